"""diffrax under jit, on the weights of a torch field, so that every library solves the same equation.

The whole batch is one state, as in torchdiffeq: one step size, the error an average over the batch. Evaluations are
counted in a second compilation of the same function, which calls back at each one; the timed one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffrax._solver.runge_kutta import AbstractERK, ButcherTableau
from harness import Run
from torch import Tensor

Weights = tuple[jax.Array, ...]
FieldOf = Callable[[Any, jax.Array, Weights], jax.Array]


class RK4(AbstractERK):
    """The classical method, of which diffrax has none: its own machinery with another tableau."""

    tableau: ClassVar[ButcherTableau] = ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0.0, 1 / 2]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),  # there is no step size control
        c=np.array([1 / 2, 1 / 2, 1.0]),
    )
    interpolation_cls: ClassVar[Any] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        return 4


def sine(t: Any, y: jax.Array, weights: Weights) -> jax.Array:
    """f(t, z) = sin(-(Wz + b)), as the module of the same name in torch."""
    W, b = weights
    return jnp.sin(-(y @ W.T + b))


def conv_field(t: Any, y: jax.Array, weights: Weights) -> jax.Array:
    """`ConvField` of up to 32 channels, each of which is a group: norm, then four times ReLU, convolution, norm."""

    def norm(y: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        centred = y - y.mean((2, 3), keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean((2, 3), keepdims=True) + 1e-5)  # torch's epsilon
        return centred * scale * weight[:, None, None] + bias[:, None, None]

    y = norm(y, *weights[:2])
    for i in range(2, len(weights), 3):
        kernel, weight, bias = weights[i : i + 3]
        dimensions = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(jax.nn.relu(y), kernel, (1, 1), "SAME", dimension_numbers=dimensions)
        y = norm(y, weight, bias)
    return y


def _array(x: Tensor) -> jax.Array:
    return jnp.asarray(x.detach().cpu().numpy())


def _tensor(x: Any) -> Tensor:
    """Arrays as one vector, in the order of `peers.gradients`; a single array keeps its shape."""
    if isinstance(x, jax.Array):
        return torch.from_numpy(np.array(x))
    return torch.cat([_tensor(leaf).flatten() for leaf in jax.tree.leaves(x)])


def diffrax_runs(
    f: FieldOf,
    parameters: list[Tensor],
    z: Tensor,
    t1: float,
    *,
    tol: float | None = None,
    steps: int | None = None,
    solver: diffrax.AbstractSolver | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    counted: bool = True,
) -> tuple[Run, Run]:
    """The runs forward and forward+backward of one setting: at a tolerance, or over equal steps.

    Counting compiles everything once more, seconds each time; `counted=False` does without.
    """
    inputs = tuple(map(_array, parameters)), _array(z)
    controller = diffrax.ConstantStepSize() if tol is None else diffrax.PIDController(rtol=tol, atol=tol)

    def solve(weights: Weights, z: jax.Array, field: FieldOf) -> jax.Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver or diffrax.Dopri5(),
            0.0,
            t1,
            None if steps is None else t1 / steps,
            z,
            args=weights,
            stepsize_controller=controller,
            adjoint=adjoint or diffrax.RecursiveCheckpointAdjoint(),
            max_steps=4096 if steps is None else steps,
        ).ys[-1]

    def loss(weights: Weights, z: jax.Array, field: FieldOf) -> jax.Array:
        return (solve(weights, z, field) ** 2).sum()

    def run(function: Callable[..., Any]) -> Run:
        fast = jax.jit(lambda weights, z: function(weights, z, f))

        def check() -> tuple[int | None, Tensor]:
            if not counted:
                return None, _tensor(fast(*inputs))
            calls: list[None] = []

            def telling(t: Any, y: jax.Array, weights: Weights) -> jax.Array:
                jax.debug.callback(lambda: calls.append(None))
                return f(t, y, weights)

            jax.block_until_ready(jax.jit(lambda weights, z: function(weights, z, telling))(*inputs))
            jax.effects_barrier()
            return len(calls), _tensor(fast(*inputs))

        return Run(lambda: jax.block_until_ready(fast(*inputs)), check)

    return run(solve), run(jax.grad(loss, argnums=(0, 1)))
