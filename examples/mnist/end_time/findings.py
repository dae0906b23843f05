"""What the records say in words: each sentence is made from numbers, and says nothing where they are missing."""

from __future__ import annotations

from typing import Any

from ..scores import percent
from .results import Results

__all__ = ["findings"]


def findings(results: Results) -> list[str]:
    """The findings that the records support, as a Markdown list; empty while nothing was measured."""
    lines = [*_forgetting(results), *_clipping(results), *_masking(results), *_settling(results), *_separation(results)]
    return ["## What came out\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []


def _forgetting(results: Results) -> list[str]:
    """How far from its training time each net keeps its accuracy."""
    parts = []
    for name, curve in results.answered("curve").items():
        best = max(curve["clean"])
        good = [end for end, share in zip(curve["ends"], curve["clean"], strict=True) if share >= best - 0.1]
        parts.append(f"{results.title(name)}: {min(good):g} to {max(good):g}")
    if not parts:
        return []
    span = f"{curve['ends'][0]:g} to {curve['ends'][-1]:g}"
    return [f"End times with an accuracy within 10 points of the net's best, of {span}: {'; '.join(parts)}."]


def _clipping(results: Results) -> list[str]:
    """The largest difference between the two FGSMs."""
    cells = [
        (name, column, record.result)
        for name in results.rows
        for column in results.columns
        if (record := results.record(name, "table", column))
    ]
    if not cells:
        return []
    name, column, cell = max(cells, key=lambda c: abs(c[2]["unclipped"] - c[2]["clipped"]))
    return [
        f"FGSM unclipped and clipped differ most for {results.title(name)} at t = {column}: "
        f"{percent(cell['unclipped'], cell['n'])} % against {percent(cell['clipped'], cell['n'])} %."
    ]


def _masking(results: Results) -> list[str]:
    """Where FGSM flatters a net: against the worst of the stronger attacks, with the share of gradients that vanish."""
    cells = results.answered("strong")
    if not cells:
        return []
    parts = []
    for name, cell in cells.items():
        parts.append(f"{results.title(name)} {100 * cell['FGSM']:.1f} -> {percent(cell['worst'], cell['n'])}")
    vanished = "; ".join(
        f"{results.title(name)} {100 * max(cell['zero_gradients']['ce']):.0f} %"
        for name, cell in results.answered("dynamics").items()
        if max(cell["zero_gradients"]["ce"]) > 0
    )
    lines = [f"Accuracy in % under FGSM -> under the worst of all attacks, at the time trained to: {'; '.join(parts)}."]
    if vanished:
        lines.append(
            "Cross-entropy's gradient at the pixels is exactly 0, because logits grow with the state, for up to this "
            f"share of the images at some end time: {vanished}. Attacks that follow it stand still there."
        )
    return lines


def _settling(results: Results) -> list[str]:
    """Equilibrium or steady state: does f go to zero, or only its change?"""
    parts = []
    for name, cell in results.answered("dynamics").items():
        place = _decade(cell["times"])
        field, cosine = cell["field"]["median"], cell["field_cosine"]["median"]
        parts.append(f"{results.title(name)} {field[0]:.3f} -> {field[-1]:.3f}, cosine {cosine[place]:.3f}")
    if not parts:
        return []
    first, before, last = cell["times"][0], cell["times"][place], cell["times"][-1]
    return [
        "No state can come to an equilibrium: f ends in a group normalisation, which fixes its size wherever z is "
        "(exactly so with one channel a group, as in the small net). Where f settles the state goes on in a straight "
        "line, and grows. Median size of f at "
        f"t = {first:g} -> {last:g}, and cosine of f at t = {before:g} with f at the end (1: settled): "
        f"{'; '.join(parts)}."
    ]


def _decade(times: list[float]) -> int:
    """The place of the time a decade before the last."""
    return min(range(len(times)), key=lambda k: abs(times[k] - times[-1] / 10))


def _separation(results: Results) -> list[str]:
    """Whether the last directions tell the classes apart."""
    parts = [_apart(results, name, cell) for name, cell in results.answered("dynamics").items()]
    return (
        [f"Median distance of directions at the last time, same digit / different digits: {'; '.join(parts)}."]
        if parts
        else []
    )


def _apart(results: Results, name: str, cell: dict[str, Any]) -> str:
    near, far = cell["same_class"]["median"][-1], cell["two_classes"]["median"][-1]
    return f"{results.title(name)} {near:.2f} / {far:.2f}"
