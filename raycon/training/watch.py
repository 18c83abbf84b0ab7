"""Watches the health of the features while they are trained, on what training computes anyway: no extra pass.

Once per epoch, from the last embeddings of it on this rank: spread, effective rank, alignment, uniformity, an online
kNN; and from what the run holds: how even the clusters are, how old the queue is. A collapse is said with its likely
cause. Shape letters: B rows of a batch, R rows kept, D embedding width, K neighbours, N rows of the data set.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from raycon.core.config import RunConfig
from raycon.core.types import Batch, Output, Snapshot
from raycon.nn import health
from raycon.nn.networks import Queue

ROWS = 1024
"""Embeddings looked at."""
PAIRS = 512
"""Of them for uniformity, whose cost grows with the square."""
K, TEMPERATURE = 20, 0.07
"""Of the online kNN."""
LEAST_SPREAD = 0.05
"""Of the unit features (1: even): below it they are nearly one point."""
LEAST_RANK = 1.5
LEAST_EVENNESS = 0.3


class Watch:
    """``saw`` after each step, ``read`` at the end of an epoch."""

    def __init__(self, config: RunConfig, method: nn.Module, label_N: Any, per_epoch: int, world: int) -> None:
        """label_N: (N,) fine labels for the online kNN, -1 or None where there are none."""
        self._config, self._per_epoch, self._world = config, per_epoch, world
        self._label_N = None if label_N is None else torch.as_tensor(label_N)
        self._queue = next((m for m in method.modules() if isinstance(m, Queue)), None)
        self._seen: deque[tuple[Tensor, Tensor, Tensor | None]] = deque()
        self._warned, self._keys = "", 0

    def saw(self, step: int, batch: Batch, output: Output) -> None:
        """Keep this step's embeddings (as they lie on the device) when it is one of the last of its epoch."""
        if "embedding" not in output.keep:
            return
        if step % self._per_epoch == 0:
            self._seen.clear()
        left = self._per_epoch - 1 - step % self._per_epoch
        if left * len(batch.row) < ROWS:
            self._seen.append((output.keep["embedding"], batch.row, output.keep.get("pair")))
        keys = sum(len(v) for k, v in output.keep.items() if k == "key" or k.startswith("key/"))
        self._keys = keys * self._world

    def read(self, snapshot: Snapshot | None) -> dict[str, float]:
        """health/... numbers of the epoch that has just ended."""
        if not self._seen:
            return {}
        embedding_RD = torch.cat([e.float() for e, _, _ in self._seen])[-ROWS:]
        row_R = torch.cat([r for _, r, _ in self._seen])[-ROWS:].cpu()
        numbers = {
            "health/std": float(health.feature_std(embedding_RD)),
            "health/effective_rank": float(health.effective_rank(embedding_RD)),
            "health/uniformity": float(health.uniformity(embedding_RD[-PAIRS:])) if len(embedding_RD) > 1 else 0.0,
        }
        pairs = [(e.float(), p.float()) for e, _, p in self._seen if p is not None and p.shape == e.shape]
        if pairs:
            one, other = (torch.cat(side)[-ROWS:] for side in zip(*pairs, strict=True))
            numbers["health/alignment"] = float(health.alignment(one, other))
        if self._queue is not None and self._keys:
            numbers["health/queue_age"] = len(self._queue.keys) / self._keys
        for i, assignment in enumerate(() if snapshot is None else snapshot.assignment):
            numbers[f"health/cluster_evenness/{i}"] = evenness(assignment, len(snapshot.prototypes[i]))  # type: ignore[union-attr]
        if self._label_N is not None:
            label_R = self._label_N[row_R]
            if bool((label_R >= 0).all()) and len(label_R) > K:
                numbers["health/knn_top1"] = knn(embedding_RD.cpu(), label_R)
        return numbers

    def warning(self, numbers: dict[str, float]) -> str:
        """What to tell a person, "" when there is nothing new to say."""
        found = collapse(numbers)
        text = f"warning: {found}; {likely_cause(self._config, found)}" if found and found != self._warned else ""
        self._warned = found
        return text


def evenness(assignment_N: Tensor, clusters: int) -> float:
    """Entropy of the clusters' sizes over its most, log k: 1 when all are equal, 0 when one holds every row."""
    if clusters < 2:
        return 1.0
    share = assignment_N.bincount(minlength=clusters).double() / len(assignment_N)
    return float(torch.special.entr(share).sum()) / math.log(clusters)


def knn(embedding_RD: Tensor, label_R: Tensor) -> float:
    """Percent of rows that their K nearest others vote right, weighted as raycon.evals.knn does."""
    unit_RD = nn.functional.normalize(embedding_RD)
    cosine_RK, row_RK = (unit_RD @ unit_RD.T).fill_diagonal_(-2.0).topk(K)
    votes_RC = torch.zeros(len(label_R), int(label_R.max()) + 1)
    votes_RC.scatter_add_(1, label_R[row_RK], ((cosine_RK - 1.0) / TEMPERATURE).exp())
    return 100.0 * float((votes_RC.argmax(1) == label_R).double().mean())


def collapse(numbers: dict[str, float]) -> str:
    """What has collapsed, "" when nothing has."""
    if numbers.get("health/std", 1.0) < LEAST_SPREAD:
        return "the embeddings have collapsed: nearly all are the same (health/std below 0.05)"
    if numbers.get("health/effective_rank", math.inf) < LEAST_RANK:
        return "the embeddings have collapsed onto a line (health/effective_rank below 1.5)"
    uneven = [n for n, v in numbers.items() if n.startswith("health/cluster_evenness/") and v < LEAST_EVENNESS]
    if uneven:
        return f"clustering {uneven[0].rsplit('/', 1)[1]} has collapsed: few clusters hold nearly all rows"
    return ""


def likely_cause(config: RunConfig, found: str) -> str:
    """The most likely causes in this configuration, the option that changes each."""
    if found.startswith("clustering"):
        return "likely the features were not spread yet: begin mining later, take a smaller k, or mining.balanced"
    train, causes = config.train, []
    per_256 = train.lr * 256 / train.batch if train.lr_scaling == "none" else train.lr
    if train.optimizer == "sgd" and per_256 > 0.3:
        causes.append(f"train.lr = {train.lr:g} is high for SGD with a batch of {train.batch}")
    if train.warmup_epochs == 0 and train.lr >= 0.1:
        causes.append("there is no warm-up (train.warmup_epochs)")
    temperature = getattr(config.method, "temperature", None)
    if isinstance(temperature, float) and temperature > 0.5:
        causes.append(f"method.temperature = {temperature:g} hardly pushes embeddings apart")
    momentum = getattr(config.method, "momentum", None)
    if isinstance(momentum, float) and momentum < 0.9:
        causes.append(f"method.momentum = {momentum:g} lets the teacher follow too fast")
    if train.weight_decay >= 0.01 and train.optimizer != "adamw":
        causes.append(f"train.weight_decay = {train.weight_decay:g} is high")
    return "likely: " + (
        "; ".join(causes) or "train.lr too high, or views that share too little: lower it, look at the views"
    )
