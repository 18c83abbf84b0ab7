"""The checkpoints of a run: the state is copied between two steps, and a thread of rank 0 writes it while training goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raycon.core import dist
from raycon.core.config import RunConfig
from raycon.core.log import Metrics
from raycon.core.types import Runtime, Snapshot
from raycon.methods.base import Method
from raycon.training import checkpoint

logger = logging.getLogger("raycon")

NICE = 5
"""How much the writing thread gives way to the computing ones where both want a core (Linux)."""


class _Written(NamedTuple):
    path: Path
    seconds: float
    bytes: int


class _Pending(NamedTuple):
    """A checkpoint that was begun and is not reported yet; every rank knows of it."""

    step: int
    epoch: int
    loss: Tensor
    evaluate: bool
    copy_s: float
    future: Future[_Written] | None
    """On rank 0."""


class Saving:
    """Begins, finishes and reports checkpoints; every rank calls ``save``, ``look`` and ``flush`` at the same steps.

    At most one is being written: the next waits for it. It is reported (and evaluated, pruned for, named anywhere) only
    once it is complete where the run is kept, at the next logged step, on all ranks at once. An error of the writing is raised there,
    on rank 0. As a context manager: however the run ends, what is being written is finished first.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        method: Method,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        metrics: Metrics,
    ) -> None:
        self._config, self._run_dir = config, run_dir
        self._method, self._optimizer, self._runtime, self._metrics = method, optimizer, runtime, metrics
        self._pending: _Pending | None = None
        self._buffers = checkpoint.Buffers()
        self._pool: ThreadPoolExecutor | None = None
        if runtime.rank == 0:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="raycon-checkpoint", initializer=_give_way)
            checkpoint.clear(run_dir / "checkpoints")

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        if kind is not None and self._pending is not None and self._pending.future is not None:
            error = self._pending.future.exception()
            if error is not None:  # the error that ends the run is another one
                logger.error("the checkpoint of step %d could not be written: %s", self._pending.step, error)

    def save(
        self,
        position: dict[str, Any],
        epoch: int,
        loss: Tensor,
        snapshot: Snapshot | None,
        coming: Snapshot | None,
        evaluate: bool,
    ) -> None:
        """Copy the state as it is now and begin to write it. ``position``: step, epoch, steps, per_epoch.

        ``epoch`` and ``loss``: of the step before, to report.
        """
        self.flush()
        start = time.perf_counter()
        future = None
        if self._pool is not None:
            state = {**position, "world": self._runtime.world, "method": self._config.method.name}
            state |= {"seed": self._config.seed, "evaluate": evaluate}
            taken = checkpoint.take(self._method, self._optimizer, snapshot, state, coming, self._buffers)
            future = self._pool.submit(self._write, taken)
        copied = time.perf_counter() - start
        self._pending = _Pending(position["step"], epoch, loss.detach(), evaluate, copied, future)

    def _write(self, taken: checkpoint.Taken) -> _Written:
        start, folder = time.perf_counter(), self._run_dir / "checkpoints"
        path = checkpoint.write(folder, taken)
        self._runtime.landed(path, self._config.checkpoint.keep)
        checkpoint.prune(folder, self._config.checkpoint.keep, self._runtime.evaluated)
        size = sum(f.stat().st_size for f in path.iterdir())
        return _Written(path, time.perf_counter() - start, size)

    def look(self) -> None:
        """Report the checkpoint that was begun, if it is complete by now: a small collective while one is being written."""
        if self._pending is not None:
            future = self._pending.future
            if dist.any_true(future is not None and future.done()):
                self.flush()

    def flush(self) -> None:
        """Wait for the checkpoint that was begun, and report it.

        Raises CheckpointError when the disk is full, OSError when it could not be written otherwise (on rank 0).
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        start, written = time.perf_counter(), None
        if pending.future is not None:
            written = pending.future.result()
        waited = time.perf_counter() - start
        told = {"step": pending.step, "epoch": pending.epoch, "loss": float(pending.loss)}
        self._runtime.report(told, None if written is None else written.path, pending.evaluate)
        self._metrics.relay()
        if written is not None:
            self._metrics.write(
                "checkpoint",
                pending.step,
                epoch=pending.epoch,
                **{
                    "checkpoint/copy_s": pending.copy_s,
                    "checkpoint/wait_s": waited,
                    "checkpoint/write_s": written.seconds,
                    "checkpoint/bytes": written.bytes,
                },
            )
        if pending.evaluate:
            self._metrics.write("state", pending.step, epoch=pending.epoch, evaluating=pending.step)


def _give_way() -> None:
    if hasattr(os, "setpriority"):
        with contextlib.suppress(OSError):
            os.setpriority(
                os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
            )
