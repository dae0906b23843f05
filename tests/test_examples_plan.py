"""The study's plan and what its cells share: models picked by name, M14's row, images made once, trainings resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.mnist import data as mnist_data, evaluation
from examples.mnist.accuracy import states
from examples.mnist.attacks import AutoAttack, Method, Threat
from examples.mnist.certified import CertifiedClassifier, Recipe
from examples.mnist.models import Block, Classifier
from examples.mnist.penalties import Constraints
from examples.mnist.plane import plane_cell
from examples.mnist.presets import PRESETS, Group, Model, Probe, Suite
from examples.mnist.report import _recipe
from examples.mnist.study import Study
from examples.mnist.training import Adam, Phase, train
from examples.mnist.unfinished import Unfinished
from examples.mnist.views import attacked, surrogate
from small_study import CPU, NOISY, PLAN, SMALL, run, without_times

RECIPE = Recipe(squeeze=4, convolutions=(4,), dense=(16,), epochs=1)
GROUPS = SMALL.suite.groups[:2]
CERTIFIED = Model("M14", "certified", Block("none"), certified=RECIPE)


@pytest.fixture(scope="module")
def digits():
    return mnist_data.load("digits")


def cells_of(out):
    return json.loads((out / "run.json").read_text())["cells"]


def test_models_picked_by_name_are_computed_with_what_they_need_and_the_rest_is_found_later(digits, tmp_path):
    """M3 brings M0's training along and nothing else; a later run for M0 keeps M3's cells in its manifest."""
    run(tmp_path, digits, models=["M3"])
    done = {(cell["model"], cell["kind"]) for cell in cells_of(tmp_path) if cell["file"]}
    assert {model for model, _ in done} == {"M0", "M3"} and {kind for m, kind in done if m == "M0"} == {"train"}
    run(tmp_path, digits, models=["M0"], minutes=0)
    assert {(cell["model"], cell["kind"]) for cell in cells_of(tmp_path) if cell["file"]} == done
    with pytest.raises(ValueError, match="models: expected names of M0, M3, M4, M5, M13, got M99"):
        run(tmp_path, digits, models=["M99"])


def test_further_seeds_are_attacked_on_one_image_in_so_many_and_some_groups_once(digits, tmp_path):
    """Of 8 images the second seed's model sees the first 2; a group that is run once leaves it out."""
    group = Group("white-box", SMALL.suite.groups[0].attacks, 8)
    suite = replace(SMALL.suite, groups=(group, replace(group, name="again", once=True)), thin=4)
    run(tmp_path, digits, replace(SMALL, suite=suite), models=["M0"])
    sizes = {}
    for cell in cells_of(tmp_path):
        if cell["model"] == "M0" and cell["kind"] == "attack":
            record = json.loads((tmp_path / "records" / cell["file"]).read_text())
            sizes.setdefault((cell["group"], cell["seed"]), record["result"]["n"])
    assert sizes == {("white-box", 0): 8, ("white-box", 1): 2, ("again", 0): 8}


def test_transferred_images_are_made_once_and_are_the_same_for_every_model(digits, tmp_path, monkeypatch):
    """Crafted once for a seed and threat, shown to M3, M4, M5 and M13; the scores are those of images made anew."""
    crafted, craft = [], evaluation.craft
    monkeypatch.setattr("examples.mnist.study.craft", lambda *a: crafted.append(a[-1]) or craft(*a))
    study = Study(SMALL, digits, tmp_path / "first", 0, CPU)
    shown = [c for c in PLAN if c.group and c.group.name == "transfer" and c.seed == 0]
    first = [study.do(cell).result for cell in shown]
    assert len(crafted) == len({cell.threat for cell in shown}) < len(shown)
    last = Study(SMALL, digits, tmp_path / "second", 0, CPU).do(shown[-1]).result
    assert without_times(last) == without_times(first[-1])


