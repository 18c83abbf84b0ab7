"""The losses: candidates, targets, one cross-entropy.

Every method here minimises the cross-entropy between a *target distribution* over candidates and the student's
similarity distribution. A candidate builder makes logits; a target builder says which candidates are right:

    InfoNCE (MoCo, SimCLR)      the other view             one-hot
    ProtoNCE (PCL)              prototypes                 one-hot, temperature per column
    ReSSL, SCE                  the queue (and own key)    softmax of the teacher, mixed with one-hot
    SupCon, Cl-InfoNCE, WCL     the other rows             uniform over those of the same label, cluster, component

Pure functions: no state, device and dtype from the inputs, embeddings of unit length unless said otherwise.
Legend: B rows of this batch, D embedding width, K queue entries, C candidates, P prototypes, R negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a (rows, C) block of logits that is worked on at once. On a CPU: what the last cache holds (the products
# get slower with few rows: a quarter of this costs a tenth more, a sixteenth three times as much, a 65,536 queue). On a
# GPU, where the whole is fastest, a bound on memory.
BLOCK_CPU, BLOCK_GPU = 2**22, 2**28

# --- candidates: logits (B, C) ----------------------------------------------------------------------------------


def queue_logits(query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """(B, 1+K): the query's own key in column 0, then the queue (MoCo, arXiv 1911.05722, eq. 1).

    Keys and queue are constants: only the query receives a gradient.
    """
    logits: Tensor = _QueueLogits.apply(query_BD, query_BD, key_BD, queue_KD, temperature)  # type: ignore[no-untyped-call]
    return logits


class _QueueLogits(torch.autograd.Function):
    """Written out so that the product lands where it stays: putting two parts together costs as much as the product.

    The query comes twice, for the queue and for its own key: so its gradients are added one after the other to those of
    other losses, as autograd does with the parts, and the sums keep their bits.
    """

    @staticmethod
    def forward(
        ctx: Any, query_BD: Tensor, same_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(key_BD, queue_KD)
        ctx.temperature = temperature
        logits_BC = query_BD.new_empty(len(query_BD), 1 + len(queue_KD))
        torch.mm(query_BD, queue_KD.T, out=logits_BC[:, 1:])
        logits_BC[:, 0] = (same_BD * key_BD).sum(1)
        return logits_BC.div_(temperature)

    @staticmethod
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor | None, ...]:
        assert not any(ctx.needs_input_grad[2:4]), "detach keys and queue"
        key_BD, queue_KD = ctx.saved_tensors
        grad_BC = grad_BC / ctx.temperature
        return grad_BC[:, 1:] @ queue_KD, grad_BC[:, :1] * key_BD, None, None, None


def prototype_logits(query_BD: Tensor, prototype_CD: Tensor, concentration_C: Tensor) -> Tensor:
    """(B, C): similarity to each prototype over that prototype's own concentration (PCL, arXiv 2005.04966, eq. 11)."""
    return query_BD @ prototype_CD.T / concentration_C


def pair_logits(query_BD: Tensor, key_CD: Tensor, temperature: float, own_B: Tensor | None = None) -> Tensor:
    """(B, C): every query with every key of a batch; key ``own_B[i]`` is query i itself and no candidate of it (-inf).

    SimCLR (arXiv 2002.05709, eq. 1), SupCon (arXiv 2004.11362, eq. 2), WCL (arXiv 2110.04770).
    """
    logits_BC = query_BD @ key_CD.T / temperature
    return logits_BC if own_B is None else logits_BC.scatter(1, own_B[:, None], -torch.inf)


def own_columns(query_BD: Tensor, rank: int) -> Tensor:
    """(B,) int64: where this rank's rows are among the rows of all ranks, gathered in rank order."""
    return torch.arange(len(query_BD), device=query_BD.device) + rank * len(query_BD)


# --- targets ----------------------------------------------------------------------------------------------------


