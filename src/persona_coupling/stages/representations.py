"""Stages about where a model keeps its personas: the states themselves, and their shift under SFT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy import ndarray

from persona_coupling import adapters, machine, models, personas, questions, residual, shifts
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.personas import SOURCE
from persona_coupling.residual import POSITIONS, SITES
from persona_coupling.stages.code import ASKING, MODEL, PROMPT_TOKENS, TEXT
from persona_coupling.store import Lab, Stage, Work

STATES, QUESTIONS = "states.safetensors", "questions.json"
ANSWER_TOKENS = 28  # of a fixed answer: for estimates of time only
SAME_TEXT = 1e-3  # relative; mean embeddings of one and the same answer differ by the rounding of their sum alone
STREAM = ("persona_coupling.residual", *ASKING)


@dataclass(frozen=True)
class Hidden(Stage):
    """The residual stream of every persona at every question, embeddings and after every layer, and what every layer's
    projections read of it. The text is teacher-forced: prompt and the question's fixed answer, the same words for every
    model and persona, so that a difference is the model's and not the text's.

    `stream` has shape (personas, questions, positions, layers + 1, width). `reads` is (2, questions, positions, layers,
    sites, width): the source's and the mean of the others' inputs of q/k/v and of gate/up, taken behind the RMS norm with
    its weight, as the adapter's A meets them.
    """

    checkpoint: Checkpoint
    everyday: int  # questions
    values: int
    instruction: str
    kind: ClassVar[str] = "hidden"
    code: ClassVar[tuple[str, ...]] = STREAM
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Read every prompt with its answer once. Raises GuardError if personas did not read the same answers."""
        import torch
        from safetensors.numpy import save_file

        model, tokenizer = self.checkpoint.load(lab)
        settings = machine.machine(lab.device)
        bank, who = questions.eval_questions(self.everyday, self.values), personas.personas()
        cells = [(p, q) for p in range(len(who)) for q in range(len(bank))]
        prompts = [models.prompt_ids(tokenizer, who[p].system_prompt(self.instruction), bank[q].text) for p, q in cells]
        answers = [models.text_ids(tokenizer, bank[q].answer) for _, q in cells]
        order = sorted(range(len(cells)), key=lambda i: len(prompts[i]) + len(answers[i]))
        depth, width = model.config.num_hidden_layers, model.config.hidden_size
        stream = np.zeros((len(who), len(bank), len(POSITIONS), depth + 1, width), dtype=np.float32)
        reads = np.zeros((len(who), len(bank), len(POSITIONS), depth, len(SITES), width), dtype=np.float32)
        for first in range(0, len(order), settings.score_batch):
            lab.report(first / len(order))
            chunk = order[first : first + settings.score_batch]
            sequences = [prompts[i] + answers[i] for i in chunk]
            longest = max(map(len, sequences))
            ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=model.device)
            mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], device=model.device)
            average = torch.zeros(len(chunk), len(POSITIONS), longest, device=model.device)
            for place, i in enumerate(chunk):
                begin, end = len(prompts[i]), len(sequences[place])
                average[place, 0, begin - 1] = 1.0
                average[place, 1, begin:end] = 1.0 / (end - begin)
            with torch.inference_mode(), residual.recording(model, average) as found:
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            for place, i in enumerate(chunk):
                stream[cells[i]] = np.stack([state[place] for state in found["stream"]], axis=1)
                for site in range(len(SITES)):
                    reads[cells[i]][:, :, site] = np.stack([state[place] for state in found[f"site {site}"]], axis=1)
        embedded = stream[:, :, 1, 0]
        if np.abs(embedded - embedded[0]).max() > SAME_TEXT * np.abs(embedded).max():
            raise GuardError("the personas' answers are not one and the same text")
        source = [p.id for p in who].index(SOURCE)
        groups = np.stack([reads[source], np.delete(reads, source, axis=0).mean(axis=0)])
        if not (np.isfinite(stream).all() and np.isfinite(groups).all()):
            raise GuardError("a state is not a number")
        save_file({"stream": stream, "reads": groups}, folder / STATES)
        (folder / QUESTIONS).write_text(json.dumps([question.id for question in bank]), encoding="utf-8")

    def work(self) -> Work:
        """One forward per persona and question."""
        cells = personas.NUMBER * (self.everyday + self.values)
        return Work(scored=cells * (PROMPT_TOKENS + ANSWER_TOKENS), seconds=3.0, megabytes=0.2 * cells)


@dataclass(frozen=True)
class Shift(Stage):
    """How SFT moved the personas, as small tables.

    `shift` (position, layer, question): `representations.SHIFTS`, one jackknife pseudo-value per question.
    `probe` (position, layer, persona, question): whether a linear probe names the persona among the eleven, each model's
    mean over personas being removed at every question: within the raw model (`raw`), within the SFT'd one (`tuned`), from
    raw to SFT'd (`transfer_centred`), on shuffled labels (`permuted`); and from raw to SFT'd with nothing removed
    (`transfer`).
    `reading` (position, layer, question; layer 0: all together): what the adapter makes of a direction per unit length,
    relative to a random one. `response_*` weighs directions by what the adapter writes for them (A'B'BA), `inside_*` is
    the share in the row space of its A's; `_shift` is the source's shift, `_persona` source minus others on the raw
    model. `kept` is what is left, in the SFT'd model, of the adapter's answer to source minus others; `kept_any` the
    same without an adapter.
    `chance` (position, draw): `response` and `inside` of random vectors as long as the source's shift, all layers
    together.
    `plane` (position, layer, persona): see `representations.planes`.
    """

    raw: Stage  # Hidden
    tuned: Stage  # Hidden
    adapter: Stage
    folds: int
    ridge: float
    draws: int
    planes: tuple[float, ...]  # layers whose plane is kept, as fractions of the depth
    seed: int
    kind: ClassVar[str] = "shift"
    code: ClassVar[tuple[str, ...]] = (
        "persona_coupling.shifts",
        "persona_coupling.representations",
        "persona_coupling.residual",
        "persona_coupling.geometry",
        *MODEL,
    )

    def build(self, folder: Path, lab: Lab) -> None:
        """Array arithmetic only; no model is loaded."""
        (before, bank), (after, same) = (read_states(stage, lab) for stage in (self.raw, self.tuned))
        if before["stream"].shape != after["stream"].shape or bank != same:
            raise GuardError("states of different models or questions cannot be compared")
        change = adapters.read_change(lab.folder(self.adapter))
        tables = {
            "shift": shifts.shift_table(before["stream"], after["stream"], bank),
            "plane": shifts.plane_table(before["stream"], after["stream"], self.planes),
            "probe": shifts.probe_table(before["stream"], after["stream"], bank, self.folds, self.ridge, self.seed),
        }
        lab.report(0.6)
        reading = shifts.reading_tables(before["reads"], after["reads"], bank, change, self.draws, self.seed)
        for name, table in {**tables, **reading}.items():
            single = {c: np.float32 for c in table.columns if table[c].dtype == np.float64}
            table.astype(single).to_parquet(folder / f"{name}.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """Measured on 30 layers of width 576: most of it is the probes."""
        count = getattr(self.raw, "everyday", 8) + getattr(self.raw, "values", 2)
        return Work(seconds=0.2 * count + 3.0, megabytes=2.0)


def read_states(stage: Stage, lab: Lab) -> tuple[dict[str, ndarray], list[str]]:
    """The arrays of a `Hidden` stage and the ids of its questions, built if need be."""
    from safetensors.numpy import load_file

    folder = lab.folder(stage)
    return load_file(folder / STATES), json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
