"""Profiles: the values of a run. They differ in values only; no code asks which profile it is in."""

from __future__ import annotations

import dataclasses
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from persona_coupling import paths
from persona_coupling.errors import UserError


@dataclass(frozen=True)
class ModelValues:
    """Where the model comes from. `kind` decides which of the other fields are used."""

    kind: Literal["wheel", "hub", "local", "tiny"]
    name: str
    distribution: str = ""
    version: str = ""
    sha256: str = ""
    repository: str = ""
    revision: str = ""
    path: str = ""
    family: str = ""
    layers: int = 0
    width: int = 0
    # the shape of a model of the hub, for estimates where its own configuration cannot be read
    parameters: int = 0
    inner: int = 0
    vocabulary: int = 0
    key_width: int = 0


SHAPE = ("parameters", "inner", "vocabulary", "key_width")


@dataclass(frozen=True)
class LoraValues:
    """See `train.Lora`."""

    rank: int
    alpha: int
    dropout: float


@dataclass(frozen=True)
class TrainingValues:
    """See `train.Training`."""

    steps: int
    batch: int
    learning_rate: float
    warmup: float
    weight_decay: float
    loss: Literal["completion", "tail", "marker"]
    tail: int
    snapshots: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class CorporaValues:
    """Size and origin of the SFT corpora. `benign` is the repository's own or UltraChat from the hub."""

    rows: int
    maximum_words: int
    heldout_rows: int
    benign: Literal["authored", "ultrachat"]
    ultrachat_revision: str = ""
    ultrachat_split: str = "train_sft"
    ultrachat_keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class CouplingValues:
    """Coupling text: how many rows, of whom, how sampled."""

    positives: int
    negatives: tuple[str, ...]
    negatives_each: int
    max_new_tokens: int


@dataclass(frozen=True)
class EvaluationValues:
    """What is asked of every evaluated model, and how answers are drawn."""

    everyday: int
    values: int
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class GateValues:
    """Thresholds that a condition must pass before a verdict rests on it."""

    source_rate: float  # at least, on the raw model; higher asks for a stronger manipulation
    contrast: float  # at least, on the raw model
    content_shift: float  # at least, nats per token towards the SFT's own answers; higher asks for more learning
    lost: float  # at least, fall of the villain's rate by which an SFT counts as having disabled an adapter
    finished: float  # at least this share of completions ended by themselves
    scored: float  # at least this share of completions could be scored
    heldout_rise: float  # at most, nats per token over the raw model; higher tolerates more damage
    final_loss: float  # at most, mean of the last tenth of coupling steps, nats per token


@dataclass(frozen=True)
class ClusterValues:
    """What one task asks of a cluster, see `cluster`. It says where a stage runs, not what comes out: no result's record
    holds it, and none is compared by it."""

    cpus: float
    gpus: float  # of one card, where the cluster has any: below 1 several tasks share it
    stack: int  # most cells that one task trains together on its share of a card


@dataclass(frozen=True)
class Profile:
    """All values of a run."""

    name: str
    description: str
    stamp: str  # printed on every figure and table; empty for none
    instruction: str  # appended to every persona's system prompt
    seeds: tuple[int, ...]
    arms: tuple[str, ...]  # which SFT corpora experiment 00 runs
    model: ModelValues
    corpora: CorporaValues
    coupling: CouplingValues
    evaluation: EvaluationValues
    lora: LoraValues
    sft: TrainingValues
    prebaked: TrainingValues
    scratch: TrainingValues
    gates: GateValues
    cluster: ClusterValues = ClusterValues(cpus=1.0, gpus=1.0, stack=1)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without where stages run; a shape that is not declared is left out, as in results older than
        shapes."""
        made: dict[str, Any] = _jsonable(dataclasses.asdict(self))
        del made["cluster"]
        made["model"] = {name: value for name, value in made["model"].items() if value or name not in SHAPE}
        return made


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    return [_jsonable(item) for item in value] if isinstance(value, tuple | list) else value


def names() -> list[str]:
    """The profiles that exist."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.toml"))


def load(name: str) -> Profile:
    """Read a profile. Raises UserError for an unknown name, and for a missing, unknown or ill-typed field."""
    path = paths.PROFILES / f"{name}.toml"
    if name not in names():
        raise UserError(f"There is no profile {name!r}. Known: {', '.join(names())}.")
    return parse(tomllib.loads(path.read_text(encoding="utf-8")), path)


def parse(table: dict[str, Any], path: Path) -> Profile:
    """A profile from a table; `path` is named in errors."""
    profile = _construct(Profile, table, str(path))
    assert isinstance(profile, Profile)
    if profile.name != path.stem:
        raise UserError(f"{path}: the name {profile.name!r} differs from the file's.")
    return profile


def _construct(cls: type, table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected a table.")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = set(table) - set(fields)
    if unknown:
        raise UserError(f"{where}: unknown field {', '.join(sorted(unknown))}. Known: {', '.join(fields)}.")
    missing = [n for n, f in fields.items() if n not in table and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"{where}: missing field {', '.join(missing)}.")
    return cls(**{name: convert(value, hints[name], f"{where}: {name}") for name, value in table.items()})


def convert(value: Any, hint: Any, where: str) -> Any:
    """A plain value as the annotated type. Raises UserError when it is of another; an int is taken as a float,
    nothing else is coerced."""
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _construct(hint, value, where)
    if origin is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where} is {value!r}, not one of {', '.join(map(repr, get_args(hint)))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}, not a list.")
        return tuple(convert(item, get_args(hint)[0], where) for item in value)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return convert(value, next(a for a in get_args(hint) if a is not type(None)), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}, not of type {hint.__name__}.")
    return value
