"""Which differences between models may be claimed: paired on the same images, and the same from seed to seed."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import stdev

from scipy.stats import t as student

from .results import NOT_PLANNED, SIGNIFICANT, Results, mean
from .scores import Scores, holm, mcnemar

__all__ = ["RULE", "Comparison", "Pair", "compare", "family", "t_interval"]

RULE = (
    f"A difference is claimed only when the paired McNemar test is significant at {SIGNIFICANT:.0%} (Holm-corrected, "
    "also over seeds) and the seeds agree: all of them, two at least, on one side, and zero outside of the t interval."
)
REGULARISER = ("M3", "M1")  # beside each model against the one it started from


@dataclass(frozen=True)
class Pair:
    """Two models of one seed on the same `n` images: their accuracies (most frequent answer), and McNemar's p."""

    seed: int
    n: int
    first: float
    second: float
    p: float

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
    def agree(self) -> bool:
        """Whether all seeds, two at least, put the same model ahead, and by more than they differ."""
        if self.interval is None:
            return False
        signs = {(pair.difference > 0) - (pair.difference < 0) for pair in self.pairs}
        low, high = self.interval
        return len(signs) == 1 and not low <= 0 <= high

    def verdict(self, p: float | None = None) -> str:
        """What may be said, with `p` corrected for the family that the comparison belongs to."""
        if not self.pairs:
            return self.waiting
        significant = (self.p if p is None else p) < SIGNIFICANT
        if significant and self.agree:
            return "better" if self.difference > 0 else "worse"
        if significant:
            return "not claimed: one seed" if len(self.pairs) == 1 else "not claimed: the seeds disagree"
        return "not claimed: McNemar is not significant" if self.agree else "no difference"


def t_interval(values: list[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over seeds; None for a single one."""
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def compare(results: Results, first: str, second: str, threat: str | None) -> Comparison:
    """Pair two models on every seed for which both are complete; nothing is compared on a part of the attacks."""
    pairs, waiting = [], []
    for seed in results.named("seed"):
        planned = all(results.missing("train", name, seed) != NOT_PLANNED for name in (first, second))
        if not planned:
            continue
        lacking = [f"{name} {why}" for name in (first, second) if (why := _lacking(results, name, threat, seed))]
        if lacking:
            waiting.append(f"seed {seed}: {', '.join(lacking)}")
            continue
        one, other = (_scores(results, name, threat, seed) for name in (first, second))
        n = min(len(one), len(other))
        a, b = one.first(n), other.first(n)
        pairs.append(Pair(seed, n, a.right, b.right, mcnemar(a.majority, b.majority)))
    return Comparison(first, second, threat, tuple(pairs), "; ".join(waiting) or ("" if pairs else "not planned"))


def _lacking(results: Results, name: str, threat: str | None, seed: int) -> str | None:
    """Why a model cannot be compared."""
    for kind in ("train", "clean"):
        if why := results.missing(kind, name, seed):
            return why
    if threat is None:
        return None
    if lacking := results.lacks(threat, name, seed):
        return f"not run ({', '.join(lacking)})"
    return None if results.worst(threat, name, seed=seed) else "not attacked"


def _scores(results: Results, name: str, threat: str | None, seed: int) -> Scores:
    found = results.clean(name, seed) if threat is None else results.worst(threat, name, seed=seed)
    if found is None:
        raise RuntimeError(f"{name}, seed {seed}: no scores under {threat}, although none is missing")
    return found


def family(results: Results) -> list[tuple[Comparison, float]]:
    """All comparisons but the primary one, with p-values that Holm's correction makes hold together."""
    models, (noise, control, threat) = results.named("model"), results.primary
    asked = [(noise, control)]
    asked += [(name, built["start"]) for name in models if (built := results.model(name)) and built["start"]]
    asked += [REGULARISER] * (set(REGULARISER) <= set(models))
    found = [
        compare(results, first, second, where)
        for first, second in dict.fromkeys(asked)
        for where in (None, *results.named("threat"))
        if (first, second, where) != (noise, control, threat)
    ]
    found = [comparison for comparison in found if comparison.pairs]
    return list(zip(found, holm([comparison.p for comparison in found]), strict=True))
