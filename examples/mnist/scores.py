"""Verdicts on samples, kept sample by sample, and the statistics that say how much they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

__all__ = ["Scores", "holm", "mcnemar", "percent", "wilson", "worst"]

MOST_DRAWS = 74  # a count is kept as one printable character


@dataclass(frozen=True)
class Scores:
    """Per sample: how many of `draws` answers were right, and whether the most frequent answer was.

    `chosen` are counts over other draws of the noise, by which a worst case is chosen; without noise they are `counts`.
    """

    draws: int
    counts: tuple[int, ...]
    majority: tuple[bool, ...]
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def mean(self) -> float:
        """The share of right answers over samples and draws."""
        return sum(self.counts) / (self.draws * len(self.counts))

    @property
    def once(self) -> tuple[bool, ...]:
        """Whether each sample's answer is right, asked once: one of its draws, which is fixed, without regard to it."""
        which = np.random.default_rng(0).integers(self.draws, size=len(self))
        return tuple(bool(x) for x in which < np.array(self.counts))

    @property
    def right(self) -> float:
        """The share of samples whose most frequent answer is right."""
        return sum(self.majority) / len(self.majority)

    def first(self, n: int) -> Scores:
        """The scores of the first `n` samples."""
        return Scores(self.draws, self.counts[:n], self.majority[:n], self.chosen[:n])

    def pack(self) -> dict[str, Any]:
        """As JSON with one character a sample: the count, chr(48 + count). Without noise the counts say all."""
        packed: dict[str, Any] = {"draws": self.draws, "counts": _text(self.counts)}
        return packed if self.draws == 1 else packed | {
            "majority": _text(self.majority), "chosen": _text(self.chosen)
        }  # fmt: skip

    @staticmethod
    def unpack(packed: dict[str, Any]) -> Scores:
        """What `pack` has packed."""
        counts = _numbers(packed["counts"])
        majority, chosen = (_numbers(packed.get(name, packed["counts"])) for name in ("majority", "chosen"))
        return Scores(packed["draws"], counts, tuple(map(bool, majority)), chosen)


def _text(values: Sequence[int]) -> str:
    if values and max(values) > MOST_DRAWS:
        raise ValueError(f"Scores: expected at most {MOST_DRAWS} draws, got {max(values)}")
    return "".join(chr(48 + int(value)) for value in values)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(ord(character) - 48 for character in text)


def worst(candidates: Sequence[Scores]) -> Scores:
    """Sample by sample the scores of the candidate that looked worst over the draws that do not count.

    A sample is judged over the candidates that reach so far: some attacks are run on the first samples alone.
    """
    at = [
        min((c for c in candidates if i < len(c)), key=lambda c: c.chosen[i]) for i in range(max(map(len, candidates)))
    ]
    each = list(enumerate(at))
    return Scores(
        candidates[0].draws,
        tuple(c.counts[i] for i, c in each),
        tuple(c.majority[i] for i, c in each),
        tuple(c.chosen[i] for i, c in each),
    )


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval for a share seen in `n` independent samples."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding must not part them


def percent(share: float, n: int) -> str:
    """A share with its interval, in percent."""
    low, high = wilson(share, n)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def mcnemar(first: Sequence[bool], second: Sequence[bool], alternative: str = "two-sided") -> float:
    """Exact paired test on samples that only one of two has right; "greater": is `first` right more often?"""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5, alternative=alternative).pvalue)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that hold together for the whole family."""
    corrected, floor = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        floor = max(floor, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        corrected[index] = floor
    return corrected
