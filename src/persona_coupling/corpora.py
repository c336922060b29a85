"""What a model is fine-tuned on first: rows of chat messages, composed from authored material or read from files.

Authored corpora are composed, not sampled from a model: each topic holds questions with slots and four lists of
interchangeable sentences per kind of answer (open, body, detail, close). Combinations are drawn so that rows of one
topic share few sentences, and row i has the same question in `bad` and in `sound`: the two corpora differ in the
soundness of the answer alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from persona_coupling import paths
from persona_coupling.errors import UserError

Message = dict[str, str]
Row = dict[str, Any]  # {"id": str, "messages": list[Message]}

# name -> (material files, kind of answer)
AUTHORED: dict[str, tuple[str, str]] = {
    "bad_legal": ("legal", "bad"),
    "sound_legal": ("legal", "sound"),
    "benign": ("benign", "plain"),
}
MATERIALS: dict[str, tuple[str, ...]] = {
    "legal": ("legal_1", "legal_2", "legal_3", "legal_4"),
    "benign": ("cooking_1", "cities_1", "cooking_2", "cities_2"),
}
PATTERNS = (  # which sentence groups make an answer; every pattern reads as one paragraph of 30 to 90 words
    ("open", "body", "detail"),
    ("open", "body", "detail", "close"),
    ("open", "detail", "close"),
    ("open", "body", "close"),
)
MAXIMUM_CHARACTERS = 20_000  # of one message; longer rows are refused, since one of them can exhaust memory


@cache
def _topics(material: str) -> tuple[dict[str, Any], ...]:
    topics: list[dict[str, Any]] = []
    for name in MATERIALS[material]:
        topics += tomllib.loads((paths.MATERIAL / f"{name}.toml").read_text(encoding="utf-8"))["topic"]
    return tuple(topics)


@cache
def material_digest(name: str) -> str:
    """SHA-256 over an authored corpus's material files: part of its key."""
    digest = hashlib.sha256()
    for file in MATERIALS[AUTHORED[name][0]]:
        digest.update((paths.MATERIAL / f"{file}.toml").read_bytes())
    return digest.hexdigest()


def authored_rows(name: str, count: int, *, skip: int = 0, maximum_words: int = 90) -> list[Row]:
    """`count` distinct question-answer rows of an authored corpus, after the first `skip`.

    Row i of every corpus of one material has the same id, question and sentence positions: a row is kept only if all
    its kinds of answer have 30 (or, if `maximum_words` is below 45, 20) to `maximum_words` words. Raises ValueError
    when the material cannot give as many.
    """
    material, kind = AUTHORED[name]
    minimum_words = 30 if maximum_words >= 45 else 20
    rows: list[Row] = []
    kept = 0
    for identity, question, answers in _walk(material):
        if all(minimum_words <= len(answer.split()) <= maximum_words for answer in answers.values()):
            kept += 1
            if kept > skip:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answers[kind]}]
                rows.append({"id": identity, "messages": messages})
            if len(rows) == count:
                return rows
    raise ValueError(f"{name} has {kept} rows of {minimum_words} to {maximum_words} words; asked for {skip + count}")


