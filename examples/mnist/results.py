"""The records of a finished run, read together: what the report and its pictures are drawn from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .evaluation import holm, mcnemar, wilson
from .records import Record, read

__all__ = ["SIGNIFICANT", "Results", "mean", "percent"]

SIGNIFICANT = 0.05


class Results:
    """The records that `run.json` names."""

    def __init__(self, out: Path) -> None:
        self.run = read(out / "run.json")
        folder = out / "records"
        self.train = {name: read(folder / file) for name, file in self.run["train"].items()}
        self.clean = {name: read(folder / file) for name, file in self.run["clean"].items()}
        self.attacks = {
            threat: {name: read(folder / file) for name, file in files.items()}
            for threat, files in self.run["attacks"].items()
        }
        self.spectra = read(folder / self.run["spectra"])
        self.masked = self._masked()

    @property
    def warnings(self) -> list[str]:
        """What must stand on every table and picture: the preset's warning, and that the data is not MNIST."""
        return [text for text in (self.run["warning"], self.run["banner"] and "NOT MNIST") if text]

    def title(self, name: str) -> str:
        """What a model is called in tables."""
        return self.train[name]["config"]["model"]["title"]

    def cell(self, threat: str, name: str, kind: str) -> dict[str, Any] | None:
        """Per-sample scores of a kind of attack ("clean", "white-box", "bypass", "worst"); None where none was run."""
        return self.attacks[threat][name].result.get(kind)

    def is_masked(self, threat: str, name: str) -> bool:
        """Whether a bypass breaks significantly more than the white-box attacks do."""
        return self.masked.get((threat, name), 1.0) < SIGNIFICANT

    def records(self) -> Iterable[Record]:
        """Every record of the run."""
        yield from self.train.values()
        yield self.spectra
        yield from self.clean.values()
        for row in self.attacks.values():
            yield from row.values()

    def _masked(self) -> dict[tuple[str, str], float]:
        """Holm-corrected p-value, per threat and model, of "the bypass leaves fewer samples right than white-box"."""
        raw = {
            (threat, name): mcnemar(
                record.result["white-box"]["majority"], record.result["bypass"]["majority"], "greater"
            )
            for threat, row in self.attacks.items()
            for name, record in row.items()
            if "bypass" in record.result
        }
        return dict(zip(raw, holm(list(raw.values())), strict=True))


def percent(share: float, n: int) -> str:
    """A share with its interval, in percent."""
    low, high = wilson(share, n)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def mean(values: Iterable[float]) -> float:
    """The mean of per-sample scores."""
    values = list(values)
    return sum(values) / len(values)
