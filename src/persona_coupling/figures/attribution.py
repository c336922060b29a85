"""Figures of experiment 06: which rival carries the gap, and the grid of recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_coupling.figures.theme import GREY, SOURCE_COLOUR, WIDTH, theme
from persona_coupling.measures import Estimates

BAR = "0.84"


def attribution(
    gaps: pd.DataFrame, panels: Sequence[tuple[str, str, str]], failed: Collection[str] = ()
) -> tuple[Figure, pd.DataFrame]:
    """One row per factor, grouped by rival: the gap as a grey bar, how much of it is closed as a dot, the same change on the
    raw model as an open diamond; all with intervals. A dot at the bar's end carries the gap, one at zero carries nothing.

    `gaps` is the table of `attribution.add_gaps`; `panels` are (measure, title, x label); factors in `failed` carry a
    dagger. Returns figure and data.
    """
    places: dict[str, float] = {}
    heads: dict[str, float] = {}
    y = 0.0
    for factor in gaps.drop_duplicates("factor").itertuples():
        if factor.rival not in heads:
            y += 0.3 * bool(heads)
            heads[str(factor.rival)] = y
            y += 0.85
        places[str(factor.factor)] = y
        y += 1.0
    changes = gaps.drop_duplicates("factor").set_index("factor")["change"]
    with theme():
        figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, 0.235 * y + 0.95), sharey=True, squeeze=False)
        for axes, (measure, title, label) in zip(grid[0], panels, strict=True):
            shown = gaps[gaps["measure"] == measure]
            for row in shown.itertuples():
                if row.value is not None and not pd.isna(row.value):
                    _draw_role(axes, row, places[str(row.factor)])
            for factor in sorted(set(places) - set(shown["factor"])):
                note = axes.text(0, places[factor], "  not counted so", va="center", fontsize=6.5, color=GREY)
                note.set_in_layout(False)
            axes.axvline(0, color=GREY, linewidth=0.8, zorder=1)
            axes.set_title(title)
            axes.set_xlabel(label)
            if measure == "contrast":
                axes.xaxis.set_major_formatter(
                    mpl.ticker.FuncFormatter(lambda x, _: f"{100 * x:.0f}".replace("-", "−"))
                )
        first = grid[0, 0]
        first.set_yticks(list(places.values()), [changes[f] + (" †" if f in failed else "") for f in places])
        first.set_ylim(y - 0.35, -0.6)
        for axes in grid[0]:
            axes.tick_params(axis="y", length=0)
        for head, at in heads.items():
            first.text(-0.02, at, head, transform=first.get_yaxis_transform(), ha="right", va="center", fontsize=7.5,
                       fontweight="bold")  # fmt: skip
        handles: list[Any] = [
            mpl.patches.Patch(color=BAR, label="the gap to the raw model"),
            mpl.lines.Line2D([], [], color=SOURCE_COLOUR, marker="o", linewidth=1.6, label="how much of it disappears"),
            mpl.lines.Line2D([], [], color=GREY, marker="D", markersize=4.5, markerfacecolor="white", linewidth=1.0,
                             label="the same change on the raw model"),
        ]  # fmt: skip
        if not (gaps["role"] == "raw").any():
            handles = handles[:2]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5)
    return figure, gaps.reset_index(drop=True)


def _draw_role(axes: Axes, row: Any, y: float) -> None:
    interval = row.low is not None and not pd.isna(row.low)
    if row.role == "gap":
        axes.barh(y, row.value, height=0.74, color=BAR, linewidth=0, zorder=1)
        if interval:
            axes.plot([row.low, row.high], [y + 0.3, y + 0.3], color="0.62", linewidth=0.9, zorder=2)
        return
    closed = row.role == "closed"
    at, colour = (y - 0.06, SOURCE_COLOUR) if closed else (y + 0.2, GREY)
    if interval:
        axes.plot([row.low, row.high], [at, at], color=colour, linewidth=1.6 if closed else 1.0, zorder=3)
    axes.plot(
        row.value, at, marker="o" if closed else "D", markersize=5.5 if closed else 3.8, linestyle="none",
        markerfacecolor=colour if closed else "white", markeredgecolor=colour, zorder=4,
    )  # fmt: skip


def recipe_grid(
    estimates: Estimates,
    series: Sequence[tuple[str, str, str]],
    losses: Mapping[str, str],
    rates: Mapping[str, str],
    panels: Sequence[tuple[str, str]],
    thresholds: Mapping[str, float],
) -> tuple[Figure, pd.DataFrame]:
    """Every recipe: learning rate across, one line per model and text, one column of panels per loss and one row per
    measure (with one loss, the measures stand side by side). Dotted lines are floor and ceiling of rates, dashed ones
    what a gate asks of the raw model.

    `series` are (arm, text, label), `losses` and `rates` map names to words, `panels` are (measure, label), `thresholds`
    measure to gate. What was not run is not drawn. Returns figure and data.
    """
    palette = sns.color_palette("colorblind")
    styles = {"A": ("0.25", "s"), "B": (SOURCE_COLOUR, "o"), "C": (palette[0], "^"), "S": (palette[2], "v")}
    single = len(losses) == 1
    shape = (1, len(panels)) if single else (len(panels), len(losses))
    frames = []
    with theme():
        height = 2.35 if single else 1.55 * shape[0] + 0.75
        figure, grid = plt.subplots(*shape, figsize=(WIDTH, height), squeeze=False, sharex=True,
                                    sharey=False if single else "row")  # fmt: skip
        for row, (measure, words) in enumerate(panels):
            for column, (loss, loss_words) in enumerate(losses.items()):
                axes = grid[0, row] if single else grid[row, column]
                for number, (arm, text, label) in enumerate(series):
                    names = {rate: f"{arm}.{text}_{loss}_{rate}.scratch" for rate in rates}
                    run = {r: n for r, n in names.items() if f"{n}.{measure}" in estimates.named}
                    if not run:
                        continue
                    part = estimates.frame([measure], list(run.values())).assign(
                        rate=list(run), loss=loss, series=label
                    )
                    frames.append(part)
                    colour, marker = styles.get(arm, (palette[4], "P"))
                    shift = 0.13 * (number - (len(series) - 1) / 2)
                    x = np.array([list(rates).index(rate) for rate in run]) + shift
                    _draw_series(axes, part, x, colour, marker, filled=text == "stale", label=label)
                if measure.endswith(("rate", "contrast")) and not measure.startswith("fixed"):
                    for limit in (0.0, 1.0):
                        axes.axhline(limit, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
                    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, symbol=""))
                if measure in thresholds:
                    axes.axhline(thresholds[measure], color=GREY, linewidth=0.8, linestyle=(0, (5, 3)), zorder=1)
                axes.grid(axis="x", visible=False)
                axes.grid(axis="y", color="0.92")
                axes.set_xticks(range(len(rates)), list(rates.values()))
                axes.set_xlim(-0.5, len(rates) - 0.5)
                if single:
                    axes.set_title(words)
                else:
                    axes.set_title(loss_words if row == 0 else "")
                    axes.set_ylabel(words if column == 0 else "")
        figure.supxlabel("learning rate", fontsize=8)
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        columns = len(handles) if len(handles) <= 3 else 3
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False,
                      fontsize=7.5)  # fmt: skip
    return figure, pd.concat(frames, ignore_index=True)


def _draw_series(
    axes: Axes, part: pd.DataFrame, x: np.ndarray, colour: Any, marker: str, *, filled: bool, label: str
) -> None:
    value = part["value"].astype(float).to_numpy()
    axes.plot(
        x, value, color=colour, marker=marker, markersize=4.8, markerfacecolor=colour if filled else "white",
        markeredgewidth=1.1, linewidth=0.9, linestyle="-" if filled else (0, (4, 2)), label=label, zorder=3,
    )  # fmt: skip
    axes.vlines(x, part["low"].astype(float), part["high"].astype(float), color=colour, linewidth=1.3, zorder=2)
