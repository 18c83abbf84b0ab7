"""Cl-InfoNCE beyond the golden vectors: where clusters come from, warm-up, start-up checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raycon import methods
from raycon.core.config import ConfigError, Facts, TrainConfig
from raycon.core.types import Batch, Mined, Snapshot
from raycon.methods import clinfonce
from raycon.nn import optim
from tests.helpers import on_ranks

FACTS = Facts(rows=12, classes=3, image=None, batch=4, world=1, size=32, epochs=9)
ROW, LABEL = torch.tensor([7, 2, 9, 0]), torch.tensor([1, -1, 1, -1])


class Encoder(nn.Linear):
    features = 6

    def __init__(self) -> None:
        super().__init__(5, self.features)


def build(seed: int = 0, **options: Any) -> clinfonce.ClInfoNCE:
    torch.manual_seed(seed)
    method = clinfonce.build(methods.configure("clinfonce", dim=4, hidden=8, **options), Encoder(), FACTS)
    assert isinstance(method, clinfonce.ClInfoNCE)
    return method


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(tuple(torch.randn(4, 5, generator=generator) for _ in range(2)), ROW, LABEL)


def mined(epoch: int = 0, assignment: torch.Tensor | None = None) -> Mined:
    snapshot = None if assignment is None else Snapshot(0, (assignment,), (torch.zeros(3, 4),), (), None)
    return Mined(snapshot, (), 0, epoch=epoch)


def test_sources(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b\n" + "".join(f"{row % 2},{row % 3}\n" for row in range(12)), encoding="utf-8")
    assignment = torch.arange(12) // 5
    found = {
        "kmeans": build(k=3).cluster_of(batch(), mined(0, assignment)),
        "instances": build(clusters="instances").cluster_of(batch(), mined()),
        "column": build(clusters="column", table=str(table), columns=("b",)).cluster_of(batch(), mined()),
        "attributes": build(clusters="attributes", table=str(table), granularity=1).cluster_of(batch(), mined()),
    }
    values = {name: [] if ids is None else ids.tolist() for name, ids in found.items()}
    assert values == {
        "kmeans": [1, 0, 1, 0],
        "instances": [7, 2, 9, 0],
        "column": [1, 2, 0, 0],
        "attributes": [1, 2, 0, 0],
    }
    labels = build(clusters="labels").cluster_of(batch(), mined())
    assert labels is not None
    assert labels[0] == labels[2] == 1
    assert len(labels.unique()) == 3  # without a label: each its own cluster, not one together
    assert "table" not in build(clusters="column", table=str(table), columns=("b",)).state_dict()
    with pytest.raises(ConfigError, match=r"method.table.*no column 'c'"):
        build(clusters="column", table=str(table), columns=("c",))


def test_a_kmeans_assignment_works_as_labels_do() -> None:
    """The same partition from any source gives the same loss, in both forms."""
    full = LABEL.new_zeros(12)
    full[ROW] = torch.tensor([2, 0, 2, 1])
    with_labels = batch()._replace(label=torch.tensor([5, 3, 5, 4]))
    for form in ("single", "dual"):
        clustered = build(form=form, k=3)(batch(), mined(0, full)).loss
        labelled = build(form=form, clusters="labels")(with_labels, mined()).loss
        alone = build(form=form, clusters="instances")(batch(), mined()).loss
        torch.testing.assert_close(clustered, labelled)
        assert float(clustered.detach()) != pytest.approx(float(alone.detach()), rel=1e-3)


def test_before_the_clusters() -> None:
    assignment = torch.zeros(12, dtype=torch.long)
    method = build(k=3, warmup_epochs=2)
    early = method(batch(), mined(1, assignment)).loss
    torch.testing.assert_close(early, build(clusters="instances")(batch(), mined()).loss)
    assert not torch.allclose(early, method(batch(), mined(2, assignment)).loss)
    method = build(form="dual", k=3, warmup_epochs=2)
    output = method(batch(), mined(1))
    output.loss.backward()
    assert set(output.metrics) == {"loss/instance", "accuracy/instance"}
    assert method.student.second[0].weight.grad is None  # type: ignore[index, union-attr]
    assert method.unused_parameters
    optimizer = optim.build_optimizer(method, TrainConfig(optimizer="sgd", momentum=0.9))
    before = [p.detach().clone() for p in method.student.second.parameters()]  # type: ignore[union-attr]
    optimizer.step()
    after = list(method.student.second.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    method(batch(), mined(2, assignment)).loss.backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))
    assert not build(form="dual", k=3).unused_parameters


def wrapped_step() -> list[bool]:
    """Two steps under DDP before there are clusters, one after: did the second head get gradients?"""
    method = build(form="dual", k=3, warmup_epochs=1)
    net = nn.parallel.DistributedDataParallel(
        method, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=method.unused_parameters
    )
    found = []
    for epoch in (0, 0, 1):
        net(batch(), mined(epoch, torch.zeros(12, dtype=torch.long))).loss.backward()
        found.append(any(p.grad is not None for p in method.student.second.parameters()))  # type: ignore[union-attr]
        net.zero_grad(set_to_none=True)
    return found


@pytest.mark.ranks
def test_ddp_bears_a_head_without_gradient() -> None:
    """And leaves it without one, so that LARS and weight decay do not move it."""
    assert on_ranks(2, wrapped_step) == [[False, False, True]] * 2


def test_start_up_checks(tmp_path: Path) -> None:
    def problems(**options: Any) -> str:
        return "\n".join(methods.configure("clinfonce", **{"k": 3, **options}).problems(FACTS))

    assert problems() == ""
    assert "method.k has k = 13, more than the 12 images" in problems(k=13)
    assert "method.k" not in problems(k=13, clusters="instances")
    assert "method.temperature = -1.0" in problems(temperature=-1.0)
    assert "method.group = 3 does not divide the 4 images" in problems(group=3)
    assert "method.group = 2 needs method.clusters" in problems(group=2, clusters="instances")
    assert problems(group=2) == ""
    assert "method.table = '' is not a file" in problems(clusters="attributes")
    assert methods.configure("clinfonce", clusters="labels").needs().labels
    warned = methods.configure("clinfonce", k=8, warmup_epochs=9).warnings(FACTS)
    assert "never used" in warned[0]
    assert "nearly InfoNCE" in warned[1]


def test_the_temperature_factor() -> None:
    plain = build(clusters="instances", temperature=0.2, base_temperature=0.0)(batch(), mined()).loss
    scaled = build(clusters="instances", temperature=0.2)(batch(), mined()).loss
    torch.testing.assert_close(scaled, plain * (0.2 / 0.07))
    views = [F.normalize(build().student(v), dim=1) for v in batch().views]
    first, _ = build(anchors="first", temperature=0.2).single_loss(views, ROW)
    second, _ = build(anchors="first", temperature=0.2).single_loss(views[::-1], ROW)
    both, _ = build(temperature=0.2).single_loss(views, ROW)
    torch.testing.assert_close((first + second) / 2, both)
