"""What a run does about faults, piece by piece and without a cluster."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raycon.core import log
from raycon.core.config import ScalingConfig
from raycon.core.log import read_lines
from raycon.recipes import recipe
from raycon.training.runtime import no_index

ray = pytest.importorskip("ray")
import ray.train  # noqa: E402, F811

from raycon.on_ray import elastic, placement, runtime, trainer  # noqa: E402


def notice(*nodes: str, seconds: float | None = 100.0) -> Any:
    deadline = None if seconds is None else int((time.time() + seconds) * 1000)
    return SimpleNamespace(preempted_node_ids=list(nodes), deadline_ms=deadline)


def test_it_saves_at_a_notice_and_just_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [None]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: found[0])
    monkeypatch.setattr(runtime, "LOOK_S", 0.0)
    monkeypatch.setenv(runtime.NOTICES, "1")
    own = runtime.RayRuntime(tmp_path, no_index(), torch.device("cpu"))
    assert not own.should_save()
    for now, wanted in [
        (notice("a"), True), (notice("a"), False), (notice("a", seconds=5.0), True), (notice("a", seconds=4.0), False),
        (notice("a", "b"), True), (notice("a", "b"), False), (None, False), (notice("c", seconds=3.0), True),
        (notice("c", seconds=2.0), False), (notice("d", seconds=None), True), (notice("d", seconds=None), False),
    ]:  # fmt: skip
        found[0] = now
        assert own.should_save() == wanted, now


def test_ray_is_not_asked_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: calls.append(1))
    monkeypatch.setenv(runtime.NOTICES, "1")
    own = runtime.RayRuntime(tmp_path, no_index(), torch.device("cpu"))
    for _ in range(1000):
        own.should_save()
    assert len(calls) <= 1


def test_the_elastic_policy_takes_numbers_that_divide_the_batch() -> None:
    scaling = ray.train.ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 2})
    policy = elastic.WholeBatches(scaling, [1, 2, 4, 8])
    counted = [policy._count_possible_workers({"node": {"CPU": 2.0 * n}}) for n in range(10)]
    assert counted == [0, 1, 2, 2, 4, 4, 4, 4, 8, 8]
    assert policy._count_possible_workers({"a": {"CPU": 3.0}, "b": {"CPU": 5.0}}) == 2  # 1 + 2 workers fit
    assert elastic.WholeBatches(scaling, [4, 8])._count_possible_workers({"a": {"CPU": 6.0}}) == 0


def test_who_kept_the_others_waiting_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "silent_ranks", lambda *_: [0, 2])
    texts = [trainer.waited_in_vain(tmp_path, rank, 4, 60.0) for rank in (1, 3)]
    assert all("did not hear from rank 0, 2" in text for text in texts)
    assert [r["text"] for r in read_lines(tmp_path / "metrics.jsonl")] == texts[:1]


def test_workers_without_a_place_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(recipe("quickstart"), scaling=ScalingConfig(workers=4, cpus_per_worker=2.0))
    groups: dict[str, Any] = {"other": {"state": "CREATED", "bundles": {0: {"CPU": 1.0}}}}
    looks: list[float] = []

    def table() -> dict[str, Any]:
        looks.append(time.monotonic())
        return groups

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="head:1"))
    monkeypatch.setattr(log, "reachable", lambda *_: True)
    monkeypatch.setattr(ray.util, "placement_group_table", table)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(placement, "SAY_AFTER_S", 0.0)
    monkeypatch.setattr(placement, "LOOK_S", 0.01)

    def waited() -> int:
        seen = len(looks)
        while len(looks) < seen + 3:
            time.sleep(0.01)
        file = tmp_path / "metrics.jsonl"
        return sum(1 for _ in read_lines(file)) if file.exists() else 0

    with placement.watched(config, tmp_path):
        assert waited() > 0
        groups["ours"] = {"state": "CREATED", "bundles": {i: {"CPU": 2.0} for i in range(4)}}
        waited()
        said = waited()
        assert waited() == said  # placed: nothing more to say
    (text, *_) = [r["text"] for r in read_lines(tmp_path / "metrics.jsonl")]
    assert "4 workers of 2 CPU each have no place; the cluster has 6 CPU (2 free)" in text


def test_a_head_that_is_gone_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def reachable(address: str, *_: float) -> bool:
        looks.append(address)
        return False

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="192.0.2.7:6379"))
    monkeypatch.setattr(log, "reachable", reachable)
    monkeypatch.setattr(placement, "HEAD_S", 0.0)
    monkeypatch.setattr(placement, "LOOK_S", 0.01)
    with placement.watched(recipe("quickstart"), tmp_path):
        while len(looks) < 5:
            time.sleep(0.01)
    assert set(looks) == {"tcp://192.0.2.7:6379"}
    (said,) = [r["text"] for r in read_lines(tmp_path / "metrics.jsonl")]
    assert "the head of the cluster (192.0.2.7:6379) is gone" in said
    assert f"--resume {tmp_path}" in said


def test_an_evaluation_asked_for_twice_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a worker group and by the one after it; the checkpoint may be pruned by then."""
    from raycon.on_ray import evaluate
    from raycon.recipes import recipe

    made: list[int] = []
    monkeypatch.setattr(trainer.methods, "read_config", lambda file: recipe("quickstart"))
    monkeypatch.setattr(
        evaluate, "of_run", lambda run, path, threads: made.append(int(path.name)) or {"results": {"knn/top1_k1": 1.0}}
    )
    (tmp_path / "evaluations.json").write_text('[{"step": 22, "results": {}, "failed": {}}]')
    for name in ("00000022", "00000044"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        trainer._evaluate(ray.train.Checkpoint(str(tmp_path / "checkpoints" / name)), str(tmp_path), 1)
    assert made == [44]


def test_rays_list_of_checkpoints_is_forgotten_and_evaluations_owed_are_known(tmp_path: Path) -> None:
    (tmp_path / trainer.RAYS_LIST).write_text("{}")
    for step, wanted in ((22, True), (33, False), (44, True)):
        path = tmp_path / "checkpoints" / f"{step:08d}"
        path.mkdir(parents=True)
        (path / "state.json").write_text(f'{{"step": {step}, "evaluate": {str(wanted).lower()}}}')
    (tmp_path / "evaluations.json").write_text('[{"step": 22, "results": {}, "failed": {}}]')
    trainer.forget_reports(tmp_path, None)
    assert not (tmp_path / trainer.RAYS_LIST).exists()
    assert trainer.owed(tmp_path, None) == ["00000044"]
