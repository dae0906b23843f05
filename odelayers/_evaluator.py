"""A field during one solve: counted, checked, under autocast for half-precision states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from odelayers._field import Field, tensors

__all__ = [
    "Evaluator",
    "OnCall",
    "ambient",
    "dual",
    "inferring",
    "readable",
    "recordable",
    "traced",
    "transformed",
    "vmapped",
]

OnCall = Callable[[], None]
Inspect = Callable[[Tensor, Tensor | float, Tensor], None]
KEPT = 8  # evaluations through which the first value must last: a step of any method here combines fewer
SAMPLED = 16  # the evaluation after the first that is watched in inference mode; then those twice as far


def transformed() -> bool:
    """Whether a torch.func transform is looking."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def traced() -> bool:
    """Whether torch.compile, export or a torch.func transform is looking: then values cannot be read on the host."""
    return torch.compiler.is_compiling() or transformed()


def readable(z: Tensor) -> bool:
    """Whether values like z's can be read on the host: not when traced, nor while a CUDA graph is captured."""
    return not (traced() or capturing(z))


def dual() -> bool:
    """Whether values may carry tangents of torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def capturing(z: Tensor) -> bool:
    """Whether z is on a GPU and the current stream is being captured into a CUDA graph."""
    return z.is_cuda and torch.cuda.is_current_stream_capturing()


def vmapped(z: Tensor) -> bool:
    """Whether torch.func.vmap holds z, at any level of nested transforms."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(z):
        if functorch.is_batchedtensor(z):
            return True
        z = functorch.get_unwrapped(z)
    return False


