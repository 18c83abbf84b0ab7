"""Classification with k labelled images per class (PCL's Places205 numbers, after the authors' MoPro code).

Shape letters: N train rows, M test rows, D feature width.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import EvalConfig
from raycon.evals import svm
from raycon.evals.base import FeatureSets, check


class Evaluation:
    """Percent of test images right by linear SVMs (C = 0.5, one against the rest) on k train images per class:
    "lowshot/top1_k<k>", the mean of ``evals.shot_runs`` draws, and "lowshot/top1_k<k>_std". For one label per image."""

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.shots, self.runs = tuple(config.shots), config.shot_runs

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        if sets.test is sets.train:
            raise ValueError("low-shot classification needs a test split; this data set has none")
        if sets.train_multi is not None:
            raise ValueError(f"{sets.data} has several labels per image: use svm")
        train_ND, test_MD = svm.unit(sets.train), svm.unit(sets.test)
        train_N, test_M = sets.train_label.numpy(), sets.test_label.numpy()
        kinds = np.unique(train_N)
        if len(kinds) < 2:
            raise ValueError("low-shot classification needs two classes or more")
        # Only the classes that train has: an empty one has nothing to draw from.
        label_NC = np.where(train_N[:, None] == kinds, 1, -1).astype(np.int8)
        shots = svm.fitting(self.shots, int((label_NC > 0).sum(0).min()))
        if not shots:
            raise ValueError(f"evals.shots = {self.shots}: a class has fewer images; give a smaller k")

        def accuracy(rows: NDArray[np.int64]) -> float:
            return 100.0 * float((predict(train_ND[rows], train_N[rows], test_MD) == test_M).mean())

        return svm.repeated(shots, self.runs, accuracy, label_NC, "lowshot/top1")


def predict(
    train_ND: NDArray[np.float32], train_N: NDArray[np.int64], test_MD: NDArray[np.float32]
) -> NDArray[np.int64]:
    """(M,) classes."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    machine = LinearSVC(C=0.5, dual=True, tol=1e-4, max_iter=2000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        guess: NDArray[np.int64] = machine.fit(train_ND, train_N).predict(test_MD)
    return guess
