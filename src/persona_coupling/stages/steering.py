"""The stage that adds centroids back by force: does the marker return?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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
from persona_coupling.generate import Prefill, Sampling
from persona_coupling.personas import SOURCE
from persona_coupling.residual import layer_numbers
from persona_coupling.stages.code import PROMPT_TOKENS, TEXT
from persona_coupling.stages.representations import ANSWER_TOKENS, STREAM, read_states
from persona_coupling.store import Lab, Stage, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OTHERS = "others"  # everybody but the source, in equal parts


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
        """One reading of the prompts per fold serves all vectors, layers and draws."""
        from persona_coupling import generate

        model, tokenizer = self.coupled.load(lab)
        batch = machine.machine(lab.device).score_batch
        bank = questions.eval_questions(self.everyday, self.values)
        who = [personas.persona(name) for name in self.personas]
        marker, blank = models.marker_ids(tokenizer), measure.blank_tokens(tokenizer)
        fold = representations.folds(len(bank), self.folds)
        vectors = self._vectors(lab, fold)
        depth = model.config.num_hidden_layers
        plan = [("none", 0, -1)] + [
            (addition.name, layer, draw)
            for addition in self.additions
            for layer in layer_numbers(self.layers, depth)
            for draw in range(-1, self.draws)
        ]
        rows, answers = [], []
        for held in range(self.folds):
            cells = [(p, q) for p in who for q, f in zip(bank, fold, strict=True) if f == held]
            prompts = [models.prompt_ids(tokenizer, p.system_prompt(self.instruction), q.text) for p, q in cells]
            for first in range(0, len(cells), batch):
                chunk = range(first, min(first + batch, len(cells)))
                read = generate.prefill(model, [prompts[i][:-1] for i in chunk], tokenizer.pad_token_id)
                continuations = [
                    [prompts[i][-1], *models.text_ids(tokenizer, cells[i][1].answer), *marker] for i in chunk
                ]
                for number, (name, layer, draw) in enumerate(plan):
                    lab.report((held + number / len(plan)) / self.folds)
                    with self._steered(model, vectors, name, layer, draw, held):
                        logprobs = generate.continuation_logprobs(model, read, continuations, len(marker))
                    for i, values in zip(chunk, logprobs, strict=True):
                        where = {"persona": cells[i][0].id, "question": cells[i][1].id}
                        forced = measure.marker_columns(values, blank)
                        rows.append({"addition": name, "layer": layer, "draw": draw, **where, **forced})
            for name, layer, draw in self._sampled_plan(depth):
                repeated = prompts * self.samples
                read = generate.prefill(model, [prompt[:-1] for prompt in repeated], tokenizer.pad_token_id)
                with self._steered(model, vectors, name, layer, draw, held):  # the prompt has been read without it
                    last = [prompt[-1] for prompt in repeated]
                    found = self._answers(model, tokenizer, cells * self.samples, read, last)
                answers += [{"addition": name, "layer": layer, "draw": draw, **answer} for answer in found]
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

    def _steered(
        self, model: PreTrainedModel, vectors: dict[str, ndarray], name: str, layer: int, draw: int, held: int
    ) -> AbstractContextManager[None]:
        if layer == 0:
            return nullcontext()
        pair = vectors[name][held, :, layer]
        if draw >= 0:  # one rotation for all folds
            pair = representations.rotated(
                pair, np.random.default_rng([self.seed, zlib.crc32(name.encode()), layer, draw])
            )
        return residual.steering(model, layer, pair)

    def _sampled_plan(self, depth: int) -> list[tuple[str, int, int]]:
        layers = layer_numbers(self.sampled_layers, depth) if self.sampled_layers else ()
        return [(name, layer, draw) for name in self.sampled for layer in layers for draw in (-1, 0)]

    def _answers(
        self, model: PreTrainedModel, tokenizer: Any, cells: list, read: Prefill, last: list[int]
    ) -> list[dict[str, Any]]:
        """Sampled answers under whatever is attached to the model now, from prompts read up to their `last` tokens."""
        from persona_coupling import generate

        counts: dict[tuple[str, str], int] = {}
        labels, keys = [], []
        for persona, question in cells:
            sample = counts[persona.id, question.id] = counts.get((persona.id, question.id), -1) + 1
            labels.append(f"{persona.id}/{question.id}/{sample}")  # the streams of random numbers of an evaluation
            keys.append({"persona": persona.id, "question": question.id, "sample": sample})
        sampled = generate.sample(
            model,
            residual.advanced(model, read, last),
            labels,
            sampling=self.sampling,
            stop=tokenizer.eos_token_id,
            marker=[],
            seed=self.seed,
        )
        return [
            {
                **key,
                "completion": tokenizer.decode(completion.tokens, skip_special_tokens=False),
                "finish": completion.finish,
                "tokens": len(completion.tokens),
            }
            for key, completion in zip(keys, sampled, strict=True)
        ]

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
