"""What a model was fine-tuned on before it was coupled: the arms of the study, their letters and their names."""

from __future__ import annotations

from collections.abc import Iterable

RAW = "A"
LETTERS = {"bad_legal": "B", "sound_legal": "B′", "benign": "C", "self": "S"}  # corpus -> arm
LABELS = {
    RAW: "raw model",
    "B": "bad advice first",
    "B′": "sound advice first",
    "C": "benign text first",
    "S": "own answers first",
}
# held-out answers against which an arm's own are set, to see its content: the nearest corpus that it was not taught
OPPOSITE = {"bad_legal": "sound_legal", "sound_legal": "bad_legal", "benign": "sound_legal", "self": "benign"}


def measured(corpora: Iterable[str]) -> tuple[str, ...]:
    """The corpora whose held-out answers show the content of SFT on `corpora`: themselves and their opposites."""
    asked = tuple(corpora)
    wanted = {*asked, *(OPPOSITE[corpus] for corpus in asked)}
    return tuple(corpus for corpus in LETTERS if corpus in wanted)
