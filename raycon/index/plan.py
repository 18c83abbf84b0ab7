"""What an index will need before anything is allocated: memory, arithmetic, traffic and time, by formulas.

The sizes of arrays are those the code really sends (tests compare them with a counted run). Times divide them by what a
machine can do: ``measured_rate`` measures this one.

Shape letters: N rows, D feature width, k clusters, K neighbours, S shards.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from raycon.core.config import ConfigError
from raycon.index.kmeans import BESIDE, MOVES

Storage = Literal["fp32", "fp16"]

_SPARE = 1.3
_FIXED = 64_000_000
_FAN_OUT_S = 0.013
"""Seconds that Ray needs to call all shards once and collect small answers."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one shard's place can do."""

    flops: float = 70e9
    """Multiplications and additions per second of one shard in the k-means step (one core here; see measured_rate)."""
    network: float = 1.25e9
    """Bytes per second of a node's network (10 Gbit/s)."""
    memory: float = 0.0
    """Bytes free for one shard; 0: unknown."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All sizes in bytes, arithmetic in floating-point operations, times in seconds."""

    rows: int
    dim: int
    clusters: tuple[int, ...]
    neighbours: int
    shards: int
    passes: int
    """Of k-means, summed over the clusterings, the last assignments included."""
    feature_bytes: int
    """The features of one shard."""
    shard_bytes: int
    """The most one shard holds: 1.3 x its features + 64 MB."""
    snapshot_bytes: int
    """Assignments, prototypes and neighbours: what every rank and each checkpoint holds."""
    coordinator_bytes: int
    """The most the coordinator holds: the snapshot twice (once in the object store), and the answers it merges."""
    flops: float
    """Distances of all passes and of the neighbour search; sums and sorting are small beside them."""
    added_bytes: int
    """Features from the ranks to the shards."""
    sent_bytes: int
    """Coordinator to shards, counted once for every shard."""
    received_bytes: int
    """Shards to coordinator."""
    compute_seconds: float
    network_seconds: float
    """Through the coordinator's link; 0 for shards in one process."""
    call_seconds: float
    """Ray's own time; 0 for shards in one process."""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.network_seconds + self.call_seconds

    def problems(self, machine: Machine) -> list[str]:
        """Why it will not fit: [] when it does, or nothing is known of the machine."""
        if machine.memory and self.shard_bytes > machine.memory:
            return [
                f"an index of {self.rows} x {self.dim} features needs {self.shard_bytes * self.shards / 1e6:.0f} MB on "
                f"{self.shards} shards, {self.shard_bytes / 1e6:.0f} MB each, and one has {machine.memory / 1e6:.0f} MB: "
                f"give {shards_for(self.rows, self.dim, machine.memory)} shards or more"
            ]
        return []


def feature_bytes(rows: int, dim: int, shards: int, storage: Storage = "fp32") -> int:
    """Features of the largest shard."""
    return math.ceil(rows / shards) * dim * (4 if storage == "fp32" else 2)


def shard_bytes(rows: int, dim: int, shards: int, storage: Storage = "fp32") -> int:
    """The most the largest shard holds, whatever it works at."""
    return int(_SPARE * feature_bytes(rows, dim, shards, storage) + _FIXED)


def shards_for(rows: int, dim: int, memory: float, storage: Storage = "fp32") -> int:
    """The fewest shards of which each holds at most ``memory`` bytes. Raises ValueError when not even one row fits."""
    room = (memory - _FIXED) / _SPARE // (dim * (4 if storage == "fp32" else 2))
    if room < 1:
        raise ValueError(f"{memory / 1e6:.0f} MB per shard: a shard needs {_FIXED / 1e6:.0f} MB beside its features")
    return math.ceil(rows / room)


