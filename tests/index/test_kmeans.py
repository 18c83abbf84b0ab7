"""The coordinator's k-means against faiss itself, against brute force, and at its edges."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from raycon.core.types import MissingRows
from raycon.index import engine, kmeans
from raycon.index.merge import FanOut
from raycon.index.shard import Shard


def fan_out_of(features: np.ndarray, shards: int = 2) -> FanOut:
    ends = [len(features) * i // shards for i in range(shards + 1)]
    parts = [Shard(a, b, features.shape[1]) for a, b in itertools.pairwise(ends)]
    for part in parts:
        part.put(0, part.first_row, features[part.first_row : part.last_row])

    def fan_out(method: str, *args: Any) -> list[Any]:
        return [getattr(part, method)(*args) for part in parts]

    return fan_out


def data_of(features: np.ndarray) -> kmeans.Data:
    return kmeans.Data(0, len(features), float(np.linalg.norm(features, axis=1).max()))


def nearest_of(centroids: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(((centroids[:, None] - centroids[None]) ** 2).sum(-1), axis=1, kind="stable")[:, :count]


def objective_of(features: np.ndarray, centroids: np.ndarray) -> float:
    """By brute force in float64."""
    distance = ((features[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2).sum(-1)
    return float(distance.min(1).sum())


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    x = load_digits().data.astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("rows", "seed"), [(2, 0), (100, 3), (1797, 1), (50000, 1 + 4 * 15486557)])
def test_permutation_is_faiss_s(rows: int, seed: int) -> None:
    faiss = pytest.importorskip("faiss")
    theirs = np.empty(rows, np.int32)
    faiss.rand_perm(faiss.swig_ptr(theirs), rows, seed)
    for count in (1, rows // 2, rows):
        np.testing.assert_array_equal(kmeans.faiss_permutation(rows, count, seed), theirs[:count])


@pytest.mark.parametrize("k", [10, 50, 200])
@pytest.mark.parametrize("position", [0, 2])
def test_official_is_faiss_kmeans(digits: np.ndarray, k: int, position: int) -> None:
    """faiss adds in float32 and we exactly, so a row on an edge may go either way: equal but for rounding."""
    faiss = pytest.importorskip("faiss")
    theirs = faiss.Kmeans(64, k, niter=20, nredo=3, seed=position, max_points_per_centroid=1000)
    theirs.train(digits)
    ours = kmeans.official(fan_out_of(digits), data_of(digits), k, seed=position, iterations=20, redo=3)
    wanted = objective_of(digits, theirs.centroids)
    assert objective_of(digits, ours.centroids_KD) == pytest.approx(wanted, rel=2e-3)
    # From one start, before roundings can lead apart: the same centroids.
    start = digits[kmeans.faiss_permutation(len(digits), k, position + 1)]
    one = faiss.Kmeans(64, k, niter=4, max_points_per_centroid=1000)
    one.train(digits, init_centroids=start)
    found = kmeans.lloyd(fan_out_of(digits), data_of(digits), start, 4)
    np.testing.assert_allclose(found.centroids_KD, one.centroids, atol=2e-6)
    assert found.objective == pytest.approx(one.obj[-1], rel=1e-5)


def test_spherical_is_faiss_s(digits: np.ndarray) -> None:
    faiss = pytest.importorskip("faiss")
    start = digits[kmeans.faiss_permutation(len(digits), 30, 1)]
    theirs = faiss.Kmeans(64, 30, niter=4, spherical=True, max_points_per_centroid=1000)
    theirs.train(digits, init_centroids=start)
    ours = kmeans.lloyd(fan_out_of(digits), data_of(digits), start, 4, spherical=True)
    np.testing.assert_allclose(ours.centroids_KD, theirs.centroids, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(ours.centroids_KD, axis=1), 1, atol=1e-6)
    similarity = len(digits) - ours.objective / 2  # of unit rows and unit centroids
    assert similarity == pytest.approx(theirs.obj[-1], rel=1e-5)


@pytest.mark.parametrize("empties", [1, 7, 30])
def test_empty_clusters_are_split_as_faiss_does(empties: int) -> None:
    """Far-off initial centroids stay empty; one iteration of faiss shows its donors and its perturbation."""
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(empties)
    x = rng.normal(size=(500, 7)).astype(np.float32)
    start = np.concatenate([x[:20], np.full((empties, 7), 1e3, np.float32)])[rng.permutation(20 + empties)]
    theirs = faiss.Kmeans(7, len(start), niter=1)
    theirs.train(x, init_centroids=start)
    ours = kmeans.lloyd(fan_out_of(x), data_of(x), start, 1)
    np.testing.assert_allclose(ours.centroids_KD, theirs.centroids, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_any_number_of_shards_gives_the_same_bits(digits: np.ndarray, shards: int) -> None:
    one = kmeans.official(fan_out_of(digits, 1), data_of(digits), 60, seed=1, iterations=15, redo=2)
    many = kmeans.official(fan_out_of(digits, shards), data_of(digits), 60, seed=1, iterations=15, redo=2)
    np.testing.assert_array_equal(one.centroids_KD, many.centroids_KD)
    assert one[1:] == many[1:]


def test_ends_when_nothing_changes(digits: np.ndarray) -> None:
    long = kmeans.official(fan_out_of(digits), data_of(digits), 10, seed=0, iterations=500, redo=1)
    assert long.iterations < 200
    again = kmeans.lloyd(fan_out_of(digits), data_of(digits), long.centroids_KD, 50)
    assert again.iterations == 1
    np.testing.assert_array_equal(again.centroids_KD, long.centroids_KD)


def test_restarts_keep_the_lowest(digits: np.ndarray) -> None:
    """The objective compared is that before the last update, as faiss compares it."""
    fan_out, data = fan_out_of(digits), data_of(digits)
    single = []
    for restart in range(4):
        start = digits[kmeans.faiss_permutation(len(digits), 40, 5 + 1 + restart * 15486557)]
        single.append(kmeans.lloyd(fan_out, data, start, 8))
    best = min(single, key=lambda c: c.objective)
    assert best is not single[0]  # else the test shows nothing
    found = kmeans.official(fan_out, data, 40, seed=5, iterations=8, redo=4)
    np.testing.assert_array_equal(found.centroids_KD, best.centroids_KD)


def test_warm_labels_survive_a_rotation(digits: np.ndarray) -> None:
    """Features turned by any rotation and a little noise: one iteration is as good as twenty cold ones."""
    rng = np.random.default_rng(0)
    cold = kmeans.official(fan_out_of(digits), data_of(digits), 50, seed=0, iterations=20, redo=1)
    label = np.concatenate([a for a, _ in fan_out_of(digits)("assign", 0, cold.centroids_KD)])
    turn = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    new = (digits + rng.normal(size=digits.shape) * 0.01).astype(np.float32) @ turn.astype(np.float32)
    new = np.ascontiguousarray(new / np.linalg.norm(new, axis=1, keepdims=True))
    (warm,), _ = kmeans.warm(fan_out_of(new), data_of(new), [label], [50], nearest_of, moves=0)
    fresh = kmeans.official(fan_out_of(new), data_of(new), 50, seed=0, iterations=20, redo=1)
    assert warm.iterations == 1
    assert objective_of(new, warm.centroids_KD) <= objective_of(new, fresh.centroids_KD) * 1.002


def drifted(x: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    moved = x + noise * np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


@pytest.mark.parametrize("numba", [True, False])
def test_moves_among_near_clusters(digits: np.ndarray, numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, for two clusterings at once, against float64: the nearest of a row's cluster and those beside it."""
    monkeypatch.setattr(engine, "_has_numba", lambda: numba)
    rng, sizes = np.random.default_rng(0), (40, 13)
    centroids = digits[rng.permutation(len(digits))[: sum(sizes)]]
    near = np.concatenate([nearest_of(centroids[:40], 5), nearest_of(centroids[40:], 5) + 40]).astype(np.int32)
    label = np.stack([rng.integers(0, 40, len(digits)), rng.integers(40, 53, len(digits))]).astype(np.int32)
    fan_out, before = fan_out_of(digits, 3), label
    for given in (label, None):  # None: from where the first pass left them
        answers = fan_out("move", 0, given, centroids, near, len(digits), 1.0)
        after = before.copy()
        for p in range(2):
            candidates = np.concatenate([before[p][:, None], near[before[p]]], axis=1)
            sqdist = ((digits[:, None].astype(np.float64) - centroids[candidates]) ** 2).sum(-1)
            after[p] = np.take_along_axis(candidates, sqdist.argmin(1)[:, None], 1)[:, 0]
        sums = sum(a.sums_KD for a in answers)
        for k in range(53):
            np.testing.assert_allclose(sums[k], digits[(after == k).any(0)].sum(0, dtype=np.float64), atol=1e-7)
        np.testing.assert_array_equal(sum(a.counts_K for a in answers), np.bincount(after.ravel(), minlength=53))
        assert sum(a.moved for a in answers) == np.count_nonzero(after != before) > 0
        before = after
    fresh = fan_out_of(digits, 3)
    with pytest.raises(MissingRows, match=r"clusters of rows 0 \.\. 599 were lost"):
        fresh("move", 0, None, centroids, near, len(digits), 1.0)


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
@pytest.mark.parametrize("spherical", [False, True])
def test_a_warm_start_follows_a_long_way(digits: np.ndarray, shards: int, spherical: bool) -> None:
    """Where features moved far, moves among near clusters reach what one Lloyd iteration does not; any shards, same bits."""
    new, sizes = drifted(digits, 0.05), (60, 20)
    data = data_of(new)
    labels = [
        np.concatenate([a for a, _ in fan_out_of(digits)("assign", 0, found.centroids_KD)])
        for k in sizes
        for found in [kmeans.official(fan_out_of(digits), data, k, seed=0, iterations=10, redo=1)]
    ]
    found, moves = kmeans.warm(fan_out_of(new, shards), data, labels, sizes, nearest_of, spherical=spherical)
    one, _ = kmeans.warm(fan_out_of(new, 2), data, labels, sizes, nearest_of, spherical=spherical, moves=0)
    same, _ = kmeans.warm(fan_out_of(new, 2), data, labels, sizes, nearest_of, spherical=spherical)
    assert 2 < moves <= kmeans.MOVES
    for i, k in enumerate(sizes):
        assert found[i].centroids_KD.shape == (k, 64)
        np.testing.assert_array_equal(found[i].centroids_KD, same[i].centroids_KD)
        cold = kmeans.official(fan_out_of(new), data, k, seed=0, iterations=20, redo=1, spherical=spherical)
        reached, before, fresh = (objective_of(new, c.centroids_KD) for c in (found[i], one[i], cold))
        assert reached < before
        assert reached < 1.01 * fresh


