"""Loops of the index that torch has no fast operation for, compiled for this CPU. Imported only where numba is installed.

They hold no lock of the interpreter, so several threads may each take a part. Shape letters: N rows, Q queries, C
columns compared at a time, K clusters or neighbours, D feature width.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_compiled: Any = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")
_reordered: Any = functools.partial(_compiled, fastmath={"reassoc", "contract"})
"""For sums that may be added up in vectors."""
_CHUNK = 128
"""Scores tested at once for any that is near enough: the test is vectorised, what follows is rare."""


@_compiled
def add_up(
    rows_ND: NDArray[np.float32],
    label_N: NDArray[np.int64],
    magic: float,
    sums_KD: NDArray[np.float64],
    counts_K: NDArray[np.int64],
    first: int,
    last: int,
) -> None:
    """Add columns first .. last of the rows to those of their clusters' sums, and the rows to the counts when first is 0.

    Every number is rounded as ``exact_terms`` rounds it: by adding and subtracting ``magic``.
    """
    for n in range(rows_ND.shape[0]):
        row, total = rows_ND[n, first:last], sums_KD[label_N[n], first:last]
        for d in range(row.size):
            total[d] += (np.float64(row[d]) + magic) - magic
        if first == 0:
            counts_K[label_N[n]] += 1


@_compiled
def keep_nearest(
    score_QC: NDArray[np.float32],
    start: int,
    best_QK: NDArray[np.float32],
    position_QK: NDArray[np.int64],
    first: int,
    last: int,
) -> None:
    """Put scores below the largest of ``best_QK`` into it, for queries first .. last; column c has position start + c.

    Each row of ``best_QK`` is a heap with its largest at place 0; it begins as all infinite.
    """
    count = best_QK.shape[1]
    for q in range(first, last):
        best, position = best_QK[q], position_QK[q]
        limit = best[0]
        for begin in range(0, score_QC.shape[1], _CHUNK):
            scores = score_QC[q, begin : begin + _CHUNK]
            near = np.int32(0)
            for c in range(scores.size):
                near += np.int32(scores[c] < limit)
            if near == 0:
                continue
            for c in range(scores.size):
                score = scores[c]
                if score < limit:
                    place = 0
                    while True:
                        child = 2 * place + 1
                        if child >= count:
                            break
                        if child + 1 < count and best[child + 1] > best[child]:
                            child += 1
                        if best[child] <= score:
                            break
                        best[place], position[place] = best[child], position[child]
                        place = child
                    best[place], position[place] = score, start + begin + c
                    limit = best[0]


@_reordered
def choose_near(
    rows_ND: NDArray[np.float32],
    label_N: NDArray[np.int64],
    centroids_KD: NDArray[np.float32],
    near_KM: NDArray[np.int64],
    chosen_N: NDArray[np.int64],
    first: int,
    last: int,
) -> None:
    """Of rows first .. last: the nearest of their cluster's centroid and of the ``near_KM`` beside it."""
    for n in range(first, last):
        row, label = rows_ND[n], label_N[n]
        best, chosen = np.float32(np.inf), label
        for m in range(-1, near_KM.shape[1]):
            candidate = label if m < 0 else near_KM[label, m]
            centroid, sqdist = centroids_KD[candidate], np.float32(0)
            for d in range(row.size):
                step = row[d] - centroid[d]
                sqdist += step * step
            if sqdist < best:
                best, chosen = sqdist, candidate
        chosen_N[n] = chosen
