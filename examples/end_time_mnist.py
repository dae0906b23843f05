"""What does the end time of a neural ODE do to accuracy and robustness? A blog's study on MNIST, its gaps filled.

    python examples/end_time_mnist.py --preset smoke     under a minute: the whole path on a small part of the data
    python examples/end_time_mnist.py                    preset quick: under 15 minutes on 2 cores
    python examples/end_time_mnist.py --preset full      the small net whole, about an hour on one core; with
                                                         --device cuda the large net too

A run that was stopped goes on where it was when it is started again with the same arguments.
Source: Rajat Vadiraj Dwaraknath, "Neural ODEs and adversarial attacks" (2019).
"""

from __future__ import annotations

import argparse
import sys

from mnist import command
from mnist.data import Dataset
from mnist.end_time.presets import PRESETS, Preset
from mnist.end_time.report import write_report
from mnist.end_time.study import run


def compute(preset: Preset, data: Dataset, given: argparse.Namespace, say: object) -> None:
    """Compute the stages as the command line says."""
    run(preset, data, given.out, given.seed, given.device)


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    return command.main("end_time_mnist", __doc__, PRESETS, compute, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
