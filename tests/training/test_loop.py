"""The loop on a small synthetic loader: resume, ranks, accumulation, not-finite, refresh."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycon import methods
from raycon.core import dist, stream
from raycon.core.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MiningConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from raycon.core.log import Metrics, NoMetrics, read_lines
from raycon.core.types import Batch, Images, Snapshot
from raycon.index.local import LocalIndex
from raycon.nn import networks
from raycon.training import checkpoint, job, loop
from raycon.training.runtime import STOP_FILE, LocalRuntime
from tests.helpers import on_ranks

ROWS, BATCH, SIZE = 96, 16, 8
DATA = torch.rand(ROWS, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


class Small:
    """A loader over random images: views are the image plus noise from the counter stream."""

    kind, rows, steps = "test", ROWS, ROWS // BATCH

    def __init__(self, seed: int = 0, poison: int = -1) -> None:
        self.seed, self.poison = seed, poison
        self.rank, self.world = dist.rank(), dist.world()

    def train(self, epoch: int, first_step: int = 0, snapshot: Snapshot | None = None) -> Iterator[Batch]:
        order = stream.epoch_order(self.seed, epoch, self.rows)
        for step in range(first_step, self.steps):
            rows = stream.batch_rows(order, step, BATCH, self.rank, self.world)
            noise = [stream.uniforms(self.seed, epoch, rows, v, SIZE * SIZE).reshape(-1, 1, SIZE, SIZE) for v in (0, 1)]
            views = tuple(DATA[rows] + 0.2 * torch.as_tensor(n) for n in noise)
            if epoch * self.steps + step == self.poison and self.rank == self.world - 1:
                views[0][0] = float("nan")
            yield Batch(views, torch.as_tensor(rows), torch.full((len(rows),), -1))

    def scan(self) -> Iterator[Images]:
        first, last = stream.shard_range(self.rows, self.rank, self.world)
        for start in range(first, last, 20):
            rows = torch.arange(start, min(start + 20, last))
            yield Images(DATA[rows], rows)

    def close(self) -> None:
        pass


def config(**changes: Any) -> RunConfig:
    base = RunConfig(
        runtime="local",
        method=methods.configure(
            "pcl", dim=8, queue=32, negatives=4, clusters=(6, 9), warmup_epochs=1, momentum=0.9, refresh_epochs=2
        ),
        model=ModelConfig(encoder="resnet10", width=4, stem="small"),
        train=TrainConfig(epochs=4, batch=BATCH, lr=0.05, schedule="cosine"),
        mining=MiningConfig(redo=2, iterations=5),
        checkpoint=CheckpointConfig(keep=0),
        evals=EvalConfig(names=()),
        log=LogConfig(every_steps=1),
    )
    return replace(base, **changes)


def go(
    folder: Path, run: RunConfig, poison: int = -1, updates: int = 1
) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Train in ``folder``, going on from what is there; the trained method and its metrics."""
    torch.set_num_threads(1)
    facts = job.Facts(ROWS, 0, (1, SIZE, SIZE), run.train.batch, dist.world(), SIZE, run.train.epochs)
    method = job.build_method(run, facts, 1)
    loader = Small(run.seed, poison)
    index = LocalIndex(ROWS, job.feature_dim(run) or 8, run.mining, run.seed, dist.rank(), dist.world())
    runtime = LocalRuntime(folder, index, torch.device("cpu"))
    metrics = Metrics(folder / "metrics.jsonl") if dist.rank() == 0 else NoMetrics()
    loop.train(run, method, loader, runtime, metrics, folder, updates)
    return method, list(read_lines(folder / "metrics.jsonl"))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()


@pytest.mark.parametrize("every", [1, 5, 6])
def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path, every: int) -> None:
    """Stopped in mid-epoch before and after the first snapshot, again and again: the same bits."""
    whole, lines = go(tmp_path / "a", config())
    saving = config(checkpoint=CheckpointConfig(every_steps=every, keep=0))
    for stop_at in (4, 9, 15, 10**9):
        run = saving

        class Stopping(LocalRuntime):
            def should_stop(self) -> bool:
                done = [r["step"] for r in read_lines(tmp_path / "b" / "metrics.jsonl") if r["kind"] == "train"]
                return bool(done) and done[-1] >= stop_at  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "LocalRuntime", Stopping)
            resumed, again = go(tmp_path / "b", run)
    assert same(whole, resumed)
    train = [(r["step"], r["loss"]) for r in lines if r["kind"] == "train"]
    assert train == [(r["step"], r["loss"]) for r in again if r["kind"] == "train"]
    assert [r["version"] for r in lines if r["kind"] == "snapshot"] == [1, 3]


def test_a_lost_checkpoint_means_redoing_steps_not_losing_them(tmp_path: Path) -> None:
    """As after a kill: metrics run ahead of the last checkpoint, and are made again once."""
    whole, lines = go(tmp_path / "a", config())
    go(tmp_path / "b", config())
    for path in checkpoint.steps(tmp_path / "b" / "checkpoints")[2:]:
        __import__("shutil").rmtree(path)
    resumed, again = go(tmp_path / "b", config())
    assert same(whole, resumed)
    assert [r["step"] for r in again if r["kind"] == "train"] == [r["step"] for r in lines if r["kind"] == "train"]


def test_the_stop_file_ends_with_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a" / STOP_FILE).touch()
    go(tmp_path / "a", config())
    (path,) = checkpoint.steps(tmp_path / "a" / "checkpoints")
    assert checkpoint.load(path).step == 1


