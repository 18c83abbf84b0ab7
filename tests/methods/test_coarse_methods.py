"""MaskCon, SupCon and supervised training against their definitions, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycon import methods
from raycon.core import dist
from raycon.core.config import Facts
from raycon.core.types import Batch, Mined, Progress
from raycon.methods import supervised
from tests.helpers import on_ranks

NOTHING = Mined(None, (), 5)


def facts(batch: int = 6, rows: int = 96, classes: int = 3) -> Facts:
    return Facts(rows=rows, classes=classes, image=None, batch=batch, world=1, size=8, epochs=1)


class Small(nn.Module):
    features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def batch_of(n: int, labels: list[int], seed: int = 0) -> Batch:
    views = torch.randn(2, n, 7, generator=torch.Generator().manual_seed(seed))
    return Batch((views[0], views[1]), torch.arange(n), torch.tensor(labels))


def build(name: str, batch: int = 6, **options: Any) -> Any:
    torch.manual_seed(3)
    return methods.module(name).build(methods.configure(name, **options), Small(), facts(batch))


def supcon_by_hand(z: Tensor, cluster: list[int], temperature: float) -> float:
    total = 0.0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        logits = {j: float(z[i] @ z[j]) / temperature for j in others}
        log_sum = math.log(sum(math.exp(v) for v in logits.values()))
        positives = [j for j in others if cluster[j] == cluster[i]]
        total -= sum(logits[j] - log_sum for j in positives) / len(positives)
    return total / len(z)


def test_supcon_by_hand() -> None:
    """Images without a label are positive with their own other view only."""
    method = build("supcon", dim=4, temperature=0.3)
    batch = batch_of(6, [0, 1, 0, -1, -1, 1])
    loss = method(batch, NOTHING).loss
    with torch.no_grad():
        z = F.normalize(method.student(torch.cat(batch.views)), dim=1)
    assert float(loss.detach()) == pytest.approx(supcon_by_hand(z, 2 * [0, 1, 0, 7, 8, 1], 0.3), rel=1e-5)


def rank_gradient(name: str) -> Tensor:
    """This rank's averaged gradient of a global batch of 6."""
    method = build(name, **({"dim": 4} if name == "supcon" else {}))
    whole, rank, local = batch_of(6, [0, 1, 0, 2, 2, 1]), dist.rank(), 6 // dist.world()
    part = slice(rank * local, (rank + 1) * local)
    views = tuple(v[part] for v in whole.views)
    method(Batch(views, whole.row[part], whole.label[part]), NOTHING).loss.backward()
    return dist.mean(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))


def test_supervised_is_cross_entropy_over_labelled_rows() -> None:
    method = build("supervised")
    assert isinstance(method, supervised.Supervised)
    whole = batch_of(6, [0, 2, -1, 1, -1, 0])
    one_view = Batch(whole.views[:1], whole.row, whole.label)
    loss = method(one_view, NOTHING).loss
    seen = whole.label >= 0
    expected = F.cross_entropy(method.classifier(method.network(whole.views[0][seen])), whole.label[seen])
    torch.testing.assert_close(loss, expected)
    unlabelled = method(Batch(whole.views[:1], whole.row, whole.label * 0 - 1), NOTHING).loss
    assert unlabelled.item() == 0


def maskcon_target_by_hand(key: Tensor, queue: Tensor, y: list[int], labels: list[int], t: float, w: float) -> Tensor:
    target = torch.zeros(len(key), 1 + len(queue))
    for i in range(len(key)):
        same = [j for j in range(len(queue)) if labels[j] == y[i] and y[i] >= 0]
        z = {j: math.exp(float(key[i] @ queue[j]) / t) for j in same}
        largest = max(z.values(), default=1.0)
        total = 1 + sum(v / largest for v in z.values())
        target[i, 0] = w / total + 1 - w
        for j, v in z.items():
            target[i, 1 + j] = w * v / largest / total
    return target


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_maskcon_targets_by_hand(weight: float) -> None:
    """With rows of no label, rows whose class the queue lacks, and entries that were never filled (-1)."""
    method = build("maskcon", dim=4, queue=12, weight=weight, soft_temperature=0.2)
    labels = [0, 0, 1, -1, 1, 0, -1, 1, 0, 0, 1, 1]
    method.queue.labels.copy_(torch.tensor(labels))
    key = F.normalize(torch.randn(6, 4), dim=1)
    y = [0, 1, 2, -1, 1, 0]
    expected = maskcon_target_by_hand(key, method.queue.keys, y, labels, 0.2, weight)
    actual = method.target(key, torch.tensor(y))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.sum(1), torch.ones(6))


