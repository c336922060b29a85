"""Stages side by side: what starts next, in which group, in which process, and what happens when one fails."""

import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jobs import Job

from persona_coupling import machine as machine_module
from persona_coupling import mps, processes, progress, room, side_by_side
from persona_coupling.errors import UserError
from persona_coupling.machine import machine
from persona_coupling.store import Lab, Stage, Store, Work, in_order


def sharing(**settings):
    return replace(machine("cpu"), **{"workers": 1, **settings})


@dataclass(frozen=True)
class Broken(Stage):
    kind: ClassVar[str] = "job"

    def build(self, folder, lab):
        raise UserError("mend this")


def test_workers_build_parents_first_and_each_once(store, speeds):
    first = Job("first")
    stages = in_order([Job("second", first), Job("third", first)])
    progress.build(progress.plan(stages, store, speeds), store, sharing(workers=2), speeds)
    times = {s.name: int((store.folder(s) / "done").read_text()) for s in stages}
    assert times["first"] < min(times["second"], times["third"])


def test_an_error_in_a_worker_stops_the_run_and_keeps_what_is_finished(store, speeds):
    """One worker's error is the run's, with its own message; what rests on nothing broken and was made is kept."""
    child = Job("child", Broken())
    planned = progress.plan([Job("a"), *in_order([child])], store, speeds)
    with pytest.raises(UserError, match="mend this"):
        progress.build(planned, store, sharing(workers=2), speeds)
    assert store.has(Job("a"))
    assert not store.has(child)


@dataclass(frozen=True)
class Cell(Stage):
    """A stage that can be built together with others of its base; member 13 fails."""

    member: int
    parent: Stage | None = None
    base: str = "one"
    steps: int = 1
    kind: ClassVar[str] = "job"

    def work(self):
        return Work(trained=self.steps)

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
    assert members(side_by_side.groups(cells, [], 4)) == [[0, 1, 2, 3]], "one stack at a time, the largest"
    assert members(side_by_side.groups(cells, [], 1)) == [[0], [1], [2], [3], [4], [9]]
    job = Job("a")
    assert members(side_by_side.groups([*cells, job], [[Cell(7)]], 4)) == [[job]], "a stack is running"


def test_a_stack_waits_for_those_who_come_soon():
    """For cells that wait for a job, not for those that wait for another cell; a full stack waits for nobody."""
    job = Job("a")
    soon, late = Cell(1, job), Cell(2, Cell(0))
    assert members(side_by_side.groups([Cell(0), soon, job], [], 4)) == [[job]]
    assert members(side_by_side.groups([Cell(0), soon], [[job]], 4)) == []
    assert members(side_by_side.groups([Cell(0), late], [], 4)) == [[0]]
    assert members(side_by_side.groups([Cell(0), Cell(3), soon], [[job]], 2)) == [[0, 3]]


def test_stacks_are_built_in_workers_and_a_failing_member_is_alone(store, speeds):
    """Cells 0, 1 and 13 in one stack; what rests on a finished cell follows, and the error is the run's."""
    cells = [Cell(0), Cell(1), Cell(13)]
    late = Cell(4, cells[0])
    stages = in_order([*cells, late, Job("a")])
    with pytest.raises(UserError, match="unlucky"):
        progress.build(progress.plan(stages, store, speeds), store, sharing(workers=2, stack=4), speeds)
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
    progress.build(progress.plan(stages, store, speeds), store, sharing(workers=2), speeds)
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
@pytest.mark.parametrize(("times", "made"), [(0, True), (2, True), (side_by_side.PATIENCE, False)])
def test_a_full_card_is_waited_for_but_not_for_ever(tmp_path, monkeypatch, times, made, words):
    monkeypatch.setattr(side_by_side, "WAIT", 0.0)
    lab, stage = Lab(Store(tmp_path / "store")), Crowded(str(tmp_path / "tries"), times, words)
    if made:
        side_by_side._patiently(lab, stage)
    else:
        with pytest.raises(RuntimeError, match=words or "out of memory"):
            side_by_side._patiently(lab, stage)
    assert lab.store.has(stage) == made
    assert len((tmp_path / "tries").read_text()) == min(times + 1, side_by_side.PATIENCE)


