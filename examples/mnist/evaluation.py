"""What is found out about a trained model: its scores, clean and attacked, its stability, and how it was attacked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from odelayers import check_stability, spectrum

from .attacks import PGD, Counted, Method, Model as View, Threat, input_gradient, perturb
from .data import Split
from .models import Classifier, attacked, surrogate
from .presets import Group, Suite
from .progress import bar
from .scores import Scores
from .training import states

__all__ = ["attack_cell", "clean_cell", "judge", "probe_cell", "spectrum_cell"]

CHUNK = 500  # images attacked at once
Plan = list[tuple[str, Method, View | None]]


@torch.no_grad()
def judge(model: Classifier, data: Split, draws: int, noise: torch.Generator) -> Scores:
    """Per sample the right answers over `draws` of the noise, and over as many again for choosing the worst case."""

    def once() -> tuple[Tensor, Tensor]:
        answers = torch.stack([model.head(model.end(z, noise)).argmax(1) for _ in range(number)])
        return (answers == data.labels).sum(0), answers.mode(0).values == data.labels

    number, z = draws if model.noisy else 1, states(model, data.images)
    counts, majority = once()
    chosen = once()[0] if model.noisy else counts
    return Scores(number, *(tuple(x.tolist()) for x in (counts, majority, chosen)))


def clean_cell(model: Classifier, data: Split, draws: int, seed: int) -> dict[str, Any]:
    """Accuracy without an attack; cost of a solve: NFE and milliseconds for 128 images."""
    noise = torch.Generator(data.images.device).manual_seed(seed)
    scores = judge(model, data, draws, noise)
    batch = data.first(128).images
    z = states(model, batch)
    nfe = model.block.solve(z, generator=noise).stats.nfe if hasattr(model.block, "solve") else 0
    started = time.perf_counter()
    with torch.no_grad():
        model(batch, noise).cpu()
    seconds = time.perf_counter() - started
    return {"clean": scores.pack(), "nfe": nfe, "milliseconds_128": round(1000 * seconds, 2)}


def attack_cell(
    model: Classifier,
    data: Split,
    threat: Threat,
    group: Group,
    suite: Suite,
    others: Mapping[str, Classifier],
    seed: int,
    what: str,
) -> dict[str, Any]:
    """Run a group of attacks within one threat: per-sample scores, queries and seconds of each.

    `others` are the models that transferred images are made on.
    """
    device = data.images.device
    noise, start = torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)
    plan = _plan(model, group, suite.draws, others, noise)
    found, largest = {}, 0.0
    with bar(-(-len(data) // CHUNK) * sum(method.ticks for _, method, _ in plan), what) as progress:
        for name, method, gradient_from in plan:
            progress.set_postfix_str(name)
            view, started = Counted(attacked(model, suite.draws, noise)), time.perf_counter()
            images = torch.cat([
                perturb(
                    view, part.images, part.labels, threat, method, start,
                    gradient_from=gradient_from, tick=progress.update,
                )
                for part in _chunks(data)
            ])  # fmt: skip
            seconds = round(time.perf_counter() - started, 2)
            scores = judge(model, Split(images, data.labels), suite.judging_draws, noise)
            found[name] = {**scores.pack(), "queries": view.queries, "seconds": seconds}
            largest = max(largest, _largest_change(images, data.images, threat))
    return {"n": len(data), "attacks": found, "largest_change": largest}


def _plan(
    model: Classifier, group: Group, draws: int, others: Mapping[str, Classifier], noise: torch.Generator
) -> Plan:
    """Every attack by name, with what its gradient comes from; None for the model itself, or for no gradient."""
    if group.gradient == "others":
        sources = {f"from {name}": attacked(other, draws, noise) for name, other in others.items()}
    elif group.gradient == "around":
        sources = {route_name(r): surrogate(model, r, draws, noise) for r in model.routes}
    else:
        sources = {"": None}
    return [
        (f"{method} {source}".strip(), method, view)
        for source, view in sources.items()
        for method in group.attacks
    ]  # fmt: skip


def route_name(route: str | float) -> str:
    """How a detour is called in tables."""
    return f"through {route}" if isinstance(route, str) else f"through t={route:g}"


def _chunks(data: Split) -> list[Split]:
    parts = zip(data.images.split(CHUNK), data.labels.split(CHUNK), strict=True)
    return [Split(images, labels) for images, labels in parts]


def _largest_change(adversarial: Tensor, images: Tensor, threat: Threat) -> float:
    """The largest distance from the original in the threat's norm, for the record."""
    order = float("inf") if threat.norm == "linf" else 2
    return (adversarial - images).flatten(1).norm(p=order, dim=1).max().item()


