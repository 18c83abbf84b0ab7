"""Linear probe: softmax regression on frozen features, many settings trained together.

Shape letters: N train rows, M test rows, B batch, D feature width, C classes, P probes (one per setting).

The features are standardised by the train statistics and scaled so that a row has norm about 1, which makes the
learning rates mean the same for every encoder and width. All P probes see the same batches, so one step of all of them
is two matrix products, (B, D) x (D, P*C) and (P*C, B) x (B, D), with the gradient of the softmax written out.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from raycon.core import stream
from raycon.core.config import EvalConfig
from raycon.evals import sgd
from raycon.evals.base import FeatureSets, Source, check
from raycon.evals.protocols import LINEAR

RATES = (1.0, 4.0, 16.0, 64.0)
DECAYS = (0.0, 1e-5, 1e-4)
_MOMENTUM = 0.9


class Probes(NamedTuple):
    """P linear classifiers of one feature space."""

    weight_PCD: Tensor
    bias_PC: Tensor
    mean_D: Tensor
    """Of the train features."""
    scale_D: Tensor
    """1 / (std * sqrt(D)) of the train features; 0 for one that does not vary."""

    def logits(self, features_BD: Tensor) -> Tensor:
        """(P, B, C)."""
        x_BD = (features_BD - self.mean_D) * self.scale_D
        return torch.einsum("bd,pcd->pbc", x_BD, self.weight_PCD) + self.bias_PC[:, None]


class Evaluation:
    """Gives "linear/top1", the percent of test rows right of the setting that is best on a tenth of *train* held out.

    The chosen setting is trained once more on all of train; test is looked at once, at the end. Also reported:
    "linear/lr", "linear/weight_decay" (the choice) and "linear/held_out_top1" (what it was chosen by).
    """

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.epochs, self.seed = config.linear_epochs, seed
        if self.epochs < 1:
            raise ValueError(f"evals.linear_epochs = {self.epochs}: give 1 or more")

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        if sets.test is sets.train:
            raise ValueError("a linear probe needs a test split; this data set has none")
        if len(sets.train) < 20:
            raise ValueError(f"a linear probe needs 20 train rows or more, not {len(sets.train)}")
        order_N = torch.from_numpy(stream.epoch_order(self.seed, 0, len(sets.train)))
        held = order_N[: len(order_N) // 10].sort().values
        rest = order_N[len(order_N) // 10 :].sort().values
        settings = list(itertools.product(RATES, DECAYS))
        rate_P, decay_P = torch.tensor(settings).T
        data = sets.train, sets.train_label, sets.classes, self.epochs, self.seed
        probes = fit(*data, rate_P, decay_P, rest)
        top1_P, loss_P = score(probes, sets.train[held], sets.train_label[held])
        # Best accuracy; of equal ones the smallest loss.
        best = min(range(len(settings)), key=lambda p: (-float(top1_P[p]), float(loss_P[p])))
        final = fit(*data, rate_P[best : best + 1], decay_P[best : best + 1])
        top1, _ = score(final, sets.test, sets.test_label)
        return {
            "linear/top1": float(top1[0]),
            "linear/held_out_top1": float(top1_P[best]),
            "linear/lr": settings[best][0],
            "linear/weight_decay": settings[best][1],
        }


class Published:
    """A paper's own protocol: SGD on the frozen encoder with augmentation; "linear/top1" and "linear/top5" of the last
    epoch (some of the papers' codes report the epoch that is best on test, which reads higher)."""

    def __init__(self, config: EvalConfig, seed: int, name: str) -> None:
        self.training, self.epochs, self.seed = LINEAR[name], config.epochs, seed

    def run_on(self, source: Source) -> dict[str, float]:
        numbers = sgd.on_images(self.training, source, self.epochs, self.seed)
        return {f"linear/{name}": value for name, value in numbers.items()}


class PublishedOnce:
    """The same optimiser on features extracted once, without augmentation: a fraction of the time, other numbers."""

    def __init__(self, config: EvalConfig, seed: int, name: str) -> None:
        self.training, self.epochs, self.seed = LINEAR[name], config.epochs, seed

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        if sets.test is sets.train:
            raise ValueError("a linear probe needs a test split; this data set has none")
        numbers = sgd.on_features(self.training, sets, self.epochs, self.seed)
        return {f"linear/{name}": value for name, value in numbers.items()}


def preset(config: EvalConfig, seed: int, name: str) -> Published | PublishedOnce:
    once = name.endswith("-once")
    return PublishedOnce(config, seed, name.removesuffix("-once")) if once else Published(config, seed, name)


def fit(
    features_ND: Tensor,
    label_N: Tensor,
    classes: int,
    epochs: int,
    seed: int,
    rate_P: Tensor,
    decay_P: Tensor,
    rows: Tensor | None = None,
) -> Probes:
    """Train P probes side by side on ``rows`` (default all): SGD, momentum 0.9, cosine decay, weights from zero.

    ``decay_P`` is on the weights, not the biases. The batches are a pure function of (seed, epoch).
    """
    row_N = torch.arange(len(features_ND)) if rows is None else rows
    width, probes = features_ND.shape[1], len(rate_P)
    std_D, mean_D = torch.std_mean(features_ND, dim=0, correction=0)  # of all rows: taking some would copy them
    # A feature that does not vary beyond rounding says nothing and must not be blown up.
    dead_D = std_D <= 1e-6 * mean_D.abs() + 1e-12
    scale_D = torch.where(dead_D, 0.0, 1.0 / (std_D.clamp_min(1e-12) * math.sqrt(width)))

    batch = max(64, min(1024, len(row_N) // 40))
    steps = -(-len(row_N) // batch)
    # Q = P*C, probe-major. (Q, D), not (D, Q): products with few columns are an order of magnitude slower.
    weight_QD, bias_Q = torch.zeros(probes * classes, width), torch.zeros(probes * classes)
    moved_QD, moved_Q = torch.zeros_like(weight_QD), torch.zeros_like(bias_Q)
    one_hot_CC = torch.eye(classes)
    rate_Q, decay_Q1 = rate_P.repeat_interleave(classes), decay_P.repeat_interleave(classes)[:, None]
    for epoch in range(epochs):
        order = row_N[torch.from_numpy(stream.epoch_order(seed, epoch + 1, len(row_N)))]
        for step in range(steps):
            row_B = order[step * batch : (step + 1) * batch]
            x_BD = (features_ND[row_B] - mean_D) * scale_D
            logits_BQ = torch.addmm(bias_Q, x_BD, weight_QD.T)
            slope_BPC = logits_BQ.view(-1, probes, classes).softmax(2)  # becomes d(mean loss) / d(logits)
            slope_BPC.sub_(one_hot_CC[label_N[row_B]][:, None]).div_(len(row_B))
            slope_BQ = slope_BPC.view(len(row_B), -1)
            decay = 0.5 * (1.0 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            moved_QD.mul_(_MOMENTUM).addmm_(slope_BQ.T, x_BD).addcmul_(weight_QD, decay_Q1)
            moved_Q.mul_(_MOMENTUM).add_(slope_BQ.sum(0))
            weight_QD.addcmul_(moved_QD, rate_Q[:, None], value=-decay)
            bias_Q.addcmul_(moved_Q, rate_Q, value=-decay)
    return Probes(weight_QD.view(probes, classes, width), bias_Q.view(probes, classes), mean_D, scale_D)


def score(probes: Probes, features_MD: Tensor, label_M: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) percent right and (P,) mean cross-entropy; a probe that diverged counts as 0 % and an infinite loss."""
    right_P, loss_P = torch.zeros(2, len(probes.weight_PCD), dtype=torch.float64)
    for i in range(0, len(label_M), 4096):
        logits_PBC = probes.logits(features_MD[i : i + 4096]).double()
        label_B = label_M[i : i + 4096]
        right_P += (logits_PBC.argmax(2) == label_B).sum(1)
        loss_P -= logits_PBC.log_softmax(2)[:, torch.arange(len(label_B)), label_B].sum(1)
    fine_P = loss_P.isfinite()
    return torch.where(fine_P, 100.0 * right_P / len(label_M), 0.0), torch.where(
        fine_P, loss_P / len(label_M), math.inf
    )
