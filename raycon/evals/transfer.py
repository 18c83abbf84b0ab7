"""Transfer by logistic regression on frozen features: ssl-transfer's protocol of eleven data sets (Ericsson et al. 2021).

Multinomial, L-BFGS, 45 strengths of the L2 penalty from weak to strong, each started where the one before ended; chosen
on validation images, fitted again on train and validation, tested once. Shape letters: N train rows, M test rows,
D feature width, C classes.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import EvalConfig
from raycon.evals import metrics, svm
from raycon.evals.base import FeatureSets, check
from raycon.evals.protocols import TRANSFER, Transfer

log = logging.getLogger(__name__)

STRENGTHS = np.logspace(-6, 5, 45)
"""Of the penalty: C is the inverse."""


class Evaluation:
    """Percent in the data set's own metric, "transfer/top1", "transfer/mean_per_class" or "transfer/map_11_point", and
    the choice: "transfer/strength" and "transfer/validation", what it was chosen by.

    Validation: the data set's own split where the protocol has it, else a fifth of train (numpy's generator from 0).
    Images are resized to the crop's size, nothing is cut off the shorter side.
    """

    whole = True

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.strengths = STRENGTHS

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        if sets.test is sets.train:
            raise ValueError("transfer needs a test split; this data set has none")
        protocol = TRANSFER.get(sets.data, Transfer(metric="accuracy", given_validation=False))
        if protocol.metric == "map_11_point" and sets.train_multi is None:
            raise ValueError(f"{sets.data} is scored by mAP: it needs several labels per image")
        held_N = np.zeros(len(sets.train), dtype=bool)
        if protocol.given_validation and sets.validation_rows is not None:
            held_N[sets.validation_rows.numpy()] = True
        else:
            if protocol.given_validation:
                log.warning("%s: its validation split is not there, a fifth of train is taken", sets.data)
            held_N[np.random.RandomState(0).permutation(len(held_N))[: len(held_N) // 5]] = True
        if held_N.all() or not held_N.any():
            raise ValueError(f"{len(held_N)} train images cannot be split into train and validation")
        train_ND: NDArray[np.float32] = sets.train.float().numpy()
        test_MD: NDArray[np.float32] = sets.test.float().numpy()
        if protocol.metric == "map_11_point":
            train_y: Any = svm.yes_or_no(sets.train_label, sets.train_multi, sets.classes)
            test_y: Any = svm.yes_or_no(sets.test_label, sets.test_multi, sets.classes)
        else:
            train_y, test_y = sets.train_label.numpy(), sets.test_label.numpy()
        model, found = None, []
        for strength in self.strengths:
            model = fit(train_ND[~held_N], train_y[~held_N], 1 / strength, model)
            found.append(score(model, train_ND[held_N], train_y[held_N], protocol.metric))
        best = int(np.argmax(found))
        final = fit(train_ND, train_y, 1 / self.strengths[best], None)
        name = "top1" if protocol.metric == "accuracy" else protocol.metric
        return {
            f"transfer/{name}": 100.0 * score(final, test_MD, test_y, protocol.metric),
            "transfer/validation": 100.0 * found[best],
            "transfer/strength": float(self.strengths[best]),
        }


def fit(x_ND: NDArray[np.float32], y: NDArray[np.integer], c: float, start: Any) -> Any:
    """A classifier; or one per class for (N, C) labels, None for a class that is in all or none of the images.

    start: the result of another strength to go on from, None for zeros.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def one(target: NDArray[np.integer], before: Any) -> Any:
        if len(np.unique(target)) < 2:
            return None
        model = LogisticRegression(C=c, warm_start=True) if before is None else copy.deepcopy(before).set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # scikit-learn's 100 iterations are the protocol
            return model.fit(x_ND, target)

    if y.ndim == 1:
        model = one(y, start)
        if model is None:
            raise ValueError("transfer needs two classes or more in train")
        return model
    return [one(np.where(y[:, i] > 0, 1, -1), start and start[i]) for i in range(y.shape[1])]


def score(model: Any, x_MD: NDArray[np.float32], y: NDArray[np.integer], metric: str) -> float:
    """0 to 1."""
    if metric == "accuracy":
        return float((model.predict(x_MD) == y).mean())
    if metric == "mean_per_class":
        return metrics.mean_per_class(model.predict(x_MD), y)
    found = [
        metrics.devkit_average_precision(one.decision_function(x_MD), y[:, i])
        for i, one in enumerate(model)
        if one is not None
    ]
    found = [ap for ap in found if not math.isnan(ap)]
    if not found:
        raise ValueError("no class has images in both train and test")
    return float(np.mean(found))
