"""Artifacts between machines that share no folder: each node has a store of its own, and any place that fsspec can reach
(`s3://`, `gs://`, `file://`, ...) holds a copy of what is finished.

An artifact travels as one archive under a name of its own, `kind/key/<random>.tar`; a small file `kind/key/whole.json`,
created last and once, says which archive counts. A kill at any moment leaves the whole artifact or an archive that nothing
names. Two writers: the first pointer counts, the second drops its own copy and takes the other's. What arrives is unpacked
beside the store, its files are held against its manifest, and only then does it get its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from persona_coupling import storage
from persona_coupling.errors import CorruptArtifact, UserError
from persona_coupling.models import POINTER
from persona_coupling.store import MANIFEST, Lab, Stage, Store, sha256_of

WHOLE = "whole.json"
BLOCK = 2**22  # bytes that are read at once


class ExchangeError(UserError):
    """The exchange cannot be reached, read or written: nothing that another node would do better."""


class Exchange:
    """Finished artifacts under an fsspec URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            # another node may write at any time: nothing that was listed before may be believed
            self.filesystem, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"--exchange {url}: {error}. Every node and this machine need fsspec's package for it "
                "(s3:// s3fs, gs:// gcsfs, abfs:// adlfs), and the credentials that it reads."
            ) from error
        if url.startswith("memory:"):
            raise UserError(f"--exchange {url} lives in one process. Give a URL that every node reaches.")

    def _place(self, stage: Stage, name: str) -> str:
        return f"{self.root.rstrip('/')}/{stage.kind}/{stage.key}/{name}"

    def has(self, stage: Stage) -> bool:
        """Whether the whole artifact is there."""
        return self._pointer(stage) is not None

    def check(self) -> None:
        """Raise ExchangeError unless a file can be written there and removed."""
        place = f"{self.root.rstrip('/')}/probe-{uuid.uuid4().hex}"
        with self._reached():
            self.filesystem.makedirs(self.root, exist_ok=True)
            self.filesystem.pipe_file(place, b"written")
            self.filesystem.rm_file(place)

    def _pointer(self, stage: Stage) -> dict[str, str] | None:
        """The archive that counts and its SHA-256. A pointer that a writer was killed upon counts as none."""
        try:
            with self._reached(FileNotFoundError):
                content = self.filesystem.cat_file(self._place(stage, WHOLE))
            found = json.loads(content)
            return {"archive": str(found["archive"]), "sha256": str(found["sha256"])}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def _reached(self, *passing: type[Exception]) -> Iterator[None]:
        """Raise ExchangeError for whatever a file system says: its libraries have exceptions of their own."""
        ours: tuple[type[Exception], ...] = (UserError, *passing)
        try:
            yield
        except ours:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ExchangeError(f"{self.url} cannot be used ({said}). Finished cells are kept; mend this.") from error

    def push(self, stage: Stage, store: Store) -> bool:
        """Copy a finished artifact there. Returns False if another writer's copy counts. Raises ExchangeError."""
        folder, archive = store.fetch(stage), f"{uuid.uuid4().hex}.tar"
        with self._reached():
            self.filesystem.makedirs(self._place(stage, ""), exist_ok=True)
            with self.filesystem.open(self._place(stage, archive), "wb") as handle:
                hashing: Any = _Hashing(handle)
                with tarfile.open(fileobj=hashing, mode="w|") as tar:  # streamed: no second copy on this disk
                    tar.add(folder, arcname=".")
            pointer = json.dumps({"archive": archive, "sha256": hashing.digest.hexdigest()}).encode()
            if self._create(self._place(stage, WHOLE), pointer, stage):
                return True
            self.filesystem.rm_file(self._place(stage, archive))
            return False

    def _create(self, place: str, content: bytes, stage: Stage) -> bool:
        """Write a small file unless it is there: the first of two writers wins where the file system can tell."""
        try:
            with self.filesystem.open(place, "xb") as handle:
                handle.write(content)
        except FileExistsError:
            if self._pointer(stage) is not None:
                return False
            self.filesystem.pipe_file(place, content)  # of a writer that was killed between name and content
        except (NotImplementedError, ValueError):  # a file system that cannot create exclusively
            if self._pointer(stage) is not None:
                return False
            self.filesystem.pipe_file(place, content)
        return True

    def pull(self, stage: Stage, store: Store) -> bool:
        """Copy an artifact from there into a store, under its lock. Returns whether it was there. Raises CorruptArtifact
        for one that is not what its manifest or its pointer says; then nothing of it is left in the store."""
        pointer = self._pointer(stage)
        if pointer is None:
            return False
        with storage.explained(store.root):
            (store.root / "locks").mkdir(parents=True, exist_ok=True)
            with FileLock(store.root / "locks" / f"{stage.key}.lock"):
                if not store.has(stage):
                    self._receive(stage, store, pointer)
        return True

    def _read(self, source: Any) -> bytes:
        with self._reached():
            return bytes(source.read(BLOCK))

    def _receive(self, stage: Stage, store: Store, pointer: dict[str, str]) -> None:
        final = store.folder(stage)
        final.parent.mkdir(parents=True, exist_ok=True)
        arriving = final.parent / f".{stage.key}.{os.getpid()}"  # the store's own name for what is not finished
        shutil.rmtree(arriving, ignore_errors=True)
        inner = Store(arriving)
        whence = f"{self.url}/{stage.kind}/{stage.key}"
        try:
            inner.folder(stage).mkdir(parents=True)
            packed = arriving / "packed.tar"
            try:
                with self._reached(FileNotFoundError):
                    source = self.filesystem.open(self._place(stage, pointer["archive"]), "rb")
            except FileNotFoundError as error:
                raise CorruptArtifact(f"{whence} names an archive that is not there. Delete it there.") from error
            with source, packed.open("wb") as handle:
                while block := self._read(source):
                    handle.write(block)
            if sha256_of(packed) != pointer["sha256"]:
                raise CorruptArtifact(f"{whence} differs from its pointer. Delete it there, and it is made again.")
            try:
                with tarfile.open(packed) as tar:
                    tar.extractall(inner.folder(stage), filter="data")
                packed.unlink()
                inner.fetch(stage)
            except (tarfile.TarError, CorruptArtifact) as error:
                raise CorruptArtifact(
                    f"{whence} is damaged ({error}). Delete it there, and it is made again."
                ) from error
            if final.exists():  # a folder without a manifest is nobody's artifact
                shutil.rmtree(final)
            inner.folder(stage).rename(final)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)


