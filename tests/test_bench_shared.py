"""The bench of processes that share a device, on a model of toy size, and what is written of it."""

import pytest

from persona_coupling import bench_shared, outputs, paths
from persona_coupling.bench_shared import Mix
from persona_coupling.errors import UserError

MIXES = (Mix(1, 40), Mix(1, 40, stacks=1), Mix(trainers=1))


def test_every_mix_is_measured_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "shared.json"
    bench_shared.run(path, "smoke", MIXES, seconds=1.0)
    found = outputs.read(path)
    assert list(found["measured"]) == ["1x40/0/0", "1x40/1/0", "0x616/0/1"]
    alone, beside, trainer = found["measured"].values()
    assert alone["evaluation"] > 0
    assert (alone["stack"], alone["trainer_step"]) == (None, None)
    assert beside["evaluation"] > 0
    assert beside["stack"] == pytest.approx(beside["seconds"]), "one stack, from its start to its end"
    assert 0 < trainer["trainer_step"] < trainer["seconds"]
    assert found["provenance"]["device"]
    text = "\n".join(bench_shared.section(found))
    assert f"| 1 of 40 | 1 | – | {beside['evaluation']:.2f} | {beside['stack']:.1f} | – |" in text


def test_a_process_that_failed_or_hangs_ends_the_bench(monkeypatch):
    shared = bench_shared.Shared(2)
    shared.ready[:] = [bench_shared.RESTING, bench_shared.FAILED]
    with pytest.raises(UserError, match="No start: a process failed"):
        shared.rest("start")
    monkeypatch.setattr(bench_shared, "PATIENCE", 0.1)
    shared.ready[1] = bench_shared.WORKING
    with pytest.raises(UserError, match="No start: not in 0 s"):
        shared.rest("start")


def test_the_committed_measurements_are_those_that_machine_names():
    """Six evaluations of 616 answers pass eight of 160 by 1.8, and none of the two is bound by its processes."""
    measured = outputs.read(paths.repository() / "docs" / "measured" / "shared.json")["measured"]
    assert round(measured["6x616/0/0"]["evaluation"], 1) == 0.8
    assert round(measured["8x160/0/0"]["evaluation"], 1) == 1.5
    assert measured["0x616/1/0"]["busy"] < 50, "a stack alone leaves the card idle"
