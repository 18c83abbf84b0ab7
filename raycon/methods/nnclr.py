"""NNCLR, nearest-neighbour contrastive learning (Dwibedi et al. 2021, arXiv 2104.14548).

SimCLR, but what a view must find the other by is not itself: it is its nearest neighbour in a queue of earlier
embeddings, so that positives reach beyond one image's augmentations.

Legend: B rows of this batch (a rank), D embedding width, K queue entries, C candidates W x B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, queue_divides
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, Queue, mlp_head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "nnclr"
    """The method."""
    temperature: float = 0.1
    """Of the similarities."""
    dim: int = 256
    """Width of the embedding."""
    projector: tuple[int, ...] = (2048, 2048)
    """Hidden widths of the projection head, BatchNorm after each and at the end."""
    predictor: tuple[int, ...] = (4096,)
    """Hidden widths of the predictor, BatchNorm after each."""
    queue: int = 98304
    """Embeddings in which neighbours are sought; a multiple of train.batch."""

    def needs(self) -> Needs:
        return Needs(views=("strong", "strong"))

    def problems(self, facts: Facts) -> list[str]:
        found = (
            above_zero("method.temperature", self.temperature)
            + at_least("method.dim", self.dim, 1)
            + queue_divides("method.queue", self.queue, facts)
        )
        for width in (*self.projector, *self.predictor):
            found += at_least("method.projector / method.predictor", width, 1)
        return found


class NNCLR(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int) -> None:
        super().__init__(options)
        self.options = options
        head = mlp_head(features, options.projector, options.dim, last_norm=True, last_affine=True)
        self.student = Branch(encoder, head)
        self.predictor = mlp_head(options.dim, options.predictor, options.dim)
        self.queue = Queue(options.queue, options.dim)

    def forward(self, batch: Batch, mined: Mined) -> Output:
        projected_BD, predicted_BD = zip(*(self.embed_each(self._both, view) for view in batch.views), strict=True)
        loss, right = projected_BD[0].new_zeros(()), projected_BD[0].new_zeros(())
        for projected, predicted in zip(projected_BD, reversed(predicted_BD), strict=True):
            direction, accuracy = self.direction(projected, predicted)
            loss, right = loss + direction / 2, right + accuracy / 2
        embedding = projected_BD[0].detach()
        return Output(
            loss,
            {"key": embedding, "embedding": embedding, "pair": projected_BD[1].detach()},
            {"accuracy/instance": right},
        )

    def direction(self, projected_BD: Tensor, predicted_BD: Tensor) -> tuple[Tensor, Tensor]:
        """InfoNCE (eq. 3) of the neighbours of one view against the other's predictions, and how often it is right.

        The neighbour has no gradient: it is a vector of the queue.
        """
        nearest_B = (projected_BD.detach() @ self.queue.keys.T).argmax(1)
        candidate_CD = dist.gather_with_gradient(predicted_BD)
        logits_BC = losses.pair_logits(self.queue.keys[nearest_B], candidate_CD, self.options.temperature)
        own_B = losses.own_columns(projected_BD, dist.rank())
        return losses.cross_entropy(logits_BC, own_B), losses.accuracy(logits_BC, own_B)

    def _both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        projected: Tensor = self.student(images)
        return projected, self.predictor(projected)

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        self.queue.enqueue(dist.gather(keep["key"]))

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor:
        """One-hot at the nearest other image, the images' own embeddings in place of the queue."""
        projected_BD = self.features(images)
        own_B = losses.own_columns(projected_BD, 0)
        nearest_B = losses.pair_logits(projected_BD, projected_BD, self.options.temperature, own_B).argmax(1)
        return F.one_hot(nearest_B, len(nearest_B)).float()

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.student, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return NNCLR(options, encoder, encoder.features)  # type: ignore[arg-type]
