"""Jacobians of a field at many points at once: one batched forward, one vectorised backward over the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odelayers._checks import positive_int, state
from odelayers._evaluator import Evaluator, vmapped
from odelayers._field import Field, as_rows, training_batchnorm
from odelayers._linalg import check_rows_finite
from odelayers._linearize import leaf, linearization, product, refused, within
from odelayers._running import RunningField

__all__ = ["differentials", "jacobian", "jvp", "refuse_batch_statistics", "value_and_jacobian"]

_CACHED = 2**19  # numbers; conv fields of 784 and 3136 coordinates are 1.4 to 4 times faster than all at once
_LOOP = 4  # outputs up to which a loop of backward passes beats one vectorised over them (measured at batch 64)


def jacobian(
    f: Callable[..., Tensor],
    z: Tensor,
    t: Tensor | float = 0.0,
    *,
    chunk_size: int | None = None,
    verify: bool = False,
) -> Tensor:
    """Give the Jacobian of the field at every row of z, as (B, D, D) with D the number of coordinates of a row.

    Entry [b, i, j] is the derivative of output i with respect to coordinate j of row b, both in the order of
    `z.flatten(1)`. In grad mode it can be differentiated further, to the parameters of `f` and to z. It is found
    without a loop over rows, so rows must not interact inside `f`.

    An `nn.Sequential` of linear layers and activations is multiplied out, layer by layer, instead of differentiated. A
    field that is an activation of a linear map may say so, by a method `f.linearize(z)`, or `f.linearize(t, z)` if it
    takes the time, that gives s (B, D) and W (D, D) with J = diag(s) W; it is used likewise. It is passed over when a
    subclass replaces `forward` alone or when hooks are registered; `verify=True` checks it.

    Args:
        f: field, `f(z)` or `f(t, z)`; its output has the shape of z.
        z: points (B, ...), floating point.
        t: time, a float or a tensor that broadcasts against z.
        chunk_size: number of outputs differentiated at once; lower it to save memory. By default all, on the CPU as
            many as its cache holds.
        verify: check the Jacobian along a random direction by an independent forward-mode derivative.

    Returns:
        The Jacobians (B, D, D), in the dtype and on the device of z.

    Raises:
        TypeError: z is not a floating-point tensor, or f does not return one.
        ValueError: f returns another shape than z's, or contains a BatchNorm that uses batch statistics; z, f or the
            Jacobian is not finite (rows named); `verify` found rows that interact, or a wrong `f.linearize`.
        RuntimeError: under `torch.func.vmap`. Forward mode (`jvp`, `jacfwd`, dual numbers) and transforms with respect
            to the parameters of `f` may raise it too; `torch.func.linearize` raises torch's own. `grad`, `vjp` and
            `jacrev` with respect to z work.

    >>> jacobian(lambda z: z**2, torch.tensor([[1.0, 3.0]])).tolist()
    [[[2.0, 0.0], [0.0, 6.0]]]
    """
    field = Field.of(f)
    _, J = value_and_jacobian(field, z, t, chunk_size=chunk_size)
    if verify:
        _verify(field, z, t, J)
    return J


def value_and_jacobian(
    f: Callable[..., Tensor],
    z: Tensor,
    t: Tensor | float = 0.0,
    *,
    chunk_size: int | None = None,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Give f(t, z), shaped like z, and the Jacobian (B, D, D), from one evaluation of the field."""
    field = Field.of(f)
    z = state(z, "jacobian")
    if chunk_size is not None:
        positive_int(chunk_size, "jacobian: chunk_size")
    refuse_batch_statistics(field, "jacobian")
    factors = linearization(field, z, t)
    if factors is None:
        out, J, _ = _differentiate(Evaluator(field, len(z)), z, t, chunk_size)
    else:
        out, J = Evaluator(field, len(z))(t, z), product(factors, len(z))
    if check_finite:
        total = out.detach().sum() + J.detach().sum()
        if not torch.compiler.is_compiling() and vmapped(total):
            raise refused()
        if not bool(total.isfinite()):
            check_rows_finite(z, "jacobian: z")
            check_rows_finite(out, f"jacobian: field {field.name}: f(z)")
            check_rows_finite(J, f"jacobian: field {field.name}: J")
    return out, J


