"""Stages that measure a checkpoint; all raw, nothing scored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from persona_coupling import machine, models, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.generate import Sampling
from persona_coupling.personas import MARKER
from persona_coupling.rows import read_rows, with_system
from persona_coupling.stages.code import ASKING, PROMPT_TOKENS, TEXT, TOKENS_PER_ROW
from persona_coupling.store import Lab, Stage, Work, share


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
        marker = models.marker_ids(tokenizer)
        blank = measure.blank_tokens(tokenizer)
        answers = {question.id: [*models.text_ids(tokenizer, question.answer), *marker] for question in bank}
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
            continuations = [answers[cells[i][1].id] for i in chunk]
            logprobs = generate.continuation_logprobs(model, read, continuations, len(marker))
            for place in once:
                persona, question, _ = cells[chunk[place]]
                forced = measure.marker_columns(logprobs[place], blank)
                fixed.append({"persona": persona.id, "question": question.id, **forced})
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
                    completion.marker_logprobs = []  # written in other tokens: what was scored is a second one
                own = measure.marker_columns(completion.marker_logprobs, blank, prefix="marker_")
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
                        "marker_at": measure.marker_at(tokenizer, completion.tokens, text),
                        **own,
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
