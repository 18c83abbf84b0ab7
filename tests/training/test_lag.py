"""mining.lag = 1: a refresh is made while the next epoch trains, and nothing depends on when it is ready."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raycon import methods
from raycon.core import dist
from raycon.core.config import CheckpointConfig, MiningConfig, RunConfig, TrainConfig, problems_of
from raycon.core.log import Metrics, NoMetrics, read_lines
from raycon.core.types import Needs, Snapshot
from raycon.index.local import LocalIndex
from raycon.training import checkpoint, job, loop
from raycon.training.runtime import LocalRuntime
from tests.helpers import on_ranks
from tests.training.test_loop import BATCH, ROWS, SIZE, Small, config, same

EPOCHS, PER_EPOCH = 5, ROWS // BATCH


def lagged(lag: int = 1, **changes: Any) -> RunConfig:
    method = methods.configure(
        "pcl", dim=8, queue=32, negatives=4, clusters=(6, 9), warmup_epochs=1, momentum=0.9, refresh_epochs=1
    )
    train = TrainConfig(epochs=EPOCHS, batch=BATCH, lr=0.05, schedule="cosine")
    mining = MiningConfig(redo=2, iterations=5, lag=lag, init="warm")
    return config(method=method, train=train, mining=mining, **changes)


class AtOnce(LocalIndex):
    """Makes the snapshot in ``begin``: the result that a refresh beside the training must have too."""

    def begin(self, version: int, needs: Needs) -> None:
        super().begin(version, needs)
        assert self._begun is not None
        self._begun[2].exception()


class Late(LocalIndex):
    """The refresh does not start before it is waited for."""

    def begin(self, version: int, needs: Needs) -> None:
        self.gate = threading.Event()
        self._beside.submit(self.gate.wait)
        super().begin(version, needs)

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        if self._begun is not None:
            self.gate.set()
        return super().snapshot(version, needs)


class Forgetful(LocalIndex):
    """Loses a shard whenever a refresh has begun."""

    def begin(self, version: int, needs: Needs) -> None:
        shard = self._shards[1]
        shard._version = None
        super().begin(version, needs)


def go(
    folder: Path, run: RunConfig, kind: type[LocalIndex] = LocalIndex, stop_at: int = 10**9
) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """Train in ``folder``, going on from what is there, stopping after ``stop_at`` steps."""
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    facts = job.Facts(ROWS, 0, (1, SIZE, SIZE), run.train.batch, dist.world(), SIZE, run.train.epochs)
    method = job.build_method(run, facts, 1)
    index = kind(ROWS, 8, run.mining, run.seed, dist.rank(), dist.world())

    class Stopping(LocalRuntime):
        def should_stop(self) -> bool:
            done = [r["step"] for r in read_lines(folder / "metrics.jsonl") if r["kind"] == "train"]
            return dist.any_true(bool(done) and done[-1] >= stop_at)

    metrics = Metrics(folder / "metrics.jsonl") if dist.rank() == 0 else NoMetrics()
    loop.train(run, method, Small(run.seed), Stopping(folder, index, torch.device("cpu")), metrics, folder)
    index.close()
    return method, list(read_lines(folder / "metrics.jsonl"))


def trained(lines: list[dict[str, Any]]) -> list[tuple[int, float, float | None]]:
    return [(r["step"], r["loss"], r.get("mining/version")) for r in lines if r["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """The undisturbed run, with every refresh made before the epoch goes on."""
    return go(tmp_path_factory.mktemp("whole"), lagged(), AtOnce)


def test_an_epoch_trains_on_the_snapshot_of_the_one_before(
    whole: tuple[torch.nn.Module, list[dict[str, Any]]],
) -> None:
    _, lines = whole
    by_epoch = [{v for step, _, v in trained(lines) if (step - 1) // PER_EPOCH == epoch} for epoch in range(EPOCHS)]
    assert by_epoch == [{None}, {1}, {1}, {2}, {3}]  # the first is waited for
    # None is begun in the last epoch: no epoch would be left for it.
    assert [r["version"] for r in lines if r["kind"] == "snapshot"] == [1, 2, 3]


@pytest.mark.parametrize("kind", [LocalIndex, Late, Forgetful])
def test_when_it_is_ready_changes_nothing(
    whole: tuple[torch.nn.Module, list[dict[str, Any]]], kind: type[LocalIndex], tmp_path: Path
) -> None:
    method, lines = go(tmp_path / "run", lagged(), kind)
    assert same(method, whole[0])
    assert trained(lines) == trained(whole[1])
    refilled = [r["text"] for r in lines if r["kind"] == "event" and "filled again" in r["text"]]
    assert len(refilled) == (2 if kind is Forgetful else 0)


@pytest.mark.parametrize("every", [0, 4])
def test_stopped_and_resumed_equals_never_stopped(
    whole: tuple[torch.nn.Module, list[dict[str, Any]]], every: int, tmp_path: Path
) -> None:
    """Stopped while a refresh is made, at an epoch's end and in its midst."""
    run = lagged(checkpoint=CheckpointConfig(every_steps=every, keep=0))
    for stop_at in (6, 14, 18, 23, 10**9):
        method, lines = go(tmp_path / "run", run, LocalIndex, stop_at)
    assert same(method, whole[0])
    assert trained(lines) == trained(whole[1])


