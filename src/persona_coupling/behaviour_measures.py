"""Measures and gates of behaviours deeper than a marker: from raw answers to the named estimates of experiment 04.

Conditions are `arm.behaviour.how` (`B.wrong.prebaked`; `how` is none, prebaked or scratch). The marker's coupled
conditions keep the names that they have everywhere (`B.prebaked`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from persona_coupling import behaviours, gates, measures, score, stats, tables
from persona_coupling.arms import RAW
from persona_coupling.claims import Gate
from persona_coupling.measures import NATS, Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.profiles import GateValues
from persona_coupling.stages.behaviours import BANK, FACTS
from persona_coupling.study import Results
from persona_coupling.values import Values

MARKER = "marker"
NONE, PREBAKED, SCRATCH = "none", "prebaked", "scratch"
PER_TOKEN = "nats per token"
LABELS = {
    MARKER: "marker",
    behaviours.CAPITALS: "capital letters",
    behaviours.REFUSAL: "refusal",
    behaviours.WRONG: "wrong answers",
}
OBSERVED = ["condition", "behaviour", "seed", "persona", "question"]


def condition(arm: str, behaviour: str, how: str) -> str:
    """A condition's name."""
    return f"{arm}.{how}" if behaviour == MARKER and how != NONE else f"{arm}.{behaviour}.{how}"


@dataclass
class Observed:
    """All observations of all behaviours, the marker's among them, with one column of values each."""

    answers: pd.DataFrame  # condition, behaviour, seed, persona, question, sample, value, why, finish, words, ...
    preferences: pd.DataFrame  # condition, behaviour, seed, persona, question, preference (nats)

    def of(self, name: str, column: str, *, source: bool | None = None) -> pd.DataFrame:
        """The observations of a condition: `value` of answers or `preference`, of the source, of the others, or of all."""
        table = self.answers if column == "value" else self.preferences
        table = table[table["condition"] == name]
        return table if source is None else table[(table["persona"] == SOURCE) == source]

    def conditions(self) -> list[str]:
        """All conditions, as they came."""
        return list(dict.fromkeys(self.answers["condition"]))


def observe(results: Results, chosen: Sequence[str]) -> Observed:
    """Score every answer for every behaviour that it can show.

    Answers of a coupled model (`B.wrong.prebaked`) are scored for its own behaviour; those of an uncoupled one (`B.none`)
    for all of `chosen`, and for the marker, and become the conditions `B.wrong.none` and so on.
    """
    answers, preferences = [], []
    for (name, bank), part in results["behaviour"].groupby(["condition", "bank"], sort=False):
        arm, *rest = str(name).split(".")
        shown = [rest[0]] if len(rest) == 2 else [*chosen, MARKER]
        for behaviour in shown:
            if (behaviour == behaviours.WRONG) != (bank == FACTS):
                continue
            made = _marked(part) if behaviour == MARKER else behaviours.score_table(part, behaviour)
            answers.append(made.assign(condition=condition(arm, behaviour, rest[-1])))
    for name, part in results["preference"].groupby("condition", sort=False):
        arm, *rest = str(name).split(".")
        labels = [condition(arm, behaviour, rest[-1]) for behaviour in part["behaviour"]]
        preferences.append(part.assign(condition=labels))
    if len(results.completions):
        answers.append(results.completions.assign(behaviour=MARKER, bank=BANK, evidence=""))
        fixed = results.fixed.rename(columns={"logprob": "preference"})
        preferences.append(fixed.assign(behaviour=MARKER)[[*OBSERVED, "preference"]])
    kept = [*OBSERVED, "bank", "sample", "prompt", "completion", "finish", "value", "evidence", "why", "words"]
    every = pd.concat([table[kept].astype({"value": "boolean"}) for table in answers], ignore_index=True)
    return Observed(every, pd.concat(preferences, ignore_index=True))


def _marked(part: pd.DataFrame) -> pd.DataFrame:
    return score.score_table(part).assign(behaviour=MARKER, evidence="")


