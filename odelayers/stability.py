"""Questions about a field at points: spectrum, discs, log norms, Lyapunov exponents, and a report on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from odelayers._checks import at_least_float32, finite_number, half_precision, positive_int, state
from odelayers._driver import Clock
from odelayers._evaluator import Evaluator
from odelayers._field import Field, as_rows
from odelayers._hurwitz import is_hurwitz
from odelayers._jacobian import jacobian, value_and_jacobian
from odelayers._krylov import RitzValues, euclidean_log_norm, rightmost_eigenvalues
from odelayers._linalg import eigenvalues, gershgorin, log_norm, row_norms, spectral_abscissa
from odelayers._solution import SolveError, Status
from odelayers._solvers.fixed import RK4

__all__ = [
    "RitzValues",
    "StabilityReport",
    "check_stability",
    "euclidean_log_norm",
    "gershgorin",
    "is_hurwitz",
    "jacobian",
    "log_norm",
    "lyapunov_exponents",
    "rightmost_eigenvalues",
    "spectral_abscissa",
    "spectrum",
]

_QUANTITIES = {
    "residual": "|f|",
    "abscissa": "spectral abscissa",
    "log_norm_1": "log norm, p = 1",
    "log_norm_2": "log norm, p = 2",
    "log_norm_inf": "log norm, p = inf",
    "diagonal": "max J_ii",
    "row_dominance": "min |J_ii| - R_i, rows",
    "column_dominance": "min |J_ii| - R_i, columns",
    "rounding": "rounding",
}
_VERDICTS = ("contracting", "stable", "undecided", "unstable")
_RESTS_ON = {
    "abscissa": ("abscissa", "linear stability (theorem 3): an equilibrium here is asymptotically stable"),
    "Gershgorin, rows": ("log_norm_inf", "Gershgorin (theorem 4): J_ii + R_i for all i; contraction in the inf-norm"),
    "Gershgorin, columns": ("log_norm_1", "the same over columns; contraction in the 1-norm"),
    "log norm, p = 2": ("log_norm_2", "contraction in the Euclidean norm"),
}


def spectrum(f: Callable[..., Tensor], z: Tensor, t: Tensor | float = 0.0) -> Tensor:
    """Give the eigenvalues of the field's Jacobian at every row of z, (B, D) complex, in no particular order.

    Raises:
        TypeError, ValueError: as `jacobian`.

    >>> spectrum(lambda z: torch.stack([z[:, 1], -z[:, 0]], 1), torch.zeros(1, 2)).imag.abs()
    tensor([[1., 1.]])
    """
    return eigenvalues(jacobian(f, z, t), "spectrum")


@dataclass(frozen=True, eq=False)
class StabilityReport:
    """What `check_stability` found at B points; every quantity is a tensor (B,). Prints as a table.

    >>> check_stability(lambda z: -2 * z, torch.zeros(1, 3)).abscissa
    tensor([-2.])

    Attributes:
        field: name of the field.
        t: time of the check.
        margin: how far from 0 a quantity must lie to have a sign, beyond rounding.
        residual: Euclidean |f|; a point is an equilibrium where it is 0.
        abscissa: largest real part of the eigenvalues of the Jacobian J.
        log_norm_1: logarithmic norm for p = 1, which is the Gershgorin bound over columns.
        log_norm_2: logarithmic norm for p = 2.
        log_norm_inf: logarithmic norm for p = inf, which is the Gershgorin bound over rows, max J_ii + R_i.
        diagonal: largest J_ii; constraint (2) of the Lyapunov regulariser asks for < 0.
        row_dominance: smallest |J_ii| - R_i over rows; constraint (3) asks for > 0.
        column_dominance: the same over columns.
        rounding: D eps |J| (Frobenius), the backward error of the eigenvalues; those of a matrix far from normal can
            be further off.
    """

    field: str
    t: float
    margin: float
    residual: Tensor
    abscissa: Tensor
    log_norm_1: Tensor
    log_norm_2: Tensor
    log_norm_inf: Tensor
    diagonal: Tensor
    row_dominance: Tensor
    column_dominance: Tensor
    rounding: Tensor

    @property
    def verdict(self) -> list[str]:
        """The strongest that holds at each point: contracting (by a log norm), stable or unstable (by the abscissa).

        Undecided is what lies within margin and rounding of 0.
        """
        mu = torch.stack([self.log_norm_1, self.log_norm_2, self.log_norm_inf]).amin(0)
        found = torch.where(self.abscissa > self.threshold, 3, 2)
        found = found.where(self.abscissa >= -self.threshold, 1).where(mu >= -self.threshold, 0)
        return [_VERDICTS[i] for i in found.tolist()]

    @property
    def threshold(self) -> Tensor:
        """How far from 0 a quantity must lie to have a sign, (B,): margin plus rounding."""
        return self.margin + self.rounding

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain numbers, strings and lists, ready for JSON."""
        numbers = {name: getattr(self, name).tolist() for name in _QUANTITIES}
        return {"field": self.field, "t": self.t, "margin": self.margin, **numbers, "verdict": self.verdict}

    def __str__(self) -> str:
        levels = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "max": 1.0}
        points = len(self.residual)
        lines = [f"{self.field} at {points} points, t = {self.t:g}, margin = {self.margin:g}"]
        lines.append(f"{'':26}" + "".join(f"{level:>11}" for level in levels))
        for name, title in _QUANTITIES.items():
            values = getattr(self, name).double()
            quantiles = [values.quantile(q).item() if points else math.nan for q in levels.values()]
            lines.append(f"{title:26}" + "".join(f"{q:11.3g}" for q in quantiles))
        lines.append(f"{'negative':26}{'points':>11}  rests on")
        for title, (name, theorem) in _RESTS_ON.items():
            count = int((getattr(self, name) < -self.threshold).sum())
            lines.append(f"{title:26}{f'{count}/{points}':>11}  {theorem}")
        verdict = self.verdict
        counts = (f"{verdict.count(v)} {v}" for v in _VERDICTS)
        return "\n".join([*lines, f"verdict: {', '.join(counts)} (at these points, not around them)"])


