"""The whole refresh without Ray: in one process, over gloo ranks, warm and cold, with parts missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from raycon.core.config import MiningConfig
from raycon.core.stream import shard_range
from raycon.core.types import MissingRows, Needs, Snapshot
from raycon.index.local import LocalIndex, part
from tests.helpers import on_ranks

NEEDS = Needs(clusterings=(12, 40), neighbours=3, temperature=0.2)
MINING = MiningConfig(shards=2, iterations=8, redo=2)


def features(rows: int = 1500, dim: int = 24, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def refresh(x: np.ndarray, mining: MiningConfig = MINING, version: int = 3) -> tuple[Snapshot, dict[str, float]]:
    index = LocalIndex(len(x), x.shape[1], mining, seed=0)
    for first in range(0, len(x), 400):
        index.add(version, first, torch.from_numpy(x[first : first + 400]))
    result = index.snapshot(version, NEEDS)
    index.close()
    return result


def same(a: Snapshot, b: Snapshot) -> bool:
    def flat(s: Snapshot) -> list[torch.Tensor]:
        assert s.neighbours is not None
        return [*s.assignment, *s.prototypes, *s.concentration, s.neighbours]

    return a.version == b.version and all(x.equal(y) for x, y in zip(flat(a), flat(b), strict=True))


def test_what_a_snapshot_holds() -> None:
    x = features()
    snapshot, metrics = refresh(x)
    assert snapshot.version == 3
    for i, k in enumerate(NEEDS.clusterings):
        label, prototypes, phi = snapshot.assignment[i], snapshot.prototypes[i], snapshot.concentration[i]
        assert (label.dtype, prototypes.dtype, phi.dtype) == (torch.int64, torch.float32, torch.float32)
        assert (label.shape, prototypes.shape, phi.shape) == ((1500,), (k, 24), (k,))
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(k))
        count = torch.bincount(label, minlength=k)
        assert metrics[f"index/{i}/used"] == int((count > 0).sum())
        assert metrics[f"index/{i}/empty"] == int((count == 0).sum())
        assert metrics[f"index/{i}/largest"] == int(count.max())
        assert metrics[f"index/{i}/imbalance"] == pytest.approx(k * float(((count / 1500) ** 2).sum()), rel=1e-5)
    assert snapshot.neighbours is not None
    assert snapshot.neighbours.shape == (1500, 3)
    assert metrics["index/kmeans_seconds"] > 0


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_any_number_of_shards_gives_the_same_snapshot(shards: int) -> None:
    x = features()
    two, metrics = refresh(x)
    other, others = refresh(x, dataclasses.replace(MINING, shards=shards))
    assert same(two, other)

    def found(metrics: dict[str, float]) -> dict[str, float]:  # what it cost depends on the shards
        return {k: v for k, v in metrics.items() if k.startswith("index/") and "seconds" not in k}

    assert found(metrics) == found(others)


def test_missing_rows_are_said_and_can_be_added() -> None:
    x = features(100)
    index = LocalIndex(100, 24, MINING, seed=0)
    index.add(0, 0, x[:70])
    with pytest.raises(MissingRows, match="30 of 100 rows of version 0"):
        index.snapshot(0, NEEDS)
    index.add(0, 70, x[70:])
    first, _ = index.snapshot(0, NEEDS)
    with pytest.raises(MissingRows, match="100 of 100 rows of version 1"):
        index.snapshot(1, NEEDS)
    assert same(first, index.snapshot(0, NEEDS)[0])
    with pytest.raises(ValueError, match=r"rows 90 \.\. 101: this process holds 0 \.\. 100"):
        index.add(0, 90, features(11))


def test_needs_that_cannot_be_met_are_refused() -> None:
    x = features(20)
    index = LocalIndex(20, 24, MINING, seed=0)
    index.add(0, 0, x)
    with pytest.raises(ValueError, match="21 clusters of 20 rows"):
        index.snapshot(0, Needs(clusterings=(21,)))
    with pytest.raises(ValueError, match="20 neighbours of each of 20 rows"):
        index.snapshot(0, Needs(neighbours=20))
    with pytest.raises(ValueError, match="none of the 20 clusters"):
        index.snapshot(0, Needs(clusterings=(20,), temperature=0.2))
    assert index.snapshot(0, Needs(clusterings=(20,)))[0].concentration == ()


def test_warm_start_follows_the_previous_snapshot_also_a_restored_one() -> None:
    mining = dataclasses.replace(MINING, init="warm", iterations=20, redo=5)
    x, moved = features(), features() + 0.1 * features(seed=1)
    index = LocalIndex(len(x), 24, mining, seed=0)
    index.add(0, 0, x)
    first, cold = index.snapshot(0, NEEDS)
    index.add(1, 0, moved)
    second, warm = index.snapshot(1, NEEDS)
    assert cold["index/1/iterations"] > 2 >= warm["index/1/iterations"]
    resumed = LocalIndex(len(x), 24, mining, seed=0)
    resumed.previous = first
    resumed.add(1, 0, moved)
    assert same(resumed.snapshot(1, NEEDS)[0], second)
    resized = LocalIndex(len(x), 24, mining, seed=0)  # another k: from scratch
    resized.previous = first
    resized.add(1, 0, moved)
    assert resized.snapshot(1, Needs(clusterings=(13,)))[1]["index/0/iterations"] > 3


def test_seed_moves_the_start() -> None:
    x = features()
    results = []
    for seed in (0, 1):
        index = LocalIndex(len(x), 24, MINING, seed=seed)
        index.add(0, 0, x)
        results.append(index.snapshot(0, Needs(clusterings=(12, 12)))[0])
    assert not results[0].assignment[0].equal(results[0].assignment[1])
    assert results[0].assignment[1].equal(results[1].assignment[0])  # seeds 0 + 1 and 1 + 0


def test_search_gives_rows_and_cosines() -> None:
    x, queries = features(), features(9, seed=1)
    index = LocalIndex(len(x), 24, MINING, seed=0)
    with pytest.raises(MissingRows, match="1500 of 1500 rows of version 0"):
        index.search(queries, 1)
    index.add(4, 0, x)
    rows, cosine = index.search(torch.from_numpy(queries), 5)
    truth = queries.astype(np.float64) @ x.T.astype(np.float64)
    np.testing.assert_array_equal(rows, np.argsort(-truth, axis=1)[:, :5])
    np.testing.assert_allclose(cosine, np.take_along_axis(truth, rows, 1), atol=1e-6)
    own, _ = index.search(x[7:9], 1, own_Q=np.array([7, 8]))
    assert (own[:, 0] != [7, 8]).all()
    broken = queries.copy()
    broken[2, 1] = np.nan
    for wrong, count, text in ((broken, 1, "row 2 are not finite"), (queries, 1501, "1501 neighbours in 1500 rows"),
                               (queries[:, :7], 1, r"expected \(n, 24\)")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            index.search(wrong, count)


def test_what_is_begun_is_what_is_waited_for() -> None:
    x = features()
    index = LocalIndex(len(x), 24, MINING, seed=0)
    index.add(3, 0, x)
    index.begin(3, NEEDS)
    begun, metrics = index.snapshot(3, NEEDS)
    assert same(begun, refresh(x)[0])
    assert index.progress() > 0
    assert "mining/0/ami" not in metrics  # nothing to compare with yet
    again, metrics = index.snapshot(3, NEEDS)
    assert same(again, begun)
    assert metrics["mining/0/ami"] == metrics["mining/1/ami"] == pytest.approx(1.0)
    index.begin(9, NEEDS)
    with pytest.raises(MissingRows, match="version 9"):
        index.snapshot(9, NEEDS)
    index.begin(3, Needs(clusterings=(12,)))
    index.close()  # waits for it


def test_shards_never_outnumber_rows() -> None:
    assert part(3, 8) == [(0, 1), (1, 2), (2, 3)]
    assert part(10, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)]


def _rank(x: np.ndarray, forget: bool) -> Snapshot | str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    index = LocalIndex(len(x), x.shape[1], MINING, seed=0, rank=rank, world=world)
    first, last = shard_range(len(x), rank, world)
    if not (forget and rank == 1):
        index.add(3, first, x[first:last])
    try:
        snapshot = index.snapshot(3, NEEDS)[0]
        rows, cosine = index.search(x[5:9] + 0.01, 3)
        truth = (x[5:9] + 0.01) @ x.T
        assert (rows == np.argsort(-(truth - (x**2).sum(1) / 2), axis=1)[:, :3]).all()
        assert cosine.shape == (4, 3)
        return snapshot
    except MissingRows as missing:
        return str(missing)


@pytest.mark.ranks
def test_ranks_hold_a_shard_each_and_agree() -> None:
    x = features(1500)
    snapshots = on_ranks(3, _rank, x, False)
    one, _ = refresh(x)
    assert all(same(one, snapshot) for snapshot in snapshots)


@pytest.mark.ranks
def test_every_rank_hears_of_missing_rows() -> None:
    texts = on_ranks(2, _rank, features(200), True)
    assert texts == ["100 of 200 rows of version 3 are not in the index: add them again"] * 2
