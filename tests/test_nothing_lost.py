"""Damage, full disks and wrong clocks: detected, named, rebuilt or refused; what was there before is still there."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from persona_coupling import cli, evidence, figures, notebooks, outputs, profiles, storage, tables
from persona_coupling.errors import UserError
from persona_coupling.store import Lab, Stage, Store
from persona_coupling.study import Design, Results, Study, disagreement, read_table
from persona_coupling.verification import ledger


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    return tmp_path


@contextmanager
def full():
    """Inside, a disk with room for 100 bytes in a file: the system's own limit, and no signal at it. For as short as may
    be, since what pytest prints meets the same limit."""
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def listing(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def results(rows):
    return Results({"scan": pd.DataFrame({"x": [0.5 * n for n in range(rows)]})}, {"profile": {}, "cells": []})


def drawn():
    figure, axes = plt.subplots(figsize=(2, 2))
    axes.plot([0, 1], [0, 1])
    return figure


def paper(folder, size):
    with outputs.replaced(folder / "paper.pdf") as place:  # as `build_paper` does
        place.write_bytes(b"%PDF" * size)


WRITERS = {
    "results": lambda folder, size: results(size).save(folder),
    "figures": lambda folder, size: figures.save(drawn(), folder, "a", pd.DataFrame({"x": range(size)}), ""),
    "tables": lambda folder, size: tables.save(pd.DataFrame({"x": range(size)}), folder, "a"),
    "paper": paper,
    "text": lambda folder, size: outputs.write(folder / "a.json", "x" * size),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_what_was_there(tmp_path, kind):
    folder = tmp_path / "place"
    WRITERS[kind](folder, 3)
    before = listing(folder)
    assert before
    with full(), pytest.raises(OSError, match=r"File too large|Error writing|close"):
        WRITERS[kind](folder, 3000)
    assert listing(folder) == before


def test_results_are_replaced_as_a_whole(tmp_path):
    Results({"old": pd.DataFrame({"x": [1.0]})}, {}).save(tmp_path)
    results(3).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.json", "scan.parquet"]
    assert read_table(tmp_path / "scan.parquet")["x"].tolist() == [0.0, 0.5, 1.0]


KILLED = """
import os, signal, sys
from pathlib import Path
import pandas as pd
from persona_coupling.study import Design, Results, Study, disagreement, read_table
rename, left = Path.rename, int(sys.argv[2])
def counted(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return rename(self, target)
Path.rename = counted
Results({n: pd.DataFrame({"x": [2.0]}) for n in "ab"}, {"new": True}).save(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_results_of_a_kill_between_two_renames_do_not_count(repository, renames):
    folder = repository / "experiments" / "00_x" / "results" / "smoke"
    Results({n: pd.DataFrame({"x": [1.0]}) for n in "ab"}, {}).save(folder)
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(renames)], check=False)
    assert done.returncode == -9
    with pytest.raises(UserError, match="no results"):
        evidence.read(folder)
    assert [p for p in folder.iterdir() if p.name.startswith(".")]
    with outputs.turn():
        assert not [p for p in folder.iterdir() if p.name.startswith(".")], "the next writer tidies up"
    results(2).save(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["record.json", "scan.parquet"]


def test_the_next_writer_removes_half_written_files_and_nothing_else(repository, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(repository / "artifacts"))
    half = [
        "paper/.paper-smoke.pdf.12", "paper/generated/smoke/.index.json.12", "figures/smoke/.a.svg.12",
        "experiments/00_x/lab_notes/.smoke.ipynb.12", ".README.md.12", "artifacts/notebooks/00_x-12.ipynb",
    ]  # fmt: skip
    whole = [
        "paper/paper-smoke.pdf", "figures/smoke/a.svg", ".gitignore", ".python-version", "paper/.keep",
        "artifacts/notebooks/mine.ipynb", "artifacts/change/.abc.12/weights", "experiments/00_x/lab_notes/smoke.ipynb",
    ]  # fmt: skip
    for name in half + whole:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("x")
    with outputs.turn():
        assert set(listing(repository)) == {*whole, outputs.LOCK}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": "\xff"}', b"\0\0\0"])
def test_a_damaged_output_is_named_wherever_it_is_read(repository, content, capsys):
    generated = repository / "paper" / "generated" / "smoke"
    generated.mkdir(parents=True)
    path = generated / "00_x.json"
    path.write_bytes(content)
    for read in (ledger.read, cli.print_claims):
        with pytest.raises(UserError, match=r"00_x.json is damaged.*Restore or delete"):
            read("smoke")
    assert cli.main(["claims", "--profile", "smoke"]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_damaged_results_are_refused(tmp_path, damage):
    results(50).save(tmp_path)
    table, record = tmp_path / "scan.parquet", tmp_path / "record.json"
    data = bytearray(table.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        table.write_bytes(data)
    elif damage == "truncate":
        table.write_bytes(data[:-1])
    elif damage == "delete":
        table.unlink()
    else:
        record.write_bytes(record.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"scan.parquet differs|record.json is (damaged|no JSON)"):
        evidence.read(tmp_path)


@dataclass(frozen=True)
class Counted(Stage):
    where: str
    kind: ClassVar[str] = "counted"

    def build(self, folder, lab):
        with Path(self.where).open("a") as handle:
            handle.write("built\n")
        (folder / "a").write_text("a")


@pytest.mark.parametrize("when", [0, 4_102_444_800])  # 1970, 2100
def test_a_wrong_clock_makes_no_difference(tmp_path, when):
    stage = Counted(str(tmp_path / "count"))
    folder = Lab(Store(tmp_path / "root")).folder(stage)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["provenance"]["made"] = "2100-01-01T00:00:00+00:00" if when else "1970-01-01T00:00:00+00:00"
    manifest.write_text(json.dumps(content))
    for path in (*folder.iterdir(), folder):
        os.utime(path, (when, when))
    assert Lab(Store(tmp_path / "root")).folder(stage) == folder
    assert (tmp_path / "count").read_text() == "built\n"


def test_a_finished_artifact_is_read_from_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    stage = Counted(str(tmp_path / "count"))
    lab = Lab(Store(tmp_path / "root"))
    folder = lab.folder(stage)

    def refused(path, *_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    assert Lab(Store(tmp_path / "root")).folder(stage) == folder
    with pytest.raises(UserError, match=r"cannot be written.*PERSONA_COUPLING_CACHE"):
        lab.folder(Counted("elsewhere"))


@dataclass(frozen=True)
class Weights(Stage):
    """Written by a library whose errors are no OSError."""

    size: int
    stacked: bool = False
    kind: ClassVar[str] = "weights"

    def build(self, folder, lab):
        save_file({"a": torch.zeros(self.size)}, folder / "a.safetensors")

    def stack_key(self):
        return "all" if self.stacked else None

    @staticmethod
    def build_together(stages, folders, lab):
        outcomes = []
        for stage, folder in zip(stages, folders, strict=True):
            try:
                outcomes.append(stage.build(folder, lab))
            except SafetensorError as error:
                outcomes.append(error)
        return outcomes


@pytest.mark.parametrize("stacked", [False, True])
def test_a_full_disk_is_said_in_words_whichever_library_finds_it(tmp_path, stacked):
    lab, stage = Lab(Store(tmp_path / "root")), Weights(10_000, stacked)
    bare = worded = ""
    with full():
        try:
            save_file({"a": torch.zeros(10_000)}, tmp_path / "a")
        except SafetensorError as error:
            bare = str(error)  # the control: what the library itself says
        try:
            if stacked:
                raise lab.store.make_together([stage], lab)[stage.key]
            lab.folder(stage)
        except UserError as error:
            worded = str(error)
    assert "os error 27" in bare
    assert "File too large. Finished cells are kept" in worded
    assert not list((tmp_path / "root" / "weights").iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left.*free some space"),
        (RuntimeError("[Errno 30] Read-only file system: 'x'"), "cannot be written.*PERSONA_COUPLING_CACHE"),
        (OSError(122, "Disk quota exceeded"), "No space left"),
        (ValueError("a shape (os error 2)"), None),
        (ValueError("a shape"), None),
    ],
)
def test_only_errors_of_the_disk_are_put_in_words(tmp_path, error, said):
    with pytest.raises(UserError if said else type(error), match=said), storage.explained(tmp_path):
        raise error


RECORDS = {
    "profile": (lambda r: r["profile"]["sft"].update(steps=99), "other values of sft"),
    "profile, a field more": (lambda r: r["profile"].update(more=1), "other values of more"),
    "values": (lambda r: r["values"].update(x=1), "values of the experiment's own"),
    "condition": (lambda r: r["cells"].pop(0), "exceed the design by"),
    "factors": (lambda r: r["cells"][0]["factors"].update(sft="other"), "other factors than the design of A"),
    "seed": (lambda r: r["cells"][0].update(seed=7), r"have cells of the seeds \[7\], their profile says \[0\]"),
    "seeds": (lambda r: r["profile"].update(seeds=[0, 1]), r"their profile says \[0, 1\]"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_results_must_be_those_of_profile_and_design(name):
    """A record that was edited, damaged, or made for other values: written out by hand, for one cell each."""
    profile = profiles.load("smoke")
    study = Study(profile, lab=None)
    design = Design([study.cell("A", study.raw, seed=0, sft="none", coupling="no")])
    record = {
        "profile": {**profile.as_dict(), "seeds": [0]},
        "values": {},
        "cells": [{"condition": "A", "seed": 0, "factors": {"sft": "none", "coupling": "no"}}],
        "observed": [],
    }
    record = json.loads(json.dumps(record))
    assert disagreement(record, profile, design) == "", "the control"
    change, said = RECORDS[name]
    change(record)
    assert re.search(said, disagreement(record, profile, design))


def test_lab_notes_are_executed_elsewhere_if_the_cache_can_only_be_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path / "cache"))
    with notebooks._workplace() as work:
        assert work == tmp_path / "cache" / "notebooks", "the control"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path / "file"))  # no folder can be made in it
    with notebooks._workplace() as work:
        assert os.access(work, os.W_OK)
        assert not work.is_relative_to(tmp_path / "file")
    assert not work.exists()
