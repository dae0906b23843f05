"""Scores of models on test images, clean and attacked, and the statistics that say how much they mean."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from odelayers import check_stability, spectrum

from .attacks import Attack, Threat, fgsm, input_gradient, perturb
from .data import Split
from .models import Classifier, attacked, surrogate
from .presets import Suite
from .progress import bar
from .training import states

__all__ = ["attack_cell", "clean_cell", "mcnemar", "spectrum_cell", "wilson"]

CHUNK = 500  # images attacked at once


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval for a share seen in `n` independent samples."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding must not part them


def mcnemar(first: Sequence[bool], second: Sequence[bool], alternative: str = "two-sided") -> float:
    """Exact paired test on samples that only one of two has right; "greater": is `first` right more often?"""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5, alternative=alternative).pvalue)


@torch.no_grad()
def _right(model: Classifier, images: Tensor, labels: Tensor, draws: int, noise: torch.Generator) -> dict[str, Any]:
    """Per sample: the share of draws classified rightly, and whether the most frequent answer is right."""
    z = states(model, images)
    answers = torch.stack([model.head(model.end(z, noise)).argmax(1) for _ in range(draws if model.noisy else 1)])
    return {
        "share": [round(s, 6) for s in (answers == labels).float().mean(0).tolist()],
        "majority": (answers.mode(0).values == labels).tolist(),
    }


def clean_cell(model: Classifier, data: Split, draws: int, seed: int) -> dict[str, Any]:
    """Accuracy without an attack; cost of a solve: NFE and seconds per 1,000 images."""
    noise = torch.Generator(data.images.device).manual_seed(seed)
    scores = _right(model, data.images, data.labels, draws, noise)
    batch = data.first(128).images
    z = states(model, batch)
    nfe = model.block.solve(z, generator=noise).stats.nfe if hasattr(model.block, "solve") else 0
    started = time.perf_counter()
    with torch.no_grad():
        model(batch, noise).cpu()
    seconds = time.perf_counter() - started
    return {
        "n": len(data),
        "draws": draws if model.noisy else 1,
        "mean": sum(scores["share"]) / len(data),
        "majority": sum(scores["majority"]) / len(data),
        "nfe": nfe,
        "milliseconds_128": round(1000 * seconds, 2),
    }


def attack_cell(model: Classifier, data: Split, threat: Threat, suite: Suite, seed: int, what: str) -> dict[str, Any]:
    """Run a suite within one threat: per-sample scores of each attack, of each kind's worst, and of the worst of all.

    The worst case of a sample is chosen by one set of draws of the noise and scored by another, so that noise cannot
    make it look worse than it is.
    """
    device = data.images.device
    noise, start = torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(seed + 1)
    plan = _plan(model, threat, suite)
    found = {}
    with bar(_steps(plan, len(data)), what) as progress:
        for name, attack, route in plan:
            progress.set_postfix_str(name)
            images = [
                perturb(
                    attacked(model, suite.draws, noise), part.images, part.labels, threat, attack, start,
                    gradient_from=None if route is None else surrogate(model, route, suite.draws, noise),
                    tick=progress.update,
                )
                for part in _chunks(data)
            ]  # fmt: skip
            found[name] = torch.cat(images)
    judge = lambda images: _right(model, images, data.labels, suite.judging_draws, noise)  # noqa: E731
    chosen_by = {name: torch.tensor(judge(images)["share"]) for name, images in found.items()}
    groups = {kind: [name for name in found if name.startswith(kind)] for kind in ("white-box", "bypass")}
    groups = {kind: names for kind, names in groups.items() if names} | {"worst": list(found)}
    worst = {kind: judge(_worst([(chosen_by[n], found[n]) for n in names])) for kind, names in groups.items()}
    return {
        "n": len(data),
        "clean": judge(data.images),
        "attacks": {name: judge(images) for name, images in found.items()},
        **worst,
        "zero_gradients": _zero_gradients(model, data, suite.draws, noise),
        "largest_change": _largest_change(found.values(), data.images, threat),
    }


def _plan(model: Classifier, threat: Threat, suite: Suite) -> list[tuple[str, Attack, str | float | None]]:
    """Every attack by name, with the route of its gradient: None for the model's own."""
    plan = [(f"white-box {attack.loss}", attack, None) for attack in suite.white_box]
    if threat.norm == "linf":
        plan.insert(0, ("white-box FGSM", fgsm(threat.eps)[1], None))
    for route in model.routes:
        through = route if isinstance(route, str) else f"t={route:g}"
        plan += [(f"bypass {through} {attack.loss}", attack, route) for attack in suite.bypass]
    return plan


def _chunks(data: Split) -> list[Split]:
    parts = zip(data.images.split(CHUNK), data.labels.split(CHUNK), strict=True)
    return [Split(images, labels) for images, labels in parts]


def _steps(plan: list[tuple[str, Attack, str | float | None]], images: int) -> int:
    """The most steps the plan can take: samples that are broken early make it fewer."""
    return -(-images // CHUNK) * sum(attack.steps * attack.restarts for _, attack, _ in plan)


def _worst(candidates: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Per sample, the images of the candidate with the lowest share of right answers."""
    shares = torch.stack([share for share, _ in candidates])
    images = torch.stack([image for _, image in candidates])
    return images[shares.argmin(0).to(images.device), torch.arange(images.shape[1], device=images.device)]


def _zero_gradients(model: Classifier, data: Split, draws: int, noise: torch.Generator) -> dict[str, float]:
    """Share of samples at which the gradient of a loss is exactly zero: there an attack walks blindly."""
    view = attacked(model, draws, noise)
    shares = {}
    for loss in ("ce", "margin"):
        gradients = [input_gradient(view, part.images, part.labels, loss)[0] for part in _chunks(data)]
        shares[loss] = (torch.cat(gradients).flatten(1).abs().amax(1) == 0).float().mean().item()
    return shares


def _largest_change(found: Iterable[Tensor], images: Tensor, threat: Threat) -> float:
    """The largest distance from the original in the threat's norm, for the record."""
    order = float("inf") if threat.norm == "linf" else 2
    return max((adversarial - images).flatten(1).norm(p=order, dim=1).max().item() for adversarial in found)


def spectrum_cell(fields: dict[str, tuple[nn.Module, Tensor]]) -> dict[str, Any]:
    """The eigenvalues' real parts of each field at its states, and the share of points that meet each constraint."""
    return {name: _stability(f, z) for name, (f, z) in fields.items()}


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
        "median_residual": report.residual.median().item(),
        "constraints": {
            "all J_ii < 0": share(report.diagonal < 0),
            "row dominance": share(report.row_dominance > 0),
            "column dominance": share(report.column_dominance > 0),
            "abscissa < 0": share(report.abscissa < 0),
            "log norm < 0": share(report.log_norm_2 < 0),
        },
    }


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that hold together for the whole family."""
    corrected, floor = [0.0] * len(pvalues), 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=lambda i: pvalues[i])):
        floor = max(floor, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        corrected[index] = floor
    return corrected
