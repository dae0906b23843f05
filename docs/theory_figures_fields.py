"""The pictures of docs/theory.md that are about gradients, fields, heads and attacks: statements 15 to 19."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from theory_figures_style import BLUE, F64, GREEN, GREY, ORANGE
from torch import Tensor

from examples.mnist.attacks import PGD, Threat, perturb
from odelayers import MLP, Adjoint, Backprop, Checkpoint, ConvexPotential, Dopri5, ODEBlock, jacobian, simplex_head


def gradients(ax: Axes) -> None:
    """How far a gradient lies from Backprop's at the same tolerance, for the adjoint and for checkpoints."""
    tolerances = [10.0**-k for k in range(3, 12)]
    net, z = MLP(4, (16,)).double(), torch.randn(8, 4, dtype=F64)
    errors: dict[str, list[float]] = {"Adjoint": [], "Checkpoint": []}
    for tol in tolerances:
        found = {}
        for gradient in (Backprop(), Adjoint(), Checkpoint()):
            with torch.enable_grad():
                block = ODEBlock(net, t1=3.0, solver=Dopri5(tol, tol), gradient=gradient)
                loss = block(z.clone().requires_grad_()).square().sum()
                parts = torch.autograd.grad(loss, list(net.parameters()))
            found[type(gradient).__name__] = torch.cat([g.flatten() for g in parts])
        for name in errors:
            errors[name].append(
                max(1e-17, ((found[name] - found["Backprop"]).norm() / found["Backprop"].norm()).item())
            )
    ax.loglog(tolerances, errors["Adjoint"], "o-", color=ORANGE, markersize=3, label="Adjoint")
    ax.loglog(tolerances, errors["Checkpoint"], "o-", color=BLUE, markersize=3, label="Checkpoint")
    ax.loglog(tolerances, tolerances, color=GREY, linestyle="--", label="tolerance")
    ax.set(xlabel="tolerance", ylabel="distance from Backprop")
    ax.legend(fontsize=8)


def bumps(ax: Axes) -> None:
    """A field with three equilibria of any Jacobian one likes: a sink, a saddle and a rotation."""
    points = torch.tensor([[-1.2, 0.0], [1.2, 0.0], [0.0, 1.6]], dtype=F64)
    A = torch.tensor([[[-1, 0], [0, -1]], [[1, 0], [0, -1]], [[0, 1], [-1, 0]]], dtype=F64)

    def f(z: Tensor) -> Tensor:
        apart = z[:, None] - points
        bump = (1 - apart.square().sum(2, keepdim=True)).clamp(min=0) ** 2
        return (bump * torch.einsum("kij,bkj->bki", A, apart)).sum(1)

    grid = torch.cartesian_prod(torch.linspace(-2.2, 2.2, 17, dtype=F64), torch.linspace(-1, 2.6, 14, dtype=F64))
    grid = grid[f(grid).norm(dim=1) > 0]
    way = torch.nn.functional.normalize(f(grid), dim=1)
    ax.quiver(*grid.T, *way.T, color=BLUE, pivot="mid", scale=22, width=0.005)
    for point, name in zip(points, ("sink", "saddle", "rotation"), strict=True):
        ax.add_patch(plt.Circle(tuple(point.tolist()), 1, fill=False, color=GREY, linewidth=0.7))
        x, y = point.tolist()
        ax.text(x, y + (1.08 if y else -1.3), name, ha="center", fontsize=8)
    ax.plot(*points.T, "o", color=ORANGE, markersize=4)
    ax.set(aspect="equal", xlim=(-2.4, 2.4), ylim=(-1.45, 2.95))


def divergence(ax: Axes) -> None:
    """The mean trace of J over the unit disc against (d/r) sup|f|, for random fields; -(z - c) lies on the line."""
    r, angle = torch.rand(2000, dtype=F64).sqrt(), 2 * math.pi * torch.rand(2000, dtype=F64)
    disc = r[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    for make, count, name, colour in (
        (lambda: MLP(2, (16,)), 60, "MLP", BLUE),
        (lambda: ConvexPotential(2, 8), 60, "ConvexPotential", GREEN),
        (lambda: lambda z: -z, 1, "-z", ORANGE),
    ):
        for k in range(count):
            f = make()
            f = f.double() if isinstance(f, torch.nn.Module) else f
            scale = 1.0 if count == 1 else 0.2 + 2.0 * torch.rand(()).item()
            x = 2 * scale * f(disc).norm(dim=1).max()
            y = scale * jacobian(f, disc).diagonal(dim1=1, dim2=2).sum(1).mean()
            ax.plot(x, y, "o", color=colour, markersize=6 if count == 1 else 3, label=name if k == 0 else None)
    line = torch.tensor([0.0, 4.0])
    ax.plot(line, -line, color="black", linewidth=0.8, label="the bound")
    ax.set(xlabel=r"$(d/r)\,\sup\|f\|$", ylabel="mean of tr J", xlim=(0, 4), ylim=(-4, 2))
    ax.legend(fontsize=8, loc="lower left")


def angles(ax: Axes) -> None:
    """The largest cosine among k unit vectors in k - 1 dimensions: random ones, and the simplex."""
    ks = list(range(2, 11))
    for k in ks:
        V = torch.nn.functional.normalize(torch.randn(25, k, k - 1, dtype=F64), dim=2)
        widest = (V @ V.mT - 2 * torch.eye(k, dtype=F64)).amax(dim=(1, 2))
        ax.plot([k] * 25, widest, ".", color=GREY, markersize=3, label="random" if k == 2 else None)
    heads = [simplex_head(k, k - 1).weight.double() for k in ks]
    cosines = [(V @ V.T - 2 * torch.eye(k, dtype=F64)).max() for k, V in zip(ks, heads, strict=True)]
    ax.plot(ks, cosines, "o", color=ORANGE, label="simplex_head")
    ax.plot(ks, [-1 / (k - 1) for k in ks], color=BLUE, label=r"$-1/(k-1)$")
    ax.set(xlabel="k", ylabel="largest cosine", ylim=(-1.1, 1.5))
    ax.legend(fontsize=8, ncols=3, loc="upper center", columnspacing=0.8, handletextpad=0.3)


def worst_case(ax: Axes) -> None:
    """Accuracy under two attacks and in the worst case over both, with hits that carry over to larger radii."""
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
    ).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    images = torch.rand(200, 1, 4, 4, dtype=F64)
    targets, radii = model(images).argmax(1), [0.02 * k for k in range(1, 13)]
    attacks = {"one step": PGD("ce", 1, random_start=False), "six steps": PGD("ce", 6)}
    accuracy: dict[str, list[float]] = {name: [] for name in (*attacks, "worst case")}
    stands = torch.ones(200, dtype=torch.bool)
    for eps in radii:
        for name, attack in attacks.items():
            with torch.enable_grad():
                found = perturb(model, images, targets, Threat("linf", eps), attack, torch.Generator().manual_seed(0))
            alone = model(found).argmax(1) == targets
            stands = stands & alone
            accuracy[name].append(alone.double().mean().item())
        accuracy["worst case"].append(stands.double().mean().item())
    for (name, values), colour in zip(accuracy.items(), ("#F5D08A", "#85BEDD", "black"), strict=True):
        ax.plot(radii, values, "o-" if colour != "black" else "-", color=colour, markersize=3, label=name)
    ax.set(xlabel=r"$\epsilon$", ylabel="accuracy", ylim=(-0.03, 1.03))
    ax.legend(fontsize=8)
