"""Health of the features during training, and what is said when they collapse."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raycon import pretrain
from raycon.core.config import RunConfig, TrainConfig
from raycon.core.log import read_lines
from raycon.core.types import Batch, Output, Snapshot
from raycon.methods import configure
from raycon.nn import health
from raycon.nn.networks import Queue
from raycon.training import watch


def batch(rows: torch.Tensor) -> Batch:
    return Batch((), rows, torch.full((len(rows),), -1))


def config(**train: object) -> RunConfig:
    return RunConfig(method=configure("moco"), train=TrainConfig(**train))  # type: ignore[arg-type]


class Holder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.queue = Queue(size, 4)


def test_numbers_are_those_of_the_last_rows_of_the_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    per_epoch, size, width = 40, 32, 8
    label = torch.randint(0, 3, (per_epoch * size,), generator=generator)
    all_rows = torch.randperm(per_epoch * size, generator=generator)
    embedding = F.normalize(3 * torch.eye(3, width)[label] + torch.randn(len(label), width, generator=generator))
    pair = F.normalize(embedding + 0.1)
    seen = watch.Watch(config(), Holder(640), label.numpy(), per_epoch, world=2)
    for epoch in range(2):
        for step in range(per_epoch):
            rows = all_rows[step * size : (step + 1) * size]
            keep = {"embedding": embedding[rows] * (1 + epoch), "pair": pair[rows], "key": pair[rows]}
            seen.saw(epoch * per_epoch + step, batch(rows), Output(torch.zeros(()), keep, {}))
    assignment = torch.tensor([0] * 30 + [1] * 10)
    snapshot = Snapshot(0, (assignment,), (torch.zeros(4, 2),), (), None)
    numbers = seen.read(snapshot)
    last = all_rows[-watch.ROWS :]
    kept = embedding[last]
    assert numbers["health/std"] == pytest.approx(float(health.feature_std(kept)), rel=1e-5)
    assert numbers["health/effective_rank"] == pytest.approx(float(health.effective_rank(kept)), rel=1e-4)
    assert numbers["health/uniformity"] == pytest.approx(float(health.uniformity(kept[-watch.PAIRS :])), rel=1e-4)
    assert numbers["health/alignment"] == pytest.approx(float(health.alignment(kept, pair[last])), rel=1e-4)
    assert numbers["health/queue_age"] == 10  # 640 keys, 2 ranks of 32 per step
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert numbers["health/cluster_evenness/0"] == pytest.approx(entropy)
    cosine = (kept @ kept.T).numpy()
    np.fill_diagonal(cosine, -9)
    near = np.argsort(-cosine, 1)[:, : watch.K]
    votes = np.zeros((len(kept), 3))
    for i, neighbours in enumerate(near):
        np.add.at(votes[i], label[last][neighbours], np.exp(cosine[i, neighbours] / watch.TEMPERATURE))
    expected = 100 * (votes.argmax(1) == label[last].numpy()).mean()
    assert numbers["health/knn_top1"] == pytest.approx(expected, abs=0.2)
    assert seen.warning(numbers) == ""


def test_a_collapse_is_said_once_with_its_cause() -> None:
    seen = watch.Watch(config(lr=3.0, batch=64), Holder(8), None, per_epoch=1, world=1)
    same = F.normalize(torch.ones(64, 8) + 1e-4 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    seen.saw(0, batch(torch.arange(64)), Output(torch.zeros(()), {"embedding": same}, {}))
    numbers = seen.read(None)
    assert "health/knn_top1" not in numbers
    text = seen.warning(numbers)
    assert "nearly all are the same" in text
    assert "train.lr = 3 is high" in text
    assert seen.warning(numbers) == "", "said once"
    assert seen.warning({"health/std": 0.9}) == ""
    assert seen.warning(numbers) != "", "and again when it comes back"
    assert "onto a line" in watch.collapse({"health/std": 0.9, "health/effective_rank": 1.2})
    uneven = watch.collapse({"health/cluster_evenness/1": 0.1})
    assert "clustering 1" in uneven
    assert "mining.balanced" in watch.likely_cause(config(), uneven)


@pytest.mark.slow
def test_a_run_says_it_on_the_terminal_and_in_its_metrics(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LEAST_SPREAD", 2.0)  # every run has collapsed by this
    folder = tmp_path / "run"
    options = ["quickstart", "--runtime", "local", "--train.epochs", "1", "--train.warmup-epochs", "0", "--model.width"]
    options += ["4", "--evals.names", "--data.loader", "torch", "--train.lr", "2"]
    assert pretrain.main([*options, f"--run.dir={folder}", "--log.quiet"]) == 0
    lines = list(read_lines(folder / "metrics.jsonl"))
    last = [r for r in lines if r["kind"] == "train"][-1]
    assert {"health/std", "health/uniformity", "health/alignment", "health/knn_top1", "health/queue_age"} <= set(last)
    (told,) = [r["text"] for r in lines if r["kind"] == "event" and "collapsed" in r["text"]]
    assert "train.lr = 2 is high" in told
    assert "train.lr = 2 is high" in capfd.readouterr().err
