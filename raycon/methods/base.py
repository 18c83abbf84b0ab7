"""What a method is: a module whose forward computes the loss and changes nothing, and one hook that changes state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from raycon.core import dist
from raycon.core.config import MethodOptions
from raycon.core.types import Batch, Mined, Needs, Output, Progress


class Method(nn.Module, ABC):
    """A file in raycon/methods holds ``Options`` and ``build(options, encoder, facts) -> Method``.

    The loop calls ``forward`` through DDP and ``after_step`` after the optimiser has moved. Randomness comes from
    ``mined.seed``; collectives from ``raycon.core.dist``.
    """

    bf16 = False
    """Set by the loop: run the networks (not the similarities) under bf16 autocast."""

    ranks_agree = False
    """The gradient averaged over W ranks is that of one process with the whole batch (BatchNorm aside)."""

    unused_parameters = False
    """Set by a method of which some parameters get no gradient in some steps: DDP must then look for them."""

    def __init__(self, options: MethodOptions) -> None:
        super().__init__()
        self.needs: Needs = options.needs()

    @abstractmethod
    def forward(self, batch: Batch, mined: Mined) -> Output:
        """The loss of this rank's batch. Changes no state but BatchNorm's running statistics."""

    def before_training(self, batches: Iterator[Batch], seed: int) -> None:
        """Called once before the first step of a run (not when it goes on): fill a queue from training batches, say.

        ``batches`` never ends: epochs that the run itself does not see. Every rank takes equally many.
        """

    def after_step(self, keep: Mapping[str, Tensor], progress: Progress) -> None:
        """EMA, queue: the only place where a method's state changes. ``keep`` is what forward left in Output."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """(B, D) unit length: what is indexed for mining. Called in eval mode, without gradient."""

    @abstractmethod
    def encoder(self) -> nn.Module:
        """What evaluations and users receive: (B, C, H, W) -> (B, F)."""

    @torch.no_grad()
    def positives(self, images: Tensor, row: Tensor, label: Tensor, mined: Mined) -> Tensor | None:
        """(B, B) float32 >= 0: the share of image i's target that lies on image j, its own share on the diagonal.

        For the report, which shows it in pictures. The B images (evaluation view, with their rows and weak labels) stand
        for the candidates: the batch of all ranks or the queue. Called in eval mode. None: an image's only positive is
        itself, or no image at all (prototypes, classes).
        """
        return None

    def embed(self, net: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """(B, D) float32 unit length; the network runs in bf16 when asked, what follows in float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            out = net(images)
        return F.normalize(out.float(), dim=1)

    def embed_each(self, net: Callable[[Tensor], Iterable[Tensor]], images: Tensor) -> tuple[Tensor, ...]:
        """``embed`` for a network with several heads: one (B, D) float32 of unit length per head."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            outs = net(images)
        return tuple(F.normalize(out.float(), dim=1) for out in outs)

    @torch.no_grad()
    def embed_shuffled(self, net: nn.Module, images: Tensor, permutation: NDArray[np.int64] | None) -> Tensor:
        """``embed`` with the global batch shuffled over the ranks, so that BatchNorm gives no clue which key is whose
        (MoCo's shuffle-BN). On one rank BatchNorm sees the same set either way, and nothing is shuffled.
        """
        if permutation is None or dist.world() == 1:
            return self.embed(net, images)
        return dist.exchange(self.embed(net, dist.exchange(images, permutation)), dist.inverse(permutation))
