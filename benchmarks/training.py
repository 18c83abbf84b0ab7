"""The training step beside lightly's: the same SimCLR and MoCo v2, data, network, batch and threads.

    python -m benchmarks.training [--quick] [--json FILE]

On the CPU: Fashion-MNIST in colour at 32 px, ResNet-18 (small stem) of width 16 and 64, batch 256; CPU seconds on one
thread, wall seconds on two. On a GPU: ResNet-50 at 224 px in bf16, synthetic images, wall seconds. The other side is
lightly 1.6 as its examples write the loop (its transforms in a DataLoader, one forward per view, NTXentLoss,
update_momentum); both sides start from the same encoder. The bare loop steps the same networks on views that lie in
memory already: forward, the textbook loss, backward, SGD, EMA and queue, nothing else. PCL's official form (per-sample
augmentation, negatives drawn by a Python set difference, fp32) is measured beside raycon's PCL.
Rows that start with "part" show where a step's time goes; they hold no target. --quick: few steps, width 64 with a
batch of 64.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from raycon import methods
from raycon.core.config import Facts, ModelConfig, TrainConfig
from raycon.core.types import Batch, LoaderPlan, Mined, Progress, Snapshot
from raycon.data_loaders import open_loader
from raycon.data_loaders.datasets import ArraySet, open_dataset
from raycon.nn import networks, optim, views
from raycon.training import loop

BATCH, QUEUE, DIM = 256, 4096, 128
CLUSTERS = (500, 1000, 1500)
Part = Callable[[str], None]


def images(side: int, rows: int) -> ArraySet:
    """Fashion-MNIST in colour, padded to 32 px; noise of that size when larger ones are asked for."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    if side == 32:
        found = open_dataset("fashion-mnist")
        assert isinstance(found, ArraySet)
        pixels = np.repeat(np.pad(found.images[:rows], ((0, 0), (2, 2), (2, 2), (0, 0))), 3, axis=3)
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
    nothing = np.full(len(pixels), -1, dtype=np.int64)
    return ArraySet(
        name="benchmark", split="train", images=pixels, label=nothing, weak=nothing, classes=(), mean=mean, std=std
    )


class Setting:
    def __init__(self, width: int, device: torch.device, threads: int = 1, batch: int = BATCH) -> None:
        self.device, self.width, self.threads, self.batch = device, width, threads, batch
        self.gpu = device.type == "cuda"
        self.side = 224 if self.gpu else 32
        self.data = images(self.side, 4 * batch if self.gpu else 60_000)
        self.model = ModelConfig(
            encoder="resnet50" if self.gpu else "resnet18", width=width, stem="imagenet" if self.gpu else "small"
        )

    def encoder(self) -> nn.Module:
        torch.manual_seed(0)
        return networks.build_encoder(self.model, 3)

    def __str__(self) -> str:
        batch = "" if self.batch == BATCH else f", batch {self.batch}"
        threads = "" if self.gpu else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.model.encoder} width {self.width} at {self.side} px{batch}{threads}"

    def clock(self) -> float:
        """Seconds of CPU on one thread, else of the wall; on a GPU, everything that was started being done."""
        if self.gpu:
            torch.cuda.synchronize()
        elif self.threads == 1:
            return time.process_time()
        return time.perf_counter()

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.06, momentum=0.9)


class Raycon:
    """raycon's loop body over its own torch loader."""

    def __init__(self, setting: Setting, name: str, **options: Any) -> None:
        encoder = setting.encoder()
        facts = Facts(
            rows=len(setting.data),
            classes=0,
            image=setting.data.image,
            batch=setting.batch,
            world=1,
            size=setting.side,
            epochs=9,
        )
        self.method = methods.module(name).build(methods.configure(name, **options), encoder, facts)
        self.method.to(setting.device, memory_format=torch.channels_last).train()
        self.method.bf16 = setting.gpu
        self.config = TrainConfig(lr=0.06)
        self.optimizer = optim.build_optimizer(self.method, self.config)
        self.guard = loop.FiniteGuard(self.optimizer, setting.device)
        preset = "simclr" if name == "simclr" else "mocov2"
        spec = views.view_spec(preset, "strong", setting.side, setting.data.mean, setting.data.std)
        plan = LoaderPlan(
            specs=(spec, spec),
            eval_spec=views.eval_spec(setting.side, setting.data.mean, setting.data.std),
            batch=setting.batch,
            seed=0,
            rank=0,
            world=1,
            device=setting.device,
        )
        loader = open_loader("torch", setting.data, plan)
        self.batches: Iterator[Batch] = (batch for epoch in range(10**6) for batch in loader.train(epoch))
        self.snapshot = snapshot(setting) if name == "pcl" else None
        self.step = 0

    def __call__(self, part: Part) -> None:
        batch = next(self.batches)
        part("data and views")
        used = CLUSTERS if self.snapshot is not None else ()
        optim.set_lr(self.optimizer, optim.lr_at(self.config, self.step, 234))
        output = self.method(batch, Mined(self.snapshot, used, self.step, 1, self.step, 10**6))
        part("forward and loss")
        loop.poisoned(output.loss).backward()
        part("backward")
        self.guard.check(output.loss, loop.gradient_norm(self.method, 0.0), self.step, batch)
        self.optimizer.step()
        self.method.after_step(output.keep, Progress(self.step, 10**6, 1))
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        part("optimiser, EMA, queue")


