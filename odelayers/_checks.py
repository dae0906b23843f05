"""Checks of what the user hands over: each says what, where, expected, got, and what to do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "boolean",
    "finite_number",
    "generator",
    "half_precision",
    "one_of",
    "points",
    "positive_int",
    "positive_number",
    "probability",
    "state",
]

half_precision = (torch.float16, torch.bfloat16)


def boolean(value: Any, name: str) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r} ({type(value).__name__})")
    return value


def positive_int(value: Any, name: str) -> int:
    """Return `value` if it is an int >= 1 (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int >= 1, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {value}")
    return value


def finite_number(value: Any, name: str) -> float:
    """Return `value` as a float if it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def positive_number(value: Any, name: str) -> float:
    """Return `value` as a float if it is finite and > 0."""
    if finite_number(value, name) <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return float(value)


def probability(value: Any, name: str) -> float:
    """Return `value` as a float if it lies in [0, 1)."""
    if not 0 <= finite_number(value, name) < 1:
        raise ValueError(f"{name}: expected a drop probability in [0, 1), got {value}")
    return float(value)


def one_of(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of the allowed strings."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def generator(value: Any, name: str) -> torch.Generator | None:
    """Return `value` if it is a generator, or None for torch's global one."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name}: expected a torch.Generator, got {type(value).__name__}")
    return value


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, or its float32 copy if it is in half precision."""
    return x.float() if x.dtype in half_precision else x


def state(z: Any, where: str) -> Tensor:
    """Return `z` if it is a floating-point tensor with a batch axis first."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{where}: expected the state z as a Tensor (B, ...), got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(
            f"{where}: expected a floating-point state z, got {z.dtype}; a state that changes continuously "
            f"cannot be integer or complex: pass z.float() (complex: torch.view_as_real(z))"
        )
    if z.ndim == 0:
        raise ValueError(f"{where}: expected a state z of shape (B, ...), got a 0-d tensor; pass z.unsqueeze(0)")
    return z


def points(z: Any, where: str) -> Tensor:
    """Return `z` if it is a state with at least one number in it: a mean over none would be NaN."""
    found = state(z, where)
    if found.numel() == 0:
        raise ValueError(f"{where}: expected at least one point, got z of shape {tuple(found.shape)}")
    return found
