"""The store: keys, whole artifacts or none, one writer, damage that is noticed."""

import ast
import errno
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from persona_coupling import store as store_module
from persona_coupling.errors import CorruptArtifact, UserError
from persona_coupling.store import Lab, Stage, Store, canonical_json, class_fingerprint, code_fingerprint, in_order


@dataclass(frozen=True)
class Note(Stage):
    text: str
    parent: Stage | None = None
    where: str = ""
    kind: ClassVar[str] = "note"
    unkeyed: ClassVar[tuple[str, ...]] = ("where",)

    def build(self, folder, lab):
        if self.parent is not None:
            lab.folder(self.parent)
        (folder / "deep").mkdir()
        (folder / "deep" / "note.txt").write_text(self.text)


@pytest.fixture
def lab(tmp_path):
    return Lab(Store(tmp_path / "root"))


def everything(root):
    """All paths under root but the locks."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if "locks" not in p.parts)


# ---------------------------------------------------------------------------------------------------- keys


def test_canonical_json_is_one_text_per_value():
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"(?i)json"):
            canonical_json({"x": bad})


def test_the_key_is_the_hash_of_the_description():
    note = Note("a", Note("b"))
    text = json.dumps(note.description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert note.key == hashlib.sha256(text.encode()).hexdigest()[:20]
    assert note.description["parent"] == {"kind": "note", "key": Note("b").key}


def test_11_a_changed_input_changes_the_key():
    """Failure 11: a field, a field of a parent, or a parent's presence."""
    base = Note("a", Note("b"))
    others = [Note("A", Note("b")), Note("a", Note("c")), Note("a"), Note("a", Note("b", Note("c")))]
    assert len({base.key, *(other.key for other in others)}) == 5
    assert replace(base, where="elsewhere").key == base.key
    assert Note("a", Note("b")).key == base.key


def test_a_field_without_canonical_json_is_refused():
    with pytest.raises(TypeError, match="Path has no canonical JSON"):
        _ = Note(Path("a")).key


MODULE = '''"""One sentence."""

CONSTANT = 1


def double(x):
    """Twice."""
    return 2 * x  # a comment
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the text of a module and return its fingerprint."""
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprint(text):
        (tmp_path / "logic.py").write_text(text)
        importlib.invalidate_caches()
        code_fingerprint.cache_clear()
        return code_fingerprint("logic")

    yield fingerprint
    code_fingerprint.cache_clear()


def test_11_code_fingerprint_ignores_words_only(module):
    """Failure 11: logic counts; comments, docstrings and blank lines do not."""
    before = module(MODULE)
    for old, new in [("a comment", "another"), ("Twice.", "Two times."), ("One sentence.", "Two."), ("\n\n\n", "\n\n")]:
        assert old in MODULE
        assert module(MODULE.replace(old, new)) == before
    for old, new in [("2 * x", "3 * x"), ("CONSTANT = 1", "CONSTANT = 2"), ("double", "twice"), ("(x)", "(x, y=1)")]:
        assert old in MODULE
        assert module(MODULE.replace(old, new)) != before
    with pytest.raises(ModuleNotFoundError):
        code_fingerprint("persona_coupling_without_such_a_module")


STAGE = '''from persona_coupling.store import Stage


class Made(Stage):
    """What it is."""

    def build(self, folder, lab):
        """Write."""
        (folder / "x").write_text("1")

    def work(self):
        return 5


class Neighbour(Stage):
    size = 1
