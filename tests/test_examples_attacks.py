"""The study's attacks, against closed forms on linear models and against foolbox step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from examples.mnist.attacks import PGD, Threat, fgsm, input_gradient, margin, perturb, project

CLASSES = 4
SHAPE = (1, 6, 6)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.fixture
def linear():
    """A linear model and images well inside [0, 1], labelled as the model says."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).eval()
    images = 0.4 + 0.2 * torch.rand(32, *SHAPE)
    return model, images, model(images).argmax(1)


@pytest.fixture
def curved():
    """A small nonlinear model with images and labels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, CLASSES)).eval()
    images = torch.rand(16, *SHAPE)
    return model, images, model(images).argmax(1)


def distance_to_boundary(model: nn.Sequential, images: torch.Tensor, labels: torch.Tensor, dual: float) -> torch.Tensor:
    """Exact distance to the nearest decision boundary: min over j of (y_l - y_j) / ||w_l - w_j||_dual."""
    weight, logits = model[1].weight, model(images)
    gaps = logits.gather(1, labels[:, None]) - logits
    norms = (weight[labels][:, None] - weight[None]).norm(p=dual, dim=2)
    ratios = (gaps / norms.clamp(min=1e-12)).scatter(1, labels[:, None], float("inf"))
    return ratios.amin(1).detach()


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("classes", [2, CLASSES])
def test_pgd_breaks_a_linear_model_beyond_its_distance_and_never_below(norm, dual, loss, classes):
    """Below the closed-form distance no sample breaks; beyond it all do (two classes: there the ascent is exact)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    images = 0.4 + 0.2 * torch.rand(12, *SHAPE)
    labels = model(images).argmax(1)
    distances = distance_to_boundary(model, images, labels, dual)
    for image, label, exact in zip(images.split(1), labels.split(1), distances.tolist(), strict=True):
        for factor, broken in [(0.98, False), (1.02, True)]:
            attack = PGD(loss, steps=40, restarts=2, rate=8.0)
            found = perturb(model, image, label, Threat(norm, factor * exact), attack, generator())
            assert 0 < found.min() and found.max() < 1, "the closed form knows no box"
            if classes == 2 or not broken:
                assert (margin(model(found), label) > 0).item() is broken


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_reaches_the_closed_form_optimum_of_two_classes(norm):
    """With two classes the best margin in the ball is margin + eps * ||w_1 - w_0||_dual, and PGD gets there."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    images = 0.4 + 0.2 * torch.rand(20, *SHAPE)
    labels = torch.arange(20) % 2
    eps = 0.01  # too small to change a label, so that no sample stops early
    model[1].bias.data = torch.zeros(2)
    before = margin(model(images), labels)
    labels = torch.where(before > 0, 1 - labels, labels)
    before = margin(model(images), labels)
    dual = (model[1].weight[0] - model[1].weight[1]).norm(p=1 if norm == "linf" else 2)
    untouched = before + eps * dual < 0
    assert untouched.sum() >= 10
    found = perturb(model, images, labels, Threat(norm, eps), PGD("margin", steps=20, rate=10.0), generator())
    after = margin(model(found), labels)
    torch.testing.assert_close(after[untouched], (before + eps * dual)[untouched], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.05, 0.7, 3.0])
@pytest.mark.parametrize("random_start", [True, False])
def test_adversarial_images_stay_in_the_ball_and_in_the_unit_cube(curved, norm, eps, random_start):
    """Every returned image is within eps of its own and within [0, 1], also where the ball is cut by the cube."""
    model, images, labels = curved
    images = images.round()  # corners of the cube: half of every ball lies outside
    attack = PGD("ce", steps=5, restarts=2, random_start=random_start)
    found = perturb(model, images, labels, Threat(norm, eps), attack, generator())
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1
    assert size.max() > 0


def test_projection_leaves_what_is_inside_alone():
    """A point of the ball and the cube is its own projection."""
    centre = torch.full((3, *SHAPE), 0.5)
    inside = centre + 0.01 * torch.randn_like(centre).clamp(-2, 2)
    assert torch.equal(project(inside, centre, Threat("linf", 0.4)), inside)
    torch.testing.assert_close(project(inside, centre, Threat("l2", 3.0)), inside)


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="foolbox is the oracle here: pip install 'odelayers[attacks]'")


def run_foolbox(foolbox, attack, model, images, labels, eps):
    """The images and the successes of a foolbox attack."""
    _, found, broken = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=eps)
    return found, broken


def test_fgsm_equals_foolbox(curved, foolbox):
    """The one-step case is foolbox's FGSM, pixel by pixel."""
    model, images, labels = curved
    threat, attack = fgsm(0.03)
    ours = perturb(model, images, labels, threat, attack, generator())
    oracle = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    theirs, _ = run_foolbox(foolbox, oracle, model, images, labels, 0.03)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_foolbox_step_by_step(curved, norm, foolbox):
    """Without a random start our iterates are foolbox's at equal step length, as long as no sample is broken."""
    model, images, labels = curved
    eps, steps = (0.002, 7) if norm == "linf" else (0.01, 7)
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    oracle = kind(abs_stepsize=2.5 * eps / steps, steps=steps, random_start=False)
    theirs, broken = run_foolbox(foolbox, oracle, model, images, labels, eps)
    assert not broken.any()
    ours = perturb(model, images, labels, Threat(norm, eps), PGD("ce", steps, random_start=False), generator())
    # The best iterate is ours to keep; the last is foolbox's: margins agree, and nearly always so do the pixels.
    assert (margin(model(ours), labels) >= margin(model(theirs), labels) - 1e-6).all()
    same = (ours - theirs).abs().flatten(1).amax(1) < 1e-5
    assert same.float().mean() > 0.6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_no_weaker_than_foolbox(curved, norm, foolbox):
    """At an eps that breaks some samples, ours breaks at least as many as foolbox's PGD with the same steps."""
    model, images, labels = curved
    eps = 0.06 if norm == "linf" else 0.3
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    oracle = kind(abs_stepsize=2.5 * eps / 20, steps=20, random_start=False)
    _, theirs = run_foolbox(foolbox, oracle, model, images, labels, eps)
    found = perturb(model, images, labels, Threat(norm, eps), PGD("ce", 20, random_start=False), generator())
    ours = margin(model(found), labels) > 0
    assert 0 < theirs.sum() < len(theirs)
    assert ours.sum() >= theirs.sum()


