"""Figures: each function returns a figure and the data it was drawn from. One module per kind of picture."""

from persona_coupling.figures.conditions import by_condition, interval_rows, persona_heatmap, training_curves
from persona_coupling.figures.theme import BYSTANDER_COLOUR, GREY, SOURCE_COLOUR, WIDTH, save, theme

__all__ = [
    "BYSTANDER_COLOUR",
    "GREY",
    "SOURCE_COLOUR",
    "WIDTH",
    "by_condition",
    "interval_rows",
    "persona_heatmap",
    "save",
    "theme",
    "training_curves",
]
