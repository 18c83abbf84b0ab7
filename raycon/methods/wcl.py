"""WCL, weakly supervised contrastive learning (Zheng et al. 2021, arXiv 2110.04770).

One encoder, two heads. The first tells images apart (SimCLR over all ranks). The second draws a graph over the batch, an
edge from every image to its nearest neighbour, and takes the connected components as weak labels: those found in one
view supervise the other view.

Legend: B rows on this rank, A = 2 B anchors, G = W B rows of all ranks, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least
from raycon.core.types import Batch, Mined, Needs, Output
from raycon.methods.base import Method
from raycon.nn import graph, losses
from raycon.nn.networks import TwoHeads, mlp_head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "wcl"
    """The method."""
    temperature: float = 0.1
    """Of both losses."""
    dim: int = 128
    """Width of both embeddings; the published code's is 256."""
    hidden: int = 2048
    """Width of the heads' two hidden layers; the published code's is 4096."""
    weight: float = 1.0
    """Of the weak loss."""
    full_gradient: bool = False
    """Let gradients flow through all keys (the paper's code: through none of the weak loss, only a rank's own of the
    instance loss), so that the gradient does not depend on the number of ranks."""
    warmup_view_epochs: int = 10
    """Epochs with the weak views of data.views before the strong ones; as long as the learning rate warms up."""
    crops: int = 0
    """Small crops of mined neighbours as further anchors of the weak loss (raycon's own design); 0: none."""
    neighbours: int = 4
    """With method.crops: nearest neighbours of an image among which one is drawn per crop."""
    crop_weight: float = 1.0
    """With method.crops: of their loss."""
    crop_from_epoch: int = 10
    """With method.crops: the first epoch with mined neighbours; before it the crops are of the image itself."""
    refresh_epochs: int = 1
    """With method.crops: neighbours are mined anew every so many epochs."""

    def needs(self) -> Needs:
        return Needs(
            views=("strong", "strong") + ("neighbour",) * self.crops,
            warmup_views=("weak", "weak") + ("neighbour",) * self.crops if self.warmup_view_epochs else (),
            warmup_view_epochs=self.warmup_view_epochs,
            neighbours=self.neighbours if self.crops else 0,
            from_epoch=self.crop_from_epoch,
            refresh_epochs=self.refresh_epochs,
        )

    def problems(self, facts: Facts) -> list[str]:
        found = (
            above_zero("method.temperature", self.temperature)
            + at_least("method.dim", self.dim, 1)
            + at_least("method.hidden", self.hidden, 1)
            + at_least("method.weight", self.weight, 0)
            + at_least("method.warmup_view_epochs", self.warmup_view_epochs, 0)
            + at_least("method.crops", self.crops, 0)
            + at_least("method.crop_weight", self.crop_weight, 0)
            + at_least("method.crop_from_epoch", self.crop_from_epoch, 0)
            + at_least("method.refresh_epochs", self.refresh_epochs, 1)
        )
        if self.crops and not 1 <= self.neighbours < facts.rows:
            found.append(
                f"method.neighbours = {self.neighbours}: give a number from 1 to {facts.rows - 1}, fewer than the images"
            )
        return found

    def warnings(self, facts: Facts) -> list[str]:
        found = []
        if self.warmup_view_epochs >= facts.epochs:
            found.append(
                f"method.warmup_view_epochs = {self.warmup_view_epochs} >= train.epochs = {facts.epochs}: "
                "the strong views are never used"
            )
        if facts.batch <= 2 and self.weight:
            found.append("method.weight has no effect at train.batch = 2: the only other image is always the neighbour")
        if self.crops and self.crop_from_epoch >= facts.epochs:
            found.append(
                f"method.crop_from_epoch = {self.crop_from_epoch} >= train.epochs = {facts.epochs}: "
                "neighbours are never mined"
            )
        return found


