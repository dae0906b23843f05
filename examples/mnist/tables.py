"""The tables of accuracies, built from the records; where there is no result, a cell says why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .comparisons import Comparison, family, span
from .document import Cell, Table
from .records import Record
from .results import BLACK_BOX, NOT_PLANNED, WHITE_BOX, Results, mean
from .scores import Scores, wilson

__all__ = [
    "Sizes",
    "attacks_table",
    "every_attack_table",
    "family_table",
    "heads_table",
    "model_cell",
    "number",
    "paper_table",
    "primary_table",
    "score",
    "share_cell",
]

# The paper's table by keep probability: clean, PGD and SPSA, both in L2 with eps 0.5, in percent.
PAPER = {1.0: (96.2, 45.2, 40.5), 0.99: (97.0, 46.0, 40.1), 0.9: (98.5, 51.2, 49.4), 0.75: (89.1, 30.0, 35.8)}
BY_NAME = {"M3": 1.0, "M4": 0.9}  # before a model's first training nothing else says what its p is
HEADLINE = "worst of everything"


def number(value: float, text: str | None = None) -> Cell:
    """A number, as it sorts."""
    return Cell(f"{value:g}" if text is None else text, value=value)


def share_cell(share: float, n: int, strong: bool = False, *more: str) -> Cell:
    """A share of `n` in percent, with its Wilson interval."""
    low, high = wilson(share, n)
    return Cell(f"{100 * share:.1f}", (f"[{100 * low:.1f}, {100 * high:.1f}]", *more), share, strong)


def score(found: Sequence[Scores], why: str = "not run", strong: bool = False) -> Cell:
    """A mean over seeds with the Wilson interval of the images; of a noisy model the mean over draws, then the vote."""
    if not found:
        return Cell(why)
    vote = [f"vote {100 * mean(scores.right for scores in found):.1f}"] if found[0].draws > 1 else []
    return share_cell(mean(scores.mean for scores in found), min(map(len, found)), strong, *vote)


def model_cell(results: Results, name: str) -> Cell:
    """A model's number and title, which sort by the number."""
    title = results.title(name)
    return Cell(name, (title,) if title != name else (), results.named("model").index(name))


class Sizes:
    """How many images each column was judged on, for the caption."""

    def __init__(self) -> None:
        self.found: dict[str, set[int]] = {}

    def score(self, column: str, found: Iterable[Scores | None], why: str = "not run", strong: bool = False) -> Cell:
        """The cell of these scores, one a seed; their number of images is kept."""
        there = [scores for scores in found if scores]
        self.found.setdefault(column, set()).update(map(len, there))
        return score(there, why, strong)

    def __str__(self) -> str:
        columns: dict[str, list[str]] = {}
        for column, sizes in self.found.items():
            if text := " or ".join(f"{n:,}" for n in sorted(sizes)):
                columns.setdefault(text, []).append(column)
        return "; ".join(f"n = {n} ({', '.join(names)})" for n, names in columns.items()) or "n = 0, nothing is run yet"


def primary_table(results: Results, comparison: Comparison) -> Table:
    """The comparison that was said in advance, seed by seed."""
    rows = []
    for pair in comparison.pairs:
        votes = [(f"vote {100 * share:.1f}",) for share in pair.votes] if pair.votes else [(), ()]
        rows.append([
            number(pair.seed), number(pair.n, f"{pair.n:,}"), share_cell(pair.first, pair.n, False, *votes[0]),
            share_cell(pair.second, pair.n, False, *votes[1]),
            number(pair.difference, f"{100 * pair.difference:+z.1f}"), number(pair.p, f"{pair.p:.2g}"),
        ])  # fmt: skip
    sizes = Sizes()
    sizes.found["both models, paired"] = {pair.n for pair in comparison.pairs}
    caption = f"Worst case at {comparison.threat}, accuracy in % (under noise the mean over draws); {sizes}"
    names = [results.called(name) for name in (comparison.first, comparison.second)]
    return Table(caption, ["seed", "n", *names, "difference, points", "McNemar p"], rows, results.warnings)


def family_table(results: Results) -> Table:
    """The other comparisons, with p-values that hold together."""
    rows, sizes = [], Sizes()
    sizes.found = {where: set() for where in ("clean", *results.named("threat"))}
    for comparison, p in family(results):
        where, verdict, interval = comparison.threat or "clean", comparison.verdict(p), comparison.interval
        sizes.found[where].update(pair.n for pair in comparison.pairs)
        rows.append([
            Cell(f"{comparison.first} - {comparison.second}", _apart(results, comparison.first, comparison.second)),
            Cell(where), number(len(comparison.pairs)),
            number(comparison.difference, f"{100 * comparison.difference:+z.1f}"),
            _interval(interval),
            Cell("one seed") if p is None else number(p, f"{p:.2g}"),
            Cell(verdict, strong=verdict in ("better", "worse")),
        ])  # fmt: skip
    caption = f"Differences in points, clean and in the worst case within each threat; {sizes}"
    header = ["first - second", "where", "seeds", "difference", "t interval", "Holm p", "the first is"]
    return Table(caption, header, rows, results.warnings)


