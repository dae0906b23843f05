"""What the study may claim: paired, on all seeds, and over attacks that do not spare the one who hides."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from examples.mnist import findings
from examples.mnist.comparisons import Comparison, Pair, compare, family
from examples.mnist.results import Results
from examples.mnist.scores import holm, mcnemar
from made_up_runs import IMAGES, WARNINGS, honest, made_up, masking


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with one masked model."""
    return made_up(tmp_path_factory.mktemp("finished"), masking, seeds=2)


def test_a_masked_model_is_not_better_for_what_its_control_cannot_be_attacked_with(finished):
    """M0 has no block to go around: M13's bypass counts all the same, and what white-box left standing is no lead."""
    results = Results(finished)
    assert results.attacks("L2 1.5", "M13", "bypass") and not results.attacks("L2 1.5", "M0", "bypass")
    white = [results.worst("L2 1.5", name, ["white-box"]).mean for name in ("M13", "M0")]
    assert white[0] - white[1] > 0.3
    assert abs(compare(results, "M13", "M0", "L2 1.5").difference) < 0.05


def pair(seed: int, difference: float, p: float) -> Pair:
    return Pair(seed, 1000, 0.5 + difference, 0.5, p)


@pytest.mark.parametrize(
    ("pairs", "verdict", "said"),
    [
        ([(0.05, 1e-4), (0.06, 1e-5), (0.055, 1e-4)], "better", "Yes: the noise helps"),
        ([(-0.05, 1e-4), (-0.06, 1e-5), (-0.055, 1e-4)], "worse", "No: the noise harms"),
        ([(0.05, 1e-4), (0.06, 1e-5), (-0.055, 1e-4)], "not claimed: the seeds disagree", "but the seeds disagree"),
        ([(0.01, 0.5), (0.20, 1e-9), (0.01, 0.5)], "not claimed: zero is in the t interval", "in their t interval"),
        ([(0.05, 1e-9)], "not claimed: one seed", "one seed says nothing of another training"),
        ([(0.01, 0.3), (0.011, 0.3)], "not claimed: McNemar is not significant", "the seeds agree, but McNemar"),
        ([(0.01, 0.3), (-0.01, 0.3)], "no difference", "not significant at the 5% level"),
        ([(0.05, 0.02), (0.06, 0.9), (0.055, 0.9)], "not claimed: McNemar is not significant", "smallest of 3 seeds"),
    ],
)
def test_a_difference_is_claimed_only_where_mcnemar_and_the_seeds_agree(finished, pairs, verdict, said):
    """The rule that was said in advance, on made-up outcomes; of several seeds the p is Holm-corrected first."""
    found = Comparison("M4", "M5", "L2 0.5", tuple(pair(seed, *each) for seed, each in enumerate(pairs)))
    assert found.verdict() == verdict
    text = findings.answer(Results(finished), found)
    assert said in text and all(warning in text for warning in WARNINGS)
    claimed = "**Yes" in text or "**No: " in text
    assert claimed == (verdict in ("better", "worse"))


def test_nothing_is_answered_on_a_part_of_the_seeds(tmp_path):
    """Two of three seeds in favour would be a yes: while the third is missing there is no verdict, here nor there."""
    better = lambda cell: honest(cell) + 0.12 * (cell.model == "M4" and cell.group is not None)  # noqa: E731
    missing = lambda cell: (cell.model, cell.seed, cell.kind) != ("M4", 2, "attack")  # noqa: E731
    results = Results(made_up(tmp_path, better, seeds=3, has=missing))
    found = compare(results, "M4", "M5", "L2 0.5")
    assert len(found.pairs) == 2 and found.verdict().startswith("not answered yet: seed 2: M4 not run")
    assert "**Not answered yet**" in findings.answer(results, found)


def test_the_interval_over_seeds_is_students():
    """Mean, deviation and quantile by hand."""
    values = [0.01, 0.03, 0.08]
    half = student.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    found = Comparison("a", "b", None, tuple(pair(seed, value, 1.0) for seed, value in enumerate(values)))
    assert found.interval == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert Comparison("a", "b", None, (pair(0, 0.1, 0.0),)).interval is None


def test_the_primary_comparison_pairs_the_samples_of_each_seed(tmp_path):
    """From records in which the noise helps on every seed: the verdict is yes, and its numbers are the records'."""
    better = lambda cell: honest(cell) + (0.12 + 0.002 * cell.seed) * (cell.model == "M4" and cell.group is not None)  # noqa: E731
    results = Results(made_up(tmp_path, better, seeds=3))
    found = compare(results, "M4", "M5", "L2 0.5")
    assert found.verdict() == "better" and [each.seed for each in found.pairs] == [0, 1, 2]
    for each in found.pairs:
        first, second = (results.worst("L2 0.5", name, seed=each.seed) for name in ("M4", "M5"))
        assert (each.n, each.first, each.second) == (IMAGES - 20, first.mean, second.mean)
        assert each.p == mcnemar(first.once, second.once)
    others = family(results)
    assert ("M4", "M5", "L2 0.5") not in {(c.first, c.second, c.threat) for c, _ in others}
    assert {("M4", "M5", "L2 1.5"), ("M4", "M5", None), ("M5", "M3", "L2 0.5"), ("M3", "M1", None)} <= {
        (c.first, c.second, c.threat) for c, _ in others
    }
    several = [(c, p) for c, p in others if len(c.pairs) > 1]
    assert [p for _, p in several] == holm([c.p for c, _ in several])
    assert all(p is None and c.verdict() == "not claimed: one seed" for c, p in others if len(c.pairs) == 1)
