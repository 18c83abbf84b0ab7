"""The adjusted mutual information against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest

from raycon.index.drift import adjusted_mutual_information, drift, expected_information


@pytest.mark.parametrize(
    ("rows", "before", "after", "kept"), [(200, 5, 7, 0.6), (3000, 40, 1000, 0.3), (400, 390, 30, 0.9), (60, 1, 5, 0.0)]
)
def test_equals_scikit_learn(rows: int, before: int, after: int, kept: float) -> None:
    from sklearn import metrics

    generator = np.random.default_rng(rows)
    u = generator.integers(0, before, rows)
    v = np.where(generator.random(rows) < kept, u % after, generator.integers(0, after, rows))
    ours = adjusted_mutual_information(u, v)
    assert ours == pytest.approx(metrics.adjusted_mutual_info_score(u, v), abs=1e-9)
    assert adjusted_mutual_information(v, u) == pytest.approx(ours, abs=1e-12)
    assert adjusted_mutual_information(u, 7 * v + 3) == pytest.approx(ours, abs=1e-12)  # numbers mean nothing


def test_the_expectation_is_the_mean_over_shuffles() -> None:
    generator = np.random.default_rng(0)
    u, v = np.repeat(np.arange(4), [2, 3, 5, 10]), np.repeat(np.arange(3), [6, 6, 8])
    found = []
    for _ in range(2000):
        table = np.zeros((4, 3))
        np.add.at(table, (u, generator.permutation(v)), 1 / 20)
        outer = table.sum(1, keepdims=True) * table.sum(0)
        found.append((table * np.log(np.where(table > 0, table / outer, 1))).sum())
    assert expected_information(np.bincount(u), np.bincount(v)) == pytest.approx(np.mean(found), abs=5e-3)


def test_edges() -> None:
    u = np.array([0, 1, 2, 0])
    assert drift(u, u) == pytest.approx(1.0)
    assert drift(np.zeros(5, int), np.zeros(5, int)) == 1.0
    assert drift(np.arange(5), np.arange(5)[::-1]) == 1.0
    assert drift(np.arange(1000) % 7, np.arange(1000) % 7, sample=100) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 and 4 rows"):
        drift(u[:3], u)
