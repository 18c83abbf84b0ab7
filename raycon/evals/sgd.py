"""Train a classifier on an encoder by SGD, frozen or not, with augmentation or on features extracted once.

Shape letters: N train rows, M test rows, B batch, F feature width, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from raycon.core import stream
from raycon.core.types import LoaderPlan
from raycon.evals import features
from raycon.evals.base import FeatureSets, Source
from raycon.evals.protocols import Training
from raycon.nn import views

log = logging.getLogger(__name__)

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Epoch -> its batches: inputs (B, ...) and labels (B,), on the device."""


def rates(training: Training, batch: int) -> tuple[float, float]:
    """(classifier's, encoder's) peak learning rate."""
    scale = batch / 256 if training.scaled else 1.0
    return training.lr * scale, training.trunk_lr * scale


def decay(training: Training, step: int, per_epoch: int, epochs: int) -> float:
    """What both rates are multiplied by in step ``step`` (0-based). Milestones move with the number of epochs."""
    if training.schedule == "cosine":
        least = training.least
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * step / (per_epoch * epochs)))
    epoch = step // per_epoch
    passed = sum(epoch >= m * epochs / training.epochs for m in training.milestones)
    return float(training.factor**passed)


def fit(
    training: Training,
    encoder: nn.Module | None,
    width: int,
    classes: int,
    batches: Batches,
    per_epoch: int,
    batch: int,
    epochs: int,
    seed: int,
    device: torch.device,
) -> nn.Linear:
    """The trained classifier (F -> C). ``encoder`` None: the batches hold features. It is trained in place when
    ``training.trunk_lr`` is not 0, else left as it is. Deterministic on a CPU. Raises ValueError when it diverges."""
    torch.manual_seed(stream.key(seed, 0x5D6) >> 1)
    head = nn.Linear(width, classes)
    if training.normal_init:
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    head.to(device)
    head_lr, trunk_lr = rates(training, batch)
    groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "peak": head_lr}]
    train_trunk = encoder is not None and trunk_lr > 0
    if encoder is not None:
        encoder.train(train_trunk).requires_grad_(train_trunk)
    if train_trunk:
        assert encoder is not None
        groups.append({"params": list(encoder.parameters()), "peak": trunk_lr})
    optimizer = torch.optim.SGD(
        groups, lr=1.0, momentum=training.momentum, weight_decay=training.weight_decay, nesterov=training.nesterov
    )
    step = 0
    loss = torch.zeros(())
    for epoch in range(epochs):
        for x, label_B in batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * decay(training, step, per_epoch, epochs)
            if encoder is not None:
                with torch.set_grad_enabled(train_trunk):
                    x = encoder(x)
            loss = F.cross_entropy(head(x.float()), label_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is not finite in epoch {epoch + 1} of {epochs} at learning rate {head_lr:g}")
        log.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, loss.item())
    return head


def image_batches(source: Source, dataset: Any, batch: int, training: Training, seed: int) -> tuple[Batches, int]:
    """Augmented batches of an ImageSet's rows and their number per epoch; the last, incomplete one is left out."""
    jitter = 0.8 if training.colour else 0.0
    spec = views.ViewSpec(
        size=source.size, crop_scale=training.crop_scale, jitter=jitter, gray=0.2 if training.colour else 0.0, blur=0.0,
        mean=source.mean, std=source.std,
    )  # fmt: skip
    plan = LoaderPlan(
        specs=(spec,), eval_spec=views.eval_spec(source.size, source.mean, source.std), batch=batch, seed=seed,
        rank=0, world=1, device=source.device, workers=source.workers, cache=source.cache,
    )  # fmt: skip
    loader = importlib.import_module("raycon.data_loaders").open_loader("torch", dataset, plan)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for made in loader.train(epoch):
            yield made.views[0], made.label

    return batches, loader.steps


def feature_batches(features_ND: Tensor, label_N: Tensor, batch: int, seed: int) -> tuple[Batches, int]:
    """Batches of features extracted once, in the order a loader would take the rows."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.from_numpy(stream.epoch_order(seed, epoch, len(label_N)))
        for row in order.split(batch):
            if len(row) == batch:
                yield features_ND[row], label_N[row]

    return batches, len(label_N) // batch


def on_features(training: Training, sets: FeatureSets, epochs: int, seed: int) -> dict[str, float]:
    """Train on ``sets.train``, score on ``sets.test``."""
    batch = batch_size(training, len(sets.train))
    batches, per_epoch = feature_batches(sets.train, sets.train_label, batch, seed)
    epochs = epochs or training.epochs
    head = fit(
        training, None, sets.train.shape[1], sets.classes, batches, per_epoch, batch, epochs, seed, torch.device("cpu")
    )  # fmt: skip
    return scores(head, sets.test, sets.test_label)


def on_images(
    training: Training, source: Source, epochs: int, seed: int, rows: NDArray[np.int64] | None = None
) -> dict[str, float]:
    """Train on rows of ``source.train`` (default all) with augmentation, score on the centre crops of ``source.test``."""
    if source.test is None:
        raise ValueError(f"{source.train.name} has no test split to score on")
    for dataset in (source.train, source.test):
        features.check_channels(dataset, source.mean)
        if len(dataset) == 0 or dataset.label.min() < 0:
            raise ValueError(f"{dataset.name}, split {dataset.split}: a classifier needs a label >= 0 for every image")
    dataset = source.train if rows is None else source.train.subset(rows)
    labelled = dataclasses.replace(dataset, weak=dataset.label)  # what a loader hands out are weak labels
    classes = int(max(source.train.label.max(), source.test.label.max())) + 1
    encoder = copy.deepcopy(source.encoder).to(source.device)
    batch = batch_size(training, len(labelled))
    batches, per_epoch = image_batches(source, labelled, batch, training, seed)
    width = int(encoder.features)  # type: ignore[arg-type]
    head = fit(
        training, encoder, width, classes, batches, per_epoch, batch, epochs or training.epochs, seed, source.device
    )  # fmt: skip
    test_MF = features.extract(encoder, features.scan(source, source.test), len(source.test))
    return scores(head.cpu(), test_MF, torch.as_tensor(source.test.label))


def batch_size(training: Training, rows: int) -> int:
    if rows < training.batch:
        log.warning("batch %d: all %d rows, the published %d are not there", rows, rows, training.batch)
    return min(training.batch, rows)


@torch.no_grad()
def scores(head: nn.Linear, features_MF: Tensor, label_M: Tensor) -> dict[str, float]:
    """Percent right of the first and (with more than 5 classes) of the first five."""
    right1 = right5 = 0
    for first in range(0, len(label_M), 4096):
        label_B1 = label_M[first : first + 4096, None]
        guess_BK = head(features_MF[first : first + 4096]).topk(min(5, head.out_features), dim=1).indices
        right1 += int((guess_BK[:, :1] == label_B1).sum())
        right5 += int((guess_BK == label_B1).sum())
    numbers = {"top1": 100.0 * right1 / len(label_M)}
    return numbers | ({"top5": 100.0 * right5 / len(label_M)} if head.out_features > 5 else {})
