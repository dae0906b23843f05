"""Peak memory of one forward and backward solve, by solver and gradient: T = 5 beside T = 80 at the same fixed step.

Each run has a process of its own. After one short solve to load what is loaded once, the kernel's high-water mark is
reset; what is told is its height after the solve less the resident set before it (Linux only). On a GPU it is the same
of the memory that torch has allocated there. Beside it stands how far the gradient at T = 80 is from that of `Backprop`
through the solver's own steps along the same noise, relative: a gradient that saves memory and is wrong is no answer.
`Reversible` takes the steps of another method over `RK4`, and `Adjoint` solves another equation: theirs is the error of
the method.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness import machine, parser, relative, stem, write
from torch import Tensor

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    ConvField,
    DropoutSDEBlock,
    ODEBlock,
    Reversible,
    ReversibleHeun,
)

BATCH, SHAPE, STEP = 64, (16, 7, 7), 0.5
TIMES = (5.0, 80.0)
GRADIENTS = {g.__name__: g() for g in (Backprop, Checkpoint, Reversible, Adjoint)}
CASES = [("RK4", name) for name in GRADIENTS]
CASES += [("ReversibleHeun", name) for name in ("Backprop", "Checkpoint", "Reversible")]
MIB = 2**20


def status(key: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def solve(solver: str, name: str, t1: float, device: str) -> Tensor:
    """Forward and backward through one block; the gradient with respect to the initial state and the parameters."""
    torch.manual_seed(0)
    f, z = ConvField(SHAPE[0]).to(device), torch.randn(BATCH, *SHAPE).to(device).requires_grad_()
    with torch.no_grad():
        for p in f.parameters():  # a field that neither grows nor contracts much over the longest time
            p.mul_(0.05)
    steps, gradient = round(t1 / STEP), GRADIENTS[name]
    block: torch.nn.Module = (
        ODEBlock(f, t1=t1, solver=RK4(steps), gradient=gradient)
        if solver == "RK4"
        else DropoutSDEBlock(f, t1=t1, solver=ReversibleHeun(steps), calculus="stratonovich", gradient=gradient)
    )
    block(z).square().mean().backward()
    return torch.cat([x.grad.flatten() for x in (z, *f.parameters()) if x.grad is not None])


def child(solver: str, name: str, t1: float, device: str) -> None:
    """Print what one solve adds to the memory in use at its height, in bytes, and how far its gradient is off."""
    torch.set_num_threads(1)
    solve(solver, name, STEP, device)
    if device == "cpu":
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the resident set
        found = solve(solver, name, t1, device)
        height = status("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = solve(solver, name, t1, device)
        height = torch.cuda.max_memory_allocated() - before
    print(height, relative(found, solve(solver, "Backprop", t1, device).double()))


def measure(solver: str, name: str, t1: float, rounds: int, device: str) -> tuple[float, float]:
    """The medians over processes: the memory in MiB, and the gradient's distance from that of Backprop."""
    # Blocks of 64 KiB and more go back to the kernel when freed, so that the height is that of live memory.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = [sys.executable, __file__, "--child", solver, name, str(t1), device]
    found = [
        [float(x) for x in subprocess.run(run, env=env, check=True, capture_output=True, text=True).stdout.split()]
        for _ in range(rounds)
    ]
    height, error = map(statistics.median, zip(*found, strict=True))
    return height / MIB, error


def main() -> None:
    args = parser(__doc__ or "", rounds=3).parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for solver, name in CASES:
        found = {f"T={t:g}": measure(solver, name, t, args.rounds, args.device) for t in TIMES}
        heights = {time: height for time, (height, _) in found.items()}
        rows.append({"solver": solver, "gradient": name, **heights, "error": found[f"T={TIMES[-1]:g}"][1]})
    short, long = (f"T={t:g}" for t in TIMES)
    steps = " and ".join(f"{t / STEP:g}" for t in TIMES)
    command = f"python benchmarks/memory.py --rounds {args.rounds}"
    about = machine(args.device)
    lines = [
        f"# Peak memory of forward+backward: ConvField, batch {BATCH} of {SHAPE}, steps of {STEP} ({steps} of them)",
        "",
        f"Command: `{command}`. Peak memory in use less that before the solve; float32; "
        f"the median of {args.rounds} processes each. {about['device']}; Python {about['python']}, "
        f"torch {about['versions']['torch']}.",
        "",
        f"| solver | gradient | {short}, MiB | {long}, MiB | growth | off Backprop |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        row["growth"] = row[long] / row[short]
        lines.append(
            f"| {row['solver']} | {row['gradient']} | {row[short]:.1f} | {row[long]:.1f} | {row['growth']:.2f}x "
            f"| {row['error']:.1e} |"
        )
    record = {"title": lines[0][2:], "command": command, "machine": about, "unit": "MiB", "rows": rows}
    write(stem("memory", args.device), lines, record, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], float(sys.argv[4]), sys.argv[5])
    else:
        main()
