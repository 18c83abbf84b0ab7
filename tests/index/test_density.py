"""PCL's concentration against a loop over clusters written from the paper and its stated arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raycon.index.density import density


def by_loop(sqdist: np.ndarray, label: np.ndarray, k: int, temperature: float) -> np.ndarray:
    raw = []
    for c in range(k):
        mine = [math.sqrt(d) for d, a in zip(sqdist.tolist(), label.tolist(), strict=True) if a == c]
        raw.append(sum(mine) / len(mine) / math.log(len(mine) + 10) if len(mine) > 1 else None)
    largest = max(r for r in raw if r is not None)
    filled = sorted(largest if r is None else r for r in raw)

    def percentile(share: float) -> float:
        place = share * (k - 1)
        low = math.floor(place)
        return filled[low] + (place - low) * (filled[min(low + 1, k - 1)] - filled[low])

    clipped = [min(max(largest if r is None else r, percentile(0.1)), percentile(0.9)) for r in raw]
    return np.array([temperature * c / (sum(clipped) / k) for c in clipped])


@pytest.mark.parametrize("k", [5, 40, 130])
def test_equals_the_loop(k: int) -> None:
    rng = np.random.default_rng(k)
    label = rng.integers(0, k - 2, 200)  # the last two are empty, many of 130 have one row
    sqdist = rng.uniform(0, 2, 200).astype(np.float32)
    found = density(sqdist, label, k, 0.2)
    np.testing.assert_allclose(found.phi_K, by_loop(sqdist, label, k, 0.2), rtol=5e-7)
    assert found.phi_K.dtype == np.float32
    assert float(found.phi_K.mean(dtype=np.float64)) == pytest.approx(0.2, rel=1e-6)


def test_degenerate_clusterings_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 4 clusters of 4 rows has two rows"):
        density(np.ones(4, np.float32), np.arange(4), 4, 0.2)
    with pytest.raises(ValueError, match="every row equals the centroid"):
        density(np.zeros(4, np.float32), np.zeros(4, np.int64), 2, 0.2)
