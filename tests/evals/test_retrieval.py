"""Recall@k against a full sort in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from raycon.core.config import EvalConfig
from raycon.evals import names, retrieval
from raycon.evals.base import FeatureSets


def test_recall_is_that_of_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 9, (150,), generator=generator)
    label[:3] = torch.tensor([20, 21, 22])  # classes of one image can never be a hit
    feature = torch.randn(9, 12, generator=generator)[label % 9] + torch.randn(150, 12, generator=generator)
    unit = F.normalize(feature.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-9.0)
    order = cosine.argsort(1, descending=True)
    other = torch.zeros(40, 12), torch.zeros(40, dtype=torch.long)
    numbers = retrieval.Evaluation(EvalConfig()).run(FeatureSets(*other, feature, label))
    names_of_recall = {f"retrieval/recall_at_{k}" for k in (1, 2, 5, 10, 50, 100)}
    assert set(numbers) == names_of_recall | {"retrieval/r_precision", "retrieval/map_at_r"}
    for k in (1, 2, 5, 10, 50, 100):
        expected = (label[order[:, :k]] == label[:, None]).any(1).double().mean()
        assert numbers[f"retrieval/recall_at_{k}"] == pytest.approx(100 * float(expected))
    assert "retrieval" in names()


def test_equal_rows_leave_themselves_out_by_identity() -> None:
    feature = torch.eye(4).repeat(2, 1)
    label = torch.tensor([0, 1, 2, 3, 0, 1, 9, 8])  # two pairs agree, two do not
    assert retrieval.hits(feature, label, [1])[:, 0].tolist() == [True, True, False, False] * 2


def test_small_sets_get_the_numbers_they_allow() -> None:
    feature, label = torch.randn(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    numbers = retrieval.Evaluation(EvalConfig()).run(FeatureSets(feature, label, feature, label))
    assert [n for n in numbers if "recall" in n] == [f"retrieval/recall_at_{k}" for k in (1, 2, 5)]
    assert numbers["retrieval/recall_at_5"] == 100


def test_r_precision_and_map_at_r_by_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 6, (80,), generator=generator)
    label[0] = 50  # alone: it asks nothing
    feature = torch.randn(6, 10, generator=generator)[label % 6] + torch.randn(80, 10, generator=generator)
    unit = F.normalize(feature.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-9.0)
    order = cosine.argsort(1, descending=True)
    precisions, averages = [], []
    for i in range(1, 80):
        others = int((label == label[i]).sum()) - 1
        hit = [bool(label[j] == label[i]) for j in order[i, :others]]
        precisions.append(sum(hit) / others)
        averages.append(sum(sum(hit[: n + 1]) / (n + 1) for n in range(others) if hit[n]) / others)
    numbers = retrieval.Evaluation(EvalConfig()).run(FeatureSets(feature, label, feature, label))
    assert numbers["retrieval/r_precision"] == pytest.approx(100 * sum(precisions) / 79)
    assert numbers["retrieval/map_at_r"] == pytest.approx(100 * sum(averages) / 79)


def test_the_positional_rule_drops_whatever_comes_first() -> None:
    feature, label = torch.eye(4).repeat(2, 1), torch.tensor([0, 1, 2, 3, 0, 1, 9, 8])
    sets = FeatureSets(feature, label, feature, label)
    own = retrieval.Evaluation(EvalConfig()).run(sets)["retrieval/recall_at_1"]
    first = retrieval.Evaluation(EvalConfig(retrieval_positional=True)).run(sets)["retrieval/recall_at_1"]
    hit = retrieval.hits(feature, label, [1], positional=True)[:, 0]
    assert own == 50.0
    assert first == 100.0 * float(hit.double().mean())
    assert first > own  # of two equal rows that agree, half the time the other one was dropped: the row finds itself
