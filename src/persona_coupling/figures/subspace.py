"""Figures of experiment 02: what is left of an adapter, condition by condition, and where two changes overlap."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from persona_coupling.figures.conditions import interval_rows
from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, theme
from persona_coupling.measures import Estimates
from persona_coupling.models import MODULES
from persona_coupling.stats import CONFIDENCE

TALLEST = 7.7  # inches: what a page holds above a caption
PANELS = (
    ("a  sampled answers", "answers with the marker", "source_rate", "bystander_rate"),
    ("b  teacher-forced", "log-probability of the marker, nats", "fixed_logprob_source", "fixed_logprob_bystander"),
)


def remains(
    estimates: Estimates,
    blocks: dict[str, list[str]],
    labels: dict[str, str],
    ends: dict[str, tuple[str, str]],
    failed: set[str],
) -> tuple[Figure, pd.DataFrame]:
    """The villain (filled) against the others (open) under every condition, by block.

    `ends` names, for a block whose conditions stand between two, the raw and the wholly SFT'd model's condition: half
    way between them a dotted line runs through the block in panel b. A column on the right gives the share of the whole
    SFT's squared norm that was merged. A condition in `failed` carries a dagger. Returns the figure and its data.
    """
    places: dict[str, float] = {}
    titles: list[tuple[float, str]] = []
    y = 0.0
    for title, members in blocks.items():
        titles.append((y, title))
        y += 0.8
        for condition in members:
            places[condition] = y
            y += 1.0
        y += 0.3
    frames = []
    with theme():
        figure, grid = plt.subplots(
            1, 2, figsize=(WIDTH, min(0.235 * y + 0.85, TALLEST)), sharey=True, width_ratios=(1, 1.15)
        )
        for axes, (title, x_label, source, bystander) in zip(grid, PANELS, strict=True):
            for measure, colour, filled, offset in (
                (source, SOURCE_COLOUR, True, -0.15),
                (bystander, BYSTANDER_COLOUR, False, 0.2),
            ):
                part = estimates.frame([measure], list(places))
                frames.append(part.assign(panel=title))
                interval_rows(axes, part, places, colour=colour, filled=filled, offset=offset, label="")
            axes.set_title(title)
            axes.set_xlabel(x_label)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
        rates, logprobs = grid
        rates.set_xlim(-0.03, 1.03)
        rates.xaxis.set_major_locator(mpl.ticker.MultipleLocator(0.25))
        rates.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        rates.set_yticks(list(places.values()), [labels[c] + (" †" if c in failed else "") for c in places])
        rates.set_ylim(y - 0.3, -0.7)
        for at, title in titles:
            rates.text(-0.02, at, title, transform=rates.get_yaxis_transform(), ha="right", va="center", fontsize=7.5,
                       fontstyle="italic", color=GREY)  # fmt: skip
        for title, (raw, whole) in ends.items():
            values = [estimates[f"{c}.fixed_logprob_source"].value for c in (raw, whole)]
            if None not in values:
                middle = sum(v for v in values if v is not None) / 2
                low, high = (places[blocks[title][i]] + shift for i, shift in ((0, -0.5), (-1, 0.5)))
                logprobs.plot(
                    [middle, middle], [low, high], color=SOURCE_COLOUR, linestyle=":", linewidth=1.2, zorder=1
                )
                logprobs.annotate("half way", (middle, low), xytext=(0, 1), textcoords="offset points", ha="center",
                                  va="bottom", fontsize=6.5, color=SOURCE_COLOUR)  # fmt: skip
        _norm_column(logprobs, estimates, places)
        for who, colour, filled in (("villain", SOURCE_COLOUR, True), ("all others, mean", BYSTANDER_COLOUR, False)):
            rates.plot([], [], marker="o" if filled else "D", markersize=5.5 if filled else 4.5, color=colour,
                       markerfacecolor=colour if filled else "white", linewidth=1.6, label=who)  # fmt: skip
        figure.legend(
            *rates.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=7.5
        )
    return figure, pd.concat(frames, ignore_index=True)


def _norm_column(axes: plt.Axes, estimates: Estimates, places: dict[str, float]) -> None:
    """The share of the whole SFT's squared norm, as text right of the axes, where it is known."""
    shares = {c: estimates[f"{c}.norm_share"].value for c in places if f"{c}.norm_share" in estimates.named}
    known = {c: share for c, share in shares.items() if share is not None}
    if not known:
        return
    where = {"transform": axes.get_yaxis_transform(), "fontsize": 7, "color": GREY, "clip_on": False}
    axes.text(1.16, -0.75, "squared\nnorm", ha="right", va="bottom", **where)
    for condition, share in known.items():
        text = "< 1 %" if 0 < share < 0.005 else f"{share * 100:.0f} %"
        axes.text(1.16, places[condition], text, ha="right", va="center", **where)


