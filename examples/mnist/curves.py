"""What the probes found on the way: accuracy over the radius of the attack, and over its number of steps."""

from __future__ import annotations

from collections.abc import Iterator

from .document import Cell, Table
from .results import NOT_PLANNED, Results
from .scores import Scores
from .tables import number, score

__all__ = ["Lines", "curves", "plateaus", "radii_table"]

Lines = dict[str, list[tuple[float, Scores]]]  # points by model: a radius or a number of steps, and the verdicts


def curves(results: Results) -> dict[str, Lines]:
    """By norm and model: the verdicts at every radius of the probes, from clean onwards."""
    found: dict[str, Lines] = {}
    for name, row, n in _probes(results, "radius"):
        norm, eps = row["threat"].split()
        clean = results.clean(name)
        start = [(0.0, clean.first(n))] if clean else []
        found.setdefault(norm, {}).setdefault(name, start).append((float(eps), Scores.unpack(row)))
    return _sorted(found)


def plateaus(results: Results) -> dict[str, Lines]:
    """By threat and model: the verdicts after every number of steps of PGD."""
    found: dict[str, Lines] = {}
    for name, row, _ in _probes(results, "steps"):
        steps = float(row["attack"].removeprefix("PGD-").split()[0])
        found.setdefault(row["threat"], {}).setdefault(name, []).append((steps, Scores.unpack(row)))
    return _sorted(found)


def _sorted(found: dict[str, Lines]) -> dict[str, Lines]:
    return {
        panel: {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}
        for panel, lines in found.items()
    }


def _probes(results: Results, kind: str) -> Iterator[tuple[str, dict[str, str], int]]:
    for name in results.drawn:
        record = results.record("probe", name)
        for row in record.result["probes"] if record else ():
            if row["probe"] == kind:
                yield name, row, record.result["n"] if record else 0


def radii_table(results: Results) -> Table:
    """The curves over the radius as numbers."""
    found = curves(results)
    names = [name for name in results.drawn if any(name in lines for lines in found.values())]
    rows = []
    for norm, lines in found.items():
        values = {name: dict(points) for name, points in lines.items()}
        for eps in sorted({eps for points in lines.values() for eps, _ in points}):
            cells = [values.get(name, {}).get(eps) for name in names]
            shown = [score([scores] if scores else [], NOT_PLANNED) for scores in cells]
            rows.append([Cell(norm), number(eps), *shown])
    n = sorted({n for _, _, n in _probes(results, "radius")})
    caption = f"Accuracy in % by radius, PGD on the margin; n = {' or '.join(map(str, n)) or '0, nothing is run yet'}"
    return Table(caption, ["norm", "radius", *map(results.called, names)], rows, results.warnings, folded=True)
