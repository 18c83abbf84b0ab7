"""The index on Ray actors: equal to the one in this process, also after a shard or the coordinator was killed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from raycon.core.config import MiningConfig
from raycon.core.stream import shard_range
from raycon.core.types import MissingRows, Needs, Snapshot
from raycon.index.local import LocalIndex
from tests.helpers import free_port

ray = pytest.importorskip("ray")
from raycon.on_ray import here  # noqa: E402
from raycon.on_ray.index import IndexSpec, RayIndex, start_index, stop_index  # noqa: E402

pytestmark = pytest.mark.ray

NEEDS = Needs(clusterings=(12, 40), neighbours=3, temperature=0.2)
MINING = MiningConfig(shards=2, iterations=8, redo=2)
ROWS, DIM = 1500, 24


def features(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(ROWS, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def local(x: np.ndarray, needs: Needs = NEEDS) -> Snapshot:
    index = LocalIndex(ROWS, DIM, MINING, seed=0)
    index.add(0, 0, x)
    return index.snapshot(0, needs)[0]


def same(a: Snapshot, b: Snapshot) -> bool:
    def flat(s: Snapshot) -> list[torch.Tensor]:
        assert s.neighbours is not None
        return [*s.assignment, *s.prototypes, *s.concentration, s.neighbours]

    return a.version == b.version and all(x.equal(y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    here.start(num_cpus=2, include_dashboard=False, namespace="raycon", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def spec(cluster: None) -> Iterator[IndexSpec]:
    started = start_index("test", ROWS, DIM, MINING, "raycon", seed=0)
    yield started
    stop_index(started)
    stop_index(started)  # nothing happens


def test_equals_the_local_index_to_the_bit(spec: IndexSpec) -> None:
    x = features()
    index = RayIndex(spec)
    for first in range(0, ROWS, 100):  # parts that cross the border of the shards
        index.add(0, first, torch.from_numpy(x[first : first + 100]))
    snapshot, metrics = index.snapshot(0, NEEDS)
    assert same(snapshot, local(x))
    assert metrics["index/0/used"] == 12
    snapshot.assignment[0][0] = 7  # memory of its own, writable
    again, second = index.snapshot(0, NEEDS)
    assert second == metrics  # not computed again: not even the seconds differ
    assert same(again, local(x))
    index.add(0, 0, x[::-1])  # other features of the same version: computed again
    assert same(index.snapshot(0, NEEDS)[0], local(np.ascontiguousarray(x[::-1])))


def test_what_is_wrong_is_said_as_without_ray(spec: IndexSpec) -> None:
    index = RayIndex(spec)
    with pytest.raises(MissingRows, match="1500 of 1500 rows of version 9"):
        index.snapshot(9, NEEDS)
    broken = features()
    broken[77, 3] = np.nan
    with pytest.raises(ValueError, match="row 87 are not finite"):
        index.add(9, 10, broken[:100])
    with pytest.raises(ValueError, match=r"rows 1499 \.\. 1501: the index holds rows 0 \.\. 1500"):
        index.add(9, 1499, features()[:2])
    index.add(9, 0, features())
    with pytest.raises(ValueError, match="1501 clusters of 1500 rows"):
        index.snapshot(9, Needs(clusterings=(1501,)))


@pytest.mark.chaos
def test_a_killed_shard_is_filled_again(spec: IndexSpec) -> None:
    x = features(1)
    index = RayIndex(spec)
    index.add(0, 0, x)
    before, _ = index.snapshot(0, NEEDS)
    ray.kill(ray.get_actor(spec.shard_names[1], spec.namespace), no_restart=False)
    with pytest.raises(MissingRows, match="750 of 1500 rows of version 0"):
        index.snapshot(0, NEEDS)
    index.add(0, 750, x[750:])
    assert same(index.snapshot(0, NEEDS)[0], before)


@pytest.mark.chaos
def test_a_shard_killed_in_the_midst_of_k_means(spec: IndexSpec) -> None:
    """Whenever the kill lands, the outcome is MissingRows or the snapshot; after a refill it is the snapshot."""
    x = features(2)
    index = RayIndex(spec)
    index.add(0, 0, x)
    index._all_arrived()
    needs = Needs(clusterings=(300,), neighbours=3)
    call = index._coordinator.snapshot.remote(0, needs, None)
    ray.get(index._shards[0].ping.remote())  # answers while the shard works
    ray.kill(ray.get_actor(spec.shard_names[0], spec.namespace), no_restart=False)
    ray.wait([call], timeout=300)
    try:
        snapshot, _ = index.snapshot(0, needs)
    except MissingRows:
        index.add(0, 0, x)
        snapshot, _ = index.snapshot(0, needs)
    assert same(snapshot, local(x, needs))


@pytest.mark.chaos
def test_a_killed_coordinator_makes_the_same_again(spec: IndexSpec) -> None:
    x = features(3)
    index = RayIndex(spec)
    index.add(0, 0, x)
    before, _ = index.snapshot(0, NEEDS)
    ray.kill(ray.get_actor(spec.coordinator_name, spec.namespace), no_restart=False)
    assert same(index.snapshot(0, NEEDS)[0], before)


def test_spec_is_plain_data_and_start_is_idempotent(spec: IndexSpec) -> None:
    sent = pickle.loads(pickle.dumps(spec))
    assert sent == spec
    assert sent.actors == ()
    assert start_index("test", ROWS, DIM, MINING, "raycon", seed=0) == spec
    with pytest.raises(ValueError, match="an index named 'test' exists with other settings"):
        start_index("test", ROWS, DIM + 1, MINING, "raycon", seed=0)


def test_memory_is_checked_first(cluster: None) -> None:
    with pytest.raises(ValueError, match=r"needs 207 MB on 2 actors, mining.memory_gb = 0.1 allows 200 MB: raise"):
        start_index("big", 119_000, 128, MiningConfig(memory_gb=0.1), "raycon", seed=0)
    with pytest.raises(ValueError, match=r"an index of 1000000000 x 256 features needs 1331456 MB on 4 actors, the cl"):
        start_index("huge", 1_000_000_000, 256, MiningConfig(shards=4), "raycon", seed=0)
    with pytest.raises(ValueError, match="huge"):
        ray.get_actor("huge/index/0", "raycon")


@ray.remote(num_cpus=0)
class Worker:
    """A train worker: a rank of a gloo group."""

    def run(self, spec: IndexSpec, x: np.ndarray, rank: int, port: int, forget: bool) -> tuple[str, Snapshot | None]:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        index = RayIndex(spec, rank, 2)
        first, last = shard_range(ROWS, rank, 2)
        index.add(0, first, x[first : last - forget * rank])
        try:
            return "", index.snapshot(0, NEEDS)[0]
        except MissingRows as missing:
            return str(missing), None
        finally:
            torch.distributed.destroy_process_group()


def test_two_ranks_agree(spec: IndexSpec) -> None:
    x = features(4)
    RayIndex(spec).add(8, 0, x)  # another version: nothing of version 0 is there
    for forget in (True, False):
        workers, port = [Worker.remote() for _ in range(2)], free_port()
        calls = [w.run.remote(spec, x, rank, port, forget) for rank, w in enumerate(workers)]
        texts, snapshots = zip(*ray.get(calls, timeout=300), strict=True)
        if forget:
            assert texts == ("1 of 1500 rows of version 0 are not in the index: add them again",) * 2
        else:
            assert texts == ("", "")
            assert all(same(s, local(x)) for s in snapshots)
