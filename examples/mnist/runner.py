"""Computing the cells of a study, in one process or several; stopped anywhere, the next run goes on from there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from .cells import Cell, needs, plan, with_needs
from .presets import Preset
from .records import NotRecorded, Record, now, write
from .study import Study

__all__ = ["run"]

Make = Callable[[], Study]
Done = Iterator[tuple[Cell, Record]]


class _Ledger:
    """Which cells are done, and which cannot be: what `run.json` says, written anew after every cell."""

    def __init__(self, preset: Preset, about: dict[str, Any], out: Path, models: Sequence[str] | None) -> None:
        self.preset, self.planned, self.out, self.about = preset, plan(preset), out, about
        self.cells = [cell for cell in self.planned if models is None or cell.model in models]
        if models is not None:
            self.cells = with_needs(preset, self.cells)
        self.silent = dist.is_initialized() and dist.get_rank() > 0  # of several ranks, the first keeps the ledger
        self.files: dict[Cell, str] = {}
        self.lost: dict[Cell, str] = {}

    def note(self, cell: Cell, record: Record) -> None:
        """A record has been found or made."""
        self.files[cell] = record.file
        if "diverged" in record.result:
            self.lost[cell] = f"{cell.name} diverged: {record.result['diverged']}"

    def reason(self, cell: Cell) -> str | None:
        """Why a cell cannot be computed: a training that it needs has diverged."""
        for need in needs(self.preset, cell):
            if found := self.lost.get(need) or self.reason(need):
                return found
        return None

    def ready(self, cell: Cell) -> bool:
        """Whether all that the cell needs is done."""
        return all(need in self.files for need in needs(self.preset, cell))

    def write(self) -> None:
        """The manifest: each cell with its file, None where there is none yet, and why where there will be none."""
        if self.silent:
            return
        cells = [
            {
                "kind": cell.kind, "model": cell.model, "seed": cell.seed, "threat": cell.threat and str(cell.threat),
                "group": cell.group and cell.group.name, "file": self.files.get(cell), "lost": self.reason(cell),
            }
            for cell in self.planned
        ]  # fmt: skip
        first, second, threat = self.preset.primary
        said = {"primary": [first, second, str(threat)], "drawn": self.preset.drawn}
        said["controls"] = {model.name: model.control for model in self.preset.models}
        write(self.out / "run.json", {**self.about, **said, "cells": cells})


def run(
    make: Make,
    preset: Preset,
    about: dict[str, Any],
    out: Path,
    *,
    jobs: int = 1,
    minutes: float | None = None,
    models: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Compute the cells of the preset's plan, the most valuable first, and return the path of `run.json`.

    `make` gives a process its study. With `minutes` no cell is begun when they are over, with `models` no cell of
    another model but the trainings that theirs need: what no run has computed yet is None in `run.json`, and a later
    one computes it.

    Raises:
        ValueError: a name in `models` is none of the preset's.
    """
    known = [model.name for model in preset.models]
    if strange := set(models or ()).difference(known):
        raise ValueError(f"models: expected names of {', '.join(known)}, got {', '.join(sorted(strange))}")
    out.mkdir(parents=True, exist_ok=True)
    ledger, started = _Ledger(preset, about, out, models), time.monotonic()
    began, fresh = now(), 0
    left = lambda: minutes is None or time.monotonic() - started < 60 * minutes  # noqa: E731
    way = _ranks if dist.is_initialized() else _alone if jobs == 1 else _together
    for done, (cell, record) in enumerate(way(make, ledger, jobs, left), 1):
        ledger.note(cell, record)
        ledger.write()
        gone, fresh = (time.monotonic() - started) / 60, fresh + (record["finished"] >= began)
        left_over = _left_over(ledger, gone, fresh)
        say(f"[{done}/{len(ledger.cells)}, {gone:.1f} min{left_over}] {cell.name}: {record['seconds']:.1f} s")
    _find_others(make, ledger)
    missing = [cell for cell in ledger.cells if cell not in ledger.files]
    for cell in missing:
        if reason := ledger.reason(cell):
            say(f"{cell.name}: not computed, {reason}")
    if minutes is not None and (over := sum(ledger.reason(cell) is None for cell in missing)):
        say(f"{over} cells were not begun within {minutes:g} minutes; run again to go on")
    ledger.write()
    return out / "run.json"


def _left_over(ledger: _Ledger, gone: float, fresh: int) -> str:
    """The minutes still to come, were all cells like those that were computed; of several ranks none knows."""
    if not fresh or dist.is_initialized():
        return ""
    waiting = sum(cell not in ledger.files and ledger.reason(cell) is None for cell in ledger.cells)
    return f", {gone / fresh * waiting:.0f} left"


def _find_others(make: Make, ledger: _Ledger) -> None:
    """What this run was not to compute, or had no time for, a former one may have left."""
    others = [cell for cell in ledger.planned if cell not in ledger.files and ledger.reason(cell) is None]
    if others and not ledger.silent:
        study = make()
        study.records.computes = False
        for cell in others:
            with suppress(NotRecorded):
                ledger.note(cell, study.do(cell))


def _alone(make: Make, ledger: _Ledger, jobs: int, left: Callable[[], bool]) -> Done:
    study = make()
    for cell in ledger.cells:
        if not left():
            return
        if ledger.reason(cell) is None:
            yield cell, study.do(cell)


def _ranks(make: Make, ledger: _Ledger, jobs: int, left: Callable[[], bool]) -> Done:
    """Under torchrun: first every training, by all ranks together, then the other cells, shared out among them.

    A barrier parts a training from the next, so that no rank sees the record of one that another is still about. All
    stop with the first rank's time: none may wait for others in a training that they do not begin.
    """
    study, rank, ranks = make(), dist.get_rank(), dist.get_world_size()
    study.records.writes = rank == 0
    for cell in ledger.cells:
        if cell.kind == "train" and ledger.reason(cell) is None:
            dist.barrier()
            goes_on = [left()]
            dist.broadcast_object_list(goes_on)
            if not goes_on[0]:
                break
            yield cell, study.do(cell)
    dist.barrier()
    study.records.writes = True
    rest = [c for c in ledger.cells if c.kind != "train" and ledger.ready(c) and ledger.reason(c) is None]
    mine = []
    for cell in rest[rank::ranks]:
        if left():
            mine.append((cell, study.do(cell)))
            yield mine[-1]
    found: list[list[tuple[Cell, Record]]] = [[] for _ in range(ranks)]
    dist.all_gather_object(found, mine)
    for theirs in found[1:] if rank == 0 else []:
        yield from theirs


def _together(make: Make, ledger: _Ledger, jobs: int, left: Callable[[], bool]) -> Done:
    """Cells that are ready, by value, in as many processes as jobs."""
    waiting, running = list(ledger.cells), dict[Future[Record], Cell]()
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (make,)) as pool:
        try:
            while True:
                waiting = [cell for cell in waiting if ledger.reason(cell) is None]
                for cell in [cell for cell in waiting if ledger.ready(cell)][: jobs - len(running) if left() else 0]:
                    waiting.remove(cell)
                    running[pool.submit(_do, cell)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()  # what a process was about is computed again by the next run
            raise


_study: Study  # of this process


def _begin(make: Make) -> None:
    global _study
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would write over each other
    _study = make()


def _end_with(parent: Any) -> None:
    """A run that is killed cannot stop its processes, which would work on unseen: they end with it."""
    parent.join()
    os._exit(1)  # records are written whole or not at all


def _do(cell: Cell) -> Record:
    return _study.do(cell)
