"""Agreement of clusters with labels, and feature health, each against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from raycon.core.config import EvalConfig
from raycon.evals import FeatureSets, clusters
from raycon.nn import health


def test_agreement_against_definitions() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 300)
    found = np.where(rng.random(300) < 0.6, label * 7, rng.integers(0, 40, 300))
    ours = clusters.agreement(torch.from_numpy(found), torch.from_numpy(label))
    table = metrics.cluster.contingency_matrix(label, found)
    joint = table / table.sum()
    p_t, p_z = joint.sum(1), joint.sum(0)

    def bits(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log2(p[p > 0])).sum())

    assert ours["purity"] == pytest.approx(table.max(0).sum() / 300)
    assert ours["leftover"] == pytest.approx(bits(joint) - bits(p_t), abs=1e-9)
    assert ours["information"] == pytest.approx(bits(p_t) + bits(p_z) - bits(joint), abs=1e-9)
    assert ours["nmi"] == pytest.approx(ours["information"] / ((bits(p_t) + bits(p_z)) / 2), abs=1e-9)
    assert ours["ari"] == pytest.approx(metrics.adjusted_rand_score(label, found))
    assert ours["ami"] == pytest.approx(metrics.adjusted_mutual_info_score(label, found))
    assert ours["used"] == len(set(found.tolist()))


def test_agreement_leaves_unlabelled_rows_out() -> None:
    found, label = torch.tensor([3, 3, 9, 9, 9]), torch.tensor([0, 0, 1, 1, -1])
    ours = clusters.agreement(found, label)
    assert (ours["ami"], ours["ari"], ours["purity"]) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="no row has a label"):
        clusters.agreement(found, torch.full((5,), -1))


def test_evaluation_finds_clear_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(200) % 4
    x = 5 * torch.eye(4, 16)[label] * torch.rand(200, 1, generator=generator).add(0.5)
    x = x + 0.3 * torch.randn(200, 16, generator=generator)
    found = clusters.Evaluation(EvalConfig()).run(FeatureSets(x, label, x[:5], label[:5]))
    assert found["clusters/ami"] == pytest.approx(1.0)
    assert found["clusters/used"] == 4


def test_std() -> None:
    same = torch.ones(50, 8)
    assert health.feature_std(same).item() == pytest.approx(0.0, abs=1e-6)
    even = torch.cat([torch.eye(8), -torch.eye(8)])
    assert health.feature_std(even * 7).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_effective_rank_is_rankme(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    singular = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = singular / singular.sum()
    assert health.effective_rank(x).item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert health.effective_rank(torch.eye(6) * 3).item() == pytest.approx(6, rel=1e-6)
    assert health.effective_rank(torch.ones(9, 4)).item() == pytest.approx(1, rel=1e-4)
    assert health.effective_rank(torch.zeros(9, 4)).item() == 0


def test_alignment_and_uniformity_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    a, b = one / one.norm(dim=1, keepdim=True), other / other.norm(dim=1, keepdim=True)
    assert health.alignment(one, 3 * one).item() == pytest.approx(0, abs=1e-6)
    assert health.alignment(one, other).item() == pytest.approx(((a - b) ** 2).sum(1).mean().item(), rel=1e-5)
    pairs = [math.exp(-2 * float(((a[i] - a[j]) ** 2).sum())) for i in range(7) for j in range(i)]
    assert health.uniformity(one).item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    with pytest.raises(ValueError, match="2 or more"):
        health.uniformity(one[:1])
