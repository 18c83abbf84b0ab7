"""How many trials fit: counted by hand, against fragmentation and shares of GPUs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from raycon.core.config import Facts
from raycon.index.plan import shard_bytes
from raycon.recipes import recipe
from raycon.tuning.place import DRIVER_MEMORY, KEPT, bundles, fits, most_trials, told


@pytest.mark.parametrize(
    ("trial", "nodes", "most"),
    [
        ([{"CPU": 1}], [{"CPU": 2}], 2),
        ([{"CPU": 1}, {"CPU": 1}], [{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], 1),
        ([{"CPU": 2}], [{"CPU": 3}, {"CPU": 3}], 2),  # 6 CPUs, but the odd ones are on two nodes
        ([{"CPU": 2}], [{"CPU": 1}, {"CPU": 1}], 0),
        ([{"CPU": 1, "GPU": 0.5}], [{"CPU": 8, "GPU": 1}], 2),
        ([{"GPU": 0.6}], [{"GPU": 2}], 2),  # 2 / 0.6 = 3.3, but a share lies on one GPU
        ([{"GPU": 0.4}], [{"GPU": 1}], 2),
        ([{"CPU": 0.1}], [{"CPU": 1}], 10),
        ([{"CPU": 1}, {"memory": 3.0}], [{"CPU": 8, "memory": 7.0}], 2),
        ([{"CPU": 1}, {}], [{"CPU": 1}], 1),
    ],
)
def test_most_trials(trial: list[dict[str, float]], nodes: list[dict[str, float]], most: int) -> None:
    assert most_trials(trial, nodes, 100) == most


def test_limit_and_order() -> None:
    assert most_trials([{"CPU": 1}], [{"CPU": 9}], 3) == 3
    assert fits([{"CPU": 1}, {"CPU": 2}], [{"CPU": 1}, {"CPU": 2}])


def test_a_trial_is_its_workers_evaluations_index_and_driver() -> None:
    base = recipe("quickstart")
    facts = Facts(rows=1000, classes=0, image=None, batch=128, world=2, size=16, epochs=1)
    config = dataclasses.replace(
        base,
        evals=dataclasses.replace(base.evals, cpus=0.5),
        mining=dataclasses.replace(base.mining, shards=3, cpus=0.0),
    )
    found = bundles(config, facts, dim=64)
    assert found[:2] == [{"CPU": 1.0}, {"CPU": 1.0}]
    assert found[2] == {"CPU": 0.5}
    assert found[3:6] == [{"memory": pytest.approx(1.3 * 334 * 64 * 4 + 64e6), KEPT: 1.0}] * 3
    assert found[6:] == [{"memory": DRIVER_MEMORY}]
    assert len(bundles(config, facts, dim=0)) == 4
    said = told(found, [{"CPU": 2.0, "memory": 8e9, KEPT: math.inf}])
    assert "a trial needs 2.5 CPU" in said
    assert said.endswith("the cluster has 2 CPU, 8 GB memory on 1 node(s)")
    assert "1 of them spot nodes, which hold no index" in told(found, [{"CPU": 2.0}, {"CPU": 2.0, KEPT: math.inf}])


def test_index_actors_on_gpus_and_off_spot_nodes_are_counted() -> None:
    """Two workers and one shard of a quarter GPU each: one trial on a GPU, not two; fp16 rows take half the memory."""
    base = recipe("quickstart")
    facts = Facts(rows=100_000, classes=0, image=None, batch=128, world=2, size=16, epochs=1)
    config = dataclasses.replace(
        base,
        scaling=dataclasses.replace(base.scaling, workers=2, gpus_per_worker=0.25),
        evals=dataclasses.replace(base.evals, cpus=0.0, gpus=0.0),
        mining=dataclasses.replace(base.mining, shards=1, gpus=0.25, storage="fp16"),
    )
    trial = bundles(config, facts, dim=128)
    assert [b.get("GPU", 0.0) for b in trial] == [0.25, 0.25, 0.25, 0.0]
    assert trial[2]["memory"] == shard_bytes(100_000, 128, 1, "fp16") < shard_bytes(100_000, 128, 1)
    kept = {"CPU": 16.0, "GPU": 1.0, "memory": 8e9, KEPT: math.inf}
    assert most_trials(trial, [kept], 9) == 1
    assert most_trials(trial, [kept | {"GPU": 2.0}], 9) == 2
    spot = {k: v for k, v in kept.items() if k != KEPT}
    assert most_trials(trial, [spot], 9) == 0
    assert most_trials(trial, [spot, {"CPU": 1.0, "GPU": 0.25, "memory": 8e9, KEPT: math.inf}], 9) == 1
