"""M14's certificate: exact operator norms, no pair moved further apart than they say, no attack inside the radius."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from examples.mnist import certified, certified_training
from examples.mnist.attacks import PGD, Threat, margin, perturb
from examples.mnist.certified import CertifiedClassifier, ConvolutionalPotential, Recipe
from examples.mnist.certified_training import AlmostOrthogonal
from examples.mnist.data import Dataset, Split, load
from odelayers import Euler, ODEBlock, SolveError

SMALL = Recipe(squeeze=7, convolutions=(12, 12), dense=(40,), epochs=3, batch=64, lr=1e-2)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", say=lambda text: None)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> tuple[CertifiedClassifier, list]:
    """A small model after three epochs of scikit-learn's digits, and its log."""
    return certified_training.train(SMALL, digits, seed=0)


@pytest.fixture
def model(trained) -> CertifiedClassifier:
    return copy.deepcopy(trained[0])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def ratios(model: CertifiedClassifier, x: Tensor, y: Tensor) -> Tensor:
    """How many times further apart the states of two images are than the images, (B,)."""
    return (model.states(x) - model.states(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)


def searched_ratio(model: CertifiedClassifier, images: Tensor, steps: int = 60) -> Tensor:
    """The largest ratio that gradient ascent on both images of a pair finds, one a pair."""
    x = images.double().clone().requires_grad_()
    y = (images.double() + 0.05 * torch.randn(images.shape, generator=generator()).double()).requires_grad_()
    optimiser = torch.optim.Adam([x, y], lr=0.02)
    best = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(steps):
        found = ratios(model, x, y)
        best = torch.maximum(best, found.detach())
        optimiser.zero_grad()
        (-found.log().sum()).backward()
        optimiser.step()
    return best


@pytest.mark.parametrize(("kernel", "size", "rows"), [(1, 3, 5), (3, 4, 2), (3, 5, 7), (5, 4, 3)])
def test_the_norm_of_a_convolution_is_that_of_its_jacobian(kernel: int, size: int, rows: int) -> None:
    """The matrix by automatic differentiation has the same largest singular value, and W' is its transpose."""
    f = ConvolutionalPotential(3, rows, kernel, size).double()
    nn.init.zeros_(f.conv.bias)
    z = torch.randn(1, 3, size, size, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(f.conv, z).reshape(rows * size**2, 3 * size**2)
    assert f.operator_norm().item() == pytest.approx(torch.linalg.svdvals(jacobian)[0].item(), rel=1e-12)
    torch.testing.assert_close(f(z).flatten(), -jacobian.T @ torch.relu(jacobian @ z.flatten()))


def test_the_norm_does_not_come_from_power_iteration() -> None:
    """Two singular values a millionth apart are told apart, where fifty power iterations stay below the larger one."""
    f = ConvolutionalPotential(2, 2, 1, 1)
    with torch.no_grad():
        f.conv.weight.copy_(torch.diag(torch.tensor([1.0, 1.0 + 1e-6]))[:, :, None, None])
    v, W = torch.tensor([1.0, 1e-3], dtype=torch.float64), f.matrix()
    for _ in range(50):
        v = W.T @ W @ v / (W.T @ W @ v).norm()
    exact = f.conv.weight.double().abs().max().item()
    assert f.operator_norm().item() == pytest.approx(exact, rel=1e-14)
    assert (W @ v).norm().item() < exact - 5e-7


@pytest.mark.parametrize("shape", [(5, 8), (9, 4), (6, 3, 3, 3), (2, 4, 5, 5)])
def test_almost_orthogonal_rows_have_norm_one_at_most(shape: tuple[int, ...]) -> None:
    """Scaled rows stay at norm <= 1, near it for orthogonal ones; unscaled they exceed it (control)."""
    orthogonal = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))
    for weight in (torch.randn(shape, dtype=torch.float64), orthogonal):
        scaled = AlmostOrthogonal()(weight)
        if len(shape) == 2:
            norm, before = (torch.linalg.matrix_norm(W, 2).item() for W in (scaled, weight))
        else:
            norm, before = (convolution_norm(W) for W in (scaled, weight))
        assert norm <= 1 + 1e-12
    assert before > 1 - 1e-12
    if shape == (5, 8):
        assert norm == pytest.approx(1, abs=1e-12)


def convolution_norm(weight: Tensor, size: int = 6) -> float:
    f = ConvolutionalPotential(weight.shape[1], weight.shape[0], weight.shape[2], size).double()
    f.conv.weight.data = weight
    return f.operator_norm().item()


def test_random_pairs_stay_within_the_lipschitz_bound(model: CertifiedClassifier, digits: Dataset) -> None:
    """Images, noise near and far from them, images of any size: none moves apart by more than the bound."""
    model, images = model.double(), digits.test.images[:100].double()
    bound = model.lipschitz()
    for size in (1e-3, 1e-1, 1.0, 30.0):
        noise = size * torch.randn(images.shape, generator=generator(), dtype=torch.float64)
        assert ratios(model, images, images + noise).max() <= bound * (1 + 1e-9)
        assert ratios(model, size * images, size * images.flip(0) + noise).max() <= bound * (1 + 1e-9)


