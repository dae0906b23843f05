"""Does noise make a stable neural ODE more robust? The MNIST study, from data to report.

    python examples/sodef_mnist.py --preset smoke     under a minute: the whole path on a small part of the data
    python examples/sodef_mnist.py                    preset quick: some 20 minutes of one core; --jobs 2 for two
    python examples/sodef_mnist.py --preset full      a GPU, or several nights; --budget 60 stops after an hour

A run that was stopped goes on where it was when it is started again with the same arguments. `--jobs 4` shares the
cells out among four processes; `torchrun --nproc-per-node=4 examples/sodef_mnist.py` trains every model on all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mnist import command
from mnist.data import Dataset, load
from mnist.parallel import joined
from mnist.presets import PRESETS, Preset
from mnist.report import write_report
from mnist.runner import run
from mnist.study import Study


def options(parser: argparse.ArgumentParser) -> None:
    """What this study's command line says beside what all say."""
    parser.add_argument("--jobs", type=command.whole(1), default=1, help="processes that share the work (default: 1)")
    parser.add_argument(
        "--models", type=lambda text: text.split(","), metavar="M0,M1", help="only the cells of these (default: all)"
    )
    parser.add_argument(
        "--budget", type=command.minutes, metavar="MINUTES", help="begin nothing new after so many minutes"
    )


def process(preset: Preset, where: str | None, out: Path, seed: int, device: torch.device, threads: int) -> Study:
    """The study of one process."""
    torch.set_num_threads(threads)
    return Study(preset, load(where, say=lambda text: None), out, seed, device)


def compute(preset: Preset, data: Dataset, given: argparse.Namespace, say: Callable[..., None]) -> None:
    """Compute the cells as the command line says."""
    about = {"preset": preset.name, "warning": preset.warning, "data": data.name, "banner": data.banner}
    with joined(str(given.device)) as device:
        make = partial(process, preset, given.data, given.out, given.seed, device, given.threads)
        limits = {"models": given.models, "minutes": given.budget}
        run(make, preset, {**about, "seed": given.seed}, given.out, jobs=given.jobs, say=say, **limits)


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the exit status. Of the processes of torchrun the first has a say."""
    say = print if os.environ.get("RANK", "0") == "0" else lambda *text, **options: None
    return command.main("sodef_mnist", __doc__, PRESETS, compute, write_report, argv, options=options, say=say)


if __name__ == "__main__":
    sys.exit(main())
