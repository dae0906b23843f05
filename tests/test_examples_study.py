"""The study as a whole: a kill loses one stage, records say what was computed, and the report is the records."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.mnist import data as mnist_data, records, study
from examples.mnist.attacks import Attack, Threat
from examples.mnist.models import Block
from examples.mnist.presets import PRESETS, Model, Suite
from examples.mnist.report import write_report
from examples.mnist.training import Phase

CPU = torch.device("cpu")
ONE = (Phase("block", 1),)
NOISY = Block("sde", t1=2.0, steps=4, p=0.1)
SMALL = replace(
    PRESETS["smoke"],
    widths=(2, 2, 4),
    models=(
        Model("M0", "features + head", Block("none"), None, (Phase("all", 1, lr=3e-3),)),
        Model("M3", "SODEF", Block("ode", t1=2.0, tolerance=1e-3), "M0", (*ONE, Phase("all", 1)), regularised=True),
        Model("M4", "SODEF_0.9", NOISY, "M3", ONE, regularised=True),
        Model("M5", "as long", replace(NOISY, p=0.0), "M3", ONE, regularised=True),
        Model("M13", "masker", Block("staircase"), "M0"),
    ),
    suite=Suite(8, (Threat("l2", 0.5), Threat("linf", 0.3)), (Attack("ce", 3),), (Attack("margin", 3),), 2, 4),
    spectrum_points=5,
    train_images=128,
    validation_images=40,
    test_images=40,
)
STAGES = 5 + 1 + 5 + 10  # trainings, spectra, clean scores, attacks


@pytest.fixture(scope="module")
def digits():
    return mnist_data.load("digits")


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A small study that ran through unbroken."""
    out = tmp_path_factory.mktemp("unbroken")
    study.run(SMALL, digits, out, 0, CPU)
    return out


def results(out: Path) -> dict[str, dict]:
    """What each record of a folder holds."""
    return {path.name: json.loads(path.read_text())["result"] for path in sorted((out / "records").glob("*.json"))}


def without_times(results: Any) -> Any:
    """The same but for the times among the results."""
    if isinstance(results, list):
        return [without_times(r) for r in results]
    if not isinstance(results, dict):
        return results
    return {k: without_times(v) for k, v in results.items() if k not in ("milliseconds_128", "seconds")}


def test_a_study_that_is_killed_at_every_stage_ends_with_the_same_numbers(digits, finished, tmp_path, monkeypatch):
    """Each start is killed while it writes its first new record; finished stages are read, and the numbers agree."""
    whole, started = records.write, []

    class Killed(BaseException):
        pass

    def killed(path, content):
        if path.name in started:
            whole(path, content)
        else:  # half a file, under its temporary name, and gone
            started.append(path.name)
            path.with_name(path.name + ".1.part").write_text(json.dumps(content)[:50])
            raise Killed

    computed = []
    monkeypatch.setattr(records, "write", killed)
    monkeypatch.setattr(study, "write", killed)
    compute = records.Records.stage
    monkeypatch.setattr(
        records.Records,
        "stage",
        lambda self, name, config, f: compute(self, name, config, lambda path: computed.append(name) or f(path)),
    )
    for _ in range(STAGES + 1):
        with pytest.raises(Killed):
            study.run(SMALL, digits, tmp_path, 0, CPU)
    study.run(SMALL, digits, tmp_path, 0, CPU)
    assert len(computed) == 2 * STAGES, "a stage is computed once in vain and once for good"
    assert without_times(results(tmp_path)) == without_times(results(finished))
    assert (tmp_path / "run.json").read_text() == (finished / "run.json").read_text()


def test_a_second_run_computes_nothing(digits, finished, monkeypatch):
    """Every stage of a finished study is found."""
    monkeypatch.setattr(records, "write", lambda path, content: pytest.fail(f"{path} was computed again"))
    study.run(SMALL, digits, finished, 0, CPU)


def test_a_changed_configuration_is_computed_and_the_old_records_stay(digits, finished, tmp_path, capsys):
    """Another attack suite reuses the trained models alone; another seed reuses nothing."""
    out = Path(shutil.copytree(finished, tmp_path / "copy"))
    before = set(results(out))
    study.run(replace(SMALL, suite=replace(SMALL.suite, images=4)), digits, out, 0, CPU)
    new = set(results(out)) - before
    assert len(new) == 10 and all(name.startswith("attack-") for name in new)
    assert "of another configuration are left alone" in capsys.readouterr().out
    assert before < set(results(out))
    first = SMALL.models[0]
    keys = [study.Study(SMALL, digits, out, seed, CPU).train(first).key for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_a_broken_record_is_an_error_that_names_it(tmp_path):
    """What is no JSON is not computed over in silence."""
    (tmp_path / "records").mkdir()
    keeper = records.Records(tmp_path, 1, say=lambda line: None)
    record = keeper.stage("one", {"a": 1}, lambda weights: {"x": 2})
    path = tmp_path / "records" / record.file
    path.write_text("{")
    with pytest.raises(RuntimeError, match=re.escape(str(path))):
        keeper.stage("one", {"a": 1}, lambda weights: {"x": 2})


def test_the_key_of_a_record_covers_its_configuration(tmp_path):
    """Any change of the configuration, and only that, changes the key; results are computed once per key."""
    keeper, calls = records.Records(tmp_path, 1, say=lambda line: None), []
    for config in ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}, {"a": 1, "b": [2, 1]}, {"a": 1.5, "b": [1, 2]}):
        keeper.stage("one", config, lambda weights, config=config: calls.append(config) or {})
    assert len(calls) == 3


