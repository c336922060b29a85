"""Figures of where the personas are: shift and decodability by layer, centroids before and after, recovery by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, theme

PALETTE = sns.color_palette("colorblind")
HALO = [patheffects.withStroke(linewidth=2, foreground="white")]
LINE_HEIGHT = 8.5  # points between labels that stand above each other


@dataclass(frozen=True)
class Series:
    """How one line is drawn and what it is called."""

    name: str
    label: str
    colour: Any
    style: Any = "-"
    width: float = 1.4
    marker: str = ""


@dataclass(frozen=True)
class Row:
    """One row of panels: a letter and title, the y label, its lines, and horizontal references (value, label)."""

    title: str
    y_label: str
    series: tuple[Series, ...]
    references: tuple[tuple[float, str], ...] = ()
    limits: tuple[float | None, float | None] = (None, None)
    percent: bool = False


SHIFT_ROWS = (
    Row(
        "a  how far the centroids move",
        "shift, in spreads",
        (
            Series("shift", "villain", SOURCE_COLOUR),
            Series("shift_others", "others, mean", BYSTANDER_COLOUR, "--"),
            Series("own_shift", "villain, mean\nof all removed", SOURCE_COLOUR, ":"),
        ),
        limits=(0.0, None),
    ),
    Row(
        "b  who is speaking? linear probe",
        "personas named",
        (
            Series("probe_tuned", "within SFT'd", PALETTE[2]),
            Series("probe_transfer_centred", "raw to SFT'd,\ncentred", PALETTE[4], "--"),
            Series("probe_transfer", "raw to SFT'd,\nas it is", PALETTE[1], "-."),
            Series("probe_permuted", "shuffled labels", GREY, ":"),
        ),
        limits=(-0.03, 1.03),
        percent=True,
    ),
    Row(
        "c  what the adapter is still told of the villain",
        "signal kept",
        (
            Series("kept", "as the adapter\nweighs it", SOURCE_COLOUR),
            Series("kept_any", "all directions\nalike", GREY, "--"),
        ),
        references=((1.0, ""), (0.0, "")),
        percent=True,
    ),
)


def shift_by_layer(curves: pd.DataFrame, arms: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """Small multiples: one column per arm, one row per question asked of the states; lines over layers with 95 % bands.

    `curves` has arm, series, layer, value, low, high; series are those of `SHIFT_ROWS`. Lines are labelled at the end of
    the last column. Returns the figure and its data.
    """
    with theme():
        figure, grid = plt.subplots(
            len(SHIFT_ROWS), len(arms), figsize=(WIDTH, 1.62 * len(SHIFT_ROWS) + 0.35), sharex=True, sharey="row",
            squeeze=False,
        )  # fmt: skip
        for row, axes_row in zip(SHIFT_ROWS, grid, strict=True):
            for (arm, title), axes in zip(arms.items(), axes_row, strict=True):
                part = curves[curves["arm"] == arm]
                for value, label in row.references:
                    reference(axes, value, label)
                for series in row.series:
                    band(axes, part[part["series"] == series.name], series)
                axes.grid(axis="both", color="0.92")
                heading = f"\n{title}" if row is SHIFT_ROWS[0] else " "  # the row's title stands above
                axes.set_title(heading, fontweight="normal", fontsize=8, loc="center", color="0.25")
                axes.xaxis.set_major_locator(layer_ticks(5))
            first = axes_row[0]
            first.set_ylim(*row.limits)
            if row.percent:
                first.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
            first.set_ylabel(row.y_label)
            first.annotate(
                row.title, (0, 1), xytext=(0, 15 if row is SHIFT_ROWS[0] else 5), xycoords="axes fraction",
                textcoords="offset points", fontsize=8.5, fontweight="bold", va="bottom", annotation_clip=False,
            ).set_in_layout(False)  # fmt: skip
        for axes in grid[-1]:
            axes.set_xlabel("after layer")
        figure.draw_without_rendering()  # heights are final only now, and labels are placed by them
        part = curves[curves["arm"] == list(arms)[-1]]
        for row, axes in zip(SHIFT_ROWS, grid[:, -1], strict=True):
            ends = [(s, part[part["series"] == s.name].dropna(subset="value")) for s in row.series]
            end_labels(axes, [(s.label, float(p["value"].iloc[-1]), s.colour) for s, p in ends if len(p)])
    return figure, curves.reset_index(drop=True)


def planes(table: pd.DataFrame, arms: Mapping[str, str], names: Mapping[str, str]) -> tuple[Figure, pd.DataFrame]:
    """Centroids before and after SFT as arrows: one row per arm; on the left both models in one plane, on the right each
    with its mean over personas removed, in the plane of the raw personas.

    `table` has arm, view, persona, x, y, x_after, y_after; `names` the personas that are labelled.
    """
    views = {"together": "a  as they are", "own": "b  the mean over personas removed"}
    with theme():
        figure, grid = plt.subplots(
            len(arms), len(views), figsize=(WIDTH, 2.35 * len(arms) + 0.35), squeeze=False,
        )  # fmt: skip
        for number, ((arm, title), axes_row) in enumerate(zip(arms.items(), grid, strict=True)):
            for (view, heading), axes in zip(views.items(), axes_row, strict=True):
                part = table[(table["arm"] == arm) & (table["view"] == view)]
                for row in part.itertuples():
                    colour = SOURCE_COLOUR if row.persona == "villain" else BYSTANDER_COLOUR
                    axes.annotate(
                        "", (row.x_after, row.y_after), (row.x, row.y), zorder=2,
                        arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.0, "shrinkA": 3, "shrinkB": 3,
                                    "mutation_scale": 7, "alpha": 0.75},
                    )  # fmt: skip
                    style: dict[str, Any] = {"color": colour, "linestyle": "none", "markersize": 5, "zorder": 3}
                    marker = "o" if row.persona == "villain" else "D"
                    axes.plot(row.x, row.y, marker=marker, markerfacecolor="white", markeredgewidth=1.2, **style)
                    axes.plot(row.x_after, row.y_after, marker=marker, **style)
                    if row.persona in names:
                        name_beside(axes, row, names[str(row.persona)], part[["x", "y"]].mean().to_numpy(), colour)
                axes.margins(0.2)
                axes.set_aspect("equal", adjustable="datalim")
                axes.grid(axis="both", color="0.92")
                if number == 0:
                    axes.set_title(heading)
                if number == len(arms) - 1:
                    axes.set_xlabel("first component, in spreads")
            axes_row[0].set_ylabel(f"{title}\nsecond component")
        handles = [
            mpl.lines.Line2D([], [], marker=m, color=c, markerfacecolor=f, linestyle="none", markersize=5, label=label)
            for m, c, f, label in (
                ("o", SOURCE_COLOUR, "white", "villain, raw"),
                ("o", SOURCE_COLOUR, SOURCE_COLOUR, "villain, SFT'd"),
                ("D", BYSTANDER_COLOUR, "white", "others, raw"),
                ("D", BYSTANDER_COLOUR, BYSTANDER_COLOUR, "others, SFT'd"),
            )
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
    return figure, table.reset_index(drop=True)


RESTORED = Series("restore", "shift undone", SOURCE_COLOUR, "-", 1.6, "o")
CONTROL = Series("random", "random control", GREY, "--", 1.2, "s")
PUSHED = Series("push", "shift added", PALETTE[1], "-", 1.6, "v")
SWAPPED = Series("swap", "persona swap", PALETTE[2], "-", 1.6, "^")


def recovery(
    curves: pd.DataFrame, levels: Mapping[str, Mapping[str, float]], arms: Mapping[str, str]
) -> tuple[Figure, pd.DataFrame]:
    """The marker's log-probability under vectors at one layer: above, the SFT'd models with the villain's centroid put back,
    and the control of the method; below, the raw model pushed to where SFT moved it.

    `curves` has panel (an arm, or "control"), series, layer, value, low, high; `levels` per panel the horizontal
    references by label (panels: every arm, and "control").
    """
    with theme():
        figure, grid = plt.subplots(
            2, len(arms) + 1, figsize=(WIDTH, 3.9), sharex=True, sharey=True, squeeze=False
        )  # fmt: skip
        panels: list[tuple[Axes, str, Series, str]] = []
        for column, (arm, title) in enumerate(arms.items()):
            panels.append((grid[0, column], arm, RESTORED, f"{title}:\nshift undone"))
            panels.append((grid[1, column], arm, PUSHED, f"raw model:\nshifted as in {arm}"))
        panels.append((grid[0, -1], "control", SWAPPED, "control, raw model:\nassistant to villain"))
        for axes, panel, series, title in panels:
            part = curves[curves["panel"] == panel]
            for kind in (replace(CONTROL, name=f"{series.name} random"), series):
                band(axes, part[part["series"] == kind.name], kind)
            for label, value in levels[panel].items():  # curves run above the lower one
                reference(axes, value, label, below=value < max(levels[panel].values()))
            axes.set_title(title, fontsize=7.5, fontweight="normal", loc="left", linespacing=1.1)
            axes.grid(axis="both", color="0.92")
            axes.xaxis.set_major_locator(layer_ticks(4))
        for letter, axes in zip("ab", grid[:, 0], strict=True):
            axes.set_ylabel("marker, nats")
            axes.annotate(letter, (0, 1), xytext=(-30, 12), xycoords="axes fraction", textcoords="offset points",
                          fontsize=9, fontweight="bold", annotation_clip=False).set_in_layout(False)  # fmt: skip
        for axes in (*grid[1, :-1], grid[0, -1]):
            axes.set_xlabel("added after layer")
        grid[0, -1].xaxis.set_tick_params(labelbottom=True)
        key = grid[1, -1]
        key.axis("off")
        handles = [
            mpl.lines.Line2D([], [], color=s.colour, linestyle=s.style, linewidth=s.width, marker=s.marker,
                             markersize=4, label=s.label)
            for s in (RESTORED, PUSHED, SWAPPED, CONTROL)
        ]  # fmt: skip
        key.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.04, -0.05), frameon=False, fontsize=7,
                   handlelength=2.0, borderaxespad=0, labelspacing=0.8).set_in_layout(False)  # fmt: skip
    return figure, curves.reset_index(drop=True)


# -------------------------------------------------------------------------------------------------------------- parts


def layer_ticks(most: int) -> mpl.ticker.MaxNLocator:
    """Round numbers of layers."""
    return mpl.ticker.MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def name_beside(axes: Axes, row: Any, name: str, middle: Any, colour: Any) -> None:
    """A persona's name at the tail of its arrow, away from where the arrow goes or, for a short one, from the middle."""
    arrow = np.array([row.x_after - row.x, row.y_after - row.y])
    outward = np.array([row.x, row.y]) - middle
    direction = -arrow if np.linalg.norm(arrow) > 0.5 else outward
    direction = direction / max(float(np.linalg.norm(direction)), 1e-9)
    side = "center" if abs(direction[0]) < 0.5 else "left" if direction[0] > 0 else "right"
    axes.annotate(
        name, (row.x, row.y), xytext=tuple(9 * direction), textcoords="offset points", ha=side, va="center",
        fontsize=7, color=colour, fontweight="bold", path_effects=HALO, zorder=5,
    )  # fmt: skip


