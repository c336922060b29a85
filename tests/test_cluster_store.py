"""Artifacts through an exchange: whole or absent, one writer's copy, verified on arrival; each guard seen to fire."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
from cluster_stages import Step

from persona_coupling import cluster_store, storage
from persona_coupling.cluster_store import Exchange, ExchangeError, TravellingStore
from persona_coupling.errors import CorruptArtifact, UserError
from persona_coupling.models import LocalModel
from persona_coupling.store import Lab, Store


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path / 'exchange'}"


def node(tmp_path, name, url):
    return Lab(TravellingStore(tmp_path / name, Exchange(url)))


def archives(tmp_path):
    return sorted((tmp_path / "exchange").rglob("*.tar"))


def test_what_one_node_made_another_takes_and_does_not_make(tmp_path, url):
    log = tmp_path / "log"
    stage = Step("a", str(log))
    made = node(tmp_path, "one", url).folder(stage)
    taken = node(tmp_path, "two", url).folder(stage)
    assert log.read_text() == "a\n"
    assert taken != made
    assert {p.name: p.read_bytes() for p in taken.iterdir()} == {p.name: p.read_bytes() for p in made.iterdir()}
    child = Step("child", str(log), (stage,))
    node(tmp_path, "three", url).folder(child)  # which fetches its parent by itself
    assert log.read_text() == "a\nchild\n"
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]


def test_what_is_half_there_is_not_there(tmp_path, url):
    """An archive without a pointer; a pointer upon which a writer was killed; both are made good by the next writer."""
    log = tmp_path / "log"
    stage = Step("a", str(log))
    exchange = Exchange(url)
    place = tmp_path / "exchange" / stage.kind / stage.key
    place.mkdir(parents=True)
    (place / "half.tar").write_bytes(b"half")
    assert not exchange.has(stage)
    (place / cluster_store.WHOLE).write_bytes(b'{"arch')
    assert not exchange.has(stage)
    node(tmp_path, "one", url).folder(stage)
    assert exchange.has(stage)
    node(tmp_path, "two", url).folder(stage)
    assert log.read_text() == "a\n"


KILLED = """
import os, signal, sys
from pathlib import Path
from cluster_stages import Step
from persona_coupling import cluster_store
from persona_coupling.store import Lab
create = cluster_store.Exchange._create
def killed(self, *arguments):
    os.kill(os.getpid(), signal.SIGKILL)
cluster_store.Exchange._create = killed
store = cluster_store.TravellingStore(Path(sys.argv[1]), cluster_store.Exchange(sys.argv[2]))
Lab(store).folder(Step("a", sys.argv[3]))
"""


def test_a_writer_killed_before_the_pointer_leaves_nothing_that_counts(tmp_path, url):
    log = str(tmp_path / "log")
    source = os.pathsep.join([str(Path(cluster_store.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "one"), url, log],
        env={**os.environ, "PYTHONPATH": source},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert len(archives(tmp_path)) == 1, "the archive had been written"
    assert not Exchange(url).has(Step("a", log))
    node(tmp_path, "one", url).folder(Step("a", log))  # here it is finished: only the copy is repeated
    assert Exchange(url).has(Step("a", log))
    assert Path(log).read_text() == "a\n"


def test_of_two_writers_the_first_counts_and_the_second_takes_its_copy(tmp_path, url, monkeypatch):
    log = str(tmp_path / "log")
    stage = Step("a", log)
    first, second = node(tmp_path, "one", url), node(tmp_path, "two", url)
    monkeypatch.setattr(Exchange, "pull", lambda *_: False)  # both look before either has written
    monkeypatch.setattr(Exchange, "has", lambda *_: False)
    first.folder(stage)
    monkeypatch.undo()
    kept = first.store.manifest(stage)
    Store.make(second.store, stage, second)
    assert second.store.manifest(stage) != kept, "the control: both have made it"
    monkeypatch.setattr(Exchange, "has", lambda *_: False)
    assert not Exchange(url).push(stage, second.store)
    second.store.share(stage)
    assert second.store.manifest(stage) == kept
    assert len(archives(tmp_path)) == 1


def repack(path, change):
    """The archive at `path` with other members, and its pointer made to fit: what a stranger who can write may do."""
    members = {}
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pointer = {"archive": path.name, "sha256": cluster_store.sha256_of(path)}
    (path.parent / cluster_store.WHOLE).write_text(json.dumps(pointer))


DAMAGE = {
    "cut off": lambda p: p.write_bytes(p.read_bytes()[:-100]),
    "one bit": lambda p: p.write_bytes(p.read_bytes()[:600] + bytes([p.read_bytes()[600] ^ 1]) + p.read_bytes()[601:]),
    "gone": lambda p: p.unlink(),
    "another file": lambda p: repack(p, lambda members: members.update({"./made": b"b"})),
    "one file more": lambda p: repack(p, lambda members: members.update({"./more": b"b"})),
    "a file outside": lambda p: repack(p, lambda members: members.update({"../../../evil": b"b"})),
    "another artifact": lambda p: repack(
        p, lambda members: members.update({"./manifest.json": members["./manifest.json"].replace(b'"a"', b'"b"')})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_arrives_damaged_is_refused_and_leaves_nothing(tmp_path, url, damage):
    stage = Step("a", str(tmp_path / "log"))
    node(tmp_path, "one", url).folder(stage)
    DAMAGE[damage](archives(tmp_path)[0])
    two = node(tmp_path, "two", url)
    with pytest.raises(CorruptArtifact, match=rf"exchange/step/{stage.key} .*Delete it"):
        two.folder(stage)
    assert not two.store.has(stage)
    assert not [path for path in (tmp_path / "two").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not list(tmp_path.rglob("evil"))
    assert Path(stage.log).read_text() == "a\n", "it is not made again behind the user's back"


def test_a_pointer_to_a_folder_of_one_machine_does_not_travel(tmp_path, url):
    stage = LocalModel("0" * 64, "/models/mine")
    for name in ("one", "two"):
        assert node(tmp_path, name, url).folder(stage).is_dir()
    assert not (tmp_path / "exchange").exists()


def test_an_exchange_that_cannot_be_used_is_no_fault_of_the_node(tmp_path):
    (tmp_path / "file").write_text("")
    exchange = Exchange(f"file://{tmp_path / 'file'}")
    with pytest.raises(ExchangeError, match="cannot be used"):
        exchange.check()
    with pytest.raises(UserError, match="fsspec's package"):
        Exchange("nonsense://bucket")
    with pytest.raises(UserError, match="lives in one process"):
        Exchange("memory://x")
    Exchange(f"file://{tmp_path / 'new'}").check()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_system_that_cannot_create_exclusively_is_looked_at_first(tmp_path, url, monkeypatch):
    stage = Step("a", str(tmp_path / "log"))
    opened = fsspec.implementations.local.LocalFileSystem.open

    def plain(self, path, mode="rb", **more):
        if mode == "xb":
            raise NotImplementedError(mode)
        return opened(self, path, mode, **more)

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "open", plain)
    one = node(tmp_path, "one", url)
    one.folder(stage)
    assert Exchange(url).has(stage)
    assert not Exchange(url).push(stage, one.store)
    assert len(archives(tmp_path)) == 1


def test_an_error_in_words_keeps_what_the_system_said(tmp_path):
    worded = storage.in_words(OSError(28, "No space left on device"), tmp_path)
    assert storage.cause(worded).errno == 28
