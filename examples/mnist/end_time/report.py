"""The report of the end-time study, drawn from `run.json` and the records alone: tables, and pictures beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..records import Record
from ..scores import percent
from . import captions, figures
from .findings import findings
from .presets import BLOG
from .results import Results

__all__ = ["write_report"]

ATTACKS = {"clean": "clean", "unclipped": "FGSM as in the blog", "clipped": "FGSM inside [0, 1]"}


def write_report(out: Path) -> Path:
    """Draw report.md and its pictures from the records in `out`; returns the report's path."""
    results = Results(out)
    parts = [_opening(results), _table(results), _draws(results), _solvers(results), _strong(results)]
    parts += [*_pictures(results, out), _training(results), _method(results)]
    path = out / "report.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def _opening(results: Results) -> str:
    lines = [f"# What the end time of a neural ODE does ({results.run['data']}, preset {results.run['preset']})"]
    lines += [f"> **{text}**" for text in (results.run["warning"], results.run["banner"]) if text]
    lines.append(
        "A net is trained with its ODE solved to one end time T and tested with it solved to another, t. Brackets hold "
        f"Wilson 95 % intervals. FGSM has epsilon {results.run['eps']:g}; each attack is made for the end time at "
        "which it is judged. The blog's FGSM did not stop at black and white, so its adversarial images are outside "
        "[0, 1]; the same attack inside [0, 1] stands beside it. The blog's settings ask for 100 epochs; here a net "
        f"was trained for {_epochs(results)}, from one seed."
    )
    return "\n\n".join([*lines, *findings(results)])


def markdown(results: Results, caption: str, header: list[str], rows: list[list[str]]) -> str:
    """A table under its caption, with the run's warnings."""
    note = "".join(f" (*{text}*)" for text in results.warnings)
    lines = [header, ["---"] * len(header), *rows]
    return f"**{caption}**{note}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _accuracies(results: Results, name: str, what: str) -> list[list[str]]:
    """The lines of one net in the table: an attack a line, an end time a column, the blog's numbers beside."""
    row = results.rows[name]
    blog = {} if row["adversarial"] or what != "table" else BLOG.get((row["net"], row["trained_to"]), {})
    asked = what in row
    title = row["title"] if asked else f"{row['title']} ({row['why']})"
    lines = []
    for key, attack in ATTACKS.items():
        line = [title if key == "clean" else "", attack]
        for column in results.columns:
            record, said = results.record(name, what, column), blog.get(int(float(column)))
            ours = "-" if record is None else percent(record.result[key], record.result["n"])
            line.append(f"{ours} (blog {said[key == 'unclipped']:g})" if said and key != "clipped" else ours)
        lines.append(line)
    return lines if asked else lines[: 2 if blog else 1]


def _table(results: Results) -> str:
    lines = [line for name in results.rows for line in _accuracies(results, name, "table")]
    header = ["net, trained to", "attack", *(f"t = {column}" for column in results.columns)]
    caption = "T5. Accuracy in % at each end time, ours with interval, the blog's in parentheses"
    return "## The blog's table\n\n" + markdown(results, caption, header, lines)


def _draws(results: Results) -> str:
    lines = [
        line for name in results.rows if "draws" in results.rows[name] for line in _accuracies(results, name, "draws")
    ]
    if not lines:
        return ""
    header = ["net, trained to", "attack", *(f"t = {column}" for column in results.columns)]
    text = (
        "The blog's pooling drew its regions in evaluation too, afresh at every call: the attack's gradient then "
        "belongs to another network than the one it is judged on. The table above has the regions fixed; this one has "
        "them drawn, and nothing else is changed."
    )
    return f"## What random pooling did\n\n{text}\n\n" + markdown(
        results, "Accuracy in %, the pooling's regions drawn at every call", header, lines
    )


def _solvers(results: Results) -> str:
    rows = []
    for name, row in results.rows.items():
        usual = results.record(name, "answers", results.run["evaluation"])
        for steps in row.get("answers", {}):
            cell = results.record(name, "answers", steps).result
            changed = [_changed(*pair) for pair in zip(cell["answers"], usual.result["answers"], strict=True)]
            texts = [
                f"{percent(a, cell['n'])}, {100 * c:.1f} changed" for a, c in zip(cell["clean"], changed, strict=True)
            ]
            rows.append([row["title"] if steps == results.run["evaluation"] else "", steps, *texts])
    if not rows:
        return ""
    header = ["net", "stepped by", *(f"t = {column}" for column in results.columns)]
    text = (
        "Every other number here is taken by one rule of stepping, the first of each net below. *Changed*: the share "
        "of the images, in %, whose answer is another when the step is halved, or taken as the blog's solver takes it."
    )
    return f"## Does the solver matter?\n\n{text}\n\n" + markdown(results, "Clean accuracy in %", header, rows)


def _changed(first: str, second: str) -> float:
    return sum(a != b for a, b in zip(first, second, strict=True)) / len(first)


