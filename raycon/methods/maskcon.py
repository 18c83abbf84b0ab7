"""MaskCon, masked contrastive learning from coarse labels (Feng and Patras 2023, arXiv 2303.12756), and its relatives.

MoCo's query, key and queue, each key with its coarse label. What the query should resemble besides its own key:

    maskcon   keys of the same coarse class, softly, by how near the image's own key is to each of them
    grafit    all keys of the same coarse class alike (SupCon over the queue)
    coins     none; instead a classifier of the coarse label

``weight`` is the share of that; what is left is instance discrimination. So weight = 0 of any mode is selfcon (MoCo's
InfoNCE), grafit with weight = 1 is supcon, coins with weight = 1 coarse cross-entropy. Grafit and CoIns are these
authors' simplifications over MoCo of the methods of those names.

Legend: B rows of this batch, D embedding width, K queue entries, C candidates 1+K, F encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, queue_divides, within
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, Queue, Twin, head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "maskcon"
    """The method."""
    mode: Literal["maskcon", "grafit", "coins"] = "maskcon"
    """What the coarse labels do: mask soft targets, make hard targets, or train a classifier."""
    weight: float = 1.0
    """Share (0..1) of the coarse labels in the loss; the rest is instance discrimination. 0: no labels (selfcon)."""
    temperature: float = 0.1
    """Of the similarities (the paper's code: t0)."""
    soft_temperature: float = 0.05
    """Of the soft targets of mode maskcon (the paper's code: t). Large: all of the class alike; small: the nearest."""
    official_targets: bool = False
    """Soft targets as the paper's code computes them: NaN when the queue has no key of the row's class."""
    dim: int = 256
    """Width of the embedding."""
    hidden: int = 512
    """Width of the head's hidden layer."""
    queue: int = 8192
    """Keys kept as candidates, with their labels; a multiple of train.batch."""
    momentum: float = 0.99
    """Of the key encoder."""
    prefill: bool = True
    """Fill the queue with keys of training images before the first step."""
    key_view: Literal["weak", "strong"] = "weak"
    """How the key's image is augmented; the query's strongly."""

    def needs(self) -> Needs:
        return Needs(views=("strong", self.key_view), labels=self.weight > 0)

    def problems(self, facts: Facts) -> list[str]:
        return (
            within("method.weight", self.weight, 0, 1)
            + above_zero("method.temperature", self.temperature)
            + above_zero("method.soft_temperature", self.soft_temperature)
            + within("method.momentum", self.momentum, 0, 1)
            + at_least("method.dim", self.dim, 1)
            + at_least("method.hidden", self.hidden, 1)
            + queue_divides("method.queue", self.queue, facts)
        )

    def warnings(self, facts: Facts) -> list[str]:
        found = []
        if self.mode != "maskcon" and (self.official_targets or self.soft_temperature != 0.05):
            found.append(
                f"method.soft_temperature and method.official_targets have no effect in method.mode = {self.mode!r}"
            )
        if self.official_targets and not self.prefill:
            found.append("method.official_targets without method.prefill: an unlabelled queue makes the loss NaN")
        if self.queue > facts.rows:
            found.append(
                f"method.queue = {self.queue} is more than the {facts.rows} images: older keys of the batch's own images "
                "are always among its candidates"
            )
        return found


class MaskCon(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int, classes: int) -> None:
        super().__init__(options)
        self.options = options
        self.student = Branch(encoder, head("mlp", features, options.dim, options.hidden))
        self.teacher = Twin(self.student)
        self.classifier = nn.Linear(features, max(classes, 1)) if options.mode == "coins" else None
        self.queue = Queue(options.queue, options.dim, labelled=True)

    def forward(self, batch: Batch, mined: Mined) -> Output:
        query_image, key_image = batch.views
        key_BD = self.key(key_image, mined.seed)
        with torch.autocast(query_image.device.type, torch.bfloat16, enabled=self.bf16):
            feature_BF = self.student.encoder(query_image)
            projected_BD = self.student.head(feature_BF)
        query_BD = F.normalize(projected_BD.float(), dim=1)
        soft = self.classifier is None and (self.options.weight > 0 or self.options.official_targets)

        def part(rows: slice, query_RD: Tensor) -> tuple[Tensor, ...]:
            logits_RC = losses.queue_logits(query_RD, key_BD[rows], self.queue.keys, self.options.temperature)
            own_R = losses.first_column(logits_RC)
            target = self.target(key_BD[rows], batch.label[rows]) if soft else own_R
            return losses.cross_entropy(logits_RC, target), losses.accuracy(logits_RC, own_R)

        loss, right = losses.by_rows(part, (query_BD,), 1 + len(self.queue.keys))
        metrics = {"accuracy/instance": right}
        if self.classifier is not None:
            class_BY, instance = self.classifier(feature_BF.float()), loss
            coarse = losses.class_cross_entropy(class_BY, batch.label)
            loss = self.options.weight * coarse + (1 - self.options.weight) * instance
            metrics |= {"loss/coarse": coarse.detach(), "loss/instance": instance.detach()}
            metrics["accuracy/coarse"] = losses.accuracy(class_BY, batch.label)
        return Output(
            loss, {"key": key_BD, "label": batch.label, "embedding": query_BD.detach(), "pair": key_BD}, metrics
        )

    def key(self, images: Tensor, seed: int) -> Tensor:
        """(B, D): the teacher's keys, BatchNorm over shuffled ranks."""
        permutation = dist.shuffle_permutation(seed, len(images) * dist.world())
        return self.embed_shuffled(self.teacher, images, permutation)

    @torch.no_grad()
    def target(self, key_BD: Tensor, label_B: Tensor) -> Tensor:
        """(B, 1+K): what each row should resemble, its own key in column 0; rows sum to 1."""
        options, queue = self.options, self.queue
        assert queue.labels is not None
        # -1 is no label: as a row's it equals nothing, not even the -1 of entries that are not filled yet.
        weight_BK = losses.same_cluster(label_B, queue.labels) & (label_B >= 0)[:, None]
        if options.mode == "maskcon":
            weight_BK = losses.masked_similarity(
                key_BD, queue.keys, weight_BK, options.soft_temperature, options.official_targets
            )
        return losses.own_and(weight_BK, options.weight)

    def before_training(self, batches: Iterator[Batch], seed: int) -> None:
        """Fill the queue once with keys of training images; the teacher's BatchNorm statistics move, as officially."""
        if self.options.prefill:
            missing = len(self.queue.keys)
            while missing > 0:
                batch = next(batches)
                self.enqueue(self.key(batch.views[1], seed), batch.label)
                missing -= len(batch.row) * dist.world()

    def enqueue(self, key_BD: Tensor, label_B: Tensor) -> None:
        self.queue.enqueue(dist.gather(key_BD), dist.gather(label_B))

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        self.teacher.follow(self.student, self.options.momentum)
        self.enqueue(keep["key"], keep["label"])

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor | None:
        """The target of ``target``, the images' own keys in place of the queue; None in mode coins."""
        options = self.options
        if self.classifier is not None:
            return None
        key_BD = self.features(images)
        own_B = losses.own_columns(key_BD, 0)
        weight_BB = losses.same_cluster(label, label, own_B) & (label >= 0)[:, None]
        if options.mode == "maskcon":
            weight_BB = losses.masked_similarity(key_BD, key_BD, weight_BB, options.soft_temperature)
        target_BC = losses.own_and(weight_BB, options.weight)
        return target_BC[:, 1:].scatter(1, own_B[:, None], target_BC[:, :1])

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.teacher, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return MaskCon(options, encoder, encoder.features, facts.classes)  # type: ignore[arg-type]
