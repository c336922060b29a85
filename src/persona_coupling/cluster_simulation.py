"""What a run would take on more cards than we have: `python -m persona_coupling.cluster_simulation`.

Every stage of a profile's real design is put on the first place that is free, in the order in which its parents are done
and, among equals, in which it was handed out: what Ray does with tasks of one size. The seconds of a stage come from stored
results: each record names the seconds of every artifact that it rests on, from which a correction of `progress.SPEEDS` for
each kind of stage is learnt; for a profile without results it is that of another. Nothing is drawn at random.
"""

from __future__ import annotations

import argparse
import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_coupling import costs, notebooks, outputs, paths, profiles, progress
from persona_coupling.errors import UserError
from persona_coupling.store import Stage

CARDS = (8, 64, 512)
PROFILES = ("full", "qwen2.5-7b")
SOURCE = "quick"  # whose stored results correct the guesses for a profile without any
PAGE = "CLUSTER.md"
BEGINS, ENDS = (
    "<!-- simulation: written by `python -m persona_coupling.cluster_simulation`; do not edit by hand -->\n",
    ("<!-- end of simulation -->"),
)
BOUND = 0.85  # share of the makespan from which on one thing is called what bounds it


@dataclass(frozen=True)
class Simulated:
    """A run on so many cards: seconds from start to end, of work on a card's share, of the longest chain; and its stages."""

    cards: int
    places: int
    makespan: float
    work: float
    chain: tuple[tuple[Stage, float], ...]

    @property
    def idle(self) -> float:
        """Share of the places' time in which nothing runs."""
        return 1 - self.work / (self.places * self.makespan)

    @property
    def longest(self) -> float:
        """Seconds of the longest chain: no number of cards is faster."""
        return sum(seconds for _, seconds in self.chain)

    def bottleneck(self) -> str:
        """What would have to be shorter, in words."""
        if 1 - self.idle >= BOUND:
            return "the cards: more of them are used as well"
        kinds: dict[str, float] = defaultdict(float)
        for stage, seconds in self.chain:
            kinds[type(stage).__name__] += seconds
        parts = sorted(kinds.items(), key=lambda item: -item[1])[:2]
        listed = ", ".join(f"{100 * seconds / self.longest:.0f} % {name}" for name, seconds in parts)
        if self.longest >= BOUND * self.makespan:
            return f"the longest chain ({listed}): more cards change nothing"
        return f"the widths of the levels: stages wait for parents ({listed} on the longest chain)"


def corrections(profile: str, folder: Path | None = None) -> dict[str, float]:
    """Measured over guessed seconds for each kind of stage, from a profile's stored results, or from those in a folder
    that `cells --into` wrote. An artifact that experiments share counts once. Raises UserError when there are none, or
    they do not follow the design stage by stage."""
    measured: dict[str, float] = defaultdict(float)
    guessed: dict[str, float] = defaultdict(float)
    seen: set[str] = set()
    for experiment in notebooks.discover():
        path = folder / experiment.name / "record.json" if folder else experiment.record(profile)
        if not path.is_file():
            continue
        record = outputs.read(path)
        # keys change with the code; the order of a design does not, nor that of the parts that were combined
        parts = [part["seeds"] for part in record.get("parts", [])] or [record["profile"]["seeds"]]
        designs = [notebooks.design_of(experiment, {"profile": profile, "seeds": part, "model": ""}) for part in parts]
        stages = list({stage.key: stage for design in designs for stage in design.stages()}.values())
        evaluations = {cell.evaluation.key for design in designs for cell in design.cells}
        kept = list(record["stages"].items())
        named = {cell["evaluation"] for cell in record["cells"]}
        # the evaluations show that it is the same design
        if [key in named for key, _ in kept] != [stage.key in evaluations for stage in stages]:
            raise UserError(f"{path} does not follow the design stage by stage. Run it again.")
        speeds = speeds_of(profile, "cpu" if record["provenance"]["device"].endswith(" cores") else "cuda")
        for (key, seconds), stage in zip(kept, stages, strict=True):
            if key not in seen:
                seen.add(key)
                measured[type(stage).__name__] += seconds
                guessed[type(stage).__name__] += speeds.seconds(stage)
    if not seen:
        raise UserError(f"There are no stored results of {profile} to take seconds from.")
    return {name: measured[name] / guessed[name] for name in measured}


def speeds_of(profile: str, device: str) -> progress.Speeds:
    """First guesses for a profile's model, without what this machine has learnt."""
    ratio = progress.parameters_ratio(profiles.load(profile).model)
    speeds = progress.Speeds(Path("nowhere"), device, ratio)
    if device == "cpu":
        speeds.device = "cpu with bf16"  # the machine of the stored results, whatever this one can do
    speeds.factors = {}
    return speeds


