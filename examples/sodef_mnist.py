"""Does noise make a stable neural ODE more robust? The MNIST study, from data to report.

    python examples/sodef_mnist.py --preset smoke     under a minute: the whole path on a small part of the data
    python examples/sodef_mnist.py                    preset quick: under 15 minutes on 2 cores
    python examples/sodef_mnist.py --preset full      a GPU, or a night

A run that was stopped goes on where it was when it is started again with the same arguments. `--jobs 4` shares the
cells out among four processes; `torchrun --nproc-per-node=4 examples/sodef_mnist.py` trains every model on all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from mnist.data import DataError, load
from mnist.presets import PRESETS, Preset
from mnist.report import write_report
from mnist.runner import run
from mnist.study import Study, usable_device


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an int >= {least}, got {text!r}")
        return int(text)

    return whole


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes >= 0, got {text!r}")
    return minutes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="quick", help="how much to do (default: quick)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/sodef_mnist-PRESET)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with MNIST's four IDX files, or 'digits' for scikit-learn's; "
        "default: $ODELAYERS_MNIST, else the cache folder, else a download",
    )
    parser.add_argument(
        "--seed", type=_whole(0), default=0, help="first seed of weights, order, noise and attacks (default: 0)"
    )
    parser.add_argument("--jobs", type=_whole(1), default=1, help="processes that share the work (default: 1)")
    parser.add_argument("--budget", type=_minutes, metavar="MINUTES", help="begin nothing new after so many minutes")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    # The operations are small: a second thread gains little, loses much as soon as another process wants its core, and
    # changes the last digits. One thread gives the same numbers on every machine of a kind.
    parser.add_argument("--threads", type=_whole(1), default=1, help="CPU threads of one operation (default: 1)")
    given = parser.parse_args(argv)
    given.out = given.out or Path("runs") / f"sodef_mnist-{given.preset}"
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out: {given.out} is a file, expected a folder")
    try:
        given.device = usable_device(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return given


def make(preset: Preset, where: str | None, out: Path, seed: int, device: torch.device, threads: int) -> Study:
    """The study of one process."""
    torch.set_num_threads(threads)
    return Study(preset, load(where, say=lambda text: None), out, seed, device)


@contextmanager
def ranks(device: torch.device) -> Iterator[torch.device]:
    """The device of this process; under torchrun with the others of its group joined."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    given = arguments(argv)
    with ranks(given.device) as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        return study(given, device, print if first else lambda *text, **options: None)


def study(given: argparse.Namespace, device: torch.device, say: Callable[..., None]) -> int:
    """The study as the command line asks for it; of several ranks one has a say."""
    started, preset = time.perf_counter(), PRESETS[given.preset]
    try:
        data = load(given.data, say=say)
    except DataError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    for text in (data.banner, preset.warning):
        if text:
            say(f"*** {text} ***")
    about = {"preset": preset.name, "warning": preset.warning, "data": data.name, "banner": data.banner}
    process = partial(make, preset, given.data, given.out, given.seed, device, given.threads)
    try:
        run(
            process, preset, {**about, "seed": given.seed}, given.out,
            jobs=given.jobs, minutes=given.budget, say=partial(say, flush=True),
        )  # fmt: skip
    except KeyboardInterrupt:
        say(f"\nstopped; the same command goes on from what is in {given.out}", file=sys.stderr)
        return 130
    if say is print:
        report = write_report(given.out)
        say(report.read_text())
        say(f"{time.perf_counter() - started:.0f} s in all; the report with its pictures: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