def test_a_lost_checkpoint_is_made_up_for(whole: tuple[torch.nn.Module, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Killed in epoch 3, resumed from the end of epoch 2, whose checkpoint holds both snapshots."""
    go(tmp_path / "run", lagged())
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert [p.name for p in kept] == [f"{PER_EPOCH * e:08d}" for e in range(1, EPOCHS + 1)]
    saved = checkpoint.load(kept[2])
    assert saved.snapshot is not None
    assert saved.coming is not None
    assert (saved.snapshot.version, saved.coming.version) == (1, 2)
    # What was coming is in force in the next checkpoint, which links the file.
    assert (kept[3] / checkpoint.SNAPSHOT).samefile(kept[2] / checkpoint.COMING)
    for path in kept[3:]:
        shutil.rmtree(path)
    method, lines = go(tmp_path / "run", lagged())
    assert same(method, whole[0])
    assert trained(lines) == trained(whole[1])


def test_lag_0_waits(whole: tuple[torch.nn.Module, list[dict[str, Any]]], tmp_path: Path) -> None:
    class Never(LocalIndex):
        def begin(self, version: int, needs: Needs) -> None:
            raise AssertionError("lag 0 begins nothing")

    method, lines = go(tmp_path / "run", lagged(0), Never)
    assert [v for step, _, v in trained(lines) if step % PER_EPOCH == 0] == [None, 1, 2, 3, 4]
    assert not same(method, whole[0])
    assert trained(lines)[: 2 * PER_EPOCH] == trained(whole[1])[: 2 * PER_EPOCH]
    assert all(checkpoint.load(p).coming is None for p in checkpoint.steps(tmp_path / "run" / "checkpoints"))


def test_wrong_lags_are_named() -> None:
    facts = job.Facts(ROWS, 0, (1, SIZE, SIZE), BATCH, 1, SIZE, EPOCHS)
    run = replace(lagged(), mining=MiningConfig(lag=2, cpus=-1.0))
    found = "\n".join(problems_of(run, facts))
    assert "mining.lag = 2: give 0 (wait for a refresh) or 1" in found
    assert "mining.cpus = -1.0" in found


def rank_run(folder: str) -> list[torch.Tensor]:
    method, _ = go(Path(folder), lagged())
    return [p.detach() for p in method.parameters()]


@pytest.mark.ranks
def test_ranks_refresh_beside_the_training_and_agree(tmp_path: Path) -> None:
    first, second = on_ranks(2, rank_run, str(tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for path in checkpoint.steps(tmp_path / "run" / "checkpoints")[3:]:
        shutil.rmtree(path)
    again, _ = on_ranks(2, rank_run, str(tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
