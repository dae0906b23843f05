"""Penalties that push a field towards stability (pointwise) or its trajectories towards rest (along a solve)."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from odelayers import _checks
from odelayers._accumulated import JacobianRegularizer, KineticRegularizer, SteadyStateRegularizer
from odelayers._checks import at_least_float32, finite_number, one_of, points, positive_int, positive_number
from odelayers._evaluator import Evaluator, inferring, recordable
from odelayers._field import Field, as_rows, training_batchnorm
from odelayers._jacobian import jacobian, refuse_batch_statistics
from odelayers._linalg import check_rows_finite, gershgorin
from odelayers._linearize import linearization

__all__ = [
    "JacobianRegularizer",
    "KineticRegularizer",
    "LyaNetRegularizer",
    "LyapunovRegularizer",
    "LyapunovTerms",
    "SteadyStateRegularizer",
]


class LyapunovTerms(NamedTuple):
    """The three terms of a `LyapunovRegularizer` before they are weighted, each a 0-d tensor.

    >>> LyapunovRegularizer(field=1.0).terms(lambda z: -z, torch.ones(2, 3)).field.item()
    1.0
    """

    field: Tensor
    diagonal: Tensor
    dominance: Tensor


@dataclass(frozen=True, kw_only=True)
class LyapunovRegularizer:
    """SODEF's penalty for points that are not near a Lyapunov-stable equilibrium of the field.

    With J the Jacobian at a point and R_i the sum of |J_ij| (`axis="row"`) or |J_ji| (`"column"`) over j != i, it is

        field * mean (field_scale f_i)^2
        + diagonal * mean exp(diagonal_scale (J_ii + diagonal_margin))
        + dominance * mean exp(dominance_scale (R_i - |J_ii| + dominance_margin)),

    means over points and coordinates: the penalty form of the constraints (1) f = 0, (2) J_ii < 0 and (3) |J_ii| > R_i
    of the source's eq. 4. Where (2) and (3) hold at a point, Gershgorin's theorem puts all eigenvalues of J in the left
    half plane; a small mean does not make them hold at every point: see `check_stability`.

    Beyond a = log(largest number) / 4 (22 in float32) the exponential goes on as its tangent, e^a (1 + x - a), so that
    neither it nor the square of its gradient overflows. Half precision is computed in float32.

    Args:
        field: weight of the first term, >= 0; so are `diagonal` and `dominance` of theirs.
        field_scale: factor on f, > 0; so are `diagonal_scale` and `dominance_scale` in their exponents.
        diagonal_margin: how far below 0 the diagonal is wanted, in units of J.
        dominance_margin: by how much |J_ii| is wanted above R_i, in units of J.
        axis: `"row"` as in the source's theorem 4, or `"column"`; both imply stability.
        samples: number of rows of z, drawn anew at each call, at which Jacobians are taken; all when None.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or outside its range.

    Source: Shariatian, "Can neural ODEs offer free robustness?", eq. 4, after Kang et al., SODEF (NeurIPS 2021).

    >>> regularizer = LyapunovRegularizer(field=1.0, diagonal=0.5, dominance=0.5)
    >>> round(regularizer(lambda z: -z, torch.zeros(8, 3)).item(), 5) == round(math.exp(-1), 5)
    True
    """

    field: float = 1.0
    diagonal: float = 1.0
    dominance: float = 1.0
    field_scale: float = 1.0
    diagonal_scale: float = 1.0
    dominance_scale: float = 1.0
    diagonal_margin: float = 0.0
    dominance_margin: float = 0.0
    axis: str = "row"
    samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("field", "diagonal", "dominance"):
            if finite_number(getattr(self, name), f"LyapunovRegularizer: {name}") < 0:
                raise ValueError(f"LyapunovRegularizer: {name}: expected a weight >= 0, got {getattr(self, name)}")
            positive_number(getattr(self, f"{name}_scale"), f"LyapunovRegularizer: {name}_scale")
        finite_number(self.diagonal_margin, "LyapunovRegularizer: diagonal_margin")
        finite_number(self.dominance_margin, "LyapunovRegularizer: dominance_margin")
        one_of(self.axis, "LyapunovRegularizer: axis", ("row", "column"))
        if self.samples is not None:
            positive_int(self.samples, "LyapunovRegularizer: samples")

    @classmethod
    def sodef_mnist(cls, *, samples: int | None = 8) -> LyapunovRegularizer:
        """Give the constants of SODEF's official MNIST code (phase 2), which sums over columns and takes 8 samples.

        >>> LyapunovRegularizer.sodef_mnist().axis
        'column'
        """
        return cls(
            field=0.2,
            diagonal=10.0,
            dominance=10.0,
            field_scale=50.0,
            dominance_scale=0.1,
            diagonal_margin=1.0,
            dominance_margin=1.0,
            axis="column",
            samples=samples,
        )

    def __call__(
        self, f: Callable[..., Tensor], z: Tensor, t: Tensor | float = 0.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Give the weighted sum of the terms, a 0-d tensor; arguments and errors as `terms`."""
        terms = self.terms(f, z, t, generator=generator)
        return self.field * terms.field + self.diagonal * terms.diagonal + self.dominance * terms.dominance

    def terms(
        self, f: Callable[..., Tensor], z: Tensor, t: Tensor | float = 0.0, *, generator: torch.Generator | None = None
    ) -> LyapunovTerms:
        """Give the three terms, not weighted.

        Args:
            f: field, `f(z)` or `f(t, z)`.
            z: points (B, ...), floating point, B >= 1.
            t: time, a float or a 0-d tensor.
            generator: source of the rows drawn for `samples`; torch's global one when None.

        Raises:
            TypeError: z is not a floating-point tensor.
            ValueError: z is empty, and what `jacobian` raises.
        """
        field, z = Field.of(f), points(z, "LyapunovRegularizer")
        _checks.generator(generator, "LyapunovRegularizer: generator")
        refuse_batch_statistics(field, "LyapunovRegularizer")  # before its statistics move
        check_rows_finite(z, "LyapunovRegularizer: z")
        some, chosen = field, z
        if self.samples is not None and self.samples < len(z):
            device = z.device if generator is None else generator.device
            rows = torch.randperm(len(z), generator=generator, device=device)[: self.samples].to(z.device)
            some, chosen = field.take(rows, len(z)), z[rows]
        centres, radii = _discs(some, chosen, t, self.axis)
        # After the discs: the order of the graph decides the last digits of a gradient, and they what is trained.
        velocity = at_least_float32(Evaluator(field, len(z))(t, z))
        check_rows_finite(velocity, f"LyapunovRegularizer: field {field.name}: f(z)")
        return LyapunovTerms(
            field=(self.field_scale * velocity).square().mean(),
            diagonal=_tame_exp(self.diagonal_scale * (centres + self.diagonal_margin)).mean(),
            dominance=_tame_exp(self.dominance_scale * (radii - centres.abs() + self.dominance_margin)).mean(),
        )


