"""When a run mines: embeds every row, hands the features to the index, and takes the snapshot, now or an epoch later."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from raycon.core import dist, stream
from raycon.core.log import Metrics
from raycon.core.types import Loader, MissingRows, Needs, Runtime, Snapshot
from raycon.methods.base import Method

TRIES = 3


class _Begun(NamedTuple):
    """A refresh whose features are in the index and whose snapshot is not taken yet."""

    version: int
    blocks: list[tuple[int, Any]]
    """(first row, features (n, D)) of this rank's rows: what a lost part of the index is filled with again."""
    embed_seconds: float


class Mining:
    """The snapshots of a run: ``snapshot`` is in force, ``coming`` (with mining.lag = 1) follows it in a later epoch.

    With lag 0 a refresh is begun and waited for at the start of an epoch. With lag 1 it is begun there too, with that
    epoch's features, but is made while the epoch trains on the snapshot before, and comes into force with the next; only
    the first one is waited for. A checkpoint settles it first and holds both snapshots, so when a refresh is ready
    changes nothing of what is computed, and a resumed run equals an undisturbed one.
    """

    def __init__(
        self, method: Method, loader: Loader, runtime: Runtime, metrics: Metrics, lag: int, epochs: int
    ) -> None:
        self.snapshot: Snapshot | None = None
        self.coming: Snapshot | None = None
        self._method, self._loader, self._runtime, self._metrics, self._lag = method, loader, runtime, metrics, lag
        self._epochs = epochs
        self._begun: _Begun | None = None

    def resume(self, snapshot: Snapshot | None, coming: Snapshot | None) -> None:
        """Go on from the snapshots of a checkpoint."""
        self.snapshot, self.coming = snapshot, coming
        self._runtime.index.previous = snapshot if coming is None else coming

    def before_epoch(self, epoch: int, step: int) -> Snapshot | None:
        """The snapshot to train ``epoch`` on (None: none is needed yet); begins a refresh when one is due."""
        self.settle(epoch, step)
        if self.coming is not None and self.coming.version < epoch:
            self.snapshot, self.coming = self.coming, None
        newest = self.snapshot if self.coming is None else self.coming
        if wants_snapshot(self._method.needs, epoch, newest):
            if self._lag == 0 or self.snapshot is None:
                self.snapshot = self._take(self._embed(epoch), epoch, step)
            elif epoch + 1 < self._epochs:  # else no epoch is left to train on it
                self._begun = self._embed(epoch)
                self._runtime.index.begin(epoch, self._method.needs)
        return self.snapshot

    def settle(self, epoch: int, step: int) -> None:
        """Wait for the refresh that was begun, if there is one: it becomes ``coming``."""
        if self._begun is not None:
            self.coming = self._take(self._begun, epoch, step)
            self._begun = None

    @torch.no_grad()
    def _embed(self, version: int) -> _Begun:
        """Embed every row once over the ranks; blocks go to the index as they come.

        Features come from rank 0's BatchNorm statistics on every rank.
        """
        start = time.perf_counter()
        dist.broadcast_buffers(self._method)
        self._method.eval()
        blocks: list[tuple[int, Any]] = []
        row, last = stream.shard_range(self._loader.rows, self._runtime.rank, self._runtime.world)
        try:
            for block in self._loader.scan():
                features = self._method.features(block.images).float().cpu().numpy()
                self._runtime.index.add(version, row, features)
                blocks.append((row, features))
                row += len(features)
        finally:
            self._method.train()
        assert row == last, "a loader scans each of its rank's rows once"
        return _Begun(version, blocks, time.perf_counter() - start)

    def _take(self, begun: _Begun, epoch: int, step: int) -> Snapshot:
        """The snapshot of a refresh. When a part of the index was lost it is filled again with the same features."""
        start = time.perf_counter()
        for attempt in range(TRIES):
            try:
                snapshot, found = self._runtime.index.snapshot(begun.version, self._method.needs)
                break
            except MissingRows as lost:
                if attempt == TRIES - 1:
                    raise
                text = f"a part of the index was lost and is filled again: {lost}"
                self._metrics.write("event", step, epoch=epoch, text=text)
                for first_row, features in begun.blocks:
                    self._runtime.index.add(begun.version, first_row, features)
        assert snapshot.version == begun.version
        waited = time.perf_counter() - start
        sizes = {}
        for i, assignment in enumerate(snapshot.assignment):
            of_size = assignment.bincount(minlength=len(snapshot.prototypes[i])).bincount()
            sizes[f"clusters/{i}/sizes_histogram"] = [[s, n] for s, n in enumerate(of_size.tolist()) if n]
        self._metrics.write(
            "snapshot",
            step,
            epoch=epoch,
            version=begun.version,
            seconds=begun.embed_seconds + waited,  # for which training stood still
            embed_seconds=begun.embed_seconds,
            **found,
            **sizes,
        )
        return snapshot


def wants_snapshot(needs: Needs, epoch: int, newest: Snapshot | None) -> bool:
    """Is a new snapshot due at the start of this epoch? The present one stays in force between refreshes."""
    if not needs.snapshot or epoch < needs.from_epoch or (newest is not None and newest.version == epoch):
        return False
    return newest is None or (epoch - needs.from_epoch) % needs.refresh_epochs == 0