@pytest.mark.parametrize("words", [CAPTURING, "another error"])
def test_members_of_a_stack_that_found_the_card_full_are_made_alone(tmp_path, words):
    stages = [Crowded(str(tmp_path / f"tries{i}"), 0, words, together=True) for i in range(2)]
    errors = side_by_side._make(stages, tmp_path / "store", "cpu").errors
    made = [Store(tmp_path / "store").has(stage) for stage in stages]
    assert made == [words == CAPTURING] * 2
    assert len(errors) == (0 if words == CAPTURING else 2)


def test_several_stacks_may_be_under_way():
    cells, job = [Cell(n) for n in range(5)], Job("a")
    assert members(side_by_side.groups(cells, [], 2, 2)) == [[0, 1], [2, 3]]
    assert members(side_by_side.groups([*cells, job], [[Cell(7), Cell(8)]], 2, 2)) == [[0, 1], [job]]
    assert members(side_by_side.groups([*cells, job], [[Cell(7)], [Cell(8)]], 2, 2)) == [[job]]
    soon = Cell(9, job)
    assert members(side_by_side.groups([*cells, soon], [[job]], 2, 4)) == [[0, 1], [2, 3]], "the rest waits for 9"


def test_the_bar_ends_where_it_should_although_seconds_are_rounded(store, speeds):
    """The longest first: 0.4 + 0.2 + 0.1 is a little more than 0.1 + 0.4 + 0.2. tqdm would warn, and warnings are errors."""
    jobs, seconds = [Job(name) for name in "abc"], (0.1, 0.4, 0.2)
    planned = progress.plan(jobs, store, speeds)
    planned = replace(planned, costs=dict(zip([job.key for job in jobs], seconds, strict=True)))
    progress.build(planned, store, sharing(workers=1, stack=2), speeds)
    assert all(store.has(job) for job in jobs)


def test_cells_of_one_length_share_a_stack_and_shorter_ones_fill_it_up():
    """As they come, each stack of two would have a long and a short one, and last as long as the long one."""
    cells = [Cell(n, steps=9 if n % 2 else 2) for n in range(9)] + [Cell(11, steps=9)]
    assert members(side_by_side.groups(cells, [], 2, 9)) == [[1, 3], [5, 7], [11, 0], [2, 4], [6, 8]]
    assert members(side_by_side.groups(cells, [], 4, 9)) == [[1, 3, 5, 7], [11, 0, 2, 4], [6, 8]]
    assert members(side_by_side.groups(cells, [], 16, 9)) == [[1, 3, 5, 7, 11, 0, 2, 4, 6, 8]]


def test_cells_of_one_turn_share_a_stack_and_the_first_turn_starts_first(store, speeds):
    cells = [Cell(n) for n in range(8)]
    ranks = {cell.key: (1 - cell.member % 2, -float(cell.member)) for cell in cells}
    assert members(side_by_side.groups(cells, [], 2, 9, ranks)) == [[5, 7], [1, 3], [4, 6], [0, 2]]
    jobs = [Job(name) for name in "abcdef"]
    planned = progress.plan(jobs, store, speeds)
    planned = replace(planned, turns={job.key: turn for turn, job in enumerate(reversed(jobs))})
    progress.build(planned, store, sharing(stack=2), speeds)
    times = [int((store.folder(job) / "done").read_text()) for job in jobs]
    assert times == sorted(times, reverse=True)


