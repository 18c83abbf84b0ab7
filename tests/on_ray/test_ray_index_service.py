"""The index on Ray as a service: beside the training, back from disk, searched, measured, placed."""

from __future__ import annotations

import contextlib
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raycon.core.config import ConfigError, MiningConfig
from raycon.core.types import MissingRows, Needs
from raycon.index.local import LocalIndex
from raycon.index.service import Saved
from tests.helpers import free_port

ray = pytest.importorskip("ray")
from raycon.on_ray import here, meters  # noqa: E402
from raycon.on_ray.index import IndexSpec, RayIndex, start_index, stop_index  # noqa: E402
from tests.on_ray.test_ray_index import DIM, MINING, NEEDS, ROWS, features, local, same  # noqa: E402

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def spec(port: int, folder: Path) -> Iterator[IndexSpec]:
    here.start(
        num_cpus=2, include_dashboard=False, namespace="raycon", log_to_driver=False,
        _metrics_export_port=port,
    )  # fmt: skip
    (folder / "rows-0-9.json").write_text("left by an earlier run")
    started = start_index(
        "service", ROWS, DIM, MINING, "raycon", seed=0, saved=Saved(folder=folder, rows=ROWS, write=True)
    )
    yield started
    stop_index(started)
    ray.shutdown()


def kill(spec: IndexSpec, number: int, wait: bool = True) -> None:
    """Kill a shard actor and wait for the process that takes its place, which has been handed nothing."""
    shard = ray.get_actor(spec.shard_names[number], spec.namespace)
    ray.kill(shard, no_restart=False)
    while wait and ray.get(shard.call.remote("stamp"), timeout=300)[1] > 0:
        pass


