"""What is seldom met: callables without a signature, fields that end in NaN on the way, tensors on another device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchsde
from torch import Tensor, nn

from odelayers import (
    AugmentedODEBlock,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    LyapunovRegularizer,
    Milstein,
    ODEBlock,
    Rodas5P,
    SDEBlock,
    SolveError,
    Status,
    TorchDiffEq,
    Tsit5,
    check_stability,
    count_nfe,
    euclidean_log_norm,
    log_norm,
    lyapunov_exponents,
    simplex_head,
)
from odelayers._solvers.reference_sde import _Rows
from odelayers.fields import MLP
from problems import TanhNet, name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
ONES = torch.ones(3, 2, dtype=F64)


def test_a_callable_without_a_signature_is_asked_for_its_time() -> None:
    """torch.sin tells nothing of its parameters: time= must, and then a context is passed on unchecked."""
    with pytest.raises(TypeError, match=r"cannot tell f\(z\) from f\(t, z\).*say time=True"):
        ODEBlock(torch.sin)
    c = torch.tensor([0.5, -1.0], dtype=F64)
    end = ODEBlock(torch.add, solver=Dopri5(1e-10, 1e-10), time=False)(ONES, context=c)  # z' = z + c
    assert (end - ((ONES + c) * torch.e - c)).abs().max() < 1e-8


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: ODEBlock(torch.sin, time="no"),
            r"time: expected True for f\(t, z\), False for f\(z\) or None, got 'no'",
        ),
        (
            lambda: SDEBlock(TanhNet(), TanhNet(), solver="euler"),
            "expected a solver such as EulerMaruyama.*got 'euler'",
        ),
        (lambda: ODEBlock(TanhNet()).solve(ONES, 1.0), "ts: expected a Tensor .* or a list of times, got float"),
        (lambda: ODEBlock(TanhNet()).solve(ONES, running="kinetic"), "expected a list of regularisers, got str"),
        (lambda: lyapunov_exponents(lambda z: -z, ONES.half(), t1=1.0), r"got torch.float16; pass z0.double\(\)"),
        (lambda: AugmentedODEBlock(TanhNet(), 1, keep="no"), "keep: expected True or False, got 'no'"),
        (lambda: DropoutSDEBlock(TanhNet(), noise_in_eval="false"), "noise_in_eval: expected True or False"),
        (lambda: ODEBlock(TanhNet(), compile=0), "ODEBlock: compile: expected True or False, got 0"),
        (lambda: MLP(2, activation=nn.Tanh()), r"MLP: activation: expected a class such as nn.Tanh, got Tanh\(\)"),
        (lambda: MLP(2, hidden=16), r"MLP: hidden: expected a sequence of widths such as \(64,\), got 16"),
        (
            lambda: LyapunovRegularizer()(MLP(2), ONES, generator=0),
            "LyapunovRegularizer: generator: expected a torch.Generator, got int",
        ),
        (
            lambda: check_stability(torch.sin, ONES, t="a"),
            "check_stability: t: expected a number or a tensor of one, got 'a'",
        ),
        (lambda: count_nfe(3).__enter__(), "count_nfe: expected a module that holds a block, got int"),
        (
            lambda: SDEBlock(TanhNet(), TanhNet()).solve(
                ONES, noise=torch.zeros(20, *ONES.shape, dtype=torch.complex64)
            ),
            "noise: expected real increments, got torch.complex64",
        ),
    ],
)
def test_arguments_of_another_type_are_refused(call: Any, words: str) -> None:
    """Expected, got, and what to do."""
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: ODEBlock(TanhNet()).solve(ONES, on_failure=""),
            "on_failure: expected one of 'raise', 'isolate', got ''",
        ),
        (lambda: log_norm(torch.eye(2), True), "expected p as 1, 2 or math.inf, got True"),
        (
            lambda: euclidean_log_norm(lambda z: z, torch.zeros(2, 0)),
            r"at least one coordinate, got z of shape \(2, 0\)",
        ),
        (
            lambda: lyapunov_exponents(lambda z: z, torch.zeros(2, 0), t1=1.0),
            r"a coordinate at least, got z0 of \(2, 0\)",
        ),
        (lambda: AugmentedODEBlock(TanhNet(), 1)(torch.zeros(3)), r"shape \(3,\); expected a state \(B, D\) or larger"),
        (
            lambda: SDEBlock(TanhNet(), TanhNet()).solve(torch.zeros(3, 2), noise=torch.zeros(20, 3)),
            r"expected increments of shape \(20, 3, 2\) .*got \(20, 3\)",
        ),
    ],
)
def test_values_outside_their_range_are_refused(call: Any, words: str) -> None:
    """None of them is taken for a default or for something near."""
    with pytest.raises(ValueError, match=words):
        call()


def test_a_field_on_another_device_is_named() -> None:
    """The devices of state and field and the remedy, in place of torch's words; the field's own errors pass through."""
    with pytest.raises(ValueError, match=r"the state z is on cpu, a parameter of the field on meta.*block.to"):
        ODEBlock(nn.Linear(2, 2, device="meta"))(torch.ones(3, 2))

    def broken(z: Tensor) -> Tensor:
        raise RuntimeError("the field's own trouble")

    with pytest.raises(RuntimeError, match="^the field's own trouble$"):
        ODEBlock(broken)(ONES)


@pytest.mark.parametrize("solver", [Dopri5(), Tsit5(), Rodas5P()], ids=name)
def test_a_field_that_ends_in_nan_on_the_way_fails_there(solver: Any) -> None:
    """z' = 1 up to z = 0.5 and NaN beyond: steps shrink towards t = 0.5 in that row, and the status is BLOW_UP."""
    z = torch.tensor([[-5.0], [0.0]], dtype=F64)
    with pytest.raises(SolveError) as caught:
        ODEBlock(lambda z: torch.where(z > 0.5, torch.nan, torch.ones_like(z)), solver=solver)(z)
    assert (caught.value.rows, caught.value.status) == ((1,), Status.BLOW_UP)
    assert caught.value.t[0] == pytest.approx(0.5, abs=1e-6)


