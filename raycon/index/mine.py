"""One refresh: features in the shards -> Snapshot. The same code in one process, over ranks, and in Ray's coordinator.

Shape letters: N rows of the data set, k clusters, K neighbours, D feature width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raycon.core.config import MiningConfig
from raycon.core.types import MissingRows, Needs, Snapshot
from raycon.index.ann import approximate_neighbours
from raycon.index.density import density
from raycon.index.fast import LocalShard, hierarchical, run_balanced, run_fast, run_minibatch, sampled_start
from raycon.index.kmeans import Clustering, Data, Running, label_means, run_official, together, warm
from raycon.index.merge import FanOut
from raycon.index.neighbours import all_neighbours
from raycon.index.shard import Shard

logger = logging.getLogger(__name__)

PROBES = 8
"""Coarse clusters in which a row looks for its centroid, when there are two levels."""


def mine(
    fan_out: FanOut, rows: int, version: int, needs: Needs, mining: MiningConfig, seed: int, previous: Snapshot | None
) -> tuple[Snapshot, dict[str, float]]:
    """The snapshot of ``version`` (CPU tensors) and its metrics: seconds per phase, and the shape of each clustering.

    The clustering at position i is seeded with ``seed + i`` (the papers': 0 + i, in every epoch), or started from
    ``previous`` when mining.init is "warm" and it has a clustering of that size there (when it has none, from a sample of
    the rows). Raises MissingRows when rows of this version are missing, ValueError when the features cannot give what is
    needed.
    """
    local = local_shards(mining)
    seconds = dict.fromkeys(("ready", "kmeans", "assign", "density", "neighbours"), 0.0)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - start

    with phase("ready"):
        states = fan_out("state", version)
        missing = sum(state.missing for state in states)
        if missing:
            raise MissingRows(f"{missing} of {rows} rows of version {version} are not in the index: add them again")
        data = Data(version, rows, max(state.radius for state in states))
    metrics: dict[str, float] = {}
    assignments, prototypes, concentrations = [], [], []
    with phase("kmeans"):
        clusterings = _cluster(fan_out, data, needs, mining, seed, previous, local, metrics)
    for position, (k, found) in enumerate(zip(needs.clusterings, clusterings, strict=True)):
        with phase("assign"):
            label_N, sqdist_N = assign(fan_out, version, found)
        with phase("density"):
            if needs.temperature > 0:
                phi_K = density(sqdist_N, label_N, k, needs.temperature).phi_K
                concentrations.append(torch.from_numpy(phi_K))
        assignments.append(torch.from_numpy(label_N))
        prototypes.append(torch.nn.functional.normalize(torch.from_numpy(found.centroids_KD), dim=1))
        metrics |= _measure(position, k, label_N, sqdist_N, found)
    neighbours = None
    if needs.neighbours:
        with phase("neighbours"):
            if mining.neighbours == "exact":
                row_NK = all_neighbours(fan_out, version, rows, needs.neighbours)
            else:
                row_NK, *shares = approximate_neighbours(
                    fan_out, data, needs.neighbours, local, recall=mining.recall, seed=seed, kind=mining.neighbours
                )
                metrics |= dict(zip(("index/neighbours_recall", "index/neighbours_compared"), shares, strict=True))
            neighbours = torch.from_numpy(row_NK)
    if mining.storage == "fp16":
        doubts = fan_out("doubt")
        metrics["index/rescored"] = sum(d.rescored for d in doubts) / max(sum(d.assigned for d in doubts), 1)
    metrics |= {f"index/{name}_seconds": value for name, value in seconds.items()}
    snapshot = Snapshot(version, tuple(assignments), tuple(prototypes), tuple(concentrations), neighbours)
    return snapshot, metrics


def local_shards(mining: MiningConfig) -> LocalShard:
    """What makes the coordinator's own shards, for samples and parts of the rows; on a GPU where it has one."""
    device = mining.device if torch.cuda.is_available() else "cpu"

    def local(rows_MD: NDArray[np.float32]) -> Shard:
        shard = Shard(0, len(rows_MD), rows_MD.shape[1], mining.threads, mining.engine, device)
        shard.put(0, 0, rows_MD)
        return shard

    return local


def assign(fan_out: FanOut, version: int, found: Clustering) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cluster of every row (N,) and the squared distance to its centroid (N,)."""
    if found.ends_G is None:
        answers = fan_out("assign", version, found.centroids_KD, found.weight_K)
    else:
        answers = fan_out("assign_below", version, found.coarse_GD, found.centroids_KD, found.ends_G, PROBES)
    return np.concatenate([labels for labels, _ in answers]), np.concatenate([sqdist for _, sqdist in answers])


def _cluster(
    fan_out: FanOut,
    data: Data,
    needs: Needs,
    mining: MiningConfig,
    seed: int,
    previous: Snapshot | None,
    local: LocalShard,
    metrics: dict[str, float],
) -> list[Clustering]:
    """All clusterings; those that make the same passes over the data make them together."""
    runs: dict[int, Running] = {}
    done: dict[int, Clustering] = {}
    warm_labels: dict[int, NDArray[np.int64]] = {}
    for position, k in enumerate(needs.clusterings):
        own: dict[str, Any] = {"seed": seed + position, "spherical": needs.spherical}
        label_N = _earlier(data, position, k, previous) if mining.init == "warm" else None
        if mining.algorithm == "hierarchical":
            done[position] = hierarchical(fan_out, data, k, local, iterations=mining.iterations, **own)
        elif mining.algorithm == "minibatch" or mining.balanced:
            if label_N is not None:
                start_KD = label_means(fan_out, data, label_N, k, spherical=needs.spherical)
            else:
                start_KD = sampled_start(fan_out, data, k, local, **own)
            if mining.balanced:
                runs[position] = run_balanced(
                    data, k, start_KD, iterations=mining.iterations, spherical=needs.spherical
                )
            else:
                runs[position] = run_minibatch(fan_out, data, k, start_KD, **own)
        elif label_N is not None and k < data.rows:
            warm_labels[position] = label_N
        elif mining.init == "warm":
            runs[position] = run_fast(fan_out, data, k, local, iterations=mining.iterations, **own)
        else:
            runs[position] = run_official(fan_out, data, k, iterations=mining.iterations, redo=mining.redo, **own)
    if warm_labels:

        def neighbours(centroids_KD: NDArray[np.float32], count: int) -> NDArray[np.int64]:
            return local(centroids_KD[:1]).engine.search(centroids_KD, centroids_KD, count)[1]

        sizes = [needs.clusterings[position] for position in warm_labels]
        found, moves = warm(fan_out, data, list(warm_labels.values()), sizes, neighbours, spherical=needs.spherical)
        done |= dict(zip(warm_labels, found, strict=True))
        metrics["index/moves"] = moves
    done |= dict(zip(runs, together(fan_out, data, list(runs.values())), strict=True))
    return [done[position] for position in range(len(needs.clusterings))]


def _earlier(data: Data, position: int, k: int, previous: Snapshot | None) -> NDArray[np.int64] | None:
    """The labels (N,) that a warm start begins at, None when there are none that fit."""
    if previous is None or position >= len(previous.assignment):
        return None
    label_N: NDArray[np.int64] = previous.assignment[position].cpu().numpy()
    if len(label_N) == data.rows and len(previous.prototypes[position]) == k:
        return label_N
    logger.warning("the last snapshot's clustering %d has another size: starting from scratch", position)
    return None


def _measure(
    position: int, k: int, label_N: NDArray[np.int64], sqdist_N: NDArray[np.float32], found: Clustering
) -> dict[str, float]:
    count_K = np.bincount(label_N, minlength=k)
    used = int(np.count_nonzero(count_K))
    return {
        f"index/{position}/{name}": float(value)
        for name, value in {
            "objective": sqdist_N.sum(dtype=np.float64),  # of the final centroids
            "iterations": found.iterations,
            "used": used,
            "empty": k - used,
            "largest": count_K.max(),
            # faiss's imbalance factor: 1 when all clusters are equal, k when one has everything.
            "imbalance": k * float(np.square(count_K / len(label_N)).sum()),
        }.items()
    }
