"""Retrieval: recall@k (MaskCon, arXiv 2303.12756, section 4), R-precision and MAP@R (Musgrave et al. 2020, A Metric
Learning Reality Check, section 3.2).

Queries and gallery are the same: the test rows (the train rows where there is no test split), each leaving itself out.

Shape letters: M rows, B rows of a block, D feature width, K neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raycon.core.config import EvalConfig
from raycon.evals.base import FeatureSets, check
from raycon.evals.knn import nearest, neighbours

log = logging.getLogger(__name__)

KS = (1, 2, 5, 10, 50, 100)
"""The published numbers of neighbours."""


class Evaluation:
    """Percent of rows with a hit among the first k: "retrieval/recall_at_<k>"; and over the rows whose class has R >= 1
    other rows, in percent: "retrieval/r_precision", the share of the R nearest that are of the class, and
    "retrieval/map_at_r", the same with each hit weighted by the precision up to it.

    ``evals.retrieval_positional``: a query leaves out whatever comes first, as MaskCon's code does.
    """

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.ks, self.positional = KS, config.retrieval_positional

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        ks = [k for k in self.ks if k < len(sets.test)]
        if not ks:
            raise ValueError(f"{len(sets.test)} rows: recall needs at least {min(self.ks) + 1}")
        if len(ks) < len(self.ks):
            log.warning("recall at %s left out, only %d rows", sorted(set(self.ks) - set(ks)), len(sets.test))
        others_M = sets.test_label.bincount()[sets.test_label] - 1
        furthest = max(ks[-1], int(others_M.max()))
        recall_k, precision, average = torch.zeros(len(ks), dtype=torch.float64), 0.0, 0.0
        own = not self.positional
        blocks = neighbours(sets.test, sets.test, furthest + self.positional, leave_one_out=own)
        for first, _, row_BK in blocks:
            rows = slice(first, first + len(row_BK))
            hit_BK = sets.test_label[row_BK[:, int(self.positional) :]] == sets.test_label[rows, None]
            recall_k += hit_BK.cummax(1).values[:, [k - 1 for k in ks]].sum(0)
            precision_B, average_B = at_r(hit_BK, others_M[rows])
            precision, average = precision + float(precision_B.sum()), average + float(average_B.sum())
        numbers = {f"retrieval/recall_at_{k}": 100.0 * float(recall_k[i]) / len(others_M) for i, k in enumerate(ks)}
        if asking := int((others_M > 0).sum()):
            numbers |= {"retrieval/r_precision": 100.0 * precision / asking}
            numbers |= {"retrieval/map_at_r": 100.0 * average / asking}
        return numbers


def at_r(hit_BK: Tensor, others_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) R-precision and (B,) average precision at R in 0..1, R = ``others_B`` <= K; 0 where R is 0."""
    place_K = torch.arange(1, hit_BK.shape[1] + 1)
    counted_BK = (hit_BK & (place_K <= others_B[:, None])).double()
    precision_BK = counted_BK.cumsum(1) / place_K
    r_B = others_B.clamp_min(1)
    return counted_BK.sum(1) / r_B, (precision_BK * counted_BK).sum(1) / r_B


def hits(features_MD: Tensor, label_M: Tensor, ks: Sequence[int], positional: bool = False) -> Tensor:
    """(M, len(ks)) bool: whether one of the k nearest other rows (by cosine) has the row's label.

    A row leaves itself out by its identity. ``positional``, the paper's code: it leaves out whatever comes first, which
    is another row where several are equal or a feature is zero. Raises ValueError when there are too few rows.
    """
    unit_MD = F.normalize(features_MD.float())
    if positional:
        row_MK = nearest(unit_MD, unit_MD, max(ks) + 1)[1][:, 1:]
    else:
        row_MK = nearest(unit_MD, unit_MD, max(ks), leave_one_out=True)[1]
    found_MK = (label_M[row_MK] == label_M[:, None]).cummax(1).values
    return found_MK[:, torch.as_tensor([k - 1 for k in ks])]
