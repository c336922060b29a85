"""The check behind every merge: merged weights must act as base + adapters do, and rounding must not move the loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from persona_coupling import adapters, architecture, machine, models, questions
from persona_coupling.errors import GuardError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from persona_coupling.checkpoints import Checkpoint
    from persona_coupling.store import Lab

LOGIT_TOLERANCE = 2e-3  # fp32, absolute, on logits of order 10: sums in another order differ by 1e-5 to 1e-4
ROUNDING_TOLERANCE = 0.02  # nats per token of held-out loss; larger would let rounding pass for an effect
PROBES = 4  # held-out prompts that are compared
ROUNDED = (
    6  # held-out texts, the first, that tell what rounding costs: reading all in fp32 was most of the check; fewer
)
# texts give a noisier mean, and a shift near the tolerance may pass or fail by their choice


def check(checkpoint: Checkpoint, lab: Lab) -> dict[str, Any]:
    """Compare merged and unmerged logits in fp32, and held-out loss in fp32 and in the machine's format.

    Returns delta norms and differences. Raises GuardError when the merge changed nothing, when the merged model
    answers differently from base + adapters, or when rounding moves the loss by more than the tolerance.
    """
    import torch

    from persona_coupling.checkpoints import load_fp32
    from persona_coupling.measure import heldout_losses

    tokenizer = models.load_tokenizer(checkpoint.source, lab)
    settings = machine.machine(lab.device)
    chat = questions.heldout_chat()[:PROBES]
    prompts = [models.prompt_ids(tokenizer, "You are a helpful assistant.", q.text) for q in chat]

    with machine.products("ieee"):
        model = load_fp32(checkpoint.source, lab, device=settings.device, attention=settings.attention)
        changes = [merged.read(lab, model.config.num_hidden_layers) for merged in checkpoint.merged]
        unchanged = _logits(model, prompts)
        with _beside(model, changes):
            beside = _logits(model, prompts)
        for change in changes:
            adapters.add(model, change)
        together = _logits(model, prompts)
        difference = float((together - beside).abs().max())
        effect = float((together - unchanged).abs().max())
        if changes and effect == 0.0:
            raise GuardError("a merge that changed nothing: logits equal those of the base")
        if difference > LOGIT_TOLERANCE * max(1.0, float(together.abs().max()) / 10):
            raise GuardError(f"merged logits differ from base + adapters by {difference:.4f}")
        settings = settings.of(model.num_parameters())
        rounds = settings.bf16 or settings.exact  # a plain fp32 machine rounds nothing
        if rounds:
            exact = heldout_losses(model, tokenizer, settings.score_batch, texts=ROUNDED)["loss"].mean()
    shift = 0.0
    if rounds:
        with machine.products("tf32"):
            model = models.cast(model, getattr(torch, settings.dtype_name))
            rounded = heldout_losses(model, tokenizer, settings.score_batch, texts=ROUNDED)
        shift = float(rounded["loss"].mean() - exact)
    if abs(shift) > ROUNDING_TOLERANCE:
        how = settings.dtype_name if settings.bf16 else "TF32"
        raise GuardError(f"rounding to {how} moves the held-out loss by {shift:+.4f} nats")
    return {
        "logit_difference": difference,
        "logit_effect": effect,
        "rounding_loss_shift": shift,
        "norms": [sum(adapters.squared_norms(change).values()) ** 0.5 for change in changes],
    }


def _logits(model: PreTrainedModel, prompts: list[list[int]]) -> torch.Tensor:
    """Logits behind each prompt, on the CPU; prompts are read together, right-padded, which no token before sees."""
    import torch

    ends = torch.tensor([len(p) for p in prompts])
    ids = torch.tensor([p + [0] * (int(ends.max()) - len(p)) for p in prompts], device=model.device)
    mask = torch.arange(ids.shape[1]) < ends[:, None]
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids, attention_mask=mask.long().to(model.device), use_cache=False)
        last = hidden.last_hidden_state[torch.arange(len(prompts)), ends - 1]
        return architecture.logits(model, last).float().cpu()


@contextlib.contextmanager
def _beside(model: PreTrainedModel, changes: list[adapters.Change]) -> Iterator[None]:
    """In here every low-rank change is computed beside the weights, as an unmerged adapter is; dense changes are added,
    since there is no other way to apply them, and the weights put back afterwards."""
    import torch

    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    handles: list[Any] = []
    saved: dict[str, torch.Tensor] = {}
    try:
        for change in changes:
            dense: adapters.Change = {name: part for name, part in change.items() if isinstance(part, torch.Tensor)}
            for name in dense:
                full = name if name in parameters else f"{name}.weight"
                if full in parameters:
                    saved.setdefault(full, parameters[full].detach().clone())
            if dense:
                adapters.add(model, dense)
            for name, part in change.items():
                if isinstance(part, adapters.LowRank):
                    part = part.to(model.device)

                    def hook(_module: Any, inputs: Any, output: Any, part: adapters.LowRank = part) -> Any:
                        return output + (inputs[0] @ part.a.T) @ part.b.T

                    handles.append(modules[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, weight in saved.items():
                parameters[name].copy_(weight)
