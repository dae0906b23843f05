"""What an attack sees of a model, the statistics of its scores, and nothing of its noise or block left out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest

from examples.mnist import data, evaluation
from examples.mnist.attacks import PGD, Threat, input_gradient
from examples.mnist.certified import CertifiedClassifier, Recipe
from examples.mnist.data import Split
from examples.mnist.models import Block, Classifier
from examples.mnist.presets import PRESETS, Group, Probe, Suite
from examples.mnist.scores import Scores, holm, mcnemar, wilson, worst
from examples.mnist.views import DIRECTIONS, QUIET, attacked, surrogate
from odelayers import Adjoint, Backprop, GradientError, ODEBlock

DIGITS = data.load("digits").test
IMAGES, LABELS = DIGITS.images[:6], DIGITS.labels[:6]
NOISY = Block("sde", t1=2.0, steps=4, p=0.1)


@pytest.fixture
def noisy():
    torch.manual_seed(0)
    return Classifier((2, 2, 4), NOISY).eval().requires_grad_(False)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_stays_on_in_the_attacked_model(noisy):
    """In evaluation mode the attacked model draws noise anew at every call, and several draws at once."""
    images = IMAGES
    view = attacked(noisy, 5, generator())
    first, second = view(images), view(images)
    assert first.shape == (5, 6, 10)
    assert not torch.equal(first, second)
    assert first.std(0).min() > 0
    assert torch.equal(attacked(noisy, 5, generator())(images), first), "the generator alone decides"


def test_without_noise_one_draw_is_all():
    """p = 0 is deterministic: SODEF's control is attacked as it is."""
    model = Classifier((2, 2, 4), replace(NOISY, p=0.0)).eval()
    view = attacked(model, 5, generator())
    images = IMAGES
    assert view(images).shape == (6, 10)
    assert torch.equal(view(images), view(images))


@pytest.mark.parametrize("route", ["identity", 0.2])
def test_a_surrogate_has_the_models_values_and_another_gradient(route):
    """The bypass changes the gradient alone: that of head(features(x)), or of the flow to the earlier end time."""
    torch.manual_seed(0)
    model = Classifier((2, 2, 4), Block("ode", t1=2.0)).eval().requires_grad_(False)
    images, labels = IMAGES, LABELS
    view, bypass = attacked(model, 1, generator()), surrogate(model, route, 1, generator())
    torch.testing.assert_close(bypass(images), view(images))
    own, _ = input_gradient(view, images, labels, "margin")
    found, _ = input_gradient(bypass, images, labels, "margin")
    assert (own - found).norm() > 1e-3 * own.norm()
    x = images.clone().requires_grad_()  # the margin's gradient, with the classes the model itself puts first
    z = model.features(x)
    logits = model.head(z if route == "identity" else model.end(z, t1=route))
    others = view(images).scatter(1, labels[:, None], float("-inf")).argmax(1)
    expected = (logits.gather(1, others[:, None]) - logits.gather(1, labels[:, None])).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, x)[0], rtol=1e-4, atol=1e-6)