def test_searched_pairs_stay_within_the_lipschitz_bound_and_come_near_it(
    model: CertifiedClassifier, digits: Dataset
) -> None:
    """Gradient ascent on the ratio over both images of a pair never exceeds the bound, and reaches 95 % of it."""
    best = searched_ratio(model.double(), digits.test.images[:20])
    assert best.max() <= model.lipschitz() * (1 + 1e-9)
    assert best.max() > 0.95 * model.lipschitz()


@pytest.mark.parametrize("part", ["convolutions", "dense"])
def test_a_step_too_long_for_its_weights_is_caught(model: CertifiedClassifier, digits: Dataset, part: str) -> None:
    """Control: at h ||W||^2 = 4 the bound is 3 where it was 1, and searched pairs do move apart by more than 1."""
    assert model.lipschitz() == pytest.approx(1, abs=1e-5)
    block = getattr(model, part)[0]
    linear = certified.linear(block)
    with torch.no_grad():
        linear.weight *= math.sqrt(2) / block.f.operator_norm()
        linear.bias += 5.0  # all units are active
    assert model.lipschitz() == pytest.approx(3, rel=1e-5)
    assert 1.05 < searched_ratio(model.double(), digits.test.images[:20]).max() <= 3


def test_one_long_step_is_split_into_short_ones() -> None:
    """The same field over the same time is within the bound with as many steps as h ||W||^2 <= 2 asks for."""
    block = certified._block(ConvolutionalPotential(2, 4, 3, 5).double(), 1)
    block.f.conv.weight.data *= 2 / block.f.operator_norm()  # h ||W||^2 = 8 in one step
    nn.init.constant_(block.f.conv.bias, 50.0)  # all units active: the block is linear
    z = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    for steps, norm in ((1, 7.0), (2, 9.0), (4, 1.0)):
        split = ODEBlock(block.f, t1=block.t1, solver=Euler(steps=steps))
        jacobian = torch.autograd.functional.jacobian(split, z).reshape(50, 50)
        largest = torch.linalg.matrix_norm(jacobian, 2).item()
        assert largest == pytest.approx(norm, rel=1e-9) or (norm == 1.0 and largest <= 1 + 1e-12)


def test_without_blocks_the_radius_is_the_distance_to_the_nearest_boundary(digits: Dataset) -> None:
    """A linear classifier's certificate is exact: just inside it no direction, just outside the nearest one, flips."""
    model = CertifiedClassifier(replace(SMALL, convolutions=(), dense=()))
    images = digits.test.images[:50].double()
    classes, radii = model(images.float()).argmax(1), model.certified_radius(images) + certified.ROUNDING
    model, rows = model.double(), model.head.weight.detach().double()
    across = nn.functional.normalize(rows[None] - rows[classes][:, None], dim=2)  # towards every other class
    across = nn.functional.pixel_shuffle(across.reshape(-1, 49, 4, 4), 7).reshape(50, 10, 1, 28, 28)
    for factor, flips in ((1 - 1e-6, False), (1 + 1e-6, True)):
        moved = images[:, None] + factor * radii[:, None, None, None, None] * across
        found = model(moved.flatten(0, 1)).argmax(1).view(50, 10)
        assert ((found != classes[:, None]).any(1) == flips).all()


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_no_attack_succeeds_within_the_certified_radius(model: CertifiedClassifier, digits: Dataset, loss: str) -> None:
    """PGD on test images, each at its own radius, breaks none; at four times the radius it breaks most (control)."""
    images, labels = digits.test.images, digits.test.labels
    radii = model.certified_radius(images, labels)
    sure = (radii > 0.02).nonzero().squeeze(1)[:30]
    assert len(sure) == 30
    broken = {}
    for factor in (1.0, 4.0):
        found = [
            perturb(
                model, images[i : i + 1], labels[i : i + 1], Threat("l2", factor * radii[i].item()),
                PGD(loss, steps=20), generator(),
            )
            for i in sure.tolist()
        ]  # fmt: skip
        broken[factor] = (margin(model(torch.cat(found)), labels[sure]) > 0).sum().item()
    assert broken[1.0] == 0
    assert broken[4.0] > 15


def test_the_radius_does_not_depend_on_the_scale_of_the_pixels(model: CertifiedClassifier, digits: Dataset) -> None:
    """Pixels and biases times 3: logits and Lipschitz constant triple, radii stay; without the latter they triple."""
    other = CertifiedClassifier(replace(SMALL, scale=3.0))
    other.load_state_dict(model.state_dict())
    for block in other.blocks:
        certified.linear(block).bias.data *= 3
    images = digits.test.images[:40]
    torch.testing.assert_close(other(images), 3 * model(images), rtol=1e-4, atol=1e-4)
    assert other.lipschitz() == pytest.approx(3 * model.lipschitz(), rel=1e-12)
    torch.testing.assert_close(other.certified_radius(images), model.certified_radius(images), rtol=1e-9, atol=1e-9)
    gaps = other.certified_radius(images) + certified.ROUNDING
    torch.testing.assert_close(gaps * other.lipschitz(), 3 * gaps * model.lipschitz())


