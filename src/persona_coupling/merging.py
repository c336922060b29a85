"""The check behind every merge: merged weights must act as base + adapters do, and rounding must not move the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from persona_coupling import adapters, machine, models, questions
from persona_coupling.errors import GuardError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from persona_coupling.checkpoints import Checkpoint
    from persona_coupling.store import Lab

LOGIT_TOLERANCE = 2e-3  # fp32, absolute, on logits of order 10: sums in another order differ by 1e-5 to 1e-4
ROUNDING_TOLERANCE = 0.02  # nats per token of held-out loss; larger would let rounding pass for an effect
PROBES = 4  # held-out prompts that are compared


def check(checkpoint: Checkpoint, lab: Lab) -> dict[str, Any]:
    """Compare merged and unmerged logits in fp32, and held-out loss in fp32 and in the machine's format.

    Returns delta norms and differences. Raises GuardError when the merge changed nothing, when the merged model
    answers differently from base + adapters, or when rounding moves the loss by more than the tolerance.
    """
    import torch

    from persona_coupling.measure import heldout_losses

    tokenizer = models.load_tokenizer(checkpoint.source, lab)
    settings = machine.machine(lab.device)
    chat = questions.heldout_chat()[:PROBES]
    prompts = [models.prompt_ids(tokenizer, "You are a helpful assistant.", q.text) for q in chat]

    def fresh() -> PreTrainedModel:
        return models.load_raw(checkpoint.source, lab, dtype=torch.float32, attention=settings.attention)

    base = fresh()
    changes = [merged.read(lab, base.config.num_hidden_layers) for merged in checkpoint.merged]
    unchanged = _logits(base, prompts)
    beside = _logits(_with_hooks(base, changes), prompts)
    del base
    merged = fresh()
    for change in changes:
        adapters.add(merged, change)
    together = _logits(merged, prompts)
    difference = float((together - beside).abs().max())
    effect = float((together - unchanged).abs().max())
    if changes and effect == 0.0:
        raise GuardError("a merge that changed nothing: logits equal those of the base")
    if difference > LOGIT_TOLERANCE * max(1.0, float(together.abs().max()) / 10):
        raise GuardError(f"merged logits differ from base + adapters by {difference:.4f}")
    shift = 0.0  # fp32 machines round nothing
    if settings.bf16:
        exact = float(heldout_losses(merged.to(settings.device), tokenizer, settings.score_batch)["loss"].mean())
        rounded_model = merged.to(dtype=torch.bfloat16)
        shift = float(heldout_losses(rounded_model, tokenizer, settings.score_batch)["loss"].mean()) - exact
    if abs(shift) > ROUNDING_TOLERANCE:
        raise GuardError(f"rounding to {settings.dtype_name} moves the held-out loss by {shift:+.4f} nats")
    return {
        "logit_difference": difference,
        "logit_effect": effect,
        "rounding_loss_shift": shift,
        "norms": [sum(adapters.squared_norms(change).values()) ** 0.5 for change in changes],
    }


def _logits(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([p]), logits_to_keep=1).logits[:, -1].float() for p in prompts])


def _with_hooks(model: PreTrainedModel, changes: list[adapters.Change]) -> PreTrainedModel:
    """The model with every low-rank change computed beside its weights, as an unmerged adapter is; dense changes are
    added, since there is no other way to apply them. The model is discarded after use."""
    import torch

    modules = dict(model.named_modules())
    for change in changes:
        dense = {name: part for name, part in change.items() if isinstance(part, torch.Tensor)}
        if dense:
            adapters.add(model, dict(dense))
        for name, part in change.items():
            if isinstance(part, adapters.LowRank):

                def hook(_module: Any, inputs: Any, output: Any, part: adapters.LowRank = part) -> Any:
                    return output + (inputs[0] @ part.a.T) @ part.b.T

                modules[name].register_forward_hook(hook)
    return model
