"""Mutants of the mathematics by cosmic-ray's operators, drawn by lines, and the tests that know each module."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

MODULES = ("_solvers/*.py", "_gradients/*.py", "_jacobian.py", "_linearize.py", "_krylov.py", "_linalg.py")
MODULES += ("_squaring.py", "_hurwitz.py", "stability.py", "regularizers.py", "_accumulated.py")
OWN = {  # the tests that know a module best come first
    "_solvers/adaptive.py": "solvers first_step step_control times faults isolate gradients compiled",
    "_solvers/base.py": "solvers isolate faults running times gradients",
    "_solvers/compiled.py": "compiled compiled_calls",
    "_solvers/control.py": "first_step independent stiff_rows stiff rosenbrock solvers isolate faults",
    "_solvers/independent.py": "independent isolate",
    "_solvers/row_march.py": "stiff_rows independent stiff isolate recompute",
    "_solvers/rows.py": "stiff_rows independent stiff isolate",
    "_solvers/fixed.py": "solvers times faults gradients sde",
    "_solvers/reference.py": "adapters isolate faults",
    "_solvers/reference_sde.py": "adapters sde isolate",
    "_solvers/settling.py": "equilibrium equilibrium_calls implicit",
    "_solvers/stages.py": "step_adjoint tableau solvers gradients compiled",
    "_solvers/coupled.py": "reversible reversible_refusals",
    "_gradients/reversible.py": "reversible reversible_heun reversible_refusals",
    "_solvers/factored.py": "rosenbrock",
    "_solvers/rosenbrock.py": "rosenbrock stiff stiff_rows tableau oracles isolate faults",
    "_solvers/rosenbrock_tableau.py": "tableau stiff",
    "_solvers/sde.py": "sde reversible_heun isolate theorems_noise",
    "_solvers/": "solvers gradients",
    "_gradients/adjoint.py": "adjoint gradients recompute",
    "_gradients/implicit.py": "implicit equilibrium_calls",
    "_gradients/": "gradients recompute adjoint",
    "_jacobian.py": "jacobian regularizers stability linearize transforms rosenbrock",
    "_linearize.py": "linearize jacobian regularizers",
    "_krylov.py": "krylov",
    "_linalg.py": "linalg stability",
    "_squaring.py": "theory_squaring conventions",
    "_hurwitz.py": "hurwitz",
    "stability.py": "stability theorems",
    "regularizers.py": "regularizers running",
}
NEXT = (
    "construction reports refusals conventions recompute running isolate faults gradients adapters transforms oracles"
)
NOT_FAST = ("docs", "house", "memory", "examples_")  # text and style, memory, and the study: no test of these modules
PAIRS = "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul BitAnd_BitOr BitOr_BitAnd Is_IsNot IsNot_Is"
COMPARISONS = ("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE")


def chosen(name: str) -> bool:
    """Whether an operator of cosmic-ray makes faults that a programmer might."""
    kind, _, pair = name.removeprefix("core/").partition("_")
    if kind in ("ReplaceBinaryOperator", "ReplaceComparisonOperator"):
        return pair in PAIRS.split() or all(side in COMPARISONS for side in pair.split("_"))
    return pair.startswith("Delete") or not kind.startswith(("ReplaceUnaryOperator", "Variable"))


def mutants(source: str) -> Iterator[tuple[int, str, int]]:
    """Every mutant of a module as its line, operator and occurrence."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        dull = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        dull += [node] if named or isinstance(node, ast.JoinedStr) else []
        spans += [((d.lineno, d.col_offset), (d.end_lineno, d.end_col_offset)) for d in dull if d is not None]
    for name in sorted(filter(chosen, plugins.operator_names())):
        operator = plugins.get_operator(name)()
        at = [start for node in ast_nodes(get_ast(source)) for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(at):
            if not any(first <= start < last for first, last in spans):
                yield start[0], name, occurrence


def mutated(tree: Path, module: str, operator: str, occurrence: int) -> tuple[str, list[str]]:
    """The module with its mutant in place, and the lines that differ; none where nothing or the syntax breaks."""
    old = (tree / module).read_text()
    new = mutate_code(old, plugins.get_operator(operator)(), occurrence) or old
    try:
        same = ast.dump(ast.parse(new)) == ast.dump(ast.parse(old))
    except SyntaxError:
        same = True
    diff = difflib.unified_diff(old.split("\n"), new.split("\n"), n=0, lineterm="")
    return new, [] if same else list(diff)[3:]


def sample(tree: Path, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` mutants, each of another line."""
    lines: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for path in sorted(p for pattern in MODULES for p in (tree / "odelayers").glob(pattern)):
        for line, operator, occurrence in mutants(path.read_text()):
            lines.setdefault((str(path.relative_to(tree)), line), []).append((operator, occurrence))
    rng, found = random.Random(seed), []
    for (module, line), choices in rng.sample(sorted(lines.items()), len(lines)):
        operator, occurrence = rng.choice(choices)
        if diff := mutated(tree, module, operator, occurrence)[1]:
            where = {"module": module, "operator": operator, "occurrence": occurrence}
            found.append({"id": f"{module}:{line}:{operator}:{occurrence}", "diff": diff, **where})
    print(f"{len(lines)} lines can be mutated; {min(size, len(found))} mutants drawn with seed {seed}", flush=True)
    return found[:size]


def tests_of(module: str, tree: Path) -> dict[str, list[str]]:
    """The test files of a module, in order: its own, and all others that are fast."""
    fast = [p.stem.removeprefix("test_") for p in sorted((tree / "tests").glob("test_*.py"))]
    fast = [name for name in fast if not name.startswith(NOT_FAST)]
    key = max((k for k in OWN if module.removeprefix("odelayers/").startswith(k)), key=len)
    own = OWN[key].split()
    rest = [name for name in dict.fromkeys([*NEXT.split(), *fast]) if name in fast and name not in own]
    return {phase: [f"tests/test_{name}.py" for name in names] for phase, names in {"own": own, "rest": rest}.items()}
