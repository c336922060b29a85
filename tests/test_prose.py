"""The headline: chosen by verdicts, by nothing else."""

import pytest

from persona_coupling import claims, earlier, paths, prose
from persona_coupling.errors import GuardError

TOML = """
[[sentence]]
topic = "adding"
claims = ["a", "b"]
supported = "It breaks."
refuted = "It holds."
mixed = "It depends."
unsettled = "It is not clear."

[[sentence]]
topic = "why"
claims = ["c"]
also = ["d"]
supported = "Because."
refuted = "Not because."
unsettled = "Who knows."
"""


@pytest.mark.parametrize(
    ("verdicts", "sentences", "left_open"),
    [
        (("supported", "supported", "refuted", "refuted"), ["It breaks.", "Not because."], []),
        (("supported", "not run", "uninterpretable", "supported"), [], ["adding", "why"]),
        (("supported", "refuted", "inconclusive", "not run"), ["It depends.", "Who knows."], []),
        (("refuted", "uninterpretable", "supported", "not run"), ["Because."], ["adding"]),
        (("refuted", "refuted", "supported", "uninterpretable"), ["It holds.", "Because."], []),
        (("supported", "inconclusive", "not run", "supported"), ["It is not clear."], ["why"]),
        (("inconclusive", "inconclusive", "supported", "inconclusive"), ["It is not clear.", "Who knows."], []),
        (("not run", "uninterpretable", "not run", "not run"), [], ["adding", "why"]),
    ],
)
def test_verdicts_choose_the_sentences(tmp_path, verdicts, sentences, left_open):
    (tmp_path / "headline.toml").write_text(TOML)
    rows = [{"id": identity, "verdict": verdict} for identity, verdict in zip("abcd", verdicts, strict=True)]
    assert prose.headline(rows, tmp_path / "headline.toml") == {
        "sentences": sentences,
        "withheld": [],
        "open": left_open,
    }


def test_what_a_gate_withholds_is_said_aside_and_stays_open(tmp_path):
    (tmp_path / "headline.toml").write_text(TOML)
    rows = [{"id": name, "verdict": "supported"} for name in "abcd"]
    rows[2] = {"id": "c", "verdict": "uninterpretable", "otherwise": "refuted"}
    rows[3] = {"id": "d", "verdict": "not run", "otherwise": None}
    made = prose.headline(rows, tmp_path / "headline.toml")
    assert made == {"sentences": ["It breaks."], "withheld": ["Not because."], "open": ["why"]}


def test_a_sentence_about_no_claim_is_refused(tmp_path):
    (tmp_path / "headline.toml").write_text(TOML)
    with pytest.raises(GuardError, match="do not exist: b"):
        prose.headline([{"id": "a", "verdict": "supported"}], tmp_path / "headline.toml")


def test_the_papers_headline_speaks_of_claims_that_exist():
    rows = [{"id": claim.id, "verdict": "supported"} for claim in claims.read()]
    assert prose.headline(rows)["sentences"]


def test_the_readme_is_rewritten_between_its_comments_only(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_COUPLING_ROOT", str(tmp_path))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{prose.README_BEGINS}\nold\n{prose.README_ENDS}\nafter\n")
    profile = {"name": "quick", "seeds": [0], "model": {"name": "M"}, "sft": {"steps": 8}}
    index = {"profile": profile, "fewer_seeds": {}, "counts": {"uninterpretable": 0}}
    index |= dict.fromkeys(earlier.KINDS)
    said = {"sentences": ["It breaks."], "withheld": [], "open": ["why"]}
    prose.write_readme({**index, "headline": said})
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "- It breaks.\n- Left open by this run: why.\n" in text
    assert "one seed" not in text
    assert "1 seed)" in text
    assert "old" not in text
    assert "have been run" not in text
    other = tmp_path / "experiments" / "03_x" / "results" / "full"
    other.mkdir(parents=True)
    (tmp_path / "experiments" / "03_x" / "x.py").write_text("# %%\n")
    (other / "record.json").write_text('{"profile": {"seeds": [0, 1]}}')
    paths.pdf("full").parent.mkdir()
    paths.pdf("full").write_bytes(b"%PDF")
    prose.write_readme({**index, "headline": {"sentences": [], "withheld": [], "open": []}})
    assert "Of the profile `full` (2 seeds) the experiments 03 of 1 have been run: [its paper]" in readme.read_text()
    before = {"steps": 9, "claims": [{"verdict": "uninterpretable"}, {"verdict": "refuted"}]}
    withheld = {"sentences": [], "withheld": ["Not because."], "open": ["why"]}
    changed = {"fewer_seeds": {"04_x": [5], "05_y": [5]}, "earlier": before, "headline": withheld}
    prose.write_readme({**index, **changed})
    text = readme.read_text()
    assert "- Withheld by a gate, as intervals alone would have it: Not because.\n" in text
    assert "1 seed, 1 seed in 04 and 05)" in text
    assert "at 9 steps of fine-tuning" in text
    assert "left 1 of 2 unreadable, here 0. The dose, now 8 steps" in text
    again = {
        "agree": 1,
        "differ": ["b"],
        "claims": [{"verdict": "refuted"}, {"verdict": "refuted"}],
        "same_code": False,
    }
    prose.write_readme({**index, "headline": said, "older": again})
    assert "seeds were run by older code too: 1 of 2 verdicts are the same, all but `b`." in readme.read_text()
    fresh = {**again, "differ": [], "agree": 2, "seeds": [8, 9]}
    prose.write_readme({**index, "headline": said, "repeat": {**again, "same_code": True}, "fresh": fresh})
    assert "seeds were run once more by this code: 1 of 2" in readme.read_text()
    assert "older code" not in readme.read_text()
    assert "Under further seeds alone (8, 9), 2 of 2 verdicts are the same." in readme.read_text()
    readme.write_text("no comments")
    with pytest.raises(GuardError, match="lacks the comments"):
        prose.write_readme({**index, "headline": said})


def test_the_repositorys_readme_has_the_comments():
    text = (paths.repository() / "README.md").read_text(encoding="utf-8")
    assert text.index(prose.README_BEGINS) < text.index(prose.README_ENDS)
