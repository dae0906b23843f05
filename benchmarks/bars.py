"""What the other tables are meant to show, line by line: reached, or not reached and by how much.

Each bar sets a row of a table against another of the same case; those of memory set a row's growth with time against a
number, beside the growth of the gradient that keeps every step. Nine tenths of a bar count as within a tenth. Beside
what was found stands what the bare field alone would have reached, evaluated as often as the row does (there is no such
number where a gradient evaluates again), and the errors of both rows; where that of the row is the larger, the verdict
says so. It reads what the benchmarks have written and measures nothing; a row that a table lacks is reported as not
measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import parser, stem, write


class Bar(NamedTuple):
    """`row` in a case of a table is to be `factor` times as fast as `peer`, or to take that part of its time."""

    table: str
    case: str
    row: str
    peer: str
    factor: float
    at_most: bool = False


# The rows at twice the tolerance evaluate the field as often as torchdiffeq, which meets its own only on average.
EAGER, COMPILED, BARE = "odelayers Backprop", "odelayers compiled", "bare field"
SINE_AS_OFTEN, CONV_AS_OFTEN = "odelayers Backprop, 2e-5", "odelayers Backprop, 2e-3"
COMPILED_AS_OFTEN = "odelayers compiled, 2e-5"
CONV_AS_GOOD = "odelayers Backprop, 5e-5"  # the error of torchdiffeq's adjoint, whose own solves are finer
ODEINT, ADJOINT, DIFFRAX = "torchdiffeq odeint", "torchdiffeq odeint_adjoint", "diffrax jit"
SINE, CONV, GRID, NOISE = "forward_backward", "conv_field", "fixed_grid", "sde"
JACOBIANS, STIFF, SPREAD, SPECTRA = "jacobians", "stiff", "stiffness_spread", "spectra"
OWN, LOOP, OFFICIAL = "odelayers jacobian", "per-sample loop", "official loop, 8 samples"
AHEAD, BOTH = "forward, B=128", "forward+backward, B=128"
CONV_BOTH, HEUN = "forward+backward, T=1", "reversible Heun forward+backward, 90 steps"
BARS = (
    *(Bar(SINE, AHEAD, row, ODEINT, 4.0) for row in (EAGER, SINE_AS_OFTEN)),
    *(Bar(SINE, AHEAD, row, DIFFRAX, 1.8) for row in (EAGER, SINE_AS_OFTEN)),
    *(Bar(SINE, AHEAD, row, ODEINT, 8.0) for row in (COMPILED, COMPILED_AS_OFTEN)),
    *(Bar(SINE, AHEAD, row, DIFFRAX, 3.5) for row in (COMPILED, COMPILED_AS_OFTEN)),
    *(Bar(SINE, BOTH, row, ODEINT, 2.0) for row in (EAGER, SINE_AS_OFTEN)),
    Bar(SINE, BOTH, EAGER, ADJOINT, 4.0),
    *(Bar(SINE, BOTH, row, ODEINT, 4.0) for row in (COMPILED, COMPILED_AS_OFTEN)),
    Bar(SINE, BOTH, COMPILED, ADJOINT, 8.0),
    *(Bar(SINE, BOTH, row, DIFFRAX, 3.0) for row in (COMPILED, COMPILED_AS_OFTEN)),
    Bar(SINE, BOTH, COMPILED, BARE, 1.3, at_most=True),
    *(Bar(CONV, CONV_BOTH, row, ODEINT, 1.5) for row in (EAGER, CONV_AS_OFTEN)),
    *(Bar(CONV, CONV_BOTH, row, ADJOINT, 7.0) for row in (EAGER, CONV_AS_GOOD)),
    Bar(CONV, CONV_BOTH, EAGER, BARE, 1.45, at_most=True),
    Bar(GRID, "forward+backward", COMPILED, "torchdiffeq rk4", 2.0),
    Bar(GRID, "forward+backward", COMPILED, BARE, 0.9, at_most=True),
    Bar(NOISE, "Euler-Maruyama forward, 20 steps", "odelayers DropoutSDEBlock", "torchsde euler", 4.0),
    Bar(NOISE, "Euler-Maruyama forward, 90 steps", "odelayers DropoutSDEBlock", "torchsde euler", 4.0),
    Bar(NOISE, HEUN, "odelayers Reversible", "torchsde adjoint_reversible_heun", 3.0),
    Bar(JACOBIANS, "jacobian, tanh(Wz + b)", OWN, LOOP, 120.0),
    Bar(JACOBIANS, "jacobian, ConvField, n = 784, batch 2", OWN, LOOP, 4.0),
    *(
        Bar(JACOBIANS, f"regulariser step, {field}", "odelayers, 8 samples", OFFICIAL, 20.0)
        for field in ("SineField", "tanh(Wz + b)", "two layers")
    ),
    *(  # 40 times per sample, and sixteen times as many samples; both have a closed form
        Bar(JACOBIANS, f"regulariser step, {field}", "odelayers, 128 samples", OFFICIAL, 40.0 * 8 / 128)
        for field in ("SineField", "tanh(Wz + b)")
    ),
    Bar(STIFF, "Robertson, forward", "odelayers Rodas5P, 1e-05", "torchdiffeq scipy_solver LSODA, 1e-06", 5.0),
    Bar(STIFF, "Robertson, forward", "odelayers Rodas5P, 1e-05", "torchdiffeq scipy_solver Radau, 1e-04", 5.0),
    Bar(STIFF, "van der Pol, forward", "odelayers Rodas5P, 3e-06", "torchdiffeq scipy_solver LSODA, 1e-07", 5.0),
    Bar(STIFF, "van der Pol, forward", "odelayers Rodas5P, 3e-06", "torchdiffeq scipy_solver Radau, 1e-04", 5.0),
    Bar(SPREAD, "forward", "odelayers, own steps", "torchode, own steps", 1.0),
    Bar(SPREAD, "forward+backward", "odelayers, own steps", "torchode, own steps", 1.0),
    # A case that is measured on a GPU alone.
    Bar(SPECTRA, "10000 matrices, mixed", "spectral_abscissa, squaring, 24", "spectral_abscissa, eig", 50.0),
)
ROUNDING = 1e-6  # of float32: of errors below it none is the larger


class MemoryBar(NamedTuple):
    """From T = 5 to T = 80 the peak memory of a gradient is to grow by at most this factor."""

    solver: str
    gradient: str
    factor: float


KEEPS_ALL = "Backprop"
MEMORY_BARS = (
    MemoryBar("RK4", "Checkpoint", 2.0),
    MemoryBar("RK4", "Reversible", 1.2),
    MemoryBar("ReversibleHeun", "Checkpoint", 2.0),
    MemoryBar("ReversibleHeun", "Reversible", 1.2),
)


def rows_of(out: Path, name: str, device: str) -> list[dict[str, Any]]:
    """The rows of one table; none where it has not been measured."""
    path = out / f"{stem(name, device)}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def verdict(found: float | None, factor: float, at_most: bool) -> str:
    """Whether a bar is reached, or by how much it is not."""
    if found is None:
        return "not measured"
    part = factor / found if at_most else found / factor
    said = "reached" if part >= 1 else "within a tenth" if part >= 0.9 else "not reached"
    return said if part >= 1 else f"{said}: {found:.2f} of {factor:g}"


def larger(error: float | None, beside: float | None) -> bool:
    """Whether a row's error is the larger by more than a tenth and by more than rounding."""
    return error is not None and beside is not None and error > max(1.1 * beside, ROUNDING)


