"""What a command would run: how many processes, for which runs, and what is refused."""

import argparse

import pytest

from persona_coupling import machine, memory, planning, progress
from persona_coupling.errors import UserError


def asked(tmp_path, monkeypatch, start=False, **options):
    """`plan` of one experiment under the smoke profile, in an empty cache, as the command line would ask for it."""
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path))
    given = {"profile": "smoke", "seeds": "", "model": "", "only": ["00"], "anyway": True, **options}
    return planning.planned(argparse.Namespace(**given), start=start)


@pytest.mark.parametrize(
    ("tiny", "options", "workers"),
    [
        (0.1, {}, 1),  # over before processes of its own would have started
        (0.0, {}, 3),
        (0.1, {"workers": 2}, 2),
        (0.0, {"workers": 2}, 2),
        (0.0, {"cluster": "local"}, 1),
    ],
)
def test_a_run_on_a_cpu_has_the_machines_workers(tmp_path, monkeypatch, capsys, tiny, options, workers):
    monkeypatch.setattr(progress, "TINY", tiny)
    with machine.tuned(workers=3):
        made = asked(tmp_path, monkeypatch, **options)
    assert made.settings.workers == workers
    assert made.speeds.sharing == workers
    assert "estimated:" in capsys.readouterr().out


def test_a_large_model_is_built_by_one_process_on_any_machine():
    assert progress.workers(machine.machine("cpu"), 5.0) == 1
    assert progress.workers(machine.machine("cpu"), 5.0, 2) == 2


def test_too_little_memory_for_all_workers_is_said_but_refuses_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "TINY", 0.0)
    monkeypatch.setattr(memory, "free", lambda _device: 2e6)
    with machine.tuned(workers=3):
        asked(tmp_path, monkeypatch, start=True)
    assert "3 processes may need" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cores", "gigabytes", "workers"), [(1, 64, 1), (2, 64, 2), (32, 64, machine.CPU_WORKERS), (8, 11, 2), (8, 2, 1)]
)
def test_cores_and_memory_bound_a_cpus_workers(monkeypatch, cores, gigabytes, workers):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(memory, "installed", lambda: gigabytes * 1e9)
    assert machine.machine("cpu").workers == workers


def test_what_shares_the_cores_is_expected_to_take_longer(tmp_path):
    """Twice as long for each of two that share them; a card is shared otherwise."""
    from persona_coupling.store import Work

    work = Work(trained=10_000)
    alone, shared = (progress.Speeds(tmp_path, "cpu", sharing=n)._guess(work) for n in (1, 2))
    assert shared == pytest.approx(2 * alone, rel=0.01)
    assert progress.Speeds(tmp_path, "cuda", sharing=12)._guess(work) == progress.Speeds(tmp_path, "cuda")._guess(work)


def test_seeds_are_integers_with_commas():
    assert planning.seeds("0, 2,") == [0, 2]
    with pytest.raises(UserError, match="give integers with commas"):
        planning.seeds("one")


def test_a_run_that_is_cut_off_has_whole_seeds(tmp_path, monkeypatch):
    """What the second seed shares with the first is the first's; parents never come after what rests on them."""
    made = asked(tmp_path, monkeypatch, seeds="4,2").plan
    assert set(made.turns) == {stage.key for stage in made.stages}
    assert set(made.turns.values()) == {0, 1}
    for stage in made.stages:
        assert all(made.turns[parent.key] <= made.turns[stage.key] for parent in stage.parents())
        seed = getattr(stage, "seed", None)
        assert made.turns[stage.key] == {4: 0, 2: 1}.get(seed, made.turns[stage.key]), stage
    alone = asked(tmp_path, monkeypatch, seeds="4").plan
    assert {stage.key for stage in alone.stages} == {key for key, turn in made.turns.items() if turn == 0}
