"""The outside world of a rank under Ray Train."""

from __future__ import annotations

from pathlib import Path

import ray.train
import torch

from raycon.core import dist
from raycon.core.types import FeatureIndex
from raycon.training.runtime import restore_newest, stop_asked


class RayRuntime:
    """Implements core.types.Runtime inside a Ray Train worker.

    The run directory is the truth: a restarted worker group goes on from its newest readable checkpoint. Ray is told of
    each checkpoint (it lies in Ray's storage already, nothing is copied) so that it can start the evaluation.
    """

    def __init__(self, run_dir: Path, index: FeatureIndex, device: torch.device) -> None:
        self.rank, self.world, self.device, self.index = dist.rank(), dist.world(), device, index
        self.refused: list[str] = []
        self._run_dir = run_dir

    def restore(self) -> Path | None:
        path, self.refused = restore_newest(self._run_dir, self.rank)
        return path

    def report(self, metrics: dict[str, float], checkpoint: Path | None, evaluate: bool) -> None:
        ray.train.report(
            metrics,
            checkpoint=None if checkpoint is None else ray.train.Checkpoint.from_directory(str(checkpoint)),
            checkpoint_dir_name=f"checkpoints/{checkpoint.name}" if checkpoint else None,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
            validation=evaluate and checkpoint is not None,
        )

    def should_stop(self) -> bool:
        return stop_asked(self._run_dir)