def test_a_surrogates_gradient_breaks_what_a_masker_hides(linear):
    """A model that rounds away its gradient stands against PGD and falls to the straight-through surrogate."""
    model, images, labels = linear

    def staircase(x):
        logits = model(x)
        return logits + ((logits * 1e3).round() / 1e3 - logits).detach() - (logits - logits.detach())

    threat = Threat("l2", 1.2 * distance_to_boundary(model, images, labels, 2).max().item())
    attack = PGD("margin", steps=20, random_start=False)
    gradient, _ = input_gradient(staircase, images, labels)
    assert gradient.abs().max() == 0
    white = perturb(staircase, images, labels, threat, attack, generator())
    bypass = perturb(staircase, images, labels, threat, attack, generator(), gradient_from=model)
    assert torch.equal(white, images)
    assert (margin(staircase(bypass), labels) > 0).float().mean() > 0.9


def test_success_is_judged_on_the_model_not_on_its_surrogate():
    """A surrogate that is always fooled does not end the attack: it goes on until the model itself is fooled."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    images = 0.4 + 0.2 * torch.rand(32, *SHAPE)
    labels = model(images).argmax(1)
    eps = 1.5 * distance_to_boundary(model, images, labels, 2)

    def fooled(x):  # the right gradient, but the wrong class is far ahead
        return model(x) + 100 * (1 - nn.functional.one_hot(labels[:1], 2))

    for image, label, reach in zip(images.split(1), labels.split(1), eps.tolist(), strict=True):
        labels = label
        attack = PGD("margin", steps=20)
        found = perturb(model, image, label, Threat("l2", reach), attack, generator(), gradient_from=fooled)
        assert margin(model(found), label) > 0


def noisy(model: nn.Module, sigma: float, draws: int, seed: int):
    """The model under additive input noise, several draws at once."""
    noise = torch.Generator().manual_seed(seed)
    return lambda x: torch.stack([model(x + sigma * torch.randn(x.shape, generator=noise)) for _ in range(draws)])


def test_the_mean_over_draws_recovers_the_gradient_under_noise(curved):
    """The gradient averaged over 400 draws nears that of the expected loss (2,000 others); a single draw does not."""
    model, images, labels = curved
    exact, _ = input_gradient(noisy(model, 0.5, 2000, seed=5), images, labels)
    errors = []
    for draws in (1, 400):
        gradient, _ = input_gradient(noisy(model, 0.5, draws, seed=6), images, labels)
        errors.append(((gradient - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.15 < errors[0]


def test_noise_stays_on_and_its_mean_margin_falls(curved):
    """The attack sees the noise at every call, and what it returns has a larger mean margin over fresh draws."""
    model, images, labels = curved
    calls, inner = [], noisy(model, 0.1, 8, seed=7)

    def attacked(x):
        calls.append(len(x))
        return inner(x)

    found = perturb(attacked, images, labels, Threat("l2", 0.2), PGD("ce", steps=6), generator())
    assert calls.count(len(images)) >= 7, "no sample is dropped for one bad draw"
    judge = noisy(model, 0.1, 200, seed=8)
    assert (margin(judge(found), labels).mean(0) > margin(judge(images), labels).mean(0)).all()


def test_the_same_generator_gives_the_same_attack(curved):
    """Random starts come from the generator alone; another seed gives other starts."""
    model, images, labels = curved
    threat, attack = Threat("linf", 0.05), PGD("ce", steps=2)
    one, two = (perturb(model, images, labels, threat, attack, generator()) for _ in range(2))
    other = perturb(model, images, labels, threat, attack, torch.Generator().manual_seed(4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_more_restarts_never_help_the_model(curved):
    """The best margin over five starts is at least that of the first start alone."""
    model, images, labels = curved
    threat = Threat("linf", 0.03)
    once, often = (
        margin(model(perturb(model, images, labels, threat, PGD("ce", 4, n), generator())), labels) for n in (1, 5)
    )
    assert (often >= once - 1e-6).all()


def test_a_gradient_that_is_not_finite_is_an_error(curved):
    """An attack that cannot see a gradient must not report a robust model."""
    model, images, labels = curved
    with pytest.raises(RuntimeError, match="gradient of the ce loss is not finite"):
        perturb(
            lambda x: model(x) + (x - x).flatten(1).sum(1, True).sqrt(),
            images,
            labels,
            Threat("l2", 1.0),
            PGD(),
            generator(),
        )
    with pytest.raises(RuntimeError, match="logits are not finite"):
        perturb(lambda x: model(x) * float("nan"), images, labels, Threat("l2", 1.0), PGD(), generator())


def test_wrong_settings_are_refused_by_name():
    """Norm, radius, loss and counts are checked where they are written down."""
    with pytest.raises(ValueError, match="norm: expected 'linf' or 'l2', got 'l1'"):
        Threat("l1", 0.5)
    with pytest.raises(ValueError, match="eps"):
        Threat("l2", 0.0)
    with pytest.raises(ValueError, match="PGD.loss: expected one of 'ce', 'margin', 'dlr'"):
        PGD("hinge")
    with pytest.raises(ValueError, match="restarts"):
        PGD(restarts=0)