@torch.no_grad()
def check_stability(
    f: Callable[..., Tensor], z: Tensor, t: Tensor | float = 0.0, *, margin: float = 0.0
) -> StabilityReport:
    """Check the linear stability and the contraction of a field at points: check, not certify.

    Each verdict speaks about the Jacobian at the point alone. A negative abscissa says that an equilibrium at that
    point would attract what starts near enough; it says nothing about how near, and nothing at all where |f| is not 0.
    A negative log norm says that neighbours approach each other now; a basin needs it on a whole region.

    Args:
        f: field, `f(z)` or `f(t, z)`.
        z: points (B, ...), floating point.
        t: time, a float or a 0-d tensor.
        margin: how far from 0 a quantity must lie to have a sign, beyond rounding; >= 0, in units of 1/time.

    Raises:
        TypeError, ValueError: as `jacobian`; `t` is not one number; `margin` is negative or not finite.

    Source: Shariatian, "Can neural ODEs offer free robustness?", theorems 3 (linear stability) and 4 (Gershgorin), the
    latter corrected: it is the real part of J_ii that must lie below -R_i.

    >>> check_stability(lambda z: -z, torch.zeros(2, 3)).verdict
    ['contracting', 'contracting']
    """
    if finite_number(margin, "check_stability: margin") < 0:
        raise ValueError(f"check_stability: margin: expected a number >= 0, got {margin}")
    at = t.item() if isinstance(t, Tensor) and t.numel() == 1 else t
    if not isinstance(at, Real):
        raise TypeError(f"check_stability: t: expected a number or a tensor of one, got {t!r}")
    field = Field.of(f)
    velocity, J = value_and_jacobian(field, z, t)
    diagonal, rows = gershgorin(J, "row")
    _, columns = gershgorin(J, "column")
    return StabilityReport(
        field=field.name,
        t=float(at),
        margin=float(margin),
        residual=row_norms(at_least_float32(as_rows(velocity))),
        abscissa=spectral_abscissa(J),
        log_norm_1=log_norm(J, 1),
        log_norm_2=log_norm(J, 2),
        log_norm_inf=log_norm(J, math.inf),
        diagonal=diagonal.amax(1),
        row_dominance=(diagonal.abs() - rows).amin(1),
        column_dominance=(diagonal.abs() - columns).amin(1),
        rounding=J.shape[-1] * torch.finfo(J.dtype).eps * row_norms(at_least_float32(J.flatten(1))),
    )


