"""The plain loader, and the reference for the others: numpy and torch only.

Images of one size are taken straight out of the data set's array. Images of any size are read, decoded and cropped here
or in ``plan.workers`` helper processes, a whole batch at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from raycon.core.types import LoaderPlan

from .common import Block, StreamLoader, read_block
from .datasets import ImageSet

log = logging.getLogger(__name__)

Job = tuple["int | None", NDArray[np.int64]]
"""An epoch (None: scan) and the rows to read (B, I): what a helper process is sent."""


class TorchLoader(StreamLoader):
    kind = "torch"

    def __init__(self, dataset: ImageSet, plan: LoaderPlan) -> None:
        super().__init__(dataset, plan)
        self._jobs = _Jobs()
        self._helpers: DataLoader[Any] | None = None
        if plan.workers and dataset.image is not None:
            log.warning("data.workers = %d has no effect: the images of %s are in memory", plan.workers, dataset.name)
        elif plan.workers:
            # Not fork: Ray's and torch's threads would be copied in the middle of what they do. The helpers stay for
            # the whole run, so the epoch travels with each job.
            self._helpers = DataLoader(
                _Reader(dataset, plan),
                sampler=self._jobs,
                batch_size=None,
                num_workers=plan.workers,
                persistent_workers=True,
                multiprocessing_context="forkserver",
            )

    def close(self) -> None:
        self._helpers = None

    def _blocks(self, source_MI: NDArray[np.int64], size: int, epoch: int | None) -> Iterator[Block]:
        self._jobs.rows, self._jobs.size, self._jobs.epoch = source_MI, size, epoch
        if self._helpers is None:
            return (read_block(self.dataset, self.plan, part, epoch) for _, part in self._jobs)
        return (Block(*(part.numpy() for part in block)) for block in self._helpers)


class _Jobs:
    """The sampler: cuts rows into jobs while they are asked for."""

    rows: NDArray[np.int64]
    size: int
    epoch: int | None

    def __iter__(self) -> Iterator[Job]:
        for first in range(0, len(self.rows), self.size):
            yield self.epoch, self.rows[first : first + self.size]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)


class _Reader(Dataset[Block]):
    """In a helper process: one item is one batch."""

    def __init__(self, dataset: ImageSet, plan: LoaderPlan) -> None:
        self._dataset, self._plan = dataset, plan

    def __getitem__(self, job: Job) -> Block:
        epoch, rows = job
        return read_block(self._dataset, self._plan, rows, epoch)