def test_moves_end_when_rows_stay(digits: np.ndarray) -> None:
    found = kmeans.official(fan_out_of(digits), data_of(digits), 30, seed=0, iterations=60, redo=1)
    label = np.concatenate([a for a, _ in fan_out_of(digits)("assign", 0, found.centroids_KD)])
    (again,), moves = kmeans.warm(fan_out_of(digits), data_of(digits), [label], [30], nearest_of)
    assert moves == 1
    np.testing.assert_allclose(again.centroids_KD, found.centroids_KD, atol=1e-6)


def test_fewer_rows_than_clusters_is_refused(digits: np.ndarray) -> None:
    few = digits[:9]
    for call in (
        lambda: kmeans.official(fan_out_of(few), data_of(few), 10, seed=0, iterations=2, redo=1),
        lambda: kmeans.warm(fan_out_of(few), data_of(few), [np.arange(9)], [10], nearest_of),
    ):
        with pytest.raises(ValueError, match=r"10 clusters of 9 rows: give 1 \.\. 9"):
            call()


def test_as_many_clusters_as_rows_are_the_rows(digits: np.ndarray) -> None:
    few = digits[:10]
    found = kmeans.official(fan_out_of(few), data_of(few), 10, seed=0, iterations=2, redo=1)
    np.testing.assert_array_equal(found.centroids_KD, few)


def test_fewer_distinct_rows_than_clusters_ends_finite() -> None:
    """Ten distinct rows, thirty clusters: unused ones remain, nothing is NaN, the objective is that of perturbation."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(10, 6)).astype(np.float32), 12, axis=0)
    for spherical in (False, True):
        y = x / np.linalg.norm(x, axis=1, keepdims=True) if spherical else x
        found = kmeans.official(fan_out_of(y, 3), data_of(y), 30, seed=0, iterations=20, redo=2, spherical=spherical)
        assert np.isfinite(found.centroids_KD).all()
        assert found.objective < 1e-4 * float(np.square(y).sum())
    zeros = np.zeros((20, 4), np.float32)
    assert not kmeans.official(fan_out_of(zeros), data_of(zeros), 3, seed=0, iterations=5, redo=1).centroids_KD.any()
