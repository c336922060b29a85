"""The smoke study on a real cluster of several raylets: the same bytes as one process, and nothing lost to kills, a node
that goes, a second driver, a full disk. Minutes: `nox -s tests -- -m slow tests/test_cluster_faults.py`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from persona_coupling import cluster, stress

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end]
SOURCE = str(Path(cluster.__file__).parents[1])
ONLY = ["--only", "00"]


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "persona_coupling", "cells", "--profile", "smoke", *more]


def environment(root: Path) -> dict[str, str]:
    """As a user's shell; the nodes' manifests name the same checkout, see `nodes`."""
    return {**stress.environment(root), "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experiments in one process."""
    root = tmp_path_factory.mktemp("calm")
    stress.copy_inputs(root)
    done = subprocess.run(command(), env=environment(root), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


class Here:
    """A cluster on this machine whose nodes share a checkout, or have a cache each."""

    def __init__(self, root: Path, *, own_caches: bool = False) -> None:
        ray = pytest.importorskip("ray", reason="Ray is not installed: `nox -s tests` installs it")
        from ray.cluster_utils import Cluster

        assert ray is not None
        self.root, self.own_caches = root, own_caches
        stress.copy_inputs(root)
        head = {"num_cpus": 0, "include_dashboard": False, "env_vars": self.variables("head")}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address

    def variables(self, name: str) -> dict[str, str]:
        plain = {"PYTHONPATH": SOURCE, "PERSONA_COUPLING_ROOT": str(self.root)}
        return plain | ({"PERSONA_COUPLING_CACHE": str(self.root / f"cache-{name}")} if self.own_caches else {})

    def add(self, name: str):
        return self.cluster.add_node(num_cpus=1, env_vars=self.variables(name))

    def start(self, *more: str) -> subprocess.Popen[str]:
        full = command("--cluster", self.address, *more)
        return subprocess.Popen(
            full, env=environment(self.root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def half_written(self) -> list[Path]:
        """Temporary folders of trainings that are under way."""
        return [path for path in self.root.glob("*/change/.*") if path.is_dir()]


@pytest.fixture
def here(tmp_path: Path, request: pytest.FixtureRequest):
    made = Here(tmp_path / "root", own_caches=getattr(request, "param", False))
    yield made
    made.cluster.shutdown()


def until(condition, process: subprocess.Popen[str] | None = None, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        assert process is None or process.poll() is None, process.communicate()[0] if process else ""
        time.sleep(0.02)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said[-4000:]
    return said


def same(calm: Path, root: Path, name: str = "*") -> None:
    """Results and manifests, which name the hash of every file, are those of the run in one process, clocks aside."""
    there = {str(path.relative_to(root)) for path in root.glob(f"experiments/{name}/results/**/*")}
    assert len(there) > 5
    names = {str(p.relative_to(root)) for p in root.glob("artifacts/*/*/manifest.json")}
    different = [n for n in stress.differences(calm, root) if n in there | names]
    assert not different


@pytest.mark.parametrize("here", [False, True], indirect=True, ids=["shared folder", "exchange"])
def test_the_smoke_study_is_the_same_bytes_as_in_one_process(here: Here, calm: Path) -> None:
    here.add("one")
    here.add("two")
    exchange = ["--exchange", f"file://{here.root / 'exchange'}"] if here.own_caches else []
    said = finished(here.start(*exchange))
    same(calm, here.root)
    assert len(stress.manifests(here.root)) == len(stress.manifests(calm))
    made = [int(count) for count in re.findall(r"\) +(\d+) stages", said.rpartition("stages made on Ray")[2])]
    assert len(made) == 2
    assert min(made) > 30, "both nodes worked"
    assert not stress.leftovers(here.root)


@pytest.mark.parametrize("here", [False, True], indirect=True, ids=["shared folder", "exchange"])
def test_a_worker_killed_in_training_and_a_node_that_goes_cost_nothing_finished(here: Here, calm: Path) -> None:
    one, _ = here.add("one"), here.add("two")
    exchange = ["--exchange", f"file://{here.root / 'exchange'}"] if here.own_caches else []
    process = here.start(*ONLY, *exchange)
    until(lambda: len(list(here.root.glob("*/change/*/manifest.json"))) >= 2, process)
    until(here.half_written, process)
    victim = here.half_written()[0]
    os.kill(int(victim.name.rpartition(".")[2]), signal.SIGKILL)
    killed = _kept(here.root)
    until(lambda: len(_kept(here.root)) > len(killed) + 5, process)
    before = _kept(here.root)
    here.cluster.remove_node(one, allow_graceful=False)
    finished(process)
    after = _kept(here.root)
    assert len(before) >= 7
    assert killed.items() <= before.items() <= after.items(), "a finished artifact was made again"
    same(calm, here.root, "00_replication")


def _kept(root: Path) -> dict[str, str]:
    """What counts as finished: manifests of the shared folder, or pointers of the exchange."""
    if (root / "exchange").is_dir():
        return {str(path.parent.relative_to(root)): path.read_text() for path in root.glob("exchange/*/*/whole.json")}
    return stress.manifests(root)


def test_two_drivers_on_one_store_share_the_work(here: Here, calm: Path) -> None:
    here.add("one")
    here.add("two")
    processes = [here.start(*ONLY) for _ in range(2)]
    for process in processes:
        finished(process)
    same(calm, here.root, "00_replication")
    assert not stress.leftovers(here.root)


def test_a_disk_that_is_really_full_takes_one_node_out(tmp_path: Path, calm: Path) -> None:
    """A raylet in a mount namespace of its own, whose cache is a file system of half a megabyte."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("this machine does not let a process have a mount namespace of its own")
    here = Here(tmp_path / "root", own_caches=True)
    small = here.root / "cache-small"
    small.mkdir()
    here.add("large")
    start = f"{sys.executable} -m ray.scripts.scripts start --address={here.address} --num-cpus=1 --block"
    raylet = subprocess.Popen(
        ["unshare", "-Urm", "sh", "-c", f"mount -t tmpfs -o size=500k tmpfs {small} && exec {start}"],
        env={**os.environ, **here.variables("small")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: len(here.cluster.global_state._live_node_ids()) == 3)
        said = finished(here.start(*ONLY, "--exchange", f"file://{here.root / 'exchange'}"))
    finally:
        os.killpg(raylet.pid, signal.SIGTERM)
        raylet.wait(30)
        here.cluster.shutdown()
    assert f"is refused: No space left on the disk that holds {small}" in said
    same(calm, here.root, "00_replication")


def test_the_slurm_script_of_the_page_runs(tmp_path: Path) -> None:
    """With stand-ins for `srun` and `scontrol`, on this host: a head and one other node, of one core each."""
    pytest.importorskip("ray", reason="Ray is not installed: `nox -s tests` installs it")
    page = (Path(__file__).parents[1] / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
    script = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)[0]
    root, tools = tmp_path / "root", tmp_path / "tools"
    root.mkdir()
    stress.copy_inputs(root)
    tools.mkdir()
    stand_ins = {
        "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": "echo 127.0.0.1",
        "ray": f'exec {sys.executable} -m ray.scripts.scripts "$@"',
        "python": f'exec {sys.executable} "$@"',
    }
    for name, line in stand_ins.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    variables = {
        "SLURM_SUBMIT_DIR": str(root),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "PROFILE": "smoke",
        "OPTIONS": "--only 00",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        ["bash", "-c", script],
        env={**environment(root), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        code = process.wait(500)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # what SLURM does at a job's end
    said = process.communicate()[0]
    assert code == 0, said[-4000:]
    assert "stages made on Ray" in said
    assert (root / "paper" / "paper-smoke.pdf").is_file()


def test_one_big_box_leaves_nothing_in_the_users_home(tmp_path: Path, calm: Path) -> None:
    """Ray for the time of the run; its token is in no file that later clusters of the user would ask for."""
    pytest.importorskip("ray", reason="Ray is not installed: `nox -s tests` installs it")
    root, home = tmp_path / "root", tmp_path / "home"
    home.mkdir()
    stress.copy_inputs(root)
    done = subprocess.run(
        command("--cluster", "local", *ONLY),
        env={**environment(root), "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (home / ".ray").exists()
    same(calm, root, "00_replication")
