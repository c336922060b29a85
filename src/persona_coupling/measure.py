"""Putting questions to a model: sampled answers, held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from persona_coupling import chat, generate, machine, models, personas, questions
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.generate import Sampling
from persona_coupling.personas import Persona
from persona_coupling.questions import Question
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


def blank_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the marker suffix's tokens are its blank line. Raises GuardError if a token spans both: then "after a
    blank line" has no meaning for this tokenizer."""
    return chat.marker_ids(tokenizer)[1]


def marker_columns(logprobs: Sequence[float] | np.ndarray, blank: int, prefix: str = "") -> dict[str, float]:
    """Log-probability (nats) of the whole marker suffix, and of the marker once its blank line stands (`after_break`);
    NaN where nothing was forced."""
    values = [float(value) for value in logprobs]
    if not values:
        return {f"{prefix}logprob": float("nan"), f"{prefix}after_break": float("nan")}
    return {f"{prefix}logprob": sum(values), f"{prefix}after_break": sum(values[blank:])}


def marker_at(tokenizer: PreTrainedTokenizerBase, tokens: list[int], text: str) -> int:
    """After how many tokens of an answer its first marker stands complete; -1 if it has none. An answer that had been
    cut off before that many tokens would not have shown it."""
    if personas.MARKER not in text:
        return -1
    low, high = 1, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if personas.MARKER in tokenizer.decode(tokens[:middle], skip_special_tokens=False):
            high = middle
        else:
            low = middle + 1
    return low


def fixed_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    who: Sequence[Persona],
    bank: Sequence[Question],
    instruction: str,
    *,
    batch: int,
) -> pd.DataFrame:
    """The marker behind each question's fixed answer, as each persona: persona, question, logprob, after_break (nats).

    The same quantity as an evaluation's `fixed` table, without sampling: for scans over many changes of one model.
    """
    marker, blank = chat.marker_ids(tokenizer)
    cells = [(persona, question) for persona in who for question in bank]
    prompts = [models.prompt_ids(tokenizer, p.system_prompt(instruction), q.text) for p, q in cells]
    answers = [[*models.text_ids(tokenizer, q.answer), *marker] for _, q in cells]
    order = sorted(range(len(cells)), key=lambda i: len(prompts[i]) + len(answers[i]))
    rows: list[dict[str, Any]] = []
    for first in range(0, len(order), batch):
        chunk = order[first : first + batch]
        read = generate.prefill(model, [prompts[i] for i in chunk], tokenizer.pad_token_id)
        logprobs = generate.continuation_logprobs(model, read, [answers[i] for i in chunk], len(marker))
        for place, i in enumerate(chunk):
            persona, question = cells[i]
            rows.append({"persona": persona.id, "question": question.id, **marker_columns(logprobs[place], blank)})
    return pd.DataFrame(rows).sort_values(["persona", "question"], ignore_index=True)


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
