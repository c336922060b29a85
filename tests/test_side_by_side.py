"""Stages side by side: what starts next, in which group, in which process, and what happens when one fails."""

import concurrent.futures
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from jobs import Job

from persona_coupling import crew, mps, processes, progress, room, side_by_side
from persona_coupling import machine as machine_module
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


@pytest.mark.parametrize("words", ["", "CUDA error: out of memory"], ids=["torch", "cuda"])
@pytest.mark.parametrize(("times", "made"), [(0, True), (2, True), (crew.PATIENCE, False)])
def test_a_full_card_is_waited_for_but_not_for_ever(tmp_path, monkeypatch, times, made, words):
    monkeypatch.setattr(crew, "WAIT", 0.0)
    lab, stage = Lab(Store(tmp_path / "store")), Crowded(str(tmp_path / "tries"), times, words)
    if made:
        crew.patiently(lab, stage)
    else:
        with pytest.raises(RuntimeError, match=words or "out of memory"):
            crew.patiently(lab, stage)
    assert lab.store.has(stage) == made
    assert len((tmp_path / "tries").read_text()) == min(times + 1, crew.PATIENCE)


def test_a_process_that_can_capture_no_more_is_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "WAIT", 0.0)
    with pytest.raises(RuntimeError, match="capturing"):
        crew.patiently(Lab(Store(tmp_path / "store")), Crowded(str(tmp_path / "tries"), 1, CAPTURING))
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.parametrize("times", [1, side_by_side.TRIES])
def test_what_found_the_card_full_goes_to_another_process(store, speeds, tmp_path, times):
    """As often as `TRIES` processes; a stage that any of them can build is built, and the run ends well."""
    crowded, others = Crowded(str(tmp_path / "tries"), times, CAPTURING), [Where(f"a{n}") for n in range(4)]
    planned = progress.plan([crowded, *others], store, speeds)
    if times < side_by_side.TRIES:
        progress.build(planned, store, sharing(workers=2), speeds)
    else:
        with pytest.raises(RuntimeError, match="capturing") as raised:
            progress.build(planned, store, sharing(workers=2), speeds)
        assert "in lab.folder(stage)" not in str(raised.value)
        assert "patiently" in "".join(raised.value.__notes__), "where it happened"
    assert store.has(crowded) == (times < side_by_side.TRIES)
    assert (tmp_path / "tries").read_text() == "x" * min(times + 1, side_by_side.TRIES)
    assert all(store.has(stage) for stage in others)


@pytest.mark.parametrize("words", [CAPTURING, "another error"])
def test_members_of_a_stack_that_found_the_card_full_are_made_alone(tmp_path, words):
    stages = [Crowded(str(tmp_path / f"tries{i}"), 0, words, together=True) for i in range(2)]
    errors = crew.make(stages, tmp_path / "store", "cpu").errors
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
    after: Stage | None = None
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


def say_whether_shared(monkeypatch, shared):
    """In place of the card's multi-process service: one that says whether it lets processes share the card."""

    @contextmanager
    def service(device, workers, say):
        yield shared

    monkeypatch.setattr(mps, "service", service)


@pytest.mark.parametrize("shared", [True, False])
def test_stacks_have_processes_that_others_give_way_to(store, speeds, monkeypatch, shared):
    say_whether_shared(monkeypatch, shared)
    monkeypatch.delenv(mps.PRIORITY, raising=False)
    alone, cells = [Where("a")], [Where("d", "one"), Where("e", "one")]
    alone += [Where("b", after=alone[0])]
    alone += [Where("c", after=alone[1])]
    late = Where("f", "one", after=alone[2])  # so that a stack waits, whose process is kept for it
    planned = progress.plan([*alone, *cells, late], store, speeds)
    progress.build(planned, store, sharing(workers=2, stack=2, stacks=1), speeds)

    assert {priority for _, priority in where(store, alone)} == ({"1"} if shared else {"normal"})
    assert {priority for _, priority in where(store, cells)} == {"normal"}
    assert not shared or not {pid for pid, _ in where(store, alone)} & {pid for pid, _ in where(store, cells)}
    assert mps.PRIORITY not in os.environ


@pytest.mark.parametrize("left", [True, False])
def test_processes_for_stacks_help_when_none_waits(store, speeds, monkeypatch, left):
    """Two others are ready at once, after a stack: they go to two processes, unless another stack waits for them."""
    say_whether_shared(monkeypatch, True)
    first = Where("z", "one")
    others = [Where(f"a{n}", after=first) for n in range(2)]
    planned = progress.plan([first, *others, *([Where("y", "one", after=others[-1])] * left)], store, speeds)
    progress.build(planned, store, sharing(workers=2, stack=2, stacks=1), speeds)
    assert len({pid for pid, _ in where(store, others)}) == (1 if left else 2)


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
        def fits(self, group, standing, idle=0.0):
            found = super().fits(group, standing, idle)
            if found and not beside:
                self.observe = lambda *_, **_k: None  # a CPU has no peaks to tell
            beside.extend([[*map(room.role, [g[0] for g in standing]), room.role(group[0])]] * found)
            return found

    monkeypatch.setattr(side_by_side, "Room", Watched)
    progress.build(planned, store, sharing(workers=4, stack=2, samplers=2, gigabytes=60.0), speeds)
    assert all(store.has(stage) for stage in (*filling, *small))
    assert max(roles.count("sample") for roles in beside) == 1
    assert any({"sample", "any"} <= set(roles) for roles in beside)


