"""Mutation check: change the library's mathematics in one place at a time and see whether the fast tests notice.

    python tests/mutants.py --sample 220 --workers 2    # the last commit, in copies; run again, it resumes
    python tests/mutants.py --again                     # the survivors only, with the tests that were added since

cosmic-ray's operators make the mutants. Lines are drawn with a seed and one mutant of each is tried, so that no line
rich in numbers has more weight than another; operators that only break types (a shift of floats) are left out, for they
would flatter the score, and so are message text, annotations and `__all__`. A mutant is killed by a failing test, an
error at import, or the time limit. Each verdict is appended at once, later lines of an id over earlier ones; the reason
of a survivor is one more line, {"id": ..., "reason": ...}, written by hand.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")  # bytecode of one mutant must not serve the next
sys.dont_write_bytecode = True

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import scipy.linalg  # noqa: E402, F401
import torchdiffeq  # noqa: E402, F401  (loaded once here, for every mutant's process is forked from this one)
import torchsde  # noqa: E402, F401
from cosmic_ray import plugins  # noqa: E402
from cosmic_ray.ast import ast_nodes, get_ast  # noqa: E402
from cosmic_ray.mutating import mutate_code  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.jsonl"
LIMIT = {"own": 90.0, "rest": 240.0}  # seconds for one mutant: several times what the sound library takes

MODULES = ("_solvers/*.py", "_gradients/*.py", "_jacobian.py", "_linalg.py", "stability.py", "regularizers.py")
OWN = {  # the tests that know a module best come first
    "_solvers/adaptive.py": "solvers times fault_table faults isolate gradients",
    "_solvers/base.py": "solvers isolate faults running times gradients",
    "_solvers/fixed.py": "solvers times faults gradients sde",
    "_solvers/reference.py": "adapters isolate faults",
    "_solvers/reference_sde.py": "adapters sde isolate",
    "_solvers/sde.py": "sde isolate theorems_noise",
    "_solvers/": "solvers gradients",
    "_gradients/adjoint.py": "adjoint gradients recompute",
    "_gradients/": "gradients recompute adjoint",
    "_jacobian.py": "jacobian regularizers stability",
    "_linalg.py": "linalg stability",
    "stability.py": "stability theorems",
    "regularizers.py": "regularizers",
}
NOT_FAST = ("docs", "house", "memory", "examples_")  # text and style, memory, and the study: no test of these modules

OPERATORS = tuple(
    "Add_Sub Sub_Add Mul_Div Div_Mul Pow_Mul FloorDiv_Mul Mod_Mul BitAnd_BitOr BitOr_BitAnd BitXor_BitAnd".split()
)
COMPARISONS = ("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE")


def chosen(name: str) -> bool:
    """Whether an operator of cosmic-ray makes faults that a programmer might."""
    kind, _, pair = name.removeprefix("core/").partition("_")
    if kind == "ReplaceBinaryOperator":
        return pair in OPERATORS
    if kind == "ReplaceComparisonOperator":
        return pair in ("Is_IsNot", "IsNot_Is") or all(side in COMPARISONS for side in pair.split("_"))
    if kind == "ReplaceUnaryOperator":
        return pair.startswith("Delete")
    return not kind.startswith("Variable")


def left_out(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The spans whose mutants say nothing: annotations, f-strings (messages) and `__all__`."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        dull = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        dull += [node] if isinstance(node, ast.JoinedStr) else []
        dull += [node] if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" else []
        spans += [((d.lineno, d.col_offset), (d.end_lineno, d.end_col_offset)) for d in dull if d is not None]
    return spans


def mutants(source: str) -> Iterator[tuple[int, str, int]]:
    """Every mutant of a module as its line, operator and occurrence."""
    spans = left_out(source)
    for name in sorted(filter(chosen, plugins.operator_names())):
        operator = plugins.get_operator(name)()
        at = [start for node in ast_nodes(get_ast(source)) for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(at):
            if not any(first <= start < last for first, last in spans):
                yield start[0], name, occurrence


def mutated(tree: Path, module: str, operator: str, occurrence: int) -> tuple[str, list[str]]:
    """The module with its mutant in place, and the lines that differ."""
    old = (tree / module).read_text()
    new = mutate_code(old, plugins.get_operator(operator)(), occurrence) or old
    return new, list(difflib.unified_diff(old.split("\n"), new.split("\n"), n=0, lineterm=""))[3:]


def means(source: str) -> str | None:
    """The syntax tree, None where there is none."""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None


def sample(tree: Path, size: int, seed: int) -> list[dict[str, Any]]:
    """`size` mutants, each of another line."""
    lines: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for path in sorted(p for pattern in MODULES for p in (tree / "odelayers").glob(pattern)):
        for line, operator, occurrence in mutants(path.read_text()):
            lines.setdefault((str(path.relative_to(tree)), line), []).append((operator, occurrence))
    rng, found = random.Random(seed), []
    for (module, line), choices in rng.sample(sorted(lines.items()), len(lines)):
        operator, occurrence = rng.choice(choices)
        new, diff = mutated(tree, module, operator, occurrence)
        if diff and means(new) not in (None, means((tree / module).read_text())):
            where = {"module": module, "operator": operator, "occurrence": occurrence}
            found.append({"id": f"{module}:{line}:{operator}:{occurrence}", "diff": diff, **where})
    print(f"{len(lines)} lines can be mutated; {min(size, len(found))} mutants drawn with seed {seed}", flush=True)
    return found[:size]


def tests_of(module: str, tree: Path) -> dict[str, list[str]]:
    """The test files of a module, in order: its own, and all others that are fast."""
    fast = [p.stem.removeprefix("test_") for p in sorted((tree / "tests").glob("test_*.py"))]
    fast = [name for name in fast if not name.startswith(NOT_FAST)]
    key = max((k for k in OWN if module.removeprefix("odelayers/").startswith(k)), key=len)
    own = [name for name in OWN[key].split() if name in fast]
    rest = [name for name in fast if name not in own]
    return {phase: [f"tests/test_{name}.py" for name in names] for phase, names in {"own": own, "rest": rest}.items()}


class Report:
    """A pytest plugin: what failed first, and hypothesis without shrinking, for the verdict needs no small example."""

    failed: str | None = None

    def pytest_collection(self) -> None:
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def pytest_child(tree: Path, files: list[str], pipe: Connection) -> None:
    """Run pytest in a process of its own group, torch already loaded, and send back what failed."""
    os.setsid()
    os.chdir(tree)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    os.environ["PYTHONPATH"] = str(tree)  # for the processes that tests start
    report = Report()
    options = ["-x", "-q", "--assert=plain", "-m", "not slow", "--timeout", "60", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis was loaded before pytest began
    code = int(pytest.main([*options, *files], plugins=[report]))
    library = sys.modules.get("odelayers")
    if library is not None and not str(library.__file__).startswith(str(tree)):
        code = -1  # the tests saw another copy
    pipe.send((code, report.failed or "collection"))
    os._exit(0)


def run_tests(tree: Path, files: list[str], limit: float) -> tuple[str, str | None]:
    """("survived", None) or ("killed", by what)."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=pytest_child, args=(tree, files, there))
    child.start()
    there.close()
    try:
        answer = here.recv() if here.poll(limit) else (None, f"time limit of {limit:.0f} s")
    except EOFError:
        answer = (None, "crash")
    if child.is_alive() and child.pid and answer[0] is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    if answer[0] == -1:
        raise RuntimeError(f"the tests in {tree} imported odelayers from elsewhere")
    return ("survived", None) if answer[0] == 0 else ("killed", answer[1])


