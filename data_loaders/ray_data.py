"""The Ray Data loader: other processes, on any node of the cluster, read, decode and crop.

Each rank runs a Ray Dataset of its own over its own rows of the epoch, in stream order. That is what makes it exact:
a split of one common dataset (``streaming_split``) promises neither which rows a rank gets nor a start in the middle of
an epoch, and makes every rank wait for all. The rows go out in blocks of about 32 MB of what comes back, one task
each: few tasks for small sets, where the cost of a task would dominate, and a bounded number of bytes on the way,
because Ray Data starts no more tasks than its share of the object store takes. Blocks are given back in order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow
import ray
import ray.data
from numpy.typing import NDArray

from raycon.core.types import LoaderPlan

from .common import Block, StreamLoader, read_block, specs_of
from .datasets import ImageSet

log = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20
"""What a task gives back, about."""
TASKS = 512
"""Of one Ray Dataset, at most. A longer epoch is a sequence of them, so that it starts as fast as a short one."""


class RayDataLoader(StreamLoader):
    kind = "ray"

    def __init__(self, dataset: ImageSet, plan: LoaderPlan) -> None:
        """Needs a Ray that is running: this process is a driver or a worker of it (else ValueError)."""
        super().__init__(dataset, plan)
        if not ray.is_initialized():
            raise ValueError("data.loader = 'ray' needs a running Ray: use --runtime ray, or --data.loader torch")
        self._source = ray.put((dataset, plan))  # once, not with every task
        self._cpus = _cpus_per_task(plan.world)

    def _blocks(self, source_MI: NDArray[np.int64], size: int, epoch: int | None) -> Iterator[Block]:
        per_task = max(1, BLOCK_BYTES // self._row_bytes(epoch))
        per_dataset = max(1, TASKS * per_task // size) * size
        for first in range(0, len(source_MI), per_dataset):
            part = source_MI[first : first + per_dataset]
            yield from self._run(np.array_split(part, math.ceil(len(part) / per_task)), size, epoch)

    def _run(self, blocks: list[NDArray[np.int64]], size: int, epoch: int | None) -> Iterator[Block]:
        tables = [pyarrow.table({f"image{i}": rows for i, rows in enumerate(block.T)}) for block in blocks]
        source = ray.data.from_blocks(tables)
        context = source.context
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        images = source.map_batches(
            _read,
            fn_kwargs={"source": self._source, "epoch": epoch},
            batch_size=None,
            batch_format="numpy",
            num_cpus=self._cpus,
            concurrency=self.plan.workers or (None if self._cpus else 1),  # tasks at once
        )
        for batch in images.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=1):
            # Arrays out of the object store are read-only, which torch cannot express.
            yield Block(*(np.require(batch[name], requirements="W") for name in Block._fields))

    def _row_bytes(self, epoch: int | None) -> int:
        """Bytes that come back per row."""
        if self.dataset.image is not None:
            return math.prod(self.dataset.image) * (1 if epoch is None else 1 + self.plan.neighbour_views)
        specs = specs_of(self.plan, epoch) if epoch is not None else (self.plan.eval_spec,)
        return sum(len(self.dataset.mean) * spec.size**2 for spec in specs)


def _read(batch: dict[str, NDArray[np.int64]], source: Any, epoch: int | None) -> dict[str, NDArray[Any]]:
    """In a task: a block of rows in (a column per image to read), the same rows with what was read out."""
    dataset, plan = ray.get(source)
    return read_block(dataset, plan, np.stack([batch[f"image{i}"] for i in range(len(batch))], axis=1), epoch)._asdict()


def _cpus_per_task(world: int) -> float:
    """1 where the cluster has a CPU that no rank holds, else 0: the tasks then share the CPUs of the ranks.

    Tasks that ask for a CPU would wait for ever on a machine whose CPUs all belong to the ranks that wait for them. What
    is free is not enough to ask for: that figure is some seconds old and may not know of the ranks yet.
    """
    try:
        held = world * ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    except AssertionError:  # in a driver, which holds none
        held = 0
    if ray.cluster_resources().get("CPU", 0) - held >= 1 and ray.available_resources().get("CPU", 0) >= 1:
        return 1.0
    log.warning("no CPU is free for Ray Data: its tasks share those of the ranks; give the cluster more CPUs")
    return 0.0
