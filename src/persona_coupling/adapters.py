"""Changes of weights as data: reading them from artifacts, restricting them, and adding them to a model.

A change is a mapping from a module's dotted name to either a `LowRank` (B A, the LoRA scale folded into B) or a dense
tensor. Everything that the study merges (SFT deltas, pre-baked adapters, controls) is one of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from persona_coupling.errors import GuardError
from persona_coupling.models import layer_of

if TYPE_CHECKING:
    import torch

ADAPTER = "adapter_model.safetensors"
DENSE = "delta.safetensors"
PREFIX = "base_model.model."
THIRDS = ("early", "mid", "late")


@dataclass(frozen=True)
class LowRank:
    """B A with `a` of shape (rank, in) and `b` of shape (out, rank), both fp32."""

    a: torch.Tensor
    b: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The change of the weight, shape (out, in)."""
        return self.b @ self.a

    def to(self, device: torch.device) -> LowRank:
        """The same on a device."""
        return LowRank(self.a.to(device), self.b.to(device))

    def squared_norm(self) -> float:
        """Squared Frobenius norm, without forming the product: tr(BᵀB · A Aᵀ)."""
        return float(((self.b.T @ self.b) * (self.a @ self.a.T)).sum())


Change = dict[str, "LowRank | torch.Tensor"]


def read_change(folder: Path) -> Change:
    """The change stored in an artifact: a PEFT LoRA adapter or a dense delta. Raises GuardError for an empty one."""
    from safetensors.torch import load_file

    if (folder / DENSE).is_file():
        change: Change = {name: tensor.float() for name, tensor in load_file(folder / DENSE).items()}
    else:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank = config["r"]
        scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
        tensors = load_file(folder / ADAPTER)
        names = [n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")]
        change = {
            name: LowRank(
                tensors[f"{PREFIX}{name}.lora_A.weight"].float(),
                tensors[f"{PREFIX}{name}.lora_B.weight"].float() * scale,
            )
            for name in names
        }
    if not change:
        raise GuardError(f"{folder} holds no change of any module")
    return change


def restrict(
    change: Change, layers: Iterable[int | str] | None, modules: Iterable[str] | None, scale: float, *, depth: int
) -> Change:
    """Only the given layers and module kinds (None: all), scaled. Layers are numbers or names of thirds, which `depth`,
    the model's number of layers, resolves. Raises GuardError if nothing is left."""
    layers = None if layers is None else layer_numbers(layers, depth)
    modules = None if modules is None else set(modules)
    kept: Change = {}
    for name, part in change.items():
        if modules is not None and name.removesuffix(".weight").rsplit(".", 1)[-1] not in modules:
            continue
        if layers is not None and (".layers." not in name or layer_of(name + ".") not in layers):
            continue
        kept[name] = LowRank(part.a, part.b * scale) if isinstance(part, LowRank) else part * scale
    if not kept:
        raise GuardError("a merge restricted to layers or modules that the change does not touch")
    return kept


def layer_numbers(layers: Iterable[int | str], depth: int) -> set[int]:
    """Numbers and names of thirds as numbers: `early`, `mid` and `late` split any depth into parts whose sizes differ
    by at most one, the larger ones first. Raises GuardError for a layer that the model does not have."""
    thirds = dict(zip(THIRDS, np.array_split(np.arange(depth), len(THIRDS)), strict=True))
    found: set[int] = set()
    for layer in layers:
        if isinstance(layer, str):
            if layer not in thirds:
                raise GuardError(f"there is no part {layer!r} of a model; known: {', '.join(THIRDS)}")
            found |= set(thirds[layer].tolist())
        elif 0 <= layer < depth:
            found.add(layer)
        else:
            raise GuardError(f"the model has {depth} layers, none is number {layer}")
    return found


def squared_norms(change: Change) -> dict[str, float]:
    """Squared Frobenius norm per module."""
    return {
        name: part.squared_norm() if isinstance(part, LowRank) else float((part.double() ** 2).sum())
        for name, part in change.items()
    }


def add(model: torch.nn.Module, change: Change) -> None:
    """Add a change to a model's weights, in place, in the weights' own (fp32) format.

    Raises GuardError when a module is missing, a shape differs, or nothing changed.
    """
    import torch

    parameters = dict(model.named_parameters())
    changed = torch.zeros((), dtype=torch.bool)
    with torch.no_grad():
        for name, part in change.items():
            weight = parameters.get(name if name in parameters else f"{name}.weight")
            if weight is None:
                raise GuardError(f"the model has no module {name}: the change was trained on another architecture")
            part = part.to(weight.device)
            update = part.dense() if isinstance(part, LowRank) else part
            if update.shape != weight.shape:
                raise GuardError(f"{name}: change of shape {tuple(update.shape)}, weight {tuple(weight.shape)}")
            changed = changed.to(weight.device) | update.any()
            weight += update.to(weight)
    if not changed:
        raise GuardError("a merge that changed nothing: every update is zero")


def save_dense(folder: Path, change: Change) -> None:
    """Write a change as dense deltas, in fp32, so that a derived change is exactly what was computed."""
    from safetensors.torch import save_file

    tensors = {
        name: (part.dense() if isinstance(part, LowRank) else part).contiguous() for name, part in change.items()
    }
    save_file(tensors, folder / DENSE, metadata={"format": "pt"})


def save_low_rank(folder: Path, change: dict[str, LowRank]) -> None:
    """Write low-rank changes as a PEFT adapter (scale 1), so that PEFT itself and `read_change` both read it."""
    from safetensors.torch import save_file

    ranks = {part.a.shape[0] for part in change.values()}
    if len(ranks) != 1:
        raise ValueError(f"one adapter has one rank; got {sorted(ranks)}")
    rank = ranks.pop()
    tensors = {}
    for name, part in change.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = part.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = part.b.contiguous()
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "target_modules": sorted(change),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
