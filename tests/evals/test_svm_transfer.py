"""SVMs, low-shot and transfer, against scikit-learn used plainly, and the average precisions by their definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from raycon.core.config import EvalConfig
from raycon.evals import FeatureSets, lowshot, metrics, svm, transfer


@pytest.fixture(scope="module")
def digits() -> FeatureSets:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    return FeatureSets(x[:400], y[:400], x[1400:], y[1400:])


def test_eleven_points_by_hand() -> None:
    relevant = np.array([True, False, True, False])
    score = np.array([0.9, 0.8, 0.7, 0.6])
    # Recall 0.5 at precision 1, recall 1 at precision 2/3: six points of 1, five of 2/3.
    assert metrics.average_precision_11(score, relevant) == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert metrics.average_precision(score, relevant) == pytest.approx(0.5 + 0.5 * 2 / 3)
    truth = np.array([1, 0, 1, -1])  # the second is difficult: out of the way, both found at once
    assert metrics.devkit_average_precision(score, truth) == pytest.approx(1.0)
    # 3 of 10 recalled is 0.3 and reaches the fourth point, though 3 / 10 is no float.
    ten = np.array([True] * 3 + [False] * 7 + [True] * 7)
    found = metrics.average_precision_11(np.arange(17.0)[::-1], ten)
    assert found == pytest.approx((4 + sum((3 + r) / (10 + r) for r in (7,) * 7)) / 11)
    assert np.isnan(metrics.average_precision(score, np.zeros(4, bool)))


def test_mean_per_class() -> None:
    assert metrics.mean_per_class(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 3])) == pytest.approx((2 / 3 + 0) / 2)


def test_svm_on_difficult_labels() -> None:
    rng = np.random.default_rng(0)
    label = rng.choice([-1, 0, 1], (120, 3), p=[0.75, 0.1, 0.15]).astype(np.int8)
    x = rng.normal(size=(120, 6)).astype(np.float32)
    x[:, :3] += label
    sets = FeatureSets(
        torch.from_numpy(x[:80]), torch.zeros(80, dtype=torch.int64), torch.from_numpy(x[80:]),
        torch.zeros(40, dtype=torch.int64), train_multi=torch.from_numpy(label[:80]),
        test_multi=torch.from_numpy(label[80:]),
    )  # fmt: skip
    numbers = svm.Evaluation(EvalConfig(shots=(5,), shot_runs=3)).run(sets)
    unit = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)
    pcl, devkit = [], []
    for c in range(3):
        machine = LinearSVC(C=0.5, class_weight={1: 2, 0: 1}, max_iter=2000, random_state=0, dual=True)
        score = machine.fit(unit[:80], label[:80, c] == 1).decision_function(unit[80:])
        pcl.append(metrics.average_precision(score, label[80:, c] == 1))
        known = label[80:, c] != 0
        devkit.append(metrics.average_precision_11(score[known], label[80:, c][known] == 1))
    assert numbers["svm/map"] == pytest.approx(100 * np.mean(pcl), abs=0.05)
    assert numbers["svm/devkit_map"] == pytest.approx(100 * np.mean(devkit), abs=0.05)
    assert numbers["svm/map"] != pytest.approx(numbers["svm/devkit_map"], abs=0.5)
    stream, runs = random.Random(0), []
    for _ in range(3):
        rows = svm.draw(label[:80], 5, stream)
        decision = svm.decisions(svm.unit(torch.from_numpy(x[:80]))[rows], label[:80][rows], unit[80:], 0.5)
        runs.append(np.mean([metrics.average_precision(decision[:, c], label[80:, c] == 1) for c in range(3)]))
    assert numbers["svm/map_k5"] == pytest.approx(100 * np.mean(runs), abs=0.05)
    assert numbers["svm/map_k5_std"] == pytest.approx(100 * np.std(runs), abs=0.05)


def test_several_costs_are_told_apart(digits: FeatureSets) -> None:
    numbers = svm.Evaluation(EvalConfig(svm_costs=(0.01, 1.0), shots=())).run(digits)
    assert numbers["svm/map_best_on_test"] == max(numbers["svm/map_c0.01"], numbers["svm/map_c1"])
    assert "svm/map" not in numbers


def test_lowshot_is_sklearns_accuracy(digits: FeatureSets, caplog: pytest.LogCaptureFixture) -> None:
    numbers = lowshot.Evaluation(EvalConfig(shots=(4, 400), shot_runs=2)).run(digits)
    assert "[400] left out" in caplog.text
    label = digits.train_label.numpy()
    stream, found = random.Random(0), []
    for _ in range(2):
        rows = np.concatenate([_shuffled(np.flatnonzero(label == c).tolist(), stream)[:4] for c in range(10)])
        machine = LinearSVC(C=0.5, max_iter=2000, random_state=0, dual=True)
        machine.fit(svm.unit(digits.train)[rows], label[rows])
        found.append(100 * machine.score(svm.unit(digits.test), digits.test_label.numpy()))
    assert numbers == pytest.approx({"lowshot/top1_k4": np.mean(found), "lowshot/top1_k4_std": np.std(found)})


def _shuffled(items: list[int], stream: random.Random) -> list[int]:
    stream.shuffle(items)
    return items


def test_transfer_chooses_on_a_fifth_of_train(digits: FeatureSets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STRENGTHS", np.array([1e-4, 1e-1, 1e3]))
    numbers = transfer.Evaluation(EvalConfig()).run(digits)
    x, y = digits.train.numpy(), digits.train_label.numpy()
    held = np.random.RandomState(0).permutation(400)[:80]
    rest = np.setdiff1d(np.arange(400), held)
    scores = [LogisticRegression(C=1 / s, max_iter=500).fit(x[rest], y[rest]).score(x[held], y[held])
              for s in (1e-4, 1e-1, 1e3)]  # fmt: skip
    assert numbers["transfer/strength"] == (1e-4, 1e-1, 1e3)[int(np.argmax(scores))]
    final = LogisticRegression(C=1 / numbers["transfer/strength"]).fit(x, y)
    expected = 100 * final.score(digits.test.numpy(), digits.test_label.numpy())
    assert numbers["transfer/top1"] == pytest.approx(expected, abs=0.3)
    wrong = transfer.Evaluation(EvalConfig()).run(digits._replace(test_label=(digits.test_label + 1) % 10))
    assert wrong["transfer/strength"] == numbers["transfer/strength"], "test has no say"


def test_transfer_uses_the_metric_and_the_validation_of_the_set(
    digits: FeatureSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STRENGTHS", np.array([1e-2]))
    own = digits._replace(data="flowers102", validation_rows=torch.arange(300, 400))
    numbers = transfer.Evaluation(EvalConfig()).run(own)
    model = LogisticRegression(C=100).fit(digits.train[:300].numpy(), digits.train_label[:300].numpy())
    guess = model.predict(digits.train[300:].numpy())
    expected = metrics.mean_per_class(guess, digits.train_label[300:].numpy())
    assert numbers["transfer/validation"] == pytest.approx(100 * expected, abs=0.5)
    assert set(numbers) == {"transfer/mean_per_class", "transfer/validation", "transfer/strength"}
    multi = digits._replace(
        data="voc2007",
        validation_rows=torch.arange(300, 400),
        train_multi=torch.from_numpy(svm.yes_or_no(digits.train_label, None, 10)),
        test_multi=torch.from_numpy(svm.yes_or_no(digits.test_label, None, 10)),
    )
    assert 90 < transfer.Evaluation(EvalConfig()).run(multi)["transfer/map_11_point"] <= 100
    with pytest.raises(ValueError, match="several labels"):
        transfer.Evaluation(EvalConfig()).run(digits._replace(data="voc2007"))