@torch.no_grad()
def lyapunov_exponents(
    f: Callable[..., Tensor], z0: Tensor, *, t1: float, t0: float = 0.0, steps: int = 1000
) -> Tensor:
    """Give the Lyapunov exponents along the solutions from z0, over the times t0 to t1, largest first.

    A frame of D tangent vectors is carried along by z' = f, Q' = J Q (classical Runge-Kutta, equal steps) and made
    orthonormal again after every step; the exponents are the mean logarithms of its stretchings. They are those of
    this stretch of time: they come near their limits like 1/(t1 - t0), and averaging over rows of one attractor helps.
    Their sum is the mean divergence of f along the solution.

    Args:
        f: field, `f(z)` or `f(t, z)`.
        z0: initial states (B, ...), floating point; float64 is advisable.
        t1: end time, > t0.
        t0: start time.
        steps: number of Runge-Kutta steps; each must resolve the fastest contraction.

    Returns:
        The exponents (B, D), in units of 1/time, D the number of coordinates of a row.

    Raises:
        TypeError, ValueError: as `jacobian`; rows without a coordinate; t1 <= t0; `steps` is not an int >= 1.
        SolveError: a solution is not finite.

    Source: Benettin, Galgani, Giorgilli, Strelcyn (1980).

    >>> A = torch.tensor([[-1.0, 5.0], [0.0, -2.0]], dtype=torch.float64)
    >>> lyapunov_exponents(lambda z: z @ A.T, torch.zeros(1, 2, dtype=torch.float64), t1=1.0).round(decimals=6)
    tensor([[-1., -2.]], dtype=torch.float64)
    """
    field, z0 = Field.of(f), state(z0, "lyapunov_exponents")
    if z0.dtype in half_precision:
        raise TypeError(f"lyapunov_exponents: expected float32 or float64 states, got {z0.dtype}; pass z0.double()")
    positive_int(steps, "lyapunov_exponents: steps")
    if finite_number(t1, "lyapunov_exponents: t1") <= finite_number(t0, "lyapunov_exponents: t0"):
        raise ValueError(f"lyapunov_exponents: expected t1 > t0, got t0={t0}, t1={t1}")
    if not (D := z0.shape[1:].numel()):
        raise ValueError(f"lyapunov_exponents: expected rows with a coordinate at least, got z0 of {tuple(z0.shape)}")

    def with_frame(t: Tensor, s: Tensor) -> Tensor:
        velocity, J = value_and_jacobian(field, s[:, :D].reshape(z0.shape), t, check_finite=False)
        return torch.cat([as_rows(velocity), (J @ s[:, D:].reshape(-1, D, D)).flatten(1)], 1)

    with_frame.__name__ = field.name  # the solver checks for NaN and inf, and names the field
    system, solver, h = Evaluator(Field.of(with_frame), len(z0)), RK4(steps=1), (t1 - t0) / steps
    z = as_rows(z0)
    Q = torch.eye(D, dtype=z.dtype, device=z.device).expand(len(z), D, D)
    stretchings = z.new_zeros(z.shape)
    for i in range(steps):
        s = torch.cat([z, Q.flatten(1)], 1)
        try:
            s = solver.integrate(system, s, (t0 + i * h, t0 + (i + 1) * h), Clock()).zs[-1]
        except SolveError as error:  # each step is a solve of its own, and its start an initial state on the way alone
            status = Status.BLOW_UP if i else error.status
            raise SolveError(f"lyapunov_exponents: {error.where}", error.rows, error.t, status, error.note) from None
        z, (Q, R) = s[:, :D], torch.linalg.qr(s[:, D:].reshape(-1, D, D))
        stretchings += R.diagonal(dim1=1, dim2=2).abs().log()
    return (stretchings / (t1 - t0)).sort(dim=1, descending=True).values
