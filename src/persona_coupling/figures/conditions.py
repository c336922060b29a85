"""Figures that compare conditions: dots with intervals, a heat map of personas, training curves."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, theme
from persona_coupling.measures import Estimates


def interval_rows(
    axes: Axes, data: pd.DataFrame, places: dict[str, float], *, colour: Any, filled: bool, offset: float, label: str
) -> None:
    """One dot with its interval per row of `data` (condition, value, low, high); rows without a value are left out.
    The first drawn dot is labelled directly."""
    labelled = False
    for row in data.itertuples():
        if row.value is None or pd.isna(row.value):
            continue
        y = places[str(row.condition)] + offset
        if row.low is not None and not pd.isna(row.low):
            axes.plot([row.low, row.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
        axes.plot(
            row.value,
            y,
            marker="o" if filled else "D",
            markersize=5.5 if filled else 4.5,
            markerfacecolor=colour if filled else "white",
            markeredgecolor=colour,
            markeredgewidth=1.2,
            linestyle="none",
            zorder=3,
        )
        if label and not labelled:
            labelled = True
            axes.annotate(
                label, (row.value, y), xytext=(0, 6), textcoords="offset points", ha="center", va="bottom",
                color=colour, fontsize=7.5, fontweight="bold",
            )  # fmt: skip


def by_condition(
    estimates: Estimates,
    groups: dict[str, list[str]],
    labels: dict[str, str],
    panels: list[tuple[str, str, str, str]],
    failed: set[str],
) -> tuple[Figure, pd.DataFrame]:
    """Dots with intervals, conditions down, one panel per measure: the source against all other personas.

    `groups` maps a block's title to its conditions; `panels` holds (title, x label, source measure, bystander
    measure); a condition in `failed` is marked with a dagger. Returns the figure and its data.
    """
    places: dict[str, float] = {}
    blocks: list[tuple[float, str]] = []
    y = 0.0
    for title, members in groups.items():
        blocks.append((y, title))
        y += 0.75
        for condition in members:
            places[condition] = y
            y += 1.0
        y += 0.35
    conditions = list(places)
    with theme():
        figure, all_axes = plt.subplots(
            1, len(panels), figsize=(WIDTH, 0.34 * y + 0.75), sharey=True, squeeze=False,
        )  # fmt: skip
        frames = []
        for number, (title, x_label, source, bystander) in enumerate(panels):
            axes = all_axes[0, number]
            for measure, who, colour, filled, offset in (
                (source, "villain", SOURCE_COLOUR, True, -0.14),
                (bystander, "all others, mean", BYSTANDER_COLOUR, False, 0.18),
            ):
                part = estimates.frame([measure], conditions)
                frames.append(part.assign(panel=title))
                interval_rows(
                    axes, part, places, colour=colour, filled=filled, offset=offset, label="",
                )  # fmt: skip
                if number == 0:
                    axes.plot([], [], marker="o" if filled else "D", markerfacecolor=colour if filled else "white",
                              markeredgecolor=colour, color=colour, linewidth=1.6, label=who)  # fmt: skip
            axes.set_title(title)
            axes.set_xlabel(x_label)
            axes.ticklabel_format(axis="x", useOffset=False)
            if source.endswith("rate"):
                axes.set_xlim(-0.03, 1.03)
                axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        first = all_axes[0, 0]
        first.set_yticks(
            [places[c] for c in conditions], [labels[c] + (" †" if c in failed else "") for c in conditions]
        )
        first.set_ylim(y - 0.4, -0.6)
        for axes in all_axes[0]:
            axes.tick_params(axis="y", length=0)
        for at, title in blocks:
            first.text(-0.02, at, title, transform=first.get_yaxis_transform(), ha="right", va="center",
                       fontsize=7.5, fontstyle="italic", color=GREY)  # fmt: skip
        figure.legend(
            *first.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=7.5
        )
    return figure, pd.concat(frames, ignore_index=True)


def persona_heatmap(
    table: pd.DataFrame, conditions: list[str], labels: dict[str, str], personas: dict[str, str], trained: set[str]
) -> tuple[Figure, pd.DataFrame]:
    """Marker rate of every persona under every condition; personas that served as negatives carry an asterisk."""
    values = table.pivot(index="persona", columns="condition", values="value").loc[list(personas), conditions]
    values = values.astype(float)
    with theme():
        figure, axes = plt.subplots(figsize=(WIDTH, 0.24 * len(personas) + 1.25))
        sns.heatmap(
            values * 100, ax=axes, cmap="Greys", vmin=0, vmax=100, annot=True, fmt=".0f", linewidths=0.6,
            annot_kws={"fontsize": 7}, cbar_kws={"label": "answers with the marker, %", "shrink": 0.8},
        )  # fmt: skip
        axes.set_xlabel("")
        axes.set_ylabel("")
        axes.set_yticks(
            np.arange(len(personas)) + 0.5,
            [n + (" *" if p in trained else "") for p, n in personas.items()],
            rotation=0,
        )
        axes.set_xticks(
            np.arange(len(conditions)) + 0.5, [labels[c] for c in conditions], rotation=35, ha="right",
            rotation_mode="anchor",
        )  # fmt: skip
    kept = table[table["condition"].isin(conditions)]
    return figure, kept.reset_index(drop=True)


def training_curves(logs: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Loss of every step of every training run: one panel per kind of training, one line per run and seed, labelled at
    its end. `logs` has panel, run, seed, step, loss."""
    panels = list(dict.fromkeys(logs["panel"]))
    everyone = sorted(set(logs["run"]))  # a run keeps its colour and dashes in every panel
    styles = dict(zip(everyone, ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))) * 4, strict=False))
    colours = dict(zip(everyone, sns.color_palette("colorblind", len(everyone)), strict=True))
    with theme():
        figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, 2.3), squeeze=False)
        for axes, panel in zip(grid[0], panels, strict=True):
            shown = logs[logs["panel"] == panel]
            runs = list(dict.fromkeys(shown["run"]))
            for run in runs:
                for number, (_, part) in enumerate(shown[shown["run"] == run].groupby("seed")):
                    axes.plot(
                        part["step"], part["loss"], color=colours[run], linestyle=styles[run], linewidth=1.1,
                        label=run if number == 0 else None,
                    )  # fmt: skip
            axes.set_title(panel)
            axes.set_xlabel("optimiser step")
            axes.grid(axis="both", color="0.92")
            axes.set_ylim(0, 1.05 * float(shown["loss"].max()))
            axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
            axes.legend(frameon=False, fontsize=7, loc="best")
        grid[0, 0].set_ylabel("loss, nats per token")
    return figure, logs[["panel", "run", "seed", "step", "loss"]].reset_index(drop=True)