def test_the_certified_model_is_a_row_of_the_study(digits, tmp_path):
    """Trained, scored, certified, attacked and attacked around its blocks; no attack goes below the certificate."""
    preset = replace(SMALL, models=(*SMALL.models, CERTIFIED), suite=replace(SMALL.suite, groups=GROUPS))
    run(tmp_path, digits, preset, models=["M14"])
    found = {}
    for cell in (cell for cell in cells_of(tmp_path) if cell["model"] == "M14"):
        record = json.loads((tmp_path / "records" / cell["file"]).read_text())
        found[cell["kind"], cell["group"], cell["threat"]] = record["result"]
    clean = found["clean", None, None]
    assert set(clean["certified"]) == {"0.5", "1.0", "1.58"} and clean["lipschitz"] >= 1
    white, around = (found["attack", group, "L2 0.5"] for group in ("white-box", "bypass"))
    assert set(around["attacks"]) == {"PGD-3 margin through identity"}
    data = digits.first(128, 40, 40)
    study = Study(preset, digits, tmp_path, 0, CPU)
    model = study.load("M14", 0)
    proven = model.certified_radius(data.test.images[:8], data.test.labels[:8]) > 0.5
    for result in (white, around):
        for scores in result["attacks"].values():
            right = torch.tensor([count != "0" for count in scores["counts"]])
            assert not (proven & ~right).any()


def test_the_route_around_the_certified_blocks_has_the_models_values(digits):
    """The bypass of M14 changes the gradient alone: that of the head on the pixels themselves."""
    torch.manual_seed(0)
    model, noise = CertifiedClassifier(RECIPE).requires_grad_(False), torch.Generator()
    x = digits.test.images[:3].clone().requires_grad_()
    around = surrogate(model, "identity", 1, noise)(x)
    torch.testing.assert_close(around, attacked(model, 1, noise)(x))
    (gradient,) = torch.autograd.grad(around.sum(), x)
    expected = torch.autograd.grad(model.head(model.features(x)).sum(), x)[0]
    torch.testing.assert_close(gradient, expected)


def test_autoattack_gets_one_draw_a_call(digits, monkeypatch):
    """It averages over calls of its own; what it finds, and all other attacks, see the suite's draws at once."""
    torch.manual_seed(0)
    model, seen = Classifier((2, 2, 4), NOISY).eval().requires_grad_(False), []

    def run(self, view, x, *rest, gradient_from, **options):
        seen.append((view(x).shape[0], gradient_from and gradient_from(x).shape[0]))
        return x

    monkeypatch.setattr(Method, "run", run)
    group = Group("rand", (AutoAttack("rand"), SMALL.suite.groups[0].attacks[0]))
    suite = Suite((), (), Probe(1, Threat("l2", 1.0), (), ()), draws=5, judging_draws=2)
    evaluation.attack_cell(model, digits.test.first(2), Threat("l2", 0.5), group, suite, {}, 0, "")
    assert seen == [(5, 1), (5, None)]


@pytest.mark.parametrize("block", [Block("ode", t1=2.0), Block("sde", t1=2.0, steps=4), NOISY])
def test_half_the_solver_s_step_is_the_same_model_solved_more_finely(block):
    """The weights are shared and the original stays; Euler at half the step ends nearer to the ODE."""
    torch.manual_seed(0)
    model = Classifier((2, 2, 4), block).eval().requires_grad_(False)
    fine, z = model.finer(), torch.randn(5, 64).tanh()
    assert fine.block.f is model.block.f and fine.features is model.features and fine.noisy == model.noisy
    if block.kind == "sde":
        assert (model.block.solver.steps, fine.block.solver.steps) == (4, 8)
    else:
        assert fine.block.solver.rtol == model.block.solver.rtol / 32
    if not model.noisy:
        exact = Classifier((2, 2, 4), Block("ode", t1=2.0, tolerance=1e-6)).eval()
        exact.block.f.load_state_dict(model.block.f.state_dict())
        far, near = ((m.end(z) - exact.end(z)).norm().item() for m in (model, fine))
        assert near < 0.7 * far + 1e-6


