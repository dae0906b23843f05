"""Rightmost eigenvalues and Euclidean log norms without Jacobians: beside dense ones, and where they are no answer."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from odelayers import ConvField, RitzValues, euclidean_log_norm, jacobian, log_norm, rightmost_eigenvalues
from strategies import Bounded, bounded_fields, random, seeds, states

F64 = torch.float64


def linear(A: Tensor) -> Callable[[Tensor], Tensor]:
    """The field whose Jacobian is A: one for all rows, or one for each."""
    return lambda z: (A @ z.unsqueeze(-1)).squeeze(-1)


def rightmost(J: Tensor, k: int) -> Tensor:
    """The k largest real parts of the eigenvalues by LAPACK, (B, k)."""
    return torch.linalg.eigvals(J).real.sort(dim=1, descending=True).values[:, :k]


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest distance in the best matching of each row."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        cost = (a[:, None] - b[None]).abs().numpy()
        worst = max(worst, float(cost[linear_sum_assignment(cost)].max()))
    return worst


@settings(max_examples=30)
@given(bounded_fields(), seeds)
def test_over_the_whole_space_they_are_exact(case: Bounded, seed: int) -> None:
    """From D iterations on: the dense eigenvalues and log norm of a network's Jacobians, all of them, to rounding."""
    z = states(3, case.dim, seed)
    J = jacobian(case.f, z).detach()
    found, norm = rightmost_eigenvalues(case.f, z, k=case.dim), euclidean_log_norm(case.f, z)
    slack = 1e-12 * torch.linalg.cond(torch.linalg.eig(J)[1]).amax().item()
    assert distance(found.values, torch.linalg.eigvals(J)) <= max(slack, 1e-9) and found.converged.all()
    torch.testing.assert_close(norm.values, log_norm(J, 2), rtol=0, atol=1e-10)
    assert (found.values.real.diff(dim=1) <= 0).all()


NEARLY_CLOSED = {
    "few values": lambda D, m, seed: torch.diag(-1 - 3 * random(m, seed=seed).abs()[torch.arange(D) % m]),
    "identity plus low rank": lambda D, m, seed: (
        0.1 / D * random(D, m, seed=seed) @ random(m, D, seed=seed + 1) - torch.eye(D, dtype=F64)
    ),
}


@settings(max_examples=40)
@given(st.sampled_from(sorted(NEARLY_CLOSED)), st.integers(6, 40), st.integers(1, 5), seeds)
def test_what_is_left_of_a_nearly_closed_space_is_a_direction(kind: str, D: int, m: int, seed: int) -> None:
    """After m steps what is left of a product is far below 1e-12: its length is 1 all the same, the answers dense."""
    A = NEARLY_CLOSED[kind](D, m, seed)
    Q = torch.linalg.qr(random(D, D, seed=seed + 2))[0]
    A, z = Q @ A @ Q.T, torch.zeros(1, D, dtype=F64)
    assert abs(rightmost_eigenvalues(linear(A), z).values.real - rightmost(A[None], 1)) < 1e-9
    assert abs(euclidean_log_norm(linear(A), z).values - log_norm(A, 2)) < 1e-9


@pytest.mark.parametrize("exponent", [-100, -60, -40, 0, 60, 100])
def test_the_scale_of_a_jacobian_does_not_matter(exponent: int) -> None:
    """In float32 squares of 2^-100 and 2^100 are out of range: the answers are those at scale 1, scaled."""
    A, z, scale = random(6, 6, seed=3).float(), torch.zeros(1, 6), 2.0**exponent
    for ask in (rightmost_eigenvalues, euclidean_log_norm):
        found, expected = ask(linear(A * scale), z), ask(linear(A), z)
        torch.testing.assert_close(found.values / scale, expected.values, rtol=1e-4, atol=1e-5)
        assert found.converged.all() and bool(found.values.isfinite().all())


