"""The end-time study: the net is the blog's, its attacks do what they say, and its report is its records."""

from __future__ import annotations

import importlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.mnist import data as mnist_data, records
from examples.mnist.attacks import input_gradient
from examples.mnist.end_time import study, training
from examples.mnist.end_time.cells import dynamics_cell, fgsm_images, table_cell
from examples.mnist.end_time.models import EndTimeNet, FractionalPool, Steps
from examples.mnist.end_time.presets import BLOG, PRESETS, Pgd, Row
from examples.mnist.end_time.report import write_report
from examples.mnist.scores import wilson

CPU = torch.device("cpu")
COARSE = Steps(density=2)
SMALL = replace(
    PRESETS["smoke"],
    rows=(
        Row("a", "small", 2, (10.0, 10.0), 2),
        Row("b", "small", 2, (10.0, 100.0), 2),
        Row("c", "small", 2, (1.0, 1.0), 1, Pgd(size=0.2, steps=2)),
        Row("d", "large", 128, (1.0, 1.0), 1, needs_gpu=True),
    ),
    training=COARSE,
    evaluation=COARSE,
    checks=(Steps(density=4), Steps(tolerance=1e-2)),
    columns=(1.0, 10.0),
    times=(0.1, 1.0, 10.0),
    curve_images=10,
    drawn=("a",),
    strong_images=4,
    dynamics_images=20,
    train_images=256,
    validation_images=10,
    test_images=20,
)
STAGES = 3 * (1 + 2 + 3 + 4) + 2
digits = pytest.fixture(scope="module")(lambda: mnist_data.load("digits"))


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A small study that ran through unbroken."""
    out = tmp_path_factory.mktemp("unbroken")
    study.run(SMALL, digits, out, 0, CPU)
    return out


@pytest.fixture(scope="module")
def report(finished):
    """Its report."""
    return write_report(finished).read_text()


def results(out: Path) -> dict[str, dict]:
    """What each record of a folder holds."""
    return {path.name: json.loads(path.read_text())["result"] for path in sorted((out / "records").glob("*.json"))}


@pytest.mark.parametrize(("channels", "parameters"), [(16, 17_418), (128, 655_370)])
def test_the_net_has_the_blogs_parameters(channels, parameters):
    """The small and the large net have as many parameters as the blog counts."""
    assert sum(p.numel() for p in EndTimeNet(channels, COARSE).parameters()) == parameters


def test_the_pooling_is_fixed_in_evaluation_and_drawn_in_training():
    """Evaluation gives one answer, that of torch's own pooling at the fixed regions; training and `draws` do not."""
    pool, x = FractionalPool(3), torch.rand(5, 3, 28, 28)
    assert not torch.equal(pool(x), pool(x))
    pool.eval()
    assert torch.equal(pool(x), pool(x))
    assert torch.equal(pool(x)[:2], pool(x[:2])), "the regions do not depend on the batch"
    own = nn.FractionalMaxPool2d(2, output_size=7, _random_samples=pool.fixed.repeat(5, 1, 1))
    assert torch.equal(pool(x), own(x)) and pool(x).shape == (5, 3, 7, 7)
    assert torch.equal(pool(x), FractionalPool(3).eval()(x)), "every net has the same regions"
    pool.draws = True
    assert not torch.equal(pool(x), pool(x))


def test_the_graded_grid_holds_its_ends_and_grows_with_time():
    """Steps lie equally apart in log(1 + t), each end time is met exactly, and twice the density halves them."""
    ends = [1.0, 10.0, 500.0]
    for density in (3, 6):
        times, places = Steps(density=density).times(ends)
        assert times[0] == 0 and [times[k] for k in places] == ends
        logs = torch.tensor(times).log1p().diff()
        assert (logs <= 1 / density + 1e-5).all()
        assert len(times) <= density * math.log1p(500) + len(ends) + 1
    assert Steps(tolerance=1e-3).times(ends) == ([0.0, *ends], [1, 2, 3])
    with pytest.raises(ValueError, match="either a tolerance or a density"):
        Steps()


def test_the_graded_grid_solves_the_ode():
    """It comes to the state of a tight adaptive solve at order 2, with one output time and with two."""
    torch.manual_seed(0)
    fine = EndTimeNet(4, Steps(tolerance=1e-9)).double().eval()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        exact = fine.states(x, [0.2, 1.0])
        errors = []
        for density in (32, 64, 128):
            net = EndTimeNet(4, Steps(density=density)).double().eval()
            net.load_state_dict(fine.state_dict())
            found = torch.cat([net.states(x, [0.2, 1.0]), net.states(x, [1.0])])
            errors.append(((found - exact[[0, 1, 1]]).norm() / exact.norm()).item())
    assert errors[0] < 0.2
    assert errors[0] / errors[1] > 2.5 and errors[1] / errors[2] > 2.5, errors


