"""ReSSL, relational self-supervised learning (Zheng et al. 2021, arXiv 2107.09282).

The strong view should relate to the queue as the momentum encoder's weak view of the same image does. The own key is
in neither distribution: nothing is told apart, only relations are kept.

Legend: B rows of this batch, D embedding width, K queue entries, C candidates, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, queue_divides, within
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, Queue, Twin, mlp_head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "ressl"
    """The method."""
    temperature: float = 0.1
    """Of the student's similarities."""
    teacher_temperature: float = 0.04
    """Of the target's similarities; lower than temperature, so that the target is sharper."""
    negatives: Literal["queue", "both"] = "queue"
    """What is related to: the queue, or the queue and the other keys of the global batch."""
    dim: int = 512
    """Width of the embedding."""
    projector: tuple[int, ...] = (4096,)
    """Hidden widths of the projection head, without BatchNorm."""
    queue: int = 65536
    """Keys kept; a multiple of train.batch."""
    momentum: float = 0.999
    """Of the teacher."""

    def needs(self) -> Needs:
        return Needs(views=("weak", "strong"))

    def problems(self, facts: Facts) -> list[str]:
        found = (
            above_zero("method.temperature", self.temperature)
            + above_zero("method.teacher_temperature", self.teacher_temperature)
            + within("method.momentum", self.momentum, 0, 1)
            + at_least("method.dim", self.dim, 1)
            + queue_divides("method.queue", self.queue, facts)
        )
        for width in self.projector:
            found += at_least("method.projector", width, 1)
        return found


class ReSSL(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int) -> None:
        super().__init__(options)
        self.options = options
        self.student = Branch(encoder, mlp_head(features, options.projector, options.dim, norm=False))
        self.teacher = Twin(self.student)
        self.queue = Queue(options.queue, options.dim)

    def forward(self, batch: Batch, mined: Mined) -> Output:
        weak, strong = batch.views
        permutation = dist.shuffle_permutation(mined.seed, len(batch.row) * dist.world())
        key_BD = self.embed_shuffled(self.teacher, weak, permutation)
        query_BD = self.embed(self.student, strong)
        loss = self.relation_loss(query_BD, key_BD)
        return Output(loss, {"key": key_BD, "embedding": query_BD.detach(), "pair": key_BD}, {})

    def relation_loss(self, query_BD: Tensor, key_BD: Tensor) -> Tensor:
        """Cross-entropy between the key's and the query's distributions over the candidates (eq. 5)."""
        candidate_CD, own_B = self.queue.keys, None
        if self.options.negatives == "both":
            candidate_CD = torch.cat([dist.gather(key_BD), candidate_CD])
            own_B = losses.own_columns(key_BD, dist.rank())

        def part(rows: slice, query_RD: Tensor) -> tuple[Tensor, ...]:
            own_R = None if own_B is None else own_B[rows]
            teacher_RC = losses.pair_logits(key_BD[rows], candidate_CD, self.options.teacher_temperature, own_R)
            logits_RC = losses.pair_logits(query_RD, candidate_CD, self.options.temperature, own_R)
            return (losses.cross_entropy(logits_RC, torch.softmax(teacher_RC, dim=1)),)

        (loss,) = losses.by_rows(part, (query_BD,), len(candidate_CD))
        return loss

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        self.teacher.follow(self.student, self.options.momentum)
        self.queue.enqueue(dist.gather(keep["key"]))

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor:
        """The teacher's distribution, the images' own keys in place of the queue."""
        key_BD = self.features(images)
        own_B = losses.own_columns(key_BD, 0)
        return torch.softmax(losses.pair_logits(key_BD, key_BD, self.options.teacher_temperature, own_B), dim=1)

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.teacher, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return ReSSL(options, encoder, encoder.features)  # type: ignore[arg-type]
