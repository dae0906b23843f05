"""The captions of the end-time study's pictures say what the records hold, to the digit."""

from __future__ import annotations

import pytest

from examples.mnist.end_time import captions


class Made:
    """Results with one net, whose records are made up."""

    run, rows = {}, ("a",)

    def __init__(self, **answers: dict) -> None:
        self.answers = answers

    def title(self, name: str) -> str:
        return "net a"

    def answered(self, what: str) -> dict[str, dict]:
        return {"a": self.answers[what]} if what in self.answers else {}

    def record(self, name: str, what: str) -> Made:
        self.result = self.answers[what]
        return self


DYNAMICS = {
    "field": {"median": [2.0, 3.0, 1.0]},
    "state": {"median": [1.0, 5.0, 1234.0]},
    "same_class": {"median": [0.5, 0.5, 0.2]},
    "two_classes": {"median": [0.6, 0.6, 0.5]},
    "gradient": {"ce": {"median": [1.0, 2e-7, 3.0]}, "margin": {"median": [4.0, 2.0, 3.0]}},
    "zero_gradients": {"ce": [0.0, 0.25, 0.1]},
}


def test_the_curve_s_caption_has_the_best_time_and_both_ends():
    """Of 50, 90 and 20 % at 0.1, 1 and 10 the best is 90 at 1."""
    said = captions.curve(Made(curve={"ends": [0.1, 1.0, 10.0], "clean": [0.5, 0.9, 0.2]}))
    assert "net a is best at t = 1 (90.0 %) and has 50.0 % at 0.1, 20.0 % at 10" in said


def test_a_film_s_caption_has_the_growth_and_the_worst_turn():
    """Of two images that grow tenfold one keeps its pattern from t = 10 to 100, the other turns by 60 degrees."""
    kept, half = [3.0, 4.0], 0.5 * 3**0.5
    states = [[kept, [1.0, 0.0]], [kept, [5.0, 0.0]], [[30.0, 40.0], [10 * 0.5, 10 * half]]]
    said = captions.film(Made(film={"states": states, "times": [1.0, 10.0, 100.0], "digits": [1, 2]}), "a")
    assert "10 times as large at t = 100 as at 1" in said and "at t = 10 has a cosine of 0.50 or more" in said


@pytest.mark.parametrize(
    ("caption", "numbers"),
    [
        ("settling", "net a 0.50 and 1,234"),
        ("distances", "net a 1.20 -> 2.50"),
        ("gradients", "net a 2e-07 and 2, 25 %"),
    ],
)
def test_captions_over_time_have_their_numbers(caption: str, numbers: str):
    """Ratios of the last to the first median; the smallest median norms, and the largest share of zeros."""
    assert numbers in getattr(captions, caption)(Made(dynamics=DYNAMICS))