def ambient(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that the caller is in; None outside of one."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def inferring() -> bool:
    """Whether inference mode is on, in which autograd records nothing; torch.compile cannot be asked."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def recordable(x: Tensor) -> Tensor:
    """The same values as autograd can record, outside of inference mode: of a tensor made inside of it a copy."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def _counting(z: Tensor) -> Tensor:
    """A copy of z that counts the writes into it, which tensors made in inference mode do not."""
    if not torch.is_inference_mode_enabled():
        return z.clone()
    z = z.detach()
    with torch.inference_mode(False):
        return z.clone()


def _random_state(device: torch.device) -> Tensor:
    """The state of the global generator that layers draw from on this device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _Draws(TorchDispatchMode):
    """Notes whether an operator that draws random numbers is called in this thread."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class Evaluator:
    """A field during one solve: evaluations are counted, the first one is checked, halves run under autocast.

    Writing into z is found at every evaluation, by the tensor's version; not under torch.compile. In inference mode
    tensors have none: at the first, 16th, 32nd, 64th, ... evaluation the field is handed a copy that has one. So the
    copies cost next to nothing, and what starts in the first half of a long solve is found.

    The state is kept in float32 where the user's is half precision; the field then runs under autocast in that dtype.
    """

    def __init__(
        self,
        field: Field,
        batch: int,
        half: torch.dtype | None = None,
        on_call: tuple[OnCall, ...] = (),
        programs: Any = None,
    ) -> None:
        self.field, self.batch, self.half, self.on_call = field, batch, half, on_call
        self.programs = programs  # the solver's compiled programs of the field, None for an eager solve
        self.nfe = 0
        self.inspect: Inspect | None = None  # sees the first value, its time and its state
        self.within: Callable[[], AbstractContextManager[None]] | None = None  # every evaluation runs inside it
        self._found: tuple[Tensor, Tensor, int] | None = None  # the first value, a copy of it, and its version

    def over(self, field: Field) -> Evaluator:
        """A fresh evaluator of another field under the same conditions."""
        return Evaluator(field, self.batch, self.half, self.on_call, self.programs)

    def precision(self, z: Tensor) -> torch.dtype:
        """The dtype that the field is evaluated in: half precision or the state's. Autocast leaves float64 as it is."""
        return z.dtype if self.half is None or z.dtype == torch.float64 else self.half

    def take(self, rows: Tensor) -> Evaluator:
        """A fresh evaluator for these rows of the batch alone."""
        return Evaluator(self.field.take(rows, self.batch), len(rows), self.half, self.on_call, self.programs)

    def count(self, evaluations: int) -> None:
        """Count evaluations of the field that a compiled program has made."""
        self.nfe += evaluations
        for notify in self.on_call * evaluations:
            notify()

    def __call__(self, t: Tensor | float, z: Tensor) -> Tensor:
        """dz/dt at time t and state z, in z's dtype and shape."""
        self.nfe += 1
        for notify in self.on_call:
            notify()
        if self.nfe <= KEPT and readable(z):
            return self._first(t, z) if self.nfe == 1 else self._early(t, z)
        return self._plain(t, z) if torch.compiler.is_compiling() else self._watched(t, z)

    def _watched(self, t: Tensor | float, z: Tensor) -> Tensor:
        """An evaluation that raises where the field writes into z."""
        if z.is_inference():
            if self.nfe < SAMPLED or self.nfe & (self.nfe - 1) or not readable(z):
                return self._plain(t, z)
            z = _counting(z)
        version = z._version
        try:
            dz = self._plain(t, z)
        except RuntimeError as error:
            point = z._base if z._base is not None else z  # of a Jacobian
            if point.is_leaf and point.requires_grad and "in-place operation" in str(error):
                raise self._wrote() from error
            raise
        if z._version != version:
            raise self._wrote()
        return dz

    def _plain(self, t: Tensor | float, z: Tensor) -> Tensor:
        plain = self.within is None and self.half is None
        dz = self.field(t, z) if plain else self._evaluate(t, z)
        return dz if dz.dtype == z.dtype else dz.to(z.dtype)

    def _evaluate(self, t: Tensor | float, z: Tensor) -> Tensor:
        if self.within is None:
            return self._called(t, z)
        with self.within():
            return self._called(t, z)

    def _called(self, t: Tensor | float, z: Tensor) -> Tensor:
        if self.half is None:
            return self.field(t, z)
        with torch.autocast(z.device.type, dtype=self.half):
            return self.field(t, z)

    def _first(self, t: Tensor | float, z: Tensor) -> Tensor:
        """The solve's own first evaluation, on a copy of z, so that a field that writes into z harms nothing."""
        recording = torch.is_grad_enabled()
        with torch.set_grad_enabled(recording or self.inspect is not None):
            # Where the graph is inspected the copy hangs on a leaf of its own, which the walk takes for the state.
            copy = _counting(z if recording or self.inspect is None else z.detach().requires_grad_())
            version = copy._version
            drawn = _random_state(z.device)
            dz = self._tried(t, copy)
        where = f"field {self.field.name}"
        if not isinstance(dz, Tensor):
            raise TypeError(f"{where}: expected a Tensor, got {type(dz).__name__}")
        if dz.shape != z.shape:
            raise ValueError(
                f"{where}: expected dz/dt of the state's shape {tuple(z.shape)}, got {tuple(dz.shape)}; "
                f"return one rate for every entry of the state"
            )
        autocast = self.half is not None or torch.is_autocast_enabled(z.device.type)
        if dz.dtype != z.dtype and not (autocast and dz.is_floating_point()):
            raise TypeError(f"{where}: expected dz/dt in the state's {z.dtype}, got {dz.dtype}; cast the field or z")
        if copy._version != version:
            raise self._wrote()
        if not torch.equal(drawn, _random_state(z.device)) and self._draws(t, copy):
            raise ValueError(
                f"{where}: the field draws random numbers (functional dropout, RReLU, attention with dropout): every "
                f"evaluation would be of another field. Use DropoutSDEBlock or SDEBlock for noise along the solve, "
                f"draw before it and pass the draw as context=, or call field.eval()"
            )
        if self.inspect is not None:
            self.inspect(dz, t, copy)
            dz = dz if recording else dz.detach()
        if dz.dtype != z.dtype:
            return dz.to(z.dtype)  # a copy already
        self._found = dz, dz.detach().clone(), -1 if dz.is_inference() else dz._version
        return dz

    @torch.no_grad()
    def _draws(self, t: Tensor | float, z: Tensor) -> bool:
        """Whether the field, called once more, draws random numbers: if not, another thread has."""
        mode = _Draws()
        with mode:
            self._evaluate(t, z)
        return mode.seen

    def _early(self, t: Tensor | float, z: Tensor) -> Tensor:
        """One of the evaluations after the first, which must leave what the first has returned alone."""
        dz = self._watched(t, z)
        if self._found is None:
            return dz
        first, kept, version = self._found
        if first.is_inference():  # which have no version: looked at once
            version, self._found = -1, None
        elif self.nfe == KEPT:
            self._found = None
        if (version < 0 or first._version != version) and not bool(((first == kept) | kept.isnan()).all()):
            raise ValueError(
                f"field {self.field.name}: the field has overwritten the tensor that it returned before; a solver "
                f"combines several evaluations: return a new tensor each time (no out= buffer, or its clone)"
            )
        return dz

    def _wrote(self) -> ValueError:
        return ValueError(
            f"field {self.field.name}: the field changed its input z in place; a solver evaluates it several times at "
            f"one state: use the out-of-place operation (z * 2, not z.mul_(2); inplace=False)"
        )

    def _tried(self, t: Tensor | float, z: Tensor) -> Tensor:
        try:
            return self._evaluate(t, z)
        except RuntimeError as error:
            self._explain(error, z)
            raise

    def _explain(self, error: RuntimeError, z: Tensor) -> None:
        """Raise what the user can act on where the field's parameters and the state disagree on dtype or device."""
        where = f"field {self.field.name}"
        for p in tensors(self.field.f):
            if p.device != z.device:
                raise ValueError(
                    f"{where}: the state z is on {z.device}, a parameter of the field on {p.device}; "
                    f"make them agree, e.g. block.to(z.device)"
                ) from error
            if p.is_floating_point() and self.half is None and p.dtype != z.dtype:
                raise TypeError(
                    f"{where}: the state z is {z.dtype}, a parameter of the field {p.dtype}; "
                    f"make them agree, e.g. block.to(z.dtype) or z.to({p.dtype})"
                ) from error
