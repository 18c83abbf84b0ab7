"""The Ray Data loader: other processes, on any node of the cluster, read, decode and crop.

Each rank runs a Ray Dataset of its own over its own rows of the epoch, in stream order. That is what makes it exact:
a split of one common dataset (``streaming_split``) promises neither which rows a rank gets nor a start in the middle of
an epoch, and makes every rank wait for all. The rows go out in blocks of about 32 MB of what comes back, one task
each: few tasks for small sets, where the cost of a task would dominate. Blocks are given back in order.

What is read from is any data set: files, shards, copies of Parquet files, arrays (datasets/). What may lie ready or be
under way is bounded per rank (``_ahead``): left alone every rank's Dataset would take half of the cluster's object store.
``plan.nodes`` keeps the tasks on nodes with a label, CPU machines that decode while GPU machines train.
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
from ray.data import ExecutionResources

from raycon.core.config import ConfigError
from raycon.core.types import LoaderPlan

from .common import Block, StreamLoader, read_block, specs_of
from .datasets import ImageSet

log = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20
"""What a task gives back, about."""
AHEAD_BYTES = 512 * 2**20
"""What a rank may have ready or under way, when four batches are not more."""
STORE_SHARE = 0.5
"""Of the cluster's object store that all ranks together may take."""
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
        self._labels = _labels(plan.nodes)
        self._cpus = 1.0 if self._labels else _cpus_per_task(plan.world)

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
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            object_store_memory=self._ahead(size * self._row_bytes(epoch))
        )
        context.execution_options.label_selector = self._labels
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

    def _ahead(self, batch_bytes: int) -> float:
        """Bytes that may lie in the object store: a few batches, two blocks at least, never more than a fair share."""
        store = ray.cluster_resources().get("object_store_memory", 0.0) * STORE_SHARE / self.plan.world
        return max(2 * BLOCK_BYTES, min(max(AHEAD_BYTES, 4 * batch_bytes), store))

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


def _labels(wanted: str) -> dict[str, str] | None:
    """A label selector. Raises ConfigError when it is not KEY=VALUE, or no node with a CPU has the label."""
    if not wanted:
        return None
    key, equals, value = wanted.partition("=")
    if not key or not equals or not value:
        raise ConfigError([f"data.nodes = {wanted!r}: give KEY=VALUE, a label of nodes (ray start --labels KEY=VALUE)"])
    there = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not any(node.get("Labels", {}).get(key) == value for node in there):
        known = sorted(
            {
                f"{k}={v}"
                for node in there
                for k, v in node.get("Labels", {}).items()
                if not k.startswith("ray.io/node-")
            }
        )
        raise ConfigError(
            [
                f"data.nodes = {wanted!r}: no node with a CPU has this label ({', '.join(known) or 'there are none'}); start "
                f"one with ray start --labels {wanted}"
            ]
        )
    return {key: value}


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
