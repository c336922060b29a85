"""Estimates and the run over missing stages, with costs worked out by hand."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from jobs import Job

from persona_coupling import machine, progress
from persona_coupling.errors import UserError
from persona_coupling.profiles import ModelValues
from persona_coupling.progress import Speeds
from persona_coupling.store import in_order

ALONE = replace(machine.machine("cpu"), workers=1)
Usage = namedtuple("Usage", "total used free")

PLAIN = "cpu with bf16" if machine.cpu_has_fast_bf16() else "cpu"


def test_a_first_guess_is_tokens_over_speed(tmp_path):
    per_second = progress.SPEEDS[PLAIN]["trained"]
    assert Speeds(tmp_path, "cpu").seconds(Job("a", tokens=1000)) == pytest.approx(1000 / per_second, abs=0.1)
    assert Speeds(tmp_path, "cpu", 50.0).seconds(Job("a", tokens=1000)) == pytest.approx(50_000 / per_second, abs=0.1)
    assert Speeds(tmp_path, "cuda:1").seconds(Job("a", tokens=10**6)) < Speeds(tmp_path, "cpu").seconds(
        Job("a", tokens=10**6)
    )


def test_observations_correct_the_guess_and_are_kept(tmp_path, speeds):
    job = Job("a", tokens=10_000)
    guess = speeds.seconds(job)
    speeds.observe(job, 3 * guess)
    assert speeds.seconds(job) == pytest.approx(3 * guess)
    speeds.observe(job, guess)
    assert speeds.seconds(job) == pytest.approx((0.7 * 3 + 0.3 * 1) * guess)
    assert Speeds(tmp_path, "cpu").seconds(job) == pytest.approx(2.4 * guess)
    assert Speeds(tmp_path, "cpu", 2.0).seconds(job) == pytest.approx(2 * guess, abs=0.1)  # another model: not its own
    assert Speeds(tmp_path / "other", "cpu").seconds(job) == pytest.approx(guess)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_unreadable_observations_cost_accuracy_only(tmp_path, speeds, text):
    guess = speeds.seconds(Job("a", tokens=100))
    (tmp_path / "speeds.json").write_text(text)
    assert Speeds(tmp_path, "cpu").seconds(Job("a", tokens=100)) == guess


def test_observations_that_cannot_be_written_cost_accuracy_only(tmp_path):
    (tmp_path / "file").write_text("")
    speeds = Speeds(tmp_path / "file", "cpu")
    speeds.observe(Job("a", tokens=100), 5.0)
    assert speeds.seconds(Job("a", tokens=100)) == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("kind", "name", "ratio"),
    [
        ("wheel", "SmolLM2-135M-Instruct", 1.0),
        ("hub", "Qwen/Qwen2.5-7B-Instruct", 7000 / 135),
        ("hub", "Qwen2.5-0.5B-Instruct", 500 / 135),
        ("local", "mine", 1.0),
        ("tiny", "random tiny Llama", 0.002),
    ],
)
def test_parameters_ratio(kind, name, ratio):
    assert progress.parameters_ratio(ModelValues(kind=kind, name=name)) == pytest.approx(ratio)


def chain():
    first = Job("first", tokens=22_000, megabytes=10.0)
    return in_order([Job("second", first, 44_000, 20.0), Job("third", first, 0, 30.0)])


def test_plan_counts_what_is_missing(store, speeds, tmp_path):
    stages = chain()
    whole = progress.plan(stages, store, speeds)
    assert whole.missing == stages
    assert whole.megabytes == 60
    assert whole.seconds == pytest.approx(66_000 / progress.SPEEDS[PLAIN]["trained"], abs=0.3)
    assert "3 in all,    0 cached,    3 to make" in whole.text()
    assert f"estimated: {whole.seconds / 60:.0f} min, 60 MB" in whole.text()
    progress.Lab(store).folder(stages[0])
    rest = progress.plan(stages, store, speeds)
    assert rest.missing == stages[1:]
    assert rest.megabytes == 50
    assert "3 in all,    1 cached,    2 to make" in rest.text()


def test_workers_share_the_seconds_but_not_those_of_a_chain(store, speeds, tmp_path):
    """Chain: 22,000 and 44,000 tokens of 66,000, which two workers do not shorten; of four such chains they do."""
    per_second = progress.SPEEDS[PLAIN]["trained"]
    assert progress.plan(chain(), store, speeds, workers=2).seconds == pytest.approx(66_000 / per_second, abs=0.3)
    many = [Job(f"job {n}", tokens=66_000) for n in range(4)]
    assert progress.plan(many, store, speeds, workers=2).seconds == pytest.approx(2 * 66_000 / per_second, abs=0.3)
    on_a_card = Speeds(tmp_path, "cuda")
    alone = sum(on_a_card.seconds(job) for job in many)
    assert progress.plan(many, store, on_a_card, workers=4).seconds == pytest.approx(alone / (4 * progress.SHARED))


@pytest.mark.parametrize(("free", "enough"), [(180, True), (160, False)])
def test_22_a_disk_too_small_is_refused_before_the_run(store, speeds, monkeypatch, free, enough):
    """Failure 22: 60 MB, a fifth more and 100 MB to spare: 172 MB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**12, 0, free * 2**20))
    if enough:
        progress.plan(chain(), store, speeds)
        return
    with pytest.raises(UserError, match=r"needs about 60 MB.*160 MB free.*PERSONA_COUPLING_CACHE"):
        progress.plan(chain(), store, speeds)
    assert not store.root.exists()