def _apart(results: Results, first: str, second: str) -> tuple[str, ...]:
    """What stands below a pair that does not descend from the same weights."""
    return ("of other trainings",) if results.apart(first, second) else ()


def _interval(found: tuple[float, float] | None) -> Cell:
    """A t interval in points, which sorts by its lower end."""
    return Cell(span(found), value=found[0]) if found else Cell("one seed")


def paper_table(results: Results) -> Table:
    """T1: the paper's numbers beside those of the same settings here."""
    threat, rows, sizes = results.primary[2], [], Sizes()
    columns = ("clean", "PGD", "SPSA", HEADLINE)
    for keep, paper, name in [(p, row, name) for p, row in PAPER.items() for name in _keeping(results, p)]:
        if name is None:
            cells = [Cell("not run")] * 4
        else:
            ours, why = _as_the_paper(results, name, threat), results.missing("train", name) or "not run"
            cells = [sizes.score(column, ours[column], why, column == HEADLINE) for column in columns]
        beside = [
            cell
            for reported, cell in zip(paper, cells, strict=False)
            for cell in (number(reported, f"{reported:.1f}"), cell)
        ]
        rows.append([number(keep), Cell(name or NOT_PLANNED), *beside, cells[3]])
    header = ["keep p", "model", *(f"{column}, {whose}" for column in columns[:3] for whose in ("paper", "ours"))]
    caption = f"T1. The paper's table beside ours at {threat}, accuracy in %; ours: {sizes}"
    return Table(caption, [*header, f"{HEADLINE}, ours"], rows, results.warnings)


def _keeping(results: Results, keep: float) -> list[str | None]:
    """The models that a row of the paper is about: SODEF itself, or those whose noise keeps that share, on at test."""
    found: list[str | None] = []
    for name in results.named("model"):
        model = results.model(name)
        block = model["block"] if model and model["regularised"] else {}
        noise = block["p"] if block.get("kind") == "sde" and block["noise_at_test"] else 0
        if BY_NAME.get(name) == keep if not noise else abs(1 - noise - keep) < 1e-9:
            found.append(str(name))
    return found or [None]


def _as_the_paper(results: Results, name: str, threat: str) -> dict[str, list[Scores]]:
    """Clean, PGD on the cross-entropy, SPSA and the worst case, each over the seeds of the row."""
    found: dict[str, list[Scores]] = {"clean": [], "PGD": [], "SPSA": [], HEADLINE: []}
    for seed in results.shown(threat, name) or results.seeds(name):
        white = results.attacks(threat, name, WHITE_BOX, seed).items()
        every = [
            pair for group in results.named("group") for pair in results.attacks(threat, name, group, seed).items()
        ]
        found["PGD"] += [scores for attack, scores in white if attack.startswith("PGD-") and " ce" in attack][:1]
        found["SPSA"] += [scores for attack, scores in every if attack.startswith("SPSA")][:1]
        for column, scores in (
            ("clean", results.clean(name, seed)),
            (HEADLINE, results.worst(threat, name, seed=seed)),
        ):
            found[column] += [scores] if scores else []
    return found


def attacks_table(results: Results, threat: str) -> Table:
    """T2: every model under every group of attacks within one threat; the worst case is what is reported."""
    records = [record for (_, _, t, _), record in results.found("attack") if t == threat]
    white = [record for record in records if record["config"]["group"]["name"] == WHITE_BOX]
    single = list(dict.fromkeys(attack for record in white for attack in record.result["attacks"]))
    groups, sizes, n = results.groups(threat), Sizes(), _shared(records)
    rows = [_attacked(results, threat, name, single, groups, sizes, n) for name in results.named("model")]
    shared = [f"{HEADLINE}, first {n:,}"] if n else []
    columns = [HEADLINE, *shared, "masked?", "clean", *single, *(f"{group}, worst" for group in groups)]
    caption = f"T2. Accuracy in % under {threat}; {sizes}"
    return Table(caption, ["model", *columns, "seeds trained", "queries", "seconds"], rows, results.warnings)


def _shared(records: Sequence[Record]) -> int | None:
    """How many of the first images all groups reach but the black-box ones; None where that is all of them."""
    sizes: dict[str, int] = {}
    for record in records:
        group = record["config"]["group"]["name"]
        found = [len(packed["counts"]) for packed in record.result["attacks"].values()]
        sizes[group] = max([sizes.get(group, 0), *found])
    n = min((n for group, n in sizes.items() if group != BLACK_BOX), default=0)
    return n if 0 < n < max(sizes.values()) else None


