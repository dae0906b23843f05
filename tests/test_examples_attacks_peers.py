"""The study's attacks beside foolbox's and pyautoattack's: the same trained network, the same images, paired."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from examples.mnist import attacks, data
from examples.mnist.attacks import PGD, SPSA, AutoAttack, Method, SimBA, Square, Threat, Transfer, fgsm, margin, search
from examples.mnist.scores import mcnemar, wilson

foolbox = pytest.importorskip("foolbox", reason="an oracle here: pip install 'odelayers[attacks]'")
pyautoattack = pytest.importorskip("pyautoattack", reason="an oracle here: pip install 'odelayers[attacks]'")

NORMS = {"linf": "Linf", "l2": "L2"}
THREATS = [Threat("linf", 0.06), Threat("l2", 1.2)]  # about half of the images stand


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(digits, seed: int) -> nn.Sequential:
    """A network of one hidden layer, 15 epochs on scikit-learn's digits: 96 % right."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(digits.train)).split(64):
            loss = nn.functional.cross_entropy(model(digits.train.images[rows]), digits.train.labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def model(digits):
    return trained(digits, 0)


@pytest.fixture(scope="module")
def samples(digits, model):
    """The first 200 test images that the network has right, with their labels."""
    right = (model(digits.test.images).argmax(1) == digits.test.labels).nonzero().squeeze(1)[:200]
    return digits.test.images[right], digits.test.labels[right]


def stands(model, images, labels) -> list[bool]:
    return (margin(model(images), labels) <= 0).tolist()


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def check_pair(ours: list[bool], theirs: list[bool]) -> None:
    """Neither breaks significantly more samples than the other, and ours is not weaker within its interval."""
    assert 0.1 < share(theirs) < 0.9, "a pair that all or none survive compares nothing"
    assert mcnemar(ours, theirs) > 0.05
    assert share(ours) <= wilson(share(theirs), len(theirs))[1]


def test_fgsm_is_foolbox_fgsm(model, samples):
    """The same images fall, one by one."""
    images, labels = samples
    threat, attack = fgsm(0.06)
    theirs = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    _, found, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=threat.eps)
    ours = attack.run(model, images, labels, threat, generator())
    assert stands(model, ours, labels) == stands(model, found, labels)
    assert 0.1 < share(stands(model, ours, labels)) < 0.9


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_pairs_with_foolbox(model, samples, threat, random_start):
    """Forty steps of equal length on the cross-entropy."""
    images, labels = samples
    kind = foolbox.attacks.LinfPGD if threat.norm == "linf" else foolbox.attacks.L2PGD
    theirs = kind(abs_stepsize=2.5 * threat.eps / 40, steps=40, random_start=random_start)
    _, found, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=threat.eps)
    ours = PGD("ce", 40, random_start=random_start).run(model, images, labels, threat, generator())
    check_pair(stands(model, ours, labels), stands(model, found, labels))


