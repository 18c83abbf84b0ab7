"""Average precision in its different published meanings. Shape letters: M images, C classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]


def average_precision(score_M: Scores, relevant_M: NDArray[np.bool_]) -> float:
    """Area under the precision envelope over all recall values (VOC from 2010 on, PCL's SVM code): 0 to 1.

    Images of equal score come in reverse order of their rows, as in the official code. NaN without a relevant image.
    """
    precision, recall = _curve(np.argsort(score_M, kind="stable")[::-1], relevant_M)
    if not len(recall):
        return float("nan")
    recall, precision = np.r_[0.0, recall, 1.0], np.r_[0.0, precision, 0.0]
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def average_precision_11(score_M: Scores, relevant_M: NDArray[np.bool_]) -> float:
    """The mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC2007's development kit): 0 to 1.

    Images of equal score come in the order of their rows. NaN without a relevant image.
    """
    precision, recall = _curve(np.argsort(-score_M, kind="stable"), relevant_M)
    if not len(recall):
        return float("nan")
    # Recall is a count over a count: compare counts, 0.3 is no float.
    total = int(relevant_M.sum())
    count = np.rint(recall * total).astype(np.int64)
    return float(np.mean([precision[10 * count >= t * total].max(initial=0.0) for t in range(11)]))


def devkit_average_precision(score_M: Scores, truth_M: NDArray[np.integer]) -> float:
    """VOC2007's development kit: 11 points, images where the class is difficult (truth 0) are left out."""
    known = truth_M != 0
    return average_precision_11(score_M[known], truth_M[known] > 0)


def _curve(order_M: NDArray[np.intp], relevant_M: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall after each image; empty when none is relevant."""
    right = np.cumsum(relevant_M[order_M])
    if not len(right) or right[-1] == 0:
        return np.empty(0), np.empty(0)
    return right / np.arange(1, len(right) + 1), right / right[-1]


def mean_per_class(guess_M: NDArray[np.integer], truth_M: NDArray[np.integer]) -> float:
    """The mean over the classes that occur of the share of their images that is right: 0 to 1."""
    right, count = np.bincount(truth_M, guess_M == truth_M), np.bincount(truth_M)
    return float((right[count > 0] / count[count > 0]).mean())
