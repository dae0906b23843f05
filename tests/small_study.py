"""A study small enough for tests, and what its records hold."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from examples.mnist import cells, data as mnist_data, runner, study
from examples.mnist.attacks import PGD, Square, Threat, Transfer
from examples.mnist.models import Block
from examples.mnist.presets import PRESETS, Group, Model, Probe, Suite
from examples.mnist.training import Phase

CPU = torch.device("cpu")
ONE = (Phase("block", 1),)
NOISY = Block("sde", t1=2.0, steps=4, p=0.1)
THREATS = (Threat("l2", 0.5), Threat("linf", 0.3))
SMALL = replace(
    PRESETS["smoke"],
    widths=(2, 2, 4),
    models=(
        Model("M0", "features + head", Block("none"), None, (Phase("all", 1, lr=3e-3),), seeds=2),
        Model("M3", "SODEF", Block("ode", t1=2.0, tolerance=1e-3), "M0", (*ONE, Phase("all", 1)), True, seeds=2),
        Model("M4", "SODEF_0.9", NOISY, "M3", ONE, True, seeds=2),
        Model("M5", "as long", replace(NOISY, p=0.0), "M3", ONE, True, seeds=2),
        Model("M13", "masker", Block("staircase"), "M0"),
    ),
    suite=Suite(
        THREATS,
        (
            Group("white-box", (PGD("ce", 3),), 8),
            Group("bypass", (PGD("margin", 3),), 8, "around"),
            Group("adjoint", (PGD("margin", 2),), 4, "adjoint"),
            Group("directions", (PGD("margin", 3),), 8, "directions"),
            Group("transfer", (Transfer(PGD("margin", 3)),), 8, "others", ("M0",)),
            Group("black-box", (Square(4),), 4, models=("M0", "M4", "M13")),
        ),
        Probe(4, THREATS[1], (("l2", (0.5,)),), (2, 3), ((THREATS[0], 3),), 4),
        2,
        4,
    ),
    spectrum_points=5,
    train_images=128,
    validation_images=40,
    test_images=40,
)
PLAN = cells.plan(SMALL)


def run(out: Path, data: mnist_data.Dataset, preset=SMALL, seed: int = 0, **options) -> Path:
    """A run of the study in this process, silent."""
    about = {"preset": preset.name, "warning": preset.warning, "data": data.name, "banner": data.banner, "seed": seed}
    make = partial(study.Study, preset, data, out, seed, CPU)
    return runner.run(make, preset, about, out, **{"say": lambda text: None, **options})


def results(out: Path) -> dict[str, dict]:
    """What each record of a folder holds."""
    return {path.name: json.loads(path.read_text())["result"] for path in sorted((out / "records").glob("*.json"))}


def without_times(found: object) -> object:
    """The same but for the times among the results."""
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in ("milliseconds_128", "seconds")}
    return [without_times(value) for value in found] if isinstance(found, list) else found
