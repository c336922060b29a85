"""Keeping the store small and whole: what nothing refers to any more, and what is damaged, is shown, and removed when
that is asked for.

An artifact is referred to by the design of any experiment under any profile that is shipped, with the profile's seeds and
those of stored results, and by the record of any stored result. What is left over was made by other code, other values,
or for seeds and models of which no results were kept.

Every removal holds the artifact's lock, and renames before it deletes: a kill leaves a temporary folder, never half an
artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from persona_coupling import notebooks, profiles, untrusted
from persona_coupling.errors import UserError
from persona_coupling.store import KEY_LENGTH, MANIFEST, Store, canonical_json, sha256_of

KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
TEMPORARY = re.compile(rf"\.([0-9a-f]{{{KEY_LENGTH}}})\..+")
EXPLANATION = """`nox -s clean -- --stale` shows which artifacts no design and no stored result refers to, with their sizes,
asks, and removes them; `--yes` does not ask. Temporary folders of writers that died and unused lock files go too.
`--seeds 7,8` and `--model FOLDER` name a run of which no results are stored yet: its artifacts are kept.
`--damaged` does the same with artifacts that are not what their manifest says: the next run makes them again.
Nothing was removed."""


@dataclass(frozen=True)
class Leftover:
    """A folder that nothing refers to: an artifact, or a temporary one of a dead writer."""

    path: Path
    key: str
    what: str
    bytes: int


@dataclass
class Leftovers:
    """What can be removed from a store, and what is left alone because somebody holds its lock."""

    stale: list[Leftover] = field(default_factory=list)
    damaged: list[Leftover] = field(default_factory=list)
    temporary: list[Leftover] = field(default_factory=list)
    locks: list[Path] = field(default_factory=list)
    held: list[str] = field(default_factory=list)  # keys
    kept: int = 0

    @property
    def folders(self) -> list[Leftover]:
        """All that goes, each once."""
        return list({left.path: left for left in (*self.stale, *self.temporary, *self.damaged)}.values())

    def text(self) -> str:
        """For people: every folder with its size."""
        lines = [
            f"  {_megabytes(left.bytes):>10}  {left.path.parent.name}/{left.path.name}  {left.what}"
            for left in self.folders
        ]
        total = _megabytes(sum(left.bytes for left in self.folders))
        lines.append(
            f"  {len(self.stale)} artifacts that nothing refers to, {len(self.damaged)} damaged ones, "
            f"{len(self.temporary)} temporary folders, {len(self.locks)} unused lock files: {total}. "
            f"{self.kept} artifacts are kept."
        )
        return "\n".join(lines)


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"


# ------------------------------------------------------------------------------------------------ references


def referred(seeds: list[int] | None = None, model: str = "") -> set[str]:
    """Keys of all artifacts that a shipped design or a stored result refers to, and of a run with other seeds or another
    model if these are given. Raises UserError when a design or a record cannot be read: then nobody knows."""
    return designed(seeds, model) | {str(key) for _, _, stored in _stored() for key in stored["stages"]}


def designed(seeds: list[int] | None = None, model: str = "") -> set[str]:
    """`referred` without what stored results name: what today's code would ask for."""
    experiments = notebooks.discover()
    runs: set[tuple[str, str, str, tuple[int, ...]]] = set()  # experiment, profile, model, seeds
    for experiment in experiments:
        runs |= {(experiment.name, name, "", ()) for name in profiles.names()}
        if seeds or model:
            runs |= {(experiment.name, name, model, tuple(seeds or ())) for name in profiles.names()}
    runs |= {
        (experiment, profile, "", tuple(stored["profile"]["seeds"]))
        for experiment, profile, stored in _stored()
        if profile in profiles.names()
    }
    by_name = {experiment.name: experiment for experiment in experiments}
    keys: set[str] = set()
    for name, profile, other, chosen in sorted(runs):
        parameters = {"profile": profile, "seeds": list(chosen), "model": other}
        keys |= {stage.key for stage in notebooks.design_of(by_name[name], parameters).stages()}
    return keys


