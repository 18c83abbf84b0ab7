"""From a configuration to a trained rank: builds data, network, method, and calls the loop. The same for every runtime.

Loaders and data sets are found by name, so that this floor does not depend on them.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path
from typing import Any

import torch

from raycon import methods
from raycon.core import dist
from raycon.core.config import ConfigError, Facts, RunConfig
from raycon.core.log import Metrics, NoMetrics, open_tracker
from raycon.core.types import Loader, LoaderPlan, Progress, Runtime
from raycon.methods.base import Method
from raycon.nn import networks, views
from raycon.training import loop
from raycon.training.checkpoint import CheckpointError

logger = logging.getLogger("raycon")

STOPS = (loop.NotFinite, CheckpointError, ConfigError)
"""Errors that would come again: a run is not tried anew after them."""


def open_data(config: RunConfig, split: str = "train") -> Any:
    """The ImageSet of ``data.name``. Raises ConfigError when there is no such, or its files are missing.

    With ``data.validation``, "train" is without the rows held out, and "validation" is those.
    """
    wanted = "train" if split == "validation" else split
    dataset = importlib.import_module("raycon.data_loaders.datasets").open_config(config.data, wanted)
    if wanted == "train" and config.data.validation:
        kept, held = importlib.import_module("raycon.data_loaders.hold_out").hold_out(
            dataset, config.data.validation, config.seed
        )
        return held if split == "validation" else kept
    return dataset


def facts_of(config: RunConfig, dataset: Any, world: int) -> Facts:
    """What checks and methods need to know of the data. Raises ConfigError for labels that are none of its classes."""
    problems = out_of_range("label", dataset.label, dataset.classes) + out_of_range(
        "weak label", dataset.weak, dataset.weak_classes
    )
    if problems:
        raise ConfigError([f"data.name = {config.data.name!r}: {problem}" for problem in problems])
    return Facts(
        rows=len(dataset),
        classes=len(dataset.weak_classes) or int(dataset.weak.max(initial=-1)) + 1,
        image=dataset.image,
        batch=max(1, config.train.batch),  # 0 is told as a problem; the checks divide by it
        world=max(1, world),
        size=config.data.size,
        epochs=config.train.epochs,
    )


def out_of_range(what: str, label_N: Any, classes: tuple[str, ...]) -> list[str]:
    """The first of the labels that is below -1 (none), or none of the classes where these are named; [] if all are fine."""
    wrong_N = label_N < -1
    if classes:
        wrong_N |= label_N >= len(classes)
    if not wrong_N.any():
        return []
    row = int(wrong_N.argmax())
    allowed = f"0..{len(classes) - 1}" if classes else "0 or more"
    return [
        f"row {row} has {what} {int(label_N[row])}, and {int(wrong_N.sum())} rows have one out of range: give {allowed}, "
        "or -1 for none"
    ]


def loader_plan(
    config: RunConfig, dataset: Any, run_dir: Path, device: torch.device, world: int, rank: int
) -> LoaderPlan:
    mean, std, size = dataset.mean, dataset.std, config.data.size
    needs = config.method.needs()

    def specs(names: tuple[str, ...]) -> tuple[views.ViewSpec, ...]:
        return tuple(views.view_spec(config.data.views, name, size, mean, std) for name in names)

    number = needs.views.count("neighbour")
    for names in (needs.views, needs.warmup_views or needs.views):
        assert len(names) == len(needs.views), "as many warm-up views as views"
        assert names[len(names) - number :] == ("neighbour",) * number, "views of neighbours come last"
    return LoaderPlan(
        specs=specs(needs.views),
        warmup_specs=specs(needs.warmup_views),
        warmup_epochs=needs.warmup_view_epochs if needs.warmup_views else 0,
        neighbour_views=number,
        group=needs.group,
        group_by_label=needs.labels,
        eval_spec=views.eval_spec(size, mean, std),
        batch=config.train.batch,
        seed=config.seed,
        rank=rank,
        world=world,
        device=device,
        workers=config.data.workers,
        cache=Path(config.data.cache or run_dir.parent / ".cache"),
        channels_last=config.model.channels_last,
        augment=config.data.augment,
        nodes=config.data.nodes,
        bf16=config.train.precision == "bf16",
    )


def open_loader(config: RunConfig, dataset: Any, plan: LoaderPlan) -> Loader:
    loader: Loader = importlib.import_module("raycon.data_loaders").open_loader(config.data.loader, dataset, plan)
    return loader


def build_method(config: RunConfig, facts: Facts, channels: int) -> Method:
    """The method with its encoder, initialised from ``seed``: the same weights on every rank."""
    torch.manual_seed(config.seed)
    encoder = networks.build_encoder(config.model, channels)
    method: Method = methods.module(config.method.name).build(config.method, encoder, facts)
    if config.model.sync_bn and dist.world() > 1:
        method = torch.nn.SyncBatchNorm.convert_sync_batchnorm(method)
    return method


def feature_dim(config: RunConfig) -> int:
    """Width of what the method indexes; 0 when it mines nothing."""
    return int(getattr(config.method, "dim", 0)) if config.method.needs().snapshot else 0


def fit_to_world(config: RunConfig, world: int) -> tuple[RunConfig, int]:
    """An elastic run on ``world`` ranks: the global batch in more parts, none larger than on all workers.

    With ``scaling.on_fewer = accumulate`` they are micro-batches of one optimiser step, with ``follow`` each is a step of
    its own: the configuration, and how many steps a global batch is taken in.
    """
    train, scaling = config.train, config.scaling
    if not scaling.min_workers or world >= scaling.workers:
        return config, 1
    most = train.batch // (scaling.workers * train.accumulate)
    local = train.batch // world
    parts = next(p for p in range(1, local + 1) if local % p == 0 and local // p <= max(most, 1))
    if scaling.on_fewer == "follow" and parts % train.accumulate == 0:
        return config, parts // train.accumulate
    return dataclasses.replace(config, train=dataclasses.replace(train, accumulate=parts)), 1


def train_rank(config: RunConfig, run_dir: Path, device: torch.device, runtime: Runtime) -> Progress:
    """Train one rank of a run; the process group is there already, ``runtime`` is the outside world."""
    config, updates = fit_to_world(config, runtime.world)
    torch.set_num_threads(config.scaling.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
        torch.backends.cudnn.benchmark = True
    tracker = open_tracker(config, run_dir, runtime.rank)
    metrics: Metrics = runtime.metrics(tracker) if runtime.rank == 0 else NoMetrics(tracker)
    dataset = open_data(config)
    facts = facts_of(config, dataset, runtime.world)
    loader = open_loader(config, dataset, loader_plan(config, dataset, run_dir, device, runtime.world, runtime.rank))
    metrics.write("event", 0, text=f"loader: {loader.kind}")
    if dataset.dropped:
        text = f"data: {dataset.dropped} unreadable images left out, {len(dataset)} stay (data.on-error = skip)"
        metrics.write("event", 0, text=text, dropped=dataset.dropped)
    method = build_method(config, facts, len(dataset.mean))
    if config.model.compile:
        method.encoder().compile()
    try:
        return loop.train(config, method, loader, runtime, metrics, run_dir, updates)
    finally:
        metrics.close()
        loader.close()