def test_the_plane_is_that_of_the_two_principal_components(digits):
    """The share of variance is numpy's; in the plane, states and arrows are the orthogonal projections of theirs."""
    torch.manual_seed(0)
    model, data = Classifier((2, 2, 4), Block("ode", t1=2.0)).eval().requires_grad_(False), digits.test.first(30)
    found, z = plane_cell(model, data, 0), states(model, data.images)
    path = model.block.solve(z, torch.linspace(0, 2, 41)).zs.double().numpy()
    flat = path.reshape(-1, 64)
    centre = flat.mean(0)
    values, vectors = np.linalg.eigh(np.cov((flat - centre).T))
    assert found["explained"] == pytest.approx(values[-2:].sum() / values.sum(), rel=1e-4)
    tracks, axes = np.array(found["tracks"]), vectors[:, :-3:-1]
    axes *= np.sign(axes.sum(0))
    np.testing.assert_allclose(tracks, (path - centre) @ axes, atol=2e-4)
    grid, arrows = np.array(found["grid"]), np.array(found["field"])
    f = model.block.f(torch.from_numpy(centre + grid @ axes.T).float()).double().numpy()
    np.testing.assert_allclose(arrows, f @ axes, atol=5e-4)
    assert (grid.min(0) < tracks.min((0, 1))).all() and (grid.max(0) > tracks.max((0, 1))).all()


class Killed(BaseException):
    """A kill, in place of the signal."""


PHASES = (
    Phase("all", 2, lr=3e-3, batch=32, one_cycle=True, average=0.9),
    Phase("block", 2, batch=32, optimiser=Adam(amsgrad=True), penalty=Constraints()),
)


@pytest.mark.parametrize("kept", range(1, 5))
def test_a_training_that_is_killed_goes_on_to_the_same_weights(kept, digits, tmp_path, monkeypatch):
    """Killed right after each epoch in turn, with averaged weights, schedule, noise and penalty draws: equal bits."""
    few = digits.first(96, 20, 20)

    def trained(unfinished: Unfinished) -> tuple[Classifier, list]:
        torch.manual_seed(0)
        model = Classifier((2, 2, 4), NOISY)
        return model, train(model, few, PHASES, False, 0, "", unfinished)

    whole, log = trained(Unfinished())
    unfinished, keep, count = Unfinished(tmp_path / "training"), Unfinished.keep, []

    def killed(self: Unfinished, **state: object) -> None:
        keep(self, **state)
        count.append(state["epoch"])
        if len(count) == kept:
            raise Killed

    monkeypatch.setattr(Unfinished, "keep", killed)
    with pytest.raises(Killed):
        trained(unfinished)
    resumed, again = trained(unfinished)
    assert len(count) == 4 and without_times(again) == without_times(log)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_study_leaves_no_unfinished_training_behind(digits, tmp_path):
    """The file is gone once the training is recorded; one that is none is an error that names it."""
    run(tmp_path, digits, models=["M0"])
    assert not list((tmp_path / "records").glob("*.unfinished"))
    path = tmp_path / "broken"
    path.write_text("{")
    with pytest.raises(RuntimeError, match="broken: expected a training to go on with, got"):
        Unfinished(path).load()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_every_recipe_of_the_plan_can_be_told_from_its_record(preset):
    """As it stands in JSON: an epoch's number, and of a penalty its kind and all its constants."""
    for model in preset.models:
        text = _recipe(json.loads(json.dumps(model.trained_as)))
        assert all(f"{phase.epochs} x {phase.trains}" in text for phase in model.phases)
        assert all(f"penalty {phase.penalty.kind}: " in text for phase in model.phases if phase.penalty)
    if preset.name == "full":
        said = _recipe(json.loads(json.dumps(preset.model("M2").trained_as)))
        assert "constraints: field 0.2 diagonal 10 dominance 10 field_scale 50" in said and "axis column" in said
