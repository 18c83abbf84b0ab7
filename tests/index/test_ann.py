"""Approximate neighbours: the recall that is said is true, for any number of shards, and so is the work."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest

from raycon.core.config import MiningConfig
from raycon.core.types import MissingRows
from raycon.index import ann
from raycon.index.ann import approximate_neighbours
from raycon.index.kmeans import Data
from raycon.index.merge import FanOut
from raycon.index.mine import local_shards
from raycon.index.shard import Shard


def blobs(rows: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = 2 * rng.normal(size=(rows // 50, dim))[rng.integers(0, rows // 50, rows)] + rng.normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def fan_out_of(x: np.ndarray, shards: int, engine: Any = "auto", storage: Any = "fp32") -> FanOut:
    ends = [len(x) * i // shards for i in range(shards + 1)]
    parts = [Shard(a, b, x.shape[1], engine=engine, storage=storage) for a, b in itertools.pairwise(ends)]
    for part in parts:
        part.put(0, part.first_row, x[part.first_row : part.last_row])

    def fan_out(method: str, *args: Any) -> list[Any]:
        return [getattr(part, method)(*args) for part in parts]

    return fan_out


def recall_of(x: np.ndarray, found: np.ndarray, rows: np.ndarray) -> float:
    """By brute force in float64."""
    sqdist = ((x[rows, None].astype(np.float64) - x[None]) ** 2).sum(-1)
    sqdist[np.arange(len(rows)), rows] = np.inf
    true = np.argsort(sqdist, axis=1)[:, : found.shape[1]]
    return float(
        np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(true.tolist(), found[rows].tolist(), strict=True)])
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "EXACT_BELOW", 100)
    monkeypatch.setattr(ann, "_SAMPLE", 200)
    monkeypatch.setattr(ann, "_BATCH", 500)


@pytest.mark.parametrize(("shards", "storage"), [(1, "fp32"), (3, "fp32"), (2, "fp16")])
def test_lists_reach_the_recall_they_are_asked_for(shards: int, storage: str) -> None:
    x = blobs(4000)
    data, local = Data(0, len(x), 1.0), local_shards(MiningConfig())
    found = approximate_neighbours(fan_out_of(x, shards, storage=storage), data, 8, local, recall=0.95, seed=0)
    assert found.row_NK.shape == (4000, 8)
    assert not (found.row_NK == np.arange(4000)[:, None]).any()
    assert found.row_NK.min() >= 0
    assert all(len(set(row)) == 8 for row in found.row_NK.tolist())
    true = recall_of(x, found.row_NK, np.arange(0, 4000, 8))
    assert 0.93 < true < 0.999  # not by comparing everything
    assert found.recall == pytest.approx(true, abs=0.02)
    assert 0 < found.compared < 0.5
    near = np.square(x[found.row_NK].astype(np.float64) - x[:, None]).sum(-1)
    assert (np.diff(near, axis=1) > -1e-3 if storage == "fp16" else np.diff(near, axis=1) > -1e-5).all()


def test_any_shards_give_the_same_neighbours() -> None:
    x = blobs(2000, seed=1)
    data, local = Data(0, len(x), 1.0), local_shards(MiningConfig())
    one, four = (approximate_neighbours(fan_out_of(x, s), data, 5, local, recall=0.9, seed=0) for s in (1, 4))
    assert (one.row_NK == four.row_NK).mean() > 0.9999
    assert one[1:] == pytest.approx(four[1:], abs=1e-3)


def test_more_recall_costs_more_work() -> None:
    x = blobs(3000, seed=2)
    data, local = Data(0, len(x), 1.0), local_shards(MiningConfig())
    low, high = (approximate_neighbours(fan_out_of(x, 2), data, 5, local, recall=r, seed=0) for r in (0.7, 0.98))
    assert low.recall < high.recall
    assert low.compared < high.compared < 1
    exact = approximate_neighbours(fan_out_of(x, 2), data, 5, local, recall=1.0, seed=0)
    assert exact[1:] == (1.0, 1.0)
    assert recall_of(x, exact.row_NK, np.arange(100)) == 1


def test_graph(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("faiss")
    x = blobs(3000, seed=3)
    data, local = Data(0, len(x), 1.0), local_shards(MiningConfig())
    found = approximate_neighbours(fan_out_of(x, 2, "faiss"), data, 6, local, recall=0.97, seed=0, kind="hnsw")
    assert not (found.row_NK == np.arange(3000)[:, None]).any()
    assert found.recall == pytest.approx(recall_of(x, found.row_NK, np.arange(0, 3000, 6)), abs=0.02)
    assert found.recall > 0.95


def test_a_recall_that_is_missed_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    x = blobs(2000, seed=4)
    monkeypatch.setattr(ann, "_MARGIN", -0.3)
    with caplog.at_level(logging.WARNING):
        found = approximate_neighbours(
            fan_out_of(x, 2), Data(0, len(x), 1.0), 5, local_shards(MiningConfig()), recall=0.99, seed=0
        )
    assert found.recall < 0.99
    assert "below mining.recall = 0.99" in caplog.text


def test_duplicates_and_lists_with_few_rows() -> None:
    """All rows are one of three points: most lists are empty, and every row finds rows at distance 0."""
    x = np.eye(3, 8, dtype=np.float32)[np.arange(900) % 3]
    found = approximate_neighbours(
        fan_out_of(x, 2), Data(0, 900, 1.0), 10, local_shards(MiningConfig()), recall=0.9, seed=0
    )
    np.testing.assert_array_equal(found.row_NK % 3, np.broadcast_to(np.arange(900)[:, None] % 3, (900, 10)))
    assert not (found.row_NK == np.arange(900)[:, None]).any()


def test_lists_of_other_features_are_not_searched() -> None:
    x = blobs(300)
    shard = Shard(0, 300, 16)
    shard.put(0, 0, x)
    shard.lists(0, x[:5], 3)
    shard.put(0, 0, x)
    with pytest.raises(MissingRows, match=r"the lists of rows 0 \.\. 300"):
        shard.search_lists(0, x[:2], np.arange(2), (2,), [np.arange(5)], 3)
