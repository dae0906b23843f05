"""Reversible Heun undone: the gradient of its own steps, by one evaluation for each step back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from odelayers import Backprop, DropoutSDEBlock, Reversible, ReversibleHeun, SDEBlock, count_nfe
from problems import TanhNet, close, gradients

F64 = torch.float64


def noisy(kind: str, gradient: Any, drift: nn.Module, diffusion: nn.Module) -> Any:
    """A Stratonovich block over reversible Heun."""
    options: dict[str, Any] = {"solver": ReversibleHeun(20), "calculus": "stratonovich", "gradient": gradient}
    if kind in ("noisy clock", "no noise"):
        return DropoutSDEBlock(drift, 0.2 if kind == "noisy clock" else 0.0, **options)
    return SDEBlock(drift, diffusion, noise="scalar" if kind == "scalar" else "diagonal", **options)


KINDS, MODES = ("noisy clock", "diagonal", "scalar", "no noise"), ("outputs", "one end", "per sample", "given noise")


@pytest.mark.parametrize("kind, mode", list(product(KINDS, MODES))[:-1])  # there is none to give where there is none
def test_reversible_heun_undone_is_backpropagation(kind: str, mode: str) -> None:
    """Drift, diffusion, start, context, end times and given increments get Backprop's gradient to 1e-10."""
    drift, diffusion, found = TanhNet(), TanhNet(scale=0.4), []
    for gradient in (Reversible(), Backprop()):
        g = torch.Generator().manual_seed(3)
        z, context, dw = (
            torch.randn(*s, generator=g, dtype=F64).requires_grad_() for s in ((4, 3), (4, 5), (20, 4, 3))
        )
        t1 = torch.tensor([0.5, 0.9, 1.3, 1.0] if mode == "per sample" else 1.2, dtype=F64, requires_grad=True)
        block = noisy(kind, gradient, drift, diffusion)
        times: dict[str, Any] = {"ts": [0.2, 0.33, 0.9, 1.7]} if mode == "outputs" else {"t1": t1}
        given = (0.2 * dw[..., 0] if kind == "scalar" else 0.2 * dw) if mode == "given noise" else None
        zs = block.solve(z, **times, context=context, noise=given, generator=g).zs
        found.append(gradients(zs.square().sum(), [z, context, t1, dw, *block.parameters()]))
    close(*found)


@pytest.mark.parametrize("ts", [(0.0, 1.0), (0.0, 0.25, 0.33, 1.0)], ids=["end", "outputs"])
@pytest.mark.parametrize("kind", ["noisy clock", "diagonal"])
def test_reversible_heun_takes_one_evaluation_a_step_and_one_back(kind: str, ts: Sequence[float]) -> None:
    """n + 1 of the drift forwards, n + 1 backwards for n steps, and as many of a diffusion of its own."""
    drift, diffusion, calls = TanhNet(), TanhNet(scale=0.4), dict[nn.Module, int]()
    for f in (drift, diffusion):
        f.register_forward_pre_hook(lambda f, _: calls.update({f: calls.get(f, 0) + 1}))
    block = noisy(kind, Reversible(), drift, diffusion)
    with count_nfe(block) as count:
        solution = block.solve(torch.randn(4, 3, dtype=F64), ts)
        steps, forward = solution.stats.accepted, dict(calls)
        solution.zs.sum().backward()
    assert steps == 20 + (len(ts) > 2)  # 0.25 lies on the grid, 0.33 does not
    for f, made in forward.items():
        assert (made, calls[f] - made) == (steps + 1, steps + 1), f
    assert solution.stats.nfe == steps + 1 and count.nfe == 2 * (steps + 1)
    assert len(forward) == (1 if kind == "noisy clock" else 2)


def test_a_row_that_starts_at_zero_is_measured_by_where_it_went() -> None:
    """dz = dW from z0 = 0, over T = 1: the start has no relative error of its own, and gets its gradient of one."""
    z = torch.zeros(4, 2, dtype=F64, requires_grad=True)
    options: dict[str, Any] = {"solver": ReversibleHeun(20), "calculus": "stratonovich", "gradient": Reversible()}
    SDEBlock(lambda z: 0 * z, lambda z: torch.ones_like(z), **options)(z).sum().backward()
    assert z.grad is not None and (z.grad - 1).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [16, 63, 100])
def test_a_row_that_returns_to_zero_is_measured_by_its_way(steps: int) -> None:
    """dz = cos(t) dt from 0 over a whole turn: both ends are rounding noise, the way is not, and the gradient is 1."""
    z = torch.zeros(3, 1, requires_grad=True)
    options: dict[str, Any] = {"calculus": "stratonovich", "gradient": Reversible(), "t1": 2 * math.pi}
    block = SDEBlock(lambda t, z: torch.cos(t) + 0 * z, lambda z: 0 * z, solver=ReversibleHeun(steps), **options)
    block(z).sum().backward()
    assert z.grad is not None and (z.grad - 1).abs().max() < 1e-5
