"""The records of a run, finished or not, read together: what the report and its pictures are drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .records import Record, read
from .scores import Scores, holm, mcnemar, wilson, worst

__all__ = ["SIGNIFICANT", "WHITE_BOX", "Results", "percent"]

SIGNIFICANT = 0.05
WHITE_BOX = "white-box"


class Results:
    """The records that `run.json` names, by kind, model, seed, threat and group; None where there is none."""

    def __init__(self, out: Path) -> None:
        self.run = read(out / "run.json")
        self.lost = [cell for cell in self.run["cells"] if cell["lost"]]
        self._records = {
            (c["kind"], c["model"], c["seed"], c["threat"], c["group"]): read(out / "records" / c["file"])
            for c in self.run["cells"]
            if c["file"]
        }
        self.masked = self._masked()

    @property
    def warnings(self) -> list[str]:
        """What must stand on every table and picture: the preset's warning, and that the data is not MNIST."""
        return [text for text in (self.run["warning"], self.run["banner"] and "NOT MNIST") if text]

    def named(self, part: str) -> list[Any]:
        """The models, seeds, threats or groups ("model", ...) of the plan, in its order."""
        found = dict.fromkeys(cell[part] for cell in self.run["cells"] if cell[part] is not None)
        return sorted(found, key=lambda name: (len(str(name)), str(name))) if part == "model" else list(found)

    def record(
        self, kind: str, model: str, seed: int = 0, threat: str | None = None, group: str | None = None
    ) -> Record | None:
        """One record."""
        return self._records.get((kind, model, seed, threat, group))

    def title(self, name: str) -> str:
        """What a model is called in tables."""
        record = self.record("train", name)
        return record["config"]["model"]["title"] if record else name

    def seeds(self, name: str) -> list[int]:
        """The seeds with which a model has been trained."""
        return [seed for seed in self.named("seed") if self.record("train", name, seed)]

    def clean(self, name: str, seed: int = 0) -> Scores | None:
        """The scores without an attack, on the whole test set."""
        record = self.record("clean", name, seed)
        return record and Scores.unpack(record.result["clean"])

    def attacks(self, threat: str, name: str, group: str, seed: int = 0) -> dict[str, Scores]:
        """The scores of each attack of a group; empty where it was not run."""
        record = self.record("attack", name, seed, threat, group)
        return {attack: Scores.unpack(packed) for attack, packed in record.result["attacks"].items()} if record else {}

    def worst(self, threat: str, name: str, groups: Sequence[str] | None = None, seed: int = 0) -> Scores | None:
        """The worst case of each sample over the attacks of these groups, by default of all; clean answers count."""
        found = [
            scores
            for group in (self.named("group") if groups is None else groups)
            for scores in self.attacks(threat, name, group, seed).values()
        ]
        clean = self.clean(name, seed)
        if not found or clean is None:
            return None
        return worst([*found, clean.first(max(map(len, found)))])

    def is_masked(self, threat: str, name: str) -> list[str]:
        """The groups that break significantly more than the attacks that use the model's own gradient."""
        return [g for (t, n, g), p in self.masked.items() if (t, n) == (threat, name) and p < SIGNIFICANT]

    def records(self) -> Iterable[Record]:
        """Every record of the run."""
        return self._records.values()

    def _masked(self) -> dict[tuple[str, str, str], float]:
        """Holm-corrected p-values, by threat, model and group, of "white-box leaves samples right that these break"."""
        raw = {}
        for threat in self.named("threat"):
            for name in self.named("model"):
                white = self.worst(threat, name, [WHITE_BOX])
                for group in self.named("group"):
                    found = self.attacks(threat, name, group)
                    if white is None or not found or group == WHITE_BOX:
                        continue
                    other = worst(list(found.values()))
                    n = min(len(white), len(other))
                    raw[threat, name, group] = mcnemar(white.majority[:n], other.majority[:n], "greater")
        return dict(zip(raw, holm(list(raw.values())), strict=True))


def percent(share: float, n: int) -> str:
    """A share with its interval, in percent."""
    low, high = wilson(share, n)
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