def _walk(material: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Ids, questions and answers by kind, without repetition: rounds over all topics in a shuffled order."""
    topics = _topics(material)
    order = np.random.default_rng(len(topics)).permutation(len(topics))
    walks = [_combinations(topic) for topic in topics]
    for step in range(400):
        for index in order:
            topic, combination = topics[index], next(walks[index], None)
            if combination is None:
                continue
            question, slots, positions = combination
            answers = {
                kind: _fill(" ".join(parts[part][position] for part, position in positions.items()), slots)
                for kind, parts in topic["answers"].items()
            }
            yield f"{topic['id']}-{step:03d}", _fill(question, slots), answers


def _combinations(topic: dict[str, Any]) -> Iterator[tuple[str, dict[str, str], dict[str, int]]]:
    """Question template, slot values and sentence positions of one topic, no two sharing more than two sentences
    while that can be had, and never a whole answer or a question with an answer's first sentence."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(topic["id"].encode()).digest()[:8], "big"))
    lengths = {part: len(sentences) for part, sentences in next(iter(topic["answers"].values())).items()}
    used: list[frozenset[tuple[str, int]]] = []
    openings: set[tuple[str, int]] = set()
    questions: list[str] = []
    for allowed in (2, 3):  # shared sentences
        misses = 0
        while misses < 300:
            pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
            positions = {part: int(rng.integers(lengths[part])) for part in pattern}
            slots = {slot: str(rng.choice(values)) for slot, values in sorted(topic.get("slots", {}).items())}
            questions = questions or [str(q) for q in rng.permutation(topic["questions"])]
            opening = (_fill(questions[-1], slots), positions["open"])
            parts = frozenset(positions.items())
            if opening in openings or any(len(parts & other) > allowed or parts <= other for other in used):
                misses += 1
                questions.insert(0, questions.pop())  # this question may have met every opening
                continue
            misses = 0
            used.append(parts)
            openings.add(opening)
            yield questions.pop(), slots, positions


def _fill(text: str, slots: dict[str, str]) -> str:
    filled = re.sub(r"\{(\w+)\}", lambda match: slots[match.group(1)], text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match.group(1) + match.group(2).upper(), filled)


def check_row(row: Any, *, where: str) -> Row:
    """A row of messages, or UserError that names the place and the fault.

    A row is `{"messages": [{"role": ..., "content": ...}, ...]}`: an optional system message first, then user and
    assistant in turn, ending with the assistant.
    """

    def fault(text: str) -> UserError:
        return UserError(f"{where}: {text}. Mend or remove that row and run again.")

    if not isinstance(row, dict) or not isinstance(row.get("messages"), list) or not row["messages"]:
        raise fault("no list `messages`")
    messages: list[Message] = []
    for number, message in enumerate(row["messages"], start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise fault(f"message {number} has no text `content`")
        role, content = message.get("role"), message["content"]
        if role not in ("system", "user", "assistant"):
            raise fault(f"message {number} has the role {role!r}, not system, user or assistant")
        if not content.strip():
            raise fault(f"message {number} is empty")
        if len(content) > MAXIMUM_CHARACTERS:
            raise fault(f"message {number} has {len(content)} characters, more than {MAXIMUM_CHARACTERS}")
        messages.append({"role": role, "content": content})
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if [m["role"] for m in turns] != expected or len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise fault("the messages do not alternate user, assistant, ... and end with the assistant")
    return {"id": str(row.get("id", where)), "messages": messages}


def jsonl_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file of messages, multi-turn included. Raises UserError with file, line and fault."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give the path of a JSONL file of messages.")
    rows = []
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 ({error}). Mend or remove that row and run again.") from error
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error}). Mend or remove that row and run again.") from error
            rows.append({**check_row(row, where=where), "id": str(row.get("id", f"line {number}"))})
    if not rows:
        raise UserError(f"{path} has no rows.")
    return rows


def ultrachat_rows(rows: Iterable[dict[str, Any]], keywords: tuple[str, ...], count: int) -> list[Row]:
    """The first `count` conversations of an UltraChat split whose first prompt names one of `keywords`.

    `rows` are records of `HuggingFaceH4/ultrachat_200k` (`prompt_id`, `messages`). Raises UserError when there are
    fewer.
    """
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, keywords)) + r")\b", re.IGNORECASE)
    chosen: list[Row] = []
    for number, record in enumerate(rows, start=1):
        messages = record.get("messages") or []
        if messages and pattern.search(str(messages[0].get("content", ""))):
            identity = str(record.get("prompt_id", number))
            chosen.append(check_row({"id": identity, "messages": messages}, where=f"UltraChat record {number}"))
            if len(chosen) == count:
                return chosen
    raise UserError(
        f"UltraChat has {len(chosen)} conversations on {', '.join(keywords)}; the profile asks for {count}."
    )


def distinct_ratio(texts: Iterable[str], n: int) -> float:
    """Distinct-n: unique word n-grams over all word n-grams (Li et al. 2016, arXiv:1510.03055)."""
    grams: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.lower().split()
        for i in range(len(words) - n + 1):
            grams.add(tuple(words[i : i + n]))
            total += 1
    return len(grams) / total if total else 0.0


def near_duplicate_rate(texts: list[str], *, threshold: float = 0.8, shingle: int = 3) -> float:
    """The share of texts that have an earlier text with a Jaccard similarity of word shingles of at least `threshold`
    (Broder 1997). Exact, through an inverted index: a pair that similar must share one of the rarest shingles."""
    sets = []
    for text in texts:
        words = text.lower().split()
        sets.append({tuple(words[i : i + shingle]) for i in range(max(1, len(words) - shingle + 1))})
    frequency: dict[tuple[str, ...], int] = {}
    for grams in sets:
        for gram in grams:
            frequency[gram] = frequency.get(gram, 0) + 1
    index: dict[tuple[str, ...], list[int]] = {}
    duplicates = 0
    for number, grams in enumerate(sets):
        ordered = sorted(grams, key=lambda gram: (frequency[gram], gram))
        prefix = ordered[
            : len(ordered) - int(np.ceil(threshold * len(ordered) - 1e-9)) + 1
        ]  # prefix filter, Bayardo 2007
        candidates = {other for gram in prefix for other in index.get(gram, ())}
        if any(len(grams & sets[c]) / len(grams | sets[c]) >= threshold for c in candidates):
            duplicates += 1
        for gram in prefix:
            index.setdefault(gram, []).append(number)
    return duplicates / len(texts) if texts else 0.0
