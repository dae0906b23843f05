"""What tables and pictures say, in sentences whose every number is computed from the records."""

from __future__ import annotations

from scipy.stats import wasserstein_distance

from .audits import fields
from .comparisons import RULE, Comparison, span, t_interval
from .curves import curves, plateaus
from .figures import ancestors, seconds
from .results import SIGNIFICANT, WHITE_BOX, Results, mean

__all__ = ["accuracy", "answer", "cost", "masking", "probes", "radii", "spectra", "steps"]


def answer(results: Results, found: Comparison) -> str:
    """The answer to the question that was asked in advance, and what it rests on."""
    noise, control = map(results.called, (found.first, found.second))
    asked = f"Is {noise}, its noise on, more robust than {control}, in the worst case of each sample at {found.threat}?"
    if found.waiting:
        return f"{asked} **Not answered yet** ({found.waiting}). {RULE}"
    k, points, verdict = len(found.pairs), f"{100 * found.difference:+z.1f} points", found.verdict()
    short = {"better": "Yes: the noise helps.", "worse": "No: the noise harms."}.get(
        verdict, "No difference can be claimed."
    )
    reason = {"not claimed: one seed": "one seed says nothing of another training",
              "not claimed: the seeds disagree": "McNemar's test is significant, but the seeds disagree",
              "not claimed: zero is in the t interval": "the seeds agree, but zero is in their t interval",
              "not claimed: McNemar is not significant": "the seeds agree, but McNemar's test is not significant",
              "no difference": f"McNemar's test is not significant at the {SIGNIFICANT:.0%} level"}  # fmt: skip
    because = f" ({reason[verdict]})" if verdict in reason else ""
    warned = "".join(f" (*{text}*)" for text in results.warnings)
    over = ""
    if interval := found.interval:
        over = f", 95 % t interval over {k} seeds {span(interval)}"
    p = f"McNemar p = {found.p:.2g}" + (f" (smallest of {k} seeds, Holm-corrected)" if k > 1 else ", from one seed")
    return (
        f"{asked} **{short}**{warned}{because} The difference is {points}{over}; {p}.{_voted(found)} "
        f"{_counted(results, found)} {RULE}"
    )


def _counted(results: Results, found: Comparison) -> str:
    """Which groups of attacks the two are compared under: not all that either was attacked with."""
    names, seeds = (found.first, found.second), [pair.seed for pair in found.pairs]
    groups = {name: results.counted(str(found.threat), name, names, seeds) for name in names}
    shared = [group for group in groups[found.second] if group in groups[found.first]]
    alone = [f"{group} (of {name})" for name in names for group in groups[name] if group not in shared]
    return f"Counted are the attacks that both could be given, and every way around: {'; '.join([*shared, *alone])}."


def _voted(found: Comparison) -> str:
    """The same difference by the most frequent answers; nothing where neither model draws."""
    if not (each := found.by_vote):
        return ""
    interval = t_interval(each)
    over = f" {span(interval)}" if interval else ""
    points = f"{100 * mean(each):+z.1f} points{over}"
    return (
        f" Judged by the most frequent answer, under the attack that is worst in the mean over draws, it is {points}."
    )


def accuracy(results: Results) -> str:
    """The most robust model in the worst case of each threat, of those under every planned attack; who is masked."""
    parts = []
    for threat in results.named("threat"):
        shown = {name: results.shown(threat, name) for name in results.named("model")}
        whole = [name for name, seeds in shown.items() if seeds and not results.lacks(threat, name, seeds[0])]
        ranked = sorted((_worst(results, threat, name) or 0.0, name) for name in whole)
        parts.append(f"{threat}: {_called(results, *ranked[-1]) if ranked else 'no model has all planned attacks yet'}")
    return (
        f"Bars and bold numbers are the worst case of everything, with Wilson intervals; marks are the worst of each "
        f"group alone; a star says that a planned group is missing. Highest in the worst case, of models without a "
        f"star, at {'; '.join(parts)}. {masking(results)}"
    )


def _called(results: Results, share: float, name: str) -> str:
    return f"{results.called(name)}, {100 * share:.1f} %"


def masking(results: Results) -> str:
    """Which models only look robust, and by how much."""
    parts = []
    for name in results.named("model"):
        drops = [
            (white - worst, threat, white, worst, results.is_masked(threat, name))
            for threat in results.named("threat")
            if results.is_masked(threat, name)
            and (white := _worst(results, threat, name, WHITE_BOX)) is not None
            and (worst := _worst(results, threat, name)) is not None
        ]
        if drops:
            _, threat, white, worst, groups = max(drops, key=lambda drop: drop[0])
            fall = f"{100 * white:.0f} -> {100 * worst:.0f} % at {threat}"
            parts.append(f"{results.called(name)} ({fall}, {' and '.join(groups)})")
    if parts:
        return f"**Masked**: what white-box attacks leave standing, others break, of {'; '.join(parts)}."
    if results.masked:
        groups = list(dict.fromkeys(group for _, _, group, _ in results.masked))
        return (
            f"No model was flagged as masked: none of {', '.join(groups)}, where they were run, breaks significantly "
            "more than the model's own gradient does."
        )
    return "Whether a model is masked is not known yet: no other group than white-box has been run."


