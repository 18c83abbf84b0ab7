"""Loops of the index that torch has no fast operation for, compiled for this CPU. Imported only where numba is installed.

They hold no lock of the interpreter, so several threads may each take a part. Shape letters: N rows, Q queries, C
columns compared at a time, K clusters or neighbours, D feature width.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

_compiled: Any = functools.partial(numba.njit, nogil=True, cache=True, error_model="numpy")
_reordered: Any = functools.partial(_compiled, fastmath={"reassoc", "contract"})
"""For sums that may be added up in vectors."""
_vectors: Any = functools.partial(_compiled, fastmath={"nnan", "nsz"})
"""For the lowest of numbers, none of which is NaN."""
_CHUNK, _PART = 128, 32
"""Scores tested at once for any that is near enough, and then parts of them: the tests are vectorised, what follows is rare."""


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


def _lower_of_two(_typing: Any, _a: Any, _b: Any) -> Any:
    """The lower of two float32, with flags that let LLVM reduce by vectors: numba's own min keeps it scalar."""

    def code(_context: Any, builder: Any, _signature: Any, numbers: Any) -> Any:
        flags = ["nnan", "nsz"]
        return builder.select(builder.fcmp_ordered("<", *numbers, flags=flags), *numbers, flags=flags)

    return numba.float32(numba.float32, numba.float32), code


_lower: Any = intrinsic(_lower_of_two)


@_vectors
def _least(score_C: NDArray[np.float32], offset_C: NDArray[np.float32]) -> np.float32:
    least = np.float32(np.inf)
    for c in range(score_C.size):
        least = _lower(score_C[c] + offset_C[c], least)
    return least


@_vectors
def _find(score_C: NDArray[np.float32], offset_C: NDArray[np.float32], wanted: np.float32) -> int:
    """The first place that has the score, which one has."""
    part = 0
    while part + _PART < score_C.size and _least(score_C[part : part + _PART], offset_C[part : part + _PART]) > wanted:
        part += _PART
    for c in range(part, score_C.size):
        if score_C[c] + offset_C[c] == wanted:
            return c
    return 0  # all are infinite


@_vectors
def take_lowest(
    score_NC: NDArray[np.float32],
    offset_C: NDArray[np.float32],
    start: int,
    best_N: NDArray[np.float32],
    label_N: NDArray[np.int64],
    second_N: NDArray[np.float32],
    first: int,
    last: int,
) -> None:
    """Of rows first .. last: take the lowest score + offset where it is below the best so far; column c has label start + c,
    and of equal ones the lowest column counts.

    ``second_N`` takes the second lowest, the best and the second of earlier columns among them, unless it is empty.
    Overwrites scores.
    """
    columns = score_NC.shape[1]
    for n in range(first, last):
        lowest, at = np.float32(np.inf), 0
        for begin in range(0, columns, _CHUNK):
            least = _least(score_NC[n, begin : begin + _CHUNK], offset_C[begin : begin + _CHUNK])
            if least < lowest:
                lowest, at = least, begin
        if second_N.size == 0 and not lowest < best_N[n]:
            continue
        at += _find(score_NC[n, at : at + _CHUNK], offset_C[at : at + _CHUNK], lowest)
        if second_N.size > 0:
            score_NC[n, at] = np.inf
            other = min(_least(score_NC[n], offset_C), max(lowest, best_N[n]))
            second_N[n] = min(second_N[n], other)
        if lowest < best_N[n]:
            best_N[n], label_N[n] = lowest, start + at


@_compiled
def _put(best: NDArray[np.float32], position: NDArray[np.int64], score: np.float32, where: int) -> None:
    """Put it into a heap with its largest at place 0, in place of that."""
    place, count = 0, best.size
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
    best[place], position[place] = score, where


@_vectors
def keep_nearest(
    score_QC: NDArray[np.float32],
    offset_C: NDArray[np.float32],
    start: int,
    best_QK: NDArray[np.float32],
    position_QK: NDArray[np.int64],
    first: int,
    last: int,
) -> None:
    """Put score + offset into ``best_QK`` where it is below the largest there, for queries first .. last; column c has
    position start + c.

    Each row of ``best_QK`` is a heap with its largest at place 0; it begins as all infinite.
    """
    count, columns = best_QK.shape[1], score_QC.shape[1]
    lane = np.empty(_CHUNK, dtype=np.float32)
    for q in range(first, last):
        best, position = best_QK[q], position_QK[q]
        limit = best[0]
        if limit == np.inf and columns >= 2 * _CHUNK and count < _CHUNK:
            # A bound to begin with, or most of the first scores would go through the heap: every lane has a least score,
            # and the count-th of these is not below the count-th score.
            lane[:] = np.inf
            for begin in range(0, columns, _CHUNK):
                scores, offset = score_QC[q, begin : begin + _CHUNK], offset_C[begin : begin + _CHUNK]
                for c in range(scores.size):
                    lane[c] = _lower(scores[c] + offset[c], lane[c])
            for c in range(_CHUNK):
                if lane[c] < best[0]:
                    _put(best, position, lane[c], -1)
            limit = np.nextafter(best[0], np.float32(np.inf))
            best[:] = np.inf
        for begin in range(0, columns, _CHUNK):
            scores, offset = score_QC[q, begin : begin + _CHUNK], offset_C[begin : begin + _CHUNK]
            if not _least(scores, offset) < limit:
                continue
            for part in range(0, scores.size, _PART):
                end = min(part + _PART, scores.size)
                if not _least(scores[part:end], offset[part:end]) < limit:
                    continue
                for c in range(part, end):
                    score = scores[c] + offset[c]
                    if score < limit:
                        _put(best, position, score, start + begin + c)
                        limit = min(limit, best[0])


@_reordered
def exact_distances(
    queries_QD: NDArray[np.float32],
    rows_ND: NDArray[np.float32],
    position_QK: NDArray[np.int64],
    sqdist_QK: NDArray[np.float64],
    first: int,
    last: int,
) -> None:
    """Squared distances of queries first .. last to the rows at their positions: float32 differences, float64 sums."""
    for q in range(first, last):
        query = queries_QD[q]
        for k in range(position_QK.shape[1]):
            row, sqdist = rows_ND[position_QK[q, k]], 0.0
            for d in range(row.size):
                step = row[d] - query[d]
                sqdist += np.float64(step * step)
            sqdist_QK[q, k] = sqdist


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
