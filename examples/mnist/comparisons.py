"""Which differences between models may be claimed: paired on the same images, and the same from seed to seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import sqrt
from statistics import stdev

from scipy.stats import t as student

from .results import NOT_PLANNED, SIGNIFICANT, Results, mean
from .scores import Scores, holm, mcnemar

__all__ = ["RULE", "Comparison", "Pair", "awaited", "compare", "family", "span", "t_interval"]

RULE = (
    f"A difference is claimed only when the paired McNemar test is significant at {SIGNIFICANT:.0%} (Holm-corrected, "
    "also over seeds) and the seeds agree: all of them, two at least, on one side, and zero outside of the t interval."
)


UNPLANNED = "not planned"


@dataclass(frozen=True)
class Pair:
    """Two models of one seed on the same `n` images: accuracies, means over draws, and McNemar's p of one draw.

    `votes` are the accuracies of the most frequent answers; None where neither model draws.
    """

    seed: int
    n: int
    first: float
    second: float
    p: float
    votes: tuple[float, float] | None = None

    @property
    def difference(self) -> float:
        """How much more often the first is right."""
        return self.first - self.second


@dataclass(frozen=True)
class Comparison:
    """Two models, seed by seed, in the worst case within a threat; None: without an attack."""

    first: str
    second: str
    threat: str | None
    pairs: tuple[Pair, ...]
    waiting: str = ""  # why there is no pair, or what seeds are still missing

    @property
    def p(self) -> float:
        """The smallest p of the seeds after Holm's correction over them."""
        return min(holm([pair.p for pair in self.pairs]), default=1.0)

    @property
    def difference(self) -> float:
        """The mean over seeds."""
        return mean(pair.difference for pair in self.pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval of the difference over seeds; None for a single one."""
        return t_interval([pair.difference for pair in self.pairs])

    @property
    def by_vote(self) -> list[float]:
        """The differences of the seeds by the most frequent answers; none where neither model draws."""
        return [pair.votes[0] - pair.votes[1] for pair in self.pairs if pair.votes]

    @property
    def one_sided(self) -> bool:
        """Whether all seeds put the same model ahead."""
        return len({(pair.difference > 0) - (pair.difference < 0) for pair in self.pairs}) == 1

    @property
    def agree(self) -> bool:
        """Whether all seeds, two at least, put the same model ahead, and by more than they differ."""
        return self.one_sided and self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def verdict(self, p: float | None = None) -> str:
        """What may be said, with `p` corrected for the family that the comparison belongs to."""
        if self.waiting:
            return f"not answered yet: {self.waiting}"
        if len(self.pairs) == 1:
            return "not claimed: one seed"
        significant = (self.p if p is None else p) < SIGNIFICANT
        if significant and self.agree:
            return "better" if self.difference > 0 else "worse"
        if significant:
            return "not claimed: zero is in the t interval" if self.one_sided else "not claimed: the seeds disagree"
        return "not claimed: McNemar is not significant" if self.agree else "no difference"


def t_interval(values: list[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over seeds; None for a single one."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def span(interval: tuple[float, float]) -> str:
    """An interval of a difference, in points."""
    return f"[{100 * interval[0]:+z.1f}, {100 * interval[1]:+z.1f}]"


def compare(results: Results, first: str, second: str, threat: str | None) -> Comparison:
    """Pair two models on every seed for which both are complete.

    All are judged on the images that they have in common. Attacks by a model's own gradient count where both models had
    them; those that do without count for whoever had them: a model without a block has no way around it, and must not
    thereby spare a model whose gradient is masked.
    """
    names, found, waiting = (first, second), {}, []
    planned = [
        seed
        for seed in results.named("seed")
        if all(results.missing("train", name, seed) != NOT_PLANNED for name in names)
    ]
    groups = {name: results.counted(threat, name, names, planned) if threat else [] for name in names}
    for seed in planned:
        lacking = [f"{name} {why}" for name in names if (why := _lacking(results, name, threat, groups[name], seed))]
        if lacking:
            waiting.append(f"seed {seed}: {', '.join(lacking)}")
        else:
            found[seed] = [_scores(results, name, threat, groups[name], seed) for name in names]
    n = min((len(scores) for each in found.values() for scores in each), default=0)
    pairs = []
    for seed, each in found.items():
        a, b = (scores.first(n) for scores in each)
        votes = (a.right, b.right) if max(a.draws, b.draws) > 1 else None
        pairs.append(Pair(seed, n, a.mean, b.mean, mcnemar(a.once, b.once), votes))
    return Comparison(first, second, threat, tuple(pairs), "; ".join(waiting) or ("" if pairs else UNPLANNED))


def _lacking(results: Results, name: str, threat: str | None, groups: list[str], seed: int) -> str | None:
    """Why a model cannot be compared."""
    for kind in ("train", "clean"):
        if why := results.missing(kind, name, seed):
            return why
    if threat is None:
        return None
    if lacking := [group for group in groups if results.missing("attack", name, seed, threat, group)]:
        return f"not run ({', '.join(lacking)})"
    return None if groups else "not attacked"


def _scores(results: Results, name: str, threat: str | None, groups: list[str], seed: int) -> Scores:
    found = results.worst(threat, name, groups, seed) if threat else results.clean(name, seed)
    if found is None:
        raise RuntimeError(f"{name}, seed {seed}: no scores under {threat}, although none is missing")
    return found


def family(results: Results) -> list[tuple[Comparison, float | None]]:
    """All comparisons but the primary one, with p-values that Holm's correction makes hold together.

    One seed cannot be claimed to differ whatever its p, so it does not belong to the family: its p is None.
    """
    found = [comparison for comparison in _others(results) if comparison.pairs]
    corrected = iter(holm([comparison.p for comparison in found if len(comparison.pairs) > 1]))
    return [(comparison, next(corrected) if len(comparison.pairs) > 1 else None) for comparison in found]


def awaited(results: Results) -> Counter[str]:
    """By threat how many comparisons have no pair of complete models yet, and may still have one."""
    without = [comparison for comparison in _others(results) if comparison.threat and not comparison.pairs]
    return Counter(c.threat for c in without if c.waiting != UNPLANNED and "diverged" not in c.waiting)


def _others(results: Results) -> list[Comparison]:
    """Every model beside its control, or the one it started from, clean and within each threat; not the primary one."""
    noise, control, threat = results.primary
    asked = [(noise, control)] + [(name, other) for name in results.named("model") if (other := results.control(name))]
    return [
        compare(results, first, second, where)
        for first, second in dict.fromkeys(asked)
        for where in (None, *results.named("threat"))
        if (first, second, where) != (noise, control, threat)
    ]
