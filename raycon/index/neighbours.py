"""Exact nearest neighbours over the shards: every shard searches its rows, the coordinator merges.

Shape letters: N rows of the data set, Q queries, K neighbours, D feature width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raycon.index.merge import FanOut, gather, merge_neighbours

QUERIES = 1024


def search(
    fan_out: FanOut, version: int, queries_QD: NDArray[np.float32], count: int, own_Q: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The ``count`` rows nearest to each query by squared L2 distance (for unit rows: by cosine): (Q, count) each.

    Distances in float64, rows int64, nearest first, equal distances by row. ``own_Q``: the row each query is itself,
    which is left out by its number, so duplicates of it stay in; None when the queries are not rows.
    """
    if own_Q is None:
        own_Q = np.full(len(queries_QD), -1, dtype=np.int64)
    return merge_neighbours(fan_out("search", version, queries_QD, own_Q, count), count)


def all_neighbours(fan_out: FanOut, version: int, rows: int, count: int) -> NDArray[np.int64]:
    """The ``count`` nearest other rows of every row: (N, count) int64. Raises ValueError when there are not so many."""
    if not 1 <= count < rows:
        raise ValueError(f"{count} neighbours of each of {rows} rows: give 1 .. {rows - 1}")
    row_NK = np.empty((rows, count), dtype=np.int64)
    for start in range(0, rows, QUERIES):
        own_Q = np.arange(start, min(start + QUERIES, rows))
        queries_QD = gather(fan_out, version, own_Q)
        row_NK[start : start + QUERIES] = search(fan_out, version, queries_QD, count, own_Q)[1]
    return row_NK
