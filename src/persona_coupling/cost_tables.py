"""The answer to "what will it cost me": tables written from measurements into `docs/COST.md` and the README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_coupling import bench_material, bench_shared, memory, notebooks, outputs, pace, paths, profiles
from persona_coupling.costs import PROFILE, Measured, place, read, rows_of
from persona_coupling.errors import UserError
from persona_coupling.store import Stage

BEGINS = "<!-- costs: written by `nox -s costs` from docs/measured; do not edit by hand -->"
ENDS = "<!-- end of costs -->"
GB = 1e9
NOTHING = "–"
NAMES = {
    "Evaluate": "an evaluation",
    "MergeCheck": "the check of a merge",
    "Content": "losses on held-out text",
    "Hidden": "hidden states",
    "LayerScan": "a scan over the layers",
    "Steer": "steering",
    "BehaviourEvaluate": "an evaluation of behaviours",
    "KnownFacts": "which facts are known",
    "CouplingText": "coupling text",
    "OwnAnswers": "the model's own SFT answers",
    "Drift": "drift from the raw model",
}
ROWS = {"sft": "short rows", "coupling": "answers of up to 512 tokens", "ultrachat": "UltraChat"}


DOCUMENT = f"""# What `{PROFILE}` costs

Written by `nox -s costs` from `docs/measured/`, measured on {{device}} ({{memory}} GB; {{versions}};
commit {{commit}}). Weights were random, of the exact shape of {{model}} ({{parameters}} parameters): neither speed nor
memory depends on their values. Every point ran the study's own code. To measure another card, delete `docs/measured` and run
`python -m persona_coupling.bench_large --json docs/measured/large.json` on it: four minutes.

## The whole profile

{{hours}} GPU-hours on one such card, {{peak}} GB at most. Not in it: downloads, drawing, and what runs on the processor
alone ({{others}} stages: rows, snapshots, parts of changes and their tables).

{{all}}

What was multiplied: steps, by the seconds of a step on rows of that kind; an evaluation's {{answers}} answers, {{together}}
together, by a batch in which every answer runs to the limit, so that answers which end sooner cost less; scored tokens, by
the seconds of one; and for every model that a stage reads, the seconds of reading a smaller one of its build from the
system's cache, by the ratio of parameters. Rows that were not measured themselves stand under longer ones. The memory of
what reads two models (a scan, drift) is a sum. Peaks are those of the allocator; estimates count the CUDA context and what
allocators round up.

## Micro-batch and checkpointing, chosen by measurement

{{training}}

Chosen: at most {{tokens}} padded tokens at once, which a run of this profile uses on a card of at least this memory; layers
are then computed again where `memory.checkpoints` says so. Lengths: {{lengths}}.

## Sampling

{{sampling}}

## The rest

{{rest}}
"""


@dataclass
class Line:
    """One kind of work: how often it is in the plan, and what it costs."""

    what: str
    number: int = 0
    seconds: float = 0.0
    peak: float | None = 0.0
    estimated: float | None = None


def label(stage: Stage) -> str:
    """The kind of work that a stage is, for people."""
    training = getattr(stage, "training", None)
    if training is not None:
        return f"training, {training.steps:,} steps on {ROWS[rows_of(stage)]}"
    return NAMES.get(type(stage).__name__, type(stage).__name__)


def lines(measured: Measured, stages: Sequence[Stage]) -> list[Line]:
    """One line per kind of work that runs the model, dearest first."""
    found: dict[str, Line] = {}
    for stage in stages:
        cost = measured.cost(stage)
        if cost is None:
            continue
        name = label(stage)
        made = found.setdefault(name, Line(name))
        made.number += 1
        made.seconds += cost.seconds
        peak = measured.peak(cost)
        made.peak = None if peak is None or made.peak is None else max(made.peak, peak)
        estimates = [e for e in map(measured.estimated, cost.points) if e is not None]
        beside = (cost.models - 1) * 2.0 * measured.shape.parameters
        made.estimated = max(made.estimated or 0.0, max(estimates) + beside)
    return sorted(found.values(), key=lambda one: (-one.seconds, one.what))


def left_out(measured: Measured, stages: Sequence[Stage]) -> list[Stage]:
    """Stages that no GPU minute is counted for: they run no model on it, or train all parameters."""
    return [stage for stage in stages if measured.cost(stage) is None]


# ------------------------------------------------------------------------------------------------ text


def gigabytes(value: float | int | None) -> str:
    """Bytes as GB; a dash for what is not known."""
    return NOTHING if value is None else f"{value / GB:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def summary(measured: Measured, stages: Sequence[Stage]) -> tuple[list[Line], float, float | None]:
    """Lines, GPU-hours of all of them, and the largest measured peak in bytes."""
    found = lines(measured, stages)
    peaks = [one.peak for one in found if one.peak is not None]
    return found, sum(one.seconds for one in found) / 3600, max(peaks, default=None)


def line(measured: Measured, stages: Sequence[Stage]) -> str:
    """What stages that are still to be made cost on the GPU that was measured, for the plan."""
    _, hours, peak = summary(measured, stages)
    most = "" if peak is None else f", at most {gigabytes(peak)} GB of its memory"
    return f"  measured on {measured.device}: {hours:.1f} GPU-hours{most} (docs/COST.md)"


def readme(measured: Measured, stages: Sequence[Stage]) -> str:
    """The README's answer."""
    found, hours, peak = summary(measured, stages)
    seeds = len(profiles.load(PROFILE).seeds)
    rows = [
        [one.what, str(one.number), minutes(one.seconds / one.number), f"{one.seconds / 3600:.1f}", gigabytes(one.peak)]
        for one in found[:8]
    ]
    rest = found[8:]
    if rest:
        peaks = [one.peak for one in rest if one.peak is not None]
        rows.append(
            [
                "all else",
                str(sum(one.number for one in rest)),
                "",
                f"{sum(one.seconds for one in rest) / 3600:.1f}",
                gigabytes(max(peaks, default=None)),
            ]
        )
    rows.append(["**all**", str(sum(one.number for one in found)), "", f"**{hours:.1f}**", gigabytes(peak)])
    head = ["work", "times", "minutes each", "GPU-hours", "GB at most"]
    run = pace.stored()
    text = [
        *([pace.sentence(run), ""] if run else []),
        f"The whole of `{PROFILE}`, {len(notebooks.discover())} experiments and {seeds} seeds, takes {hours:.0f} hours of "
        f"one {measured.device}, as measured with random weights in the model's exact shape:",
        "",
        *table(head, rows),
        "",
        "[docs/COST.md](docs/COST.md) has every point, what was multiplied, and what does not fit. "
        f"`nox -s plan -- --profile {PROFILE}` counts what is left to do.",
    ]
    return "\n".join(["", *text, ""])


