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
    """Where one module's A (rank, in) begins among every A of a cell, and its B (out, rank) among every B."""

    a: int
    b: int
    inputs: int
    outputs: int


class Adapters:
    """All cells' adapters in flat tensors of shape (cells, parameters): every A first, then every B.

    Modules of `frozen` get a place (of zeros) even if no cell trains them. `master` and `gradient` are fp32. Their
    counterparts in the compute format: `first` every A, (cells, parameters); `second` every B multiplied by the cell's LoRA
    scale, (cells, outputs of all modules, rank + fixed rank), each row followed by that of the frozen change beside it, so
    that one product does both; and the gradients `raw_a`, in as many parts as `fused.gradient_a` gives, and `raw_b`.
    Modules read views of the former and write views of the latter.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        starts: list[Factors],
        scales: list[float],
        *,
        frozen: dict[str, tuple[torch.Tensor, torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        parts: int = 1,
    ) -> None:
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.ranks = [next(iter(start.values()))[0].shape[0] for start in starts]
        self.rank, self.cells, self.frozen = max(self.ranks), len(starts), frozen
        self.fixed = max((a.shape[1] for a, _ in frozen.values()), default=0)
        names = [name for name in linears if name in frozen or any(name in start for start in starts)]
        sizes = [(linears[n].in_features, linears[n].out_features) for n in names]
        self.split = sum(inputs for inputs, _ in sizes) * self.rank
        self.places: dict[str, Place] = {}
        a = b = 0
        for name, (inputs, outputs) in zip(names, sizes, strict=True):
            self.places[name] = Place(a, b, inputs, outputs)
            a, b = a + inputs * self.rank, b + outputs * self.rank
        drawn = torch.zeros(self.cells, a + b, dtype=torch.float32)  # filled on the CPU: one copy instead of hundreds
        for cell, start in enumerate(starts):
            for name, (first, second) in start.items():
                self.a(drawn, name)[cell, : self.ranks[cell]] = first
                self.b(drawn, name)[cell, :, : self.ranks[cell]] = second
        self.master = drawn.to(device)
        self.gradient = torch.zeros_like(self.master)
        self.first = torch.zeros(self.cells, self.split, dtype=dtype, device=device)
        self.second = torch.zeros(self.cells, b // self.rank, self.rank + self.fixed, dtype=dtype, device=device)
        for name, (_, fixed) in frozen.items():
            self.row(name)[:, :, self.rank :] = fixed
        summed = dtype if parts == 1 else torch.float32
        self.raw_a = torch.zeros(parts, self.cells, self.split, dtype=summed, device=device)
        self.raw_b = torch.zeros(self.cells, b, dtype=dtype, device=device)
        self.scale = torch.tensor(scales, dtype=torch.float32, device=device)[:, None, None]

    def a(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The view of a flat tensor that is a module's A, (cells, rank, in)."""
        place = self.places[name]
        return flat[:, place.a : place.a + self.rank * place.inputs].view(self.cells, self.rank, place.inputs)

    def b(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """The view of a flat tensor that is a module's B, (cells, out, rank)."""
        return self.b_of(flat[:, self.split :], name)

    def b_of(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        """`b` of a tensor that has every B and no A."""
        place = self.places[name]
        return flat[:, place.b : place.b + self.rank * place.outputs].view(self.cells, place.outputs, self.rank)

    def row(self, name: str) -> torch.Tensor:
        """A module's rows of `second`, (cells, out, rank), or with the fixed rank behind it where it has a frozen change."""
        place = self.places[name]
        first, width = place.b // self.rank, self.rank + (self.fixed if name in self.frozen else 0)
        return self.second[:, first : first + place.outputs, :width]

    def refresh(self) -> None:
        """Cast the master weights to the compute format, B scaled."""
        self.first.copy_(self.master[:, : self.split])
        b = self.master[:, self.split :].view(self.cells, -1, self.rank)
        torch.mul(b, self.scale, out=self.second[:, :, : self.rank])

    def collect(self) -> None:
        """Cast the raw gradients to fp32, their parts added up and B's scaled."""
        a = self.gradient[:, : self.split]
        if len(self.raw_a) == 1:
            a.copy_(self.raw_a[0])
        else:
            torch.sum(self.raw_a, dim=0, out=a)
        torch.mul(self.raw_b, self.scale[:, :, 0], out=self.gradient[:, self.split :])

    def factors(self, cell: int, names: set[str]) -> Factors:
        """A copy of a cell's adapter on the CPU. Raises GuardError if anything that pads it is not exactly zero."""
        row, rank = self.master[cell].cpu(), self.ranks[cell]
        every_a, every_b = row[: self.split], row[self.split :]
        found: Factors = {}
        for name, place in self.places.items():
            a = every_a[place.a : place.a + self.rank * place.inputs].view(self.rank, place.inputs)
            b = every_b[place.b : place.b + self.rank * place.outputs].view(place.outputs, self.rank)
            kept = rank if name in names else 0
            if bool(a[kept:].any()) or bool(b[:, kept:].any()):
                raise GuardError(f"cell {cell}: the padding of its adapter on {name} was trained")
            if kept:
                found[name] = (a[:rank].clone(), b[:, :rank].clone())
        return found


class _Adapted(torch.autograd.Function):  # type: ignore[misc]
    """Wx + b + B A drop(x) + frozen B A x for every cell and each module of one input; writes the gradients of A and B,
    returns that of x. What is low-rank comes first, so that the large product adds to it as it writes."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, group: Group) -> tuple[torch.Tensor, ...]:
        x = values.reshape(group.cells, -1, values.shape[-1])
        inputs = fused.inner(x, group.a, group.fixed, group.dropout, len(group.layers))
        results = []
        for layer, inner in zip(group.layers, inputs.joint, strict=True):
            out = torch.bmm(inner, layer.b.transpose(1, 2)).view(-1, layer.b.shape[1])
            out.addmm_(x.reshape(-1, x.shape[2]), layer.weight.T)
            if layer.bias is not None:
                out += layer.bias
            results.append(out.view(*values.shape[:-1], -1))
        context.group, context.kept = group, len(inputs.kept)
        context.save_for_backward(inputs.joint, *inputs.kept, *inputs.masks)
        return tuple(results)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        group: Group = context.group
        joint, *more = context.saved_tensors
        inputs = fused.Inputs(joint, more[: context.kept], more[context.kept :])
        through, rank = torch.empty_like(joint), group.rank
        outers = [gradient.reshape(group.cells, -1, gradient.shape[-1]) for gradient in gradients]
        for module, (layer, outer) in enumerate(zip(group.layers, outers, strict=True)):
            torch.bmm(outer, layer.b, out=through[module])
            torch.bmm(outer.transpose(1, 2), joint[module, :, :, :rank], out=layer.gradient_b)
        fused.gradient_a(through, inputs, group.gradient_a, group.dropout)
        back = fused.back(through, group.a, group.fixed, inputs.masks, group.dropout).view(-1, group.a.shape[2])
        for layer, outer in zip(group.layers, outers, strict=True):
            back.addmm_(outer.reshape(-1, outer.shape[2]), layer.weight)
        return back.view(*gradients[0].shape[:-1], -1), None


class StackedLinear(torch.nn.Module):  # type: ignore[misc]
    """A linear layer with the adapters of all cells; a member of a `Group`, which computes it with the others."""

    def __init__(self, base: torch.nn.Linear, name: str, adapters: Adapters) -> None:
        super().__init__()
        self.weight, self.bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
        self.b, self.gradient_b = adapters.row(name), adapters.b_of(adapters.raw_b, name)
        self.group: Group | None = None

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (cells * batch, length, in) to (cells * batch, length, out)."""
        assert self.group is not None
        return self.group.result(self, values)


class Group:
    """Adapted modules that are given the same values one after the other: queries, keys and values, or gate and up. Their
    low-rank products and the gradients of their input are made together. Modules of one group follow each other in
    `Adapters`, or it raises ValueError; `dropout` is that of the first, and the others' numbers follow it."""

    def __init__(self, layers: dict[str, StackedLinear], adapters: Adapters, dropout: fused.Dropout) -> None:
        names = list(layers)
        places = [adapters.places[name] for name in names]
        self.layers, self.dropout, self.cells, self.rank = list(layers.values()), dropout, adapters.cells, adapters.rank
        inputs, begin = places[0].inputs, places[0].a
        length = adapters.rank * inputs
        if [(place.a, place.inputs) for place in places] != [(begin + i * length, inputs) for i in range(len(places))]:
            raise ValueError(f"{', '.join(names)} do not follow each other")
        part = slice(begin, begin + len(names) * length)
        self.a = adapters.first[:, part].view(adapters.cells, -1, inputs)
        self.gradient_a = adapters.raw_a[:, :, part].view(len(adapters.raw_a), adapters.cells, -1, inputs)
        self.fixed: torch.Tensor | None = None
        if names[0] in adapters.frozen:
            self.fixed = torch.stack([adapters.frozen[name][0] for name in names], dim=1)
        self.values: torch.Tensor | None = None
        self.results: dict[StackedLinear, torch.Tensor] = {}
        for layer in self.layers:
            layer.group = self

    def result(self, layer: StackedLinear, values: torch.Tensor) -> torch.Tensor:
        """What a module makes of `values`. The first that is asked computes all."""
        if self.values is not values or layer not in self.results:
            self.values = values
            self.results = dict(zip(self.layers, _Adapted.apply(values, self), strict=True))
        result = self.results.pop(layer)
        if not self.results:
            self.values = None
        return result


def frozen_factors(
    model: PreTrainedModel, changes: list[Change], *, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The fixed low-rank changes of every cell's start, padded with zeros to one rank: per module A (cells, rank, in) and B
    (cells, out, rank), also for modules of the same input as one that has a change. Raises GuardError for a dense change
    or a module that is not there."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    given = dict.fromkeys(name for change in changes for name in change)
    names = [name for name in linears if any(other in given for other in siblings(name))]
    parts = {name: [change.get(name) for change in changes] for name in (*names, *given)}
    for name, its in parts.items():
        if name not in linears or any(part is not None and not isinstance(part, LowRank) for part in its):
            raise GuardError(f"{name}: only a low-rank change of a linear layer can be carried beside the base")
    low = [part for its in parts.values() for part in its if isinstance(part, LowRank)]
    rank = math.ceil(max((part.a.shape[0] for part in low), default=0) / 8) * 8  # aligned rows
    found = {}
    for name in names:
        a = torch.zeros(len(changes), rank, linears[name].in_features)
        b = torch.zeros(len(changes), linears[name].out_features, rank)
        for cell, part in enumerate(parts[name]):
            if isinstance(part, LowRank):
                a[cell, : part.a.shape[0]], b[cell, :, : part.a.shape[0]] = part.a, part.b
        found[name] = (a.to(device, dtype), b.to(device, dtype))
    return found


SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # modules of one input, as they follow each other


def siblings(name: str) -> list[str]:
    """A module's name and those of the modules with the same input, in their order."""
    parent, _, child = name.rpartition(".")
    family = next((names for names in SHARING if child in names), (child,))
    return [f"{parent}.{each}" if parent else each for each in family]


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
            layers: dict[str, StackedLinear] = {}
            for name in names:
                base = modules[name]
                assert isinstance(base, torch.nn.Linear)
                parent, _, child = name.rpartition(".")
                layers[name] = StackedLinear(base, name, adapters)
                setattr(modules[parent], child, layers[name])
                replaced.append((modules[parent], child, base))
            for number, name in enumerate(names):
                together = {other: layers[other] for other in siblings(name) if other in layers}
                if next(iter(together)) == name:
                    Group(together, adapters, fused.Dropout(p, random, number))
            if len(replaced) != len(adapters.places):
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
