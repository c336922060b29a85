"""What a large profile costs, in minutes and memory: what `bench_large` measured, times what the profile's plan asks for.

Only here anything is multiplied. A stage's seconds are those of reading its models and of merging their changes, and then
of its own work: steps of training at the speed of rows of that length, whole batches of sampled answers, scored tokens.
Micro-batch, checkpointing and the batch of the sampler are those that measured best (`Measured.settings`), and a run of the
profile uses them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_coupling import decode, memory, outputs, paths, personas, train
from persona_coupling.checkpoints import Checkpoint
from persona_coupling.errors import UserError
from persona_coupling.machine import Machine
from persona_coupling.profiles import ModelValues
from persona_coupling.store import Stage

PROFILE = "qwen2.5-7b"
NEEDED = ("merge", "merge/check", "hidden", "score", "load")
# which measured rows stand for which rows of the study: those of the stage, or the longer ones
ROWS = {"UltraChat": "ultrachat", "CouplingText": "coupling", "MannerText": "coupling", "OwnAnswers": "coupling"}
BESIDE = {"LayerScan": 1}  # models that a stage reads more than it has checkpoints
ALIKE = 0.98  # of the measured card's memory: cards of one kind differ a little in what they report


@dataclass(frozen=True)
class Cost:
    """Of a stage: seconds of one GPU, and the points whose peaks bound its memory."""

    seconds: float
    points: tuple[str, ...]
    models: int = 1  # read together


def place() -> Path:
    """Where measurements are kept."""
    return paths.repository() / "docs" / "measured"


def read(folder: Path | None = None) -> Measured | None:
    """The committed measurements, or None where there are none. Raises UserError for a damaged file, and for one that
    lacks a point."""
    folder = folder or place()
    if not (folder / "large.json").is_file():
        return None
    sharded = folder / "large-fsdp.json"
    found = Measured(outputs.read(folder / "large.json"), outputs.read(sharded) if sharded.is_file() else None)
    lacking = [name for name in NEEDED if not found.points.get(name, {}).get("fits")]
    if lacking or not found.whole:
        raise UserError(
            f"{folder / 'large.json'} lacks {', '.join(lacking or ['a whole batch of answers'])}: "
            "run `python -m persona_coupling.bench_large` on it again."
        )
    return found


@dataclass(frozen=True)
class Measured:
    """Measurements of one GPU (`content`), and of several that share one training (`sharded`)."""

    content: dict[str, Any]
    sharded: dict[str, Any] | None = None

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        """By name."""
        found: dict[str, dict[str, Any]] = self.content["measured"]
        return found

    @property
    def device(self) -> str:
        """The GPU's name."""
        return str(self.content["device"])

    @property
    def capacity(self) -> float:
        """Its memory, in bytes."""
        return float(self.content["capacity_bytes"] or math.inf)

    @cached_property
    def shape(self) -> memory.Shape:
        """The model's."""
        declared = self.content["shape"]
        return memory.Shape(**{field.name: declared[field.name] for field in dataclasses.fields(memory.Shape)})

    def of(self, model: ModelValues) -> bool:
        """Whether that model has the shape that was measured."""
        return all(getattr(model, name) == value for name, value in dataclasses.asdict(self.shape).items())

    # -------------------------------------------------------------------------------------------- the choice

    @property
    def whole(self) -> dict[str, Any]:
        """The batch of answers that was sampled to the limit: the fastest of the grid that fits. Empty if none was."""
        found = [p for name, p in self.points.items() if name.count("/") == 2 and name.startswith("sample/")]
        fitting = [p for p in found if p["fits"]]
        return max(fitting, key=lambda p: p["rows"] / p["seconds"]) if fitting else {}

    def machine(self, train_tokens: int) -> Machine:
        """The GPU as estimates of memory see it."""
        return Machine("cuda", True, "sdpa", self.whole["rows"], 1_024, train_tokens)

    def training(self, kind: str, train_tokens: int) -> str:
        """The point that a training on rows of that kind is, where a micro-batch may hold so many padded tokens."""
        some = self.fitting(kind)
        longest, batch = some["longest"], some["batch"]
        micro = train.micro_batch(batch, longest, train_tokens)
        machine = self.machine(train_tokens)
        again = longest * micro > train_tokens or memory.checkpoints(
            self.shape, longest * micro, machine, self.capacity, full=False
        )
        return f"lora/{kind}/{micro}/{'again' if again else 'kept'}"

    def fitting(self, kind: str) -> dict[str, Any]:
        """Some point of training rows of that kind that fits: it says how long they are."""
        return next(p for name, p in self.points.items() if name.startswith(f"lora/{kind}/") and p["fits"])

    def kinds(self) -> list[str]:
        """Kinds of training rows that were measured."""
        return list(dict.fromkeys(name.split("/")[1] for name in self.points if name.startswith("lora/")))

    def speed(self, point: str) -> float:
        """Trained tokens per second."""
        found = self.points[point]
        return float(sum(found["tokens"]) / sum(found["seconds"]))

    @cached_property
    def settings(self) -> dict[str, int]:
        """What a run of this shape is to use, by `Machine`'s names: padded tokens of a micro-batch under which coupling,
        most of all training, is fastest, among those under which every kind of rows was measured and fits; and rows
        sampled together."""
        found = [p for name, p in self.points.items() if name.startswith("lora/") and p["fits"]]
        possible = sorted({p["micro"] * p["longest"] for p in found} | {16_384})
        fitting = [
            tokens
            for tokens in possible
            if all(self.points.get(self.training(kind, tokens), {}).get("fits") for kind in self.kinds())
        ]
        if not fitting:
            raise UserError("No micro-batch was measured under which every kind of rows fits.")
        best = max(fitting, key=lambda tokens: (self.speed(self.training("coupling", tokens)), tokens))
        return {"train_tokens": best, "sample_batch": int(self.whole["rows"])}

    def best(self, machine: Machine) -> Machine:
        """A machine's settings, with those that measured best if it is a GPU with at least as much memory."""
        if not machine.device.startswith("cuda") or memory.capacity(machine.device) < ALIKE * self.capacity:
            return machine
        chosen = self.settings
        return dataclasses.replace(machine, train_tokens=chosen["train_tokens"], sample_batch=chosen["sample_batch"])

    # -------------------------------------------------------------------------------------------- minutes

    def step(self, kind: str) -> float:
        """Seconds of an optimiser step on rows of that kind."""
        name = self.training(kind, self.settings["train_tokens"])
        found = self.points[name]
        return float(found["batch"] * found["mean_tokens"] / self.speed(name))

    def reading(self, stage: Stage) -> tuple[float, int]:
        """Seconds of reading a stage's models and of merging their changes, and how many there are."""
        values = [getattr(stage, field.name) for field in dataclasses.fields(stage)]
        found = [value for value in values if isinstance(value, Checkpoint)]
        found += found[:1] * BESIDE.get(type(stage).__name__, 0)
        once = self.points["load"]["seconds"] * self.shape.parameters / self.points["load"]["parameters"]
        merges = sum(len(checkpoint.merged) for checkpoint in found)
        return len(found) * once + merges * self.points["merge"]["seconds"], len(found)

    def cost(self, stage: Stage) -> Cost | None:
        """Of a stage that runs the model; None for one that does not, and for full-parameter training, which one GPU
        cannot do. The check of a merge has one merge in it."""
        work, whole = stage.work(), self.whole
        read, models = self.reading(stage)
        training = getattr(stage, "training", None)
        if not models or (training is not None and training.lora is None):
            return None
        if training is not None:
            kind = rows_of(stage)
            name = self.training(kind, self.settings["train_tokens"])
            steps = training.steps * training.batch / self.points[name]["batch"] * self.step(kind)
            return Cost(read + self.points[name]["start_seconds"] + steps, ("merge", name))
        kind = type(stage).__name__
        if kind == "MergeCheck":
            once = self.points["merge"]["seconds"] * bool(stage.checkpoint.merged)  # type: ignore[attr-defined]
            return Cost(read - once + self.points["merge/check"]["seconds"], ("merge", "merge/check"))
        if kind == "Hidden":
            return Cost(read + self.points["hidden"]["seconds"], ("merge", "hidden"))
        score = self.points["score"]
        if kind == "Evaluate":
            rows = personas.NUMBER * (stage.everyday + stage.values) * stage.samples  # type: ignore[attr-defined]
            longer = stage.sampling.max_new_tokens / whole["new_tokens"]  # type: ignore[attr-defined]
            batches = math.ceil(rows / whole["rows"])
            return Cost(read + batches * longer * whole["seconds"], ("merge", self.sampling))
        sampled = work.sampled * whole["seconds"] / whole["tokens"]
        scored = work.scored * score["seconds"] / score["tokens"]
        basis = self.sampling if work.sampled else "score"
        return Cost(read + sampled + scored, ("merge", basis), models)

    @property
    def sampling(self) -> str:
        """The name of the point that `whole` is."""
        return f"sample/{self.whole['rows']}/{self.whole['new_tokens']}"

    def peak(self, cost: Cost) -> float | None:
        """Bytes at the largest moment, as measured; where a stage reads a second model beside the first, its weights in
        bf16 are added. None if the device does not tell."""
        peaks = [float(self.points[name].get("peak_bytes", math.nan)) for name in cost.points]
        if any(map(math.isnan, peaks)):
            return None
        return max(peaks) + (cost.models - 1) * 2.0 * self.shape.parameters

    def estimated(self, name: str) -> float | None:
        """What `memory` expects of the same load, bytes; None for a point that it has no estimate of."""
        found, part = self.points[name], name.split("/")[0]
        if part == "lora":
            _, kind, micro, how = name.split("/")
            some = self.fitting(kind)
            tokens = int(micro) * some["longest"]
            return memory.training(self.shape, tokens, some["rank"], self.machine(tokens), checkpointed=how == "again")
        if name in ("merge", "merge/check"):
            rows = (0, 0, 0, 0)
        elif part == "sample":
            rows = (decode.bucket(found["rows"]), found["prompts"], found["prompt_tokens"], found["new_tokens"])
        else:
            return None
        load = memory.Load(*rows, trained_tokens=0, rank=0, lora=False, full=False)
        return memory.needs(self.shape, load, self.machine(0), self.capacity)[-1].bytes


def rows_of(stage: Stage) -> str:
    """Which measured rows stand for those that a training sees."""
    rows = stage.rows  # type: ignore[attr-defined]
    while type(rows).__name__ == "Mixed":  # a few coupling rows among those of an SFT
        rows = rows.rows
    return ROWS.get(type(rows).__name__, "sft")
