"""The report, drawn from `run.json` and the records alone: tables in Markdown, pictures beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scipy.stats import wasserstein_distance

from .evaluation import mcnemar
from .figures import bars_figure, spectra_figure
from .records import Record
from .results import SIGNIFICANT, Results, mean, percent

__all__ = ["write_report"]

# The paper's table (keep probability, clean, PGD at L2 0.5, SPSA at 0.5), in percent.
PAPER = {"M3": (1.0, 96.2, 45.2, 40.5), "M4": (0.9, 98.5, 51.2, 49.4)}
PRIMARY = ("M4", "M5", "L2 0.5")


def write_report(out: Path) -> Path:
    """Draw report.md and its pictures from the records in `out`; returns the report's path."""
    results = Results(out)
    pictures = {"accuracy": bars_figure(results, out), "spectra": spectra_figure(results, out)}
    parts = [
        _opening(results),
        _primary(results),
        _paper(results),
        *(_threat(results, threat) for threat in results.attacks),
        f"![accuracy]({pictures['accuracy'].name})\n\n{_masking(results)}",
        f"![spectra]({pictures['spectra'].name})\n\n{spectra_finding(results)}",
        _constraints(results),
        _cost(results),
        _method(results),
    ]
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _opening(results: Results) -> str:
    lines = [
        f"# Does noise make a stable neural ODE more robust? ({results.run['data']}, preset {results.run['preset']})"
    ]
    lines += [f"> **{text}**" for text in (results.run["warning"], results.run["banner"]) if text]
    lines.append(
        "Brackets hold Wilson 95 % intervals. Accuracy under attack is judged on the model itself, with its noise on; "
        "for a model that draws noise it is the mean over draws, then the accuracy of its most frequent answer. "
        "*White-box* is the worst, sample by sample, over attacks that use the model's gradient; *bypass* over attacks "
        "whose gradient goes around the block; *worst* over everything, and that is the robustness reported."
    )
    return "\n\n".join(lines)


def _table(results: Results, caption: str, header: list[str], rows: list[list[str]]) -> str:
    note = "".join(f" (*{text}*)" for text in results.warnings)
    lines = [header, ["---"] * len(header), *rows]
    return f"**{caption}**{note}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _score(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    text = percent(mean(cell["share"]), len(cell["share"]))
    noisy = any(0 < share < 1 for share in cell["share"])
    return f"{text} / {100 * mean(cell['majority']):.1f}" if noisy else text


def _primary(results: Results) -> str:
    """The preregistered comparison: the noise against the same training without it."""
    noise, control, threat = PRIMARY
    first, second = (results.cell(threat, name, "worst")["majority"] for name in (noise, control))
    n, p = len(first), mcnemar(first, second)
    difference = 100 * (mean(first) - mean(second))
    verdict = "the difference is significant" if p < SIGNIFICANT else "no difference can be claimed"
    return (
        "## The question asked in advance\n\n"
        f"Does {results.title(noise)} (noise on) stand better than the same model trained as long without noise, in "
        f"the worst case at {threat}? {percent(mean(first), n)} % against {percent(mean(second), n)} % (most frequent "
        f"answer, {n} images): {difference:+.1f} points, paired McNemar p = {p:.2g}: {verdict} at the "
        f"{SIGNIFICANT:.0%} level, from one seed."
    )


def _paper(results: Results) -> str:
    threat = PRIMARY[2]
    rows = []
    for name, (keep, clean, pgd, spsa) in PAPER.items():
        white, worst = (_score(results.cell(threat, name, kind)) for kind in ("white-box", "worst"))
        rows.append([f"{keep:g}", f"{clean}", _clean(results, name), f"{pgd}", white, worst, f"{spsa}"])
    header = [
        "keep p",
        "clean, paper",
        "clean, ours",
        "PGD, paper",
        f"PGD {threat}, ours",
        "worst, ours",
        "SPSA, paper",
    ]
    return "## The paper's table\n\n" + _table(results, "Accuracy in %, the paper's beside ours", header, rows)


