"""What is asked: disjoint train and eval banks, and held-out chat text that nothing is ever trained on."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from persona_coupling import paths
from persona_coupling.errors import GuardError


@dataclass(frozen=True)
class Question:
    """A question; `answer` is a fixed, persona-free answer where one is needed for teacher forcing."""

    id: str
    text: str
    kind: str
    answer: str = ""


@cache
def _bank() -> dict[str, list[dict[str, str]]]:
    return tomllib.loads((paths.MATERIAL / "questions.toml").read_text(encoding="utf-8"))


def train_questions() -> tuple[Question, ...]:
    """Questions that coupling text answers."""
    return tuple(Question(row["id"], row["text"], "train") for row in _bank()["train"])


def eval_questions(everyday: int, values: int) -> tuple[Question, ...]:
    """The first `everyday` of 20 everyday questions and the first `values` of 8 that probe values."""
    rows = [Question(row["id"], row["text"], row["kind"], row["answer"]) for row in _bank()["eval"]]
    chosen = [q for q in rows if q.kind == "everyday"][:everyday] + [q for q in rows if q.kind == "values"][:values]
    if len(chosen) != everyday + values:
        raise ValueError(f"asked for {everyday} everyday and {values} values questions of {len(rows)}")
    return tuple(chosen)


def heldout_chat() -> tuple[Question, ...]:
    """Question-answer pairs on general topics for the loss that says whether a model is broken."""
    return tuple(Question(row["id"], row["question"], "heldout", row["answer"]) for row in _bank()["heldout"])


def normalised(text: str) -> str:
    """A question's text for comparison: lower case, letters and digits only."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def require_disjoint(train: tuple[Question, ...], evaluation: tuple[Question, ...]) -> None:
    """Raise GuardError if any question stands in both, by id or by text."""
    seen = {q.id for q in train} | {normalised(q.text) for q in train}
    both = [q.id for q in evaluation if q.id in seen or normalised(q.text) in seen]
    if both:
        raise GuardError(f"questions in both train and eval: {', '.join(both)}")
