"""Do clusters of the features agree with the labels?

Shape letters: N rows, D feature width, k clusters, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from raycon.core.config import EvalConfig
from raycon.evals.base import FeatureSets, check
from raycon.nn import health

_HEALTH_ROWS = 2048


class Evaluation:
    """Agreement of k-means (cosine, as many clusters as classes, best of 3 starts) on the train features with the
    labels: "clusters/ami" and the others of ``agreement``; and the health of the feature space as the encoder gives it:
    "clusters/std", "clusters/effective_rank", "clusters/uniformity" (see raycon/nn/health.py). For a run that mines, the
    agreement of clustering i of the snapshot in the checkpoint too: "clusters/snapshot<i>_ami" and so on."""

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.seed = seed

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        from sklearn.cluster import KMeans

        # All rows must be of one scale for cosine: k-means on the unit sphere.
        unit_ND = F.normalize(sets.train.float())
        k = min(len(sets.train_label.unique()), len(unit_ND))
        found = KMeans(k, n_init=3, random_state=self.seed).fit_predict(unit_ND.numpy())
        numbers = agreement(torch.from_numpy(found).long(), sets.train_label)
        for i, assignment_N in enumerate(sets.assignment):
            numbers |= {f"snapshot{i}_{k}": v for k, v in agreement(assignment_N, sets.train_label).items()}
        # Evenly spaced rows: files are often sorted by class.
        sample_BD = sets.train[:: max(1, len(sets.train) // _HEALTH_ROWS)][:_HEALTH_ROWS]
        numbers["std"] = float(health.feature_std(sample_BD))
        numbers["effective_rank"] = float(health.effective_rank(sample_BD))
        numbers["uniformity"] = float(health.uniformity(sample_BD))
        return {f"clusters/{name}": value for name, value in numbers.items()}


def agreement(assignment_N: Tensor, label_N: Tensor) -> dict[str, float]:
    """How an assignment (any clustering, so also a snapshot's) agrees with labels; rows with label -1 are left out.

    ami, nmi: adjusted / normalised mutual information (arithmetic mean, as scikit-learn), ari: adjusted Rand index,
    purity: share of rows in the majority class of their cluster; all at most 1. information: I(Z;T) and leftover:
    H(Z|T) in bits (Cl-InfoNCE: what the clusters Z tell of the classes T, and what else they tell), used: clusters with
    at least one row. Raises ValueError when the lengths differ or no row has a label.
    """
    if assignment_N.shape != label_N.shape or assignment_N.ndim != 1:
        raise ValueError(f"assignment {tuple(assignment_N.shape)}, label {tuple(label_N.shape)}: give (N,) and (N,)")
    known_N = label_N >= 0
    if not bool(known_N.any()):
        raise ValueError("no row has a label")
    from sklearn import metrics

    z_N, t_N = assignment_N[known_N].cpu(), label_N[known_N].cpu()
    z_N, t_N = z_N.unique(return_inverse=True)[1], t_N.unique(return_inverse=True)[1]
    classes = int(t_N.max()) + 1
    # Pairs that occur, not the k x C table: with k = N / 10 and many classes that would not fit.
    pair_Z, count_Z = (z_N * classes + t_N).unique(return_counts=True)
    majority_k = torch.zeros(int(z_N.max()) + 1, dtype=torch.int64)
    majority_k.scatter_reduce_(0, pair_Z // classes, count_Z, "amax")
    leftover = _bits(count_Z) - _bits(t_N.bincount())
    truth, found = t_N.numpy(), z_N.numpy()
    return {
        "ami": float(metrics.adjusted_mutual_info_score(truth, found)),
        "nmi": float(metrics.normalized_mutual_info_score(truth, found)),
        "ari": float(metrics.adjusted_rand_score(truth, found)),
        "purity": float(majority_k.sum()) / len(t_N),
        "information": _bits(z_N.bincount()) - leftover,
        "leftover": leftover,
        "used": float(len(majority_k)),
    }


def _bits(count: Tensor) -> float:
    p = count.double() / count.sum()
    return float(torch.special.entr(p).sum()) / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
