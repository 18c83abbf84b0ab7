"""SCE beyond its official code: masked targets with many crops, the temperature's warm-up, and what start-up refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raycon import methods
from raycon.core.config import Facts
from raycon.core.types import Batch, Mined, Progress, Snapshot
from raycon.methods import sce

ROWS, BATCH, DIM = 40, 8, 6
FACTS = Facts(rows=ROWS, classes=3, image=None, batch=BATCH, world=1, size=8, epochs=4)


class Flat(nn.Module):
    features = DIM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def build(**options: Any) -> sce.SCE:
    torch.manual_seed(0)
    made = methods.configure("sce", dim=DIM, queue=32, projector=(DIM,), **options)
    assert made.problems(FACTS) == []
    return sce.SCE(made, Flat(), DIM, FACTS.epochs)


def batch(crops: int, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    views = tuple(torch.randn(BATCH, DIM, generator=generator) for _ in range(crops))
    row = torch.arange(first, first + BATCH) % ROWS
    return Batch(views, row, torch.arange(BATCH) % 3 - 1)


def mined(assignment: torch.Tensor) -> Mined:
    snapshot = Snapshot(0, (assignment,), (torch.eye(4, DIM),), (), None)
    return Mined(snapshot, (4,), 1, epoch=2, step=0, steps=40)


@pytest.mark.parametrize("mask", ["clusters", "labels"])
def test_six_crops_with_a_masked_target(mask: str) -> None:
    names = ("strong", "strong", "l1", "l2", "l3", "l4")
    options = {"clusters": 4, "from_epoch": 0} if mask == "clusters" else {}
    method = build(views=names, symmetric=True, mask=mask, official_zero=False, coefficient=0.3, **options)
    assert method.needs.clusterings == ((4,) if mask == "clusters" else ())
    assert method.needs.labels == (mask == "labels")
    assignment = torch.arange(ROWS) * 7 % 4
    now = mined(assignment)
    before = batch(6)
    method.after_step(method(before, now).keep, Progress(0, 40, 0))  # 16 of 32 entries are filled
    assert method.queue is not None
    assert method.queue.labels is not None

    after = batch(6, first=5)
    output = method(after, now)
    output.loss.backward()
    assert torch.isfinite(output.loss)

    keys = method.key(after.views[0], 1)
    own, target = method.target(keys, method.candidates(keys), after, now)
    mine = assignment[after.row] if mask == "clusters" else after.label
    theirs = (assignment[before.row] if mask == "clusters" else before.label).repeat(2)
    assert own.tolist() == [0] * BATCH
    for i in range(BATCH):
        same = [j for j in range(16) if mine[i] == theirs[j] and mine[i] >= 0]
        expected = torch.zeros(33)
        if same:
            expected[[1 + j for j in same]] = 0.7 * F.softmax(method.queue.keys[same] @ keys[i] / 0.05, dim=0)
        expected[0] = 0.3 if same else 1.0
        torch.testing.assert_close(target[i], expected, rtol=1e-4, atol=1e-6)


def test_no_mask_before_the_first_clustering() -> None:
    masked, plain = build(mask="clusters", clusters=4), build()
    still = Mined(None, (), 1, steps=40)
    assert torch.equal(masked(batch(2), still).loss, plain(batch(2), still).loss)


def test_warm_up_of_the_targets_temperature() -> None:
    method = build(teacher_temperature=0.07, teacher_temperature_start=0.03, teacher_temperature_epochs=2)
    assert method.queue is not None
    key = F.normalize(torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(1)))
    for step, temperature in ((0, 0.03), (5, 0.04), (20, 0.07), (30, 0.07)):  # 40 steps are 4 epochs
        _, target = method.target(key, method.candidates(key), batch(2), Mined(None, (), 0, step=step, steps=40))
        logits = torch.cat([torch.zeros(BATCH, 1), key @ method.queue.keys.T / temperature], 1)
        expected = 0.5 * logits.softmax(1)
        expected[:, 0] += 0.5
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"coefficient": 1.1}, "method.coefficient = 1.1"),
        ({"temperature": 0.0}, "method.temperature = 0.0"),
        ({"teacher_temperature": -0.1}, "method.teacher_temperature = -0.1"),
        ({"queue": 24, "symmetric": True}, "method.queue = 24"),
        ({"queue": 20}, "method.queue = 20"),
        ({"views": ("strong",)}, "method.views"),
        ({"mask": "clusters", "clusters": 41}, "method.clusters has k = 41"),
        ({"mask": "labels", "negatives": "both"}, "method.mask = 'labels'"),
        ({"split_bn": 3}, "method.split_bn = 3"),
        ({"momentum": 1.5}, "method.momentum = 1.5"),
        ({"projector": (0,)}, "method.projector"),
    ],
)
def test_start_up_refuses(wrong: dict[str, Any], named: str) -> None:
    fine = methods.configure("sce", queue=32)
    assert fine.problems(FACTS) == []
    (problem,) = replace(fine, **wrong).problems(FACTS)
    assert problem.startswith(named)
