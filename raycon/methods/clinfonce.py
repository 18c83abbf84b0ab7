"""Cl-InfoNCE (Tsai et al. 2021 and 2022, arXiv 2106.02869 and 2202.06670): images of one cluster belong together.

Clusters come from k-means on the features, from labels, attributes or a class tree. With single images as clusters it is
SimCLR, with the classes SupCon. Two forms are published: one head (both views are anchors and keys, all with gradient)
and two heads (an instance loss on the first, a contrast across views on the second, against keys that are constants).

Legend: B rows on this rank, A = V B anchors of V views, G those of all ranks, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import ConfigError, Facts, MethodOptions, above_zero, at_least, clusters_fit
from raycon.core.types import Batch, Mined, Needs, Output
from raycon.index import metadata
from raycon.methods.base import Method
from raycon.nn import losses
from raycon.nn.networks import Branch, TwoHeads, head, mlp_head


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "clinfonce"
    """The method."""
    form: Literal["single", "dual"] = "single"
    """single: one head, InfoNCE within clusters; dual: instance loss and cluster loss, a head each."""
    clusters: Literal["kmeans", "labels", "instances", "attributes", "hierarchy", "column"] = "kmeans"
    """Where clusters come from; the last three are read from method.table."""
    k: int = 2500
    """Number of k-means clusters."""
    table: str = ""
    """A CSV file with a header and a line per training image, in their order."""
    columns: tuple[str, ...] = ()
    """Columns of the table to use, a hierarchy's from the coarsest on; empty: all."""
    granularity: int = 10
    """attributes: how many, those of highest entropy; hierarchy: the depth of the cut."""
    temperature: float = 0.1
    """Of the similarities."""
    base_temperature: float = 0.07
    """single: the loss is multiplied by temperature / base_temperature; 0: it is not."""
    anchors: Literal["all", "first"] = "all"
    """single: both views are anchors, or the first views only."""
    dim: int = 128
    """Width of the embedding."""
    hidden: int = 2048
    """dual: width of the heads' two hidden layers (single: that of the features)."""
    weight: float = 1.0
    """dual: of the cluster loss."""
    full_gradient: bool = False
    """dual: let gradients flow through all keys (the paper's code: only a rank's own of the instance loss)."""
    warmup_epochs: int = 0
    """Epochs without clusters: every image is its own (single), or the instance loss alone (dual)."""
    refresh_epochs: int = 1
    """kmeans: a new clustering every so many epochs; it stays in force in between."""
    group: int = 1
    """kmeans, labels: batches in which images of one cluster come in groups of so many (raycon's own; the papers' code
    shuffles all, so that with many clusters an image hardly meets another of its own); 1: off."""
    warmup_view_epochs: int = 0
    """Epochs with the weak views of data.views before the strong ones."""

    def needs(self) -> Needs:
        return Needs(
            views=("strong", "strong"),
            warmup_views=("weak", "weak") if self.warmup_view_epochs else (),
            warmup_view_epochs=self.warmup_view_epochs,
            labels=self.clusters == "labels",
            clusterings=(self.k,) if self.clusters == "kmeans" else (),
            refresh_epochs=self.refresh_epochs,
            from_epoch=self.warmup_epochs,
            group=self.group,
        )

    def problems(self, facts: Facts) -> list[str]:
        found = (
            above_zero("method.temperature", self.temperature)
            + at_least("method.base_temperature", self.base_temperature, 0)
            + at_least("method.dim", self.dim, 1)
            + at_least("method.hidden", self.hidden, 1)
            + at_least("method.weight", self.weight, 0)
            + at_least("method.warmup_epochs", self.warmup_epochs, 0)
            + at_least("method.refresh_epochs", self.refresh_epochs, 1)
            + at_least("method.warmup_view_epochs", self.warmup_view_epochs, 0)
            + at_least("method.group", self.group, 1)
        )
        if self.group > 1 and (facts.batch // facts.world) % self.group:
            found.append(
                f"method.group = {self.group} does not divide the {facts.batch // facts.world} images of a rank "
                f"(train.batch = {facts.batch})"
            )
        if self.group > 1 and self.clusters not in ("kmeans", "labels"):
            found.append(f"method.group = {self.group} needs method.clusters = kmeans or labels, or give 1")
        if self.clusters == "kmeans":
            found += clusters_fit("method.k", (self.k,), facts)
        if self.clusters in ("attributes", "hierarchy", "column"):
            if not Path(self.table).is_file():
                found.append(
                    f"method.table = {self.table!r} is not a file: method.clusters = {self.clusters!r} reads a CSV"
                )
            found += at_least("method.granularity", self.granularity, 1)
        return found

    def warnings(self, facts: Facts) -> list[str]:
        found = []
        if self.warmup_epochs >= facts.epochs:
            found.append(
                f"method.warmup_epochs = {self.warmup_epochs} >= train.epochs = {facts.epochs}: clusters are never used"
            )
        if self.clusters == "kmeans" and self.k > facts.batch and self.group == 1:
            found.append(
                f"method.k = {self.k} with train.batch = {facts.batch}: an image finds {facts.batch / self.k:.2g} others "
                "of its cluster in a batch on average, so this is nearly InfoNCE; give fewer clusters, a larger batch or method.group"
            )
        if self.table and self.clusters in ("kmeans", "labels", "instances"):
            found.append(f"method.table has no effect with method.clusters = {self.clusters!r}")
        return found


class ClInfoNCE(Method):
    ranks_agree = True
    table: Tensor | None

    def __init__(self, options: Options, encoder: nn.Module, features: int, rows: int) -> None:
        """Raises ConfigError when ``method.table`` cannot be used."""
        super().__init__(options)
        self.options = options
        self.student: Branch | TwoHeads
        if options.form == "single":
            self.student = Branch(encoder, head("mlp", features, options.dim))
        else:
            hidden = (options.hidden, options.hidden)
            self.student = TwoHeads(
                encoder,
                mlp_head(features, hidden, options.dim, bias=True),
                mlp_head(features, hidden, options.dim, bias=True),
            )
            self.ranks_agree = options.full_gradient
            # Without clusters the second head gets no gradient.
            self.unused_parameters = options.warmup_epochs > 0
        table = None
        if options.clusters in ("attributes", "hierarchy", "column"):
            try:
                ids = metadata.table_clusters(
                    Path(options.table), options.clusters, options.columns, options.granularity, rows
                )
            except ValueError as error:
                raise ConfigError([f"method.table, method.columns or method.granularity: {error}"]) from None
            table = torch.from_numpy(ids)
        # A part of the configuration, not of what was learned: not in checkpoints.
        self.register_buffer("table", table, persistent=False)

    def forward(self, batch: Batch, mined: Mined) -> Output:
        cluster_B = self.cluster_of(batch, mined)
        if self.options.form == "single":
            views = [self.embed(self.student, view) for view in batch.views]
            loss, positives = self.single_loss(views, batch.row if cluster_B is None else cluster_B)
            return Output(
                loss, {"embedding": views[0].detach(), "pair": views[1].detach()}, {"cluster/positives": positives}
            )
        first_one, second_one = self.embed_each(self.student, batch.views[0])
        first_two, second_two = self.embed_each(self.student, batch.views[1])
        loss, right = self.instance_loss(torch.cat([first_one, first_two]))
        metrics = {"loss/instance": loss.detach(), "accuracy/instance": right}
        if cluster_B is not None:
            cluster, positives = self.dual_loss(second_one, second_two, cluster_B)
            loss = loss + self.options.weight * cluster
            metrics |= {"loss/cluster": cluster.detach(), "cluster/positives": positives}
        return Output(loss, {"embedding": first_one.detach(), "pair": first_two.detach()}, metrics)

    def cluster_of(self, batch: Batch, mined: Mined) -> Tensor | None:
        """(B,) cluster ids; None while there are none. A row without a label is a cluster of its own."""
        source = self.options.clusters
        if mined.epoch < self.options.warmup_epochs:
            return None
        if source == "kmeans":
            return None if mined.snapshot is None else mined.snapshot.assignment[0][batch.row]
        if source == "labels":
            return losses.unlabelled_alone(batch.label, batch.row)
        return batch.row if self.table is None else self.table[batch.row]

    def single_loss(self, views: Sequence[Tensor], cluster_B: Tensor) -> tuple[Tensor, Tensor]:
        """The published single-head loss over the views (B, D) of all ranks, and the mean number of positives.

        Positives are all other views of the cluster's images, the own image's too. Gradients flow through all keys of
        all ranks, as when one process holds the batch. Times temperature / 0.07, a factor that comes from SupCon's
        code and changes the effective learning rate with the temperature.
        """
        options = self.options
        anchor_AD, cluster_A = torch.cat(list(views)), cluster_B.repeat(len(views))
        own_A = losses.own_columns(anchor_AD, dist.rank())
        logits = losses.pair_logits(anchor_AD, dist.gather_with_gradient(anchor_AD), options.temperature, own_A)
        positive = losses.same_cluster(cluster_A, dist.gather(cluster_A), own_A)
        if options.anchors == "first":
            logits, positive = logits[: len(cluster_B)], positive[: len(cluster_B)]
        loss = losses.cross_entropy(logits, losses.uniform_over(positive))
        scale = options.temperature / options.base_temperature if options.base_temperature else 1.0
        return scale * loss, positive.sum(1).float().mean()

    def instance_loss(self, anchor_AD: Tensor) -> tuple[Tensor, Tensor]:
        """NT-Xent over both views of all ranks, first views of this rank before its second ones; and its accuracy."""
        gather = dist.gather_with_gradient if self.options.full_gradient else dist.gather_own_gradient
        own_A = losses.own_columns(anchor_AD, dist.rank())
        logits = losses.pair_logits(anchor_AD, gather(anchor_AD), self.options.temperature, own_A)
        target_A = losses.other_view(anchor_AD, dist.rank())
        return losses.cross_entropy(logits, target_A), losses.accuracy(logits, target_A)

    def dual_loss(self, one_BD: Tensor, two_BD: Tensor, cluster_B: Tensor) -> tuple[Tensor, Tensor]:
        """The published dual-head cluster loss, across views only, and the mean number of positives.

        Anchors of one view against the other view of all ranks; positives are its images of the same cluster, the own
        image included. The mean of both directions.
        """
        gather = dist.gather_with_gradient if self.options.full_gradient else dist.gather
        positive = losses.same_cluster(cluster_B, dist.gather(cluster_B))
        target = losses.uniform_over(positive)
        loss = one_BD.new_zeros(())
        for anchor_BD, key_BD in ((one_BD, two_BD), (two_BD, one_BD)):
            logits = losses.pair_logits(anchor_BD, gather(key_BD), self.options.temperature)
            loss = loss + losses.cross_entropy(logits, target) / 2
        return loss, positive.sum(1).float().mean()

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor | None:
        """Uniform over the views of the same cluster; of the own image one view (single: the other) counts."""
        cluster_B = self.cluster_of(Batch((images,), row, label), mined)
        if cluster_B is None:
            return None
        views_BB = losses.same_cluster(cluster_B, cluster_B).float()
        if self.options.form == "single":
            views_BB *= 2
            views_BB.fill_diagonal_(1.0)
        return views_BB / views_BB.sum(1, keepdim=True)

    def features(self, images: Tensor) -> Tensor:
        """The (first) head's: what k-means clusters."""
        if self.options.form == "single":
            return self.embed(self.student, images)
        return self.embed_each(self.student, images)[0]

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return ClInfoNCE(options, encoder, encoder.features, facts.rows)  # type: ignore[arg-type]
