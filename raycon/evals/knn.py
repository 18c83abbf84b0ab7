"""Weighted k-nearest-neighbour classification by cosine, exact (Wu et al. 2018, Unsupervised Feature Learning via
Non-Parametric Instance Discrimination, section 3.4; the protocol of most self-supervised papers).

Shape letters: N stored rows, M queries, D feature width, K neighbours, C classes.

Vote of class c = sum over the k nearest stored rows of class c of exp(cosine / temperature).
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raycon.core.config import EvalConfig
from raycon.evals.base import FeatureSets, check
from raycon.index import engine

log = logging.getLogger(__name__)

_QUERIES = 1024
"""Queries searched at once; the engine takes the stored rows in blocks too."""
_GATHERED = 2**22
"""Numbers of neighbours' features held at once: 16 MiB of float32, which stays in the cache."""


class Evaluation:
    """Percent of test rows classified right, for several k at once: "knn/top1_k<k>".

    Without a test split (``sets.test is sets.train``) each row is classified by all others: "knn/loo_top1_k<k>".
    """

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.ks = tuple(sorted(set(config.knn_k)))
        self.temperature = config.knn_temperature

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        alone = sets.test is sets.train
        stored = len(sets.train) - alone
        ks = [k for k in self.ks if k <= stored]
        if not ks:
            raise ValueError(f"evals.knn_k = {self.ks}: only {stored} stored rows; give a smaller k")
        if len(ks) < len(self.ks):
            log.warning("evals.knn_k: %s left out, only %d stored rows", sorted(set(self.ks) - set(ks)), stored)
        train_ND = F.normalize(sets.train.float())
        test_MD = train_ND if alone else F.normalize(sets.test.float())
        cosine_MK, row_MK = nearest(test_MD, train_ND, ks[-1], leave_one_out=alone)
        right = {}
        for k in ks:
            guess_M = vote(cosine_MK[:, :k], sets.train_label[row_MK[:, :k]], sets.classes, self.temperature)
            name = f"knn/loo_top1_k{k}" if alone else f"knn/top1_k{k}"
            right[name] = 100.0 * float((guess_M == sets.test_label).double().mean())
        return right


def nearest(query_MD: Tensor, stored_ND: Tensor, k: int, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """(M, k) cosines and (M, k) int64 rows of the k stored rows nearest to each query, nearest first. Exact.

    All rows must be unit vectors (a row of zeros is tolerated). ``leave_one_out``: query i is stored row i and never
    its own neighbour; another row equal to it is. Memory beyond the answer is bounded whatever M and N. Raises
    ValueError when there are fewer than k rows to find.
    """
    wanted = k + leave_one_out
    if k < 1 or wanted > len(stored_ND):
        raise ValueError(f"k = {k} of {len(stored_ND)} stored rows{', itself excluded' if leave_one_out else ''}")
    searcher, stored = engine.load(), np.ascontiguousarray(stored_ND.numpy(), dtype=np.float32)
    stored_ND = torch.from_numpy(stored)
    cosine_MK, row_MK = torch.empty(len(query_MD), k), torch.empty(len(query_MD), k, dtype=torch.int64)
    part = max(1, _GATHERED // (wanted * stored_ND.shape[1]))
    for i in range(0, len(query_MD), _QUERIES):
        query_QD = query_MD[i : i + _QUERIES].float().contiguous()
        row_QK = torch.from_numpy(searcher.search(query_QD.numpy(), stored, wanted))
        if leave_one_out:
            other_QK = row_QK != torch.arange(i, i + len(row_QK))[:, None]
            # A row that is not among its own k + 1 nearest (so many equal ones) gives up the last of them instead.
            other_QK[other_QK.all(1), -1] = False
            row_QK = row_QK[other_QK].view(-1, k)
        for q, row in zip(query_QD.split(part), row_QK.split(part), strict=True):
            cosine_MK[i : i + len(q)] = torch.bmm(stored_ND[row], q[:, :, None])[..., 0]
            row_MK[i : i + len(q)] = row
            i += len(q)
    return cosine_MK, row_MK


def vote(cosine_MK: Tensor, label_MK: Tensor, classes: int, temperature: float) -> Tensor:
    """(M,) int64: the class with the most weight among the neighbours, the smallest of equal ones."""
    # Relative to the nearest neighbour: the same order of classes, and no overflow at any temperature.
    weight_MK = ((cosine_MK - cosine_MK[:, :1]) / temperature).exp().double()
    votes_MC = torch.zeros(len(cosine_MK), classes, dtype=torch.float64).scatter_add_(1, label_MK, weight_MK)
    return votes_MC.argmax(1)
