"""What it costs to ask whether matrices are stable: eigenvalues, the bound by squaring, discs, and `is_hurwitz`.

Matrices J = G / 8 - s I of 64 rows, G standard normal, float32: their abscissa is near 1 - s, their log norm near
1.4 - s, and their discs reach to 6.4 - s. In the case "mixed" s is uniform in [-1, 8], in "near the axis" in [0, 1.4],
where no bound decides. 10,000 matrices on a GPU, if there is one (LAPACK takes one at a time there), 200 on a CPU. The
error of a number is its largest distance from the abscissa by LAPACK in float64, that of `is_hurwitz` the share of
matrices with another sign than that. Then a conv field of n = 784: dense, and by products with vectors alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from harness import Row, arguments, interleaved, parser, publish, rows
from torch import Tensor

from odelayers import (
    ConvField,
    euclidean_log_norm,
    gershgorin,
    is_hurwitz,
    jacobian,
    log_norm,
    rightmost_eigenvalues,
    spectral_abscissa,
)

DIM = 64


def matrices(count: int, low: float, high: float) -> Tensor:
    """G / 8 - s I with s uniform in [low, high]."""
    shifts = torch.rand(count, 1, 1) * (high - low) + low
    return torch.randn(count, DIM, DIM) / DIM**0.5 - shifts * torch.eye(DIM)


def discs(J: Tensor) -> Tensor:
    """The bound by Gershgorin's discs, over rows."""
    centres, radii = gershgorin(J)
    return (centres + radii).amax(-1)


def question_rows(name: str, J: Tensor, rounds: int) -> list[Row]:
    """Every way to ask, about the same matrices."""
    exact = spectral_abscissa(J.cpu().double())
    runs: dict[str, Callable[[], Tensor]] = {
        "is_hurwitz": lambda: is_hurwitz(J),
        "spectral_abscissa, eig": lambda: spectral_abscissa(J),
        "spectral_abscissa, squaring, 24": lambda: spectral_abscissa(J, method="squaring"),
        "spectral_abscissa, squaring, 16": lambda: spectral_abscissa(J, method="squaring", squarings=16),
        "log_norm, p = 2": lambda: log_norm(J, 2),
        "gershgorin": lambda: discs(J),
    }
    answers = {key: run().cpu() for key, run in runs.items()}
    error = {key: (value.double() - exact).abs().amax().item() for key, value in answers.items()}
    error["is_hurwitz"] = (answers["is_hurwitz"] != (exact < 0)).double().mean().item()
    return rows(f"{len(J)} matrices, {name}", interleaved(runs, rounds), {}, error)


def conv_rows(device: torch.device, rounds: int) -> list[Row]:
    """The abscissa and the log norm of a conv field's Jacobians, without them and with."""
    f, z = ConvField(16).to(device), torch.randn(2, 16, 7, 7).to(device)
    with torch.no_grad():
        J = jacobian(f.double(), z.double()).cpu()
        abscissa, norm = spectral_abscissa(J), log_norm(J, 2)
        f.float()
        runs = {
            "rightmost_eigenvalues": lambda: rightmost_eigenvalues(f, z).values[:, 0].real,
            "jacobian, eig": lambda: spectral_abscissa(jacobian(f, z)),
            "euclidean_log_norm": lambda: euclidean_log_norm(f, z).values,
            "jacobian, log_norm, p = 2": lambda: log_norm(jacobian(f, z), 2),
        }
        exact = {key: norm if "norm" in key else abscissa for key in runs}
        error = {key: (run().cpu().double() - exact[key]).abs().amax().item() for key, run in runs.items()}
        return rows("ConvField, n = 784, batch 2", interleaved(runs, rounds), {}, error)


def main() -> None:
    args = arguments(parser(__doc__ or "", rounds=7))  # LAPACK takes seconds a turn
    device, count = torch.device(args.device), 10_000 if args.device == "cuda" else 200
    table = [
        *question_rows("mixed", matrices(count, -1.0, 8.0).to(device), args.rounds),
        *question_rows("near the axis", matrices(count, 0.0, math.sqrt(2)).to(device), args.rounds),
        *conv_rows(device, args.rounds),
    ]
    publish("spectra", f"Stability of {DIM} x {DIM} matrices and of a conv field, float32", table, args)


if __name__ == "__main__":
    main()
