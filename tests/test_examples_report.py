"""The report: every number is the records', what is missing says why, and a verdict needs all that it was said to."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from examples.mnist.curves import curves
from examples.mnist.records import write
from examples.mnist.report import write_report
from examples.mnist.results import Results
from examples.mnist.scores import holm, mcnemar, wilson
from made_up_runs import FEW, IMAGES, WARNINGS, made_up, masking, number, records, table

LOST = "train-M1-s0 diverged: the mean loss is nan"


class Page(HTMLParser):
    """What a page is made of: its tags with their attributes, and its table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with one masked model."""
    out = made_up(tmp_path_factory.mktemp("finished"), masking, seeds=2)
    write_report(out)
    return out


@pytest.fixture(scope="module")
def text(finished):
    return (finished / "report.md").read_text()


def test_the_report_needs_the_records_alone(finished, text, tmp_path):
    """From a copy of run.json and the JSON records, and nothing else, the same text and the same page come out."""
    shutil.copytree(finished / "records", tmp_path / "records")
    shutil.copy(finished / "run.json", tmp_path)
    assert write_report(tmp_path) == tmp_path / "report.md"
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "report.html").read_text() == (finished / "report.html").read_text()
    for picture in ("accuracy", "radii", "steps", "spectra", "plane", "cost"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000, picture
        assert (tmp_path / f"{picture}-dark.png").stat().st_size > 10_000, picture


def test_every_accuracy_in_the_tables_is_the_records(finished, text):
    """Counted anew from the packed verdicts: single attacks, clean scores, and the worst case sample by sample."""
    found = records(finished)
    for threat, slug in (("L2 0.5", "l2-0.5"), ("L2 1.5", "l2-1.5")):
        for row in table(text, f"T2. Accuracy in % under {threat}"):
            name = row["model"].split()[0]
            packs = [
                pack
                for cell, record in found.items()
                if cell.startswith(f"attack-{name}-{slug}-") and cell.endswith("-s0")
                for pack in record["result"]["attacks"].values()
            ]
            packs.append(found[f"clean-{name}-s0"]["result"]["clean"])
            draws, n = packs[0]["draws"], IMAGES - 20
            counts = [[(ord(c) - 48) / draws for c in pack["counts"]] for pack in packs]
            worst = np.mean([min(each[i] for each in counts if i < len(each)) for i in range(n)])
            assert number(row["worst of everything"]) == round(100 * worst, 1), (threat, name)
            assert row["worst of everything"].startswith("**"), "the headline is bold"
            assert number(row["clean"]) == round(100 * np.mean(counts[-1]), 1), (threat, name)
    rows = [line for line in text.split("**Every attack that was run")[1].splitlines() if line.startswith("| M")]
    assert len(rows) == sum(len(record["result"].get("attacks", ())) for record in found.values())


def test_constraints_are_audited_after_each_phase_and_at_attacked_images(text):
    """T3 has a row for each: what a phase left behind, the trained field, and the same at images that were attacked."""
    rows = [row["field"] for row in table(text, "T3. Share of the points")]
    own = [row for row in rows if row.startswith("M3 SODEF") and "linear" not in row]
    assert rows[0] == "untrained"
    assert own == ["M3 SODEF, after phase 1 (block)", "M3 SODEF", "M3 SODEF, attacked test images"]


def test_other_heads_stand_beside_the_fixed_simplex(text):
    """T4 holds M3 and the model that differs from it in the head alone."""
    rows = table(text, "T4. SODEF under other heads")
    assert [(row["model"].split()[0], row["head"]) for row in rows] == [("M3", "simplex"), ("M3-linear", "linear")]


def test_each_cell_has_its_wilson_interval_and_each_caption_its_n(text):
    """The interval printed beside a share is Wilson's for the n of the caption."""
    captions = [line for line in text.splitlines() if line.startswith("**") and "(*" in line]
    assert len(captions) == 14 and all(re.search(r"\bn\b", line) for line in captions)
    row = table(text, "T2. Accuracy in % under L2 0.5")[0]
    for column, n in (("FGSM ce", IMAGES - 20), ("clean", IMAGES), ("black-box, worst", FEW)):
        share, low, high = map(float, re.match(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", row[column]).groups())
        assert (low, high) == pytest.approx([100 * end for end in wilson(share / 100, n)], abs=0.11), column


def test_the_warnings_stand_on_every_table_and_picture(finished, text):
    """A smoke run on a stand-in for MNIST says so beside each caption, in both forms, and in its opening."""
    captions = [line for line in text.splitlines() if line.startswith("**")]
    pictures = [after.split("\n\n")[1] for after in text.split("\n![")[1:]]
    assert len(captions) == 14 and len(pictures) == 6
    assert all(f"(*{warning}*)" in line for line in captions + pictures for warning in WARNINGS)
    page = (finished / "report.html").read_text()
    for part in (*re.findall(r'<p class="caption">.*?</p>', page), *re.findall(r"<figcaption>.*?</figcaption>", page)):
        assert all(f'<span class="note">{warning}</span>' in part for warning in WARNINGS)
    assert page.count('<p class="warning">') == 2


def test_the_page_stands_alone_and_its_tables_sort(finished):
    """No address of another file; every tag is closed; headers are buttons, and cells with numbers carry them."""
    text = (finished / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    links = [value for tag, given in page.tags for key, value in given.items() if key in ("src", "href", "srcset")]
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    anchors = {given["id"] for _, given in page.tags if "id" in given}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    heads, buttons = (sum(tag == wanted for tag, _ in page.tags) for wanted in ("th", "button"))
    assert heads == buttons > 50 and "aria-sort" in text
    body = text.split("T2. Accuracy in % under L2 0.5")[-1].split("<tbody>")[1].split("</tbody>")[0]
    headline = re.findall(r'<td data-value="([^"]+)"><strong>([\d.]+)</strong>', body)
    assert len(headline) == 7
    assert all(float(shown) == round(100 * float(value), 1) for value, shown in headline)


def test_the_masked_model_is_flagged_and_the_honest_ones_are_not(finished, text):
    """Positive and negative control of the flag, in the table, the caption and the statistic behind both."""
    for threat in ("L2 0.5", "L2 1.5"):
        flags = {row["model"].split()[0]: row["masked?"] for row in table(text, f"T2. Accuracy in % under {threat}")}
        assert flags.pop("M13").startswith("**masked** by bypass")
        assert flags and all(flag.startswith("no p = ") for flag in flags.values()), flags
    assert "**Masked**: what white-box attacks leave standing, others break, of M13 gradient masker (" in text
    results = Results(finished)
    families = {key[:2] for key in results.masked if key[1] != "M4"}
    assert len(families) > 5
    for where in families:
        raw = {}
        for key in (key for key in results.masked if key[:2] == where):
            threat, name, group, seed = key
            white, other = results.worst(threat, name, ["white-box"], seed), results.attacks(threat, name, group, seed)
            least = np.min([scores.counts for scores in other.values()], axis=0).astype(bool)
            stood = np.array(white.counts[: len(least)], dtype=bool)
            raw[key] = mcnemar(list(stood), list(least), "greater"), int((stood & ~least).sum())
        corrected = dict(zip(raw, holm([p for p, _ in raw.values()]), strict=True))
        assert all(results.masked[key] == pytest.approx((corrected[key], raw[key][1])) for key in raw)


@pytest.mark.parametrize("done", ["nothing", "trained", "white-box", "one model", "no probes"])
def test_a_half_finished_run_draws_and_says_what_is_missing(tmp_path, done):
    """At whatever stage a run stands, its report is drawn; what is not there is "not run" or why it diverged."""
    has = {
        "nothing": lambda cell: False,
        "trained": lambda cell: cell.kind == "train",
        "white-box": lambda cell: cell.group is None or cell.group.name == "white-box",
        "one model": lambda cell: cell.model in ("M0", "M3"),
        "no probes": lambda cell: cell.kind not in ("probe", "spectra", "clean") and cell.seed == 0,
    }[done]
    out = made_up(tmp_path, seeds=2, has=has, lost=lambda cell: LOST if cell.model == "M1" else None)
    text = write_report(out).read_text()
    rows = {row["model"].split()[0]: row for row in table(text, "T2. Accuracy in % under L2 0.5")}
    assert rows["M1"]["worst of everything"] == "diverged"
    assert rows["M1"]["FGSM ce" if "FGSM ce" in rows["M1"] else "clean"] == "diverged"
    assert f"> **{LOST}**" in text and "**Not answered yet**" in text
    if done in ("nothing", "trained", "no probes"):
        assert "M5" not in rows and re.search(r"T2\. .*; left out: \d of which nothing is run yet", text)
    if done in ("nothing", "trained"):
        assert "No attack is run yet within L2 1.5." in text and "T2. Accuracy in % under L2 1.5" not in text
    if done == "white-box":
        assert "without bypass, transfer, black-box" in rows["M5"]["worst of everything"]
        assert rows["M5"]["bypass, worst"] == "not run" and rows["M0"]["bypass, worst"] == "-"
        assert "M1" not in {row["model"].split()[0] for row in table(text, "T2. Accuracy in % under L2 1.5")}
    if done == "one model":
        assert number(rows["M0"]["worst of everything"]) > 0
    Page((out / "report.html").read_text())


def test_a_training_that_diverged_itself_is_lost(tmp_path):
    """A record that says so, as the runner writes it, has no numbers; what stands on it waits for nothing."""
    out = made_up(tmp_path, lost=lambda cell: LOST if cell.model == "M1" and cell.kind != "train" else None)
    path = out / "records" / "train-M1-s0-0.json"
    write(path, {**json.loads(path.read_text()), "result": {"diverged": "the mean loss is nan"}})
    text = write_report(out).read_text()
    assert table(text, "Cost of a seed")[1]["training, s"] == "diverged"
    assert text.count(f"> **{LOST}**") == 1


def test_records_of_two_trainings_are_told(tmp_path):
    """Weights differ between machines: where records of one model and seed know two, the report says so at its top."""
    out = made_up(tmp_path)

    def trained_as(name: str, **config: object) -> None:
        (path,) = out.glob(f"records/{name}-0.json")
        record = json.loads(path.read_text())
        write(path, {**record, "config": {**record["config"], **config}})

    trained_as("clean-M3-s0", weights="a")
    trained_as("attack-M3-l2-0.5-white-box-s0", weights="a")
    trained_as("clean-M0-s0", weights="b")
    assert "more than one training" not in write_report(out).read_text()
    trained_as("attack-M3-l2-0.5-transfer-s0", weights="a", sources={"M0": "c"})
    assert "whose weights differ by the machine: M0 (seed 0; another for M3).**" in write_report(out).read_text()


def test_a_row_is_of_the_first_seed_also_where_a_later_one_is_complete(tmp_path):
    """The first seed of all models stands side by side, on the same images, and says what it lacks."""
    lacks = ("attack", "M5", 0, "black-box")
    has = lambda cell: (cell.kind, cell.model, cell.seed, cell.group and cell.group.name) != lacks  # noqa: E731
    results = Results(made_up(tmp_path, seeds=2, has=has))
    assert results.lacks("L2 0.5", "M5", 0) == ["black-box"] and not results.lacks("L2 0.5", "M5", 1)
    assert results.shown("L2 0.5", "M5") == results.shown("L2 0.5", "M4") == [0]


def test_an_attack_that_finds_less_with_more_steps_is_told(tmp_path):
    """The caption names a model whose accuracy rises with more steps."""
    out = made_up(tmp_path)
    assert "more steps find less there" not in write_report(out).read_text()
    (path,) = out.glob("records/probe-M4-s0-0.json")
    record = json.loads(path.read_text())
    first, last = (row for row in record["result"]["probes"] if row["probe"] == "steps")
    first["attack"], last["attack"] = last["attack"], first["attack"]
    write(path, record)
    assert "it rises for M4 SODEF_0.9, by " in write_report(out).read_text()


def test_what_single_draws_say_stands_under_the_probes(text):
    """Of the noisy model alone, with the numbers of its record."""
    said = re.findall(r"Gradients at the clean images, each of a single draw of the noise of (\S+) .*?0\.12\.", text)
    assert said == ["M4"]
    assert "has 47% of the length of all; two averages over 8 have a cosine of -0.03, by directions 0.12." in text


def test_the_paper_stands_beside_the_same_settings(text):
    """T1 has the paper's four rows; ours where this preset has the model, at its threat, PGD on the cross-entropy."""
    rows = table(text, "T1. The paper's table beside ours at L2 0.5")
    assert [[row[f"{column}, paper"] for column in ("clean", "PGD", "SPSA")] for row in rows] == [
        ["96.2", "45.2", "40.5"], ["97.0", "46.0", "40.1"], ["98.5", "51.2", "49.4"], ["89.1", "30.0", "35.8"],
    ]  # fmt: skip
    attacked = {row["model"].split()[0]: row for row in table(text, "T2. Accuracy in % under L2 0.5")}
    for row, name in ((rows[0], "M3"), (rows[2], "M4")):
        assert row["model"] == name and row["PGD, ours"] == attacked[name]["PGD-5 ce"]
        assert row["worst of everything, ours"] == attacked[name]["worst of everything"]
    assert rows[1]["clean, ours"] == rows[3]["clean, ours"] == "not run"


def test_a_certificate_in_a_record_is_a_table(tmp_path):
    """What no attack can take away stands in a table of its own, with its interval; without one there is none."""
    out = made_up(tmp_path)
    assert "clean and certified" not in write_report(out).read_text()
    path = out / "records" / "clean-M0-s0-0.json"
    record = json.loads(path.read_text())
    record["result"] |= {"certified": {"0.5": 0.94, "1.0": 0.8}, "lipschitz": 0.98765}
    write(path, record)
    row = table(write_report(out).read_text(), "Accuracy in %, clean and certified")[0]
    low, high = (round(100 * end, 1) for end in wilson(0.94, IMAGES))
    assert row["model"].startswith("M0") and row["L2 0.5"] == f"94.0 [{low}, {high}]" and number(row["L2 1"]) == 80.0
    assert row["Lipschitz constant"] == "0.9877" and number(row["clean"]) > 80.0


def test_every_group_stands_seed_by_seed_with_the_p_of_its_alarm(tmp_path):
    """Its numbers are those of `Results`; with one seed there is no such table."""
    out = made_up(tmp_path / "two", seeds=2)
    results, threat = Results(out), "L2 0.5"
    rows = table(write_report(out).read_text(), f"Every group within {threat} seed by seed")
    assert {(row["model"].split()[0], row["seed"]) for row in rows} >= {("M4", "0"), ("M4", "1"), ("M5", "1")}
    for row in rows:
        name, seed = row["model"].split()[0], int(row["seed"])
        assert number(row["worst so far"]) == pytest.approx(100 * results.worst(threat, name, seed=seed).mean, abs=0.06)
        if (key := (threat, name, "transfer", seed)) in results.masked:
            p, broken = results.masked[key]
            assert f"p = {p:.1g}, {broken} that stood fall" in row["transfer"]
    assert "seed by seed, accuracy" not in write_report(made_up(tmp_path / "one", seeds=1)).read_text()


def test_the_curves_over_the_radius_are_a_table_too(finished, text):
    """A cell is the accuracy of that probe, and at radius 0 the clean accuracy of the same images."""
    found, rows = curves(Results(finished)), table(text, "Accuracy in % by radius")
    assert rows and rows[0]["radius"] == "0"
    for row in rows:
        for name, points in found[row["norm"]].items():
            (column,) = (title for title in row if title.split()[0] == name)
            scores = dict(points)[float(row["radius"])]
            low, high = (100 * end for end in wilson(scores.mean, len(scores)))
            assert row[column].startswith(f"{100 * scores.mean:.1f} [{low:.1f}, {high:.1f}]")
