"""PEFT's adapter of a model, for as long as it is needed: to draw the values from which a cell starts, exactly as TRL's
path draws them, and to write trained values in PEFT's format."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from persona_coupling import train
from persona_coupling.adapters import ADAPTER, PREFIX
from persona_coupling.errors import GuardError
from persona_coupling.models import quiet_transformers
from persona_coupling.stacked import Factors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lora_of(settings: train.Training) -> train.Lora:
    """The adapter's settings. Raises ValueError for full fine-tuning, which cannot share a base."""
    if settings.lora is None:
        raise ValueError("full fine-tuning cannot share a base")
    return settings.lora


@contextlib.contextmanager
def with_peft(model: PreTrainedModel, settings: train.Training, seed: int) -> Iterator[Any]:
    """PEFT's model of these settings, drawn as TRL draws it; the base is left as it was."""
    from peft import get_peft_model

    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with quiet_transformers(), train.seeded(seed):
        adapted = get_peft_model(model, train.lora_config(lora_of(settings)))
    try:
        train.check_attached(adapted, settings)
        yield adapted
    finally:
        adapted.unload()
        model.__dict__.pop("peft_config", None)  # some versions of PEFT leave it
        for parameter, before in required:
            parameter.requires_grad_(before)


def pairs_of(adapted: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every adapted module of a PEFT model, by the module's name in the base, in PEFT's order."""
    parameters = dict(adapted.get_base_model().named_parameters())
    ends = ".lora_A.default.weight", ".lora_B.default.weight"
    names = [name.removesuffix(ends[0]) for name in parameters if name.endswith(ends[0])]
    return {name: (parameters[name + ends[0]].data, parameters[name + ends[1]].data) for name in names}


def initial_adapter(model: PreTrainedModel, settings: train.Training, seed: int) -> Factors:
    """The adapter from which TRL's path would start, by module name: PEFT draws it, from the same generator state."""
    with with_peft(model, settings, seed) as adapted:
        return {name: (a.float().clone(), b.float().clone()) for name, (a, b) in pairs_of(adapted).items()}


@dataclass(frozen=True)
class _Template:
    """What adapters of one setting have in common: shapes by module in PEFT's order, the format PEFT rounds to, PEFT's
    configuration file, and whether `_draw` was seen to draw PEFT's own numbers."""

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    rounded: torch.dtype
    config: str
    known: bool


def _draw(template: _Template, seed: int) -> Factors:
    """PEFT's draws without its modules: per module the initial values of two linear layers, then A's again; B is zero."""
    factors: Factors = {}
    with train.seeded(seed):
        for name, (a_shape, b_shape) in template.shapes.items():
            a, b = torch.empty(a_shape), torch.empty(b_shape)
            for drawn in (a, b, a):
                torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            factors[name] = (a.to(template.rounded).float(), torch.zeros_like(b))
    return factors


_templates: dict[tuple[str, str, str, train.Lora], _Template] = {}


class Drawer:
    """Initial adapters and their files for many cells of one model. PEFT is asked once per setting and kind of model in a
    process: putting its modules into a model and taking them out again takes as long as dozens of a cell's steps. Its
    draws are repeated here if they come out bit by bit for one seed; otherwise PEFT draws every cell's."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._kind = model.name_or_path, str(model.dtype), model.config.to_json_string()

    def _template(self, settings: train.Training) -> _Template:
        lora, probe = lora_of(settings), 1
        if (*self._kind, lora) not in _templates:
            with with_peft(self.model, settings, probe) as adapted, tempfile.TemporaryDirectory() as scratch:
                wanted = {name: (a.float().cpu(), b.float().cpu()) for name, (a, b) in pairs_of(adapted).items()}
                train.save_adapter(adapted, Path(scratch))
                config = (Path(scratch) / "adapter_config.json").read_text(encoding="utf-8")
            shapes = {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in wanted.items()}
            template = _Template(shapes, self.model.dtype, config, known=False)
            again = _draw(template, probe)
            known = all(torch.equal(x, y) for n in wanted for x, y in zip(wanted[n], again[n], strict=True))
            _templates[*self._kind, lora] = replace(template, known=known)
        return _templates[*self._kind, lora]

    def initial(self, settings: train.Training, seed: int) -> Factors:
        """The adapter from which TRL's path would start."""
        template = self._template(settings)
        return _draw(template, seed) if template.known else initial_adapter(self.model, settings, seed)

    def save(self, settings: train.Training, adapter: Factors, snapshots: dict[int, Factors], folder: Path) -> None:
        """Write an adapter and its snapshots into `folder`, as TRL's path does. Raises GuardError for other modules or
        shapes than the setting's."""
        from safetensors.torch import save_file

        template = self._template(settings)
        places = {train.snapshot_folder(folder, step): factors for step, factors in snapshots.items()}
        for place, factors in {**places, folder: adapter}.items():
            if {n: (tuple(a.shape), tuple(b.shape)) for n, (a, b) in factors.items()} != template.shapes:
                raise GuardError("the trained modules are not those of the adapter")
            tensors = {}
            for name, (a, b) in factors.items():
                tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
                tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
            place.mkdir(exist_ok=True)
            save_file(tensors, place / ADAPTER, metadata={"format": "pt"})
            (place / "adapter_config.json").write_text(template.config, encoding="utf-8")
