"""SVM evaluation against vectors made by PCL's official code."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import torch

from raycon.core.config import EvalConfig
from raycon.evals import FeatureSets, metrics, svm
from tests.helpers import golden_files


def test_average_precision(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_svm_map*"):
        rows = zip(g["ap_scores"].numpy(), g["ap_targets"].numpy(), g["ap_values"].tolist(), strict=True)
        for scores, targets, expected in rows:
            assert abs(metrics.average_precision(scores, targets > 0) - expected) < 1e-12
        for decision, ap in zip(g["decision"].numpy(), g["ap"].numpy(), strict=True):
            ours = [
                100 * metrics.average_precision(d, t > 0)
                for d, t in zip(decision.T, g["test_y"].numpy().T, strict=True)
            ]
            np.testing.assert_allclose(ours, ap, atol=1e-10, rtol=0)


def test_svm_map(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_svm_map*"):
        np.testing.assert_allclose(svm.unit(g["train_x"]), g["train_x_norm"], atol=1e-7)
        train_y, test_y = g["train_y"].to(torch.int8), g["test_y"].to(torch.int8)
        for cost, decision in zip(g["costs"].tolist(), g["decision"].numpy(), strict=True):
            ours = svm.decisions(svm.unit(g["train_x"]), train_y.numpy(), svm.unit(g["test_x"]), cost)
            np.testing.assert_allclose(ours, decision, atol=2e-3)  # another build of liblinear
        label, other = torch.zeros(len(train_y), dtype=torch.int64), torch.zeros(len(test_y), dtype=torch.int64)
        sets = FeatureSets(g["train_x"], label, g["test_x"], other, train_multi=train_y, test_multi=test_y)
        costs = tuple(g["costs"].tolist())
        numbers = svm.Evaluation(EvalConfig(svm_costs=costs, shots=())).run(sets)
        for cost, expected in zip(costs, g["mean_ap"].tolist(), strict=True):
            assert abs(numbers[f"svm/map_c{cost:g}"] - expected) < 0.2
        assert numbers["svm/map_best_on_test"] == max(numbers[f"svm/map_c{cost:g}"] for cost in costs)


def test_low_shot_draws(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_lowshot*"):
        stream = random.Random(g.settings["random_seed"])
        runs = sorted((tuple(map(int, re.findall(r"\d+", name))), name) for name in g.names("k"))
        assert runs
        for (k, _), name in runs:
            np.testing.assert_array_equal(svm.draw(g["labels"].numpy(), k, stream), g[name], err_msg=name)
