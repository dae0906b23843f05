"""The study's training: recipes are the published ones, losses are what they say, and divergence is an outcome."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from examples.mnist import data as mnist_data
from examples.mnist.accuracy import states
from examples.mnist.adversary import Adversary
from examples.mnist.models import Block, Classifier
from examples.mnist.objective import Objective
from examples.mnist.penalties import Constraints, LyaNet, SteadyState, Transport
from examples.mnist.phases import ClippedAdam
from examples.mnist.presets import PRESETS
from examples.mnist.recipes import OFFICIAL_TRADES, Effort, further
from examples.mnist.training import SGD, Adam, Diverged, Phase, train
from odelayers import ODEBlock

DIGITS = mnist_data.load("digits").first(64, 20, 20)
ROWS = {m.name: m for m in further(Effort(fresh=(1, 2, 3), longer=4, official=(25, 15, 5), adversarial=6))}
WIDTHS = (2, 2, 4)
ODE = Block("ode", t1=2.0, tolerance=1e-3)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(block: Block = ODE, net: str = "resnet") -> Classifier:
    torch.manual_seed(0)
    return Classifier(
        WIDTHS if net == "resnet" else (8, 8, 16), block, net=net
    )  # fewer rectified units may all be dead


def objective(model: Classifier, **options: object) -> Objective:
    given = {"trains": "all", "weight": 1.0, "penalty": None, "adversary": None, **options}
    return Objective(model, noise=generator(), draws=generator(), **given)


def test_the_authors_recipe_is_theirs() -> None:
    """M2's constants: optimisers, rates, batches, regulariser, T, tolerance, heads, epochs of three phases."""
    (features,) = ROWS["M2-features"].phases
    assert (features.lr, features.batch, features.epochs, features.optimiser.amsgrad) == (1e-4, 128, 25, True)
    assert ROWS["M2-features"].head == "simplex" and ROWS["M2-features"].block.kind == "none"
    field, head = ROWS["M2"].phases
    assert (field.trains, field.lr, field.batch, field.optimiser) == ("block", 1e-2, 32, Adam(amsgrad=True, eps=1e-3))
    assert field.cross_entropy == 0 and isinstance(field.penalty, Constraints)
    constants = field.penalty.regularizer
    assert (constants.field, constants.diagonal, constants.dominance, constants.samples) == (0.2, 10.0, 10.0, 8)
    assert (constants.field_scale, constants.dominance_scale, constants.axis) == (50.0, 0.1, "column")
    assert (head.trains, head.lr, head.epochs, head.optimiser.amsgrad) == ("head", 1e-2, 5, True)
    block = ROWS["M2"].block
    assert (block.t1, block.tolerance, ROWS["M2"].head, ROWS["M2"].start) == (5.0, 1e-5, "linear", "M2-features")


def test_the_other_losses_have_their_sources_constants() -> None:
    """TisODE's weight, LyaNet alone, RNODE's weights, TRADES' beta, steps, radius and optimiser, M12's radius."""
    losses = {name: [phase.penalty for phase in ROWS[name].phases] for name in ("M7", "M8", "M9", "M10", "M11")}
    assert losses["M8"] == [SteadyState(weight=0.01)] * 3
    assert losses["M9"] == [Transport(kinetic=0.01, jacobian=0.01)] * 3
    assert losses["M10"] == [LyaNet(kappa=1.0)] * 3 and all(p.cross_entropy == 0 for p in ROWS["M10"].phases)
    assert losses["M7"] == losses["M11"] == [None] * 3
    assert ROWS["M11"].block.field == "skew" and ROWS["M7"].block.extra > 0
    attack = OFFICIAL_TRADES.adversary
    assert (attack.beta, attack.steps, attack.step, attack.eps) == (1.0, 40, 0.01, 0.3)
    assert (OFFICIAL_TRADES.optimiser, OFFICIAL_TRADES.lr, OFFICIAL_TRADES.epochs) == (SGD(momentum=0.9), 0.01, 100)
    assert ROWS["M12-published"].phases == (OFFICIAL_TRADES,)
    trained = {name: row for name, row in ROWS.items() if name.startswith("M12") and name != "M12-published"}
    assert set(trained) == {f"M12-{loss}-M{i}" for loss in ("pgd", "trades") for i in (0, 1, 3)}
    assert all(row.start == name.rpartition("-")[2] for name, row in trained.items())
    for loss in ("pgd", "trades"):  # the same steps of optimiser and attack with and without a block
        phases = [row.phases for name, row in trained.items() if loss in name]
        assert phases == [phases[0]] * 3 and phases[0][0].adversary.eps == 0.3


