"""The four blocks as modules: what they hold, print, pass on, pad, and count."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import odelayers
from odelayers import (
    RK4,
    AugmentedODEBlock,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    EulerMaruyama,
    ODEBlock,
    SDEBlock,
    Solution,
    StratonovichHeun,
    Tsit5,
    Uniform,
)
from problems import TanhNet, name

F64 = torch.float64


def blocks() -> list[nn.Module]:
    """One of each kind, over a field with parameters."""
    return [
        ODEBlock(TanhNet()),
        AugmentedODEBlock(TanhNet(5), 2),
        SDEBlock(TanhNet(), TanhNet()),
        DropoutSDEBlock(TanhNet(), 0.1),
    ]


@pytest.mark.parametrize("block", blocks(), ids=name)
def test_a_block_is_an_ordinary_module(block: Any) -> None:
    """Its state dict holds f.* (and g.*) alone; it survives pickle, deepcopy, torch.save and load_state_dict."""
    keys = {key.split(".")[0] for key in block.state_dict()}
    assert keys == ({"f", "g"} if isinstance(block, SDEBlock) else {"f"})
    z = torch.randn(4, 3, dtype=F64)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)]
    fresh = copy.deepcopy(block)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(block.state_dict())
    outs = []
    for each in (block, *copies, fresh):
        torch.manual_seed(2)
        outs.append(each(z))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(c.solver == block.solver and c.gradient == block.gradient for c in copies)


def test_a_block_registers_the_field_unchanged() -> None:
    """block.f is the object handed over; moving or freezing the block moves and freezes it."""
    net = TanhNet()
    block = ODEBlock(net)
    assert block.f is net and list(block.parameters()) == list(net.parameters())
    block.float()
    assert block(torch.randn(2, 3)).dtype == torch.float32
    block.requires_grad_(False)
    assert not block(torch.randn(2, 3)).requires_grad


def test_the_repr_is_the_record_of_the_experiment() -> None:
    """Solver, gradient, times and noise can be read off."""
    assert repr(ODEBlock(torch.sin, time=False, t1=2.0, solver=RK4(steps=8), gradient=Checkpoint())) == (
        "ODEBlock(f=sin, t0=0.0, t1=2.0, solver=RK4(steps=8), gradient=Checkpoint(segments=None))"
    )
    text = repr(DropoutSDEBlock(nn.Linear(2, 2), 0.25, t1=Uniform(1, 2), layer_time=0.5, noise_in_eval=True))
    for part in ("p=0.25", "t1=Uniform(a=1, b=2)", "EulerMaruyama(steps=20)", "layer_time=0.5", "noise_in_eval=True"):
        assert part in text
    assert "calculus='ito', noise='diagonal'" in text and "(f): Linear(" in text
    assert "extra=3, axis=1, keep=False" in repr(AugmentedODEBlock(nn.Linear(5, 5), 3, keep=False))


def test_defaults_are_those_of_the_contract() -> None:
    """Dopri5 with Backprop; Euler-Maruyama for Ito and Heun for Stratonovich, 20 steps; noise off in evaluation."""
    assert (ODEBlock(torch.sin, time=False).solver, ODEBlock(torch.sin, time=False).t1) == (Dopri5(), 1.0)
    assert ODEBlock(torch.sin, time=False, solver="tsit5").solver == Tsit5()
    for build in (partial(SDEBlock, torch.sin, torch.sin, time=False), partial(DropoutSDEBlock, torch.sin, time=False)):
        assert build().solver == EulerMaruyama(steps=20)
        assert build(calculus="stratonovich").solver == StratonovichHeun(steps=20)
    block = DropoutSDEBlock(torch.sin, time=False)
    assert (block.p, block.layer_time, block.noise_in_eval) == (0.1, 1.0, False)
    assert block.sigma == pytest.approx(1 / 3)


def test_the_short_call_is_the_end_of_the_long_one() -> None:
    """block(z) equals block.solve(z).final; a solution holds times, states, statistics."""
    block, z = ODEBlock(TanhNet()), torch.randn(4, 3, dtype=F64)
    solution = block.solve(z)
    assert isinstance(solution, Solution) and torch.equal(block(z), solution.final)
    assert solution.ts.tolist() == [0.0, 1.0] and solution.zs.shape == (2, 4, 3)
    assert solution.stats.accepted > 0 and solution.stats.status.tolist() == [0] * 4
    with pytest.raises(AttributeError):
        solution.zs = z  # type: ignore[misc]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("axis, shape", [(1, (4, 3)), (-1, (4, 2, 3)), (1, (4, 2, 3)), (2, (4, 2, 3, 5))])
def test_padding_is_that_of_an_ode_over_the_padded_state(axis: int, shape: tuple[int, ...], keep: bool) -> None:
    """The block equals an ODEBlock on cat(z, 0) along the axis, cropped where asked, at every output time."""
    z, ts = torch.randn(shape, dtype=F64), [0.0, 0.4, 1.0]

    def f(z: Tensor) -> Tensor:
        return torch.sin(z + z.flip(axis) + 1)

    wide = list(shape)
    wide[axis] = 2
    wanted = ODEBlock(f).solve(torch.cat([z, torch.zeros(wide, dtype=F64)], dim=axis), ts).zs
    if not keep:
        wanted = wanted.narrow(axis + 1 if axis >= 0 else axis, 0, shape[axis])
    assert torch.equal(AugmentedODEBlock(f, 2, axis=axis, keep=keep).solve(z, ts).zs, wanted)


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"extra": 0}, ValueError, "extra: expected an int >= 1"),
        ({"extra": 1.5}, TypeError, "extra: expected an int"),
        ({"extra": 1, "axis": "1"}, TypeError, "axis: expected an int"),
        (
            {"extra": 1, "axis": 0},
            ValueError,
            r"axis=0 is not a state axis of z with shape \(4, 3\)",
        ),
        ({"extra": 1, "axis": 2}, ValueError, "axis=2 is not a state axis"),
        ({"extra": 1, "axis": -2}, ValueError, "axis=-2 is not a state axis"),
    ],
)
def test_padding_that_makes_no_sense_is_refused(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    """No channels, or an axis that the state lacks."""
    with pytest.raises(kind, match=words):
        AugmentedODEBlock(torch.sin, time=False, **options)(torch.randn(4, 3))


@pytest.mark.parametrize("context", ["tensor", "tuple"])
def test_context_reaches_the_field_after_the_state(context: str) -> None:
    """One tensor or several, with time or without, for drift and diffusion alike."""
    z, a, b = (torch.randn(4, 3, dtype=F64) for _ in range(3))
    if context == "tensor":
        given, sum_of = a, a
        f, timed = (lambda z, a: a.expand_as(z)), (lambda t, z, a: a + 0 * t)
    else:
        given, sum_of = (a, b), a + b
        f, timed = (lambda z, a, b: a + b), (lambda t, z, a, b: a + b + 0 * t)
    assert torch.allclose(ODEBlock(f, time=False)(z, context=given), z + sum_of)
    assert torch.allclose(ODEBlock(timed, time=True)(z, context=given), z + sum_of)
    block = SDEBlock(f, f, time=False, solver=EulerMaruyama(1))
    assert torch.allclose(block.solve(z, context=given, noise=torch.ones(1, 4, 3)).final, z + 2 * sum_of)
    with pytest.raises(TypeError, match="context: expected a Tensor or a tuple of Tensors, got list"):
        ODEBlock(f, time=False)(z, context=[a, b])


class Stateful(nn.Module):
    """A field as a user might write it, with an attribute of its own and an unused flag."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)

    def forward(self, z: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.tanh(self.linear(z))


def test_a_block_writes_nothing_into_field_or_itself() -> None:
    """A solve with gradient leaves every attribute, buffer and mode as it was; defaults of f do not count as time."""
    f = Stateful()
    block = ODEBlock(f, gradient=Checkpoint())
    before = [dict(vars(m)) for m in block.modules()]
    block(torch.randn(2, 3, dtype=F64)).sum().backward()
    for module, attributes in zip(block.modules(), before, strict=True):
        assert set(vars(module)) == set(attributes)
        assert all(vars(module)[k] is v or vars(module)[k] == v for k, v in attributes.items())


def test_blocks_stack_and_train() -> None:
    """Two blocks in a Sequential fit rotated points by gradient descent: the loss falls to a tenth."""
    z = torch.randn(64, 2)
    target = torch.stack([-z[:, 1], z[:, 0]], dim=1)
    model = nn.Sequential(ODEBlock(nn.Linear(2, 2), t1=0.8), ODEBlock(nn.Linear(2, 2), t1=0.8, gradient=Checkpoint()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(z) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_a_per_sample_loss_takes_the_whole_batch_through_one_solve() -> None:
    """torch.func's vmap and jacrev pass through a fixed-grid solve and agree with a loop."""
    block, z = ODEBlock(TanhNet(), solver=RK4(steps=4)), torch.randn(4, 3, dtype=F64)
    found = torch.func.vmap(torch.func.jacrev(lambda x: block(x[None])[0]))(z)
    wanted = torch.stack([torch.autograd.functional.jacobian(lambda x: block(x[None])[0], x) for x in z])
    assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.cuda
def test_blocks_run_on_cuda_as_on_the_cpu() -> None:
    """Every kind of block gives on the device, without noise, what it gives on the CPU, with its gradient."""
    z = torch.randn(4, 3, dtype=F64)
    for block in (ODEBlock(TanhNet()), AugmentedODEBlock(TanhNet(5), 2), DropoutSDEBlock(TanhNet(), 0.1).eval()):
        there = copy.deepcopy(block).cuda()
        out = there(z.cuda())
        assert torch.allclose(out.cpu(), block(z), atol=1e-10)
        out.sum().backward()
    noisy = DropoutSDEBlock(TanhNet(), 0.3).cuda()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(noisy(z.cuda()))
    assert torch.equal(*runs)


def test_all_public_names_exist() -> None:
    """__all__ is what the package offers."""
    assert all(hasattr(odelayers, public) for public in odelayers.__all__)
