"""Mutation check: change the library's mathematics in one place at a time and see whether the fast tests notice.

    python tests/mutation_check.py            # a seeded sample at the last commit, in copies; run again, it resumes
    python tests/mutation_check.py --again    # only survivors without a reason, with the tests committed since

cosmic-ray's operators make the mutants. Lines are drawn with a seed and one mutant of each is tried, so that a line
rich in numbers weighs no more than another. Operators that only break types (a shift of floats) would flatter the score
and are left out; so are annotations, message text and `__all__`. A failing test, an error at import or the time limit
kills. Each verdict is appended at once, and a later line of an id counts over earlier ones; the reason of a survivor is
one more line, {"id": ..., "reason": ...}, written by hand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
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

from mutants import mutated, sample, tests_of  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.jsonl"
LIMIT = {"own": 600.0, "rest": 1800.0}  # seconds for one mutant: several times what the sound library takes


class Report:
    """A pytest plugin: what failed first, and hypothesis without shrinking, for a verdict needs no small example."""

    failed: str | None = None

    def pytest_collection(self) -> None:
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid


def pytest_child(tree: Path, files: list[str], pipe: Connection) -> None:
    """Run pytest in a process group of its own, torch already loaded, and send back what failed."""
    os.setsid()
    os.chdir(tree)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.environ["PYTHONPATH"] = str(tree)  # for the processes that tests start
    report = Report()
    options = ["-x", "-q", "--assert=plain", "-m", "not slow", "--timeout", "60", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis was loaded before pytest began
    code = int(pytest.main([*options, *files], plugins=[report]))
    library = sys.modules.get("odelayers")
    elsewhere = library is not None and not str(library.__file__).startswith(str(tree))
    pipe.send((-1 if elsewhere else code, report.failed or "collection"))
    os._exit(0)


def killer(tree: Path, files: list[str], limit: float) -> str | None:
    """What killed the mutant that stands in the tree, None if it survived."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=pytest_child, args=(tree, files, there))
    child.start()
    there.close()
    try:
        code, by = here.recv() if here.poll(limit) else (None, f"time limit of {limit:.0f} s")
    except EOFError:
        code, by = None, "crash"
    if code is None and child.is_alive() and child.pid:
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    if code == -1:
        raise RuntimeError(f"the tests in {tree} imported odelayers from elsewhere")
    return None if code == 0 else str(by)


def copy_of(commit: str, folder: Path) -> Path:
    """The committed files, so that no work in progress is changed or tested."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def read() -> dict[str, dict[str, Any]]:
    """What is known of the run and of each mutant, by its id."""
    known: dict[str, dict[str, Any]] = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        record = json.loads(line)
        known.setdefault(record["id"], {}).update(record)
    return known


def append(record: dict[str, Any]) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def work(tree: Path, commit: str, share: list[dict[str, Any]]) -> None:
    """Try a share of the mutants, first each with its own tests, then those left with all the rest."""
    for phase, after in (("own", "survived its own tests"), ("rest", "survived")):
        for m in share:
            verdict = read()[m["id"]].get("verdict")
            if verdict in ("killed", "survived", after):
                continue
            new, diff = mutated(tree, m["module"], m["operator"], m["occurrence"])
            if diff != m["diff"]:
                print(f"{m['id']}: the code is another by now; start over without {RESULTS.name}", flush=True)
                continue
            path, start = tree / m["module"], time.perf_counter()
            old = path.read_text()
            path.write_text(new)
            by = killer(tree, tests_of(m["module"], tree)[phase], LIMIT[phase])
            path.write_text(old)
            seconds = round(time.perf_counter() - start, 1)
            verdict = after if by is None else "killed"
            append({"id": m["id"], "verdict": verdict, "by": by, "seconds": seconds, "commit": commit})
            print(f"{verdict} in {seconds:.1f} s: {m['id']}  {by or ''}", flush=True)


def table(known: dict[str, dict[str, Any]]) -> str:
    """The score and the survivors with their reasons, in Markdown."""
    run, tried = known["run"], [m for m in known.values() if "verdict" in m]
    killed = [m for m in tried if m["verdict"] == "killed"]
    late = sum(m["by"].startswith("time limit") for m in killed)
    drawn = len(known) - 1
    text = ["# Mutation check", "", f"`make mutants`, seed {run['seed']}, commit {run['commit'][:12]}: "]
    text[-1] += f"{len(tried)} of {drawn} mutants drawn were tried, {len(killed)} killed "
    text[-1] += f"({100 * len(killed) / max(1, len(tried)):.1f} %), {late} of them by the time limit (a hang)."
    same = sum(m["verdict"] != "killed" and m.get("reason", "").startswith("equivalent") for m in tried)
    text[-1] += f" {same} are equivalent: {100 * len(killed) / max(1, len(tried) - same):.1f} % of the others."
    text += ["", "| Survivor | Change | Reason |", "|---|---|---|"]
    for m in sorted((m for m in tried if m["verdict"] != "killed"), key=lambda m: str(m["id"])):
        lines = [line for line in m["diff"] if line[1:].strip()]
        change = "<br>".join("`" + line.replace("|", "\\|") + "`" for line in lines)
        reason = m.get("reason", "") + (" (its own tests only)" if m["verdict"] != "survived" else "")
        text.append(f"| {':'.join(m['id'].split(':')[:2])} | {change} | {reason} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="try again the survivors without a reason")
    parser.add_argument("--table", action="store_true", help="only write the table anew")
    options = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    commit = git.stdout.strip()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_of(commit, Path(folder) / str(i)) for i in range(0 if options.table else options.workers)]
        if trees and "run" not in read():
            sound = tests_of("odelayers/_linalg.py", trees[0])
            if by := killer(trees[0], sound["own"] + sound["rest"], 1200.0):
                raise RuntimeError(f"the tests fail without any mutant: {by}")
            append({"id": "run", "seed": options.seed, "commit": commit})
            for m in sample(trees[0], options.sample, options.seed):
                append(m)
        todo = [m for key, m in read().items() if key != "run" and not m.get("reason")]  # what is explained is done
        if options.again and trees:
            todo = [m for m in todo if m.get("verdict", "").startswith("survived")]
            for m in todo:
                append({"id": m["id"], "verdict": "survived before"})
        workers = [fork.Process(target=work, args=(t, commit, todo[i :: len(trees)])) for i, t in enumerate(trees)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    RESULTS.with_suffix(".md").write_text(table(read()))


if __name__ == "__main__":
    main()