def test_a_budget_that_only_torchdiffeq_spends_fails_every_row() -> None:
    """Second order at 1e-9 takes thousands of steps where Dopri5 takes a few: no row is to blame, all are named."""
    solver = TorchDiffEq("adaptive_heun", 1e-9, 1e-9, max_steps=50)
    with pytest.raises(SolveError, match="torchdiffeq says: .*max_num_steps") as caught:
        ODEBlock(lambda z: -z, solver=solver)(ONES)
    assert (caught.value.rows, caught.value.status) == ((0, 1, 2), Status.MAX_STEPS)
    assert 0 < caught.value.t[0] < 1


def test_milstein_without_noise_is_euler() -> None:
    """In evaluation the correction falls away with the noise, bit for bit."""
    f = TanhNet(2)
    silent = DropoutSDEBlock(f, 0.3, solver=Milstein(9), noise="scalar").eval()
    assert torch.equal(silent(ONES), ODEBlock(f, solver=Euler(9))(ONES))


def test_rows_of_a_torchsde_path_are_the_path_s() -> None:
    """What torchsde asks of a Brownian motion, for the rows that are left."""
    path = torchsde.BrownianInterval(0.0, 1.0, size=(4, 2), dtype=F64, entropy=3, levy_area_approximation="space-time")
    rows = _Rows(path, torch.tensor([0, 2]))
    assert torch.equal(rows(0.0, 0.5), path(0.0, 0.5)[[0, 2]])
    for found, whole in zip(rows(0.0, 0.5, return_U=True), path(0.0, 0.5, return_U=True), strict=True):
        assert torch.equal(found, whole[[0, 2]])
    assert (rows.shape, rows.dtype, rows.device) == ((2, 2), F64, torch.device("cpu"))
    assert rows.levy_area_approximation == "space-time" and "BrownianInterval" in repr(rows)


def test_a_head_prints_its_size() -> None:
    """Classes, dimension and whether it is trained."""
    assert repr(simplex_head(3, 2)).endswith("(classes=3, dim=2, trainable=False)")