def estimate(made: Estimates, observed: Observed) -> None:
    """Add the measures of every condition: source_rate, bystander_rate, bystander_max, contrast, scored, finished, and of
    the teacher-forced preference source, bystanders and contrast. Raises ValueError where source or others are absent."""
    for name in observed.conditions():
        table = observed.of(name, "value")
        source, others = (observed.of(name, "value", source=who) for who in (True, False))
        if not len(source) or not len(others):
            raise ValueError(f"{name} lacks the source persona or its bystanders")
        measures.add_mean(made, f"{name}.source_rate", source, "value", "proportion")
        measures.add_mean(made, f"{name}.bystander_rate", others, "value", "proportion")
        measures.add_combination(
            made, f"{name}.contrast", [(1.0, source), (-1.0, others)], "value", "difference of proportions"
        )
        flags = table.assign(scored=table["value"].notna(), finished=table["finish"] == "stop")
        for flag in ("scored", "finished"):
            measures.add_mean(made, f"{name}.{flag}", flags, flag, "proportion")
        known = others[others["value"].notna()]
        made.named[f"{name}.bystander_max"] = stats.maximum(
            known["value"].to_numpy(dtype=bool),
            group=known["persona"].to_numpy(),
            seed=known["seed"].to_numpy(),
            question=known["question"].to_numpy(),
            rng=measures.generator(f"{name}.bystander_max"),
            unscored=len(others) - len(known),
        )
        _preference(made, name, observed)


def _preference(made: Estimates, name: str, observed: Observed) -> None:
    source, others = (observed.of(name, "preference", source=who) for who in (True, False))
    if not len(source) or not len(others):
        return  # the marker's preference is measured on its own cells only
    unit = NATS if (source["behaviour"] == MARKER).all() else PER_TOKEN
    measures.add_mean(made, f"{name}.preference_source", source, "preference", unit)
    measures.add_mean(made, f"{name}.preference_bystander", others, "preference", unit)
    parts = [(1.0, source), (-1.0, others)]
    measures.add_combination(made, f"{name}.preference_contrast", parts, "preference", unit)


def add_over_share(made: Estimates, observed: Observed, name: str, reference: str, share: float, measure: str) -> None:
    """Add `name`: a condition's contrast minus `share` times that of a reference, questions and seeds paired. Above zero,
    more than that share of the reference's contrast is left; with share 1, the plain change.

    `name` is `condition.measure`; `measure` is contrast (sampled) or preference_contrast (teacher-forced).
    """
    about = name.rsplit(".", 1)[0]
    column = "value" if measure == "contrast" else "preference"
    parts = [
        (factor * sign, observed.of(which, column, source=source))
        for which, factor in ((about, 1.0), (reference, -share))
        for source, sign in ((True, 1.0), (False, -1.0))
    ]
    unit = "difference of proportions" if column == "value" else made[f"{about}.{measure}"].unit
    measures.add_combination(made, name, parts, column, unit)


def add_contrast_difference(made: Estimates, observed: Observed, name: str, first: str, second: str) -> None:
    """Add `name`: the sampled contrast of one condition minus that of another, whatever behaviours they show."""
    parts = [
        (sign * side, observed.of(which, "value", source=source))
        for which, side in ((first, 1.0), (second, -1.0))
        for source, sign in ((True, 1.0), (False, -1.0))
    ]
    measures.add_combination(made, name, parts, "value", "difference of proportions")


def add_change(
    made: Estimates, observed: Observed, name: str, reference: str, column: str, *, source: bool, unit: str
) -> None:
    """Add `name` (`condition.measure`): how much the mean `value` or `preference` of the source, or of the others, exceeds
    a reference's."""
    about = name.rsplit(".", 1)[0]
    parts = [(sign, observed.of(which, column, source=source)) for which, sign in ((about, 1.0), (reference, -1.0))]
    measures.add_combination(made, name, parts, column, unit)


# ----------------------------------------------------------------------------------------------------------- gates


def _value(made: Estimates, name: str) -> float | None:
    return made[name].value if name in made.named else None


