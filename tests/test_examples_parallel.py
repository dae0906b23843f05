"""Several processes that train together: what one does when another fails or is killed, and how they share."""

from __future__ import annotations

import re

import pytest
import torch

from examples.mnist.parallel import Processes, joined
from examples.mnist.records import Record
from examples.mnist.results import seconds_of
from examples.mnist.unfinished import Unfinished
from torchrun import launched, started

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
from odelayers import GradientError, SolveError, Status
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

class Failing(Classifier):
    def end(self, z, generator=None, t1=None):
        if self.training and Processes.now().rank == 1:
            raise SolveError("a solve", (0,), (0.5,), Status.BLOW_UP)
        return super().end(z, generator, t1)

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
    try:
        phase = Phase("all", 1, batch=45, adversary=Adversary("trades", steps=1))
        train(Failing((2, 2, 4), Block("ode", t1=1.0)), load("digits").first(90, 20, 20), (phase,), False, 0, "T")
    except Diverged as error:
        with open(f"{sys.argv[1]}/trades-{Processes.now().rank}.txt", "w") as file:
            file.write(str(error))
    failure(None)
"""


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_weights(tmp_path):
    """Stopped after each of three epochs, each with noise and attacks of its own, they end at the same bits."""
    for left in launched(tmp_path / "two", 2, KILLED):
        assert left["stops"] == 3
        for name, value in left["whole"].items():
            assert torch.equal(value, left["resumed"][name]), name


@pytest.mark.slow
def test_a_failure_in_one_process_ends_the_others_too(tmp_path):
    """Without a gradient in the attack, or a solve under TRADES, both diverge; in the backward pass the run ends."""
    done = started(tmp_path / "two", 2, FAILING)
    assert done.returncode != 0
    said = [(tmp_path / "two" / f"{rank}.txt").read_text() for rank in range(2)]
    assert re.fullmatch(r"M: .* the solve or the loss of another process failed", said[0])
    assert re.fullmatch(r"M: .* there is none in this process", said[1])
    trades = [(tmp_path / "two" / f"trades-{rank}.txt").read_text() for rank in range(2)]
    assert "another process failed" in trades[0] and "a solve" in trades[1]
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
