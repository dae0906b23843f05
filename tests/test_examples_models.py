"""The study's models: every row builds, trains, reloads and says what it is; without noise they are their ODEs."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from examples.mnist import data as mnist_data
from examples.mnist.features import Features, fold
from examples.mnist.models import Block, Classifier
from examples.mnist.presets import PRESETS
from examples.mnist.recipes import Effort, Model, further
from examples.mnist.training import Phase, train
from odelayers import Euler, Heun, ODEBlock, SineField

DIGITS = mnist_data.load("digits").first(64, 20, 20)
EFFORT = Effort(fresh=(1, 1, 1), longer=1, official=(1, 1, 1), adversarial=1)
ROWS = {model.name: model for model in (*PRESETS["smoke"].models, *further(EFFORT)) if model.certified is None}
WIDTHS = (2, 2, 4)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def short(phase: Phase) -> Phase:
    """The phase on two batches."""
    attack = phase.adversary and replace(phase.adversary, steps=2)
    return replace(phase, epochs=1, batch=32, adversary=attack)


def build(spec: Model) -> Classifier:
    return Classifier(WIDTHS, spec.block, head=spec.head, net=spec.net)


def trained(spec: Model) -> tuple[Classifier, list[dict]]:
    """The row after two steps a phase, from its start trained as little, as the study chains them."""
    torch.manual_seed(0)
    model = build(spec)
    if spec.start:
        model.start_from(trained(ROWS[spec.start])[0].state_dict())
    phases = tuple(short(phase) for phase in spec.phases)
    return model, train(model, DIGITS, phases, spec.regularised, 0, spec.name)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_two_steps_and_reloads_to_the_same_logits(name: str) -> None:
    """Two steps change weights; what is saved and loaded into a fresh model answers the same, noise included."""
    spec = ROWS[name]
    model, log = trained(spec)
    assert [line["steps"] for line in log] == [2] * len(spec.phases)
    assert all(math.isfinite(line["loss"]) and 0 <= line["validation"] <= 1 for line in log)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = build(spec)
    again.load_state_dict(torch.load(file, weights_only=True))
    images = DIGITS.test.images
    with torch.no_grad():
        first, second = (m.eval()(images, generator()) for m in (model, again))
    assert torch.equal(first, second) and first.shape == (20, 10) and first.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ROWS if name.endswith("-off")])
def test_noise_off_at_test_evaluates_the_same_weights_as_their_ode(name: str) -> None:
    """The row takes its weights from the noisy one; its end state is that of the ODE by the noiseless method."""
    spec = ROWS[name]
    noisy = ROWS[spec.start]
    assert spec.phases == () and noisy.block == replace(spec.block, noise_at_test=True)
    torch.manual_seed(0)
    model = build(spec).eval()
    assert not model.noisy and build(noisy).noisy
    z = torch.randn(5, 64).tanh()
    first, second = (model.end(z, generator(seed)) for seed in (1, 2))
    assert torch.equal(first, second)
    if spec.block.method != "reversible_heun":
        ode = {"sde": {"euler_maruyama": Euler(20), "heun": Heun(20)}.get(spec.block.method)}
        solver = ode.get(spec.block.kind) or model.block.solver
        torch.testing.assert_close(first, ODEBlock(model.block.f, t1=10.0, solver=solver)(z), rtol=1e-4, atol=1e-4)


def test_the_grid_of_noise_is_the_study_s() -> None:
    """keep p in {.99, .9, .75} x three ways to read and solve x noise on and off, each from M3 with M5's steps."""
    noisy = {n: m for n, m in ROWS.items() if m.block.kind == "sde" and m.block.p > 0}
    grid = {n: m for n, m in noisy.items() if n != "M4-unclipped"}
    assert len(grid) == 3 * 3 * 2
    trained = [m for m in grid.values() if m.phases]
    assert {(m.block.p, m.block.method) for m in trained} == {
        (p, method) for p in (0.01, 0.1, 0.25) for method in ("euler_maruyama", "heun", "reversible_heun")
    }
    calculus = {m.block.method: build(m).block.calculus for m in trained}
    assert calculus == {"euler_maruyama": "ito", "heun": "stratonovich", "reversible_heun": "stratonovich"}
    for model in trained:
        assert model.start == "M3" and model.regularised
        assert model.phases == ROWS["M5"].phases
        assert model.block.t1 == 10.0


