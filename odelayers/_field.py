"""A field `f(t, z)` or `f(z)`: how it is called and what it is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Field",
    "as_rows",
    "modules",
    "parameters",
    "takes_time",
    "tensors",
    "training_batchnorm",
    "training_dropout",
]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BATCHNORM = (nn.modules.batchnorm._BatchNorm,)
_DROPOUT = (nn.modules.dropout._DropoutNd,)


def takes_time(f: Callable[..., Any], time: bool | None = None) -> bool:
    """Say whether `f` is called as `f(t, z)` (True) or as `f(z)` (False).

    Decided by the number of required positional parameters: one means `f(z)`, two or three mean `f(t, z[, context])`.
    `time` overrides the count. Raises TypeError if `f` is not callable or its signature leaves the question open.
    """
    if not callable(f):
        raise TypeError(f"field: expected a callable f(z) or f(t, z), got {type(f).__name__}")
    if time is not None:
        if not isinstance(time, bool):
            raise TypeError(f"time: expected True for f(t, z), False for f(z) or None, got {time!r}")
        return time
    target = f.forward if isinstance(f, nn.Module) else f
    try:
        named = tuple(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        named = ()
    required = [p.name for p in named if p.kind in _POSITIONAL and p.default is p.empty]
    if not 1 <= len(required) <= 3:
        raise TypeError(
            f"field {_name(f)}: cannot tell f(z) from f(t, z): expected 1 to 3 required positional parameters, "
            f"got {len(required)}; say time=True for f(t, z) or time=False for f(z)"
        )
    if len(required) >= 2 and required[1] in ("t", "time"):
        raise TypeError(f"field {_name(f)}: expected f(t, z) with the time first, got f({', '.join(required)})")
    return len(required) >= 2


def _name(f: Callable[..., Any]) -> str:
    return type(f).__name__ if isinstance(f, nn.Module) else getattr(f, "__name__", type(f).__name__)


@dataclass(frozen=True)
class Field:
    """A user's field with its calling convention and its context, called as `field(t, z)`."""

    f: Callable[..., Tensor]
    takes_time: bool
    context: tuple[Tensor, ...] = ()
    per_row: tuple[bool, ...] | None = None  # which of the context is; decided when rows are first taken

    @classmethod
    def of(cls, f: Callable[..., Tensor], time: bool | None = None, context: Any = None) -> Field:
        """Wrap `f`, deciding its calling convention, unless it is wrapped already."""
        if isinstance(f, Field):
            return f
        field = cls(f, takes_time(f, time), _as_tuple(context))
        if field.context:
            field._check_call()
        return field

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """Evaluate at time `t` (a tensor that broadcasts against z) and state `z` of shape (B, ...)."""
        if not self.takes_time:
            return self.f(z, *self.context)
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=z.dtype, device=z.device)
        return self.f(t, z, *self.context)

    def _check_call(self) -> None:
        """Refuse a context that the field's signature has no place for, before the call fails in its own words."""
        target = self.f.forward if isinstance(self.f, nn.Module) else self.f
        said = "f(t, z, " if self.takes_time else "f(z, "
        try:
            inspect.signature(target).bind(*range(1 + self.takes_time + len(self.context)))
        except ValueError:
            return  # no signature to be had: the call itself will tell
        except TypeError as error:
            raise TypeError(
                f"field {self.name}: called as {said}context) with {len(self.context)} context tensor(s), but {error}; "
                f"time=False says f(z, context), time=True f(t, z, context)"
            ) from error

    def with_context(self, context: tuple[Tensor, ...]) -> Field:
        """The same field with other tensors as its context."""
        return replace(self, context=context)

    def take(self, rows: Tensor, batch: int) -> Field:
        """The same field for these rows alone: context with the batch's size as its first axis is per row."""
        per_row = self.per_row  # kept: a context for all may have as many entries as rows are left
        if per_row is None:
            per_row = tuple(c.ndim > 0 and c.shape[0] == batch for c in self.context)
        picked = tuple(c[rows] if own else c for c, own in zip(self.context, per_row, strict=True))
        return replace(self, context=picked, per_row=per_row)

    def speed(self, dz: Tensor) -> Tensor:
        """|dz/dt| of each row, Euclidean over its coordinates, `(B,)`."""
        norm: Tensor = torch.linalg.vector_norm(as_rows(dz), dim=1)
        return norm

    @property
    def name(self) -> str:
        """The name of the user's class or function, for messages."""
        return _name(self.f)


def _as_tuple(context: Any) -> tuple[Tensor, ...]:
    if context is None:
        return ()
    items = context if isinstance(context, tuple) else (context,)
    for item in items:
        if not isinstance(item, Tensor):
            raise TypeError(f"context: expected a Tensor or a tuple of Tensors, got {type(item).__name__}")
    return items


def as_rows(z: Tensor) -> Tensor:
    """A state `(B, ...)` as `(B, D)`, a batch of scalars `(B,)` as `(B, 1)`."""
    return z.flatten(1) if z.ndim > 1 else z.unsqueeze(1)


def modules(f: Callable[..., Any]) -> Iterator[nn.Module]:
    """The modules a callable is known to hold: itself, or the owner of a bound method."""
    owner = f if isinstance(f, nn.Module) else getattr(f, "__self__", None)
    if isinstance(owner, nn.Module):
        yield from owner.modules()


def tensors(f: Callable[..., Any]) -> Iterator[Tensor]:
    """Every parameter and buffer a callable is known to hold."""
    for m in modules(f):
        yield from m.parameters(recurse=False)
        yield from m.buffers(recurse=False)


def parameters(f: Callable[..., Any]) -> list[nn.Parameter]:
    """The parameters of `f` that require a gradient; an empty list for a plain function."""
    found = {id(p): p for m in modules(f) for p in m.parameters(recurse=False) if p.requires_grad}
    return list(found.values())


def training_batchnorm(f: Callable[..., Any]) -> str | None:
    """The class name of a BatchNorm in `f` that uses batch statistics, or None."""
    for m in modules(f):
        if isinstance(m, _BATCHNORM) and (m.training or not m.track_running_stats):
            return type(m).__name__
    return None


def training_dropout(f: Callable[..., Any]) -> str | None:
    """The class name of an active dropout layer in `f`, or None."""
    for m in modules(f):
        if isinstance(m, _DROPOUT) and m.training and m.p > 0:
            return type(m).__name__
    return None
