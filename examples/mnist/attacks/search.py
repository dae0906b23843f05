"""Attacks by random search on the margin: SimBA along the vectors of a basis, Square by square patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .common import Best, Method, Model, Threat, Tick, beside, length, project

__all__ = ["SimBA", "Square"]


class _Search:
    """Where a greedy search stands for each sample that is left: `rows`, the points `x`, their margins."""

    def __init__(self, best: Best, images: Tensor) -> None:
        self.best, self.rows = best, best.left()
        self.images = self.x = images[self.rows]
        self.margins = best.margins[self.rows]

    def start(self, x: Tensor) -> None:
        """Stand at `x` (R, ...), better or not."""
        self.x, self.margins = x, self.best.judge(self.rows, x)

    def finish(self) -> None:
        """Under noise the point where the search ends is judged; without, all were on the way."""
        if self.best.draws is not None and len(self.rows):
            self.best.judge(self.rows, self.x)

    def offer(self, x: Tensor, which: Tensor) -> Tensor:
        """Move the rows `which` to `x` where that is better; returns which of them stay where they were.

        Under noise both points are asked about anew: the luck of an old answer would keep all others out.
        """
        if not len(which):
            return which
        if self.best.draws is None:
            margins, before = self.best.judge(self.rows[which], x), self.margins[which]
        else:
            margins, before = self.best.compared(self.rows[which], x, self.x[which])
        better = margins > before
        self.x = self.x.index_copy(0, which[better], x[better])
        self.margins = self.margins.index_copy(0, which[better], margins[better])
        return which[~better]

    def drop(self) -> Tensor:
        """Leave out what is done; returns which of the rows go on."""
        left = self.best.undone(self.margins)
        if not left.all():
            self.rows, self.images, self.x, self.margins = (
                kept[left] for kept in (self.rows, self.images, self.x, self.margins)
            )
        return left


@dataclass(frozen=True)
class SimBA(Method):
    """Try a step along each vector of an orthonormal basis in random order, then the step back; keep what is better.

    The basis is "pixel" or "dct", of which the share `lowest` of the frequencies along each axis is used. A step has
    length `rate * eps` in the threat's norm; "pixel" at rate 1 under L-inf puts each pixel at an end of its interval.
    Where the published method ends, with the basis, the next pass takes half the step. What leaves the ball is
    projected onto it (the original has no ball), and the margin takes the place of the right class's probability,
    which float32 rounds to 1 on confident models. Asks at most `2 * steps` times.

    Source: Guo et al., Simple Black-box Adversarial Attacks, ICML 2019.
    """

    gradients = "none"

    basis: str = "dct"
    steps: int = 1000
    rate: float = 0.2
    lowest: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("basis", ("pixel", "dct"))
        self._at_least(1, "steps")
        self._positive("rate", "lowest")
        if self.lowest > 1:
            raise ValueError(f"SimBA.lowest: expected a share <= 1, got {self.lowest}")

    def __str__(self) -> str:
        return f"SimBA {self.basis} {self.steps}"

    @property
    def ticks(self) -> int:
        """One a vector."""
        return self.steps

    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """See `Method.search`."""
        search = _Search(best, images)
        channels, *size = images.shape[1:]
        down, across = (self._vectors(n, images) for n in size)
        n = channels * len(down) * len(across)
        for i in range(self.steps):
            if not len(search.rows):
                break
            tick()
            if i % n == 0:
                order = torch.rand(len(search.rows), n, generator=generator, device=images.device).argsort(1)
            number = order[:, i % n]
            channel, row, column = number // (len(down) * len(across)), number // len(across) % len(down), number
            vector = torch.einsum("rh,rw->rhw", down[row], across[column % len(across)])
            q = torch.zeros_like(search.x)
            q[torch.arange(len(q), device=q.device), channel] = vector / (
                vector.flatten(1).abs().amax(1)[:, None, None] if threat.norm == "linf" else 1
            )
            step = self.rate * threat.eps / 2 ** (i // n) * q
            stay = torch.arange(len(q), device=q.device)
            for sign in (1, -1):
                stay = search.offer(project(search.x[stay] + sign * step[stay], search.images[stay], threat), stay)
            order = order[search.drop()]
        search.finish()

    def _vectors(self, n: int, like: Tensor) -> Tensor:
        """The basis along one axis of length n, orthonormal rows: pixels, or the lowest waves of the DCT-II."""
        if self.basis == "pixel":
            return torch.eye(n, device=like.device, dtype=like.dtype)
        wave = torch.arange(max(1, round(self.lowest * n)), device=like.device, dtype=like.dtype)[:, None]
        place = torch.arange(n, device=like.device, dtype=like.dtype) + 0.5
        rows = (2 / n) ** 0.5 * torch.cos(math.pi / n * wave * place)
        rows[0] /= 2**0.5
        return rows


@dataclass(frozen=True)
class Square(Method):
    """Random search over square patches that shrink by the published schedule; asks `queries` times, with the margin.

    Every sample has windows of its own. The first windows take the share `p` of the image.

    Source: Andriushchenko et al., Square Attack, ECCV 2020, algorithms 1 to 3.
    """

    gradients = "none"

    queries: int = 5000
    p: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "queries")
        self._positive("p")
        if self.p > 1:
            raise ValueError(f"Square.p: expected a share <= 1, got {self.p}")

    def __str__(self) -> str:
        return f"Square {self.queries}"

    @property
    def ticks(self) -> int:
        """One a query."""
        return self.queries

    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """See `Method.search`."""
        search, draw = _Search(best, images), _Draw(generator, images.device)
        if not len(search.rows):
            return
        first, move = (_stripes, _move_linf) if threat.norm == "linf" else (_pyramids, _move_l2)
        tick()
        search.start(first(search.images, threat, draw))
        search.drop()
        for i in range(1, self.queries):
            if not len(search.rows):
                break
            tick()
            side = self._share(i - 1) ** 0.5 * (images.shape[2] * images.shape[3]) ** 0.5
            x = move(search.x, search.images, round(side), threat, draw)
            search.offer(x, torch.arange(len(x), device=x.device))
            search.drop()
        search.finish()

    def _share(self, i: int) -> float:
        """The share of the image in query i: halved at these of 10,000 queries, in proportion for fewer or more."""
        halvings = sum(i * 10_000 // self.queries > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        return self.p / 2**halvings


class _Draw:
    """Random numbers of one generator."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.source = {"generator": generator, "device": device}

    def signs(self, *shape: int, like: Tensor) -> Tensor:
        """-1 or 1."""
        return torch.randint(2, shape, **self.source).to(like.dtype) * 2 - 1

    def window(self, x: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Rows (B, side, 1) and columns (B, 1, side) of a window in each image."""
        low = [torch.randint(n - side + 1, (len(x), 1), **self.source) for n in x.shape[2:]]
        inside = torch.arange(side, device=x.device)
        return (low[0] + inside)[:, :, None], (low[1] + inside)[:, None, :]


def _stripes(x: Tensor, threat: Threat, draw: _Draw) -> Tensor:
    return project(x + threat.eps * draw.signs(*x.shape[:2], 1, x.shape[3], like=x), x, threat)


def _move_linf(x: Tensor, images: Tensor, side: int, threat: Threat, draw: _Draw) -> Tensor:
    """One window of each channel goes to one of the two ends of the interval."""
    rows, columns = draw.window(x, min(max(side, 1), *x.shape[2:]))
    change = torch.zeros_like(x)
    _put(change, rows, columns, 2 * threat.eps * draw.signs(*x.shape[:2], 1, 1, like=x))
    return project(x + change, images, threat)


def _pyramids(x: Tensor, threat: Threat, draw: _Draw) -> Tensor:
    """A grid of at least 5 x 5 pairs of pyramids over the whole image."""
    side = max(1, min(x.shape[2:]) // 5)
    change = torch.zeros_like(x)
    starts = [range((n - n // side * side) // 2, n - side + 1, side) for n in x.shape[2:]]
    for top in starts[0]:
        for left in starts[1]:
            change[:, :, top : top + side, left : left + side] = _eta(x, side, draw)
    return _at_radius(x, change, threat)


def _move_l2(x: Tensor, images: Tensor, side: int, threat: Threat, draw: _Draw) -> Tensor:
    """Move the mass of one window, and what the image has left of its radius, as pyramids into another."""
    side = max(side, 3)
    side = min(side + 1 - side % 2, *x.shape[2:])
    change = x - images
    into, out_of = draw.window(x, side), draw.window(x, side)
    old = _take(change, *into)
    old_norm = _norm(old)
    both = torch.zeros_like(change)
    _put(both, *into, torch.ones_like(old))
    _put(both, *out_of, torch.ones_like(old))
    unused = (threat.eps**2 - length(change).square()).clamp(min=0) / x.shape[1]
    radius = (unused + (change * both).square().sum((2, 3), keepdim=True)).sqrt()
    new = _eta(x, side, draw) + old / (1e-12 + old_norm)
    _put(change, *out_of, torch.zeros_like(old))
    _put(change, *into, new / (1e-12 + _norm(new)) * radius)
    return _at_radius(images, change, threat)


def _at_radius(images: Tensor, change: Tensor, threat: Threat) -> Tensor:
    return project(images + threat.eps * change / (1e-12 + length(change)), images, threat)


def _norm(window: Tensor) -> Tensor:
    return window.square().sum((2, 3), keepdim=True).sqrt()


def _take(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The windows (B, C, side, side)."""
    return x.movedim(1, -1)[beside(torch.arange(len(x), device=x.device), rows), rows, columns].movedim(-1, 1)


def _put(x: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values (B, C, side, side), or what broadcasts to them, into the windows."""
    x.movedim(1, -1)[beside(torch.arange(len(x), device=x.device), rows), rows, columns] = values.movedim(1, -1)


def _eta(x: Tensor, side: int, draw: _Draw) -> Tensor:
    """Two pyramids of opposite sign beside or above each other, of norm 1, for each image and channel."""
    pair = torch.cat([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)]).to(x)
    pair = pair / pair.norm()
    upright = (draw.signs(len(x), 1, 1, 1, like=x) > 0).to(x.dtype)
    return (upright * pair + (1 - upright) * pair.T) * draw.signs(*x.shape[:2], 1, 1, like=x)


def _pyramid(height: int, width: int) -> Tensor:
    """Rings of value sum_{k > distance} 1 / k^2 around the centre, of norm 1 (h x w)."""
    if not height:
        return torch.zeros(0, width)
    most = max(height // 2, width // 2)
    sums = (torch.arange(1, most + 2).double() ** -2).flip(0).cumsum(0).flip(0)
    down, across = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    rings = sums[torch.maximum(down[:, None], across[None])]
    return (rings / rings.norm()).float()
