"""Exact k-means over shards: the coordinator's side, which holds centroids and no features.

An algorithm is a generator: it yields what it wants of a pass over the data (``Ask``), is sent the merged answer, and
returns a ``Clustering``. ``together`` runs several of them at once, and those that ask for the same rows share a pass.

``official`` is faiss's algorithm (faiss/Clustering.cpp, 1.15), as PCL and Cl-InfoNCE call it: k distinct rows drawn by
a seeded permutation, a fixed number of Lloyd iterations, several restarts of which the lowest objective is kept, and
its rule for empty clusters. Two things differ: sums are exact (faiss adds in float32), and no row is ever left out
(faiss draws a sample when N is more than 256 k, or 1000 k as PCL sets it).

Shape letters: N rows of the data set, K clusters, D feature width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycon.index.merge import FanOut, gather, merge_steps

_RESTART = 15486557
"""faiss's distance between the seeds of two restarts."""
_SPLIT_SEED = 1234
"""faiss starts this generator anew in every iteration."""
_SPLIT = np.float32(1 / 1024)
MOVES = 6
"""Most passes among near clusters of a warm start."""
BESIDE = 8
"""Clusters, its own with them, that a row then looks at."""
_RELAXED = 1.9
"""How far a centroid goes on its way to its mean between two of those passes (1: to it)."""
_SETTLED = 0.002
"""Share of the rows changing their cluster below which those passes end."""


class Data(NamedTuple):
    """What is to be clustered, as the shards know it."""

    version: int
    rows: int
    """N."""
    radius: float
    """Largest norm of a row."""


class Clustering(NamedTuple):
    centroids_KD: NDArray[np.float32]
    """Not normalised, unless spherical."""
    objective: float
    """Sum of squared distances before the last update: what restarts are compared by."""
    iterations: int
    """Passes over the data, of all restarts together (of slices of it: their number divided by that of the slices)."""
    weight_K: NDArray[np.float64] | None = None
    """Balanced: added to the squared distances when rows choose their centroid; None: nothing is."""
    coarse_GD: NDArray[np.float32] | None = None
    """On two levels: the coarse centroids. Those below one lie together in ``centroids_KD``."""
    ends_G: NDArray[np.int64] | None = None
    """On two levels: where in ``centroids_KD`` the centroids below each coarse one end."""


class Ask(NamedTuple):
    """One pass over the data: the rows first, first + stride, ... are assigned to the centroids and added up."""

    centroids_KD: NDArray[np.float32]
    slice_of: tuple[int, int] = (0, 1)
    weight_K: NDArray[np.float64] | None = None


class Sums(NamedTuple):
    """The answer."""

    sums_KD: NDArray[np.float64]
    counts_K: NDArray[np.int64]
    objective: float


Running = Generator[Ask, Sums, Clustering]
Neighbours = Callable[[NDArray[np.float32], int], NDArray[np.int64]]


def together(fan_out: FanOut, data: Data, runs: Sequence[Running]) -> list[Clustering]:
    """The results of several clusterings, run side by side: each is the same, to the bit, as if it ran alone."""
    done: dict[int, Clustering] = {}
    asks: dict[int, Ask] = {}

    def go_on(i: int, answer: Sums | None) -> None:
        try:
            asks[i] = next(runs[i]) if answer is None else runs[i].send(answer)
        except StopIteration as end:
            asks.pop(i, None)
            done[i] = end.value

    for i in range(len(runs)):
        go_on(i, None)
    while asks:
        first = next(iter(asks.values()))
        group = [
            i
            for i, ask in asks.items()
            if ask.slice_of == first.slice_of and (ask.weight_K is None) == (first.weight_K is None)
        ]
        weight_K = None
        if first.weight_K is not None:
            weight_K = np.concatenate([w for i in group if (w := asks[i].weight_K) is not None])
        centroids_KD = np.concatenate([asks[i].centroids_KD for i in group])
        sizes = tuple(len(asks[i].centroids_KD) for i in group)
        answers = fan_out("steps", data.version, centroids_KD, sizes, data.rows, data.radius, first.slice_of, weight_K)
        for number, i in enumerate(group):
            go_on(i, Sums(*merge_steps([answer[number] for answer in answers])))
    return [done[i] for i in range(len(runs))]


def faiss_permutation(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """The first ``count`` of faiss.rand_perm(rows, seed): a shuffle by the Mersenne twister mt19937."""
    order = np.arange(rows)
    swaps = min(count, rows - 1)
    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, swaps, dtype=np.uint32).astype(np.int64)
    for i, other in enumerate(np.arange(swaps) + draws % (rows - np.arange(swaps))):
        order[i], order[other] = order[other], order[i]
    return order[:count].copy()


