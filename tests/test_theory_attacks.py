"""Statements on attacks: what is found lies where it may, and more attack is never less."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from examples.mnist.attacks import PGD, Threat, margin, perturb, project
from strategies import seeds

NORMS = st.sampled_from(["linf", "l2"])


def case(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, eight images of which half are corners of the cube, and its labels of them."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    images = torch.rand(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    images[:4] = images[:4].round()
    return model, images, model(images).argmax(1)


def length(change: Tensor, norm: str) -> Tensor:
    return change.flatten(1).abs().amax(1) if norm == "linf" else change.flatten(1).norm(dim=1)


@settings(max_examples=20)
@given(seeds, NORMS, st.floats(1e-3, 3.0), st.sampled_from(["ce", "margin"]), st.booleans(), st.integers(1, 2))
def test_what_is_found_lies_in_the_ball_and_in_the_cube(
    seed: int, norm: str, eps: float, loss: str, random_start: bool, restarts: int
) -> None:
    """Madry et al. 2018: |x - x0| <= eps and 0 <= x <= 1, whatever the attack."""
    model, images, labels = case(seed)
    attack = PGD(loss, steps=4, restarts=restarts, random_start=random_start)
    found = perturb(model, images, labels, Threat(norm, eps), attack, torch.Generator().manual_seed(seed))
    assert (length(found - images, norm) <= eps * (1 + 1e-9)).all()
    assert found.min() >= 0 and found.max() <= 1


def test_without_the_cut_the_cube_is_left() -> None:
    """Control, Madry et al. 2018: the same step from a corner, cut to the ball alone, leaves [0, 1]; project brings it
    back."""
    _, images, _ = case(0)
    outside = images + 0.3 * (images - 0.5).sign()
    assert outside.max() > 1 and (length(outside - images, "linf") <= 0.3 + 1e-12).all()
    assert torch.equal(project(outside, images, Threat("linf", 0.3))[:4], images[:4])


@settings(max_examples=15)
@given(seeds, NORMS)
def test_the_worst_case_falls_as_the_set_of_attacks_grows(seed: int, norm: str) -> None:
    """Croce and Hein 2020: Accuracy in the worst case over a set of attacks is at most that over any part of it (a
    minimum over more)."""
    model, images, labels = case(seed)
    threat, right = Threat(norm, 0.05 if norm == "linf" else 0.3), torch.ones(8, dtype=torch.bool)
    alone, accuracies = [], []
    for k, attack in enumerate((PGD("ce", 1), PGD("ce", 6), PGD("margin", 6), PGD("margin", 6, restarts=2))):
        generator = torch.Generator().manual_seed(seed + k)
        stands = margin(model(perturb(model, images, labels, threat, attack, generator)), labels) <= 0
        right = right & stands
        alone.append(int(stands.sum()))
        accuracies.append(int(right.sum()))
    assert accuracies == sorted(accuracies, reverse=True)
    assert all(worst <= min(alone[: k + 1]) for k, worst in enumerate(accuracies))


@settings(max_examples=15)
@given(seeds, NORMS)
def test_hits_that_carry_over_stay_hits_at_a_larger_radius(seed: int, norm: str) -> None:
    """Madry et al. 2018: The balls are nested: an image found at eps is legal at any larger one, so accuracy falls as
    hits carry over."""
    model, images, labels = case(seed)
    carried, accuracies = images.clone(), [8]
    for eps in (0.02, 0.1, 0.3, 0.9):
        threat, generator = Threat(norm, eps), torch.Generator().manual_seed(seed)
        found = perturb(model, images, labels, threat, PGD("ce", 3), generator)
        hit = margin(model(carried), labels) > 0
        carried = torch.where(hit[:, None, None, None], carried, found)
        assert (length(carried - images, norm) <= eps * (1 + 1e-9)).all() and carried.min() >= 0 and carried.max() <= 1
        accuracies.append(int((margin(model(carried), labels) <= 0).sum()))
    assert accuracies == sorted(accuracies, reverse=True)


def test_without_carrying_over_a_larger_radius_may_miss() -> None:
    """Control, Madry et al. 2018: a model that errs on (0.55, 0.65) falls to a step of 0.1 from 0.5 and stands against
    one of 0.3."""

    def model(x: Tensor) -> Tensor:
        dent = 0.05 - (x.flatten(1) - 0.6).abs()
        return torch.cat([torch.zeros_like(dent), dent], dim=1)

    image, label = torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    stands = []
    for eps in (0.1, 0.3):
        attack = PGD("ce", steps=1, rate=1.0, random_start=False)
        found = perturb(model, image, label, Threat("linf", eps), attack, torch.Generator())
        stands.append((margin(model(found), label) <= 0).item())
    assert stands == [False, True]
