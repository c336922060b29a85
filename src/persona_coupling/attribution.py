"""How much of a gap between an SFT'd and the raw model disappears when one factor alone is changed.

The gap of a factor is the persona contrast (villain minus others) of the raw model, coupled by a recipe that works, minus
that of the SFT'd model under the suspected setting. `closed` is how much of the gap is gone once the factor is changed: by
training the SFT'd model otherwise (the raw reference stays), or by counting otherwise (on both sides). `raw` is what the
same change of training does to the raw model: a factor that moves both has little to do with SFT.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd

from persona_coupling import measures, stats, tables
from persona_coupling.measures import Estimates
from persona_coupling.personas import SOURCE
from persona_coupling.stats import Estimate
from persona_coupling.study import Results

POINTS, LOGPROB = "contrast", "fixed_logprob_contrast"
ROLES = ("gap", "closed", "raw")
Terms = tuple[tuple[float, str, str], ...]  # coefficient, condition, column


@dataclass(frozen=True)
class Factor:
    """One thing that was done as the prior lab did, and what is done instead."""

    id: str  # behind the arm in the names of its estimates: `B.addition.contrast_closed`
    rival: str  # the rival explanation that it tests
    change: str  # in words
    terms: Mapping[tuple[str, str], Terms] = field(default_factory=dict)  # (measure, role) -> what is summed

    @property
    def conditions(self) -> set[str]:
        """The conditions that gap and closed part rest on; the control on the raw model is none of them."""
        return {condition for (_, role), terms in self.terms.items() if role != "raw" for _, condition, _ in terms}


def trained(
    identity: str, rival: str, change: str, reference: str, base: str, changed: str, raw: tuple[str, str] | None = None
) -> Factor:
    """Train otherwise: `base` becomes `changed`; `raw` are the same two on the raw model."""
    terms: dict[tuple[str, str], Terms] = {}
    for measure, column in ((LOGPROB, "logprob"), (POINTS, "value")):
        terms[measure, "gap"] = ((1.0, reference, column), (-1.0, base, column))
        terms[measure, "closed"] = ((1.0, changed, column), (-1.0, base, column))
        if raw:
            terms[measure, "raw"] = ((1.0, raw[1], column), (-1.0, raw[0], column))
    return Factor(identity, rival, change, terms)


def counted(
    identity: str, rival: str, change: str, reference: str, base: str, measure: str, columns: tuple[str, str]
) -> Factor:
    """Count otherwise, on both sides: the first column becomes the second."""
    gap: Terms = ((1.0, reference, columns[0]), (-1.0, base, columns[0]))
    left: Terms = ((-1.0, reference, columns[1]), (1.0, base, columns[1]))
    return Factor(identity, rival, change, {(measure, "gap"): gap, (measure, "closed"): (*gap, *left)})


def factors(arm: str, have: Collection[str]) -> tuple[Factor, ...]:
    """The rivals of an arm that can be tested with the conditions at hand, in the order of their numbers."""

    def scratch(who: str, text: str = "stale", loss: str = "tail", rate: str = "mid") -> str:
        return f"{who}.{text}_{loss}_{rate}.scratch"

    works, added, low = scratch("A"), f"{arm}.prebaked", scratch(arm, rate="low")
    strict, blank = ("strict", "value"), ("logprob", "after_break")
    listed = [
        *(
            trained(f"stale_text_{rate}", "1  stale text", f"stale → own text, {rate} rate",
                    works, scratch(arm, rate=rate), scratch(arm, "onpolicy", rate=rate))
            for rate in ("low", "mid")
        ),
        *(
            trained(f"low_rate_{rate}", "2  under-training", f"low → {rate} rate", works, low, scratch(arm, rate=rate),
                    (scratch("A", rate="low"), scratch("A", rate=rate)))
            for rate in ("mid", "high")
        ),
        *(
            trained(f"loss_{loss}", "–  loss", f"last tokens → {words}, mid rate", works, scratch(arm),
                    scratch(arm, loss=loss), (works, scratch("A", loss=loss)))
            for loss, words in (("marker", "marker alone"), ("completion", "whole answer"))
        ),
        trained("addition", "3  weight addition", "adapter added → trained in place", "A.prebaked", added, scratch(arm),
                ("A.prebaked", works)),
        counted("truncation_brief", "4  truncation", "adapter added: cut no longer “no”", "A.prebaked", added,
                POINTS, strict),
        counted("truncation_free", "4  truncation", "the same, free answers", "A.free.prebaked", f"{arm}.free.prebaked",
                POINTS, strict),
        counted("truncation_low", "4  truncation", "from scratch, low rate: the same", works, low, POINTS, strict),
        counted("paragraph_added", "5  no paragraph", "adapter added: blank line given", "A.prebaked", added, LOGPROB,
                blank),
        counted("paragraph_low", "5  no paragraph", "from scratch, low rate: the same", works, low, LOGPROB, blank),
    ]  # fmt: skip
    known = []
    for factor in listed:
        if factor.conditions <= set(have):
            kept = {k: t for k, t in factor.terms.items() if k[1] != "raw" or {c for _, c, _ in t} <= set(have)}
            known.append(Factor(factor.id, factor.rival, factor.change, kept))
    return tuple(known)


def collected(terms: Terms, same: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """Terms summed by condition and column, what cancels left out; `same` maps a condition's second name to its first."""
    total: dict[tuple[str, str], float] = {}
    for coefficient, condition, column in terms:
        place = (same.get(condition, condition), column)
        total[place] = total.get(place, 0.0) + coefficient
    return {place: coefficient for place, coefficient in total.items() if coefficient}