def test_learning_happens(tmp_path: Path) -> None:
    run = config(
        method=methods.configure("moco", dim=16, queue=96, momentum=0.9),
        model=ModelConfig(encoder="resnet10", width=8, stem="small"),
        train=TrainConfig(epochs=12, batch=BATCH, lr=0.02, schedule="cosine"),
    )
    _, lines = go(tmp_path / "a", run)
    train = [r for r in lines if r["kind"] == "train"]
    assert np.mean([r["loss"] for r in train[-6:]]) < np.mean([r["loss"] for r in train[:6]]) - 0.5
    assert np.mean([r["accuracy/instance"] for r in train[-6:]]) > 0.8


@pytest.mark.parametrize("poison", [0, 7])
def test_not_finite_stops_before_the_optimiser_moves(tmp_path: Path, poison: int) -> None:
    with pytest.raises(loop.NotFinite, match=f"step {poison}: .*rows of this batch: rank 0"):
        go(tmp_path / "a", config(), poison=poison)
    folder = tmp_path / "a" / "checkpoints"
    good = checkpoint.newest(folder)[0] if folder.exists() else None
    assert (good is None) == (poison < 6)
    if good is not None:
        assert all(torch.isfinite(v).all() for v in checkpoint.load(good).model.values() if v.is_floating_point())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    go(tmp_path / "a", config())
    with pytest.raises(checkpoint.CheckpointError, match=r"train.epochs"):
        go(tmp_path / "a", config(train=TrainConfig(epochs=9, batch=BATCH)))
    with pytest.raises(checkpoint.CheckpointError, match=r"method.name"):
        go(tmp_path / "a", config(method=methods.configure("moco", dim=8, queue=32)))
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        go(tmp_path / "a", config(model=ModelConfig(encoder="resnet10", width=8, stem="small")))


def test_more_and_smaller_steps_are_those_of_a_smaller_batch(tmp_path: Path) -> None:
    """Each global batch in two steps of half the learning rate: what a run of half the batch and learning rate does."""
    train = TrainConfig(epochs=2, batch=BATCH, lr=0.05, lr_scaling="none", schedule="constant", warmup_epochs=0)
    run = config(method=methods.configure("moco", dim=8, queue=32, momentum=0.9), train=train)
    followed, lines = go(tmp_path / "a", run, updates=2)
    assert [r["step"] for r in lines if r["kind"] == "train"] == list(range(1, 13))
    assert {r["lr"] for r in lines if r["kind"] == "train"} == {0.025}
    with pytest.MonkeyPatch.context() as patch:
        half = BATCH // 2
        patch.setattr(Small, "steps", ROWS // half)
        patch.setitem(globals(), "BATCH", half)
        small, again = go(tmp_path / "b", replace(run, train=replace(train, batch=half, lr=0.025)))
    assert [r["loss"] for r in lines if r["kind"] == "train"] == [r["loss"] for r in again if r["kind"] == "train"][
        1::2
    ]
    assert same(followed, small)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """With BatchNorm in evaluation mode a sample's loss does not depend on its batch, so the parts must add up."""
    run = config(method=methods.configure("moco", dim=8, queue=32))
    facts = job.Facts(ROWS, 0, (1, SIZE, SIZE), BATCH, 1, SIZE, 4)
    gradients, keys = [], []
    for parts in (1, 4):
        method = job.build_method(run, facts, 1).eval()
        batch = next(Small().train(0))
        output = loop.forward_backward(method, batch, loop.Mined(None, (), 1), parts)
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
        keys.append(output.keep["key"])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(keys[0], keys[1])


def test_clipping_bounds_the_norm() -> None:
    layer = torch.nn.Linear(4, 4)
    (100 * layer(torch.ones(1, 4)).sum()).backward()
    before = loop.gradient_norm(layer, 0.0)
    assert loop.gradient_norm(layer, 0.5) == before
    norm = torch.sqrt(sum(p.grad.square().sum() for p in layer.parameters() if p.grad is not None))  # type: ignore[arg-type]
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


def rank_run(folder: str) -> tuple[list[float], list[torch.Tensor]]:
    method, lines = go(Path(folder), config())
    queue = method.queue.keys  # type: ignore[union-attr]
    losses = [r["loss"] for r in lines if r["kind"] == "train"]
    return losses, [queue, *(p.detach() for p in method.parameters())]


@pytest.mark.ranks
def test_two_ranks_agree_and_resume(tmp_path: Path) -> None:
    results = on_ranks(2, rank_run, str(tmp_path / "a"))
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(ours, theirs)
    for path in checkpoint.steps(tmp_path / "a" / "checkpoints")[1:]:
        __import__("shutil").rmtree(path)
    again = on_ranks(2, rank_run, str(tmp_path / "a"))
    for ours, theirs in zip(results[0][1], again[0][1], strict=True):
        assert torch.equal(ours, theirs)


def rank_nan(folder: str) -> str:
    try:
        go(Path(folder), config(), poison=2)
    except loop.NotFinite as error:
        return str(error)
    return ""


@pytest.mark.ranks
def test_all_ranks_stop_when_one_is_not_finite(tmp_path: Path) -> None:
    first, second = on_ranks(2, rank_nan, str(tmp_path / "a"))
    assert first == second
    assert "rank 1" in first
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_the_snapshot_of_two_ranks_covers_all_rows(tmp_path: Path) -> None:
    _, lines = go(tmp_path / "a", config())
    saved = checkpoint.load(checkpoint.steps(tmp_path / "a" / "checkpoints")[-1])
    assert isinstance(saved.snapshot, Snapshot)
    assert [len(a) for a in saved.snapshot.assignment] == [ROWS, ROWS]
    assert json.dumps(lines)
    assert isinstance(networks.Queue(4, 2), torch.nn.Module)
