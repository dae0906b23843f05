"""The same seed gives the same numbers: from a file, in another process, in a worker, by deterministic algorithms."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from odelayers import (
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    EulerMaruyama,
    JacobianRegularizer,
    ODEBlock,
    Reversible,
    SDEBlock,
    TorchDiffEq,
    TorchSDE,
    Uniform,
)
from problems import ODE_SOLVERS, SDE_SOLVERS, TanhNet, name

pytestmark = pytest.mark.timeout(90)
F64 = torch.float64
BACKPROP = Backprop()
SDES = (*SDE_SOLVERS, TorchSDE("euler", 6), TorchSDE("srk", 6))


def noisy(solver: Any, gradient: Any = BACKPROP) -> SDEBlock:
    """A block with a drift, a diffusion and scalar noise in the solver's first reading."""
    torch.manual_seed(1)
    drift, diffusion = TanhNet(), TanhNet(scale=0.4)
    return SDEBlock(drift, diffusion, solver=solver, calculus=solver.calculus[0], noise="scalar", gradient=gradient)


def path(blocks: list[nn.Module], seed: int = 3) -> list[Tensor]:
    """The end states after one torch seed."""
    z = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    torch.manual_seed(seed)
    with torch.no_grad():
        return [block(z) for block in blocks]


CHILD = """
import sys, numpy, torch
sys.path[:0] = sys.argv[3:]
from test_determinism import path
numpy.random.seed(int(sys.argv[2]))
torch.set_num_threads(1)
numpy.random.rand(7)
torch.save(path(torch.load(sys.argv[1], weights_only=False)), sys.argv[1] + sys.argv[2])
"""


def test_a_path_is_the_same_in_other_processes_from_a_saved_block(tmp_path: Path) -> None:
    """Blocks loaded in two processes, with other numpy and hash seeds, follow this process's paths bit for bit."""
    blocks = [*(noisy(solver) for solver in SDES), ODEBlock(TanhNet(), t1=Uniform(0.5, 2.0))]
    saved, here = tmp_path / "blocks", Path(__file__).parent
    torch.save(blocks, saved)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(saved), seed, str(here), str(here.parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    wanted, other = path(blocks), path(blocks, seed=4)
    for seed, child in zip(("1", "2"), children, strict=True):
        _, words = child.communicate(timeout=60)
        assert child.returncode == 0, words
        found = torch.load(f"{saved}{seed}")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other, wanted, strict=True))  # control


class Paths(Dataset[Tensor]):
    """Item i: the end state of a noisy solve whose generator is seeded with i."""

    def __init__(self) -> None:
        self.blocks = [noisy(solver) for solver in SDES]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        z = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
        with torch.no_grad():
            return torch.stack(
                [block.solve(z, generator=torch.Generator().manual_seed(index)).final for block in self.blocks]
            )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 on any fork
def test_workers_of_a_data_loader_draw_what_the_main_process_draws() -> None:
    """A generator seeded per item gives each item its path, however many workers share the items."""
    runs = [list(DataLoader(Paths(), batch_size=1, num_workers=workers)) for workers in (0, 1, 2)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch refuses what it cannot repeat."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def everything(block: Any, device: str) -> list[Tensor]:
    """States, status and every gradient of one solve with a spoiled row and end times of their own."""
    z = torch.linspace(-1, 1, 12, dtype=F64, device=device).reshape(4, 3).clone()
    z[2, 0] = torch.nan
    z.requires_grad_()
    t1 = torch.tensor([0.5, 0.9, 1.0, 1.2], dtype=F64, device=device, requires_grad=True)
    running = [JacobianRegularizer()] if isinstance(block, ODEBlock) else []
    torch.manual_seed(7)
    solution = block.to(device).solve(z, t1=t1, running=running, on_failure="isolate")
    healthy = solution.stats.status == 0
    loss = solution.final[healthy].square().sum() + sum(r[healthy].sum() for r in solution.running)
    found = torch.autograd.grad(loss, [z, t1, *block.parameters()])
    assert healthy.tolist() == [True, True, False, True]
    return [solution.zs[:, healthy], *(r[healthy] for r in solution.running), *found]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(
    "gradient", [BACKPROP, Checkpoint(), Reversible(max_gap=9.0), Adjoint(max_drift=1.0)], ids=name
)
@pytest.mark.parametrize("solver", [*ODE_SOLVERS, TorchDiffEq("dopri5"), *SDES], ids=name)
def test_everything_runs_twice_the_same_under_deterministic_algorithms(
    solver: Any, gradient: Any, device: str, deterministic: None
) -> None:
    """No solver, gradient, isolated row or end time needs an algorithm that torch cannot repeat."""
    if not gradient.accepts(solver):
        with pytest.raises(ValueError, match="cannot differentiate through"):
            noisy(solver, gradient) if solver.calculus else ODEBlock(TanhNet(), solver=solver, gradient=gradient)
        return
    block = noisy(solver, gradient) if solver.calculus else ODEBlock(TanhNet(), solver=solver, gradient=gradient)
    first, second = everything(block, device), everything(block, device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["ode", "noisy clock", "drift and diffusion"])
def test_to_dtype_moves_a_block_and_nothing_of_it_stays_behind(kind: str) -> None:
    """float32 gives the numbers of float64 to its rounding, for one path, and back again the very same."""
    f, z, dw = TanhNet(), torch.randn(4, 3, dtype=F64), 0.2 * torch.randn(6, 4, 3, dtype=F64)
    block: Any = {
        "ode": lambda: ODEBlock(f, solver=Dopri5(1e-6, 1e-6)),
        "noisy clock": lambda: DropoutSDEBlock(f, 0.2, solver=EulerMaruyama(6)),
        "drift and diffusion": lambda: SDEBlock(f, TanhNet(scale=0.3), solver=EulerMaruyama(6)),
    }[kind]()
    noise = None if kind == "ode" else dw
    for p in block.parameters():
        p.data = p.data.float().double()  # so that the way there and back loses nothing
    wanted = block.solve(z, noise=noise).final
    low = block.to(torch.float32).solve(z.float(), noise=noise).final
    assert low.dtype == torch.float32 and (low - wanted).abs().max() < 2e-5
    assert torch.equal(block.to(F64).solve(z, noise=noise).final, wanted)
