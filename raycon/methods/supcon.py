"""SupCon, supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362), on weak labels.

Two views of every image of all ranks; a view's positives are all other views with its label. An image without a label
is alone with its own two views, so that on unlabelled data this is SimCLR.

Legend: B rows of this rank's batch, V = 2B views of them, C = 2B x ranks views of all, D embedding width.
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
from raycon.nn.networks import Branch, head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "supcon"
    """The method."""
    temperature: float = 0.1
    """Of the similarities."""
    dim: int = 128
    """Width of the embedding."""
    hidden: int = 0
    """Width of the head's hidden layer; 0: as wide as the encoder's features."""

    def needs(self) -> Needs:
        return Needs(views=("strong", "strong"), labels=True)

    def problems(self, facts: Facts) -> list[str]:
        return (
            above_zero("method.temperature", self.temperature)
            + at_least("method.dim", self.dim, 1)
            + at_least("method.hidden", self.hidden, 0)
        )


class SupCon(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int) -> None:
        super().__init__(options)
        self.options = options
        self.student = Branch(encoder, head("mlp", features, options.dim, options.hidden))

    def forward(self, batch: Batch, mined: Mined) -> Output:
        query_VD = self.embed(self.student, torch.cat(batch.views))
        key_CD = dist.gather_with_gradient(query_VD)
        own_V = losses.own_columns(query_VD, dist.rank())
        logits_VC = losses.pair_logits(query_VD, key_CD, self.options.temperature, own_V)
        cluster_V = losses.unlabelled_alone(batch.label, batch.row).repeat(2)
        positive_VC = losses.same_cluster(cluster_V, dist.gather(cluster_V), own_V)
        loss = losses.cross_entropy(logits_VC, losses.uniform_over(positive_VC))
        right_V = positive_VC.gather(1, logits_VC.argmax(1, keepdim=True))
        metrics = {"accuracy/positive": right_V.float().mean()}
        rows = len(batch.row)
        return Output(
            loss, {"embedding": query_VD[:rows].detach(), "pair": query_VD[rows : 2 * rows].detach()}, metrics
        )

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor:
        """Uniform over the views of the same label: two of every other image, the other one of the own."""
        cluster_B = losses.unlabelled_alone(label, row)
        views_BB = 2.0 * losses.same_cluster(cluster_B, cluster_B).float()
        views_BB.fill_diagonal_(1.0)
        return views_BB / views_BB.sum(1, keepdim=True)

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.student, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return SupCon(options, encoder, encoder.features)  # type: ignore[arg-type]
