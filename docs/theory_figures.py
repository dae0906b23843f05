"""Draws the pictures of docs/theory.md: `python docs/theory_figures.py`, from the root of the repository."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from odelayers import (
    AugmentedODEBlock,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    ODEBlock,
    StratonovichHeun,
    gershgorin,
    log_norm,
    spectral_abscissa,
)

OUT = Path(__file__).parent / "_static" / "theory"
F64 = torch.float64
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#888888"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "odelayers",  # the same file at every run
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def crossing(left: Axes, right: Axes) -> None:
    """Solutions of z' = -2z keep apart; Euler at h = 1 swaps them at every step."""
    z = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]], dtype=F64)
    ts = torch.linspace(0, 3, 61, dtype=F64)
    for ax, block, at, title in (
        (left, ODEBlock(lambda z: -2 * z), ts, "flow (Dopri5)"),
        (right, ODEBlock(lambda z: -2 * z, t1=3.0, solver=Euler(3)), torch.arange(4, dtype=F64), "Euler, h = 1"),
    ):
        zs = block.solve(z, at).zs[..., 0]
        for k, colour in enumerate((ORANGE, "#F5D08A", "#85BEDD", BLUE)):
            ax.plot(at, zs[:, k], color=colour, marker="o" if len(at) < 9 else None, markersize=3)
        ax.set(title=title, xlabel="t", ylim=(-1.15, 1.15))
    left.set_ylabel("z")


def transient(ax: Axes) -> None:
    """|e^{At}| for A = [[-1, 100], [0, -1]], between the rates of its abscissa and of its log norm."""
    A = torch.tensor([[-1.0, 100.0], [0.0, -1.0]], dtype=F64)
    ts = torch.linspace(0, 12, 400, dtype=F64)
    norms = torch.linalg.matrix_norm(torch.linalg.matrix_exp(A * ts[:, None, None]), 2)
    ax.semilogy(ts, norms, color=BLUE, label=r"$\|e^{At}\|_2$")
    ax.semilogy(ts, torch.exp(spectral_abscissa(A) * ts), color=GREY, linestyle="--", label=r"$e^{\alpha t}$, the end")
    ax.semilogy(ts, torch.exp(log_norm(A, 2) * ts), color=ORANGE, label=r"$e^{\mu_2 t}$, the beginning")
    ax.axhline(1, color="black", linewidth=0.5)
    ax.set(xlabel="t", ylim=(1e-4, 1e3))
    ax.legend(loc="lower left")


def discs(ax: Axes) -> None:
    """Gershgorin's disc of the counterexample: it does not hold 0, and reaches over the axis all the same."""
    A = torch.tensor([[-1 + 10j, 5], [5, -1 + 10j]], dtype=torch.complex128)
    centres, radii = gershgorin(A)
    c, r = centres[0], radii[0].item()  # both rows have the same disc
    ax.add_patch(plt.Circle((c.real, c.imag), r, color=BLUE, alpha=0.15))
    values = torch.linalg.eigvals(A)
    ax.plot(values.real, values.imag, "o", color=ORANGE, label="eigenvalues")
    ax.plot(c.real, c.imag, "+", color=BLUE, label=r"$a_{ii}$, with its disc")
    ax.axvline(0, color="black", linewidth=0.5)
    ax.axhline(0, color="black", linewidth=0.5)
    ax.set(xlabel="Re", ylabel="Im", xlim=(-9, 18), ylim=(-1, 17), aspect="equal")
    ax.legend(loc="center right", fontsize=8)