'''


def test_a_fingerprint_is_the_same_under_every_version_of_python():
    """Written out by hand: what newer versions add to a syntax tree, and leave out of its dump, is no part of it."""
    written = store_module._written(ast.parse("def f(x, *, y=None):\n    return f'{x}' if x else y"))
    assert written == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x')],kwonlyargs=[arg(arg='y')],"
        "kw_defaults=[Constant()]),body=[Return(value=IfExp(test=Name(id='x',ctx=Load()),body=JoinedStr(values=["
        "FormattedValue(value=Name(id='x',ctx=Load()),conversion=-1)]),orelse=Name(id='y',ctx=Load())))])])"
    )


def test_11_class_fingerprint(tmp_path):
    """Failure 11: a stage's own build counts; docstrings, the estimate of minutes and its neighbours do not."""

    def fingerprint(text):
        path = tmp_path / f"stage_{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
        path.write_text(text)
        return class_fingerprint(str(path), "Made")

    before = fingerprint(STAGE)
    for old, new in [("What it is.", "Other."), ("Write.", "Put."), ("return 5", "return 6"), ("size = 1", "size = 2")]:
        assert fingerprint(STAGE.replace(old, new)) == before
    assert fingerprint(STAGE.replace('write_text("1")', 'write_text("2")')) != before


def test_in_order_puts_parents_first_and_each_once():
    shared = Note("shared")
    first, second = Note("first", shared), Note("second", shared)
    ordered = in_order([second, first, shared])
    assert [s.text for s in ordered] == ["shared", "second", "first"]


# ------------------------------------------------------------------------------------------------- building


def test_make_builds_once_with_parents(lab):
    note = Note("a", Note("b"))
    assert not lab.store.has(note)
    with pytest.raises(KeyError):
        lab.store.fetch(note)
    folder = lab.folder(note)
    assert (folder / "deep" / "note.txt").read_text() == "a"
    assert lab.store.has(Note("b"))
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert lab.folder(Note("a", Note("b"))) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == stamp


def test_manifest_lists_every_file_with_its_hash(lab):
    note = Note("abc")
    lab.folder(note)
    manifest = lab.store.manifest(note)
    digest = hashlib.sha256(b"abc").hexdigest()
    assert manifest["files"] == {str(Path("deep", "note.txt")): {"bytes": 3, "sha256": digest}}
    assert manifest["provenance"]["versions"]["python"]


@dataclass(frozen=True)
class Failing(Stage):
    error: str
    kind: ClassVar[str] = "note"

    def build(self, folder, lab):
        (folder / "half.txt").write_text("half")
        if self.error == "value":
            raise ValueError("in the middle")
        if self.error == "interrupt":
            raise KeyboardInterrupt
        raise OSError(getattr(errno, self.error), os.strerror(getattr(errno, self.error)))


@pytest.mark.parametrize(("error", "kind"), [("value", ValueError), ("interrupt", KeyboardInterrupt)])
def test_a_failed_build_leaves_nothing(lab, error, kind):
    with pytest.raises(kind):
        lab.folder(Failing(error))
    assert everything(lab.store.root) == ["note"]


def test_22_disk_full_in_a_build(lab):
    """Failure 22: a user's message with a remedy, nothing left behind, and what was finished stays."""
    lab.folder(Note("finished"))
    before = everything(lab.store.root)
    with pytest.raises(UserError, match=r"No space left.*free some space.*PERSONA_COUPLING_CACHE"):
        lab.folder(Failing("ENOSPC"))
    assert everything(lab.store.root) == before
    assert lab.folder(Note("finished"))


def test_22_disk_full_while_the_manifest_is_written(lab, monkeypatch):
    """Failure 22: the artifact's files are written and the last write fails."""

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            lab.folder(Note("a"))
    assert everything(lab.store.root) == ["note"]
    assert (lab.folder(Note("a")) / "deep" / "note.txt").read_text() == "a"


def test_a_store_that_cannot_be_written_names_itself(lab):
    with pytest.raises(UserError, match=r"cannot be written.*PERSONA_COUPLING_CACHE"):
        lab.folder(Failing("EACCES"))
    blocked = Lab(Store(Path(__file__) / "root"))
    with pytest.raises(UserError, match=r"test_store.py"):
        blocked.folder(Note("a"))


# --------------------------------------------------------------------------------------------------- damage


def damaged(lab, note):
    """A store that has verified nothing yet, as in a new process."""
    with pytest.raises(CorruptArtifact) as caught:
        Lab(Store(lab.store.root)).folder(note)
    return str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named_with_a_remedy(lab, damage):
    note = Note("abcdef")
    folder = lab.folder(note)
    path = folder / "deep" / "note.txt"
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    message = damaged(lab, note)
    assert str(path) in message
    assert f"Delete the folder {folder} and run again" in message
    for part in sorted(folder.rglob("*"), reverse=True):  # what the remedy says
        part.rmdir() if part.is_dir() else part.unlink()
    folder.rmdir()
    assert (Lab(Store(lab.store.root)).folder(note) / "deep" / "note.txt").read_text() == "abcdef"


def drop_files(manifest):
    del manifest["files"]


def drop_hash(manifest):
    next(iter(manifest["files"].values())).pop("sha256")


def other_hash(manifest):
    next(iter(manifest["files"].values()))["sha256"] = "0" * 64


def other_key(manifest):
    manifest["key"] = "0" * 20


def other_description(manifest):
    manifest["description"]["text"] = "b"


@pytest.mark.parametrize("edit", [other_description, other_key, other_hash, drop_files, drop_hash])
def test_an_edited_manifest_is_refused(lab, edit):
    note = Note("a")
    path = lab.folder(note) / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    message = damaged(lab, note)
    assert str(path.parent) in message
    assert "Delete the folder" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 1}'])
def test_an_unreadable_manifest_is_refused(lab, text):
    note = Note("a")
    path = lab.folder(note) / "manifest.json"
    path.write_text(text)
    assert str(path) in damaged(lab, note)


# ------------------------------------------------------------------------------------------------- processes

SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from persona_coupling import store
from persona_coupling.store import Lab, Stage, Store


@dataclass(frozen=True)
class Slow(Stage):
    size: int
    kind: ClassVar[str] = "slow"

    def build(self, folder, lab):
        with open(os.environ["COUNT"], "a") as handle:
            handle.write("built\\n")
        (folder / "first").write_bytes(b"1" * self.size)
        pause("build")
        (folder / "second").write_bytes(b"2" * self.size)


def pause(moment):
    if os.environ.get("PAUSE") == moment:
        print("paused", flush=True)
        time.sleep(float(os.environ["SECONDS_OF_PAUSE"]))


def slow_sync(_handle):
    pause("manifest")


store.os.fsync = slow_sync
lab = Lab(Store(Path(sys.argv[1])), say=lambda line: print(line, flush=True))
print(lab.folder(Slow(1000)), flush=True)
"""


@pytest.fixture
def process(tmp_path):
    """Start a process that makes one slow artifact in `tmp_path / root`."""
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    started = []

    def start(pause="", seconds=0.0):
        environment = {
            **os.environ,
            "COUNT": str(tmp_path / "count"),
            "PAUSE": pause,
            "SECONDS_OF_PAUSE": str(seconds),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        started.append(
            subprocess.Popen(
                [sys.executable, str(script), str(tmp_path / "root")],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for running in started:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("moment", ["build", "manifest"])
def test_12_a_kill_leaves_nothing_that_counts(tmp_path, process, moment):
    """Failure 12: SIGKILL during a build; nothing partial is visible, the next make succeeds and cleans up."""
    killed = process(moment, 60)
    assert killed.stdout.readline() == "paused\n"
    names = {p.name for p in (tmp_path / "root" / "slow").iterdir()}
    assert len(names) == 1
    assert names.pop().startswith(".")  # half-written, under a hidden name
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = [p for p in (tmp_path / "root" / "slow").iterdir() if not p.name.startswith(".")]
    assert left == []
    output, errors = process().communicate(timeout=60)
    folder = Path(output.strip())
    assert folder.is_dir(), errors
    assert [p.name for p in (tmp_path / "root" / "slow").iterdir()] == [folder.name]
    assert sorted(p.name for p in folder.iterdir()) == ["first", "manifest.json", "second"]
    assert (folder / "second").read_bytes() == b"2" * 1000
    assert (tmp_path / "count").read_text().count("built") == 2


def test_a_folder_without_a_manifest_is_rebuilt(lab):
    note = Note("a")
    folder = lab.store.folder(note)
    folder.mkdir(parents=True)
    (folder / "stray.txt").write_text("stray")
    assert not lab.store.has(note)
    assert sorted(p.name for p in lab.folder(note).iterdir()) == ["deep", "manifest.json"]


def test_13_two_processes_build_once(tmp_path, process):
    """Failure 13: the second waits for the first and takes what it made."""
    first = process("build", 1.5)
    assert first.stdout.readline() == "paused\n"
    second = process("build", 1.5)
    began = time.monotonic()
    outputs = [p.communicate(timeout=60)[0].splitlines() for p in (first, second)]
    assert time.monotonic() - began < 30
    assert outputs[1][0].startswith("waiting for another process")
    assert outputs[0][-1] == outputs[1][-1]
    assert (tmp_path / "count").read_text() == "built\n"
