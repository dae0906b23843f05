"""Scripts run by several processes of torchrun, for the tests of what they do together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def launched(folder: Path, count: int, text: str) -> list[dict]:
    """What each of `count` processes of torchrun left behind."""
    done = started(folder, count, text)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def started(folder: Path, count: int, text: str) -> subprocess.CompletedProcess[str]:
    """`count` processes of torchrun that run the script `text` in a new folder, which is its argument."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(text)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*run, str(script), str(folder)], env=environment, text=True, capture_output=True, timeout=110, cwd=folder
    )
