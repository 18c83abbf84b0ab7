"""MoCo v1 / v2 (He et al. 2020, arXiv 1911.05722; Chen et al. 2020, arXiv 2003.04297).

A query is told from the keys of other images, which a momentum encoder made and a queue remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, queue_divides, within
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, Queue, Twin, head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "moco"
    """The method."""
    temperature: float = 0.2
    """Of the similarities; MoCo v1 used 0.07."""
    dim: int = 128
    """Width of the embedding."""
    head: Literal["linear", "mlp"] = "mlp"
    """linear: v1; mlp: v2."""
    queue: int = 65536
    """Keys kept as negatives; a multiple of train.batch."""
    momentum: float = 0.999
    """Of the key encoder."""

    def needs(self) -> Needs:
        return Needs(views=("strong", "strong"))

    def problems(self, facts: Facts) -> list[str]:
        return (
            above_zero("method.temperature", self.temperature)
            + within("method.momentum", self.momentum, 0, 1)
            + at_least("method.dim", self.dim, 1)
            + queue_divides("method.queue", self.queue, facts)
        )


class MoCo(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int) -> None:
        super().__init__(options)
        self.options = options
        self.student = Branch(encoder, head(options.head, features, options.dim))
        self.teacher = Twin(self.student)
        self.queue = Queue(options.queue, options.dim)

    def forward(self, batch: Batch, mined: Mined) -> Output:
        query_image, key_image = batch.views
        permutation = dist.shuffle_permutation(mined.seed, len(batch.row) * dist.world())
        key_BD = self.embed_shuffled(self.teacher, key_image, permutation)
        query_BD = self.embed(self.student, query_image)
        loss, right = losses.info_nce(query_BD, key_BD, self.queue.keys, self.options.temperature)
        return Output(
            loss, {"key": key_BD, "embedding": query_BD.detach(), "pair": key_BD}, {"accuracy/instance": right}
        )

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        self.teacher.follow(self.student, self.options.momentum)
        self.queue.enqueue(dist.gather(keep["key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.teacher, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return MoCo(options, encoder, encoder.features)  # type: ignore[arg-type]
