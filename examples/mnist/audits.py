"""The tables about models and attacks themselves: constraints, probes of the attacks, certificates and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .document import Cell, Table
from .records import Record
from .results import NOT_PLANNED, Results, mean, seconds_of
from .scores import Scores
from .tables import Sizes, model_cell, number, score, share_cell

__all__ = ["certified_table", "constraints_table", "cost_table", "fields", "probes_table"]


def fields(results: Results) -> dict[str, dict[str, Any]]:
    """The stability of the fields that are drawn, at the same points, first the untrained one; seed 0 of each."""
    found: dict[str, dict[str, Any]] = {}
    for name in results.drawn:
        record = results.record("spectra", name)
        for label in ("untrained", "trained") if record else ():
            found.setdefault(label if label == "untrained" else results.called(name), record.result[label])
    return found


def _audited(results: Results) -> dict[str, dict[str, Any]]:
    """The stability of each field after each phase of its training, and at other points than those of training."""
    found: dict[str, dict[str, Any]] = {}
    for name in results.named("model"):
        trained, record, title = results.record("train", name), results.record("spectra", name), results.called(name)
        lines = trained.result["epochs"] if trained else []
        audits = [(line["phase"], line["trains"], line["audit"]) for line in lines if "audit" in line]
        found |= {f"{title}, after phase {phase} ({part})": audit for phase, part, audit in audits}
        for label, field in record.result.items() if record else ():
            if label == "untrained":
                found = {label: field} | found
            else:
                found[title if label == "trained" else f"{title}, {label}"] = field
    return found


def constraints_table(results: Results) -> Table:
    """T3: the share of points at which a field meets each constraint of the method, and how large it is there."""
    found, sizes = _audited(results), Sizes()
    names = list(dict.fromkeys(name for field in found.values() for name in field["constraints"]))
    rows = []
    for title, field in found.items():
        sizes.found.setdefault("points", set()).add(field["points"])
        shares = [share_cell(field["constraints"][name], field["points"]) for name in names]
        quantiles = [number(value, f"{value:.2g}") for value in field["residual"].values()]
        unstable = number(field["unstable"], f"{100 * field['unstable']:.1f}")
        rows.append([Cell(title), *shares, unstable, number(field["largest"], f"{field['largest']:.2f}"), *quantiles])
    for name in results.named("model"):
        why = results.missing("spectra", name)
        if why and why != NOT_PLANNED:
            rows.append([Cell(results.called(name)), *[Cell(why)] * (len(names) + 5)])
    size = (f"|f|, {q}" for q in ("5 %", "median", "95 %"))
    header = ["field", *names, "eigenvalues > 0", "largest real part", *size]
    caption = f"T3. Share of the points, in %, that meet each constraint, at training images unless said; {sizes}"
    return Table(caption, header, rows, results.warnings)


def probes_table(results: Results) -> Table:
    """How the attack itself behaves on each model: what would give a masked gradient or a weak attack away."""
    names, sizes, rows = results.named("model"), Sizes(), []
    records = [record for name in names if (record := results.record("probe", name))]
    columns = list(dict.fromkeys(_probe(row) for record in records for row in _telling(record)))
    for name in names:
        record = results.record("probe", name)
        if record is None:
            rows.append([model_cell(results, name), *[Cell(results.missing("probe", name) or "")] * (2 + len(columns))])
            continue
        zero = [share_cell(share, record.result["n"]) for share in record.result["zero_gradients"].values()]
        scores = {_probe(row): Scores.unpack(row) for row in _telling(record)}
        cells = [sizes.score("every column", [scores.get(column)], NOT_PLANNED) for column in columns]
        rows.append([model_cell(results, name), *zero, *cells])
    caption = f"How the attacks behave: share of zero gradients, then accuracy in %; {sizes}"
    header = ["model", "zero gradients, CE", "zero gradients, margin", *columns]
    return Table(caption, header, rows, results.warnings)


def _telling(record: Record) -> list[dict[str, Any]]:
    """Of the radii the largest in each norm alone: the curves are in a figure."""
    rows: Sequence[dict[str, Any]] = record.result["probes"]
    radii: dict[str, dict[str, Any]] = {}
    for row in rows:
        norm, eps = row["threat"].split()
        if row["probe"] == "radius" and (norm not in radii or float(eps) > float(radii[norm]["threat"].split()[1])):
            radii[norm] = row
    return [*radii.values(), *(row for row in rows if row["probe"] != "radius")]


def _probe(row: dict[str, Any]) -> str:
    what = "" if row["probe"] in ("radius", "steps") else f"{row['probe']}: "
    return f"{what}{row['attack']}, {row['threat']}"


def certified_table(results: Results) -> Table | None:
    """Accuracy that no attack can take away, of the models whose records have a certificate."""
    found = [
        (name, seed, record.result)
        for kind in results.kinds()
        for (name, seed, _, _), record in results.found(kind)
        if "certified" in record.result
    ]
    if not found:
        return None
    radii = list(dict.fromkeys(radius for *_, result in found for radius in result["certified"]))
    rows, sizes = [], Sizes()
    for name, seed, result in found:
        n = result.get("n") or len(Scores.unpack(result["clean"]))
        sizes.found.setdefault("images", set()).add(n)
        shares = [result["certified"].get(radius) for radius in radii]
        cells = [Cell(NOT_PLANNED) if share is None else share_cell(share, n) for share in shares]
        clean, lipschitz = results.clean(name, seed), number(result["lipschitz"], f"{result['lipschitz']:.4f}")
        right = score([clean] if clean else [])
        fallen = _fallen(results, name, seed, result.get("held", {}))
        rows.append([model_cell(results, name), number(seed), right, lipschitz, *cells, fallen])
    header = ["model", "seed", "clean", "Lipschitz constant", *(f"L2 {float(radius):g}" for radius in radii)]
    header.append("certified images that an attack broke")
    paper = "the paper's best under PGD at L2 0.5, without a certificate: 51.2"
    return Table(f"Accuracy in %, clean and certified ({paper}); {sizes}", header, rows, results.warnings)


def _fallen(results: Results, name: str, seed: int, held: dict[str, Any]) -> Cell:
    """How many images fell to any attack within an L2 threat of those certified at its radius or the next larger."""
    found, said = 0, []
    for threat in results.named("threat"):
        norm, eps = threat.split()
        reaching = [radius for radius in held if norm == "L2" and float(radius) >= float(eps)]
        worst = results.worst(threat, name, seed=seed)
        if reaching and worst:
            proven = Scores.unpack(held[min(reaching, key=float)]).first(len(worst)).counts
            broken = sum(a and not b for a, b in zip(proven, worst.counts, strict=True))
            found += broken
            said.append(f"{broken} of {sum(proven):,} within {threat}")
    return number(found, "; ".join(said)) if said else Cell(NOT_PLANNED)


def cost_table(results: Results) -> Table:
    """What each model cost: parameters, training, one forward solve, and the attacks on it."""
    rows = []
    for name in results.named("model"):
        trained = [record for (n, *_), record in results.found("train") if n == name]
        if not trained:
            rows.append([model_cell(results, name), *[Cell(results.missing("train", name) or "not run")] * 10])
            continue
        clean = [record.result for (n, *_), record in results.found("clean") if n == name]
        attacks = [
            attack
            for (n, *_), record in results.found("attack")
            if n == name
            for attack in record.result["attacks"].values()
        ]
        result, last = trained[0].result, [line for record in trained for line in record.result["epochs"][-1:]]
        rows.append([
            model_cell(results, name),
            number(len(trained)),
            number(result["parameters"], f"{result['parameters']:,}"),
            number(result["steps"], f"{result['steps']:,}"),
            _mean([record.result["validation"] for record in trained], "{:.2f}", 100),
            _mean([seconds_of(record) for record in trained], "{:,.1f}"),
            _mean([record["nfe"] for record in clean], "{:g}"),
            _mean([line.get("nfe_backward", 0) for line in last], "{:g}"),
            _mean([record["milliseconds_128"] for record in clean], "{:,.1f}"),
            _mean([sum(attack["seconds"] for attack in attacks) / len(trained)] if attacks else [], "{:,.1f}"),
            _mean([sum(attack["queries"] for attack in attacks) / len(trained)] if attacks else [], "{:,.0f}"),
        ])  # fmt: skip
    header = ["model", "seeds", "parameters", "steps", "validation, %", "training, s", "NFE forward", "NFE backward"]
    n = next((record["config"]["sizes"][1] for _, record in results.found("train")), 0)
    caption = (
        "Cost of a seed: training (seconds times the processes that trained together), one forward solve, and all "
        f"attacks; n = {n:,} validation images"
    )
    return Table(caption, [*header, "ms per 128", "attacks, s", "queries"], rows, results.warnings)


def _mean(values: Sequence[float], form: str, factor: float = 1) -> Cell:
    """The mean over seeds; "not run" where there is none."""
    return number(mean(values), form.format(factor * mean(values))) if values else Cell("not run")