def test_the_noiseless_route_has_the_noisy_values_and_the_noiseless_gradient():
    """The draws' logits are the model's, and every draw's gradient is that of the block without noise; the model's own
    is another, and its noise stays on."""
    torch.manual_seed(0)
    model = Classifier((2, 2, 4), NOISY).eval().requires_grad_(False)
    view, other = attacked(model, 5, generator()), surrogate(model, QUIET, 5, generator())
    x, weights = IMAGES.clone().requires_grad_(), torch.randn(5, len(IMAGES), 10, generator=generator())
    logits, own = other(x), view(x)
    torch.testing.assert_close(logits, own)
    assert logits.std(0).min() > 0
    quiet = Classifier((2, 2, 4), replace(NOISY, noise_at_test=False)).eval()
    quiet.load_state_dict(model.state_dict())
    found, expected, noisy = (
        torch.autograd.grad((out * w).sum(), x)[0]
        for out, w in ((logits, weights), (quiet(x), weights.sum(0)), (own, weights))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert (noisy - found).norm() > 1e-2 * found.norm()
    assert model.block.noise_in_eval and not torch.equal(view(x), own)


def test_directions_give_every_draw_the_same_weight(noisy):
    """The logits are the model's. Every draw's gradient at the state that enters the block is scaled to length 1, so
    that a loss ten thousand times as large on one draw changes nothing; without, it decides all (the control)."""
    own, unit = attacked(noisy, 5, generator()), surrogate(noisy, DIRECTIONS, 5, generator())
    x, weights = IMAGES.clone().requires_grad_(), torch.randn(5, len(IMAGES), 10, generator=generator())
    found = {}
    for scale in (1.0, 1e4):
        weights[2] *= scale
        for view in (own, unit):
            view.noise.manual_seed(3)
            found[view, scale] = torch.autograd.grad((view(x) * weights).sum(), x)[0]
    with torch.no_grad():
        state = noisy.features(x).repeat(5, 1)
    state.requires_grad_()
    logits = noisy.head(noisy.end(state, generator(3))).reshape(5, len(x), 10)
    unit.noise.manual_seed(3)
    torch.testing.assert_close(unit(x), logits)
    (per_draw,) = torch.autograd.grad((logits * weights).sum(), state)
    directions = (per_draw / per_draw.norm(dim=1, keepdim=True)).reshape(5, len(x), -1).sum(0)
    (expected,) = torch.autograd.grad((noisy.features(x) * directions).sum(), x)
    for scale in (1.0, 1e4):
        torch.testing.assert_close(found[unit, scale], expected, rtol=1e-4, atol=1e-6)
    assert found[own, 1e4].norm() > 100 * found[own, 1.0].norm()


def test_a_group_by_directions_and_its_probes_follow_them(noisy, monkeypatch):
    """A group's gradients are the surrogate's, not the model's own; a probe has both, over as many draws; of one draw
    the direction is the gradient's, and is left out."""
    seen = []

    def kept(view, images, labels, threat, method, *rest, gradient_from=None, **options):
        seen.append((threat, view, input_gradient(gradient_from or view, images, labels, "margin")[0]))
        return images

    monkeypatch.setattr(evaluation, "perturb", kept)
    threat, data = Threat("l2", 0.5), DIGITS.first(6)
    group = Group("directions", (PGD("margin", 7),), None, "directions")
    far = Threat("l2", 9.0)
    suite = Suite((), (), Probe(6, threat, (), (7,), ((far, 1), (far, 2))), draws=5, judging_draws=2)
    record = evaluation.attack_cell(noisy, data, threat, group, suite, {}, 1, "")
    assert list(record["attacks"]) == ["PGD-7 margin through directions"]
    own, other = (
        input_gradient(view, IMAGES, LABELS, "margin")[0]
        for view in (attacked(noisy, 5, generator()), surrogate(noisy, DIRECTIONS, 5, generator()))
    )
    torch.testing.assert_close(seen[0][2], other, rtol=1e-4, atol=1e-6)
    assert (own - other).norm() > 0.1 * other.norm()
    evaluation.probe_cell(noisy, data, suite, 1, "")
    probed = [(view.draws, view.directions) for where, view, _ in seen if where == far]
    assert probed == [(1, False), (2, False), (2, True)]


def test_how_far_gradients_lie_apart():
    """Known gradients: eight directions of which one is nine times as long decide the mean, and not that of the
    directions; equal ones agree and share the length in eighths."""
    labels = torch.zeros(2, dtype=torch.long)
    data = Split(torch.zeros(2, 1, 1, 2), labels)

    def view(lengths, angles):
        calls = iter(zip(lengths, angles, strict=True))

        def logits(x):
            length, angle = next(calls)
            towards = length * torch.tensor([math.cos(angle), math.sin(angle)])
            return torch.stack([torch.zeros(len(x)), x.flatten(1) @ towards], 1)

        return logits

    equal, long = [1.0] * 8, [1.0] * 7 + [9.0]
    same, turned = [0.3] * 8, [0.0] * 7 + [math.pi / 2]
    found = evaluation.apart(view(equal, same), view(equal, same), data, 8)
    assert found == pytest.approx({"longest": 1 / 8, "mean": 1, "directions": 1})
    found = evaluation.apart(view(long, turned), view(equal, turned), data, 8)
    mean, directions = (math.cos(math.atan2(up, 3)) for up in (9, 1))  # of the odd calls; the even ones are the axis
    assert found == pytest.approx({"longest": 9 / 16, "mean": mean, "directions": directions}, rel=1e-5)


def test_the_adjoint_route_has_the_models_values_and_nearly_its_gradient():
    """Solved backwards, the gradient of a mild field is the own one up to the tolerance; the block keeps its own."""
    torch.manual_seed(0)
    model = Classifier((2, 2, 4), Block("ode", t1=2.0)).eval().requires_grad_(False)
    assert model.routes == ("identity", 0.2) and model.spec.has_adjoint
    view, other = attacked(model, 1, generator()), surrogate(model, "adjoint", 1, generator())
    assert torch.equal(other(IMAGES), view(IMAGES))
    own, _ = input_gradient(view, IMAGES, LABELS, "margin")
    found, _ = input_gradient(other, IMAGES, LABELS, "margin")
    assert 0 < (own - found).norm() < 1e-3 * own.norm()
    assert model.block.gradient == Backprop()


def test_a_gradient_that_the_adjoint_gets_wrong_is_still_followed():
    """On a field so contracting that the checked adjoint refuses, the attack's gradient is finite and wrong."""
    torch.manual_seed(0)
    model = Classifier((2, 2, 4), Block("ode", t1=10.0)).eval().requires_grad_(False)
    for p in model.block.f.parameters():
        p.mul_(4)
    own, _ = input_gradient(attacked(model, 1, generator()), IMAGES, LABELS, "margin")
    found, _ = input_gradient(surrogate(model, "adjoint", 1, generator()), IMAGES, LABELS, "margin")
    assert found.isfinite().all() and (own - found).norm() > 0.01 * own.norm()
    z = model.features(IMAGES).requires_grad_()
    checked = ODEBlock(model.block.f, t1=10.0, solver=model.block.solver, gradient=Adjoint())
    with pytest.raises(GradientError, match="differs from the forward solve"):
        checked(z).sum().backward()


@pytest.mark.parametrize("block", [Block("none"), Block("ode"), Block("random_time", p=0.1), Block("staircase"), NOISY])
def test_a_block_has_an_adjoint_where_its_solver_has_one(block):
    """What is said of a block as data is what `Adjoint` says of the solver that it is built with."""
    solver = getattr(block.build(), "solver", None)
    assert block.has_adjoint == (solver is not None and Adjoint().accepts(solver))


def test_a_noisy_block_has_no_adjoint_route(noisy):
    """Euler-Maruyama has no adjoint: no group asks for it, and asking for it says why."""
    assert not noisy.spec.has_adjoint
    with pytest.raises(ValueError, match=r"EulerMaruyama\(steps=4\) has no adjoint"):
        surrogate(noisy, "adjoint", 1, generator())


def test_intervals_and_tests_are_the_textbooks():
    """Wilson's interval and the exact McNemar test equal scipy's; Holm's correction equals a worked example."""
    for k, n in [(0, 10), (7, 10), (283, 300), (300, 300)]:
        exact = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k / n, n) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert all(wilson(0.0, n)[0] == 0.0 and wilson(1.0, n)[1] == 1.0 for n in range(1, 500))
    first, second = [True] * 9 + [False] * 3 + [True] * 5, [False] * 9 + [True] * 3 + [True] * 5
    assert mcnemar(first, second) == pytest.approx(binomtest(9, 12).pvalue)
    assert mcnemar(first, second, "greater") == pytest.approx(299 / 4096)  # sum of C(12, k), k >= 9, over 2^12
    assert mcnemar(first, first) == 1.0
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_worst_case_is_chosen_by_draws_that_do_not_count():
    """Each sample keeps the scores of the attack that looked worst, also where those are better than another's."""
    first = Scores(4, (4, 0, 3), (True, False, True), (3, 0, 2))
    second = Scores(4, (1, 4), (False, True), (1, 4))
    assert worst([first, second]) == Scores(4, (1, 0, 3), (False, False, True), (1, 0, 2))
    lucky = Scores(4, (2, 2, 2), (True, True, True), (0, 1, 3))
    assert worst([first, lucky]) == Scores(4, (2, 0, 3), (True, False, True), (0, 0, 2))


