"""The outside world of a rank under Ray Train."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import ray.train
import torch

from raycon.core import dist
from raycon.core.log import Metrics, Trackers
from raycon.core.types import FeatureIndex
from raycon.on_ray.desk import DeskMetrics
from raycon.training.runtime import Kept
from raycon.training.storage import Store

LOOK_S = 1.0
"""How often Ray is asked whether a node is being taken away: the question is a barrier."""
LAST_S = 10.0
"""So long before a node goes it is saved once more."""
POLL_S = 0.2
MARK = "gave-up"
NOTICES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray's switch: is it asked whether nodes are being taken away?"""


class RayRuntime(Kept):
    """Implements core.types.Runtime inside a Ray Train worker.

    The run directory is the truth: a restarted worker group goes on from its newest readable checkpoint. Ray is told of
    each checkpoint (it lies in Ray's storage already, nothing is copied) so that it can start the evaluation.
    """

    def __init__(
        self,
        run_dir: Path,
        index: FeatureIndex,
        device: torch.device,
        wait_s: float = 0.0,
        store: Store | None = None,
        desk: str = "",
        owed: Sequence[str] = (),
    ) -> None:
        """``desk``: the name of the actor that keeps metrics, where the run directory is this machine's alone. ``owed``: the
        checkpoints whose evaluation an earlier driver did not live to see."""
        super().__init__(run_dir, store)
        self.device, self.index = device, index
        self._wait_s, self._desk = wait_s, desk
        self._looked = time.monotonic()
        self._notices = os.environ.get(NOTICES, "1") not in ("0", "false", "False")
        self._notice: ray.train.PreemptionInfo | None = None
        self._owed = tuple(owed)
        self._saved: set[tuple[str, ...]] = set()

    def metrics(self, tracker: Trackers) -> Metrics:
        return DeskMetrics(self._desk, tracker) if self._desk else super().metrics(tracker)

    def restore(self) -> Path | None:
        path = super().restore()
        for name in self._owed:  # of the one it goes on from the loop sees to it
            wanted = self.rank == 0 and path is not None and name != path.name and not self.evaluated(int(name))
            if dist.any_true(wanted):
                there = self.run_dir / "checkpoints" / name
                self.report({"step": int(name)}, there if self.rank == 0 else None, evaluate=True)
        return path

    def report(self, metrics: dict[str, float], checkpoint: Path | None, evaluate: bool) -> None:
        ray.train.report(
            metrics,
            checkpoint=None if checkpoint is None else self._lies_at(checkpoint),
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
            return self.evaluated(step) or self.stop_seen() or time.monotonic() >= end

        while not dist.any_true(self.rank == 0 and over()):  # together: a rank ahead would wait in a collective
            time.sleep(POLL_S)

    def _lies_at(self, path: Path) -> ray.train.Checkpoint:
        if self.store is None:
            return ray.train.Checkpoint.from_directory(str(path))
        # Ray's own object: it takes no other for the same file system.
        system = ray.train.get_context().get_storage().storage_filesystem
        return ray.train.Checkpoint(f"{self.store.root}/checkpoints/{path.name}", filesystem=system)

    @property
    def noticed(self) -> bool:
        """Is a node of this run being taken away?"""
        return self._notice is not None

    def should_save(self) -> bool:
        """At a notice that nodes of this run are being taken away, and once more just before they go."""
        if not self._notices:
            return False
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


def silent_ranks(run_dir: Path, rank: int, world: int, store: Store | None = None, seconds: float = 10.0) -> list[int]:
    """Called by every rank that has waited in vain for the others: the ranks that do not call it within ``seconds``.

    By files in the run directory (in the store): the ranks cannot talk to each other any more.
    """
    folder = run_dir / f".{MARK}"
    if store is None:
        folder.mkdir(exist_ok=True)
        (folder / str(rank)).touch()
    else:
        store.put_bytes(b"", f".{MARK}/{rank}")
    end = time.monotonic() + seconds
    while True:
        if store is None:
            missing = [r for r in range(world) if not (folder / str(r)).exists()]
        else:
            there = set(store.names(f".{MARK}"))
            missing = [r for r in range(world) if f".{MARK}/{r}" not in there]
        if not missing or time.monotonic() >= end:
            return missing
        time.sleep(0.2)
