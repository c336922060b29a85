"""From states' tables to named estimates and curves over layers: shifts, probes, what an adapter reads, what steering does.

Names are `arm.position.measure` for states and `arm.intervention.measure` for steering, for example `B.answer.kept` and
`B.restored.above_midpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from persona_coupling import measures, representations, score, stats
from persona_coupling.claims import Gate
from persona_coupling.measures import NATS, Estimates
from persona_coupling.personas import ASSISTANT, SOURCE
from persona_coupling.residual import POSITIONS
from persona_coupling.shifts import ALL_LAYERS
from persona_coupling.stats import Estimate
from persona_coupling.study import Results
from persona_coupling.values import Values

PROBES = ("raw", "tuned", "transfer", "transfer_centred", "permuted")
READINGS = ("kept", "kept_any", "response_shift", "response_persona", "inside_shift", "inside_persona")
RESTORE, COMMON, OWN, SWAP, NONE = "restore", "common", "own", "swap", "none"


def push(arm: str) -> str:
    """The name of the addition that pushes the raw model's villain to where an arm's SFT moved it."""
    return f"push {arm}"


# ------------------------------------------------------------------------------------------------------------- states


def add_states(made: Estimates, results: Results, arm: str) -> None:
    """Add means over layers of all shift and probe measures of an arm, and the adapter's readings over all layers together,
    at both positions."""
    tables = {name: results[name][results[name]["condition"] == arm] for name in ("shift", "probe", "reading")}
    for position in POSITIONS:
        shift, probe, reading = (tables[n][tables[n]["position"] == position] for n in ("shift", "probe", "reading"))
        for name in representations.SHIFTS:
            unit = "proportion of squared length" if name == "common_share" else "spreads or cosine"
            _add_whole(made, f"{arm}.{position}.{name}", shift, name, unit)
        for name in PROBES:
            _add_whole(made, f"{arm}.{position}.probe_{name}", probe, name, "proportion", binary=True)
        margin = probe.assign(margin=probe["raw"].astype(float) - probe["permuted"].astype(float))
        _add_whole(made, f"{arm}.{position}.probe_margin", margin, "margin", "difference of proportions")
        whole = reading[reading["layer"] == ALL_LAYERS]
        for name in READINGS:
            unit = "proportion of the persona signal" if name.startswith("kept") else "proportion of chance"
            _add_whole(made, f"{arm}.{position}.{name}", whole, name, unit)
        gap = whole.assign(response_gap=whole["response_persona"] - whole["response_shift"])
        _add_whole(made, f"{arm}.{position}.response_gap", gap, "response_gap", "proportion of chance")


def per_question(table: pd.DataFrame, column: str, *keys: str) -> pd.DataFrame:
    """The mean over all rows of a seed and question (and of further keys); missing if any of them is. Every question has
    as many rows as the next, so that the mean of these means is the mean of all, at a hundredth of the resampling."""
    by = ["seed", "question", *keys]
    values = table[column].astype(float)
    whole = values.groupby([table[key] for key in by], sort=True).agg(["mean", "count", "size"])
    whole.loc[whole["count"] < whole["size"], "mean"] = np.nan
    return whole["mean"].rename(column).reset_index()


def _add_whole(
    made: Estimates, name: str, table: pd.DataFrame, column: str, unit: str, *, binary: bool = False
) -> None:
    """Add `name`: the mean over layers and personas, one number per seed and question. `binary`: at 0 and 1, where no
    resample differs, the exact bound with as many trials as questions."""
    measures.add_mean(made, name, per_question(table, column), column, unit)
    found = made[name]
    if binary and found.value in (0.0, 1.0):
        low, high = stats.clopper_pearson(found.clusters if found.value else 0, found.clusters)
        made.named[name] = replace(found, low=low, high=high)


def chance_bounds(results: Results, arm: str, position: str, measure: str) -> tuple[float, float]:
    """The central 95 % of `response` or `inside` over random vectors, all layers together."""
    table = results["chance"]
    chosen = table[(table["condition"] == arm) & (table["position"] == position)]
    low, high = np.quantile(chosen[measure], [0.025, 0.975])
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------------------- steering


def steered(
    results: Results, condition: str, addition: str, *, layer: int | None = None, control: bool = False
) -> pd.DataFrame:
    """Rows of one addition (or of its random controls, averaged over draws) in a condition; all layers by default."""
    table = results["steered"]
    chosen = table[(table["condition"] == condition) & (table["addition"] == addition)]
    chosen = chosen[(chosen["draw"] >= 0) == control]
    if layer is not None:
        chosen = chosen[chosen["layer"] == layer]
    keys = ["seed", "layer", "persona", "question"]
    return chosen.groupby(keys, as_index=False)[["logprob", "after_break"]].mean()


def of(table: pd.DataFrame, *who: str) -> pd.DataFrame:
    """The rows of some personas."""
    return table[table["persona"].isin(who)]


def best_layer(results: Results, condition: str, addition: str, persona: str, *, sign: int = 1) -> int:
    """The layer at which an addition raises (sign 1) or lowers (-1) a persona's marker most, over all seeds. Chosen on the
    data that it is then reported for: an upper bound of what the intervention does, which is what a null needs."""
    means = of(steered(results, condition, addition), persona).groupby("layer")["logprob"].mean()
    return int((sign * means).idxmax())


def add_steering(
    made: Estimates, results: Results, arm: str, evaluated: Sequence[str], parts: Sequence[str] = (RESTORE,)
) -> int:
    """Add what putting the villain's centroid back does to an arm with the pre-baked adapter, at its best layer, which is
    returned. All in nats of the marker behind fixed answers:

    `arm.none`, `arm.restored`, `arm.random` (the rotated vectors at that layer): `logprob` of the villain, `others` the
    mean of the evaluated bystanders, `after_break` the villain's once the blank line stands;
    `arm.lost.logprob`: raw minus SFT'd; `arm.restored.above_midpoint`: restored minus half way between these two;
    `arm.restored.beyond_random`; `arm.restored.share` of the loss. Of further `parts` of the shift, each at its own best
    layer: `arm.<part>.logprob` and `.share`. Where answers were sampled, the villain's `arm.restored.sampled_rate` and
    `arm.random.sampled_rate`.
    """
    condition, raw = f"{arm}.prebaked", "A.prebaked"
    layer = best_layer(results, condition, RESTORE, SOURCE)
    others = [persona for persona in evaluated if persona != SOURCE]
    tables = {
        "none": steered(results, condition, NONE),
        "restored": steered(results, condition, RESTORE, layer=layer),
        "random": steered(results, condition, RESTORE, layer=layer, control=True),
        "raw": steered(results, raw, NONE),
    }
    for name, table in tables.items():
        measures.add_mean(made, f"{arm}.{name}.logprob", of(table, SOURCE), "logprob", NATS)
        measures.add_mean(made, f"{arm}.{name}.others", of(table, *others), "logprob", NATS)
        measures.add_mean(made, f"{arm}.{name}.after_break", of(table, SOURCE), "after_break", NATS)
    villain = {name: of(table, SOURCE) for name, table in tables.items()}
    for measure, column in (("logprob", "logprob"), ("after_break", "after_break")):
        suffix = "" if measure == "logprob" else "_after_break"
        _combine(made, f"{arm}.lost.{measure}", [(1.0, villain["raw"]), (-1.0, villain["none"])], column)
        middle = [(1.0, villain["restored"]), (-0.5, villain["raw"]), (-0.5, villain["none"])]
        _combine(made, f"{arm}.restored.above_midpoint{suffix}", middle, column)
        beyond = [(1.0, villain["restored"]), (-1.0, villain["random"])]
        _combine(made, f"{arm}.restored.beyond_random{suffix}", beyond, column)
        add_share(made, f"{arm}.restored.share{suffix}", villain["restored"], villain["none"], villain["raw"], column)
    for part in parts:
        if part != RESTORE:
            own = best_layer(results, condition, part, SOURCE)
            reached = of(steered(results, condition, part, layer=own), SOURCE)
            measures.add_mean(made, f"{arm}.{part}.logprob", reached, "logprob", NATS)
            add_share(made, f"{arm}.{part}.share", reached, villain["none"], villain["raw"], "logprob")
    answers = results["steered_answers"]
    answers = answers[(answers["condition"] == condition) & (answers["addition"] == RESTORE)]
    for name, chosen in (("restored", answers[answers["draw"] < 0]), ("random", answers[answers["draw"] >= 0])):
        if len(chosen):
            scored = score.score_table(of(chosen, SOURCE))
            measures.add_mean(made, f"{arm}.{name}.sampled_rate", scored, "value", "proportion")
    return layer


def add_pushing(made: Estimates, results: Results, arm: str) -> int:
    """Add the mirror image: the raw model with the adapter, its villain pushed to where the arm's SFT moved it, at the layer
    that lowers the marker most, which is returned. `arm.pushed.logprob`, `.beyond_random`, `.share` of the way to the
    SFT'd model's level."""
    raw, name = "A.prebaked", push(arm)
    layer = best_layer(results, raw, name, SOURCE, sign=-1)
    pushed, random = (of(steered(results, raw, name, layer=layer, control=c), SOURCE) for c in (False, True))
    start, end = (of(steered(results, condition, NONE), SOURCE) for condition in (raw, f"{arm}.prebaked"))
    measures.add_mean(made, f"{arm}.pushed.logprob", pushed, "logprob", NATS)
    _combine(made, f"{arm}.pushed.beyond_random", [(1.0, pushed), (-1.0, random)], "logprob")
    add_share(made, f"{arm}.pushed.share", pushed, start, end, "logprob")
    return layer


def add_swap(made: Estimates, results: Results) -> int:
    """Add the control of the method, on the raw model with the adapter: the assistant with villain minus assistant added,
    at its best layer, which is returned. `A.swapped.logprob` of the assistant, `.beyond_random`, `.share` of the
    distance to the villain, `A.swapped.random_share` of the rotated vectors."""
    raw = "A.prebaked"
    layer = best_layer(results, raw, SWAP, ASSISTANT)
    swapped, random = (of(steered(results, raw, SWAP, layer=layer, control=c), ASSISTANT) for c in (False, True))
    start, end = (of(steered(results, raw, NONE), persona) for persona in (ASSISTANT, SOURCE))
    measures.add_mean(made, "A.swapped.logprob", swapped, "logprob", NATS)
    _combine(made, "A.swapped.beyond_random", [(1.0, swapped), (-1.0, random)], "logprob")
    add_share(made, "A.swapped.share", swapped, start, end, "logprob")
    add_share(made, "A.swapped.random_share", random, start, end, "logprob")
    return layer


def _combine(made: Estimates, name: str, parts: list[tuple[float, pd.DataFrame]], column: str) -> None:
    measures.add_combination(made, name, parts, column, NATS)


def add_share(
    made: Estimates, name: str, reached: pd.DataFrame, start: pd.DataFrame, end: pd.DataFrame, column: str
) -> None:
    """Add `name`: (reached - start) / (end - start), a ratio of means; seeds and questions are resampled jointly. Not
    given (None) where start and end do not differ by more than their paired noise: a ratio of noise means nothing."""
    parts = [table.assign(_part=number) for number, table in enumerate((reached, start, end))]
    both = pd.concat(parts, ignore_index=True)
    seeds, clusters = both["seed"].nunique(), len(both[["seed", "question"]].drop_duplicates())
    weights = stats.bootstrap_weights(
        both["seed"].to_numpy(), both["question"].to_numpy(), rng=measures.generator(name)
    )
    values = both[column].to_numpy(dtype=float)
    members = [(both["_part"] == number).to_numpy() for number in range(3)]
    whole = [float(values[m].mean()) for m in members]
    a, b, c = ((weights[:, m] @ values[m]) / weights[:, m].sum(1) for m in members)
    unit = "proportion of the distance"
    tail = (1 - stats.CONFIDENCE) / 2
    low, high = np.quantile(c - b, [tail, 1 - tail])
    if low <= 0 <= high or not np.isfinite(values).all():
        made.named[name] = Estimate(None, None, None, 0, clusters, seeds, len(both), unit)
        return
    low, high = np.quantile((a - b) / (c - b), [tail, 1 - tail])
    value = (whole[0] - whole[1]) / (whole[2] - whole[1])
    made.named[name] = Estimate(value, float(low), float(high), len(both), clusters, seeds, 0, unit)


def upright(table: pd.DataFrame) -> pd.DataFrame:
    """A table with one row per condition turned: one row per measure, one column per condition, for many measures."""
    return table.set_index("condition").T.rename_axis("measure").rename_axis(None, axis=1).reset_index()


# -------------------------------------------------------------------------------------------------------------- gates


def gates(made: Estimates, results: Results, arms: Sequence[str], limits: Values) -> list[Gate]:
    """What must hold before a null means anything: the marker was lost (`lost.<arm>.restored`), a vector at one layer can
    carry a persona at all (`carries.steering`), the probe reads personas where they are known to be (`probed.raw`), and
    the adapter answers the villain's direction more than 97.5 % of random ones (`reads.adapter`). `limits` names their
    thresholds."""
    first = arms[0]
    carried = [made[f"A.swapped.{name}"].value for name in ("share", "random_share")]
    beyond = None if carried[0] is None or carried[1] is None else carried[0] - carried[1]
    response = made[f"{first}.answer.response_persona"].value
    ratio = None if response is None else response / chance_bounds(results, first, "answer", "response")[1]
    found = [
        Gate(f"lost.{arm}.restored", "SFT cost the villain's marker, nats", made[f"{arm}.lost.logprob"].value, "at least",
             limits.lost)
        for arm in arms
    ]  # fmt: skip
    return [
        *found,
        Gate("carries.steering", "a vector makes the raw assistant a villain, share beyond random", beyond, "at least",
             limits.carries),
        Gate("probed.raw", "a probe names the raw model's personas, share above shuffled labels",
             made[f"{first}.answer.probe_margin"].value, "at least", limits.probed),
        Gate("reads.adapter", "the adapter's response to the villain over the top of random ones", ratio, "at least",
             limits.reads),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- curves


def curve(table: pd.DataFrame, column: str, *, binary: bool = False) -> pd.DataFrame:
    """One row per layer with value, low, high: the mean over seeds and questions with its bootstrap interval, the
    same resamples for all layers. Rows of one seed, question and layer are averaged first. `binary`: at 0 and 1 the
    exact bound stands in for the bootstrap's zero width. A layer with a missing value has none."""
    wide = per_question(table, column, "layer").pivot(index=["seed", "question"], columns="layer", values=column)
    if not len(wide):
        return pd.DataFrame(columns=["layer", "value", "low", "high"])
    keys = wide.index.to_frame(index=False)
    weights = stats.bootstrap_weights(
        keys["seed"].to_numpy(), keys["question"].to_numpy(), rng=measures.generator(column)
    )
    draws = (weights @ wide.to_numpy()) / weights.sum(axis=1, keepdims=True)
    tail = (1 - stats.CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    made = pd.DataFrame({"layer": wide.columns, "value": wide.mean(skipna=False).to_numpy(), "low": low, "high": high})
    if binary:
        for end in (0.0, 1.0):
            exact = stats.clopper_pearson(int(end) * len(wide), len(wide))
            made.loc[made["value"] == end, ["low", "high"]] = exact
    return made


def state_curves(results: Results, arms: Sequence[str], position: str) -> pd.DataFrame:
    """All lines of the figure of states: arm, series, layer, value, low, high."""
    made = []
    for arm in arms:
        for name, columns, prefix in (
            ("shift", ("shift", "shift_others", "own_shift"), ""),
            ("probe", PROBES, "probe_"),
            ("reading", ("kept", "kept_any"), ""),
        ):
            table = results[name]
            table = table[(table["condition"] == arm) & (table["position"] == position) & (table["layer"] > ALL_LAYERS)]
            for column in columns:
                line = curve(table, column, binary=name == "probe")
                made.append(line.assign(arm=arm, series=f"{prefix}{column}"))
    return pd.concat(made, ignore_index=True)


def steering_curves(results: Results, arms: Sequence[str]) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """All lines of the figure of steering (panel, series, layer, value, low, high) and its horizontal references by
    panel and label."""
    raw = "A.prebaked"
    asked = [("control", raw, SWAP, ASSISTANT, SWAP)]
    for arm in arms:
        asked += [(arm, f"{arm}.prebaked", RESTORE, SOURCE, RESTORE), (arm, raw, push(arm), SOURCE, "push")]
    made = []
    for panel, condition, addition, persona, series in asked:
        for control in (False, True):
            line = curve(of(steered(results, condition, addition, control=control), persona), "logprob")
            made.append(line.assign(panel=panel, series=f"{series} random" if control else series))

    def level(condition: str, persona: str) -> float:
        return float(of(steered(results, condition, NONE), persona)["logprob"].mean())

    levels = {"control": {"villain": level(raw, SOURCE), "assistant": level(raw, ASSISTANT)}}
    for arm in arms:
        levels[arm] = {"raw": level(raw, SOURCE), "SFT'd": level(f"{arm}.prebaked", SOURCE)}
    return pd.concat(made, ignore_index=True), levels
