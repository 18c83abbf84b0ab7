"""The losses: candidates, targets, one cross-entropy.

Every method here minimises the cross-entropy between a *target distribution* over candidates and the student's
similarity distribution. A candidate builder makes logits; a target builder says which candidates are right:

    InfoNCE (MoCo, SimCLR)      the other view             one-hot
    ProtoNCE (PCL)              prototypes                 one-hot, temperature per column

Pure functions: no state, device and dtype from the inputs, embeddings of unit length unless said otherwise.
Legend: B rows of this batch, D embedding width, K queue entries, C candidates, P prototypes, R negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# --- candidates: logits (B, C) ----------------------------------------------------------------------------------


def queue_logits(query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """(B, 1+K): the query's own key in column 0, then the queue (MoCo, arXiv 1911.05722, eq. 1)."""
    positive_B1 = (query_BD * key_BD).sum(1, keepdim=True)
    return torch.cat([positive_B1, query_BD @ queue_KD.T], dim=1) / temperature


def prototype_logits(query_BD: Tensor, prototype_CD: Tensor, concentration_C: Tensor) -> Tensor:
    """(B, C): similarity to each prototype over that prototype's own concentration (PCL, arXiv 2005.04966, eq. 11)."""
    return query_BD @ prototype_CD.T / concentration_C


# --- targets ----------------------------------------------------------------------------------------------------


def first_column(logits_BC: Tensor) -> Tensor:
    """(B,) int64: the right candidate is column 0 of every row."""
    return logits_BC.new_zeros(len(logits_BC), dtype=torch.long)


def diagonal(logits_BC: Tensor) -> Tensor:
    """(B,) int64: the right candidate of row i is column i."""
    return torch.arange(len(logits_BC), device=logits_BC.device)


# --- the one loss -----------------------------------------------------------------------------------------------


def cross_entropy(logits_BC: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of -sum_c target_c log softmax(logits)_c.

    ``target`` is (B,) int64 column numbers (one-hot) or (B, C) rows that sum to 1. A candidate with logit -inf is
    excluded; its target must be 0.
    """
    if not target.is_floating_point():
        return F.cross_entropy(logits_BC, target)
    log_p_BC = F.log_softmax(logits_BC, dim=1)
    return -(target * log_p_BC.masked_fill(target == 0, 0.0)).sum(1).mean()


@torch.no_grad()
def accuracy(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Scalar in [0, 1]: how often the right candidate has the largest logit."""
    return (logits_BC.argmax(1) == target_B).float().mean()


# --- sampling of negatives --------------------------------------------------------------------------------------


@torch.no_grad()
def sample_excluding(used: int | Tensor, size: int, exclude_B: Tensor, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """``number`` distinct ids from 0..used-1 without those in ``exclude_B``, uniformly, in random order.

    One random permutation and one cumulative sum, on the device of ``exclude_B``: no Python loop, no host
    synchronisation. ``size`` >= used bounds the ids. Returns (ids (number,), valid (number,) bool): when fewer ids are
    left than asked for, the last entries are not valid (and their ids 0).
    """
    device = exclude_B.device
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(size, device=device, generator=generator)
    allowed = torch.arange(size, device=device) < used
    allowed[exclude_B] = False
    allowed = allowed[order]
    # The j-th allowed id goes to place j; everything else to a place that is thrown away.
    place = torch.where(allowed, allowed.cumsum(0) - 1, number).clamp_(max=number)
    ids = order.new_zeros(number + 1)
    ids[place] = order
    valid = torch.arange(number, device=device) < allowed.sum()
    return torch.where(valid, ids[:number], 0), valid
