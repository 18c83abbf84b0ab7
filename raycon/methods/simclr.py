"""SimCLR (Chen et al. 2020, arXiv 2002.05709): each view finds the other among all views of the global batch.

No teacher and no queue; the negatives are the batch, so it wants a large one.

Legend: B rows of this batch (a rank), D embedding width, W ranks; anchors are 2B: first views, then second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least
from raycon.core.types import Batch, Mined, Needs, Output
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, mlp_head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "simclr"
    """The method."""
    temperature: float = 0.1
    """Of the similarities."""
    dim: int = 128
    """Width of the embedding."""
    projector: tuple[int, ...] = (2048,)
    """Hidden widths of the projection head, BatchNorm after each and at the end."""

    def needs(self) -> Needs:
        return Needs(views=("strong", "strong"))

    def problems(self, facts: Facts) -> list[str]:
        found = above_zero("method.temperature", self.temperature) + at_least("method.dim", self.dim, 1)
        for width in self.projector:
            found += at_least("method.projector", width, 1)
        return found


class SimCLR(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int) -> None:
        super().__init__(options)
        self.options = options
        head = mlp_head(features, options.projector, options.dim, last_norm=True, last_affine=True)
        self.student = Branch(encoder, head)

    def forward(self, batch: Batch, mined: Mined) -> Output:
        anchor_AD = torch.cat([self.embed(self.student, view) for view in batch.views])
        key_CD = dist.gather_with_gradient(anchor_AD)
        rank = dist.rank()
        own_A, other_A = losses.own_columns(anchor_AD, rank), losses.other_view(anchor_AD, rank)
        logits_AC = losses.pair_logits(anchor_AD, key_CD, self.options.temperature, own_A)
        loss = losses.cross_entropy(logits_AC, other_A)
        metrics = {"accuracy/instance": losses.accuracy(logits_AC, other_A)}
        rows = len(batch.row)
        return Output(
            loss, {"embedding": anchor_AD[:rows].detach(), "pair": anchor_AD[rows : 2 * rows].detach()}, metrics
        )

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.student, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return SimCLR(options, encoder, encoder.features)  # type: ignore[arg-type]