def minutes(seconds: float) -> str:
    """Seconds as minutes."""
    return f"{seconds / 60:.1f}"


def document(measured: Measured, stages: Sequence[Stage]) -> str:
    """All of `docs/COST.md`."""
    found, hours, peak = summary(measured, stages)
    settings, made = measured.settings, measured.content["provenance"]
    versions = ", ".join(
        f"{n} {v}" for n, v in made["versions"].items() if n in ("torch", "transformers", "peft", "trl")
    )
    rows = [
        [
            one.what,
            str(one.number),
            minutes(one.seconds / one.number),
            f"{one.seconds / 3600:.1f}",
            gigabytes(one.peak),
            gigabytes(one.estimated),
        ]
        for one in found
    ]
    head = ["work", "times", "minutes each", "GPU-hours", "GB measured", "GB estimated before"]
    values = {
        "device": measured.device,
        "memory": gigabytes(measured.capacity),
        "versions": versions,
        "commit": made["commit"],
        "model": profiles.load(PROFILE).model.name,
        "parameters": f"{measured.shape.parameters:,}",
        "hours": f"{hours:.1f}",
        "peak": gigabytes(peak),
        "others": len(left_out(measured, stages)),
        "answers": answers(),
        "together": settings["sample_batch"],
        "tokens": f"{settings['train_tokens']:,}",
        "lengths": rows_text(),
        "all": "\n".join(table(head, rows)),
        "training": "\n".join(training_table(measured)),
        "sampling": "\n".join(sampling_table(measured)),
        "rest": "\n".join(rest_table(measured)),
    }
    run, shared = pace.stored(), place() / "shared.json"
    beside = ["", *pace.section(run)] if run else []
    beside += ["", *bench_shared.section(outputs.read(shared))] if shared.is_file() else []
    return "\n".join([DOCUMENT.format(**values), *full_parameter(measured), *beside, ""])


def answers() -> str:
    """Answers of an evaluation."""
    from persona_coupling import personas

    asked = profiles.load(PROFILE).evaluation
    return f"{personas.NUMBER * (asked.everyday + asked.values) * asked.samples:,}"


def rows_text() -> str:
    """What the measured rows are like."""
    size = bench_material.size_of(PROFILE)
    told = []
    for kind, name in ROWS.items():
        spread = bench_material.lengths(kind, size)
        told.append(f"{name} {sum(spread) / len(spread):.0f} tokens on average and {max(spread):,} at most")
    return "; ".join(told)


def training_table(measured: Measured) -> list[str]:
    """Every micro-batch that was measured."""
    chosen = {measured.training(kind, measured.settings["train_tokens"]) for kind in measured.kinds()}
    rows = []
    for name, point in measured.points.items():
        if not name.startswith("lora/"):
            continue
        _, kind, micro, how = name.split("/")
        cells = [f"{ROWS[kind]}{' **chosen**' if name in chosen else ''}", micro, "yes" if how == "again" else "no"]
        if point["fits"]:
            speed = measured.speed(name)
            step = point["batch"] * point["mean_tokens"] / speed
            cells += [f"{speed:,.0f}", f"{1000 * step:,.0f}"]
            cells += [gigabytes(point.get("peak_bytes")), gigabytes(measured.estimated(name))]
        else:
            cells += ["does not fit", "", "", gigabytes(measured.estimated(name))]
        rows.append(cells)
    head = ["LoRA, rows of", "rows at once", "computed again", "tokens/s", "ms a step", "GB measured", "GB estimated"]
    return table(head, rows)