def _strong(results: Results) -> str:
    cells = results.answered("strong")
    if not cells:
        return ""
    kinds = [key for key in next(iter(cells.values())) if key not in ("n", "end")]
    rows = [
        [results.title(name), f"{cell['end']:g}", *(percent(cell[kind], cell["n"]) for kind in kinds)]
        for name, cell in cells.items()
    ]
    n = next(iter(cells.values()))["n"]
    text = (
        "One gradient step says little: where it fails because the gradient is useless, a net only looks robust. "
        "*worst* is the worst of these attacks, image by image, and that is the robustness to be reported."
    )
    caption = f"Accuracy in % at L-inf {results.run['eps']:g} inside [0, 1], the first {n} test images"
    return f"## Under attacks of more than one step\n\n{text}\n\n" + markdown(
        results, caption, ["net", "t", *kinds], rows
    )


def _pictures(results: Results, out: Path) -> list[str]:
    parts = []
    if results.answered("curve"):
        parts += ["## Accuracy over the end time", _shown(figures.curve_figure(results, out), captions.curve(results))]
    if films := results.answered("film"):
        parts += [
            "## The state through time",
            "Two images of one digit and one of another. On one scale (above) the state of most nets only grows; with "
            "each frame on its own scale (below, as in the blog) one sees whether its pattern settles.",
            *(_shown(figures.film_figure(results, name, out), captions.film(results, name)) for name in films),
        ]
    if results.answered("dynamics"):
        parts += [
            _shown(figures.settling_figure(results, out), captions.settling(results)),
            _shown(figures.distance_figure(results, out), captions.distances(results)),
            _shown(figures.gradient_figure(results, out), captions.gradients(results)),
        ]
    return parts


def _shown(path: Path, caption: str) -> str:
    """A picture over what it says."""
    return f"![{path.stem}]({path.name})\n\n*{caption}*"


def _training(results: Results) -> str:
    rows = []
    for name in results.trained():
        record = results.record(name, "train")
        row, n = record["config"]["row"], record["config"]["sizes"][1]
        epochs = _trained_for(record)
        last = record.result["log"][-1]
        validation = [percent(share, n) for share in record.result["validation"]]
        rows.append([
            results.title(name), f"{record.result['parameters']:,}", f"{row['batches']:,} ({epochs:.1f} epochs)",
            _adversarial(row["pgd"]), f"{last['loss']:.3f}", f"{last['gradient']:.2g}", *validation,
            f"{record['seconds']:.0f}",
        ])  # fmt: skip
    if not rows:
        return ""
    header = ["net", "parameters", "batches", "adversarial half", "last loss", "last gradient norm",
              *(f"t = {column}" for column in results.columns), "seconds"]  # fmt: skip
    return "## Training\n\n" + markdown(
        results, "Training of each net; accuracy on the validation set in %", header, rows
    )


def _trained_for(record: Record) -> float:
    """The epochs of a net's training."""
    row, size = record["config"]["row"], record["config"]["sizes"][0]
    return row["batches"] / max(1, size // row["batch"])


def _epochs(results: Results) -> str:
    found = [_trained_for(results.record(name, "train")) for name in results.trained()]
    low, high = f"{min(found):.1f}", f"{max(found):.1f}"
    return f"{low} epochs" if low == high else f"{low} to {high} epochs"


def _adversarial(pgd: dict[str, Any] | None) -> str:
    return "-" if pgd is None else f"PGD-{pgd['steps']}, step {pgd['size']:g}, eps {pgd['eps']:g}"


METHOD = """\
## How it was done

{train:,} training, {validation:,} validation and {test:,} test images; seed {seed}, one seed a net. Network, optimiser
and attack are the blog's: 3x3 convolution, batch normalisation, fractional max pooling to 7x7; f = group normalisation,
then four times ReLU, 3x3 convolution, group normalisation; a linear head; Adam at 1e-3 on batches of {batch}; pixels
moved to [-0.5, 0.5]. Different from the blog:

- far fewer batches, with the learning rate falling to 0 along half a cosine;
- the solver, where the blog has Dopri5 at 1e-3: in training {training}, in evaluation {evaluation};
- the gradient: backpropagation through the steps taken instead of the adjoint;
- pooling regions are fixed in evaluation;
- adversarial training, half of every batch as in the blog, stays within epsilon. The code published with the blog
  (github.com/rajatvd/NeuralODE, adversarial.py) cuts a perturbation to the ball around the current point instead of the
  image, which never binds: from a random start within 0.3, 40 steps of 0.01 may lead to 0.7.

The test set was used after all training only.

All stages together: {seconds:.0f} s on {machine}; {versions}; commit {commit}. This command computes them; it goes on
from what is already there:

```bash
{command}
```"""


def _method(results: Results) -> str:
    trained = results.record(results.trained()[0], "train")
    records = list(results.records())
    command = f"python examples/end_time_mnist.py --preset {results.run['preset']}"
    command += f" --seed {results.run['seed']}" if results.run["seed"] else ""
    return METHOD.format(
        command=command,
        **dict(zip(("train", "validation", "test"), trained["config"]["sizes"], strict=True)),
        seed=results.run["seed"],
        batch=trained["config"]["row"]["batch"],
        training=trained["config"]["steps"],
        evaluation=results.run["evaluation"],
        seconds=sum(record["seconds"] for record in records),
        machine=trained["machine"],
        versions=", ".join(f"{name} {version}" for name, version in trained["versions"].items()),
        commit=", ".join(sorted({str(record["commit"]) for record in records})),
    )
