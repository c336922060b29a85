"""Runs of the same claims that came before, set beside this copy's, and held against the commits that they are from."""

import json

import pytest

from persona_coupling import earlier, outputs, provenance
from persona_coupling.errors import GuardError, UserError
from persona_coupling.verification import verify

NOW = [
    {"id": "a", "statement": "It breaks.", "value": 0.5, "verdict": "supported"},
    {"id": "b", "statement": "It bends.", "value": 0.9, "verdict": "refuted"},
    {"id": "c", "statement": "It was not seen.", "value": None, "verdict": "not run"},
]
THEN = [
    {"id": "a", "statement": "It breaks.", "value": 0.4, "low": 0.3, "high": 0.6, "verdict": "supported", "why": ""},
    {"id": "b", "statement": "It bends.", "value": 0.4, "low": 0.3, "high": 0.6, "verdict": "supported", "why": ""},
    {
        "id": "c",
        "statement": "It was not seen.",
        "value": None,
        "low": None,
        "high": None,
        "verdict": "not run",
        "why": "",
    },
]
STAGES = {"k1": 1.0, "k2": 2.0}
INDEX = {
    "experiments": ["00_x"],
    "profile": {"seeds": [2], "sft": {"steps": 9}},
    "claims": [{**row, "more": 1} for row in THEN],
    "provenance": {"00_x": {"commit": "abc / def", "device": "a card", "made": "then"}},
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A repository whose git knows one commit with an index."""
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    (tmp_path / "paper").mkdir()

    def git(*arguments):
        held = {"index": INDEX, "00_x": {"experiment": "00_x", "stages": STAGES}}
        named = {
            ("show", f"abc:paper/generated/full/{name}.json"): json.dumps(content) for name, content in held.items()
        }
        return named.get(arguments)

    monkeypatch.setattr(provenance, "git", git)
    return tmp_path / "paper"


def read(kind, rows=NOW, *, profile="full", stages=STAGES, more=(), **values):
    keys = earlier.keys_of([{"experiment": "00_x", "stages": stages}, *more])
    return earlier.read(kind, profile, earlier.Copy(rows, {**INDEX["profile"], **values}, keys))


def test_where_nothing_came_before_nothing_is_set_beside(there):
    assert {read(kind) for kind in earlier.KINDS} == {None}
    assert verify.check_earlier("full").status == "holds"


def test_a_commits_verdicts_are_kept_and_counted_up(there):
    earlier.main(["repeat", "abc"])
    found = read("repeat")
    assert found["claims"] == THEN
    assert found["made_by"] == {"commit": ["abc", "def"], "device": ["a card"], "made": ["then"]}
    assert (found["seeds"], found["steps"]) == ([2], 9)
    assert (found["agree"], found["differ"], found["measured"], found["within"]) == (2, ["b"], 2, 1)
    assert read("repeat", profile="quick") is None
    assert read("earlier") is None
    assert read("repeat", seeds=[2, 3]) is None, "other seeds repeat nothing"
    assert "1 as their commits hold them" in verify.check_earlier("full").why


def test_a_repeat_says_whether_it_is_of_the_same_code(there):
    earlier.main(["repeat", "abc"])
    assert read("repeat")["same_code"]
    assert not read("repeat", stages={**STAGES, "k3": 0.0})["same_code"]
    assert read("repeat", more=[{"experiment": "01_y", "stages": {"k9": 1.0}}])["same_code"], "one more question"
    assert read("repeat", gates={"lost": 1.0}) is not None, "thresholds are applied anew"
    assert read("repeat", sft={"steps": 8}) is None, "another dose repeats nothing"
    assert read("repeat", model={"name": "another"}) is None
    assert read("repeat", model={"path": "/elsewhere"})["agree"] == 2, "where a model lies does not matter"
    kept = outputs.read(earlier.path("repeat", "full"))
    outputs.write_json(earlier.path("repeat", "full"), {**kept, "keys": None})
    assert not read("repeat")["same_code"], "what git did not tell is not the same"


def test_further_seeds_share_none_with_this_copy(there):
    earlier.main(["fresh", "abc"])
    assert (read("fresh", seeds=[0, 1])["agree"], read("fresh", seeds=[0, 1])["within"]) == (2, 1)
    assert "same_code" not in read("fresh", seeds=[0, 1]), "keys hold seeds"
    assert read("fresh", seeds=[1, 2]) is None


def test_a_run_of_other_claims_is_refused(there):
    earlier.main(["earlier", "abc"])
    with pytest.raises(GuardError, match=r"earlier-full\.json: b is not the claim that it was"):
        read("earlier", [NOW[0], {**NOW[1], "statement": "It mends."}, NOW[2]])
    with pytest.raises(GuardError, match="a is not the claim that it was"):
        read("earlier", NOW[1:])


def test_a_commit_without_an_index_is_named(there):
    with pytest.raises(UserError, match=r"no paper/generated/full/index.json at nowhere"):
        earlier.main(["repeat", "nowhere"])


def test_a_changed_verdict_of_then_is_found(there):
    earlier.main(["repeat", "abc"])
    path = earlier.path("repeat", "full")
    kept = outputs.read(path)
    kept["claims"][1]["verdict"] = "refuted"
    outputs.write_json(path, kept)
    assert verify.check_earlier("full").status == "fails"
    assert "repeat-full.json differs in claims from abc" in verify.check_earlier("full").why
    outputs.write_json(path, {**kept, "commit": "gone"})
    assert verify.check_earlier("full").status == "skipped"