def test_what_most_rests_on_starts_first():
    """A chain of three seconds before a job of two, whatever came first; a stack counts as long as all of it lasts."""
    short, first = Job("short"), Job("first")
    second, cell = Job("second", first), Cell(3, base="one")
    stages = in_order([short, second, cell])
    costs = {short.key: 2.0, first.key: 1.0, second.key: 2.0, cell.key: 1.0}
    urgent = side_by_side.urgency(stages, costs, 4)
    assert [urgent[s.key] for s in (short, first, second, cell)] == [2.0, 3.0, 2.0, 4.0]
    assert side_by_side.urgency(stages, costs, 1)[cell.key] == 1.0
    ranks = {key: (0, -seconds) for key, seconds in urgent.items()}
    assert side_by_side.groups(stages, [], 4, 1, ranks) == [[cell], [first], [short]]
    ranks[cell.key] = (1, -4.0)
    assert side_by_side.groups(stages, [], 4, 1, ranks) == [[first], [short], [cell]], "first what is of the first turn"
    lone, pair = Cell(1, base="lone"), [Cell(5, base="pair"), Cell(6, base="pair")]
    assert members(side_by_side.groups([lone, *pair], [], 2, 1, {lone.key: (0, -9.0)})) == [[1]], (
        "the more urgent stack"
    )
    assert members(side_by_side.groups([lone, *pair], [], 2, 1)) == [[5, 6]], "or else the larger one"


@dataclass(frozen=True)
class Where(Stage):
    """Writes its process and whether that gives way on the card."""

    name: str
    base: str | None = None
    sampled: int = 0
    trained: int = 0
    kind: ClassVar[str] = "where"

    def build(self, folder, lab):
        (folder / "where").write_text(f"{os.getpid()} {os.environ.get(mps.PRIORITY, 'normal')}")

    def stack_key(self):
        return self.base

    def work(self):
        return Work(trained=self.trained, sampled=self.sampled, scored=100)

    @staticmethod
    def build_together(stages, folders, lab):
        for stage, folder in zip(stages, folders, strict=True):
            stage.build(folder, lab)
        return [{} for _ in stages]


def where(store, stages):
    """The processes that built the stages, and how they stand on the card."""
    return {tuple((store.folder(stage) / "where").read_text().split()) for stage in stages}


@pytest.mark.parametrize("shared", [True, False])
def test_stacks_have_processes_that_others_give_way_to(store, speeds, monkeypatch, shared):
    @contextmanager
    def service(device, workers, say):
        yield shared

    monkeypatch.setattr(mps, "service", service)
    monkeypatch.delenv(mps.PRIORITY, raising=False)
    alone, cells = [Where("a"), Where("b"), Where("c")], [Where("d", "one"), Where("e", "one")]
    planned = progress.plan([*alone, *cells], store, speeds)
    progress.build(planned, store, sharing(workers=2, stack=2, stacks=1), speeds)

    assert {priority for _, priority in where(store, alone)} == ({"1"} if shared else {"normal"})
    assert {priority for _, priority in where(store, cells)} == {"normal"}
    assert not shared or not {pid for pid, _ in where(store, alone)} & {pid for pid, _ in where(store, cells)}
    assert mps.PRIORITY not in os.environ


@pytest.mark.parametrize(("workers", "few"), [(3, 1), (2, 2), (2, 0)])
@pytest.mark.parametrize("large", [{"sampled": 50}, {"trained": 50}])
def test_few_processes_do_what_fills_the_card(store, speeds, workers, few, large):
    """A sampler's cache and a trainer's activations: the others never have them, unless nobody is left for all else."""
    filling, small = [Where(f"a{n}", **large) for n in range(6)], [Where(f"b{n}", sampled=5) for n in range(6)]
    planned = progress.plan([*filling, *small], store, speeds)
    name = "trainers" if "trained" in large else "samplers"
    progress.build(planned, store, sharing(workers=workers, stack=2, **{name: few}), speeds)
    filled, others = ({pid for pid, _ in where(store, stages)} for stages in (filling, small))
    if workers == 3:
        assert len(filled) == 1
        assert not filled & others
    else:
        assert len(filled | others) <= workers


