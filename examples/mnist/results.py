"""The records of a run, finished or not, read together: what the report and its pictures are drawn from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import Record, read
from .scores import Scores, holm, mcnemar, worst

__all__ = ["BLACK_BOX", "KINDS", "NOT_PLANNED", "SIGNIFICANT", "WHITE_BOX", "Results", "mean", "seconds_of"]

SIGNIFICANT = 0.05
WHITE_BOX, BLACK_BOX = "white-box", "black-box"
# Groups that do without the gradient of the model itself.
ROUNDABOUT = ("bypass", "adjoint", "noise-off", "transfer", BLACK_BOX)
NOT_PLANNED = "-"
KINDS = ("train", "clean", "attack", "spectra", "plane", "probe")  # those that the report draws


class Results:
    """The records that `run.json` names, by kind, model, seed, threat and group; None where there is none."""

    def __init__(self, out: Path) -> None:
        self.run = read(out / "run.json")
        self.cells = {_key(**cell): cell for cell in self.run["cells"]}
        self._records = {
            key: read(out / "records" / cell["file"]) for key, cell in self.cells.items() if cell["file"] is not None
        }
        self._worst: dict[tuple[Any, ...], Scores | None] = {}  # of 10,000 samples it takes a while
        self._masked: dict[tuple[str, str, str, int], tuple[float, int]] | None = None

    @property
    def warnings(self) -> list[str]:
        """What must stand on every table and picture: the preset's warning, and that the data is not MNIST."""
        return [text for text in (self.run.get("warning"), self.run.get("banner") and "NOT MNIST") if text]

    @property
    def data(self) -> str:
        """The name of the data set."""
        trained = next((record for _, record in self.found("train")), None)
        return self.run.get("data") or (trained["config"]["data"] if trained else "data unknown yet")

    @property
    def primary(self) -> tuple[str, str, str]:
        """The comparison that was said in advance: the noisy model, its control, and the threat."""
        noise, control, threat = self.run["primary"]
        return noise, control, threat

    @property
    def drawn(self) -> list[str]:
        """The models that pictures show: all of them, or those that the preset names."""
        return [name for name in self.named("model") if name in (self.run.get("drawn") or self.named("model"))]

    def named(self, part: str) -> list[Any]:
        """The models, seeds, threats or groups ("model", ...) of the plan, in its order; models by their number."""
        found = dict.fromkeys(cell[part] for cell in self.run["cells"] if cell[part] is not None)
        return sorted(found, key=_by_number) if part == "model" else list(found)

    def record(
        self, kind: str, model: str, seed: int = 0, threat: str | None = None, group: str | None = None
    ) -> Record | None:
        """One record that holds a result; None also where the training diverged."""
        found = self._records.get((kind, model, seed, threat, group))
        return None if found is None or "diverged" in found.result else found

    def records(self) -> Iterable[Record]:
        """Every record of the run."""
        return self._records.values()

    def found(self, kind: str) -> Iterator[tuple[tuple[str, int, str | None, str | None], Record]]:
        """The records of one kind that hold a result, each with its model, seed, threat and group."""
        for (k, *where), record in self._records.items():
            if k == kind and "diverged" not in record.result:
                yield tuple(where), record

    def groups(self, threat: str) -> list[str]:
        """The groups of attacks that are planned within a threat."""
        return list(dict.fromkeys(c["group"] for c in self.run["cells"] if c["group"] and c["threat"] == threat))

    def missing(
        self, kind: str, model: str, seed: int = 0, threat: str | None = None, group: str | None = None
    ) -> str | None:
        """Why there is no result: "diverged" (see `lost`), "not run", or a dash where none was planned; else None."""
        key = (kind, model, seed, threat, group)
        cell, found = self.cells.get(key), self._records.get(key)
        if cell is None:
            return NOT_PLANNED
        if found is not None:
            return "diverged" if "diverged" in found.result else None
        return "not run" if cell["lost"] is None else "diverged"

    def unfinished(self) -> list[tuple[str, str]]:
        """Every cell of the plan that has no result, by name, and why."""
        named = ((" ".join(str(part) for part in key if part is not None), self.missing(*key)) for key in self.cells)
        return [(name, why) for name, why in named if why]

    def lost(self) -> list[str]:
        """What diverged, each named, and why."""
        diverged = [record for record in self.records() if "diverged" in record.result]
        own = [f"{record['stage']} diverged: {record.result['diverged']}" for record in diverged]
        return list(dict.fromkeys([*own, *(cell["lost"] for cell in self.run["cells"] if cell["lost"])]))

    def retrained(self) -> list[str]:
        """Models whose records are of more than one training, and who was judged with the rarer ones.

        On other machines the same recipe gives other weights.
        """
        users: dict[tuple[str, int], dict[str, list[str]]] = {}
        for (_, name, seed, *_), record in self._records.items():
            config = record["config"]
            own = {name: config["weights"]} if "weights" in config else {}  # a training does not know its outcome
            for model, weights in (own | config.get("sources", {})).items():
                users.setdefault((model, seed), {}).setdefault(weights, []).append(name)
        told = []
        for (model, seed), trainings in users.items():
            _, *others = sorted(trainings.values(), key=len, reverse=True)
            if others:
                judged = ", ".join(dict.fromkeys(name for names in others for name in names))
                told.append(f"{model} (seed {seed}; another for {judged})")
        return told

    def apart(self, first: str, second: str) -> bool:
        """Whether two models are of other trainings: images for them were made on other weights of the same model."""
        one, other = (
            {(seed, model): weights for (_, name, seed, *_), record in self._records.items() if name == called
             for model, weights in record["config"].get("sources", {}).items()}
            for called in (first, second)
        )  # fmt: skip
        return any(one[key] != other[key] for key in one.keys() & other.keys())

    def kinds(self) -> list[str]:
        """The kinds of records that there are."""
        return list(dict.fromkeys(key[0] for key in self._records))

    def title(self, name: str) -> str:
        """What a model is called in tables."""
        model = self.model(name)
        return model["title"] if model else name

    def called(self, name: str) -> str:
        """A model's number and title."""
        return " ".join(dict.fromkeys((name, self.title(name))))

    def model(self, name: str) -> dict[str, Any] | None:
        """How a model is built and trained, as its records say; None before its first training."""
        found = (self._records.get(("train", name, seed, None, None)) for seed in self.named("seed"))
        return next((record["config"]["model"] for record in found if record), None)

    def seeds(self, name: str) -> list[int]:
        """The seeds with which a model has been trained to its end."""
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
        chosen = tuple(self.named("group") if groups is None else groups)
        key = (threat, name, chosen, seed)
        if key not in self._worst:
            self._worst[key] = self._found_worst(*key)
        return self._worst[key]

    def _found_worst(self, threat: str, name: str, groups: tuple[str, ...], seed: int) -> Scores | None:
        found = [scores for group in groups for scores in self.attacks(threat, name, group, seed).values()]
        clean = self.clean(name, seed)
        if not found or clean is None:
            return None
        return worst([*found, clean.first(max(map(len, found)))])

    def lacks(self, threat: str, name: str, seed: int = 0) -> list[str]:
        """What the worst case of everything still lacks: groups of attacks that were planned, or the clean scores."""
        planned = [group for group in self.named("group") if ("attack", name, seed, threat, group) in self.cells]
        lacking = [group for group in planned if self.missing("attack", name, seed, threat, group)]
        return lacking + ["clean"] * (self.missing("clean", name, seed) is not None)

    def shown(self, threat: str, name: str) -> list[int]:
        """The seed that a row of a table is about, the first that was attacked; it may be none.

        Further seeds are attacked on fewer images, and by fewer attacks: they are together in tables of their own.
        """
        return [seed for seed in self.seeds(name) if self.worst(threat, name, seed=seed)][:1]

    def common(self, threat: str, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """The groups of attacks that are planned for all these models and seeds."""
        return [
            group
            for group in self.groups(threat)
            if all(("attack", name, seed, threat, group) in self.cells for name in names for seed in seeds)
        ]

    def counted(self, threat: str, name: str, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """The groups that count for a model beside others: its own gradient's if all have them, and the roundabout."""
        own = self.common(threat, [name], seeds)
        return [group for group in own if group in ROUNDABOUT or group in self.common(threat, names, seeds)]

    def control(self, name: str) -> str | None:
        """The model that a model is compared with."""
        controls: dict[str, str | None] = self.run.get("controls", {})
        return controls.get(name) or (self.model(name) or {}).get("start")

    @property
    def masked(self) -> dict[tuple[str, str, str, int], tuple[float, int]]:
        """By threat, model, group and seed: p of "white-box leaves samples right that these attacks break", and how
        many do so; those that only white-box breaks count against them in p.

        Corrected (Holm) over the groups and seeds of a model within a threat: an alarm must not grow duller with every
        other model. Only the samples that the group was run on are compared.
        """
        if self._masked is None:
            self._masked = {}
            for threat in self.named("threat"):
                for name in self.named("model"):
                    self._masked |= self._alarms(threat, name)
        return self._masked

    def _alarms(self, threat: str, name: str) -> dict[tuple[str, str, str, int], tuple[float, int]]:
        raw, broken = {}, {}
        own = [group for group in self.groups(threat) if group.startswith(WHITE_BOX)]
        for (model, seed, where, group), _ in self.found("attack"):
            if (model, where) != (name, threat) or group not in ROUNDABOUT:
                continue
            white, found = self.worst(threat, name, own, seed), self.attacks(threat, name, group, seed)
            if white is not None and found:
                other = worst(list(found.values()))
                n = min(len(white), len(other))
                key, stood, fell = (threat, name, group, seed), white.first(n).once, other.first(n).once
                raw[key] = mcnemar(stood, fell, "greater")
                broken[key] = sum(a and not b for a, b in zip(stood, fell, strict=True))
        return {key: (p, broken[key]) for key, p in zip(raw, holm(list(raw.values())), strict=True)}

    def is_masked(self, threat: str, name: str) -> dict[str, list[float]]:
        """By group, the p-values of the seeds where it breaks significantly more than the model's own gradient does."""
        found: dict[str, list[float]] = {}
        for (t, n, group, _), (p, _) in self.masked.items():
            if (t, n) == (threat, name) and p < SIGNIFICANT:
                found.setdefault(group, []).append(p)
        return found


def _key(
    kind: str, model: str, seed: int, threat: str | None, group: str | None, **_: Any
) -> tuple[str, str, int, str | None, str | None]:
    return kind, model, seed, threat, group


def _by_number(name: str) -> list[tuple[int, float | str]]:
    """M4 before M13, and M4_.75 before M4_.9."""
    parts = re.findall(r"\d*\.\d+|\d+|[^\d]+", name)
    return [(0, float(part)) if part[-1].isdigit() else (1, part) for part in parts]


def seconds_of(record: Record) -> float:
    """What a training took of its processes together: a record counts from its last start alone, its epochs each for
    themselves.
    """
    epochs = sum(line.get("seconds", 0.0) for line in record.result["epochs"])
    together: int = record.result.get("processes", 1)
    return together * max(epochs, float(record["seconds"]))


def mean(values: Iterable[float]) -> float:
    """The mean of some numbers."""
    each = list(values)
    return sum(each) / len(each)