def first_column(logits_BC: Tensor) -> Tensor:
    """(B,) int64: the right candidate is column 0 of every row."""
    return logits_BC.new_zeros(len(logits_BC), dtype=torch.long)


def diagonal(logits_BC: Tensor) -> Tensor:
    """(B,) int64: the right candidate of row i is column i."""
    return torch.arange(len(logits_BC), device=logits_BC.device)


def own_and(weight_BK: Tensor, share: float = 1.0) -> Tensor:
    """(B, 1+K) rows that sum to 1: the own key (column 0) with weight 1 beside weights >= 0 of the queue.

    Weights 0 / 1 by class are SupCon over a queue (MaskCon's "grafit"), soft ones are MaskCon's target. share: how much
    of that; the rest, 1 - share, is one-hot of column 0.
    """
    target_BC = weight_BK.new_empty(len(weight_BK), 1 + weight_BK.shape[1], dtype=torch.float32)
    unit_B1 = share / (1 + weight_BK.sum(1, keepdim=True))
    torch.mul(weight_BK, unit_B1, out=target_BC[:, 1:])
    target_BC[:, :1] = unit_B1 + (1 - share)
    return target_BC


@torch.no_grad()
def masked_similarity(
    key_BD: Tensor, queue_KD: Tensor, mask_BK: Tensor, temperature: float, official: bool = False
) -> Tensor:
    """(B, K) in [0, 1]: exp(key . queue / temperature) where the mask holds, over the largest of the row; 0 elsewhere.

    The soft labels of MaskCon (arXiv 2303.12756); a row of which nothing is in the mask is 0. ``official``: as
    the paper's code computes it, the maximum taken over masked similarities of 0 too. That gives the same numbers but
    where all similarities of the mask are far below 0 (underflow), and NaN for rows of which nothing is left.
    """
    similarity_BK = (key_BD @ queue_KD.T).div_(temperature)
    if official:
        similarity_BK = similarity_BK * mask_BK
        weight_BK = (similarity_BK - similarity_BK.amax(1, keepdim=True)).exp() * mask_BK
        weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
        return weight_BK / weight_BK.amax(1, keepdim=True)
    similarity_BK.masked_fill_(~mask_BK, -torch.inf)
    largest_B1 = similarity_BK.amax(1, keepdim=True)
    return similarity_BK.sub_(torch.where(largest_B1 == -torch.inf, 0.0, largest_B1)).exp_()


