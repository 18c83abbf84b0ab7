"""What a run will need, before anyone spends money: memory, arithmetic, traffic and time, from its configuration.

Arithmetic and activations are counted, not guessed: the method itself makes one small step (random images) under
PyTorch's counters. What cannot be counted is an assumption, and the answer names each of them.

Shape letters: N rows, D index width, W ranks, B images of a rank and step.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from raycon.core.config import Facts, RunConfig
from raycon.core.types import Batch, Mined
from raycon.index import plan as index_plan
from raycon.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One small step of the method, forward and backward, on this machine. Sizes in bytes, per image of the batch."""

    batch: int
    """Images of the step that was counted."""
    step_flops: float
    """Per image, all views, forward and backward."""
    scan_flops: float
    """Per image: the features that are indexed."""
    activation_bytes: float
    """Per image: what the forward pass keeps for the backward pass."""
    step_seconds: float
    """Per image: CPU seconds on one thread, or seconds of the GPU."""
    parameters: int
    """That are trained."""
    state_bytes: int
    """Parameters and buffers of student, teacher and queue."""
    view_bytes: int
    """Per image: all its views, float32."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a plan takes for granted."""

    flops: float = 100e12
    """Operations per second that a rank sustains in training."""
    network: float = 12.5e9
    """Bytes per second of each rank's network for gradients (100 Gbit/s)."""
    overlap: float = 0.7
    """Share of the backward pass behind which gradients travel unnoticed."""
    index: index_plan.Machine = field(default_factory=index_plan.Machine)
    """Of a shard's machine."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Sizes in bytes, times in seconds."""

    rows: int
    world: int
    batch: int
    """Global."""
    steps: int
    """Per epoch."""
    epochs: int
    rank_bytes: dict[str, int]
    """Memory of a rank, by what takes it."""
    step_flops: float
    """Of a rank."""
    compute_seconds: float
    """Of a step, at the assumed rate."""
    network_bytes: dict[str, int]
    """Sent by a rank per step, by what is sent."""
    network_seconds: float
    """Of a step, were nothing hidden."""
    exposed_seconds: float
    """What is left of that behind the backward pass."""
    index: index_plan.Plan | None
    """One refresh; None when the method mines nothing."""
    refreshes: int
    embed_seconds: float
    """Features of all rows over all ranks, once."""

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def scaling(self) -> float:
        """Speed of W ranks over W times that of one rank with the same images per rank, mining included."""
        whole = self.steps * self.epochs * self.compute_seconds + self.refreshes * self.embed_seconds
        return whole / max(self.seconds, 1e-30)

    @property
    def seconds(self) -> float:
        """The run, without reading data, evaluations and checkpoints."""
        mining = self.refreshes * (self.embed_seconds + (self.index.seconds if self.index else 0.0))
        return self.steps * self.epochs * self.step_seconds + mining


def count(
    config: RunConfig, channels: int, classes: int, batch: int = 0, device: torch.device | None = None
) -> Counted:
    """Build the method and make one step of ``batch`` random images (0: 4 of more than 64 pixels, else 32)."""
    from torch.utils.flop_counter import FlopCounterMode

    from raycon.nn import views as specs
    from raycon.training import job

    device = device or torch.device("cpu")
    batch = batch or (4 if config.data.size > 64 else 32)
    facts = Facts(1 << 30, classes, None, config.train.batch, 1, config.data.size, config.train.epochs)
    if getattr(config.method, "table", ""):
        raise ValueError("method.table assigns rows of one data set: a plan needs method.clusters = kmeans or labels")
    method = job.build_method(config, facts, channels).to(device).train()
    if config.model.channels_last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    needs = config.method.needs()
    sides = [
        specs.view_spec(config.data.views, n, config.data.size, (0.5,) * channels, (0.5,) * channels).size
        for n in needs.views
    ]
    images = [torch.randn(batch, channels, side, side, device=device) for side in sides]
    label = torch.arange(batch, device=device) % max(classes, 1)
    given = Batch(tuple(images), torch.arange(batch, device=device), label)
    mined = Mined(None, (), 1)

    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in (*method.parameters(), *method.buffers(), *images)}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = method(given, mined)
        activations = sum(kept.values())
        output.loss.backward()
    scan = FlopCounterMode(display=False)
    with scan, torch.no_grad():
        method.eval().features(images[0])
    seconds = _seconds(method.train(), given, mined, device)
    return Counted(
        batch=batch,
        step_flops=counter.get_total_flops() / batch,
        scan_flops=scan.get_total_flops() / batch,
        activation_bytes=activations / batch,
        step_seconds=seconds / batch,
        parameters=sum(p.numel() for p in method.parameters() if p.requires_grad),
        state_bytes=sum(t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers())),
        view_bytes=sum(channels * side * side * 4 for side in sides),
    )


