"""Ready-made autonomous fields f(z); any other module or function f(z) or f(t, z) serves as well.

`SineField` and `SkewSymmetric` are activations of a linear map: their Jacobian is diag(s) W. They say so by a method
`linearize(z)` that gives s and W, which Jacobians and regularisers use; a field of yours may do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odelayers._checks import finite_number, one_of, positive_int

__all__ = ["MLP", "ConvField", "ConvexPotential", "SineField", "SkewSymmetric"]

_LEAK = 0.01

# Activations with their slopes; all are nondecreasing and 1-Lipschitz, which the bounds of this module rest on.
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, lambda u: (u > 0).to(u.dtype)),
    "leaky_relu": (lambda u: F.leaky_relu(u, _LEAK), lambda u: torch.full_like(u, _LEAK).masked_fill(u > 0, 1.0)),
    "tanh": (torch.tanh, lambda u: 1 - torch.tanh(u) ** 2),
    "softplus": (F.softplus, torch.sigmoid),
}


class MLP(nn.Sequential):
    """A fully connected field on vectors: Linear layers with an activation between them.

    Args:
        dim: number of coordinates of the state (B, dim).
        hidden: widths of the hidden layers; none gives an affine field.
        activation: class of the activation; a smooth one keeps high-order solvers at their order.

    Raises:
        TypeError, ValueError: a width is not an int >= 1, `hidden` no sequence of them, or `activation` no class.

    >>> MLP(2, hidden=(16,))(torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (64,), activation: Callable[[], nn.Module] = nn.Tanh):
        if not isinstance(hidden, Sequence) or isinstance(hidden, str):
            raise TypeError(f"MLP: hidden: expected a sequence of widths such as (64,), got {hidden!r}")
        if isinstance(activation, nn.Module) or not callable(activation):
            raise TypeError(f"MLP: activation: expected a class such as nn.Tanh, got {activation!r}")
        widths = [positive_int(dim, "MLP: dim"), *(positive_int(h, "MLP: hidden") for h in hidden), dim]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), activation()]
        super().__init__(*layers[:-1])


