"""Approximate neighbours of all rows, at a recall that is chosen beforehand and measured afterwards.

``ivf``: the rows are sorted into about 2 sqrt(N) lists by a small k-means. The rows of one list are searched together,
as one matrix product, in a few lists: those nearest to its rows. How many is decided by the
recall wanted, on a sample of rows whose true neighbours are searched exactly; another sample then tells the recall
that was reached. ``hnsw``: faiss's graph per shard, its breadth chosen in the same way.

Shape letters: N rows of the data set, S sampled rows, L lists, K neighbours, D feature width.
"""

from __future__ import annotations

import itertools
import logging
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raycon.index.fast import LocalShard, plus_plus, sample_rows
from raycon.index.kmeans import Data, run_lloyd, together
from raycon.index.merge import FanOut, gather
from raycon.index.neighbours import QUERIES, all_neighbours, search

logger = logging.getLogger(__name__)

Kind = Literal["ivf", "hnsw"]

EXACT_BELOW = 8192
"""With fewer rows than this the exact search is as cheap."""
_SAMPLE = 512
"""Rows whose true neighbours choose the lists, and as many others that measure the recall."""
_MARGIN = 0.001
"""Recall aimed for above the one wanted: about the standard error of the sample."""
_TOP = 16
_ROWS_PER_LIST = 32
"""Rows per list that its centroid is trained on."""
_BATCH = 4096
"""Queries of one call to the shards, at least."""


class Mined(NamedTuple):
    row_NK: NDArray[np.int64]
    """Nearest first, self left out."""
    recall: float
    """Share of the true neighbours found, of the second sample; 1 when the search was exact."""
    compared: float
    """Share of all N x N pairs that were compared (ivf); 1 when exact, NaN for hnsw."""