def test_conv_fields_have_their_dense_answers() -> None:
    """ConvField on 4x5x5, D = 100, with 60 iterations: both as dense, to 1e-6, and said to have converged."""
    f, z = ConvField(4).double(), random(3, 4, 5, 5)
    J = jacobian(f, z).detach()
    found, norm = rightmost_eigenvalues(f, z, k=3, iterations=60), euclidean_log_norm(f, z, iterations=60)
    assert found.converged.all() and norm.converged.all()
    torch.testing.assert_close(found.values.real, rightmost(J, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(norm.values, log_norm(J, 2), rtol=0, atol=1e-6)
    alone = rightmost_eigenvalues(f, z[1:2], k=3, iterations=60)
    torch.testing.assert_close(alone.values, found.values[1:2], rtol=0, atol=1e-8)
    torch.testing.assert_close(euclidean_log_norm(f, z[1:2], iterations=60).values, norm.values[1:2])


def test_a_state_of_12544_coordinates_needs_no_jacobian() -> None:
    """16x28x28, whose Jacobian would take 630 MB a row: a known rightmost pair, and a conv net's bounds in order."""
    decay = torch.linspace(1, 2, 6272)
    decay[77] = 0.1

    def spirals(z: Tensor) -> Tensor:
        """6272 planes, each with the eigenvalues -decay +- 3i."""
        x, y = z.flatten(1).split(6272, 1)
        return torch.cat([-decay * x - 3 * y, 3 * x - decay * y], 1).view_as(z)

    z = torch.randn(2, 16, 28, 28)
    found = rightmost_eigenvalues(spirals, z, k=2, iterations=40)
    assert found.converged.all()
    torch.testing.assert_close(found.values, torch.tensor([[-0.1 + 3j, -0.1 - 3j]] * 2), rtol=0, atol=1e-3)
    assert euclidean_log_norm(spirals, z, iterations=40).values.tolist() == pytest.approx([-0.1, -0.1], abs=1e-3)
    net = ConvField(16)
    norms = [euclidean_log_norm(net, z[:1], iterations=m) for m in (5, 10, 20)]
    assert norms[0].values < norms[1].values < norms[2].values  # Lanczos' values rise
    assert norms[2].residuals < norms[0].residuals


def test_each_row_has_its_own_matrix() -> None:
    """Eight random 30x30 matrices at once, in any state shape and at a time: each as dense."""
    A = random(8, 30, 30) / 30**0.5
    field: Callable[..., Tensor] = lambda t, z: t * linear(A)(z.flatten(1)).view_as(z)  # noqa: E731
    found = rightmost_eigenvalues(field, random(8, 5, 6), 2.0, k=4, iterations=30)
    torch.testing.assert_close(found.values.real, rightmost(2 * A, 4), rtol=0, atol=1e-10)
    norm = euclidean_log_norm(field, random(8, 5, 6), 2.0, iterations=30)
    torch.testing.assert_close(norm.values, log_norm(2 * A, 2), rtol=0, atol=1e-10)


def test_of_a_conjugate_pair_the_upper_comes_first() -> None:
    """k = 1 gives the one with the positive imaginary part."""
    A = torch.block_diag(torch.tensor([[-1.0, 2.0], [-2.0, -1.0]]), torch.tensor([[-3.0]])).double()
    assert rightmost_eigenvalues(linear(A), random(1, 3)).values.item() == pytest.approx(-1 + 2j)
    found = rightmost_eigenvalues(linear(A), random(1, 3), k=3).values[0]
    assert [complex(x) for x in found.tolist()] == [pytest.approx(v) for v in (-1 + 2j, -1 - 2j, -3)]


CLOSED = {
    "a multiple of the identity": (-2 * torch.eye(6, dtype=F64), 0.0),
    "zero": (torch.zeros(6, 6, dtype=F64), 0.0),
    "two eigenvalues": (torch.diag(torch.tensor([1.0, -1, -1, -1, -1, -1], dtype=F64)), 0.0),
    "rank one": (random(6, 1) @ random(1, 6, seed=1), 0.0),
    "blocks that do not meet": (torch.block_diag(random(3, 3), random(3, 3, seed=1)), 0.0),
    "nilpotent": (torch.diag(torch.ones(5, dtype=F64), 1), 1e-2),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_space_that_closes_early_hides_nothing(name: str) -> None:
    """Where A maps the space into itself, the search goes on elsewhere: all eigenvalues, all mates undisturbed."""
    A, slack = CLOSED[name]
    mate = random(6, 6, seed=2)
    z = random(2, 6)
    found = rightmost_eigenvalues(linear(torch.stack([A, mate])), z, k=6)
    assert found.converged.all()
    assert distance(found.values[:1], torch.linalg.eigvals(A)[None]) <= slack + 1e-7
    assert distance(found.values[1:], torch.linalg.eigvals(mate)[None]) < 1e-10
    norm = euclidean_log_norm(linear(torch.stack([A, mate])), z)
    torch.testing.assert_close(norm.values, log_norm(torch.stack([A, mate]), 2), rtol=0, atol=1e-10)


@settings(max_examples=30)
@given(seeds, st.integers(1, 40))
def test_the_log_norm_is_reached_from_below(seed: int, m: int) -> None:
    """Rayleigh: no iteration exceeds it, more iterations never lower it, and an eigenvalue is within the residual."""
    A = random(2, 40, 40, seed=seed)
    few, more = (euclidean_log_norm(linear(A), random(2, 40), iterations=i) for i in (m, m + 1))
    assert (few.values <= log_norm(A, 2) + 1e-10).all() and (few.values <= more.values + 1e-10).all()
    spectra = torch.linalg.eigvalsh((A + A.mT) / 2)
    assert ((spectra - few.values[:, None]).abs().amin(1) <= few.residuals + 1e-10).all()


@settings(max_examples=30)
@given(seeds, st.integers(1, 20))
def test_a_residual_is_the_distance_to_a_matrix_with_that_eigenvalue(seed: int, m: int) -> None:
    """The smallest singular value of A - value I is at most the residual (backward error)."""
    A = random(2, 20, 20, seed=seed)
    found = rightmost_eigenvalues(linear(A), random(2, 20), iterations=m)
    shifted = A - found.values[:, :1, None] * torch.eye(20)
    assert (torch.linalg.svdvals(shifted)[:, -1] <= found.residuals[:, 0] + 1e-10).all()


def test_too_few_iterations_are_said_to_be_too_few() -> None:
    """Control: with 5 of 200 the estimate is off by over a tenth of the abscissa, and `converged` is False."""
    A = random(1, 200, 200) / 200**0.5
    exact = rightmost(A, 1).item()
    few, enough = (rightmost_eigenvalues(linear(A), random(1, 200), iterations=m) for m in (5, 150))
    assert not few.converged.any() and (few.values.real - exact).abs() > 0.1
    assert enough.converged.all() and (enough.values.real - exact).abs() < 1e-3


def test_an_eigenvector_that_the_start_lacks_is_never_found_by_few_iterations() -> None:
    """Control: converged is no proof. An eigenvalue 1 among 4000 of -1 and below, met by 1 / 4000 of the start."""
    values = torch.linspace(-1.001, -1, 4000, dtype=F64)
    values[5] = 1.0
    found = rightmost_eigenvalues(lambda z: z * values, torch.zeros(1, 4000, dtype=F64), iterations=1, tol=0.1)
    assert found.converged.all() and found.values[0, 0].real < -0.9
    assert rightmost_eigenvalues(lambda z: z * values, torch.zeros(1, 4000, dtype=F64), iterations=4).values.real > 0.99


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_residuals_are_never_below_the_rounding(dtype: torch.dtype, accuracy: float) -> None:
    """In single precision exact up to it, in half precision not converged at a tolerance that rounding exceeds."""
    A = (random(1, 12, 12) / 4).to(dtype)
    z = torch.zeros(1, 12, dtype=dtype)
    found, norm = rightmost_eigenvalues(linear(A), z), euclidean_log_norm(linear(A), z)
    assert found.values.dtype == torch.complex64 and norm.values.dtype == found.residuals.dtype == torch.float32
    assert abs(found.values.real - rightmost(A.double(), 1)) < accuracy
    assert abs(norm.values - log_norm(A.double(), 2)) < accuracy
    for result in (found, norm):
        assert (result.residuals >= 12**0.5 * torch.finfo(dtype).eps * 0.1).all()
        assert result.converged.all() == (dtype == torch.float32)


def test_fields_that_ignore_z_and_empty_batches() -> None:
    """The Jacobian 0, with and without parameters; no row, no value; a batch of scalars; no graph is kept."""
    bias = nn.Parameter(torch.ones(3))
    for f in (lambda z: torch.zeros_like(z), lambda z: bias.expand_as(z), lambda z: z.detach()):
        for found in (rightmost_eigenvalues(f, torch.randn(2, 3)), euclidean_log_norm(f, torch.randn(2, 3))):
            assert (found.values == 0).all() and found.converged.all() and not found.values.requires_grad
    assert [tuple(x.shape) for x in rightmost_eigenvalues(ConvField(4), torch.zeros(0, 4, 2, 2), k=2)] == [(0, 2)] * 3
    assert [tuple(x.shape) for x in euclidean_log_norm(ConvField(4), torch.zeros(0, 4, 2, 2))] == [(0,)] * 3
    assert isinstance(rightmost_eigenvalues(lambda z: -2 * z, torch.ones(3)), RitzValues)
    with torch.inference_mode():
        assert rightmost_eigenvalues(
            lambda z: -(z**3), torch.ones(2, 3)
        ).values.real.flatten().tolist() == pytest.approx([-3.0] * 2)
    assert euclidean_log_norm(lambda z: -2 * z, torch.ones(3)).values.tolist() == pytest.approx([-2.0] * 3)


@pytest.mark.parametrize("ask", [rightmost_eigenvalues, euclidean_log_norm])
@pytest.mark.parametrize(
    ("f", "z", "keywords", "error", "words"),
    [
        (nn.BatchNorm1d(3), torch.zeros(2, 3), {}, ValueError, "batch statistics.*GroupNorm"),
        (nn.Dropout(0.5), torch.zeros(2, 3), {}, ValueError, "draws random numbers"),
        (torch.sin, torch.zeros(2, 3, dtype=torch.int64), {}, TypeError, "int64"),
        (lambda z: z[:, :2], torch.zeros(2, 3), {}, ValueError, r"\(2, 3\).*\(2, 2\)"),
        (lambda z: -z, torch.tensor([[0.0], [math.nan]]), {}, ValueError, r"z: .* 1 of 2 rows \(1\)"),
        (lambda z: z.sqrt(), torch.tensor([[1.0], [0.0]]), {}, ValueError, r"J.* v: .* 1 of 2 rows \(1\)"),
        (lambda z: -z, torch.zeros(2, 3), {"iterations": 0}, ValueError, "iterations: expected an int >= 1"),
        (lambda z: -z, torch.zeros(2, 3), {"tol": 0.0}, ValueError, "tol: expected a number > 0"),
    ],
)
def test_bad_input_is_named(ask, f, z: Tensor, keywords: dict, error: type[Exception], words: str) -> None:
    """Typed errors that say what, where, expected and got."""
    field = f if isinstance(f, nn.Module) else lambda z: f(z)
    with pytest.raises(error, match=words):
        ask(field, z, **keywords)


def test_the_time_is_zero_unless_it_is_given() -> None:
    """Of f = (t - 1) z the only eigenvalue, and the log norm, are t - 1."""
    f, z = lambda t, z: (t - 1) * z, torch.randn(2, 3, dtype=torch.float64)
    for ask in (euclidean_log_norm, lambda *a: rightmost_eigenvalues(*a, k=1)):
        for found, expected in ((ask(f, z), -1.0), (ask(f, z, 3.0), 2.0)):
            torch.testing.assert_close(found.values.real.flatten(), torch.full((2,), expected, dtype=torch.float64))


def test_estimates_are_values_without_a_graph() -> None:
    """Neither keeps a graph alive for a state or a field that asks for gradients: nothing trains through them."""
    f, z = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    for found in (euclidean_log_norm(f, z), rightmost_eigenvalues(f, z, k=1)):
        assert not found.values.requires_grad and not found.residuals.requires_grad


@pytest.mark.parametrize(("k", "iterations"), [(4, 100), (3, 2), (0, 2)])
def test_more_values_than_there_are_is_refused(k: int, iterations: int) -> None:
    """k is at least 1, at most D and at most the number of iterations."""
    with pytest.raises(ValueError, match="k: expected"):
        rightmost_eigenvalues(lambda z: -z, torch.zeros(2, 3), k=k, iterations=iterations)


@pytest.mark.cuda
def test_estimates_on_cuda_are_the_cpu_s() -> None:
    """On CUDA, in float64, the values stay there and equal the CPU's."""
    f, z = ConvField(4).double(), random(3, 4, 5, 5)
    for ask in (rightmost_eigenvalues, euclidean_log_norm):
        expected = ask(f.cpu(), z, iterations=60)
        found = ask(f.cuda(), z.cuda(), iterations=60)
        assert found.values.is_cuda and found.residuals.is_cuda and found.converged.is_cuda
        torch.testing.assert_close(found.values.cpu(), expected.values, rtol=0, atol=1e-8)
