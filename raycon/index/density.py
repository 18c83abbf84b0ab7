"""PCL's concentration phi: how loose a cluster is (Li et al., ICLR 2021, section 3.3; the authors' arithmetic).

Shape letters: N rows, K clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SMOOTH = 10
"""alpha in Z log(Z + alpha): keeps small clusters from looking dense."""


class Density(NamedTuple):
    """The stages of the computation, each (K,) float64 but phi."""

    raw_K: NDArray[np.float64]
    """mean distance / ln(count + 10); 0 where a cluster has fewer than 2 rows."""
    filled_K: NDArray[np.float64]
    """Those clusters take the largest value."""
    bounds: tuple[float, float]
    """10th and 90th percentile of ``filled_K``."""
    clipped_K: NDArray[np.float64]
    phi_K: NDArray[np.float32]
    """Scaled to a mean of the temperature."""


def density(sqdist_N: NDArray[np.float32], assignment_N: NDArray[np.int64], k: int, temperature: float) -> Density:
    """PCL's concentrations from the squared distances (N,) of the rows to their raw (not normalised) centroids.

    Distances and their means are float32, the rest float64, as the authors compute. Raises ValueError when no cluster
    has two rows: there is nothing to scale then.
    """
    count_K = np.bincount(assignment_N, minlength=k)
    many_K = count_K > 1
    if not many_K.any():
        raise ValueError(
            f"none of the {k} clusters of {len(assignment_N)} rows has two rows, so PCL's concentration is undefined: "
            "ask for fewer clusters"
        )
    total_K = np.bincount(assignment_N, weights=np.sqrt(sqdist_N), minlength=k)
    mean_K = (total_K / np.maximum(count_K, 1)).astype(np.float32)
    raw_K = np.where(many_K, mean_K / np.log(count_K + SMOOTH), 0.0)
    filled_K = np.where(many_K, raw_K, raw_K.max())
    low, high = np.percentile(filled_K, (10, 90))
    clipped_K = filled_K.clip(low, high)
    if clipped_K.mean() == 0:
        raise ValueError(
            f"every row equals the centroid of its cluster ({k} clusters of {len(assignment_N)} rows), so PCL's "
            "concentration is undefined: the features have collapsed, or there are too many clusters"
        )
    phi_K = (temperature * clipped_K / clipped_K.mean()).astype(np.float32)
    return Density(raw_K, filled_K, (float(low), float(high)), clipped_K, phi_K)
