"""A loaded model whose layers carry a further change or not, switched in place: for scans over depth.

A switch holds two versions of every weight that the change touches, both made as a checkpoint makes them (summed in
fp32, then rounded once), so that a switched model is the checkpoint with the change merged into those layers, bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_coupling.errors import GuardError, UserError
from persona_coupling.models import layer_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MODES = ("only", "without", "from_bottom", "from_top")


@dataclass(frozen=True)
class Point:
    """One measurement of a scan: under `mode`, the step of layers from `start` up to but excluding `stop`, and the
    layers that then carry the change."""

    mode: str
    start: int
    stop: int
    layers: frozenset[int]


def points(depth: int, stride: int, modes: Collection[str]) -> list[Point]:
    """All measurements of a scan over `depth` layers in steps of `stride` (the last one may be smaller).

    `only` merges one step, `without` all but one; `from_bottom` all layers below `stop`, `from_top` all layers from
    `start` up; the cumulative scans begin with no layer and end with all. Raises UserError for an unknown mode.
    """
    unknown = sorted(set(modes) - set(MODES))
    if unknown or not 1 <= stride <= depth:
        raise UserError(
            f"A scan of {depth} layers in steps of {stride}, modes {unknown}: known are {', '.join(MODES)}."
        )
    bounds = [*range(0, depth, stride), depth]
    steps = list(itertools.pairwise(bounds))
    everything = frozenset(range(depth))
    made: list[Point] = []
    for mode in modes:
        if mode == "only":
            made += [Point(mode, a, b, frozenset(range(a, b))) for a, b in steps]
        elif mode == "without":
            made += [Point(mode, a, b, everything - set(range(a, b))) for a, b in steps]
        elif mode == "from_bottom":
            made += [Point(mode, 0, b, frozenset(range(b))) for b in bounds]
        else:
            made += [Point(mode, a, depth, frozenset(range(a, depth))) for a in bounds]
    return made


class Switch:
    """Both versions of the weights of a model that differ from those of another, by layer."""

    def __init__(self, model: PreTrainedModel, changed: PreTrainedModel, touched: Collection[str]) -> None:
        """`changed` has the change in all layers, `touched` names the modules that it changes. Raises GuardError when
        the two are of different architectures, when nothing differs, or when anything else than `touched` does."""
        import torch

        others = dict(changed.named_parameters())
        weights = dict(model.named_parameters())
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in others.items()}:
            raise GuardError("the two models to switch between have different parameters")
        expected = {name if name in weights else f"{name}.weight" for name in touched}
        differing = {name for name, weight in weights.items() if not torch.equal(weight, others[name])}
        if not differing:
            raise GuardError("a scan over a change that changes no weight")
        stray = sorted({n for n in expected | differing if ".layers." not in n} | (differing - expected))
        if stray or not expected <= set(weights):
            raise GuardError(
                f"a scan over layers needs a change of layers alone; {stray or sorted(expected)[:3]} are not"
            )
        self.depth: int = model.config.num_hidden_layers
        self.versions: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        for name in sorted(expected):
            live = weights[name].detach()  # shares the weight's memory
            self.versions.setdefault(layer_of(name), []).append((live, live.clone(), others[name].detach()))

    @contextmanager
    def on(self, layers: Collection[int]) -> Iterator[int]:
        """The change in these layers only, until the block ends; gives the number of weights switched. Raises GuardError
        for a layer that the change does not touch."""
        missing = sorted(set(layers) - set(self.versions))
        if missing:
            raise GuardError(f"the change touches no weight of layer {missing}")
        chosen = [weights for layer in sorted(layers) for weights in self.versions[layer]]
        try:
            for live, _, other in chosen:
                live.copy_(other)
            yield len(chosen)
        finally:
            for live, original, _ in chosen:
                live.copy_(original)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all weights' bits."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