def test_the_field_has_one_size_everywhere_so_there_is_no_equilibrium():
    """f ends in a normalisation of each channel: |f|^2 is the sum of weight^2 + bias^2, whatever the state."""
    torch.manual_seed(0)
    net = EndTimeNet(16, COARSE)
    last = net.block.f[-1]
    with torch.no_grad():
        last.weight.uniform_(0.5, 2)
        last.bias.normal_()
    size = (last.weight.square() + last.bias.square()).mean().sqrt()
    for scale in (1e-1, 1.0, 1e3):
        z = scale * torch.randn(6, 16, 7, 7) + scale
        assert torch.allclose(net.block.f(z).flatten(1).square().mean(1).sqrt(), size, rtol=1e-3)


def test_fgsm_clipped_and_unclipped_differ_where_pixels_are_black_or_white():
    """Unclipped every pixel moves by eps and leaves [0, 1]; clipped is the same cut to [0, 1], pixel by pixel."""
    torch.manual_seed(0)
    net = EndTimeNet(4, COARSE).eval().requires_grad_(False)
    x, y = torch.rand(6, 1, 28, 28).round(decimals=1), torch.arange(6)
    unclipped, clipped, margins = fgsm_images(net.at(1.0), x, y, 0.3)
    gradient, expected = input_gradient(net.at(1.0), x, y)
    moved = gradient != 0
    assert torch.allclose((unclipped - x).abs()[moved], torch.tensor(0.3))
    assert unclipped.min() < 0 and unclipped.max() > 1
    assert torch.equal(clipped, unclipped.clamp(0, 1)) and not torch.equal(clipped, unclipped)
    assert torch.equal(margins, expected)


def test_training_against_pgd_stays_in_the_ball_and_raises_the_loss():
    """The adversarial half of a batch lies within eps of the images and in [0, 1], and the loss there is higher."""
    torch.manual_seed(0)
    net, images, labels = EndTimeNet(4, COARSE), torch.rand(8, 1, 28, 28), torch.arange(8)
    statistics = net.stem[1].running_mean.clone()
    spec = Pgd(eps=0.1, size=0.02, steps=10)
    found = training.pgd(net, images, labels, 1.0, spec, torch.Generator().manual_seed(0))
    assert not net.pool.draws
    assert (found - images).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    net.eval().pool.draws = True
    loss = [torch.stack([nn.functional.cross_entropy(net(x, 1.0), labels) for _ in range(20)]).mean()
            for x in (images, found)]  # fmt: skip
    assert loss[1] > loss[0]
    net.pool.draws = False
    assert torch.equal(statistics, net.stem[1].running_mean), "making the images leaves the net as it was"


def test_the_random_end_times_fill_their_interval():
    """U(10, 100) is drawn for every batch; a fixed end time is itself."""
    times = torch.Generator().manual_seed(0)
    drawn = [training._end(Row("r", "small", 2, (10.0, 100.0), 1), times) for _ in range(200)]
    assert 10 <= min(drawn) < 15 and 95 < max(drawn) <= 100
    assert training._end(Row("r", "small", 2, (10.0, 10.0), 1), times) == 10


def test_a_cell_is_the_accuracy_of_the_net_on_its_images(digits):
    """Clean accuracy in the cell is that of the logits; the states' settling ends at cosine 1."""
    torch.manual_seed(0)
    net, data = EndTimeNet(2, COARSE).eval().requires_grad_(False), digits.test.first(30)
    cell = table_cell(net, data, 10.0, 0.3, "x")
    assert cell["clean"] == pytest.approx((net(data.images, 10.0).argmax(1) == data.labels).float().mean().item())
    moves = dynamics_cell(net, data, [0.1, 1.0, 10.0], "x")
    assert moves["field_cosine"]["median"][-1] == pytest.approx(1, abs=1e-5)
    assert moves["state"]["low"][-1] > moves["state"]["high"][0], "the state grows"


def test_a_saturated_cross_entropy_has_no_gradient_and_the_cell_says_so(digits):
    """Where logits make the softmax exact, right answers have no gradient of cross-entropy, but one of the margin."""
    torch.manual_seed(0)
    net, data = EndTimeNet(2, COARSE).eval().requires_grad_(False), digits.test.first(30)
    net.head.weight.mul_(1e5)
    right = (net(data.images, 1.0).argmax(1) == data.labels).float().mean().item()
    zero = dynamics_cell(net, data, [1.0], "x")["zero_gradients"]
    assert right > 0
    assert zero["ce"][0] == pytest.approx(right, abs=0.05)
    assert zero["margin"][0] == 0


