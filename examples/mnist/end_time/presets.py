"""The presets of the end-time study as data: which nets, trained to which end time, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log10

from .models import Steps

__all__ = ["BLOG", "PRESETS", "Pgd", "Preset", "Row"]

NO_EVIDENCE = "a smoke run, not evidence"
SMALL, LARGE = 16, 128  # channels


@dataclass(frozen=True)
class Pgd:
    """Adversarial training in L-inf: from a random point of the ball, `steps` steps of `size`, inside [0, 1]."""

    eps: float = 0.3
    size: float = 0.01
    steps: int = 40


@dataclass(frozen=True)
class Row:
    """One net and its training: `batches` of Adam, each solved to a time drawn from `end` = (lowest, highest)."""

    name: str
    net: str
    channels: int
    end: tuple[float, float]
    batches: int
    pgd: Pgd | None = None
    batch: int = 128
    lr: float = 1e-3
    needs_gpu: bool = False

    @property
    def title(self) -> str:
        """What the row is called in tables."""
        return f"{self.net}, T = {self.trained_to}" + (", adversarial" if self.pgd else "")

    @property
    def trained_to(self) -> str:
        """The training end time in words."""
        low, high = self.end
        return f"{low:g}" if low == high else f"U({low:g}, {high:g})"

    @property
    def usual_end(self) -> float:
        """The mean of the training end times: where the net is at home."""
        return sum(self.end) / 2


@dataclass(frozen=True)
class Preset:
    """A whole study. None for a number of images means all of them."""

    name: str
    warning: str | None
    rows: tuple[Row, ...]
    training: Steps
    evaluation: Steps
    checks: tuple[Steps, ...]  # the clean accuracies once more, stepped otherwise
    drawn: tuple[str, ...]  # rows of the table that are repeated with the pooling's regions drawn
    columns: tuple[float, ...]  # end times of the table
    times: tuple[float, ...]  # end times of the curves
    curve_images: int  # for the comparison of solvers too
    strong_images: int  # attacked by PGD too
    dynamics_images: int
    eps: float = 0.3
    train_images: int | None = None
    validation_images: int | None = None
    test_images: int | None = None


# The blog's table: standard and adversarial accuracy in percent, by net and training end time, at its four columns.
BLOG = {
    ("small", "10"): {1: (49.45, 0), 10: (98.64, 9.34), 100: (26.35, 12.83), 500: (9.94, 8.09)},
    ("small", "U(10, 100)"): {1: (61.54, 0), 10: (98.46, 0.52), 100: (98.31, 23.64), 500: (94.35, 11.67)},
    ("small", "100"): {1: (37.58, 0), 10: (66.43, 0), 100: (98.52, 13.25), 500: (72.16, 14.16)},
    ("large", "10"): {1: (97.06, 0.18), 10: (98.93, 30.76), 100: (91.43, 28.20), 500: (9.35, 8.57)},
    ("large", "U(10, 100)"): {1: (72.84, 0.15), 10: (99.08, 70.67), 100: (99.11, 85.98), 500: (94.66, 62.29)},
    ("large", "100"): {1: (78.88, 0.59), 10: (98.85, 83.13), 100: (99.01, 92.62), 500: (96.68, 78.60)},
}
ENDS = ((1.0, 1.0), (10.0, 10.0), (10.0, 100.0), (100.0, 100.0))


def _rows(net: str, channels: int, batches: tuple[int, int, int, int], adversarial: int, pgd: Pgd) -> tuple[Row, ...]:
    """The blog's rows, the row T = 1 that its figures show, and the adversarially trained net."""
    gpu = channels == LARGE
    usual = [
        Row(f"{net}-{low:g}" + (f"-{high:g}" if high > low else ""), net, channels, (low, high), n, needs_gpu=gpu)
        for (low, high), n in zip(ENDS, batches, strict=True)
    ]
    return *usual, Row(f"{net}-1-adversarial", net, channels, ENDS[0], adversarial, pgd, needs_gpu=gpu)


def _geometric(low: float, high: float, per_decade: int) -> tuple[float, ...]:
    """Times from `low` to `high`, `per_decade` of them equally apart in the logarithm; powers of ten are exact."""
    first, last = round(per_decade * log10(low)), round(per_decade * log10(high))
    return tuple(float(f"{10 ** (k / per_decade):.3g}") for k in range(first, last + 1))


QUICK = Preset(
    name="quick",
    warning=NO_EVIDENCE,
    rows=_rows("small", SMALL, batches=(430, 300, 200, 200), adversarial=200, pgd=Pgd(size=0.04, steps=10)),
    training=Steps(density=5),
    evaluation=Steps(density=5),
    checks=(Steps(density=10), Steps(tolerance=1e-3)),
    drawn=("small-10-100",),
    columns=(1, 10, 100),
    times=_geometric(0.1, 100, 4),
    curve_images=500,
    strong_images=100,
    dynamics_images=100,
    validation_images=1_000,
    test_images=1_000,
)

SMOKE = replace(
    QUICK,
    name="smoke",
    rows=_rows("small", 4, batches=(40, 30, 20, 20), adversarial=10, pgd=Pgd(size=0.1, steps=4)),
    training=Steps(density=3),
    evaluation=Steps(density=3),
    checks=(Steps(density=6), Steps(tolerance=1e-3)),
    times=_geometric(0.1, 100, 2),
    curve_images=100,
    strong_images=20,
    dynamics_images=40,
    train_images=4_000,
    validation_images=200,
    test_images=100,
)

FULL = replace(
    QUICK,
    name="full",
    warning=None,
    rows=_rows("small", SMALL, batches=(860, 860, 860, 860), adversarial=300, pgd=Pgd())
    + _rows("large", LARGE, batches=(43_000,) * 4, adversarial=43_000, pgd=Pgd()),
    columns=(1, 10, 100, 500),
    times=_geometric(0.1, 1000, 6),
    curve_images=2_000,
    strong_images=200,
    dynamics_images=200,
    validation_images=5_000,
    test_images=None,
)

PRESETS = {preset.name: preset for preset in (SMOKE, QUICK, FULL)}
