"""Weighted k-nearest-neighbour classification by cosine, exact (Wu et al. 2018, Unsupervised Feature Learning via
Non-Parametric Instance Discrimination, section 3.4; the protocol of most self-supervised papers).

Shape letters: N stored rows, M queries, D feature width, K neighbours, C classes.

Vote of class c = sum over the k nearest stored rows of class c of exp(cosine / temperature).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

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
_STORED = 2**26
"""Numbers of stored features that are normalised and searched at once: 256 MiB of float32."""
_SHARED = 8
"""As many times ``_QUERIES`` are searched in a block of the stored features before the next block is made."""


class Evaluation:
    """Percent of test rows classified right, for several k at once: "knn/top1_k<k>".

    Without a test split (``sets.test is sets.train``) each row is classified by all others: "knn/loo_top1_k<k>".
    Beyond the features it takes a bounded amount of memory whatever the number of rows: 0.42 GB measured for k = 200,
    1,000 classes and 2,048 dimensions in two blocks.
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
        right = dict.fromkeys(ks, 0)
        for first, cosine_MK, row_MK in neighbours(sets.test, sets.train, ks[-1], leave_one_out=alone):
            truth_M, label_MK = sets.test_label[first : first + len(row_MK)], sets.train_label[row_MK]
            for k in ks:
                guess_M = vote(cosine_MK[:, :k], label_MK[:, :k], sets.classes, self.temperature)
                right[k] += int((guess_M == truth_M).sum())
        name = "knn/loo_top1_k" if alone else "knn/top1_k"
        return {f"{name}{k}": 100.0 * right[k] / len(sets.test) for k in ks}


def neighbours(
    query_MD: Tensor, stored_ND: Tensor, k: int, leave_one_out: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks (first query, (B, k) cosines, (B, k) int64 rows): the k nearest stored rows by cosine. Exact.

    The features need no normalisation; a row of zeros is at cosine 0 of everything. Nearest first; of equal ones the
    engine chooses. ``leave_one_out``: query i is stored row i and never its own neighbour; another row equal to it is.
    Memory beyond the features is bounded whatever M and N. Raises ValueError when there are fewer than k rows to find.
    """
    wanted = k + leave_one_out
    if k < 1 or wanted > len(stored_ND):
        raise ValueError(f"k = {k} of {len(stored_ND)} stored rows{', itself excluded' if leave_one_out else ''}")
    searcher, rows = engine.load(), max(wanted, _STORED // stored_ND.shape[1])
    parts = [slice(first, first + rows) for first in range(0, len(stored_ND), rows)]
    once = _unit(stored_ND) if len(parts) == 1 else None  # all of it in one block: made once
    group = _QUERIES if once is not None else _SHARED * _QUERIES
    for first in range(0, len(query_MD), group):
        unit_BD = _unit(query_MD[first : first + group])
        found: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            unit_SD = torch.empty(0)  # the block before is given back first
            unit_SD = _unit(stored_ND[part]) if once is None else once
            blocks = [_search(searcher, q, unit_SD, min(wanted, len(unit_SD))) for q in unit_BD.split(_QUERIES)]
            cosine_BK, row_BK = torch.cat([c for c, _ in blocks]), torch.cat([r for _, r in blocks]) + part.start
            found = [_merged([*found, (cosine_BK, row_BK)], wanted)]
        (cosine_BK, row_BK) = found[0]
        if leave_one_out:
            other_BK = row_BK != torch.arange(first, first + len(row_BK))[:, None]
            # A row that is not among its own k + 1 nearest (so many equal ones) gives up the last of them instead.
            other_BK[other_BK.all(1), -1] = False
            cosine_BK, row_BK = cosine_BK[other_BK].view(-1, k), row_BK[other_BK].view(-1, k)
        yield first, cosine_BK, row_BK


def nearest(query_MD: Tensor, stored_ND: Tensor, k: int, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """All blocks of ``neighbours`` together: (M, k) cosines and (M, k) rows."""
    blocks = list(neighbours(query_MD, stored_ND, k, leave_one_out))
    return torch.cat([cosine for _, cosine, _ in blocks]), torch.cat([row for _, _, row in blocks])


def _unit(features_BD: Tensor) -> Tensor:
    return F.normalize(features_BD.float()).contiguous()


def _search(searcher: engine.Engine, query_QD: Tensor, stored_SD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(Q, count) cosines and positions. The engine's own distances lose digits near 0; the cosines are taken anew."""
    row_QK = torch.from_numpy(searcher.search(query_QD.numpy(), stored_SD.numpy(), count)[1])
    cosine_QK, part = torch.empty(row_QK.shape), max(1, _GATHERED // (count * stored_SD.shape[1]))
    # One buffer: freshly gathered features of every part would be left behind as holes in the heap.
    near = torch.empty(min(part, len(row_QK)) * count, stored_SD.shape[1])
    for q, row, cosine in zip(query_QD.split(part), row_QK.split(part), cosine_QK.split(part), strict=True):
        gathered = torch.index_select(stored_SD, 0, row.reshape(-1), out=near[: row.numel()])
        torch.bmm(gathered.view(*row.shape, -1), q[:, :, None], out=cosine[:, :, None])
    return cosine_QK, row_QK


def _merged(found: list[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest of what several blocks of stored rows gave."""
    if len(found) == 1:
        return found[0]
    cosine_BK, row_BK = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    cosine_BK, order_BK = cosine_BK.sort(dim=1, descending=True, stable=True)
    return cosine_BK[:, :count].contiguous(), row_BK.gather(1, order_BK[:, :count])


def vote(cosine_MK: Tensor, label_MK: Tensor, classes: int, temperature: float) -> Tensor:
    """(M,) int64: the class with the most weight among the neighbours, the smallest of equal ones."""
    # Relative to the nearest neighbour: the same order of classes, and no overflow at any temperature.
    weight_MK = ((cosine_MK - cosine_MK[:, :1]) / temperature).exp().double()
    votes_MC = torch.zeros(len(cosine_MK), classes, dtype=torch.float64).scatter_add_(1, label_MK, weight_MK)
    return votes_MC.argmax(1)
