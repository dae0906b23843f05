"""The records that a run has so far, read together: what its report and pictures are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..records import Record, read

__all__ = ["Results"]

ASKED = ("curve", "film", "strong", "dynamics")


class Results:
    """The records that `run.json` names; a stage that has not been run is missing, and nothing is made up for it."""

    def __init__(self, out: Path) -> None:
        self.run = read(out / "run.json")
        self.rows: dict[str, dict[str, Any]] = self.run["rows"]
        self.columns = [f"{end:g}" for end in self.run["columns"]]
        self._folder = out / "records"

    @property
    def warnings(self) -> list[str]:
        """What must stand on every table and picture: the preset's warning, and that the data is not MNIST."""
        return [text for text in (self.run["warning"], self.run["banner"] and "NOT MNIST") if text]

    def title(self, name: str) -> str:
        """What a row is called in tables."""
        return self.rows[name]["title"]

    def trained(self) -> list[str]:
        """The rows that were trained."""
        return [name for name, row in self.rows.items() if "train" in row]

    def record(self, name: str, *path: str) -> Record | None:
        """The record of a question to a row, such as "curve" or "table", "10"; None where it was not run."""
        place: Any = self.rows[name]
        for step in path:
            if step not in place:
                return None
            place = place[step]
        return read(self._folder / place)

    def answered(self, what: str) -> dict[str, dict[str, Any]]:
        """The results of a question, by row, of the rows to which it was put."""
        found = {name: self.record(name, what) for name in self.rows}
        return {name: record.result for name, record in found.items() if record is not None}

    def records(self) -> Iterator[Record]:
        """Every record of the run."""
        for row in self.rows.values():
            files = [row[what] for what in ("train", *ASKED) if what in row]
            for what in ("table", "answers", "draws"):
                files += row.get(what, {}).values()
            yield from (read(self._folder / file) for file in files)
