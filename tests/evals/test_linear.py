"""The linear probe against scikit-learn, against autograd, and its choice of settings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from raycon.core import stream
from raycon.core.config import EvalConfig
from raycon.evals import FeatureSets, linear


@pytest.fixture(scope="module")
def digits() -> FeatureSets:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    x, y = torch.tensor(data.data[order], dtype=torch.float32), torch.tensor(data.target[order])
    return FeatureSets(x[:1400], y[:1400], x[1400:], y[1400:])


def test_as_good_as_sklearn(digits: FeatureSets) -> None:
    scaler = StandardScaler().fit(digits.train.numpy())
    other = LogisticRegression(C=1.0, max_iter=2000).fit(
        scaler.transform(digits.train.numpy()), digits.train_label.numpy()
    )
    expected = 100 * other.score(scaler.transform(digits.test.numpy()), digits.test_label.numpy())
    found = linear.Evaluation(EvalConfig()).run(digits)
    # Of several probes the best on held-out rows is taken, so it may be better; how much of both is the processor's rounding.
    assert expected - 1.0 <= found["linear/top1"] <= expected + 2.5
    assert found["linear/lr"] in linear.RATES
    assert found["linear/weight_decay"] in linear.DECAYS
    assert found == linear.Evaluation(EvalConfig()).run(digits)  # deterministic


def test_one_probe_of_many_is_sgd_by_autograd(digits: FeatureSets) -> None:
    rate, decay, epochs, seed = 4.0, 1e-4, 3, 7
    x, y = digits.train[:200], digits.train_label[:200]
    probes = linear.fit(x, y, 10, epochs, seed, torch.tensor([1.0, rate, 64.0]), torch.tensor([0.0, decay, 1e-5]))

    # As anyone would write it; a batch of 64 is what 200 rows get.
    std, mean = x.std(0, correction=0), x.mean(0)
    z = torch.where(std > 0, (x - mean) / std.clamp_min(1e-9), 0.0) / math.sqrt(x.shape[1])
    net = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    groups = [{"params": [net.weight], "weight_decay": decay}, {"params": [net.bias], "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs * 4)
    for epoch in range(epochs):
        for row in torch.from_numpy(stream.epoch_order(seed, epoch + 1, 200)).split(64):
            sgd.zero_grad()
            F.cross_entropy(net(z[row]), y[row]).backward()
            sgd.step()
            cosine.step()
    assert torch.allclose(probes.weight_PCD[1], net.weight.detach(), atol=2e-4)
    assert torch.allclose(probes.bias_PC[1], net.bias.detach(), atol=2e-4)
    assert torch.allclose(probes.logits(x)[1], net(z).detach(), atol=2e-3)


def test_test_labels_do_not_influence_the_choice(digits: FeatureSets) -> None:
    config = EvalConfig(linear_epochs=5)
    true = linear.Evaluation(config).run(digits)
    wrong = linear.Evaluation(config).run(digits._replace(test_label=(digits.test_label + 1) % 10))
    same = ("linear/lr", "linear/weight_decay", "linear/held_out_top1")
    assert [true[name] for name in same] == [wrong[name] for name in same]
    assert wrong["linear/top1"] < 10 < true["linear/top1"]


def test_scale_and_dead_features_do_not_matter(digits: FeatureSets) -> None:
    # A power of two changes no digit. The first pixel of all digits is 0; it becomes one that varies by rounding only,
    # and would be thousands of standard deviations away in test if it were standardised like the others.
    moved = digits._replace(train=digits.train * 1024, test=digits.test * 1024)
    moved.train[:, 0], moved.test[:, 0] = 1e4, 1e4 + 1
    moved.train[::2, 0] = np.nextafter(np.float32(1e4), np.float32(2e4)).item()
    config = EvalConfig(linear_epochs=5)
    assert linear.Evaluation(config).run(moved) == linear.Evaluation(config).run(digits)


def test_a_diverged_probe_is_never_chosen() -> None:
    probes = linear.Probes(torch.full((1, 2, 3), math.nan), torch.zeros(1, 2), torch.zeros(3), torch.ones(3))
    top1, loss = linear.score(probes, torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    assert top1.tolist() == [0.0]
    assert loss.tolist() == [math.inf]


def test_no_test_split(digits: FeatureSets) -> None:
    sets = FeatureSets(digits.train, digits.train_label, digits.train, digits.train_label)
    with pytest.raises(ValueError, match="test split"):
        linear.Evaluation(EvalConfig()).run(sets)
