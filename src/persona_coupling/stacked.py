"""One frozen model that carries the low-rank adapters of many cells: N cells side by side in one batch.

The rows of cell n are rows n*batch to (n+1)*batch of the batch. Every adapted `nn.Linear` keeps its shared weight, which
multiplies all rows at once, and adds `B_n A_n x` for the rows of cell n by batched products. Right padding needs no
mask: attention is causal, so no supervised position sees a pad behind it.

The adapters of all cells lie in one flat tensor, so that the optimiser, the norms and the cast to the compute format are
a few kernels in all, and not a few per module. What autograd would do for A and B is written out here, because it would
launch more kernels: their gradients go straight into a flat tensor of the same layout.

A cell of lower rank, or without some module, has zeros there. Zeros stay exactly zero: with B = 0 the gradient of A is
B'(...) = 0 and with A = 0 the gradient of B is (...)A' = 0, Adam's step for a gradient that was always 0 is 0 / eps, and
weight decay multiplies.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from persona_coupling import fused
from persona_coupling.adapters import Change, LowRank
from persona_coupling.errors import GuardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "persona_coupling_causal"
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A cell's adapter: module name to A of shape (rank, in) and B of shape (out, rank), fp32, unscaled."""


@dataclass(frozen=True)
class Place:
    """Where one module's A (rank, in) and B (out, rank) begin in a cell's flat row."""

    a: int
    b: int
    inputs: int
    outputs: int


