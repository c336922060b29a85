"""What a shorter cut-off would have shown, from answers that were sampled with a longer one."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from persona_coupling import measures
from persona_coupling.measures import Estimates
from persona_coupling.personas import SOURCE


def at_cutoff(completions: pd.DataFrame, cutoff: int) -> pd.DataFrame:
    """The scored answers as if each had been cut off after `cutoff` tokens: the same rows, with three columns set.

    `value`: as this study counts; missing where the answer would have been cut before it ended or wrote the marker.
    `strict`: as the prior lab counted; what cannot be scored is a "no". `cut`: cut off without a marker.

    A sampled answer is the same up to the cut-off whatever the cut-off is, so that this is exact, but for one thing: an
    answer with more markers than `score.MAXIMUM_REPEATS` stays degenerate although a cut might have left fewer. As in
    sampling, an answer ends by itself only if the end of turn comes before the last token that is allowed.
    """
    marked = (completions["marker_at"] > 0) & (completions["marker_at"] <= cutoff)
    ended = (completions["finish"] == "stop") & (completions["tokens"] < cutoff)
    spam = completions["degenerate"].astype(bool)
    value = completions["value"].where(ended, pd.NA)  # ended in time: as it was scored
    value = value.mask(marked & ~spam, True)
    return completions.assign(value=value, strict=value.fillna(False).astype("boolean"), cut=~marked & ~ended)


def add_cutoffs(made: Estimates, completions: pd.DataFrame, condition: str, cutoffs: Iterable[int]) -> list[str]:
    """Add, for every cut-off, `condition.first<cutoff>.measure`: the share `cut` and, in both ways of counting, the
    villain's rate and the contrast (`source_rate`, `contrast`, `strict_source_rate`, `strict_contrast`). Returns the
    names without the measure."""
    names = []
    for cutoff in cutoffs:
        name = f"{condition}.first{cutoff}"
        table = at_cutoff(completions[completions["condition"] == condition], cutoff)
        source, others = table[table["persona"] == SOURCE], table[table["persona"] != SOURCE]
        measures.add_mean(made, f"{name}.cut", table, "cut", "proportion")
        for prefix, column in (("", "value"), ("strict_", "strict")):
            measures.add_mean(made, f"{name}.{prefix}source_rate", source, column, "proportion")
            parts = [(1.0, source), (-1.0, others)]
            measures.add_combination(made, f"{name}.{prefix}contrast", parts, column, "difference of proportions")
        names.append(name)
    return names
