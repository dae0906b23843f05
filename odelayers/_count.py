"""Counting the evaluations of fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from odelayers._block import Block

__all__ = ["NFECount", "count_nfe"]


class NFECount:
    """Evaluations of the fields counted so far, in `nfe`."""

    def __init__(self) -> None:
        self.nfe = 0

    def _add(self) -> None:
        self.nfe += 1


@contextmanager
def count_nfe(module: nn.Module) -> Iterator[NFECount]:
    """Count the evaluations of the fields of all blocks in a module, those of backward passes included.

    As in `Stats.nfe`, an `SDEBlock` counts by its drift.

    Args:
        module: a block or any module that holds blocks.

    Yields:
        An object whose `nfe` is the count so far; one evaluation is one call of a field on a batch.

    Raises:
        TypeError: if it is no module.
        ValueError: if the module holds no block.

    Example:
        >>> import torch
        >>> from odelayers import RK4, ODEBlock, count_nfe
        >>> block = ODEBlock(torch.nn.Linear(2, 2), solver=RK4(steps=5))
        >>> with count_nfe(block) as count:
        ...     _ = block(torch.randn(3, 2))
        >>> count.nfe
        20
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"count_nfe: expected a module that holds a block, got {type(module).__name__}")
    blocks = [m for m in module.modules() if isinstance(m, Block)]
    if not blocks:
        raise ValueError(f"count_nfe: expected a module that holds a block, got {type(module).__name__} without one")
    count = NFECount()
    for block in blocks:
        block._counters.append(count._add)
    try:
        yield count
    finally:
        for block in blocks:
            block._counters.remove(count._add)