def _clean(results: Results, name: str) -> str:
    result = results.clean[name].result
    return percent(result["mean"], result["n"])


def _threat(results: Results, threat: str) -> str:
    rows = []
    for name, record in results.attacks[threat].items():
        p = results.masked.get((threat, name))
        masked = results.is_masked(threat, name)
        flag = "-" if p is None else f"**masked** (p = {p:.1g})" if masked else f"no (p = {p:.2g})"
        zero = record.result["zero_gradients"]
        scores = [_score(results.cell(threat, name, kind)) for kind in ("white-box", "bypass", "worst")]
        rows.append(
            [
                name,
                results.title(name),
                _clean(results, name),
                *scores,
                flag,
                f"{zero['ce']:.0%} / {zero['margin']:.0%}",
            ]
        )
    n = next(iter(results.attacks[threat].values())).result["n"]
    header = ["", "model", "clean", "white-box", "bypass", "worst", "masked?", "zero gradients (CE / margin)"]
    caption = f"Accuracy in % under {threat}, {n} test images (clean: the whole test set)"
    return f"## Under {threat}\n\n" + _table(results, caption, header, rows)


def _masking(results: Results) -> str:
    """What the flags say, in words."""
    flagged = list(dict.fromkeys(name for threat, name in results.masked if results.is_masked(threat, name)))
    if not flagged:
        return "No bypass beats the white-box attacks by more than chance."
    parts = []
    for name in flagged:
        drops = {threat: _drop(results, threat, name) for threat in results.attacks if results.is_masked(threat, name)}
        threat = max(drops, key=lambda t: drops[t][0] - drops[t][1])
        before, after = drops[threat]
        parts.append(f"{results.title(name)} ({100 * before:.0f} -> {100 * after:.0f} % at {threat})")
    rest = [results.title(name) for name in dict.fromkeys(m for _, m in results.masked) if name not in flagged]
    clear = f"; not of {', '.join(rest)}" if rest else ""
    return f"Going around the block breaks what white-box attacks leave standing of {', '.join(parts)}{clear}."


def _drop(results: Results, threat: str, name: str) -> tuple[float, float]:
    cells = (results.cell(threat, name, kind) for kind in ("white-box", "worst"))
    before, after = (mean(cell["share"]) for cell in cells if cell)
    return before, after


def spectra_finding(results: Results) -> str:
    """What the eigenvalues say, in words."""
    parts = []
    for name, field in results.spectra.result.items():
        title = name if name == "untrained" else results.title(name)
        parts.append(
            f"{title} {100 * field['unstable']:.1f} % (mean {field['mean']:z.2f}, largest {field['largest']:z.2f})"
        )
    fields = results.spectra.result
    noise, control, _ = PRIMARY
    start = results.train[noise]["config"]["model"]["start"]
    moved = wasserstein_distance(fields[start]["real_parts"], fields[control]["real_parts"])
    by_noise = wasserstein_distance(fields[noise]["real_parts"], fields[control]["real_parts"])
    return (
        f"Real parts of the eigenvalues of the field's Jacobian at the same {fields[start]['points']} training points. "
        f"Share above zero: {'; '.join(parts)}. The longer training moved an eigenvalue by {moved:.2g} on average "
        f"(Wasserstein distance of {results.title(control)} from {results.title(start)}), the noise by {by_noise:.2g} "
        f"({results.title(noise)} from {results.title(control)}). The noise is a multiple of the field itself, and the "
        f"median size of the field at these points is {fields[noise]['median_residual']:.2g}, against "
        f"{fields['untrained']['median_residual']:.2g} untrained."
    )


