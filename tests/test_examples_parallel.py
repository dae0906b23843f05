"""Several processes train as one: the same gradients and weights up to rounding, under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.mnist.parallel import Processes, joined
from examples.mnist.records import Record
from examples.mnist.results import seconds_of
from examples.mnist.unfinished import Unfinished

ROOT = Path(__file__).parents[1]
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

KILLED = """
import sys
from pathlib import Path
import torch
from examples.mnist.adversary import Adversary
from examples.mnist.data import load
from examples.mnist.models import Block, Classifier
from examples.mnist.parallel import Processes, joined
from examples.mnist.training import Phase, train
from examples.mnist.unfinished import Unfinished

class Killed(BaseException):
    pass

class Stopped(Unfinished):
    def keep(self, **state):
        super().keep(**state)
        torch.distributed.barrier()  # who is killed reads what was written
        raise Killed

torch.set_num_threads(1)
with joined("cpu"):
    data, rank = load("digits").first(90, 20, 20), Processes.now().rank
    phases = (Phase("all", 3, batch=45, average=0.9, adversary=Adversary(steps=2)),)
    path = Path(sys.argv[1]) / "training"

    def trained(unfinished):
        torch.manual_seed(0)
        model = Classifier((2, 2, 4), Block("sde", p=0.1, steps=4))
        train(model, data, phases, True, 0, "M", unfinished)
        return model.state_dict()

    whole, stops = trained(Unfinished()), 0
    while True:
        try:
            resumed = trained((Stopped if stops < 3 else Unfinished)(path, rank == 0))
            break
        except Killed:
            stops += 1
    torch.save({"whole": whole, "resumed": resumed, "stops": stops}, f"{sys.argv[1]}/{rank}.pt")
"""

FAILING = """
import sys
import torch
from odelayers import GradientError
from examples.mnist.adversary import Adversary
from examples.mnist.data import load
from examples.mnist.models import Block, Classifier
from examples.mnist.parallel import Processes, joined
from examples.mnist.training import Diverged, Phase, train

def refuse(gradient):
    raise GradientError("there is none in this process")

class Refusing(Classifier):
    def end(self, z, generator=None, t1=None):
        end = super().end(z, generator, t1)
        if end.requires_grad and Processes.now().rank == 1 and self.training == self.refuses_in_training:
            end.register_hook(refuse)
        return end

def failure(adversary):
    model = Refusing((2, 2, 4), Block("ode", t1=1.0))
    model.refuses_in_training = adversary is None
    train(model, load("digits").first(90, 20, 20), (Phase("all", 1, batch=45, adversary=adversary),), False, 0, "M")

torch.set_num_threads(1)
with joined("cpu"):
    try:
        failure(Adversary(steps=1))
    except Diverged as error:
        with open(f"{sys.argv[1]}/{Processes.now().rank}.txt", "w") as file:  # one stdout would mix what both say
            file.write(str(error))
    failure(None)
"""


def launched(folder: Path, count: int, text: str = SCRIPT) -> list[dict]:
    """What each of `count` processes of torchrun left behind."""
    done = started(folder, count, text)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def started(folder: Path, count: int, text: str) -> subprocess.CompletedProcess[str]:
    """`count` processes of torchrun that run the script `text` in a new folder, which is its argument."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(text)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*run, str(script), str(folder)], env=environment, text=True, capture_output=True, timeout=110, cwd=folder
    )


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    """Gradients, losses and weights equal one process's, batch normalisation included, with unequal shares."""
    (one,), (first, second) = launched(tmp_path / "one", 1), launched(tmp_path / "two", 2)
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


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_weights(tmp_path):
    """Stopped after each of three epochs, each with noise and attacks of its own, they end at the same bits."""
    for left in launched(tmp_path / "two", 2, KILLED):
        assert left["stops"] == 3
        for name, value in left["whole"].items():
            assert torch.equal(value, left["resumed"][name]), name


@pytest.mark.slow
def test_a_failure_in_one_process_ends_the_others_too(tmp_path):
    """One without a gradient: in the attack both diverge, in the backward pass the run ends; neither waits for ever."""
    done = started(tmp_path / "two", 2, FAILING)
    assert done.returncode != 0
    said = [(tmp_path / "two" / f"{rank}.txt").read_text() for rank in range(2)]
    assert re.fullmatch(r"M: .* the solve or the loss of another process failed", said[0])
    assert re.fullmatch(r"M: .* there is none in this process", said[1])
    assert "RuntimeError: one of 2 processes has no gradient; train by one" in done.stderr


def test_a_training_of_two_processes_is_not_gone_on_with_by_one(tmp_path):
    """The other's noise and samples would be lost in silence: the error names the file and says how many began it."""
    Unfinished(path := tmp_path / "training").keep(generators=[[], []])
    with pytest.raises(RuntimeError, match="training: expected a training begun by 1 processes, got one by 2"):
        Unfinished(path).load(1)


def test_shares_make_up_the_batch_and_their_weights_make_up_its_mean():
    """Every row is in one share, and the average of weighted means over processes is the mean over the batch."""
    values = torch.randn(11)
    rows = torch.randperm(11)
    processes = [Processes(rank, 3) for rank in range(3)]
    shares = [p.share(rows) for p in processes]
    assert torch.equal(torch.cat(shares), rows)
    means = [p.weight(mine, rows) * values[mine].mean() for p, mine in zip(processes, shares, strict=True)]
    torch.testing.assert_close(torch.stack(means).mean(), values.mean())
    with pytest.raises(ValueError, match="a batch of 2 cannot be shared by 3 processes"):
        processes[0].share(rows[:2])


def test_a_training_costs_what_its_processes_took_together():
    """Two that train half as long have cost as much as one; a record of one process need not say so."""
    epochs = [{"seconds": 2.0}, {"seconds": 3.0}]
    record = Record(result={"epochs": epochs, "processes": 2}, seconds=4.0)  # goes on after a kill: its epochs count
    assert seconds_of(record) == 10.0
    del record["result"]["processes"]
    assert seconds_of(record) == 5.0


def test_outside_torchrun_there_is_one_process(monkeypatch):
    """Nothing is joined, shared or wrapped without torchrun's environment."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with joined("cpu") as device:
        alone = Processes.now()
        assert device.type == "cpu" and alone == Processes(0, 1)
        module, rows = torch.nn.Linear(1, 1), torch.arange(5)
        assert alone.wrap(module) is module and torch.equal(alone.share(rows), rows) and alone.weight(rows, rows) == 1
