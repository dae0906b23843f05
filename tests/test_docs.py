"""README, documentation pages and docstrings say nothing that does not run."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import odelayers

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = ["odelayers", *sorted(m.name for m in pkgutil.walk_packages(odelayers.__path__, "odelayers."))]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _run(example: doctest.DocTest) -> str:
    """Run a doctest; return what it says of its failures."""
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=said.append, clear_globs=False)
    return "".join(said)


def run_page(text: str, name: str) -> str:
    """Run a page's blocks in order in one namespace: `python` is executed, `pycon` is compared with its output."""
    namespace: dict[str, object] = {"__name__": name}
    for block in BLOCK.finditer(text):
        kind, code = block.groups()
        line = text[: block.start()].count("\n") + 1
        if kind == "python":
            exec(compile("\n" * line + code, name, "exec"), namespace)
            continue
        example = doctest.DocTest(doctest.DocTestParser().get_examples(code), {}, name, name, line, code)
        example.globs = namespace  # what one block defines, the next ones know
        if said := _run(example):
            return said
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_code_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python block of README.md and docs/*.md runs, and prints what the page says it prints."""
    monkeypatch.chdir(tmp_path)
    said = run_page(page.read_text(), page.name)
    assert not said, said


def test_a_page_that_prints_something_else_is_caught() -> None:
    """Control: a block with a wrong output and a block that raises are both seen."""
    assert "Expected" in run_page("```pycon\n>>> 1 + 1\n3\n```\n", "wrong")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n", "raises")


def _legal_pairs(text: str) -> list[tuple[str, str, bool]]:
    """The rows of the table of legal pairs in docs/gradients.md: solver, gradient, legal."""
    lines = [line.strip("| ").split(" | ") for line in text.split("## Legal pairs")[1].splitlines() if line[:1] == "|"]
    header, rows = [cell.strip("`") for cell in lines[0]], lines[2:]
    return [
        (row[0].strip("`"), gradient, {"yes": True, "no": False}[cell])
        for row in rows
        for gradient, cell in zip(header[1:], row[1:], strict=True)
    ]


def _solver(text: str) -> object:
    """The solver that a cell such as `RK4` or `TorchSDE("euler")` names."""
    if "(" in text:
        return eval(text, vars(odelayers))
    kind = getattr(odelayers, text)
    return kind() if text in ("Dopri5", "Tsit5", "Rodas5P") else kind(10)


@pytest.mark.parametrize(
    ("solver", "gradient", "legal"), _legal_pairs((ROOT / "docs" / "gradients.md").read_text()), ids=str
)
def test_the_table_of_legal_pairs_is_that_of_the_code(solver: str, gradient: str, legal: bool) -> None:
    """Each cell of the table in docs/gradients.md is what the constructor of a block does."""
    chosen, how = _solver(solver), getattr(odelayers, gradient)()

    def build() -> torch.nn.Module:
        if solver.startswith(("EulerMaruyama", "Milstein", "Stratonovich", "Reversible", "TorchSDE")):
            calculus = "ito" if solver in ("EulerMaruyama", "Milstein", 'TorchSDE("euler")') else "stratonovich"
            noise = "scalar" if solver == "Milstein" else "diagonal"
            return odelayers.DropoutSDEBlock(
                torch.tanh, p=0.1, solver=chosen, gradient=how, calculus=calculus, noise=noise, time=False
            )
        return odelayers.ODEBlock(torch.tanh, solver=chosen, gradient=how, time=False)

    if legal:
        build()
    else:
        with pytest.raises(ValueError, match=gradient):
            build()


def test_every_bar_that_is_not_reached_has_its_reason() -> None:
    """The page on performance says of each, by case, peer and kind, what was tried and why it stops there."""
    text = (ROOT / "docs" / "performance.md").read_text().split("### Bars that are not reached")[1].split("\n## ")[0]
    cells = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    explained, case, peer = set(), "", ""
    for row in cells:  # an empty cell repeats the one above it
        case, peer = row[0] or case, row[1] or peer
        explained.add((case, peer, row[2]))
    bars = json.loads((ROOT / "benchmarks" / "results" / "bars.json").read_text())["bars"]

    def kind(row: str) -> str:
        return next((word for word in ("compiled", "squaring") if word in row), "eager")

    missed = {(bar["case"], bar["peer"], kind(bar["row"])) for bar in bars if bar["verdict"] != "reached"}
    assert bars and missed <= explained


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    """Every `>>>` of the library's docstrings prints what it says."""
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        torch.manual_seed(0)
        said = _run(example)
        assert not said, said


def test_every_public_name_has_an_example() -> None:
    """Each name in `odelayers.__all__` has a doctest, in its own docstring or in one of its methods'."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    bare = [name for name in odelayers.__all__ if not any(t.examples for t in finder.find(getattr(odelayers, name)))]
    assert bare == []
