"""Does noise make a stable neural ODE more robust? The MNIST study, from data to report.

    python examples/sodef_mnist.py --preset smoke     under a minute: the whole path on a small part of the data
    python examples/sodef_mnist.py                    preset quick: under 15 minutes on 2 cores
    python examples/sodef_mnist.py --preset full      a GPU, or a night

A run that was stopped goes on where it was when it is started again with the same arguments.
"""

from __future__ import annotations

import sys

from mnist import command
from mnist.presets import PRESETS
from mnist.report import write_report
from mnist.study import run


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    return command.main("sodef_mnist", __doc__, PRESETS, run, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
