"""How many whole trials a cluster can hold at once, so that trials never wait for each other for ever. Without Ray.

A trial is placed whole or not at all: its workers, the CPUs its evaluations and its index actors ask for, and the
memory of those actors. Resources are dicts as Ray has them: {"CPU": 4, "GPU": 1, "memory": 8e9}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from raycon.core.config import Facts, RunConfig
from raycon.index.plan import shard_bytes

Bundle = dict[str, float]

DRIVER_MEMORY = 256 * 2**20
"""Bytes set aside for the process that leads a trial. Not a CPU: it waits for the workers."""
KEPT = "not spot"
"""A resource of nodes that are not spot nodes, as on_ray/index.py asks for them; each index actor takes next to none."""
_EPSILON = 1e-6


def bundles(config: RunConfig, facts: Facts, dim: int) -> list[Bundle]:
    """What one trial asks for, a bundle per process. ``dim``: width of the indexed features, 0 for no index."""
    scaling, mining = config.scaling, config.mining
    found = [_bundle(scaling.cpus_per_worker, scaling.gpus_per_worker)] * scaling.workers
    if config.evals.cpus or config.evals.gpus:
        found.append(_bundle(config.evals.cpus, config.evals.gpus))
    if dim:
        shards = min(mining.shards, facts.rows)
        memory = float(shard_bytes(facts.rows, dim, shards, mining.storage))  # as on_ray/index.py reserves it
        found += [_bundle(mining.cpus, mining.gpus) | {"memory": memory, KEPT: 1.0}] * shards
    return [*found, {"memory": float(DRIVER_MEMORY)}]


def _bundle(cpus: float, gpus: float) -> Bundle:
    return {k: v for k, v in {"CPU": cpus, "GPU": gpus}.items() if v}


def most_trials(trial: Sequence[Bundle], nodes: Sequence[Mapping[str, float]], limit: int) -> int:
    """The largest number of trials, up to ``limit``, whose bundles all fit on the nodes; 0 when not even one does.

    First fit, largest bundles first. A share of a GPU never spans two GPUs.
    """
    number = 0
    while number < limit and fits([_whole_shares(b) for b in trial] * (number + 1), nodes):
        number += 1
    return number


def fits(wanted: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> bool:
    free = [dict(node) for node in nodes]
    for bundle in sorted(
        wanted, key=lambda b: (b.get("GPU", 0.0), b.get("CPU", 0.0), b.get("memory", 0.0)), reverse=True
    ):
        for node in free:
            if all(node.get(what, 0.0) + _EPSILON >= amount for what, amount in bundle.items()):
                for what, amount in bundle.items():
                    node[what] -= amount
                break
        else:
            return False
    return True


def _whole_shares(bundle: Bundle) -> Bundle:
    """0.4 of a GPU as 1/2: two of them fit on one GPU, and never two and a half."""
    gpus = bundle.get("GPU", 0.0)
    return bundle | {"GPU": 1 / math.floor(1 / gpus + _EPSILON)} if 0 < gpus < 1 else bundle


def told(trial: Sequence[Bundle], nodes: Sequence[Mapping[str, float]]) -> str:
    """A trial's demand and the cluster's supply in words."""

    def words(total: Mapping[str, float]) -> str:
        return ", ".join(
            f"{v / 1e9:.2g} GB memory" if k == "memory" else f"{v:g} {k}" for k, v in sorted(total.items()) if v
        )

    need: dict[str, float] = {}
    for bundle in trial:
        for what in ("CPU", "GPU", "memory"):
            need[what] = need.get(what, 0.0) + bundle.get(what, 0.0)
    there = {what: sum(node.get(what, 0.0) for node in nodes) for what in ("CPU", "GPU", "memory")}
    spot = sum(KEPT not in node for node in nodes)
    where = f", {spot} of them spot nodes, which hold no index" if spot and any(KEPT in b for b in trial) else ""
    return f"a trial needs {words(need)}; the cluster has {words(there)} on {len(nodes)} node(s){where}"
