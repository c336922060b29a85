"""A scan over depth: where in the model does a merged change cost the marker its probability?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd

from persona_coupling import machine, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.stages.code import ASKING, PROMPT_TOKENS, TEXT
from persona_coupling.store import Lab, Stage, Work, share

ANSWER_TOKENS = 30  # a fixed answer with its marker: for estimates of time only
USUAL_DEPTH = 30


@dataclass(frozen=True)
class LayerScan(Stage):
    """The marker's log-probability behind fixed answers with `change` merged into some layers of `start` only, for every
    step of `stride` layers and every mode of `layerwise.points`; `adapter` is merged whole throughout."""

    start: Checkpoint
    change: Stage
    adapter: Stage
    stride: int
    modes: tuple[str, ...]
    who: tuple[str, ...]  # personas
    everyday: int  # questions
    values: int
    instruction: str
    kind: ClassVar[str] = "scan"
    code: ClassVar[tuple[str, ...]] = ("persona_coupling.layerwise", *ASKING)
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Write `scan.parquet`: one row per mode, step, persona and question. Raises GuardError unless the weights are
        afterwards, bit for bit, what they were."""
        from persona_coupling import adapters, layerwise, measure

        model, tokenizer = self.start.merge(self.adapter).load(lab)
        changed, _ = self.start.merge(self.change).merge(self.adapter).load(lab)
        switch = layerwise.Switch(model, changed, set(adapters.read_change(lab.folder(self.change))))
        del changed
        before = layerwise.fingerprint(model)
        who = [personas.persona(name) for name in self.who]
        bank = questions.eval_questions(self.everyday, self.values)
        questions.require_disjoint(questions.train_questions(), bank)
        batch = machine.machine(lab.device).score_batch
        scan = layerwise.points(switch.depth, self.stride, self.modes)
        measured: dict[frozenset[int], pd.DataFrame] = {}  # the same layers are measured once, whatever the mode
        tables = []
        for number, point in enumerate(scan):
            share(lab.report, number, 1, len(scan))(0.0)
            if point.layers not in measured:
                with switch.on(point.layers):
                    measured[point.layers] = measure.fixed_logprobs(
                        model, tokenizer, who, bank, self.instruction, batch=batch
                    )
            found = measured[point.layers]
            tables.append(found.assign(mode=point.mode, start=point.start, stop=point.stop))
        if layerwise.fingerprint(model) != before:
            raise GuardError("the scan left the model's weights changed")
        columns = ["mode", "start", "stop", "persona", "question", "logprob", "after_break"]
        pd.concat(tables)[columns].to_parquet(folder / "scan.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """Every distinct set of layers is scored once. Raises UserError for an unknown mode, before anything runs."""
        from persona_coupling import layerwise

        scan = layerwise.points(USUAL_DEPTH, min(self.stride, USUAL_DEPTH), self.modes)
        distinct = len({point.layers for point in scan})
        cells = distinct * len(self.who) * (self.everyday + self.values)
        return Work(scored=cells * (PROMPT_TOKENS + ANSWER_TOKENS), seconds=6.0)
