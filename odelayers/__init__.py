"""Differential-equation layers for PyTorch: blocks, solvers, gradients, stability checks and regularisers."""

from odelayers._driver import Uniform
from odelayers._gradients import Adjoint, Backprop, Checkpoint
from odelayers._solution import GradientError, Solution, SolveError, Stats, Status
from odelayers._solvers import (
    RK4,
    Dopri5,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Milstein,
    ReversibleHeun,
    Rodas5P,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from odelayers.blocks import AugmentedODEBlock, DropoutSDEBlock, ODEBlock, SDEBlock, count_nfe
from odelayers.fields import MLP, ConvexPotential, ConvField, SineField, SkewSymmetric
from odelayers.heads import orthogonal_head, simplex_head
from odelayers.regularizers import (
    JacobianRegularizer,
    KineticRegularizer,
    LyaNetRegularizer,
    LyapunovRegularizer,
    LyapunovTerms,
    SteadyStateRegularizer,
)
from odelayers.stability import (
    StabilityReport,
    check_stability,
    gershgorin,
    jacobian,
    log_norm,
    lyapunov_exponents,
    spectral_abscissa,
    spectrum,
)

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "RK4",
    "Adjoint",
    "AugmentedODEBlock",
    "Backprop",
    "Checkpoint",
    "ConvField",
    "ConvexPotential",
    "Dopri5",
    "DropoutSDEBlock",
    "Euler",
    "EulerMaruyama",
    "GradientError",
    "Heun",
    "JacobianRegularizer",
    "KineticRegularizer",
    "LyaNetRegularizer",
    "LyapunovRegularizer",
    "LyapunovTerms",
    "Midpoint",
    "Milstein",
    "ODEBlock",
    "ReversibleHeun",
    "Rodas5P",
    "SDEBlock",
    "SineField",
    "SkewSymmetric",
    "Solution",
    "SolveError",
    "StabilityReport",
    "Stats",
    "Status",
    "SteadyStateRegularizer",
    "StratonovichHeun",
    "TorchDiffEq",
    "TorchSDE",
    "Tsit5",
    "Uniform",
    "check_stability",
    "count_nfe",
    "gershgorin",
    "jacobian",
    "log_norm",
    "lyapunov_exponents",
    "orthogonal_head",
    "simplex_head",
    "spectral_abscissa",
    "spectrum",
]
