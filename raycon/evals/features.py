"""Features of images: extracted once, shared by all evaluations.

Shape letters: N rows, B images of a block, D feature width, C/H/W image.

The controls are the same code with another encoder: ``pixels`` in place of the network, or the network before training.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from raycon.core.config import ConfigError
from raycon.core.types import Images, LoaderPlan
from raycon.evals.base import FeatureSets, Source
from raycon.nn import views


def extract(encoder: Callable[[Tensor], Tensor], blocks: Iterable[Images], rows: int, first: int = 0) -> Tensor:
    """(rows, D) float32 on the CPU: the encoder's features of rows first .. first + rows, whatever the blocks' order.

    A module runs in evaluation mode without gradients and is left in the mode it was in. The encoder gives (B, D);
    ``blocks`` must bring each of the rows exactly once (``Loader.scan`` of one rank does), else ValueError.
    """
    features_ND: Tensor | None = None
    seen_N = torch.zeros(rows, dtype=torch.int64)
    with _evaluating(encoder), torch.inference_mode():
        for block in blocks:
            out_BD = encoder(block.images)
            if out_BD.ndim != 2 or len(out_BD) != len(block.row):
                raise ValueError(f"the encoder gave {tuple(out_BD.shape)} for {len(block.row)} images: give (B, D)")
            row_B = block.row.cpu() - first
            if int(row_B.min()) < 0 or int(row_B.max()) >= rows:
                raise ValueError(f"row {int(row_B.min())} to {int(row_B.max())} in a set of {rows} rows from {first}")
            if features_ND is None:
                features_ND = torch.empty(rows, out_BD.shape[1])
            features_ND[row_B] = out_BD.float().cpu()
            seen_N.index_add_(0, row_B, torch.ones_like(row_B))
    if features_ND is None or int(seen_N.min()) != 1 or int(seen_N.max()) != 1:
        wrong = (seen_N != 1).nonzero().flatten()
        which = f", the first is row {first + int(wrong[0])} ({int(seen_N[wrong[0]])} times)" if len(wrong) else ""
        raise ValueError(f"{len(wrong)} of {rows} rows did not come exactly once{which}")
    # A normal tensor again: inference tensors cannot enter autograd later.
    return features_ND.clone() if features_ND.is_inference() else features_ND


def extract_sets(
    encoder: Callable[[Tensor], Tensor],
    train: Iterable[Images],
    train_label: Tensor,
    test: Iterable[Images] | None = None,
    test_label: Tensor | None = None,
) -> FeatureSets:
    """The FeatureSets of an encoder; without a test set, train stands for both (see FeatureSets)."""
    train_label = train_label.cpu().long()
    train_ND = extract(encoder, train, len(train_label))
    if test is None or test_label is None:
        return FeatureSets(train_ND, train_label, train_ND, train_label)
    return FeatureSets(train_ND, train_label, extract(encoder, test, len(test_label)), test_label.cpu().long())


def scan(source: Source, dataset: Any, resize: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Images]:
    """The rows of ``rank`` of an ImageSet as the encoder wants them: centre crops, normalised with *its* mean and std.

    resize: the shorter side before the crop, see views.eval_spec. Raises ConfigError when the channels do not fit.
    """
    check_channels(dataset, source.mean)
    plan = LoaderPlan(
        specs=(), eval_spec=views.eval_spec(source.size, source.mean, source.std, resize), seed=0,
        batch=min(512, len(dataset)) // world * world or world, rank=rank, world=world, device=source.device,
        workers=source.workers, cache=source.cache,
    )  # fmt: skip
    loader = importlib.import_module("raycon.data_loaders").open_loader("torch", dataset, plan)
    blocks: Iterator[Images] = loader.scan()
    return blocks


def check_channels(dataset: Any, mean: tuple[float, ...]) -> None:
    if len(dataset.mean) != len(mean):
        raise ConfigError(
            [f"data.name = {dataset.name!r} has {len(dataset.mean)} channel(s), the encoder takes {len(mean)}"]
        )


def blocks(images: Tensor, size: int = 512, device: torch.device | str = "cpu") -> Iterator[Images]:
    """(N, C, H, W) images in memory as blocks of ``size`` rows, in order."""
    for first in range(0, len(images), size):
        part = images[first : first + size].to(device)
        yield Images(part, torch.arange(first, first + len(part), device=device))


def pixels(images: Tensor, mean: tuple[float, ...] = (0.0,), std: tuple[float, ...] = (1.0,)) -> Tensor:
    """(B, C*H*W) raw pixels: the control "no encoder". Give the mean and std the images were normalised with per
    channel, and the pixels are 0 to 1 again, which is what published raw-pixel numbers use."""
    shape = (1, -1, 1, 1)
    raw = images.float() * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
    return raw.flatten(1)


class _evaluating:
    """Evaluation mode for a block, each submodule's own mode restored afterwards (frozen parts stay frozen)."""

    def __init__(self, encoder: Any) -> None:
        self.modes = [(m, m.training) for m in encoder.modules()] if isinstance(encoder, nn.Module) else []

    def __enter__(self) -> None:
        for module, _ in self.modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes:
            module.training = mode
