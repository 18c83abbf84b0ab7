"""Accuracy at equal cost beside lightly's: MoCo v2 and SimCLR on Fashion-MNIST, three seeds, the same evaluation.

    python -m benchmarks.accuracy [--quick] [--json FILE] [--go-on FILE [--runs N]]

Both sides: the same narrow ResNet-10 with the same first weights, images, epochs, batch, head, temperature, teacher
momentum, queue length, SGD and cosine schedule (lightly's tutorials': lr 0.06, momentum 0.9, weight decay 5e-4), and
raycon's evaluators (kNN with k = 20, linear probe; the ten classes). lightly trains with its own transforms, losses,
update_momentum and a plain loop over a DataLoader; raycon with its loop, its views (presets mocov2 and simclr: the
parameters of lightly's MoCoV2Transform and SimCLRTransform) and its losses. What differs: the random numbers; blur
(three sigma of exact weights here, PIL's approximation there); lightly moves the teacher before a step, raycon after
it; the memory format. A third, raycon's own views for these pictures, is shown without a promise.

Not worse: the mean over the seeds is at least the other's less the spread of the seeds, which is largest minus smallest
on the side where that is more. "CPU s" is the training alone, on one thread.

--go-on FILE keeps every finished run in FILE and does not repeat those that are there; --runs N ends after N new ones.
Default: 160 steps a run, about 10 minutes of one core; --quick: 40 steps of a narrower network, enough to see that it
works and too few to mean more.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from benchmarks.methods_fashion import evaluate, part_of, train
from benchmarks.training import Samples
from raycon import methods
from raycon.core.config import CheckpointConfig, EvalConfig, LogConfig, RunConfig, RunDirConfig
from raycon.data_loaders.datasets import ImageSet, open_dataset
from raycon.nn import networks, optim
from raycon.recipes import recipe
from raycon.training.runtime import choose_device

QUEUE, DIM, MOMENTUM = 4096, 128, 0.99
TEMPERATURE = {"moco": 0.2, "simclr": 0.1}
SIDES = ("raycon", "lightly", "raycon, its own views")
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Setting:
    rows: int
    test_rows: int
    epochs: int
    batch: int
    width: int
    seeds: tuple[int, ...]
    linear_epochs: int


@dataclass(frozen=True)
class Result:
    """One trained encoder: accuracies in percent, CPU seconds of the training."""

    method: str
    side: str
    seed: int
    knn: float
    linear: float
    seconds: float


def configure(method: str, side: str, seed: int, setting: Setting, folder: Path) -> RunConfig:
    """What both sides are given; ``data.views`` is raycon's only."""
    base = recipe("fashion-mnist-moco-cpu")
    options: dict[str, Any] = {"dim": DIM, "temperature": TEMPERATURE[method]}
    if method == "moco":
        options |= {"queue": QUEUE, "momentum": MOMENTUM}
    else:
        options |= {"projector": (8 * setting.width,)}
    views = "fashion" if side == SIDES[2] else "mocov2" if method == "moco" else "simclr"
    return dataclasses.replace(
        base,
        seed=seed,
        runtime="local",
        run=RunDirConfig(dir=str(folder)),
        method=methods.configure(method, **options),
        model=dataclasses.replace(base.model, width=setting.width),
        data=dataclasses.replace(base.data, views=views, loader="torch"),
        train=dataclasses.replace(
            base.train, epochs=setting.epochs, batch=setting.batch, lr=0.06, weight_decay=5e-4, warmup_epochs=0
        ),
        checkpoint=CheckpointConfig(every_epochs=setting.epochs, keep=1),
        evals=EvalConfig(names=(), knn_k=(20,), linear_epochs=setting.linear_epochs),
        log=LogConfig(quiet=True),
    )