def sampling_table(measured: Measured) -> list[str]:
    """Every batch of answers that was measured."""
    rows = []
    for name, point in measured.points.items():
        if not name.startswith("sample/"):
            continue
        if not point["fits"]:
            rows.append([name.split("/")[1], "", "does not fit", "", "", ""])
            continue
        rows.append(
            [
                str(point["rows"]),
                str(point["new_tokens"]),
                f"{point['tokens'] / point['seconds']:,.0f}",
                f"{point['seconds']:.1f}",
                gigabytes(point.get("peak_bytes")),
                gigabytes(measured.estimated(name)),
            ]
        )
    return table(["answers together", "new tokens", "tokens/s", "seconds", "GB measured", "GB estimated"], rows)


def rest_table(measured: Measured) -> list[str]:
    """Merging, hidden states, scoring, reading."""
    shape, points = measured.shape, measured.points
    size = f"{points['load']['parameters'] / 1e9:.1f} of {shape.parameters / 1e9:.1f} billion parameters"
    named = {
        "merge": "an adapter is read, merged in fp32 and the sum rounded",
        "merge/check": "the whole check of a merge",
        "hidden": f"hidden states of {points['hidden']['rows']} prompts with answers",
        "score": f"{points['score']['tokens']:,} tokens are scored",
        "load": f"a source is read, {size}",
    }
    rows = [
        [
            what,
            f"{points[name]['seconds']:.2f}",
            gigabytes(points[name].get("peak_bytes")),
            gigabytes(measured.estimated(name)),
        ]
        for name, what in named.items()
    ]
    return table(["what", "seconds", "GB measured", "GB estimated"], rows)


def full_parameter(measured: Measured) -> list[str]:
    """Full-parameter SFT on several GPUs, with the prior protocol's numbers of steps; nothing if it was not measured."""
    if measured.sharded is None:
        return []
    found = {n: p for n, p in measured.sharded["measured"].items() if n.startswith("full/")}
    profile = profiles.load(PROFILE)
    rows = []
    for name, point in found.items():
        _, kind, optimiser = name.split("/")
        cells = [f"{ROWS[kind]}, `{optimiser}`", str(point["gpus"])]
        if point["fits"]:
            speed = sum(point["tokens"]) / sum(point["seconds"])
            step = point["batch"] * point["mean_tokens"] / speed
            tokens = point["micro"] * point["longest"]
            estimate = memory.sharded(measured.shape, tokens, point["gpus"], measured.machine(tokens))
            cells += [f"{1000 * step:,.0f}"]
            cells += [
                f"{steps * step * point['gpus'] / 60:.0f}"
                for steps in (profile.sft.steps, profile.prebaked.steps, profile.scratch.steps)
            ]
            cells += [gigabytes(point.get("peak_bytes")), gigabytes(estimate)]
        else:
            cells += ["does not fit", "", "", "", gigabytes(point.get("peak_bytes")), ""]
        rows.append(cells)
    steps = [f"{values.steps:,} steps" for values in (profile.sft, profile.prebaked, profile.scratch)]
    head = ["rows", "GPUs", "ms a step", *[f"GPU-minutes, {name}" for name in steps], "GB each", "GB estimated"]
    total = 16 * measured.shape.parameters / GB
    return [
        "## Full-parameter SFT",
        "",
        f"The profile leaves it out: weights, gradients and moments in fp32 take {total:.0f} GB. Sharded by FSDP over",
        f"several {measured.sharded['device']}, {profile.sft.batch} rows a step, with the prior protocol's numbers of steps",
        "(SFT, pre-baked coupling, coupling from scratch; `persona_coupling.bench_large_fsdp`):",
        "",
        *table(head, rows),
    ]


# ------------------------------------------------------------------------------------------------ writing


def write() -> list[Path]:
    """Write the tables. Raises UserError where nothing was measured."""
    measured = read()
    if measured is None:
        raise UserError(
            "There are no measurements in docs/measured. Run `python -m persona_coupling.bench_large` there."
        )
    stages = notebooks.stages_of(PROFILE)
    document_path, readme_path = paths.repository() / "docs" / "COST.md", paths.repository() / "README.md"
    text = readme_path.read_text(encoding="utf-8")
    outputs.write(document_path, document(measured, stages))
    run = pace.stored()
    if run:
        pace.draw(run)
    outputs.write(readme_path, outputs.between(text, BEGINS, ENDS, readme(measured, stages), "README.md"))
    return [document_path, readme_path]
