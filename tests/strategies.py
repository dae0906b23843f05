"""What hypothesis draws: fields with a known Lipschitz bound, matrices, states, seeds. Float64, small dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["Bounded", "any_matrices", "bounded_fields", "drops", "matrices", "orthogonal", "random", "seeds", "states"]

seeds = st.integers(0, 2**31 - 1)
drops = st.floats(0.05, 0.9)


@dataclass(frozen=True)
class Bounded:
    """A tanh network, a Lipschitz bound L of it, and a time T with L T <= 4."""

    f: nn.Module
    lipschitz: float
    time: float
    dim: int


class _Net(nn.Module):
    def __init__(self, dim: int, hidden: int, lipschitz: float, generator: torch.Generator) -> None:
        super().__init__()
        share = lipschitz**0.5
        self.inner = nn.Parameter(_with_norm(torch.randn(hidden, dim, generator=generator, dtype=torch.float64), share))
        self.outer = nn.Parameter(_with_norm(torch.randn(dim, hidden, generator=generator, dtype=torch.float64), share))
        self.bias = nn.Parameter(torch.randn(hidden, generator=generator, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.inner.T + self.bias) @ self.outer.T


def _with_norm(matrix: Tensor, norm: float) -> Tensor:
    # tanh has slope at most 1, so the product of the layers' spectral norms bounds the network's Lipschitz constant.
    return matrix * (norm / torch.linalg.matrix_norm(matrix, 2))


@st.composite
def bounded_fields(draw: st.DrawFn, dim: int | None = None) -> Bounded:
    """A tanh network whose layers are rescaled to a known Lipschitz bound."""
    lipschitz = draw(st.floats(0.1, 4.0))
    time = draw(st.floats(0.1, 1.0)) * min(4.0 / lipschitz, 4.0)
    d = draw(st.integers(1, 6)) if dim is None else dim
    generator = torch.Generator().manual_seed(draw(seeds))
    return Bounded(_Net(d, draw(st.integers(1, 6)), lipschitz, generator), lipschitz, time, d)


def states(batch: int, dim: int, seed: int, size: float = 1.0) -> Tensor:
    """A batch of normal states, float64."""
    return size * random(batch, dim, seed=seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of any shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthogonal(n: int, seed: int) -> Tensor:
    """An orthogonal matrix, (n, n)."""
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def matrices(dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Batches of three normal matrices, n <= 6."""
    return st.builds(lambda seed, n: random(3, n, n, seed=seed, dtype=dtype), seeds, st.integers(1, 6))


def any_matrices() -> st.SearchStrategy[Tensor]:
    """Batches of three matrices, real or complex."""
    return matrices() | matrices(torch.complex128)