class TestRoom:
    def room(self, free):
        """Of a card that has so much left beside the contexts of seven processes; 0: of one without bound."""
        contexts = 7 * machine_module.CONTEXT_GB if free else 0.0
        return room.Room(replace(sharing(), gigabytes=free + contexts), 7)

    def test_needs_are_guessed_and_then_learnt(self):
        made, job, cells = self.room(80.0), Large("a"), [Cell(1), Cell(2)]
        guess = machine_module.STACK_GB + 2 * machine_module.CELL_GB
        assert made.need([job]) == machine_module.WORKER_GB
        assert made.need(cells) == guess
        made.observe([job], 1.5)
        assert made.need([Large("b")]) == 1.5
        made.observe(cells, 4.0, crowded=True)
        assert made.need(cells) == guess, "it found the card full"
        made.observe(cells, 30.0)
        made.observe([job], 0.5)
        assert made.need(cells) == 30.0
        assert made.need([job]) == 1.5, "the most so far"

    def test_what_cells_share_is_counted_once(self):
        """A cell alone had 9.5 GB, most of it not its own: six of them are not six times as large."""
        made = self.room(80.0)
        made.observe([Cell(0)], machine_module.STACK_GB + 2.0)
        assert made.need([Cell(n) for n in range(6)]) == machine_module.STACK_GB + 12.0

    def test_cells_of_more_steps_are_another_kind(self):
        made, short, long = self.room(80.0), [Cell(0, steps=100)], [Cell(0, steps=250)]
        made.observe(short, machine_module.STACK_GB + 1.0)
        assert made.need(short) == machine_module.STACK_GB + 1.0
        assert made.need(long) == machine_module.STACK_GB + machine_module.CELL_GB

    @pytest.mark.parametrize(("free", "cells"), [(76.0, 4), (44.0, 3), (39.0, 2), (26.0, 4)])
    def test_a_stack_too_large_starts_with_fewer_cells(self, free, cells):
        """Beside a job of 19, cells of 7.6 and what they share: four need 32. Fewer than half are not worth it."""
        made, job, whole = self.room(free), Large("a"), [Cell(n) for n in range(4)]
        made.observe([job], 19.0)
        made.observe(whole, 32.0)
        part = made.part(whole, [[job]])
        assert part == whole[:cells]
        assert made.fits(part, [[job]]) == (free > 26)
        assert made.part([job], [whole]) == [job]

    def test_what_idle_processes_keep_is_not_free(self):
        """Beside a running job of 9 another fits into 19, but not if 4 are kept idly."""
        made, job = self.room(19.0), Large("a")
        made.observe([job], 9.0)
        assert made.fits([Large("b")], [[job]])
        assert not made.fits([Large("b")], [[job]], 4.0)
        assert made.fits([Large("b")], [], 4.0), "what is alone is tried"

    def test_what_does_not_fit_keeps_its_turn_in_time(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
        made, job = self.room(22.0), [Large("a")]
        assert made.keeps_its_turn([Cell(0)]), "a stack at once"
        assert not made.keeps_its_turn(job)
        now[0] += room.PATIENCE - 1
        assert not made.keeps_its_turn(job)
        now[0] += 2
        assert made.keeps_its_turn(job)
        assert not made.keeps_its_turn([Large("b")]), "its own patience"

    def test_without_a_bound_everything_fits(self):
        made = self.room(0.0)
        made.observe([Large("a")], 900.0)
        assert made.fits([Large("b")], [[Large("a")]] * 9)


@dataclass(frozen=True)
class Deadly(Stage):
    """Kills its process the first time, and notes each try in a file."""

    tries: str
    times: int
    kind: ClassVar[str] = "deadly"

    def build(self, folder, lab):
        with open(self.tries, "a", encoding="utf-8") as handle:
            handle.write("x")
        if len(Path(self.tries).read_text(encoding="utf-8")) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_replaced_and_costs_its_own_stage_alone(store, speeds, tmp_path):
    """All others are made, by a new process too; the error says what to do, and a second start makes the rest."""
    deadly = Deadly(str(tmp_path / "tries"), 1)
    stages = [deadly, *(Job(f"a{n}") for n in range(6))]
    with pytest.raises(UserError, match=r"deadly/\w+ was killed.*start the command again"):
        progress.build(progress.plan(stages, store, speeds), store, sharing(workers=2), speeds)
    assert [store.has(stage) for stage in stages] == [False, *[True] * 6]
    progress.build(progress.plan(stages, store, speeds), store, sharing(workers=2), speeds)
    assert store.has(deadly)


class TestCrew:
    def crew(self, *roles):
        return crew.Crew(
            lambda name: crew.Worker(name, concurrent.futures.ProcessPoolExecutor(1)),
            [crew.Worker(name, concurrent.futures.ProcessPoolExecutor(1)) for name in roles],
        )

    def test_a_stage_goes_to_who_built_its_like_or_keeps_little(self):
        made = self.crew("any", "any", "any", "sample")
        first, second, third, sampler = made.workers
        second.last, third.last = Large, Job
        first.kept, second.kept, third.kept = 2.0, 9.0, 1.0
        assert made.choose(Large("a"), made.workers) is second
        assert made.choose(Large("a"), [first, third, sampler]) is third
        assert made.choose(Large("a", sampled=99), made.workers) is sampler
        assert made.choose(Large("a", sampled=99), [first]) is None, "samplers alone have the cache"

    def test_once_no_stack_waits_their_processes_help_out(self):
        made = self.crew("stack", "any", "sample")
        stacks, small, sampler = made.workers
        sample = Large("a", sampled=99)
        assert made.choose(sample, [stacks, small]) is None
        assert made.choose(sample, [stacks, small], stacks_wait=False) is stacks
        assert made.choose(Large("b"), [stacks, sampler], stacks_wait=False) is stacks
        sampler.last = Large
        assert made.choose(sample, made.workers, stacks_wait=False) is sampler

    def test_without_workers_of_a_role_any_will_do(self):
        made = self.crew("any")
        assert made.choose(Large("a", sampled=99), made.workers) is made.workers[0]
        assert made.choose(Cell(0), made.workers) is made.workers[0]

    def test_a_replacement_takes_the_place(self):
        made = self.crew("sample", "any")
        old = made.workers[0]
        made.replace(old)
        assert old not in made.workers
        assert [worker.role for worker in made.workers] == ["sample", "any"]
        now = list(made.workers)
        made.replace(old)
        assert made.workers == now, "once"

    def test_one_that_was_killed_while_it_idled_is_replaced(self):
        made = self.crew("sample", "any")
        idle = made.workers[0]
        assert isinstance(idle.submit(os._exit, 1).exception(), BrokenProcessPool)
        worker, future = made.give(idle, os.getpid)
        assert worker is made.workers[0] is not idle
        assert worker.role == "sample"
        assert future.result() != os.getpid()
        assert made.give(worker, os.getpid)[0] is worker


@pytest.mark.parametrize("fails", [False, True])
def test_what_idle_processes_keep_is_given_back_when_it_is_lacked(store, speeds, monkeypatch, fails):
    """On a card of 60 GB: samplers keep 30 GB each, so that a trainer of 40 fits once they were told to let go; on one of
    600 nobody is told. One that cannot let go is replaced."""
    given, replaced, replace_worker = [], [], crew.Crew.replace
    monkeypatch.setattr(
        crew.Crew, "replace", lambda self, worker: (replaced.append(worker), replace_worker(self, worker))[1]
    )
    monkeypatch.setattr("persona_coupling.room.TRAINER_GB", 40.0)
    monkeypatch.setattr("persona_coupling.room.SAMPLER_GB", 12.0)
    monkeypatch.setattr("persona_coupling.room.ROW_GB", 0.0)

    def submit(self, call, *arguments):
        done = concurrent.futures.Future()
        if call is crew.tidy:
            given.append(self)
            if fails:
                done.set_exception(RuntimeError(CAPTURING))
            else:
                done.set_result(0.0)
        else:
            made = crew.make(*arguments)
            done.set_result(replace(made, peak=12.0, kept=30.0 if self.role == "sample" else 0.0))
        return done

    monkeypatch.setattr(crew.Worker, "submit", submit)
    for gigabytes, told in ((60.0, True), (600.0, False)):
        given.clear()
        first = [Where(f"{gigabytes}s{n}", sampled=50) for n in range(2)]
        late = Where(f"{gigabytes}t", trained=50)
        chain: list[Stage] = [first[0]]  # more urgent than the trainer, so that it does not start on an empty card
        for n in range(10):
            chain.append(Large(f"{gigabytes}b{n}", chain[-1]))
        planned = progress.plan([*in_order(chain), first[1], late], store, speeds)
        settings = sharing(workers=4, stack=2, stacks=1, samplers=2, trainers=1, gigabytes=gigabytes)
        progress.build(planned, store, settings, speeds)
        assert all(store.has(stage) for stage in planned.stages)
        assert bool(given) == told
    assert bool(replaced) == fails
