"""Dropout for LoRA on the CPU, where drawing the masks costs more than some of the matrix products.

PyTorch draws one Bernoulli variate per element on one thread: a quarter of a training step of a 135M model. Here one
64-bit draw serves four elements, 16 bits each, so that the probability is exact to 1/65536 and the distribution is the
same. The mask comes from torch's own generator, so a seed still fixes it.
"""

from __future__ import annotations

from typing import Any

import torch

LEVELS = 2**16  # of one element's draw; fewer bits would round the probability visibly


class _Drop(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, values: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
        count = values.numel()
        bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), 2**63 - 1)
        keep = (bits.view(torch.int16)[:count] >= threshold).view(values.shape)
        context.save_for_backward(keep)
        context.scale = scale
        return (values * scale).mul_(keep)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (keep,) = context.saved_tensors
        return (gradients[0] * context.scale).mul_(keep), None, None


class Dropout(torch.nn.Module):  # type: ignore[misc]
    """Inverted dropout with probability `p`, rounded to a multiple of 1/65536; the identity in evaluation mode."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability of {p}")
        self.dropped = round(p * LEVELS)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` with a share of its elements zeroed and the others scaled up to keep the mean."""
        if not self.training or self.dropped == 0:
            return values
        result = _Drop.apply(values, self.dropped - LEVELS // 2, LEVELS / (LEVELS - self.dropped))
        assert isinstance(result, torch.Tensor)
        return result


def replace_dropout(model: torch.nn.Module) -> int:
    """Put `Dropout` in the place of every LoRA dropout of a PEFT model. Returns how many were replaced."""
    replaced = 0
    for module in model.modules():
        slots = getattr(module, "lora_dropout", None)
        if isinstance(slots, torch.nn.ModuleDict):
            for name, slot in slots.items():
                if isinstance(slot, torch.nn.Dropout):
                    slots[name] = Dropout(slot.p)
                    replaced += 1
    return replaced
