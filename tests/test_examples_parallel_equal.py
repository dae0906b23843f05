"""Several processes train as one: the same gradients, statistics and weights up to rounding, under torchrun."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from torchrun import launched

SCRIPT = """
import sys
import torch
from examples.mnist.adversary import Adversary
from examples.mnist.data import Dataset, Split, load
from examples.mnist.models import Block, Classifier
from examples.mnist.parallel import Processes, joined
from examples.mnist.penalties import Constraints
from examples.mnist.training import SGD, Phase, train
from odelayers import LyapunovRegularizer

torch.set_num_threads(1)
with joined("cpu"):
    small = load("digits").first(90, 20, 20)  # batches of 43, 43 and 4: the shares are not equal
    wide = [Split(s.images.double(), s.labels) for s in (small.train, small.validation, small.test)]
    data = Dataset("digits", *wide)  # in float64 rounding is not blown up by channels that hardly vary
    everywhere = Constraints(LyapunovRegularizer.sodef_mnist(samples=None))
    phases = (
        Phase("block", 1, 1e-2, batch=43, optimiser=SGD(), penalty=everywhere),
        Phase("all", 1, 1e-2, batch=43, optimiser=SGD()),
        Phase("head", 1, 1e-2, batch=43),
    )
    torch.manual_seed(0)
    model = Classifier((8, 8, 16), Block("ode", t1=1.0, tolerance=1e-6), head="linear").double()
    seen, step = [], torch.optim.SGD.step
    def watched(self, *given, **options):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return step(self, *given, **options)
    torch.optim.SGD.step = watched
    log = train(model, data, phases, False, 0, "M")
    log += train(model, data, (Phase("all", 1, batch=43, adversary=Adversary(steps=1)),), False, 0, "runs")
    assert [line["steps"] for line in log] == [3] * 4
    kept = {"log": [line["loss"] for line in log[:3]], "gradients": seen, "weights": None}
    torch.manual_seed(0)
    model = Classifier((8, 8, 16), Block("ode", t1=1.0, tolerance=1e-6), head="linear").double()
    train(model, data, phases, False, 0, "M")
    kept["weights"] = model.state_dict()
    torch.save(kept, f"{sys.argv[1]}/{Processes.now().rank}.pt")
"""

CERTIFIED = """
import sys
import torch
from examples.mnist.certified import Recipe
from examples.mnist.certified_training import train
from examples.mnist.data import Dataset, Split, load
from examples.mnist.parallel import Processes, joined

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
with joined("cpu"):
    small = load("digits").first(90, 20, 20)
    wide = [Split(s.images.double(), s.labels) for s in (small.train, small.validation, small.test)]
    model, log = train(Recipe(squeeze=4, convolutions=(4,), dense=(8,), epochs=2, batch=43), Dataset("digits", *wide))
    kept = {"weights": model.state_dict(), "loss": [line["loss"] for line in log]}
    torch.save(kept, f"{sys.argv[1]}/{Processes.now().rank}.pt")
"""

NORMS = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel
from examples.mnist.parallel import Processes, joined

torch.manual_seed(0)
images, to = torch.randn(7, 3, 4, 4, dtype=torch.float64) * 3 + 5, torch.randn(7, 3, 4, 4, dtype=torch.float64)
with joined("cpu"):
    processes, layer = Processes.now(), torch.nn.BatchNorm2d(3).double()
    processes.prepare(layer, torch.device("cpu"))
    x = processes.share(images).clone().requires_grad_()
    for _ in range(2):
        y = layer(x)
    (y * processes.share(to)).sum().backward()
    torch.save({"y": y.detach(), "x": x.grad, "slope": layer.weight.grad, **layer.state_dict()},
               f"{sys.argv[1]}/{processes.rank}.pt")
    for strange in (torch.nn.BatchNorm2d(3, momentum=None), torch.nn.BatchNorm1d(3)):
        try:
            processes.prepare(torch.nn.Sequential(strange), torch.device("cpu"))
        except ValueError as error:
            assert "0: expected a BatchNorm2d with" in str(error)
        else:
            raise AssertionError(strange)
"""


@pytest.mark.slow
def test_batch_normalisation_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    """Output, gradients and running statistics are torch's on the joined rows, 4 and 3; one's rows give others."""
    first, second = launched(tmp_path / "two", 2, NORMS)
    torch.manual_seed(0)
    images, to = torch.randn(7, 3, 4, 4, dtype=torch.float64) * 3 + 5, torch.randn(7, 3, 4, 4, dtype=torch.float64)
    layer, x = torch.nn.BatchNorm2d(3).double(), images.clone().requires_grad_()
    for _ in range(2):
        y = layer(x)
    (y * to).sum().backward()
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
    close(torch.cat([first["y"], second["y"]]), y)
    close(torch.cat([first["x"], second["x"]]), x.grad)
    close(first["slope"] + second["slope"], layer.weight.grad)
    for name, value in layer.state_dict().items():
        close(first[name], value)
        assert torch.equal(first[name], second[name])
    assert (torch.nn.BatchNorm2d(3).double()(images[:4]) - first["y"]).abs().max() > 0.01


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """Gradients, losses and weights equal one process's, batch normalisation included, with unequal shares."""
    (one,), (first, second) = launched(tmp_path / "one", 1, SCRIPT), launched(tmp_path / "two", 2, SCRIPT)
    assert len(one["gradients"]) == len(first["gradients"]) == 12  # two phases of SGD, three steps, two trainings
    assert all(max(g.abs().max() for g in step) > 1e-3 for step in one["gradients"])
    for mine, other, alone in zip(first["gradients"], second["gradients"], one["gradients"], strict=True):
        for a, b, c in zip(mine, other, alone, strict=True):
            assert torch.equal(a, b), "the processes hold the same averaged gradient"
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7 * max(1.0, c.abs().max().item()))
    assert first["log"] == pytest.approx(one["log"], rel=1e-7) and first["log"] == second["log"]
    for name, tensor in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_two_processes_train_the_certified_model_as_one(tmp_path):
    """Its weights and losses after six steps are those of one process, the scaled rows of its layers included."""
    (one,), pair = launched(tmp_path / "one", 1, CERTIFIED), launched(tmp_path / "two", 2, CERTIFIED)
    for found in pair:
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-9)
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-7, atol=1e-9)