def test_the_random_end_time_has_the_noise_s_variance() -> None:
    """T + sqrt(layer_time) sigma W_T: mean T, variance layer_time p / (1 - p) T; one draw a batch, a draw a row."""
    block = Block("random_time", p=0.2, layer_time=0.5).build()
    block.f = _Ones()
    z = torch.zeros(4000, 64)
    block.train()
    in_training = block.solve(z[:3], generator=generator()).final
    assert torch.equal(in_training[0], in_training[2]) and abs(in_training[0, 0] - 10) > 1e-3
    times = block.eval().solve(z, generator=generator()).final[:, 0]
    assert abs(times.mean() - 10) < 5 * times.std() / 4000**0.5
    assert times.var().item() == pytest.approx(0.5 * 0.25 * 10, rel=0.15)
    block.noise_in_eval = False
    assert torch.allclose(block(z[:2]), torch.tensor(10.0))
    assert torch.allclose(block(z[:2], t1=1.0), torch.tensor(1.0)), "a given end time is taken as it is"


class _Ones(torch.nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


def test_a_start_gives_what_fits_and_leaves_the_rest_fresh() -> None:
    """Features always; a block only of the same shape; a head only of the same kind, though all have one shape."""
    torch.manual_seed(0)
    start = Classifier(WIDTHS, Block("ode"))
    heads = [(Block("ode"), head) for head in ("linear", "orthogonal", "random")]
    for block, head in (*heads, (Block("ode", extra=4), "simplex"), (Block("none"), "simplex")):
        model = Classifier(WIDTHS, block, head=head)
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.start_from(start.state_dict(), same_head=head == "simplex")
        for name, tensor in model.state_dict().items():
            fits = name.startswith("features.") or (head == "simplex" and name.startswith("head."))
            fits = fits or (block == Block("ode") and name.startswith("block."))
            assert torch.equal(tensor, start.state_dict()[name] if fits else fresh[name]), name
    with pytest.raises(RuntimeError, match="size mismatch"):
        Classifier((2, 2, 8), Block("none")).start_from(start.state_dict())


def test_wrong_names_are_refused_where_they_are_written() -> None:
    """A block, field, method, head or extractor that there is not is an error that names those there are."""
    for wrong in ({"kind": "cde"}, {"kind": "ode", "field": "cosine"}, {"kind": "sde", "method": "srk"}):
        with pytest.raises(ValueError, match=f"Block.{list(wrong)[-1]}: expected one of '"):
            Block(**wrong)
    with pytest.raises(ValueError, match="head: expected one of 'simplex', 'orthogonal', 'random', 'linear'"):
        Classifier(WIDTHS, Block("none"), head="cubic")
    with pytest.raises(ValueError, match="net: expected one of 'resnet', 'conv'"):
        Classifier(WIDTHS, Block("none"), net="vit")


def test_augmentation_is_dropped_again_and_the_field_sees_the_padded_state() -> None:
    """M7's field works on 80 coordinates, its block gives 64; `entering` is what the field sees at the start."""
    model = build(ROWS["M7"])
    z = torch.randn(3, 64)
    assert model.end(z).shape == (3, 64)
    assert model.entering(z).shape == (3, 80) and torch.equal(model.entering(z)[:, :64], z)
    assert model.block.f(model.entering(z)).shape == (3, 80)
    assert isinstance(model.block.f, SineField)


def test_folded_normalisations_leave_the_map_and_its_gradient() -> None:
    """In evaluation, in float64, to 1e-12 of both; no normalisation is left; in another order nothing is folded."""
    torch.manual_seed(0)
    net = Features((4, 8, 16)).double()
    for _ in range(3):  # running statistics of their own
        net(torch.rand(32, 1, 28, 28, dtype=torch.float64))
    folded, x = copy.deepcopy(net.eval()), torch.rand(8, 1, 28, 28, dtype=torch.float64, requires_grad=True)
    fold(folded)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    outs = [each(x) for each in (net, folded)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in outs), rtol=1e-12, atol=1e-12)
    other = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3)).eval()
    fold(other)
    assert isinstance(other[0], nn.BatchNorm2d)
