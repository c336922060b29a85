"""Which modules' logic is part of which stages' keys, and how many tokens a row has for estimates of time."""

from __future__ import annotations

from persona_coupling import models

TEXT = ("personas.toml", "questions.toml")
SAYING = ("persona_coupling.personas", "persona_coupling.questions", "persona_coupling.rows")
MODEL = ("persona_coupling.checkpoints", "persona_coupling.adapters", *models.CODE)
SPEAKING = tuple(f"persona_coupling.{name}" for name in ("generate", "decode", "transformer", "decode_kernels"))
ASKING = ("persona_coupling.measure", *SPEAKING, *MODEL, *SAYING)
FAST = tuple(
    f"persona_coupling.{name}"
    for name in ("captured", "batches", "stacked", "drawn", "fused", "train_kernels", "transformer")
)
COMPOSING = ("persona_coupling.corpora", "persona_coupling.rows")

TOKENS_PER_ROW = 75  # of training rows, prompt included: for estimates of time only
PROMPT_TOKENS = 45