@pytest.mark.parametrize("threat", [Threat("linf", 0.06), Threat("l2", 1.5)], ids=str)
def test_square_pairs_with_pyautoattack(model, samples, threat):
    """A thousand queries, the schedule scaled to them in both."""
    images, labels = samples
    theirs = pyautoattack.square.SquareAttack(
        model, norm=NORMS[threat.norm], eps=threat.eps, n_queries=1000, p_init=0.8, resc_schedule=True,
        n_restarts=1, seed=0, device="cpu", verbose=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        found = theirs.perturb(images, labels)
    ours = Square(1000).run(model, images, labels, threat, generator())
    check_pair(stands(model, ours, labels), stands(model, found, labels))


@pytest.mark.parametrize("queries", [300, 5000, 10_000])
def test_squares_schedule_and_pyramids_are_pyautoattacks(queries):
    """The share of the image in every query, and the two pyramids of every size, number for number."""
    theirs = pyautoattack.square.SquareAttack(None, norm="L2", n_queries=queries, p_init=0.8, resc_schedule=True)
    theirs.device = "cpu"
    assert [Square(queries)._share(i) for i in range(queries)] == [theirs.p_selection(i) for i in range(queries)]
    for height, width in [(1, 3), (2, 5), (3, 5), (12, 25), (13, 25)]:
        torch.testing.assert_close(search._pyramid(height, width), theirs.eta_rectangles(height, width))


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_dlr_loss_is_pyautoattacks_and_knows_no_scale(model, samples, threat):
    """Equal values; a million times the logits falls as before, where the cross-entropy sees nothing."""
    images, labels = samples
    theirs = pyautoattack.autopgd_base.APGDAttack(model, eps=1.0, device="cpu")
    logits = model(images)
    torch.testing.assert_close(attacks.common.LOSSES["dlr"](logits, labels), theirs.dlr_loss(logits, labels))
    sharp = lambda x: 2.0**20 * model(x)  # noqa: E731
    plain, scaled = (PGD("dlr", 20).run(m, images, labels, threat, generator()) for m in (model, sharp))
    assert mcnemar(stands(model, plain, labels), stands(model, scaled, labels)) > 0.05
    blind = PGD("ce", 20).run(sharp, images, labels, threat, generator())
    assert mcnemar(stands(model, blind, labels), stands(model, scaled, labels), "greater") < 0.01


AUTO = [AutoAttack("rand"), pytest.param(AutoAttack("standard"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("attack", AUTO, ids=str)
def test_autoattack_is_the_librarys_and_leaves_global_state_alone(model, samples, threat, attack):
    """The images of a direct call with the same seed; torch's global generator and the thread's tracer stay."""
    images, labels = (s[:40] for s in samples)
    tracer = lambda *_: None  # noqa: E731
    before, old, ticks = torch.get_rng_state(), sys.gettrace(), []
    sys.settrace(tracer)
    try:
        ours = attack.run(model, images, labels, threat, generator(), tick=lambda: ticks.append(1))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(old)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < len(ticks) <= attack.ticks
    seed = int(torch.randint(2**31, (), generator=generator()))
    direct = pyautoattack.AutoAttack(
        model, norm=NORMS[threat.norm], eps=threat.eps, version=attack.version, device="cpu", seed=seed
    )
    try:
        theirs, _ = direct.run_standard_evaluation(images, labels, batch_size=40)
        assert not torch.equal(torch.get_rng_state(), before), "control: the library seeds the global generator"
    finally:
        sys.settrace(old)
        torch.set_rng_state(before)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert stands(model, ours, labels) == stands(model, theirs, labels)
    pgd = PGD("ce", 40).run(model, images, labels, threat, generator())
    assert sum(stands(model, ours, labels)) <= sum(stands(model, pgd, labels))


def test_autoattack_takes_noise_and_refuses_what_it_cannot_do(model, samples):
    """A noisy model goes to the version rand alone; nine targets need ten classes."""
    images, labels = (s[:4] for s in samples)
    noise = generator(5)
    noisy = lambda x: model(x + 0.05 * torch.randn(x.shape, generator=noise))[None]  # noqa: E731
    found = AutoAttack("rand").run(noisy, images, labels, Threat("l2", 1.2), generator())
    moved = (found != images).flatten(1).any(1)
    assert moved.any() and (margin(model(found), labels) > margin(model(images), labels))[moved].all()
    with pytest.raises(ValueError, match=r"use AutoAttack\('rand'\)"):
        AutoAttack().run(noisy, images, labels, Threat("l2", 1.2), generator())
    with pytest.raises(ValueError, match="expected >= 10 classes, got 9"):
        AutoAttack().run(lambda x: model(x)[:, :9], images, labels.clamp(max=8) * 0 + model(images)[:, :9].argmax(1),
                         Threat("l2", 1.2), generator())  # fmt: skip


def without_gradient(digits, delta: float) -> list[tuple[Method, nn.Module | None]]:
    """What needs no gradient of the model, each with the other model that it starts from."""
    searches = (Square(500), SPSA(50, 32, delta=delta), SimBA("dct", 500))
    return [*((search, None) for search in searches), (Transfer(), trained(digits, 1))]


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_masked_model_falls_to_search_and_transfer_where_gradients_see_nothing(digits, model, samples, threat):
    """Logits on a staircase have no gradient: PGD leaves all standing, what needs none breaks significantly more."""
    images, labels = samples
    masked = lambda x: (4 * model(x)).round() / 4  # noqa: E731
    right = (margin(masked(images), labels) < 0).nonzero().squeeze(1)
    images, labels = images[right[:80]], labels[right[:80]]

    def blind(x):  # the staircase as autograd sees it
        return masked(x) + 0 * model(x)

    white = [PGD(loss, 20).run(blind, images, labels, threat, generator()) for loss in ("ce", "margin", "dlr")]
    standing = [all(s) for s in zip(*(stands(masked, w, labels) for w in white), strict=True)]
    assert share(standing) > 0.9, "but for the random start"
    others = {
        Square(500): None,
        SPSA(60, 32, delta=0.05): None,
        SimBA("dct", 500): None,
        Transfer(): trained(digits, 1),
    }
    for attack, source in others.items():
        found = attack.run(masked, images, labels, threat, generator(), gradient_from=source)
        assert mcnemar(standing, stands(masked, found, labels), "greater") < 0.01, str(attack)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_an_honest_model_is_not_called_masked(digits, model, samples, threat):
    """Control: without the staircase no search and no transfer breaks significantly more than the gradient does."""
    images, labels = (s[:80] for s in samples)
    white = stands(model, PGD("margin", 40).run(model, images, labels, threat, generator()), labels)
    for attack, source in without_gradient(digits, delta=0.01):
        found = attack.run(model, images, labels, threat, generator(), gradient_from=source)
        assert mcnemar(white, stands(model, found, labels), "greater") > 0.05, str(attack)
