"""What is found out about a trained model: its scores, clean and attacked, its stability, and how it was attacked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from odelayers import check_stability, count_nfe, spectrum

from .accuracy import states
from .attacks import AutoAttack, Best, Counted, Method, Model as View, Threat, Transfer, input_gradient, perturb
from .attacks.common import ascent
from .certified import CertifiedClassifier, evaluate
from .data import Split
from .models import SOLVED, Classifier
from .presets import Group, Suite, long_steps
from .progress import bar
from .scores import Scores
from .views import ADJOINT, DIRECTIONS, QUIET, attacked, surrogate

__all__ = ["apart", "attack_cell", "clean_cell", "craft", "judge", "probe_cell", "spectrum_cell", "stability"]

CHUNK = 250  # images attacked at once: more leave the cache of a CPU
Plan = list[tuple[str, Method, View | None]]
Made = Mapping[str, Tensor]
Victim = Classifier | CertifiedClassifier


@torch.no_grad()
def judge(model: Victim, data: Split, draws: int, noise: torch.Generator) -> Scores:
    """Per sample the right answers over `draws` of the noise, and over as many again for choosing the worst case."""

    def once() -> tuple[Tensor, Tensor]:
        answers = torch.stack([model.head(model.end(z, noise)).argmax(1) for _ in range(number)])
        return (answers == data.labels).sum(0), answers.mode(0).values == data.labels

    number, z = draws if model.noisy else 1, states(model, data.images)
    counts, majority = once()
    chosen = once()[0] if model.noisy else counts
    return Scores(number, *(tuple(x.tolist()) for x in (counts, majority, chosen)))


@torch.no_grad()
def clean_cell(model: Victim, data: Split, draws: int, seed: int) -> dict[str, Any]:
    """Accuracy without an attack; cost of a solve: NFE and milliseconds for 128 images; what is certified, if it is."""
    noise = torch.Generator(data.images.device).manual_seed(seed)
    scores = judge(model, data, draws, noise)
    certified, batch = isinstance(model, CertifiedClassifier), data.first(128).images
    with count_nfe(model) if certified or model.spec.kind in SOLVED else nullcontext() as count:
        model(batch, noise)
    started = time.perf_counter()
    model(batch, noise).cpu()
    seconds = time.perf_counter() - started
    cost = {"nfe": count.nfe if count else 0, "milliseconds_128": round(1000 * seconds, 2)}
    return {"clean": scores.pack(), **cost, **(_certificate(model, data) if certified else {})}


def _certificate(model: CertifiedClassifier, data: Split) -> dict[str, Any]:
    """What is certified, and sample by sample whether it is right and certified beyond each radius, as `held`."""
    found = {key: value for key, value in evaluate(model, data).items() if key != "clean"}
    reach = model.certified_radius(data.images, data.labels)
    held = {radius: (reach > float(radius)).int().tolist() for radius in found["certified"]}
    return {**found, "held": {radius: Scores(1, *[tuple(each)] * 3).pack() for radius, each in held.items()}}


def attack_cell(
    model: Victim, data: Split, threat: Threat, group: Group, suite: Suite, made: Made, seed: int, what: str
) -> dict[str, Any]:
    """Run a group of attacks within one threat: per-sample scores, queries and seconds of each.

    `made` are the images that were made on other models: they are shown to this one.
    """
    device = data.images.device
    noise, start = torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)
    plan = _plan(model, group, suite.draws, noise) if not made else []
    found, largest = {}, 0.0
    with bar(-(-len(data) // CHUNK) * sum(method.ticks for _, method, _ in plan), what) as progress:

        def record(name: str, images: Tensor, queries: int, started: float) -> None:
            nonlocal largest
            seconds = round(time.perf_counter() - started, 2)
            scores = judge(model, Split(images, data.labels), suite.judging_draws, noise)
            found[name] = {**scores.pack(), "queries": queries, "seconds": seconds}
            largest = max(largest, _largest_change(images, data.images, threat))
            if largest > threat.eps * (1 + 1e-5):
                raise RuntimeError(f"{what}: {name} left the ball of {threat}: a change of {largest:g}")

        for name, method, gradient_from in plan:
            progress.set_postfix_str(name)
            view, started = Counted(attacked(model, suite.draws, noise)), time.perf_counter()
            if isinstance(method, AutoAttack) and model.noisy:  # it averages over calls of its own: one draw a call
                gradient_from = attacked(model, 1, noise)
            images = torch.cat([
                perturb(
                    view, part.images, part.labels, threat, method, start,
                    gradient_from=gradient_from, tick=progress.update,
                )
                for part in _chunks(data)
            ])  # fmt: skip
            record(name, images, view.queries, started)
        for name, images in made.items():
            view, started = Counted(attacked(model, suite.draws, noise)), time.perf_counter()
            record(name, _shown(view, data, images), view.queries, started)
    return {"n": len(data), "attacks": found, "largest_change": largest}


def craft(model: Victim, data: Split, threat: Threat, method: Transfer, seed: int, what: str) -> Tensor:
    """The images that are made on `model`, to be shown to others."""
    start = torch.Generator(data.images.device).manual_seed(seed)
    with bar(-(-len(data) // CHUNK) * method.ticks, what) as progress:
        parts = [method.craft(model, p.images, p.labels, threat, start, progress.update) for p in _chunks(data)]
    return torch.cat(parts)


def _shown(view: View, data: Split, made: Tensor) -> Tensor:
    """Of each image and what was made of it the one that the model takes worse."""
    found = []
    for part, images in zip(_chunks(data), made.split(CHUNK), strict=True):
        best = Best(view, part.images, part.labels)
        best.judge(torch.arange(len(images), device=images.device), images)
        found.append(best.images)
    return torch.cat(found)


def _plan(model: Victim, group: Group, draws: int, noise: torch.Generator) -> Plan:
    """Every attack by name, with what its gradient comes from; None for the model itself, or for no gradient."""
    sources: dict[str, View | None] = {"": None}
    if group.gradient != "own":
        named = {"around": model.routes, "adjoint": (ADJOINT,), "quiet": (QUIET,), "directions": (DIRECTIONS,)}
        detours = named[group.gradient]
        sources = {route_name(route): surrogate(model, route, draws, noise) for route in detours}
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


def probe_cell(model: Victim, data: Split, suite: Suite, seed: int, what: str) -> dict[str, Any]:
    """How the attack itself behaves: gradients that are zero, radii up to accuracy 0, more steps, rescaled logits.

    Where there is a solver, its error too: what was found is shown to the model solved in half the steps' length. Of a
    noisy model, more and fewer draws of the noise for a gradient, averaged as they are and by their directions, and how
    far the gradients of single draws lie apart at the clean images.
    """
    noise, probe = torch.Generator(data.images.device).manual_seed(seed), suite.probe
    view = attacked(model, suite.draws, noise)
    rescaled = {f"logits x {c:g}": _times(view, c) for c in (0.01, 100.0)}
    eot = [
        (f"{n} {taken}", averaged, threat)
        for threat, n in (probe.eot if model.noisy else ())
        for taken, averaged in (
            ("draws", attacked(model, n, noise)),
            ("directions", surrogate(model, DIRECTIONS, n, noise)),
        )
        if n > 1 or taken == "draws"  # the direction of a single draw is that of its gradient
    ]
    margin, ce, dlr = (long_steps(loss, probe.steps[0]) for loss in ("margin", "ce", "dlr"))
    runs: list[tuple[str, View, Threat, Method]] = [
        *(("radius", view, Threat(norm, eps), margin) for norm, radii in probe.radii for eps in radii),
        *(("steps", view, probe.threat, long_steps("margin", steps)) for steps in probe.steps),
        *((name, scaled, probe.threat, method) for name, scaled in rescaled.items() for method in (ce, dlr)),
        *((name, averaged, threat, margin) for name, averaged, threat in eot),
    ]
    rows = []
    with bar(sum(method.ticks for *_, method in runs), what) as progress:
        for name, seen, threat, method in runs:
            start = torch.Generator(data.images.device).manual_seed(seed + 1)
            images = perturb(seen, data.images, data.labels, threat, method, start, tick=progress.update)
            scores = judge(model, Split(images, data.labels), suite.judging_draws, noise)
            rows.append({"probe": name, "threat": str(threat), "attack": str(method), **scores.pack()})
            if (name, method.steps) == ("steps", probe.steps[0]) and hasattr(model.block, "solver"):
                fine = judge(model.finer(), Split(images, data.labels), suite.judging_draws, noise)
                rows.append({"probe": "half the step", "threat": str(threat), "attack": str(method), **fine.pack()})
    found = {"n": len(data), "zero_gradients": _zero_gradients(view, data), "probes": rows}
    if not (probe.apart and model.noisy):
        return found
    single = attacked(model, 1, noise), surrogate(model, DIRECTIONS, 1, noise)
    return found | {"gradients_apart": apart(*single, data, probe.apart)}


def _times(view: View, factor: float) -> View:
    return lambda x: factor * view(x)


def _zero_gradients(view: View, data: Split) -> dict[str, float]:
    """Share of samples at which the gradient of a loss is exactly zero: there an attack walks blindly."""
    shares = {}
    for loss in ("ce", "margin"):
        gradients = [input_gradient(view, part.images, part.labels, loss)[0] for part in _chunks(data)]
        shares[loss] = (torch.cat(gradients).flatten(1).abs().amax(1) == 0).float().mean().item()
    return shares


def apart(mean: View, directions: View, data: Split, draws: int) -> dict[str, float]:
    """How far gradients with respect to the image lie apart that are of one draw of the noise: medians over the images.

    `longest` is the share of the longest of eight in the length of all (an eighth, were they equally long). The others
    are the cosine between two averages over half of the draws each, of the gradients that either view gives.
    """

    def gradients(view: View, part: Split) -> Tensor:
        each = [input_gradient(view, part.images, part.labels, "margin")[0] for _ in range(draws)]
        return torch.stack(each).flatten(2)

    def cosine(each: Tensor) -> Tensor:
        first, second = (ascent(half.mean(0), "l2") for half in (each[::2], each[1::2]))
        return (first * second).sum(1)

    found = []
    for part in _chunks(data):
        plain, scaled = gradients(mean, part), gradients(directions, part)
        lengths = plain[:8].norm(dim=2)
        share = lengths.amax(0) / lengths.sum(0).clamp(min=torch.finfo(lengths.dtype).tiny)
        found.append(torch.stack([share, cosine(plain), cosine(scaled)]))
    medians = torch.cat(found, 1).median(1).values.tolist()
    return dict(zip(("longest", "mean", "directions"), medians, strict=True))


def spectrum_cell(fields: Iterable[tuple[str, nn.Module, Tensor]]) -> dict[str, Any]:
    """The stability of each field at its states, and its eigenvalues' real parts."""
    found = {}
    for name, f, z in fields:
        real = spectrum(f, z).real
        found[name] = {**_stability(f, z, real), "real_parts": [round(x, 4) for x in real.flatten().tolist()]}
    return found


def stability(f: nn.Module, z: Tensor) -> dict[str, Any]:
    """The share of states (B, 64) at which a field meets each constraint, and the size of the field there."""
    return _stability(f, z, spectrum(f, z).real)


def _stability(f: nn.Module, z: Tensor, real: Tensor) -> dict[str, Any]:
    report = check_stability(f, z)

    def share(holds: Tensor) -> float:
        return holds.float().mean().item()

    return {
        "points": len(z),
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
