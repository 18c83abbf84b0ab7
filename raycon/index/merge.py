"""Putting the answers of the shards together, in shard order.

Shape letters: K clusters or neighbours, D feature width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class FanOut(Protocol):
    """The one thing the coordinator knows of the shards: call a method of ``Shard`` on all of them.

    The list of results is in shard order, which is row order. In one process, over the ranks of torch.distributed, and
    over Ray actors.
    """

    def __call__(self, method: str, *args: Any) -> list[Any]: ...


def merge_steps(
    steps: Sequence[tuple[NDArray[np.float64], NDArray[np.int64], float]],
) -> tuple[NDArray[np.float64], NDArray[np.int64], float]:
    """Sums (K, D), counts (K,) and objective of the whole data set. Exact: every term lies on one grid."""
    sums_KD, counts_K, objective = steps[0][0].copy(), steps[0][1].copy(), steps[0][2]
    for sums, counts, value in steps[1:]:
        sums_KD += sums
        counts_K += counts
        objective += value
    return sums_KD, counts_K, objective


def merge_neighbours(
    parts: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The nearest ``count`` of all shards' candidates by (distance, row): distances and rows, both (Q, count)."""
    sqdist_QK = np.concatenate([p[0] for p in parts], axis=1)
    row_QK = np.concatenate([p[1] for p in parts], axis=1)
    order = np.lexsort((row_QK, sqdist_QK))[:, :count]
    return np.take_along_axis(sqdist_QK, order, 1), np.take_along_axis(row_QK, order, 1)


def gather(fan_out: FanOut, version: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The features (len(rows), D) of any rows of the data set."""
    parts = fan_out("gather", version, rows)
    features = np.empty((len(rows), parts[0][1].shape[1]), dtype=np.float32)
    for where, block in parts:
        features[where] = block
    return features
