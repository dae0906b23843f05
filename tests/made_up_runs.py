"""Runs of the MNIST study whose records are made up: what the tests of its report are drawn from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from examples.mnist.cells import Cell, plan
from examples.mnist.presets import PRESETS, Model, Preset
from examples.mnist.records import write
from examples.mnist.scores import Scores

IMAGES, FEW, DRAWS = 200, 40, 8
WARNINGS = ("a smoke run, not evidence", "NOT MNIST")
Accuracy = Callable[[Cell], float]


def preset(seeds: int = 1) -> Preset:
    """The smoke preset with more seeds."""
    models = PRESETS["smoke"].models
    return replace(
        PRESETS["smoke"],
        models=tuple(replace(m, seeds=1 if m.name == "M13" else seeds) for m in (*models, _other_head(models))),
    )


def _other_head(models: tuple[Model, ...]) -> Model:
    return next(
        replace(m, name="M3-linear", title="SODEF, linear head", head="linear") for m in models if m.name == "M3"
    )


def honest(cell: Cell) -> float:
    """White-box attacks are the strongest; a larger radius breaks more."""
    weaker = {"white-box": 0.0, "bypass": 0.02, "adjoint": 0.02, "noise-off": 0.02, "directions": 0.02, "transfer": 0.2}
    weaker["black-box"] = 0.1
    eps = cell.threat.eps if cell.threat else 0.0
    return max(0.0, 0.98 - 0.3 * eps + (weaker[cell.group.name] if cell.group else 0))


def masking(cell: Cell) -> float:
    """M13 hides its gradient: white-box attacks find little, the others what they find on an honest model."""
    hidden = cell.model == "M13" and cell.group is not None and cell.group.name == "white-box"
    return 0.95 if hidden else honest(cell)


def made_up(
    out: Path,
    accuracy: Accuracy = honest,
    *,
    seeds: int = 1,
    has: Callable[[Cell], bool] = lambda cell: True,
    lost: Callable[[Cell], str | None] = lambda cell: None,
) -> Path:
    """A run whose records say what `accuracy` says; cells that `has` refuses are missing, those `lost` names too."""
    study, manifest = preset(seeds), []
    for cell in plan(study):
        why, name = lost(cell), None
        if has(cell) and why is None:
            name = f"{cell.name}-0.json"
            result, config = _result(study, cell, accuracy), _config(study, cell)
            (out / "records").mkdir(parents=True, exist_ok=True)
            write(out / "records" / name, {
                "stage": cell.name, "key": "0", "config": config, "result": result, "seconds": 2.5, "machine": "abacus",
                "versions": {"torch": "0"}, "commit": "c0ffee",
            })  # fmt: skip
        manifest.append({
            "kind": cell.kind, "model": cell.model, "seed": cell.seed, "threat": cell.threat and str(cell.threat),
            "group": cell.group and cell.group.name, "file": name, "lost": why,
        })  # fmt: skip
    about = {"preset": "smoke", "warning": WARNINGS[0], "data": "digits", "banner": "NOT MNIST: digits", "seed": 0}
    out.mkdir(exist_ok=True)
    controls = {model.name: model.control for model in study.models}
    write(out / "run.json", {**about, "primary": ["M4", "M5", "L2 0.5"], "controls": controls, "cells": manifest})
    return out


def _config(study: Preset, cell: Cell) -> dict:
    config = {
        "data": "digits",
        "sizes": [500, 100, IMAGES],
        "device": "cpu",
        "threads": 1,
        "model": asdict(study.model(cell.model)),
    }
    if cell.kind == "probe":
        return config | {"probe": {"apart": 16}}
    if cell.group:
        return config | {"group": {"name": cell.group.name}, "draws": 2, "judging_draws": DRAWS}
    return config


def _scores(cell: Cell, accuracy: float, n: int, salt: int = 0) -> dict:
    """Fixed random verdicts; the samples that are hard are the same for all models, as they are in life."""
    hard = np.random.default_rng(cell.seed).random(n) + 0.02 * np.random.default_rng(
        [salt, *cell.name.encode()]
    ).random(n)
    right = hard < accuracy
    if cell.model != "M4":
        return Scores(1, *[tuple(map(int, right))] * 3).pack()
    counts = tuple(int(DRAWS * r) if i % 5 else max(0, int(DRAWS * r) - 1) for i, r in enumerate(right))
    return Scores(DRAWS, counts, tuple(map(bool, right)), counts).pack()


def _result(study: Preset, cell: Cell, accuracy: Accuracy) -> dict:
    if cell.kind == "train":
        audit = {key: value for key, value in _field(-0.1, np.random.default_rng(1)).items() if key != "real_parts"}
        lines = [
            {"phase": 1, "trains": "block", "epoch": 1},
            {"phase": 1, "trains": "block", "epoch": 2, "audit": audit},
        ]
        audited = study.model(cell.model).regularised
        return {"epochs": lines if audited else [], "steps": 12, "validation": 0.9, "parameters": 1234}
    if cell.kind == "clean":
        return {"clean": _scores(cell, accuracy(cell), IMAGES), "nfe": 20, "milliseconds_128": 3.5}
    if cell.kind == "attack":
        n = FEW if cell.group.name == "black-box" else IMAGES - 20
        salted = ((i, str(method)) for i, method in enumerate(cell.group.attacks))
        return {"n": n, "largest_change": 0.1, "attacks": {
            name: {**_scores(cell, accuracy(cell), n, i), "queries": 700, "seconds": 1.5} for i, name in salted
        }}  # fmt: skip
    if cell.kind == "spectra":
        fields = {"untrained": 0.1, "trained": -0.4, "attacked test images": -0.3}
        return {name: _field(mean, np.random.default_rng(len(cell.name))) for name, mean in fields.items()}
    if cell.kind == "plane":
        times, grid = [0.0, 5.0, 10.0], [[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)]
        tracks = [[[2.0**-t * k, 1.0] for k in range(5)] for t in times]
        return {"explained": 0.75, "times": times, "tracks": tracks, "labels": [0, 1, 2, 3, 4], "grid": grid,
                "field": [[-x, 0.0] for x, _ in grid]}  # fmt: skip
    rows = [("radius", f"L2 {eps:g}", "PGD-5 margin", 0.98 - eps / 3) for eps in (0.5, 1.5, 3.0)]
    rows += [("radius", f"L-inf {eps:g}", "PGD-5 margin", 0.98 - 4 * eps) for eps in (0.05, 0.3)]
    rows += [("steps", "L2 1.5", f"PGD-{n} margin", 0.5 - n / 2000) for n in (40, 200)]
    rows += [(f"logits x {c}", "L2 1.5", f"PGD-5 {loss}", 0.5) for c in ("0.01", "100") for loss in ("ce", "dlr")]
    zero = dict.fromkeys(("ce", "margin"), float(cell.model == "M13"))
    probes = [{"probe": what, "threat": t, "attack": a, **_scores(cell, share, 50)} for what, t, a, share in rows]
    apart = {"gradients_apart": {"longest": 0.47, "mean": -0.03, "directions": 0.12}} if cell.model == "M4" else {}
    return {"n": 50, "zero_gradients": zero, "probes": probes, **apart}


def _field(mean: float, random: np.random.Generator) -> dict:
    real = random.normal(mean, 0.3, 640).round(4)
    shares = dict.fromkeys(("all J_ii < 0", "row dominance", "column dominance", "abscissa < 0", "log norm < 0"), 0.25)
    return {
        "points": 10, "real_parts": real.tolist(), "mean": real.mean(), "largest": real.max(), "constraints": shares,
        "unstable": float((real > 0).mean()), "residual": {"0.05": 0.1, "0.5": 0.2, "0.95": 0.3},
    }  # fmt: skip


def records(out: Path) -> dict[str, dict]:
    """What each record of a run holds, by the name of its cell."""
    return {path.stem.removesuffix("-0"): json.loads(path.read_text()) for path in (out / "records").glob("*.json")}


def table(text: str, caption: str) -> list[dict[str, str]]:
    """The rows of the Markdown table whose caption begins so, by header."""
    parts = text.split(f"**{caption}")[1].split("\n\n")
    lines = next(part for part in parts if part.startswith("|")).splitlines()  # a folded one has its fold before it
    header, _, *rows = ([entry.strip() for entry in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows]


def number(entry: str) -> float:
    """The first number of an entry."""
    return float(re.search(r"-?[\d.]+", entry.replace("*", ""))[0])
