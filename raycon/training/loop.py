"""THE loop. Read ``train`` from top to bottom; every helper is called from it and is one hop away."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raycon.core import dist, stream
from raycon.core.config import RunConfig
from raycon.core.log import Metrics
from raycon.core.types import Batch, Loader, Mined, Output, Progress, Runtime, Snapshot
from raycon.methods.base import Method
from raycon.nn import health, optim, pictures
from raycon.training import checkpoint
from raycon.training.meter import Meter
from raycon.training.mining import Mining
from raycon.training.saving import Saving
from raycon.training.watch import Watch

logger = logging.getLogger("raycon")


class NotFinite(FloatingPointError):
    """The loss or the gradient is NaN or infinite. Raised on every rank before the optimiser moves."""


def train(
    config: RunConfig,
    method: Method,
    loader: Loader,
    runtime: Runtime,
    metrics: Metrics,
    run_dir: Path,
    updates: int = 1,
) -> Progress:
    """Train to ``train.epochs``, going on from the checkpoint that the runtime gives. Returns where the run stopped.

    ``updates``: how many times the optimiser moves in a step, each time on so much less of the global batch and with so
    much less learning rate (linear scaling; an elastic run on fewer workers, ``scaling.on_fewer = follow``).

    Raises NotFinite (the last good checkpoint is kept) and checkpoint.CheckpointError.
    """
    per_epoch, steps = loader.steps, config.train.epochs * loader.steps
    device = runtime.device
    method.to(device).train()
    if config.model.channels_last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.bf16 = config.train.precision == "bf16"
    optimizer = optim.build_optimizer(method, config.train)
    mining = Mining(method, loader, runtime, metrics, config.mining.lag, config.train.epochs)
    step = 0
    if (path := runtime.restore()) is not None:
        step, evaluate = restore(path, method, optimizer, config, steps, mining)
        metrics.rewind(step)
        for text in runtime.refused:
            metrics.write("event", step, text=f"a damaged checkpoint was passed over: {text}")
        if dist.any_true(runtime.rank == 0 and evaluate and not runtime.evaluated(step)):
            # The run died between this checkpoint and its evaluation.
            runtime.report({"step": step}, path if runtime.rank == 0 else None, evaluate=True)
    started: dict[str, Any] = {
        "steps": steps,
        "epochs": config.train.epochs,
        "world": runtime.world,
        "device": str(device),
    }
    started |= {"pids": dist.gather_objects(os.getpid()), "hosts": dist.gather_objects(socket.gethostname())}
    metrics.write("start", step, epoch=step // per_epoch, **started)
    net: nn.Module = method
    if runtime.world > 1:
        # Buffers (queue, BatchNorm) need no broadcast: queues are equal by construction, statistics are made equal
        # before anything reads them.
        net = DistributedDataParallel(
            method,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=method.unused_parameters,
        )
    if step == 0:
        beyond = (loader.train(epoch) for epoch in itertools.count(config.train.epochs))
        method.before_training(itertools.chain.from_iterable(beyond), stream.key(config.seed, 0xF111) >> 1)
    guard = FiniteGuard(optimizer, device)
    meter = Meter(config.train.batch, method, device, net)
    loader.stopwatch = meter.augment
    watch = Watch(config, method, getattr(getattr(loader, "dataset", None), "label", None), per_epoch, runtime.world)

    stopping = leaving = False
    with Saving(config, run_dir, method, optimizer, runtime, metrics) as saving:
        while step < steps and not stopping:
            epoch = step // per_epoch
            if method.needs.snapshot and epoch >= method.needs.from_epoch:
                metrics.write("state", step, epoch=epoch, mining=epoch)
            with meter.mining:
                snapshot = mining.before_epoch(epoch, step)
            mined_on_device = None if snapshot is None else snapshot.to(device)
            used = () if snapshot is None else tuple(int(a.max()) + 1 for a in snapshot.assignment)
            batches = loader.train(epoch, first_step=step % per_epoch, snapshot=snapshot)
            for batch in meter.waiting(batches):
                if step == 0 and runtime.rank == 0:
                    save_views(batch, run_dir, config, metrics)
                optim.set_lr(optimizer, lr := optim.lr_at(config.train, step, per_epoch) / updates)
                torch.manual_seed(stream.key(config.seed, step, runtime.rank) >> 1)  # dropout and the like
                for i, part in enumerate(parts_of(batch, updates)):
                    key = stream.key(config.seed, step, 0x57E9 + i) >> 1
                    mined = Mined(mined_on_device, used, key, epoch, step, steps)
                    with meter.compute:
                        output = forward_backward(net, part, mined, config.train.accumulate)
                    norm = gradient_norm(method, config.train.clip)
                    guard.check(output.loss, norm, step, part)
                    optimizer.step()
                    method.after_step(output.keep, Progress(step, steps, epoch))
                    watch.saw(step, part, output)
                    optimizer.zero_grad(set_to_none=True)
                step += 1
                meter.stepped()

                end_of_epoch = step % per_epoch == 0
                if step % config.log.every_steps == 0 or end_of_epoch:
                    told = watch.read(snapshot) if end_of_epoch and runtime.rank == 0 else {}
                    log_step(metrics, meter, output, norm, lr, step, steps, epoch, config, snapshot, told)
                    if warning := watch.warning(told):
                        logger.warning("%s", warning)
                        metrics.write("event", step, epoch=epoch, text=warning)
                    saving.look()
                    stopping, leaving = runtime.should_stop(), runtime.should_save()
                if stopping or leaving or due(config, step, per_epoch, steps):
                    guard.flush()
                    mining.settle(epoch, step)
                    evaluate = due_evaluation(config, step, per_epoch, steps)
                    position = {"step": step, "epoch": step // per_epoch, "steps": steps, "per_epoch": per_epoch}
                    saving.save(position, epoch, output.loss, snapshot, mining.coming, evaluate)
                    if leaving or (evaluate and config.evals.wait_s):
                        saving.flush()
                    if leaving:
                        metrics.write("event", step, epoch=epoch, text="a node is being taken away: saved")
                        leaving = False
                    meter.pause()
                if stopping:
                    break
        guard.flush()
        saving.flush()
    return Progress(step, steps, step // per_epoch)


# --- one step ---------------------------------------------------------------------------------------------------


def forward_backward(net: nn.Module, batch: Batch, mined: Mined, parts: int) -> Output:
    """Forward and backward over ``parts`` micro-batches; gradients are those of the mean loss.

    A loss that is not finite makes every gradient NaN: with the all-reduce of DDP all ranks see it.
    """
    if parts == 1:
        output: Output = net(batch, mined)
        poisoned(output.loss).backward()
        return output
    outputs = []
    for i, part in enumerate(parts_of(batch, parts)):
        last = i == parts - 1
        quiet = net.no_sync() if isinstance(net, DistributedDataParallel) and not last else contextlib.nullcontext()
        with quiet:
            output = net(part, mined)
            (poisoned(output.loss) / parts).backward()
        outputs.append(output)
    return Output(
        torch.stack([o.loss.detach() for o in outputs]).mean(),
        {k: torch.cat([o.keep[k] for o in outputs]) for k in outputs[0].keep},
        {k: torch.stack([o.metrics[k] for o in outputs]).mean() for k in outputs[0].metrics},
    )


def parts_of(batch: Batch, parts: int) -> list[Batch]:
    """The batch in so many parts of consecutive samples."""
    if parts == 1:
        return [batch]
    pieces = zip(batch.row.chunk(parts), batch.label.chunk(parts), *(v.chunk(parts) for v in batch.views), strict=True)
    return [Batch(tuple(views), row, label) for row, label, *views in pieces]


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself when it is finite; otherwise its backward gives NaN everywhere."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def gradient_norm(method: nn.Module, clip: float) -> Tensor:
    """The norm of all gradients, a tensor on the device; clips when ``clip`` > 0."""
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip > 0:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    return norm


class FiniteGuard:
    """Stops the run before the optimiser moves when the loss or the gradient is not finite.

    On a CPU the flag is read at once. On a GPU that would stall the step, so the flag goes to the optimiser as
    ``found_inf`` (its fused step then does nothing) and to the host in the background; it is read one step later,
    and always before a checkpoint.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        self._on_cpu = device.type == "cpu"
        self._pending: tuple[Tensor, Any, int, Tensor] | None = None

    def check(self, loss: Tensor, norm: Tensor, step: int, batch: Batch) -> None:
        bad = ~torch.isfinite(loss.detach() + norm)
        if self._on_cpu:
            if bad.item():
                self._stop(step, batch.row)
            return
        self.flush()
        self._optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)  # a copy to pageable memory would wait
        flag.copy_(bad, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending = (flag, event, step, batch.row)

    def flush(self) -> None:
        if self._pending is None:
            return
        flag, event, step, row = self._pending
        self._pending = None
        event.synchronize()
        if flag.item():
            self._stop(step, row)

    def _stop(self, step: int, row: Tensor) -> None:
        rows = dist.gather_objects(row.tolist())
        shown = "; ".join(f"rank {r}: {', '.join(map(str, found))}" for r, found in enumerate(rows))
        raise NotFinite(
            f"loss or gradient not finite in step {step}: the optimiser has not moved and the last checkpoint is good. "
            f"Lower train.lr, give train.warmup_epochs or train.clip, or look at the rows of this batch: {shown}"
        )


# --- once in a while --------------------------------------------------------------------------------------------


def restore(
    path: Path, method: Method, optimizer: torch.optim.Optimizer, config: RunConfig, steps: int, mining: Mining
) -> tuple[int, bool]:
    """Put a checkpoint into method, optimiser and mining; returns (steps done, whether it is for evaluation)."""
    saved = checkpoint.load(path)
    if saved.state["method"] != config.method.name:
        raise checkpoint.CheckpointError(
            f"{path} is of method.name = {saved.state['method']!r}, this run of {config.method.name!r}"
        )
    if saved.state["steps"] != steps:
        raise checkpoint.CheckpointError(
            f"{path} is of a run of {saved.state['steps']} steps, this one has {steps}: train.epochs, train.batch and "
            "the data must be the same to go on"
        )
    try:
        method.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.optimizer)
        same_layout(optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise checkpoint.CheckpointError(f"{path} does not fit this configuration: {error}") from None
    mining.resume(saved.snapshot, saved.coming)
    return saved.step, bool(saved.state["evaluate"])


def same_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give optimiser state the memory layout of its parameter: fused steps walk both as they lie in memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def due(config: RunConfig, step: int, per_epoch: int, steps: int) -> bool:
    """A checkpoint after this many steps? At the end, at epoch ends, and every ``checkpoint.every_steps``."""
    every = config.checkpoint
    at_epoch = step % (per_epoch * every.every_epochs) == 0
    at_step = bool(every.every_steps) and step % every.every_steps == 0
    return at_epoch or at_step or step == steps or due_evaluation(config, step, per_epoch, steps)


def due_evaluation(config: RunConfig, step: int, per_epoch: int, steps: int) -> bool:
    """Is the checkpoint after this step one to evaluate? The last one always is."""
    every = config.evals.every_epochs
    return bool(config.evals.names) and (step == steps or (every > 0 and step % (per_epoch * every) == 0))


def log_step(
    metrics: Metrics,
    meter: Meter,
    output: Output,
    norm: Tensor,
    lr: float,
    step: int,
    steps: int,
    epoch: int,
    config: RunConfig,
    snapshot: Snapshot | None,
    told: Mapping[str, float],
) -> None:
    """One line of metrics.jsonl: means over the ranks. Reading the numbers is the only host synchronisation."""
    named: Mapping[str, Tensor] = {"loss": output.loss.detach(), **output.metrics}
    values = dist.mean(torch.stack([v.float() for v in named.values()])).tolist()
    numbers = dict(zip(named, values, strict=True)) | {"lr": lr, "gradient_norm": norm.item()}
    if "embedding" in output.keep:
        numbers["health/std"] = float(health.feature_std(output.keep["embedding"]))
    numbers |= told
    if snapshot is not None:
        numbers["mining/version"] = snapshot.version
    if output.loss.is_cuda:
        numbers["gpu_memory_gb"] = torch.cuda.max_memory_allocated(output.loss.device) / 1e9
    numbers |= meter.read(steps - step)
    numbers |= slowest(numbers["time/data"] + numbers.get("time/augment", 0.0))
    metrics.write("train", step, epoch=epoch, epochs=config.train.epochs, steps=steps, **numbers)


def slowest(seconds: float) -> dict[str, float]:
    """Which rank takes longest for its batch, how long, and the median over the ranks; {} for one rank.

    Waiting for images and making views happens without the other ranks, so a slow machine shows here; in the rest of a
    step all ranks wait for each other.
    """
    if dist.world() == 1:
        return {}
    seconds_W = dist.gather(torch.tensor([seconds], dtype=torch.float64))
    return {
        "ranks/slowest": int(seconds_W.argmax()),
        "ranks/slowest_s": float(seconds_W.max()),
        "ranks/median_s": float(seconds_W.median()),
    }


def save_views(batch: Batch, run_dir: Path, config: RunConfig, metrics: Metrics) -> None:
    """The augmented views of the first batch, as a picture for the report."""
    file = run_dir / "pictures" / "views.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pictures.view_grid([v[:12].float().cpu() for v in batch.views]))
    metrics.picture(0, file)
