"""MoCo v3 (Chen, Xie and He 2021, arXiv 2104.02057): no queue; the keys of the global batch are the candidates.

Both views are queries, through a predictor, and both are keys, from the momentum encoder; the loss is the sum of the
two directions, each 2 x temperature x InfoNCE.

Legend: B rows of this batch (a rank), D embedding width, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, within
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses, optim
from raycon.nn.networks import Branch, Twin, mlp_head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "mocov3"
    """The method."""
    temperature: float = 1.0
    """Of the similarities; the loss is multiplied by twice that."""
    views: tuple[str, str] = ("strong-alpha", "strong-beta")
    """The two views; most presets have only one kind of them: strong and strong."""
    dim: int = 256
    """Width of the embedding."""
    projector: tuple[int, ...] = (4096,)
    """Hidden widths of the projection head, BatchNorm after each and at the end."""
    predictor: tuple[int, ...] = (4096,)
    """Hidden widths of the student's predictor, BatchNorm after each."""
    predictor_norm: bool = False
    """A BatchNorm without scale and shift at the end of the predictor, as for ViTs; ResNets have none."""
    momentum: float = 0.99
    """Of the teacher."""
    momentum_schedule: Literal["constant", "cosine"] = "cosine"
    """cosine: from momentum to 1 at the last step."""

    def needs(self) -> Needs:
        return Needs(views=self.views)

    def problems(self, facts: Facts) -> list[str]:
        found = (
            above_zero("method.temperature", self.temperature)
            + within("method.momentum", self.momentum, 0, 1)
            + at_least("method.dim", self.dim, 1)
        )
        for width in (*self.projector, *self.predictor):
            found += at_least("method.projector / method.predictor", width, 1)
        return found


class MoCoV3(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int, epochs: int) -> None:
        super().__init__(options)
        self.options, self.epochs = options, epochs
        self.student = Branch(encoder, mlp_head(features, options.projector, options.dim, last_norm=True))
        self.teacher = Twin(self.student)
        self.predictor = mlp_head(
            options.dim, options.predictor, options.dim, last_norm=options.predictor_norm, last_bias=False
        )

    def forward(self, batch: Batch, mined: Mined) -> Output:
        with torch.no_grad():
            key_BD = [self.embed(self.teacher, view) for view in batch.views]
        query_BD = [self.embed(self._online, view) for view in batch.views]
        loss, right = query_BD[0].new_zeros(()), query_BD[0].new_zeros(())
        for query, key in zip(query_BD, reversed(key_BD), strict=True):
            direction, accuracy = self.direction(query, key)
            loss, right = loss + direction, right + accuracy
        return Output(loss, {"embedding": query_BD[0].detach(), "pair": key_BD[1]}, {"accuracy/instance": right / 2})

    def direction(self, query_BD: Tensor, key_BD: Tensor) -> tuple[Tensor, Tensor]:
        """2 x temperature x InfoNCE over the keys of all ranks, and how often the own key is the nearest."""
        temperature = self.options.temperature
        logits_BC = losses.pair_logits(query_BD, dist.gather(key_BD), temperature)
        own_B = losses.own_columns(query_BD, dist.rank())
        return 2 * temperature * losses.cross_entropy(logits_BC, own_B), losses.accuracy(logits_BC, own_B)

    def _online(self, images: Tensor) -> Tensor:
        out: Tensor = self.predictor(self.student(images))
        return out

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        momentum = optim.momentum_at(self.options.momentum_schedule, self.options.momentum, progress, self.epochs)
        self.teacher.follow(self.student, momentum)

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.teacher, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return MoCoV3(options, encoder, encoder.features, facts.epochs)  # type: ignore[arg-type]