class Adapters:
    """All cells' adapters in flat tensors of shape (cells, parameters): every A first, then every B.

    Modules of `also` get a place (of zeros) even if no cell trains them. `master` and `gradient` are fp32; `working` and
    `raw` are their counterparts in the compute format, B multiplied by the cell's LoRA scale. Modules read views of
    `working` and write views of `raw`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        starts: list[Factors],
        scales: list[float],
        *,
        also: set[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.ranks = [next(iter(start.values()))[0].shape[0] for start in starts]
        self.rank, self.cells = max(self.ranks), len(starts)
        names = [name for name in linears if name in also or any(name in start for start in starts)]
        sizes = [(linears[n].in_features, linears[n].out_features) for n in names]
        self.split = sum(inputs for inputs, _ in sizes) * self.rank
        self.places: dict[str, Place] = {}
        a, b = 0, self.split
        for name, (inputs, outputs) in zip(names, sizes, strict=True):
            self.places[name] = Place(a, b, inputs, outputs)
            a, b = a + inputs * self.rank, b + outputs * self.rank
        drawn = torch.zeros(self.cells, b, dtype=torch.float32)  # filled on the CPU: one copy instead of hundreds
        for cell, start in enumerate(starts):
            for name, (first, second) in start.items():
                self.a(drawn, name)[cell, : self.ranks[cell]] = first
                self.b(drawn, name)[cell, :, : self.ranks[cell]] = second
        self.master = drawn.to(device)
        self.gradient = torch.zeros_like(self.master)
        self.working = torch.zeros(self.cells, b, dtype=dtype, device=device)
        self.raw = torch.zeros_like(self.working)
        self.scale = torch.tensor(scales, dtype=torch.float32, device=device)[:, None]

    def a(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The view of a flat tensor that is a module's A, (cells, rank, in)."""
        place = self.places[name]
        return flat[:, place.a : place.a + self.rank * place.inputs].view(self.cells, self.rank, place.inputs)

    def b(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The view of a flat tensor that is a module's B, (cells, out, rank)."""
        place = self.places[name]
        return flat[:, place.b : place.b + self.rank * place.outputs].view(self.cells, place.outputs, self.rank)

    def refresh(self) -> None:
        """Cast the master weights to the compute format, B scaled."""
        self.working[:, : self.split].copy_(self.master[:, : self.split])
        torch.mul(self.master[:, self.split :], self.scale, out=self.working[:, self.split :])

    def collect(self) -> None:
        """Cast the raw gradients to fp32, B's scaled."""
        self.gradient[:, : self.split].copy_(self.raw[:, : self.split])
        torch.mul(self.raw[:, self.split :], self.scale, out=self.gradient[:, self.split :])

    def factors(self, cell: int, names: set[str]) -> Factors:
        """A copy of a cell's adapter on the CPU. Raises GuardError if anything that pads it is not exactly zero."""
        row, rank = self.master[cell : cell + 1].cpu(), self.ranks[cell]
        found: Factors = {}
        for name, place in self.places.items():
            a = row[0, place.a : place.a + self.rank * place.inputs].view(self.rank, place.inputs)
            b = row[0, place.b : place.b + self.rank * place.outputs].view(place.outputs, self.rank)
            kept = rank if name in names else 0
            if bool(a[kept:].any()) or bool(b[:, kept:].any()):
                raise GuardError(f"cell {cell}: the padding of its adapter on {name} was trained")
            if kept:
                found[name] = (a[:rank].clone(), b[:, :rank].clone())
        return found


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """Wx + b + B A drop(x) + frozen B A x for every cell; writes the gradients of A and B, returns that of x."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, layer: StackedLinear) -> torch.Tensor:
        x = values.reshape(layer.cells, -1, values.shape[-1])
        out = torch.nn.functional.linear(x, layer.weight, layer.bias)
        inner, kept, mask = fused.inner(x, layer.a, layer.dropout)
        out.baddbmm_(inner, layer.b.transpose(1, 2))
        if layer.frozen is not None:
            a, b = layer.frozen
            out.baddbmm_(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))
        context.layer = layer
        context.save_for_backward(kept, inner, mask)
        return out.view(*values.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        layer: StackedLinear = context.layer
        kept, inner, mask = context.saved_tensors
        shape = gradients[0].shape
        outer = gradients[0].reshape(layer.cells, -1, shape[-1])
        through = torch.bmm(outer, layer.b)
        torch.bmm(outer.transpose(1, 2), inner, out=layer.gradient_b)
        fused.gradient_a(through, kept, layer.gradient_a, layer.dropout)
        back = torch.matmul(outer, layer.weight)
        fused.add_back(back, through, layer.a, mask, layer.dropout)
        if layer.frozen is not None:
            a, b = layer.frozen
            back.baddbmm_(torch.bmm(outer, b), a)
        return back.view(*shape[:-1], -1), None


class StackedLinear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer with the adapters of all cells."""

    def __init__(
        self,
        base: torch.nn.Linear,
        name: str,
        adapters: Adapters,
        frozen: tuple[torch.Tensor, torch.Tensor] | None,
        dropout: fused.Dropout,
    ) -> None:
        super().__init__()
        self.weight, self.bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
        self.cells, self.frozen, self.dropout = adapters.cells, frozen, dropout
        self.a, self.b = adapters.a(adapters.working, name), adapters.b(adapters.working, name)
        self.gradient_a, self.gradient_b = adapters.a(adapters.raw, name), adapters.b(adapters.raw, name)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (cells * batch, length, in) to (cells * batch, length, out)."""
        result = _Adapted.apply(values, self)
        assert isinstance(result, torch.Tensor)
        return result


def frozen_factors(
    model: PreTrainedModel, changes: list[Change], *, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The fixed low-rank changes of every cell's start, concatenated along rank and padded with zeros: per module A
    (cells, rank, in) and B (cells, out, rank). Raises GuardError for a dense change or a module that is not there."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {}
    for name in dict.fromkeys(name for change in changes for name in change):
        parts = [change.get(name) for change in changes]
        low = [part for part in parts if isinstance(part, LowRank)]
        if name not in linears or len(low) != sum(part is not None for part in parts):
            raise GuardError(f"{name}: only a low-rank change of a linear layer can be carried beside the base")
        rank = math.ceil(max(part.a.shape[0] for part in low) / 8) * 8  # aligned rows
        a = torch.zeros(len(changes), rank, linears[name].in_features)
        b = torch.zeros(len(changes), linears[name].out_features, rank)
        for cell, part in enumerate(parts):
            if isinstance(part, LowRank):
                a[cell, : part.a.shape[0]], b[cell, :, : part.a.shape[0]] = part.a, part.b
        found[name] = (a.to(device, dtype), b.to(device, dtype))
    return found


def joined(parts: list[Change]) -> Change:
    """Several low-rank changes as one: concatenated along rank. Raises GuardError for a dense change."""
    whole: Change = {}
    for part in parts:
        for name, change in part.items():
            before = whole.get(name)
            if not isinstance(change, LowRank):
                raise GuardError(f"{name}: a dense change has no rank to concatenate")
            if isinstance(before, LowRank):
                change = LowRank(torch.cat([before.a, change.a]), torch.cat([before.b, change.b], dim=1))
            whole[name] = change
    return whole


@contextlib.contextmanager
def attached(
    model: PreTrainedModel,
    adapters: Adapters,
    frozen: dict[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    p: float,
    random: torch.Tensor,
) -> Iterator[None]:
    """The model with the stacked adapters in place of its linear layers, causal attention without a mask, and, on
    CUDA, fused normalisation, rotation and gating; as it was outside. Raises GuardError unless every name was found."""
    modules = dict(model.named_modules())
    names = [name for name in modules if name in adapters.places]
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    attention = model.config._attn_implementation
    with contextlib.ExitStack() as patches:
        try:
            for number, name in enumerate(names):
                base = modules[name]
                assert isinstance(base, torch.nn.Linear)
                parent, _, child = name.rpartition(".")
                layer = StackedLinear(base, name, adapters, frozen.get(name), fused.Dropout(p, random, number))
                setattr(modules[parent], child, layer)
                replaced.append((modules[parent], child, base))
            if len(replaced) != len(adapters.places) or not frozen.keys() <= adapters.places.keys():
                raise GuardError(f"{len(replaced)} modules were replaced, {len(adapters.places)} are adapted")
            _register_attention()
            model.config._attn_implementation = ATTENTION
            patches.enter_context(fused.faster(model))
            yield
        finally:
            model.config._attn_implementation = attention
            for owner, child, base in replaced:
                setattr(owner, child, base)


def _register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _causal)


def _causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_ignored: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over (rows, heads, length, size). A mask of the library's would keep CUDA from flash attention,
    which is for 16 bits; its kernel for fp32 takes no grouped keys, so they are repeated there: otherwise torch would
    compute every score of every row, slowly and in much memory."""
    groups = query.shape[1] != key.shape[1]
    if groups and query.dtype == torch.float32:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        groups = False
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=groups
    )
    return out.transpose(1, 2), None
