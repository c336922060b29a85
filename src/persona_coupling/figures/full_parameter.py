"""Figures of experiment 03: variants of a change side by side under every corpus, and the spectrum of a change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_coupling import models
from persona_coupling.figures.conditions import interval_rows
from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, theme
from persona_coupling.measures import Estimates
from persona_coupling.spectra import PARTS

PART_COLOURS = dict(zip(("attention", "mlp"), (sns.color_palette("colorblind")[i] for i in (0, 1)), strict=True))
PART_NAMES = {"attention": "attention", "mlp": "MLP", "embedding": "embedding", "norm": "norms", "other": "other"}
MEASURES = (
    ("sampled answers", "answers with the marker", "source_rate", "bystander_rate"),
    ("teacher-forced", "marker log-prob., nats", "fixed_logprob_source", "fixed_logprob_bystander"),
)


def by_variant(
    estimates: Estimates,
    blocks: Mapping[str, Mapping[str, Mapping[str, str]]],
    columns: Mapping[str, str],
    marks: Mapping[str, str],
    failed: set[str],
) -> tuple[Figure, pd.DataFrame]:
    """Dots with intervals: variants down, one column of panels per corpus, sampled rate and log-probability apart.

    `blocks` maps a block's title to its rows, a row's label to the condition of every column that has it; `columns` maps
    a column to its title; `marks` notes beside a condition what was matched. A condition in `failed` carries a dagger.
    With one corpus the two measures stand side by side. Returns the figure and its data.
    """
    single = len(columns) == 1
    places: dict[str, float] = {}
    titles: list[tuple[float, str]] = []
    ends: list[float] = []
    y = 0.0
    for title, rows in blocks.items():
        titles.append((y, title))
        y += 0.8
        for label in rows:
            places[f"{title}/{label}"] = y
            y += 1.0
        y += 0.3
        ends.append(y)
    # with several corpora the log-probabilities, in a row of their own, leave out what the rates already show
    bottoms = [ends[-1], ends[-1] if single else ends[0]]
    heights = [0.22 * bottom + 0.5 for bottom in bottoms]
    with theme():
        figure, grid = plt.subplots(
            *((1, 2) if single else (2, len(columns))),
            figsize=(WIDTH, 0.27 * y + 0.6 if single else sum(heights)),
            sharex=False if single else "row",
            sharey="row",
            squeeze=False,
            gridspec_kw={} if single else {"height_ratios": heights},
        )
        frames = []
        for number, (column, title) in enumerate(columns.items()):
            for which, (heading, x_label, source, bystander) in enumerate(MEASURES):
                axes = grid[0, which] if single else grid[which, number]
                here = {
                    f"{block}/{label}": conditions[column]
                    for block, rows in blocks.items()
                    for label, conditions in rows.items()
                    if column in conditions and places[f"{block}/{label}"] < bottoms[which]
                }
                for measure, colour, filled, offset in (
                    (source, SOURCE_COLOUR, True, -0.15),
                    (bystander, BYSTANDER_COLOUR, False, 0.17),
                ):
                    part = pd.DataFrame(
                        [{"condition": row, **estimates[f"{c}.{measure}"].as_dict()} for row, c in here.items()]
                    )
                    interval_rows(axes, part, places, colour=colour, filled=filled, offset=offset, label="")
                    frames.append(part.assign(column=column, measure=measure, name=list(here.values())))
                _reference(axes, estimates, next(iter(here.values())), source)
                axes.set_xlabel(x_label)
                if which == 1:
                    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
                else:
                    axes.set_xlim(-0.03, 1.03)
                    axes.set_xticks([0, 0.5, 1.0])
                    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
                letter = "abcdefghijkl"[which if single else which * len(columns) + number]
                axes.set_title(f"{letter}  {heading if single else title}")
                for row, condition in here.items():
                    text = marks.get(condition, "") if which == 0 else ""
                    text += " †" if condition in failed else ""
                    axes.text(1.02, places[row], text.strip(), transform=axes.get_yaxis_transform(), va="center",
                              fontsize=6.5, color=GREY)  # fmt: skip
        for axes in grid.flat:
            axes.tick_params(axis="y", length=0)
        for which, axes in enumerate(grid[:, 0]):
            shown = {row: place for row, place in places.items() if place < bottoms[which]}
            axes.set_yticks(list(shown.values()), [row.split("/", 1)[1] for row in shown])
            axes.set_ylim(bottoms[which] - 0.6, -0.5)
            for at, title in titles:
                if at < bottoms[which]:
                    axes.text(-0.02, at, title, transform=axes.get_yaxis_transform(), ha="right", va="center",
                              fontsize=7.5, fontstyle="italic", color=GREY)  # fmt: skip
        _name_the_dots(grid[0, 0], estimates, next(iter(next(iter(blocks.values())).values())), places)
    data = pd.concat(frames, ignore_index=True).rename(columns={"condition": "row", "name": "condition"})
    return figure, data


def _reference(axes: Axes, estimates: Estimates, condition: str, measure: str) -> None:
    """A dotted line at the villain's value in a panel's first row."""
    value = estimates[f"{condition}.{measure}"].value
    if value is not None:
        axes.axvline(value, color=SOURCE_COLOUR, linewidth=0.8, linestyle=":", zorder=1)


def _name_the_dots(axes: Axes, estimates: Estimates, row: Mapping[str, str], places: Mapping[str, float]) -> None:
    """Label the two dots of the first row directly, the one above and the other below."""
    condition, y = next(iter(row.values())), next(iter(places.values()))
    for measure, text, colour, offset, shift in (
        ("source_rate", "villain", SOURCE_COLOUR, -0.15, 7),
        ("bystander_rate", "all others", BYSTANDER_COLOUR, 0.17, -8),
    ):
        value = estimates[f"{condition}.{measure}"].value
        if value is not None:
            axes.annotate(text, (value, y + offset), xytext=(0, shift), textcoords="offset points",
                          ha="right" if value > 0.8 else "left" if value < 0.2 else "center", va="center", color=colour,
                          fontsize=7, fontweight="bold")  # fmt: skip


def cumulative(table: pd.DataFrame, kept: int) -> pd.DataFrame:
    """Share of a matrix's squared norm within its best approximation of rank 1 to `kept`: one row per matrix and rank,
    with condition, seed, layer, module and part. Parameters without a spectrum are left out."""
    parts = []
    for row in table.itertuples():
        values = np.asarray(row.singular, dtype=float)
        if not len(values) or not row.squared:
            continue
        held = np.cumsum(values**2) / row.squared
        held = np.concatenate([held, np.full(max(0, kept - len(held)), held[-1])])[:kept]
        labels = {"condition": row.condition, "seed": row.seed, "layer": row.layer, "module": row.module}
        parts.append(pd.DataFrame({**labels, "part": row.part, "rank": np.arange(1, kept + 1), "share": held}))
    return pd.concat(parts, ignore_index=True)


def norm_shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of a change's squared norm in every part of the model: condition, part, share (mean over seeds)."""
    sums = table.groupby(["condition", "seed", "part"])["squared"].sum()
    shares = sums / sums.groupby(["condition", "seed"]).transform("sum")
    filled = shares.unstack("part", fill_value=0.0).groupby("condition").mean()
    return filled.reset_index().melt(id_vars="condition", var_name="part", value_name="share")