def split_empty(centroids_KD: NDArray[np.float32], counts_K: NDArray[np.int64], rows: int) -> int:
    """faiss's rule for empty clusters, in place; returns how many there were.

    Each takes half of a cluster j: walking round the clusters, j is chosen with probability (n_j - 1) / (N - K); both
    centroids are then moved apart by 1/1024 of each coordinate. Needs rows > K.
    """
    empty = np.flatnonzero(counts_K == 0)
    if not len(empty):
        return 0
    k, size_K = len(counts_K), counts_K.astype(np.float32)
    assert rows > k
    generator = np.random.RandomState(_SPLIT_SEED)
    chance_K = ((size_K.astype(np.float64) - 1.0) / np.float32(rows - k)).astype(np.float32)
    draws = np.empty(0, dtype=np.float32)
    step = np.where(np.arange(centroids_KD.shape[1]) % 2 == 0, _SPLIT, -_SPLIT)
    for target in empty:
        while True:
            if len(draws) < k:
                more = generator.randint(0, 2**32, max(k, 4096), dtype=np.uint32)
                draws = np.concatenate([draws, more.astype(np.float32) / np.float32(2**32)])
            hits = np.flatnonzero(draws[:k] < chance_K)
            used = int(hits[0]) + 1 if len(hits) else k
            draws = draws[used:]
            if len(hits):
                break
        donor = used - 1
        centroids_KD[target] = centroids_KD[donor] * (1 + step)
        centroids_KD[donor] *= 1 - step
        size_K[target] = size_K[donor] / 2
        size_K[donor] -= size_K[target]
        for changed in (target, donor):
            chance_K[changed] = np.float32((np.float64(size_K[changed]) - 1.0) / np.float32(rows - k))
    return len(empty)


def update(
    sums_KD: NDArray[np.float64], counts_K: NDArray[np.int64], rows: int, spherical: bool
) -> NDArray[np.float32]:
    """The new centroids: means, empty clusters refilled by splitting, rows normalised when spherical."""
    centroids_KD = (sums_KD / np.maximum(counts_K, 1)[:, None]).astype(np.float32)
    split_empty(centroids_KD, counts_K, rows)
    return unit(centroids_KD) if spherical else centroids_KD


def lloyd(
    fan_out: FanOut,
    data: Data,
    centroids_KD: NDArray[np.float32],
    iterations: int,
    spherical: bool = False,
    tolerance: float = 0.0,
) -> Clustering:
    """``run_lloyd``, alone."""
    return together(fan_out, data, [run_lloyd(data, centroids_KD, iterations, spherical, tolerance)])[0]


def run_lloyd(
    data: Data, centroids_KD: NDArray[np.float32], iterations: int, spherical: bool = False, tolerance: float = 0.0
) -> Running:
    """Lloyd's iterations from given centroids; ends early when an iteration changes nothing, or lowers the objective
    by ``tolerance`` of it or less (0: runs on).

    Spherical k-means is the same with unit centroids: for unit rows the smallest distance is the largest cosine.
    """
    objective, passes = float("inf"), 0
    for _ in range(iterations):
        before = objective
        sums_KD, counts_K, objective = yield Ask(centroids_KD)
        new_KD = update(sums_KD, counts_K, data.rows, spherical)
        passes += 1
        # Sums are exact, so the centroids stay what they are, to the bit, exactly when no row changes its cluster.
        fixed = np.array_equal(new_KD, centroids_KD)
        centroids_KD = new_KD
        if fixed or (tolerance > 0 and before - objective <= tolerance * before < np.inf):
            break
    return Clustering(centroids_KD, objective, passes)


def official(
    fan_out: FanOut, data: Data, k: int, *, seed: int, iterations: int, redo: int, spherical: bool = False
) -> Clustering:
    """``run_official``, alone."""
    run = run_official(fan_out, data, k, seed=seed, iterations=iterations, redo=redo, spherical=spherical)
    return together(fan_out, data, [run])[0]


def run_official(
    fan_out: FanOut, data: Data, k: int, *, seed: int, iterations: int, redo: int, spherical: bool = False
) -> Running:
    """A cold start by faiss's rules. Raises ValueError when there are fewer rows than clusters."""
    check_clusters(data.rows, k)
    if data.rows == k:
        return every_row(fan_out, data, spherical)
    best: Clustering | None = None
    passes = 0
    for restart in range(redo):
        start = faiss_permutation(data.rows, k, seed + 1 + restart * _RESTART)
        centroids_KD = gather(fan_out, data.version, start)
        found = yield from run_lloyd(data, unit(centroids_KD) if spherical else centroids_KD, iterations, spherical)
        passes += found.iterations
        if best is None or found.objective < best.objective:
            best = found
    assert best is not None
    return best._replace(iterations=passes)


