"""The outside world without Ray: this process alone, or the ranks that torchrun started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from raycon.core import dist
from raycon.core.types import FeatureIndex, Needs, Snapshot
from raycon.training import checkpoint

STOP_FILE = "stop"
"""When a file of this name appears in the run directory, the run saves a checkpoint and ends."""


def choose_device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def join_torchrun() -> None:
    """Join the process group that torchrun describes in the environment; nothing to do for one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.active():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend)


def restore_newest(run_dir: Path, rank: int) -> tuple[Path | None, list[str]]:
    """The newest readable checkpoint, chosen by rank 0 for all, and what was wrong with newer ones."""
    found = checkpoint.newest(run_dir / "checkpoints") if rank == 0 else (None, [])
    chosen: tuple[Path | None, list[str]] = dist.gather_objects(found)[0]
    return chosen


def stop_asked(run_dir: Path) -> bool:
    return dist.any_true(dist.rank() == 0 and (run_dir / STOP_FILE).exists())


class _NoIndex:
    """For methods that mine nothing."""

    previous: Snapshot | None = None

    def add(self, version: int, first_row: int, features: Any) -> None:
        raise AssertionError("this method declared no need to mine")

    def begin(self, version: int, needs: Needs) -> None:
        raise AssertionError("this method declared no need to mine")

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        raise AssertionError("this method declared no need to mine")

    def close(self) -> None:
        pass


def no_index() -> FeatureIndex:
    return _NoIndex()


class LocalRuntime:
    """Implements core.types.Runtime. Evaluations are left to the caller: ``pending`` lists the checkpoints."""

    def __init__(self, run_dir: Path, index: FeatureIndex, device: torch.device) -> None:
        self.rank, self.world, self.device, self.index = dist.rank(), dist.world(), device, index
        self.refused: list[str] = []
        self.pending: list[Path] = []
        self._run_dir = run_dir

    def restore(self) -> Path | None:
        path, self.refused = restore_newest(self._run_dir, self.rank)
        return path

    def report(self, metrics: dict[str, float], checkpoint: Path | None, evaluate: bool) -> None:
        if evaluate and checkpoint is not None:
            self.pending.append(checkpoint)

    def should_stop(self) -> bool:
        return stop_asked(self._run_dir)

    def should_save(self) -> bool:
        return False
