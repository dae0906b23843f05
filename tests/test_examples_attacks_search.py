"""The study's black-box attacks: closed forms on linear models, and what holds for every attack there is."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from examples.mnist.attacks import PGD, SPSA, Counted, SimBA, Square, Threat, Transfer, margin, search
from examples.mnist.scores import wilson

SHAPE = (1, 6, 6)
LINF, L2 = Threat("linf", 0.04), Threat("l2", 0.2)
SEARCHES = [SPSA(steps=20, samples=8), SimBA("pixel", 80), SimBA("dct", 80), Square(80)]
ALL = [PGD("dlr", 10, restarts=2), *SEARCHES]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def robust(model, images, labels) -> torch.Tensor:
    return margin(model(images), labels) <= 0


@pytest.fixture
def halves():
    """A linear model of two classes, 300 images well inside [0, 1], and labels that the model gives them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).requires_grad_(False)
    images = 0.4 + 0.2 * torch.rand(300, *SHAPE)
    model[1].bias[0] += margin(model(images), torch.zeros(300, dtype=torch.long)).median()  # half of each class
    return model, images, model(images).argmax(1)


@pytest.fixture
def curved():
    """A small nonlinear model with images and labels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.Tanh(), nn.Linear(24, 4)).requires_grad_(False)
    images = torch.rand(16, *SHAPE)
    return model, images, model(images).argmax(1)


def distances(model: nn.Sequential, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    """Exact distance to the one boundary: |y_0 - y_1| over the dual norm of w_0 - w_1."""
    return -margin(model(images), labels) / (model[1].weight[0] - model[1].weight[1]).norm(p=1 if norm == "linf" else 2)


EXACT = [
    (SPSA(steps=50, samples=64), "linf"),
    (SPSA(steps=50, samples=64), "l2"),
    (SimBA("pixel", steps=36, rate=1.0), "linf"),
    (SimBA("pixel", steps=400), "l2"),
    (SimBA("dct", steps=400, lowest=1.0), "l2"),
    (Square(3000), "linf"),
]


@pytest.mark.parametrize(("attack", "norm"), EXACT, ids=str)
def test_a_search_reaches_the_exact_robust_accuracy_of_a_linear_model(halves, attack, norm):
    """At eps it leaves no fewer samples right than the closed form says, nor more than that says at 0.95 eps."""
    model, images, labels = halves
    reach = distances(model, images, labels, norm)
    eps = reach.median().item() * 1.02
    found = attack.run(model, images, labels, Threat(norm, eps), generator())
    assert 0 < found.min() and found.max() < 1, "the closed form knows no box"
    right, exact = robust(model, found, labels), reach > eps
    assert (right | ~exact).all(), "nothing breaks below its distance"
    assert right.sum() <= (reach > 0.95 * eps).sum()
    most = eps * (margin(model(images), labels) / reach).abs()  # what the ball allows the margin to gain
    assert (margin(model(found), labels) - margin(model(images), labels))[right].ge(0.95 * most[right]).all()
    low, high = wilson(right.float().mean().item(), len(images))
    assert low <= exact.float().mean().item() <= high


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", SEARCHES, ids=str)
def test_no_search_breaks_a_sample_below_its_distance(halves, attack, norm):
    """Below the closed-form distance nothing breaks, sample by sample."""
    model, images, labels = halves
    reach = distances(model, images, labels, norm).clamp(min=1e-4)
    for i in range(5):
        one = slice(i, i + 1)
        found = attack.run(model, images[one], labels[one], Threat(norm, 0.98 * reach[i].item()), generator())
        assert robust(model, found, labels[one]).all()


def test_spsa_estimates_the_gradient(halves):
    """On a linear model the mean over 4,000 random signs is the margin's gradient, within four standard errors."""
    model, images, labels = halves
    attack = SPSA(samples=4000)
    found = attack._estimate(model, images[:3], labels[:3], 1, generator()).flatten(1)
    exact = torch.stack([model[1].weight[1 - label] - model[1].weight[label] for label in labels[:3].tolist()])
    assert (found - exact).abs().max() < 4 * exact.norm(dim=1).max() / math.sqrt(4000)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize("lowest", [0.5, 1.0])
