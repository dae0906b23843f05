"""How to differentiate: each gradient owns the solve."""

from odelayers._gradients.adjoint import Adjoint
from odelayers._gradients.backprop import Backprop
from odelayers._gradients.base import Gradient
from odelayers._gradients.checkpoint import Checkpoint
from odelayers._gradients.implicit import Implicit
from odelayers._gradients.reversible import Reversible

__all__ = ["Adjoint", "Backprop", "Checkpoint", "Gradient", "Implicit", "Reversible"]