class ConvField(nn.Sequential):
    """The field of the blog's MNIST net: GroupNorm, then four times ReLU, 3x3 convolution, GroupNorm.

    Convolutions have no bias. The number of groups is the largest divisor of `channels` up to 32.

    Args:
        channels: channels C of the state (B, C, H, W); the blog's nets have 16 and 128.

    Raises:
        TypeError, ValueError: `channels` is not an int >= 1.

    Source: Rajat Vadiraj Dwaraknath, "Neural ODEs and adversarial attacks" (2019).

    >>> ConvField(16)(torch.zeros(2, 16, 7, 7)).shape
    torch.Size([2, 16, 7, 7])
    """

    def __init__(self, channels: int):
        groups = max(g for g in range(1, 33) if positive_int(channels, "ConvField: channels") % g == 0)
        layers: list[nn.Module] = [nn.GroupNorm(groups, channels)]
        for _ in range(4):
            layers += [nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
            layers += [nn.GroupNorm(groups, channels)]
        super().__init__(*layers)


class SineField(nn.Module):
    """SODEF's field on MNIST, f(z) = sin(-(Wz + b)).

    Args:
        dim: number of coordinates of the state (B, dim); SODEF has 64.

    Raises:
        TypeError, ValueError: `dim` is not an int >= 1.

    Source: Kang, Song, Ding, Tay, "Stable neural ODE with Lyapunov-stable equilibrium points" (NeurIPS 2021).

    >>> SineField(64)(torch.zeros(2, 64)).shape
    torch.Size([2, 64])
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(positive_int(dim, "SineField: dim"), dim)

    def forward(self, z: Tensor) -> Tensor:
        """Give dz/dt at states (B, dim)."""
        return torch.sin(-self.linear(z))

    def linearize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Give -cos(Wz + b), (B, dim), and W, (dim, dim): the Jacobian is diag(-cos(Wz + b)) W."""
        return -torch.cos(self.linear(z)), self.linear.weight


class SkewSymmetric(nn.Module):
    """SONet's stable field f(z) = act(Az + b), A = [[-damping I, K], [-K', -damping I]].

    The eigenvalues of its Jacobian have real parts of at most -damping times the smallest slope of the activation:
    diag(s) A has the spectrum of s^1/2 A s^1/2, whose symmetric part is -damping diag(s). So no mode grows, and with
    damping > 0 and an activation of positive slope every equilibrium is asymptotically stable. It need not contract:
    in the Euclidean norm a solution may first grow.

    Args:
        dim: number of coordinates of the state (B, dim), at least 2; K couples the first half with the second.
        damping: gamma >= 0.
        activation: `"leaky_relu"` (slope 0.01 below 0, the source's), `"relu"`, `"tanh"` or `"softplus"`.

    Raises:
        TypeError, ValueError: `dim` is not an int >= 2, `damping` negative or not finite, or `activation` unknown.

    Source: Huang, Yu, Zhang, Ma, Yao, "Adversarial robustness of stabilized neural ODE might be from obfuscated
    gradients" (MSML 2022): the block of its SONet, dense where that is convolutional and without its GroupNorm.
    The authors trace its robustness to the adaptive solver, which hides gradients from attacks.

    >>> SkewSymmetric(6, damping=0.1)(torch.zeros(2, 6)).shape
    torch.Size([2, 6])
    """

    def __init__(self, dim: int, *, damping: float = 0.0, activation: str = "leaky_relu"):
        super().__init__()
        if positive_int(dim, "SkewSymmetric: dim") < 2:
            raise ValueError("SkewSymmetric: dim: expected an int >= 2 (two parts that are coupled), got 1")
        if finite_number(damping, "SkewSymmetric: damping") < 0:
            raise ValueError(f"SkewSymmetric: damping: expected a number >= 0, got {damping}")
        self.damping = float(damping)
        self.activation = one_of(activation, "SkewSymmetric: activation", tuple(_ACTIVATIONS))
        linear = nn.Linear(dim - dim // 2, dim // 2)  # for torch's usual initialisation
        self.weight = linear.weight
        self.bias = nn.Parameter(torch.zeros(dim))

    def matrix(self) -> Tensor:
        """Give A, (dim, dim)."""
        upper = F.pad(self.weight, (self.weight.shape[0], 0, 0, self.weight.shape[1]))
        return upper - upper.mT - self.damping * torch.eye(len(upper), dtype=upper.dtype, device=upper.device)

    def forward(self, z: Tensor) -> Tensor:
        """Give dz/dt at states (B, dim)."""
        return _ACTIVATIONS[self.activation][0](F.linear(z, self.matrix(), self.bias))

    def linearize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Give act'(Az + b), (B, dim), and A, (dim, dim): the Jacobian is diag(act'(Az + b)) A."""
        A = self.matrix()
        return _ACTIVATIONS[self.activation][1](F.linear(z, A, self.bias)), A

    def extra_repr(self) -> str:
        """Describe the field in its repr."""
        return f"{len(self.bias)}, damping={self.damping}, activation={self.activation!r}"


class ConvexPotential(nn.Module):
    """A field whose flow is 1-Lipschitz: f(z) = -W' act(Wz + b), the negative gradient of a convex function.

    Its Jacobian -W' diag(s) W is symmetric with eigenvalues in [-||W||^2, 0], so its Euclidean log norm is <= 0 and
    no two solutions move apart. Explicit Euler with step h keeps that while h ||W||^2 <= 2 (`max_step()`); other
    Runge-Kutta methods do not in general.

    Args:
        dim: number of coordinates of the state (B, dim).
        hidden: number of rows of W; `dim` when not given.
        activation: nondecreasing and 1-Lipschitz: `"relu"`, `"leaky_relu"`, `"tanh"` or `"softplus"`.

    Raises:
        TypeError, ValueError: `dim` or `hidden` is not an int >= 1, or `activation` is unknown.

    Source: Meunier, Delattre, Araujo, Allauzen, "A dynamical system perspective for Lipschitz neural networks" (2022).

    >>> f = ConvexPotential(4)
    >>> z = torch.randn(2, 4)
    >>> step = z + f.max_step() * f(z)
    >>> bool((step[0] - step[1]).norm() <= (z[0] - z[1]).norm() * (1 + 1e-5))
    True
    """

    def __init__(self, dim: int, hidden: int | None = None, *, activation: str = "relu"):
        super().__init__()
        rows = positive_int(dim if hidden is None else hidden, "ConvexPotential: hidden")
        self.linear = nn.Linear(positive_int(dim, "ConvexPotential: dim"), rows)
        self.activation = one_of(activation, "ConvexPotential: activation", tuple(_ACTIVATIONS))

    def forward(self, z: Tensor) -> Tensor:
        """Give dz/dt at states (B, dim)."""
        return -_ACTIVATIONS[self.activation][0](self.linear(z)) @ self.linear.weight

    def operator_norm(self) -> Tensor:
        """Give ||W||, the largest singular value, by a full SVD in float64: exact up to rounding, unlike iterations."""
        norm: Tensor = torch.linalg.matrix_norm(self.linear.weight.double(), 2)
        return norm

    def max_step(self) -> float:
        """Give 2 / ||W||^2, the largest step at which explicit Euler stays 1-Lipschitz (inf for W = 0)."""
        norm = self.operator_norm().item()
        return 2 / norm**2 if norm else float("inf")

    def extra_repr(self) -> str:
        """Describe the field in its repr."""
        return f"activation={self.activation!r}"
