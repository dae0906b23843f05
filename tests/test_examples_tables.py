"""The study's tables: like stands beside like, and every accuracy has its interval."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.mnist import findings, tables
from examples.mnist.audits import certified_table
from examples.mnist.comparisons import awaited, compare
from examples.mnist.document import Cell
from examples.mnist.records import write
from examples.mnist.report import write_report
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


def change(folder: Path, name: str, **parts: dict) -> None:
    """Add to parts of a record of a made-up run."""
    path = folder / "records" / f"{name}-0.json"
    record = json.loads(path.read_text())
    for part, more in parts.items():
        record[part] |= more
    write(path, record)


def test_a_pair_of_other_trainings_is_marked(tmp_path):
    """Images for the two were made on other weights of M0: their lines, and a head's, say so; control: the same."""
    folder = made_up(tmp_path / "run")
    for name, weights in (("M1", "aaa"), ("M3", "aaa"), ("M3-linear", "bbb")):
        change(folder, f"attack-{name}-l2-0.5-transfer-s0", config={"sources": {"M0": weights}})
    results = Results(folder)
    marked = {row[0].text for row in tables.family_table(results).rows if row[0].small}
    assert marked == {"M3-linear - M1"}
    heads = {row[0].text: row[1].small for row in tables.heads_table(results).rows}
    assert heads == {"M3": (), "M3-linear": ("of other trainings",)}


def test_the_highest_is_of_models_with_every_planned_attack(tmp_path):
    """M0 lacks groups and is passed over, however high; with no model whole it says so."""
    whole = lambda cell: cell.model != "M0" or cell.group is None or cell.group.name == "white-box"  # noqa: E731
    at = lambda cell: 0.99 if cell.model == "M0" else 0.9 if cell.model == "M3" else 0.0  # noqa: E731
    text = findings.accuracy(Results(made_up(tmp_path / "run", at, has=whole)))
    assert re.search(r"L2 0\.5: M3 SODEF, \d\d\.\d %", text) and "M0" not in text
    none = lambda cell: cell.group is None or cell.group.name == "white-box"  # noqa: E731
    assert "L2 0.5: no model has all planned attacks yet" in findings.accuracy(
        Results(made_up(tmp_path / "none", at, has=none))
    )


def test_comparisons_that_wait_are_counted(tmp_path):
    """Without transfer no pair is comparable; those of a model that diverged never will be, and are not counted."""
    without = lambda cell: cell.group is None or cell.group.name != "transfer"  # noqa: E731
    waiting = awaited(Results(made_up(tmp_path / "part", has=without)))
    pairs = {"M1 - M0", "M3-linear - M1", "M3 - M1", "M5 - M3", "M13 - M0"}  # and M4 - M5 beyond the primary threat
    assert waiting == {"L2 0.5": len(pairs), "L2 1.5": len(pairs) + 1}
    lost = lambda cell: "M1 diverged" if cell.model == "M1" else None  # noqa: E731
    waiting = awaited(Results(made_up(tmp_path / "lost", has=without, lost=lost)))
    assert waiting == {"L2 0.5": len(pairs) - 3, "L2 1.5": len(pairs) - 2}
    assert not awaited(Results(made_up(tmp_path / "whole")))


def test_what_several_processes_trained_has_torchruns_command(tmp_path):
    """The command names their number and the model; without such a training there is none."""
    folder = made_up(tmp_path / "run")
    write_report(folder)
    assert "torchrun" not in (folder / "report.md").read_text()
    change(folder, "train-M3-s0", result={"processes": 2})
    write_report(folder)
    assert "torchrun --nproc-per-node=2 examples/sodef_mnist.py --preset smoke" in (folder / "report.md").read_text()
