"""Kills and neighbours: what `stress` compares, seen to fire; a short session of it; two runs at once on one checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from persona_coupling import outputs, paths, stress

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def pair(tmp_path):
    """Two copies of a small finished run: one artifact, results, a note, a figure, generated values."""
    for name, minutes in (("calm", 1.5), ("rough", 2.25)):
        root = tmp_path / name
        for path, content in {
            "artifacts/change/abc/manifest.json": {"key": "abc"},
            "experiments/00_x/results/smoke/record.json": {
                "cells": [1],
                "compute_minutes": minutes,
                "a": {"made": minutes},
            },
            "experiments/00_x/lab_notes/smoke.ipynb": {"text": f"{minutes} min"},
            "paper/generated/smoke/00_x.json": {"estimates": {"value": 0.5}, "stages": {"abc": minutes}},
        }.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(json.dumps(content))
        (root / "figures/smoke").mkdir(parents=True)
        (root / "figures/smoke/a.svg").write_bytes(b"<svg/>")
    return tmp_path / "calm", tmp_path / "rough"


def test_clock_times_are_no_difference(pair):
    assert stress.differences(*pair) == []
    assert stress.leftovers(pair[1]) == []


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("figures/smoke/a.svg", "<svg />"),
        ("figures/smoke/b.svg", "<svg/>"),
        ("paper/generated/smoke/00_x.json", '{"estimates": {"value": 0.51}, "stages": {}}'),
        ("artifacts/change/abc/manifest.json", '{"key": "abc", "files": {"a": {"sha256": "0"}}}'),
        ("experiments/00_x/results/smoke/record.json", '{"cells": [2], "a": {}}'),
        ("experiments/00_x/lab_notes/smoke.ipynb", '{"text": "1.5 m"}'),
    ],
)
def test_any_other_difference_is_found(pair, path, content):
    (pair[1] / path).write_text(content)
    assert stress.differences(*pair) == [path]


def test_a_missing_output_is_found(pair):
    (pair[1] / "figures/smoke/a.svg").unlink()
    assert stress.differences(*pair) == ["figures/smoke/a.svg"]


@pytest.mark.parametrize(
    "path", ["artifacts/change/.abc.77/weights", "paper/.index.json.77", "artifacts/notebooks/x-1.ipynb"]
)
def test_what_a_killed_run_leaves_is_found(pair, path):
    (pair[1] / path).parent.mkdir(parents=True, exist_ok=True)
    (pair[1] / path).write_text("half")
    assert stress.leftovers(pair[1])


def test_an_artifact_made_again_is_found(pair):
    before = stress.manifests(pair[1])
    assert list(before) == ["artifacts/change/abc"]
    assert not list(stress._made_again(before, pair[1]))
    (pair[1] / "artifacts/change/abc/manifest.json").write_text("{}")
    assert list(stress._made_again(before, pair[1])) == ["made again or lost: artifacts/change/abc"]
    shutil.rmtree(pair[1] / "artifacts/change/abc")
    assert list(stress._made_again(before, pair[1]))


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    outputs.write(path, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        outputs.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wait", [outputs.turn, outputs.at_rest])
def test_the_second_waits_for_its_turn(tmp_path, monkeypatch, wait):
    """While another process holds the lock, a run or a check says that it waits; the lock of a dead process is free."""
    monkeypatch.setattr(paths, "repository", lambda: tmp_path)
    hold = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", hold, str(tmp_path / outputs.LOCK)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        holder.kill()

    started = time.monotonic()
    with wait(say), pytest.raises(TimeoutError):
        FileLock(tmp_path / outputs.LOCK).acquire(timeout=0)
    assert said
    assert time.monotonic() - started < 30
    holder.wait()
    holder.stdout.close()


def test_a_checkout_that_can_only_be_read_is_at_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "repository", lambda: tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with outputs.at_rest():
        assert not list(tmp_path.iterdir()), "no lock is made"
    monkeypatch.undo()
    monkeypatch.setattr(paths, "repository", lambda: tmp_path)
    with outputs.at_rest():
        assert [path.name for path in tmp_path.iterdir()] == [outputs.LOCK], "the control"


@pytest.fixture
def typeset(pair, monkeypatch):
    """The pair with a typesetter whose PDF is the bytes of the copy's generated values and figures."""

    def compiled(_profile):
        root = paths.repository()
        return b"".join(p.read_bytes() for p in sorted([*root.glob("paper/generated/*/*"), *root.glob("figures/*/*")]))

    monkeypatch.setattr(stress.prose, "compile_paper", compiled)
    for root in pair:
        with stress.processes.environment({"PERSONA_COUPLING_ROOT": str(root)}):
            (root / "paper/paper-smoke.pdf").write_bytes(compiled("smoke"))
    return pair


def test_a_paper_that_differs_in_minutes_is_the_same(typeset):
    assert (typeset[0] / "paper/paper-smoke.pdf").read_bytes() != (typeset[1] / "paper/paper-smoke.pdf").read_bytes()
    assert stress.papers(*typeset, "smoke") == []


def test_a_paper_of_other_values_or_figures_is_found(typeset):
    (typeset[1] / "paper/paper-smoke.pdf").write_bytes(b"half")
    assert stress.papers(*typeset, "smoke") == ["paper/paper-smoke.pdf is not what its generated files give"]
    (typeset[1] / "figures/smoke/a.svg").write_bytes(b"<svg />")
    assert "paper/paper-smoke.pdf differs by more than clock times" in stress.papers(*typeset, "smoke")


@pytest.mark.end_to_end
def test_three_kills_lose_nothing(monkeypatch, tmp_path, capsys):
    """Compared with a run that was left alone in a cache of its own: so the same profile twice gives the same bytes, too."""
    monkeypatch.setenv("PERSONA_COUPLING_CACHE", str(tmp_path))
    assert stress.main(3, ["00"], seed=3) == 0
    report = json.loads((tmp_path / "stress.json").read_text())
    assert report["kills"] == 3
    assert report["faults"] == []
    assert sum(report["struck while"].values()) == 3
    assert "Nothing was lost" in capsys.readouterr().out


@pytest.mark.end_to_end
def test_two_runs_at_once_share_the_work(tmp_path):
    """Both end well, though they meet: what one is making the other waits for, and nothing is left half-made."""
    root = tmp_path / "copy"
    stress.copy_inputs(root)
    command = [sys.executable, "-m", "persona_coupling", "reproduce", "--profile", "smoke", "--only", "00"]
    running = [
        subprocess.Popen(
            command, env=stress.environment(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert stress.leftovers(root) == []
    assert (root / "paper" / "paper-smoke.pdf").read_bytes().startswith(b"%PDF")
    assert "waiting for another process" in "".join(said), said  # they did meet, and one left the work to the other
    for kind in ("change", "evaluation"):
        assert list((root / "artifacts" / kind).glob("*/manifest.json"))


def test_what_a_killed_writer_had_not_renamed_is_no_artifact(tmp_path):
    for name in ("0123", ".4567.99"):
        (tmp_path / "artifacts" / "change" / name).mkdir(parents=True)
        (tmp_path / "artifacts" / "change" / name / stress.MANIFEST).write_text("{}")
    assert list(stress.manifests(tmp_path)) == ["artifacts/change/0123"]
