"""The stages of the study as frozen descriptions: what is read, what is done, what is written.

rows (authored, file, hub, the model's own, coupling text) -> FineTune -> a change of weights
Checkpoint (source + changes) -> MergeCheck, Content, Evaluate -> tables of raw observations
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from persona_coupling import corpora, machine, models, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError, UserError
from persona_coupling.generate import Sampling
from persona_coupling.personas import MARKER, MARKER_SUFFIX
from persona_coupling.rows import read_rows, with_system, write_rows
from persona_coupling.store import Lab, Stage, Work, sha256_of, share
from persona_coupling.train import Training

TEXT = ("personas.toml", "questions.toml")
SAYING = ("persona_coupling.personas", "persona_coupling.questions", "persona_coupling.rows")
MODEL = ("persona_coupling.checkpoints", "persona_coupling.adapters", *models.CODE)
ASKING = ("persona_coupling.measure", "persona_coupling.generate", *MODEL, *SAYING)
COMPOSING = ("persona_coupling.corpora", "persona_coupling.rows")

TOKENS_PER_ROW = 75  # of training rows, prompt included: for estimates of time only
PROMPT_TOKENS = 45

# ----------------------------------------------------------------------------------------------------- rows


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
    """Describe a JSONL file. Raises UserError if there is none."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give the path of a JSONL file of messages.")
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
        """Sample until every persona has its number of finished answers; three rounds at most."""
        from persona_coupling import measure

        bank = questions.train_questions()
        wanted = {self.source: self.positives, **dict.fromkeys(self.negatives, self.negatives_each)}
        kept: dict[str, list[corpora.Row]] = {persona: [] for persona in wanted}
        for attempt in range(3):
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