class WCL(Method):
    def __init__(self, options: Options, encoder: nn.Module, features: int) -> None:
        super().__init__(options)
        self.options = options
        self.ranks_agree = options.full_gradient
        hidden = (options.hidden, options.hidden)
        self.student = TwoHeads(
            encoder,
            mlp_head(features, hidden, options.dim, bias=True),
            mlp_head(features, hidden, options.dim, bias=True),
        )

    def forward(self, batch: Batch, mined: Mined) -> Output:
        first_one, second_one = self.embed_each(self.student, batch.views[0])
        first_two, second_two = self.embed_each(self.student, batch.views[1])
        instance, right = self.instance_loss(torch.cat([first_one, first_two]))
        weak, label_2G, telemetry = self.weak_loss(second_one, second_two)
        loss = instance + self.options.weight * weak
        metrics = {"loss/instance": instance.detach(), "loss/weak": weak.detach(), "accuracy/instance": right}
        if self.options.crops:
            crops = [self.embed_each(self.student, view)[1] for view in batch.views[2:]]
            crop = self.crop_loss(crops, (second_one, second_two), label_2G)
            loss = loss + self.options.crop_weight * crop
            metrics["loss/crop"] = crop.detach()
        return Output(loss, {"embedding": first_one.detach(), "pair": first_two.detach()}, metrics | telemetry)

    def instance_loss(self, anchor_AD: Tensor) -> tuple[Tensor, Tensor]:
        """NT-Xent over both views of all ranks, first views of this rank before its second ones; and its accuracy."""
        gather = dist.gather_with_gradient if self.options.full_gradient else dist.gather_own_gradient
        own_A = losses.own_columns(anchor_AD, dist.rank())
        logits = losses.pair_logits(anchor_AD, gather(anchor_AD), self.options.temperature, own_A)
        target_A = losses.other_view(anchor_AD, dist.rank())
        return losses.cross_entropy(logits, target_A), losses.accuracy(logits, target_A)

    def weak_loss(self, one_BD: Tensor, two_BD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Tensor]]:
        """The mean over views of the contrast within a view, its labels from the other view; both views' labels (G,).

        Each rank looks up the neighbours of its own rows, in the similarities that the loss needs anyway, and only
        integers travel. So a neighbour is computed in one place only, and ranks cannot disagree over near ties.
        """
        gather = dist.gather_with_gradient if self.options.full_gradient else dist.gather
        own_B = losses.own_columns(one_BD, dist.rank())
        logits = [losses.pair_logits(u, gather(u), self.options.temperature, own_B) for u in (one_BD, two_BD)]
        one_G, two_G = (graph.components(dist.gather(s.argmax(1))) for s in logits)
        loss, positives = one_BD.new_zeros(()), one_BD.new_zeros(())
        for logits_BG, label_G in zip(logits, (two_G, one_G), strict=True):
            positive_BG = losses.same_cluster(label_G[own_B], label_G, own_B)
            loss = loss + losses.cross_entropy(logits_BG, losses.uniform_over(positive_BG)) / 2
            positives = positives + positive_BG.sum(1).float().mean() / 2
        node_G = torch.arange(len(one_G), device=one_G.device)  # a component is labelled by one of its nodes
        found = ((one_G == node_G).sum() + (two_G == node_G).sum()) / 2
        return loss, (one_G, two_G), {"weak/components": found, "weak/positives": positives}

    def crop_loss(self, crops: list[Tensor], views: tuple[Tensor, Tensor], label_2G: tuple[Tensor, Tensor]) -> Tensor:
        """A crop of a neighbour of image i takes the place of i: against a view's keys of all ranks (constants), its
        positives are image i and the images of i's component in the other view. The mean over crops and views.
        """
        own_B = losses.own_columns(views[0], dist.rank())
        total = views[0].new_zeros(())
        for u_BD, label_G in zip(views, reversed(label_2G), strict=True):
            key_GD = dist.gather(u_BD)
            target_BG = losses.uniform_over(losses.same_cluster(label_G[own_B], label_G))
            for crop_BD in crops:
                logits_BG = losses.pair_logits(crop_BD, key_GD, self.options.temperature)
                total = total + losses.cross_entropy(logits_BG, target_BG)
        return total / (2 * len(crops))

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor:
        """Uniform over the own component of the neighbour graph (the weak loss; itself left out)."""
        second_BD = self.embed_each(self.student, images)[1]
        own_B = losses.own_columns(second_BD, 0)
        nearest_B = losses.pair_logits(second_BD, second_BD, self.options.temperature, own_B).argmax(1)
        label_B = graph.components(nearest_B)
        return losses.uniform_over(losses.same_cluster(label_B, label_B, own_B))

    def features(self, images: Tensor) -> Tensor:
        """The second head's: neighbours in its space are what the weak labels are made of."""
        return self.embed_each(self.student, images)[1]

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return WCL(options, encoder, encoder.features)  # type: ignore[arg-type]