def test_the_radius_does_not_depend_on_the_length_of_the_heads_rows(
    model: CertifiedClassifier, digits: Dataset
) -> None:
    """The distances of the rows as they are make the certificate, whatever their scale or a shift of all of them."""
    images, before = digits.test.images[:40], model.certified_radius(digits.test.images[:40])
    with torch.no_grad():
        model.head.weight.copy_(7 * model.head.weight + torch.linspace(-1, 1, 784))
    torch.testing.assert_close(model.certified_radius(images), before, rtol=1e-4, atol=1e-5)


def test_wrong_samples_have_negative_radii_and_equal_rows_none(model: CertifiedClassifier, digits: Dataset) -> None:
    """A label's radius is negative exactly where it is not predicted; classes that nothing parts have none."""
    images, labels = digits.test.images, digits.test.labels
    wrong = model(images).argmax(1) != labels
    assert 0 < wrong.sum() < len(labels)
    assert torch.equal(model.certified_radius(images, labels) < -certified.ROUNDING, wrong)
    model.head.weight[1:] = model.head.weight[0]
    assert model.certified_radius(images).max() <= 0


def test_training_keeps_the_constraint_and_certifies(trained, digits: Dataset) -> None:
    """Three epochs on the digits: the exact constant stays 1 to rounding, the log is the evaluation of each epoch."""
    model, log = trained
    assert [line["epoch"] for line in log] == [1, 2, 3] and log[0]["loss"] > log[2]["loss"]
    assert all(line["validation"]["lipschitz"] == pytest.approx(1, abs=1e-5) for line in log)
    last = certified.evaluate(model, digits.validation)
    assert last == log[-1]["validation"]
    assert last["clean"] > 0.8 and last["rounding"] < certified.ROUNDING / 10
    assert last["clean"] >= last["certified"]["0.5"] >= last["certified"]["1.0"] >= last["certified"]["1.58"]
    assert last["certified"]["0.5"] > 0.3


def test_the_same_seed_trains_the_same_model(digits: Dataset) -> None:
    """Weights, order and shifts come from the seed alone; torch's own generator is left as it was."""
    few = digits.first(128, 20, 20)
    brief = replace(SMALL, epochs=1)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(torch.randint(1000, ()).item())
        state = torch.get_rng_state()
        models.append(certified_training.train(brief, few, seed)[0])
        assert torch.equal(torch.get_rng_state(), state)
    one, two, other = ([*m.state_dict().values()] for m in models)
    assert all(map(torch.equal, one, two)) and not all(map(torch.equal, one, other))


def test_sealing_changes_no_logit(digits: Dataset) -> None:
    """The weights that training computes at every access become plain ones: same logits, plain state dict."""
    scaled = certified_training.constrained(CertifiedClassifier(SMALL))
    plain = certified_training.sealed(scaled)
    torch.testing.assert_close(plain(digits.test.images), scaled(digits.test.images))
    assert plain.state_dict().keys() == CertifiedClassifier(SMALL).state_dict().keys()


def test_rounded_weights_carry_their_own_certificate(model, digits: Dataset) -> None:
    """Rounded to half they make another model, whose constant is its own."""
    norms = [block.f.operator_norm().item() for block in model.blocks]
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    rounded = [block.f.operator_norm().item() for block in model.blocks]
    assert rounded != norms
    assert model.lipschitz() == pytest.approx(math.prod(max(1, 2 * norm**2 - 1) for norm in rounded), rel=1e-12)
    assert certified.evaluate(model, digits.test)["clean"] > 0.8


def test_shifted_images_are_the_images_moved() -> None:
    """Each equals one of the nine shifts by at most one pixel, zeros moving in; all nine occur; 0 does nothing."""
    image = torch.rand(1, 1, 5, 4)
    padded = nn.functional.pad(image, [1] * 4)[0]
    nine = torch.stack([padded[:, i : i + 5, j : j + 4] for i in range(3) for j in range(3)])
    found = certified_training.shifted(image.expand(200, 1, 5, 4), 1, generator())
    equal = (found[:, None] == nine[None]).flatten(2).all(2)
    assert (equal.sum(1) == 1).all() and equal.any(0).all()
    assert certified_training.shifted(image, 0, generator()) is image


@pytest.mark.parametrize(
    ("change", "words"),
    [({"squeeze": 3}, "squeeze: expected a divisor of 28"), ({"kernel": 2}, "kernel: expected an odd")],
)
def test_recipes_that_do_not_fit_are_refused(change: dict[str, int], words: str) -> None:
    """Each error names the field of the recipe."""
    with pytest.raises(ValueError, match=words):
        CertifiedClassifier(replace(SMALL, **change))


def test_training_that_diverges_is_an_error(digits: Dataset) -> None:
    """States that are not finite are reported by the solver, not averaged away."""
    broken = Split(digits.train.images * math.nan, digits.train.labels)
    with pytest.raises(SolveError, match="NaN or inf"):
        certified_training.train(replace(SMALL, epochs=1), replace(digits, train=broken))
