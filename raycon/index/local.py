"""The feature index without Ray: all shards in this process, or one per rank under torchrun."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from raycon.core.config import MiningConfig
from raycon.core.stream import shard_range
from raycon.core.types import Needs, Snapshot
from raycon.index.engine import EngineName
from raycon.index.mine import mine
from raycon.index.shard import Shard


class LocalIndex:
    """A FeatureIndex of ``rows`` features of width ``dim``.

    In one process: mining.shards shards, each worked on by a thread of its own, so its thread settings never touch the
    trainer's. With ``world`` > 1 (torch.distributed initialised): this rank holds the rows ``shard_range`` gives it,
    which are those its loader scans, and every rank runs the same coordinator in lock step on all ranks' answers.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        mining: MiningConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        engine: EngineName = "auto",
    ) -> None:
        self.previous: Snapshot | None = None
        """The snapshot a warm start begins at: the last one made, or the one a checkpoint held."""
        self._rows, self._mining, self._seed, self._world = rows, mining, seed, world
        ranges = [shard_range(rows, rank, world)] if world > 1 else part(rows, mining.shards)
        self._shards = [Shard(first, last, dim, mining.threads, engine) for first, last in ranges]
        self._pool = ThreadPoolExecutor(len(self._shards), thread_name_prefix="index")

    def add(self, version: int, first_row: int, features: Any) -> None:
        """Store (n, dim) features of rows ``first_row ..``; under torchrun rows of this rank only. Raises ValueError."""
        if not (self._shards[0].first_row <= first_row and first_row + len(features) <= self._shards[-1].last_row):
            raise ValueError(
                f"rows {first_row} .. {first_row + len(features)}: this process holds "
                f"{self._shards[0].first_row} .. {self._shards[-1].last_row}"
            )
        for shard in self._shards:
            first, last = max(first_row, shard.first_row), min(first_row + len(features), shard.last_row)
            if first < last:
                shard.put(version, first, features[first - first_row : last - first_row])

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        """Cluster and mine. Raises MissingRows, or ValueError, on every rank alike."""
        snapshot, metrics = mine(self._fan_out, self._rows, version, needs, self._mining, self._seed, self.previous)
        self.previous = snapshot
        return snapshot, metrics

    def close(self) -> None:
        self._pool.shutdown()
        self._shards.clear()

    def _fan_out(self, method: str, *args: Any) -> list[Any]:
        calls: list[Callable[..., Any]] = [getattr(shard, method) for shard in self._shards]
        futures = [self._pool.submit(call, *args) for call in calls]
        if self._world == 1:
            return [future.result() for future in futures]
        failure = futures[0].exception()
        answers: list[Any] = [None] * self._world
        dist.all_gather_object(answers, failure if failure is not None else futures[0].result())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer  # on every rank, or the others would wait for this one's next answer
        return answers


def part(rows: int, shards: int) -> list[tuple[int, int]]:
    """The rows [first, last) of each shard; no more shards than rows."""
    shards = min(shards, rows)
    return [shard_range(rows, i, shards) for i in range(shards)]