def differentials(f: Evaluator, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give f(t, z), the Jacobian (B, D, D) and the derivative in t (B, D), from one evaluation that is counted.

    t has an entry for each row and broadcasts against z. The derivative in t is None where the field takes no time.
    """
    field = f.field
    # A closed form is not told of the autocast that a half-precision state is evaluated under, nor of integrals.
    known = f.half is None and not isinstance(field, RunningField)
    factors = linearization(field, z, t) if known else None
    if factors is None:
        return _differentiate(f, z, t, None, field.takes_time)
    J = product(factors, len(z))
    if not field.takes_time:
        return f(t, z), J, None
    out, drift = torch.func.jvp(lambda s: f(s, z), (t,), (torch.ones_like(t),))[:2]
    return out, J, as_rows(drift)


def refuse_batch_statistics(field: Field, where: str) -> None:
    """Raise ValueError where a BatchNorm lets the rows of z interact, so that none has a Jacobian of its own."""
    culprit = training_batchnorm(field.f)
    if culprit is not None:
        raise ValueError(
            f"{where}: field {field.name} contains {culprit} with batch statistics, through which the rows of z "
            f"interact; use GroupNorm instead, or call .eval() on the field first"
        )


def jvp(f: Callable[..., Tensor], z: Tensor, v: Tensor, t: Tensor | float = 0.0) -> Tensor:
    """Give the derivative of the field at z along v, J v, shaped like z, at about the cost of two evaluations.

    Args:
        f: field, `f(z)` or `f(t, z)`.
        z: points (B, ...), floating point.
        v: directions, shaped like z.
        t: time.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: v or f(z) has another shape than z.

    >>> jvp(lambda z: z**2, torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]])).tolist()
    [[2.0, -6.0]]
    """
    field = Field.of(f)
    z = state(z, "jvp")
    if v.shape != z.shape:
        raise ValueError(f"jvp: expected v of the shape of z, {tuple(z.shape)}, got {tuple(v.shape)}")
    derivative: Tensor = torch.func.jvp(lambda x: Evaluator(field, len(z))(t, x), (z,), (v.to(z.dtype),))[1]
    return derivative


def _differentiate(
    f: Evaluator, z: Tensor, t: Tensor | float, chunk_size: int | None = None, in_time: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The value, the Jacobian and, if asked for, the derivative in a t that has an entry for each row."""
    further = torch.is_grad_enabled()
    D = z.shape[1:].numel()
    with torch.inference_mode(False), torch.enable_grad():
        # To a transform with respect to anything else, z itself would be a constant: its leaf is refused.
        # A view of its own: hooks on z see the gradients of the caller's graph, not those that are taken here.
        x = z.view_as(z) if further and z.requires_grad and within(z) else leaf(z)
        into = [x]
        if in_time and isinstance(t, Tensor):
            t = t if further and t.requires_grad else leaf(t)
            t = t if x.is_leaf else _above(t, x)
            into.append(t)
        out = f(t, x)
        further = further and (z.requires_grad or _has_other_leaf(out, into))
        if not (out.requires_grad and D):
            return out, z.new_zeros(len(z), D, D), z.new_zeros(len(z), D) if in_time else None

        def pull_back(output: Tensor) -> tuple[Tensor, ...]:
            # Row b of f(z) depends on row b of z alone, so one output can be pulled back in all rows at once.
            direction = output.expand(z.shape)
            return torch.autograd.grad(
                out, into, direction, create_graph=further, retain_graph=True, materialize_grads=True
            )

        outputs = torch.eye(D, dtype=out.dtype, device=z.device).reshape(-1, *z.shape[1:])
        found: tuple[Tensor, ...]
        if D <= _LOOP and chunk_size is None:
            found = tuple(map(torch.stack, zip(*map(pull_back, outputs), strict=True)))
        else:
            found = torch.func.vmap(pull_back, chunk_size=chunk_size or _chunk(z))(outputs)
        J = found[0].reshape(D, len(z), D).transpose(0, 1)
        drift = found[1].reshape(D, len(z)).T if in_time else None
    return (out if further else out.detach()), J, drift


def _chunk(z: Tensor) -> int | None:
    """The number of outputs whose directions, shaped like z, fit the cache of a CPU; None (all) elsewhere."""
    return max(1, _CACHED // max(1, z.numel())) if z.device.type == "cpu" else None


class _Above(torch.autograd.Function):
    """t itself, in the graph above x though it does not depend on it.

    autograd's search for a way to its inputs leaves out what lies below the lowest of them. With a leaf among them it
    would walk through all that x was made from, at every step through the whole solve before it.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _above(t: Tensor, x: Tensor) -> Tensor:
    raised: Tensor = _Above.apply(t, x)  # type: ignore[no-untyped-call]
    return raised


def _has_other_leaf(out: Tensor, inputs: list[Tensor]) -> bool:
    """Say whether `out` depends on a tensor that requires a gradient beside its inputs: a parameter, a context."""
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is x for x in inputs):
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False


def _verify(field: Field, z: Tensor, t: Tensor | float, J: Tensor) -> None:
    """Compare J v with a forward-mode derivative along a random v, which sees all rows at once."""
    with torch.no_grad():
        v = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype, device="cpu")
        v = v.to(z.device)
        expected = jvp(field, z.detach(), v, t)
        bad = _disagreeing_rows(J, v, expected)
        if not bad:
            return
        closed = linearization(field, z, t) is not None
        if closed and not _disagreeing_rows(_differentiate(Evaluator(field, len(z)), z, t)[1], v, expected):
            raise ValueError(f"jacobian: {field.name}.linearize is not the derivative of the field at rows {bad} of z")
    raise ValueError(
        f"jacobian: rows of z interact inside field {field.name}: f at rows {bad} changes with other rows; look for "
        f"batch statistics, a mean or softmax over axis 0 or a reshape that mixes the batch axis with others"
    )


def _disagreeing_rows(J: Tensor, v: Tensor, expected: Tensor) -> list[int]:
    found, expected = (J @ as_rows(v).unsqueeze(-1)).squeeze(-1), as_rows(expected)
    tolerance = torch.finfo(J.dtype).eps ** 0.5 * (found.norm(dim=1) + expected.norm(dim=1))
    rows: list[int] = ((found - expected).norm(dim=1) > tolerance).nonzero().flatten().tolist()
    return rows