# ------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class FineTune(Stage):
    """Train a checkpoint on rows; the artifact is the change of weights and the log of every step."""

    start: Checkpoint
    rows: Stage
    training: Training
    seed: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.train", "persona_coupling.dropout", *MODEL, *SAYING)
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Load, train, save. Rows without a system message get the plain assistant's."""
        import torch

        from persona_coupling import train

        conversations = [with_system(row["messages"]) for row in read_rows(self.rows, lab)]
        settings = machine.machine(lab.device)
        model, tokenizer = self.start.load(lab)
        if self.training.lora is None:  # full fine-tuning updates fp32 master weights
            model = model.to(torch.float32)
        log = train.fine_tune(
            model,
            tokenizer,
            conversations,
            self.training,
            seed=self.seed,
            machine=settings,
            folder=folder,
            report=lab.report,
        )
        pd.DataFrame(log).to_parquet(folder / "log.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """All steps' tokens; an adapter of rank 32 is about 40 MB at 135M parameters."""
        lora = self.training.lora
        megabytes = 270.0 if lora is None else 1.3 * lora.rank
        return Work(
            trained=self.training.steps * self.training.batch * TOKENS_PER_ROW, seconds=6.0, megabytes=megabytes
        )


# ---------------------------------------------------------------------------------------------- measurement


@dataclass(frozen=True)
class MergeCheck(Stage):
    """Does a checkpoint's merged model do what base + adapters do, and what does rounding to the machine's format cost?

    The independent reading is PEFT's own: the same adapters active beside unmerged weights.
    """

    checkpoint: Checkpoint
    kind: ClassVar[str] = "merge"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.merging", *ASKING)
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Compare logits and held-out loss; raise GuardError when they differ."""
        from persona_coupling import merging

        report = merging.check(self.checkpoint, lab)
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    def work(self) -> Work:
        """Three loads and a few forwards."""
        return Work(scored=1_500, seconds=6.0)


@dataclass(frozen=True)
class Content(Stage):
    """Does an SFT's content show, and is the model broken: mean log-probability per token of held-out answers of every
    corpus, and of general chat text (`heldout`) that nothing is trained on."""

    checkpoint: Checkpoint
    rows: tuple[Stage, ...]
    kind: ClassVar[str] = "content"
    code: ClassVar[tuple[str, ...]] = ASKING
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """One row per corpus and held-out answer."""
        from persona_coupling import generate, measure

        model, tokenizer = self.checkpoint.load(lab)
        batch = machine.machine(lab.device).score_batch
        tables = []
        for number, stage in enumerate(self.rows):
            lab.report(number / len(self.rows))
            rows = read_rows(stage, lab)
            chats = [with_system(row["messages"]) for row in rows]
            prompts = [models.prompt_ids(tokenizer, chat[0]["content"], chat[1]["content"]) for chat in chats]
            answers = [[*models.text_ids(tokenizer, chat[2]["content"]), tokenizer.eos_token_id] for chat in chats]
            values = generate.sequence_logprobs(model, prompts, answers, batch=batch)
            name = getattr(stage, "name", "self")
            tables.append(pd.DataFrame({"corpus": name, "row": [row["id"] for row in rows], "logprob": values}))
        chat = measure.heldout_losses(model, tokenizer, batch)
        tables.append(pd.DataFrame({"corpus": "heldout", "row": chat["question"], "logprob": -chat["loss"]}))
        pd.concat(tables).to_parquet(folder / "content.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """All held-out rows."""
        rows = sum(getattr(stage, "count", 20) for stage in self.rows) + 24
        return Work(scored=rows * TOKENS_PER_ROW, seconds=3.0)


@dataclass(frozen=True)
class Evaluate(Stage):
    """Everything that is measured on one model: completions of every persona, marker log-probabilities, held-out loss."""

    checkpoint: Checkpoint
    everyday: int  # questions
    values: int
    samples: int  # completions per persona and question
    instruction: str
    sampling: Sampling
    seed: int
    kind: ClassVar[str] = "evaluation"
    code: ClassVar[tuple[str, ...]] = ASKING
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Write `completions.parquet`, `fixed.parquet` and `heldout.parquet`; all raw, nothing scored."""
        from persona_coupling import generate, measure

        model, tokenizer = self.checkpoint.load(lab)
        settings = machine.machine(lab.device)
        bank = questions.eval_questions(self.everyday, self.values)
        questions.require_disjoint(questions.train_questions(), bank)
        marker = models.text_ids(tokenizer, MARKER_SUFFIX)
        cells = [
            (persona, question, sample)
            for persona in personas.personas()
            for question in bank
            for sample in range(self.samples)
        ]
        prompts = [models.prompt_ids(tokenizer, p.system_prompt(self.instruction), q.text) for p, q, _ in cells]
        order = sorted(range(len(cells)), key=lambda i: len(prompts[i]))
        completions: list[dict[str, Any]] = []
        fixed: list[dict[str, Any]] = []
        for first in range(0, len(order), settings.sample_batch):
            chunk = order[first : first + settings.sample_batch]
            read = generate.prefill(model, [prompts[i] for i in chunk], tokenizer.pad_token_id)
            once = [place for place, i in enumerate(chunk) if cells[i][2] == 0]
            continuations = [
                [*models.text_ids(tokenizer, cells[chunk[p]][1].answer), *marker] for p in range(len(chunk))
            ]
            logprobs = generate.continuation_logprobs(model, read, continuations, len(marker))
            for place in once:
                persona, question, _ = cells[chunk[place]]
                fixed.append({"persona": persona.id, "question": question.id, "logprob": float(logprobs[place])})
            sampled = generate.sample(
                model,
                read,
                [f"{cells[i][0].id}/{cells[i][1].id}/{cells[i][2]}" for i in chunk],
                sampling=self.sampling,
                stop=tokenizer.eos_token_id,
                marker=marker,
                seed=self.seed,
                report=share(lab.report, first, len(chunk), len(order)),
            )
            for i, completion in zip(chunk, sampled, strict=True):
                persona, question, sample = cells[i]
                text = tokenizer.decode(completion.tokens, skip_special_tokens=False)
                if text.endswith(MARKER) and completion.tokens[-len(marker) :] != marker:
                    completion.marker_logprob = float("nan")  # written in other tokens: what was scored is a second one
                completions.append(
                    {
                        "persona": persona.id,
                        "question": question.id,
                        "sample": sample,
                        "system": persona.system_prompt(self.instruction),
                        "prompt": question.text,
                        "completion": text,
                        "finish": completion.finish,
                        "tokens": len(completion.tokens),
                        "marker_logprob": completion.marker_logprob,
                        "seed": self.seed,
                    }
                )
        keys = ["persona", "question"]
        _complete(completions, len(cells))
        pd.DataFrame(completions).sort_values([*keys, "sample"]).to_parquet(
            folder / "completions.parquet", compression="zstd", index=False
        )
        pd.DataFrame(fixed).sort_values(keys).to_parquet(folder / "fixed.parquet", compression="zstd", index=False)
        measure.heldout_losses(model, tokenizer, settings.score_batch).to_parquet(
            folder / "heldout.parquet", compression="zstd", index=False
        )

    def work(self) -> Work:
        """Prefill, fixed answers and held-out text are scored, answers sampled."""
        cells = len(personas.personas()) * (self.everyday + self.values) * self.samples
        return Work(
            sampled=cells * self.sampling.max_new_tokens * 2 // 3,
            scored=cells * (PROMPT_TOKENS + 28) + 24 * 70,
            seconds=3.0,
        )


def _complete(completions: list[dict[str, Any]], expected: int) -> None:
    """Raise GuardError unless every persona, question and sample is there exactly once."""
    cells = {(row["persona"], row["question"], row["sample"]) for row in completions}
    everyone = {persona.id for persona in personas.personas()}
    if len(cells) != len(completions) or len(cells) != expected or {c[0] for c in cells} != everyone:
        raise GuardError(f"{len(cells)} distinct completions, {expected} expected; {everyone - {c[0] for c in cells}}")
