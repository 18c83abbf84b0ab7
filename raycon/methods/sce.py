"""SCE, similarity contrastive estimation (Denize et al. 2023, arXiv 2111.14585).

The query should resemble its own key, and beyond that the queue as the momentum branch's view of the same image does:

    target = lambda one-hot + (1 - lambda) softmax(key . queue / teacher_temperature)
    loss   = cross-entropy(target, softmax([query . key, query . queue] / temperature))

lambda = 1 is InfoNCE; lambda = 0 is ReSSL plus a term that keeps the query away from its own key.

Legend: B rows of this batch, D embedding width, K queue entries, C candidates (own key and queue), W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import Facts, MethodOptions, above_zero, at_least, clusters_fit, within
from raycon.core.types import Batch, Mined, Needs, Output, Progress
from raycon.methods.base import Method
from raycon.nn import losses, optim
from raycon.nn.networks import Branch, Queue, Twin, mlp_head, split_batch_norm


@dataclass(frozen=True, kw_only=True)
class Options(MethodOptions):
    name: str = "sce"
    """The method."""
    coefficient: float = 0.5
    """Lambda, the share (0..1) of the own key in the target; the rest follows the teacher's similarities."""
    temperature: float = 0.1
    """Of the student's similarities."""
    teacher_temperature: float = 0.05
    """Of the target's similarities; lower than temperature, so that the target is sharper."""
    teacher_temperature_start: float = 0.04
    """Where the target's temperature begins when it has a warm-up."""
    teacher_temperature_epochs: float = 0.0
    """Epochs in which the target's temperature moves from its start to its value; 0: it has its value throughout."""
    official_zero: bool = True
    """Give the own key the similarity 0 in the target, as the official code does; no: mask it, as the paper says."""
    negatives: Literal["queue", "keys", "both"] = "queue"
    """Candidates beside the own key: the queue, the other keys of the global batch, or both."""
    mask: Literal["none", "labels", "clusters"] = "none"
    """Let the target follow the teacher only among queue entries of the same weak label or cluster (raycon's own)."""
    clusters: int = 0
    """The k of the clustering for mask = clusters."""
    from_epoch: int = 20
    """The first epoch with clusters, for mask = clusters."""
    refresh_epochs: int = 1
    """A new clustering every so many epochs, for mask = clusters."""
    views: tuple[str, ...] = ("weak", "strong")
    """Target first, then the queries; when symmetric, the two large crops first, then the small ones."""
    symmetric: bool = False
    """Both large crops are targets, of every other crop; no: the first is the only target, and no query."""
    projector: tuple[int, ...] = (512,)
    """Hidden widths of the projection head, BatchNorm after each."""
    projector_norm: bool = False
    """A BatchNorm without scale and shift at the end of the projection head."""
    predictor: tuple[int, ...] = ()
    """Hidden widths of the student's predictor; empty: no predictor."""
    dim: int = 128
    """Width of the embedding."""
    queue: int = 4096
    """Keys kept as candidates; a multiple of the keys of a step (train.batch, twice that when symmetric)."""
    momentum: float = 0.99
    """Of the teacher."""
    momentum_schedule: Literal["constant", "cosine", "cosine-lagging", "cosine-epoch"] = "constant"
    """cosine: to 1 at the last step; cosine-lagging: one step behind (Lightning 1.5); cosine-epoch: per epoch."""
    shuffle_bn: bool = True
    """Shuffle the images over the ranks for the teacher; no: each rank keeps its own (for model.sync_bn)."""
    split_bn: int = 0
    """On one rank: shuffle, and let the teacher's BatchNorm2d see this many groups (official: 8); 0: do not."""

    def needs(self) -> Needs:
        clustered = self.mask == "clusters"
        return Needs(
            views=self.views,
            labels=self.mask == "labels",
            clusterings=(self.clusters,) if clustered else (),
            refresh_epochs=self.refresh_epochs,
            from_epoch=self.from_epoch if clustered else 0,
        )

    def problems(self, facts: Facts) -> list[str]:
        found = (
            within("method.coefficient", self.coefficient, 0, 1)
            + above_zero("method.temperature", self.temperature)
            + above_zero("method.teacher_temperature", self.teacher_temperature)
            + above_zero("method.teacher_temperature_start", self.teacher_temperature_start)
            + at_least("method.teacher_temperature_epochs", self.teacher_temperature_epochs, 0)
            + within("method.momentum", self.momentum, 0, 1)
            + at_least("method.dim", self.dim, 1)
            + at_least("method.refresh_epochs", self.refresh_epochs, 1)
            + at_least("method.from_epoch", self.from_epoch, 0)
            + at_least("method.split_bn", self.split_bn, 0)
        )
        for width in (*self.projector, *self.predictor):
            found += at_least("method.projector / method.predictor", width, 1)
        if len(self.views) < 2:
            found.append(f"method.views = {self.views}: give two or more")
        inserted = facts.batch * (2 if self.symmetric else 1)
        if self.negatives != "keys" and (self.queue < inserted or self.queue % inserted):
            near = max(1, round(self.queue / inserted)) * inserted
            found.append(f"method.queue = {self.queue} is not a multiple of the {inserted} keys of a step: give {near}")
        if self.mask != "none" and self.negatives != "queue":
            found.append(f"method.mask = {self.mask!r} is for method.negatives = 'queue', not {self.negatives!r}")
        if self.mask == "clusters":
            found += clusters_fit("method.clusters", (self.clusters,), facts)
        if self.split_bn > 1 and facts.batch // facts.world % self.split_bn:
            found.append(
                f"method.split_bn = {self.split_bn} does not divide the {facts.batch // facts.world} images of a rank"
            )
        return found

    def warnings(self, facts: Facts) -> list[str]:
        found = []
        if self.split_bn > 1 and facts.world > 1:
            found.append(f"method.split_bn has no effect on {facts.world} ranks: the ranks are the groups")
        if self.coefficient == 1 and self.mask != "none":
            found.append("method.mask has no effect with method.coefficient = 1: nothing follows the teacher")
        if self.official_zero and self.negatives != "queue":
            found.append(f"method.official_zero has no effect with method.negatives = {self.negatives!r}: it is masked")
        return found


