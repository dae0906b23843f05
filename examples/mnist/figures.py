"""The pictures of the report: accuracy bars and the histogram of eigenvalues."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import Results
from .scores import wilson

__all__ = ["bars_figure", "spectra_figure"]

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
KINDS = {"clean": "#BBBBBB", "white-box": "#0072B2", "bypass": "#E69F00", "worst": "#1A1A1A"}
LINES = ("#999999", "#0072B2", "#D55E00", "#009E73")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "svg.hashsalt": "odelayers",
}


def bars_figure(results: Results, out: Path) -> Path:
    """Accuracy of every model, clean and under each kind of attack, with 95 % intervals: one panel per threat."""
    with plt.rc_context(STYLE):
        panels = list(results.attacks)
        figure, axes = plt.subplots(len(panels), 1, figsize=(8.6, 2.3 * len(panels) + 0.7), sharex=True, squeeze=False)
        for panel, threat in zip(axes[:, 0], panels, strict=True):
            _bars(panel, results, threat)
        axes[0, 0].legend(
            ncols=len(KINDS), loc="lower right", bbox_to_anchor=(1, 1.0), handlelength=1, columnspacing=1.2
        )
        return _save(figure, results, out / "accuracy.png")


def _bars(panel: Axes, results: Results, threat: str) -> None:
    names = list(results.attacks[threat])
    width = 0.8 / len(KINDS)
    for offset, (kind, colour) in enumerate(KINDS.items()):
        for position, name in enumerate(names):
            cell = results.cell(threat, name, kind)
            x = position + (offset - (len(KINDS) - 1) / 2) * width
            if cell is None:
                continue
            n, share = len(cell["share"]), float(np.mean(cell["share"]))
            low, high = wilson(share, n)
            label = kind if position == 1 else None
            panel.bar(x, 100 * share, 0.9 * width, color=colour, label=label, linewidth=0)
            error = [[100 * (share - low)], [100 * (high - share)]]
            panel.errorbar(x, 100 * share, error, color="#808080", linewidth=1.2, capsize=2)
            if kind == "worst":
                panel.text(x, 100 * high + 2, f"{100 * share:.0f}", ha="center", fontsize=9, fontweight="bold")
            if kind == "white-box" and results.is_masked(threat, name):
                panel.text(x - 0.45 * width, 100 * high + 2, "masked", fontsize=9, color=colour)
    panel.set_xticks(range(len(names)), [_wrapped(results.title(name)) for name in names])
    panel.tick_params(axis="x", length=0)
    panel.set_ylim(0, 112)
    panel.set_yticks(range(0, 101, 25))
    panel.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    panel.set_ylabel("accuracy, %")
    panel.set_title(f"{threat}, {n} test images")


def _wrapped(title: str) -> str:
    return title.replace(", ", ",\n").replace(" + ", "\n+ ").replace("gradient ", "gradient\n")


def spectra_figure(results: Results, out: Path) -> Path:
    """Histogram of the real parts of the eigenvalues, one row per field over one axis."""
    fields = results.spectra.result
    values = [value for field in fields.values() for value in field["real_parts"]]
    edges = _bins(min(values), max(values))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(fields), 1, figsize=(7.6, 1.3 * len(fields) + 0.9), sharex=True, sharey=True)
        for panel, colour, (name, field) in zip(np.atleast_1d(axes), LINES, fields.items(), strict=False):
            title = name if name == "untrained" else results.title(name)
            share = np.full(len(field["real_parts"]), 100 / len(field["real_parts"]))
            panel.hist(field["real_parts"], bins=edges, weights=share, color=colour)
            panel.axvline(0, color="#1A1A1A", linewidth=1, linestyle=":")
            panel.set_title(title)
            note = f"{100 * field['unstable']:.1f} % above 0, mean {field['mean']:z.2f}"
            panel.set_title(note, loc="right", fontsize=9, color="#444444")
            panel.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        figure.supylabel("share of eigenvalues, %", fontsize=10)
        axes[-1].set_xlabel(f"real part of an eigenvalue of the field's Jacobian ({field['points']} training points)")
        return _save(figure, results, out / "spectra.png")


def _bins(low: float, high: float, count: int = 80) -> np.ndarray:
    """Equal bins with an edge at 0, so that no bin mixes the two signs."""
    width = (high - low) / count
    return width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)


def _save(figure: Figure, results: Results, path: Path) -> Path:
    note = "; ".join([results.run["data"], *results.warnings])
    figure.supxlabel(note, fontsize=8, color="#888888", x=0.99, ha="right")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path