@pytest.mark.chaos
def test_killed_shards_come_back_from_disk(spec: IndexSpec, folder: Path) -> None:
    """Between refreshes, and in the midst of one: no MissingRows, the same bits."""
    assert not (folder / "rows-0-9.json").exists()
    x = features(5)
    index = RayIndex(spec)
    index.add(4, 0, x)
    needs = Needs(clusterings=(300,), neighbours=3)
    before, _ = index.snapshot(4, needs)
    assert sorted(p.name for p in folder.iterdir()) == [
        "rows-0-750.json", "rows-0-750.v4.npy", "rows-750-1500.json", "rows-750-1500.v4.npy",
    ]  # fmt: skip
    kill(spec, 0)
    kill(spec, 1)
    rows, _ = index.search(x[:5], 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    kill(spec, 1)
    index.begin(4, Needs(clusterings=(300, 20), neighbours=3))
    kill(spec, 0, wait=False)
    after, _ = index.snapshot(4, Needs(clusterings=(300, 20), neighbours=3))
    assert after.assignment[0].equal(before.assignment[0])
    assert after.prototypes[0].equal(before.prototypes[0])
    assert after.neighbours is not None
    assert after.neighbours.equal(before.neighbours)


@pytest.mark.chaos
def test_a_damaged_part_is_named_and_filled_again(spec: IndexSpec, folder: Path) -> None:
    x = features(6)
    index = RayIndex(spec)
    index.add(5, 0, x)
    before, _ = index.snapshot(5, NEEDS)
    file = folder / "rows-0-750.v5.npy"
    data = bytearray(file.read_bytes())
    data[20_000] ^= 1
    file.write_bytes(data)
    kill(spec, 0)
    with pytest.raises(MissingRows, match=r"750 of 1500 rows .*rows-0-750.v5.npy: rows 0 .. 750 are cut off or alt"):
        index.snapshot(5, NEEDS)
    index.add(5, 0, x)
    assert same(index.snapshot(5, NEEDS)[0], before)


def test_a_part_of_other_features_never_comes_back(spec: IndexSpec) -> None:
    """New rows of the same version take the manifest away: what is on disk is not what the shard holds."""
    x = features(7)
    index = RayIndex(spec)
    index.add(6, 0, x)
    index.snapshot(6, NEEDS)
    index.add(6, 0, features(8)[:10])
    index.call("stamp")
    kill(spec, 0)
    with pytest.raises(MissingRows, match="750 of 1500 rows of version 6"):
        index.snapshot(6, NEEDS)


def test_begun_beside_other_work(spec: IndexSpec) -> None:
    x = features(9)
    index = RayIndex(spec)
    index.add(0, 0, x)
    index.begin(0, NEEDS)
    snapshot, metrics = index.snapshot(0, NEEDS)
    assert same(snapshot, local(x))
    assert index.progress() >= 2 * 2 * 2
    _, second = index.snapshot(0, NEEDS)
    assert second == metrics
    index.add(1, 0, x)
    _, metrics = index.snapshot(1, NEEDS)
    assert metrics["mining/0/ami"] == metrics["mining/1/ami"] == pytest.approx(1.0)  # nothing moved
    # Counted where the coordinator calls: all that a refresh in one process counts, too.
    here = LocalIndex(ROWS, DIM, MINING, seed=0)
    here.add(0, 0, x)
    local_metrics = here.snapshot(0, NEEDS)[1]
    assert metrics["mining/bytes_received"] == local_metrics["mining/bytes_received"]
    assert metrics["mining/bytes_sent"] == local_metrics["mining/bytes_sent"]


def test_search_gives_rows_and_cosines(spec: IndexSpec) -> None:
    x, queries = features(1), features(2)[:7]
    index = RayIndex(spec)
    index.add(0, 0, x)
    rows, cosine = index.search(queries, 10)
    truth = queries.astype(np.float64) @ x.T.astype(np.float64)
    assert (rows == np.argsort(-truth, axis=1, kind="stable")[:, :10]).all()
    np.testing.assert_allclose(cosine, np.take_along_axis(truth, rows, 1), atol=1e-6)
    with pytest.raises(ValueError, match="1501 neighbours in 1500 rows"):
        index.search(queries, 1501)
    with pytest.raises(MissingRows, match="1500 of 1500 rows of version 7"):
        index.search(queries, 1, version=7)


def test_prometheus_hears_of_it(spec: IndexSpec, port: int) -> None:
    index = RayIndex(spec)
    index.add(11, 0, features(1))
    _, metrics = index.snapshot(11, NEEDS)
    wanted = {
        f'ray_{meters.VERSION}{{': 11.0,
        f'ray_{meters.PER_CLUSTERING["used"]}{{.*clustering="1"': metrics["index/1/used"],
        f'ray_{meters.PHASE_SECONDS}{{.*phase="kmeans"': metrics["index/kmeans_seconds"],
        f'ray_{meters.ROWS_ADDED}_total{{.*shard="1"': None,
        f'ray_{meters.CALL_SECONDS}_total{{.*method="steps"': None,
    }  # fmt: skip
    left, page = dict(wanted), ""
    end = time.monotonic() + 240
    while left and time.monotonic() < end:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer,
        ):
            page = answer.read().decode()
        for name, value in list(left.items()):
            numbers = [float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(name, line)]
            if numbers and (value is None or value in numbers):
                del left[name]
        time.sleep(0.5)  # Ray exports every few seconds
    assert not left, (left, [line for line in page.splitlines() if "raycon" in line])


def test_what_cannot_be_placed_is_refused(spec: IndexSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"did not start within 1 s; .* mining.cpus = 2, mining.gpus = 0; free"):
        start_index("cpus", ROWS, DIM, replace(MINING, cpus=2.0), "raycon", seed=0, start_timeout_s=1.0)
    with pytest.raises(ValueError, match="cpus/index"):
        ray.get_actor("cpus/index/1", "raycon")
    # 100 MB each: three nodes of 180 MB have room for three, not for five, though 540 MB are free in all.
    rows = int(36e6 / 1.3 / 4 / DIM) * 5
    nodes = [{"Alive": True, "Resources": {"memory": 180e6}}] * 3
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 540e6})
    with pytest.raises(
        ConfigError, match=r"needs 500 MB on 5 actors of 100 MB each, and the nodes have 180, 180, 180 MB"
    ):
        start_index("large", rows, DIM, replace(MINING, shards=5), "raycon", seed=0)


def test_placement_counts_the_shards(spec: IndexSpec) -> None:
    from raycon.on_ray.trainer import placement_problems
    from raycon.recipes import recipe

    config = recipe("quickstart")
    assert placement_problems(config) == []
    asked = replace(config, mining=MiningConfig(cpus=0.5, shards=2))
    (problem,) = placement_problems(asked)
    assert "mining.cpus = 0.5 x mining.shards = 2 beside 2 CPU for the workers" in problem
