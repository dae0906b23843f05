"""The pictures of docs/theory.md that are about flows: statements 1 to 3, 13 and 14."""

from __future__ import annotations

import math

import scipy.linalg
import torch
from matplotlib.axes import Axes
from theory_figures_style import BLUE, F64, GREY, ORANGE
from torch import Tensor

from odelayers import AugmentedODEBlock, Euler, ODEBlock, jacobian, log_norm


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


def pendulum(z: Tensor) -> Tensor:
    """A damped pendulum: angle and speed."""
    return torch.stack([z[:, 1], -torch.sin(z[:, 0]) - 0.5 * z[:, 1]], dim=1)


def gronwall(ax: Axes) -> None:
    """Distance of two damped pendulums, e^{Lt}, and the bound by the log norm on the segment between them."""
    z, ts = torch.tensor([[1.0, 0.5], [1.6, 0.2]], dtype=F64), torch.linspace(0, 6, 121, dtype=F64)
    zs = ODEBlock(pendulum).solve(z, ts).zs
    between = zs[:, :1] + torch.linspace(0, 1, 33, dtype=F64)[:, None] * (zs[:, 1:] - zs[:, :1])
    J = jacobian(pendulum, between.reshape(-1, 2))
    mu = log_norm(J, 2).reshape(121, 33).amax(dim=1)
    start, distance = (z[0] - z[1]).norm(), (zs[:, 0] - zs[:, 1]).norm(dim=1)
    L = torch.linalg.matrix_norm(torch.tensor([[0.0, 1.0], [-1.0, -0.5]], dtype=F64), 2)
    ax.semilogy(ts, start * torch.exp(L * ts), color=GREY, linestyle="--", label=r"$e^{Lt}$ (Gronwall)")
    integral = torch.cat([torch.zeros(1, dtype=F64), torch.cumulative_trapezoid(mu, ts)])
    ax.semilogy(ts, start * torch.exp(integral), color=ORANGE, label="log norm on the segment")
    ax.semilogy(ts, distance, color=BLUE, label="distance")
    ax.set(xlabel="t")
    ax.legend(fontsize=8)


def sink(ax: Axes) -> None:
    """Level sets of V = z'Pz, with A'P + PA = -I at the sink of a damped pendulum, and solutions that enter them."""
    J = jacobian(pendulum, torch.zeros(1, 2, dtype=F64))[0]
    P = torch.from_numpy(scipy.linalg.solve_continuous_lyapunov(J.T.numpy(), -torch.eye(2).double().numpy()))
    angle = torch.linspace(0, 2 * math.pi, 121, dtype=F64)
    ring = torch.stack([angle.cos(), angle.sin()], dim=1) @ torch.linalg.inv(torch.linalg.cholesky(P))
    for size in (0.5, 1.0, 1.5, 2.0):
        ax.plot(*(size * ring).T, color=GREY, linewidth=0.7)
    zs = ODEBlock(pendulum).solve(2 * ring[:-1:30], torch.linspace(0, 14, 141, dtype=F64)).zs
    for k in range(4):
        ax.plot(*zs[:, k].T, color=BLUE, linewidth=1.2)
    ax.plot(*zs[0].T, "o", color=BLUE, markersize=4)
    ax.plot(0, 0, "o", color=ORANGE)
    ax.set(xlabel="angle", ylabel="speed", aspect="equal")


def circles(left: Axes, right: Axes) -> None:
    """A circle and its images by a flow, each around its centre once; by one long Euler step, twice."""
    angle = torch.linspace(0, 2 * math.pi, 161, dtype=F64)
    circle = torch.cat([torch.stack([angle.cos(), angle.sin()], dim=1), torch.zeros(1, 2, dtype=F64)])
    for t, colour in ((0.0, GREY), (1.0, "#85BEDD"), (2.0, BLUE)):
        image = circle + torch.tensor([1.5, 0.5], dtype=F64)
        image = ODEBlock(pendulum, t1=t)(image) if t else image
        left.plot(*image[:-1].T, color=colour, label=f"t = {t:g}")
        left.plot(*image[-1:].T, "o", color=colour, markersize=3)

    def square(z: Tensor) -> Tensor:
        x, y = z.unbind(1)
        return torch.stack([x**2 - y**2, 2 * x * y], dim=1) - z

    start = circle + torch.tensor([0.3, 0.0], dtype=F64)
    for image, colour in ((start, GREY), (ODEBlock(square, solver=Euler(1))(start), ORANGE)):
        right.plot(*image[:-1].T, color=colour)
        right.plot(*image[-1:].T, "o", color=colour, markersize=3)
    left.set(title="flow", aspect="equal", xlim=(-1.2, 3.4))
    left.legend(fontsize=8, loc="upper left", handlelength=1, borderaxespad=0)
    right.set(title=r"Euler, $z \to z^2$", aspect="equal")


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
