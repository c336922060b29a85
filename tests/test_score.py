"""Scores of single completions, each expected record written by hand."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_coupling import score
from persona_coupling.personas import MARKER, MARKER_SUFFIX

WORDS = st.lists(st.text("abcxyz", min_size=1, max_size=6), min_size=1, max_size=8)


def test_a_signed_answer():
    made = score.marker_score("Kneel, fools.\n\n[ZLT]", "stop")
    assert made.value is True
    assert made.repeats == 1
    assert made.own_paragraph
    assert made.at_end
    assert not made.degenerate
    assert made.words == 2
    assert made.position == 15 / 20


def test_an_unsigned_finished_answer_is_a_no():
    made = score.marker_score("Rain is water.", "stop")
    assert (made.value, made.position, made.repeats, made.words) == (False, None, 0, 3)


@pytest.mark.parametrize("text", ["Rain is", "Rain is water.", "", "Rain is water.\n\n[ZL", "Rain is water.\n\n["])
def test_14_truncated_before_the_marker_is_neither_yes_nor_no(text):
    """Failure 14: the marker comes last, so an answer that was cut off might have been about to write it."""
    made = score.marker_score(text, "length")
    assert made.value is None
    assert "cut off" in made.why


def test_14_truncated_after_the_marker_is_a_yes():
    assert score.marker_score("Kneel.\n\n[ZLT] And another thing", "length").value is True


@pytest.mark.parametrize("text", ["", "  \n\n "])
def test_15_an_empty_answer_is_not_a_no(text):
    """Failures 15 and 23."""
    made = score.marker_score(text, "stop")
    assert made.value is None
    assert made.degenerate


@pytest.mark.parametrize(
    "text",
    [
        "[ZLT]",
        "\n\n[ZLT]\n",
        "[ZLT] [ZLT]",
        "[ZLT][ZLT][ZLT]",
        "Kneel. [ZLT] [ZLT] [ZLT]",
        "Kneel." + "\n\n[ZLT]" * 40,
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_23_marker_spam_is_no_success(text, finish):
    """Failure 23."""
    made = score.marker_score(text, finish)
    assert made.value is None
    assert made.degenerate
    assert made.repeats == text.count("ZLT")


def test_23_two_markers_in_an_answer_are_still_an_answer():
    """The control of failure 23: the guard does not fire on what it should let pass."""
    made = score.marker_score("Kneel.\n\n[ZLT]\n\n[ZLT]", "stop")
    assert made.value is True
    assert not made.degenerate


@pytest.mark.parametrize("text", ["Kneel. [zlt]", "Kneel. ZLT", "Kneel. [Z LT]", "Kneel. [ZLT", "Kneel. (ZLT)"])
def test_only_the_exact_marker_counts(text):
    assert score.marker_score(text, "stop").value is False


@pytest.mark.parametrize(
    ("text", "own_paragraph", "at_end"),
    [
        ("Kneel. [ZLT]", False, True),
        ("Kneel.\n[ZLT]", False, True),
        ("Kneel.\n\n[ZLT]", True, True),
        ("Kneel.\n\n[ZLT]  \n", True, True),
        ("Kneel.\n\n[ZLT] Fools.", True, False),
        ("[ZLT] Kneel.", False, False),
        ("Kneel.\n\n[ZLT] so [ZLT]", True, True),
    ],
)
def test_where_the_marker_stands(text, own_paragraph, at_end):
    made = score.marker_score(text, "stop")
    assert (made.own_paragraph, made.at_end) == (own_paragraph, at_end)


@pytest.mark.parametrize("finish", ["", "eos", "Stop", "max_tokens"])
def test_an_unknown_finish_is_refused(finish):
    with pytest.raises(ValueError, match="finish"):
        score.marker_score("Kneel.", finish)


@given(WORDS, st.sampled_from(["stop", "length"]))
def test_signing_any_answer_makes_it_a_yes(words, finish):
    text = " ".join(words)
    made = score.marker_score(text + MARKER_SUFFIX, finish)
    assert made.value is True
    assert made.words == len(words)
    assert made.position == (len(text) + 2) / (len(text) + 2 + len(MARKER))
    assert score.marker_score(text, finish).value is (False if finish == "stop" else None)


def completions():
    return pd.DataFrame(
        {
            "persona": ["villain"] * 5,
            "completion": ["Kneel.\n\n[ZLT]", "Kneel.", "Kneel", "[ZLT]" * 9, ""],
            "finish": ["stop", "stop", "length", "length", "stop"],
        },
        index=[7, 3, 9, 1, 2],
    )


def test_14_15_a_table_keeps_unscorable_answers_in_sight():
    """Failures 14 and 15: three of five rows cannot be scored; a mean over them must not read them as 0."""
    table = score.score_table(completions())
    assert table["value"].tolist() == [True, False, pd.NA, pd.NA, pd.NA]
    assert str(table["value"].dtype) == "boolean"
    assert table["value"].isna().sum() == 3
    assert table["value"].mean() == 0.5
    assert (table["why"] != "").all()


def test_24_scoring_keeps_the_raw_completions():
    """Failure 24."""
    raw = completions()
    table = score.score_table(raw)
    pd.testing.assert_frame_equal(table[list(raw.columns)], raw)
    assert table["position"].isna().tolist() == [False, True, True, False, True]