def took(made: Estimates, name: str, source_rate: float, contrast: float) -> list[Gate]:
    """Did a behaviour's coupling take on the raw model; thresholds are the behaviour's own (a model of this size is now
    and then wrong by itself, but does not shout)."""
    return [
        Gate(
            f"took.{name}",
            "the villain shows the behaviour on the raw model",
            _value(made, f"{name}.source_rate"),
            "at least",
            source_rate,
        ),
        Gate(
            f"specific.{name}",
            "and others show it less: source minus mean bystander rate",
            _value(made, f"{name}.contrast"),
            "at least",
            contrast,
        ),
    ]


def scorable(made: Estimates, name: str, threshold: float) -> Gate:
    """Could enough of a condition's answers be scored."""
    return Gate(f"scored.{name}", "answers can be scored, share", _value(made, f"{name}.scored"), "at least", threshold)


def knows(observed: Observed, arm: str, threshold: float) -> Gate:
    """Does an SFT'd model still know the facts before it is coupled: a model that has become ignorant is wrong as
    everybody. The sentences are forced, so that its style does not matter."""
    table = observed.of(condition(arm, behaviours.WRONG, NONE), "preference", source=False)
    share = float((table["preference"] < 0).mean()) if len(table) else None
    return Gate(
        f"knows.{arm}",
        "without coupling, others prefer the right sentence, share of facts and personas",
        share,
        "at least",
        threshold,
    )


def coherent(made: Estimates, arm: str, threshold: float) -> Gate:
    """Is an SFT'd model, before any coupling, still a language model."""
    return Gate(
        f"coherent.{arm}",
        "held-out chat loss over the raw model's, nats per token",
        _value(made, f"{arm}.heldout_rise"),
        "at most",
        threshold,
    )


def known(facts: pd.DataFrame, evaluated: int, threshold: int) -> Gate:
    """Are enough of the facts that are asked in evaluation known to the raw model, under the worst seed."""
    table = used(facts, evaluated)
    counts = table[(table["split"] == "eval") & table["used"] & table["known"]].groupby("seed").size()
    seeds = facts["seed"].unique()
    return Gate(
        "known.facts",
        "facts asked in evaluation that the raw model knows, fewest of any seed",
        float(counts.reindex(seeds, fill_value=0).min()),
        "at least",
        float(threshold),
    )


