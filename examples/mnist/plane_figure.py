"""The picture of fields in two principal components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps

from .figures import LIGHT, Ground, picture, picture_path
from .records import Record
from .results import Results

__all__ = ["plane_figure", "plane_text"]

MOST = 4  # fields beside each other


def _planes(results: Results) -> dict[str, Record]:
    found = ((name, results.record("plane", name)) for name in results.drawn)
    return dict([(name, record) for name, record in found if record][:MOST])


def plane_figure(results: Results, out: Path, ground: Ground = LIGHT) -> Path | None:
    """Each field as arrows, and the way of some images to its end time, a colour a class; None before the first."""
    found, path = _planes(results), picture_path(out, "plane", ground)
    if not found:
        return None
    columns, classes = min(2, len(found)), colormaps["tab10"]
    rows = -(-len(found) // columns)
    with picture(results, path, ground, rows, columns, (9.0, 4.3 * rows + 0.2)) as (_, panels):
        for panel, (name, record) in zip(panels, found.items(), strict=False):
            plane = record.result
            grid, field, tracks = (np.array(plane[key]) for key in ("grid", "field", "tracks"))
            panel.quiver(*grid.T, *field.T, color=ground.faint, alpha=0.6, angles="xy", width=0.003)
            for k, label in enumerate(plane["labels"]):
                panel.plot(*tracks[:, k].T, color=classes(label), linewidth=0.9, alpha=0.8)
                panel.plot(*tracks[-1, k], color=classes(label), marker="o", markersize=3)
            panel.set_title(results.called(name))
            panel.set_xlabel(f"first component (both: {100 * plane['explained']:.0f} % of variance)")
            panel.set_ylabel("second")
        for panel in panels[len(found) :]:
            panel.set_axis_off()
    return path


def plane_text(results: Results) -> str:
    """How far the states go, and whether they come to rest."""
    parts = []
    for name, record in _planes(results).items():
        tracks = np.array(record.result["tracks"])
        steps = np.linalg.norm(np.diff(tracks, axis=0), axis=2)
        first, last = (np.median(steps[k]) for k in (0, -1))
        parts.append(f"{results.called(name)} {first:.2g} -> {last:.2g}")
    some = next(iter(_planes(results).values()), None)
    if some is None:
        return ""
    count, between = len(some.result["labels"]), some.result["times"][1]
    return (
        f"The fields (arrows) and the way of {count} test images from the features to the end time (points), a colour "
        f"a class, in the two principal components of the states on the way. Median way in the plane within the first "
        f"and the last {between:g} units of time: {'; '.join(parts)}."
    )
