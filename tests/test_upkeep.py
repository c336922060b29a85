"""Why a cell is missing, and what may be removed: worked out by hand on stages of a few fields."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from filelock import FileLock

from persona_coupling import staleness, upkeep
from persona_coupling.errors import UserError
from persona_coupling.store import Lab, Stage, Store, in_order


@dataclass(frozen=True)
class Rows(Stage):
    rate: float
    seed: int = 0
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.values", "persona_coupling.score")

    def build(self, folder, lab):
        (folder / "x").write_text("x" * 1000)


@dataclass(frozen=True)
class Read(Stage):
    rows: Stage
    kind: ClassVar[str] = "read"

    def build(self, folder, lab):
        lab.folder(self.rows)
        (folder / "y").write_text("y")


@pytest.fixture
def lab(tmp_path):
    return Lab(Store(tmp_path / "root"))


def why(lab, stage, elsewhere=frozenset):
    stages = in_order([stage])
    return staleness.explain(stages, [s for s in stages if not lab.store.has(s)], lab.store, elsewhere)


def test_the_field_that_changed_is_named_and_handed_down(lab):
    lab.folder(Read(Rows(0.1)))
    found = why(lab, Read(Rows(0.2)))
    assert found[Rows(0.2).key].reasons == ["rate 0.1 -> 0.2"]
    assert found[Read(Rows(0.2)).key].reasons == ["rate 0.1 -> 0.2"], "of its input, nothing of its own"
    assert found[Read(Rows(0.2)).key].relative.key == Read(Rows(0.1)).key


def test_another_seed_and_what_others_ask_for_are_no_relatives(lab):
    lab.folder(Rows(0.1))
    assert why(lab, Rows(0.1, seed=1))[Rows(0.1, seed=1).key].relative is None
    assert why(lab, Rows(0.2), lambda: {Rows(0.1).key})[Rows(0.2).key].relative is None
    assert why(lab, Rows(0.2))[Rows(0.2).key].relative is not None, "the control"


def test_what_only_stored_results_name_is_kept_but_no_design(monkeypatch):
    monkeypatch.setattr(upkeep.notebooks, "discover", lambda: ())
    record = {"profile": {"seeds": [0]}, "stages": {"a" * 20: 1.0}}
    monkeypatch.setattr(upkeep, "_stored", lambda: [("00_x", "of another time", record)])
    assert upkeep.referred() == {"a" * 20}
    assert upkeep.designed() == set()


@pytest.mark.parametrize(("named", "said"), [(True, "score changed"), (False, "one of its 2 modules changed")])
def test_the_module_that_changed_is_named(lab, monkeypatch, named, said):
    lab.folder(Rows(0.1))
    path = lab.store.folder(Rows(0.1)) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert set(manifest["made_of"]) == {"class Rows", "persona_coupling.values", "persona_coupling.score"}
    # as if it had been made by other logic of one module
    manifest["made_of"]["persona_coupling.score"] = manifest["description"]["code"][1] = "0" * 20
    manifest["key"] = "1" * 20
    if not named:
        del manifest["made_of"]
    path.write_text(json.dumps(manifest))
    path.parent.rename(path.parent.parent / ("1" * 20))
    assert why(lab, Rows(0.1))[Rows(0.1).key].reasons == [said]


def test_clean_removes_what_nothing_refers_to_and_nothing_else(lab, monkeypatch, capsys):
    wanted, old = Read(Rows(0.2)), Read(Rows(0.1))
    lab.folder(wanted)
    lab.folder(old)
    root = lab.store.root
    (root / "rows" / f".{'a' * 20}.1").mkdir()
    (root / "rows" / "mine").mkdir()
    (root / "rows" / ("b" * 20)).mkdir()  # no manifest: not known to be ours
    monkeypatch.setattr(upkeep, "referred", lambda *_: {wanted.key, Rows(0.2).key})
    upkeep.clean(lab.store, stale=False, yes=True)
    assert "Nothing was removed" in capsys.readouterr().out
    assert lab.store.has(old)
    upkeep.clean(lab.store, stale=True, yes=False)  # nobody to ask in a test
    assert lab.store.has(old)
    assert f"rows/{Rows(0.1).key}" in capsys.readouterr().out
    upkeep.clean(lab.store, stale=True, yes=True)
    assert not lab.store.has(old)
    assert not lab.store.has(Rows(0.1))
    assert Store(root).fetch(wanted)
    assert sorted(p.name for p in (root / "rows").iterdir()) == sorted([Rows(0.2).key, "b" * 20, "mine"])
    assert not list((root / "locks").iterdir())
    assert lab.folder(replace(old)), "and it can be made again"


def test_nothing_is_removed_while_a_lock_is_held(lab, monkeypatch):
    lab.folder(Rows(0.1))
    lab.folder(Rows(0.2))
    monkeypatch.setattr(upkeep, "referred", lambda *_: set())
    path = lab.store.root / "locks" / f"{Rows(0.2).key}.lock"
    with FileLock(path):
        assert [left.key for left in upkeep.leftovers(lab.store, set()).stale] == [Rows(0.1).key]
        with pytest.raises(UserError, match=f"is making {Rows(0.2).key}"):
            upkeep.clean(lab.store, stale=True, yes=True)
    assert lab.store.has(Rows(0.1))
    assert lab.store.has(Rows(0.2))
    assert path.exists()
    upkeep.clean(lab.store, stale=True, yes=True)
    assert not lab.store.has(Rows(0.2)), "the control"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "flip": (lambda f: flip(f / "x"), "x differs"),
    "cut": (lambda f: (f / "x").write_text("x" * 999), "x differs"),
    "absent": (lambda f: (f / "x").unlink(), "x is missing"),
    "planted": (lambda f: (f / "z").write_text("z"), "file z is not in it"),
    "manifest": (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
    "description": (lambda f: other(f / "manifest.json", description={"rate": 0.3}), "describes another"),
    "key": (lambda f: other(f / "manifest.json", key="0" * 20), "describes another"),
    "kind": (lambda f: other(f / "manifest.json", kind="read"), "describes another"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_found_and_made_again(lab, capsys, how):
    """All at once, by manifests alone: what is whole stays, and whether a design refers to it is not asked."""
    whole, broken = lab.folder(Read(Rows(0.2))), lab.folder(Rows(0.1))
    upkeep.clean(lab.store, stale=False, damaged=True, yes=True)
    assert "0 damaged ones" in capsys.readouterr().out, "the control"
    spoil, said = DAMAGE[how]
    spoil(broken)
    upkeep.clean(lab.store, stale=False, damaged=True, yes=False)  # nobody to ask in a test
    assert broken.is_dir()
    shown = capsys.readouterr().out
    assert f"rows/{broken.name}" in shown
    assert said in shown
    with FileLock(lab.store.root / "locks" / f"{broken.name}.lock"), pytest.raises(UserError, match="is making"):
        upkeep.clean(lab.store, stale=False, damaged=True, yes=True)
    upkeep.clean(lab.store, stale=False, damaged=True, yes=True)
    assert not broken.exists()
    assert whole.is_dir()
    assert (Lab(Store(lab.store.root)).folder(Rows(0.1)) / "x").read_text() == "x" * 1000
