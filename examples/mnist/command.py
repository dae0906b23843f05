"""The command line that the studies share: arguments, data, banners, and what a stop leaves behind."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .data import DataError, Dataset, load

__all__ = ["main", "minutes", "whole"]

Say = Callable[..., None]


def main(
    name: str,
    about: str | None,
    presets: Mapping[str, Any],
    compute: Callable[[Any, Dataset, argparse.Namespace, Say], object],
    write_report: Callable[[Path], Path],
    argv: list[str] | None = None,
    *,
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    say: Say = print,
) -> int:
    """Run the study `name` as the command line says; returns the exit status.

    `options` adds arguments of the study's own. Of several processes that compute together one has a `say`, `print`.
    """
    given, started = arguments(name, about, presets, options, argv), time.perf_counter()
    torch.set_num_threads(given.threads)
    try:
        data = load(given.data, say=say)
    except DataError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    preset = presets[given.preset]
    for text in (data.banner, preset.warning):
        if text:
            say(f"*** {text} ***")
    try:
        compute(preset, data, given, partial(say, flush=True))
    except KeyboardInterrupt:
        say(f"\nstopped; the same command goes on from what is in {given.out}", file=sys.stderr)
        return 130
    if say is print:
        report = write_report(given.out)
        say(report.read_text())
        say(f"{time.perf_counter() - started:.0f} s in all; the report with its pictures: {report}")
    return 0


def arguments(
    name: str,
    about: str | None,
    presets: Mapping[str, Any],
    options: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None,
) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets), default="quick", help="how much to do (default: quick)")
    parser.add_argument("--out", type=Path, help=f"folder of the results (default: runs/{name}-PRESET)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder with MNIST's four IDX files, or 'digits' for scikit-learn's; "
        "default: $ODELAYERS_MNIST, else the cache folder, else a download",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="seed of weights, order, noise and attacks (default: 0)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    # The operations are small: a second thread gains little, loses much as soon as another process wants its core, and
    # changes the last digits. One thread gives the same numbers on every machine of a kind.
    parser.add_argument("--threads", type=whole(1), default=1, help="CPU threads of one operation (default: 1)")
    options(parser)
    given = parser.parse_args(argv)
    given.out = given.out or Path("runs") / f"{name}-{given.preset}"
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out: {given.out} is a file, expected a folder")
    try:
        given.device = _usable_device(given.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return given


def _usable_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        ValueError: torch does not know it or cannot use it here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an AssertionError is what a torch without CUDA raises
        raise ValueError(f"torch cannot use {name!r} here ({str(error).splitlines()[0]}); try cpu") from error


def whole(least: int) -> Callable[[str], int]:
    """An argument that is an int of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an int >= {least}, got {text!r}")
        return int(text)

    return number


def minutes(text: str) -> float:
    """An argument that is a time in minutes."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes >= 0, got {text!r}")
    return found
