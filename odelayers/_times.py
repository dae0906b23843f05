"""Start, end and output times: what the user says of them, and the clock and times that a solver sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._checks import finite_number
from odelayers._driver import Clock

__all__ = ["Times", "end_times", "output_times"]


class Times(NamedTuple):
    """Output times as reported, the times the solver runs through, and the clock between the two."""

    reported: Tensor
    solver: tuple[float, ...]
    clock: Clock

    @property
    def still(self) -> bool:
        """Whether no time passes."""
        return self.solver[0] == self.solver[-1]


def output_times(ts: Tensor | Sequence[float], like: Tensor, where: str) -> Times:
    """Given output times `(T,)`, strictly increasing or decreasing."""
    if not isinstance(ts, Tensor | Sequence) or isinstance(ts, str):
        raise TypeError(f"{where}: ts: expected a Tensor (T,) or a list of times, got {type(ts).__name__}")
    values = torch.as_tensor(ts, dtype=torch.float64 if not isinstance(ts, Tensor) else None)
    if values.requires_grad:
        raise ValueError(f"{where}: ts: output times carry no gradient; pass the end time as t1=tensor for one")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{where}: ts: expected output times of shape (T,), T >= 1, got {tuple(values.shape)}")
    times = [float(t) for t in values.tolist()]
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{where}: ts: expected finite times, got {times}")
    steps = [b - a for a, b in pairwise(times)]
    if not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise ValueError(f"{where}: ts: expected strictly increasing or strictly decreasing times, got {times}")
    return Times(values.to(device=like.device, dtype=like.dtype), tuple(times), Clock(ndim=like.ndim))


def end_times(t0: float, t1: float | Tensor, like: Tensor, where: str) -> Times:
    """From t0 to an end time: a float, a 0-d tensor, or one for each sample `(B,)`."""
    batch = like.shape[0]
    if not isinstance(t1, Tensor):
        last = finite_number(t1, f"{where}: t1")
        return Times(like.new_tensor([t0, last]), (t0, last), Clock(ndim=like.ndim))
    if not t1.is_floating_point():
        raise TypeError(f"{where}: t1: expected a floating-point tensor, got {t1.dtype}; pass t1.float()")
    if t1.ndim > 1 or (t1.ndim == 1 and t1.shape[0] != batch):
        raise ValueError(
            f"{where}: t1: expected a float, a 0-d tensor or one end time per sample ({batch},), got {tuple(t1.shape)}"
        )
    if not bool(t1.isfinite().all()):
        raise ValueError(f"{where}: t1: expected finite end times, got {t1.tolist()}")
    if t1.ndim == 0 and not t1.requires_grad:
        return end_times(t0, float(t1), like, where)
    end = t1.to(device=like.device, dtype=like.dtype)
    reported = torch.stack([torch.full_like(end, t0), end]).detach()
    return Times(reported, (0.0, 1.0), Clock(t0, end - t0, like.ndim))
