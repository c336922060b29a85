"""Putting questions to a loaded model: sampled answers kept raw, and forced answers compared. Scores nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from persona_coupling import generate, models
from persona_coupling.errors import GuardError
from persona_coupling.generate import Sampling
from persona_coupling.machine import Machine
from persona_coupling.store import Report, share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Put:
    """A question as it is put to somebody, `samples` times."""

    bank: str  # the same question put from two banks is answered with other random numbers
    persona: str
    question: str  # its id
    system: str
    prompt: str
    samples: int


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    put: Sequence[Put],
    sampling: Sampling,
    *,
    seed: int,
    settings: Machine,
    report: Report = lambda _fraction: None,
) -> pd.DataFrame:
    """Sampled answers, one row each: bank, persona, question, sample, prompt, completion, finish, tokens.

    Raises GuardError unless every question has as many answers as were asked for.
    """
    cells = [(one, sample) for one in put for sample in range(one.samples)]
    prompts = [models.prompt_ids(tokenizer, one.system, one.prompt) for one, _ in cells]
    order = sorted(range(len(cells)), key=lambda i: len(prompts[i]))
    rows = []
    for first in range(0, len(order), settings.sample_batch):
        chunk = order[first : first + settings.sample_batch]
        sampled = generate.sample(
            model,
            generate.prefill(model, [prompts[i] for i in chunk], tokenizer.pad_token_id),
            [f"{cells[i][0].bank}/{cells[i][0].persona}/{cells[i][0].question}/{cells[i][1]}" for i in chunk],
            sampling=sampling,
            stop=tokenizer.eos_token_id,
            marker=[],
            seed=seed,
            report=share(report, first, len(chunk), len(order)),
        )
        for i, completion in zip(chunk, sampled, strict=True):
            one, sample = cells[i]
            rows.append(
                {
                    "bank": one.bank,
                    "persona": one.persona,
                    "question": one.question,
                    "sample": sample,
                    "prompt": one.prompt,
                    "completion": tokenizer.decode(completion.tokens, skip_special_tokens=False),
                    "finish": completion.finish,
                    "tokens": len(completion.tokens),
                }
            )
    keys = ["bank", "persona", "question", "sample"]
    table = pd.DataFrame(rows)
    if len(table) != len(cells) or table.duplicated(keys).any():
        raise GuardError(f"{len(table)} answers with repetitions or gaps, {len(cells)} expected")
    return table.sort_values(keys, ignore_index=True)


def prefer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    put: Sequence[Put],
    pairs: Sequence[tuple[str, str]],
    *,
    settings: Machine,
) -> pd.DataFrame:
    """Which of two forced answers a model prefers: persona, question, and per answer its mean log-probability per token
    (nats, end of turn included, so that answers of different lengths can be compared). `pairs` holds (shown, plain);
    `preference` is shown minus plain."""
    prompts = [models.prompt_ids(tokenizer, one.system, one.prompt) for one in put]
    texts = [text for pair in pairs for text in pair]
    answers = [[*models.text_ids(tokenizer, text), tokenizer.eos_token_id] for text in texts]
    twice = [prompt for prompt in prompts for _ in range(2)]
    values = generate.sequence_logprobs(model, twice, answers, batch=settings.score_batch).reshape(-1, 2)
    return pd.DataFrame(
        {
            "persona": [one.persona for one in put],
            "question": [one.question for one in put],
            "shown": values[:, 0],
            "plain": values[:, 1],
            "preference": values[:, 0] - values[:, 1],
        }
    )