def lightly_train(config: RunConfig, dataset: Any, device: torch.device) -> nn.Module:
    """lightly's MoCo v2 or SimCLR as its tutorials write it; the encoder starts from raycon's weights."""
    import copy

    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform, SimCLRTransform

    moco, settings = config.method.name == "moco", config.train
    torch.manual_seed(config.seed)
    backbone = networks.build_encoder(config.model, len(dataset.mean)).to(device)
    width = backbone.features
    head = (MoCoProjectionHead if moco else SimCLRProjectionHead)(width, width, DIM).to(device)
    slow, slow_head = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(slow)
    deactivate_requires_grad(slow_head)
    bank = {"memory_bank_size": (QUEUE, DIM)} if moco else {}
    criterion = NTXentLoss(temperature=TEMPERATURE[config.method.name], **bank).to(device)
    optimizer = torch.optim.SGD(
        [*backbone.parameters(), *head.parameters()],
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    normalize = {"mean": list(dataset.mean), "std": list(dataset.std)}
    transform = (MoCoV2Transform if moco else SimCLRTransform)(input_size=config.data.size, normalize=normalize)
    batches = torch.utils.data.DataLoader(
        Samples(dataset, transform),
        batch_size=settings.batch,
        shuffle=True,
        drop_last=True,
        num_workers=8 if device.type == "cuda" else 0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: optim.lr_at(settings, step, len(batches)) / settings.lr
    )
    backbone.train()
    for _ in range(settings.epochs):
        for (one, two), _row in batches:
            first = head(backbone(one.to(device)))
            if moco:
                update_momentum(backbone, slow, m=MOMENTUM)
                update_momentum(head, slow_head, m=MOMENTUM)
                with torch.no_grad():
                    second = slow_head(slow(two.to(device)))
            else:
                second = head(backbone(two.to(device)))
            loss = criterion(first, second)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return backbone.eval()


def run(method: str, side: str, seed: int, setting: Setting, dataset: ImageSet, test: ImageSet) -> Result:
    """Train one encoder and evaluate it."""
    device = choose_device(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = configure(method, side, seed, setting, folder)
        start = time.process_time()
        if side == UNTRAINED:
            torch.manual_seed(seed)
            encoder = networks.build_encoder(config.model, len(dataset.mean)).eval().to(device)
        elif side == "lightly":
            encoder = lightly_train(config, dataset, device)
        else:
            encoder = train(config, dataset, folder, device)
        seconds = time.process_time() - start
        knn, linear, _ = evaluate(encoder, config, dataset, test, device)
    return Result(method, side, seed, knn, linear, seconds)


class Enough(Exception):
    """So many new runs as were asked for are done."""


def runs(setting: Setting, kept: Path | None, most: int = 0) -> Iterator[Result]:
    """All runs, the sides in turns; those in ``kept`` are taken from there, the others are added to it.

    Raises Enough before new run number ``most`` + 1 (0: no such end).
    """
    new = 0
    about = dataclasses.asdict(setting) | {"seeds": None}
    found: dict[tuple[str, str, int], Result] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            if told.pop("setting") == about:
                result = Result(**told)
                found[result.method, result.side, result.seed] = result
    whole, test = open_dataset("fashion-mnist"), open_dataset("fashion-mnist", split="test")
    dataset, test = part_of(whole, setting.rows, "none"), part_of(test, setting.test_rows, "none")
    wanted = [(method, side, seed) for seed in setting.seeds for method in TEMPERATURE for side in SIDES[:2]]
    wanted += [("moco", UNTRAINED, seed) for seed in setting.seeds]
    wanted += [(method, SIDES[2], seed) for seed in setting.seeds for method in TEMPERATURE]
    for method, side, seed in wanted:
        if (method, side, seed) in found:
            result = found[method, side, seed]
        else:
            if most and new == most:
                raise Enough
            new += 1
            result = run(method, side, seed, setting, dataset, test)
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(result) | {"setting": about}) + "\n")
        sys.stderr.write(
            f"{method:7} {side:22} seed {seed}: kNN {result.knn:.2f}, linear {result.linear:.2f}, "
            f"{result.seconds:.0f} CPU s\n"
        )
        yield result


def claims(results: list[Result]) -> list[harness.Row]:
    rows = []
    for method in TEMPERATURE:
        sides = {side: [r for r in results if (r.method, r.side) == (method, side)] for side in SIDES}
        seeds = len(sides["raycon"])
        for what in ("knn", "linear"):
            values = {side: [getattr(r, what) for r in of] for side, of in sides.items()}
            ours, other, own = (statistics.mean(values[side]) for side in SIDES)
            spread = max(max(v) - min(v) for v in (values["raycon"], values["lightly"]))
            claim = f"{method}: {what} accuracy, percent, mean of {seeds} seeds: raycon over lightly"
            between = (min(values["raycon"]) / max(values["lightly"]), max(values["raycon"]) / min(values["lightly"]))
            row = harness.at_least(claim, ours, other, 1 - spread / other)
            rows.append(dataclasses.replace(row, spread=between))
            rows.append(harness.shown(f"{method}: {what} accuracy: raycon with its own views over lightly", own, other))
            untrained = statistics.mean(getattr(r, what) for r in results if r.side == UNTRAINED)
            rows.append(harness.shown(f"{method}: {what} accuracy: raycon over the untrained encoder", ours, untrained))
        seconds = {side: statistics.median(r.seconds for r in of) for side, of in sides.items()}
        rows.append(harness.at_most(f"{method}: CPU s of a training", seconds["raycon"], seconds["lightly"], 1.0))
    return rows


def measure(quick: bool, kept: Path | None = None, most: int = 0) -> list[harness.Row]:
    if importlib.util.find_spec("lightly") is None:
        sys.stderr.write("lightly is not installed (pip install 'raycon[bench]'): not compared\n")
        return []
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    setting = Setting(10_240, 10_000, 4, 256, 16, (0, 1, 2), 50)
    if quick:
        setting = Setting(5120, 2000, 2, 256, 8, (0, 1, 2), 10)
    return claims(list(runs(setting, kept, most)))


def main(argv: list[str] | None = None) -> list[harness.Row]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--go-on", type=Path)
    parser.add_argument("--runs", type=int, default=0)
    asked, rest = parser.parse_known_args(argv)
    try:
        return harness.main(__doc__ or "", lambda quick: measure(quick, asked.go_on, asked.runs), rest)
    except Enough:
        sys.stderr.write(f"the rest another time: --go-on {asked.go_on}\n")
        return []


if __name__ == "__main__":
    main()
