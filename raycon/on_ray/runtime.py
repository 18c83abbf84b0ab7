"""The outside world of a rank under Ray Train."""

from __future__ import annotations

import time
from pathlib import Path

import ray.train
import torch

from raycon.core import dist
from raycon.core.types import FeatureIndex
from raycon.training.loop import evaluated
from raycon.training.runtime import STOP_FILE, restore_newest, stop_asked

LOOK_S = 1.0
"""How often Ray is asked whether a node is being taken away: the question is a barrier."""
LAST_S = 10.0
"""So long before a node goes it is saved once more."""
POLL_S = 0.2
MARK = "gave-up"


class RayRuntime:
    """Implements core.types.Runtime inside a Ray Train worker.

    The run directory is the truth: a restarted worker group goes on from its newest readable checkpoint. Ray is told of
    each checkpoint (it lies in Ray's storage already, nothing is copied) so that it can start the evaluation.
    """

    def __init__(self, run_dir: Path, index: FeatureIndex, device: torch.device, wait_s: float = 0.0) -> None:
        self.rank, self.world, self.device, self.index = dist.rank(), dist.world(), device, index
        self.refused: list[str] = []
        self._run_dir = run_dir
        self._wait_s = wait_s
        self._looked = time.monotonic()
        self._notice: ray.train.PreemptionInfo | None = None
        self._saved: set[tuple[str, ...]] = set()

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
        if evaluate and self._wait_s:
            self._await_evaluation(int(metrics["step"]))

    def _await_evaluation(self, step: int) -> None:
        """Until the evaluation of this step is there or the run is to stop, ``evals.wait_s`` at most."""
        end = time.monotonic() + self._wait_s

        def over() -> bool:
            return evaluated(self._run_dir, step) or (self._run_dir / STOP_FILE).exists() or time.monotonic() >= end

        while not dist.any_true(self.rank == 0 and over()):  # together: a rank ahead would wait in a collective
            time.sleep(POLL_S)

    def should_stop(self) -> bool:
        return stop_asked(self._run_dir)

    def should_save(self) -> bool:
        """At a notice that nodes of this run are being taken away, and once more just before they go."""
        if dist.any_true(self.rank == 0 and time.monotonic() - self._looked >= LOOK_S):
            self._looked = time.monotonic()
            self._notice = ray.train.get_preemption_info()  # the same on every rank
        if self._notice is None:
            return False
        nodes, deadline = tuple(self._notice.preempted_node_ids), self._notice.deadline_ms
        last = deadline is not None and deadline / 1000 - time.time() < LAST_S
        occasion = (*nodes, "last") if last else nodes
        wanted: bool = dist.gather_objects(occasion not in self._saved)[0]
        if wanted:
            self._saved |= {nodes, occasion}
        return wanted


def silent_ranks(run_dir: Path, rank: int, world: int, seconds: float = 10.0) -> list[int]:
    """Called by every rank that has waited in vain for the others: the ranks that do not call it within ``seconds``.

    By files in the run directory: the ranks cannot talk to each other any more.
    """
    folder = run_dir / f".{MARK}"
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).touch()
    end = time.monotonic() + seconds
    while True:
        missing = [r for r in range(world) if not (folder / str(r)).exists()]
        if not missing or time.monotonic() >= end:
            return missing
        time.sleep(0.2)
