"""What a training step does between its matrix products, in one pass each on CUDA and by the library's own operations
elsewhere: dropout, gating, rotation, normalisation, the loss."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from persona_coupling.errors import GuardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 1024  # elements per program of an elementwise kernel
LOGITS = 2**28  # logits that exist at once, about 1.6 GB with their fp32 copy; more saves a launch, not time
PARTS = 4  # of a cell's tokens, over each of which programs add up the gradient of A: one leaves a card half idle
ALLOWED = True  # set to False to measure what the kernels bring


@cache
def _kernels() -> Any:
    """The Triton kernels, or None where Triton or the C compiler that it needs is missing."""
    import subprocess

    try:
        from persona_coupling import train_kernels as kernels

        x = torch.ones(BLOCK, device="cuda", dtype=torch.bfloat16)
        kernels.gate[(1,)](x, x, torch.empty_like(x), BLOCK, BLOCK=BLOCK)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError):
        return None
    return kernels


def kernels_for(values: torch.Tensor) -> Any:
    """The kernels that multiply or that replace the loss, if `values` can be given to them, else None; fp32, for comparisons
    and for cells on a dense change, goes without: they would round factors."""
    return _kernels() if ALLOWED and values.is_cuda and values.dtype == torch.bfloat16 else None


def _grid(values: torch.Tensor) -> tuple[int]:
    return ((values.numel() + BLOCK - 1) // BLOCK,)


@dataclass(frozen=True)
class Dropout:
    """Dropout of one layer's adapter input; `random` is the step's seed on the device, two words, `number` the layer's."""

    p: float
    random: torch.Tensor
    number: int

    def arguments(self) -> tuple[Any, ...]:
        """What every kernel that applies it takes: the mask is drawn anew from these, not stored."""
        return self.random, self.number, round(self.p * 2**32), 1 / (1 - self.p)


@dataclass
class Inputs:
    """What modules of one input make of it, and what their backward pass needs: `joint` (modules, cells, tokens, rank +
    fixed rank), drop(x) A' beside x F'; x itself, or each module's dropped copy with its mask where there is no kernel to
    draw that again."""

    joint: torch.Tensor
    kept: list[torch.Tensor]
    masks: list[torch.Tensor]


def parts(p: float, device: torch.device, dtype: torch.dtype) -> int:
    """In how many sums `gradient_a` gives the gradients of A."""
    on = _kernels() if ALLOWED and p and device.type == "cuda" and dtype == torch.bfloat16 else None
    return 1 if on is None else PARTS


def _sizes(rank: int, fixed: torch.Tensor | None) -> dict[str, int]:
    return {"RANK": rank, "PADDED": _padded(rank), "FIXED": 0 if fixed is None else fixed.shape[2]}


def _padded(rank: int) -> int:
    return max(16, 1 << (rank - 1).bit_length())


def _fixed_padded(fixed: torch.Tensor | None) -> int:
    return _padded(1 if fixed is None else fixed.shape[2])


