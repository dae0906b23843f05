"""Integrals accumulated along a solve: the state is carried on with one more entry for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from odelayers._checks import at_least_float32
from odelayers._evaluator import ambient
from odelayers._field import Field, as_rows

__all__ = ["RunningField", "RunningRegularizer"]


class RunningRegularizer(Protocol):
    """What a solve asks of a regulariser accumulated along it."""

    needs_jacobian: bool

    def rate(self, t: Tensor | float, z: Tensor, dz: Tensor, probe: Tensor) -> Tensor:
        """What is integrated over time, `(B,)`, at state z with dz = f(t, z) and a probe fixed for the solve."""


@dataclass(frozen=True)
class RunningField(Field):
    """A field over states `(B, D + R)`: the user's state, flat, followed by R running integrals."""

    field: Field | None = None
    regularizers: tuple[RunningRegularizer, ...] = ()
    probe: Tensor | None = None

    @classmethod
    def around(
        cls, field: Field, regularizers: Sequence[RunningRegularizer], z0: Tensor, generator: torch.Generator | None
    ) -> RunningField:
        """The field that also accumulates the regularisers; a probe shaped like z0 is drawn if one of them needs it."""
        for r in regularizers:
            if isinstance(r, type) or not callable(getattr(r, "rate", None)) or not hasattr(r, "needs_jacobian"):
                raise TypeError(
                    f"running: expected regularisers accumulated along a solve (KineticRegularizer(), "
                    f"JacobianRegularizer(), SteadyStateRegularizer()), got "
                    f"{f'the class {r.__name__}' if isinstance(r, type) else type(r).__name__}"
                )
        probe = torch.zeros_like(z0)
        if any(r.needs_jacobian for r in regularizers):
            probe = torch.randn(z0.shape, generator=generator, dtype=z0.dtype, device=z0.device)
        return cls(field.f, field.takes_time, field.context, field=field, regularizers=tuple(regularizers), probe=probe)

    def take(self, rows: Tensor, batch: int) -> RunningField:
        field, probe = self._parts()
        inner = field.take(rows, batch)
        return replace(self, context=inner.context, field=inner, probe=probe[rows])

    def with_context(self, context: tuple[Tensor, ...]) -> RunningField:
        return replace(self, context=context, field=self._parts()[0].with_context(context))

    def speed(self, dz: Tensor) -> Tensor:
        """|dz/dt| of the user's state alone: the integrals beside it may run on."""
        return super().speed(dz[:, : self._parts()[1][0].numel()])

    def enter(self, z: Tensor) -> Tensor:
        """The augmented state at the start: every integral is zero."""
        return torch.cat([as_rows(z), z.new_zeros(len(z), len(self.regularizers))], dim=1)

    def leave(self, zs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """States `(T, B, ...)` and the integrals at the last time from augmented states `(T, B, D + R)`."""
        _, probe = self._parts()
        n = probe[0].numel()
        return zs[..., :n].reshape(zs.shape[0], *probe.shape), zs[-1, :, n:].unbind(1)

    def __call__(self, t: Tensor | float, y: Tensor) -> Tensor:
        field, probe = self._parts()
        z = y[:, : probe[0].numel()].view(probe.shape)
        recording = torch.is_grad_enabled()
        jacobian = any(r.needs_jacobian for r in self.regularizers)
        if jacobian and not (recording and z.requires_grad):
            z = z.detach().requires_grad_()
        with torch.set_grad_enabled(recording or jacobian):
            dz = field(t, z)
            rates = [r.rate(t, z, dz, probe) for r in self.regularizers]
            # Under autocast rates may leave the range of what the field returns; any other dtype is its own.
            flat = as_rows(dz) if ambient(z.device) is None else at_least_float32(as_rows(dz))
            out = torch.cat([flat, torch.stack(rates, dim=1).to(flat.dtype)], dim=1)
        return out if recording else out.detach()

    def _parts(self) -> tuple[Field, Tensor]:
        if self.field is None or self.probe is None:
            raise TypeError("RunningField: build it with RunningField.around")
        return self.field, self.probe
