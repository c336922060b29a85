"""Estimates and the run over missing stages, with costs worked out by hand."""

import json
import os
import shutil
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from persona_coupling import machine, processes, progress
from persona_coupling.errors import UserError
from persona_coupling.profiles import ModelValues
from persona_coupling.progress import Speeds
from persona_coupling.store import Lab, Stage, Store, Work, in_order

Usage = namedtuple("Usage", "total used free")

PLAIN = "cpu with bf16" if machine.cpu_has_fast_bf16() else "cpu"


@dataclass(frozen=True)
class Job(Stage):
    name: str
    parent: Stage | None = None
    tokens: int = 0
    megabytes: float = 1.0
    kind: ClassVar[str] = "job"

    def build(self, folder, lab):
        if self.parent is not None:
            assert lab.store.has(self.parent)
        for fraction in (0.5, 1.0):
            lab.report(fraction)
        (folder / "done").write_text(str(time.time_ns()))

    def work(self):
        return Work(trained=self.tokens, megabytes=self.megabytes)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "root")


@pytest.fixture
def speeds(tmp_path):
    return Speeds(tmp_path, "cpu")


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
    progress.build(progress.plan(stages, store, speeds), store, "cpu", speeds)
    assert all(store.has(stage) for stage in stages)
    shown = capsys.readouterr().out
    assert "3/3" in shown
    assert shown.rstrip().endswith("3 stages made.")
    times = {s.name: int((store.folder(s) / "done").read_text()) for s in stages}
    assert times["first"] < times["second"] < times["third"]
    factors = json.loads((tmp_path / "speeds.json").read_text())
    assert list(factors) == [f"{PLAIN}/Job/1"]
    assert factors[f"{PLAIN}/Job/1"] > 0
    progress.build(progress.plan(stages, store, speeds), store, "cpu", speeds)
    assert {s.name: int((store.folder(s) / "done").read_text()) for s in stages} == times


def test_a_stage_that_another_process_made_is_not_learnt_from(store, speeds, tmp_path):
    job = Job("a")
    planned = progress.plan([job], store, speeds)
    progress.Lab(store).folder(job)
    progress.build(planned, store, "cpu", speeds)
    assert not (tmp_path / "speeds.json").exists()


def test_running_lab_builds(store):
    lab = progress.running_lab(store, "cpu")
    assert (lab.folder(Job("a")) / "done").is_file()


@dataclass(frozen=True)
class Broken(Stage):
    kind: ClassVar[str] = "job"

    def build(self, folder, lab):
        raise UserError("mend this")


def test_workers_build_parents_first_and_each_once(store, speeds):
    stages = chain()
    progress.build(progress.plan(stages, store, speeds), store, "cpu", speeds, workers=2)
    times = {s.name: int((store.folder(s) / "done").read_text()) for s in stages}
    assert times["first"] < min(times["second"], times["third"])


def test_an_error_in_a_worker_stops_the_run_and_keeps_what_is_finished(store, speeds):
    """One worker's error is the run's, with its own message; what rests on nothing broken and was made is kept."""
    child = Job("child", Broken())
    planned = progress.plan([Job("a"), *in_order([child])], store, speeds)
    with pytest.raises(UserError, match="mend this"):
        progress.build(planned, store, "cpu", speeds, workers=2)
    assert store.has(Job("a"))
    assert not store.has(child)


@dataclass(frozen=True)
class Cell(Stage):
    """A stage that can be built together with others of its base; member 13 fails."""

    member: int
    parent: Stage | None = None
    base: str = "one"
    kind: ClassVar[str] = "job"

    def build(self, folder, lab):
        (folder / "done").write_text("alone")
        return {"how": "alone"}

    def stack_key(self):
        return self.base

    @staticmethod
    def build_together(stages, folders, lab):
        for folder in folders:
            (folder / "done").write_text(" ".join(sorted(str(s.member) for s in stages)))
        return [UserError("unlucky") if s.member == 13 else {"how": f"x{len(stages)}"} for s in stages]


def members(made):
    return [[getattr(s, "member", s) for s in group] for group in made]


def test_cells_that_are_ready_are_grouped():
    cells = [Cell(n) for n in range(5)] + [Cell(9, base="other")]
    assert members(progress.groups(cells, [], 4)) == [[0, 1, 2, 3]], "one stack at a time, the largest"
    assert members(progress.groups(cells, [], 1)) == [[0], [1], [2], [3], [4], [9]]
    job = Job("a")
    assert members(progress.groups([*cells, job], [Cell(7)], 4)) == [[job]], "a stack is running"


