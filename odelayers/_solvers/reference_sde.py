"""torchsde as a solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchsde
from torch import Tensor

from odelayers._checks import one_of, positive_int
from odelayers._driver import Brownian, Driver
from odelayers._evaluator import Evaluator
from odelayers._field import as_rows
from odelayers._solution import Status
from odelayers._solvers.base import Norm, Path, Solver, fail, nonfinite_rows, row_rms

__all__ = ["TorchSDE"]

_READINGS = {
    "euler": ("ito",),
    "srk": ("ito",),
    "milstein": ("ito", "stratonovich"),
    "midpoint": ("stratonovich",),
    "heun": ("stratonovich",),
    "euler_heun": ("stratonovich",),
    "reversible_heun": ("stratonovich",),
}
# torchsde's diagonal noise means g_i(z_i); a field that mixes coordinates makes these two silently wrong.
_SCALAR_ONLY = ("srk", "milstein")


@dataclass(frozen=True)
class TorchSDE(Solver):
    """torchsde's `sdeint` at a fixed step as a solver, its Brownian path seeded from torch's generator.

    Args:
        method: "euler" (Ito), "midpoint", "heun", "euler_heun", "reversible_heun" (Stratonovich), or, for scalar
            noise alone, "srk" (Ito) and "milstein" (either). "reversible_heun" is unstable on contracting fields.
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if the method is unknown or steps is not an int >= 1.
        SolveError: from the solve, when the result is NaN or inf.

    Example:
        >>> TorchSDE("heun", steps=20).calculus
        ('stratonovich',)
    """

    method: str
    steps: int = 20

    def __post_init__(self) -> None:
        one_of(self.method, "TorchSDE: method", tuple(_READINGS))
        positive_int(self.steps, "TorchSDE: steps")

    @property
    def calculus(self) -> tuple[str, ...]:  # type: ignore[override]
        """The readings that the method converges to."""
        return _READINGS[self.method]

    @property
    def noises(self) -> tuple[str, ...]:  # type: ignore[override]
        """The kinds of noise for which it is right."""
        return ("scalar",) if self.method in _SCALAR_ONLY else ("diagonal", "scalar")

    def noise_steps(self, ts: Sequence[float]) -> int:
        return 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def integrate(
        self,
        f: Evaluator,
        z0: Tensor,
        ts: Sequence[float],
        driver: Driver,
        norm: Norm = row_rms,
        adjoint: tuple[Tensor, ...] | None = None,
    ) -> Path:
        """As `Solver.integrate`; with `adjoint`, these tensors' gradients come from `adjoint_reversible_heun`."""
        bad = nonfinite_rows(z0)
        if bad.any():
            raise fail(self, f, bad, ts[0], driver, Status.NONFINITE)
        # Without noise both readings agree, and torchsde wants its method's own.
        reading = self.calculus[0] if driver.noise is None else driver.calculus
        sde, flat = _Sde(f, driver, z0.shape, reading), as_rows(z0)
        dt = (ts[-1] - ts[0]) / self.steps
        bm = _brownian(driver.noise, flat, ts, dt, self.method)
        times = torch.tensor(ts, dtype=z0.dtype, device=z0.device)
        solve, more = torchsde.sdeint, {}
        if adjoint is not None:
            solve = torchsde.sdeint_adjoint
            more = {"adjoint_params": adjoint, "adjoint_method": "adjoint_reversible_heun"}
        zs: Tensor = solve(sde, flat, times, bm=bm, method=self.method, dt=dt, **more)
        bad = nonfinite_rows(zs.transpose(0, 1))
        if bad.any():
            raise fail(self, f, bad, ts[-1], driver, Status.BLOW_UP, "by the end of the solve")
        return Path(zs.reshape(len(ts), *z0.shape), self.steps, 0)


class _Sde:
    """A field and its driver as torchsde calls them, over states of shape (B, D)."""

    def __init__(self, f: Evaluator, driver: Driver, shape: torch.Size, reading: str) -> None:
        self.field, self.driver, self.shape = f, driver, shape
        self.noise_type = "diagonal" if driver.noise is None else driver.noise.kind
        self.sde_type = reading

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self.driver.clock.terms(self.field, t, y.view(self.shape))[0].reshape(y.shape)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self.driver.noise_coefficient(self.field, t, y.view(self.shape))
        g = self.driver.clock.root(g).reshape(y.shape)
        return g.unsqueeze(-1) if self.noise_type == "scalar" else g


class _Rows(torchsde.BaseBrownian):  # type: ignore[misc]
    """Some rows of a Brownian path drawn for a whole batch."""

    def __init__(self, path: torchsde.BrownianInterval, rows: Tensor) -> None:
        self.path, self.rows = path, rows

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        found = self.path(ta, tb, return_U=return_U, return_A=return_A)
        return tuple(x[self.rows] for x in found) if isinstance(found, tuple) else found[self.rows]

    def __repr__(self) -> str:
        return f"_Rows({self.path!r})"

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.path.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.path.device
        return device

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.path.shape[1:])

    @property
    def levy_area_approximation(self) -> str:
        return str(self.path.levy_area_approximation)


def _brownian(noise: Brownian | None, flat: Tensor, ts: Sequence[float], dt: float, method: str) -> Any:
    """A path over [ts[0], ts[-1]] for the whole batch, of which the noise's rows are used."""
    size, seed, rows = tuple(flat.shape), 0, None
    if noise is not None:
        size, seed, rows = (noise.shape[0], 1 if noise.kind == "scalar" else flat.shape[1]), noise.seeds[0], noise.rows
    # The dt hint keeps the path's tree shallow; without one its queries can fail to end.
    path = torchsde.BrownianInterval(
        ts[0],
        ts[-1],
        size=size,
        dtype=flat.dtype,
        device=flat.device,
        entropy=seed,
        dt=dt,
        levy_area_approximation="space-time" if method == "srk" else "none",
    )
    return path if rows is None else _Rows(path, rows)
