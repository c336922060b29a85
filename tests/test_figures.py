"""The theme: what is drawn lies inside the picture, at the picture's resolution and in the SVG."""

from __future__ import annotations

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from persona_coupling import figures
from persona_coupling.figures.theme import DPI

LABELS = [f"B  coupled, then SFT with {share} % marker rows in italics" for share in (0, 1, 5)]


def edge(path):
    """The darkest pixel of the picture's two outermost columns and rows."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return min(float(part.min()) for part in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))


def drawn():
    with figures.theme():
        figure, axes = plt.subplots(1, 2, figsize=(figures.WIDTH, 2))
        axes[0].plot([0.0, 1.0, 2.0], range(3))
        axes[0].set_yticks(range(3), LABELS, style="italic")
        axes[1].set_yticks([])
        axes[0].set_xlabel("answers with the marker")
    return figure


def test_no_label_is_cut_off_at_the_edge(tmp_path):
    """Long labels, whose widths were once measured at another resolution than they were drawn at."""
    figures.save(drawn(), tmp_path, "a", pd.DataFrame(), "")
    assert edge(tmp_path / "a.png") == 1.0
    assert matplotlib.image.imread(tmp_path / "a.png").shape[1] == round(figures.WIDTH * DPI)
    cut = drawn()
    cut.text(-0.01, 0.5, "outside")
    figures.save(cut, tmp_path, "b", pd.DataFrame(), "")
    assert edge(tmp_path / "b.png") < 0.5, "the control: what is cut off leaves ink at the edge"


@pytest.mark.parametrize("dpi", [72, 100, 300])
def test_a_text_is_as_wide_at_every_resolution(dpi):
    """As a share of the figure: the SVG is laid out at 72 dots per inch, the picture at 200."""
    widths = {}
    for resolution in (dpi, DPI):
        figure = drawn()
        with figures.theme():
            figure.set_dpi(resolution)
            figure.canvas.draw()
            boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
            widths[resolution] = np.array([box.width / figure.bbox.width for box in boxes])
        plt.close(figure)
    np.testing.assert_allclose(widths[dpi], widths[DPI], rtol=0.01)
