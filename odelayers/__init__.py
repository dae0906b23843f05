"""Differential-equation layers for PyTorch: blocks, solvers, gradients, stability checks and regularisers."""

from odelayers._driver import Uniform
from odelayers._gradients import Adjoint, Backprop, Checkpoint, Implicit, Reversible
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
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from odelayers._times import Equilibrium
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
    RitzValues,
    StabilityReport,
    check_stability,
    euclidean_log_norm,
    gershgorin,
    is_hurwitz,
    jacobian,
    log_norm,
    lyapunov_exponents,
    rightmost_eigenvalues,
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
    "Equilibrium",
    "Euler",
    "EulerMaruyama",
    "GradientError",
    "Heun",
    "Implicit",
    "JacobianRegularizer",
    "KineticRegularizer",
    "LyaNetRegularizer",
    "LyapunovRegularizer",
    "LyapunovTerms",
    "Midpoint",
    "Milstein",
    "ODEBlock",
    "Reversible",
    "ReversibleHeun",
    "RitzValues",
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
    "euclidean_log_norm",
    "gershgorin",
    "is_hurwitz",
    "jacobian",
    "log_norm",
    "lyapunov_exponents",
    "orthogonal_head",
    "rightmost_eigenvalues",
    "simplex_head",
    "spectral_abscissa",
    "spectrum",
]
