"""The weights that are published beside the study's results are those that its records speak of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from examples.mnist.attacks import perturb
from examples.mnist.data import load
from examples.mnist.presets import PRESETS
from examples.mnist.records import read
from examples.mnist.results import KINDS, Results
from examples.mnist.study import Study
from examples.mnist.views import attacked

FULL, FOLDER = PRESETS["full"], Path(__file__).parents[1] / "docs" / "results" / "sodef_mnist"
WEIGHTS = sorted((FOLDER / "records").glob("*.safetensors"))
IMAGES = 500


@pytest.fixture(scope="module")
def results() -> Results:
    """The published records."""
    return Results(FOLDER)


def model_of(path: Path) -> str:
    """The model whose training left these weights."""
    return read(path.with_suffix(".json"))["config"]["model"]["name"]


@pytest.mark.parametrize("path", WEIGHTS, ids=model_of)
def test_published_weights_are_those_that_every_record_of_their_model_names(results: Results, path: Path) -> None:
    """Their digest is the one under which the model was attacked, and under which others were shown its images."""
    digest, name = hashlib.sha256(path.read_bytes()).hexdigest()[:12], model_of(path)
    configs = [
        record["config"]
        for kind in KINDS
        if kind != "train"
        for where, record in results.found(kind)
        if where[:2] == (name, 0)
    ]
    assert configs and {config["weights"] for config in configs} == {digest}


def test_published_weights_are_small() -> None:
    """At most 2 MB each, as a repository should hold, and those of the compared models are all there."""
    assert all(path.stat().st_size <= 2_000_000 for path in WEIGHTS)
    assert {"M0", "M0-conv", "M1", "M3", "M4", "M5"} <= {model_of(path) for path in WEIGHTS}


@pytest.fixture(scope="module")
def study() -> Study:
    """The full preset's study in the folder of its published results, which computes nothing."""
    if "ODELAYERS_MNIST" not in os.environ:
        pytest.skip("ODELAYERS_MNIST names no folder with MNIST")
    found = Study(FULL, load(say=lambda text: None), FOLDER, 0, torch.device("cpu"))
    found.records.computes = False
    found.adopt()
    return found


def standing(study: Study, name: str) -> tuple[int, ...]:
    """Which of the first test images stand under the first of the white-box attacks within L2 1.5, FGSM."""
    threat = next(threat for threat in FULL.suite.threats if str(threat) == "L2 1.5")
    method = next(group for group in FULL.suite.groups if group.name == "white-box").attacks[0]
    view, test = attacked(study.load(name, 0), 1, torch.Generator()), study.data.test.first(IMAGES)
    found = perturb(view, test.images, test.labels, threat, method, torch.Generator())
    return tuple((view(found).argmax(1) == test.labels).int().tolist())


def apart(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """On how many images they differ."""
    return sum(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["M0", "M1", "M3", "M5"])
def test_published_weights_fall_where_the_records_say(study: Study, results: Results, name: str) -> None:
    """FGSM breaks the same of 500 images, but for one in a hundred that rounding may decide; control: no other's."""
    found = standing(study, name)
    differ = {
        other: apart(found, results.attacks("L2 1.5", other, "white-box")["FGSM ce"].first(IMAGES).counts)
        for other in ("M0", "M1", "M3", "M5")
    }
    assert differ.pop(name) <= IMAGES // 100
    assert min(differ.values()) > IMAGES // 20
