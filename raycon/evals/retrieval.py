"""Recall@k: is there an image of the same fine class among the k nearest? (MaskCon, arXiv 2303.12756, section 4.)

Queries and gallery are the same: the test rows (the train rows where there is no test split), each leaving itself out.

Shape letters: M rows, D feature width, K neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from raycon.core.config import EvalConfig
from raycon.evals.base import FeatureSets, check
from raycon.evals.knn import nearest

log = logging.getLogger(__name__)

KS = (1, 2, 5, 10, 50, 100)
"""The published numbers of neighbours."""


class Evaluation:
    """Percent of rows with a hit among the first k: "retrieval/recall_at_<k>"."""

    def __init__(self, config: EvalConfig, seed: int = 0) -> None:
        self.ks = KS

    def run(self, sets: FeatureSets) -> dict[str, float]:
        check(sets)
        ks = [k for k in self.ks if k < len(sets.test)]
        if not ks:
            raise ValueError(f"{len(sets.test)} rows: recall needs at least {min(self.ks) + 1}")
        if len(ks) < len(self.ks):
            log.warning("recall at %s left out, only %d rows", sorted(set(self.ks) - set(ks)), len(sets.test))
        hit_MK = hits(sets.test, sets.test_label, ks)
        return {f"retrieval/recall_at_{k}": 100.0 * float(hit_MK[:, i].double().mean()) for i, k in enumerate(ks)}


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