def band(axes: Axes, data: pd.DataFrame, series: Series) -> None:
    """A line over layers with its interval; layers without a value are left out."""
    shown = data.dropna(subset=["value"]).sort_values("layer")
    if not len(shown):
        return
    x, y, low, high = (shown[name].to_numpy(dtype=float) for name in ("layer", "value", "low", "high"))
    axes.fill_between(x, low, high, color=series.colour, alpha=0.16, linewidth=0, zorder=1)
    axes.plot(
        x, y, color=series.colour, linestyle=series.style, linewidth=series.width, zorder=3,
        marker=series.marker, markersize=3.5,
    )  # fmt: skip


def reference(axes: Axes, value: float, label: str, *, below: bool = False) -> None:
    """A horizontal line with its label: above it at the right, or below it at the left and clear of markers on it."""
    if not np.isfinite(value):
        return
    axes.axhline(value, color="0.2", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=2)
    if label:
        axes.annotate(
            label, (0 if below else 1, value), xycoords=("axes fraction", "data"),
            xytext=(1, -4) if below else (-1, 1.5), textcoords="offset points",
            ha="left" if below else "right", va="top" if below else "bottom",
            fontsize=6.5, color="0.2", zorder=5, path_effects=HALO,
        )  # fmt: skip


def end_labels(axes: Axes, items: Sequence[tuple[str, float, Any]]) -> None:
    """Labels to the right of an axes at the height of their lines' ends, pushed apart where they would overlap."""
    points = 72 * axes.get_window_extent().height / axes.figure.dpi
    low, high = axes.get_ylim()
    placed: list[tuple[float, str, Any]] = []
    lowest = -np.inf
    for label, value, colour in sorted(items, key=lambda item: item[1]):
        lines = label.count("\n") + 1
        half = LINE_HEIGHT * lines / 2
        centre = max((value - low) / (high - low) * points, lowest + half)
        lowest = centre + half
        placed.append((centre, label, colour))
    overshoot = max(0.0, lowest - points - LINE_HEIGHT)
    for centre, label, colour in placed:
        axes.annotate(
            label, (1, 0), xycoords="axes fraction", xytext=(4, centre - overshoot), textcoords="offset points",
            ha="left", va="center", fontsize=7, color=colour, fontweight="bold", linespacing=0.95,
            annotation_clip=False,
        )  # fmt: skip
