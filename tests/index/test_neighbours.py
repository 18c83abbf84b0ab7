"""Exact neighbours against brute force in float64, duplicates and ties included."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from raycon.index.merge import FanOut
from raycon.index.neighbours import QUERIES, all_neighbours, search
from raycon.index.shard import Shard


def fan_out_of(features: np.ndarray, shards: int, engine: Any = "auto") -> FanOut:
    ends = [len(features) * i // shards for i in range(shards + 1)]
    parts = [Shard(a, b, features.shape[1], engine=engine) for a, b in itertools.pairwise(ends)]
    for part in parts:
        part.put(0, part.first_row, features[part.first_row : part.last_row])

    def fan_out(method: str, *args: Any) -> list[Any]:
        return [getattr(part, method)(*args) for part in parts]

    return fan_out


def brute_force(features: np.ndarray, count: int) -> np.ndarray:
    x = features.astype(np.float64)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    return np.lexsort((np.broadcast_to(np.arange(len(x)), distance.shape), distance))[:, :count]


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_all_neighbours_equal_brute_force(shards: int, engine: str) -> None:
    if engine == "faiss":
        pytest.importorskip("faiss")
    rows = QUERIES + 300  # two blocks of queries
    x = np.random.default_rng(shards).normal(size=(rows, 20)).astype(np.float32)
    found = all_neighbours(fan_out_of(x, shards, engine), 0, rows, 7)
    np.testing.assert_array_equal(found, brute_force(x, 7))


def test_self_is_removed_by_its_number_and_duplicates_stay() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 5)).astype(np.float32), 3, axis=0)
    found = all_neighbours(fan_out_of(x, 3), 0, len(x), 2)
    group = np.arange(len(x)) // 3
    np.testing.assert_array_equal(found // 3, np.stack([group, group], 1))
    np.testing.assert_array_equal(found, brute_force(x, 2))
    assert not (found == np.arange(len(x))[:, None]).any()


def test_as_many_as_there_are_over_tiny_shards() -> None:
    x = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    np.testing.assert_array_equal(all_neighbours(fan_out_of(x, 4), 0, 6, 5), brute_force(x, 5))
    for count in (0, 6):
        with pytest.raises(ValueError, match=rf"{count} neighbours of each of 6 rows: give 1 \.\. 5"):
            all_neighbours(fan_out_of(x, 4), 0, 6, count)


def test_foreign_queries_exclude_nothing() -> None:
    x = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    sqdist, row = search(fan_out_of(x, 2), 0, x[[3, 30]] + np.float32(1e-3), 2)
    assert row[:, 0].tolist() == [3, 30]
    wanted = ((x[row].astype(np.float64) - (x[[3, 30]] + np.float32(1e-3))[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(sqdist, wanted, rtol=1e-5)
