"""A content-addressed store: an artifact is named by what made it, and exists whole or not at all.

A stage is a frozen dataclass. Its key is the SHA-256 of its canonical JSON: its own fields, the keys of its parents, and
fingerprints of the code that builds it. What does not change a result (device, workers, verbosity) is in no key.

Writing: build in a temporary folder under the artifact's lock, write `manifest.json` last, rename. A kill at any moment
leaves either the whole artifact or a temporary folder that the next writer removes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from persona_coupling import memory, paths, provenance, storage, untrusted
from persona_coupling.errors import CorruptArtifact

MANIFEST = "manifest.json"
KEY_LENGTH = 20  # 80 bits: a collision among a million artifacts has probability 4e-13

Report = Callable[[float], None]
"""Called by a build with the fraction of its work that is done, 0 to 1."""


def share(report: Report, first: int, count: int, total: int) -> Report:
    """A report for items `first` to `first + count` of `total`."""
    return lambda fraction: report((first + fraction * count) / total)


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, no NaN. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@cache
def code_fingerprint(*modules: str) -> str:
    """Hex digest of the logic of some modules: their syntax trees without docstrings, so that a reworded comment
    or docstring keeps every key and a changed statement changes it."""
    digest = hashlib.sha256()
    for module in sorted(modules):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(module)
        digest.update(f"{module}\n{_logic(Path(spec.origin).read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:KEY_LENGTH]


@cache
def _logic(source: str) -> str:
    tree = ast.parse(source)
    _strip_docstrings(tree)
    return _written(tree)


def _written(node: Any) -> str:
    """A syntax tree as text that is the same under every version of Python: `ast.dump` gained fields and lost empty ones,
    and a key would depend on it."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({','.join(f'{name}={_written(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_written, node))}]"
    return repr(node)


@cache
def class_fingerprint(file: str, name: str) -> str:
    """Hex digest of a class's own logic, docstrings aside: a stage's `build` is part of its key, its neighbours' is not."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    # `work` only estimates minutes
    body.body = [n for n in body.body if not (isinstance(n, ast.FunctionDef) and n.name == "work")]
    _strip_docstrings(body)
    return hashlib.sha256(_written(body).encode()).hexdigest()[:KEY_LENGTH]


def _strip_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]


@dataclass(frozen=True)
class Work:
    """What a stage costs, in tokens of the model it runs, for estimates of minutes and disk only."""

    trained: int = 0
    sampled: int = 0
    scored: int = 0
    seconds: float = 0.0  # on top, independent of tokens
    megabytes: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A description of an artifact. Subclasses add fields, `kind`, `code` and `build`."""

    kind: ClassVar[str]
    code: ClassVar[tuple[str, ...]] = ()  # modules whose logic makes the artifact
    material: ClassVar[tuple[str, ...]] = ()  # files of the package's material that it reads
    unkeyed: ClassVar[tuple[str, ...]] = ()  # fields that say where an input lies, not what it is

    def build(self, folder: Path, lab: Lab) -> dict[str, Any] | None:
        """Write the artifact's files into an empty `folder`; fetch parents with `lab.folder(parent)`. What is returned
        is kept in the manifest's provenance: by which path an equal result was made."""
        raise NotImplementedError

    def stack_key(self) -> Hashable:
        """What stages must have in common to be built in one go by `build_together`; None: built alone."""
        return None

    @staticmethod
    def build_together(stages: list[Any], folders: list[Path], lab: Lab) -> list[dict[str, Any] | Exception]:
        """Build stages of one stack key, each into its folder. Returns for each what `build` would, or its error: one
        that fails leaves the others whole."""
        raise NotImplementedError

    def work(self) -> Work:
        """The expected cost of `build`."""
        return Work()

    @cached_property
    def description(self) -> dict[str, Any]:
        """The JSON object whose hash is the key."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in self.unkeyed]
        fields = {name: _plain(getattr(self, name)) for name in names}
        code = [class_fingerprint(inspect.getfile(type(self)), type(self).__name__), code_fingerprint(*self.code)]
        code += [sha256_of(paths.MATERIAL / name)[:KEY_LENGTH] for name in self.material]
        return {"kind": self.kind, "type": type(self).__name__, "code": code, **fields}

    @property
    def low_rank(self) -> bool:
        """Of a change of weights: whether its description says that all of it is of low rank."""
        return False

    def made_of(self) -> dict[str, str]:
        """Fingerprints by name of all that `code` in the description stands for, so that a change can be named: the
        class itself, every module, every file of material. Kept in the manifest, part of no key."""
        own = class_fingerprint(inspect.getfile(type(self)), type(self).__name__)
        modules = {module: code_fingerprint(module) for module in self.code}
        material = {f"material/{name}": sha256_of(paths.MATERIAL / name)[:KEY_LENGTH] for name in self.material}
        return {f"class {type(self).__name__}": own, **modules, **material}

    @cached_property
    def key(self) -> str:
        """The artifact's name."""
        return hashlib.sha256(canonical_json(self.description).encode()).hexdigest()[:KEY_LENGTH]

    def parents(self) -> tuple[Stage, ...]:
        """The stages whose artifacts this one reads, found among its fields."""
        return self._parents

    @cached_property
    def _parents(self) -> tuple[Stage, ...]:
        return tuple(stage for field in dataclasses.fields(self) for stage in _stages_in(getattr(self, field.name)))

    def __str__(self) -> str:
        return f"{self.kind}/{self.key}"