def warm(
    fan_out: FanOut,
    data: Data,
    label_CN: Sequence[NDArray[np.int64]],
    clusters: Sequence[int],
    neighbours: Neighbours,
    *,
    moves: int = MOVES,
    iterations: int = 1,
    spherical: bool = False,
) -> tuple[list[Clustering], int]:
    """Clusterings of ``clusters`` clusters each from earlier labels (N,) of each: clusterings and moves made.

    They start at the means of the present features under the earlier labels, which no turn of the space affects. What
    is left to do is to follow the features that came to other clusters, and nearly all of them come to one beside
    theirs: so first ``moves`` passes in which a row looks at the ``BESIDE`` nearest clusters only, at a small part of the
    cost of a Lloyd iteration, then Lloyd's ``iterations``. Between the moves centroids go ``_RELAXED`` times as far
    as to their means (over-relaxation, which Lloyd's iteration stands well beyond 1). Moves end early when no more than
    ``_SETTLED`` of the rows change their cluster. ``neighbours``: (centroids (K, D), count) -> the count nearest of each.
    """
    for k in clusters:
        check_clusters(data.rows, k)
    starts = [
        label_means(fan_out, data, label_N, k, spherical=spherical)
        for label_N, k in zip(label_CN, clusters, strict=True)
    ]
    ends = np.cumsum([0, *clusters])
    made = 0
    if moves:
        parts = list(itertools.pairwise(ends))
        beside = min(BESIDE, *clusters)
        near_KM = np.concatenate([neighbours(c, beside) + a for c, (a, _) in zip(starts, parts, strict=True)])
        near_KM = near_KM.astype(np.int32)
        label_CA = np.stack([label_N + a for label_N, (a, _) in zip(label_CN, parts, strict=True)]).astype(np.int32)
        centroids_KD = np.concatenate(starts)
    for made in range(1, moves + 1):
        label = label_CA if made == 1 else None  # shards remember where their rows are
        answers = fan_out("move", data.version, label, centroids_KD, near_KM, data.rows, data.radius)
        sums_KD, counts_K, _ = merge_steps([(sums, counts, 0.0) for sums, counts, _ in answers])
        means_KD = np.concatenate([update(sums_KD[a:b], counts_K[a:b], data.rows, spherical) for a, b in parts])
        settled = sum(answer.moved for answer in answers) <= _SETTLED * label_CA.size
        if settled or made == moves:
            starts = [means_KD[a:b] for a, b in parts]
            break
        # An empty cluster's new place is that of the cluster it splits: not to be overshot.
        far_KD = centroids_KD + np.float32(_RELAXED) * (means_KD - centroids_KD)
        centroids_KD = np.where((counts_K > 0)[:, None], far_KD, means_KD).astype(np.float32)
        if spherical:
            centroids_KD = unit(centroids_KD)
    return together(fan_out, data, [run_lloyd(data, c, iterations, spherical) for c in starts]), made


def label_means(
    fan_out: FanOut, data: Data, label_N: NDArray[np.int64], k: int, *, spherical: bool = False
) -> NDArray[np.float32]:
    """(K, D) means of the present features under given labels (N,), empty clusters refilled by splitting."""
    sums_KD, counts_K, _ = merge_steps(fan_out("label_sums", data.version, label_N, k, data.rows, data.radius))
    return update(sums_KD, counts_K, data.rows, spherical)


def every_row(fan_out: FanOut, data: Data, spherical: bool) -> Clustering:
    """As many clusters as rows: every row is its own centroid, as with faiss."""
    centroids_KD = gather(fan_out, data.version, np.arange(data.rows))
    return Clustering(unit(centroids_KD) if spherical else centroids_KD, 0.0, 0)


def check_clusters(rows: int, k: int) -> None:
    if not 1 <= k <= rows:
        raise ValueError(f"{k} clusters of {rows} rows: give 1 .. {rows}")


def unit(centroids_KD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows; a row of zeros stays one."""
    norm_K = np.linalg.norm(centroids_KD.astype(np.float64), axis=1)
    return (centroids_KD / np.where(norm_K > 0, norm_K, 1.0)[:, None]).astype(np.float32)
