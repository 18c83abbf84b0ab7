"""One part of the feature index: the features of a contiguous range of rows, and the passes over them.

Every number it returns is the same however the rows are cut into shards:

* Distances come from calls on blocks of ``BLOCK`` rows that lie on one grid for the whole data set, because a matrix
  product rounds a row differently depending on how many rows there are and where it stands among them (measured with
  OpenBLAS: 0.5 % of the distances). A shard that owns a part of a block computes it with zeros in the other places.
* Sums are of float64 numbers rounded to a grid so coarse that no addition rounds, so that their order cannot matter.

(For equal bits the engine, its number of threads and the kind of CPU must be the same too.)

Shape letters: N rows of this shard, K clusters or neighbours, D feature width, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raycon.core.types import MissingRows
from raycon.index.engine import EngineName, load

BLOCK = 1024
_CHECK = 4096
_SPARE = 4
"""Candidates searched beyond K: float32 distances may order near ties wrongly, exact ones then decide."""


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


def exact_terms(values: torch.Tensor, bound: float) -> torch.Tensor:
    """float64 values rounded to the finest grid on which every sum of magnitude <= ``bound`` is exact.

    The spacing is at most 2^-50 of the bound: 3e-11 for 60,000 unit rows, 1/250 of the float32 spacing of a coordinate
    of 0.1. Adding and subtracting a large constant rounds to it; no value may exceed the bound.
    """
    magic = 1.5 * 2.0 ** (math.frexp(bound)[1] + 1)
    return values.double().add_(magic).sub_(magic)


class Shard:
    """Owns rows ``first_row .. last_row``. Not thread-safe: one caller at a time.

    ``threads``: CPU threads of the engine's calls. Passes over the features raise MissingRows unless all rows of the
    version asked for are there, so features of different versions never mix.
    """

    def __init__(self, first_row: int, last_row: int, dim: int, threads: int = 1, engine: EngineName = "auto") -> None:
        assert 0 <= first_row <= last_row
        assert min(dim, threads) >= 1
        self.first_row, self.last_row, self.dim, self.threads = first_row, last_row, dim, threads
        self.engine = load(engine)
        self._version: int | None = None
        self._puts = 0
        self._features_ND = np.empty((0, dim), dtype=np.float32)  # memory is taken with the first put
        self._filled_N = np.zeros(last_row - first_row, dtype=bool)

    def __len__(self) -> int:
        return self.last_row - self.first_row

    def put(self, version: int, first_row: int, features: Any) -> None:
        """Store features of rows ``first_row ..``; another version forgets all rows. Repeating it is harmless.

        Raises ValueError for rows outside this shard, a wrong width, or a number that is not finite.
        """
        block = as_features(features, self.dim)
        start, stop = first_row - self.first_row, first_row + len(block) - self.first_row
        if start < 0 or stop > len(self):
            raise ValueError(
                f"rows {first_row} .. {first_row + len(block)} do not lie in this shard's {self.first_row} .. {self.last_row}"
            )
        check_finite(block, first_row)
        if len(self._features_ND) != len(self):
            self._features_ND = np.empty((len(self), self.dim), dtype=np.float32)
        if version != self._version:
            self._version = version
            self._filled_N[:] = False
        self._features_ND[start:stop] = block
        self._filled_N[start:stop] = True
        self._puts += 1

    def state(self, version: int) -> State:
        missing = self.missing(version)
        radius = 0.0
        if not missing:
            for start in range(0, len(self), _CHECK):
                rows = self._features_ND[start : start + _CHECK]
                radius = max(radius, float(np.einsum("nd,nd->n", rows, rows).max()) ** 0.5)
        return State(missing, radius)

    def missing(self, version: int) -> int:
        """How many rows of ``version`` have not been handed over."""
        return len(self) - int(np.count_nonzero(self._filled_N)) if version == self._version else len(self)

    def stamp(self) -> tuple[int | None, int]:
        """Changes whenever features do: the version held, and how many blocks were handed over so far."""
        return self._version, self._puts

    def step(self, version: int, centroids_KD: NDArray[np.float32], total_rows: int, radius: float) -> Step:
        """Assign every row to its nearest centroid and add up the clusters.

        ``total_rows`` and ``radius`` (largest norm) are those of the whole data set: they fix the grid of the sums.
        """
        sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.float64)
        counts_K = np.zeros(len(centroids_KD), dtype=np.int64)
        objective = 0.0
        reach = radius + float(np.einsum("kd,kd->k", centroids_KD, centroids_KD).max()) ** 0.5
        for rows, sqdist_B, label_B in self._assigned(version, centroids_KD):
            terms = exact_terms(torch.from_numpy(rows), total_rows * radius)
            sums_KD.index_add_(0, torch.from_numpy(label_B), terms)
            counts_K += np.bincount(label_B, minlength=len(counts_K))
            objective += float(exact_terms(torch.from_numpy(sqdist_B), total_rows * reach**2).sum())
        return Step(sums_KD.numpy(), counts_K, objective)

    def assign(self, version: int, centroids_KD: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest centroid of every row (N,) and the squared distance to it (N,)."""
        label_N = np.empty(len(self), dtype=np.int64)
        sqdist_N = np.empty(len(self), dtype=np.float32)
        start = 0
        for rows, sqdist_B, label_B in self._assigned(version, centroids_KD):
            label_N[start : start + len(rows)], sqdist_N[start : start + len(rows)] = label_B, sqdist_B
            start += len(rows)
        return label_N, sqdist_N

    def label_sums(self, version: int, label_all: NDArray[np.int64], k: int, total_rows: int, radius: float) -> Step:
        """The sums and counts under given labels of all rows of the data set (total_rows,), 0 <= label < k."""
        self._require(version)
        label_N = label_all[self.first_row : self.last_row]
        sums_KD = torch.zeros(k, self.dim, dtype=torch.float64)
        for start in range(0, len(self), BLOCK):
            terms = exact_terms(torch.from_numpy(self._features_ND[start : start + BLOCK]), total_rows * radius)
            sums_KD.index_add_(0, torch.tensor(label_N[start : start + BLOCK]), terms)
        return Step(sums_KD.numpy(), np.bincount(label_N, minlength=k), math.nan)

    def gather(self, version: int, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Of the data set's rows asked for: where in ``rows`` this shard's are (n,), and their features (n, D)."""
        self._require(version)
        mine = np.flatnonzero((rows >= self.first_row) & (rows < self.last_row))
        return mine, self._features_ND[rows[mine] - self.first_row] if len(mine) else np.empty(
            (0, self.dim), np.float32
        )

    def search(
        self, version: int, queries_QD: NDArray[np.float32], own_Q: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The nearest of this shard's rows to each query: squared distances in float64 and rows, both (Q, <=count).

        Sorted by (distance, row). ``own_Q`` is the row each query is itself (left out of its result), -1 for none.
        Where the shard has fewer rows than asked, the places left over hold distance inf and row -1.
        """
        self._require(version)
        wanted = min(count + 1 + _SPARE, len(self))
        if wanted == 0:
            return np.empty((len(queries_QD), 0)), np.empty((len(queries_QD), 0), dtype=np.int64)
        self.engine.use_threads(self.threads)
        position_QK = self.engine.search(queries_QD, self._features_ND, wanted)
        sqdist_QK = np.empty(position_QK.shape)
        features = torch.from_numpy(self._features_ND)
        for start in range(0, len(queries_QD), 64):  # small enough for the cache
            query = torch.tensor(queries_QD[start : start + 64])
            near = features[torch.from_numpy(position_QK[start : start + 64])]
            near.sub_(query[:, None]).square_()
            sqdist_QK[start : start + 64] = near.sum(-1, dtype=torch.float64).numpy()
        row_QK = position_QK + self.first_row
        self_QK = row_QK == own_Q[:, None]
        sqdist_QK[self_QK], row_QK[self_QK] = math.inf, -1
        order = np.lexsort((row_QK, sqdist_QK))[:, :count]
        return np.take_along_axis(sqdist_QK, order, 1), np.take_along_axis(row_QK, order, 1)

    def _require(self, version: int) -> None:
        missing = self.missing(version)
        if missing:
            raise MissingRows(
                f"{missing} of rows {self.first_row} .. {self.last_row} of version {version} are not in the index"
            )

    def _assigned(
        self, version: int, centroids_KD: NDArray[np.float32]
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]]:
        """(features, squared distances, labels) of one block of this shard's rows after the other."""
        self._require(version)
        self.engine.use_threads(self.threads)
        nearest = self.engine.nearest(centroids_KD)
        for block in range(self.first_row // BLOCK * BLOCK, self.last_row, BLOCK):
            first, last = max(block, self.first_row), min(block + BLOCK, self.last_row)
            rows = self._features_ND[first - self.first_row : last - self.first_row]
            if len(rows) == BLOCK:
                padded = rows
            else:
                padded = np.zeros((BLOCK, self.dim), dtype=np.float32)
                padded[first - block : last - block] = rows
            sqdist_B, label_B = nearest(padded)
            yield rows, sqdist_B[first - block : last - block], label_B[first - block : last - block]