def _plain(value: Any) -> Any:
    """A value as JSON; a stage inside it as its key."""
    if isinstance(value, Stage):
        return {"kind": value.kind, "key": value.key}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"A stage field of type {type(value).__name__} has no canonical JSON.")


def _stages_in(value: Any) -> Iterator[Stage]:
    if isinstance(value, Stage):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _stages_in(getattr(value, field.name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _stages_in(item)


def in_order(stages: list[Stage]) -> list[Stage]:
    """The stages and all that they rest on, each once, parents first."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key in ordered:
            return
        for parent in stage.parents():
            visit(parent)
        ordered[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())


class Store:
    """Artifacts under one root folder: `root/kind/key/` with payload files and `manifest.json`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._verified: set[str] = set()

    def folder(self, stage: Stage) -> Path:
        """Where the artifact lies, or would."""
        return self.root / stage.kind / stage.key

    def has(self, stage: Stage) -> bool:
        """Whether the artifact exists (its content is checked when it is fetched)."""
        return (self.folder(stage) / MANIFEST).is_file()

    def manifest(self, stage: Stage) -> dict[str, Any]:
        """The artifact's manifest. Raises CorruptArtifact when it cannot be read or names another artifact."""
        path = self.folder(stage) / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            named, described = manifest["key"], manifest["description"]
            if not all(isinstance(f["bytes"], int) and f["sha256"] for f in manifest["files"].values()):
                raise ValueError("a file without size or hash")
            untrusted.check_files(path.parent, manifest["files"], MANIFEST)
        except (AttributeError, OSError, RecursionError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifact(f"{path} cannot be read ({error}). {self._remedy(stage)}") from error
        if named != stage.key or described != json.loads(canonical_json(stage.description)):
            raise CorruptArtifact(f"{path} describes another artifact than {stage}. {self._remedy(stage)}")
        return manifest

    def fetch(self, stage: Stage) -> Path:
        """The folder of an existing artifact whose files match its manifest.

        Hashes are computed once per process. Raises KeyError if it does not exist, CorruptArtifact if it is damaged.
        """
        folder = self.folder(stage)
        if not self.has(stage):
            raise KeyError(f"no artifact {stage}")
        if stage.key not in self._verified:
            for name, recorded in self.manifest(stage)["files"].items():
                path = folder / name
                if not path.is_file():
                    raise CorruptArtifact(f"{path} is missing. {self._remedy(stage)}")
                if path.stat().st_size != recorded["bytes"] or sha256_of(path) != recorded["sha256"]:
                    raise CorruptArtifact(f"{path} differs from its manifest. {self._remedy(stage)}")
            untrusted.check_pointer(folder, stage.description)
            self._verified.add(stage.key)
        return folder

    def _remedy(self, stage: Stage) -> str:
        return (
            f"Delete the folder {self.folder(stage)} and run again: it will be rebuilt, all else is kept. "
            "(`nox -s clean -- --damaged` finds all that are damaged.)"
        )

    def make(self, stage: Stage, lab: Lab) -> Path:
        """Fetch the artifact, building it first if it does not exist. One writer at a time, across processes."""
        if self.has(stage):
            return self.fetch(stage)
        lock_path = self.root / "locks" / f"{stage.key}.lock"
        with storage.explained(self.root):
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(lock_path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                lab.say(f"waiting for another process that is making {stage}")
                lock.acquire()
            try:
                if not self.has(stage):
                    self._build(stage, lab)
            finally:
                lock.release()
        return self.fetch(stage)

    def make_together(self, stages: Sequence[Stage], lab: Lab) -> dict[str, Exception]:
        """Build stages of one stack key in one go, each under its own lock and written whole. Returns the errors of those
        that failed, by key. One that another process is making is left to it: `make` waits for it."""
        errors: dict[str, Exception] = {}
        with storage.explained(self.root), contextlib.ExitStack() as held:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            missing = []
            for stage in stages:
                lock = FileLock(self.root / "locks" / f"{stage.key}.lock")
                with contextlib.suppress(Timeout):
                    held.enter_context(lock.acquire(timeout=0))
                    missing += [] if self.has(stage) else [stage]
            if not missing:
                return {}
            memory.watch(lab.device)
            started = time.monotonic()
            folders = [self._begin(stage) for stage in missing]
            try:
                outcomes = type(missing[0]).build_together(missing, folders, lab)
                seconds = (time.monotonic() - started) / len(missing)
                for stage, folder, outcome in zip(missing, folders, outcomes, strict=True):
                    if isinstance(outcome, Exception):
                        errors[stage.key] = storage.in_words(outcome, self.root)
                    else:
                        self._finish(stage, folder, lab, seconds, outcome)
            finally:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)  # those that were finished have been renamed
        return errors

    def _begin(self, stage: Stage) -> Path:
        """An empty temporary folder for an artifact whose lock we hold."""
        final = self.folder(stage)
        final.parent.mkdir(parents=True, exist_ok=True)
        for stale in final.parent.glob(f".{stage.key}.*"):  # we hold the lock: its writer is gone
            shutil.rmtree(stale)
        if final.exists():  # a folder without a manifest is nobody's artifact
            shutil.rmtree(final)
        temporary = final.parent / f".{stage.key}.{os.getpid()}"
        temporary.mkdir()
        return temporary

    def _finish(self, stage: Stage, temporary: Path, lab: Lab, seconds: float, notes: dict[str, Any] | None) -> None:
        """Write the manifest and give the folder its name."""
        files = {
            str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "kind": stage.kind,
            "key": stage.key,
            "description": stage.description,
            "made_of": stage.made_of(),
            "files": files,
            "provenance": {
                **provenance.record(lab.device),
                "seconds": round(seconds, 3),
                **({"peak_gigabytes": round(peak, 2)} if (peak := memory.peak(lab.device)) else {}),
                **(notes or {}),
            },
        }
        with (temporary / MANIFEST).open("w", encoding="utf-8") as handle:
            json.dump(manifest, handle, indent=1, ensure_ascii=False)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(self.folder(stage))

    def _build(self, stage: Stage, lab: Lab) -> None:
        memory.watch(lab.device)
        temporary, started = self._begin(stage), time.monotonic()
        try:
            notes = stage.build(temporary, lab)
            self._finish(stage, temporary, lab, time.monotonic() - started, notes)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


class Lab:
    """What a build may use besides its description: the store, the device, and a way to report progress."""

    def __init__(
        self,
        store: Store,
        *,
        device: str = "cpu",
        report: Report = lambda _fraction: None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.store = store
        self.device = device
        self.report = report
        self.say = say

    def folder(self, stage: Stage) -> Path:
        """The artifact's folder, built if need be."""
        return self.store.make(stage, self)
