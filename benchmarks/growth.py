"""How the cost of forward+backward grows with time, tolerance, batch and dimension, and the pictures of it.

From the sine field of `forward_backward.py` at D = 64, batch 128, t in [0, 5], tolerance 1e-5, one of the four is
changed at a time. `--draw` draws the pictures from the JSON of an earlier run, without measuring.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from forward_backward import Sine, blocks
from harness import Row, Run, arguments, compare, missing, parser, publish, stem
from peers import adaptive, gradients, odeint, training
from torch import Tensor

PICTURES = Path(__file__).parents[1] / "docs" / "_static" / "performance"
CENTRE = {"T": 5.0, "tol": 1e-5, "B": 128, "D": 64}
SWEEPS: dict[str, tuple[float, ...]] = {
    "T": (1, 2, 5, 10, 20),
    "tol": (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    "B": (8, 32, 128, 512, 1024),
    "D": (8, 16, 64, 128, 256),
}
AXES = {"T": "end time T", "tol": "tolerance", "B": "batch", "D": "dimension D"}
# Run, colour, marker: colours that the colour-blind tell apart, and a marker each for a print in black.
LINES = {
    "odelayers Backprop": ("#0072B2", "o"),
    "odelayers Checkpoint": ("#56B4E9", "v"),
    "torchdiffeq odeint": ("#E69F00", "s"),
    "torchdiffeq odeint_adjoint": ("#D55E00", "^"),
    "torchode": ("#009E73", "D"),
    "diffrax jit": ("#888888", "x"),
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "odelayers",  # the same file from the same numbers
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def diffrax_row(f: Sine, z: Tensor, t1: float, tol: float) -> dict[str, Run]:
    """diffrax's run forward and backward."""
    from peers_jax import diffrax_runs, sine

    return {"diffrax jit": diffrax_runs(sine, list(f.parameters()), z, t1, tol=tol, counted=False)[1]}


def point(name: str, value: float, rounds: int, device: str) -> list[Row]:
    """The rows of one setting."""
    at = CENTRE | {name: value}
    f, z = Sine(int(at["D"])).to(device), torch.randn(int(at["B"]), int(at["D"])).to(device)
    exact_f = copy.deepcopy(f).double()
    exact = gradients(exact_f, z.double(), odeint(exact_f, at["T"], 1e-9))
    solves = blocks(f, at["T"], at["tol"]) | adaptive(f, at["T"], at["tol"])
    runs = {line: training(f, z, solves[line]) for line in LINES if line in solves}
    if "diffrax" not in missing(device):
        runs |= diffrax_row(f, z, at["T"], at["tol"])
    return compare(f"{name} = {value:g}", runs, exact, rounds)


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """One picture a sweep: milliseconds over what is changed, a line for each run."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    out.mkdir(parents=True, exist_ok=True)
    for name, group in groupby(rows, key=lambda row: row["case"].split(" = ")[0]):
        points = list(group)
        with plt.rc_context(STYLE):
            figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
            for line, (colour, marker) in LINES.items():
                found = [(float(p["case"].split(" = ")[1]), p["ms"]) for p in points if p["name"] == line]
                if found:
                    ax.loglog(*zip(*found, strict=True), color=colour, marker=marker, markersize=4, label=line)
            values = sorted({float(p["case"].split(" = ")[1]) for p in points}, reverse=name == "tol")
            ax.set_xticks(values, [f"{value:g}".replace("e-0", "e-") for value in values])
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            if name == "tol":
                ax.invert_xaxis()  # dearer to the right, as in the others
            ax.set(xlabel=AXES[name], ylabel="forward+backward, ms")
            ax.grid(axis="y", color="#DDDDDD", linewidth=0.5)
            figure.legend(loc="outside right center")
            figure.savefig(out / f"growth_{name}.svg", metadata={"Date": None})
            plt.close(figure)


def main() -> None:
    options = parser(__doc__ or "", rounds=5)
    options.add_argument("--draw", action="store_true", help="draw from the JSON of an earlier run")
    options.add_argument("--pictures", type=Path, default=PICTURES, help="folder for the pictures")
    args = arguments(options)
    if not args.draw:
        sweeps = SWEEPS.items()
        table = [r for name, values in sweeps for v in values for r in point(name, v, args.rounds, args.device)]
        title = "Growth of forward+backward: sine field, D = 64, B = 128, T = 5, dopri5 at 1e-5, one changed at a time"
        publish("growth", title, table, args)
    draw(json.loads((args.out / f"{stem('growth', args.device)}.json").read_text())["rows"], args.pictures)


if __name__ == "__main__":
    main()
