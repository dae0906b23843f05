"""The study as a whole: a kill loses one stage, records say what was computed, and the report is the records."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.mnist import data as mnist_data, records, runner, study
from examples.mnist.results import Results
from examples.mnist.scores import Scores
from small_study import CPU, PLAN, SMALL, THREATS, results, run, without_times


@pytest.fixture(scope="module")
def digits():
    return mnist_data.load("digits")


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A small study that ran through unbroken."""
    out = tmp_path_factory.mktemp("unbroken")
    run(out, digits)
    return out


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
    monkeypatch.setattr(runner, "write", killed)
    compute = records.Records.stage
    monkeypatch.setattr(
        records.Records,
        "stage",
        lambda self, name, config, f, save=None: compute(
            self, name, config, lambda: computed.append(name) or f(), save
        ),
    )
    for _ in range(len(PLAN) + 1):
        with pytest.raises(Killed):
            run(tmp_path, digits)
    run(tmp_path, digits)
    assert len(computed) == 2 * len(PLAN), "a stage is computed once in vain and once for good"
    assert without_times(results(tmp_path)) == without_times(results(finished))
    assert (tmp_path / "run.json").read_text() == (finished / "run.json").read_text()


def test_a_second_run_computes_nothing(digits, finished, monkeypatch):
    """Every stage of a finished study is found."""
    monkeypatch.setattr(records, "write", lambda path, content: pytest.fail(f"{path} was computed again"))
    run(finished, digits)


def test_a_changed_configuration_is_computed_and_the_old_records_stay(digits, finished, tmp_path):
    """Other attacks reuse the trained models alone; another seed reuses nothing."""
    out = Path(shutil.copytree(finished, tmp_path / "copy"))
    before = set(results(out))
    suite = replace(SMALL.suite, groups=(replace(SMALL.suite.groups[0], images=4), *SMALL.suite.groups[1:]))
    run(out, digits, replace(SMALL, suite=suite))
    new = set(results(out)) - before
    assert len(new) == 2 * 9 and all("white-box" in name for name in new)
    assert before < set(results(out))
    first = PLAN[0]
    keys = [study.Study(SMALL, digits, out, seed, CPU).do(first).key for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_a_broken_record_is_an_error_that_names_it(tmp_path):
    """What is no JSON is not computed over in silence."""
    (tmp_path / "records").mkdir()
    keeper = records.Records(tmp_path)
    record = keeper.stage("one", {"a": 1}, lambda: {"x": 2})
    path = tmp_path / "records" / record.file
    path.write_text("{")
    with pytest.raises(RuntimeError, match=re.escape(str(path))):
        keeper.stage("one", {"a": 1}, lambda: {"x": 2})


def test_the_key_of_a_record_covers_its_configuration(tmp_path):
    """Any change of the configuration, and only that, changes the key; results are computed once per key."""
    keeper, calls = records.Records(tmp_path), []
    for config in ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}, {"a": 1, "b": [2, 1]}, {"a": 1.5, "b": [1, 2]}):
        keeper.stage("one", config, lambda config=config: calls.append(config) or {})
    assert len(calls) == 3


@pytest.mark.parametrize(("known", "name"), [({"cpu_name": "AMD EPYC"}, "AMD EPYC"), ({}, platform.machine())])
def test_a_record_names_the_processor_that_computed_it(tmp_path, monkeypatch, known, name):
    """Its maker chooses the kernels, and with them which weights a recipe gives; where it is not known, its kind."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = records.Records(tmp_path).stage("one", {}, dict)
    assert record["machine"] == f"{name}, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("name", ["M0", "M3", "M4", "M5", "M13"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_attacks_are_scored_within_their_threat_and_worst_is_worst(finished, name, threat):
    """No image leaves its ball; without noise the worst case is the minimum over attacks, sample by sample."""
    found, everything = Results(finished), []
    for group in found.named("group"):
        record = found.record("attack", name, 0, str(threat), group)
        if record:
            assert record.result["largest_change"] <= threat.eps * (1 + 1e-5)
            assert all(attack["queries"] > 0 for attack in record.result["attacks"].values())
        everything += found.attacks(str(threat), name, group).values()
    worst, clean = found.worst(str(threat), name), found.clean(name)
    assert (len(worst) == 8 and all(w <= c for w, c in zip(worst.counts, clean.counts, strict=False))) or name == "M4"
    if name != "M4":
        everything.append(clean.first(8))
        for i, count in enumerate(worst.counts):
            assert count == min(scores.counts[i] for scores in everything if i < len(scores))


def test_the_hand_made_masker_has_no_gradient_at_all(finished):
    """The positive control: every gradient of M13 is zero, none of M0's is."""
    found = Results(finished)
    assert found.record("probe", "M13").result["zero_gradients"] == {"ce": 1.0, "margin": 1.0}
    assert found.record("probe", "M0").result["zero_gradients"]["margin"] == 0.0


def test_only_what_draws_noise_is_probed_with_more_draws(finished):
    """A noisy model's gradient is averaged over other numbers of draws too; a still one's record knows none."""
    found = Results(finished)
    noisy, still = (found.record("probe", name) for name in ("M4", "M5"))
    probes = [[row["probe"] for row in record.result["probes"]] for record in (noisy, still)]
    assert set(probes[0]) - set(probes[1]) == {"3 draws", "3 directions"}
    assert {"eot", "apart"} == set(noisy["config"]["probe"]) - set(still["config"]["probe"])
    assert set(noisy.result["gradients_apart"]) == {"longest", "mean", "directions"}
    assert "gradients_apart" not in still.result


def test_scores_come_back_from_their_record():
    """Counts up to the most draws, packed as one character a sample."""
    noisy = Scores(74, (0, 74, 9), (False, True, True), (1, 73, 10))
    plain = Scores(1, (0, 1), (False, True), (0, 1))
    for scores in (noisy, plain):
        assert Scores.unpack(json.loads(json.dumps(scores.pack()))) == scores
    with pytest.raises(ValueError, match="at most 74 draws, got 75"):
        Scores(75, (75,), (True,), (75,)).pack()


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
        (["--jobs", "0"], "expected an int >= 1, got '0'"),
        (["--budget", "-1"], "expected a number of minutes >= 0, got '-1'"),
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
@pytest.mark.timeout(600)
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
    assert without_times(results(broken)) == without_times(results(tmp_path / "unbroken"))
