"""The pictures of docs/theory.md that are about noise: statements 8 to 12."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from theory_figures_style import BLUE, F64, GREY, ORANGE

from odelayers import DropoutSDEBlock, EulerMaruyama, Milstein, SDEBlock, StratonovichHeun


def growth_rates(ax: Axes) -> None:
    """log|z_T| / T of geometric Brownian motion in both readings, on the normal density of each."""
    rate, sigma, t1, rows = 0.5, 1.0, 2.0, 4000
    xs, spread = torch.linspace(-2.5, 3, 200, dtype=F64), sigma / t1**0.5
    for calculus, solver, mean, colour in (
        ("ito", Milstein(200), rate - sigma**2 / 2, BLUE),
        ("stratonovich", StratonovichHeun(200), rate, ORANGE),
    ):
        options = {"solver": solver, "calculus": calculus, "noise": "scalar", "t1": t1}
        z = SDEBlock(lambda z: rate * z, lambda z: sigma * z, **options)(torch.ones(rows, 1, dtype=F64))
        ax.hist(z.abs().log().flatten() / t1, bins=40, density=True, color=colour, alpha=0.35)
        ax.plot(
            xs, torch.exp(-(((xs - mean) / spread) ** 2) / 2) / spread / math.tau**0.5, color=colour, label=calculus
        )
        ax.axvline(mean, color=colour, linestyle="--", linewidth=0.8)
    ax.set(xlabel=r"$\log\,|z_T|\,/\,T$", ylabel="density", ylim=(0, 0.8))
    ax.legend(fontsize=8, loc="upper left")


def stabilised(ax: Axes) -> None:
    """log|z| under one Brownian motion a path and under one a coordinate, with the rate of the bound."""
    dim, sigma, t1, steps = 16, 2.0, 40.0, 8000
    a = torch.randn(dim, dim, dtype=F64)
    a = (a - a.T) * (1.5 / torch.linalg.matrix_norm(a - a.T, 2))
    ts = torch.linspace(0, t1, 81, dtype=F64)
    for noise, colour in (("scalar", BLUE), ("diagonal", ORANGE)):
        block = SDEBlock(lambda z: z @ a.T, lambda z: sigma * z, solver=EulerMaruyama(steps), noise=noise, t1=t1)
        paths = block.solve(torch.ones(4, dim, dtype=F64), ts).zs.norm(dim=2).log()
        for k in range(4):
            ax.plot(
                ts, paths[:, k] - paths[0, k], color=colour, linewidth=1, label=f"{noise} noise" if k == 0 else None
            )
    ax.plot(ts, (1.5 - sigma**2 / 2) * ts, color=GREY, linestyle="--", label=r"rate $L - \sigma^2/2$")
    ax.set(xlabel="t", ylabel=r"$\log\,\|z\|/\|z_0\|$")
    ax.legend(fontsize=8, loc="lower left")


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


def order_of_paths(left: Axes, right: Axes) -> None:
    """Five solutions in one dimension on one path of W, and on a path each."""
    steps, T = 200, 2.0
    z0, ts = torch.linspace(-1, 1, 5, dtype=F64)[:, None], torch.linspace(0, T, 101, dtype=F64)
    block = DropoutSDEBlock(lambda z: 1 + 0.3 * torch.sin(3 * z), 0.2, noise="scalar", solver=Milstein(steps), t1=T)
    dw = (T / steps) ** 0.5 * torch.randn(steps, 5, dtype=F64)
    for ax, noise, title in ((left, dw[:, :1].expand(steps, 5), "one path for all"), (right, dw, "a path for each")):
        zs = block.solve(z0, ts, noise=noise).zs[..., 0]
        for k, colour in enumerate((ORANGE, "#F5D08A", GREY, "#85BEDD", BLUE)):
            ax.plot(ts, zs[:, k], color=colour, linewidth=1.2)
        ax.set(title=title, xlabel="t")
    left.set_ylabel("z")
