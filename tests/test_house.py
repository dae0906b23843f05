"""The rules of the house that a machine can check: floors of imports, sizes of files, no assert, no torchvision."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import odelayers

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "odelayers").rglob("*.py"))
FOLDERS = ("odelayers", "examples", "tests", "benchmarks", "docs")
EVERYTHING = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(source: str) -> Iterator[str]:
    """The absolute names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_strictly_downwards(capsys: pytest.CaptureFixture[str]) -> None:
    """The floors drawn in pyproject.toml hold for every import of the library."""
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_the_floors_refuse_an_upward_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control: with the floors turned upside down the same check fails."""
    config = (ROOT / "pyproject.toml").read_text()
    top, bottom = '  "blocks",\n', '  "_driver : _evaluator : _field : _solution : _checks",\n'
    assert config.count(top) == config.count(bottom) == 1
    config = config.replace(top, "@").replace(bottom, top).replace("@", bottom)
    (tmp_path / "pyproject.toml").write_text(config)
    assert lint_imports(config_filename=str(tmp_path / "pyproject.toml"), no_cache=True, no_logo=True) == 1
    assert "odelayers._solve is not allowed to import odelayers._driver" in capsys.readouterr().out


def test_no_module_imports_the_public_names() -> None:
    """A module names the module that it needs; `odelayers` itself is for users only."""
    inside = {_name(path): set(_imports(path.read_text())) for path in LIBRARY if path.name != "__init__.py"}
    public = {f"odelayers.{name}" for name in odelayers.__all__}
    assert {name for name, found in inside.items() if found & public} == set()


def test_no_torchvision_and_no_functorch_anywhere() -> None:
    """No file imports torchvision or functorch, and no extra installs them."""
    banned = {"torchvision", "functorch"}
    imports = {_name(path): {name.split(".")[0] for name in _imports(path.read_text())} for path in EVERYTHING}
    assert {name for name, found in imports.items() if found & banned} == set()
    wanted = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in [*wanted, *pins] if any(line.lower().startswith(name) for name in banned)] == []


def test_runtime_dependencies_are_four() -> None:
    """The library installs torch, torchdiffeq, torchsde and scipy, and nothing else of its own."""
    names = sorted(requirement.split(">=")[0] for requirement in PROJECT["dependencies"])
    assert names == ["scipy", "torch", "torchdiffeq", "torchsde"]


def test_importing_the_library_loads_no_extra() -> None:
    """`import odelayers` brings in nothing that only an extra installs; tqdm apart, which torch takes where it is."""
    extras = ("matplotlib", "sklearn", "foolbox", "pyautoattack", "onnx", "pytest", "torchvision")
    code = f"import sys, odelayers; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", EVERYTHING, ids=_name)
def test_a_file_stays_under_300_lines(path: Path) -> None:
    """A file is one concept: longer ones are two."""
    count = len(path.read_text().splitlines())
    assert count < 300


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_the_library_asserts_nothing(path: Path) -> None:
    """`assert` vanishes under -O and tells a user nothing: the library raises instead."""
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert lines == []


def test_the_version_stands_in_one_place() -> None:
    """The installed distribution and the package agree on the version."""
    assert importlib.metadata.version("odelayers") == odelayers.__version__
