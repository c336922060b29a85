"""Figures about depth: a factorial over thirds of the layers, and a scan layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from persona_coupling import adapters
from persona_coupling.adapters import THIRDS
from persona_coupling.figures.conditions import interval_rows
from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, theme
from persona_coupling.layer_effects import ALL, NONE, PAIR, SINGLE, SUBSETS, Subset, condition
from persona_coupling.measures import Estimates

GROUPS: tuple[tuple[str, tuple[Subset, ...]], ...] = (
    ("none", (NONE,)),
    ("one third", SINGLE),
    ("all but one", PAIR),
    ("all", (ALL,)),
)
GAP = 0.45  # between groups, in rows


@dataclass(frozen=True)
class Panel:
    """A column of the factorial's figure: what is drawn, how coupled; `predicted` marks the sum of single effects."""

    title: str
    label: str
    source: str
    bystander: str
    how: str = "prebaked"
    predicted: str = ""


def _places() -> dict[Subset, float]:
    places, y = {}, 0.0
    for _, members in GROUPS:
        for subset in members:
            places[subset] = y
            y += 1.0
        y += GAP
    return places


def thirds(
    estimates: Estimates, arms: Mapping[str, str], panels: Sequence[Panel], failed: set[str]
) -> tuple[Figure, pd.DataFrame]:
    """Every subset of the thirds, from none to all, one block of rows per arm (`arms`: arm to title) and one column per
    panel: the source (filled) and its bystanders (open), and where the source would stand if the thirds' effects added
    up. Squares at the left say which thirds carry the SFT. A condition in `failed` is marked with a dagger."""
    places = _places()
    height = 0.17 * (max(places.values()) + 2.2) * len(arms) + 0.62
    with theme():
        figure, grid = plt.subplots(
            len(arms), 1 + len(panels), figsize=(WIDTH, height), sharey=True, squeeze=False,
            gridspec_kw={"width_ratios": [0.34 if len(panels) > 2 else 0.24, *[1.0] * len(panels)]},
        )  # fmt: skip
        frames = []
        for row, (arm, title) in enumerate(arms.items()):
            daggers = {s for s in SUBSETS if any(condition(arm, s, panel.how) in failed for panel in panels)}
            _matrix(grid[row, 0], places, daggers, title)
            for column, panel in enumerate(panels):
                axes = grid[row, column + 1]
                frames += _subset_panel(axes, estimates, arm, panel, places, marked=row + column == 0)
                if row == 0:
                    axes.set_title(f"{'abc'[column]}  {panel.title}")
                if row == len(arms) - 1:
                    axes.set_xlabel(panel.label)
        for column in range(1, len(panels) + 1):
            _share_limits(list(grid[:, column]), panels[column - 1])
        figure.legend(
            handles=_handles(), loc="outside lower center", ncols=3, frameon=False, fontsize=7.5, handlelength=1.6
        )
    return figure, pd.concat(frames, ignore_index=True)


def _matrix(axes: Axes, places: Mapping[Subset, float], daggers: set[Subset], title: str) -> None:
    for subset, y in places.items():
        for x, third in enumerate(THIRDS):
            axes.add_patch(
                Rectangle(
                    (x - 0.36, y - 0.36), 0.72, 0.72, facecolor="0.25" if third in subset else "white",
                    edgecolor="0.25" if third in subset else "0.75", linewidth=0.7,
                )
            )  # fmt: skip
        if subset in daggers:
            axes.text(2.75, y, "†", ha="center", va="center", fontsize=7.5)
    for group, members in GROUPS:
        middle = float(np.mean([places[s] for s in members]))
        axes.text(-0.75, middle, group, ha="right", va="center", fontsize=7.5, color="0.2")
    for x, third in enumerate(THIRDS):
        axes.text(x - 0.1, -0.62, third, ha="left", va="bottom", fontsize=6.5, rotation=50, rotation_mode="anchor")
    axes.set_xlim(-0.6, 3.1)
    if title:
        axes.text(-4.6, -2.6, title, ha="left", va="bottom", fontsize=8, fontstyle="italic", color="0.1")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_ylim(max(places.values()) + 0.7, -0.7)


