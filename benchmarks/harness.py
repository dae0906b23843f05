"""What every benchmark shares: interleaved timing, the machine's description, and one table per file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a table: what ran, how long it took, how much it evaluated, and how wrong it was."""

    case: str
    name: str
    ms: float
    ratio: float  # the time of this row over that of the first row of its case, turn by turn; the median
    nfe: int | None
    error: float | None  # against a float64 reference


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The milliseconds of each run in each turn; the runs take turns, so that a slow moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):  # two turns to warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def evaluations(f: nn.Module, run: Callable[[], Any]) -> tuple[int, Any]:
    """How often `run` evaluates `f`, whichever library calls it, and what it returns."""
    calls: list[None] = []
    hook = f.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        result = run()
    finally:
        hook.remove()
    return len(calls), result


def rows(case: str, times: dict[str, list[float]], nfe: dict[str, int], error: dict[str, float]) -> list[Row]:
    """The lines of one case: median times, and medians of the ratios to its first run within each turn."""
    base, table = next(iter(times.values())), []
    for name, turns in times.items():
        ratio = statistics.median(ms / first for ms, first in zip(turns, base, strict=True))
        table.append(Row(case, name, statistics.median(turns), ratio, nfe.get(name), error.get(name)))
    return table


def arguments(description: str) -> argparse.Namespace:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=31, help="turns that each run gets (default: 31)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table and the JSON")
    return parser.parse_args()


def machine(device: str | None = None) -> dict[str, Any]:
    """What the numbers depend on: device (the processor when not given), threads, load and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    packages = ("odelayers", "torch", "torchdiffeq", "torchsde")
    return {
        "device": device or f"CPU: {cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cell(value: float | int | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def publish(name: str, title: str, command: str, table: Sequence[Row], out: Path, *, device: str | None = None) -> None:
    """Print the table and write it as Markdown and JSON."""
    about = machine(device)
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`. Medians of interleaved runs in one process, {about['threads']} thread. "
        f"{about['device']}; load {about['load']} at the end; Python {about['python']}, {versions}. "
        "A ratio is the time of a row over that of the first row of its case: the median over the turns.",
        "",
        "| case | run | ms | ratio | NFE | error |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in table:
        cells = [row.case, row.name, f"{row.ms:.3g}", f"{row.ratio:.2f}", _cell(row.nfe, "d"), _cell(row.error, ".1e")]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    record = {"title": title, "command": command, "machine": about, "rows": [asdict(row) for row in table]}
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
