"""The pictures of docs/theory.md that are about matrices: statements 4 to 7."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from theory_figures_style import BLUE, F64, GREY, ORANGE

from odelayers import MLP, gershgorin, log_norm, spectral_abscissa


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


def batch_jacobian(left: Axes, right: Axes) -> None:
    """The Jacobian of a batch of four rows by itself: blocks on the diagonal, unless the rows interact."""
    z, net = torch.randn(4, 3, dtype=F64), MLP(3, (8,)).double()
    for ax, f, title in ((left, net, "rows apart"), (right, lambda z: net(z - z.mean(0)), "less the mean over rows")):
        J = torch.func.jacrev(lambda z, f=f: f(z.view(4, 3)).flatten())(z.flatten()).abs()
        ax.imshow(J, cmap="Blues", interpolation="nearest")
        for edge in (2.5, 5.5, 8.5):
            ax.axhline(edge, color=GREY, linewidth=0.5)
            ax.axvline(edge, color=GREY, linewidth=0.5)
        centres = [1, 4, 7, 10]
        ax.set(title=title, xlabel="row of z")
        ax.set_xticks(centres, labels="1234")
        ax.set_yticks(centres, labels="1234")
    left.set_ylabel("row of f(z)")


def squaring(ax: Axes) -> None:
    """The time t = 2^k / |A| times the gap of the bound: constant, or with one eigenvector short growing like log t."""
    ks = list(range(2, 25, 2))
    for values, label, colour in (
        ([[-1.0, 100.0], [0.0, -2.0]], "two eigenvectors", BLUE),
        ([[-1.0, 1.0], [0.0, -1.0]], "one eigenvector", ORANGE),
    ):
        A = torch.tensor(values, dtype=F64)
        gaps = [spectral_abscissa(A, method="squaring", squarings=k).item() + 1 for k in ks]
        scaled = [gap * 2**k / A.norm().item() for gap, k in zip(gaps, ks, strict=True)]
        ax.plot(ks, scaled, "o-", color=colour, markersize=3, label=label)
    ax.set(xlabel="k, squarings", ylabel=r"$t\,\times$ (bound less abscissa)", ylim=(0, 18))
    ax.legend(fontsize=8)
