"""What every benchmark shares: interleaved timing, the machine's description, and one table per file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when jax is imported, by the file that needs it: one thread for it too.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
WARM_UP, BUDGET = 2, 15.0  # turns before those that count; seconds after which a run sits out the other turns
PEERS = ("torchdiffeq", "torchsde", "torchode", "torchdyn", "diffrax")


@dataclass(frozen=True)
class Row:
    """One line of a table: what ran, how long it took, how much it evaluated, and how wrong it was."""

    case: str
    name: str
    ms: float
    ratio: float  # the time of this row over that of the first row of its case, turn by turn; the median
    nfe: float | None
    error: float | None  # against a float64 reference


@dataclass(frozen=True)
class Run:
    """One way to solve a case: `go` is timed, `check` tells the evaluations of the field and the result."""

    go: Callable[[], Any]
    check: Callable[[], tuple[float | None, Tensor | None]]


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The milliseconds of each run in each turn; the runs take turns, so that a slow moment of the machine hits all.

    On the CPU they are those of the processor: on one core of an idle machine the time that passes, and on a busy one
    not that of its other work. A GPU is waited for by the clock on the wall.
    """
    gpu = torch.cuda.is_initialized()
    now, finish = (time.perf_counter, torch.cuda.synchronize) if gpu else (time.process_time, lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for turn in range(WARM_UP + rounds):
        warm = turn >= WARM_UP
        for name, run in runs.items():
            if spent[name] > BUDGET and (times[name] or not warm):
                continue  # it takes seconds: fewer turns, but one at least
            finish()
            start = now()
            run()
            finish()
            took = now() - start
            spent[name] += took
            if warm:
                times[name].append(took * 1e3)
    return times


def relative(found: Tensor, exact: Tensor) -> float:
    """The relative error in the Euclidean norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def largest(found: Tensor, exact: Tensor) -> float:
    """The largest absolute error of an entry."""
    return (found.double() - exact).abs().max().item()


def compare(
    case: str, runs: dict[str, Run], exact: Tensor, rounds: int, error: Callable[[Tensor, Tensor], float] = relative
) -> list[Row]:
    """The lines of one case: every run checked once against the reference, then all timed in turns."""
    nfe: dict[str, float | None] = {}
    wrong: dict[str, float] = {}
    for name, run in runs.items():
        nfe[name], found = run.check()
        if found is not None:
            wrong[name] = error(found, exact)
    return rows(case, interleaved({name: run.go for name, run in runs.items()}, rounds), nfe, wrong)


def rows(case: str, times: dict[str, list[float]], nfe: dict[str, float | None], error: dict[str, float]) -> list[Row]:
    """The lines of one case: median times, and medians of the ratios to its first run within each turn."""
    base, table = next(iter(times.values())), []
    for name, turns in times.items():
        ratio = statistics.median(ms / first for ms, first in zip(turns, base, strict=False))
        table.append(Row(case, name, statistics.median(turns), ratio, nfe.get(name), error.get(name)))
    return table


def parser(description: str, rounds: int = 31) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--rounds", type=int, default=rounds, help=f"turns that each run gets (default: {rounds})")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder for the table and the JSON")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def arguments(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a benchmark that runs in this process: one thread on one core, from a fixed seed."""
    args = options.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux: jax has threads that its flags leave, and a core's cache is one's own
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return args


def missing(device: str = "cpu") -> dict[str, str]:
    """The peers that cannot run here, with the reason."""
    found = {}
    for name in PEERS:
        try:
            import_module(name)
        except ImportError as error:
            found[name] = f"not installed: {error}"
    if "diffrax" not in found and (import_module("jax").default_backend() == "cpu") != (device == "cpu"):
        found["diffrax"] = f"its jax does not run on {device}"
    return found


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on: processor, threads, load and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    absent = missing(device)
    packages = ("odelayers", "torch", *(name for name in PEERS if name not in absent))
    gpu = f"GPU: {torch.cuda.get_device_name()}, driven by " if device == "cuda" else ""
    return {
        "device": f"{gpu}CPU: {cpu}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "missing": absent,
    }


def stem(name: str, device: str) -> str:
    """The name of a result's files: on a GPU with the name of it, so that a machine's tables stand beside others'."""
    return name if device == "cpu" else f"{name}-{re.sub('[^a-z0-9]+', '-', torch.cuda.get_device_name().lower())}"


def write(name: str, lines: Sequence[str], record: dict[str, Any], out: Path) -> None:
    """Print a table and write it as Markdown and JSON."""
    text = "\n".join(lines) + "\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def publish(name: str, title: str, table: Sequence[Row], args: argparse.Namespace) -> None:
    """Print the table of a benchmark and write it as Markdown and JSON."""
    about = machine(args.device)
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    command = f"python benchmarks/{name}.py --rounds {args.rounds}"
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`. Medians of interleaved runs in one process, {about['threads']} thread"
        f"{', processor time' if args.device == 'cpu' else ''}. "
        f"{about['device']}; load {about['load']} at the end; Python {about['python']}, {versions}. "
        "A ratio is the time of a row over that of the first row of its case: the median over the turns.",
        "",
        "| case | run | ms | ratio | NFE | error |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in table:
        nfe = "-" if row.nfe is None else f"{row.nfe:.4g}"
        error = "-" if row.error is None else f"{row.error:.1e}"
        lines.append(f"| {row.case} | {row.name} | {row.ms:.3g} | {row.ratio:.2f} | {nfe} | {error} |")
    if about["missing"]:
        lines += ["", *(f"- {peer}, {reason}." for peer, reason in about["missing"].items())]
    record = {"title": title, "command": command, "machine": about, "rows": [asdict(row) for row in table]}
    write(stem(name, args.device), lines, record, args.out)