def test_build_makes_every_stage_once_and_learns(store, speeds, tmp_path, capsys):
    stages = chain()
    progress.build(progress.plan(stages, store, speeds), store, ALONE, speeds)
    assert all(store.has(stage) for stage in stages)
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert shown.rstrip().endswith("3 stages made.")
    times = {s.name: int((store.folder(s) / "done").read_text()) for s in stages}
    assert times["first"] < times["second"] < times["third"]
    factors = json.loads((tmp_path / "speeds.json").read_text())
    assert list(factors) == [f"{PLAIN}/Job/1"]
    assert factors[f"{PLAIN}/Job/1"] > 0
    progress.build(progress.plan(stages, store, speeds), store, ALONE, speeds)
    assert {s.name: int((store.folder(s) / "done").read_text()) for s in stages} == times


def test_the_eta_is_the_plan_at_first_and_the_pace_of_the_run_later():
    """100 expected seconds of work, planned to take 50 side by side: nothing done after 20 leaves the plan, 5 half of it,
    and 50 after 80 say that as much is left."""

    def left(bar, done, elapsed):
        bar.n, bar.start_t = done, bar._time() - elapsed
        told = bar.format_dict
        return (told["total"] - told["n"]) / told["rate"]

    with progress.seconds_bar({"a": 60.0, "b": 40.0}, seconds=50.0, described=8) as bar:
        assert left(bar, 0.0, 20.0) == pytest.approx(50, rel=1e-3)
        assert left(bar, 5.0, 20.0) == pytest.approx(95 / (0.5 * 5 / 20 + 0.5 * 2), rel=1e-3)
        assert left(bar, 50.0, 80.0) == pytest.approx(80, rel=1e-3)
        bar.n = 100.0


def test_a_stage_that_another_process_made_is_not_learnt_from(store, speeds, tmp_path):
    job = Job("a")
    planned = progress.plan([job], store, speeds)
    progress.Lab(store).folder(job)
    progress.build(planned, store, ALONE, speeds)
    assert not (tmp_path / "speeds.json").exists()


def test_running_lab_builds(store):
    lab = progress.running_lab(store, "cpu")
    assert (lab.folder(Job("a")) / "done").is_file()
