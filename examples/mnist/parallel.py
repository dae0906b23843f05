"""One training by several processes, as torchrun starts them; without it there is one process, and nothing to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

__all__ = ["FailedElsewhere", "Processes", "joined"]

PATIENCE = timedelta(days=1)  # one process may attack for hours while the others have nothing left to do


class FailedElsewhere(ArithmeticError):
    """Another process could not compute its part."""


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and which of them this one is.

    Each takes its share of every batch, and DistributedDataParallel averages the gradients. A process's mean over its
    share counts as much as its rows (`weight`), so that the average is the mean over the whole batch, up to rounding.
    What is drawn (noise, attacks' starts, rows at which Jacobians are taken) each process draws for its own rows.

    Batch normalisation takes the statistics of the whole batch: on GPUs the layers are made torch's `SyncBatchNorm`, on
    CPUs, for which torch has none, `SharedBatchNorm2d`. Running statistics are the first process's, for all of them at
    the end of every epoch.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def now(cls) -> Processes:
        """Those of the process group, if there is one."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of the rows of a batch.

        Raises:
            ValueError: there are fewer rows than processes.
        """
        if len(rows) < self.count:
            raise ValueError(f"a batch of {len(rows)} cannot be shared by {self.count} processes; start fewer of them")
        return rows.tensor_split(self.count)[self.rank]

    def weight(self, mine: Tensor, all_rows: Tensor) -> float:
        """What this process's mean counts for, so that the average over processes is the mean over all rows."""
        return len(mine) * self.count / len(all_rows)

    def average(self, values: Tensor) -> Tensor:
        """The mean over processes."""
        if self.count > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values / self.count

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it holds in any process."""
        return flag if self.count == 1 else self.average(torch.tensor(float(flag), device=device)).item() > 0

    def prepare(self, model: nn.Module, device: torch.device) -> None:
        """Make batch normalisation in `model` use the whole batch, in place.

        Raises:
            ValueError: on a CPU, a layer is of a kind for which that is not written.
        """
        if self.count > 1 and device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif self.count > 1:
            for name, layer in model.named_modules():
                if type(layer) is nn.BatchNorm2d and layer.affine and layer.running_mean is not None and layer.momentum:
                    layer.__class__ = SharedBatchNorm2d
                elif isinstance(layer, _BatchNorm) and type(layer) is not SharedBatchNorm2d:
                    raise ValueError(
                        f"{name}: expected a BatchNorm2d with weights, statistics and momentum, got {layer}"
                    )

    def agree(self, *modules: nn.Module) -> None:
        """Give the buffers of the first process to all, in place."""
        if self.count > 1:
            for module in modules:
                for buffer in module.buffers():
                    distributed.broadcast(buffer, 0)

    def together(
        self, compute: Callable[[], Any], errors: type[Exception] | tuple[type[Exception], ...], device: torch.device
    ) -> Any:
        """What is computed; where that fails in one process it fails in all, or the others would wait for ever.

        Raises:
            FailedElsewhere: it failed in another process, by one of these errors.
        """
        result = failed = None
        try:
            result = compute()
        except errors as error:
            failed = error
        if self.any(failed is not None, device):
            raise failed or FailedElsewhere("the solve or the loss of another process failed")
        return result

    def gathered(self, value: Any) -> list[Any]:
        """The value that each process gives, in the order of their ranks, for all of them."""
        found = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(found, value)
        return found

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over processes."""
        return DistributedDataParallel(module) if self.count > 1 else module


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that in training takes mean and variance over the rows of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this process's rows (B, C, H, W); all processes must call it."""
        if not self.training:
            return super().forward(x)
        n = _Sum.apply(torch.tensor(x.numel() // x.shape[1], dtype=torch.float64))
        mean = _Sum.apply(x.sum((0, 2, 3))) / n
        centred = x - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, on "cpu" (gloo) or "cuda" (nccl, a GPU each); yields the device.

    Outside torchrun there is nothing to join.
    """
    if "LOCAL_RANK" not in os.environ:
        yield torch.device(device)
        return
    on_gpu = torch.device(device).type == "cuda"
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device(device)
    if on_gpu:
        torch.cuda.set_device(here)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield here
    finally:
        distributed.destroy_process_group()
