"""The pictures of the report, each on a light and on a dark ground; all are drawn from records, finished or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .audits import fields
from .curves import Lines, curves, plateaus
from .results import WHITE_BOX, Results, mean, seconds_of
from .scores import wilson

__all__ = [
    "COLOURS",
    "Ground",
    "bars_figure",
    "cost_figure",
    "picture",
    "picture_path",
    "radii_figure",
    "spectra_figure",
    "steps_figure",
]

# Okabe and Ito's palette, told apart by colour-blind readers; where its colours end, other dashes begin.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999")
DASHES = ("-", "--", ":")
MARKERS = "osD^vPX"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Ground:
    """What a picture stands on: its colour, the colours of text, of grids and of what is less important."""

    paper: str
    ink: str
    grid: str
    faint: str

    @property
    def style(self) -> dict[str, str]:
        """As matplotlib is told it."""
        inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        return {"figure.facecolor": self.paper, "axes.facecolor": self.paper, "grid.color": self.grid} | dict.fromkeys(
            inked, self.ink
        )


LIGHT, DARK = Ground("#FFFFFF", "#1A1A1A", "#E6E6E6", "#767676"), Ground("#16181D", "#E8E8E8", "#33363D", "#9A9A9A")


@contextmanager
def picture(results: Results, path: Path, ground: Ground, rows: int, columns: int, size: tuple[float, float],
            **shared: bool | str) -> Iterator[tuple[Figure, np.ndarray]]:  # fmt: skip
    """Panels to draw on; what has been drawn is saved under a note that says what data it is, and all warnings."""
    with plt.rc_context(STYLE | ground.style):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **shared)
        try:
            yield figure, axes.ravel()
            note = "; ".join([results.data, *results.warnings])
            figure.text(0.995, 0.003, note, fontsize=8, color=ground.faint, ha="right", va="bottom")
            figure.get_layout_engine().set(rect=(0, 0.17 / size[1], 1, 1 - 0.17 / size[1]))
            figure.savefig(drawn := BytesIO(), format="png", dpi=130)  # pages show at most 900 pixels of width
            # A palette takes a third of the size; with fewer colours than 256 the grids are tinted.
            Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        finally:
            plt.close(figure)


def bars_figure(results: Results, out: Path, ground: Ground = LIGHT) -> Path:
    """The worst case of every model as a bar with its interval, and each group's as a mark: one panel per threat."""
    threats, names, groups = results.named("threat"), results.drawn, results.named("group")
    columns = len(threats) if len(threats) <= 3 else -(-len(threats) // 2)
    rows = -(-len(threats) // columns)
    size = (9.0, rows * (0.42 * len(names) + 0.75) + 0.55)
    path = picture_path(out, "accuracy", ground)
    with picture(results, path, ground, rows, columns, size, sharex=True, sharey=True) as (figure, panels):
        marks = {"clean": ("|", ground.faint)} | {
            group: (MARKERS[i % 7], COLOURS[(i + i // 7) % 7]) for i, group in enumerate(groups)
        }
        for panel, threat in zip(panels, threats, strict=False):
            for position, name in enumerate(names):
                _bar(panel, results, threat, name, position, ground)
                _marks(panel, results, threat, name, position, marks)
            panel.set_title(threat)
            panel.set_xlabel("accuracy, %")
            panel.set_xlim(0, 119)
            panel.set_xticks(range(0, 101, 25))
            panel.grid(axis="x", linewidth=0.8)
            panel.tick_params(axis="y", length=0)
        for panel in panels[len(threats) :]:
            panel.set_axis_off()
        panels[0].set_yticks(range(len(names)), [results.called(name) for name in names])
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        handles = [plt.Line2D([], [], color=c, marker=m, linestyle="", label=label) for label, (m, c) in marks.items()]
        bar = plt.Rectangle((0, 0), 1, 1, color=ground.ink, alpha=0.85, label="worst of everything")
        figure.legend(handles=[bar, *handles], ncols=min(6, 1 + len(handles)), loc="outside upper right",
                      handlelength=1, columnspacing=1.1, handletextpad=0.4, fontsize=9)  # fmt: skip
    return path


def _bar(panel: Axes, results: Results, threat: str, name: str, position: int, ground: Ground) -> None:
    found = [scores for seed in results.shown(threat, name) if (scores := results.worst(threat, name, seed=seed))]
    if not found:
        why = results.missing("train", name) or results.missing("attack", name, 0, threat, WHITE_BOX) or "not run"
        panel.text(2, position, why, color=ground.faint, va="center", fontsize=9, style="italic")
        return
    share, n = mean(scores.mean for scores in found), min(map(len, found))
    low, high = wilson(share, n)
    panel.barh(position, 100 * share, 0.5, color=ground.ink, alpha=0.85, linewidth=0)
    error = [[100 * (share - low)], [100 * (high - share)]]
    panel.errorbar(100 * share, position, xerr=error, color=ground.faint, linewidth=1.4, capsize=2.5)
    label = f"{100 * share:.0f}" + ("*" if results.lacks(threat, name, results.shown(threat, name)[0]) else "")
    panel.text(118, position, label, ha="right", va="center", fontweight="bold")
    if results.is_masked(threat, name):
        panel.text(118, position + 0.45, "masked", ha="right", va="center", fontsize=8, color=COLOURS[3])


def _marks(
    panel: Axes, results: Results, threat: str, name: str, position: int, marks: dict[str, tuple[str, str]]
) -> None:
    for label, (marker, colour) in marks.items():
        seeds = results.shown(threat, name)
        found = [
            results.clean(name, seed) if label == "clean" else results.worst(threat, name, [label], seed)
            for seed in seeds
        ]
        if there := [scores.mean for scores in found if scores]:
            size, width = (11, 2) if marker == "|" else (5, 0.6)
            panel.plot(100 * mean(there), position, marker, color=colour, markersize=size, markeredgewidth=width,
                       markeredgecolor=colour if marker == "|" else panel.get_facecolor(),
                       clip_on=False, zorder=4)  # fmt: skip


def radii_figure(results: Results, out: Path, ground: Ground = LIGHT) -> Path | None:
    """Accuracy against the radius of the attack, one panel per norm; None before the first probe."""
    found = curves(results)
    return _lines(results, picture_path(out, "radii", ground), ground, found, "largest change, {}") if found else None


def steps_figure(results: Results, out: Path, ground: Ground = LIGHT) -> Path | None:
    """Accuracy against the number of PGD's steps; None before the first probe."""
    found = plateaus(results)
    return (
        _lines(results, picture_path(out, "steps", ground), ground, found, "steps of PGD, {}", True) if found else None
    )


def _lines(
    results: Results, path: Path, ground: Ground, found: dict[str, Lines], label: str,
    logarithmic: bool = False,
) -> Path:  # fmt: skip
    with picture(results, path, ground, 1, len(found), (9.0, 3.5), sharey=True) as (figure, panels):
        names = results.drawn
        for panel, (what, lines) in zip(panels, found.items(), strict=True):
            for name, points in lines.items():
                i = names.index(name)
                share = np.array([scores.mean for _, scores in points])
                low, high = np.array([wilson(scores.mean, len(scores)) for _, scores in points]).T
                error = 100 * np.stack([share - low, high - share])
                panel.errorbar([x for x, _ in points], 100 * share, yerr=error, color=COLOURS[i % 7],
                               linestyle=DASHES[i // 7 % 3], marker=MARKERS[i % 7], markersize=4.5, linewidth=1.6,
                               elinewidth=0.8, label=results.called(name))  # fmt: skip
            panel.set_xlabel(label.format(what))
            panel.grid(linewidth=0.8)
            panel.set_ylim(-3, 103)
            if logarithmic:
                ticks = sorted({steps for points in lines.values() for steps, _ in points})
                panel.set_xscale("log")
                panel.set_xticks(ticks, [f"{steps:g}" for steps in ticks])
                panel.minorticks_off()
            else:
                panel.set_xlim(left=0)
        panels[0].set_ylabel("accuracy, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    return path


def spectra_figure(results: Results, out: Path, ground: Ground = LIGHT) -> Path | None:
    """Histogram of the real parts of the eigenvalues, one row per field over one axis; None before the first record."""
    found, names = fields(results), results.drawn
    if not found:
        return None
    values = [value for field in found.values() for value in field["real_parts"]]
    edges, path = _bins(min(values), max(values)), picture_path(out, "spectra", ground)
    size = (8.6, 1.25 * len(found) + 0.9)
    with picture(results, path, ground, len(found), 1, size, sharex=True, sharey=True) as (figure, panels):
        for panel, (title, field) in zip(panels, found.items(), strict=True):
            share = np.full(len(field["real_parts"]), 100 / len(field["real_parts"]))
            colour = ground.faint if title == "untrained" else COLOURS[names.index(title.split()[0]) % 7]
            panel.hist(field["real_parts"], bins=edges, weights=share, color=colour)
            panel.axvline(0, color=ground.ink, linewidth=1, linestyle=":")
            panel.set_title(title)
            note = f"{100 * field['unstable']:.1f} % above 0, mean {field['mean']:z.2f}"
            panel.set_title(note, loc="right", fontsize=9, color=ground.faint)
            panel.grid(axis="y", linewidth=0.8)
        figure.supylabel("share of eigenvalues, %", fontsize=10)
        panels[-1].set_xlabel(f"real part of an eigenvalue of the field's Jacobian ({field['points']} training points)")
    return path


def _bins(low: float, high: float, count: int = 80) -> np.ndarray:
    """Equal bins with an edge at 0, so that no bin mixes the two signs."""
    width = max(high - low, 1e-6) / count
    return width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)


def cost_figure(results: Results, out: Path, ground: Ground = LIGHT) -> Path | None:
    """Seconds of training, those of the models a model started from included; None before the first training."""
    names = [name for name in results.named("model") if results.seeds(name)]
    if not names:
        return None
    path = picture_path(out, "cost", ground)
    with picture(results, path, ground, 1, 1, (8.6, 0.38 * len(names) + 1.0)) as (_, (panel,)):
        for position, name in enumerate(names):
            own, before = seconds(results, name), sum(seconds(results, other) for other in ancestors(results, name))
            panel.barh(
                position,
                before,
                0.6,
                color=ground.faint,
                alpha=0.45,
                label="the models it starts from" * (not position),
            )
            panel.barh(position, own, 0.6, left=before, color=COLOURS[0], label="its own training" * (not position))
            panel.text(before + own, position, f" {before + own:,.0f} s", va="center", fontsize=9)
        panel.set_yticks(range(len(names)), [results.called(name) for name in names])
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.margins(x=0.1)
        panel.tick_params(axis="y", length=0)
        panel.grid(axis="x", linewidth=0.8)
        panel.set_xlabel("seconds of training times processes, mean over seeds")
        panel.legend(loc="upper right", fontsize=9)
    return path


def seconds(results: Results, name: str) -> float:
    """How long a model was trained itself, the mean over its seeds."""
    found: Sequence[float] = [seconds_of(record) for (n, *_), record in results.found("train") if n == name]
    return mean(found) if found else 0.0


def ancestors(results: Results, name: str) -> list[str]:
    """The models that a model goes back to, the nearest first."""
    model = results.model(name)
    start = model and model["start"]
    return [start, *ancestors(results, start)] if start else []


def picture_path(out: Path, name: str, ground: Ground) -> Path:
    """Where a picture lies."""
    return out / f"{name}{'-dark' if ground == DARK else ''}.png"
