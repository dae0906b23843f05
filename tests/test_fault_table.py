"""The fault table: what goes wrong elsewhere in silence, and the tests that hold what happens here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odelayers import Adjoint, Backprop, Checkpoint, Dopri5, ODEBlock, Reversible, Tsit5
from odelayers._gradients.base import Gradient
from problems import name

TESTS = Path(__file__).parent

# Input -> the tests of what must happen.
TABLE: dict[str, tuple[str, ...]] = {
    "NaN or inf in one row, raised: rows, time and cause": (
        "test_faults.py::test_a_bad_initial_row_is_named",
        "test_faults.py::test_a_field_that_gives_nan_is_reported",
        "test_faults_of_noise.py::test_a_bad_initial_row_is_named_by_blocks_with_noise",
    ),
    "NaN or inf in one row, isolated: the healthy rows as if alone, a status per row": (
        "test_isolate.py::test_healthy_rows_equal_a_run_without_the_failed_ones",
        "test_isolate.py::test_status_and_time_say_how_each_row_failed",
        "test_isolate.py::test_a_hundred_rows_in_a_thousand_fail_when_and_why_they_should",
        "test_isolate.py::test_a_row_keeps_its_own_noise_when_others_fail",
        "test_isolate.py::test_parameters_get_the_gradient_of_the_healthy_rows_alone",
    ),
    "blow-up y' = y^2: typed error and status with the time": (
        "test_faults.py::test_a_finite_time_blow_up_is_diagnosed_with_its_time",
        "test_faults.py::test_a_blow_up_on_a_fixed_grid_names_row_and_time",
        "test_faults.py::test_a_blow_up_inside_a_noisy_solve_names_row_and_time",
    ),
    "stiff -1e6 y: a finite budget, called stiff, with a remedy that works": (
        "test_faults.py::test_a_stiff_field_is_called_stiff_and_an_implicit_method_named",
        "test_faults.py::test_the_remedy_for_a_stiff_field_works",
        "test_fault_table.py::test_the_default_budget_is_finite_and_ends_a_stiff_solve",
    ),
    "max_steps reached: typed error and status, how far it came": (
        "test_faults.py::test_a_hard_row_is_told_from_its_easy_mates_when_the_budget_is_spent",
        "test_faults.py::test_the_step_budget_may_be_spent_exactly",
        "test_adapters.py::test_torchdiffeq_s_assertions_become_solve_errors",
    ),
    "times not monotone, or NaN: ValueError": (
        "test_times.py::test_times_that_make_no_sense_are_refused",
        "test_times.py::test_times_of_a_block_are_checked_at_construction",
    ),
    "t0 == t1: the identity": ("test_times.py::test_no_time_is_the_identity",),
    "steps <= 0, rtol < 0, an unknown keyword: refused at construction": (
        "test_construction.py::test_nonsense_is_refused_at_construction",
        "test_faults_of_noise.py::test_nonsense_steps_of_an_sde_solver_are_refused",
        "test_faults_of_noise.py::test_nonsense_of_other_controlled_solvers_is_refused",
    ),
    "an empty batch: an empty output of the right shape": (
        "test_times.py::test_an_empty_batch_gives_an_empty_result",
        "test_faults_of_noise.py::test_an_empty_batch_gives_an_empty_result_everywhere",
    ),
    "an integer z0; float64 z with a float32 net": ("test_faults.py::test_a_state_that_does_not_fit_is_refused",),
    "f returns another dtype or shape": (
        "test_faults.py::test_a_field_that_does_not_fit_is_refused",
        "test_faults.py::test_a_diffusion_that_does_not_fit_is_refused",
    ),
    "float16, bfloat16: solved in float32, a floor under the tolerance": (
        "test_faults.py::test_half_precision_is_carried_in_float32",
        "test_faults_of_noise.py::test_half_precision_with_noise_is_carried_in_float32",
        "test_what_a_field_may_not_do.py::test_ambient_autocast_raises_the_tolerance_floor",
        "test_call_arguments.py::test_a_half_precision_state_that_overflows_on_its_way_back_is_refused",
    ),
    "f works in place on z: raised, z unharmed": (
        "test_faults.py::test_a_field_that_does_not_fit_is_refused",
        "test_in_place.py::test_a_field_in_place_on_z_is_raised_whenever_it_starts",
        "test_in_place.py::test_drift_and_diffusion_in_place_on_z_are_raised",
        "test_in_place.py::test_an_in_place_layer_is_raised_though_it_changes_no_value_yet",
    ),
    "dropout in f, training: refused with the reason": (
        "test_faults.py::test_dropout_in_the_field_is_refused_in_training",
        "test_what_a_field_may_not_do.py::test_a_field_that_draws_is_refused_and_its_evaluation_mode_is_not",
    ),
    "BatchNorm in f, training: warned of, refused by gradients that evaluate again and by Jacobians": (
        "test_faults.py::test_batchnorm_in_the_field_is_warned_of_or_refused",
        "test_jacobian.py::test_batchnorm_is_refused_in_training_and_works_in_eval",
    ),
    "train() or eval() between forward and backward: the forward's mode holds": (
        "test_recompute.py::test_the_mode_of_the_forward_pass_holds_in_the_backward_pass",
        "test_recompute.py::test_library_adjoints_hold_the_mode_of_the_forward_pass",
        "test_faults_of_noise.py::test_a_block_with_noise_may_go_to_eval_before_backward",
        "test_faults_of_noise.py::test_an_equilibrium_s_gradient_holds_the_mode_of_the_forward_pass",
    ),
    "an unused or frozen parameter: None; no parameters, a plain function: works": (
        "test_gradients.py::test_unused_and_frozen_parameters_get_none",
        "test_gradients.py::test_a_plain_function_passes_the_gradient_to_the_state",
    ),
    "a tensor captured by a closure: detected, with the remedy": (
        "test_recompute.py::test_a_captured_tensor_is_refused_by_gradients_that_evaluate_again",
    ),
    "NaN in the incoming gradient: reported as the backward pass's; under Backprop passed on, row by row": (
        "test_gradients.py::test_a_bad_incoming_gradient_is_reported_as_the_loss_s",
        "test_recompute.py::test_library_adjoints_report_a_bad_incoming_gradient",
        "test_faults_of_noise.py::test_backprop_passes_a_bad_incoming_gradient_on_as_torch_does",
    ),
    "a steady state that is never reached: bounded by t1": (
        "test_fault_table.py::test_a_field_that_never_rests_is_followed_to_its_end_time_and_no_further",
        "test_equilibrium_calls.py::test_a_steady_state_that_is_never_reached_is_bounded_by_t_max",
        "test_equilibrium.py::test_a_limit_cycle_ends_at_t_max_and_says_that_it_has_not_settled",
        "test_implicit.py::test_a_row_that_has_not_settled_gets_no_gradient_silently",
    ),
}


def limits(marks: list[ast.expr]) -> list[float]:
    """The seconds of the timeouts among these marks."""
    calls = [mark for mark in marks if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.timeout"]
    return [float(ast.literal_eval(call.args[0])) for call in calls]


@pytest.mark.parametrize("row", TABLE)
def test_every_row_has_its_tests_and_they_their_time_limit(row: str) -> None:
    """The tests named exist, nothing skips them, and a mark of their own ends each after 90 seconds at the latest.

    A mark holds whatever --timeout says on the command line; the configuration's limit would not.
    """
    assert TABLE[row]
    for test in TABLE[row]:
        file, function = test.split("::")
        body = ast.parse((TESTS / file).read_text()).body
        (node,) = (n for n in body if isinstance(n, ast.FunctionDef) and n.name == function)
        marks = " ".join(ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list)
        assert not any(word in marks for word in ("skip", "xfail", "slow", "cuda")), marks
        assigned = [n for n in body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
        whole = [m for n in assigned for m in (n.value.elts if isinstance(n.value, ast.List) else [n.value])]
        found = limits(node.decorator_list) or limits(whole)  # the nearest mark holds
        assert found and all(0 < seconds <= 90 for seconds in found), f"{test}: no time limit of its own"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solver", [Dopri5(), Tsit5()], ids=name)
def test_the_default_budget_is_finite_and_ends_a_stiff_solve(solver: Dopri5 | Tsit5) -> None:
    """-1e6 z at the defaults, in the call that isolates: STIFF in every row, with the time reached, and no hang."""
    stats = ODEBlock(lambda z: -1e6 * z, solver=solver, on_failure="isolate").solve(torch.ones(2, 1)).stats
    assert stats.status.tolist() == [4, 4]
    assert ((stats.failed_at > 0) & (stats.failed_at < 1)).all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint(), Reversible(), Adjoint()], ids=name)
def test_a_field_that_never_rests_is_followed_to_its_end_time_and_no_further(gradient: Gradient) -> None:
    """z'' = -z has no steady state but its centre: the solve asks for no time beyond t1, and ends there."""
    seen: list[float] = []

    def f(t: Tensor, z: Tensor) -> Tensor:
        seen.append(float(t))
        return torch.stack([z[:, 1], -z[:, 0]], dim=1)

    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    end = ODEBlock(f, t1=30.0, solver=Dopri5(1e-8, 1e-8), gradient=gradient)(z)
    wanted = torch.tensor([30.0], dtype=torch.float64)
    assert (end - torch.stack([wanted.cos(), -wanted.sin()], dim=1)).abs().max() < 1e-5
    assert min(seen) == 0.0 and max(seen) == 30.0
