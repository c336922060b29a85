"""A real Ray cluster of several raylets on this machine, and what happens to it: another version, a kill, a full disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cluster_stages import FULL, Joined, Killed, Large, Step, Wrong

from persona_coupling import cli, cluster, cluster_nodes, progress
from persona_coupling.cluster_nodes import Order
from persona_coupling.errors import UserError
from persona_coupling.profiles import ClusterValues
from persona_coupling.store import Store, in_order
from persona_coupling.study import Design, Study

ONE = ClusterValues(cpus=1.0, gpus=0.0, stack=1)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A head that computes nothing and four nodes of one core each: two fit ones that say they have a card, one with
    another library version, one with a full disk. Each has a cache of its own."""
    pytest.importorskip("ray", reason="Ray is not installed: `nox -s tests` installs it, or the extra `cluster`")
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("nodes")
    other = folder / "other" / "peft-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    source = os.pathsep.join([str(Path(cluster.__file__).parents[1]), str(Path(__file__).parent)])
    plain = {"PYTHONPATH": source, "PERSONA_COUPLING_ROOT": str(folder)}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "env_vars": plain})
    for name, more in {
        "one": {},
        "two": {},
        "old": {"PYTHONPATH": f"{other.parent}{os.pathsep}{source}"},
        "full": {FULL: "1"},
    }.items():
        own = {"PERSONA_COUPLING_CACHE": str(folder / name)}
        made.add_node(wait=False, num_cpus=1, num_gpus=int(not more), env_vars={**plain, **own, **more})
    made.wait_for_nodes()
    yield made
    made.shutdown()


def run(nodes, stages, tmp_path, values=ONE, **more):
    store = Store(tmp_path / "shared")
    speeds = progress.Speeds(store.root, "cpu")
    planned = progress.plan(in_order(stages), store, speeds)
    return store, cluster.build(planned, store, speeds, values, address=nodes.address, **more)


def test_a_run_survives_a_kill_a_full_disk_and_a_node_of_another_version(nodes, tmp_path, capsys):
    """One run: a worker kills itself, a node has no room, a node has another library, a stage cannot be made. All that
    does not rest on the last is made, once; parents first; the error is the stage's own."""
    log = str(tmp_path / "log")
    first = Step("first", log)
    killed = Killed("killed", log, (first,))
    large = [Large(f"large {n}", log, (first,)) for n in range(6)]
    last = Step("last", log, (killed, *large))
    wrong = Wrong("wrong", log)
    orphan = Step("orphan", log, (wrong,))
    with pytest.raises(UserError, match="mend this"):
        run(nodes, [last, orphan], tmp_path)
    store = Store(tmp_path / "shared")
    assert all(store.fetch(stage) for stage in (first, killed, *large, last))
    assert not store.has(orphan)
    built = Path(log).read_text().splitlines()
    assert Counter(built) == Counter(["first", "killed", "last", *(stage.name for stage in large)])
    assert (built[0], built[-1]) == ("first", "last")
    assert Path(log + ".killed").is_file()
    assert Path(log + ".full").is_file(), "the full node was asked"
    said = capsys.readouterr().out
    assert "is refused: has peft 0.0.1, the driver " in said
    assert "is refused: No space left on the disk that holds" in said
    assert not [path for path in store.root.glob("*/.*") if path.is_dir()], "a half-written artifact is left"


@pytest.mark.end_to_end
def test_a_trained_cell_is_the_same_bytes_through_an_exchange(nodes, lab, tmp_path):
    """Model, rows, training, merge, samples: on nodes that share no folder, and in this process."""
    study = Study.open("smoke", seeds=[0])
    cell = study.cell("one", study.couple(study.raw, study.stale_text(seed=0), study.profile.scratch, seed=0), seed=0)
    stages = Design([cell]).stages()
    store, summary = run(nodes, stages, tmp_path, exchange=f"file://{tmp_path / 'exchange'}")
    assert "stages" in summary
    for stage in stages:
        lab.folder(stage)
        ours, theirs = lab.store.manifest(stage), store.manifest(stage)
        for name in ours["files"]:
            if not name.endswith("adapter_config.json"):  # its order is the hash seed's, which a test has not settled
                assert theirs["files"][name] == ours["files"][name], (stage, name)


