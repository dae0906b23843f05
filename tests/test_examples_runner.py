"""Which cells a study has, in which order they are computed, and what happens where some cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from examples.mnist import cells, data as mnist_data, study
from examples.mnist.presets import PRESETS
from small_study import PLAN, SMALL, THREATS, results, run, without_times


@pytest.fixture(scope="module")
def digits():
    return mnist_data.load("digits")


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A small study that ran through unbroken."""
    out = tmp_path_factory.mktemp("unbroken")
    run(out, digits)
    return out


@pytest.mark.slow
def test_two_processes_find_what_one_finds(digits, finished, tmp_path):
    """With --jobs the cells are shared out, none before what it needs, and the numbers are the same."""
    lines: list[str] = []
    run(tmp_path, digits, jobs=2, say=lines.append)
    assert without_times(results(tmp_path)) == without_times(results(finished))
    names = [line.split("] ")[1].split(":")[0] for line in lines]
    for cell in PLAN:
        assert all(names.index(need.name) < names.index(cell.name) for need in cells.needs(SMALL, cell))


def test_a_budget_that_is_spent_begins_nothing_and_a_later_run_goes_on(digits, finished, tmp_path):
    """Cells come by value: what was asked in advance first, with all seeds; what is missing is None, not lost."""
    lines: list[str] = []
    run(tmp_path, digits, minutes=0.0, say=lines.append)
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert all(cell["file"] is None and cell["lost"] is None for cell in manifest["cells"])
    assert lines == [f"{len(PLAN)} cells were not begun within 0 minutes; run again to go on"]
    asked = [cell for cell in PLAN if cell.model in ("M4", "M5") and cell.threat in (None, THREATS[0])]
    asked = [cell for cell in asked if cell.kind in ("train", "clean", "attack")]
    rest = [cell for cell in PLAN if cell.model == "M13" or cell.threat == THREATS[1]]
    assert max(map(PLAN.index, asked)) < min(map(PLAN.index, rest))
    assert {cell.seed for cell in asked} == {0, 1}


def test_what_a_cell_needs_comes_before_it():
    """In every preset's plan; and each cell is there once."""
    for preset in (SMALL, *PRESETS.values()):
        plan = cells.plan(preset)
        place = {cell: i for i, cell in enumerate(plan)}
        assert len(place) == len(plan) == len({cell.name for cell in plan})
        assert all(place[need] < place[cell] for cell in plan for need in cells.needs(preset, cell))


def test_a_start_that_comes_later_is_refused():
    """A model cannot start from one that is not trained yet, or with too few seeds."""
    first, second, *_ = SMALL.models
    for models in ((second, first), (replace(first, seeds=1), second)):
        with pytest.raises(ValueError, match="M3 starts from M0 with 2 seeds, which comes later or has"):
            replace(SMALL, models=models)


def test_a_model_that_diverged_takes_its_descendants_with_it_and_nothing_else(digits, tmp_path, monkeypatch):
    """Its cells are lost with the reason, also those of the models that start from it; the others are computed."""
    train = study.Study._train
    monkeypatch.setattr(
        study.Study,
        "_train",
        lambda self, model, spec, *rest: (
            {"diverged": "loss inf"} if spec.name == "M3" else train(self, model, spec, *rest)
        ),
    )
    run(tmp_path, digits)
    found = json.loads((tmp_path / "run.json").read_text())["cells"]
    for cell in found:
        trained = cell["model"] == "M3" and cell["kind"] == "train"
        lost = cell["model"] in ("M3", "M4", "M5") and not trained
        assert (cell["file"] is None) == lost and bool(cell["lost"]) == lost, cell


WORKING = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from examples.mnist.runner import _begin
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (object,))
    pool.submit(time.sleep, 600)
    while not pool._processes:
        time.sleep(0.02)
    print(*pool._processes, flush=True)
    time.sleep(600)
"""


def test_the_processes_of_a_run_that_is_killed_end_with_it(tmp_path):
    """After SIGKILL nobody is left to stop them, and they would go on with their cells for minutes or hours."""
    script = tmp_path / "working.py"
    script.write_text(WORKING)
    root = Path(__file__).parents[1]
    command, environment = [sys.executable, str(script)], {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.kill()
    for _ in range(300):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process outlived its run by half a minute")


def by_two(out: Path, *options: str) -> tuple[str, list[dict]]:
    """What two processes of torchrun say of the smoke study on the digits, and the cells of their manifest."""
    script = Path(__file__).parents[1] / "examples" / "sodef_mnist.py"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [*line, "--preset", "smoke", "--data", "digits", "--out", str(out), *options],
        env=environment, text=True, capture_output=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "run.json").read_text())["cells"]


@pytest.mark.slow
def test_ranks_of_torchrun_begin_nothing_when_their_time_is_over(tmp_path):
    """Neither a training nor, without it, what needs it; a later run goes on."""
    said, found = by_two(tmp_path, "--budget", "0")
    assert f"{len(found)} cells were not begun within 0 minutes" in said
    assert not any(cell["file"] for cell in found) and not list((tmp_path / "records").glob("*.json"))


@pytest.mark.slow
def test_ranks_of_torchrun_share_the_cells(tmp_path):
    """Two processes on the digits end with every cell recorded once, and one of them reports."""
    said, found = by_two(tmp_path)
    assert all(cell["file"] for cell in found)
    assert len(list((tmp_path / "records").glob("*.json"))) == len(found)
    assert said.count("the report with its pictures") == 1
    trained = [json.loads(path.read_text())["result"] for path in (tmp_path / "records").glob("train-*.json")]
    assert {result["processes"] for result in trained} == {2}, "what they cost is told"
