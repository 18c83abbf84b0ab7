"""WCL beyond the golden vectors: crops of neighbours, full gradients, start-up checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raycon import methods
from raycon.core import dist
from raycon.core.config import Facts
from raycon.core.types import Batch, Mined
from raycon.methods import wcl
from tests.helpers import on_ranks

ROWS, DIM = 8, 5
FACTS = Facts(rows=100, classes=0, image=None, batch=8, world=1, size=32, epochs=20)


class Half(nn.Module):
    """A head: one half of the columns of its input."""

    def __init__(self, second: bool) -> None:
        super().__init__()
        self.second = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(2, dim=1)[self.second]


def build(**options: Any) -> wcl.WCL:
    method = wcl.WCL(methods.configure("wcl", **options), nn.Identity(), 1)  # type: ignore[arg-type]
    method.student.first, method.student.second = Half(False), Half(True)
    return method


def raw(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, 2 * DIM, generator=torch.Generator().manual_seed(seed))


def batch(*views: torch.Tensor) -> Batch:
    return Batch(views, torch.arange(len(views[0])), torch.full((len(views[0]),), -1))


def test_crops_stand_for_their_row() -> None:
    views = [raw(s) for s in range(4)]
    options = {"temperature": 0.2, "warmup_view_epochs": 0}
    method = build(crops=2, crop_weight=0.5, **options)
    output = method(batch(*views), Mined(None, (), 0))
    plain = build(**options)(batch(*views[:2]), Mined(None, (), 0))
    one, two, *crops = (F.normalize(v[:, DIM:], dim=1) for v in views)
    labels = method.weak_loss(one, two)[1]
    expected = 0.0
    for keys, label in ((one, labels[1]), (two, labels[0])):
        for crop in crops:
            for i in range(ROWS):
                similarity = [float(crop[i] @ k) / 0.2 for k in keys]
                total = math.log(sum(math.exp(s) for s in similarity))
                same = [similarity[j] - total for j in range(ROWS) if label[j] == label[i]]
                expected -= sum(same) / len(same) / ROWS / 4
    torch.testing.assert_close(output.metrics["loss/crop"], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * output.metrics["loss/crop"])


def test_needs() -> None:
    plain = methods.configure("wcl").needs()
    assert plain.views == ("strong", "strong")
    assert (plain.warmup_views, plain.warmup_view_epochs) == (("weak", "weak"), 10)
    assert not plain.snapshot
    cropped = methods.configure("wcl", crops=2, neighbours=3, crop_from_epoch=5).needs()
    assert cropped.views == ("strong", "strong", "neighbour", "neighbour")
    assert cropped.warmup_views == ("weak", "weak", "neighbour", "neighbour")
    assert (cropped.neighbours, cropped.from_epoch, cropped.clusterings) == (3, 5, ())


def test_start_up_checks() -> None:
    def problems(**options: Any) -> str:
        return "\n".join(methods.configure("wcl", **options).problems(FACTS))

    assert problems() == ""
    assert problems(crops=2) == ""
    assert "method.temperature = 0.0" in problems(temperature=0.0)
    assert "method.neighbours = 100" in problems(crops=1, neighbours=100)
    assert "method.crops = -1" in problems(crops=-1)
    assert methods.configure("wcl").warnings(FACTS) == []
    assert "never used" in methods.configure("wcl", warmup_view_epochs=20).warnings(FACTS)[0]


def gradients(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's loss, and the gradient of its rows as DDP averages it."""
    local = ROWS // world
    mine = slice(dist.rank() * local, (dist.rank() + 1) * local)
    views = [raw(s)[mine].requires_grad_() for s in range(2)]
    output = build(full_gradient=True)(batch(*views), Mined(None, (), 0))
    output.loss.backward()
    return output.loss.detach(), torch.stack([v.grad for v in views if v.grad is not None]) / world


@pytest.mark.ranks
def test_full_gradients_do_not_depend_on_the_number_of_ranks() -> None:
    loss, grad = gradients(1)
    ranks = on_ranks(2, gradients, 2)
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), loss)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks], dim=1), grad, rtol=1e-4, atol=1e-6)
