"""Jacobians in closed form: of fields that declare theirs, and of linear layers with activations between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odelayers._evaluator import dual, recordable, transformed
from odelayers._field import Field

__all__ = ["Factor", "leaf", "linearization", "product", "refused", "within"]

_ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus)


class Factor(NamedTuple):
    """diag(slopes) matrix, the derivative of an activation of a linear map at every row."""

    slopes: Tensor | None  # (B, out); None where there is no activation
    matrix: Tensor  # (out, in)


def linearization(field: Field, z: Tensor, t: Tensor | float) -> list[Factor] | None:
    """Give the factors of J, the first to be applied first, if they are known of the forward that runs, else None.

    They are known of a field that declares its own, and of linear layers with at most activations between them.
    """
    own = getattr(field.f, "linearize", None)
    return _declared(own, field, z, t) if callable(own) else _sequential(field, z)


def product(factors: list[Factor], batch: int) -> Tensor:
    """Multiply factors to the Jacobians (B, D, D)."""
    slopes, J = factors[-1]
    J = J if slopes is None else slopes.unsqueeze(-1) * J
    for slopes, matrix in reversed(factors[:-1]):  # from the left, a product of all rows with one matrix is one product
        J = (J if slopes is None else J * slopes.unsqueeze(-2)) @ matrix
    return J if J.ndim == 3 else J.expand(batch, *J.shape).clone()


def within(x: Tensor) -> bool:
    """Whether the innermost torch.func transform, if there is one, is with respect to x."""
    functorch = torch._C._functorch
    top = None if torch.compiler.is_compiling() else functorch.peek_interpreter_stack()
    return top is None or functorch.maybe_get_level(x) == top.level()


def leaf(x: Tensor) -> Tensor:
    """The same values as the leaf of a new graph, which autograd differentiates by."""
    if not torch.compiler.is_compiling() and (transformed() or dual()):
        raise refused()
    return recordable(x).detach().requires_grad_()


def refused() -> RuntimeError:
    """The error for the transforms of torch.func, and the dual numbers, that a Jacobian cannot pass."""
    functorch = torch._C._functorch
    mapped = any(x.key() == functorch.TransformType.Vmap for x in functorch.get_interpreter_stack() or ())
    rows = "hand all rows over as one batch, jacobian(f, z), and " if mapped else ""
    return RuntimeError(
        f"jacobian under a torch.func transform or with dual numbers: it differentiates the field itself and reads on "
        f"the host whether the result is finite, which vmap, forward mode and transforms with respect to anything but "
        f"z forbid; {rows}differentiate the result with torch.autograd.grad"
    )


def _declared(
    own: Callable[..., tuple[Tensor, Tensor]], field: Field, z: Tensor, t: Tensor | float
) -> list[Factor] | None:
    f = field.f
    if isinstance(f, nn.Module):
        if not _runs_as_written(f):
            return None
        nearest = next(c for c in type(f).__mro__ if "forward" in vars(c) or "linearize" in vars(c))
        if "linearize" not in vars(nearest):
            return None
    slopes, matrix = own(t, z, *field.context) if field.takes_time else own(z, *field.context)
    D = z.shape[1:].numel()
    if slopes.shape != (len(z), D) or matrix.shape != (D, D):
        raise ValueError(
            f"field {field.name}: expected linearize to give slopes of shape {(len(z), D)} and a matrix of shape "
            f"{(D, D)}, got {tuple(slopes.shape)} and {tuple(matrix.shape)}"
        )
    return [Factor(slopes, matrix)]


def _sequential(field: Field, z: Tensor) -> list[Factor] | None:
    layers = _layers(field.f)
    if not layers or field.context or z.ndim != 2 or torch.is_autocast_enabled(z.device.type):
        return None
    factors: list[Factor] = []
    for layer in layers:
        if isinstance(layer, nn.Linear):
            W = layer.weight
            if (W.shape[1], W.dtype, W.device) != (z.shape[1], z.dtype, z.device):
                return None  # the field itself will say what is wrong
            factors.append(Factor(None, W))
            z = layer(z)
        elif not factors:
            return None
        else:
            before, matrix = factors[-1]
            z, slopes = _activated(layer, z)
            factors[-1] = Factor(slopes if before is None else before * slopes, matrix)
    return factors


def _layers(f: object) -> list[nn.Module] | None:
    """The linear layers and activations that f is a chain of; None if there is anything else in it."""
    if not isinstance(f, nn.Module) or not _runs_as_written(f):
        return None
    if type(f) is nn.Linear or (type(f) in _ACTIVATIONS and not getattr(f, "inplace", False)):
        return [f]
    if not isinstance(f, nn.Sequential) or type(f).forward is not nn.Sequential.forward:
        return None
    found: list[nn.Module] = []
    for child in f:  # not children(), which leaves out a layer that occurs again
        layers = _layers(child)
        if layers is None:
            return None
        found += layers
    return found


def _runs_as_written(f: nn.Module) -> bool:
    """Whether calling f runs the forward of its class and nothing else."""
    hooks = (f._forward_hooks, f._forward_pre_hooks, f._backward_hooks, f._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(f)


def _activated(activation: nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of u and its slopes, differentiable in grad mode where u is."""
    further = torch.is_grad_enabled() and u.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        x = u if further else leaf(u)
        out = activation(x)
        (slopes,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=further)
    return (out if further else out.detach()), slopes