def test_the_vectors_of_simba_are_orthonormal(basis, lowest):
    """Along one axis the vectors are orthonormal, all pixels or the stated share of the frequencies, lowest first."""
    vectors = SimBA(basis, lowest=lowest)._vectors(28, torch.zeros(1, dtype=torch.float64))
    assert len(vectors) == (28 if basis == "pixel" else 28 * lowest)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors), dtype=torch.float64))
    changes = [int((row.diff() != 0).logical_and(row[1:] * row[:-1] < 0).sum()) for row in vectors]
    assert changes == (list(range(len(vectors))) if basis == "dct" else [0] * 28), "a wave k changes its sign k times"


@pytest.mark.parametrize("threat", [LINF, Threat("l2", 0.3)], ids=str)
def test_square_moves_within_its_windows_and_stays_at_the_radius(threat):
    """Inside the cube every pixel stays at +-eps, or the norm at eps, and what lies outside the windows as it was."""
    images, draw = 0.4 + 0.2 * torch.rand(20, 2, 9, 9), search._Draw(generator(), torch.device("cpu"))
    start, move = (search._stripes, search._move_linf) if threat.norm == "linf" else (search._pyramids, search._move_l2)
    x, moved = start(images, threat, draw), torch.zeros(20, 2, 9, 9, dtype=torch.bool)
    for side in (3, 3, 3):
        x, before = move(x, images, side, threat, draw), x
        change, moved = x - images, (x - before).abs() > 1e-6
        windows = 1 if threat.norm == "linf" else 2
        assert 0 < moved.flatten(2).sum(2).max() <= windows * side**2
        if threat.norm == "linf":
            torch.testing.assert_close(change.abs(), torch.full_like(change, threat.eps), rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((20,), threat.eps))


@pytest.mark.parametrize("threat", [LINF, L2, Threat("linf", 0.7), Threat("l2", 3.0)], ids=str)
@pytest.mark.parametrize("attack", ALL, ids=str)
def test_what_any_attack_finds_lies_in_the_ball_and_in_the_cube(curved, attack, threat):
    """Every image is within eps of its own and within [0, 1], also where the ball is cut by the cube."""
    model, images, labels = curved
    images = images.round()  # corners of the cube
    found = attack.run(model, images, labels, threat, generator())
    change = (found - images).flatten(1)
    size = change.abs().amax(1) if threat.norm == "linf" else change.norm(dim=1)
    assert 0 < size.max() <= threat.eps * (1 + 1e-5)
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("attack", ALL, ids=str)
def test_the_generator_alone_decides(curved, attack, threat):
    """The same generator gives the same images, another seed others; torch's own generator is left alone."""
    model, images, labels = curved
    before = torch.get_rng_state()
    one, two, other = (attack.run(model, images, labels, threat, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("threat", [LINF, L2], ids=str)
@pytest.mark.parametrize("attack", ALL, ids=str)
def test_the_best_margin_is_kept_and_the_wrong_are_left_alone(curved, attack, threat):
    """No margin falls, most rise, and a sample that was misclassified comes back as it was."""
    model, images, labels = curved
    labels = labels.clone()
    labels[:4] = (labels[:4] + 1) % 4
    found = attack.run(model, images, labels, threat, generator())
    gain = margin(model(found), labels) - margin(model(images), labels)
    assert (gain >= 0).all() and (gain > 0).sum() >= 10
    assert torch.equal(found[:4], images[:4])


def far(model):
    """The same decisions with the first class a hundred ahead: no small step changes them."""
    return lambda x: model(x) + 100 * torch.tensor([1.0, 0, 0, 0])


@pytest.mark.parametrize(
    ("attack", "least", "most"),
    [
        (PGD("ce", 10, restarts=2), 1 + 2 * 11, 1 + 2 * 11),
        (SPSA(steps=5, samples=7), 1 + 5 * 15, 1 + 5 * 15),
        (SimBA("pixel", 30), 1 + 30, 1 + 60),
        (Square(50), 1 + 50, 1 + 50),
    ],
    ids=str,
)
def test_queries_and_ticks_are_what_the_attack_says(curved, attack, least, most):
    """Where nothing breaks, every image costs the stated queries and `ticks` is exact; broken samples cost no more."""
    model, images, _ = curved
    zeros = torch.zeros(16, dtype=torch.long)
    counted, ticks = Counted(far(model)), []
    attack.run(counted, images, zeros, L2, generator(), tick=lambda: ticks.append(1))
    assert least * 16 <= counted.queries <= most * 16
    assert len(ticks) == attack.ticks
    counted, ticks = Counted(far(model)), []
    found = attack.run(counted, images, zeros + 1, L2, generator(), tick=lambda: ticks.append(1))
    assert counted.queries == 16 and not ticks and torch.equal(found, images)


def noisy(model, sigma: float, draws: int, seed: int):
    """The model under additive input noise, several draws at once."""
    noise = torch.Generator().manual_seed(seed)
    return lambda x: torch.stack([model(x + sigma * torch.randn(x.shape, generator=noise)) for _ in range(draws)])


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.6)], ids=str)
@pytest.mark.parametrize("attack", [SPSA(20, 16), SimBA("dct", 60), Square(60)], ids=str)
def test_noise_stays_on_and_the_mean_margin_over_fresh_draws_falls(curved, attack, threat):
    """Every sample is attacked to the end, on means over draws, and what is found holds over other draws."""
    model, images, labels = curved
    sizes, inner = [], noisy(model, 0.05, 8, seed=7)

    def attacked(x):
        sizes.append(len(x))
        return inner(x)

    found = attack.run(attacked, images, labels, threat, generator())
    assert sizes.count(16) >= attack.ticks, "no sample is dropped for one bad draw"
    judge = noisy(model, 0.05, 200, seed=8)
    assert (margin(judge(found), labels).mean(0) > margin(judge(images), labels).mean(0)).float().mean() > 0.8