def test_a_stack_waits_for_those_who_come_soon():
    """For cells that wait for a job, not for those that wait for another cell; a full stack waits for nobody."""
    job = Job("a")
    soon, late = Cell(1, job), Cell(2, Cell(0))
    assert members(progress.groups([Cell(0), soon, job], [], 4)) == [[job]]
    assert members(progress.groups([Cell(0), soon], [job], 4)) == []
    assert members(progress.groups([Cell(0), late], [], 4)) == [[0]]
    assert members(progress.groups([Cell(0), Cell(3), soon], [job], 2)) == [[0, 3]]


def test_stacks_are_built_in_workers_and_a_failing_member_is_alone(store, speeds):
    """Cells 0, 1 and 13 in one stack; what rests on a finished cell follows, and the error is the run's."""
    cells = [Cell(0), Cell(1), Cell(13)]
    late = Cell(4, cells[0])
    stages = in_order([*cells, late, Job("a")])
    with pytest.raises(UserError, match="unlucky"):
        progress.build(progress.plan(stages, store, speeds), store, "cpu", speeds, workers=2, stack=4)
    assert [store.has(stage) for stage in (*cells, late, Job("a"))] == [True, True, False, True, True]
    assert store.manifest(cells[0])["provenance"]["how"] == "x3"
    assert (store.folder(cells[1]) / "done").read_text() == "0 1 13"
    assert store.manifest(late)["provenance"]["how"] == "alone"


@dataclass(frozen=True)
class Threads(Stage):
    """Writes how many threads its worker's BLAS may start."""

    name: str
    kind: ClassVar[str] = "threads"

    def build(self, folder, lab):
        (folder / "blas").write_text(os.environ.get(processes.BLAS[0], "unset"), encoding="utf-8")


def test_workers_share_the_cores_out_to_their_blas(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv(processes.BLAS[0], "64")
    store, stages = Store(tmp_path / "store"), [Threads("a"), Threads("b")]
    speeds = progress.Speeds(store.root, "cpu")
    progress.build(progress.plan(stages, store, speeds), store, "cpu", speeds, workers=2)
    assert [(store.folder(stage) / "blas").read_text() for stage in stages] == ["3", "3"]
    assert os.environ[processes.BLAS[0]] == "64"


@dataclass(frozen=True)
class Crowded(Stage):
    """Finds the card full so many times; every try is counted in a file."""

    tries: str
    times: int
    words: str = ""  # of CUDA; none: torch's own error
    together: bool = False
    kind: ClassVar[str] = "crowded"

    def stack_key(self):
        return "crowded" if self.together else None

    @staticmethod
    def build_together(stages, folders, lab):
        return [RuntimeError(stage.words) for stage in stages]

    def build(self, folder, lab):
        with open(self.tries, "a", encoding="utf-8") as handle:
            handle.write("x")
        if len(Path(self.tries).read_text(encoding="utf-8")) <= self.times:
            raise RuntimeError(self.words) if self.words else torch.OutOfMemoryError("out of memory")


CAPTURING = "CUDA error: operation not permitted when stream is capturing"


@pytest.mark.parametrize("words", ["", "CUDA error: out of memory", CAPTURING], ids=["torch", "cuda", "captured"])
@pytest.mark.parametrize(("times", "made"), [(0, True), (2, True), (progress.PATIENCE, False)])
def test_a_full_card_is_waited_for_but_not_for_ever(tmp_path, monkeypatch, times, made, words):
    monkeypatch.setattr(progress, "WAIT", 0.0)
    lab, stage = Lab(Store(tmp_path / "store")), Crowded(str(tmp_path / "tries"), times, words)
    if made:
        progress._patiently(lab, stage)
    else:
        with pytest.raises(RuntimeError, match=words or "out of memory"):
            progress._patiently(lab, stage)
    assert lab.store.has(stage) == made
    assert len((tmp_path / "tries").read_text()) == min(times + 1, progress.PATIENCE)


@pytest.mark.parametrize("words", [CAPTURING, "another error"])
def test_members_of_a_stack_that_found_the_card_full_are_made_alone(tmp_path, words):
    stages = [Crowded(str(tmp_path / f"tries{i}"), 0, words, together=True) for i in range(2)]
    _, errors = progress._make(stages, tmp_path / "store", "cpu")
    made = [Store(tmp_path / "store").has(stage) for stage in stages]
    assert made == [words == CAPTURING] * 2
    assert len(errors) == (0 if words == CAPTURING else 2)
