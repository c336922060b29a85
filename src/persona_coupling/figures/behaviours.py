"""One figure for behaviours of different depth: who shows them, and what is left of the raw model's coupling."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_coupling.figures.conditions import interval_rows
from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, theme
from persona_coupling.measures import Estimates

SAMPLED, FORCED = "contrast", "preference_contrast"
SHARE = (-0.75, 1.75)  # of the raw model's contrast: what is drawn; intervals beyond are cut at the edge
Cells = dict[tuple[str, str], str]  # (behaviour, row) -> condition


def by_behaviour(
    estimates: Estimates,
    behaviours: dict[str, str],
    blocks: dict[str, dict[str, str]],
    conditions: Cells,
    reference: dict[str, str],
    failed: set[str],
) -> tuple[Figure, pd.DataFrame]:
    """Behaviours across, models down. Above: the rate of the source and of the others. Below: what is left of the
    coupling, as a share of the reference's contrast, sampled and teacher-forced.

    `behaviours` maps a behaviour to its title; `blocks` a block's title to its rows and their labels; `conditions` says
    which condition a behaviour has in a row (absent: not measured); `reference` which one its shares are of; conditions
    in `failed` carry a dagger. A share is drawn only where the reference's own contrast is above zero with its whole
    interval. Returns the figure and its data: rates and contrasts, and shares beside the contrasts that they are of.
    """
    every, places, titles, height = _places(blocks)
    below = {
        block: rows for number, (block, rows) in enumerate(blocks.items()) if number
    }  # nothing is coupled in the first
    coupled, low_places, low_titles, low_height = _places(below)
    rates = _rows(estimates, behaviours, every, conditions, ["source_rate", "bystander_rate"])
    left = _shares(estimates, behaviours, coupled, conditions, reference)
    with theme():
        figure, grid = plt.subplots(
            2, len(behaviours), figsize=(WIDTH, 0.215 * (height + low_height) + 1.3), sharey="row", squeeze=False,
            height_ratios=[height + 0.6, low_height + 0.6],
        )  # fmt: skip
        for column, (behaviour, title) in enumerate(behaviours.items()):
            top, bottom = grid[0, column], grid[1, column]
            for measure, colour, filled, offset in (
                ("source_rate", SOURCE_COLOUR, True, -0.16), ("bystander_rate", BYSTANDER_COLOUR, False, 0.18),
            ):  # fmt: skip
                part = rates[(rates["behaviour"] == behaviour) & (rates["measure"] == measure)]
                interval_rows(top, _placed(part), places, colour=colour, filled=filled, offset=offset, label="")
            top.set_title(f" \n{title}", fontweight="normal")  # the empty line is for the panel's own title
            top.set_xlim(-0.06, 1.06)
            top.set_xticks([0, 0.5, 1])
            top.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
            _daggers(top, behaviour, places, conditions, failed)
            part = left[left["behaviour"] == behaviour]
            for measure, filled, offset in ((SAMPLED, True, -0.16), (FORCED, False, 0.18)):
                drawn = _placed(part[(part["measure"] == measure) & part["share"].notna()], "share_")
                interval_rows(bottom, drawn, low_places, colour="black" if filled else GREY, filled=filled, offset=offset,
                              label="")  # fmt: skip
            if part["share"].isna().all():
                bottom.text(0.5, 0.5, "the raw model\nhas no contrast", transform=bottom.transAxes, ha="center", va="center",
                            fontsize=6.5, color=GREY)  # fmt: skip
            for at, style in ((0, "-"), (0.5, (0, (2, 2))), (1, "-")):
                bottom.axvline(at, color="0.7", linestyle=style, linewidth=0.8, zorder=1)
            bottom.set_title(" ")
            bottom.set_xlim(*SHARE)
            bottom.set_xticks([0, 1])
            bottom.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        _label_rows(grid[0, 0], places, every, titles, height)
        _label_rows(grid[1, 0], low_places, coupled, low_titles, low_height)
        _legend(figure)
        _panel(grid[0, 0], "a  answers that show it", 17.0)
        _panel(grid[1, 0], "b  villain minus others, as a share of the raw model’s", 4.0)
    return figure, pd.concat([rates, left], ignore_index=True)


def _places(
    blocks: dict[str, dict[str, str]],
) -> tuple[dict[str, str], dict[str, float], list[tuple[float, str]], float]:
    """Row labels, each row's height on the page, each block's title with its height, and the whole height."""
    labels: dict[str, str] = {}
    places: dict[str, float] = {}
    titles: list[tuple[float, str]] = []
    y = 0.0
    for title, rows in blocks.items():
        titles.append((y, title))
        y += 0.85
        for row, label in rows.items():
            labels[row], places[row] = label, y
            y += 1.0
        y += 0.2
    return labels, places, titles, y


def _rows(
    estimates: Estimates, behaviours: dict[str, str], rows: dict[str, str], conditions: Cells, measures: list[str]
) -> pd.DataFrame:
    """One row per behaviour, model and measure that was estimated."""
    made: list[dict[str, Any]] = []
    for behaviour in behaviours:
        for row in rows:
            name = conditions.get((behaviour, row))
            for measure in measures:
                found = estimates.named.get(f"{name}.{measure}")
                if name is not None and found is not None:
                    made.append(
                        {"behaviour": behaviour, "row": row, "condition": name, "measure": measure, **found.as_dict()}
                    )
    return pd.DataFrame(made)


def _shares(
    estimates: Estimates,
    behaviours: dict[str, str],
    rows: dict[str, str],
    conditions: Cells,
    reference: dict[str, str],
) -> pd.DataFrame:
    """Contrasts with their share of the reference's: value and interval divided by the reference's value."""
    made = _rows(estimates, behaviours, rows, conditions, [SAMPLED, FORCED])
    shares = []
    for row in made.to_dict("records"):
        whole = estimates[f"{reference[row['behaviour']]}.{row['measure']}"]
        firm = whole.value is not None and whole.low is not None and whole.low > 0
        parts = {f"share_{end}": row[end] / whole.value if firm else None for end in ("value", "low", "high")}
        shares.append({**row, "share": parts["share_value"], **parts})
    return pd.DataFrame(shares)


def _placed(part: pd.DataFrame, prefix: str = "") -> pd.DataFrame:
    """Rows as `interval_rows` reads them: `condition` is the row, value and interval under their plain names."""
    made = part.assign(condition=part["row"])
    if prefix:
        for end in ("value", "low", "high"):
            made[end] = part[f"{prefix}{end}"].astype(float)
        made["low"], made["high"] = made["low"].clip(*SHARE), made["high"].clip(*SHARE)
    return made


def _daggers(axes: Axes, behaviour: str, places: dict[str, float], conditions: Cells, failed: set[str]) -> None:
    for row, y in places.items():
        if conditions.get((behaviour, row)) in failed:
            axes.text(
                1.0, y, "†", transform=axes.get_yaxis_transform(), ha="left", va="center", fontsize=7.5, color=GREY
            )


def _label_rows(
    axes: Axes, places: dict[str, float], labels: dict[str, str], titles: list[tuple[float, str]], height: float
) -> None:
    axes.set_yticks([places[row] for row in labels], list(labels.values()))
    axes.set_ylim(height - 0.35, -0.55)
    axes.tick_params(axis="y", length=0)
    for at, title in titles:
        axes.text(-0.06, at, title, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=7.5,
                  fontstyle="italic", color=GREY)  # fmt: skip


def _panel(axes: Axes, title: str, above: float) -> None:
    """A panel's title over its first axes, running on over the others: kept out of the layout, which would make room."""
    text = axes.annotate(title, (0, 1), xytext=(0, above), xycoords="axes fraction", textcoords="offset points",
                         fontsize=8.5, fontweight="bold", annotation_clip=False)  # fmt: skip
    text.set_in_layout(False)


def _legend(figure: Figure) -> None:
    handles = [
        mpl.lines.Line2D([], [], marker="o" if filled else "D", markersize=5.5 if filled else 4.5, color=colour,
                         markerfacecolor=colour if filled else "white", linewidth=1.6, label=label)
        for label, colour, filled in (
            ("villain", SOURCE_COLOUR, True), ("all others, mean", BYSTANDER_COLOUR, False),
            ("contrast, sampled", "black", True), ("contrast, teacher-forced", GREY, False),
        )
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
