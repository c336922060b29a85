"""How long a whole run took on one card, and where its time went: from what the artifacts of its store say of themselves.

    python -m persona_coupling.pace --profile full --seeds 5,6,7,8,9 --started TIME --ended TIME

writes `docs/measured/one-gpu.json`, from which `nox -s costs` writes a section of `docs/COST.md` with its figure. Start and
end are those of the command: the artifacts know neither what came before the first nor the tables behind the last, nor how
many cards there were.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from persona_coupling import notebooks, outputs, paths, planning, profiles, provenance
from persona_coupling.costs import place
from persona_coupling.errors import UserError
from persona_coupling.store import Stage, Store, in_order

FILE = "one-gpu.json"
SHARES = tuple(range(0, 101, 5))  # per cent of a seed's stages
MOST = 12  # kinds of work that have a line of their own
MORE = {  # names beside those of `cost_tables`
    "FineTune": "training",
    "Overlap": "two subspaces compared",
    "Truncated": "a change at lower ranks",
    "Shift": "shifts of hidden states",
    "Spectrum": "spectra of a change",
    "Rescaled": "a change at another norm",
}


@dataclass(frozen=True)
class Made:
    """An artifact of the run: its kind, the place of the seed that asked for it first, when it was finished (seconds after
    the run's start) and how many seconds its process was at work on it."""

    kind: str
    turn: int
    finished: float
    seconds: float


def from_store(store: Store, stages: Iterable[Stage], turns: Mapping[str, int], started: datetime) -> list[Made]:
    """What a store says of these stages. Raises UserError where one is missing or older than the run's start."""
    found = []
    for stage in stages:
        if not store.has(stage):
            raise UserError(f"{stage} is not in the store: the run did not finish, or was one of other seeds.")
        made = store.manifest(stage)["provenance"]
        after = (datetime.fromisoformat(made["made"]) - started).total_seconds()
        if after < 0:
            raise UserError(f"{stage} was made before the run started: it was not from nothing.")
        found.append(Made(type(stage).__name__, turns[stage.key], after, made["seconds"]))
    return found


def measured(made: Sequence[Made], seeds: Sequence[int], wall: float) -> dict[str, Any]:
    """Seconds after the start at which each share of a seed's stages was finished, and each kind's number and seconds;
    `wall` is the whole command. A stage that several seeds ask for counts for the first of them."""
    late = max(one.finished for one in made)
    if late > wall + 1:  # artifacts know whole seconds
        raise UserError(f"An artifact was finished {late:.0f} s after the start, behind the run's end at {wall:.0f} s.")
    curves = {}
    for turn, seed in enumerate(seeds):
        ends = sorted(one.finished for one in made if one.turn == turn)
        if not ends:
            raise UserError(f"No stage was made for seed {seed}.")
        curves[str(seed)] = [round(ends[max(0, math.ceil(share * len(ends) / 100) - 1)], 1) for share in SHARES]
    kinds = {}
    for kind in sorted({one.kind for one in made}):
        spent = [one.seconds for one in made if one.kind == kind]
        kinds[kind] = {"number": len(spent), "seconds": round(sum(spent), 1)}
    return {"wall_seconds": wall, "stages": len(made), "shares": list(SHARES), "seeds": curves, "kinds": kinds}


def stored() -> dict[str, Any] | None:
    """The measurement that is kept here; None where there is none."""
    path = place() / FILE
    return outputs.read(path) if path.is_file() else None


def whole_after(content: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Seeds in their order, each with the seconds after which it and all before it were whole."""
    latest, found = 0.0, []
    for seed, curve in content["seeds"].items():
        latest = max(latest, curve[-1])
        found.append((seed, latest))
    return found


def section(content: Mapping[str, Any]) -> list[str]:
    """The measurement as a section of `docs/COST.md`."""
    from persona_coupling.cost_tables import NAMES, minutes, table

    rows, before = [], 0.0
    for number, (seed, after) in enumerate(whole_after(content), 1):
        rows.append([f"{number} (seed {seed})", minutes(after), minutes(after - before)])
        before = after
    kinds = sorted(content["kinds"].items(), key=lambda item: -item[1]["seconds"])
    most, rest = kinds[:MOST], kinds[MOST:]
    work = [_line((NAMES | MORE).get(kind, f"`{kind}`"), [spent]) for kind, spent in most]
    work += [_line("all else", [spent for _, spent in rest])] if rest else []
    made = content["provenance"]
    return [
        "## A small model: the whole study on one GPU",
        "",
        f"The profile `{content['profile']}`, all {content['experiments']} experiments under {len(rows)} seeds, every model "
        "trained and sampled",
        f"from nothing on one {made['device']} (torch {made['versions']['torch']}, commit {made['commit']}):",
        f"**{minutes(content['wall_seconds'])} minutes** for {content['stages']:,} artifacts and all tables, measured by "
        "`persona_coupling.pace`.",
        "The first seed's minutes hold the start and what all seeds share; what each further one adds is beside it. The",
        "last minutes go into tables.",
        "",
        *table(["seeds", "whole after minutes", "minutes more"], rows),
        "",
        f"![artifacts finished over time, seed by seed](measured/{FILE.replace('.json', '.svg')})",
        "",
        "Where the processes' time went; they run side by side and wait for the card together:",
        "",
        *table(["work", "times", "seconds each", "minutes of processes"], work),
    ]


def sentence(content: Mapping[str, Any]) -> str:
    """The measurement for the README."""
    return (
        f"The profile `{content['profile']}`, all {content['experiments']} experiments under {len(content['seeds'])} seeds, "
        f"took {content['wall_seconds'] / 60:.0f} minutes on one {content['provenance']['device']}, every model trained and "
        "sampled from nothing."
    )


def _line(what: str, spent: Sequence[Mapping[str, int | float]]) -> list[str]:
    from persona_coupling.cost_tables import minutes

    number, seconds = sum(one["number"] for one in spent), sum(one["seconds"] for one in spent)
    return [what, f"{number:,}", f"{seconds / number:.1f}", minutes(seconds)]


def points(content: Mapping[str, Any]) -> pd.DataFrame:
    """The curve as a table: seed, minutes, and per cent of the seed's artifacts that were finished by then."""
    rows = [
        {"seed": int(seed), "minutes": seconds / 60, "finished": share}
        for seed, curve in content["seeds"].items()
        for share, seconds in zip(content["shares"], curve, strict=True)
    ]
    return pd.DataFrame(rows)


def draw(content: Mapping[str, Any]) -> Path:
    """The curve as a figure beside the measurement, with its data."""
    from persona_coupling.figures.pace import seeds_over_time
    from persona_coupling.figures.theme import save

    figure, data = seeds_over_time(points(content))
    return save(figure, place(), Path(FILE).stem, data, "")


def main(arguments: list[str] | None = None) -> int:
    """Measure a run by its store."""
    parser = argparse.ArgumentParser(prog="persona_coupling.pace", description=main.__doc__)
    parser.add_argument("--profile", default="full")
    parser.add_argument("--seeds", required=True, help="the run's seeds, e.g. 5,6,7,8,9")
    parser.add_argument(
        "--started", required=True, help="time of the command's start, as ISO 8601; UTC if it names no zone"
    )
    parser.add_argument("--ended", required=True, help="time of its end")
    chosen = parser.parse_args(arguments)
    try:
        started, ended = _time(chosen.started), _time(chosen.ended)
        seeds, store = planning.seeds(chosen.seeds), Store(paths.artifacts())
        profile = profiles.load(chosen.profile).name
        given = {"profile": profile, "seeds": seeds, "model": ""}
        designs = [notebooks.design_of(experiment, given) for experiment in notebooks.discover()]
        stages = in_order([stage for design in designs for stage in design.stages()])
        made = from_store(store, stages, planning.turns_of(designs, seeds), started)
        found = measured(made, seeds, (ended - started).total_seconds())
        records = [store.manifest(stage)["provenance"] for stage in stages]
        last = max(records, key=lambda record: record["made"]) | {
            what: " / ".join(provenance.distinct(records, what)) for what in ("commit", "device")
        }
        keep(found, profile, len(designs), last)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"  {(place() / FILE).relative_to(paths.repository())}; now `nox -s costs`")
    return 0


def _time(text: str) -> datetime:
    try:
        told = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{text} is no time as ISO 8601 writes it, e.g. 2026-01-31T12:00:00.") from error
    return told if told.tzinfo else told.replace(tzinfo=UTC)


def keep(content: dict[str, Any], profile: str, experiments: int, made: Mapping[str, Any]) -> None:
    """Write a measurement with what it was made with."""
    about = {"profile": profile, "experiments": experiments}
    what = {name: made[name] for name in ("made", "commit", "device", "system", "versions")}
    outputs.write_json(place() / FILE, about | {"provenance": what} | content)


if __name__ == "__main__":
    sys.exit(main())
