"""What every form of the index has in common: shards that can come back from disk, and refreshes that are measured.

Shape letters: N rows of the data set, D feature width, Q queries, K neighbours.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import MiningConfig
from raycon.core.types import MissingRows, Needs, Snapshot
from raycon.index import persist
from raycon.index.drift import drift
from raycon.index.merge import FanOut
from raycon.index.mine import mine
from raycon.index.neighbours import search
from raycon.index.shard import Shard, State, as_features, check_finite

logger = logging.getLogger(__name__)

_PASSES = ("step", "steps", "label_sums", "assign", "assign_below")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Where the shards of an index find their features again."""

    folder: Path
    rows: int
    """Of the whole data set."""
    write: bool
    """Each complete version is written there by the shard, before it is mined; else the folder is only read."""
    storage: persist.Storage = "float32"
    metric: str = "cosine"


class SavedShard(Shard):
    """A Shard that takes rows it lacks from disk: what it wrote itself before it was lost, or an index built before.

    Only a version that was complete is on disk, and the first new block takes its manifest away, so what comes back is
    what the shard held.
    """

    def __init__(self, *args: Any, saved: Saved | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved = saved
        self._written: int | None = None
        """The version on disk, as far as this process knows."""
        self._refused: dict[int, str] = {}
        self._clean = False
        """No manifest of an earlier version is left."""

    def put(self, version: int, first_row: int, features: Any) -> None:
        super().put(version, first_row, features)
        if self._saved is not None and self._saved.write and not self._clean:
            (self._saved.folder / f"rows-{self.first_row}-{self.last_row}.json").unlink(missing_ok=True)
            self._written, self._clean = None, True

    def state(self, version: int) -> State:
        found = super().state(version)
        if self._saved is not None and self._saved.write and not found.missing and self._written != version:
            self.write(version, self._saved)
            self._written, self._clean = version, False
        return found

    def missing(self, version: int) -> int:
        """How many rows of ``version`` are neither here nor on disk; those on disk are then here."""
        missing = super().missing(version)
        if missing and self._saved is not None and version not in self._refused:
            try:
                place = (self._saved.folder, version, self.first_row, self.last_row)
                if persist.overlapping(*place):
                    for first_row, block in persist.read_range(*place):
                        super().put(version, first_row, block)
                    if self._saved.write:
                        self._written, self._clean = version, False
            except persist.DamagedPart as error:
                self._refused[version] = str(error)
                logger.warning("%s", error)
            missing = super().missing(version)
        return missing

    def held(self) -> int | None:
        """The newest version of which this shard has rows, here or on disk; None when it has none."""
        versions = [self.stamp()[0]]
        if self._saved is not None:
            try:
                versions += [
                    part.version
                    for part in persist.overlapping(self._saved.folder, None, self.first_row, self.last_row)
                ]
            except persist.DamagedPart as error:
                logger.warning("%s", error)
        return max((v for v in versions if v is not None), default=None)

    def refused(self, version: int) -> str:
        """What was wrong with the part on disk; empty when nothing was."""
        return self._refused.get(version, "")

    def write(self, version: int, saved: Saved) -> None:
        """Write the rows of this shard as one part. Raises MissingRows when some are not there."""
        self._require(version)
        writer = persist.PartWriter(
            saved.folder, version, self.first_row, self.last_row, saved.rows, self.dim, saved.storage, saved.metric
        )
        try:
            for start in range(self.first_row, self.last_row, 8192):
                rows = np.arange(start, min(start + 8192, self.last_row))
                writer.write(self.gather(version, rows)[1])
        except BaseException:
            writer.abandon()
            raise
        writer.close()


class Miner:
    """The coordinator's side of an index: refreshes over a FanOut to ``shards`` shards, with what they cost.

    One caller at a time, but for ``progress``.
    """

    def __init__(self, fan_out: FanOut, shards: int, rows: int, mining: MiningConfig, seed: int) -> None:
        self._fan_out, self._shards, self._rows, self._mining, self._seed = fan_out, shards, rows, mining, seed
        self._calls: Counter[str] = Counter()
        self._sent = self._received = 0
        self._last: tuple[NDArray[np.int64], ...] = ()

    def make(self, version: int, needs: Needs, previous: Snapshot | None) -> tuple[Snapshot, dict[str, float]]:
        """``mine``, and metrics "mining/...": seconds, rows clustered per second, bytes, AMI with the version before.

        Raises MissingRows, naming damaged files too, and ValueError.
        """
        start = time.perf_counter()
        self._calls.clear()
        self._sent = self._received = 0
        try:
            snapshot, metrics = mine(self._counted, self._rows, version, needs, self._mining, self._seed, previous)
        except MissingRows as missing:
            damaged = [text for text in self._fan_out("refused", version) if text]
            raise MissingRows("; ".join([str(missing), *damaged])) from None
        seconds = time.perf_counter() - start
        before = self._last if previous is None else tuple(a.cpu().numpy() for a in previous.assignment)
        self._last = tuple(a.numpy() for a in snapshot.assignment)
        clustering = sum(metrics.get(f"index/{name}_seconds", 0.0) for name in ("kmeans", "assign"))
        metrics |= {
            "mining/seconds": seconds,
            "mining/rows_per_s": self._rows / max(clustering, 1e-9) if needs.clusterings else 0.0,
            "mining/bytes_sent": float(self._sent),
            "mining/bytes_received": float(self._received),
        }
        for i, (old, new) in enumerate(zip(before, self._last, strict=False)):
            if len(old) == len(new):
                metrics[f"mining/{i}/ami"] = drift(old, new)
        return snapshot, metrics

    def progress(self) -> int:
        """Passes over the data made so far by the refresh under way or the last one."""
        return sum(self._calls[name] for name in _PASSES)

    def _counted(self, method: str, *args: Any) -> list[Any]:
        answers = self._fan_out(method, *args)
        self._calls[method] += 1
        self._sent += self._shards * array_bytes(args)
        self._received += array_bytes(answers)
        return answers


def search_rows(
    fan_out: FanOut,
    version: int | None,
    rows: int,
    dim: int,
    features: Any,
    count: int,
    own_Q: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ``count`` of ``rows`` rows nearest to each query (Q, dim): rows and squared L2 distances, both (Q, count).

    Nearest first, equal ones by row. ``version``: None for the newest held. ``own_Q``: a row to leave out of each
    query's answer, -1 for none. Raises MissingRows when rows of the version are missing, ValueError for a wrong width, a
    number that is not finite, or a count that is too large.
    """
    if version is None:
        version = max((v for v in fan_out("held") if v is not None), default=0)
    if missing := sum(fan_out("missing", version)):
        damaged = [text for text in fan_out("refused", version) if text]
        raise MissingRows("; ".join([f"{missing} of {rows} rows of version {version} are not in the index", *damaged]))
    queries_QD = as_features(features, dim)
    check_finite(queries_QD, 0)
    if not 1 <= count <= rows - (own_Q is not None):
        raise ValueError(f"{count} neighbours in {rows} rows: give 1 .. {rows - (own_Q is not None)}")
    sqdist_QK, row_QK = search(fan_out, version, queries_QD, count, own_Q)
    return row_QK, sqdist_QK


def cosines(sqdist_QK: NDArray[np.float64]) -> NDArray[np.float32]:
    """Cosines of unit rows, from their squared distances."""
    return (1.0 - sqdist_QK / 2.0).astype(np.float32)


def array_bytes(value: Any) -> int:
    """Bytes of the arrays in nested tuples and lists."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(map(array_bytes, value)) if isinstance(value, (tuple, list)) else 0
