"""How to step: own Runge-Kutta and SDE methods, torchdiffeq and torchsde as adapters. Knows nothing of gradients."""

from odelayers._solvers.adaptive import AdaptiveRungeKutta, Dopri5, Tsit5
from odelayers._solvers.base import MarchingSolver, Path, Solver
from odelayers._solvers.compiled import Programs
from odelayers._solvers.fixed import RK4, Euler, FixedGrid, FixedRungeKutta, Heun, Midpoint
from odelayers._solvers.reference import TorchDiffEq
from odelayers._solvers.reference_sde import TorchSDE
from odelayers._solvers.rosenbrock import Rodas5P
from odelayers._solvers.sde import EulerMaruyama, Milstein, ReversibleHeun, StratonovichHeun
from odelayers._solvers.settling import Settling

__all__ = [
    "RK4",
    "AdaptiveRungeKutta",
    "Dopri5",
    "Euler",
    "EulerMaruyama",
    "FixedGrid",
    "FixedRungeKutta",
    "Heun",
    "MarchingSolver",
    "Midpoint",
    "Milstein",
    "Path",
    "Programs",
    "ReversibleHeun",
    "Rodas5P",
    "Settling",
    "Solver",
    "StratonovichHeun",
    "TorchDiffEq",
    "TorchSDE",
    "Tsit5",
]