def test_every_epoch_says_what_it_cost_and_reached() -> None:
    """A line holds loss, penalty, accuracy, evaluations and seconds; the cost of the attack where there is one."""
    model = classifier()
    phases = (
        Phase("block", 1, batch=32),
        Phase("all", 2, batch=32, adversary=Adversary(steps=3), average=0.9),
    )
    quiet, *attacked = train(model, DIGITS, phases, True, 0, "M")
    common = {"phase", "trains", "epoch", "steps", "loss", "regulariser", "validation", "nfe_forward", "nfe_backward"}
    assert set(quiet) == common | {"seconds"}
    assert all(set(line) == common | {"seconds", "nfe_attack", "adversarial"} for line in attacked)
    assert 0 < quiet["regulariser"] < quiet["loss"] and quiet["nfe_forward"] >= 7 and quiet["nfe_backward"] == 0
    assert all(line["nfe_attack"] >= 2.5 * line["nfe_forward"] for line in attacked), "three passes a step"
    assert all(line["adversarial"] <= line["validation"] for line in attacked)
    json.dumps([quiet, *attacked], allow_nan=False)
    (none,) = train(classifier(Block("none")), DIGITS, (Phase("all", 1),), False, 0, "M0")
    assert none["nfe_forward"] == none["regulariser"] == 0


def test_the_adjoint_s_evaluations_are_counted_backward() -> None:
    """The reversible method evaluates the field again in the backward pass, and the log says how often."""
    model = classifier(Block("sde", t1=0.5, steps=5, p=0.01, method="reversible_heun"))
    (line,) = train(model, DIGITS, (Phase("block", 1, batch=32),), False, 0, "M4")
    assert line["nfe_backward"] >= 5