@dataclass(frozen=True)
class Large(Job):
    """A stage whose work makes it a sampler or none."""

    sampled: int = 0

    def work(self):
        return Work(sampled=self.sampled, scored=100)


def test_what_the_card_has_no_room_for_waits(store, speeds, monkeypatch):
    """Samplers of 40 GB on a card of 60: one at a time, though there are two processes for them; small ones beside it."""
    monkeypatch.setattr("persona_coupling.room.SAMPLER_GB", 40.0)
    monkeypatch.setattr("persona_coupling.room.ROW_GB", 0.0)
    filling, small = [Large(f"a{n}", sampled=99) for n in range(4)], [Large(f"b{n}") for n in range(4)]
    planned, beside = progress.plan([*filling, *small], store, speeds), []

    class Watched(room.Room):
        def fits(self, group, standing):
            found = super().fits(group, standing)
            if found and not beside:
                self.observe = lambda *_: None  # a CPU has no peaks to tell
            beside.extend([[*map(room.role, [g[0] for g in standing]), room.role(group[0])]] * found)
            return found

    monkeypatch.setattr(side_by_side, "Room", Watched)
    progress.build(planned, store, sharing(workers=4, stack=2, samplers=2, gigabytes=60.0), speeds)
    assert all(store.has(stage) for stage in (*filling, *small))
    assert max(roles.count("sample") for roles in beside) == 1
    assert any({"sample", "any"} <= set(roles) for roles in beside)


class TestRoom:
    PLACES: ClassVar = {"stack": 2, "sample": 2, "any": 3}

    def room(self, gigabytes):
        settings = replace(sharing(), gigabytes=gigabytes)
        return room.Room(
            settings, self.PLACES, lambda stage: room.role(stage) if room.role(stage) in self.PLACES else "any"
        )

    def test_needs_are_guessed_and_then_learnt(self):
        made, job, cells = self.room(80.0), Large("a"), [Cell(1), Cell(2)]
        assert made.need([job]) == machine_module.WORKER_GB
        assert made.need(cells) == 2 * machine_module.CELL_GB
        made.observe([job], 1.5, 0.5)
        made.observe(cells, 1.0, 0.5)
        assert made.need([Large("b")]) == 1.5
        assert made.need(cells) == 2 * machine_module.CELL_GB, "it may have found the card full"
        made.observe(cells, 30.0, 0.5)
        made.observe([job], 0.5, 0.5)
        assert made.need(cells[:1]) == 15
        assert made.need([job]) == 1.5

    @pytest.mark.parametrize(("gigabytes", "cells"), [(80.0, 4), (47.0, 3), (43.0, 2), (30.0, 4)])
    def test_a_stack_too_large_starts_with_fewer_cells(self, gigabytes, cells):
        """Beside 3.5 GB of contexts and a job of 19, cells of 8: four need 32. Fewer than half are not worth it."""
        made, job, whole = self.room(gigabytes), Large("a"), [Cell(n) for n in range(4)]
        made.observe([job], 19.0, 0.0)
        made.observe(whole, 32.0, 0.0)
        part = made.part(whole, [[job]])
        assert part == whole[:cells]
        assert made.fits(part, [[job]]) == (gigabytes > 30)
        assert made.part([job], [whole]) == [job]

    def test_what_idle_processes_keep_is_not_free(self):
        """Beside 3.5 GB of contexts: 9 of a running job, and 4 of each of two idle samplers, leave 1.5 of 22."""
        made, job = self.room(22.0), Large("a")
        made.observe([job], 9.0, 0.0)
        assert made.fits([Large("b")], [[job]])
        made.observe([Large("c", sampled=99)], 10.0, 4.0)
        assert not made.fits([Large("b")], [[job]])
        assert made.fits([Large("b")], []), "what is alone is tried"

    def test_without_a_bound_everything_fits(self):
        made = self.room(0.0)
        made.observe([Large("a")], 900.0, 0.0)
        assert made.fits([Large("b")], [[Large("a")]] * 9)