def probe_cell(model: Classifier, data: Split, suite: Suite, seed: int, what: str) -> dict[str, Any]:
    """How the attack itself behaves: gradients that are zero, radii up to accuracy 0, more steps, rescaled logits."""
    noise, probe = torch.Generator(data.images.device).manual_seed(seed), suite.probe
    view = attacked(model, suite.draws, noise)
    rescaled = {f"logits x {c:g}": _times(view, c) for c in (0.01, 100.0)}
    runs: list[tuple[str, View, Threat, Method]] = [
        *(
            ("radius", view, Threat(norm, eps), PGD("margin", probe.steps[0]))
            for norm, radii in probe.radii
            for eps in radii
        ),
        *(("steps", view, probe.threat, PGD("margin", steps)) for steps in probe.steps),
        *((name, v, probe.threat, PGD(loss, probe.steps[0])) for name, v in rescaled.items() for loss in ("ce", "dlr")),
    ]
    rows = []
    with bar(sum(method.ticks for *_, method in runs), what) as progress:
        for name, seen, threat, method in runs:
            start = torch.Generator(data.images.device).manual_seed(seed + 1)
            images = perturb(seen, data.images, data.labels, threat, method, start, tick=progress.update)
            scores = judge(model, Split(images, data.labels), suite.judging_draws, noise)
            rows.append({"probe": name, "threat": str(threat), "attack": str(method), **scores.pack()})
    return {"n": len(data), "zero_gradients": _zero_gradients(view, data), "probes": rows}


def _times(view: View, factor: float) -> View:
    return lambda x: factor * view(x)


def _zero_gradients(view: View, data: Split) -> dict[str, float]:
    """Share of samples at which the gradient of a loss is exactly zero: there an attack walks blindly."""
    shares = {}
    for loss in ("ce", "margin"):
        gradients = [input_gradient(view, part.images, part.labels, loss)[0] for part in _chunks(data)]
        shares[loss] = (torch.cat(gradients).flatten(1).abs().amax(1) == 0).float().mean().item()
    return shares


def spectrum_cell(fields: Iterable[tuple[str, nn.Module, Tensor]]) -> dict[str, Any]:
    """The eigenvalues' real parts of each field at its states, and the share of points that meet each constraint."""
    return {name: _stability(f, z) for name, f, z in fields}


def _stability(f: nn.Module, z: Tensor) -> dict[str, Any]:
    real, report = spectrum(f, z).real, check_stability(f, z)

    def share(holds: Tensor) -> float:
        return holds.float().mean().item()

    return {
        "points": len(z),
        "real_parts": [round(value, 4) for value in real.flatten().tolist()],
        "mean": real.mean().item(),
        "largest": real.max().item(),
        "unstable": share(real > 0),
        "residual": {str(q): report.residual.quantile(q).item() for q in (0.05, 0.5, 0.95)},
        "constraints": {
            "all J_ii < 0": share(report.diagonal < 0),
            "row dominance": share(report.row_dominance > 0),
            "column dominance": share(report.column_dominance > 0),
            "abscissa < 0": share(report.abscissa < 0),
            "log norm < 0": share(report.log_norm_2 < 0),
        },
    }
