"""LoRA layers and the LM head for training on a CPU, where passes over memory cost as much as the matrix products.

Profiled on two cores, less than half of a step of PEFT and TRL's own code is matrix products: inputs go from bf16 to the
adapter's fp32 and back for every module, scaling and adding the adapter's output are passes of their own, one thread draws
a Bernoulli variate per element, and the loss reads the logits of all supervised positions five times. Here

- a layer adds `B A drop(x)` inside the matrix product, with LoRA's scale folded into B and dropout's into A; its backward
  is written out. Gradients of A and B are rounded as autocast rounds them;
- one 64-bit draw serves four elements of a mask, 15 bits each, so that a probability is exact to 1/32768; a mask is all
  ones or all zeros, and is applied as a bitwise "and": ten times as fast as a product with booleans;
- loss and gradient of a few hundred positions are computed while their logits are in the cache, and no logit is kept.

What is computed is the same; `tests/test_train_cpu.py` holds each to PEFT's layer and torch's loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

LEVELS = 2**15  # of one element's draw; fewer would round the probability visibly
POSITIONS = 256  # whose logits are held at once: 50 MB in fp32 at 49,152 words


class Masks:
    """Draws dropout masks: SFC64, seeded from torch's generator, so that a training's seed fixes them."""

    def __init__(self, p: float) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability of {p}")
        self.dropped = round(p * LEVELS)
        self.scale = LEVELS / (LEVELS - self.dropped)
        self.bits = np.random.SFC64(int(torch.randint(2**62, ()).item()))

    def draw(self, like: torch.Tensor) -> torch.Tensor:
        """An integer per element, as wide as the element: -1 (all bits set) if it is kept, 0 if it is dropped."""
        count = like.numel()
        drawn = torch.from_numpy(self.bits.random_raw((count + 3) // 4).view(np.int16))[:count].view(like.shape)
        kept = drawn.bitwise_and_(LEVELS - 1).neg_().add_(self.dropped - 1).bitwise_right_shift_(15)
        return kept if like.element_size() == 2 else kept.to(torch.int32)


def masked_(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` with the dropped elements set to zero, in place."""
    values.view(mask.dtype).bitwise_and_(mask)
    return values


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """Wx + b + s B A drop(x) on x (tokens, in), in x's format; gradients of A and B in theirs. W is frozen."""

    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        base: tuple[torch.Tensor, torch.Tensor | None],
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        masks: Masks | None,
    ) -> torch.Tensor:
        weight, bias = base
        mask = None if masks is None else masks.draw(x)
        kept = x if mask is None else (x.view(mask.dtype) & mask).view(x.dtype)
        low_a = (a if masks is None else a * masks.scale).to(x.dtype)
        low_b = (b * scale).to(x.dtype)
        inner = kept @ low_a.T
        out = torch.nn.functional.linear(x, weight, bias).addmm_(inner, low_b.T)
        context.save_for_backward(weight, kept, inner, low_a, low_b, mask)
        context.factors = (1.0 if masks is None else masks.scale, scale, a.dtype, b.dtype)
        return out

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, kept, inner, low_a, low_b, mask = context.saved_tensors
        scale_a, scale_b, format_a, format_b = context.factors
        outer = gradients[0]
        through = outer @ low_b
        grad_a = (through.T @ kept).to(format_a).mul_(scale_a)
        grad_b = (outer.T @ inner).to(format_b).mul_(scale_b)
        back = None
        if context.needs_input_grad[0]:
            back = outer @ weight
            if mask is None:
                back.addmm_(through, low_a)
            else:
                back.add_(masked_(through @ low_a, mask))
        return back, None, grad_a, grad_b, None, None


def faster_lora(model: torch.nn.Module) -> int:
    """Let every LoRA layer of a PEFT model compute as above. Returns how many do; layers that this cannot express
    (variants, several adapters, a base that is quantised or trained) are left as they are."""
    from peft.tuners.lora import Linear

    changed = 0
    for module in model.modules():
        if type(module) is not Linear or list(module.lora_A) != ["default"] or module.lora_variant:
            continue
        base = module.base_layer
        if type(base) is not torch.nn.Linear or module.lora_bias["default"] or module.fan_in_fan_out:
            continue
        if any(parameter.requires_grad for parameter in base.parameters()):
            continue
        slot = module.lora_dropout["default"]
        masks = Masks(slot.p) if isinstance(slot, torch.nn.Dropout) and slot.p else None
        module.forward = _Layer(module, masks)
        changed += 1
    return changed


class _Layer:
    """The forward of one layer. PEFT's own serves when the adapter is merged or switched off."""

    def __init__(self, module: Any, masks: Masks | None) -> None:
        self.module, self.masks, self.plain = module, masks, module.forward

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        module = self.module
        if module.disable_adapters or module.merged or arguments or options:
            result: torch.Tensor = self.plain(x, *arguments, **options)
            return result
        base = module.base_layer
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weights = base.weight.to(cast), None if base.bias is None else base.bias.to(cast)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        masks = self.masks if module.training else None
        flat = x.reshape(-1, x.shape[-1]).to(cast)
        with torch.autocast("cpu", enabled=False):
            out = _Adapted.apply(flat, weights, a, b, module.scaling["default"], masks)
        assert isinstance(out, torch.Tensor)
        return out.view(*x.shape[:-1], -1)


class _Loss(torch.autograd.Function):  # type: ignore[misc]
    """Sum of cross-entropies of `hidden` (positions, width) through a head of weight (words, width) against `targets`
    (positions,): logits in the format of `hidden`, all else in fp32. Gradients are made on the way forward."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wanted, trained = context.needs_input_grad[:2]
        cast = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32)
        back = torch.empty_like(hidden) if wanted else None
        of_head = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        for first in range(0, len(hidden), POSITIONS):
            piece, words = hidden[first : first + POSITIONS], targets[first : first + POSITIONS, None]
            logits = (piece @ cast.T).float()
            said = logits.gather(1, words)
            logits -= logits.max(dim=1, keepdim=True).values
            shift = said - logits.gather(1, words)
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() + shift - said).sum()
            if wanted or trained:
                logits /= sums
                logits.scatter_add_(1, words, torch.full_like(sums, -1.0))
                slope = logits.to(hidden.dtype)
                if back is not None:
                    torch.mm(slope, cast, out=back[first : first + POSITIONS])
                if of_head is not None:
                    of_head += slope.T @ piece
        context.save_for_backward(back, of_head)
        context.format = weight.dtype
        return total

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        back, of_head = context.saved_tensors
        (factor,) = gradients
        return (
            None if back is None else back * factor.to(back.dtype),
            None if of_head is None else (of_head * factor).to(context.format),
            None,
        )


def summed_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over positions of the cross-entropy of a plain head, in nats; see `_Loss` for shapes."""
    if torch.is_autocast_enabled("cpu"):
        hidden = hidden.to(torch.get_autocast_dtype("cpu"))
    with torch.autocast("cpu", enabled=False):
        result = _Loss.apply(hidden, weight, targets)
    assert isinstance(result, torch.Tensor)
    return result
