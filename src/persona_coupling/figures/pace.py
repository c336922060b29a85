"""What a whole run got done over time, seed by seed."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from persona_coupling.figures.theme import WIDTH, theme

STYLES = ("-", "--", "-.", ":")


def seeds_over_time(data: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """A line per seed; `data` has seed, minutes since the start, and finished, per cent of the seed's artifacts."""
    palette = sns.color_palette("colorblind")
    with theme():
        figure, axes = plt.subplots(figsize=(WIDTH, 2.4))
        for number, (seed, part) in enumerate(data.groupby("seed", sort=False)):
            style, colour = STYLES[number % len(STYLES)], palette[number % len(palette)]
            axes.plot(part["minutes"], part["finished"], style, color=colour, linewidth=1.4, clip_on=False)
            last = part.iloc[-1]
            axes.annotate(
                f"seed {seed}", (last["minutes"], last["finished"]), xytext=(0, 4), textcoords="offset points",
                ha="center", fontsize=7.5, color=colour,
            )  # fmt: skip
        axes.grid(axis="both", color="0.92")
        axes.set(xlabel="minutes since the command", ylabel="artifacts finished, %", xlim=(0, None), ylim=(0, 100))
    return figure, data
