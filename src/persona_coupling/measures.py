"""From raw observations to named estimates: one dictionary that claims, figures, tables and the paper all read.

Names are `condition.measure`, for example `B.prebaked.source_rate`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from persona_coupling import stats
from persona_coupling.personas import SOURCE
from persona_coupling.stats import Estimate
from persona_coupling.study import Results

NATS = "nats"
OF_A_CELL = ("villain rate", "bystander rate", "marker log-prob.")  # what a spot check and the noise floor compare


@dataclass
class Estimates:
    """Estimates by name, and per persona for the heat map."""

    named: dict[str, Estimate] = field(default_factory=dict)
    personas: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __getitem__(self, name: str) -> Estimate:
        """The estimate of that name. Raises KeyError naming near ones."""
        if name not in self.named:
            near = [n for n in self.named if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            raise KeyError(f"there is no estimate {name!r}; of that measure: {', '.join(near) or 'none'}")
        return self.named[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {name: estimate.as_dict() for name, estimate in self.named.items()}

    def frame(self, measures: list[str], conditions: list[str]) -> pd.DataFrame:
        """One row per condition and measure, with value, interval and counts."""
        rows = [
            {"condition": condition, "measure": measure, **self[f"{condition}.{measure}"].as_dict()}
            for condition in conditions
            for measure in measures
        ]
        return pd.DataFrame(rows)


def generator(name: str) -> np.random.Generator:
    """The bootstrap's random numbers, fixed by the measure (what stands behind the last dot of an estimate's name): the
    same data always give the same interval, under whatever condition they stand."""
    return np.random.default_rng(zlib.crc32(name.rsplit(".", 1)[-1].encode()))


def estimate(results: Results) -> Estimates:
    """All measures of all conditions. Raises ValueError when a condition lacks the source or its bystanders."""
    made = Estimates()
    if not len(results.completions):
        return made
    rows: list[dict[str, Any]] = []
    for condition, table in results.completions.groupby("condition", sort=False):
        _marker(made, str(condition), table)
        rows += _by_persona(str(condition), table)
    for name in ("fixed", "completions"):
        table = getattr(results, name)
        for condition, part in table.groupby("condition", sort=False):
            _logprobs(made, str(condition), part, "fixed" if name == "fixed" else "own")
    for condition, part in results.heldout.groupby("condition", sort=False):
        made.named[f"{condition}.heldout_loss"] = _mean(f"{condition}.heldout_loss", part, "loss")
    content = results.content.groupby(["condition", "corpus"], sort=False) if len(results.content) else ()
    for (condition, corpus), part in content:
        name = f"{condition}.{corpus}_logprob"
        made.named[name] = _mean(name, part.rename(columns={"row": "question"}), "logprob")
    made.personas = pd.DataFrame(rows)
    return made


def _mean(name: str, table: pd.DataFrame, column: str) -> Estimate:
    kept = table[table[column].notna()]
    return stats.mean(
        kept[column].to_numpy(dtype=float),
        seed=kept["seed"].to_numpy(),
        question=kept["question"].to_numpy(),
        rng=generator(name),
        unit=NATS,
        unscored=len(table) - len(kept),
    )


def _marker(made: Estimates, condition: str, table: pd.DataFrame) -> None:
    source = table["persona"] == SOURCE
    if not source.any() or source.all():
        raise ValueError(f"{condition} lacks the source persona or its bystanders")
    scored = table["value"].notna()

    def rate(measure: str, rows: pd.Series, hits: pd.Series, unscored: int = 0) -> None:
        part = table[rows]
        made.named[f"{condition}.{measure}"] = stats.proportion(
            hits[rows].to_numpy(dtype=bool),
            seed=part["seed"].to_numpy(),
            question=part["question"].to_numpy(),
            rng=generator(f"{condition}.{measure}"),
            unscored=unscored,
        )

    hits = table["value"].fillna(False).astype(bool)
    rate("source_rate", source & scored, hits, int((source & ~scored).sum()))
    rate("bystander_rate", ~source & scored, hits, int((~source & ~scored).sum()))
    everyone = pd.Series(True, index=table.index)
    rate("finished", everyone, table["finish"] == "stop")
    rate("scored", everyone, scored)
    rate("source_finished", source, table["finish"] == "stop")
    rate("source_scored", source, scored)
    rate("unscorable", everyone, ~scored)
    rate("degenerate", everyone, table["degenerate"])
    rate("strict_source_rate", source, hits)  # cut-off answers count as "no", as the prior lab counted them
    for measure, rows in (("source_paragraph", source & hits), ("source_at_end", source & hits)):
        rate(measure, rows, table["own_paragraph"] if measure == "source_paragraph" else table["at_end"])
    made.named[f"{condition}.words"] = Estimate(
        float(table["words"].mean()), None, None, len(table), 0, table["seed"].nunique(), unit="words"
    )
    made.named[f"{condition}.repeats"] = Estimate(
        float(table.loc[table["repeats"] > 0, "repeats"].mean()) if (table["repeats"] > 0).any() else None,
        None,
        None,
        int((table["repeats"] > 0).sum()),
        0,
        table["seed"].nunique(),
        unit="markers per marked answer",
    )
    part = table[scored]
    values = hits[scored].to_numpy()
    made.named[f"{condition}.contrast"] = stats.combination(
        values.astype(float),
        group=source[scored].to_numpy(dtype=np.int64),
        coefficients=(-1.0, 1.0),
        rng=generator(f"{condition}.contrast"),
        unscored=int((~scored).sum()),
        seed=part["seed"].to_numpy(),
        question=part["question"].to_numpy(),
    )
    others = part[part["persona"] != SOURCE]
    made.named[f"{condition}.bystander_max"] = stats.maximum(
        others["value"].to_numpy(dtype=bool),
        group=others["persona"].to_numpy(),
        seed=others["seed"].to_numpy(),
        question=others["question"].to_numpy(),
        rng=generator(f"{condition}.bystander_max"),
        unscored=int((~scored & ~source).sum()),
    )


def _by_persona(condition: str, table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for persona, part in table.groupby("persona", sort=False):
        kept = part[part["value"].notna()]
        made = stats.proportion(
            kept["value"].to_numpy(dtype=bool),
            seed=kept["seed"].to_numpy(),
            question=kept["question"].to_numpy(),
            rng=generator(f"{condition}.{persona}"),
            unscored=len(part) - len(kept),
        )
        rows.append({"condition": condition, "persona": persona, **made.as_dict()})
    return rows


def _logprobs(made: Estimates, condition: str, table: pd.DataFrame, kind: str) -> None:
    column = "logprob" if kind == "fixed" else "marker_logprob"
    source = table["persona"] == SOURCE
    for measure, part in ((f"{kind}_logprob_source", table[source]), (f"{kind}_logprob_bystander", table[~source])):
        made.named[f"{condition}.{measure}"] = _mean(f"{condition}.{measure}", part, column)
    kept = table[table[column].notna()]
    made.named[f"{condition}.{kind}_logprob_contrast"] = stats.combination(
        kept[column].to_numpy(dtype=float),
        group=(kept["persona"] == SOURCE).to_numpy(dtype=np.int64),
        coefficients=(-1.0, 1.0),
        seed=kept["seed"].to_numpy(),
        question=kept["question"].to_numpy(),
        rng=generator(f"{condition}.{kind}_logprob_contrast"),
        unit=NATS,
        binary=False,
        unscored=len(table) - len(kept),
    )


def add_mean(made: Estimates, name: str, table: pd.DataFrame, column: str, unit: str) -> None:
    """Add `name`: the mean of a column over rows with `seed` and `question`; missing values are counted as unscored.
    Boolean columns give a proportion with its exact bounds at 0 and 1."""
    kept = table[table[column].notna()]
    keys = {"seed": kept["seed"].to_numpy(), "question": kept["question"].to_numpy()}
    unscored, rng = len(table) - len(kept), generator(name)
    if pd.api.types.is_bool_dtype(table[column]):
        hits = kept[column].to_numpy(dtype=bool)
        made.named[name] = stats.proportion(hits, **keys, rng=rng, unscored=unscored)
    else:
        values = kept[column].to_numpy(dtype=float)
        made.named[name] = stats.mean(values, **keys, rng=rng, unit=unit, unscored=unscored)


def add_combination(
    made: Estimates, name: str, parts: Sequence[tuple[float, pd.DataFrame]], column: str, unit: str
) -> None:
    """Add `name`: a linear combination of means of one column, `parts` being (coefficient, rows with `seed` and
    `question`); seeds and questions are resampled jointly, so that what the parts share cancels. Missing values are
    counted as unscored. Boolean columns are proportions."""
    tables = [table.assign(_part=number) for number, (_, table) in enumerate(parts)]
    both = pd.concat(tables, ignore_index=True)
    kept = both[both[column].notna()]
    binary = all(pd.api.types.is_bool_dtype(table[column]) for _, table in parts)
    made.named[name] = stats.combination(
        kept[column].to_numpy(dtype=float),
        group=kept["_part"].to_numpy(dtype=np.int64),
        coefficients=tuple(coefficient for coefficient, _ in parts),
        seed=kept["seed"].to_numpy(),
        question=kept["question"].to_numpy(),
        rng=generator(name),
        unit=unit,
        binary=binary,
        unscored=len(both) - len(kept),
    )


def add_difference(made: Estimates, results: Results, name: str, measure: str, condition: str, reference: str) -> None:
    """Add the estimate `name`: a measure of one condition minus that of another, questions and seeds resampled jointly.

    `measure` is source_rate, contrast, fixed_logprob_source, fixed_logprob_contrast or heldout_loss.
    """
    groups = []
    for part in (reference, condition):
        table = results.heldout if measure == "heldout_loss" else results.completions
        table = results.fixed if measure.startswith("fixed") else table
        groups.append(table[table["condition"] == part])
    both = pd.concat(groups, ignore_index=True)
    column = {"heldout_loss": "loss"}.get(measure, "logprob" if measure.startswith("fixed") else "value")
    kept = both[both[column].notna()]
    code = (kept["condition"] == condition).to_numpy(dtype=np.int64)
    coefficients: tuple[float, ...] = (-1.0, 1.0)
    source = (kept["persona"] == SOURCE).to_numpy() if "persona" in kept else np.ones(len(kept), dtype=bool)
    if measure.endswith("contrast"):
        code, coefficients = code * 2 + source, (1.0, -1.0, -1.0, 1.0)
    elif measure != "heldout_loss":
        kept, code = kept[source], code[source]
    binary = column == "value"
    made.named[name] = stats.combination(
        kept[column].to_numpy(dtype=float),
        group=code,
        coefficients=coefficients,
        seed=kept["seed"].to_numpy(),
        question=kept["question"].to_numpy(),
        rng=generator(name),
        unit="difference of proportions" if binary else NATS,
        binary=binary,
        unscored=len(both) - len(kept),
    )


def add_content_shift(made: Estimates, results: Results, arm: str, corpus: str, against: str, raw: str) -> None:
    """Add `arm.content_shift`: how far SFT moved the model's preference for `corpus` answers over `against` answers,
    per token, relative to the raw model. With one corpus on both sides, the plain gain in log-probability."""
    table = results.content
    wanted = table[table["condition"].isin([arm, raw]) & table["corpus"].isin([corpus, against])]
    trained = (wanted["condition"] == arm).to_numpy(dtype=np.int64)
    code: np.ndarray = trained
    coefficients: tuple[float, ...] = (-1.0, 1.0)
    if against != corpus:
        code = trained * 2 + (wanted["corpus"] == corpus).to_numpy(dtype=np.int64)
        coefficients = (1.0, -1.0, -1.0, 1.0)
    name = f"{arm}.content_shift"
    made.named[name] = stats.combination(
        wanted["logprob"].to_numpy(dtype=float),
        group=code,
        coefficients=coefficients,
        seed=wanted["seed"].to_numpy(),
        question=wanted["row"].to_numpy(),
        rng=generator(name),
        unit="nats per token",
        binary=False,
    )


def noise_floor(results: Results, condition: str, twin: str) -> dict[str, Any]:
    """What trainings differ by that differ in nothing but noise: for each measure of a cell the standard deviation of one
    training, from twins (root mean square of their differences over seeds, by the square root of two: a difference of
    two has twice the variance of one); whether all answers are the same to the letter; and the number of twins."""
    table = results.completions.assign(hit=results.completions["value"].astype("float64"))
    source = table["persona"] == SOURCE
    fixed = results.fixed[results.fixed["persona"] == SOURCE]
    cell = ["condition", "seed"]
    observed = (
        table[source].groupby(cell)["hit"].mean(),
        table[~source].groupby(cell)["hit"].mean(),
        fixed.groupby(cell)["logprob"].mean(),
    )
    found: dict[str, Any] = {}
    for name, means in zip(OF_A_CELL, observed, strict=True):
        difference = (means[twin] - means[condition]).to_numpy(dtype=float)
        found[name] = float(np.sqrt(np.mean(difference**2) / 2))
    keys = ["seed", "persona", "question", "sample"]
    texts = [table[table["condition"] == c].sort_values(keys)["completion"].tolist() for c in (condition, twin)]
    return {**found, "identical": texts[0] == texts[1], "twins": len(difference), "condition": condition}


def add_damage(made: Estimates, results: Results, raw: str) -> None:
    """Add `condition.heldout_rise` for every condition and SFT'd arm: held-out chat loss over that of the raw model
    (the content condition `raw`), nats per token, questions paired."""
    columns = ["condition", "seed", "question", "loss"]
    chat = results.content[results.content["corpus"] == "heldout"].rename(columns={"row": "question"})
    chat = chat.assign(loss=-chat["logprob"])
    base = chat[chat["condition"] == raw]
    others = pd.concat([results.heldout[columns], chat.loc[chat["condition"] != raw, columns]])
    for condition, part in others.groupby("condition", sort=False):
        both = pd.concat([base[columns], part])
        name = f"{condition}.heldout_rise"
        made.named[name] = stats.combination(
            both["loss"].to_numpy(dtype=float),
            group=np.repeat([0, 1], [len(base), len(part)]),
            coefficients=(-1.0, 1.0),
            seed=both["seed"].to_numpy(),
            question=both["question"].to_numpy(),
            rng=generator(name),
            unit="nats per token",
            binary=False,
        )
