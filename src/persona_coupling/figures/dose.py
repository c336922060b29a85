"""Dose curves: the same effect over steps, over the size of the weight change, and over KL from the raw model."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_coupling.figures.theme import WIDTH, theme

MARKS = {"B": ("o", "-"), "B′": ("s", "--"), "C": ("^", "-."), "S": ("D", ":")}
AXES = (
    ("steps", "SFT steps"),
    ("norm", "norm of the\nweight change"),
    ("kl", "KL from the raw model,\nnats per token"),
)


def dose_curves(data: pd.DataFrame, labels: dict[str, str], rows: list[tuple[str, str]]) -> tuple[Figure, pd.DataFrame]:
    """Arms as lines over three measures of dose. `data` has arm, measure, steps, norm, kl, value, low, high, and the raw
    model's row under every arm; `rows` holds (measure, y label). Lines are labelled at their ends in the first panel."""
    palette = dict(zip(MARKS, sns.color_palette("colorblind"), strict=False))
    with theme():
        figure, grid = plt.subplots(
            len(rows), len(AXES), figsize=(WIDTH, 2.05 * len(rows) + 0.45), sharey="row", sharex="col", squeeze=False
        )
        for number, (measure, y_label) in enumerate(rows):
            line = grid[number]
            for axes, (x, x_label) in zip(line, AXES, strict=True):
                for arm, part in data[data["measure"] == measure].groupby("arm", sort=False):
                    mark, dashes = MARKS[str(arm)]
                    _curve(axes, part.sort_values(x), x, palette[str(arm)], mark, dashes, labels[str(arm)])
                axes.grid(axis="both", color="0.92")
                if x == "steps":
                    axes.set_xscale("symlog", linthresh=10)
                    axes.set_xticks(sorted(set(data["steps"])))
                    axes.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
                    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
                    axes.tick_params(axis="x", labelsize=6.5, rotation=40)
                if number == len(rows) - 1:
                    axes.set_xlabel(x_label)
                if measure.endswith("rate"):
                    axes.set_ylim(-0.03, 1.03)
                    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
            line[0].set_ylabel(y_label)
        figure.legend(
            *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=7.5
        )
    return figure, data.reset_index(drop=True)


def _curve(axes: Axes, part: pd.DataFrame, x: str, colour: object, mark: str, dashes: str, label: str) -> None:
    axes.fill_between(
        part[x], part["low"].astype(float), part["high"].astype(float), color=colour, alpha=0.13, linewidth=0
    )
    axes.plot(
        part[x], part["value"], color=colour, linestyle=dashes, marker=mark, markersize=4, markerfacecolor="white",
        markeredgewidth=1.1, linewidth=1.2, label=label,
    )  # fmt: skip