class SCE(Method):
    ranks_agree = True

    def __init__(self, options: Options, encoder: nn.Module, features: int, epochs: int) -> None:
        super().__init__(options)
        self.options, self.epochs = options, epochs
        projector = mlp_head(features, options.projector, options.dim, last_norm=options.projector_norm)
        self.student = Branch(encoder, projector)
        self.teacher = Twin(self.student)
        # Only BatchNorm2d is split, the head's BatchNorm1d is not: so does the official code.
        self.split = options.split_bn > 1 and dist.world() == 1
        if self.split:
            split_batch_norm(self.teacher, options.split_bn)
        self.predictor = (
            mlp_head(options.dim, options.predictor, options.dim, last_bias=False)
            if options.predictor
            else nn.Identity()
        )
        self.queue = (
            Queue(options.queue, options.dim, labelled=options.mask != "none") if options.negatives != "keys" else None
        )

    def forward(self, batch: Batch, mined: Mined) -> Output:
        targets = 2 if self.options.symmetric else 1
        queries = range(0 if self.options.symmetric else 1, len(batch.views))
        key_BD = [self.key(batch.views[i], mined.seed) for i in range(targets)]
        # One forward per crop: BatchNorm sees one kind of crop at a time.
        query_BD = {j: self.embed(self._online, batch.views[j]) for j in queries}
        loss, right, pairs = query_BD[1].new_zeros(()), query_BD[1].new_zeros(()), 0
        for i in range(targets):
            others = tuple(query_BD[j] for j in queries if j != i)
            found, agree = self.relation(key_BD[i], others, batch, mined)
            loss, right, pairs = loss + found, right + agree, pairs + len(others)
        keep = {f"key/{i}": key for i, key in enumerate(key_BD)} | {
            "embedding": query_BD[queries[0]].detach(),
            "pair": key_BD[-1],
        }
        if self.options.mask != "none":
            keep["label"] = batch.label if self.options.mask == "labels" else batch.row
        return Output(loss / pairs, keep, {"accuracy/instance": right / pairs})

    def _online(self, images: Tensor) -> Tensor:
        out: Tensor = self.predictor(self.student(images))
        return out

    @torch.no_grad()
    def key(self, images: Tensor, seed: int) -> Tensor:
        """(B, D): the teacher's keys of a crop."""
        permutation = dist.shuffle_permutation(seed, len(images) * dist.world())
        if self.split:
            return dist.exchange(
                self.embed(self.teacher, dist.exchange(images, permutation)), dist.inverse(permutation)
            )
        return self.embed_shuffled(self.teacher, images, permutation if self.options.shuffle_bn else None)

    def relation(self, key_BD: Tensor, query_BD: tuple[Tensor, ...], batch: Batch, mined: Mined) -> tuple[Tensor, ...]:
        """The loss of all queries that should resemble one key as its target says, and how often the key is nearest:
        sums over the queries."""
        candidate_CD = self.candidates(key_BD)

        def part(rows: slice, *query_RD: Tensor) -> tuple[Tensor, ...]:
            own_R, target_RC = self.target(key_BD, candidate_CD, batch, mined, rows)
            loss, right = key_BD.new_zeros(()), key_BD.new_zeros(())
            for query in query_RD:
                logits_RC = self.logits(query, key_BD[rows], candidate_CD)
                loss = loss + losses.cross_entropy(logits_RC, target_RC)
                first = self.options.negatives == "queue"
                right = right + (losses.first_accuracy(logits_RC) if first else losses.accuracy(logits_RC, own_R))
            return loss, right

        return losses.by_rows(part, query_BD, 1 + len(candidate_CD))

    @torch.no_grad()
    def candidates(self, key_BD: Tensor) -> Tensor:
        """(C, D): the queue, the keys of the global batch, or both."""
        if self.options.negatives == "queue":
            assert self.queue is not None
            return self.queue.keys
        keys_WD = dist.gather(key_BD)
        return keys_WD if self.queue is None else torch.cat([keys_WD, self.queue.keys])

    def logits(self, query_BD: Tensor, key_BD: Tensor, candidate_CD: Tensor) -> Tensor:
        """(B, C): [own key, queue], or every candidate when the batch's keys are among them."""
        if self.options.negatives == "queue":
            return losses.queue_logits(query_BD, key_BD, candidate_CD, self.options.temperature)
        return losses.pair_logits(query_BD, candidate_CD, self.options.temperature)

    @torch.no_grad()
    def target(
        self, key_BD: Tensor, candidate_CD: Tensor, batch: Batch, mined: Mined, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """What the queries of these rows should resemble: ((R,) column of the own key, (R, C) target)."""
        options = self.options
        length = options.teacher_temperature_epochs * mined.steps / self.epochs
        temperature = optim.linear_at(
            options.teacher_temperature_start, options.teacher_temperature, mined.step, length
        )
        if options.negatives == "queue":
            teacher_RC = losses.queue_logits(key_BD[rows], key_BD[rows], candidate_CD, temperature)
            teacher_RC[:, 0] = 0.0 if options.official_zero else -torch.inf
            own_R = losses.first_column(teacher_RC)
            if (same_RK := self.same(rows, batch, mined)) is not None:
                teacher_RC[:, 1:].masked_fill_(~same_RK, -torch.inf)
        else:
            own_R = losses.own_columns(key_BD, dist.rank())[rows]
            teacher_RC = losses.pair_logits(key_BD[rows], candidate_CD, temperature, own_R)
        return own_R, losses.relational_target(teacher_RC, own_R, options.coefficient)

    def same(self, rows: slice, batch: Batch, mined: Mined) -> Tensor | None:
        """(R, K) bool: queue entries of the row's label or cluster; None where nothing is masked."""
        if self.options.mask == "none" or (self.options.mask == "clusters" and mined.snapshot is None):
            return None
        assert self.queue is not None
        assert self.queue.labels is not None
        mine_R, theirs_K = batch.label[rows], self.queue.labels
        if self.options.mask == "clusters":
            assert mined.snapshot is not None
            # The queue remembers rows: an entry is in the cluster that its row has now.
            (assignment_N,) = mined.snapshot.assignment
            mine_R = assignment_N[batch.row[rows]]
            theirs_K = torch.where(theirs_K < 0, -1, assignment_N[theirs_K.clamp_min(0)])
        return losses.same_cluster(mine_R, theirs_K) & (mine_R >= 0)[:, None]

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        momentum = optim.momentum_at(self.options.momentum_schedule, self.options.momentum, progress, self.epochs)
        self.teacher.follow(self.student, momentum)
        if self.queue is not None:
            keys = [dist.gather(keep[f"key/{i}"]) for i in range(2 if self.options.symmetric else 1)]
            labels = None if self.options.mask == "none" else dist.gather(keep["label"]).repeat(len(keys))
            self.queue.enqueue(torch.cat(keys), labels)

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor:
        """The target of ``target``, the images' own keys in place of the queue."""
        options, key_BD = self.options, self.features(images)
        own_B = losses.own_columns(key_BD, 0)
        teacher_BB = losses.pair_logits(key_BD, key_BD, options.teacher_temperature, own_B)
        if options.mask != "none" and (options.mask == "labels" or mined.snapshot is not None):
            same_B = label
            if options.mask == "clusters":
                assert mined.snapshot is not None
                same_B = mined.snapshot.assignment[0][row]
            teacher_BB.masked_fill_(~(losses.same_cluster(same_B, same_B) & (same_B >= 0)[:, None]), -torch.inf)
        if options.official_zero and options.negatives == "queue":
            teacher_BB[own_B, own_B] = 0.0
        return losses.relational_target(teacher_BB, own_B, options.coefficient)

    def features(self, images: Tensor) -> Tensor:
        return self.embed(self.teacher, images)

    def encoder(self) -> nn.Module:
        return self.student.encoder


def build(options: Options, encoder: nn.Module, facts: Facts) -> Method:
    return SCE(options, encoder, encoder.features, facts.epochs)  # type: ignore[arg-type]