def _worst(results: Results, threat: str, name: str, *groups: str) -> float | None:
    found = [results.worst(threat, name, groups or None, seed) for seed in results.shown(threat, name)]
    there = [scores.mean for scores in found if scores]
    return mean(there) if there else None


def radii(results: Results) -> str:
    """Whether the attack breaks everything at its largest radius, as it must."""
    parts = []
    for norm, lines in curves(results).items():
        largest = max(points[-1][0] for points in lines.values())
        left = {name: 100 * share for name, points in lines.items() if (share := points[-1][1].mean) > 0}
        standing = ", ".join(f"{results.called(name)} {value:.1f} %" for name, value in left.items())
        parts.append(f"at {norm} {largest:g} {'still stand: ' + standing if left else 'nothing stands'}")
    return (
        f"White-box PGD with growing radius: {'; '.join(parts)}. At L-inf 0.5 all "
        "images can be made the same grey: what stands there beyond the share of one class tells of a weak attack or a "
        "masked gradient."
    )


def steps(results: Results) -> str:
    """What more steps still break."""
    parts = []
    for threat, lines in plateaus(results).items():
        drops = {name: 100 * (points[0][1].mean - points[-1][1].mean) for name, points in lines.items()}
        few, many = (min(p[i][0] for p in lines.values()) for i in (0, -1))
        name = max(drops, key=lambda n: drops[n])
        parts.append(
            f"from {few:g} to {many:g} steps at {threat} the accuracy falls most for {results.called(name)}, by "
            f"{drops[name]:.1f} points"
            + "".join(
                f"; it rises for {results.called(n)}, by {-drop:.1f}: more steps find less there"
                for n, drop in drops.items()
                if drop < -1
            )
        )
    return f"PGD with more steps of equal length: {'; '.join(parts)}."


def spectra(results: Results) -> str:
    """What training and noise did to the eigenvalues at the same points."""
    found, (noise, control, _) = fields(results), results.primary
    each = [
        f"{title} {100 * field['unstable']:.1f} % (mean {field['mean']:z.2f}, largest {field['largest']:z.2f})"
        for title, field in found.items()
    ]
    points = next(iter(found.values()))["points"]
    text = (
        f"Real parts of the eigenvalues of the field's Jacobian at the same {points} training points. "
        f"Share above zero: {'; '.join(each)}."
    )
    start = (results.model(noise) or {}).get("start")
    names = [results.called(name) for name in (start, control, noise) if name]
    if len(names) < 3 or not set(names) <= set(found):
        return text
    before, longer, noisy = (found[name]["real_parts"] for name in names)
    moved, by_noise = wasserstein_distance(before, longer), wasserstein_distance(noisy, longer)
    size = found[names[2]]["residual"]["0.5"]
    return (
        f"{text} The distributions of the eigenvalues differ by {moved:.2g} through the longer training (Wasserstein "
        f"distance of {control} from {start}), and by {by_noise:.2g} through the noise ({noise} from {control}). The "
        f"noise is a multiple of the field, whose median size at these points is {size:.2g}."
    )


def probes(results: Results) -> str:
    """Where the gradient is exactly zero, and how far those of single draws of the noise lie apart."""
    blind, noisy = [], []
    for name in results.named("model"):
        record = results.record("probe", name)
        shares = record.result["zero_gradients"] if record else {}
        if shares and max(shares.values()) > 0:
            blind.append(f"{results.called(name)} ({max(shares.values()):.0%} of the images)")
        if record and (apart := record.result.get("gradients_apart")):
            half = record["config"]["probe"]["apart"] // 2
            noisy.append(
                f" Gradients at the clean images, each of a single draw of the noise of {results.called(name)} "
                f"(medians): the longest of eight has {apart['longest']:.0%} of the length of all; two averages over "
                f"{half} have a cosine of {apart['mean']:.2f}, by directions {apart['directions']:.2f}."
            )
    return (
        f"Gradients that are exactly zero: {', '.join(blind) or 'nowhere'}. With logits a hundred times smaller or "
        "larger the cross-entropy's gradient may vanish in float32; the DLR loss does not depend on their scale."
        f"{''.join(noisy)}"
    )


def cost(results: Results) -> str:
    """Which training took longest."""
    total = {name: seconds(results, name) for name in results.named("model") if results.seeds(name)}
    for name in total:
        total[name] += sum(seconds(results, other) for other in ancestors(results, name))
    longest, shortest = (pick(total, key=lambda name: total[name]) for pick in (max, min))
    return (
        f"Training of one seed, with what came before it, seconds times processes: from {total[shortest]:,.0f} s "
        f"({results.called(shortest)}) to {total[longest]:,.0f} s ({results.called(longest)})."
    )
