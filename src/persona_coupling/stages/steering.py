"""The stage that adds centroids back by force: does the marker return?"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from numpy import ndarray

from persona_coupling import machine, measure, models, personas, questions, representations, residual
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.generate import Sampling
from persona_coupling.personas import SOURCE, Persona
from persona_coupling.questions import Question
from persona_coupling.residual import layer_numbers
from persona_coupling.stages.code import PROMPT_TOKENS, TEXT
from persona_coupling.stages.representations import ANSWER_TOKENS, STREAM, read_states
from persona_coupling.store import Lab, Report, Stage, Work, share

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OTHERS = "others"  # everybody but the source, in equal parts
Variant = tuple[str, int, int]  # an addition's name, the layer after which it is added (0: nowhere), the draw


@dataclass(frozen=True)
class Term:
    """A centroid with a weight: a persona's, or that of all others but the source (`others`), in a model's states."""

    hidden: Stage  # Hidden
    who: str
    weight: float


@dataclass(frozen=True)
class Addition:
    """A vector to be added to the stream, as a sum of centroids."""

    name: str
    terms: tuple[Term, ...]


def restoring(raw: Stage, tuned: Stage, parts: Sequence[str]) -> tuple[Addition, ...]:
    """What undoes the SFT's shift: the source's centroid, raw minus SFT'd (`restore`), the mean of all others' (`common`),
    and the rest, which is the source's own (`own`). The last two add up to the first."""
    source = (Term(raw, SOURCE, 1.0), Term(tuned, SOURCE, -1.0))
    common = (Term(raw, OTHERS, 1.0), Term(tuned, OTHERS, -1.0))
    rest = (*source, *(Term(t.hidden, t.who, -t.weight) for t in common))
    known = {"restore": source, "common": common, "own": rest}
    return tuple(Addition(part, known[part]) for part in parts)


def pushing(name: str, raw: Stage, tuned: Stage) -> Addition:
    """What brings the SFT's shift about in a model that had none: the source's centroid, SFT'd minus raw."""
    return Addition(name, (Term(tuned, SOURCE, 1.0), Term(raw, SOURCE, -1.0)))


def persona_swap(name: str, raw: Stage) -> Addition:
    """The control of the method: the source's centroid minus the assistant's, within one model."""
    return Addition(name, (Term(raw, SOURCE, 1.0), Term(raw, personas.ASSISTANT, -1.0)))


@dataclass(frozen=True)
class Cell:
    """A persona that is asked a question, with the question's fold and the prompt's tokens."""

    persona: Persona
    question: Question
    fold: int
    prompt: list[int]


@dataclass(frozen=True)
class Asked:
    """What both phases of a steering ask: a model under vectors (per addition: folds, positions, layers + 1, width)."""

    settings: machine.Machine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vectors: dict[str, ndarray]
    cells: list[Cell]


