"""What each picture of the report shows, in sentences whose every number is computed from the records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .results import Results

__all__ = ["curve", "distances", "film", "gradients", "settling"]


def curve(results: Results) -> str:
    """Where each net is best, and what is left of it at the ends of the axis."""
    parts = []
    for name, found in results.answered("curve").items():
        ends, clean = found["ends"], found["clean"]
        best = int(np.argmax(clean))
        parts.append(
            f"{results.title(name)} is best at t = {ends[best]:g} ({100 * clean[best]:.1f} %) and has "
            f"{100 * clean[0]:.1f} % at {ends[0]:g}, {100 * clean[-1]:.1f} % at {ends[-1]:g}"
        )
    return (
        f"Where each net is best (bars at the foot: trained to), and what is left far from there: {'; '.join(parts)}."
    )


def film(results: Results, name: str) -> str:
    """How much the state grows, and how far its pattern still turns."""
    record = results.record(name, "film").result
    states = np.array(record["states"])  # (times, images, ...)
    flat = states.reshape(*states.shape[:2], -1)
    sizes = np.linalg.norm(flat, axis=2).mean(1)
    directions = flat / np.linalg.norm(flat, axis=2, keepdims=True)
    times = np.array(record["times"])
    before = int(np.argmin(abs(times - times[-1] / 10)))
    cosine = (directions[before] * directions[-1]).sum(1).min()
    return (
        f"{results.title(name)}: what is shown of the state is {sizes[-1] / sizes[0]:.0f} times as large at t = "
        f"{times[-1]:g} as at {times[0]:g}; its pattern at t = {times[before]:g} has a cosine of {cosine:.2f} or more "
        f"with the last one, in each of the images."
    )


def settling(results: Results) -> str:
    """How the sizes of field and state change; the text above the tables has the cosines."""

    def grown(cell: dict[str, Any]) -> str:
        field, state = (cell[part]["median"][-1] / cell[part]["median"][0] for part in ("field", "state"))
        return f"{field:.2f} and {state:,.0f}"

    return (
        "Sizes of field and state, and how their directions come to rest. Median size at the last time over that at "
        f"the first, of the field and of the state: {_of_each(results, grown)}."
    )


def distances(results: Results) -> str:
    """Whether directions of different digits stay further apart than those of one."""

    def apart(cell: dict[str, Any]) -> str:
        first, last = (cell["two_classes"]["median"][k] / cell["same_class"]["median"][k] for k in (0, -1))
        return f"{first:.2f} -> {last:.2f}"

    return (
        "Median distance between digits over that within one, at the first and the last time (1: digits are not told "
        f"apart): {_of_each(results, apart)}."
    )


def gradients(results: Results) -> str:
    """How the gradient of the cross-entropy vanishes where that of the margin does not."""

    def smallest(cell: dict[str, Any]) -> str:
        ce, margin = (min(cell["gradient"][loss]["median"]) for loss in ("ce", "margin"))
        return f"{ce:.1g} and {margin:.1g}, {100 * max(cell['zero_gradients']['ce']):.0f} %"

    return (
        "Smallest median norm over the end times of the gradient of the cross-entropy and of the margin, and the "
        f"largest share of images whose cross-entropy's gradient is exactly 0: {_of_each(results, smallest)}."
    )


def _of_each(results: Results, say: Callable[[dict[str, Any]], str]) -> str:
    return "; ".join(f"{results.title(name)} {say(cell)}" for name, cell in results.answered("dynamics").items())
