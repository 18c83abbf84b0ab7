"""What a method adds to its encoder: heads, losses, mining look-ups, EMA and queue, as a share of the encoder's time.

    python -m benchmarks.losses [--quick] [--json FILE]

Batch 256, queue 65,536, D = 128, ResNet-18 (small stem) at 32 px, one thread, CPU seconds. "Ours" is a whole step with
an encoder that costs nothing (it returns given features, one per image), and the EMA of the real encoder; "other" is
the real encoder's forward and backward of the views that carry gradient and forward of the teacher's views. --quick
measures the encoder on 32 images and multiplies (its time is linear in the images).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from raycon import methods
from raycon.core.config import Facts, ModelConfig, TrainConfig
from raycon.core.types import Batch, Mined, Progress, Snapshot
from raycon.methods.base import Method
from raycon.nn import networks, optim
from raycon.training import loop

BATCH, QUEUE, DIM, ROWS = 256, 65536, 128, 60_000
CLUSTERS = (2500, 5000, 10000)


class Given(nn.Module):
    """An encoder for free: an image is its features already."""

    features = 512

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def configured(name: str) -> Any:
    known = {f.name for f in dataclasses.fields(methods.options(name))}
    wanted = {"queue": QUEUE, "dim": DIM, "clusters": CLUSTERS, "negatives": 2048, "k": CLUSTERS[0], "warmup_epochs": 0}
    kinds = {f.name: type(f.default) for f in dataclasses.fields(methods.options(name))}
    return methods.configure(name, **{k: v for k, v in wanted.items() if k in known and isinstance(v, kinds[k])})


def snapshot(method: Method) -> Snapshot | None:
    needs = method.needs
    if not needs.snapshot:
        return None
    unit = nn.functional.normalize
    return Snapshot(
        0,
        tuple(torch.randint(k, (ROWS,)) for k in needs.clusterings),
        tuple(unit(torch.randn(k, DIM), dim=1) for k in needs.clusterings),
        tuple(torch.full((k,), 0.2) for k in needs.clusterings),
        torch.randint(ROWS, (ROWS, needs.neighbours)) if needs.neighbours else None,
    )


def added_seconds(name: str, repeats: int) -> float:
    """CPU seconds of one step without its encoder, and the number of views is the method's own."""
    torch.manual_seed(0)
    facts = Facts(rows=ROWS, classes=10, image=(3, 32, 32), batch=BATCH, world=1, size=32, epochs=10)
    method = methods.module(name).build(configured(name), Given(), facts).train()
    optimizer = optim.build_optimizer(method, TrainConfig())
    found = snapshot(method)
    used = () if found is None else tuple(len(p) for p in found.prototypes)
    views = tuple(torch.randn(BATCH, Given.features, 1, 1) for _ in method.needs.views)
    batch = Batch(views, torch.randint(ROWS, (BATCH,)), torch.randint(10, (BATCH,)))

    def step() -> None:
        output = loop.forward_backward(method, batch, Mined(found, used, 1, epoch=5, step=50, steps=100), 1)
        optimizer.step()
        method.after_step(output.keep, Progress(50, 100, 5))
        optimizer.zero_grad(set_to_none=True)

    return harness.interleave({"step": step}, repeats)["step"]


def encoder_seconds(images: int) -> tuple[float, float, float]:
    """(forward and backward, forward alone, EMA) of a ResNet-18 at 32 px for BATCH images."""
    encoder = networks.build_encoder(ModelConfig(encoder="resnet18", stem="small"), 3).train()
    encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher = networks.Twin(encoder)
    x = torch.randn(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def cpu(work: Any) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def forward() -> None:
        with torch.no_grad():
            encoder(x)

    forward()
    scale = BATCH / images
    both = cpu(lambda: encoder(x).sum().backward()) * scale
    ema = min(cpu(lambda: teacher.follow(encoder, 0.99)) for _ in range(3))
    return both, cpu(forward) * scale, ema


def measure(quick: bool) -> list[harness.Row]:
    torch.set_num_threads(1)
    both, forward, ema = encoder_seconds(32 if quick else BATCH)
    rows = []
    for name in methods.names():
        facts = Facts(rows=ROWS, classes=10, image=(3, 32, 32), batch=BATCH, world=1, size=32, epochs=10)
        method = methods.module(name).build(configured(name), Given(), facts)
        twin = any(isinstance(m, networks.Twin) for m in method.modules())
        views = len(method.needs.views)
        # With a teacher and no symmetry, one view is the student's; else all carry gradient, and the teacher sees all.
        student = 1 if twin and not getattr(method.options, "symmetric", name in ("mocov3", "nnclr")) else views
        encoder = student * both + (views if student == views else views - student) * forward * twin
        ours = added_seconds(name, 2 if quick else 5) + ema * twin
        rows.append(harness.at_most(f"{name}: losses and bookkeeping / encoder (CPU s)", ours, encoder, 0.05))
    return rows


if __name__ == "__main__":
    harness.main(__doc__ or "", measure)