def approximate_neighbours(
    fan_out: FanOut, data: Data, count: int, local: LocalShard, *, recall: float, seed: int, kind: Kind = "ivf"
) -> Mined:
    """The ``count`` nearest other rows of every row, of which a share ``recall`` are found (0 < recall <= 1).

    Warns when the recall measured is below the one wanted. Raises ValueError when there are not so many rows.
    """
    if data.rows < EXACT_BELOW or recall == 1:
        return Mined(all_neighbours(fan_out, data.version, data.rows, count), 1.0, 1.0)
    sample_S = np.sort(np.random.default_rng([seed, data.rows]).choice(data.rows, 2 * _SAMPLE, replace=False))
    true_SK = np.concatenate(
        [
            search(fan_out, data.version, gather(fan_out, data.version, rows), count, rows)[1]
            for rows in np.array_split(sample_S, -(-len(sample_S) // QUERIES))
        ]
    )
    tuning = np.arange(len(sample_S)) % 2 == 0
    aim = min(recall + _MARGIN, 1.0)
    make = _by_lists if kind == "ivf" else _by_graph
    row_NK, compared = make(fan_out, data, count, local, seed, sample_S[tuning], true_SK[tuning], aim)
    reached = _recall(row_NK[sample_S[~tuning]], true_SK[~tuning])
    if reached < recall:
        logger.warning(
            "neighbours by %s: recall %.4f on %d rows, below mining.recall = %g", kind, reached, _SAMPLE, recall
        )
    return Mined(row_NK, reached, compared)


def _recall(found_SK: NDArray[np.int64], true_SK: NDArray[np.int64]) -> float:
    return float((found_SK[:, :, None] == true_SK[:, None, :]).any(1).mean())


def _by_lists(
    fan_out: FanOut,
    data: Data,
    count: int,
    local: LocalShard,
    seed: int,
    tuning_S: NDArray[np.int64],
    true_SK: NDArray[np.int64],
    aim: float,
) -> tuple[NDArray[np.int64], float]:
    """(N, K) neighbours and the share of pairs compared."""
    lists = round(2 * data.rows**0.5)
    rows_MD = gather(fan_out, data.version, sample_rows(data.rows, _ROWS_PER_LIST * lists))
    shard = local(rows_MD)
    start_LD = plus_plus(shard.engine, rows_MD, lists, np.random.default_rng([seed, lists]))
    part = Data(0, len(rows_MD), data.radius)

    def alone(method: str, *args: object) -> list[object]:
        return [getattr(shard, method)(*args)]

    centroids_LD = together(alone, part, [run_lloyd(part, start_LD, 3)])[0].centroids_KD
    answers = fan_out("lists", data.version, centroids_LD, _TOP)
    list_N = np.concatenate([a[0] for a in answers])
    interest_LL = np.sum([a[1] for a in answers], axis=0) / np.maximum(np.bincount(list_N, minlength=lists), 1)[:, None]
    # Lists that are among the eight nearest of no row come after all others, nearer ones first.
    apart_LL = np.square(centroids_LD[:, None, :1] - centroids_LD[None, :, :1])[..., 0]
    for d in range(1, centroids_LD.shape[1]):
        apart_LL += np.square(centroids_LD[:, None, d] - centroids_LD[None, :, d])
    priority_LL = interest_LL - 1e-6 * apart_LL / max(float(apart_LL.max()), 1e-30)
    of_true = np.sort(priority_LL[list_N[tuning_S][:, None], list_N[true_SK]].ravel())
    least = of_true[min(int((1 - aim) * len(of_true)), len(of_true) - 1)]
    picked_LL = priority_LL >= least
    return _search_picked(fan_out, data, count, list_N, picked_LL, priority_LL)


def _search_picked(
    fan_out: FanOut,
    data: Data,
    count: int,
    list_N: NDArray[np.int64],
    picked_LL: NDArray[np.bool_],
    priority_LL: NDArray[np.float64],
) -> tuple[NDArray[np.int64], float]:
    """Search the rows of each list in the lists picked for it, and in more where those hold too few rows."""
    lists = len(picked_LL)
    counts_L = np.bincount(list_N, minlength=lists)
    order_N = np.argsort(list_N, kind="stable")
    ends_L = np.cumsum(counts_L)
    picks: list[NDArray[np.int64]] = []
    for number in range(lists):
        order_L = np.argsort(-priority_LL[number], kind="stable")
        enough = int(np.searchsorted(np.cumsum(counts_L[order_L]), 2 * count + 1)) + 1
        picks.append(order_L[: max(int(picked_LL[number].sum()), enough)])
    compared = sum(int(counts_L[i]) * int(counts_L[p].sum()) for i, p in enumerate(picks)) / data.rows**2
    row_NK = np.empty((data.rows, count), dtype=np.int64)
    # Batches of whole lists.
    cuts = [0, *np.flatnonzero(np.diff(ends_L // _BATCH)) + 1, lists]
    for first, last in itertools.pairwise(sorted(set(cuts))):
        rows_Q = order_N[(ends_L[first - 1] if first else 0) : ends_L[last - 1]]
        if not len(rows_Q):
            continue
        queries_QD = gather(fan_out, data.version, rows_Q)
        groups = tuple(int(c) for c in counts_L[first:last])
        answers = fan_out("search_lists", data.version, queries_QD, rows_Q, groups, picks[first:last], count)
        row_NK[rows_Q] = _nearest_of(answers, count)
    return row_NK, compared


def _by_graph(
    fan_out: FanOut,
    data: Data,
    count: int,
    local: LocalShard,
    seed: int,
    tuning_S: NDArray[np.int64],
    true_SK: NDArray[np.int64],
    aim: float,
) -> tuple[NDArray[np.int64], float]:
    """(N, K) neighbours by HNSW; the breadth is doubled from 32 until the sample's recall is reached, up to 2048."""

    def find(rows_Q: NDArray[np.int64], breadth: int) -> NDArray[np.int64]:
        queries_QD = gather(fan_out, data.version, rows_Q)
        return _nearest_of(fan_out("search_graph", data.version, queries_QD, rows_Q, count, breadth), count)

    breadth = 32
    while breadth < 2048 and _recall(find(tuning_S, breadth), true_SK) < aim:
        breadth *= 2
    row_NK = np.empty((data.rows, count), dtype=np.int64)
    for start in range(0, data.rows, _BATCH):
        rows_Q = np.arange(start, min(start + _BATCH, data.rows))
        row_NK[rows_Q] = find(rows_Q, breadth)
    return row_NK, float("nan")


def _nearest_of(answers: list[tuple[NDArray[np.float32], NDArray[np.int64]]], count: int) -> NDArray[np.int64]:
    """(Q, count) rows of the smallest distances over all shards, whose answers are sorted."""
    if len(answers) == 1:
        return answers[0][1]
    sqdist_QK, row_QK = (np.concatenate([a[i] for a in answers], axis=1) for i in (0, 1))
    return np.take_along_axis(row_QK, np.argsort(sqdist_QK, axis=1, kind="stable")[:, :count], 1)  # type: ignore[no-any-return]
