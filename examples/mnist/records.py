"""One JSON record per stage, written whole or not at all, so that a study can be killed anywhere and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

import odelayers

__all__ = ["NotRecorded", "Record", "Records", "fingerprint", "now", "read", "save_weights", "write"]

FORMAT = 1  # raise it when a stage's result changes its meaning: older records are then computed again


class NotRecorded(LookupError):
    """A stage has no record yet."""


class Record(dict[str, Any]):
    """What a stage left behind: `stage`, `key`, `config`, `result`, `seconds`, `versions`, `commit`, `finished`."""

    @property
    def result(self) -> dict[str, Any]:
        """What the stage computed."""
        return self["result"]

    @property
    def key(self) -> str:
        """The fingerprint of everything the result depends on."""
        return self["key"]

    @property
    def file(self) -> str:
        """The name of the record's file."""
        return f"{self['stage']}-{self.key}.json"


class Records:
    """The records of one study in one folder.

    A record's file name carries the fingerprint of its stage's configuration, so a changed configuration finds no
    record and computes again; nothing is reused silently and nothing is overwritten.
    """

    def __init__(self, out: Path, stages: int | None = None, say: Callable[[str], None] = print) -> None:
        self.folder = out / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stages, self.done, self._say = stages, 0, say  # of so many stages each is told of when it is done
        self.computes = True  # otherwise what is not recorded is an error
        self.writes = True  # of several ranks that compute a stage together, one writes

    def stage(
        self,
        name: str,
        config: Mapping[str, Any],
        compute: Callable[[], dict[str, Any]],
        save: Callable[[Path], None] | None = None,
    ) -> Record:
        """The record of a stage, read if it is there, else computed and written.

        `save`, called when all is computed, keeps weights that belong to the record; where they are missing, the stage
        is computed again.

        Raises:
            NotRecorded: it is not there, and these records are not to compute.
        """
        config = json.loads(json.dumps(config, default=_plain))
        key = _key(config)
        path = self.folder / f"{name}-{key}.json"
        weights = path.with_suffix(".safetensors")
        if path.exists() and (save is None or weights.exists()):
            return self._told(read(path), ": already done")
        if not self.computes:
            made = ", ".join(f"{name} {version}" for name, version in _results_depend_on().items())
            raise NotRecorded(f"{path} is not there; its key is of this configuration, {made}")
        started = time.perf_counter()
        result = compute()
        seconds = time.perf_counter() - started
        record = Record(
            stage=name, key=key, config=config, result=result, seconds=round(seconds, 3),
            finished=now(), **provenance(),
        )  # fmt: skip
        if self.writes:
            if save is not None:
                save(weights)
            write(path, record)
        return self._told(record, "")

    def _told(self, record: Record, note: str) -> Record:
        self.done += 1
        if self.stages is not None:
            self._say(f"[{self.done}/{self.stages}] {record['stage']}{note}: {record['seconds']:.1f} s")
        return record

    def unfinished(self, name: str, config: Mapping[str, Any]) -> Path:
        """Where a stage may keep what it needs to go on after a stop."""
        return self.folder / f"{name}-{_key(config)}.unfinished"

    def digest(self, record: Record) -> str:
        """A fingerprint of the weights of a record: what is found out about them depends on nothing else of it."""
        return hashlib.sha256(self.weights(record).read_bytes()).hexdigest()[:12]

    def weights(self, record: Record) -> Path:
        """Where the weights of a record lie."""
        return (self.folder / record.file).with_suffix(".safetensors")


def _key(config: Mapping[str, Any]) -> str:
    return fingerprint({"format": FORMAT, "versions": _results_depend_on(), "config": config})


def fingerprint(config: Mapping[str, Any]) -> str:
    """Twelve hex digits that change with anything in `config`."""
    text = json.dumps(config, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"records: expected JSON values and dataclasses, got {type(value).__name__}: {value!r}")


def now() -> str:
    """The time in UTC, to a second; later times sort later."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(path: Path) -> Record:
    """Read a record; a file that is none is an error that names it."""
    try:
        return Record(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise RuntimeError(
            f"{path}: expected a JSON record, got {error}; delete the file to compute it again"
        ) from error


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name and rename it: readers see the whole file or none."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Save a model's state the same way."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    save_model(model, str(partial))
    os.replace(partial, path)


def _results_depend_on() -> dict[str, str]:
    return {"odelayers": odelayers.__version__, "torch": torch.__version__}


def provenance() -> dict[str, Any]:
    """What made a record: versions, machine, and the commit where git knows one."""
    versions = {"python": platform.python_version(), **_results_depend_on()}
    return {"versions": versions, "machine": _machine(), "commit": _commit()}


def _machine() -> str:
    """The processor too: its maker and kind choose the kernels, and with them the last digits of what is trained."""
    names = [torch.cpu.get_capabilities().get("cpu_name", platform.machine())]
    if torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return f"{', '.join(names)}, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of this file's repository, marked where the tree differs from it; None outside git."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=here, capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
