"""A study as cells: what is to be computed, what each cell needs, and which is worth most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .attacks import Threat
from .presets import Group, Model, Preset

__all__ = ["Cell", "needs", "plan", "with_needs"]

KINDS = ("train", "clean", "attack", "spectra", "plane", "probe")  # of equal rank, the first are worth more


@dataclass(frozen=True)
class Cell:
    """One stage of a study: a kind of work on one model, trained with the study's seed plus `seed`."""

    kind: str
    model: str
    seed: int
    threat: Threat | None = None
    group: Group | None = None

    @property
    def name(self) -> str:
        """What its record is called."""
        threat = f"{self.threat.norm}-{self.threat.eps:g}" if self.threat else None
        group = self.group.name.replace(", ", "-") if self.group else None
        return "-".join(part for part in (self.kind, self.model, threat, group, f"s{self.seed}") if part)


def plan(preset: Preset) -> list[Cell]:
    """Every cell of the study, the most valuable first; what a cell needs comes before it.

    First comes the comparison that was said in advance, with all its seeds; then every model once; then the rest.
    """
    cells = [cell for model in preset.models for seed in range(model.seeds) for cell in _cells(preset, model, seed)]
    first = _ancestors(preset)

    def rank(cell: Cell) -> tuple[bool, int, int, int]:
        asked = cell.model in first and cell.kind in KINDS[:3] and cell.threat in (None, preset.primary[2])
        group = preset.suite.groups.index(cell.group) if cell.group else 0
        return not asked, 0 if asked else cell.seed, group, KINDS.index(cell.kind)

    return with_needs(preset, sorted(cells, key=rank))  # sorted() keeps the order of models


def _cells(preset: Preset, model: Model, seed: int) -> Iterator[Cell]:
    for kind in ("train", "clean", "probe"):
        yield Cell(kind, model.name, seed)
    if model.has_field:
        yield Cell("spectra", model.name, seed)
        if seed == 0:
            yield Cell("plane", model.name, seed)
    for group in preset.suite.groups:
        for threat in preset.suite.threats:
            if group.covers(model, threat) and not (group.once and seed):
                yield Cell("attack", model.name, seed, threat, group)


def _ancestors(preset: Preset) -> set[str]:
    """The models of the primary comparison and those they start from."""
    found: set[str] = set()
    names: list[str | None] = [*preset.primary[:2]]
    while names:
        name = names.pop()
        if name is not None and name not in found:
            found.add(name)
            names.append(preset.model(name).start)
    return found


def needs(preset: Preset, cell: Cell) -> tuple[Cell, ...]:
    """The trainings that must be there before a cell can be computed."""
    names = [preset.model(cell.model).start] if cell.kind == "train" else [cell.model]
    if cell.group:
        names += cell.group.others(preset.model(cell.model))
    return tuple(Cell("train", name, _seed(preset, name, cell.seed)) for name in names if name is not None)


def _seed(preset: Preset, name: str, seed: int) -> int:
    """The seed of another model that a cell needs; one that has fewer seeds lends its first."""
    return seed if seed < preset.model(name).seeds else 0


def with_needs(preset: Preset, cells: list[Cell]) -> list[Cell]:
    """The same cells in the same order, but every training that one needs before it, added where it is missing."""
    done: dict[Cell, None] = {}

    def visit(cell: Cell) -> None:
        for before in needs(preset, cell):
            visit(before)
        done.setdefault(cell)

    for cell in cells:
        visit(cell)
    return list(done)
