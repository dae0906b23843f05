"""The study's tables: like stands beside like, and every accuracy has its interval."""

from __future__ import annotations

import json
import re

import pytest

from examples.mnist import tables
from examples.mnist.audits import certified_table
from examples.mnist.comparisons import compare
from examples.mnist.document import Cell
from examples.mnist.records import write
from examples.mnist.results import Results
from examples.mnist.scores import Scores, wilson
from examples.mnist.seeds import groups_table
from made_up_runs import made_up


@pytest.fixture
def run(tmp_path):
    """A finished run with two seeds."""
    return made_up(tmp_path, seeds=2)


def named(header: list[str], row: list[Cell]) -> dict[str, Cell]:
    return dict(zip(header, row, strict=True))


def has_interval(cell: Cell, n: int) -> bool:
    """Whether the cell holds Wilson's interval of its share of `n`."""
    low, high = wilson(cell.value, n)
    return f"[{100 * low:.1f}, {100 * high:.1f}]" in cell.small


def test_worst_cases_stand_side_by_side_on_the_images_that_all_groups_reach(run):
    """Where one group is run on the first 60 images alone, a column is about these; with equal ones there is none."""
    threat, n, title = "L2 0.5", 60, "worst of everything, first 60"
    assert not any("first" in column for column in tables.attacks_table(Results(run), threat).header)
    for path in run.glob("records/attack-*-l2-0.5-adjoint-*.json"):
        record = json.loads(path.read_text())
        for packed in record["result"]["attacks"].values():
            packed |= {key: packed[key][:n] for key in ("counts", "majority", "chosen") if key in packed}
        write(path, record)
    results = Results(run)
    found = tables.attacks_table(results, threat)
    assert title in found.header and f"n = {n} ({title}" in found.caption
    for row in (named(found.header, row) for row in found.rows):
        expected = results.worst(threat, row["model"].text).first(n).mean
        assert row[title].value == expected and has_interval(row[title], n)


def test_heads_are_compared_with_one_seed_clean_as_under_attack(run):
    """M3 has two seeds and another head one: its clean accuracy is that of the seed whose attacks stand beside it."""
    results = Results(run)
    found = tables.heads_table(results)
    row = next(named(found.header, row) for row in found.rows if row[0].text == "M3")
    assert results.clean("M3", 0).mean != results.clean("M3", 1).mean
    assert row["clean"].value == results.clean("M3", 0).mean
    assert row["L2 0.5"].value == results.worst("L2 0.5", "M3", seed=0).mean


def test_every_group_of_every_seed_has_its_interval(run):
    """The interval is Wilson's over the images that the cell says."""
    results = Results(run)
    found, groups = groups_table(results, "L2 0.5"), results.groups("L2 0.5")
    cells = [cell for row in found.rows for cell in map(named(found.header, row).get, groups) if cell.text != "-"]
    assert len(cells) > 20
    for cell in cells:
        (n,) = re.findall(r"n = (\d+)", " ".join(cell.small))
        assert has_interval(cell, int(n))


def test_the_comparison_stands_by_votes_too(run):
    """Beside the mean over draws is the accuracy of the most frequent answer, for both models and their difference."""
    results = Results(run)
    found = compare(results, "M4", "M5", "L2 0.5")
    shown = tables.primary_table(results, found)
    for row, pair, difference in zip(shown.rows, found.pairs, found.by_vote, strict=True):
        votes = [
            results.worst("L2 0.5", name, results.counted("L2 0.5", name, ("M4", "M5"), [0, 1]), pair.seed).right
            for name in ("M4", "M5")
        ]
        assert [cell.small[-1] for cell in row[2:4]] == [f"vote {100 * vote:.1f}" for vote in votes]
        assert difference == pytest.approx(votes[0] - votes[1]) and votes[0] > pair.first
    assert compare(results, "M5", "M3", "L2 0.5").by_vote == []


@pytest.mark.parametrize("liars", [0, 3])
def test_a_certified_image_that_falls_is_told(run, liars):
    """Held against what stands under all attacks within a threat: none fell; of a wrong certificate each that did."""
    threat, path = "L2 0.5", run / "records" / "clean-M0-s0-0.json"
    stands = Results(run).worst(threat, "M0", seed=0).counts
    fallen = [i for i, right in enumerate(stands) if not right][:liars]
    held = tuple(int(right or i in fallen) for i, right in enumerate(stands))
    record = json.loads(path.read_text())
    proven = {"0.6": Scores(1, held, held, held).pack()}
    record["result"] |= {"certified": {"0.6": 0.9}, "lipschitz": 1.0, "held": proven}
    write(path, record)
    found = certified_table(Results(run))
    cell = named(found.header, found.rows[0])["certified images that an attack broke"]
    assert cell.value == len(fallen) == liars
    assert cell.text == f"{liars} of {sum(held)} within {threat}"
