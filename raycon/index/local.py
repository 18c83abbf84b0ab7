"""The feature index without Ray: all shards in this process, or one per rank under torchrun."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from raycon.core.config import MiningConfig
from raycon.core.stream import shard_range
from raycon.core.types import Needs, Snapshot
from raycon.index.engine import EngineName
from raycon.index.plan import check_memory
from raycon.index.service import Miner, Saved, SavedShard, cosines, search_rows


class LocalIndex:
    """A FeatureIndex of ``rows`` features of width ``dim``.

    In one process: mining.shards shards, each worked on by a thread of its own, so its thread settings never touch the
    trainer's. With ``world`` > 1 (torch.distributed initialised, every rank makes its index at the same time): this rank
    holds the rows ``shard_range`` gives it, which are those its loader scans, and every rank runs the same coordinator in
    lock step on all ranks' answers, over a process group of its own. ``saved``: a folder of features that rows which were
    not added are read from. ``engine``: in place of mining.engine.

    Raises ValueError when the features would not fit into memory; none is taken before the first are added.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        mining: MiningConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        engine: EngineName | None = None,
        saved: Saved | None = None,
    ) -> None:
        self.previous: Snapshot | None = None
        """The snapshot a warm start begins at: the last one made, or the one a checkpoint held."""
        self._rows, self._dim, self._world = rows, dim, world
        ranges = [shard_range(rows, rank, world)] if world > 1 else part(rows, mining.shards)
        check_memory(sum(last - first for first, last in ranges), dim, len(ranges), mining.memory_gb, mining.storage)
        kind = (dim, mining.threads, engine or mining.engine, mining.device, mining.storage)
        self._shards = [SavedShard(first, last, *kind, saved=saved) for first, last in ranges]
        own = (keep_threads, (mining.threads,))
        self._pool = ThreadPoolExecutor(len(self._shards), "index", *own)
        self._beside = ThreadPoolExecutor(1, "index-refresh", *own)
        self._begun: tuple[int, Needs, Future[tuple[Snapshot, dict[str, float]]]] | None = None
        # Its own group: a refresh beside the training must not mix its messages with the gradients'.
        self._group = dist.new_group(backend="gloo") if world > 1 else None
        self._miner = Miner(self._fan_out, max(len(self._shards), world), rows, mining, seed)

    def add(self, version: int, first_row: int, features: Any) -> None:
        """Store (n, dim) features of rows ``first_row ..``; under torchrun rows of this rank only. Raises ValueError."""
        if not (self._shards[0].first_row <= first_row and first_row + len(features) <= self._shards[-1].last_row):
            raise ValueError(
                f"rows {first_row} .. {first_row + len(features)}: this process holds "
                f"{self._shards[0].first_row} .. {self._shards[-1].last_row}"
            )
        assert self._begun is None, "features may not change while they are mined"
        for shard in self._shards:
            first, last = max(first_row, shard.first_row), min(first_row + len(features), shard.last_row)
            if first < last:
                shard.put(version, first, features[first - first_row : last - first_row])

    def begin(self, version: int, needs: Needs) -> None:
        """Start to make a snapshot in a thread beside the caller's."""
        assert self._begun is None, "one refresh at a time"
        self._begun = version, needs, self._beside.submit(self._miner.make, version, needs, self.previous)

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        """Cluster and mine, or wait for what was begun. Raises MissingRows, or ValueError, on every rank alike."""
        if self._begun is not None:
            begun_version, begun_needs, future = self._begun
            assert (begun_version, begun_needs) == (version, needs), "another snapshot was begun"
            try:
                snapshot, metrics = future.result()
            finally:
                self._begun = None
        else:
            snapshot, metrics = self._beside.submit(self._miner.make, version, needs, self.previous).result()
        self.previous = snapshot
        return snapshot, metrics

    def search(
        self, features: Any, count: int, version: int | None = None, own_Q: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ``count`` rows most similar to each of (Q, dim) unit features: rows and cosines, both (Q, count).

        See ``search_rows``; under torchrun every rank asks the same at the same time. Raises MissingRows and ValueError.
        """
        assert self._begun is None, "shards answer one caller at a time"
        row_QK, sqdist_QK = search_rows(self._fan_out, version, self._rows, self._dim, features, count, own_Q)
        return row_QK, cosines(sqdist_QK)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of ``SavedShard`` on every shard: the answers in row order."""
        return self._fan_out(method, *args)

    def progress(self) -> int:
        """Passes over the data made so far by the refresh under way or the last one."""
        return self._miner.progress()

    def close(self) -> None:
        """Wait for a refresh under way, then free the features."""
        self._beside.shutdown(cancel_futures=True)
        self._pool.shutdown()
        self._shards.clear()

    def _fan_out(self, method: str, *args: Any) -> list[Any]:
        calls: list[Callable[..., Any]] = [getattr(shard, method) for shard in self._shards]
        futures = [self._pool.submit(call, *args) for call in calls]
        if self._world == 1:
            return [future.result() for future in futures]
        failure = futures[0].exception()
        answers: list[Any] = [None] * self._world
        dist.all_gather_object(answers, failure if failure is not None else futures[0].result(), group=self._group)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer  # on every rank, or the others would wait for this one's next answer
        return answers


def keep_threads(count: int) -> None:
    """Torch uses ``count`` CPU threads for what the calling thread does, and as many as before for all others."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    # Threads that start later take the number that was set last, wherever that was.
    helper = threading.Thread(target=torch.set_num_threads, args=(before,))
    helper.start()
    helper.join()


def part(rows: int, shards: int) -> list[tuple[int, int]]:
    """The rows [first, last) of each shard; no more shards than rows."""
    shards = min(shards, rows)
    return [shard_range(rows, i, shards) for i in range(shards)]
