"""The report, drawn from `run.json` and the records alone: report.md, report.html and the pictures beside them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import audits, figures, findings, seeds, tables
from .comparisons import awaited, compare
from .curves import radii_table
from .document import Block, Code, Figure, Heading, Table, Text, markdown
from .page import page
from .plane_figure import plane_figure, plane_text
from .results import KINDS, NOT_PLANNED, Results

__all__ = ["blocks", "write_report"]

EMPTY = ("not run", NOT_PLANNED, "0", "")  # what the cells of a row say of which nothing is run

READING = """
Brackets hold Wilson 95 % intervals over the images. Accuracy under attack is judged on the model itself, with its
noise on; of a model that draws noise it is the mean over draws, and *vote* is the accuracy of its most frequent
answer. *White-box* attacks use the model's own gradient, *bypass* attacks one that goes around the block, *adjoint*
attacks the one that is solved for backwards, *noise-off* attacks that of the same block solved without its noise,
*directions* attacks the mean of the gradients of its draws, each scaled to length 1 at the input of the block,
*transfer* attacks one of another model, *black-box* attacks none. **The robustness reported is the worst of
everything**, sample by sample; a sample is judged over the attacks that were run on it, as some are run on the first
images alone. Where that is so, a column has the worst case of the first images that all groups but the black-box ones
reach. Queries count the images that a model was asked to judge or differentiate, not the passes that give the
gradient of a stand-in (bypass, adjoint, noise-off, directions; AutoAttack's own version for noise). A model is
*masked* where attacks without its own gradient break significantly more (paired
McNemar, Holm-corrected over the groups and seeds of the model within the threat). Numbers and pictures are of a
model's first seed unless they say otherwise; further seeds are attacked on fewer images, and stand in tables of what
they have in common. Pictures show {drawn} of the {models} models.
"""

RETRAINED = "Records of more than one training of the same recipe, whose weights differ by the machine: {}."

METHOD = """
{train:,} training, {validation:,} validation and {test:,} test images. M3 has the paper's phases: integration to
T = 10, Adam on batches of 128, the block, then the whole net, then the block. It differs from the paper in a rate that
rises and falls (one cycle), that of the official code where the regulariser meets fresh weights, a fixed regular
simplex as head, the official code's constants and column sums in the regulariser, and gradients by backpropagation
through the steps. M2 follows the official code. The noisy model and its control start from the same SODEF and differ
in p alone: same solver, steps, order of samples and recipe; both cut their gradients to norm 1, as those that come
back through the noise have heavy tails. Every model is scored on the test images after its training alone.
"""


def write_report(out: Path) -> Path:
    """Draw report.md, report.html and their pictures from the records in `out`; returns the path of report.md."""
    results = Results(out)
    content = blocks(results, out)
    (out / "report.html").write_text(page(content), encoding="utf-8")
    path = out / "report.md"
    path.write_text(markdown(content), encoding="utf-8")
    return path


def blocks(results: Results, out: Path) -> list[Block]:
    """The report, block by block; pictures are drawn into `out`."""
    primary = compare(results, *results.primary)
    heads = tables.heads_table(results)
    spread, certified = seeds.seeds_table(results), audits.certified_table(results)
    found: list[Block | None] = [
        *_opening(results),
        Heading("The question asked in advance"),
        Text(findings.answer(results, primary)),
        tables.primary_table(results, primary) if primary.pairs else None,
        Heading("Other comparisons"),
        Text(
            "Every model against its control, or against the one it started from; the two may differ in more than one "
            "thing (*How it was done*). One Holm family of those with several seeds, the same rule; the t intervals "
            "are not corrected. *Of other trainings*: images for the two were made on other weights of the same nets, "
            f"as another machine gave them; nor do they descend from the same.{_awaited(results)}"
        ),
        tables.family_table(results),
        Heading("The paper's table"),
        Text("The paper says neither the images, nor the steps, nor the scale of the pixels; ours are in [0, 1]."),
        tables.paper_table(results),
        Heading("Every model under every attack"),
        _figure(results, out, "accuracy", figures.bars_figure, findings.accuracy),
        *_attacked(results),
        spread if spread.rows else None,
        *(seeds.groups_table(results, threat) for threat in results.named("threat")),
        *([Heading("Does the head matter?"), heads] if heads else []),
        *([Heading("Certified"), certified] if certified else []),
        Heading("Are the constraints met?"),
        _figure(results, out, "eigenvalues", figures.spectra_figure, findings.spectra),
        audits.constraints_table(results),
        _figure(results, out, "vector field", plane_figure, plane_text),
        Heading("Can the attacks be trusted?"),
        _figure(results, out, "accuracy by radius", figures.radii_figure, findings.radii),
        radii_table(results),
        _figure(results, out, "accuracy by steps", figures.steps_figure, findings.steps),
        Text(findings.probes(results)),
        audits.probes_table(results),
        Heading("Cost"),
        _figure(results, out, "training cost", figures.cost_figure, findings.cost),
        audits.cost_table(results),
        Heading("Attack by attack"),
        tables.every_attack_table(results),
        *_method(results),
    ]
    return [_begun(block) if isinstance(block, Table) else block for block in found if block is not None]


def _awaited(results: Results) -> str:
    """How many comparisons are not in the table yet."""
    found = [f"{count} within {threat}" for threat, count in awaited(results).items()]
    return f" Not there yet, for want of trainings or attacks that are planned: {', '.join(found)}." if found else ""


def _attacked(results: Results) -> list[Block]:
    """The accuracies under attack by threat: that of the primary question, and each under which anything is run.

    Their rows are the models attacked; the first table says of which others training ended as diverged.
    """
    primary = results.primary[2]
    begun = {primary, *(threat for (_, _, threat, _), _ in results.found("attack"))}
    waiting = [threat for threat in results.named("threat") if threat not in begun]
    found: list[Block] = [
        _begun(tables.attacks_table(results, threat), 2, EMPTY if threat == primary else (*EMPTY, "diverged"))
        for threat in results.named("threat")
        if threat in begun
    ]
    return [*found, Text(f"No attack is run yet within {', '.join(waiting)}.")] if waiting else found


def _begun(table: Table, end: int | None = None, empty: tuple[str, ...] = EMPTY) -> Table:
    """The table without the rows of which, up to a column, nothing is run yet; the caption counts them."""
    rows = [row for row in table.rows if any(cell.text not in empty for cell in row[1:end])]
    if not (left := len(table.rows) - len(rows)):
        return table
    return replace(table, rows=rows, caption=f"{table.caption}; left out: {left} of which nothing is run yet")


def _opening(results: Results) -> list[Block]:
    preset = results.run["preset"]
    title = Heading(f"Does noise make a stable neural ODE more robust? ({results.data}, preset {preset})", 1)
    said = [results.run.get("warning"), results.run.get("banner")]
    said += [RETRAINED.format(", ".join(several))] if (several := results.retrained()) else []
    warnings = [Text(text, warning=True) for text in said if text]
    shown = {"drawn": len(results.drawn), "models": len(results.named("model"))}
    reading = Text(_line(READING.format(**shown)))
    missing, planned = results.unfinished(), len(results.cells)
    if not missing:
        return [title, *warnings, reading]
    state = f"{planned - len(missing)} of {planned} stages have a result; the same command computes what is not run."
    return [
        title,
        *warnings,
        Text(state, warning=True),
        *(Text(why, warning=True) for why in results.lost()),
        reading,
    ]


def _figure(
    results: Results,
    out: Path,
    alt: str,
    draw: Callable[[Results, Path, figures.Ground], Path | None],
    caption: Callable[[Results], str],
) -> Block:
    """A picture on both grounds under what it says; in words where there is nothing to draw yet."""
    light = draw(results, out, figures.LIGHT)
    dark = draw(results, out, figures.DARK)
    if light is None or dark is None:
        return Text(f"*Figure ({alt}): not run.*")
    return Figure(light, dark, alt, caption(results), results.warnings)


def _method(results: Results) -> list[Block]:
    """How the numbers came about, as far as the records say it."""
    trained = [record for _, record in results.found("train")]
    found: list[Block] = [Heading("How it was done")]
    if trained:
        sizes = zip(("train", "validation", "test"), trained[0]["config"]["sizes"], strict=True)
        found.append(Text(_line(METHOD.format(**dict(sizes)))))
    recipes = [
        f"- {name}, {model['title']}: {_recipe(model)}"
        for name in results.named("model")
        if (model := results.model(name))
    ]
    if recipes:
        found.append(Text("\n".join(recipes)))
    draws = {(r["config"]["draws"], r["config"]["judging_draws"]) for _, r in results.found("attack")}
    groups: dict[str, list[str]] = {}
    for (_, _, _, group), record in results.found("attack"):
        names = groups.setdefault(str(group), [])
        names += [attack for attack in record.result["attacks"] if attack not in names]
    if groups:
        noise = " or ".join(
            f"{each} draws of the noise per gradient, {verdict} per verdict" for each, verdict in sorted(draws)
        )
        found += [
            Text(f"Attacks ({noise}):"),
            Text("\n".join(f"- {g}: {'; '.join(names)}" for g, names in groups.items())),
        ]
    if others := [kind for kind in results.kinds() if kind not in KINDS]:
        found.append(Text(f"Recorded, not drawn here: {', '.join(others)}."))
    return [*found, *_provenance(results)]


def _line(text: str) -> str:
    """A text of several lines as one paragraph."""
    return " ".join(text.split())


def _recipe(model: dict[str, Any]) -> str:
    phases = [_phase(phase) for phase in model["phases"]]
    start = f"from {model['start']}; " if model["start"] else ""
    trained = "epochs: " + ", ".join(phases) if phases else "not trained further"
    if certified := model.get("certified"):
        blocks = len(certified["convolutions"]) + len(certified["dense"])
        return f"{blocks} convex-potential Euler steps; epochs: {certified['epochs']} on the certified margin"
    return _block(model["block"]) + start + trained + (", regularised" if model["regularised"] else "")


def _phase(phase: dict[str, Any]) -> str:
    """A phase in a few words; what is not said is Adam on batches of 128 and the cross-entropy."""
    text = f"{phase['epochs']} x {phase['trains']} at {phase['lr']:g}"
    if (batch := phase["batch"]) != 128:
        text += f", batches of {batch}"
    if norm := phase["optimiser"].get("norm"):
        text += f", gradients cut to norm {norm:g}"
    if penalty := phase["penalty"]:
        settings = {k: v for k, v in penalty.items() if k not in ("kind", "regularizer")}
        settings |= penalty.get("regularizer", {})
        said = (f"{k} {format(v, 'g') if isinstance(v, int | float) else v}" for k, v in settings.items())
        text += f", penalty {penalty['kind']}: {' '.join(said)}"
    if adversary := phase["adversary"]:
        text += (
            f", {adversary['loss']} with {adversary['steps']} steps of {adversary['step']:g}, eps {adversary['eps']:g}"
        )
    return text


def _block(block: dict[str, Any]) -> str:
    if block["kind"] == "ode":
        return f"Dopri5 at {block['tolerance']:g} to T = {block['t1']:g}; "
    if block["kind"] == "sde":
        noise = f"p_drop = {block['p']:g}" + ("" if block["noise_at_test"] else ", off at test")
        return f"{block['steps']} steps of {block['method'].replace('_', ' ')} to T = {block['t1']:g}, {noise}; "
    return {"staircase": f"state rounded to multiples of {block['staircase']:g}; ", "none": ""}.get(
        block["kind"], f"{block['kind']}; "
    )


def _provenance(results: Results) -> list[Block]:
    """What made the numbers, and the command that makes them again."""
    records = list(results.records())
    commits, machines = (sorted({str(record[key]) for record in records}) for key in ("commit", "machine"))
    versions = sorted({f"{name} {version}" for record in records for name, version in record["versions"].items()})
    total = sum(record["seconds"] for record in records)
    trained = next((record["config"] for _, record in results.found("train")), {})
    words = ["python", "examples/sodef_mnist.py", "--preset", results.run["preset"]]
    words += ["--data", "digits"] if "digits" in results.data else []
    words += ["--seed", str(results.run["seed"])] if results.run.get("seed") else []
    words += ["--device", trained["device"]] if trained.get("device", "cpu") != "cpu" else []
    words += ["--threads", str(trained["threads"])] if trained.get("threads", 1) != 1 else []
    made = [f"All stages together: {total:,.0f} s on {' and '.join(machines)}", ", ".join(versions)]
    made.append(f"commit {', '.join(commits)}.")
    return [
        Heading("Every number's command"),
        *([Text("; ".join(made))] if records else []),
        Text("This command computes all numbers, tables and pictures; it goes on from what is already there. A "
             "processor of another kind gives other last digits, and with them other weights; records name the commit "
             "and the processor."),
        Code(shlex.join(words)),
        *_together(results, words),
        Text("`run.json` and `records/*.json` hold every sample's verdict. This draws the report from them:"),
        Code("PYTHONPATH=examples python -c 'import pathlib, sys; from mnist.report import write_report; "
             "write_report(pathlib.Path(sys.argv[1]))' FOLDER"),
    ]  # fmt: skip


def _together(results: Results, words: list[str]) -> list[Block]:
    """The commands of what several processes trained."""
    found: dict[int, dict[str, str]] = {}
    for (name, *_), record in results.found("train"):
        if (count := record.result.get("processes", 1)) > 1:
            found.setdefault(count, {})[name] = record["commit"]
    return [
        block
        for count, names in found.items()
        for block in (
            Text(f"By {count} processes were trained {', '.join(f'{n} (commit {at})' for n, at in names.items())}:"),
            Code(shlex.join(["torchrun", f"--nproc-per-node={count}", *words[1:], "--models", ",".join(names)])),
        )
    ]