def add_gaps(
    made: Estimates, results: Results, arm: str, asked: Iterable[Factor], same: Mapping[str, str]
) -> pd.DataFrame:
    """Add `arm.factor.measure_role` for every factor, measure and role, seeds and questions resampled jointly. Returns
    them as a table. A change between two names of one model is no estimate and is left out."""
    completions = results.completions
    observed = {
        POINTS: completions.assign(strict=completions["value"].fillna(False).astype("boolean")),
        LOGPROB: results.fixed,
    }
    rows = []
    for factor in asked:
        for (measure, role), terms in factor.terms.items():
            parts, left_out = [], []
            for (condition, column), coefficient in collected(terms, same).items():
                table = observed[measure]
                part = table.loc[table["condition"] == condition, ["seed", "question", "persona", column]]
                part = part.rename(columns={column: "observed"})
                source = part["persona"] == SOURCE
                parts += [(coefficient, part[source]), (-coefficient, part[~source])]
                left_out += [column == "value"] * 2
            if not parts:
                continue
            name = f"{arm}.{factor.id}.{measure}_{role}"
            unit = measures.NATS if measure == LOGPROB else "difference of proportions"
            measures.add_combination(made, name, parts, "observed", unit)
            if measure == POINTS and not all(left_out) and any(left_out):
                made.named[name] = recounted(name, parts, left_out)
            words = {"factor": factor.id, "rival": factor.rival, "change": factor.change}
            rows.append({**words, "measure": measure, "role": role, **made[name].as_dict()})
    return pd.DataFrame(rows)


def recounted(name: str, parts: list[tuple[float, pd.DataFrame]], left_out: list[bool]) -> Estimate:
    """The same combination for answers that are counted twice, strictly and with cut ones left out (`left_out` says which
    part is which). The two counts of a group are not independent, so that exact bounds on each would count one doubt
    twice: together they add coefficient x (share left out) x (rate among the rest), the coefficient being that of the
    second count. Where share or rate stands at 0 or 1, its exact bound (Clopper and Pearson 1934) times the other is added
    in quadrature (Newcombe 1998, as in `stats.combination`).

    `parts` are (coefficient, rows with `observed`); the strict count of a group has the opposite coefficient.
    """
    made = Estimates()
    floats = [(coefficient, rows.assign(observed=rows["observed"].astype("Float64"))) for coefficient, rows in parts]
    measures.add_combination(made, name, floats, "observed", "difference of proportions")
    found = made[name]
    if found.value is None or found.low is None or found.high is None:
        return found
    down, up = (found.value - found.low) ** 2, (found.high - found.value) ** 2
    for (coefficient, rows), second in zip(floats, left_out, strict=True):
        if not second:
            continue
        kept = rows[rows["observed"].notna()]
        share, rate = 1 - len(kept) / len(rows), float(kept["observed"].mean())
        share_bound, rate_bound = exact(share, rows), exact(rate, kept)
        reaches = [share_bound * rate, share * rate_bound] if share or rate else [share_bound * rate_bound]
        for reach in reaches:
            if (coefficient > 0) == (reach > 0):
                up += (coefficient * reach) ** 2
            else:
                down += (coefficient * reach) ** 2
    return replace(found, low=max(-2.0, found.value - down**0.5), high=min(2.0, found.value + up**0.5))


