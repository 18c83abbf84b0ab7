"""PCL v1 / v2, prototypical contrastive learning (Li et al. 2021, arXiv 2005.04966).

E-step, once per epoch: k-means on momentum features, at several granularities. M-step: MoCo's instance loss plus, per
granularity, a contrast of the query with its prototype against others, each with a temperature of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycon.core import dist, stream
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, clusters_fit, queue_divides, within
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, Queue, Twin, head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "pcl"
    """The method."""
    temperature: float = 0.2
    """Of the instance similarities, and the mean of the prototypes' concentrations."""
    dim: int = 128
    """Width of the embedding."""
    head: Literal["linear", "mlp"] = "mlp"
    """linear: v1; mlp: v2."""
    queue: int = 16384
    """Keys kept as instance negatives; a multiple of train.batch."""
    negatives: int = 0
    """Prototypes drawn as negatives for each granularity, fewer than the smallest k; 0: as many as the queue has."""
    clusters: tuple[int, ...] = (25000, 50000, 100000)
    """The k of each clustering."""
    momentum: float = 0.999
    """Of the key encoder."""
    warmup_epochs: int = 20
    """Epochs of instance loss alone before the first clustering."""
    refresh_epochs: int = 1
    """A new clustering every so many epochs."""
    mask_duplicates: bool = False
    """Leave out columns that repeat the row's own prototype (the papers' code counts them as negatives)."""
    spherical: bool = False
    """Cluster by cosine (the papers' code: plain k-means)."""
    weight: float = 1.0
    """Of the prototype loss."""

    def needs(self) -> Needs:
        return Needs(
            views=("strong", "strong"),
            clusterings=self.clusters,
            refresh_epochs=self.refresh_epochs,
            from_epoch=self.warmup_epochs,
            spherical=self.spherical,
            temperature=self.temperature,
        )

    def problems(self, facts: Facts) -> list[str]:
        found = (
            above_zero("method.temperature", self.temperature)
            + within("method.momentum", self.momentum, 0, 1)
            + at_least("method.dim", self.dim, 1)
            + at_least("method.negatives", self.negatives, 0)
            + at_least("method.warmup_epochs", self.warmup_epochs, 0)
            + at_least("method.refresh_epochs", self.refresh_epochs, 1)
            + at_least("method.weight", self.weight, 0)
            + queue_divides("method.queue", self.queue, facts)
            + clusters_fit("method.clusters", self.clusters, facts)
        )
        if not self.clusters:
            found.append("method.clusters is empty: give the k of at least one clustering")
        elif (drawn := self.negatives or self.queue) >= min(self.clusters):
            name = "method.negatives" if self.negatives else "method.queue (method.negatives = 0 means as many)"
            found.append(
                f"{name} = {drawn} prototypes cannot be drawn from the smallest k = {min(self.clusters)} of "
                "method.clusters without the positives: give method.negatives a smaller number"
            )
        return found

    def warnings(self, facts: Facts) -> list[str]:
        found, drawn, local = [], self.negatives or self.queue, facts.batch // facts.world
        if self.clusters and min(self.clusters) - local < drawn < min(self.clusters):
            found.append(
                f"method.negatives = {drawn}: a rank's batch of {local} may leave fewer of the smallest k = "
                f"{min(self.clusters)} prototypes; then all that are left are used"
            )
        if self.warmup_epochs >= facts.epochs:
            found.append(
                f"method.warmup_epochs = {self.warmup_epochs} >= train.epochs = {facts.epochs}: there will be no prototypes"
            )
        return found


class PCL(Method):
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
        instance, right = losses.info_nce(query_BD, key_BD, self.queue.keys, self.options.temperature)
        loss, metrics = instance, {"loss/instance": instance.detach(), "accuracy/instance": right}
        if mined.snapshot is not None:
            prototype, right = self.prototype_loss(query_BD, batch.row, mined)
            loss = instance + self.options.weight * prototype
            metrics |= {"loss/prototype": prototype.detach(), "accuracy/prototype": right}
        return Output(loss, {"key": key_BD, "embedding": query_BD.detach(), "pair": key_BD}, metrics)

    def prototype_loss(self, query_BD: Tensor, row_B: Tensor, mined: Mined) -> tuple[Tensor, Tensor]:
        """ProtoNCE's second term (eq. 11): the mean over granularities, and how often the own prototype is nearest.

        The columns are each sample's own prototype, then the sampled ones; the right column of row i is i. Two
        samples of one cluster give the same column twice, and officially the other one counts as a negative.
        """
        assert mined.snapshot is not None
        total, right = query_BD.new_zeros(()), query_BD.new_zeros(())
        snapshot, number = mined.snapshot, self.options.negatives or self.options.queue
        granularities = zip(snapshot.assignment, snapshot.prototypes, snapshot.concentration, mined.used, strict=True)
        for m, (assignment_N, prototype_kD, concentration_k, used) in enumerate(granularities):
            own_B = assignment_N[row_B]
            seed = stream.key(mined.seed, dist.rank(), m)
            negative_R, valid_R = losses.sample_excluding(used, len(prototype_kD), own_B, number, seed)
            column_C = torch.cat([own_B, negative_R])
            logits = losses.prototype_logits(query_BD, prototype_kD[column_C], concentration_k[column_C])
            logits[:, len(own_B) :].masked_fill_(~valid_R, -torch.inf)
            if self.options.mask_duplicates:
                same_BB = own_B[:, None] == own_B[None, :]
                same_BB.fill_diagonal_(False)
                logits[:, : len(own_B)].masked_fill_(same_BB, -torch.inf)
            target = losses.diagonal(logits)
            total = total + losses.cross_entropy(logits, target)
            right = right + losses.accuracy(logits, target)
        return total / len(snapshot.prototypes), right / len(snapshot.prototypes)

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        self.teacher.follow(self.student, self.options.momentum)
        self.queue.enqueue(dist.gather(keep["key"]))

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.teacher, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return PCL(options, encoder, encoder.features)  # type: ignore[arg-type]
