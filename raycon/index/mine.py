"""One refresh: features in the shards -> Snapshot. The same code in one process, over ranks, and in Ray's coordinator.

Shape letters: N rows of the data set, k clusters, K neighbours, D feature width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from raycon.core.config import MiningConfig
from raycon.core.types import MissingRows, Needs, Snapshot
from raycon.index.density import density
from raycon.index.kmeans import Clustering, Data, official, warm
from raycon.index.merge import FanOut
from raycon.index.neighbours import all_neighbours

logger = logging.getLogger(__name__)

WARM_ITERATIONS = 2
"""One already reaches what twenty cold ones do; the second is for features that moved far."""


def mine(
    fan_out: FanOut, rows: int, version: int, needs: Needs, mining: MiningConfig, seed: int, previous: Snapshot | None
) -> tuple[Snapshot, dict[str, float]]:
    """The snapshot of ``version`` (CPU tensors) and its metrics: seconds per phase, and the shape of each clustering.

    The clustering at position i is seeded with ``seed + i`` (the papers': 0 + i, in every epoch), or started from
    ``previous`` when mining.init is "warm" and it has a clustering of that size there. Raises MissingRows when rows
    of this version are missing, ValueError when the features cannot give what is needed.
    """
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
    for position, k in enumerate(needs.clusterings):
        with phase("kmeans"):
            found = _cluster(fan_out, data, position, k, needs, mining, seed, previous)
        with phase("assign"):
            answers = fan_out("assign", version, found.centroids_KD)
            label_N = np.concatenate([labels for labels, _ in answers])
            sqdist_N = np.concatenate([sqdist for _, sqdist in answers])
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
            neighbours = torch.from_numpy(all_neighbours(fan_out, version, rows, needs.neighbours))
    metrics |= {f"index/{name}_seconds": value for name, value in seconds.items()}
    snapshot = Snapshot(version, tuple(assignments), tuple(prototypes), tuple(concentrations), neighbours)
    return snapshot, metrics


def _cluster(
    fan_out: FanOut,
    data: Data,
    position: int,
    k: int,
    needs: Needs,
    mining: MiningConfig,
    seed: int,
    previous: Snapshot | None,
) -> Clustering:
    if mining.init == "warm" and previous is not None and position < len(previous.assignment):
        label_N = previous.assignment[position].cpu().numpy()
        if len(label_N) == data.rows and len(previous.prototypes[position]) == k:
            return warm(fan_out, data, label_N, k, iterations=WARM_ITERATIONS, spherical=needs.spherical)
        logger.warning("the last snapshot's clustering %d has another size: starting from scratch", position)
    return official(
        fan_out,
        data,
        k,
        seed=seed + position,
        iterations=mining.iterations,
        redo=mining.redo,
        spherical=needs.spherical,
    )


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