def _subset_panel(
    axes: Axes, estimates: Estimates, arm: str, panel: Panel, places: Mapping[Subset, float], *, marked: bool
) -> list[pd.DataFrame]:
    """Draw one panel; returns its data, one frame per kind of dot."""
    at = {condition(arm, s, panel.how): y for s, y in places.items()}
    present = [c for c in at if f"{c}.{panel.source}" in estimates.named]
    frames = []
    for measure, who, colour, filled, offset in (
        (panel.source, "villain", SOURCE_COLOUR, True, -0.15),
        (panel.bystander, "others", BYSTANDER_COLOUR, False, 0.2),
    ):
        data = estimates.frame([measure], present)
        interval_rows(axes, data, at, colour=colour, filled=filled, offset=offset, label="")
        frames.append(data.assign(arm=arm, panel=panel.title, who=who))
    if panel.predicted:
        added = [condition(arm, s) for s in (*PAIR, ALL)]
        data = estimates.frame([panel.predicted], added)
        for entry in data.dropna(subset=["value"]).itertuples():
            y = at[str(entry.condition)] - 0.15
            axes.plot([entry.low, entry.high], [y, y], color="0.25", linewidth=0.7, zorder=3.5)
            axes.plot(entry.value, y, marker="|", color="0.1", markersize=8, markeredgewidth=1.8, zorder=4)
        frames.append(data.assign(arm=arm, panel=panel.title, who="villain, if effects added up"))
    for _, members in GROUPS[1:]:
        axes.axhline(places[members[0]] - 0.5 - GAP / 2, color="0.85", linewidth=0.6, zorder=0)
    axes.tick_params(axis="y", length=0, labelleft=False)
    return frames


def _share_limits(column: Sequence[Axes], panel: Panel) -> None:
    """One x axis for all arms of a panel: rates from 0 to 100 %, everything else by its data."""
    if panel.source.endswith("rate"):
        for axes in column:
            axes.set_xlim(-0.04, 1.04)
            axes.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.5 if len(column) > 3 else 0.25))
            axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0, symbol=""))
        return
    limits = np.array([axes.get_xlim() for axes in column])
    left, right = float(limits[:, 0].min()), float(limits[:, 1].max())
    spare = max(0.0, 1.0 - (right - left)) / 2  # differences far below a nat are shown as such
    for axes in column:
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        axes.set_xlim(left - spare, right + spare)
        axes.ticklabel_format(axis="x", useOffset=False)


def _handles() -> list[Any]:
    line = mpl.lines.Line2D
    return [
        line([], [], color=SOURCE_COLOUR, marker="o", markersize=5.5, linewidth=1.6, label="villain"),
        line([], [], color=BYSTANDER_COLOUR, marker="D", markersize=4.5, markerfacecolor="white", linewidth=1.6,
             label="all others, mean"),
        line([], [], color="0.1", marker="|", markersize=8, markeredgewidth=1.8, linewidth=0.7,
             label="villain, if the thirds’ effects added up"),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the scan


def scan(steps: pd.DataFrame, titles: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """`depth_scan.by_step` rows, one row of panels per condition (`titles`): the effect of each step of layers alone, and
    the cumulative effects from both ends, over the depth of the model."""
    depth = int(steps["stop"].max())
    with theme():
        figure, grid = plt.subplots(
            len(titles), 2, figsize=(WIDTH, 1.85 * len(titles) + 0.7), squeeze=False, sharex=True, sharey="col"
        )
        for row, (name, title) in enumerate(titles.items()):
            part = steps[steps["condition"] == name]
            alone, cumulative = grid[row]
            for axes in (alone, cumulative):
                _depth_axes(axes, depth, named=row == 0)
            _alone(alone, part)
            _cumulative(cumulative, part, named=row == 0)
            alone.set_ylabel(f"{title}\nchange of log-odds, nats" if title else "change of log-odds, nats")
        grid[0, 0].set_title("a  one step of layers alone", pad=13)
        grid[0, 1].set_title("b  all layers up to x, or from x on", pad=13)
        grid[-1, 0].set_xlabel("layer")
        grid[-1, 1].set_xlabel("x, layer")
        handles, names = grid[0, 0].get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda i: (names[i] != "villain", names[i]))
        handles, names = [handles[i] for i in order], [names[i] for i in order]
        figure.legend(
            handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=7.5, handlelength=1.6,
            columnspacing=1.3,
        )  # fmt: skip
    columns = ["condition", "mode", "start", "stop", "who", "value", "low", "high", "n", "clusters", "seeds", "unit"]
    return figure, steps.loc[steps["condition"].isin(titles), columns].reset_index(drop=True)


def _depth_axes(axes: Axes, depth: int, *, named: bool) -> None:
    for number, third in enumerate(THIRDS):
        layers = sorted(adapters.layer_numbers([third], depth))
        left, right = layers[0], layers[-1] + 1
        if number % 2 == 0:
            axes.axvspan(left, right, color="0.955", linewidth=0, zorder=0)
        if named:
            axes.text(
                (left + right) / 2, 1.02, third, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=7, color=GREY, fontstyle="italic",
            )  # fmt: skip
    axes.grid(axis="x", visible=False)
    axes.grid(axis="y", visible=True, color="0.88")
    axes.axhline(0.0, color="0.3", linewidth=0.8, zorder=1)
    axes.set_xlim(0, depth)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)