class _Hashing:
    """A file that is only written to, and the SHA-256 of what was."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.digest = handle, hashlib.sha256()

    def write(self, block: bytes) -> int:
        """Write bytes; returns how many."""
        self.digest.update(block)
        return int(self.handle.write(block))


class TravellingStore(Store):
    """A node's own store: what it lacks comes from the exchange if it is there, and what is made goes there."""

    def __init__(self, root: Path, exchange: Exchange) -> None:
        super().__init__(root)
        self.exchange = exchange
        self._there: set[str] = set()

    def make(self, stage: Stage, lab: Lab) -> Path:
        """Fetch or build, as a store does, and see that the exchange has it too."""
        if not self.has(stage):
            self.exchange.pull(stage, self)
        folder = super().make(stage, lab)
        self.share(stage)
        return folder

    def make_together(self, stages: Sequence[Stage], lab: Lab) -> dict[str, Exception]:
        """Build those that are neither here nor there."""
        for stage in stages:
            if not self.has(stage):
                self.exchange.pull(stage, self)
        return super().make_together(stages, lab)

    def share(self, stage: Stage) -> None:
        """Copy an artifact that is here to the exchange, unless it is there or points to a folder of this machine. Where
        another's copy was first, that one takes the place of ours."""
        if stage.key in self._there or (self.folder(stage) / POINTER).is_file():
            return
        if not self.exchange.has(stage) and not self.exchange.push(stage, self):
            with FileLock(self.root / "locks" / f"{stage.key}.lock"):
                own = self.folder(stage)
                doomed = own.rename(own.parent / f".{stage.key}.{os.getpid()}")
            shutil.rmtree(doomed)
            self.exchange.pull(stage, self)
        self._there.add(stage.key)
        assert (self.folder(stage) / MANIFEST).is_file()
