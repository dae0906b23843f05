"""The benchmarks run, with whatever peers are installed, and every library's answer in their tables is a right one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# The largest error that a row may have: of tolerance and method, known beforehand, and far from that of a wrong answer.
TABLES = {"fixed_grid": 1e-3, "sde": 0.1, "stiffness_spread": 1e-3}


def run(name: str, out: Path, *, without: tuple[str, ...] = (), device: str = "cpu") -> dict[str, object]:
    """One turn of a benchmark in a process of its own, where the peers `without` cannot be imported."""
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({without!r})); sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, str(__import__('pathlib').Path(sys.argv[0]).parent)); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    script = [str(BENCHMARKS / f"{name}.py"), "--rounds", "1", "--out", str(out), "--device", device]
    done = subprocess.run([sys.executable, "-c", code, *script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (written,) = out.glob(f"{name}.json" if device == "cpu" else f"{name}-*.json")
    return json.loads(written.read_text()) | {"printed": done.stdout, "file": written.stem}


def bare(row: dict[str, object]) -> bool:
    """Whether a row is the field alone, which solves nothing and so has no error."""
    return str(row["name"]).startswith("bare field")


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_is_near_the_reference(name: str, tmp_path: Path) -> None:
    """Whatever library a row is of, its result agrees with the float64 reference to what its setting promises."""
    table = run(name, tmp_path)
    errors = {(row["case"], row["name"]): row["error"] for row in table["rows"] if not bare(row)}
    assert errors and all(error < TABLES[name] for error in errors.values()), errors


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_reported(tmp_path: Path) -> None:
    """Without torchode, torchdyn and diffrax the table is made all the same, and names them."""
    absent = ("torchode", "torchdyn", "diffrax")
    table = run("fixed_grid", tmp_path, without=absent)
    assert {row["name"].split()[0] for row in table["rows"]} == {"odelayers", "torchdiffeq", "bare"}
    assert all(f"- {peer}, not installed: " in table["printed"] for peer in absent)


@pytest.mark.slow
@pytest.mark.cuda
def test_on_a_gpu_a_table_bears_its_name(tmp_path: Path) -> None:
    """The rows run there, are as right as on the CPU, and land in files of the GPU's own."""
    table, gpu = run("fixed_grid", tmp_path, device="cuda"), torch.cuda.get_device_name()
    assert gpu in table["machine"]["device"] and gpu.split()[-1].split("-")[0].lower() in table["file"]
    assert all(row["error"] < TABLES["fixed_grid"] for row in table["rows"] if not bare(row))


def test_the_bars_say_reached_only_where_it_is_so(tmp_path: Path) -> None:
    """A bar is judged by the two rows that it names: reached at its factor, near it, missed, or not measured."""
    case = "forward, B=128"
    rows = [
        {"case": case, "name": "odelayers Backprop", "ratio": 1.0, "nfe": 50, "error": 1e-4},
        {"case": case, "name": "odelayers Backprop, 2e-5", "ratio": 0.8, "nfe": 40, "error": 5e-4},
        {"case": case, "name": "odelayers compiled", "ratio": 0.5, "nfe": 50, "error": 1e-4},
        {"case": case, "name": "torchdiffeq odeint", "ratio": 4.0, "nfe": 44, "error": 2e-4},
        {"case": case, "name": "diffrax jit", "ratio": 1.7, "nfe": 49, "error": 4e-4},
        {"case": case, "name": "bare field", "ratio": 0.4, "nfe": 50, "error": None},
    ]
    (tmp_path / "forward_backward.json").write_text(json.dumps({"rows": rows}))
    bars = run("bars", tmp_path)["bars"]
    found = {(bar["row"], bar["peer"]): (bar["verdict"], bar["bare"]) for bar in bars if bar["case"] == case}
    assert found == {
        ("odelayers Backprop", "torchdiffeq odeint"): ("reached", pytest.approx(10.0)),
        ("odelayers Backprop, 2e-5", "torchdiffeq odeint"): ("reached, at a larger error", pytest.approx(12.5)),
        ("odelayers Backprop", "diffrax jit"): ("within a tenth: 1.70 of 1.8", pytest.approx(4.25)),
        ("odelayers Backprop, 2e-5", "diffrax jit"): ("reached, at a larger error", pytest.approx(5.3125)),
        ("odelayers compiled", "torchdiffeq odeint"): ("reached", pytest.approx(10.0)),
        ("odelayers compiled", "diffrax jit"): ("within a tenth: 3.40 of 3.5", pytest.approx(4.25)),
        ("odelayers compiled, 2e-5", "torchdiffeq odeint"): ("not measured", None),
        ("odelayers compiled, 2e-5", "diffrax jit"): ("not measured", None),
    }
    assert {bar["verdict"] for bar in bars if bar["case"] != case} == {"not measured"}


def test_the_bars_of_memory_read_the_growth_of_its_table(tmp_path: Path) -> None:
    """A gradient's growth is judged at its factor, beside the growth of Backprop; what is not there is not measured."""
    rows = [
        {"solver": "RK4", "gradient": "Backprop", "growth": 15.6},
        {"solver": "RK4", "gradient": "Checkpoint", "growth": 1.9},
        {"solver": "RK4", "gradient": "Reversible", "growth": 1.4},
    ]
    (tmp_path / "memory.json").write_text(json.dumps({"rows": rows}))
    found = {(m["solver"], m["gradient"]): (m["beside"], m["verdict"]) for m in run("bars", tmp_path)["memory"]}
    assert found == {
        ("RK4", "Checkpoint"): (15.6, "reached"),
        ("RK4", "Reversible"): (15.6, "not reached: 1.40 of 1.2"),
        ("ReversibleHeun", "Checkpoint"): (None, "not measured"),
        ("ReversibleHeun", "Reversible"): (None, "not measured"),
    }
