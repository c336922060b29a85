"""Why a plan's stages are missing: what differs from the nearest artifact in the store that no plan asks for any more.

A stage is *stale* if such a relative exists (same type and seed, few differences): then the fields, inputs, modules and
material that differ are named, old value and new; what differs in a stale input alone has that input's reasons. Otherwise
it is *new*.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from persona_coupling.progress import Plan, Speeds
from persona_coupling.store import KEY_LENGTH, MANIFEST, Stage, Store, canonical_json
from persona_coupling.study import Design

NEAR = 3  # differing fields at most: more relatives of other profiles are named when it is raised
INPUT = re.compile(rf"[a-z_]+/[0-9a-f]{{{KEY_LENGTH}}}")
WIDTH = 48  # characters of a value that are shown

Items = frozenset[tuple[str, str]]  # a description as (path, value as JSON); code apart


@dataclass(frozen=True)
class Kept:
    """An artifact in the store, from its manifest alone."""

    key: str
    items: Items
    code: tuple[str, ...]
    made_of: Mapping[str, str]  # empty for artifacts that are older than the entry


@dataclass
class Why:
    """A missing stage's nearest relative, and what differs. `inherited` are reasons of its stale inputs."""

    relative: Kept | None = None
    own: list[str] = field(default_factory=list)
    inherited: list[str] = field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """All reasons, each once, those of inputs first."""
        return list(dict.fromkeys(self.inherited + self.own))


@dataclass(frozen=True)
class Row:
    """One cell or observation of the plan. Stages that several rows share are counted in the first."""

    experiment: str
    condition: str
    seed: int
    state: str  # cached, stale or new
    missing: tuple[str, ...]  # types of missing stages
    seconds: float
    megabytes: float
    reasons: tuple[str, ...]


