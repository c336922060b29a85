"""Putting questions to a model: sampled answers, held-out loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from persona_coupling import generate, machine, models, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.generate import Sampling
from persona_coupling.store import Lab, share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: Checkpoint, asked: list[tuple[str, str, str]], sampling: Sampling, *, seed: int, lab: Lab
) -> list[tuple[str, str]]:
    """Text (stripped) and finish reason of one sampled answer per (label, system prompt, question)."""
    loaded, tokenizer = model.load(lab)
    settings = machine.machine(lab.device)
    prompts = [models.prompt_ids(tokenizer, system, question) for _, system, question in asked]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[tuple[str, str]] = [("", "")] * len(prompts)
    for first in range(0, len(order), settings.sample_batch):
        chunk = order[first : first + settings.sample_batch]
        completions = generate.sample(
            loaded,
            generate.prefill(loaded, [prompts[i] for i in chunk], tokenizer.pad_token_id),
            [asked[i][0] for i in chunk],
            sampling=sampling,
            stop=tokenizer.eos_token_id,
            marker=[],
            seed=seed,
            report=share(lab.report, first, len(chunk), len(order)),
        )
        for i, completion in zip(chunk, completions, strict=True):
            answers[i] = (tokenizer.decode(completion.tokens, skip_special_tokens=True).strip(), completion.finish)
    return answers


def heldout_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, *, texts: int | None = None
) -> pd.DataFrame:
    """Loss per token (nats) on each held-out chat answer, or on the first `texts` of them: is the model broken?"""
    chat = questions.heldout_chat()[:texts]
    system = personas.persona(personas.ASSISTANT).prompt
    prompts = [models.prompt_ids(tokenizer, system, q.text) for q in chat]
    answers = [[*models.text_ids(tokenizer, q.answer), tokenizer.eos_token_id] for q in chat]
    values = generate.sequence_logprobs(model, prompts, answers, batch=batch)
    return pd.DataFrame({"question": [q.id for q in chat], "loss": -np.asarray(values)})