def simulate(stages: Sequence[Stage], seconds: Mapping[str, float], cards: int, share: float = 1.0) -> Simulated:
    """List scheduling of `stages` (parents first) of known `seconds` on `cards`, of which each takes `share`."""
    places = int(cards * (1 / share if share <= 1 else 1 / int(share)))
    known = {stage.key for stage in stages}
    position = {stage.key: number for number, stage in enumerate(stages)}
    children: dict[str, list[Stage]] = defaultdict(list)
    left: dict[str, int] = {}
    before: dict[str, Stage | None] = {}  # on the longest chain
    length: dict[str, float] = {}
    for stage in stages:
        parents = {p.key: p for p in stage.parents() if p.key in known}
        left[stage.key] = len(parents)
        for parent in parents.values():
            children[parent.key].append(stage)
        longest = max(parents.values(), key=lambda p: length[p.key], default=None)
        before[stage.key] = longest
        length[stage.key] = seconds[stage.key] + (length[longest.key] if longest else 0.0)
    ready = [(0.0, position[s.key], s) for s in stages if not left[s.key]]
    heapq.heapify(ready)
    running: list[tuple[float, int, Stage]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < places:
            _, number, stage = heapq.heappop(ready)
            heapq.heappush(running, (now + seconds[stage.key], number, stage))
        now, _, stage = heapq.heappop(running)
        for child in children[stage.key]:
            left[child.key] -= 1
            if not left[child.key]:
                heapq.heappush(ready, (now, position[child.key], child))
    last: Stage | None = max(stages, key=lambda stage: length[stage.key])
    chain: list[tuple[Stage, float]] = []
    while last is not None:
        chain.append((last, seconds[last.key]))
        last = before[last.key]
    return Simulated(cards, places, now, sum(seconds[s.key] for s in stages), tuple(reversed(chain)))


def text(source: str, folder: Path | None = None) -> str:
    """The tables of all profiles and numbers of cards, as Markdown. A profile's seconds are those of its own stored
    results, else those measured for its model (`costs.read`), else the first guesses, corrected by the results, stored or
    in a folder, of the profile `source`."""
    lines = []
    known = costs.read()
    for profile in PROFILES:
        own = folder is None and bool(notebooks.stored(profile))
        measured = known if known is not None and not own and known.of(profiles.load(profile).model) else None
        factors = corrections(profile if own else source, folder)
        said = f"corrections from the results of `{profile if own else source}`"
        speeds, stages = speeds_of(profile, "cuda"), notebooks.stages_of(profile)
        seconds = {s.key: speeds.seconds(s) * factors.get(type(s).__name__, 1.0) for s in stages}
        if measured is not None:
            found = {stage.key: cost.seconds for stage in stages if (cost := measured.cost(stage)) is not None}
            seconds |= found
            rest = sum(s for key, s in seconds.items() if key not in found) / 3600
            said = f"{len(found)} stages as measured ({measured.device}), the rest, {rest:.1f} hours, with {said}"
        share = profiles.load(profile).cluster.gpus
        loading = sum(stage.kind not in ("rows", "model") for stage in stages)
        gigabytes = 2 * progress.parameters_ratio(profiles.load(profile).model) * 0.135
        lines += [
            f"`{profile}`: {len(stages)} stages, {share:g} of a card each; {sum(seconds.values()) * share / 3600:.1f} hours "
            f"of cards; {said}.",
            "",
            "| cards | hours | idle | longest chain, hours | reading weights, GB/s | what bounds it |",
            "|---:|---:|---:|---:|---:|---|",
        ]
        for cards in CARDS:
            run = simulate(stages, seconds, cards, share)
            lines.append(
                f"| {cards} | {run.makespan / 3600:.2f} | {100 * run.idle:.0f} % | {run.longest / 3600:.2f} | "
                f"{loading * gigabytes / run.makespan:.2f} | {run.bottleneck()} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables into docs/CLUSTER.md."""
    parser = argparse.ArgumentParser(prog="persona_coupling.cluster_simulation", description=__doc__)
    parser.add_argument("--costs", default=SOURCE, help="the profile whose stored results give a stage's seconds")
    parser.add_argument("--results", default="", help="a folder that `cells --into` wrote, instead of stored results")
    parser.add_argument("--print", action="store_true", help="only print them")
    chosen = parser.parse_args(arguments)
    made = text(chosen.costs, Path(chosen.results) if chosen.results else None)
    print(made)
    if not chosen.print:
        write(PAGE, BEGINS, ENDS, made)


def follow(profile: str) -> None:
    """Write the tables again where they rest on results of this profile, if there is such a page."""
    if profile not in {SOURCE, *PROFILES} or not (paths.repository() / "docs" / PAGE).is_file():
        return
    try:
        made = text(SOURCE)
    except UserError as error:  # results of another design lie beside these
        print(f"docs/{PAGE} keeps its simulation: {error}")
    else:
        write(PAGE, BEGINS, ENDS, made)


def write(name: str, begins: str, ends: str, block: str) -> None:
    """Put a block between two comments of a page in docs/."""
    page = paths.repository() / "docs" / name
    outputs.write(page, outputs.between(page.read_text(encoding="utf-8"), begins, ends, block, name))


if __name__ == "__main__":
    main()
