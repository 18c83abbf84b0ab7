"""One part of the feature index: the features of a contiguous range of rows, and the passes over them.

Every number it returns is the same however the rows are cut into shards:

* Distances come from calls on blocks of ``BLOCK`` rows that lie on one grid for the whole data set, because a matrix
  product rounds a row differently depending on how many rows there are and where it stands among them (measured with
  OpenBLAS: 0.5 % of the distances). A shard that owns a part of a block computes it with zeros in the other places.
* Sums are of float64 numbers rounded to a grid so coarse that no addition rounds, so that their order cannot matter.

(For equal bits the engine, its number of threads and the kind of CPU must be the same too.)

With ``storage = "fp16"`` the rows are kept rounded, in half the memory, and their float32 originals in a scratch file.
A row's label is then that of its original all the same: by the triangle inequality rounding moves no distance by more
than |x - fp16(x)|, so only rows whose two nearest centroids are closer than that allows are in doubt, and those are
assigned anew from the originals, each at its own place of the grid. Sums of clusters are those of the rounded rows.

Shape letters: N rows of this shard, K clusters or neighbours, D feature width, Q queries, L lists, B rows of a block.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.types import MissingRows
from raycon.index.engine import (
    CPU_BLOCK,
    DeviceName,
    Engine,
    EngineName,
    FaissEngine,
    Nearest,
    TorchEngine,
    add_up,
    choose_near,
    exact_distances,
    load,
    squares,
)

Storage = Literal["fp32", "fp16"]

BLOCK = CPU_BLOCK
_CHECK = 4096
_SPARE = 4
"""Candidates searched beyond K: float32 distances may order near ties wrongly, exact ones then decide."""
_CHUNK = 64
"""Blocks whose doubtful rows are assigned anew together (fp16)."""
_HALF_MAX = 65504.0
_SEARCH_ROWS = 32_768
"""Rows converted to float32 at a time (fp16)."""


class State(NamedTuple):
    missing: int
    """Rows not yet handed over for the version asked."""
    radius: float
    """Largest norm of a row; 0 when rows are missing."""


class Step(NamedTuple):
    """What one pass of k-means returns: float64 sums that are exact, whatever their order."""

    sums_KD: NDArray[np.float64]
    counts_K: NDArray[np.int64]
    objective: float
    """Sum of the squared distances of the rows to their centroids."""


class Move(NamedTuple):
    """What one pass among near clusters returns: exact sums, and how many rows changed their cluster."""

    sums_KD: NDArray[np.float64]
    counts_K: NDArray[np.int64]
    moved: int


def as_features(features: Any, dim: int) -> NDArray[np.float32]:
    """(n, dim) float32 C-contiguous, of a tensor or an array; copied only when needed. Raises ValueError."""
    if isinstance(features, torch.Tensor):
        features = features.detach().cpu().numpy()
    array: NDArray[np.float32] = np.ascontiguousarray(features, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != dim:
        raise ValueError(f"features of shape {tuple(array.shape)}: expected (n, {dim})")
    return array


def check_finite(features_ND: NDArray[np.float32], first_row: int) -> None:
    """Raises ValueError naming the first row that holds a NaN or an infinity."""
    for start in range(0, len(features_ND), _CHECK):
        finite_N = np.isfinite(features_ND[start : start + _CHECK]).all(1)
        if not finite_N.all():
            row = first_row + start + int(np.argmin(finite_N))
            raise ValueError(
                f"the features of row {row} are not finite: the encoder diverged or its input was bad; "
                "lower the learning rate or look at that image"
            )


def rounding(bound: float) -> float:
    """What ``exact_terms`` adds and subtracts."""
    return 1.5 * 2.0 ** (math.frexp(bound)[1] + 1)


def exact_terms(values: torch.Tensor, bound: float) -> torch.Tensor:
    """float64 values rounded to the finest grid on which every sum of magnitude <= ``bound`` is exact.

    The spacing is at most 2^-50 of the bound: 3e-11 for 60,000 unit rows, 1/250 of the float32 spacing of a coordinate
    of 0.1. Adding and subtracting a large constant rounds to it; no value may exceed the bound.
    """
    magic = rounding(bound)
    return values.double().add_(magic).sub_(magic)


class Doubt(NamedTuple):
    """How often rounded rows (fp16) left a label in doubt, since the last call."""

    rescored: int
    assigned: int


class Shard:
    """Owns rows ``first_row .. last_row``. Not thread-safe: one caller at a time.

    ``threads``: CPU threads of the engine's calls. Passes over the features raise MissingRows unless all rows of the
    version asked for are there, so features of different versions never mix.
    """

    def __init__(
        self,
        first_row: int,
        last_row: int,
        dim: int,
        threads: int = 1,
        engine: EngineName = "auto",
        device: DeviceName = "cpu",
        storage: Storage = "fp32",
    ) -> None:
        assert 0 <= first_row <= last_row
        assert min(dim, threads) >= 1
        self.first_row, self.last_row, self.dim, self.threads = first_row, last_row, dim, threads
        self.engine: Engine = load(engine, device)
        self._plain = self.engine if isinstance(self.engine, TorchEngine) else TorchEngine()
        self._version: int | None = None
        self._puts = 0
        self._half = storage == "fp16"
        # Memory is taken with the first put.
        self._features_ND: NDArray[Any] = np.empty((0, dim), dtype=np.float16 if self._half else np.float32)
        self._exact_ND: NDArray[np.float32] | None = None
        self._error_N = np.empty(0, dtype=np.float32)
        self._squares_N = np.empty(0, dtype=np.float32)  # squared norms of the rows (fp32)
        self._filled_N = np.zeros(last_row - first_row, dtype=bool)
        self._radius = 0.0  # at least the largest norm of a row (fp16)
        self._rescored = self._assigned_rows = 0
        self._lists: tuple[Any, NDArray[np.int64], NDArray[np.int64]] | None = None  # of which features, rows, ends
        self._moving: tuple[Any, NDArray[np.int32]] | None = None  # of which features, clusters of this shard's rows
        self._graph: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return self.last_row - self.first_row

    def put(self, version: int, first_row: int, features: Any) -> None:
        """Store features of rows ``first_row ..``; another version forgets all rows. Repeating it is harmless.

        Raises ValueError for rows outside this shard, a wrong width, a number that is not finite or, for fp16, one
        above 65504; OSError when the scratch file of fp16 finds no space.
        """
        block = as_features(features, self.dim)
        start, stop = first_row - self.first_row, first_row + len(block) - self.first_row
        if start < 0 or stop > len(self):
            raise ValueError(
                f"rows {first_row} .. {first_row + len(block)} do not lie in this shard's {self.first_row} .. {self.last_row}"
            )
        check_finite(block, first_row)
        if self._half and len(block) and float(np.abs(block).max()) > _HALF_MAX:
            raise ValueError(
                f"a feature of rows {first_row} .. {first_row + len(block)} is above {_HALF_MAX:g}, the most that fp16 "
                "holds: scale the features, or use mining.storage = fp32"
            )
        if len(self._features_ND) != len(self):
            self._allocate()
        if version != self._version:
            self._version = version
            self._filled_N[:] = False
            self._radius = 0.0
            self._lists = self._graph = None
        self._features_ND[start:stop] = block
        if self._exact_ND is None:
            self._squares_N[start:stop] = squares(block)
        else:
            self._exact_ND[start:stop] = block
            for first in range(0, len(block), _CHECK):
                rows = block[first : first + _CHECK].astype(np.float64)
                self._radius = max(self._radius, float(np.einsum("nd,nd->n", rows, rows).max()) ** 0.5)
                rows -= self._features_ND[start + first : start + first + len(rows)]
                error = np.sqrt(np.einsum("nd,nd->n", rows, rows))
                self._error_N[start + first : start + first + len(rows)] = np.nextafter(error.astype(np.float32), 1)
        self._filled_N[start:stop] = True
        self._puts += 1

    def state(self, version: int) -> State:
        missing = self.missing(version)
        radius = 0.0
        if not missing and self._exact_ND is None:
            radius = float(self._squares_N.max(initial=0)) ** 0.5
        elif not missing:
            for start in range(0, len(self), _CHECK):
                rows = self._rows(start, start + _CHECK)
                radius = max(radius, float(np.einsum("nd,nd->n", rows, rows).max()) ** 0.5)
        return State(missing, radius)

    def missing(self, version: int) -> int:
        """How many rows of ``version`` have not been handed over."""
        return len(self) - int(np.count_nonzero(self._filled_N)) if version == self._version else len(self)

    def stamp(self) -> tuple[int | None, int]:
        """Changes whenever features do: the version held, and how many blocks were handed over so far."""
        return self._version, self._puts

    def features(self, version: int, first_row: int, last_row: int) -> NDArray[np.float32]:
        """The features (last_row - first_row, D) of some of this shard's rows, as they were handed over."""
        self._require(version)
        assert self.first_row <= first_row <= last_row <= self.last_row
        source = self._features_ND if self._exact_ND is None else self._exact_ND
        return np.array(source[first_row - self.first_row : last_row - self.first_row], dtype=np.float32)

    def step(self, version: int, centroids_KD: NDArray[np.float32], total_rows: int, radius: float) -> Step:
        """Assign every row to its nearest centroid and add up the clusters: ``steps`` of one clustering."""
        return self.steps(version, centroids_KD, (len(centroids_KD),), total_rows, radius)[0]

    def steps(
        self,
        version: int,
        centroids_KD: NDArray[np.float32],
        sizes: Sequence[int],
        total_rows: int,
        radius: float,
        slice_of: tuple[int, int] = (0, 1),
        weight_K: NDArray[np.float64] | None = None,
    ) -> list[Step]:
        """One pass of k-means for several clusterings, whose centroids (``sizes`` each) lie one after the other.

        ``total_rows`` and ``radius`` (largest norm) are those of the whole data set: they fix the grid of the sums.
        ``slice_of = (first, stride)``: only the data set's rows first, first + stride, ... take part. ``weight_K``: of
        each centroid, added to its squared distances when rows choose; the objective is without it.
        """
        ends = np.cumsum([0, *sizes])
        device = self.engine.device if weight_K is None else self._plain.device
        parts = [centroids_KD[a:b] for a, b in itertools.pairwise(ends)]
        sums = [torch.zeros(part.shape, dtype=torch.float64, device=device) for part in parts]
        counts = [torch.zeros(len(part), dtype=torch.int64, device=device) for part in parts]
        objectives = [torch.zeros((), dtype=torch.float64, device=device) for _ in parts]
        reaches = [radius + float(np.einsum("kd,kd->k", part, part).max()) ** 0.5 for part in parts]
        scratch: list[Tensor] = []
        grid = rounding(total_rows * radius)
        for _, rows, answers in self._assigned(version, parts, slice_of, weight_K):
            for i, (sqdist_B, label_B) in enumerate(answers):
                add_up(rows, label_B, grid, sums[i], counts[i], scratch)
                objectives[i] += exact_terms(sqdist_B, total_rows * reaches[i] ** 2).sum()
        return [
            Step(s.cpu().numpy(), c.cpu().numpy(), float(o)) for s, c, o in zip(sums, counts, objectives, strict=True)
        ]

    def assign(
        self, version: int, centroids_KD: NDArray[np.float32], weight_K: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest centroid of every row (N,) and the squared distance to it (N,); ``weight_K`` as in ``steps``."""
        label_N = np.empty(len(self), dtype=np.int64)
        sqdist_N = np.empty(len(self), dtype=np.float32)
        for first, rows, ((sqdist_B, label_B),) in self._assigned(version, [centroids_KD], (0, 1), weight_K):
            label_N[first : first + len(rows)] = label_B.cpu().numpy()
            sqdist_N[first : first + len(rows)] = sqdist_B.cpu().numpy()
        return label_N, sqdist_N

    def label_sums(self, version: int, label_all: NDArray[np.int64], k: int, total_rows: int, radius: float) -> Step:
        """The sums and counts under given labels of all rows of the data set (total_rows,), 0 <= label < k."""
        self._require(version)
        label_N = label_all[self.first_row : self.last_row]
        sums_KD, counts_K = torch.zeros(k, self.dim, dtype=torch.float64), torch.zeros(k, dtype=torch.int64)
        scratch: list[Tensor] = []
        for start in range(0, len(self), BLOCK):
            rows, label = (
                torch.from_numpy(self._rows(start, start + BLOCK)),
                torch.tensor(label_N[start : start + BLOCK]),
            )
            add_up(rows, label, rounding(total_rows * radius), sums_KD, counts_K, scratch)
        return Step(sums_KD.numpy(), counts_K.numpy(), math.nan)

    def move(
        self,
        version: int,
        label_PA: NDArray[np.int32] | None,
        centroids_KD: NDArray[np.float32],
        near_KM: NDArray[np.int32],
        total_rows: int,
        radius: float,
    ) -> Move:
        """A pass in which a row looks only at its cluster and at those beside it, for several (P) clusterings at once.

        ``label_PA``: the present cluster of every row of the data set (A = total_rows), by its place in
        ``centroids_KD``, where the clusterings lie one after the other; None: where the last pass left it (the shard keeps
        its rows' part, so that labels travel once). ``near_KM``: the clusters beside each. Raises MissingRows also when
        that part was lost with an actor.
        """
        self._require(version)
        if label_PA is not None:
            self._moving = (self.stamp(), label_PA[:, self.first_row : self.last_row].copy())
        if self._moving is None or self._moving[0] != self.stamp():
            raise MissingRows(f"the clusters of rows {self.first_row} .. {self.last_row} were lost in a warm start")
        label_PN = self._moving[1]
        device, moved = self.engine.device, 0
        centroids, near = (
            torch.tensor(centroids_KD, device=device),
            torch.tensor(near_KM, dtype=torch.int64, device=device),
        )
        sums_KD = torch.zeros(centroids.shape, dtype=torch.float64, device=device)
        counts_K = torch.zeros(len(centroids), dtype=torch.int64, device=device)
        scratch: list[Tensor] = []
        for start in range(0, len(self), BLOCK):
            rows = torch.from_numpy(self._rows(start, start + BLOCK)).to(device)
            for label_N in label_PN[:, start : start + len(rows)]:
                label = torch.tensor(label_N, dtype=torch.int64, device=device)
                label = choose_near(rows, label, centroids, near)
                add_up(rows, label, rounding(total_rows * radius), sums_KD, counts_K, scratch)
                chosen_N = label.cpu().numpy()
                moved += int(np.count_nonzero(chosen_N != label_N))
                label_N[:] = chosen_N
        return Move(sums_KD.cpu().numpy(), counts_K.cpu().numpy(), moved)

    def gather(self, version: int, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Of the data set's rows asked for: where in ``rows`` this shard's are (n,), and their features (n, D)."""
        self._require(version)
        mine = np.flatnonzero((rows >= self.first_row) & (rows < self.last_row))
        if not len(mine):
            return mine, np.empty((0, self.dim), np.float32)
        source = self._features_ND if self._exact_ND is None else self._exact_ND
        return mine, source[rows[mine] - self.first_row]

    def search(
        self, version: int, queries_QD: NDArray[np.float32], own_Q: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The nearest of this shard's rows to each query: squared distances in float64 and rows, both (Q, <=count).

        Sorted by (distance, row). ``own_Q`` is the row each query is itself (left out of its result), -1 for none.
        Where the shard has fewer rows than asked, the places left over hold distance inf and row -1. With fp16 the
        candidates come from the rounded rows, the distances from the originals.
        """
        self._require(version)
        wanted = min(count + 1 + _SPARE, len(self))
        if wanted == 0:
            return np.empty((len(queries_QD), 0)), np.empty((len(queries_QD), 0), dtype=np.int64)
        self.engine.use_threads(self.threads)
        position_QK = self._candidates(queries_QD, wanted)
        source = self._features_ND if self._exact_ND is None else self._exact_ND
        sqdist_QK = exact_distances(queries_QD, source, position_QK)
        row_QK = position_QK + self.first_row
        self_QK = row_QK == own_Q[:, None]
        sqdist_QK[self_QK], row_QK[self_QK] = math.inf, -1
        order = np.lexsort((row_QK, sqdist_QK))[:, :count]
        return np.take_along_axis(sqdist_QK, order, 1), np.take_along_axis(row_QK, order, 1)

    def assign_below(
        self,
        version: int,
        coarse_GD: NDArray[np.float32],
        centroids_KD: NDArray[np.float32],
        ends_G: NDArray[np.int64],
        probes: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """``assign`` among the centroids below the ``probes`` coarse centroids that are nearest to a row.

        Those below coarse centroid g end at ``ends_G[g]``. Approximate: the nearest of all may lie below another.
        """
        self._require(version)
        self.engine.use_threads(self.threads)
        label_N, sqdist_N = np.zeros(len(self), dtype=np.int64), np.full(len(self), np.inf, dtype=np.float32)
        near = [self.engine.nearest(centroids_KD[a:b]) for a, b in itertools.pairwise([0, *ends_G])]
        for start in range(0, len(self), _SEARCH_ROWS):
            rows = self._rows(start, start + _SEARCH_ROWS)
            group_BP = self.engine.search(rows, coarse_GD, min(probes, len(coarse_GD)))[1]
            order = np.argsort(group_BP, axis=None, kind="stable")
            counts_G = np.bincount(group_BP.ravel(), minlength=len(coarse_GD))
            for group, (a, b) in enumerate(itertools.pairwise(np.cumsum([0, *counts_G]))):
                first = int(ends_G[group - 1]) if group else 0
                for part in range(a, b, self.engine.block):
                    which = order[part : min(part + self.engine.block, b)] // group_BP.shape[1]
                    found = near[group](torch.from_numpy(rows[which]).to(self.engine.device))
                    sqdist = found.sqdist_N.cpu().numpy()
                    closer = sqdist < sqdist_N[start + which]
                    sqdist_N[start + which[closer]] = sqdist[closer]
                    label_N[start + which[closer]] = first + found.label_N.cpu().numpy()[closer]
        return label_N, sqdist_N

    def lists(
        self, version: int, centroids_LD: NDArray[np.float32], top: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Sort this shard's rows into the lists of their nearest centroids, for ``search_lists``.

        Returns the list of each row (N,), and (L, L): how near one list is to the rows of another, the sum over those
        rows of 1 for their nearest list, 1/2 for the second, ... 1/top.
        """
        self._require(version)
        self.engine.use_threads(self.threads)
        count = len(centroids_LD)
        list_N, interest = np.empty(len(self), dtype=np.int32), np.zeros(count * count)
        for start in range(0, len(self), _SEARCH_ROWS):
            near_BT = self.engine.search(self._rows(start, start + _SEARCH_ROWS), centroids_LD, min(top, count))[1]
            list_N[start : start + len(near_BT)] = near_BT[:, 0]
            weight_BT = np.broadcast_to(1 / np.arange(1, near_BT.shape[1] + 1), near_BT.shape)
            pair_BT = near_BT[:, :1] * count + near_BT
            interest += np.bincount(pair_BT.ravel(), weight_BT.ravel(), minlength=count * count)
        ends_L = np.cumsum(np.bincount(list_N, minlength=count))
        self._lists = (self.stamp(), np.argsort(list_N, kind="stable"), ends_L)
        return list_N, interest.reshape(count, count)

    def search_lists(
        self,
        version: int,
        queries_QD: NDArray[np.float32],
        own_Q: NDArray[np.int64],
        groups: Sequence[int],
        picks: Sequence[NDArray[np.int64]],
        count: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest rows to each query within some lists, the row it is itself left out: both (Q, count).

        The queries come in groups of ``groups`` each, and those of group i are compared with the rows of the lists
        ``picks[i]``. Squared distances (float32, of the stored rows) and rows, nearest first; where there are fewer,
        inf and -1. Raises MissingRows when features came since ``lists``.
        """
        self._require(version)
        if self._lists is None or self._lists[0] != self.stamp():
            raise MissingRows(f"the lists of rows {self.first_row} .. {self.last_row} are not of version {version}")
        _, order, ends_L = self._lists
        starts_L = np.concatenate([[0], ends_L[:-1]])
        self.engine.use_threads(self.threads)
        sqdist_QK = np.full((len(queries_QD), count + 1), np.inf, dtype=np.float32)
        row_QK = np.full((len(queries_QD), count + 1), -1, dtype=np.int64)
        memory = np.empty((0, self.dim), dtype=self._features_ND.dtype)  # of one group: fresh memory costs page faults
        for (a, b), lists in zip(itertools.pairwise(np.cumsum([0, *groups])), picks, strict=True):
            members = np.concatenate([order[starts_L[n] : ends_L[n]] for n in lists])
            found = min(count + 1, len(members))
            if found == 0 or a == b:
                continue
            if len(memory) < len(members):
                memory = np.empty((len(members), self.dim), dtype=self._features_ND.dtype)
            rows = memory[: len(members)]
            np.take(self._features_ND, members, axis=0, out=rows, mode="clip")  # clip: else it makes a copy first
            rows = rows.astype(np.float32, copy=False)
            sqdist_QK[a:b, :found], position = self._plain.search(
                queries_QD[a:b], rows, found
            )  # few: faster than faiss
            row_QK[a:b, :found] = members[position] + self.first_row
        return _without_self(sqdist_QK, row_QK, own_Q)

    def search_graph(
        self, version: int, queries_QD: NDArray[np.float32], own_Q: NDArray[np.int64], count: int, breadth: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """``search_lists`` by an HNSW graph of this shard's rows, which is built at the first call for a version.

        ``breadth``: candidates kept during the search (efSearch). The graph holds a float32 copy of the rows and 256
        bytes of links for each. Needs faiss.
        """
        self._require(version)
        engine = self.engine if isinstance(self.engine, FaissEngine) else FaissEngine()
        engine.use_threads(self.threads)
        if self._graph is None or self._graph[0] != self.stamp():
            self._graph = (self.stamp(), engine.graph(self._rows(0, len(self))))
        sqdist_QK, row_QK = self._graph[1](queries_QD, count + 1, max(breadth, count + 1))
        row_QK = np.where(row_QK >= 0, row_QK + self.first_row, -1)
        sqdist_QK = np.where(row_QK >= 0, sqdist_QK, np.float32(np.inf))
        return _without_self(sqdist_QK, row_QK, own_Q)

    def doubt(self) -> Doubt:
        """The rows assigned anew and all rows assigned (clusterings x passes x rows) since the last call."""
        found = Doubt(self._rescored, self._assigned_rows)
        self._rescored = self._assigned_rows = 0
        return found

    # --- inside ---

    def _allocate(self) -> None:
        self._features_ND = np.empty((len(self), self.dim), dtype=self._features_ND.dtype)
        if not self._half:
            self._squares_N = np.empty(len(self), dtype=np.float32)
            return
        size = max(len(self) * self.dim * 4, 1)
        self._error_N = np.zeros(len(self), dtype=np.float32)
        with tempfile.TemporaryFile(prefix="raycon-index-") as file:  # has no name: gone with this process
            try:
                _reserve(file.fileno(), size)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"mining.storage = fp16 keeps {size / 1e6:.0f} MB of exact features in a scratch file, for which "
                    f"{tempfile.gettempdir()} has no room: set TMPDIR to another folder, or use fp32",
                ) from None
            self._exact_ND = np.memmap(file, dtype=np.float32, mode="r+", shape=(len(self), self.dim))

    def _rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Float32 rows by their position in this shard: a view, or a copy when they are stored as fp16."""
        return self._features_ND[start:stop].astype(np.float32, copy=False)

    def _candidates(self, queries_QD: NDArray[np.float32], wanted: int) -> NDArray[np.int64]:
        """(Q, wanted) positions of the nearest stored rows by the engine's distances."""
        if not self._half:
            return self.engine.search(queries_QD, self._features_ND, wanted)[1]
        best_QK, position_QK = np.empty((len(queries_QD), 0), np.float32), np.empty((len(queries_QD), 0), np.int64)
        for start in range(0, len(self), _SEARCH_ROWS):
            rows = self._rows(start, start + _SEARCH_ROWS)
            sqdist, position = self.engine.search(queries_QD, rows, min(wanted, len(rows)))
            best_QK = np.concatenate([best_QK, sqdist], axis=1)
            position_QK = np.concatenate([position_QK, position + start], axis=1)
            order = np.argsort(best_QK, axis=1, kind="stable")[:, :wanted]
            best_QK, position_QK = np.take_along_axis(best_QK, order, 1), np.take_along_axis(position_QK, order, 1)
        return position_QK

    def _require(self, version: int) -> None:
        missing = self.missing(version)
        if missing:
            raise MissingRows(
                f"{missing} of rows {self.first_row} .. {self.last_row} of version {version} are not in the index"
            )

    def _assigned(
        self,
        version: int,
        parts: Sequence[NDArray[np.float32]],
        slice_of: tuple[int, int],
        weight_K: NDArray[np.float64] | None,
    ) -> Iterator[tuple[int, Tensor, list[tuple[Tensor, Tensor]]]]:
        """Block after block of this shard's rows: (position of the first among those taking part, rows, per part of
        the centroids (squared distances, labels)), on the device of the engine."""
        self._require(version)
        self.engine.use_threads(self.threads)
        engine: Engine = self.engine
        near: list[Nearest]
        if weight_K is None:
            near = [engine.nearest(part, second=self._half) for part in parts]
        else:
            engine = self._plain
            ends = np.cumsum([0, *map(len, parts)])
            near = [
                self._plain.nearest(part, second=False, weight_K=weight_K[a:b])
                for part, (a, b) in zip(parts, itertools.pairwise(ends), strict=True)
            ]
        first, stride = slice_of
        low, high = (max(0, -(-(row - first) // stride)) for row in (self.first_row, self.last_row))
        blocks = [
            (max(b, low), min(b + engine.block, high), b)
            for b in range(low // engine.block * engine.block, high, engine.block)
        ]
        chunk = _CHUNK if self._half and weight_K is None else 1
        for start in range(0, len(blocks), chunk):
            chosen = blocks[start : start + chunk]
            found = (
                [self._labels(chosen, slice_of, c, n) for c, n in zip(parts, near, strict=True)] if chunk > 1 else []
            )
            done = 0
            for a, b, grid in chosen:
                rows = self._taking_part(a, b, slice_of)
                if chunk > 1:
                    tensor = torch.from_numpy(rows).to(engine.device)
                    answers = [(f[0][done : done + b - a], f[1][done : done + b - a]) for f in found]
                else:
                    block = torch.from_numpy(_placed(rows, a - grid, engine.block)).to(engine.device)
                    inside, norms = slice(a - grid, b - grid), None
                    if len(rows) == engine.block and stride == 1 and not self._half:
                        known_N = self._squares_N[a - self.first_row : b - self.first_row]
                        norms = torch.from_numpy(known_N).to(engine.device)
                    answers = [(f.sqdist_N[inside], f.label_N[inside]) for f in (n(block, norms) for n in near)]
                    tensor = block[inside]
                yield a - low, tensor, answers
                done += b - a

    def _taking_part(self, start: int, stop: int, slice_of: tuple[int, int]) -> NDArray[np.float32]:
        """Float32 rows by their number among those that take part."""
        first, stride = slice_of
        a = first + start * stride - self.first_row
        rows = self._features_ND[a : a + (stop - start) * stride : stride]
        return np.ascontiguousarray(rows, dtype=np.float32)

    def _labels(
        self,
        blocks: list[tuple[int, int, int]],
        slice_of: tuple[int, int],
        centroids: NDArray[np.float32],
        near: Nearest,
    ) -> tuple[Tensor, Tensor]:
        """Squared distances and labels of rounded rows; those in doubt come from the originals."""
        engine = self.engine
        reach = self._radius + float(np.einsum("kd,kd->k", centroids, centroids).max()) ** 0.5
        # |x|^2 + |c|^2 - 2 x.c is at most reach^2 in every term; sums of D products round by sqrt(D) units or so.
        slack = (8 + self.dim**0.5) * 2.0**-24 * reach**2
        first, stride = slice_of
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for a, b, grid in blocks:
            block = torch.from_numpy(_placed(self._taking_part(a, b, slice_of), a - grid, engine.block))
            answer = near(block.to(engine.device))
            assert answer.second_N is not None
            inside = slice(a - grid, b - grid)
            found.append((answer.sqdist_N[inside], answer.label_N[inside], answer.second_N[inside]))
        start, stop = blocks[0][0], blocks[-1][1]
        position_N = first + np.arange(start, stop) * stride - self.first_row
        best_N, label_N, second_N = (torch.cat(list(parts)) for parts in zip(*found, strict=True))
        doubt_U = np.flatnonzero(
            _in_doubt(best_N.cpu().numpy(), second_N.cpu().numpy(), self._error_N[position_N], slack)
        )
        self._rescored += len(doubt_U)
        self._assigned_rows += stop - start
        assert self._exact_ND is not None
        # Each at its own place of the grid: its bits are then those that fp32 storage gives.
        slot_U = (start + doubt_U) % engine.block
        order = np.argsort(slot_U, kind="stable")
        doubt_U, slot_U = doubt_U[order], slot_U[order]
        turn_U = np.arange(len(slot_U)) - np.searchsorted(slot_U, slot_U)  # of several at one place
        for turn in range(int(turn_U.max(initial=-1)) + 1):
            which_U, place_U = doubt_U[turn_U == turn], slot_U[turn_U == turn]
            block_BD = np.zeros((engine.block, self.dim), dtype=np.float32)
            block_BD[place_U] = self._exact_ND[position_N[which_U]]
            answer = near(torch.from_numpy(block_BD).to(engine.device))
            best_N[torch.from_numpy(which_U)] = answer.sqdist_N[torch.from_numpy(place_U)]
            label_N[torch.from_numpy(which_U)] = answer.label_N[torch.from_numpy(place_U)]
        return best_N, label_N


def _in_doubt(
    best_N: NDArray[np.float32], second_N: NDArray[np.float32], error_N: NDArray[np.float32], slack: float
) -> NDArray[np.bool_]:
    """Rows whose original may have another nearest centroid than the rounded row, as float32 computes it.

    ``best_N`` and ``second_N``: squared distances of the rounded row to its two nearest; ``error_N``: how far rounding
    moved the row; ``slack``: how far off float32 squared distances may be.
    """
    farthest_N = np.sqrt(best_N.astype(np.float64) + slack) + error_N
    nearest_N = np.maximum(np.sqrt(np.maximum(second_N.astype(np.float64) - slack, 0)) - error_N, 0)
    return np.asarray(nearest_N**2 - farthest_N**2 <= 2 * slack)


def _without_self(
    sqdist_QK: NDArray[np.float32], row_QK: NDArray[np.int64], own_Q: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One column less, the order kept: each query's own row, or else the farthest, is left out."""
    drop_QK = (row_QK == own_Q[:, None]) & (row_QK >= 0)
    drop_QK[:, -1] |= ~drop_QK.any(1)
    shape = (len(row_QK), row_QK.shape[1] - 1)
    return sqdist_QK[~drop_QK].reshape(shape), row_QK[~drop_QK].reshape(shape)


def _placed(rows_ND: NDArray[np.float32], start: int, size: int) -> NDArray[np.float32]:
    """The rows at ``start`` of a block of ``size``, zeros elsewhere; the rows themselves when they fill it."""
    if len(rows_ND) == size:
        return rows_ND
    block_BD = np.zeros((size, rows_ND.shape[1]), dtype=np.float32)
    block_BD[start : start + len(rows_ND)] = rows_ND
    return block_BD


def _reserve(file: int, size: int) -> None:
    """Space on the disk now, rather than a bus error when it is written to later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)