def test_transfer_shows_the_model_each_image_once(curved):
    """Images come from the other model, to the end of the attack there; the model is asked before and after."""
    model, images, labels = curved
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).requires_grad_(False)
    counted, threat = Counted(model), Threat("l2", 2.0)
    found = Transfer(PGD("margin", 10)).run(counted, images, labels, threat, generator(), gradient_from=other)
    assert counted.queries == 2 * 16
    made = PGD("margin", 10).run(lambda x: other(x)[None], images, labels, threat, generator())
    kept = margin(model(made), labels) > margin(model(images), labels)
    assert kept.any() and torch.equal(found[kept], made[kept]) and torch.equal(found[~kept], images[~kept])
    assert margin(other(made), labels).min() > 0.2, "not just across the other model's boundary"


def test_what_an_attack_cannot_use_or_do_without_is_refused(curved):
    """gradient_from means nothing to a search and everything to a transfer; infinite logits prove nothing."""
    model, images, labels = curved
    for attack in SEARCHES:
        with pytest.raises(ValueError, match=f"{attack.kind} takes no gradient"):
            attack.run(model, images, labels, L2, generator(), gradient_from=model)
        broken = Counted(model)
        with pytest.raises(RuntimeError, match="logits are not finite"):
            attack.run(
                lambda x, m=broken: m(x) / float(m.queries <= 16), images, labels, L2, generator()
            )  # finite once, then not
    with pytest.raises(ValueError, match="Transfer: expected the model that the images are made on"):
        Transfer().run(model, images, labels, L2, generator())
    with pytest.raises(ValueError, match="third largest logit"):
        PGD("dlr").run(lambda x: model(x)[:, :2], images, labels.clamp(max=1) * 0, L2, generator())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SPSA(samples=0), r"SPSA.samples: expected a number >= 1, got 0"),
        (lambda: SPSA(delta=0.0), r"SPSA.delta: expected a number > 0, got 0"),
        (lambda: SimBA("wavelet"), r"SimBA.basis: expected one of 'pixel', 'dct', got 'wavelet'"),
        (lambda: SimBA(lowest=1.5), r"SimBA.lowest: expected a share <= 1"),
        (lambda: Square(0), r"Square.queries: expected a number >= 1"),
        (lambda: Square(p=2.0), r"Square.p: expected a share <= 1"),
        (lambda: PGD(rate=float("nan")), r"PGD.rate: expected a number > 0, got nan"),
    ],
)
def test_wrong_settings_name_the_field(make, message):
    """Settings are checked where they are written down."""
    with pytest.raises(ValueError, match=message):
        make()


def test_records_tell_attacks_apart():
    """The plain data of two attacks differ even where their numbers agree, nested ones included."""
    assert asdict(SPSA(steps=7))["kind"] == "SPSA"
    assert asdict(Transfer(Square(9)))["attack"] == {"kind": "Square", "queries": 9, "p": 0.8}
    assert len({str(attack) for attack in ALL}) == len(ALL)