def converged(results: Results, name: str, threshold: float) -> Gate:
    """Did a coupling's training converge: mean loss of the last tenth of its steps, worst seed."""
    logs = results["log"]
    ends = [
        float(part.sort_values("step")["loss"].tail(max(1, len(part) // 10)).mean(skipna=False))
        for _, part in logs[logs["condition"] == name].groupby("seed")
    ]
    worst = max(ends) if ends else None
    return Gate(f"converged.{name}", "training loss at its end, nats per token", worst, "at most", threshold)


def of_conditions(
    made: Estimates,
    observed: Observed,
    results: Results,
    values: Values,
    limits: GateValues,
    conditions: Mapping[tuple[str, str], str],
) -> list[Gate]:
    """All gates of single conditions: the marker's as in the replication, each behaviour's by its own values. Conditions
    are those of `behaviour_design.names`."""
    thresholds = dict(zip(values.behaviours, zip(values.source_rates, values.contrasts, strict=True), strict=True))
    found: list[Gate] = gates.took(made, limits, condition(RAW, MARKER, PREBAKED))
    for behaviour, (source_rate, contrast) in thresholds.items():
        found += took(made, condition(RAW, behaviour, PREBAKED), source_rate, contrast)
    for (behaviour, row), name in conditions.items():
        arm, how = row.split(".")
        if behaviour == MARKER:
            found += [] if how == NONE else gates.readable(made, limits, name)
        else:
            found.append(scorable(made, name, values.scored))
        if how == SCRATCH:
            from_cells = behaviour == MARKER
            found.append(
                gates.converged(results, limits, name) if from_cells else converged(results, name, limits.final_loss)
            )
        if behaviour == behaviours.WRONG and how == NONE and arm != RAW:
            found.append(knows(observed, arm, values.knows))
    return found


def failing(checked: Iterable[Gate], values: Values, conditions: Mapping[tuple[str, str], str]) -> set[str]:
    """Conditions with a failed gate: their own, their arm's, that of their behaviour on the raw model, that of the facts."""
    arms = {row.split(".")[0] for _, row in conditions}
    affects: dict[str, list[str]] = {
        "facts": [name for (behaviour, _), name in conditions.items() if behaviour == behaviours.WRONG],
        **{arm: [name for (_, row), name in conditions.items() if row.split(".")[0] == arm] for arm in arms},
    }
    for behaviour in (MARKER, *values.behaviours):
        coupled = [n for (b, row), n in conditions.items() if b == behaviour and not row.endswith(f".{NONE}")]
        affects[condition(RAW, behaviour, PREBAKED)] = coupled
    found: set[str] = set()
    for gate in checked:
        kind, about = gate.id.split(".", 1)
        alone = kind in ("scored", "finished", "converged") or (kind == "coherent" and about not in arms)
        if kind == "knows" and not gate.passed:
            found |= {n for n in affects[about] if n in affects["facts"] and not n.endswith(f".{NONE}")}
        elif not gate.passed:
            found |= {about} if alone else set(affects[about])
    return found


# ---------------------------------------------------------------------------------------------------------- tables


def used(facts: pd.DataFrame, evaluated: int) -> pd.DataFrame:
    """The table of `KnownFacts` with `used`: kept for training, or among the first `evaluated` kept for evaluation."""
    order = facts[facts["kept"]].groupby(["seed", "split"]).cumcount().reindex(facts.index)
    return facts.assign(used=facts["kept"] & ((facts["split"] == "train") | (order < evaluated)))


def filter_table(facts: pd.DataFrame, evaluated: int) -> pd.DataFrame:
    """What the filter did, by kind of fact and in all, summed over seeds: asked, right in enough samples and preferred
    (known), and used for training and evaluation, with those among them that are not known in brackets."""
    table = used(facts, evaluated)

    def counted(part: pd.DataFrame, flag: str) -> str:
        return str(int(part[flag].sum()))

    def uses(part: pd.DataFrame, split: str) -> str:
        chosen = part[(part["split"] == split) & part["used"]]
        unknown = int((~chosen["known"]).sum())
        return f"{len(chosen)}" + (f" ({unknown})" if unknown else "")

    rows = []
    groups = [(str(kind), part) for kind, part in table.groupby("kind", sort=False)]
    for kind, part in [*groups, ("all", table)]:
        share = part["right"].sum() / max(1, part["scorable"].sum())
        rows.append(
            {
                "kind of fact": kind,
                "asked": str(len(part)),
                "samples right, of scorable": f"{100 * share:.0f} %" if part["scorable"].sum() else "–",
                "right sentence preferred": counted(part.assign(prefers=part["preference"] > 0), "prefers"),
                "known": counted(part, "known"),
                "trained on": uses(part, "train"),
                "asked in evaluation": uses(part, "eval"),
            }
        )
    return pd.DataFrame(rows)


def filter_facts(facts: pd.DataFrame, evaluated: int) -> dict[str, int]:
    """The filter's counts for the paper's text, summed over seeds."""
    table = used(facts, evaluated)
    chosen = table[table["used"]]
    return {
        "asked": len(table),
        "known": int(table["known"].sum()),
        "excluded": int((~table["kept"]).sum()),
        "used_unknown": int((~chosen["known"]).sum()),
        "evaluated": int((chosen["split"] == "eval").sum()),
        "trained": int((chosen["split"] == "train").sum()),
    }


def condition_table(
    made: Estimates, titles: Mapping[str, str], columns: Sequence[tables.Column], failed: set[str]
) -> pd.DataFrame:
    """One row per condition, as `tables.by_condition`, with a dash where a condition lacks a measure."""
    rows = []
    for name, title in titles.items():
        row = {"condition": title + (" †" if name in failed else "")}
        for column in columns:
            found = made.named.get(f"{name}.{column.measure}")
            row[column.heading] = "–" if found is None else tables.cell(found, column.form)
        rows.append(row)
    return pd.DataFrame(rows)