def test_shares_of_a_card_and_groups_that_are_trained_together(nodes, tmp_path, capsys):
    """Half a card each on two nodes: four places. Groups of two; one member fails, and only what rests on it is not made."""
    log = str(tmp_path / "log")
    cells = [Joined(name, log) for name in ("0", "1", "2", "3", "4", "5", "6", "13")]
    above = [Joined(f"above {cell.name}", log, (cell,)) for cell in (cells[0], cells[-1])]
    with pytest.raises(UserError, match="unlucky"):
        run(nodes, [*cells, *above], tmp_path, ClusterValues(cpus=0.5, gpus=0.5, stack=2))
    store = Store(tmp_path / "shared")
    assert [store.has(cell) for cell in cells] == [True] * 7 + [False]
    assert [store.has(cell) for cell in above] == [True, False]
    how = Counter(store.manifest(cell)["provenance"].get("how") for cell in cells[:-1])
    assert how == {"x2": 7}
    assert "of 4 busy" in capsys.readouterr().out


def test_no_node_that_is_fit_is_said_with_all_reasons(nodes, tmp_path):
    with pytest.raises(UserError, match=r"no node that can take a task \(64 CPU\)"):
        run(nodes, [Step("a", "log")], tmp_path, ClusterValues(cpus=64.0, gpus=0.0, stack=1))


def test_a_cluster_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    """Before anything is planned or built."""
    pytest.importorskip("ray", reason="Ray is not installed")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"  # bound, and nobody listens
        for wrong, said in (
            (address, "nothing answers"),
            ("there", "nothing answers"),
            ("ray://x:1", "on a node of the"),
        ):
            assert cli.main(["cells", "--profile", "smoke", "--cluster", wrong]) == 2
            assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--exchange", "file:///x"], "needs --cluster"), (["--cluster", "auto", "--workers", "2"], "one machine")],
)
def test_options_that_do_not_go_together_are_said(arguments, said, capsys):
    assert cli.main(["cells", "--profile", "smoke", *arguments]) == 2
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ without Ray


def test_nothing_of_ray_is_imported_without_the_option():
    code = "import sys; from persona_coupling import cli, cluster, study; cli.main(['plan', '--profile', 'smoke']); "
    code += "print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_without_ray_the_option_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"installs it.*\[cluster\]"), cluster.connected("auto"):
        pass


def test_every_difference_of_libraries_and_code_is_named():
    own = cluster_nodes.identity()
    assert cluster_nodes.difference(Order(own, "abc", "", "", "", 1)) == "", "the control"
    assert {"torch", "python", "persona_coupling/train.py", "persona_coupling/material/personas.toml"} <= set(own)
    said = cluster_nodes.difference(Order({**own, "torch": "1.0"}, "abc", "", "", "", 1))
    assert said.startswith(f"has torch {own['torch']}, the driver 1.0. Install")
    said = cluster_nodes.difference(Order({**own, "persona_coupling/train.py": "f" * 12}, "abc", "", "", "", 1))
    assert "persona_coupling/train.py" in said
    assert "the driver's abc" in said


def test_a_store_that_is_not_shared_or_does_not_lock_is_found(tmp_path):
    with cluster._probe(Store(tmp_path / "a")) as probe:
        assert cluster_nodes._shares(probe) == "", "the control"
        elsewhere = tmp_path / "b" / "locks" / probe.name
        assert "does not see the store" in cluster_nodes._shares(elsewhere)
        elsewhere.parent.mkdir(parents=True)
        elsewhere.touch()  # as a mount whose locks stay on each machine
        assert "is not held by locks" in cluster_nodes._shares(elsewhere)
        own = cluster_nodes.identity()  # a node that joins in mid-run is asked as well, at its first task
        late = Order(own, "abc", str(tmp_path / "c"), "", str(tmp_path / "c" / "locks" / "probe.lock"), 1)
        assert "does not see the store" in cluster_nodes.unfit(late)
    assert not probe.exists()


def names(groups):
    return [[stage.name for stage in group] for group in groups]


def test_groups_are_parents_first_no_larger_than_asked_and_spread_over_the_places():
    cells = [Joined(str(n), "") for n in range(6)]
    above = [Joined(f"above {n}", "", (cells[n],)) for n in range(2)]
    plain = Step("plain", "", (above[0],))
    stages = in_order([*cells, *above, plain])
    assert names(cluster.grouped(stages, 1, 1)) == [[stage.name] for stage in stages]
    assert names(cluster.grouped(stages, 4, 1)) == [["0", "1", "2", "3"], ["4", "5"], ["above 0", "above 1"], ["plain"]]
    assert names(cluster.grouped(stages, 4, 3))[:3] == [["0", "1"], ["2", "3"], ["4", "5"]]
    late = Joined("late", "", (plain,))  # behind two levels: not with those it rests on
    assert names(cluster.grouped(in_order([*cells, late]), 16, 1))[-1] == ["late"]
