"""k-means for when the papers' protocol is not wanted: a good start from a sample, slices of the rows, two levels.

The centroids are a pure function of (features, seed): the same bits for any number of shards. Shape letters: N rows of the data
set, M rows of a sample, K clusters, G coarse clusters, D feature width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from raycon.index.engine import Engine
from raycon.index.kmeans import (
    Ask,
    Clustering,
    Data,
    Running,
    check_clusters,
    every_row,
    run_lloyd,
    together,
    unit,
    update,
)
from raycon.index.merge import FanOut, gather
from raycon.index.shard import Shard

TOLERANCE = 1e-3
"""Lloyd ends when an iteration lowers the objective by this share of it or less."""
_SAMPLE = 32
"""Rows per cluster that a start looks at."""
_ROUNDS = 32
"""Rounds in which centroids are drawn."""
_SLICES = 8
"""Slices of the rows that mini-batch k-means goes through one after the other."""

LocalShard = Callable[[NDArray[np.float32]], Shard]
"""Makes a shard of the coordinator's own, filled with the rows (M, D) given, as version 0."""


def sample_rows(rows: int, count: int) -> NDArray[np.int64]:
    """About ``count`` rows at equal distances, so that data sorted by class are sampled evenly; all when there are no more."""
    return np.arange(0, rows, max(rows // max(count, 1), 1))


def plus_plus(
    engine: Engine, rows_MD: NDArray[np.float32], k: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    """(k, D) of the rows, drawn in rounds with a probability proportional to the squared distance to those drawn before.

    k-means++ (Arthur and Vassilvitskii 2007) draws one in each round and so needs k passes; here ``_ROUNDS`` rounds
    draw equally many, at the cost of one iteration of k-means over the sample (compare k-means||, Bahmani et al. 2012).
    When fewer rows than k are distinct the rest are drawn uniformly. Needs k <= M.
    """
    total = len(rows_MD)
    assert k <= total
    chosen = np.array([generator.integers(total)])
    sqdist_M = np.full(total, np.inf)
    latest = chosen
    while len(chosen) < k:
        near = engine.nearest(rows_MD[latest])
        for start in range(0, total, engine.block):
            block = torch.from_numpy(rows_MD[start : start + engine.block]).to(engine.device)
            found = near(block).sqdist_N.cpu().numpy()
            sqdist_M[start : start + len(found)] = np.minimum(sqdist_M[start : start + len(found)], found)
        sqdist_M[chosen] = 0.0
        wanted = min(math.ceil(k / _ROUNDS), k - len(chosen))
        positive = np.flatnonzero(sqdist_M)
        if len(positive) >= wanted:
            # Exponential races: the smallest of E / weight are a draw without replacement, proportional to the weights.
            race = generator.exponential(size=len(positive)) / sqdist_M[positive]
            latest = positive[np.argpartition(race, wanted - 1)[:wanted]]
        else:
            rest = np.setdiff1d(np.arange(total), chosen, assume_unique=True)
            latest = generator.permutation(rest)[:wanted]
        latest = np.sort(latest)
        chosen = np.concatenate([chosen, latest])
    return rows_MD[chosen]


def sampled_start(
    fan_out: FanOut, data: Data, k: int, local: LocalShard, *, seed: int, spherical: bool = False
) -> NDArray[np.float32]:
    """(k, D) centroids to start Lloyd from: drawn from a sample of 32 rows per cluster, and moved on it for 5 iterations
    (not when the sample is half of the rows or more: those iterations would cost as much as real ones)."""
    check_clusters(data.rows, k)
    rows_MD = gather(fan_out, data.version, sample_rows(data.rows, max(_SAMPLE * k, 1)))
    shard = local(rows_MD)
    start_KD = plus_plus(shard.engine, rows_MD, k, np.random.default_rng([seed, k]))
    if spherical:
        start_KD = unit(start_KD)
    if 2 * len(rows_MD) >= data.rows:
        return start_KD
    part = data._replace(version=0, rows=len(rows_MD))
    return together(_alone(shard), part, [run_lloyd(part, start_KD, 5, spherical, TOLERANCE)])[0].centroids_KD


def run_fast(
    fan_out: FanOut, data: Data, k: int, local: LocalShard, *, seed: int, iterations: int, spherical: bool = False
) -> Running:
    """A fresh start without the papers' restarts: ``sampled_start``, then Lloyd until it hardly gains (``TOLERANCE``)."""
    check_clusters(data.rows, k)
    if data.rows == k:
        return every_row(fan_out, data, spherical)
    start_KD = sampled_start(fan_out, data, k, local, seed=seed, spherical=spherical)
    return (yield from run_lloyd(data, start_KD, iterations, spherical, TOLERANCE))


def run_minibatch(
    fan_out: FanOut,
    data: Data,
    k: int,
    start_KD: NDArray[np.float32],
    *,
    seed: int,
    epochs: int = 2,
    spherical: bool = False,
) -> Running:
    """Mini-batch k-means (Sculley 2010): centroids move after every slice of the rows, towards the mean of all rows they
    were given in this pass; one Lloyd iteration over all rows ends it.

    A slice is every eighth row (of fewer than 8 x 16 x K rows: every fourth, ..., so that it has 16 rows per cluster), so
    it holds each class in proportion however the data are sorted. ``epochs`` + 1 passes in all.
    """
    check_clusters(data.rows, k)
    if data.rows == k:
        return every_row(fan_out, data, spherical)
    slices = int(min(_SLICES, max(1, data.rows // (16 * k))))
    centroids_KD, generator = start_KD.astype(np.float64), np.random.default_rng([seed, k, 1])
    for _ in range(epochs):
        seen_K = np.zeros(k)
        for first in generator.permutation(slices):
            asked_KD = centroids_KD.astype(np.float32)
            sums_KD, counts_K, _ = yield Ask(unit(asked_KD) if spherical else asked_KD, (int(first), slices))
            seen_K += counts_K
            used_K = counts_K > 0
            moved_KD = sums_KD[used_K] - counts_K[used_K, None] * centroids_KD[used_K]
            centroids_KD[used_K] += moved_KD / seen_K[used_K, None]
    asked_KD = centroids_KD.astype(np.float32)
    sums_KD, counts_K, objective = yield Ask(unit(asked_KD) if spherical else asked_KD)
    return Clustering(update(sums_KD, counts_K, data.rows, spherical), objective, epochs + 1)


def run_balanced(
    data: Data, k: int, start_KD: NDArray[np.float32], *, iterations: int, spherical: bool = False
) -> Running:
    """Lloyd with a weight per cluster that grows while the cluster is too large: clusters of nearly equal size.

    Rows choose the centroid of the smallest squared distance plus weight (a power diagram), and the weights follow the
    logarithm of size / (N / K): subgradient steps on the dual of the transport problem whose solution gives every
    cluster the same mass, each weight with a step of its own that grows while the sign stays and shrinks when it turns
    (Rprop). The most even iteration is returned. Sizes come near to N / K, they are not forced to be equal.
    """
    check_clusters(data.rows, k)
    centroids_KD, weight_K, best = start_KD, np.zeros(k), None
    step_K, before_K = np.zeros(k), np.zeros(k)
    for i in range(iterations):
        sums_KD, counts_K, objective = yield Ask(centroids_KD, weight_K=weight_K)
        spread = float(np.square(counts_K / data.rows).sum() * k)
        if best is None or spread < best[0]:
            best = (spread, Clustering(centroids_KD, objective, i + 1, weight_K))
        means_KD = (sums_KD / np.maximum(counts_K, 1)[:, None]).astype(np.float32)
        means_KD[counts_K == 0] = centroids_KD[counts_K == 0]  # its weight falls until it is chosen
        centroids_KD = unit(means_KD) if spherical else means_KD
        over_K = np.log((counts_K + 1) * k / (data.rows + k)).clip(-1, 1)
        if i == 0:
            step_K[:] = 0.02 * objective / data.rows
        else:
            step_K = np.minimum(step_K * np.where(over_K * before_K > 0, 1.1, 0.7), 0.1 * objective / data.rows)
        before_K = over_K
        weight_K = weight_K + step_K * over_K
        weight_K -= weight_K.mean()
    assert best is not None
    return best[1]._replace(iterations=iterations)


def hierarchical(
    fan_out: FanOut,
    data: Data,
    k: int,
    local: LocalShard,
    *,
    seed: int,
    iterations: int,
    spherical: bool = False,
) -> Clustering:
    """Two levels: about sqrt(k) coarse clusters of all rows, each then cut into a number in proportion to its rows.

    About 2 N sqrt(k) D multiplications per iteration in place of N k D. The rows of one coarse cluster at a time come
    to the coordinator. Rows are then assigned by ``assign_below``.
    """
    check_clusters(data.rows, k)
    if data.rows == k:
        return every_row(fan_out, data, spherical)
    groups = max(1, round(math.sqrt(k)))
    coarse_run = run_fast(fan_out, data, groups, local, seed=seed, iterations=iterations, spherical=spherical)
    coarse = together(fan_out, data, [coarse_run])[0]
    label_N = np.concatenate([labels for labels, _ in fan_out("assign", data.version, coarse.centroids_KD)])
    counts_G = np.bincount(label_N, minlength=groups)
    shares_G = proportional(counts_G, k)
    order_N = np.argsort(label_N, kind="stable")
    below, objective = [], 0.0
    for group, (start, stop) in enumerate(itertools.pairwise(np.cumsum([0, *counts_G]))):
        if start == stop:
            continue
        rows_MD = gather(fan_out, data.version, order_N[start:stop])
        part = data._replace(version=0, rows=len(rows_MD))
        shard = _alone(local(rows_MD))
        run = run_fast(shard, part, int(shares_G[group]), local, seed=seed + group + 1, iterations=iterations)
        found = together(shard, part, [run])[0]
        objective += found.objective
        below.append(found.centroids_KD)
    centroids_KD = np.concatenate(below)
    return Clustering(
        unit(centroids_KD) if spherical else centroids_KD,
        objective,
        coarse.iterations + iterations,
        coarse_GD=coarse.centroids_KD[counts_G > 0],
        ends_G=np.cumsum(shares_G[counts_G > 0]),
    )


def proportional(counts_G: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """(G,) parts of ``k`` in proportion to the counts, at least 1 and at most the count where there are rows, else 0.

    Largest remainders first. Needs (groups with rows) <= k <= sum of the counts.
    """
    assert np.count_nonzero(counts_G) <= k <= counts_G.sum()
    ideal_G = counts_G * (k / counts_G.sum())
    share_G = np.minimum(np.maximum(np.floor(ideal_G).astype(np.int64), counts_G > 0), counts_G)
    while (missing := k - int(share_G.sum())) != 0:
        sign = 1 if missing > 0 else -1
        free_G = np.flatnonzero(share_G < counts_G if sign > 0 else share_G > 1)
        worst = free_G[np.argsort(sign * (share_G - ideal_G)[free_G], kind="stable")][: abs(missing)]
        share_G[worst] += sign
    return share_G


def _alone(shard: Shard) -> FanOut:
    def fan_out(method: str, *args: object) -> list[object]:
        return [getattr(shard, method)(*args)]

    return fan_out
