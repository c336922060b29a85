"""What a command would run: how many processes, for which runs, and what is refused."""

import argparse

import pytest

from persona_coupling import machine, memory, planning, progress
from persona_coupling.errors import UserError


def asked(tmp_path, monkeypatch, **options):
    """`plan` of one experiment under the smoke profile, in an empty cache, as the command line would ask for it."""
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path))
    given = {"profile": "smoke", "seeds": "", "model": "", "only": ["00"], "anyway": True}
    return planning.planned(argparse.Namespace(**given, **options))


@pytest.mark.parametrize(
    ("worth", "options", "workers"),
    [
        (1e9, {}, 1),  # too short a run for processes of its own
        (0.0, {}, 3),
        (1e9, {"workers": 2}, 2),
        (0.0, {"workers": 2}, 2),
        (0.0, {"cluster": "local"}, 1),
    ],
)
def test_a_long_run_on_a_cpu_has_the_machines_workers(tmp_path, monkeypatch, capsys, worth, options, workers):
    monkeypatch.setattr(progress, "WORTH", worth)
    with machine.tuned(workers=3):
        made = asked(tmp_path, monkeypatch, **options)
    assert made.settings.workers == workers
    assert made.speeds.sharing == workers
    assert "estimated:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cores", "gigabytes", "workers"), [(1, 64, 1), (2, 64, 2), (32, 64, machine.CPU_WORKERS), (8, 11, 2), (8, 2, 1)]
)
def test_cores_and_memory_bound_a_cpus_workers(monkeypatch, cores, gigabytes, workers):
    monkeypatch.setattr(machine.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(memory, "free", lambda _device: gigabytes * 1e9)
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
