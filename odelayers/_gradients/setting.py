"""What a solve was evaluated under, so that its backward pass evaluates the same field again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, readable, traced
from odelayers._field import modules
from odelayers._gradients.base import fields
from odelayers._solution import GradientError

__all__ = ["Setting"]


class _Read(NamedTuple):
    """A tensor that the field read, and what tells whether it is still the same."""

    tensor: Tensor
    version: int
    storage: torch.UntypedStorage | None  # which `x.data = ...` changes; None where it cannot be told

    @classmethod
    def of(cls, x: Tensor) -> _Read:
        plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and not traced()
        return cls(x, x._version, x.untyped_storage() if plain else None)

    @property
    def changed(self) -> bool:
        if self.tensor._version != self.version:
            return True
        return self.storage is not None and self.tensor.untyped_storage()._cdata != self.storage._cdata


class Setting:
    """What the forward solve read and ran under: the backward pass must find the same.

    Training modes, autocast and the tensors that the modules held are restored (`torch.func.functional_call` lends
    them others for a call); tensors that have changed since are refused. `leaves` stand in for `originals`.
    """

    def __init__(
        self, f: Evaluator, driver: Driver, device: torch.device, originals: Sequence[Tensor], leaves: Sequence[Tensor]
    ) -> None:
        every = fields(f, driver)
        found = list(dict.fromkeys(m for field in every for m in modules(field.f)))
        owned: list[tuple[Any, str, Tensor]] = [
            (owner, name, x)
            for m in found
            for owner in (m._parameters, m._buffers)
            for name, x in owner.items()
            if x is not None
        ]
        read = [*(x for _, _, x in owned), *(x for field in every for x in field.context)]
        read += [driver.noise.given] if driver.noise is not None and driver.noise.given is not None else []
        self.read = [_Read.of(x) for x in read if not x.is_inference()]
        self.modes = [(m, m.training) for m in found]
        stand_in = {id(x): leaf for x, leaf in zip(originals, leaves, strict=True)}
        # What a ScriptModule owns cannot be lent another: it is no dict.
        self.held = [(owner, name, stand_in.get(id(x), x)) for owner, name, x in owned if isinstance(owner, dict)]
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
        """Run as in the forward solve, which runs so itself: among the leaves, and with weights that are its own.

        `parametrize.cached()` has weights with another graph than the solve's: they are computed again.
        """
        for read in self.read:
            if read.changed:
                raise GradientError(
                    f"backward pass: a tensor of shape {tuple(read.tensor.shape)} that the field reads was modified by "
                    f"an inplace operation or by .data since the forward solve, and the field must be evaluated again: "
                    f"call backward() first, or change a copy"
                )
        now = [(m, m.training) for m, _ in self.modes]
        others = [(owner, name, x, owner[name]) for owner, name, x in self.held if owner.get(name, x) is not x]
        enabled, dtype = self.autocast
        cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
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
            parametrize._cache_enabled = cached

    @contextmanager
    def again(self, gradient: Tensor, start: Tensor) -> Iterator[list[Tensor]]:
        """Be in the backward pass: as in the forward solve, and unseen by hooks on parameters.

        They see the total and not the part of each step, unless another thread is in a backward pass of the same
        parameters. What is yielded are the gradients of the start and of the leaves where that which arrives has
        overflowed already, else nothing.
        """
        spoilt = self.spoilt(start) if self._overflowed(gradient) else []
        hooked = [(x, x._backward_hooks) for x in self.leaves if x._backward_hooks]
        try:
            for x, _ in hooked:
                x._backward_hooks = None
            with torch.no_grad(), self.restored():
                yield spoilt
        finally:
            for x, hooks in hooked:
                x._backward_hooks = hooks

    def spoilt(self, start: Tensor) -> list[Tensor]:
        """The gradients of the start and of the leaves after an overflow: what a scaler of the loss looks for."""
        return [torch.full_like(x, torch.nan) for x in (start, *self.leaves)]

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
            "the layers after the block, not from the solve; look there first (torch.autograd.detect_anomaly). Under a "
            "loss scaler for float16 let the block run under autocast as well"
        )
