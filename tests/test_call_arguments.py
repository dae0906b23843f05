"""Arguments of a call that cannot be meant are refused in the library's words, not in Python's."""

from __future__ import annotations

import pytest
import torch

from odelayers import RK4, DropoutSDEBlock, ODEBlock, SDEBlock, SolveError, Status

pytestmark = pytest.mark.timeout(60)


def test_noise_of_the_wrong_kind_is_refused() -> None:
    """Increments are a tensor."""
    block = SDEBlock(lambda z: -z, lambda z: 0.1 * z)
    with pytest.raises(TypeError, match=r"SDEBlock: noise: expected a Tensor of increments, got list"):
        block.solve(torch.ones(2, 1), noise=[1, 2])


@pytest.mark.parametrize("block", [ODEBlock(lambda z: -z), DropoutSDEBlock(lambda z: -z)], ids=["ode", "sde"])
def test_a_generator_of_the_wrong_kind_is_refused(block: ODEBlock | DropoutSDEBlock) -> None:
    """A seed is not a generator."""
    with pytest.raises(TypeError, match=r"generator: expected a torch.Generator, got int"):
        block.solve(torch.ones(2, 1), generator=3)


def test_a_context_without_a_place_in_the_signature_is_refused_with_the_remedy() -> None:
    """f(z, c) counts as f(t, z) until time=False says otherwise."""
    z, c = torch.ones(2, 1), torch.ones(2, 1)
    with pytest.raises(TypeError, match=r"called as f\(t, z, context\) with 1 context tensor.*time=False says f\(z, c"):
        ODEBlock(lambda z, c: -c * z)(z, context=c)
    with pytest.raises(TypeError, match=r"called as f\(z, context\) with 1 context tensor"):
        ODEBlock(lambda z: -z)(z, context=c)
    with pytest.raises(TypeError, match=r"called as f\(z, context\) with 1 context tensor"):
        SDEBlock(lambda z, c: -z, lambda z: z, time=False)(z, context=c)
    solver = RK4(steps=20)
    assert (ODEBlock(lambda z, c: -c * z, time=False, solver=solver)(z, context=c) - torch.exp(-z)).abs().max() < 1e-6


def test_a_half_precision_state_that_overflows_on_its_way_back_is_refused() -> None:
    """The solve runs in float32; 1e5 does not fit into float16, and inf would be a silent wrong number."""
    z = torch.tensor([[0.0], [-1e4]], dtype=torch.float16)
    block = ODEBlock(lambda z: torch.full_like(z, 1e4), t1=10.0, solver=RK4(steps=4))
    with pytest.raises(SolveError, match=r"beyond the range of torch.float16") as caught:
        block(z)
    assert caught.value.rows == (0, 1) and caught.value.status is Status.BLOW_UP
    solution = block.solve(z, t1=7.0, on_failure="isolate")
    assert solution.stats.status.tolist() == [Status.BLOW_UP, Status.OK]
    assert solution.final[1].item() == 6e4
