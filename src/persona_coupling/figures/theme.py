"""The one theme of all figures, and how a figure is kept: SVG, PNG, and the CSV it was drawn from.

A figure's bytes depend on its data alone: no dates, no versions, no random ids inside. Colour-blind safe, readable in
grey and at column width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from persona_coupling import outputs

WIDTH = 6.3  # inches: the text width of the paper
SOURCE_COLOUR, BYSTANDER_COLOUR = sns.color_palette("colorblind")[3], sns.color_palette("colorblind")[0]
GREY = "0.45"
DPI = 200  # of the PNG


@contextmanager
def theme() -> Iterator[None]:
    """The one theme of all figures."""
    with sns.axes_style("whitegrid"), sns.plotting_context("paper"):
        settings = {
            "font.family": "DejaVu Sans",
            "font.size": 8,
            "axes.labelsize": 8,
            "axes.titlesize": 8.5,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "xtick.labelsize": 7.5,
            "ytick.labelsize": 7.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid.axis": "x",
            "grid.color": "0.9",
            "svg.hashsalt": "persona-coupling",
            "svg.fonttype": "path",
            "figure.constrained_layout.use": True,
            "text.hinting": "none",  # a text's width is then the same share of the figure at every resolution
        }
        with mpl.rc_context(settings):
            yield


def save(figure: Figure, folder: Path, name: str, data: pd.DataFrame, stamp: str) -> Path:
    """Write `name`.svg, .png and .csv; a stamp is written across the figure. Returns the SVG's path."""
    if stamp:
        figure.text(
            0.5, 0.5, stamp, ha="center", va="center", rotation=20, fontsize=22, color="0.5", alpha=0.35, zorder=10
        )
    with theme():
        _settle(figure)
        with outputs.replaced(folder / f"{name}.svg") as place:
            figure.savefig(place, format="svg", metadata={"Date": None, "Creator": None})
        with outputs.replaced(folder / f"{name}.png") as place:
            figure.savefig(place, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    outputs.write(folder / f"{name}.csv", data.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return folder / f"{name}.svg"


def _settle(figure: Figure) -> None:
    """Lay the figure out once and round the axes' places: the layout's solver repeats itself to some 1e-13 only, and the
    SVG's ids are hashes of exact places. At the picture's resolution: texts that were measured at another one are cut off
    at the figure's edge."""
    figure.set_dpi(DPI)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        x, y, width, height = axes.get_position(original=True).bounds
        axes.set_position((round(x, 6), round(y, 6), round(width, 6), round(height, 6)), which="original")