def test_the_limits_of_maskcon() -> None:
    """A hot temperature is grafit, weight 0 of every mode is selfcon, coins with weight 1 looks at labels only."""
    batch = batch_of(6, [0, 1, 0, 2, 2, 1])
    keys = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(8)), dim=1)

    def loss(**options: Any) -> float:
        method = build("maskcon", dim=4, queue=12, **options)
        method.queue.labels.copy_(torch.arange(12) % 3)
        method.queue.keys.copy_(keys)
        return float(method(batch, NOTHING).loss.detach())

    assert loss(weight=1.0, soft_temperature=1e6) == pytest.approx(loss(mode="grafit", weight=1.0), rel=1e-5)
    selfcon = {mode: loss(mode=mode, weight=0.0) for mode in ("maskcon", "grafit", "coins")}
    assert selfcon["maskcon"] == pytest.approx(selfcon["grafit"], rel=1e-6)
    assert selfcon["maskcon"] == pytest.approx(selfcon["coins"], rel=1e-6)
    assert loss(mode="coins", weight=1.0) == pytest.approx(loss(mode="coins", weight=1.0, temperature=9.0))
    assert loss(weight=1.0) != pytest.approx(selfcon["maskcon"], rel=1e-3)


def test_the_bank_is_filled_with_training_images_before_the_first_step() -> None:
    method = build("maskcon", dim=4, queue=12)

    def batches() -> Iterator[Batch]:
        for i in count():
            taken.append(i)
            yield batch_of(6, [0, 1, 0, 2, 2, 1], seed=i)

    taken: list[int] = []
    method.before_training(batches(), seed=0)
    assert taken == [0, 1]
    with torch.no_grad():
        expected = torch.cat(
            [F.normalize(method.teacher(batch_of(6, [0] * 6, seed=i).views[1]), dim=1) for i in (0, 1)]
        )
    torch.testing.assert_close(method.queue.keys, expected)
    assert method.queue.labels.tolist() == 2 * [0, 1, 0, 2, 2, 1]
    empty = build("maskcon", dim=4, queue=12, prefill=False)
    empty.before_training(iter(()), seed=0)
    assert (empty.queue.labels == -1).all()
    assert bool(empty(batch_of(6, [0, 1, 0, 2, 2, 1]), NOTHING).loss.isfinite())


def rank_queue() -> tuple[Tensor, Tensor]:
    method, local = build("maskcon", dim=4, queue=12), 6 // dist.world()
    for step in range(3):
        whole = batch_of(6, [step, 1, 2, 0, step, 1], seed=step)
        part = slice(dist.rank() * local, (dist.rank() + 1) * local)
        batch = Batch(tuple(v[part] for v in whole.views), whole.row[part], whole.label[part])
        if step == 0:
            method.before_training((batch for _ in count()), seed=1)
        output = method(batch, NOTHING)
        method.after_step(output.keep, Progress(step, 3, 0))
    return method.queue.keys, method.queue.labels


def rank_all() -> tuple[Tensor, Tensor, Tensor]:
    return rank_gradient("supcon"), *rank_queue()


@pytest.mark.ranks
def test_three_ranks_have_one_queue_and_the_gradient_of_one_process() -> None:
    one, ranks = rank_gradient("supcon"), on_ranks(3, rank_all)
    for gradient, keys, labels in ranks:
        torch.testing.assert_close(gradient, one, rtol=1e-4, atol=1e-6)
        assert torch.equal(keys, ranks[0][1])
        assert labels.tolist() == [2, 1, 2, 0, 2, 1, 1, 1, 2, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("maskcon", "weight", 1.5),
        ("maskcon", "temperature", 0.0),
        ("maskcon", "soft_temperature", -1.0),
        ("maskcon", "momentum", 1.1),
        ("maskcon", "queue", 8),
        ("maskcon", "hidden", 0),
        ("supcon", "temperature", 0.0),
        ("supcon", "dim", 0),
    ],
)
def test_impossible_options_are_named(name: str, option: str, value: float) -> None:
    good = {"queue": 12} if name == "maskcon" else {}
    (problem,) = methods.configure(name, **good | {option: value}).problems(facts())
    assert problem.startswith(f"method.{option}")
    assert str(value) in problem


def test_options_without_effect_are_said() -> None:
    assert methods.configure("maskcon", queue=12).warnings(facts()) == []
    (warning,) = methods.configure("maskcon", queue=12, mode="grafit", soft_temperature=0.1).warnings(facts())
    assert "method.soft_temperature" in warning
    (warning,) = methods.configure("maskcon", queue=120).warnings(facts())
    assert "method.queue = 120" in warning


def test_needs() -> None:
    assert methods.configure("maskcon").needs().labels
    assert not methods.configure("maskcon", weight=0.0).needs().labels
    assert methods.configure("maskcon", key_view="strong").needs().views == ("strong", "strong")