def _constraints(results: Results) -> str:
    rows = []
    for name, field in results.spectra.result.items():
        shares = [percent(share, field["points"]) for share in field["constraints"].values()]
        title = name if name == "untrained" else results.title(name)
        rows.append([title, f"{field['median_residual']:.2g}", *shares])
    header = ["field", "median size of f", *next(iter(results.spectra.result.values()))["constraints"]]
    return _table(results, "Share of the points, in %, that meet each constraint of the method", header, rows)


def _cost(results: Results) -> str:
    rows = []
    for name, record in results.train.items():
        clean = results.clean[name].result
        attacking = sum(row[name]["seconds"] for row in results.attacks.values())
        rows.append([
            name, results.title(name), f"{100 * record.result['validation']:.2f}", f"{record.result['parameters']:,}",
            f"{record.result['steps']:,}", str(clean["nfe"]), f"{clean['milliseconds_128']:.0f}",
            f"{record['seconds']:.0f}", f"{attacking:.0f}",
        ])  # fmt: skip
    header = ["", "model", "validation, %", "parameters", "steps", "NFE", "ms per 128", "training, s", "attacks, s"]
    return "## Cost\n\n" + _table(results, "Training, one forward solve, and the attacks on it", header, rows)


METHOD = """\
## How it was done

{train:,} training, {validation:,} validation and {test:,} test images; seed {seed}. The training follows the paper,
not the method's official code: integration to T = 10, Adam on batches of 128, the block, then the whole net, then the
block. It is cut to the budget: few epochs, and where the regulariser meets fresh weights the official code's learning
rate of 1e-2, because at the paper's 1e-3 so few epochs leave the constraints far from met. The head is a fixed regular
simplex; the regulariser's constants are those of the official code. SODEF_0.9 and its control start from SODEF and
differ in p alone: same solver, steps and order of samples. The test set is scored once, after all training.

{recipes}

Attacks ({draws} draws of the noise per gradient, {judging_draws} per verdict; FGSM besides in L-inf):

{attacks}

All stages together: {seconds:.0f} s on {machine}; {versions}; commit {commit}."""


def _method(results: Results) -> str:
    trained, attacked = next(iter(results.train.values())), next(iter(next(iter(results.attacks.values())).values()))
    suite = attacked["config"]["suite"]
    kinds = {"white-box": suite["white_box"], "bypass, on each route": suite["bypass"]}
    return METHOD.format(
        **dict(zip(("train", "validation", "test"), trained["config"]["sizes"], strict=True)),
        seed=results.run["seed"],
        recipes="\n".join(f"- {name}, {results.title(name)}: {_recipe(r)}" for name, r in results.train.items()),
        draws=suite["draws"],
        judging_draws=suite["judging_draws"],
        attacks="\n".join(f"- {kind}: {'; '.join(map(_attack, attacks))}" for kind, attacks in kinds.items()),
        seconds=sum(record["seconds"] for record in results.records()),
        machine=attacked["machine"],
        versions=", ".join(f"{name} {version}" for name, version in attacked["versions"].items()),
        commit=attacked["commit"],
    )


def _attack(attack: dict[str, Any]) -> str:
    return f"PGD on the {attack['loss']} loss, {attack['steps']} steps, {attack['restarts']} random start(s)"


def _recipe(record: Record) -> str:
    model = record["config"]["model"]
    phases = [f"{p['epochs']} x {p['trains']} at {p['lr']:g}" for p in model["phases"]]
    start = _block(model["block"]) + (f"from {model['start']}; " if model["start"] else "")
    trained = "epochs: " + ", ".join(phases) if phases else "not trained further"
    return start + trained + (", regularised" if model["regularised"] else "")


def _block(block: dict[str, Any]) -> str:
    if block["kind"] == "ode":
        return f"Dopri5 at {block['tolerance']:g} to T = {block['t1']:g}; "
    if block["kind"] == "sde":
        return f"{block['steps']} Euler-Maruyama steps to T = {block['t1']:g}, p_drop = {block['p']:g}; "
    return f"state rounded to multiples of {block['staircase']:g}; " if block["kind"] == "staircase" else ""