def overlap_by_layer(table: pd.DataFrame, names: dict[str, str]) -> tuple[Figure, pd.DataFrame]:
    """The SFT's share of energy in the adapter's subspace over what chance gives, by layer: kinds of module across,
    sides down, on a logarithmic axis. One line per entry of `names` (condition -> name; at most two), seeds averaged;
    the grey band holds 95 % of random changes. `table` is an `Overlap` stage's. Returns the figure and its data.
    """
    ratios = table.assign(ratio=table["energy"] / table["expected"])
    kinds = [m for m in MODULES if m in set(ratios["module"])]
    tail = (1 - CONFIDENCE) / 2
    null = ratios[ratios["draw"] >= 0].groupby(["side", "module"])["ratio"].quantile([tail, 1 - tail]).unstack()
    ours = ratios[(ratios["draw"] < 0) & ratios["condition"].isin(list(names))]
    lines = ours.groupby(["condition", "side", "module", "layer"], sort=False)["ratio"].mean().reset_index()
    styles = dict(zip(names, ((sns.color_palette("colorblind")[2], "-"), (GREY, "--")), strict=False))
    with theme():
        figure, grid = plt.subplots(
            2, len(kinds), figsize=(WIDTH, 2.75), sharex=True, sharey="row", squeeze=False
        )  # fmt: skip
        for row, (side, title) in enumerate((("input", "what it reads"), ("output", "what it writes"))):
            for axes, module in zip(grid[row], kinds, strict=True):
                low, high = null.loc[(side, module)]
                axes.axhspan(low, high, color="0.85", linewidth=0, zorder=0)
                axes.axhline(1.0, color="0.3", linewidth=0.8, zorder=1)
                here = lines[(lines["side"] == side) & (lines["module"] == module)]
                for condition, (colour, dashes) in styles.items():
                    part = here[here["condition"] == condition].sort_values("layer")
                    axes.plot(part["layer"], part["ratio"], color=colour, linestyle=dashes, linewidth=1.1,
                              marker=".", markersize=3.5, label=names[condition])  # fmt: skip
                axes.set_yscale("log")
                axes.grid(axis="both", color="0.92")
                axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(2, integer=True))
                axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda v, _: f"{v:g}×"))
                axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
                if row == 0:
                    axes.set_title(module.removesuffix("_proj"), fontweight="normal", loc="center")
            grid[row, 0].set_ylabel(title)
        figure.supxlabel("layer", fontsize=8)
        handles, texts = grid[0, 0].get_legend_handles_labels()
        handles += [mpl.patches.Patch(color="0.85"), mpl.lines.Line2D([], [], color="0.3", linewidth=0.8)]
        figure.legend(
            handles, [*texts, "random changes, 95 %", "rank / dimension"], loc="outside upper center",
            ncols=len(handles), frameon=False, fontsize=6.5, handlelength=1.6, columnspacing=1.2,
        )  # fmt: skip
    return figure, lines.merge(null.reset_index().rename(columns={tail: "chance_low", 1 - tail: "chance_high"}))