def test_the_report_is_drawn_from_the_records_alone(finished, tmp_path):
    """Without weights, data or library state the same report comes out, and its numbers are the records'."""
    out = Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("*.pt")))
    text = write_report(out).read_text()
    assert text == write_report(finished).read_text()
    assert (out / "accuracy.png").stat().st_size > 10_000 and (out / "spectra.png").stat().st_size > 10_000
    run = json.loads((out / "run.json").read_text())
    for threat, files in run["attacks"].items():
        section = text.split(f"## Under {threat}")[1].split("##")[0]
        for name, file in files.items():
            worst = json.loads((out / "records" / file).read_text())["result"]["worst"]
            share = 100 * sum(worst["share"]) / len(worst["share"])
            assert re.search(rf"\| {name} \|.*\| {share:.1f} \[", section), (threat, name)


def test_every_table_of_a_small_run_says_that_it_is_no_evidence(finished):
    """The warning of the preset and the name of the stand-in data stand on each table."""
    text = write_report(finished).read_text()
    captions = [line for line in text.splitlines() if line.startswith("**")]
    assert len(captions) == 1 + len(SMALL.suite.threats) + 2  # the paper, threats, constraints, cost
    assert all("a smoke run, not evidence" in line and "NOT MNIST" in line for line in captions)


def cells(out: Path, name: str) -> list[dict]:
    return [r for file, r in results(out).items() if file.startswith(f"attack-{name}-") and r["n"] == 8]


@pytest.mark.parametrize("name", ["M0", "M3", "M4", "M5", "M13"])
def test_attacks_are_scored_within_their_threat_and_worst_is_worst(finished, name):
    """No image leaves its ball; without noise the worst case is the minimum over attacks, sample by sample."""
    for cell, eps in zip(cells(finished, name), (0.5, 0.3), strict=True):
        assert cell["largest_change"] <= eps * (1 + 1e-5)
        assert name == "M13" or cell["largest_change"] > 0
        if name != "M4":
            attacks = [attack["share"] for attack in cell["attacks"].values()]
            assert cell["worst"]["share"] == [min(shares) for shares in zip(*attacks, strict=True)]
            assert all(w <= c for w, c in zip(cell["worst"]["share"], cell["clean"]["share"], strict=True))


def test_the_hand_made_masker_has_no_gradient_at_all(finished):
    """The positive control: every gradient of M13 is zero, none of M0's is."""
    assert all(cell["zero_gradients"] == {"ce": 1.0, "margin": 1.0} for cell in cells(finished, "M13"))
    assert all(cell["zero_gradients"]["margin"] == 0.0 for cell in cells(finished, "M0"))


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The study's command line in a process of its own."""
    root = Path(__file__).parents[1]
    line = [sys.executable, "-u", str(root / "examples" / "sodef_mnist.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "slow"], "invalid choice: 'slow'"),
        (["--seed", "-1"], "expected an int >= 0, got '-1'"),
        (["--seed", "two"], "expected an int >= 0, got 'two'"),
        (["--threads", "0"], "expected an int >= 1, got '0'"),
        (["--device", "abacus"], "torch cannot use 'abacus' here"),
        (["--data", "/no/such/folder"], "--data: expected a folder with MNIST's four IDX files"),
        (["--out", __file__], "is a file, expected a folder"),
    ],
)
def test_bad_arguments_are_clear_errors(arguments, message, capsys, monkeypatch):
    """Each wrong argument ends with status 2 and one line that says what was expected."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")  # as `python examples/sodef_mnist.py` has it
    main = importlib.import_module("sodef_mnist").main
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_survives_a_real_kill(tmp_path):
    """The smoke preset on the digits, killed by SIGKILL and started again, ends with the unbroken run's numbers."""
    arguments = ["--preset", "smoke", "--data", "digits", "--out"]
    unbroken = command(*arguments, str(tmp_path / "unbroken"))
    out, err = unbroken.communicate(timeout=300)
    assert unbroken.returncode == 0, err
    assert "NOT MNIST" in out
    broken = tmp_path / "broken"
    for wanted in (3, 10):
        process = command(*arguments, str(broken))
        while process.poll() is None and len(list(broken.glob("records/*.json"))) < wanted:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = command(*arguments, str(broken))
    out, err = last.communicate(timeout=300)
    assert last.returncode == 0, err
    assert out.count("already done") >= 10
    assert without_times(results(broken)) == without_times(results(tmp_path / "unbroken"))