def _stored() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Experiment, profile and record of all stored results."""
    for experiment in notebooks.discover():
        for path in sorted((experiment.folder / "results").glob("*/record.json")):
            yield experiment.name, path.parent.name, _record(path)


def _record(path: Path) -> dict[str, Any]:
    record = untrusted.read_json(path)
    try:
        seeds, stages = record["profile"]["seeds"], record["stages"]
        if not all(type(seed) is int for seed in seeds) or not isinstance(stages, dict):
            raise ValueError("seeds or stages")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say what its results rest on ({error}); nothing was removed.") from error
    return dict(record)


# ------------------------------------------------------------------------------------------------- leftovers


def leftovers(store: Store, keys: set[str]) -> Leftovers:
    """What of a store `keys` do not name; looks only, and skips what is locked."""
    found = Leftovers()
    for path in sorted(store.root.glob("*/*")):
        if path.is_symlink() or not path.is_dir() or path.parent.name == "locks" or path.parent.is_symlink():
            continue
        temporary = TEMPORARY.fullmatch(path.name)
        key = temporary.group(1) if temporary else path.name
        if not KEY.fullmatch(key) or not (temporary or _is_artifact(path)):
            continue  # not ours
        if not temporary and key in keys:
            found.kept += 1
        elif _held(store, key):
            found.held.append(key)
        elif temporary:
            found.temporary.append(Leftover(path, key, "temporary folder of a writer that is gone", _size(path)))
        else:
            found.stale.append(Leftover(path, key, _what(path), _size(path)))
    for path in sorted((store.root / "locks").glob("*.lock")):
        if _held(store, path.stem):
            found.held.append(path.stem)
        elif KEY.fullmatch(path.stem):
            found.locks.append(path)
    found.held = sorted(set(found.held))
    return found


def damage(store: Store) -> Leftovers:
    """The artifacts of a store that are not what their own manifest says; reads every byte, and skips what is locked."""
    found = Leftovers()
    for path in sorted(store.root.glob(f"*/*/{MANIFEST}")):
        folder = path.parent
        if not KEY.fullmatch(folder.name) or folder.is_symlink() or folder.parent.is_symlink():
            continue  # not ours
        if _held(store, folder.name):
            found.held.append(folder.name)
        elif fault := fault_of(folder):
            found.damaged.append(Leftover(folder, folder.name, fault, _size(folder)))
        else:
            found.kept += 1
    return found


def fault_of(folder: Path) -> str:
    """What is wrong with an artifact by its manifest alone, without knowing its stage; empty if nothing is. The name of
    a folder is the hash of the description in it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        key = hashlib.sha256(canonical_json(manifest["description"]).encode()).hexdigest()[:KEY_LENGTH]
        if not folder.name == key == manifest["key"] or folder.parent.name != manifest["kind"]:
            return f"{MANIFEST} describes another artifact"
        files = {name: (recorded["bytes"], recorded["sha256"]) for name, recorded in manifest["files"].items()}
        untrusted.check_files(folder, files, MANIFEST)
    except (AttributeError, OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read or does not fit ({type(error).__name__}: {error})"
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (path.stat().st_size, sha256_of(path)) != recorded:
            return f"{name} differs from its manifest"
    return ""


def _is_artifact(path: Path) -> bool:
    """Whether a folder's manifest says that it is this very artifact."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return (manifest["kind"], manifest["key"]) == (path.parent.name, path.name)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _what(path: Path) -> str:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    described, made = manifest.get("description", {}), manifest.get("provenance", {}).get("made", "")
    seed = f", seed {described['seed']}" if "seed" in described else ""
    return f"{described.get('type', '')}{seed}, made {made[:10] or 'at an unknown time'}"


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def _lock(store: Store, key: str) -> Path:
    return store.root / "locks" / f"{key}.lock"


@contextmanager
def _holding(store: Store, key: str) -> Iterator[bool]:
    """Hold an artifact's lock inside; yields whether it could be had."""
    _lock(store, key).parent.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(_lock(store, key)).acquire(timeout=0))
        except Timeout:
            yield False
            return
        yield True


def _held(store: Store, key: str) -> bool:
    if not _lock(store, key).exists():
        return False
    with _holding(store, key) as free:
        return not free


def remove(found: Leftovers, store: Store) -> int:
    """Remove them, each under its lock; returns the bytes that were freed. What somebody has locked meanwhile stays."""
    freed = 0
    for left in found.folders:
        with _holding(store, left.key) as free:
            if free and left.path.exists():
                doomed = left.path
                if not TEMPORARY.fullmatch(doomed.name):  # gone as a whole, whatever happens to us
                    doomed = doomed.rename(doomed.parent / f".{left.key}.{os.getpid()}")
                shutil.rmtree(doomed)
                freed += left.bytes
    for path in dict.fromkeys((*found.locks, *(_lock(store, left.key) for left in found.folders))):
        with _holding(store, path.stem) as free:
            if free:  # whoever opened the file before this looks whether it is still there, and opens a new one
                path.unlink(missing_ok=True)
    return freed


def clean(
    store: Store, *, stale: bool, yes: bool, damaged: bool = False, seeds: list[int] | None = None, model: str = ""
) -> None:
    """The command. With neither `stale` nor `damaged` it explains itself. Raises UserError while any lock is held: a run
    that is under way may have made artifacts for seeds or a model that no design names, and reads those it has checked."""
    if not stale and not damaged:
        print(EXPLANATION)
        return
    found = leftovers(store, referred(seeds, model)) if stale else Leftovers()
    if damaged:
        looked = damage(store)
        found.damaged, found.kept = looked.damaged, looked.kept - len(found.stale)
        found.held = sorted({*found.held, *looked.held})
    print(found.text())
    if found.held:
        raise UserError(
            f"Another process is making {', '.join(found.held[:3])}; what it made before may be among these. Nothing was "
            "removed: run again when it is done."
        )
    if not (found.folders or found.locks):
        return
    if not yes:
        if not sys.stdin.isatty():
            print("Nothing was removed: there is nobody to ask. Add --yes to remove these.")
            return
        if input(f"Remove them from {store.root}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was removed.")
            return
    print(f"{_megabytes(remove(found, store))} freed in {store.root}.")