def test_probes_look_at_the_attack_of_the_tables(noisy, monkeypatch):
    """At every radius PGD on the margin is the white-box group's own; more steps are as long as those."""
    suite, tried = PRESETS["full"].suite, []

    def kept(view, images, labels, threat, method, *rest, **options):
        tried.append(method)
        return images

    monkeypatch.setattr(evaluation, "perturb", kept)
    evaluation.probe_cell(noisy, DIGITS.first(2), suite, 0, "probes")
    (own,) = (attack for attack in suite.groups[0].attacks if attack.loss == "margin")
    margins = [method for method in tried if method.loss == "margin"]
    assert len(margins) == 13 + 3 + 10 and margins.count(own) == 13 + 1 + 10
    assert {method.rate / method.steps for method in tried} == {own.rate / own.steps}


@pytest.mark.parametrize(
    ("model", "nfe"),
    [
        (Classifier((2, 2, 4), Block("none")), 0),
        (Classifier((2, 2, 4), Block("sde", t1=2.0, steps=7, p=0.1)), 7),
        (CertifiedClassifier(Recipe(convolutions=(4,), dense=(8, 8), steps=2)), 6),
    ],
    ids=["without a field", "noisy", "certified"],
)
def test_the_cost_of_a_pass_counts_every_evaluation_of_every_field(model, nfe):
    """No field, seven steps of Euler-Maruyama, three blocks of two Euler steps."""
    assert evaluation.clean_cell(model.eval(), DIGITS.first(20), 2, 0)["nfe"] == nfe


def test_what_is_certified_is_kept_image_by_image():
    """The verdicts are those of the radii around the true class, and their share is the certified accuracy."""
    torch.manual_seed(0)
    model = CertifiedClassifier(Recipe(convolutions=(4,), dense=(8,))).eval()
    found = evaluation.clean_cell(model, DIGITS, 1, 0)
    held = {radius: Scores.unpack(packed) for radius, packed in found["held"].items()}
    assert {radius: scores.mean for radius, scores in held.items()} == pytest.approx(found["certified"])
    reach = model.certified_radius(DIGITS.images, DIGITS.labels)
    for radius, scores in held.items():
        assert scores.counts == tuple((reach > float(radius)).int().tolist())
