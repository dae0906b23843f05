"""Draws the pictures of docs/theory.md: `python docs/theory_figures.py`, from the root of the repository."""

from __future__ import annotations

import inspect
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from theory_figures_fields import angles, bumps, divergence, gradients, worst_case
from theory_figures_flows import circles, crossing, gronwall, labels, sink
from theory_figures_linear import batch_jacobian, discs, squaring, transient
from theory_figures_noise import dropout_depth, growth_rates, noisy_clock, order_of_paths, stabilised
from theory_figures_style import STYLE

OUT = Path(__file__).parent / "_static" / "theory"
FIGURES = (  # in the order of the statements
    *(crossing, gronwall, sink, transient, discs, batch_jacobian, squaring),
    *(growth_rates, stabilised, dropout_depth, noisy_clock, order_of_paths),
    *(circles, labels, gradients, bumps, divergence, angles, worst_case),
)


def main() -> None:
    """Draw every picture into docs/_static/theory."""
    OUT.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        torch.manual_seed(0)
        panels = len(inspect.signature(draw).parameters)
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(1, panels, figsize=(3.6 * panels if panels > 1 else 4.2, 2.8), squeeze=False)
            with torch.no_grad():
                draw(*axes[0])
            figure.tight_layout()
            path = OUT / f"{draw.__name__}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            plt.close(figure)
        print(path)


if __name__ == "__main__":
    main()