def _seconds(method: Method, batch: Batch, mined: Mined, device: torch.device) -> float:
    """The faster of two steps: CPU seconds of this process, or the GPU's."""

    def step() -> float:
        method.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
        else:
            begin = time.process_time()
        method(batch, mined).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter() - begin
        return time.process_time() - begin

    return min(step() for _ in range(2))


def plan(config: RunConfig, counted: Counted, rows: int, world: int, assumed: Assumed | None = None) -> RunPlan:
    """The plan of a run over ``rows`` images on ``world`` ranks. Raises ValueError for sizes that make no sense."""
    if rows < 1 or world < 1:
        raise ValueError(f"{rows} images on {world} ranks: give 1 or more of each")
    if config.train.batch % world:
        raise ValueError(f"train.batch = {config.train.batch} does not divide over {world} ranks: give --train.batch N")
    if rows < config.train.batch:
        raise ValueError(f"train.batch = {config.train.batch} is more than {rows} images")
    assumed = assumed or Assumed()
    needs, local = config.method.needs(), config.train.batch // world
    steps, micro = rows // config.train.batch, local // config.train.accumulate
    dim = int(getattr(config.method, "dim", 0))
    refresh = None
    refreshes = 0
    if needs.snapshot:
        refresh = index_plan.plan(
            rows,
            dim,
            needs.clusterings,
            config.mining.shards,
            neighbours=needs.neighbours,
            iterations=config.mining.iterations,
            redo=config.mining.redo,
            warm=config.mining.init == "warm",
            storage=config.mining.storage,
            machine=assumed.index,
        )
        refreshes = len(range(needs.from_epoch, config.train.epochs, needs.refresh_epochs))
    moments = 2 if config.train.optimizer == "adamw" else 1
    half = 0.5 if config.train.precision == "bf16" else 1.0
    rank_bytes = {
        "networks, teacher and queue": counted.state_bytes,
        "gradients": counted.parameters * 4,
        "optimiser": counted.parameters * 4 * moments,
        "activations": int(counted.activation_bytes * micro * half),
        "views": counted.view_bytes * local,
        "snapshot": refresh.snapshot_bytes if refresh else 0,
    }
    share = (world - 1) / world
    keyed = 1 if hasattr(config.method, "queue") else 0
    network = {
        "gradients (ring all-reduce)": int(2 * share * counted.parameters * 4),
        "embeddings (all-gather)": int(share * local * dim * 4 * max(1, len(needs.views) - keyed) * world),
    }
    if keyed:  # the key's image goes to another rank and its embedding comes back
        network["shuffled keys (all-to-all)"] = int(share * local * (counted.view_bytes / len(needs.views) + dim * 4))
    network = {name: size for name, size in network.items() if size}
    flops = counted.step_flops * local
    compute, seconds = flops / assumed.flops, sum(network.values()) / assumed.network
    return RunPlan(
        rows=rows,
        world=world,
        batch=config.train.batch,
        steps=steps,
        epochs=config.train.epochs,
        rank_bytes=rank_bytes,
        step_flops=flops,
        compute_seconds=compute,
        network_bytes=network,
        network_seconds=seconds,
        exposed_seconds=max(0.0, seconds - assumed.overlap * compute * 2 / 3),  # backward is two thirds of a step
        index=refresh,
        refreshes=refreshes,
        embed_seconds=counted.scan_flops * rows / world / assumed.flops if refresh else 0.0,
    )


def scaling_table(
    config: RunConfig, counted: Counted, rows: int, world: int, assumed: Assumed | None = None
) -> list[RunPlan]:
    """Plans of the same run on 1, 2, 4, ... ranks up to ``world``, each rank with the images that it has at ``world``.

    The global batch grows with the ranks (weak scaling); ``RunPlan.scaling`` of each is its share of a linear speed-up.
    """
    local = config.train.batch // world
    worlds = sorted({1 << i for i in range(world.bit_length()) if 1 << i <= world} | {world})
    found = []
    for ranks in worlds:
        train = replace(config.train, batch=local * ranks)
        found.append(plan(replace(config, train=train), counted, rows, ranks, assumed))
    return found


def as_dict(found: RunPlan) -> dict[str, Any]:
    """For JSON: fields and derived numbers."""
    return asdict(found) | {"step_seconds": found.step_seconds, "seconds": found.seconds, "scaling": found.scaling}
