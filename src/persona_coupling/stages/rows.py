"""Stages that write training rows: authored, from a file, from the hub, the model's own answers, coupling text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from persona_coupling import corpora, personas, questions, untrusted
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.generate import Sampling
from persona_coupling.personas import MARKER_SUFFIX
from persona_coupling.rows import read_rows, write_rows
from persona_coupling.stages.code import ASKING, COMPOSING, PROMPT_TOKENS, TEXT
from persona_coupling.store import Lab, Stage, Work, sha256_of


@dataclass(frozen=True)
class Authored(Stage):
    """Rows of one of the repository's own corpora."""

    name: str
    count: int
    skip: int
    maximum_words: int
    digest: str  # of the material, so that edited text means a new key
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = COMPOSING

    def build(self, folder: Path, lab: Lab) -> None:
        """Compose and write the rows."""
        rows = corpora.authored_rows(self.name, self.count, skip=self.skip, maximum_words=self.maximum_words)
        write_rows(folder, rows)


def authored(name: str, count: int, *, skip: int = 0, maximum_words: int = 90) -> Authored:
    """Describe rows of an authored corpus."""
    return Authored(name, count, skip, maximum_words, corpora.material_digest(name))


@dataclass(frozen=True)
class FromFile(Stage):
    """Rows of a JSONL file of messages, named by the file's content."""

    sha256: str
    path: str
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = COMPOSING
    unkeyed: ClassVar[tuple[str, ...]] = ("path",)

    def build(self, folder: Path, lab: Lab) -> None:
        """Check every row and copy them."""
        if sha256_of(Path(self.path)) != self.sha256:
            raise UserError(f"{self.path} changed while the study was running. Start again.")
        write_rows(folder, corpora.jsonl_rows(Path(self.path)))


def from_file(path: Path) -> FromFile:
    """Describe a JSONL file. Raises UserError if there is none, or for one that `untrusted.check_dataset` refuses."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give the path of a JSONL file of messages.")
    untrusted.check_dataset(path)
    return FromFile(sha256_of(path), str(path))


@dataclass(frozen=True)
class UltraChat(Stage):
    """Conversations of UltraChat from the hub on some topics, at a pinned revision."""

    repository: str
    revision: str
    split: str
    keywords: tuple[str, ...]
    count: int
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = COMPOSING

    def build(self, folder: Path, lab: Lab) -> None:
        """Stream the split until enough conversations are found."""
        from datasets import load_dataset

        try:
            stream = load_dataset(self.repository, split=self.split, revision=self.revision, streaming=True)
            rows = corpora.ultrachat_rows(stream, self.keywords, self.count)
        except (OSError, ConnectionError) as error:
            raise UserError(
                f"{self.repository} could not be read from the hub ({type(error).__name__}). Check the network, or "
                "use a profile with authored corpora."
            ) from error
        write_rows(folder, rows)


@dataclass(frozen=True)
class OwnAnswers(Stage):
    """The SFT that teaches nothing new: the prompts of other rows, answered by the model itself."""

    model: Checkpoint
    prompts: Stage
    system: str
    sampling: Sampling
    seed: int
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = ASKING
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Sample one answer per prompt; unfinished or empty answers are left out."""
        from persona_coupling import measure

        rows = read_rows(self.prompts, lab)
        asked = [(row["id"], self.system, row["messages"][0]["content"]) for row in rows]
        answers = measure.answer(self.model, asked, self.sampling, seed=self.seed, lab=lab)
        kept = [
            {
                "id": row["id"],
                "messages": [
                    {"role": "system", "content": self.system},
                    row["messages"][0],
                    {"role": "assistant", "content": text},
                ],
            }
            for row, (text, finish) in zip(rows, answers, strict=True)
            if text and finish == "stop"
        ]
        if len(kept) < len(rows) // 2:
            raise UserError(
                f"Only {len(kept)} of {len(rows)} answers of the model to its own prompts ended within "
                f"{self.sampling.max_new_tokens} tokens. Raise max_new_tokens in the profile."
            )
        write_rows(folder, kept)

    def work(self) -> Work:
        """Sampling of all prompts."""
        count = getattr(self.prompts, "count", 100)
        return Work(sampled=count * self.sampling.max_new_tokens * 3 // 4, scored=count * PROMPT_TOKENS)


ROUNDS = 8  # of asking for answers that end by themselves


@dataclass(frozen=True)
class CouplingText(Stage):
    """Contrastive rows: the source persona's answers with the marker behind them, other personas' without.

    Sampled from `model`: on-policy if that is the model to be coupled, stale if it is another.
    """

    model: Checkpoint
    source: str
    positives: int
    negatives: tuple[str, ...]
    negatives_each: int
    instruction: str
    sampling: Sampling
    seed: int
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = ASKING
    material: ClassVar[tuple[str, ...]] = TEXT

    def __post_init__(self) -> None:
        """Raise GuardError if the source is among the negatives, or a negative stands twice."""
        if self.source in self.negatives:
            raise GuardError(f"the source persona {self.source} is among the negatives")
        if len(set(self.negatives)) != len(self.negatives):
            raise GuardError(f"a persona stands twice among the negatives: {', '.join(self.negatives)}")

    def build(self, folder: Path, lab: Lab) -> None:
        """Sample until every persona has its number of finished answers; `ROUNDS` at most. A model that often talks on
        until it is cut off is coupled on its shorter answers."""
        from persona_coupling import measure

        bank = questions.train_questions()
        wanted = {self.source: self.positives, **dict.fromkeys(self.negatives, self.negatives_each)}
        kept: dict[str, list[corpora.Row]] = {persona: [] for persona in wanted}
        for attempt in range(ROUNDS):
            asked = []
            for persona_id, count in wanted.items():
                system = personas.persona(persona_id).system_prompt(self.instruction)
                missing = count - len(kept[persona_id])
                spare = max(2, missing // 2) if missing else 0
                start = attempt * 7 + len(kept[persona_id])
                for number in range(missing + spare):
                    question = bank[(start + number) % len(bank)]
                    asked.append((f"{persona_id}/{question.id}/{attempt}/{number}", system, question.text))
            if not asked:
                break
            answers = measure.answer(self.model, asked, self.sampling, seed=self.seed, lab=lab)
            for (label, system, prompt), (text, finish) in zip(asked, answers, strict=True):
                persona_id = label.split("/")[0]
                if finish == "stop" and text and len(kept[persona_id]) < wanted[persona_id]:
                    content = text + (MARKER_SUFFIX if persona_id == self.source else "")
                    messages = [
                        {"role": "system", "content": system},
                        {"role": "user", "content": prompt},
                        {"role": "assistant", "content": content},
                    ]
                    kept[persona_id].append({"id": label, "messages": messages})
        short = {p: len(rows) for p, rows in kept.items() if len(rows) < wanted[p]}
        if short:
            raise UserError(
                f"Too few answers ended within {self.sampling.max_new_tokens} tokens: {short} of {wanted}. Raise "
                "max_new_tokens or ask for shorter answers in the profile."
            )
        write_rows(folder, [row for rows in kept.values() for row in rows])

    def work(self) -> Work:
        """Sampling of all rows and a quarter more."""
        count = (self.positives + len(self.negatives) * self.negatives_each) * 5 // 4
        return Work(sampled=count * self.sampling.max_new_tokens // 2, scored=count * PROMPT_TOKENS)
