"""The plan against what a counted refresh really moves and holds."""

from __future__ import annotations

import numpy as np
import pytest

from raycon.core.config import ConfigError, MiningConfig
from raycon.core.types import Needs
from raycon.index import plan as planning
from raycon.index.local import LocalIndex
from raycon.index.plan import Machine, check_memory, free_memory, measured_rate, plan, shard_bytes, shards_for

ROWS, DIM = 3000, 16


def snapshot_of(needs: Needs, mining: MiningConfig, times: int = 1) -> tuple[int, dict[str, float]]:
    x = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    index = LocalIndex(ROWS, DIM, mining, seed=0)
    for version in range(times):
        index.add(version, 0, x + 0.3 * version)
        snapshot, metrics = index.snapshot(version, needs)
    metrics["calls"] = index._miner._calls.total()
    tensors = [*snapshot.assignment, *snapshot.prototypes]
    tensors += [] if snapshot.neighbours is None else [snapshot.neighbours]
    return sum(t.nbytes for t in tensors), metrics


@pytest.mark.parametrize("shards", [1, 3])
def test_sizes_are_those_of_a_counted_run(shards: int) -> None:
    needs = Needs(clusterings=(50, 200), neighbours=5)
    held, metrics = snapshot_of(needs, MiningConfig(shards=shards, iterations=3, redo=2))
    made = plan(ROWS, DIM, (50, 200), shards, neighbours=5, iterations=3, redo=2)
    assert made.snapshot_bytes == held
    assert made.passes == 2 * (3 * 2 + 1)
    assert made.sent_bytes == pytest.approx(metrics["mining/bytes_sent"], rel=0.03)
    assert made.received_bytes == pytest.approx(metrics["mining/bytes_received"], rel=0.03)
    assert made.call_seconds == pytest.approx(0.013 * metrics["calls"])


def test_warm_sizes() -> None:
    mining = MiningConfig(shards=2, init="warm", iterations=3, redo=2)
    _, metrics = snapshot_of(Needs(clusterings=(50, 30)), mining, times=2)
    made = plan(ROWS, DIM, (50, 30), 2, warm=True, moves=int(metrics["index/moves"]))
    assert made.passes == 4
    assert made.call_seconds == pytest.approx(0.013 * metrics["calls"])
    assert made.sent_bytes == pytest.approx(metrics["mining/bytes_sent"], rel=0.03)
    assert made.received_bytes == pytest.approx(metrics["mining/bytes_received"], rel=0.03)


def test_the_sum_of_imagenet() -> None:
    """PCL's published setting: 1.15e15 operations for one restart of 20 iterations of all three k."""
    made = plan(1_281_167, 128, (25_000, 50_000, 100_000), 8, iterations=20, redo=1, machine=Machine(flops=70e9))
    assert made.flops == pytest.approx(2 * 1_281_167 * 128 * 175_000 * 21)
    assert made.feature_bytes * 8 == pytest.approx(656e6, rel=0.01)
    assert made.compute_seconds == pytest.approx(made.flops / 8 / 70e9)
    assert plan(1_281_167, 128, (25_000,), 8, storage="fp16").feature_bytes * 2 == pytest.approx(
        made.feature_bytes, rel=1e-6
    )
    alone = plan(1_281_167, 128, (25_000,), 8, ray=False)
    assert alone.network_seconds == alone.call_seconds == 0


def test_shards_for_a_memory() -> None:
    for memory in (1e9, 70e6):
        shards = shards_for(1_000_000, 256, memory)
        assert shard_bytes(1_000_000, 256, shards) <= memory + 2 * 1331
        assert shards == 1 or shard_bytes(1_000_000, 256, shards - 1) > memory
    with pytest.raises(ValueError, match="60 MB per shard: a shard needs 64 MB beside"):
        shards_for(10, 10, 60e6)
    (problem,) = plan(10**9, 256, (10,), 64).problems(Machine(memory=16e9))
    assert "needs 1335296 MB on 64 shards, 20864 MB each, and one has 16000 MB: give 84 shards or more" in problem
    assert plan(10**9, 256, (10,), 84).problems(Machine(memory=16e9)) == []
    assert plan(10**9, 256, (10,), 64).problems(Machine()) == []


def test_nonsense_is_refused() -> None:
    for wrong in (
        {"rows": 0}, {"shards": 0}, {"iterations": 0}, {"clusters": (11,)}, {"clusters": (0,)}, {"neighbours": 10}
    ):  # fmt: skip
        given = {"rows": 10, "dim": 4, "clusters": (2,), "shards": 1} | wrong
        with pytest.raises(ValueError, match="give"):
            plan(**given)  # type: ignore[arg-type]


def test_memory_is_checked_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda: 700_000_000)
    with pytest.raises(
        ConfigError, match="1000000 x 128 features needs 730 MB on 2 shards in this process, 700 MB are"
    ):
        LocalIndex(1_000_000, 128, MiningConfig(), seed=0)
    check_memory(900_000, 128, 2, 0.0)
    with pytest.raises(ConfigError, match=r"364 MB for one; mining.memory_gb = 0.3 allows it 300 MB: raise mining"):
        check_memory(900_000, 128, 2, 0.3)
    check_memory(900_000, 128, 3, 0.3)
    monkeypatch.setattr(planning, "free_memory", lambda: None)
    check_memory(10**12, 128, 2, 0.0)


def test_what_this_machine_has() -> None:
    free = free_memory()
    assert free is None or free > 1e6
    assert 1e8 < measured_rate(rows=2048, clusters=100) < 1e14
