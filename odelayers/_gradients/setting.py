"""What a solve was evaluated under, so that its backward pass evaluates the same field again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, readable
from odelayers._field import modules, tensors
from odelayers._gradients.base import fields
from odelayers._solution import GradientError

__all__ = ["Setting"]


class _Read(NamedTuple):
    """A tensor that the field read, and what tells whether it is still the same."""

    tensor: Tensor
    version: int
    storage: int | None

    @classmethod
    def of(cls, x: Tensor) -> _Read:
        return cls(x, x._version, _storage(x))

    @property
    def changed(self) -> bool:
        return self.tensor._version != self.version or _storage(self.tensor) != self.storage


def _storage(x: Tensor) -> int | None:
    """What `x.data = ...` changes, which leaves the version as it is; None for tensors that wrap others."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and readable(x)
    return x.untyped_storage()._cdata if plain else None


class Setting:
    """What the forward solve read and ran under: the backward pass must find the same.

    Training modes, autocast and the tensors that the modules held are restored (`torch.func.functional_call` lends
    them others for a call); tensors that have changed since are refused. `leaves` stand in for `originals`.
    """

    def __init__(
        self, f: Evaluator, driver: Driver, device: torch.device, originals: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> None:
        every = fields(f, driver)
        read = [x for field in every for x in (*tensors(field.f), *field.context)]
        read += [driver.noise.given] if driver.noise is not None and driver.noise.given is not None else []
        self.read = [_Read.of(x) for x in read if not x.is_inference()]
        found = list(dict.fromkeys(m for field in every for m in modules(field.f)))
        self.modes = [(m, m.training) for m in found]
        stand_in = {id(x): leaf for x, leaf in zip(originals, leaves, strict=True)}
        self.held: list[tuple[dict[str, Any], str, Tensor]] = [
            (owner, name, stand_in.get(id(x), x))
            for m in found
            if not isinstance(m, torch.jit.ScriptModule)
            for owner in cast(tuple[dict[str, Any], ...], (m._parameters, m._buffers))
            for name, x in owner.items()
            if x is not None
        ]
        self.leaves = leaves
        self.device = device.type
        self.autocast = torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)
        self.scaled = f.half is torch.float16

    def check_still(self) -> None:
        """Refuse a field that changed its own buffers while it was solved for: evaluated again it would be another."""
        if any(read.changed for read in self.read):
            raise GradientError(
                "the field's parameters or buffers moved while it was evaluated (spectral_norm in training mode, a "
                "running statistic): a gradient that evaluates the field again would see another field. Call "
                "field.eval(), or use gradient=Backprop()"
            )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run as in the forward solve."""
        for read in self.read:
            if read.changed:
                raise GradientError(
                    f"backward pass: a tensor of shape {tuple(read.tensor.shape)} that the field reads was modified by "
                    f"an inplace operation or by .data since the forward solve, and the field must be evaluated again: "
                    f"call backward() first, or change a copy"
                )
        now = [(m, m.training) for m, _ in self.modes]
        others = [(owner, name, x, owner.get(name)) for owner, name, x in self.held if owner.get(name) is not x]
        enabled, dtype = self.autocast
        try:
            for m, training in self.modes:
                m.training = training
            for owner, name, x, _ in others:
                owner[name] = x
            with torch.autocast(self.device, enabled=enabled, dtype=dtype):
                yield
        finally:
            for m, training in now:
                m.training = training
            for owner, name, _, other in others:
                owner[name] = other

    @contextmanager
    def again(self, gradient: Tensor, start: Tensor) -> Iterator[list[Tensor]]:
        """Be in the backward pass: as in the forward solve, and unseen by hooks on parameters.

        They see the total and not the part of each step. Nor are weights taken from `parametrize.cached()`, whose graph
        is not the solve's. What is yielded are the gradients of the start and of the leaves where that which arrives
        has overflowed already, else nothing.
        """
        overflowed = self._overflowed(gradient)
        hooked = [(x, x._backward_hooks) for x in self.leaves if x._backward_hooks]
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
        try:
            for x, _ in hooked:
                x._backward_hooks = None
            with torch.no_grad(), self.restored():
                yield [torch.full_like(x, torch.nan) for x in (start, *self.leaves)] if overflowed else []
        finally:
            parametrize._cache_enabled = cached
            for x, hooks in hooked:
                x._backward_hooks = hooks

    def _overflowed(self, gradient: Tensor) -> bool:
        """Whether a gradient that reaches the solution is NaN or inf where that is a scaler's signal: under float16.

        Elsewhere it is refused, before it is mistaken for a failed solve; and so is a second derivative.
        """
        if torch.is_grad_enabled():  # in a backward pass: create_graph=True
            raise GradientError(
                "backward pass: a gradient that evaluates the field again cannot be differentiated twice "
                "(create_graph=True); use gradient=Backprop()"
            )
        if not readable(gradient) or bool(gradient.isfinite().all()):
            return False
        if self.scaled:
            return True
        raise GradientError(
            "backward pass: the gradient that reaches the solution is NaN or inf already: it comes from the loss or "
            "the layers after the block, not from the solve; look there first (torch.autograd.detect_anomaly)"
        )