def _alone(axes: Axes, part: pd.DataFrame) -> None:
    alone = part[part["mode"] == "only"]
    source, others = (alone[alone["who"] == who].sort_values("start") for who in ("source", "bystander"))
    middle, width = (source["start"] + source["stop"]) / 2, source["stop"] - source["start"]
    axes.bar(
        middle, source["value"], 0.82 * width, color=SOURCE_COLOUR, alpha=0.75, linewidth=0, zorder=2, label="villain"
    )
    axes.vlines(middle - 0.1 * width, source["low"], source["high"], color="0.15", linewidth=0.9, zorder=3)
    axes.vlines(middle + 0.18 * width, others["low"], others["high"], color=BYSTANDER_COLOUR, linewidth=0.9, zorder=3)
    axes.plot(
        middle + 0.18 * width, others["value"], "D", markersize=3.4, markerfacecolor="white",
        markeredgecolor=BYSTANDER_COLOUR, markeredgewidth=0.9, zorder=4, label="others, mean",
    )  # fmt: skip
    last = part[(part["mode"] == "without") & (part["who"] == "source")].sort_values("start")
    if len(last):
        axes.stairs(
            last["value"].to_numpy(), [*last["start"], int(last["stop"].max())], baseline=None, color="0.1",
            linewidth=0.9, zorder=3.5, label="villain, step added last",
        )  # fmt: skip
    whole = part[(part["mode"].isin(["from_bottom", "from_top"])) & (part["who"] == "source")]
    whole = whole[whole["stop"] - whole["start"] == int(part["stop"].max())]
    axes.axhline(
        float(whole["value"].iloc[0]) / max(1, len(source)), color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), zorder=3,
        label="whole, in equal steps",
    )  # fmt: skip


def _cumulative(axes: Axes, part: pd.DataFrame, *, named: bool) -> None:
    """Both curves over the boundary x: the villain with a band, the others thin."""
    for mode, edge, style, marker in (("from_bottom", "stop", "-", "o"), ("from_top", "start", (0, (3, 1.5)), "s")):
        for who, colour in (("source", SOURCE_COLOUR), ("bystander", BYSTANDER_COLOUR)):
            curve = part[(part["mode"] == mode) & (part["who"] == who)].sort_values(edge)
            if not len(curve):
                continue
            main = who == "source"
            axes.fill_between(
                curve[edge], curve["low"], curve["high"], color=colour, alpha=0.16 if main else 0.09, linewidth=0
            )
            axes.plot(
                curve[edge], curve["value"], color=colour, linestyle=style, linewidth=1.5 if main else 0.9,
                marker=marker if main else None, markersize=3.2, markeredgewidth=0.9,
                markerfacecolor=colour if mode == "from_bottom" else "white", clip_on=False, zorder=3 if main else 2,
            )  # fmt: skip
    if named:
        depth = int(part["stop"].max())
        lowest = float(part.loc[part["mode"].isin(["from_bottom", "from_top"]), "value"].min())
        for x, text, ha in ((0.02 * depth, "from x on", "left"), (0.98 * depth, "up to x", "right")):
            axes.annotate(text, (x, lowest), xytext=(0, -9), textcoords="offset points", ha=ha, va="top", fontsize=7.2)
        axes.margins(y=0.14)