@pytest.mark.parametrize("kind", ["pgd", "trades"])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_inner_maximisation_stays_in_the_ball_and_raises_its_loss(kind: str, share: float) -> None:
    """Images are within share * eps and [0, 1] of their own, and worse for the model than the random start."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.Tanh(), nn.Linear(30, 10))
    images, labels = DIGITS.train.images, DIGITS.train.labels
    attack = Adversary(kind, steps=5, step=0.1, eps=0.3)
    found = attack.find(model, images, labels, generator(), share)
    change = (found - images).abs().flatten(1).amax(1)
    assert change.max() <= 0.3 * share * (1 + 1e-5) and change.min() > 0.2 * share
    assert found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    start = images + share * 0.3 * (2 * torch.rand(images.shape, generator=generator()) - 1)
    for p in model.parameters():
        assert p.grad is None, "the search must leave no gradient behind"

    def height(x: Tensor) -> float:
        logits, clean = model(x.clamp(0, 1)), softmax(model(images), 1)
        pgd = cross_entropy(logits, labels)
        return (pgd if kind == "pgd" else kl_div(log_softmax(logits, 1), clean, reduction="batchmean")).item()

    assert height(found) > height(start)


def test_the_radius_grows_over_the_warm_up() -> None:
    """The share of the radius is linear up to the warm-up's end and 1 after it; without a warm-up it is 1 at once."""
    attack = Adversary(warm_up=0.5)
    assert [attack.share(done) for done in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert Adversary(warm_up=0.0).share(0.001) == 1.0


def test_pgd_trains_on_the_attacked_images_and_trades_on_both() -> None:
    """The objective is the cross-entropy on attacked images, or the clean one plus beta KL(attacked, clean)."""
    model, images, labels = classifier(Block("none")).eval(), DIGITS.train.images, DIGITS.train.labels
    attacked = (images + 0.2).clamp(0, 1)
    loss, _ = objective(model, adversary=Adversary("pgd"))(images, labels, attacked)
    torch.testing.assert_close(loss, cross_entropy(model(attacked), labels))
    loss, _ = objective(model, adversary=Adversary("trades", beta=3.0))(images, labels, attacked)
    clean, far = softmax(model(images), 1), softmax(model(attacked), 1)
    divergence = (clean * (clean.log() - far.log())).sum(1).mean()
    torch.testing.assert_close(loss, cross_entropy(model(images), labels) + 3 * divergence)


@pytest.fixture
def rows() -> tuple[Classifier, Tensor, Tensor]:
    """A model with a tight solver, states that enter its block, and labels."""
    model = classifier(replace(ODE, tolerance=1e-7))
    return model, states(model, DIGITS.train.images), DIGITS.train.labels


def test_the_steady_state_penalty_is_the_mean_speed_around_the_end(rows) -> None:
    """TisODE's term equals .01 times the trapezoid rule's mean of |f| over [.75 T, 1.05 T] on a fine grid."""
    model, z, labels = rows
    loss, penalty = objective(model, trains="block", penalty=SteadyState())(z, labels)
    with torch.no_grad():
        fine = ODEBlock(model.block.f, t1=2.1, solver=model.block.solver).solve(z, ts=torch.linspace(0, 2.1, 281))
        speed = torch.stack([model.block.f(y).norm(dim=1).mean() for y in fine.zs[200:]])  # 1.5 is the 200th time
    expected = 0.01 * torch.trapezoid(speed, dx=1 / 80)
    torch.testing.assert_close(penalty, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(loss - penalty, cross_entropy(model.head(model.end(z)), labels), rtol=1e-4, atol=1e-5)


def test_the_transport_penalty_is_the_energy_and_the_jacobian_along_the_solve(rows) -> None:
    """RNODE's kinetic part equals the trapezoid rule's; the Jacobian's part adds to it and reaches the weights."""
    model, z, labels = rows
    _, kinetic = objective(model, trains="block", penalty=Transport(jacobian=0.0))(z, labels)
    with torch.no_grad():
        fine = model.block.solve(z, ts=torch.linspace(0, 2, 201))
        energy = torch.stack([model.block.f(y).square().mean() for y in fine.zs])
    torch.testing.assert_close(kinetic, 0.01 * torch.trapezoid(energy, dx=0.01), rtol=1e-3, atol=0)
    _, jacobian = objective(model, trains="block", penalty=Transport(kinetic=0.0))(z, labels)
    (gradient,) = torch.autograd.grad(jacobian, model.block.f.linear.weight)
    assert jacobian > 0 and gradient.abs().max() > 0


def test_lyanet_s_loss_is_taken_along_the_solution_in_place_of_the_cross_entropy(rows) -> None:
    """The loss is relu(V' + V) at the states at 0, T/4, T/2, 3T/4, V' by a difference quotient along the flow."""
    model, z, labels = rows
    loss, penalty = objective(model, trains="block", weight=0.0, penalty=LyaNet())(z, labels)
    torch.testing.assert_close(loss, penalty)
    with torch.no_grad():
        points = torch.cat([model.end(z, t1=t) if t else z for t in (0.0, 0.5, 1.0, 1.5)]).double()
        model.double()
        v = [cross_entropy(model.head(points + h * model.block.f(points)), labels.repeat(4), reduction="none")
             for h in (-1e-5, 0.0, 1e-5)]  # fmt: skip
        expected = ((v[2] - v[0]) / 2e-5 + v[1]).clamp(min=0).mean().float()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def test_a_phase_moves_what_it_trains_and_nothing_else() -> None:
    """The block's phase leaves features and head, the head's phase the field; what was fixed stays fixed after."""
    torch.manual_seed(0)
    model = Classifier(WIDTHS, ODE, head="linear")
    for trains, moved in (("block", "block"), ("head", "head"), ("all", "features block head")):
        before = {name: tensor.clone() for name, tensor in model.named_parameters()}
        train(model, DIGITS, (Phase(trains, 1, batch=32),), False, 0, "M")
        for name, tensor in model.named_parameters():
            assert torch.equal(tensor, before[name]) is (name.split(".")[0] not in moved.split()), (trains, name)
            assert tensor.requires_grad
    with pytest.raises(ValueError, match="nothing to train in 'head'"):
        train(classifier(), DIGITS, (Phase("head", 1),), False, 0, "M")


def test_an_averaged_phase_leaves_the_moving_average_behind() -> None:
    """With decay d the weights after two steps are d w1 + (1 - d) w2, w1 and w2 those of plain training."""
    phase = Phase("all", 1, 0.1, batch=32, optimiser=SGD())
    first, second, averaged = (classifier(Block("none"), net="conv") for _ in range(3))
    batch = torch.randperm(64, generator=generator(0))[:32]  # the first of the two that seed 0 draws
    one = replace(DIGITS, train=mnist_data.Split(DIGITS.train.images[batch], DIGITS.train.labels[batch]))
    train(first, one, (phase,), False, 0, "M")
    train(second, DIGITS, (phase,), False, 0, "M")
    train(averaged, DIGITS, (replace(phase, average=0.75),), False, 0, "M")
    for name, tensor in averaged.state_dict().items():
        expected = 0.75 * first.state_dict()[name] + 0.25 * second.state_dict()[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_noise_and_its_controls_train_on_gradients_of_norm_one() -> None:
    """ClippedAdam on (30, 40) leaves (0.6, 0.8), on what is shorter nothing is cut; M4's grid and its controls have it,
    so that they differ in the noise alone, and the row without it differs from M4 in nothing else."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = ClippedAdam().build([weight], 1e-3)
    for gradient, cut in (((30.0, 40.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))):
        weight.grad = torch.tensor(gradient)
        optimiser.step()
        torch.testing.assert_close(weight.grad, torch.tensor(cut))
    rows = {model.name: model for model in PRESETS["full"].models}
    noisy = [
        row
        for row in rows.values()
        if row.block.kind in ("sde", "random_time") and row.phases and not row.phases[0].adversary
    ]
    noisy += [rows[row.control] for row in noisy if row.control]
    phases = {row.name: row.phases for row in noisy}
    unclipped = phases.pop("M4-unclipped")
    assert set(phases.values()) == {(replace(unclipped[0], optimiser=ClippedAdam()),)}
    assert unclipped[0].optimiser == Adam() and rows["M4-unclipped"].block == rows["M4"].block


def test_a_constant_rate_is_the_phase_s() -> None:
    """Without one_cycle the first step of plain gradient descent is lr times the gradient."""
    model, phase = classifier(Block("none"), net="conv"), Phase("all", 1, 0.5, batch=64, optimiser=SGD(momentum=0))
    objective(model)(DIGITS.train.images, DIGITS.train.labels)[0].backward()
    expected = {n: p.detach() - 0.5 * p.grad for n, p in model.named_parameters() if p.requires_grad}
    train(model, DIGITS, (phase,), False, 0, "M")
    for name, tensor in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", [Block("none"), ODE, Block("sde", t1=2.0, steps=4, p=0.1)], ids=lambda b: b.kind)
def test_divergence_is_an_outcome_that_a_record_can_keep(block: Block) -> None:
    """At an absurd rate of SGD training ends as Diverged, with phase, epoch, loss, reason and the epochs before."""
    phases = (Phase("all", 1, 1e-3, batch=32), Phase("all", 50, 1e38, batch=32, optimiser=SGD()))
    with pytest.raises(Diverged, match="phase 2/2: training diverged in epoch .*, step ") as caught:
        train(classifier(block, net="conv"), DIGITS, phases, False, 0, "M")
    outcome = caught.value.outcome
    assert outcome["phase"] == 2 and outcome["epoch"] >= 1 and outcome["reason"]
    assert outcome["log"][0]["phase"] == 1
    json.dumps(outcome, allow_nan=False)


def test_reversible_heun_on_a_contracting_field_ends_as_diverged() -> None:
    """The paper's pair on z' = sin(-8 z), steps of 0.5: its past cannot be recovered, and that is the row's outcome."""
    model = classifier(Block("sde", p=0.01, method="reversible_heun"))
    with torch.no_grad():
        model.block.f.linear.weight.copy_(8 * torch.eye(64))
    with pytest.raises(Diverged) as caught:
        train(model, DIGITS, (Phase("block", 1),), False, 0, "M4-reversible")
    assert "the gradient would be wrong" in caught.value.outcome["reason"] and caught.value.outcome["step"] == 0


def test_wrong_recipes_are_refused_by_name() -> None:
    """What a phase or an adversary cannot be is said where it is written down."""
    with pytest.raises(ValueError, match="trains: expected 'all', 'block', 'head'"):
        Phase("field", 1)
    with pytest.raises(ValueError, match="adversary: attacks images"):
        Phase("block", 1, adversary=Adversary())
    with pytest.raises(ValueError, match="cross_entropy: expected a weight > 0"):
        Phase("all", 1, cross_entropy=0.0)
    with pytest.raises(ValueError, match="average"):
        Phase("all", 1, average=1.0)
    with pytest.raises(ValueError, match="loss: expected 'pgd' or 'trades'"):
        Adversary("mart")
    with pytest.raises(ValueError, match="steps"):
        Adversary(steps=0)
    with pytest.raises(ValueError, match="expected numbers > 0"):
        Adversary(eps=0.0)
    with pytest.raises(ValueError, match="warm_up"):
        Adversary(warm_up=2.0)
