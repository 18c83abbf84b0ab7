"""Memory of a rank at its peak for every method, against what `doctor --plan` says, and what it consists of.

    python -m benchmarks.memory [--quick] [--json FILE]

ResNet-18 (small stem, width 32) at 28 px, batch 64, queue 16,384; on a GPU ResNet-50 at 224 px in bf16, batch 64, queue
65,536. Each method takes three steps of the loop's body in a process of its own. On a CPU the peak is what the kernel
counts (VmHWM, less what the process held before the method was built), on a GPU what torch allocated. The plan counts
one small step and adds up; "tensors" are those that are there after a step: parameters, buffers (teacher and queue
among them), gradients, the optimiser's state. --quick: a narrower network, two steps.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from raycon import methods
from raycon.core.config import RunConfig
from raycon.core.types import Mined, Progress
from raycon.methods.base import Method
from raycon.nn import networks, optim
from raycon.recipes import recipe
from raycon.training import cost, loop

ROWS, CLASSES = 60_000, 4


def configure(name: str, gpu: bool, quick: bool) -> RunConfig:
    base = recipe(f"fashion-mnist-{name}-cpu")
    has = {field.name: getattr(base.method, field.name) for field in dataclasses.fields(base.method)}
    options: dict[str, Any] = {n: 0 for n in ("warmup_epochs", "warmup_view_epochs", "from_epoch") if n in has}
    if "queue" in has:
        options["queue"] = 65_536 if gpu else 16_384
    encoder, size, width = ("resnet50", 224, 64) if gpu else ("resnet18", 28, 16 if quick else 32)
    return dataclasses.replace(
        base,
        method=dataclasses.replace(base.method, **options),
        model=dataclasses.replace(base.model, encoder=encoder, stem="imagenet" if gpu else "small", width=width),
        data=dataclasses.replace(base.data, size=size),
        train=dataclasses.replace(base.train, batch=64, precision="bf16" if gpu else "fp32"),
    )


def of_process(what: str) -> int:
    """Bytes: VmRSS, held now, or VmHWM, the most since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def measured(config: RunConfig, steps: int) -> dict[str, int]:
    """Bytes at the peak, and of the tensors that stay, of a rank that takes some steps."""
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, width=8))
    train(small, 4, 1)  # the code of the libraries is memory too, once it has run
    gc.collect()
    before = 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        before = of_process("VmRSS")
        forget_peak()
    method, optimizer, mined, gradients = train(config, config.train.batch, steps)
    peak = torch.cuda.max_memory_allocated() if gpu else of_process("VmHWM") - before

    def within(kind: type[nn.Module]) -> int:
        found = [m for m in method.modules() if isinstance(m, kind)]
        return size_of(t for m in found for t in (*m.parameters(), *m.buffers()))

    state = size_of((*method.parameters(), *method.buffers()))
    moments = size_of(value for kept in optimizer.state.values() for value in kept.values())
    return {
        "peak": peak,
        "stays": state + gradients + moments,
        "teacher": within(networks.Twin),
        "queue": within(networks.Queue),
        "optimiser": moments,
        "snapshot": 0 if mined.snapshot is None else size_of(t for part in mined.snapshot[1:4] for t in part),
    }


def train(config: RunConfig, images: int, steps: int) -> tuple[Method, torch.optim.Optimizer, Mined, int]:
    """Some steps of the loop's body: the method, its optimiser, what it looked up, and the bytes of its gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels = 3 if device.type == "cuda" else 1
    method = cost.build(config, channels, CLASSES, 1, device)
    method.bf16 = device.type == "cuda"
    optimizer = optim.build_optimizer(method, config.train)
    mined = cost.random_mined(config, device)
    gradients = 0
    for step in range(steps):
        batch = cost.random_batch(config, channels, CLASSES, images, device)
        output = loop.forward_backward(method, batch, mined, 1)
        gradients = size_of(p.grad for p in method.parameters())
        optimizer.step()
        method.after_step(output.keep, Progress(step, steps, 0))
        optimizer.zero_grad(set_to_none=True)
        del batch, output
    return method, optimizer, mined, gradients


def planned(config: RunConfig) -> dict[str, int]:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = cost.count(config, 3 if device.type == "cuda" else 1, CLASSES, device=device)
    return cost.plan(config, one, ROWS, 1).rank_bytes


def apart(work: Callable[..., dict[str, int]], *given: Any) -> dict[str, int]:
    """The answer of ``work`` from a process of its own; that of a CPU is a fork, which has imported everything."""
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work, given))
    process.start()
    theirs.close()
    try:
        found: dict[str, int] = ours.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} of {given[0].method.name} failed") from None
    finally:
        process.join()
    return found


def _answer(pipe: multiprocessing.connection.Connection, work: Callable[..., dict[str, int]], given: Any) -> None:
    pipe.send(work(*given))


def measure(quick: bool) -> list[harness.Row]:
    gpu = torch.cuda.is_available()
    rows = []
    for name in methods.names():
        config = configure(name, gpu, quick)
        there = apart(measured, config, 2 if quick else 3)
        plan = apart(planned, config)
        # The random snapshot knows fewer rows than the planned one.
        whole = sum(plan.values()) - plan["snapshot"] + there["snapshot"]
        stays = sum(plan[what] for what in ("networks, teacher and queue", "gradients", "optimiser"))
        row = harness.between(
            f"{name}: peak of a rank, MB: measured / planned", there["peak"] / 1e6, whole / 1e6, 0.75, 1.35
        )
        rows.append(dataclasses.replace(row, floor=there["stays"] / 1e6))
        claim = f"{name}: networks, teacher, queue, gradients, optimiser, MB: tensors / planned"
        rows.append(harness.between(claim, there["stays"] / 1e6, stays / 1e6, 0.999, 1.001))
        for what in ("teacher", "queue", "optimiser"):
            if there[what]:
                claim = f"part of {name}: {what}, MB / the peak"
                rows.append(harness.shown(claim, there[what] / 1e6, there["peak"] / 1e6))
    return rows


if __name__ == "__main__":
    harness.main(__doc__ or "", measure)