def dropout_depth(ax: Axes) -> None:
    """Variance at the end of N dropout layers on [0, 1], and of the SDE with each choice of layer_time."""
    p, rows, depths = 0.3, 20_000, (2, 4, 8, 16, 32, 64)
    found: dict[str, list[float]] = {"ResNet": [], "1/N": [], "1": []}
    start = torch.zeros(rows, 1, dtype=F64)
    for n in depths:
        z = start
        for _ in range(n):
            z = z + torch.cos(z) / n * torch.bernoulli(torch.full_like(z, 1 - p)) / (1 - p)
        found["ResNet"].append(z.var().item())
        for name, layer_time in (("1/N", 1 / n), ("1", 1.0)):
            block = DropoutSDEBlock(lambda z: torch.cos(z), p, layer_time=layer_time, solver=EulerMaruyama(n))
            found[name].append(block(start).var().item())
    ax.loglog(depths, found["ResNet"], "o", color="black", label="N dropout layers")
    ax.loglog(depths, found["1/N"], color=BLUE, label="SDE, layer_time = 1/N")
    ax.loglog(depths, found["1"], color=ORANGE, label="SDE, layer_time = 1 (eq. 8)")
    ax.set(xlabel="N", ylabel="variance of z(1)", ylim=(1e-3, 1))
    ax.set_xticks(depths, labels=map(str, depths))
    ax.minorticks_off()
    ax.legend(fontsize=8)


def noisy_clock(ax: Axes) -> None:
    """Ends of a scalar-noise Stratonovich block against the random time T + sigma W(T), on the ODE's curve."""
    T, steps, rows = 1.0, 400, 60
    block = DropoutSDEBlock(
        lambda z: -torch.sin(z), 0.3, t1=T, calculus="stratonovich", noise="scalar", solver=StratonovichHeun(steps)
    )
    dw = (T / steps) ** 0.5 * torch.randn(steps, rows, dtype=F64)
    z0 = torch.full((rows, 1), 2.0, dtype=F64)
    clock = T + block.sigma * dw.sum(0)
    ts = torch.linspace(clock.min().item(), clock.max().item(), 100, dtype=F64)
    curve = 2 * torch.atan(math.tan(1.0) * torch.exp(-ts))
    ax.plot(ts, curve, color=BLUE, label="ODE z' = -sin z, z(0) = 2")
    ax.plot(
        clock, block.solve(z0, noise=dw).final[:, 0], "o", markersize=3, color=ORANGE, label="SDE ends, a path each"
    )
    ax.set(xlabel=r"$T + \sigma W_T$", ylabel="z")
    ax.legend(fontsize=8)


def labels(left: Axes, right: Axes) -> None:
    """A one-dimensional flow is monotone; with a dimension more, a' = |z|^2 lifts the ends over the middle."""
    z = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    ts = torch.linspace(0, 1, 41, dtype=F64)

    def lifted(y: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(y[:, 0]), y[:, 0] ** 2], dim=1)

    flat = ODEBlock(lambda z: torch.sin(3 * z) + 0.5).solve(z, ts).zs[..., 0]
    up = AugmentedODEBlock(lifted, 1).solve(z, ts).zs
    for k, colour in enumerate((ORANGE, BLUE, ORANGE)):
        left.plot(ts, flat[:, k], color=colour)
        right.plot(up[:, k, 0], up[:, k, 1], color=colour)
        right.plot(up[-1:, k, 0], up[-1:, k, 1], "o", color=colour)
    right.axhline(0.5, color="black", linewidth=0.5, linestyle="--")
    left.set(title="one dimension", xlabel="t", ylabel="z")
    right.set(title="one dimension more", xlabel="z", ylabel="a", ylim=(-0.1, 1.1))


FIGURES = {"crossing": crossing, "transient": transient, "discs": discs, "dropout_depth": dropout_depth}
FIGURES |= {"noisy_clock": noisy_clock, "labels": labels}


def main() -> None:
    """Draw every picture into docs/_static/theory."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        torch.manual_seed(0)
        panels = 2 if name in ("crossing", "labels") else 1
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(1, panels, figsize=(3.6 * panels if panels > 1 else 4.2, 2.8), squeeze=False)
            with torch.no_grad():
                draw(*axes[0])
            figure.tight_layout()
            figure.savefig(OUT / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        print(f"{OUT / name}.svg")


if __name__ == "__main__":
    main()
