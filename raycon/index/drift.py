"""How much assignments moved between two versions: adjusted mutual information, which does not mind cluster numbers.

AMI = (MI - E[MI]) / (mean(H(U), H(V)) - E[MI]), the expectation over all ways to fill clusters of these sizes (Vinh, Epps,
Bailey, JMLR 2010). Clusters of one size have one and the same term, so the expectation costs by the number of different
sizes, not of clusters.

Shape letters: N rows, U and V clusters of the two assignments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SAMPLE = 50_000


def drift(before_N: NDArray[np.int64], after_N: NDArray[np.int64], sample: int = SAMPLE) -> float:
    """The AMI of two assignments of the same rows, of ``sample`` evenly spaced rows when there are more."""
    every = -(-len(before_N) // sample)
    return adjusted_mutual_information(before_N[::every], after_N[::every])


def adjusted_mutual_information(u_N: NDArray[np.int64], v_N: NDArray[np.int64]) -> float:
    """1 for equal partitions, about 0 for independent ones; ids >= 0. As scikit-learn's (arithmetic mean)."""
    if len(u_N) != len(v_N) or not len(u_N):
        raise ValueError(f"assignments of {len(u_N)} and {len(v_N)} rows: give the same rows twice, at least one")
    rows = len(u_N)
    u_N, size_U = np.unique(u_N, return_inverse=True, return_counts=True)[1:]
    v_N, size_V = np.unique(v_N, return_inverse=True, return_counts=True)[1:]
    if len(size_U) == len(size_V) == 1 or len(size_U) == len(size_V) == rows:
        return 1.0  # one cluster, or every row its own: equal, and nothing to adjust
    count = np.unique(u_N.astype(np.int64) * len(size_V) + v_N, return_counts=True)[1]  # cells that are not empty
    entropy_u, entropy_v = _entropy(size_U, rows), _entropy(size_V, rows)
    information = entropy_u + entropy_v - _entropy(count, rows)
    expected = expected_information(size_U, size_V)
    room = (entropy_u + entropy_v) / 2 - expected
    tiny = np.finfo(np.float64).eps
    return float((information - expected) / (max(room, tiny) if room >= 0 else min(room, -tiny)))


def expected_information(size_U: NDArray[np.int64], size_V: NDArray[np.int64]) -> float:
    """E[MI] in nats of random assignments with clusters of these sizes (both sum to N)."""
    rows = int(size_U.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, rows + 1)))])
    values_u, many_u = np.unique(size_U, return_counts=True)
    values_v, many_v = np.unique(size_V, return_counts=True)
    b_V, weight_V = values_v[:, None], many_v.astype(np.float64)
    total = 0.0
    for a, of_a in zip(values_u.tolist(), many_u.tolist(), strict=True):
        # How many rows a cell may hold: further from the mean than this the probability is below 1e-20 (Bernstein).
        mean_V = a * values_v / rows
        reach_V = 10 * np.sqrt(mean_V) + 40
        low, high = max(1, int((mean_V - reach_V).min())), min(a, int((mean_V + reach_V).max()) + 1)
        n = np.arange(low, high + 1)
        # The hypergeometric probability of each, in logarithms.
        log_p_VN = (
            (log_factorial[a] + log_factorial[rows - a] - log_factorial[rows] - log_factorial[n] - log_factorial[a - n])
            + (log_factorial[b_V] + log_factorial[rows - b_V])
            - log_factorial[np.maximum(b_V - n, 0)]
            - log_factorial[np.maximum(rows - a - b_V + n, 0)]
        )
        log_p_VN[(n > b_V) | (n < a + b_V - rows)] = -np.inf
        term_VN = n / rows * (np.log(rows) + np.log(n) - np.log(a) - np.log(b_V)) * np.exp(log_p_VN)
        total += of_a * float(weight_V @ term_VN.sum(1))
    return total


def _entropy(size: NDArray[np.int64], rows: int) -> float:
    p = size / rows
    return float(-(p * np.log(p)).sum())