def _attacked(
    results: Results,
    threat: str,
    name: str,
    single: Sequence[str],
    groups: Sequence[str],
    sizes: Sizes,
    shared: int | None,
) -> list[Cell]:
    seeds = results.shown(threat, name)
    first = seeds[0] if seeds else 0
    untrained = results.missing("train", name)

    def why(group: str) -> str:
        return results.missing("attack", name, first, threat, group) or untrained or "not run"

    def under(*chosen: str) -> list[Scores | None]:
        return [results.worst(threat, name, chosen or None, seed) for seed in seeds]

    headline = sizes.score(HEADLINE, under(), untrained or why(WHITE_BOX), strong=True)
    if seeds and (lacking := results.lacks(threat, name, first)):
        headline = Cell(headline.text, (*headline.small, f"without {', '.join(lacking)}"), headline.value, strong=True)
    both = [
        sizes.score(f"{HEADLINE}, first {n:,}", [found and found.first(n) for found in under()], headline.text)
        for n in ([shared] if shared else [])
    ]
    why_clean = results.missing("clean", name, first) or "not run"
    clean = [results.clean(name, seed) for seed in seeds or results.seeds(name)]
    white = [results.attacks(threat, name, WHITE_BOX, seed) for seed in seeds]
    return [
        model_cell(results, name),
        headline,
        *both,
        _flag(results, threat, name),
        sizes.score("clean", clean, why_clean),
        *(sizes.score(attack, [found.get(attack) for found in white], why(WHITE_BOX)) for attack in single),
        *(sizes.score(group, under(group), why(group)) for group in groups),
        number(len(results.seeds(name))),
        *_effort(results, threat, name, seeds),
    ]


def _flag(results: Results, threat: str, name: str) -> Cell:
    """Whether attacks without the model's own gradient break more, by the smallest p of all groups and seeds."""
    tested = [(*found, seed) for (t, n, _, seed), found in results.masked.items() if (t, n) == (threat, name)]
    if not tested:
        return Cell(NOT_PLANNED)
    groups, (p, broken, seed) = results.is_masked(threat, name), min(tested)
    small = (*(f"by {group}" for group in groups), f"p = {p:.2g} (seed {seed})", f"{broken} that stood fall")
    return Cell("masked" if groups else "no", small, p, strong=bool(groups))


def _effort(results: Results, threat: str, name: str, seeds: Sequence[int]) -> list[Cell]:
    """Queries and seconds of all attacks on one model, the mean over its seeds."""
    attacks = [
        attack
        for (n, seed, t, _), record in results.found("attack")
        if (n, t) == (name, threat) and seed in seeds
        for attack in record.result["attacks"].values()
    ]
    if not attacks:
        return [Cell(NOT_PLANNED)] * 2
    queries, seconds = (sum(attack[what] for attack in attacks) / len(seeds) for what in ("queries", "seconds"))
    return [number(queries, f"{queries:,.0f}"), number(seconds, f"{seconds:,.1f}")]


def heads_table(results: Results) -> Table | None:
    """T4: the same model under other heads, clean and in the worst case; None where there is one head alone."""
    models = {name: model for name in results.named("model") if (model := results.model(name))}
    sodef = models.get("M3")
    same = [n for n, m in models.items() if sodef and (m["block"], m["phases"]) == (sodef["block"], sodef["phases"])]
    same = [n for n in same if models[n]["regularised"]]
    if len(same) < 2:
        return None
    rows, sizes, threats, primary = [], Sizes(), results.named("threat"), results.primary[2]
    for name in same:
        clean = [results.clean(name, seed) for seed in (results.shown(primary, name) or results.seeds(name))[:1]]
        under = [
            sizes.score(t, [results.worst(t, name, seed=seed) for seed in results.shown(t, name)]) for t in threats
        ]
        head = Cell(models[name]["head"], _apart(results, name, "M3"))
        rows.append([model_cell(results, name), head, sizes.score("clean", clean), *under])
    caption = f"T4. SODEF under other heads: accuracy in %, clean and in the worst case of everything; {sizes}"
    return Table(caption, ["model", "head", "clean", *threats], rows, results.warnings)


def every_attack_table(results: Results) -> Table:
    """Every single attack of the run, seed by seed."""
    rows = []
    for (name, seed, threat, group), record in results.found("attack"):
        for attack, packed in record.result["attacks"].items():
            scores = Scores.unpack(packed)
            rows.append([
                model_cell(results, name), number(seed), Cell(str(threat)), Cell(str(group)), Cell(attack),
                number(len(scores), f"{len(scores):,}"), score([scores]),
                number(packed["queries"], f"{packed['queries']:,}"),
                number(packed["seconds"], f"{packed['seconds']:,.1f}"),
            ])  # fmt: skip
    header = ["model", "seed", "threat", "group", "attack", "n", "accuracy, %", "queries", "seconds"]
    return Table("Every attack that was run, with its n", header, rows, results.warnings, folded=True)