def test_a_study_that_is_killed_at_every_stage_ends_with_the_same_tables(
    digits, finished, report, tmp_path, monkeypatch
):
    """Each start is killed while it writes its first new record; the report at the end is the unbroken run's."""
    whole, started = records.write, set()

    class Killed(BaseException):
        pass

    def killed(path, content):
        if path.name in started:
            whole(path, content)
        else:  # half a file, under its temporary name, and gone
            started.add(path.name)
            path.with_name(path.name + ".1.part").write_text(json.dumps(content)[:50])
            raise Killed

    monkeypatch.setattr(records, "write", killed)
    for _ in range(STAGES):
        with pytest.raises(Killed):
            study.run(SMALL, digits, tmp_path, 0, CPU)
    study.run(SMALL, digits, tmp_path, 0, CPU)
    assert results(tmp_path) == results(finished) and len(results(finished)) == STAGES
    assert (tmp_path / "run.json").read_text() == (finished / "run.json").read_text()
    clock = "## Training"  # from here on the report has seconds
    assert write_report(tmp_path).read_text().split(clock)[0] == report.split(clock)[0]


def test_a_second_run_computes_nothing(digits, finished, monkeypatch):
    """Every stage of a finished study is found."""
    monkeypatch.setattr(records, "write", lambda path, content: pytest.fail(f"{path} was computed again"))
    study.run(SMALL, digits, finished, 0, CPU)


def test_the_report_is_drawn_from_the_records_alone(finished, report, tmp_path):
    """Without weights the same report comes out; each cell has the record's number, its interval and the blog's."""
    out = Path(shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("*.pt", "*.png")))
    text = write_report(out).read_text()
    assert text == report
    for picture, caption in re.findall(r"!\[.*?\]\((.*?)\)(?:\n\n\*(.*)\*)?", text):
        assert (out / picture).stat().st_size > 10_000 and re.search(r"\d", caption), picture
    assert "\npython examples/end_time_mnist.py --preset " in text
    run = json.loads((out / "run.json").read_text())
    for row, blog in (("a", BLOG["small", "10"]), ("b", BLOG["small", "U(10, 100)"])):
        for end in (1, 10):
            cell = json.loads((out / "records" / run["rows"][row]["table"][f"{end}"]).read_text())["result"]
            for key, said in zip(("clean", "unclipped"), blog[end], strict=True):
                low, high = wilson(cell[key], cell["n"])
                wanted = f"{100 * cell[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}] (blog {said:g})"
                assert wanted in text, (row, end, key)


def test_what_was_not_run_is_named_so(report, digits, tmp_path, monkeypatch):
    """The large net needs a GPU and says it; a run that was stopped has a report with what is missing named."""
    assert "| large, T = 1 (not run: needs a GPU) | clean | - | - |" in report
    monkeypatch.setattr(study, "table_cell", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        study.run(SMALL, digits, tmp_path, 0, CPU)
    text = write_report(tmp_path).read_text()
    assert "| small, T = 10 (not run yet) | clean | - (blog 49.45) | - (blog 98.64) |" in text
    assert "What random pooling did" not in text


def test_every_table_of_a_small_run_says_that_it_is_no_evidence(report):
    """The warning of the preset and the name of the stand-in data stand on each table."""
    captions = [line for line in report.splitlines() if line.startswith("**")]
    assert len(captions) == 5  # the blog's, drawn pooling, solver, strong attacks, training
    assert all("a smoke run, not evidence" in line and "NOT MNIST" in line for line in captions)


def test_the_presets_are_the_blogs_rows():
    """Every preset has the blog's end times, T = 1 and adversarial training; the full one both nets and t = 500."""
    for preset in PRESETS.values():
        small = [row for row in preset.rows if row.net == "small"]
        assert [row.trained_to for row in small] == ["1", "10", "U(10, 100)", "100", "1"]
        assert [row.pgd is not None for row in small] == [False] * 4 + [True]
    full = PRESETS["full"]
    assert {row.channels for row in full.rows} == {16, 128} and full.columns == (1, 10, 100, 500)
    assert all(row.needs_gpu for row in full.rows if row.net == "large")
    assert full.rows[4].pgd == Pgd(eps=0.3, size=0.01, steps=40) and full.times[0] == 0.1 and full.times[-1] == 1000
    assert full.warning is None and PRESETS["quick"].warning and PRESETS["smoke"].warning


def test_the_command_runs_a_study(tmp_path, capsys, monkeypatch):
    """`main` prints banners and report and ends with status 0; a wrong argument ends with status 2."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")  # as `python examples/end_time_mnist.py` has it
    script = importlib.import_module("end_time_mnist")
    smoke = script.PRESETS["smoke"]
    few = {"times": (0.1, 1.0), "columns": (1.0,), "checks": (), "train_images": 128, "test_images": 10}
    row = replace(smoke.rows[0], channels=2, batches=1)
    monkeypatch.setitem(script.PRESETS, "smoke", replace(smoke, rows=(row,), strong_images=2, **few))
    threads = torch.get_num_threads()
    assert script.main(["--preset", "smoke", "--data", "digits", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "NOT MNIST" in out and "# What the end time of a neural ODE does" in out
    with pytest.raises(SystemExit) as stop:
        script.main(["--preset", "slow"])
    assert stop.value.code == 2