def kept(store: Store) -> dict[str, dict[str, Kept]]:
    """All artifacts of a store by type and key; what cannot be read is left out (a fetch would name it)."""
    found: dict[str, dict[str, Kept]] = {}
    for path in store.root.glob(f"*/[!.]*/{MANIFEST}"):
        with contextlib.suppress(AttributeError, OSError, RecursionError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            described = manifest["description"]
            code, made_of = tuple(map(str, described["code"])), dict(manifest.get("made_of", {}))
            if manifest["key"] == path.parent.name:
                artifact = Kept(path.parent.name, flat(described), code, made_of)
                found.setdefault(str(described["type"]), {})[artifact.key] = artifact
    return found


def flat(description: Mapping[str, Any]) -> Items:
    """A description's fields as (dotted path, JSON value); an input is one field, kind and key; `code` is left out."""
    items: list[tuple[str, str]] = []

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and set(value) == {"kind", "key"}:
            items.append((path, f"{value['kind']}/{value['key']}"))
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(item, f"{path}.{name}" if path else name)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                walk(item, f"{path}[{number}]")
        else:
            items.append((path, canonical_json(value)))

    walk({name: value for name, value in description.items() if name not in ("code", "kind", "type")}, "")
    return frozenset(items)


def explain(
    stages: Sequence[Stage], missing: Sequence[Stage], store: Store, elsewhere: Callable[[], Set[str]] = frozenset
) -> dict[str, Why]:
    """Why each missing stage is missing, by key. `stages`, parents first, is all that the plan asks for, `elsewhere`
    gives the keys that other designs ask for. What a design asks for is no relative, since nothing became of it; what
    only stored results name may be one: they are what is stale."""
    lacking = {stage.key for stage in missing}
    types, asked = {type(stage).__name__ for stage in missing}, {stage.key for stage in stages}
    artifacts = {t: {k: a for k, a in of.items() if k not in asked} for t, of in kept(store).items() if t in types}
    if any(artifacts.values()):
        others = elsewhere()
        artifacts = {t: {k: a for k, a in of.items() if k not in others} for t, of in artifacts.items()}
    exact = {t: {artifact.items: artifact for artifact in of.values()} for t, of in artifacts.items()}
    whys: dict[str, Why] = {}
    for stage in stages:
        if stage.key in lacking:
            name = type(stage).__name__
            whys[stage.key] = _why(stage, whys, exact.get(name, {}))
    return whys


def _why(stage: Stage, whys: Mapping[str, Why], others: Mapping[Items, Kept]) -> Why:
    inputs = {str(parent): whys[parent.key] for parent in stage.parents() if parent.key in whys}
    was = {
        name: f"{name.split('/')[0]}/{why.relative.key}" for name, why in inputs.items() if why.relative is not None
    }  # what a stale input was before
    now = flat(stage.description)
    items = frozenset((path, was.get(value, value)) for path, value in now)
    relative = others.get(items)
    if relative is None:
        seed = {item for item in items if item[0] == "seed"}
        near = [other for other in others.values() if seed <= other.items]
        relative = min(near, key=lambda other: (len(items ^ other.items), other.key), default=None)
        if relative is None or not _is_near(items, relative.items):
            return Why()
    own = differences(dict(relative.items), dict(items))
    if relative.code != tuple(stage.description["code"]):
        own += code_differences(relative, stage)
    inherited = [reason for name in was for reason in inputs[name].reasons]
    return Why(relative, own, inherited)


def _is_near(items: Items, other: Items) -> bool:
    """At most NEAR fields differ, or one input for another and nothing else: with two inputs or more it is another cell."""
    differing = items ^ other
    paths = {path for path, _ in differing}
    inputs = {path for path, value in differing if INPUT.fullmatch(value)}
    return len(paths) <= (1 if inputs else NEAR)


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """`field old -> new` for every field that differs."""
    paths = [path for path in sorted({*old, *new}) if old.get(path) != new.get(path)]
    return [f"{path} {_short(old.get(path))} -> {_short(new.get(path))}" for path in paths]


def _short(value: str | None) -> str:
    text = "absent" if value is None else value.strip('"')
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def code_differences(old: Kept, stage: Stage) -> list[str]:
    """Which modules, material or the class itself changed; for artifacts that do not say, which group of them did."""
    now = stage.made_of()
    if old.made_of:
        changed = [name for name in sorted({*old.made_of, *now}) if old.made_of.get(name) != now.get(name)]
        return [f"{name.removeprefix('persona_coupling.')} changed" for name in changed]
    groups = [f"class {type(stage).__name__}", f"one of its {len(stage.code)} modules"]
    groups += [f"material/{name}" for name in stage.material]
    code = stage.description["code"]
    if len(code) != len(old.code):
        return ["material that it reads changed"]
    return [f"{name} changed" for name, before, after in zip(groups, old.code, code, strict=True) if before != after]


def rows(
    designs: Mapping[str, Design],
    planned: Plan,
    store: Store,
    speeds: Speeds,
    *,
    elsewhere: Callable[[], Set[str]] = frozenset,
    megabytes: Callable[[Stage], float] = lambda stage: stage.work().megabytes,
) -> list[Row]:
    """A row for every cell and observation of the experiments' designs, in their order; `elsewhere` as in `explain`."""
    whys = explain(planned.stages, planned.missing, store, elsewhere)
    lacking = {stage.key: stage for stage in planned.missing}
    below: dict[str, dict[str, Stage]] = {}  # missing stages that a stage rests on, itself included

    def missing_for(stage: Stage) -> dict[str, Stage]:
        if stage.key not in below:
            found: dict[str, Stage] = {}
            for parent in stage.parents():
                found |= missing_for(parent)
            below[stage.key] = found | ({stage.key: stage} if stage.key in lacking else {})
        return below[stage.key]

    counted: set[str] = set()
    made: list[Row] = []
    for experiment, design in designs.items():
        asked: list[tuple[str, int, tuple[Stage, ...]]] = []
        asked += [(cell.condition, cell.seed, (cell.merge, cell.evaluation)) for cell in design.cells]
        asked += [(o.condition, o.seed, (o.stage,)) for o in design.observations]
        for condition, seed, wanted in asked:
            need: dict[str, Stage] = {}
            for stage in wanted:
                need |= missing_for(stage)
            fresh = [stage for key, stage in need.items() if key not in counted]
            counted |= set(need)
            reasons = tuple(dict.fromkeys(reason for key in need for reason in whys[key].reasons))
            stale = any(whys[key].relative is not None for key in need)
            made.append(
                Row(
                    experiment,
                    condition,
                    seed,
                    "stale" if stale else "new" if need else "cached",
                    tuple(type(stage).__name__ for stage in need.values()),
                    sum((speeds.seconds(stage) for stage in fresh), 0.0),
                    sum((megabytes(stage) for stage in fresh), 0.0),
                    reasons,
                )
            )
    return made


def text(made: list[Row]) -> str:
    """The rows for people, then each reason once with the number of rows that it concerns."""
    if not made:
        return "  no cells"
    reasons = list(dict.fromkeys(reason for row in made for reason in row.reasons))
    letters = {reason: f"({number})" for number, reason in enumerate(reasons, start=1)}
    wide = max(len(row.condition) for row in made)
    lines = [f"\n  {'':<3}{'condition':<{wide}}  seed  state    min     MB  missing, why"]
    for row in made:
        parts = [f"{row.missing.count(kind)} {kind}" for kind in dict.fromkeys(row.missing)]
        why = " ".join(letters[reason] for reason in row.reasons)
        lines.append(
            f"  {row.experiment[:2]:<3}{row.condition:<{wide}}  {row.seed:>4}  {row.state:<6} {row.seconds / 60:>5.1f} "
            f"{row.megabytes:>6.0f}  {', '.join(parts)}{'  ' + why if why else ''}".rstrip()
        )
    states = [row.state for row in made]
    lines.append(
        f"  {len(made)} rows: {', '.join(f'{states.count(s)} {s}' for s in ('cached', 'stale', 'new'))}. A stage that "
        "several rows share counts in the first of them."
    )
    lines += [
        f"  {letter} {reason} (rows: {sum(reason in row.reasons for row in made)})"
        for reason, letter in letters.items()
    ]
    return "\n".join(lines)