def plan(
    rows: int,
    dim: int,
    clusters: Sequence[int],
    shards: int,
    *,
    neighbours: int = 0,
    iterations: int = 20,
    redo: int = 5,
    warm: bool = False,
    moves: int = MOVES,
    storage: Storage = "fp32",
    ray: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """The plan of one refresh by exact k-means and exact neighbours.

    ``warm``: from the last labels ``moves`` passes among near clusters and one iteration, in place of ``redo`` starts of
    ``iterations``. Raises ValueError for sizes that make no sense.
    """
    for name, value in (("rows", rows), ("dim", dim), ("shards", shards), ("iterations", iterations), ("redo", redo)):
        if value < 1:
            raise ValueError(f"{name} = {value}: give 1 or more")
    if bad := [k for k in clusters if not 1 <= k <= rows]:
        raise ValueError(f"{bad[0]} clusters of {rows} rows: give 1 .. {rows}")
    if not 0 <= neighbours < rows:
        raise ValueError(f"{neighbours} neighbours of each of {rows} rows: give 0 .. {rows - 1}")
    machine = machine or Machine()
    shards = min(shards, rows)
    steps, starts = (1, 1) if warm else (iterations * redo, redo)
    passes, flops, sent, received = 0, 0.0, 0, 0
    # One call asks for the state; all clusterings share the calls of their iterations.
    calls = 1 + (steps if clusters else 0) + len(clusters) * (starts + 1)
    if warm and clusters:
        beside, sums = min(BESIDE, *clusters), sum(clusters) * (dim * 8 + 8)
        calls += moves
        flops += 2.0 * rows * (beside + 1) * dim * moves * len(clusters) + sum(2.0 * k * k * dim for k in clusters)
        sent += shards * (rows * len(clusters) * 4 + moves * sum(clusters) * (dim * 4 + beside * 4))
        received += moves * shards * sums
    for k in clusters:
        passes += steps + 1
        flops += 2.0 * rows * k * dim * (steps + 1)
        sent += shards * (steps + 1) * k * dim * 4
        received += shards * steps * k * (dim * 8 + 8) + rows * 12
        if warm:  # the labels of all rows go to every shard, sums come back
            sent += shards * rows * 8
            received += shards * k * (dim * 8 + 8)
        else:  # the rows that start: their numbers out, their places and features back
            sent += shards * starts * k * 8
            received += starts * k * (dim * 4 + 8)
    if neighbours:
        calls += 2 * math.ceil(rows / 1024)
        flops += 2.0 * rows * rows * dim
        sent += shards * rows * (8 + dim * 4 + 8)
        received += rows * (8 + dim * 4) + shards * rows * neighbours * 16
    snapshot = rows * 8 * (len(clusters) + neighbours) + sum(clusters) * dim * 4
    return Plan(
        rows=rows,
        dim=dim,
        clusters=tuple(clusters),
        neighbours=neighbours,
        shards=shards,
        passes=passes,
        feature_bytes=feature_bytes(rows, dim, shards, storage),
        shard_bytes=shard_bytes(rows, dim, shards, storage),
        snapshot_bytes=snapshot,
        coordinator_bytes=2 * snapshot + 24 * rows + shards * sum(clusters) * (dim * 8 + 8),
        flops=flops,
        added_bytes=rows * dim * 4,
        sent_bytes=sent,
        received_bytes=received,
        compute_seconds=flops / (machine.flops * shards),
        network_seconds=(sent + received) / machine.network if ray else 0.0,
        call_seconds=calls * _FAN_OUT_S if ray else 0.0,
    )


def free_memory() -> int | None:
    """Bytes this process may still take: of the machine, or of its control group when that is less; None: unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().rpartition("::")[2].lstrip("/")
        for folder in (Path("/sys/fs/cgroup") / group, Path("/sys/fs/cgroup")):
            limit = folder / "memory.max"
            if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
                found.append(int(text) - int((folder / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass  # another system: what was found so far, if anything
    return max(0, min(found)) if found else None


def check_memory(rows: int, dim: int, shards: int, memory_gb: float, storage: Storage = "fp32") -> None:
    """Raises ConfigError when an index in this process would not fit; takes no memory itself."""
    each = shard_bytes(rows, dim, shards, storage)
    need = int(_SPARE * rows * dim * (4 if storage == "fp32" else 2) + _FIXED)  # one process: the fixed part once
    what = f"an index of {rows} x {dim} features needs {need / 1e6:.0f} MB on {shards} shards in this process"
    if memory_gb and each > memory_gb * 1e9:
        raise ConfigError(
            [
                f"{what}, {each / 1e6:.0f} MB for one; mining.memory_gb = {memory_gb:g} allows it {memory_gb * 1e3:.0f} "
                "MB: raise mining.memory_gb or mining.shards"
            ]
        )
    free = free_memory()
    if free is not None and need > free:
        raise ConfigError(
            [f"{what}, {free / 1e6:.0f} MB are free: stop other programs, or spread it over machines (runtime = ray)"]
        )


def measured_rate(dim: int = 128, clusters: int = 1000, rows: int = 8192, threads: int = 1) -> float:
    """Floating-point operations per second of the k-means step on this machine, by CPU time; half a second of work."""
    from raycon.index.shard import Shard

    features = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    shard = Shard(0, rows, dim, threads)
    shard.put(0, 0, features)
    best = math.inf
    for _ in range(3):
        start, wall = time.process_time(), time.perf_counter()
        shard.step(0, features[:clusters], rows, 1.0)
        used = time.process_time() - start if threads == 1 else time.perf_counter() - wall
        best = min(best, used)
    return 2.0 * rows * min(clusters, rows) * dim / best


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
