"""The outside world without Ray: this process alone, or the ranks that torchrun started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from raycon.core import dist
from raycon.core.log import Metrics, Trackers
from raycon.core.types import FeatureIndex, Needs, Snapshot
from raycon.training import checkpoint
from raycon.training.storage import StopWatch, Store

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


class Kept:
    """Where a run is kept, the part that all runtimes share: a run directory, and perhaps a store that outlives it.

    With a store the run directory is a folder of this machine alone, and the store is the truth.
    """

    def __init__(self, run_dir: Path, store: Store | None = None) -> None:
        self.rank, self.world = dist.rank(), dist.world()
        self.refused: list[str] = []
        self.run_dir, self.store = run_dir, store
        self._stop = StopWatch(store) if store is not None and self.rank == 0 else None

    def restore(self) -> Path | None:
        """The newest readable checkpoint, chosen by rank 0 for all; ``refused``: what was wrong with newer ones.

        Raises CheckpointError when there are checkpoints and none can be read.
        """
        folder = self.run_dir / "checkpoints"
        found: tuple[Path | None, list[str]] = (None, [])
        if self.rank == 0:
            found = checkpoint.newest(folder) if self.store is None else self.store.fetch_newest(folder)
            if self.store is not None:
                checkpoint.keep_only(folder, found[0])  # what else is here may be of another attempt
        path, self.refused = dist.gather_objects(found)[0]
        if path is None and self.refused:  # to begin anew would throw away what may yet be saved
            raise checkpoint.CheckpointError(f"no readable checkpoint to go on from: {'; '.join(self.refused)}")
        if path is not None and self.store is not None and self.rank != 0:
            path = self.store.fetch_checkpoint(path.name, folder)
        return path

    def landed(self, path: Path, keep: int) -> None:
        """A checkpoint is complete in the run directory (rank 0, in the writing thread): bring it to where it is safe."""
        if self.store is not None:
            self.store.send_checkpoint(path)
            self.store.prune(keep)

    def evaluated(self, step: int) -> bool:
        """Has the checkpoint of this step been evaluated?"""
        if self.store is not None:
            return self.store.evaluated(step)
        file = self.run_dir / "evaluations.json"
        return file.exists() and any(
            e["step"] == step and "control" not in e for e in json.loads(file.read_text(encoding="utf-8"))
        )

    def metrics(self, tracker: Trackers) -> Metrics:
        """Where rank 0 writes its metrics."""
        return Metrics(self.run_dir / "metrics.jsonl", tracker)

    def should_stop(self) -> bool:
        """Does a file "stop" lie in the run directory? The same answer on every rank."""
        return dist.any_true(self.rank == 0 and self.stop_seen())

    def stop_seen(self) -> bool:
        """The same for rank 0 alone."""
        return (self.run_dir / STOP_FILE).exists() or (self._stop is not None and self._stop.asked)

    def close(self) -> None:
        if self._stop is not None:
            self._stop.close()


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


class LocalRuntime(Kept):
    """Implements core.types.Runtime. Evaluations are left to the caller: ``pending`` lists the checkpoints."""

    def __init__(self, run_dir: Path, index: FeatureIndex, device: torch.device, store: Store | None = None) -> None:
        super().__init__(run_dir, store)
        self.device, self.index = device, index
        self.pending: list[Path] = []

    def report(self, metrics: dict[str, float], checkpoint: Path | None, evaluate: bool) -> None:
        if evaluate and checkpoint is not None:
            self.pending.append(checkpoint)

    def should_save(self) -> bool:
        return False