@dataclass(frozen=True, kw_only=True)
class LyaNetRegularizer:
    """LyaNet's pointwise penalty, the mean of relu(V' + kappa V), with V the cross-entropy of head(z) as potential.

    V' = grad V . f is its rate along the flow. Where the penalty is 0 along a solution, V falls at least like
    e^(-kappa t).

    Args:
        kappa: wanted rate, > 0, in units of 1/time.

    Raises:
        TypeError, ValueError: `kappa` is not a number > 0.

    Source: Rodriguez, Ames, Yue, "LyaNet: a Lyapunov framework for training neural ODEs" (ICML 2022).
    """

    kappa: float = 1.0

    def __post_init__(self) -> None:
        positive_number(self.kappa, "LyaNetRegularizer: kappa")

    def __call__(
        self, f: Callable[..., Tensor], z: Tensor, y: Tensor, head: Callable[[Tensor], Tensor], t: Tensor | float = 0.0
    ) -> Tensor:
        """Give the penalty, a 0-d tensor.

        Args:
            f: field, `f(z)` or `f(t, z)`.
            z: points (B, ...), floating point.
            y: classes (B,), integer, or class probabilities (B, classes).
            head: gives scores (B, classes) at states; its rows must not interact.
            t: time.

        Raises:
            TypeError: z is not a floating-point tensor.
            ValueError: z is empty, f returns another shape than z's, or f or the head contains a BatchNorm with batch
                statistics.

        >>> z, y = torch.zeros(1, 2), torch.tensor([0])
        >>> round(LyaNetRegularizer(kappa=2.0)(lambda z: -z, z, y, lambda z: z).item(), 4)
        1.3863
        """
        field, z = Field.of(f), points(z, "LyaNetRegularizer")
        refuse_batch_statistics(field, "LyaNetRegularizer")
        if norm := training_batchnorm(head):
            raise ValueError(
                f"LyaNetRegularizer: head contains {norm} with batch statistics, through which its rows interact; call "
                f".eval() on the head first"
            )
        further = torch.is_grad_enabled()
        recording = torch.inference_mode(False) if inferring() else nullcontext()
        with recording, torch.enable_grad():
            # A view of its own: hooks on z see the gradients of the caller's graph, not the one that is taken here.
            x = z.view_as(z) if further and z.requires_grad else recordable(z).detach().requires_grad_()
            potential = F.cross_entropy(head(x), recordable(y), reduction="none")
            (gradient,) = torch.autograd.grad(potential.sum(), x, create_graph=further)
        velocity = Evaluator(field, len(z))(t, z)
        decay = as_rows(gradient * velocity).sum(1)
        return F.relu(decay + self.kappa * (potential if further else potential.detach())).mean()


def _discs(field: Field, z: Tensor, t: Tensor | float, axis: str) -> tuple[Tensor, Tensor]:
    """The Gershgorin discs of the Jacobians, (B, D) each; without the Jacobians where they are one diag(s) W."""
    factors = linearization(field, z, t)
    if factors is None or len(factors) > 1 or factors[0].slopes is None or not _square(factors[0].matrix):
        return gershgorin(at_least_float32(jacobian(field, z, t)), axis)  # which says so of a field of another width
    slopes, matrix = at_least_float32(factors[0].slopes), at_least_float32(factors[0].matrix)
    for factor in (slopes, matrix):
        check_rows_finite(factor, f"LyapunovRegularizer: field {field.name}: linearize")
    diagonal, radii = gershgorin(matrix, axis)
    if axis == "row":
        return slopes * diagonal, slopes.abs() * radii
    return slopes * diagonal, slopes.abs() @ (matrix - matrix.diagonal().diag_embed()).abs()


def _square(matrix: Tensor) -> bool:
    return matrix.shape[-2] == matrix.shape[-1]


def _tame_exp(x: Tensor) -> Tensor:
    """The exponential up to log(largest number) / 4, its tangent beyond."""
    bend = math.log(torch.finfo(x.dtype).max) / 4
    return torch.exp(x.clamp(max=bend)) * (1 + (x - bend).clamp(min=0))
