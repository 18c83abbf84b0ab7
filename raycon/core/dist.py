"""Ranks and collectives. Everything answers without a process group too: one rank is the same code path.

Shape letters: B rows on this rank, W ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from raycon.core import stream


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


@torch.no_grad()
def gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (W*B, ...) in rank order, without gradient. Every rank has the same B."""
    if world() == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = x.new_empty((world() * x.shape[0], *x.shape[1:]))
    dist.all_gather(list(out.chunk(world())), x)
    return out


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Each rank needs the sum of its own rows only: half of what an all-reduce sends. Gloo's reduce-scatter is an
        # all-reduce underneath, so the parts are exchanged and added here, in rank order.
        grad = grad.contiguous()
        if grad.is_cuda:
            mine = grad.new_empty((len(grad) // world(), *grad.shape[1:]))
            dist.reduce_scatter_tensor(mine, grad)
            return mine
        parts = torch.empty_like(grad)
        dist.all_to_all_single(parts, grad)
        return parts.view(world(), -1, *grad.shape[1:]).sum(0)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Like ``gather``; the gradient of this rank's rows is the sum over all ranks' losses.

    With DDP's averaging the gradient then equals that of the mean loss computed in one process.
    """
    if world() == 1:
        return x
    out: Tensor = _GatherWithGradient.apply(x)  # type: ignore[no-untyped-call]
    return out


def gather_own_gradient(x: Tensor) -> Tensor:
    """Like ``gather``, but this rank's rows are ``x`` itself with its gradient; those of other ranks are constants."""
    if world() == 1:
        return x
    parts = list(gather(x).chunk(world()))
    parts[rank()] = x
    return torch.cat(parts)


@torch.no_grad()
def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over the ranks."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world()


def any_true(flag: bool) -> bool:
    """True on every rank when it is true on one: a small collective, not for every step."""
    if world() == 1:
        return flag
    value = torch.tensor([int(flag)], device=_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def gather_objects(value: Any) -> list[Any]:
    """Small Python values of all ranks, in rank order (our own processes only: they travel pickled)."""
    if world() == 1:
        return [value]
    out: list[Any] = [None] * world()
    dist.all_gather_object(out, value)
    return out


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Rank 0's buffers (BatchNorm statistics) to all: features must not depend on the rank that computes them."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


# --- shuffle-BN -------------------------------------------------------------------------------------------------


def shuffle_permutation(seed: int, batch: int) -> NDArray[np.int64]:
    """The permutation of the global batch for shuffle-BN: from the step's key, so nothing needs broadcasting."""
    return np.random.Generator(np.random.Philox(key=stream.key(seed, 0x5B))).permutation(batch)


def exchange(x: Tensor, permutation: NDArray[np.int64]) -> Tensor:
    """Rank g receives rows ``permutation.reshape(W, -1)[g]`` of the rank-ordered global batch.

    Only the rows that change place travel (all-to-all), not W copies of the batch (MoCo, arXiv 1911.05722, sec. 3.3).
    """
    world_size, me, local = world(), rank(), len(x)
    if world_size == 1:
        return x[torch.as_tensor(permutation, device=x.device)]
    wanted_WB = permutation.reshape(world_size, local)
    send_rows = [rows[rows // local == me] % local for rows in wanted_WB]
    order = torch.as_tensor(np.concatenate(send_rows), device=x.device)
    source = wanted_WB[me] // local
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    receive = [int((source == r).sum()) for r in range(world_size)]
    dist.all_to_all_single(out, x.contiguous()[order], receive, [len(r) for r in send_rows])
    # Rows arrive grouped by sender; put them in the order asked for.
    place = np.empty(local, dtype=np.int64)
    place[np.argsort(source, kind="stable")] = np.arange(local)
    return out[torch.as_tensor(place, device=x.device)]


def inverse(permutation: NDArray[np.int64]) -> NDArray[np.int64]:
    """``exchange(exchange(x, p), inverse(p)) == x``."""
    return np.argsort(permutation, kind="stable")