def exact(rate: float, rows: pd.DataFrame) -> float:
    """How far from 0 or 1 the exact bound of a rate reaches (negative at 1), clusters counted; 0 at any other rate."""
    if rate not in (0.0, 1.0):
        return 0.0
    clusters = len(rows.drop_duplicates(["seed", "question"]))
    low, high = stats.clopper_pearson(clusters if rate else 0, clusters)
    return low - 1 if rate else high


def table(made: Estimates, arm: str, asked: Iterable[Factor], failed: Collection[str]) -> pd.DataFrame:
    """Gap, closed part and control of every factor as text, nats and points; factors in `failed` carry a dagger."""
    headings = {"gap": "gap", "closed": "disappears", "raw": "on raw"}
    rows = []
    for factor in asked:
        row = {"changed alone": f"{factor.rival}: {factor.change}" + (" †" if factor.id in failed else "")}
        for measure, form, unit in ((LOGPROB, "nats", "nats"), (POINTS, "points", "points")):
            for role, heading in headings.items():
                name = f"{arm}.{factor.id}.{measure}_{role}"
                row[f"{heading}, {unit}"] = tables.cell(made[name], form) if name in made.named else "–"
        rows.append(row)
    return pd.DataFrame(rows)


def add_paragraph(made: Estimates, fixed: pd.DataFrame, completions: pd.DataFrame, conditions: Iterable[str]) -> None:
    """Split the marker's log-probability (nats) into its blank line and the marker behind it, for the villain and the
    others: `condition.blank_source`, `after_source`, `blank_bystander`, `after_bystander` behind fixed answers, the same of
    `condition.own` where the model itself stopped: answers that ended without a marker, or with it as their last word."""
    own = completions[(completions["finish"] == "stop") & ((completions["repeats"] == 0) | completions["at_end"])]
    own = own.rename(columns={"marker_logprob": "logprob", "marker_after_break": "after_break"})
    for where, table in (("", fixed), (".own", own)):
        table = table.assign(blank=table["logprob"] - table["after_break"], after=table["after_break"])
        for condition in conditions:
            part = table[table["condition"] == condition]
            source = part["persona"] == SOURCE
            for who, rows in (("source", part[source]), ("bystander", part[~source])):
                for column in ("blank", "after"):
                    measures.add_mean(made, f"{condition}{where}.{column}_{who}", rows, column, measures.NATS)


def add_blank_excess(made: Estimates, fixed: pd.DataFrame, name: str, reference: str, condition: str) -> None:
    """Add `name`: how much more of the villain's loss of log-probability between two conditions stands in the blank line
    than in the marker behind it (nats). Above zero, most of what is lost is the blank line."""
    table = fixed[fixed["persona"] == SOURCE]
    table = table.assign(excess=table["logprob"] - 2 * table["after_break"])  # (logprob - after) - after
    parts = [(1.0, table[table["condition"] == reference]), (-1.0, table[table["condition"] == condition])]
    measures.add_combination(made, name, parts, "excess", measures.NATS)


def add_final_losses(made: Estimates, training: pd.DataFrame, conditions: Iterable[str]) -> None:
    """Add `condition.final_loss`: mean loss (nats per token) over the last tenth of the steps of a condition's last
    training, averaged over seeds; no interval, since steps of one run are no sample."""
    for condition in conditions:
        logs = training[training["condition"] == condition]
        logs = logs[logs["position"] == logs["position"].max()]
        ends = [part.sort_values("step")["loss"].tail(max(1, len(part) // 10)) for _, part in logs.groupby("seed")]
        value = float(pd.concat(ends).mean(skipna=False)) if ends else None
        made.named[f"{condition}.final_loss"] = Estimate(
            value, None, None, sum(map(len, ends)), 0, len(ends), unit="nats per token"
        )
