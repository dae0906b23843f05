"""The pictures of the report: accuracy over the end time, film strips, settling, distances, gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figures import STYLE
from ..scores import wilson
from .results import Results

__all__ = ["curve_figure", "distance_figure", "film_figure", "gradient_figure", "settling_figure"]

# Okabe and Ito's palette, told apart by colour-blind readers; dashes tell the lines apart in grey.
LOOKS = (
    ("#0072B2", "-"),
    ("#E69F00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#1A1A1A", (0, (5, 1))),
    ("#D55E00", (0, (1, 1))),
    ("#56B4E9", (0, (3, 1, 1, 1))),
    ("#999999", "-"),
    ("#F0E442", "--"),
    ("#8A5A44", "-."),
)
FRAMES = 8
Panels = tuple[tuple[str, str, tuple[float | None, float | None] | None], ...]
Values = Callable[[dict[str, Any], str], dict[str, list[float]]]


def _look(results: Results, name: str) -> dict[str, Any]:
    """The colour, dashes and label of a row, the same in every picture."""
    colour, dashes = LOOKS[list(results.rows).index(name) % len(LOOKS)]
    return {"color": colour, "linestyle": dashes, "linewidth": 1.8, "label": results.title(name)}


def _band(panel: Axes, results: Results, name: str, times: list[float], values: dict[str, list[float]]) -> None:
    """A median with its quartiles."""
    look = _look(results, name)
    panel.plot(times, values["median"], **look)
    panel.fill_between(times, values["low"], values["high"], color=look["color"], alpha=0.12, linewidth=0)


def _end_axis(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.set_xlabel("end time t")
    panel.grid(color="#E6E6E6", linewidth=0.8)


def curve_figure(results: Results, out: Path) -> Path:
    """Accuracy over the end time, a line for each net with its Wilson interval; training times along the foot."""
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(8.2, 4.4))
        for place, (name, curve) in enumerate(results.answered("curve").items()):
            look = _look(results, name)
            bounds = np.array([wilson(share, curve["n"]) for share in curve["clean"]]).T
            panel.plot(curve["ends"], 100 * np.array(curve["clean"]), **look)
            panel.fill_between(curve["ends"], *(100 * bounds), color=look["color"], alpha=0.15, linewidth=0)
            low, high = results.record(name, "train")["config"]["row"]["end"]
            foot = -5 - 5 * place
            panel.plot([low, high], [foot, foot], color=look["color"], linewidth=3, solid_capstyle="butt")
            panel.plot([low, high], [foot, foot], color=look["color"], marker="|", linestyle="none", markersize=7)
        _end_axis(panel)
        panel.set_ylim(-5 - 5 * len(results.answered("curve")), 102)
        panel.set_yticks(range(0, 101, 20))
        panel.set_ylabel("accuracy, %")
        panel.set_title(f"Accuracy over the end time ({curve['n']} test images; bars at the foot: trained to)")
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return _save(figure, results, out / "curve.png")


def film_figure(results: Results, name: str, out: Path) -> Path:
    """A channel of the state through time for three images: above on one scale, below each frame on its own."""
    record = results.record(name, "film").result
    films = np.array(record["states"])[:, :, 0]  # (times, images, 7, 7)
    shown = np.unique(np.linspace(0, len(films) - 1, FRAMES).round().astype(int))
    digits = record["digits"]
    with plt.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        figure, axes = plt.subplots(2 * len(digits), len(shown), figsize=(0.95 * len(shown) + 1.4, 6.8))
        bound = np.abs(films).max()
        for row, panels in enumerate(axes):
            image, own = row % len(digits), row >= len(digits)
            for column, (panel, k) in enumerate(zip(panels, shown, strict=True)):
                frame = films[k, image]
                limits = (frame.min(), frame.max()) if own else (-bound, bound)
                panel.imshow(frame, cmap="gray" if own else "RdBu_r", vmin=limits[0], vmax=limits[1])
                panel.set_xticks([])
                panel.set_yticks([])
                for spine in panel.spines.values():
                    spine.set_visible(False)
                if row == 0:
                    panel.set_title(f"t = {record['times'][k]:g}", fontsize=9, loc="center")
                if column == 0:
                    scale = "own scale" if own else "one scale"
                    label = f"digit {digits[image]}\n{scale}"
                    panel.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
        figure.suptitle(f"The first channel of the state, {results.title(name)}", fontsize=11, x=0.02, ha="left")
        figure.subplots_adjust(left=0.13, right=0.99, top=0.91, bottom=0.05, wspace=0.06, hspace=0.1)
        return _save(figure, results, out / f"film-{name}.png")


def settling_figure(results: Results, out: Path) -> Path:
    """Size of the field and of the state, and cosines of both with their last values."""
    panels = (
        ("field", "size of the field f", (0, 1.6)),
        ("state", "size of the state z", None),
        ("field_cosine", "cosine of f(z(t)) with its last value", (None, 1.02)),
        ("state_cosine", "cosine of z(t) with its last value", (None, 1.02)),
    )
    title = "Settling: medians and quartiles of {n} test images (sizes: root mean square over coordinates)"
    return _grid(results, out / "settling.png", panels, lambda cell, key: cell[key], title)


def distance_figure(results: Results, out: Path) -> Path:
    """Distances of the directions of states, within a class and between two."""
    panels = (
        ("same_class", "pairs of the same digit", (0, 1.6)),
        ("two_classes", "pairs of different digits", (0, 1.6)),
    )
    title = "Distance of the directions z / |z|: medians and quartiles of all pairs of {n} test images"
    return _grid(results, out / "distances.png", panels, lambda cell, key: cell[key], title)


def gradient_figure(results: Results, out: Path) -> Path:
    """Gradients at the pixels: their norms, and the share that are exactly zero."""
    panels = (
        ("ce", "norm of the gradient of cross-entropy", None),
        ("margin", "norm of the gradient of the margin", None),
        ("zero", "share of cross-entropy gradients that are 0", (-0.02, 1.02)),
    )

    def values(cell: dict[str, Any], key: str) -> dict[str, list[float]]:
        if key != "zero":
            return {k: [max(v, 1e-12) for v in row] for k, row in cell["gradient"][key].items()}
        share = cell["zero_gradients"]["ce"]
        return {"low": share, "median": share, "high": share}

    title = "Gradients at the pixels: medians and quartiles of {n} test images (0 is drawn at 1e-12)"
    return _grid(results, out / "gradients.png", panels, values, title)


def _grid(results: Results, path: Path, panels: Panels, values: Values, title: str) -> Path:
    """Panels over the end time and one legend below; a panel has limits, or None for a logarithmic scale."""
    cells = results.answered("dynamics")
    columns = 2 if len(panels) % 2 == 0 else len(panels)
    rows = len(panels) // columns
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.1 * rows + 1.1), squeeze=False)
        for panel, (key, label, limits) in zip(axes.flat, panels, strict=True):
            for name, cell in cells.items():
                _band(panel, results, name, cell["times"], values(cell, key))
            _end_axis(panel)
            if limits is None:
                panel.set_yscale("log")
            else:
                panel.set_ylim(*limits)
            panel.set_title(label)
        n = next(iter(cells.values()))["n"]
        figure.suptitle(title.format(n=n), fontsize=11, x=0.01, ha="left")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        return _save(figure, results, path)


def _save(figure: Figure, results: Results, path: Path) -> Path:
    note = "; ".join([results.run["data"], *results.warnings])
    figure.text(0.995, 0.002, note, fontsize=8, color="#888888", ha="right", va="bottom")
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