class Bare:
    """The least that trains the same networks: two views that lie in memory, a textbook loss, SGD, EMA and queue."""

    def __init__(self, setting: Setting, name: str, momentum: float) -> None:
        self.setting, self.name, self.momentum = setting, name, momentum
        encoder = setting.encoder()
        width = encoder.features
        if name == "moco":
            head = networks.head("mlp", width, DIM)  # type: ignore[arg-type]
        else:
            head = networks.mlp_head(width, (width,), DIM, last_norm=True, last_affine=True)  # type: ignore[arg-type]
        layout: dict[str, Any] = {"memory_format": torch.channels_last}
        self.student = networks.Branch(encoder, head).to(setting.device, **layout).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.queue = nn.functional.normalize(torch.randn(QUEUE, DIM, device=setting.device), dim=1)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.06, momentum=0.9, weight_decay=1e-4, fused=True
        )
        view = torch.randn(setting.batch, 3, setting.side, setting.side, device=setting.device)
        self.views = (view.to(**layout), view.flip(0).to(**layout))

    def embed(self, network: nn.Module, view: Tensor) -> Tensor:
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.setting.gpu):
            out = network(view)
        return nn.functional.normalize(out.float(), dim=1)

    def __call__(self, part: Part) -> None:
        batch = self.setting.batch
        query = self.embed(self.student, self.views[0])
        if self.name == "moco":
            with torch.no_grad():
                key = self.embed(self.teacher, self.views[1])
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], dim=1) / 0.2
            loss = nn.functional.cross_entropy(logits, torch.zeros(batch, dtype=torch.long, device=query.device))
        else:
            both = torch.cat([query, self.embed(self.student, self.views[1])])
            logits = (both @ both.T / 0.1).fill_diagonal_(-torch.inf)
            other = torch.arange(2 * batch, device=query.device).roll(batch)
            loss = nn.functional.cross_entropy(logits, other)
        part("forward and loss")
        loss.backward()
        part("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.name == "moco":
            with torch.no_grad():
                mine: list[Tensor] = list(self.teacher.parameters())
                theirs: list[Tensor] = list(self.student.parameters())
                torch._foreach_lerp_(mine, theirs, 1 - self.momentum)
                self.queue = torch.cat([self.queue[batch:], key])
        part("optimiser, EMA, queue")


def snapshot(setting: Setting) -> Snapshot:
    """A random mining result: what PCL's step looks up."""
    generator = torch.Generator().manual_seed(0)
    rows = len(setting.data)
    found = Snapshot(
        0,
        tuple(torch.randint(k, (rows,), generator=generator) for k in CLUSTERS),
        tuple(nn.functional.normalize(torch.randn(k, DIM, generator=generator), dim=1) for k in CLUSTERS),
        tuple(torch.full((k,), 0.2) for k in CLUSTERS),
        None,
    )
    return found.to(setting.device)


class Samples(torch.utils.data.Dataset[tuple[Any, int]]):
    """Views of a picture made one by one, as the examples of the field do."""

    def __init__(self, data: ArraySet, transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        from PIL import Image

        pixels = self.data.images[row]
        return self.transform(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)), row


def sample_batches(setting: Setting, transform: Any) -> Iterator[Any]:
    """Batches without end from a DataLoader; its workers' time is not seen by a CPU clock, so there are none then."""
    loader = torch.utils.data.DataLoader(
        Samples(setting.data, transform),
        batch_size=setting.batch,
        shuffle=True,
        drop_last=True,
        num_workers=8 if setting.gpu else 0,
        persistent_workers=setting.gpu,
        pin_memory=setting.gpu,
    )
    while True:
        yield from loader


class Lightly:
    """lightly's SimCLR or MoCo v2 as its examples write them."""

    def __init__(self, setting: Setting, name: str, momentum: float) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
        from lightly.models.utils import deactivate_requires_grad
        from lightly.transforms import MoCoV2Transform, SimCLRTransform

        self.setting, self.name, self.momentum = setting, name, momentum
        self.backbone = setting.encoder().to(setting.device)
        width = self.backbone.features
        kind = SimCLRProjectionHead if name == "simclr" else MoCoProjectionHead
        self.head = kind(width, width, DIM).to(setting.device)
        bank = {"memory_bank_size": (QUEUE, DIM)} if name == "moco" else {}
        self.criterion = NTXentLoss(**bank).to(setting.device)
        self.optimizer = setting.optimizer(nn.ModuleList([self.backbone, self.head]))
        if name == "moco":
            self.slow, self.slow_head = copy.deepcopy(self.backbone), copy.deepcopy(self.head)
            deactivate_requires_grad(self.slow)
            deactivate_requires_grad(self.slow_head)
        transform = (SimCLRTransform if name == "simclr" else MoCoV2Transform)(input_size=setting.side)
        self.batches = sample_batches(setting, transform)

    def __call__(self, part: Part) -> None:
        from lightly.models.utils import update_momentum

        (one, two), _ = next(self.batches)
        one, two = one.to(self.setting.device), two.to(self.setting.device)
        part("data and views")
        if self.name == "moco":
            update_momentum(self.backbone, self.slow, m=self.momentum)
            update_momentum(self.head, self.slow_head, m=self.momentum)
        part("optimiser, EMA, queue")
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.setting.gpu):
            first = self.head(self.backbone(one))
            if self.name == "moco":
                with torch.no_grad():
                    second = self.slow_head(self.slow(two))
            else:
                second = self.head(self.backbone(two))
            loss = self.criterion(first, second)
        part("forward and loss")
        loss.backward()
        part("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        part("optimiser, EMA, queue")


class OfficialForm:
    """PCL's step in the form of its published code: views per sample, negatives by a Python set difference, fp32."""

    def __init__(self, setting: Setting) -> None:
        from torchvision.transforms import v2

        self.setting = setting
        encoder = setting.encoder()
        self.student = networks.Branch(encoder, networks.head("mlp", encoder.features, DIM)).to(setting.device)  # type: ignore[arg-type]
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.queue = nn.functional.normalize(torch.randn(QUEUE, DIM, device=setting.device), dim=1)
        self.optimizer = setting.optimizer(self.student)
        self.snapshot = snapshot(setting)
        one = v2.Compose(
            [
                v2.RandomResizedCrop(setting.side, scale=(0.2, 1.0)),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(9 if setting.side == 32 else 23, (0.1, 2.0))], p=0.5),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(setting.data.mean, setting.data.std),
            ]
        )
        self.batches = sample_batches(setting, lambda image: (one(image), one(image)))
        self.drawn = random.Random(0)

    def prototype_loss(self, query_BD: Tensor, row_B: Tensor) -> Tensor:
        total = query_BD.new_zeros(())
        for assignment, prototypes, density in zip(*self.snapshot[1:4], strict=True):
            own = assignment[row_B]
            others = list(set(range(len(prototypes))) - set(own.tolist()))
            negatives = self.drawn.sample(others, min(256, len(others)))
            column = torch.cat([own, torch.tensor(negatives, device=own.device)])
            logits = query_BD @ prototypes[column].T / density[column]
            total = total + nn.functional.cross_entropy(logits, torch.arange(len(own), device=own.device))
        return total / len(CLUSTERS)

    def __call__(self, part: Part) -> None:
        (one, two), row = next(self.batches)
        one, two, row = (x.to(self.setting.device) for x in (one, two, row))
        part("data and views")
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.data = mine.data * 0.999 + theirs.data * 0.001
            key = nn.functional.normalize(self.teacher(two), dim=1)
        part("optimiser, EMA, queue")
        query = nn.functional.normalize(self.student(one), dim=1)
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone().T], dim=1) / 0.2
        loss = nn.functional.cross_entropy(logits, row.new_zeros(len(row))) + self.prototype_loss(query, row)
        part("forward and loss")
        loss.backward()
        part("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.queue = torch.cat([self.queue[self.setting.batch :], key])
        part("optimiser, EMA, queue")


Times = dict[str, list[float]]


def turns(
    setting: Setting, sides: dict[str, Callable[[Part], None]], repeats: int
) -> tuple[Times, dict[str, dict[str, float]]]:
    """Seconds of every step of each side, taken in turns after one that does not count, and medians of their parts."""
    totals: Times = defaultdict(list)
    parts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(repeats + 1):
        for name, step in sides.items():
            spent: dict[str, float] = defaultdict(float)
            start = last = setting.clock()

            def part(what: str, spent: dict[str, float] = spent) -> None:
                nonlocal last
                now = setting.clock()
                spent[what] += now - last
                last = now

            step(part)
            if turn:
                totals[name].append(setting.clock() - start)
                for what, seconds in spent.items():
                    parts[name][what].append(seconds)
    for name, values in totals.items():
        sys.stderr.write(
            f"{setting}: {name}: median {statistics.median(values):.3f} s, {min(values):.3f} .. {max(values):.3f}\n"
        )
    return totals, {n: {w: statistics.median(v) for w, v in p.items()} for n, p in parts.items()}


def compare(setting: Setting, name: str, repeats: int, target: float) -> list[harness.Row]:
    """One method at one width against lightly and the bare loop."""
    options: dict[str, Any] = {"dim": DIM}
    options |= {"queue": QUEUE, "momentum": 0.99} if name == "moco" else {"projector": (setting.encoder().features,)}
    sides: dict[str, Callable[[Part], None]] = {
        "raycon": Raycon(setting, name, **options),
        "bare": Bare(setting, name, 0.99),
    }
    lightly = importlib.util.find_spec("lightly") is not None
    if lightly:
        sides["lightly"] = Lightly(setting, name, 0.99)
    seconds, parts = turns(setting, sides, repeats)
    median = {side: statistics.median(values) for side, values in seconds.items()}
    what, bare = f"{name} {setting}", median["bare"]
    row = harness.at_most(f"{what}: step / a bare loop on views in memory (s)", median["raycon"], bare, 1.05)
    rows = [harness.paired(row, seconds["raycon"], seconds["bare"])]
    if not lightly:
        sys.stderr.write("lightly is not installed (pip install 'raycon[bench]'): not compared\n")
        return rows
    rate = f"{what}: steps/s over lightly's"
    row = harness.at_least(rate, 1 / median["raycon"], 1 / median["lightly"], target, floor=1 / bare)
    rows.append(harness.paired(row, seconds["lightly"], seconds["raycon"]))
    for part, value in parts["raycon"].items():
        rows.append(harness.shown(f"part of {what}: {part} (s)", value, parts["lightly"][part]))
    return rows


def official(setting: Setting, repeats: int) -> harness.Row:
    options: dict[str, Any] = {"queue": QUEUE, "dim": DIM, "clusters": CLUSTERS, "negatives": 256, "warmup_epochs": 0}
    sides: dict[str, Callable[[Part], None]] = {
        "raycon": Raycon(setting, "pcl", **options),
        "official form": OfficialForm(setting),
    }
    seconds, _ = turns(setting, sides, repeats)
    claim = f"pcl {setting}: steps/s over the official form's"
    rate = 1 / statistics.median(seconds["raycon"]), 1 / statistics.median(seconds["official form"])
    row = harness.at_least(claim, *rate, 3.0) if setting.gpu else harness.shown(claim, *rate)
    return harness.paired(row, seconds["official form"], seconds["raycon"])


def measure(quick: bool) -> list[harness.Row]:
    if torch.cuda.is_available():
        setting = Setting(64, torch.device("cuda"))
        rows = [row for name in ("simclr", "moco") for row in compare(setting, name, 8 if quick else 20, 2.0)]
        return [*rows, official(setting, 4 if quick else 20)]
    sys.stderr.write("no GPU here: ResNet-50 at 224 px in bf16, and PCL's official form on a GPU, are not measured\n")
    rows = []
    # Width, threads, batch, turns, the least times lightly's speed.
    cases = [(16, 1, BATCH, 9, 1.25), (16, 2, BATCH, 9, 1.25), (64, 1, BATCH, 3, 1.0), (64, 2, BATCH, 5, 1.0)]
    if quick:
        cases = [(16, 1, BATCH, 3, 1.25), (16, 2, BATCH, 5, 1.25), (64, 2, 64, 3, 1.0)]
    for width, threads, batch, repeats, target in cases:
        if threads > (os.cpu_count() or 1):
            sys.stderr.write(f"{threads} threads are not measured: there is one core\n")
            continue
        torch.set_num_threads(threads)
        setting = Setting(width, torch.device("cpu"), threads, batch)
        for name in ("simclr", "moco"):
            rows += compare(setting, name, repeats, target)
        if width == 16 and threads == 1:
            rows.append(official(setting, repeats))
    return rows


if __name__ == "__main__":
    harness.main(__doc__ or "", measure)