def spectrum(
    table: pd.DataFrame, *, full: str, lora: str, bars: Mapping[str, str], rank: int, kept: int
) -> tuple[Figure, pd.DataFrame]:
    """Where the full-parameter delta's squared norm lies: by rank (a), by module within LoRA's rank (b), by part of the
    model (c).

    `full` and `lora` name the conditions of a and b, `bars` maps the conditions of c to labels. Bands and bars of a and b
    hold the middle 90 % of matrices (layers and seeds). Returns the figure and its data.
    """
    curves = cumulative(table[table["condition"].isin([full, lora])], kept)
    own = table[(table["condition"] == full) & table["module"].isin(models.MODULES)]
    with theme():
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(WIDTH, 2.5), gridspec_kw={"width_ratios": (1.25, 0.95, 1.0)}
        )
        drawn = [
            *_curves(left, curves, full, lora, rank, kept),
            *_modules(middle, own, rank),
            *_bars(right, norm_shares(table), bars),
        ]
    return figure, pd.DataFrame(drawn)


def _curves(axes: Axes, curves: pd.DataFrame, full: str, lora: str, rank: int, kept: int) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    ends: list[float] = []
    for condition, part, colour, style, label in (
        (lora, None, "0.25", "--", "LoRA"),
        (full, "attention", PART_COLOURS["attention"], "-", "full,\nattention"),
        (full, "mlp", PART_COLOURS["mlp"], "-", "full,\nMLP"),
    ):
        chosen = curves[(curves["condition"] == condition) & ((part is None) | (curves["part"] == part))]
        by_rank = chosen[chosen["module"].isin(models.MODULES)].groupby("rank")["share"]
        if not len(by_rank):
            continue
        middle, low, high = by_rank.mean(), by_rank.quantile(0.05), by_rank.quantile(0.95)
        axes.fill_between(middle.index, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(middle.index, middle, color=colour, linestyle=style, linewidth=1.5)
        ends.append(_apart([*ends, float(middle.iloc[-1])]))
        axes.annotate(label, (kept, ends[-1]), xytext=(3, 0), textcoords="offset points", va="center", ha="left",
                      fontsize=7, color=colour, fontweight="bold", annotation_clip=False)  # fmt: skip
        drawn += [
            {"panel": "a", "group": f"{condition} {part or 'projections'}", "x": k, "value": m, "low": lo, "high": hi}
            for k, m, lo, hi in zip(middle.index, middle, low, high, strict=True)
        ]
    axes.axvline(rank, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(f"rank {rank}", (rank, 0.02), xytext=(2, 0), textcoords="offset points", fontsize=6.5, color=GREY)
    axes.set_xlim(1, kept)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.grid(axis="both", color="0.92")
    axes.set_xlabel("rank of the best approximation")
    axes.set_title("a  squared norm by rank")
    return drawn


def _apart(ends: Sequence[float], gap: float = 0.17) -> float:
    """Where the last of some labels goes: at its own height, or the nearest that keeps `gap` from the others."""
    *taken, wanted = ends
    tried = sorted(np.arange(0.0, 1.001, 0.01), key=lambda y: abs(y - wanted))
    return float(next((y for y in tried if all(abs(y - other) >= gap for other in taken)), wanted))


def _modules(axes: Axes, own: pd.DataFrame, rank: int) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    for place, module in enumerate(models.MODULES):
        rows = own[own["module"] == module]
        share = rows["rank_share"].dropna()
        if not len(share):
            continue
        colour = PART_COLOURS["attention" if module in models.ATTENTION else "mlp"]
        low, high, chance = share.quantile(0.05), share.quantile(0.95), float(rows["chance_rank_share"].mean())
        axes.plot([low, high], [place, place], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(share.mean(), place, marker="o", markersize=5, color=colour)
        axes.plot(chance, place, marker="D", markersize=4, markerfacecolor="white", markeredgecolor=GREY)
        if not drawn:
            axes.annotate("Gaussian", (chance, place), xytext=(0, 7), textcoords="offset points", fontsize=6.5,
                          color=GREY, ha="left" if chance < 0.5 else "right", va="center")  # fmt: skip
        drawn += [
            {"panel": "b", "group": module, "x": rank, "value": share.mean(), "low": low, "high": high},
            {"panel": "b", "group": f"{module} Gaussian", "x": rank, "value": chance},
        ]
    names = [module.removesuffix("_proj") for module in models.MODULES]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.9)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"b  within rank {rank}")
    axes.set_xlabel("of the full delta")
    return drawn


def _bars(axes: Axes, shares: pd.DataFrame, bars: Mapping[str, str]) -> list[dict[str, Any]]:
    colours = {**PART_COLOURS, "embedding": "0.55", "norm": "0.2", "other": "0.8"}
    drawn: list[dict[str, Any]] = []
    named: set[str] = set()
    for place, (condition, _) in enumerate(bars.items()):
        start = 0.0
        for part in PARTS:
            found = shares.loc[(shares["condition"] == condition) & (shares["part"] == part), "share"]
            share = float(found.iloc[0]) if len(found) else 0.0
            if not share:
                continue
            axes.barh(place, share, left=start, height=0.62, color=colours[part], edgecolor="white", linewidth=0.6)
            if share > 0.14:
                axes.text(start + share / 2, place, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5,
                          color="white")  # fmt: skip
            if share > 0.05 and part not in named:  # named once, at the first bar that shows it
                named.add(part)
                axes.text(start + share / 2, place - 0.36, PART_NAMES[part], ha="center", va="bottom", fontsize=6.5,
                          color=colours[part], fontweight="bold")  # fmt: skip
            drawn.append({"panel": "c", "group": f"{condition} {part}", "value": share})
            start += share
    axes.set_yticks(range(len(bars)), list(bars.values()))
    axes.set_ylim(len(bars) - 0.5, -1.0)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1.0])
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.set_title("c  by part")
    axes.set_xlabel("of the delta's squared norm")
    return drawn
