"""Changes of weights that are computed from other changes: snapshots of a training, controls, parts, approximations.

Each is an artifact of its own, so that it can be merged, checked, measured and shared like a trained one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from persona_coupling import adapters, models
from persona_coupling.adapters import Change, LowRank
from persona_coupling.errors import GuardError
from persona_coupling.stages.code import MODEL
from persona_coupling.store import Lab, Stage, Work
from persona_coupling.train import snapshot_folder

DERIVING = ("persona_coupling.train", *MODEL)


@dataclass(frozen=True)
class Snapshot(Stage):
    """A trained change as it was after some optimiser steps of the same run."""

    change: Stage
    step: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = DERIVING

    def build(self, folder: Path, lab: Lab) -> None:
        """Copy it out of the run's artifact. Raises GuardError if the run kept no snapshot at that step."""
        source = snapshot_folder(lab.folder(self.change), self.step)
        if not source.is_dir():
            raise GuardError(f"{self.change} kept no snapshot after step {self.step}")
        shutil.copytree(source, folder, dirs_exist_ok=True)

    @property
    def low_rank(self) -> bool:
        """As the run's change."""
        return self.change.low_rank

    def work(self) -> Work:
        """A copy."""
        return Work(seconds=0.2, megabytes=20.0)


@dataclass(frozen=True)
class RandomLike(Stage):
    """The control "any weight change of that size": of every changed matrix a Gaussian one of the same rank and the same
    Frobenius norm (low-rank changes stay low-rank, dense ones dense)."""

    change: Stage
    seed: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = DERIVING

    def build(self, folder: Path, lab: Lab) -> None:
        """Draw, scale, write."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        change = adapters.read_change(lab.folder(self.change))
        drawn: Change = {}
        for name in sorted(change):
            part = change[name]
            if isinstance(part, LowRank):
                other = LowRank(
                    torch.randn(part.a.shape, generator=generator), torch.randn(part.b.shape, generator=generator)
                )
                drawn[name] = LowRank(other.a, other.b * (part.squared_norm() / other.squared_norm()) ** 0.5)
            else:
                noise = torch.randn(part.shape, generator=generator)
                drawn[name] = noise * float(part.double().norm() / noise.double().norm())
        write(folder, drawn)

    @property
    def low_rank(self) -> bool:
        """As the change that it is like."""
        return self.change.low_rank

    def work(self) -> Work:
        """Small."""
        return Work(seconds=1.0, megabytes=20.0)


@dataclass(frozen=True)
class Part(Stage):
    """The part of a change that an adapter's subspaces share, or the rest.

    With P the projector on what the adapter reads (the rows of its A) and Q on what it writes (the columns of its B), of
    every matrix D: `outside` is (1 - Q) D (1 - P), which neither reads nor writes anything that the adapter does;
    `inside` is D minus that. Modules that the adapter lacks are outside. The two add up to D.
    """

    change: Stage
    adapter: Stage
    side: Literal["inside", "outside"]
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = DERIVING

    def build(self, folder: Path, lab: Lab) -> None:
        """Project and write. Raises GuardError for dense changes: their parts are not low-rank."""
        import torch

        change, adapter = (adapters.read_change(lab.folder(stage)) for stage in (self.change, self.adapter))
        parts: Change = {}
        for name, part in change.items():
            against = adapter.get(name)
            if not isinstance(part, LowRank) or isinstance(against, torch.Tensor):
                raise GuardError(f"{name}: only a low-rank change is split along a low-rank adapter")
            outside = LowRank(part.a.clone(), part.b.clone())
            if against is not None:
                reads = torch.linalg.qr(against.a.double().T).Q  # (in, rank)
                writes = torch.linalg.qr(against.b.double()).Q  # (out, rank)
                a, b = part.a.double(), part.b.double()
                outside = LowRank((a - a @ reads @ reads.T).float(), (b - writes @ (writes.T @ b)).float())
            if self.side == "outside":
                parts[name] = outside
            else:
                parts[name] = LowRank(torch.cat([part.a, outside.a]), torch.cat([part.b, -outside.b], dim=1))
        write(folder, parts)

    @property
    def low_rank(self) -> bool:
        """A dense one is refused."""
        return True

    def work(self) -> Work:
        """Two QR factorisations a matrix."""
        return Work(seconds=2.0, megabytes=60.0)


@dataclass(frozen=True)
class Rescaled(Stage):
    """A change scaled as a whole so that its total Frobenius norm is that of another."""

    change: Stage
    like: Stage
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = DERIVING

    def build(self, folder: Path, lab: Lab) -> None:
        """Scale and write; the factor is kept beside, in `scale.json`."""
        change, like = (adapters.read_change(lab.folder(stage)) for stage in (self.change, self.like))
        factor = (sum(adapters.squared_norms(like).values()) / sum(adapters.squared_norms(change).values())) ** 0.5
        scaled: Change = {
            name: LowRank(part.a, part.b * factor) if isinstance(part, LowRank) else part * factor
            for name, part in change.items()
        }
        write(folder, scaled)
        (folder / "scale.json").write_text(json.dumps({"factor": factor}), encoding="utf-8")

    @property
    def low_rank(self) -> bool:
        """As the change that is scaled."""
        return self.change.low_rank

    def work(self) -> Work:
        """Small, unless the change is dense."""
        return Work(seconds=2.0, megabytes=60.0)


@dataclass(frozen=True)
class Truncated(Stage):
    """The best approximation of rank at most `rank` of every projection matrix of a change (Eckart and Young 1936,
    doi:10.1007/BF02288367); what is changed elsewhere (embeddings, norms) is left out, as LoRA would leave it."""

    change: Stage
    rank: int
    kind: ClassVar[str] = "change"
    code: ClassVar[tuple[str, ...]] = DERIVING

    def build(self, folder: Path, lab: Lab) -> None:
        """A truncated SVD per matrix."""
        import torch

        kept: Change = {}
        for name, part in adapters.read_change(lab.folder(self.change)).items():
            module = name.removesuffix(".weight")
            if module.rsplit(".", 1)[-1] not in models.MODULES:
                continue
            dense = part.dense() if isinstance(part, LowRank) else part
            u, s, v = torch.linalg.svd(dense.to(lab.device).float(), full_matrices=False)
            kept[module] = LowRank(v[: self.rank].cpu(), (u[:, : self.rank] * s[: self.rank]).cpu())
        write(folder, kept)

    @property
    def low_rank(self) -> bool:
        """Whatever the change was."""
        return True

    def work(self) -> Work:
        """210 decompositions of matrices of about 600 x 1500."""
        return Work(seconds=25.0, megabytes=45.0)


def write(folder: Path, change: Change) -> None:
    """Write a change in the format that fits it: a PEFT adapter if all of it is low-rank, dense deltas otherwise."""
    low_rank = {name: part for name, part in change.items() if isinstance(part, LowRank)}
    if len(low_rank) == len(change):
        adapters.save_low_rank(folder, low_rank)
    else:
        adapters.save_dense(folder, change)