def copy_of(commit: str, folder: Path) -> Path:
    """The committed files, so that no work in progress is changed or tested."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def read() -> dict[str, dict[str, Any]]:
    """What is known of each mutant, by its id."""
    known: dict[str, dict[str, Any]] = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        record = json.loads(line)
        known.setdefault(record["id"], {}).update(record)
    return known


def append(record: dict[str, Any]) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def work(tree: Path, commit: str, share: list[dict[str, Any]], again: bool) -> None:
    """Try a share of the mutants, first each with its own tests, then those left with all the rest."""
    known = read()
    done = {"own": ("killed", "survived", "rest"), "rest": ("killed", "survived")}
    for phase, after in (("own", "rest"), ("rest", "survived")):
        for m in share:
            verdict = known.get(m["id"], {}).get("verdict")
            if verdict in done[phase] and not (again and verdict != "killed"):
                continue
            new, diff = mutated(tree, m["module"], m["operator"], m["occurrence"])
            if diff != m["diff"]:
                print(f"{m['id']}: the code has changed, the mutant is left as it was", flush=True)
                continue
            path, start = tree / m["module"], time.perf_counter()
            old = path.read_text()
            path.write_text(new)
            verdict, by = run_tests(tree, tests_of(m["module"], tree)[phase], LIMIT[phase])
            path.write_text(old)
            seconds = round(time.perf_counter() - start, 1)
            record = {**m, "verdict": verdict if by else after, "by": by, "seconds": seconds, "commit": commit}
            known[m["id"]] = record
            append(record)
            print(f"{record['verdict']:8} {seconds:6.1f} s  {m['id']}  {by or ''}", flush=True)


def table(known: dict[str, dict[str, Any]]) -> str:
    """The score and the survivors with their reasons, in Markdown."""
    run, tried = known.get("run", {}), [m for m in known.values() if m.get("verdict") in ("killed", "survived")]
    killed = [m for m in tried if m["verdict"] == "killed"]
    late = sum(m["by"].startswith("time limit") or m["by"] == "crash" for m in killed)
    text = ["# Mutation check", ""]
    text += [f"`make mutants`: seed {run.get('seed')}, commit {run.get('commit')}: {len(tried)} mutants tried, "]
    text[-1] += f"{len(killed)} killed ({100 * len(killed) / max(1, len(tried)):.1f} %), {late} of them by the time limit."
    text += ["", "| Survivor | Change | Reason |", "|---|---|---|"]
    for m in sorted((m for m in tried if m["verdict"] == "survived"), key=lambda m: str(m["id"])):
        change = "<br>".join(f"`{line.replace('|', chr(92) + '|')}`" for line in m["diff"])
        text.append(f"| {':'.join(m['id'].split(':')[:2])} | {change} | {m.get('reason', '')} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="try the survivors of the last run again")
    options = parser.parse_args()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    commit, known = head.stdout.strip(), read()
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_of(commit, Path(folder) / str(i)) for i in range(options.workers)]
        if "run" not in known:
            append({"id": "run", "seed": options.seed, "commit": commit})
            for m in sample(trees[0], options.sample, options.seed):
                append(m)
        todo = [m for key, m in read().items() if key != "run"]
        shares = [todo[i :: options.workers] for i in range(options.workers)]
        fork = multiprocessing.get_context("fork")
        workers = [fork.Process(target=work, args=(tree, commit, share, options.again)) for tree, share in zip(trees, shares, strict=True)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    RESULTS.with_suffix(".md").write_text(table(read()))


if __name__ == "__main__":
    main()
