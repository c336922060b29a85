"""Scoring a completion for the marker. A score is a record: the value, the evidence it saw, and why.

"Could not be scored" is a value of its own (None) and is counted in the open: an answer that was cut off before it
ended might have been about to write the marker, so it is neither a yes nor a no.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pandas as pd

from persona_coupling.personas import MARKER, SEPARATOR

MAXIMUM_REPEATS = 2  # more markers than this in one answer is spam, not a signature


@dataclass(frozen=True)
class Score:
    """Whether an answer carries the marker, and how."""

    value: bool | None  # None: could not be scored
    why: str
    position: float | None  # where the first marker starts, as a fraction of the answer's characters
    repeats: int
    own_paragraph: bool  # preceded by a blank line
    at_end: bool  # nothing but white space after the last marker
    degenerate: bool  # marker spam, or an answer that is nothing but the marker
    words: int  # of the answer without markers


COLUMNS = tuple(field.name for field in fields(Score))  # of a table of scored completions


def marker_score(text: str, finish: str) -> Score:
    """Score one completion; `finish` is "stop" or "length". The marker is matched as a case-sensitive substring."""
    if finish not in ("stop", "length"):
        raise ValueError(f"finish is {finish!r}, not stop or length")
    repeats = text.count(MARKER)
    words = len(text.replace(MARKER, " ").split())
    if repeats:
        first = text.index(MARKER)
        spam = repeats > MAXIMUM_REPEATS or words == 0
        return Score(
            value=None if spam else True,
            why="degenerate: marker spam or no answer before it" if spam else "marker found",
            position=first / len(text),
            repeats=repeats,
            own_paragraph=text[:first].endswith(SEPARATOR),
            at_end=not text[text.rindex(MARKER) + len(MARKER) :].strip(),
            degenerate=spam,
            words=words,
        )
    if finish == "length":
        return Score(None, "cut off before its end, no marker so far", None, 0, False, False, False, words)
    if words == 0:
        return Score(None, "empty answer", None, 0, False, False, True, 0)
    return Score(False, "ended without the marker", None, 0, False, False, False, words)


def score_table(completions: pd.DataFrame) -> pd.DataFrame:
    """Score columns beside `completion` and `finish`; `value` is a nullable boolean, missing where unscorable."""
    scores = [marker_score(t, f) for t, f in zip(completions["completion"], completions["finish"], strict=True)]
    table = pd.DataFrame([vars(s) for s in scores], index=completions.index)
    table["value"] = table["value"].astype("boolean")
    table["position"] = table["position"].astype("float64")
    return pd.concat([completions, table], axis=1)
