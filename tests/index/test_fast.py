"""k-means off the papers' protocol: as good as it says, the same for any shards, and what sizes it gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from raycon.core.config import MiningConfig
from raycon.core.types import Needs, Snapshot
from raycon.index import fast, kmeans
from raycon.index.engine import TorchEngine
from raycon.index.kmeans import Clustering, Data, Running, together
from raycon.index.merge import FanOut
from raycon.index.mine import assign, local_shards, mine
from raycon.index.shard import Shard

LOCAL = local_shards(MiningConfig())


def fan_out_of(x: np.ndarray, shards: int = 2, calls: list[str] | None = None) -> FanOut:
    ends = [len(x) * i // shards for i in range(shards + 1)]
    parts = [Shard(a, b, x.shape[1]) for a, b in itertools.pairwise(ends)]
    for part in parts:
        part.put(0, part.first_row, x[part.first_row : part.last_row])

    def fan_out(method: str, *args: Any) -> list[Any]:
        if calls is not None:
            calls.append(method)
        return [getattr(part, method)(*args) for part in parts]

    return fan_out


def blobs(rows: int = 3000, dim: int = 12, centres: int = 60, seed: int = 0) -> np.ndarray:
    """Sorted by blob, as an image folder is by class; blobs of unequal size."""
    rng = np.random.default_rng(seed)
    which = np.sort((centres * rng.random(rows) ** 1.5).astype(int))
    x = rng.normal(size=(centres, dim))[which] + 0.4 * rng.normal(size=(rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def objective_of(x: np.ndarray, centroids: np.ndarray) -> float:
    return float(((x[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(-1).min(1).sum())


def run(fan_out: FanOut, data: Data, running: Running) -> Clustering:
    return together(fan_out, data, [running])[0]


def start_of(fan_out: FanOut, data: Data, k: int) -> np.ndarray:
    return fast.sampled_start(fan_out, data, k, LOCAL, seed=0)


def made(name: str, fan_out: FanOut, data: Data, k: int) -> Clustering:
    if name == "fast":
        return run(fan_out, data, fast.run_fast(fan_out, data, k, LOCAL, seed=0, iterations=20))
    if name == "minibatch":
        return run(fan_out, data, fast.run_minibatch(fan_out, data, k, start_of(fan_out, data, k), seed=0))
    if name == "balanced":
        return run(fan_out, data, fast.run_balanced(data, k, start_of(fan_out, data, k), iterations=25))
    return fast.hierarchical(fan_out, data, k, LOCAL, seed=0, iterations=10)


def test_several_clusterings_share_their_passes_and_keep_their_bits() -> None:
    x = blobs()
    data, calls = Data(0, len(x), 1.0), list[str]()
    fan_out, quiet = fan_out_of(x, calls=calls), fan_out_of(x)
    ks, iterations = (10, 25, 60), 6
    runs = [kmeans.run_official(fan_out, data, k, seed=k, iterations=iterations, redo=2) for k in ks]
    found = together(fan_out, data, runs)
    for k, one in zip(ks, found, strict=True):
        alone = kmeans.official(quiet, data, k, seed=k, iterations=iterations, redo=2)
        np.testing.assert_array_equal(one.centroids_KD, alone.centroids_KD)
        assert one[1:3] == alone[1:3]
    assert calls.count("steps") <= 2 * iterations  # not three times as many


@pytest.mark.parametrize("name", ["fast", "minibatch", "balanced", "hierarchical"])
def test_any_number_of_shards_gives_the_same_bits(name: str) -> None:
    x = blobs()
    data = Data(0, len(x), 1.0)
    one, three = (made(name, fan_out_of(x, s), data, 30) for s in (1, 3))
    np.testing.assert_array_equal(one.centroids_KD, three.centroids_KD)
    assert one[1:3] == three[1:3]


@pytest.mark.parametrize(("name", "slack"), [("fast", 1.02), ("minibatch", 1.03), ("hierarchical", 1.08)])
def test_nearly_as_good_as_the_papers_protocol(name: str, slack: float) -> None:
    """Sorted data with a few large and many small clusters; rows assigned as a refresh does."""
    x = blobs()
    fan_out, data = fan_out_of(x), Data(0, len(x), 1.0)
    official = kmeans.official(fan_out, data, 60, seed=0, iterations=20, redo=3)
    found = made(name, fan_out, data, 60)
    assert found.centroids_KD.shape == (60, 12)
    assert objective_of(x, found.centroids_KD) <= slack * objective_of(x, official.centroids_KD)
    label, sqdist = assign(fan_out, 0, found)
    np.testing.assert_allclose(sqdist, np.square(x - found.centroids_KD[label]).sum(1), atol=1e-5)
    assert sqdist.sum() <= slack * objective_of(x, official.centroids_KD)


def test_two_levels_lie_one_below_the_other() -> None:
    x = blobs()
    fan_out = fan_out_of(x)
    found = made("hierarchical", fan_out, Data(0, len(x), 1.0), 50)
    assert found.ends_G is not None
    assert found.coarse_GD is not None
    assert len(found.coarse_GD) == len(found.ends_G) == 7
    assert found.ends_G[-1] == 50
    exact = np.concatenate([a for a, _ in fan_out("assign", 0, found.centroids_KD)])
    below = fan_out("assign_below", 0, found.coarse_GD, found.centroids_KD, found.ends_G, 7)  # all of them: exact
    np.testing.assert_array_equal(np.concatenate([a for a, _ in below]), exact)
    (first, *_) = fan_out("assign_below", 0, found.coarse_GD, found.centroids_KD, found.ends_G, 1)
    assert 0.5 < (first[0] == exact[: len(first[0])]).mean() < 1


def test_balanced_clusters_are_more_even() -> None:
    x = blobs()
    fan_out, data, k = fan_out_of(x), Data(0, len(x), 1.0), 20
    plain = kmeans.official(fan_out, data, k, seed=0, iterations=20, redo=1)

    def imbalance(found: Clustering) -> float:
        count = np.bincount(assign(fan_out, 0, found)[0], minlength=k)
        return k * float(np.square(count / len(x)).sum())

    found = made("balanced", fan_out, data, k)
    assert imbalance(plain) > 1.2
    assert imbalance(found) < 1 + 0.3 * (imbalance(plain) - 1)
    label, sqdist = assign(fan_out, 0, found)
    true = np.square(x[:, None].astype(np.float64) - found.centroids_KD).sum(-1)
    np.testing.assert_array_equal(label, (true + found.weight_K).argmin(1))
    np.testing.assert_allclose(sqdist, true[np.arange(len(x)), label], atol=1e-5)


def test_slices_are_every_so_many_rows() -> None:
    """Each slice holds every class of sorted data; together they are all rows, for any cut into shards."""
    x = blobs(2500)
    c = x[::100]
    whole = fan_out_of(x, 1)("step", 0, c, len(x), 1.0)[0]
    for shards in (1, 3):
        fan_out = fan_out_of(x, shards)
        sums, counts = np.zeros(c.shape), np.zeros(len(c), int)
        for first in range(7):
            answers = [a[0] for a in fan_out("steps", 0, c, (len(c),), len(x), 1.0, (first, 7))]
            some = x[first::7]
            label = ((some[:, None] - c[None]) ** 2).sum(-1).argmin(1)
            np.testing.assert_array_equal(sum(a.counts_K for a in answers), np.bincount(label, minlength=len(c)))
            sums, counts = sums + sum(a.sums_KD for a in answers), counts + sum(a.counts_K for a in answers)
        np.testing.assert_array_equal(counts, whole.counts_K)
        np.testing.assert_array_equal(sums, whole.sums_KD)


def test_the_start_spreads_over_the_data() -> None:
    """40 far-off blobs of 5 to 200 rows: drawn by squared distance, nearly every blob gets a centroid."""
    rng = np.random.default_rng(0)
    which = np.repeat(np.arange(40), np.linspace(5, 200, 40).astype(int))
    x = (10 * rng.normal(size=(40, 8))[which] + 0.1 * rng.normal(size=(len(which), 8))).astype(np.float32)

    def blobs_hit(rows: np.ndarray) -> int:
        return len({int(which[np.square(x - row).sum(1).argmin()]) for row in rows})

    chosen = [blobs_hit(fast.plus_plus(TorchEngine(), x, 40, np.random.default_rng(s))) for s in range(5)]
    uniform = [blobs_hit(x[np.random.default_rng(s).choice(len(x), 40, replace=False)]) for s in range(5)]
    assert min(chosen) >= 35 > max(uniform)
    duplicates = np.repeat(x[:3], 10, axis=0)
    assert len(np.unique(fast.plus_plus(TorchEngine(), duplicates, 20, rng), axis=0)) == 3


@pytest.mark.parametrize(("counts", "k"), [([10, 0, 1, 89], 10), ([5, 5, 5], 3), ([5, 5, 5], 15), ([1000, 1, 1], 4)])
def test_shares_are_in_proportion(counts: list[int], k: int) -> None:
    count = np.array(counts)
    share = fast.proportional(count, k)
    assert share.sum() == k
    assert ((share >= 1) == (count > 0)).all()
    assert (share <= count).all()
    assert np.abs(share - np.maximum(count * k / count.sum(), count > 0)).max() < 2.5


@pytest.mark.parametrize("name", ["fast", "minibatch", "hierarchical"])
def test_edges(name: str) -> None:
    """As many clusters as rows are the rows; more are refused; duplicates end finite."""
    x = blobs(12)
    found = made(name, fan_out_of(x), Data(0, 12, 1.0), 12)
    np.testing.assert_array_equal(found.centroids_KD, x)
    with pytest.raises(ValueError, match=r"13 clusters of 12 rows: give 1 \.\. 12"):
        made(name, fan_out_of(x), Data(0, 12, 1.0), 13)
    same = np.repeat(x[:4], 50, axis=0)
    found = made(name, fan_out_of(same), Data(0, 200, 1.0), 30)
    assert np.isfinite(found.centroids_KD).all()
    assert objective_of(same, found.centroids_KD) < 1e-3 * len(same)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "minibatch"},
        {"algorithm": "hierarchical"},
        {"balanced": True},
        {"init": "warm"},
        {"storage": "fp16"},
        {"neighbours": "ivf"},
        {"engine": "torch"},
    ],
    ids=str,
)
def test_a_refresh_with_every_option(options: dict[str, Any]) -> None:
    x = blobs(1200)
    mining = MiningConfig(shards=2, iterations=6, redo=1, **options)
    ends = (0, 700, 1200)
    parts = [Shard(a, b, 12, engine=mining.engine, storage=mining.storage) for a, b in itertools.pairwise(ends)]
    for part in parts:
        part.put(0, part.first_row, x[part.first_row : part.last_row])

    def fan_out(method: str, *args: Any) -> list[Any]:
        return [getattr(part, method)(*args) for part in parts]

    needs = Needs(clusterings=(10, 30), neighbours=3, temperature=0.2)

    def refresh(previous: Snapshot | None) -> tuple[Snapshot, dict[str, float]]:
        return mine(fan_out, len(x), 0, needs, mining, 0, previous)

    plain = mine(fan_out_of(x), len(x), 0, needs, MiningConfig(iterations=6, redo=1), 0, None)[1]
    first, metrics = refresh(None)
    second, again = refresh(first)
    for snapshot, found in ((first, metrics), (second, again)):
        for i, k in enumerate((10, 30)):
            assert snapshot.assignment[i].shape == (1200,)
            assert snapshot.prototypes[i].shape == (k, 12)
            assert float(snapshot.concentration[i].mean()) == pytest.approx(0.2, rel=1e-5)
            assert found[f"index/{i}/objective"] <= 1.15 * plain[f"index/{i}/objective"]
        assert snapshot.neighbours is not None
        assert snapshot.neighbours.shape == (1200, 3)
    if mining.init == "warm":
        assert again["index/1/iterations"] <= 2
    elif not options.get("balanced"):
        assert all(torch.equal(a, b) for a, b in zip(first.assignment, second.assignment, strict=True))
    assert ("index/rescored" in metrics) == (mining.storage == "fp16")
    assert ("index/neighbours_recall" in metrics) == (mining.neighbours == "ivf")
