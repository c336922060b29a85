"""The GPU's multi-process service: started for a pool and stopped with it, and done without where it does not start."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from persona_coupling import mps

# what stands in for NVIDIA's program: listens while in the foreground, and ends when another of it is told to quit
CONTROL = """#!{python}
import os, pathlib, sys, time
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
if sys.argv[1:] == ["-f"]:
    {fault}
    (folder / "control").touch()
    while not (folder / "quit").exists():
        time.sleep(0.02)
else:
    assert sys.stdin.read() == "quit\\n"
    (folder / "quit").touch()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts the stand-in on the path; `fault` is run before it listens."""
    monkeypatch.setattr(mps, "PLACES", ())
    monkeypatch.setattr(mps, "_by_name", lambda: "GPU-0123")
    monkeypatch.delenv(mps.PIPES, raising=False)

    def install(fault: str = "pass") -> None:
        program = tmp_path / mps.CONTROL
        program.write_text(CONTROL.format(python=sys.executable, fault=fault), encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").is_file() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_processes_inside_are_told_of_the_service_and_it_ends_with_them(install, monkeypatch):
    install()
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with mps.service("cuda", 4) as there:
        assert there
        folder = Path(os.environ[mps.PIPES])
        assert (folder / "control").exists()
        assert os.environ[mps.VISIBLE] == "GPU-0123"
        assert alive(started[0].pid)
    assert mps.PIPES not in os.environ
    assert not folder.exists()
    assert not alive(started[0].pid)


def test_it_ends_when_the_pool_fails(install):
    install()
    folders = []

    def pool() -> None:
        with mps.service("cuda", 4):
            folders.append(Path(os.environ[mps.PIPES]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool()
    assert not folders[0].exists()


def test_it_ends_when_its_owner_is_killed(install):
    install()
    code = (
        "import os, time\nfrom persona_coupling import mps\nmps._by_name = lambda: ''\n"
        "with mps.service('cuda', 2):\n    print(os.environ[mps.PIPES], flush=True)\n    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    folder = owner.stdout.readline().strip()

    def served() -> bool:
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{mps.PIPES}={folder}".encode() in path.read_bytes() and path.parent.name != str(owner.pid):
                    return True
            except OSError:
                continue
        return False

    assert served()
    owner.kill()
    owner.communicate()
    until = time.monotonic() + 10
    while served() and time.monotonic() < until:
        time.sleep(0.05)
    assert not served()


@pytest.mark.parametrize("fault", ["sys.exit(1)", "time.sleep(60)"], ids=["refused", "never listens"])
def test_without_it_workers_take_turns(install, monkeypatch, fault):
    monkeypatch.setattr(mps, "PATIENCE", 0.5)
    install(fault)
    said = []
    with mps.service("cuda", 4, said.append) as there:
        assert not there
        assert mps.PIPES not in os.environ
    assert len(said) == 1


@pytest.mark.parametrize(("device", "workers"), [("cpu", 4), ("cuda", 1)])
def test_nothing_is_started_for_a_cpu_or_for_one_worker(install, device, workers):
    install()
    with mps.service(device, workers) as there:
        assert not there
        assert mps.PIPES not in os.environ


def test_a_service_that_is_there_is_used(install, monkeypatch):
    install("raise AssertionError")
    monkeypatch.setenv(mps.PIPES, "/elsewhere")
    with mps.service("cuda", 4) as there:
        assert there
        assert os.environ[mps.PIPES] == "/elsewhere"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the service is its driver's")
def test_the_real_service_serves():
    """Skips where the driver has none, as in many containers."""

    def computes() -> bool:
        code = "import torch; print(float(torch.ones(8, device='cuda').sum()))"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return ran.stdout == "8.0\n"

    with mps.service("cuda", 2) as there:
        if not there:
            pytest.skip("no multi-process service here")
        assert computes()
    assert computes()
