"""Linear SVMs, one per class: PCL's protocol for VOC2007, on all of train and on k images per class.

Shape letters: N train rows, M test rows, D feature width, C classes.
"""

from __future__ import annotations

import itertools
import logging
import random
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from raycon.core.config import EvalConfig
from raycon.evals import metrics
from raycon.evals.base import FeatureSets, check

log = logging.getLogger(__name__)

Labels = NDArray[np.int8]
"""(N, C): 1 there, -1 not there, 0 there but difficult."""


class Evaluation:
    """Mean average precision over the classes, in percent.

    "svm/map": on all of train; "svm/map_k<k>" on k images per class, the mean of ``evals.shot_runs`` draws, and
    "svm/map_k<k>_std", their (population) standard deviation. PCL's numbers: all-point AP, difficult is "not there" in
    train and test. "svm/devkit_map" and so on: the same classifiers scored as VOC2007's development kit does, 11 points
    and difficult images left out of the test.

    With several ``evals.svm_costs`` each has its numbers, "svm/map_c0.5", and "svm/map_best_on_test" is the best of
    them, which is what PCL's code reports. The draws follow the official stream (Python's generator from 0, over k, then
    cost, then run). A data set with one label per image is taken as C yes-or-no labels.
    """

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.costs, self.shots, self.runs = tuple(config.svm_costs), tuple(config.shots), config.shot_runs

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        if sets.test is sets.train:
            raise ValueError("SVMs need a test split; this data set has none")
        train_ND, test_MD = unit(sets.train), unit(sets.test)
        train_NC = yes_or_no(sets.train_label, sets.train_multi, sets.classes)
        test_MC = yes_or_no(sets.test_label, sets.test_multi, sets.classes)
        shots = fitting(self.shots, int((train_NC > 0).sum(0).min()))
        stream = random.Random(0)
        numbers: dict[str, float] = {}
        for k in (*shots, 0):
            found: dict[str, list[float]] = {"map": [], "devkit_map": []}
            for cost in self.costs:
                runs = [
                    self.score(train_ND[rows], train_NC[rows], test_MD, test_MC, cost)
                    for rows in (draw(train_NC, k, stream) for _ in range(self.runs if k else 1))
                ]
                for name, values in zip(found, np.array(runs).T, strict=True):
                    key = f"svm/{name}" + (f"_k{k}" if k else "") + (f"_c{cost:g}" if len(self.costs) > 1 else "")
                    numbers[key] = float(values.mean())
                    found[name].append(numbers[key])
                    if k:
                        numbers[f"{key}_std"] = float(values.std())
            if len(self.costs) > 1:
                for name, values_of_costs in found.items():
                    numbers[f"svm/{name}" + (f"_k{k}" if k else "") + "_best_on_test"] = max(values_of_costs)
        return numbers

    def score(
        self,
        train_ND: NDArray[np.float32],
        train_NC: Labels,
        test_MD: NDArray[np.float32],
        test_MC: Labels,
        cost: float,
    ) -> tuple[float, float]:
        """(PCL's mAP, the development kit's) in percent. Classes without an image in test are left out."""
        decision_MC = decisions(train_ND, train_NC, test_MD, cost)
        scored = [c for c in range(test_MC.shape[1]) if (test_MC[:, c] > 0).any()]
        if len(scored) < test_MC.shape[1]:
            log.warning("%d classes without an image in test are left out", test_MC.shape[1] - len(scored))
        pcl = [metrics.average_precision(decision_MC[:, c], test_MC[:, c] > 0) for c in scored]
        devkit = [metrics.devkit_average_precision(decision_MC[:, c], test_MC[:, c]) for c in scored]
        return 100.0 * float(np.mean(pcl)), 100.0 * float(np.mean(devkit))


def decisions(
    train_ND: NDArray[np.float32], train_NC: Labels, test_MD: NDArray[np.float32], cost: float
) -> NDArray[np.float64]:
    """(M, C) decision values of PCL's SVMs: squared hinge, twice the weight on positives, difficult as negative.

    Raises ValueError when a class has no negative image in train.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    found = np.empty((len(test_MD), train_NC.shape[1]))
    for c in range(train_NC.shape[1]):
        target = np.where(train_NC[:, c] > 0, 1, -1)
        if len(np.unique(target)) < 2:
            raise ValueError(f"class {c} is in all or none of the {len(target)} images an SVM is to be trained with")
        machine = LinearSVC(
            C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, loss="squared_hinge", penalty="l2", dual=True,
            tol=1e-4, max_iter=2000, random_state=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 2,000 rounds are the protocol
            found[:, c] = machine.fit(train_ND, target).decision_function(test_MD)
    return found


def draw(label_NC: Labels, k: int, stream: random.Random) -> NDArray[np.int64]:
    """Rows of k images per class, class by class; an image of several classes can come several times. 0: all rows.

    The official sampler: per class the images in order, shuffled, the first k.
    """
    if k == 0:
        return np.arange(len(label_NC))
    chosen: list[int] = []
    for c in range(label_NC.shape[1]):
        mine = np.flatnonzero(label_NC[:, c] > 0).tolist()
        stream.shuffle(mine)
        chosen += mine[:k]
    return np.array(chosen)


def fitting(shots: tuple[int, ...], least: int) -> list[int]:
    """The k that every class has images for."""
    kept = [k for k in shots if k <= least]
    if len(kept) < len(shots):
        log.warning("evals.shots %s left out: a class has only %d images", sorted(set(shots) - set(kept)), least)
    return kept


def unit(features_ND: Tensor) -> NDArray[np.float32]:
    """x / (|x| + 1e-5), as PCL's code."""
    x: NDArray[np.float32] = features_ND.float().numpy()
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + np.float32(1e-5))


def yes_or_no(label_N: Tensor, multi_NC: Tensor | None, classes: int) -> Labels:
    if multi_NC is not None:
        found: Labels = multi_NC.numpy().astype(np.int8)
        return found
    return np.where(label_N.numpy()[:, None] == np.arange(classes), 1, -1).astype(np.int8)


def repeated(
    shots: list[int], runs: int, one: Callable[[NDArray[np.int64]], float], label_NC: Labels, name: str
) -> dict[str, float]:
    """ "<name>_k<k>" and its "_std" over draws of k images per class, from one stream."""
    stream, numbers = random.Random(0), {}
    values: dict[int, list[float]] = {k: [] for k in shots}
    for k, _ in itertools.product(shots, range(runs)):
        values[k].append(one(draw(label_NC, k, stream)))
    for k, found in values.items():
        numbers[f"{name}_k{k}"] = float(np.mean(found))
        numbers[f"{name}_k{k}_std"] = float(np.std(found))
    return numbers
