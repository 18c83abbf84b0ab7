"""What the index actors tell Ray's Prometheus endpoint; each name below appears there with "ray_" before it.

Tags: ``run`` the run's name; ``shard`` its number; ``method`` of a shard; ``phase`` of a refresh; ``clustering`` its
position. Counters end in "_total" at the endpoint.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.util.metrics import Counter, Gauge

from raycon.index.service import array_bytes

ROWS_ADDED = "raycon_index_rows_added"
BYTES_ADDED = "raycon_index_bytes_added"
CALL_SECONDS = "raycon_index_call_seconds"
BYTES_MOVED = "raycon_index_bytes_moved"
VERSION = "raycon_index_version"
PHASE_SECONDS = "raycon_index_phase_seconds"
ROWS_PER_SECOND = "raycon_index_rows_per_second"
PER_CLUSTERING = {
    "empty": "raycon_index_empty_clusters",
    "imbalance": "raycon_index_imbalance",
    "used": "raycon_index_used_clusters",
    "ami": "raycon_index_ami",
}


class ShardMeters:
    """Of one shard actor."""

    def __init__(self, run: str, number: int) -> None:
        tags, keys = {"run": run, "shard": str(number)}, ("run", "shard")
        self._rows = Counter(ROWS_ADDED, "Rows handed to a shard", keys)
        self._bytes = Counter(BYTES_ADDED, "Bytes of features handed to a shard", keys)
        self._seconds = Counter(CALL_SECONDS, "Seconds a shard worked, by method", (*keys, "method"))
        for meter in (self._rows, self._bytes, self._seconds):
            meter.set_default_tags(tags)

    @contextmanager
    def call(self, method: str, args: tuple[Any, ...]) -> Iterator[None]:
        """Around one call of a shard's method; one that raises counts too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds.inc(max(time.perf_counter() - start, 1e-9), {"method": method})
            if method == "put" and len(args[2]):
                self._rows.inc(len(args[2]))
                self._bytes.inc(array_bytes(args[2]))


class CoordinatorMeters:
    """Of the coordinator: the last refresh."""

    def __init__(self, run: str) -> None:
        self._version = Gauge(VERSION, "The version of the last snapshot", ("run",))
        self._phase = Gauge(PHASE_SECONDS, "Seconds of the last refresh, by phase", ("run", "phase"))
        self._rate = Gauge(ROWS_PER_SECOND, "Rows clustered per second in the last refresh", ("run",))
        self._moved = Counter(BYTES_MOVED, "Bytes between coordinator and shards", ("run", "way"))
        self._per_clustering = {
            key: Gauge(name, f"{key} of the last snapshot", ("run", "clustering"))
            for key, name in PER_CLUSTERING.items()
        }
        for meter in (self._version, self._phase, self._rate, self._moved, *self._per_clustering.values()):
            meter.set_default_tags({"run": run})

    def refreshed(self, version: int, metrics: Mapping[str, float]) -> None:
        """``metrics`` as a refresh gives them."""
        self._version.set(version)
        self._rate.set(metrics["mining/rows_per_s"])
        for way in ("sent", "received"):
            if metrics[f"mining/bytes_{way}"] > 0:
                self._moved.inc(metrics[f"mining/bytes_{way}"], {"way": way})
        for name, value in metrics.items():
            if found := re.fullmatch(r"index/(\w+)_seconds", name):
                self._phase.set(value, {"phase": found[1]})
            elif (found := re.fullmatch(r"(?:index|mining)/(\d+)/(\w+)", name)) and found[2] in self._per_clustering:
                self._per_clustering[found[2]].set(value, {"clustering": found[1]})
