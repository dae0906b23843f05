"""docs/theory.md names tests that exist, a control for each statement, and pictures that are there and small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGE = (DOCS / "theory.md").read_text()
SOURCE = re.compile(r"(Theorem|Lemma|[Ee]quations?|eq\.|[Ss]ection) \d|[A-Z]\w+ (et al\. )?(18|19|20)\d\d\b")
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def sections(text: str) -> dict[int, str]:
    """The text under each numbered heading."""
    parts = re.split(r"^## (\d+)\. ", text, flags=re.MULTILINE)
    return {int(number): body for number, body in zip(parts[1::2], parts[2::2], strict=True)}


def missing(text: str) -> list[str]:
    """The tests that a text names and no file defines."""
    known: dict[str, set[str]] = {}
    for file in TESTS.glob("test_*.py"):
        known[file.name] = {n.name for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)}
    return [f"{file}::{test}" for file, test in NAMED.findall(text) if test not in known.get(file, set())]


def test_every_test_that_the_page_names_exists() -> None:
    """File and function; a name that is none is caught (control)."""
    assert missing(PAGE) == []
    assert missing("`test_theorems.py::test_nothing`, `test_none.py::test_x`") != []


def test_each_of_the_19_statements_has_its_test_and_its_control() -> None:
    """Every heading from 1 to 19, once, with a line of each kind that names a test."""
    bodies = sections(PAGE)
    assert sorted(bodies) == list(range(1, 20)) and len(re.findall(r"^## ", PAGE, re.MULTILINE)) == 19
    for number, body in bodies.items():
        held, _, control = body.partition("- Control:")
        assert NAMED.search(held.partition("- Held by")[2]), f"statement {number} has no test"
        assert NAMED.search(control), f"statement {number} has no control"


def test_the_page_s_tests_say_what_they_hold_and_whence() -> None:
    """Each named test's docstring names its source: the paper's number, or a name and a year; nothing else is one."""
    for file, test in NAMED.findall(PAGE):
        tree = ast.parse((TESTS / file).read_text())
        function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == test)
        assert SOURCE.search(ast.get_docstring(function) or ""), f"{file}::{test} names no source"
    assert not any(SOURCE.search(text) for text in ("Control: f = -2z, L = 1.8", "Over 1,500 paths", "By 2 of 20 rows"))


def test_pictures_are_those_of_the_script_and_small() -> None:
    """Each statement shows one; together exactly the files of docs/_static/theory, under 60 kB, by the scripts."""
    picture = re.compile(r"!\[[^]]{20,}\]\(_static/theory/(\w+)\.svg\)")
    assert [number for number, body in sections(PAGE).items() if len(picture.findall(body)) != 1] == []
    shown = sorted(picture.findall(PAGE))
    files = sorted((DOCS / "_static" / "theory").iterdir())
    assert shown == [file.stem for file in files]
    assert [file.name for file in files if file.stat().st_size >= 60_000] == []
    trees = [ast.parse(script.read_text()) for script in DOCS.glob("theory_figures*.py")]
    assert set(shown) <= {n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}
