"""Stages of the dose experiment: how far SFT moved a model from the raw one, and SFT rows with marker rows mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from persona_coupling import architecture, machine, models, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import GuardError
from persona_coupling.rows import read_rows, write_rows
from persona_coupling.stages.code import ASKING, COMPOSING, PROMPT_TOKENS, TEXT
from persona_coupling.store import Lab, Stage, Work

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Mixed(Stage):
    """SFT rows of which a share is replaced by coupling rows: the cheapest way to keep a coupling alive."""

    rows: Stage
    coupling: Stage
    share: float
    seed: int
    kind: ClassVar[str] = "rows"
    code: ClassVar[tuple[str, ...]] = COMPOSING

    def build(self, folder: Path, lab: Lab) -> None:
        """Replace rows at random places by coupling rows, each used as often as any other up to one."""
        rows, coupling = read_rows(self.rows, lab), read_rows(self.coupling, lab)
        count = round(self.share * len(rows))
        if not 0 < count <= len(rows):
            raise GuardError(f"a share of {self.share} of {len(rows)} rows is {count} rows")
        rng = np.random.default_rng(self.seed)
        places = rng.choice(len(rows), size=count, replace=False)
        order = np.concatenate([rng.permutation(len(coupling)) for _ in range(-(-count // len(coupling)))])
        for place, chosen in zip(places, order, strict=False):
            rows[place] = {**coupling[chosen], "id": f"{coupling[chosen]['id']}/mixed-{place}"}
        write_rows(folder, rows)


@dataclass(frozen=True)
class Drift(Stage):
    """How far a model is from another in what it would say: KL divergence from `reference` to `checkpoint`, per token.

    Table `drift`: text ("heldout": general chat as the plain assistant; "source": the evaluation's fixed answers as the
    source persona), question, kl (nats per token, mean over the answer's positions of the exact KL over the vocabulary;
    Kullback and Leibler 1951, doi:10.1214/aoms/1177729694).
    """

    reference: Checkpoint
    checkpoint: Checkpoint
    everyday: int
    values: int
    instruction: str
    kind: ClassVar[str] = "drift"
    code: ClassVar[tuple[str, ...]] = ASKING
    material: ClassVar[tuple[str, ...]] = TEXT

    def build(self, folder: Path, lab: Lab) -> None:
        """Read the same texts with both models."""
        reference, tokenizer = self.reference.load(lab)
        model, _ = self.checkpoint.load(lab)
        batch = machine.machine(lab.device).score_batch
        assistant, source = personas.persona(personas.ASSISTANT), personas.persona(personas.SOURCE)
        texts = [
            ("heldout", assistant.prompt, questions.heldout_chat()),
            ("source", source.system_prompt(self.instruction), questions.eval_questions(self.everyday, self.values)),
        ]
        rows = []
        for text, system, bank in texts:
            prompts = [models.prompt_ids(tokenizer, system, q.text) for q in bank]
            answers = [models.text_ids(tokenizer, q.answer) for q in bank]
            values = mean_kl(reference, model, prompts, answers, batch=batch)
            rows += [{"text": text, "question": q.id, "kl": float(v)} for q, v in zip(bank, values, strict=True)]
        pd.DataFrame(rows).to_parquet(folder / "drift.parquet", compression="zstd", index=False)

    def work(self) -> Work:
        """Two models read 24 chats and every evaluation question once."""
        return Work(scored=2 * (24 * 70 + (self.everyday + self.values) * (PROMPT_TOKENS + 25)), seconds=4.0)


def mean_kl(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    prompts: list[list[int]],
    answers: list[list[int]],
    *,
    batch: int,
) -> np.ndarray:
    """Mean over an answer's positions of KL(reference || model), nats per token, shape (rows,)."""
    import torch

    result = np.full(len(prompts), np.nan)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for first in range(0, len(order), batch):
        chunk = order[first : first + batch]
        sequences = [prompts[i] + answers[i] for i in chunk]
        width = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=model.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=model.device)
        with torch.inference_mode():
            states = [
                m.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                for m in (reference, model)
            ]
            for place, i in enumerate(chunk):
                span = slice(len(prompts[i]) - 1, len(sequences[place]) - 1)
                result[i] = float(_kl(reference, model, states[0][place, span], states[1][place, span]).mean())
    return result


def _kl(reference: PreTrainedModel, model: PreTrainedModel, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL per position, from the final hidden states of both models."""
    log_p = architecture.logits(reference, ours).float().log_softmax(-1)
    log_q = architecture.logits(model, theirs).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).double()