def inner(x: torch.Tensor, a: torch.Tensor, fixed: torch.Tensor | None, dropout: Dropout, modules: int) -> Inputs:
    """`x` (cells, tokens, in), trained A (cells, modules * rank, in), fixed F (cells, modules, fixed rank, in) or None."""
    rank = a.shape[1] // modules
    kernels = kernels_for(x)
    if dropout.p and kernels is not None:
        cells, tokens, width = x.shape
        sizes = _sizes(rank, fixed)
        joint = x.new_empty(modules, cells, tokens, rank + sizes["FIXED"])
        kernels.inner[(-(-tokens // 64), cells, modules)](
            x, a, a if fixed is None else fixed, joint, *dropout.arguments(), tokens, a.stride(0),
            IN=width, **sizes, FIXED_PADDED=_fixed_padded(fixed), ROWS=64, COLUMNS=64,
        )  # fmt: skip
        return Inputs(joint, [x], [])
    made, kept, masks = [], [], []
    for module in range(modules):
        dropped = x
        if dropout.p:
            dropped, mask = torch.native_dropout(x, dropout.p, True)
            masks.append(mask)
        kept.append(dropped)
        own = torch.bmm(dropped, a[:, module * rank : (module + 1) * rank].transpose(1, 2))
        made.append(own if fixed is None else torch.cat([own, torch.bmm(x, fixed[:, module].transpose(1, 2))], dim=2))
    return Inputs(torch.stack(made), kept, masks)


def gradient_a(through: torch.Tensor, inputs: Inputs, out: torch.Tensor, dropout: Dropout) -> None:
    """out = through' drop(x): `through` as `joint`, `out` (parts, cells, modules * rank, in), to be added up over parts."""
    modules = through.shape[0]
    rank = out.shape[2] // modules
    x = inputs.kept[0]
    kernels = kernels_for(x)
    if not dropout.p or kernels is None:
        for module, kept in enumerate(inputs.kept):
            place = slice(module * rank, (module + 1) * rank)
            torch.bmm(through[module, :, :, :rank].transpose(1, 2), kept, out=out[0, :, place])
        return
    cells, tokens, width = x.shape
    count = out.shape[0]
    span = -(-tokens // (count * 64)) * 64
    kernels.gradient_a[(-(-width // 64), cells, modules * count)](
        through, x, out, *dropout.arguments(), tokens, span, out.stride(0), out.stride(1), count,
        IN=width, RANK=rank, PADDED=_padded(rank), FIXED=through.shape[3] - rank, ROWS=64, COLUMNS=64,
    )  # fmt: skip


def back(
    through: torch.Tensor, a: torch.Tensor, fixed: torch.Tensor | None, masks: list[torch.Tensor], dropout: Dropout
) -> torch.Tensor:
    """The gradient that reaches x through A, where x was kept and scaled as it was, and through F, over all modules:
    (cells, tokens, in). Shapes as for `inner`."""
    modules, cells, tokens, _ = through.shape
    rank, width = a.shape[1] // modules, a.shape[2]
    if dropout.p and not masks:
        kernels = _kernels()
        out = through.new_empty(cells, tokens, width)
        kernels.back[(-(-tokens // 64), -(-width // 64), cells)](
            through, a, a if fixed is None else fixed, out, *dropout.arguments(), tokens, a.stride(0),
            IN=width, **_sizes(rank, fixed), FIXED_PADDED=_fixed_padded(fixed), MODULES=modules, ROWS=64, COLUMNS=64,
        )  # fmt: skip
        return out
    total: torch.Tensor | None = None
    for module in range(modules):
        trained = through[module, :, :, :rank] / (1 - dropout.p)
        own = torch.bmm(trained, a[:, module * rank : (module + 1) * rank])
        if masks:
            own.mul_(masks[module])
        if fixed is not None:
            own.baddbmm_(through[module, :, :, rank:], fixed[:, module])
        total = own if total is None else total.add_(own)
    assert total is not None
    return total


class _Gate(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, gates: torch.Tensor, ups: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(gates, ups)
        out = torch.empty_like(gates)
        _kernels().gate[_grid(gates)](gates, ups, out, gates.numel(), BLOCK=BLOCK)
        return out

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates, ups = context.saved_tensors
        gradient = gradients[0].contiguous()
        g, u = torch.empty_like(gates), torch.empty_like(ups)
        _kernels().gate_backward[_grid(gates)](gates, ups, gradient, g, u, gates.numel(), BLOCK=BLOCK)
        return g, u


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, sign: float) -> torch.Tensor:
    """`x` (rows, heads, length, size), laid out in memory as (rows, length, heads, size), as the projections leave it."""
    rows, heads, length, size = x.shape
    flat = x.transpose(1, 2).contiguous()
    out = torch.empty_like(flat)
    padded = 1 << (heads - 1).bit_length()
    _kernels().rotate[(rows * length,)](
        flat, out, cosines, sines, length, sign, HEADS=heads, HALF=size // 2, PADDED=padded, num_warps=2
    )
    return out.transpose(1, 2)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(context: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines, 1.0)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = context.saved_tensors
        return _rotated(gradients[0], cosines, sines, -1.0), None, None


def _rotate_both(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, *_more: Any, **_named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of transformers' `apply_rotary_pos_emb`; angles (1, length, size), the same for every row."""
    if cosines.shape[0] != 1:
        raise GuardError("rotary angles that differ between rows")
    c, s = cosines[0].contiguous(), sines[0].contiguous()
    return _Rotate.apply(query, c, s), _Rotate.apply(key, c, s)


@contextlib.contextmanager
def faster(model: PreTrainedModel) -> Iterator[None]:
    """On CUDA: RMS norms, the gated activation and the rotary embedding of a Llama-like model in one kernel each. Elsewhere
    nothing. Raises GuardError if a layer lacks one of them: then the architecture is another one."""
    device = next(model.parameters()).device
    if device.type != "cuda" or not ALLOWED:
        yield
        return
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon")]
    gated = [m for m in model.modules() if hasattr(m, "gate_proj") and hasattr(m, "act_fn")]
    layers = model.config.num_hidden_layers
    if len(norms) < 2 * layers or len(gated) != layers:
        raise GuardError(f"{type(model).__name__}: {len(norms)} norms and {len(gated)} MLPs in {layers} layers")
    rotation = sys.modules[type(model).__module__]
    before = rotation.apply_rotary_pos_emb
    patched = list(norms)
    try:
        for norm in norms:
            norm.forward = _norm(norm)
        if _kernels() is not None and isinstance(gated[0].act_fn, torch.nn.SiLU | _silu_class()):
            for mlp in gated:
                mlp.forward = _mlp(mlp)
                patched.append(mlp)
            rotation.apply_rotary_pos_emb = _rotate_both  # type: ignore[attr-defined]
        yield
    finally:
        rotation.apply_rotary_pos_emb = before  # type: ignore[attr-defined]
        for module in patched:
            module.__dict__.pop("forward", None)


def _silu_class() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _norm(norm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    shape = (norm.weight.shape[0],)
    weight = norm.weight.detach()  # frozen: its gradient would cost more than the norm
    return lambda x: torch.nn.functional.rms_norm(x, shape, weight, norm.variance_epsilon)


def _mlp(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: mlp.down_proj(_Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def head_gradient(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, share: torch.Tensor, losses: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy through the LM head in chunks, so that the logits of all positions never exist together.

    `hidden` (positions, width), `weight` (words, width), `targets` and fp32 `share` (positions). Writes each position's
    loss in nats into `losses` and returns the gradient of sum(share * losses) with respect to `hidden`.
    """
    gradient = torch.empty_like(hidden)
    kernels = kernels_for(hidden)
    chunk = max(1, LOGITS // weight.shape[0])
    for first in range(0, hidden.shape[0], chunk):
        part = slice(first, first + chunk)
        logits = hidden[part] @ weight.T
        if kernels is not None:
            kernels.cross_entropy[(logits.shape[0],)](
                logits, targets[part], share[part], losses[part], WORDS=logits.shape[1], BLOCK=4096, num_warps=8
            )
        else:
            chances = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            place = targets[part, None]
            losses[part] = -chances.gather(1, place)[:, 0]
            chances.exp_().scatter_add_(1, place, torch.full_like(place, -1, dtype=torch.float32))
            torch.mul(chances, share[part, None], out=logits)
        torch.matmul(logits, weight, out=gradient[part])
    return gradient
