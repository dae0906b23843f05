"""The tables that tell seeds apart: their spread in the worst case, and every group of attacks seed by seed."""

from __future__ import annotations

from .comparisons import t_interval
from .document import Cell, Table
from .results import NOT_PLANNED, Results, mean
from .scores import percent
from .tables import Sizes, model_cell, number, score, share_cell

__all__ = ["groups_table", "seeds_table"]


def seeds_table(results: Results) -> Table:
    """The worst case of every model, seed by seed, where there is more than one."""
    rows, sizes = [], Sizes()
    for threat in results.named("threat"):
        for name in results.named("model"):
            groups = results.common(threat, [name], results.seeds(name))
            seeds = [s for s in results.seeds(name) if not {*groups, "clean"} & {*results.lacks(threat, name, s)}]
            each = [scores for seed in seeds if (scores := results.worst(threat, name, groups, seed))]
            n = min(map(len, each), default=0)
            found = [scores.first(n) for scores in each]
            means = [scores.mean for scores in found]
            if interval := t_interval(means):
                sizes.score(threat, found)
                low, high = (f"{100 * end:.1f}" for end in interval)
                values = ", ".join(percent(value, n) for value in means)
                spread = Cell(f"{100 * mean(means):.1f}", (f"[{low}, {high}]",), mean(means), strong=True)
                rows.append([model_cell(results, name), Cell(threat), number(len(means)), spread, Cell(values)])
    caption = f"The worst case of what all seeds have in common, accuracy in % with their t interval; {sizes}"
    return Table(caption, ["model", "threat", "seeds", "mean", "each seed"], rows, results.warnings)


def groups_table(results: Results, threat: str) -> Table | None:
    """The worst of each group for every seed, and p of its alarm; None where no model has a second seed yet."""
    groups, rows, several = results.groups(threat), [], False
    for name in results.named("model"):
        seeds = [seed for seed in results.seeds(name) if results.worst(threat, name, seed=seed)]
        several |= len(seeds) > 1
        for seed in seeds:
            clean, worst = results.clean(name, seed), results.worst(threat, name, seed=seed)
            cells = [_group(results, threat, name, group, seed) for group in groups]
            ends = [score([scores] if scores else []) for scores in (clean, worst)]
            rows.append([model_cell(results, name), number(seed), ends[0], *cells, ends[1]])
    caption = (
        f"Every group within {threat} seed by seed, accuracy in %; n is in the cells, p is that of the alarm, with the "
        "images that stand under the model's own gradient and fall here"
    )
    header = ["model", "seed", "clean", *groups, "worst so far"]
    return Table(caption, header, rows, results.warnings, folded=True) if several else None


def _group(results: Results, threat: str, name: str, group: str, seed: int) -> Cell:
    scores = results.worst(threat, name, [group], seed)
    if scores is None:
        return Cell(NOT_PLANNED)
    alarm = results.masked.get((threat, name, group, seed))
    more = (f"p = {alarm[0]:.1g}, {alarm[1]} that stood fall",) if alarm else ()
    return share_cell(scores.mean, len(scores), False, f"n = {len(scores):,}", *more)