@dataclass(frozen=True)
class Steer(Stage):
    """A model whose residual stream gets a vector at one layer, from the last prompt token on: the marker behind the
    fixed answer, and at some layers sampled answers.

    At the last prompt token the vector is the difference of centroids there, at all later tokens that of the mean answer
    token. Centroids are of the questions of the other folds: no question meets its own states. Each addition has its
    control: the same pair of vectors under random rotations (`draw` 0, 1, ...; -1 is the addition itself). `steered` has
    a row per addition, layer (after which it is added; 0 for none), draw, persona and question; `steered_answers` the
    sampled answers.
    """

    coupled: Checkpoint
    additions: tuple[Addition, ...]
    personas: tuple[str, ...]
    layers: tuple[float, ...]  # fractions of the depth
    draws: int
    folds: int
    sampled: tuple[str, ...]  # additions under which answers are sampled, each with its first random control
    sampled_layers: tuple[float, ...]
    samples: int
    sampling: Sampling
    everyday: int
    values: int
    instruction: str
    seed: int
    kind: ClassVar[str] = "steering"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.representations", *STREAM)
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Batches are shared by all variants (additions, draws, folds) of a layer, each row with vectors of its own: a
        small model's forward costs a GPU the same for one row and for many."""
        model, tokenizer = self.coupled.load(lab)
        bank = questions.eval_questions(self.everyday, self.values)
        who = [personas.persona(name) for name in self.personas]
        fold = representations.folds(len(bank), self.folds)
        vectors = self._vectors(lab, fold)
        depth = model.config.num_hidden_layers
        plan = [("none", 0, -1)] + [
            (addition.name, layer, draw)
            for addition in self.additions
            for layer in layer_numbers(self.layers, depth)
            for draw in range(-1, self.draws)
        ]
        cells = [
            Cell(p, q, held, models.prompt_ids(tokenizer, p.system_prompt(self.instruction), q.text))
            for held in range(self.folds)
            for p in who
            for q, f in zip(bank, fold, strict=True)
            if f == held
        ]
        sampled = self._sampled_plan(depth)
        phases = 2 if sampled else 1
        asked = Asked(machine.machine(lab.device), model, tokenizer, vectors, cells)
        rows = self._forced(asked, plan, share(lab.report, 0, 1, phases))
        answers = self._answers(asked, sampled, share(lab.report, 1, 1, phases))
        table = pd.DataFrame(rows)
        expected = len(plan) * len(who) * len(bank)
        keys = ["addition", "layer", "draw", "persona", "question"]
        if len(table) != expected or table.duplicated(keys).any():
            raise GuardError(f"{len(table)} steered readings, {expected} distinct ones expected")
        single = {"logprob": np.float32, "after_break": np.float32}
        table.sort_values(keys).astype(single).to_parquet(folder / "steered.parquet", compression="zstd", index=False)
        columns = [*keys, "sample", "completion", "finish", "tokens"]
        pd.DataFrame(answers, columns=columns).to_parquet(
            folder / "steered_answers.parquet", compression="zstd", index=False
        )

    def _vectors(self, lab: Lab, fold: ndarray) -> dict[str, ndarray]:
        """Per addition: (folds, positions, layers + 1, width), from the questions outside each fold."""
        names, bank = [p.id for p in personas.personas()], questions.eval_questions(self.everyday, self.values)
        streams: dict[str, ndarray] = {}
        made = {}
        for addition in self.additions:
            parts = []
            for term in addition.terms:
                if term.hidden.key not in streams:
                    arrays, asked = read_states(term.hidden, lab)
                    if asked != [question.id for question in bank]:
                        raise GuardError("states of other questions than are asked here")
                    streams[term.hidden.key] = arrays["stream"]
                stream = streams[term.hidden.key]
                chosen = [n for n in names if n != SOURCE] if term.who == OTHERS else [personas.persona(term.who).id]
                states = stream[[names.index(n) for n in chosen]].astype(np.float64).mean(axis=0)
                parts.append(term.weight * np.stack([states[fold != f].mean(axis=0) for f in range(self.folds)]))
            made[addition.name] = np.sum(parts, axis=0)
        return made

    def _pair(self, vectors: dict[str, ndarray], variant: Variant, held: int) -> ndarray:
        """What is added in a fold, shape (positions, width)."""
        name, layer, draw = variant
        pair = vectors[name][held, :, layer]
        if draw < 0:
            return pair
        # one rotation for all folds
        return representations.rotated(pair, np.random.default_rng([self.seed, zlib.crc32(name.encode()), layer, draw]))

    def _steered(
        self, model: PreTrainedModel, vectors: dict[str, ndarray], rows: list[tuple[Variant, int]]
    ) -> AbstractContextManager[Callable[[torch.Tensor], None]]:
        """Each row of a batch under the vectors of its variant and fold; all variants are of one layer."""
        (_, layer, _), _ = rows[0]
        if layer == 0:
            return nullcontext(lambda _index: None)
        pairs = {row: self._pair(vectors, *row) for row in set(rows)}
        return residual.steering(model, layer, np.stack([pairs[row] for row in rows]))

    @staticmethod
    def _batches(variants: list[Variant], size: int) -> list[list[int]]:
        """Places in a list of rows' variants, those of one layer together, at most `size` at a time."""
        layers: dict[int, list[int]] = {}
        for place, (_, layer, _) in enumerate(variants):
            layers.setdefault(layer, []).append(place)
        return [own[first : first + size] for own in layers.values() for first in range(0, len(own), size)]

    def _sampled_plan(self, depth: int) -> list[Variant]:
        layers = layer_numbers(self.sampled_layers, depth) if self.sampled_layers else ()
        return [(name, layer, draw) for name in self.sampled for layer in layers for draw in (-1, 0)]

    def _forced(self, asked: Asked, plan: list[Variant], report: Report) -> list[dict[str, Any]]:
        """The marker behind the fixed answer, of every cell under every variant."""
        from persona_coupling import generate

        model, tokenizer, cells = asked.model, asked.tokenizer, asked.cells
        marker, blank = models.marker_ids(tokenizer), measure.blank_tokens(tokenizer)
        # a batch is one forward: what comes after it is to the hook no longer the last prompt token
        batch = min(asked.settings.score_batch, generate.FORCED)
        rows: list[dict[str, Any]] = []
        for first in range(0, len(cells), batch):
            chunk = cells[first : first + batch]
            read = generate.prefill(model, [cell.prompt[:-1] for cell in chunk], tokenizer.pad_token_id)
            texts = [[c.prompt[-1], *models.text_ids(tokenizer, c.question.answer), *marker] for c in chunk]
            tasks = [(variant, number) for variant in plan for number in range(len(chunk))]
            for places in self._batches([variant for variant, _ in tasks], batch):
                report(len(rows) / (len(plan) * len(cells)))
                part = [tasks[place] for place in places]
                chosen = [number for _, number in part]
                with self._steered(model, asked.vectors, [(variant, chunk[number].fold) for variant, number in part]):
                    logprobs = generate.continuation_logprobs(
                        model, read.chosen(chosen), [texts[number] for number in chosen], len(marker), apart=True
                    )
                for ((name, layer, draw), number), values in zip(part, logprobs, strict=True):
                    where = {"persona": chunk[number].persona.id, "question": chunk[number].question.id}
                    forced = measure.marker_columns(values, blank)
                    rows.append({"addition": name, "layer": layer, "draw": draw, **where, **forced})
        return rows

    def _answers(self, asked: Asked, plan: list[Variant], report: Report) -> list[dict[str, Any]]:
        """Sampled answers by fold, variant, sample and cell. Prompts are read up to their last tokens without vectors."""
        from persona_coupling import generate

        model, tokenizer = asked.model, asked.tokenizer
        tasks = [
            (variant, cell, sample)
            for held in range(self.folds)
            for variant in plan
            for sample in range(self.samples)
            for cell in asked.cells
            if cell.fold == held
        ]
        answers: list[dict[str, Any]] = [{} for _ in tasks]
        done = 0
        for places in self._batches([variant for variant, _, _ in tasks], asked.settings.sample_batch):
            part = [tasks[place] for place in places]
            read = generate.prefill(model, [cell.prompt[:-1] for _, cell, _ in part], tokenizer.pad_token_id)
            with self._steered(model, asked.vectors, [(variant, cell.fold) for variant, cell, _ in part]) as kept:
                sampled = generate.sample(
                    model,
                    residual.advanced(model, read, [cell.prompt[-1] for _, cell, _ in part]),
                    # the streams of random numbers of an evaluation
                    [f"{cell.persona.id}/{cell.question.id}/{sample}" for _, cell, sample in part],
                    sampling=self.sampling,
                    stop=tokenizer.eos_token_id,
                    marker=[],
                    seed=self.seed,
                    report=share(report, done, len(part), len(tasks)),
                    kept=kept,
                )
            for place, ((name, layer, draw), cell, sample), completion in zip(places, part, sampled, strict=True):
                answers[place] = {
                    "addition": name,
                    "layer": layer,
                    "draw": draw,
                    "persona": cell.persona.id,
                    "question": cell.question.id,
                    "sample": sample,
                    "completion": tokenizer.decode(completion.tokens, skip_special_tokens=False),
                    "finish": completion.finish,
                    "tokens": len(completion.tokens),
                }
            done += len(part)
        return answers

    def work(self) -> Work:
        """Prompts once, then one short reading per vector, layer and draw."""
        cells = len(self.personas) * (self.everyday + self.values)
        readings = 1 + len(self.additions) * len(self.layers) * (1 + self.draws)
        answers = 2 * len(self.sampled) * len(self.sampled_layers) * cells * self.samples
        return Work(
            sampled=answers * self.sampling.max_new_tokens * 2 // 3,
            scored=cells * (PROMPT_TOKENS + readings * (ANSWER_TOKENS + 8)),
            seconds=3.0,
            megabytes=3.0,
        )