def other_view(query_BD: Tensor, rank: int) -> Tensor:
    """(B,) int64: where the other view of each row is, when a rank's rows are B/2 first views, then the B/2 second."""
    local = len(query_BD)
    return (torch.arange(local, device=query_BD.device) + local // 2) % local + rank * local


def same_cluster(id_B: Tensor, id_C: Tensor, own_B: Tensor | None = None) -> Tensor:
    """(B, C) bool: candidates whose cluster (any integer) is the row's; not candidate ``own_B[i]``, row i itself."""
    positive_BC = id_B[:, None] == id_C[None, :]
    return positive_BC if own_B is None else positive_BC.scatter(1, own_B[:, None], False)


def unlabelled_alone(label_B: Tensor, row_B: Tensor) -> Tensor:
    """(B,) int64 cluster ids: the label, or where there is none (-1) a negative number that only this row has."""
    return torch.where(label_B < 0, -1 - row_B, label_B)


def uniform_over(positive_BC: Tensor) -> Tensor:
    """(B, C) float32: equal weights over a row's positives, so that the mean is taken outside of the logarithm
    (SupCon's L_out, arXiv 2004.11362, eq. 2). A row without positives gets zeros: it adds nothing to the loss.
    """
    positive_BC = positive_BC.float()
    return positive_BC / positive_BC.sum(1, keepdim=True).clamp_min(1)


@torch.no_grad()
def relational_target(teacher_BC: Tensor, own_B: Tensor, weight: float) -> Tensor:
    """(B, C): weight * one-hot of column ``own_B`` + (1 - weight) * softmax of the teacher's logits (0 <= weight <= 1).

    ReSSL with weight 0 (arXiv 2107.09282, eq. 4), SCE (arXiv 2111.14585). Candidates with the logit -inf get nothing
    of the second part; a row of which nothing is left is one-hot.
    """
    soft_BC = torch.softmax(teacher_BC, dim=1).mul_(1 - weight)
    own_B1 = soft_BC.new_full((len(soft_BC), 1), weight)
    # A row of which nothing is left is NaN throughout. On a CPU it is cheap to see that there is none.
    if soft_BC.is_cuda or bool(soft_BC[:, 0].isnan().any()):
        nothing_B1 = teacher_BC.amax(1, keepdim=True) == -torch.inf
        soft_BC.masked_fill_(nothing_B1, 0.0)
        own_B1 = torch.where(nothing_B1, 1.0, own_B1)
    return soft_BC.scatter_add_(1, own_B[:, None], own_B1)


# --- the one loss -----------------------------------------------------------------------------------------------


def cross_entropy(logits_BC: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of -sum_c target_c log softmax(logits)_c.

    ``target`` is (B,) int64 column numbers (one-hot) or (B, C) rows that sum to 1. A candidate with logit -inf is
    excluded; its target must be 0.
    """
    if not target.is_floating_point():
        return F.cross_entropy(logits_BC, target)
    loss: Tensor = _SoftCrossEntropy.apply(logits_BC, target)  # type: ignore[no-untyped-call]
    return loss


class _SoftCrossEntropy(torch.autograd.Function):
    """The mean over rows of -sum_c target_c log softmax(logits)_c, and its gradient p sum_c target_c - target.

    Written out because a queue of 65,536 makes every pass over (B, C) numbers count: two tensors of that size here,
    seven when autograd keeps the books. The target is a constant.
    """

    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, target_BC: Tensor) -> Tensor:
        assert not target_BC.requires_grad, "detach the target"
        log_p_BC = torch.log_softmax(logits_BC, dim=1).clamp_(min=torch.finfo(logits_BC.dtype).min)  # 0 x -inf is 0
        ctx.save_for_backward(log_p_BC, target_BC)
        return -torch.linalg.vecdot(target_BC, log_p_BC).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        log_p_BC, target_BC = ctx.saved_tensors
        gradient_BC = log_p_BC.exp().mul_(target_BC.sum(1, keepdim=True)).sub_(target_BC)
        return gradient_BC.mul_(grad / len(target_BC)), None


def by_rows(
    part: Callable[..., tuple[Tensor, ...]], query_BD: tuple[Tensor, ...], candidates: int
) -> tuple[Tensor, ...]:
    """``part(rows, *query_BD)`` in blocks of rows, so that no (B, C) array of logits ever is in memory.

    part: given a slice of rows and these rows of each query, their mean loss and any number of mean metrics. The loss
    must be a mean over rows. candidates: C, what one row's logits number. Each block's gradient by the queries is taken
    while its logits are in the caches; nothing but the queries receives a gradient. One block: a plain call.
    """
    rows = len(query_BD[0])
    block = max((BLOCK_GPU if query_BD[0].is_cuda else BLOCK_CPU) // candidates, 1)
    if block >= rows:
        return part(slice(0, rows), *query_BD)
    return _ByRows.apply(part, block, *query_BD)  # type: ignore[no-untyped-call,no-any-return]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Callable[..., tuple[Tensor, ...]], block: int, *query_BD: Tensor) -> tuple[Tensor, ...]:
        rows = len(query_BD[0])
        gradients = [torch.empty_like(q) for q in query_BD]
        means: list[Tensor] = []
        for start in range(0, rows, block):
            here = slice(start, min(start + block, rows))
            queries = [q[here].detach().requires_grad_(any(ctx.needs_input_grad)) for q in query_BD]
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                loss, *metrics = part(here, *queries)
            share = (here.stop - here.start) / rows
            if any(ctx.needs_input_grad):
                for whole, found in zip(gradients, torch.autograd.grad(loss, queries), strict=True):
                    torch.mul(found, share, out=whole[here])
            found_means = [share * value.detach() for value in (loss, *metrics)]
            means = [a + b for a, b in zip(means, found_means, strict=True)] if means else found_means
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*means[1:])
        return tuple(means)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * whole for whole in ctx.saved_tensors)


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_KD: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The own key against the queue: (mean loss, how often the own key is nearest)."""

    def part(rows: slice, query_RD: Tensor) -> tuple[Tensor, ...]:
        logits_RC = queue_logits(query_RD, key_BD[rows], queue_KD, temperature)
        return cross_entropy(logits_RC, first_column(logits_RC)), first_accuracy(logits_RC)

    return by_rows(part, (query_BD,), 1 + len(queue_KD))


def class_cross_entropy(logits_BY: Tensor, label_B: Tensor) -> Tensor:
    """Cross-entropy of a classifier, mean over the rows that have a label (>= 0); 0 when none has."""
    total = F.cross_entropy(logits_BY, label_B, ignore_index=-1, reduction="sum")
    return total / (label_B >= 0).sum().clamp(min=1)


@torch.no_grad()
def accuracy(logits_BC: Tensor, target_B: Tensor) -> Tensor:
    """Scalar in [0, 1]: how often the right candidate has the largest logit (of equal ones the first counts)."""
    return (logits_BC.argmax(1) == target_B).float().mean()


@torch.no_grad()
def first_accuracy(logits_BC: Tensor) -> Tensor:
    """``accuracy`` where column 0 is right, in a quarter of the time: no candidate has a larger logit."""
    return (logits_BC[:, 0] >= logits_BC.amax(1)).float().mean()


# --- sampling of negatives --------------------------------------------------------------------------------------


@torch.no_grad()
def sample_excluding(used: int | Tensor, size: int, exclude_B: Tensor, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """``number`` distinct ids from 0..used-1 without those in ``exclude_B``, uniformly, in random order.

    One random permutation and one cumulative sum, on the device of ``exclude_B``: no Python loop, no host
    synchronisation. ``size`` >= used bounds the ids. Returns (ids (number,), valid (number,) bool): when fewer ids are
    left than asked for, the last entries are not valid (and their ids 0). On a CPU, few of many ids are drawn one by one
    and repeats thrown away, which is the same distribution in a fifth of the time.
    """
    device = exclude_B.device
    if device.type == "cpu" and isinstance(used, int) and used >= 16384 and 4 * (number + len(exclude_B)) <= used:
        return _draw_excluding(used, exclude_B, number, seed), torch.ones(number, dtype=torch.bool)
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


def _draw_excluding(used: int, exclude_B: Tensor, number: int, seed: int) -> Tensor:
    """``number`` distinct ids of 0..used-1 without those in ``exclude_B``: rejection sampling, for number << used."""
    generator = np.random.Generator(np.random.SFC64(seed & (2**64 - 1)))
    place = np.empty(used, dtype=np.int32)  # half of the memory traffic of int64
    exclude = exclude_B.numpy()
    draws = np.empty(0, dtype=np.int32)
    count = number + len(exclude_B)
    while True:
        # So many draws of `used` ids are expected to hold `count` different ones; a little more, to need one round.
        more = generator.integers(0, used, int(-math.log1p(-count / used) * used * 1.02) + 64, dtype=np.int32)
        draws = np.concatenate([draws, more]) if len(draws) else more
        order = np.arange(len(draws), dtype=np.int32)
        place[draws[::-1].copy()] = order[::-1].copy()  # the last write stays: where an id was drawn first
        place[exclude] = -1
        fresh = draws[place[draws] == order]
        if len(fresh) >= number:
            return torch.from_numpy(fresh[:number].astype(np.int64))