def judged(out: Path, device: str) -> Iterator[dict[str, Any]]:
    """Every bar with what was found. Ratios of one case have the same base, so one over the other compares two rows."""
    tables = dict.fromkeys(bar.table for bar in BARS)
    rows = {(name, row["case"], row["name"]): row for name in tables for row in rows_of(out, name, device)}
    for bar in BARS:
        row, peer, bare = (rows.get((bar.table, bar.case, name)) for name in (bar.row, bar.peer, BARE))
        found = floor = None
        errors = tuple(None if x is None else x["error"] for x in (row, peer))
        if row and peer:
            found = row["ratio"] / peer["ratio"] if bar.at_most else peer["ratio"] / row["ratio"]
        if row and peer and bare and peer is not bare and row["nfe"] <= bare["nfe"]:
            floor = peer["ratio"] / (bare["ratio"] * row["nfe"] / bare["nfe"])
        said = verdict(found, bar.factor, bar.at_most) + (", at a larger error" if larger(*errors) else "")
        yield {**bar._asdict(), "found": found, "bare": floor, "errors": errors, "verdict": said}


def remembered(out: Path, device: str) -> Iterator[dict[str, Any]]:
    """Every bar of memory with what was found, and the growth beside it."""
    growth = {(row["solver"], row["gradient"]): row["growth"] for row in rows_of(out, "memory", device)}
    for bar in MEMORY_BARS:
        found, beside = growth.get((bar.solver, bar.gradient)), growth.get((bar.solver, KEEPS_ALL))
        yield {**bar._asdict(), "found": found, "beside": beside, "verdict": verdict(found, bar.factor, at_most=True)}


def shown(number: float | None) -> str:
    """A number in a table."""
    return "-" if number is None else f"{number:.2f}"


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    verdicts, memory = list(judged(args.out, args.device)), list(remembered(args.out, args.device))
    lines = [
        "# Bars",
        "",
        "| table | case | row | beside | bar | found | bare field | errors | verdict |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for v in verdicts:
        bar = f"at most {v['factor']:g} of its time" if v["at_most"] else f"{v['factor']:g}x as fast"
        errors = ", ".join("-" if error is None else f"{error:.1e}" for error in v["errors"])
        found = (shown(v[key]) for key in ("found", "bare"))
        cells = (v["table"], v["case"], v["row"], v["peer"], bar, *found, errors, v["verdict"])
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Growth of peak memory over 16 times the steps (table memory), beside that of {KEEPS_ALL}:",
        "",
        f"| solver | gradient | bar | found | {KEEPS_ALL} | verdict |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for m in memory:
        found = (shown(m[key]) for key in ("found", "beside"))
        cells = (m["solver"], m["gradient"], f"at most {m['factor']:g}x", *found, m["verdict"])
        lines.append(f"| {' | '.join(cells)} |")
    write(stem("bars", args.device), lines, {"bars": verdicts, "memory": memory}, args.out)


if __name__ == "__main__":
    main()
