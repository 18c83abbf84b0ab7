"""What a run will need, before anyone spends money: memory, arithmetic, traffic and time, from its configuration.

Arithmetic, activations and traffic are counted, not guessed: the method itself makes one small step (random images, a
random snapshot) under PyTorch's counters, and one as a rank among W whose collectives only count. What cannot be counted
is an assumption, and the answer names each of them. benchmarks/scaling.py and memory.py hold plans against measurements.

Shape letters: N rows, D index width, W ranks, B images of a rank and step.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raycon.core import dist
from raycon.core.config import Facts, RunConfig
from raycon.core.types import Batch, Mined, Needs, Progress, Snapshot
from raycon.index import plan as index_plan
from raycon.methods.base import Method
from raycon.nn import networks


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
    """Per image: what a step holds at its fullest beside what stays: mostly what is kept for the backward pass."""
    fixed_bytes: int = 0
    """As that, whatever the batch: gradients, copies of weights."""
    step_seconds: float
    """Per image: CPU seconds on one thread, or seconds of the GPU."""
    parameters: int
    """That are trained."""
    state_bytes: int
    """Parameters and buffers of student, teacher and queue."""
    view_bytes: int
    """Per image: all its views, float32."""
    world: int = 1
    """Ranks for which ``sent`` holds."""
    sent: dict[str, float] = field(default_factory=dict)
    """Per image of a rank's batch: bytes that the rank sends in a step beside its gradients, by what they are."""
    synced_bytes: int = 0
    """Per step, whatever the batch: BatchNorm statistics that are made equal, forward and backward."""
    calls: int = 0
    """Collectives of a step that the networks wait for."""

    def at(self, world: int) -> Counted:
        """The same for another number of ranks: what every rank gets grows with the others, what is exchanged with their
        share (of SyncBatchNorm's bytes, all as the first: a little too much). Raises ValueError when only one was counted.
        """
        if world == self.world:
            return self
        if self.world == 1:
            raise ValueError(f"counted for one rank, planned for {world}: count with world = {world}")
        others = (world - 1) / (self.world - 1)
        share = others * self.world / world
        sent = {what: size * (share if "all-to-all" in what else others) for what, size in self.sent.items()}
        return replace(self, world=world, sent=sent, synced_bytes=round(self.synced_bytes * others))


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What a plan takes for granted."""

    flops: float = 100e12
    """Operations per second that a rank sustains in training."""
    network: float = 12.5e9
    """Bytes per second of each rank's network for gradients (100 Gbit/s)."""
    overlap: float = 0.7
    """Share of the backward pass behind which gradients travel unnoticed. What a method gathers is never hidden."""
    latency: float = 15e-6
    """Seconds that a collective takes beyond its bytes, per doubling of the ranks."""
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
    config: RunConfig,
    channels: int,
    classes: int,
    batch: int = 0,
    device: torch.device | None = None,
    world: int = 1,
) -> Counted:
    """Build the method and make one step of ``batch`` random images (0: 4 of more than 64 pixels, else 32).

    With ``world`` > 1 one more step counts what a rank of so many sends.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = device or torch.device("cpu")
    batch = batch or (4 if config.data.size > 64 else 32)
    if getattr(config.method, "table", ""):
        raise ValueError("method.table assigns rows of one data set: a plan needs method.clusters = kmeans or labels")
    method = build(config, channels, classes, 1, device)
    given = random_batch(config, channels, classes, batch, device)
    mined = random_mined(config, device)

    counter, live, less = FlopCounterMode(display=False), Live(), Live()
    with counter, live:
        method(given, mined).loss.backward()
    method.zero_grad(set_to_none=True)
    half = Batch(tuple(v[: batch // 2] for v in given.views), given.row[: batch // 2], given.label[: batch // 2])
    with less:
        method(half, mined).loss.backward()
    activations = max(0.0, (live.peak - less.peak) / (batch - batch // 2))
    scan = FlopCounterMode(display=False)
    with scan, torch.no_grad():
        method.eval().features(given.views[0])
    seconds = _seconds(method.train(), given, mined, device)
    told = Ranks(world)
    if world > 1:
        told = traffic(config, channels, classes, batch, device, world)
    return Counted(
        batch=batch,
        step_flops=counter.get_total_flops() / batch,
        scan_flops=scan.get_total_flops() / batch,
        activation_bytes=activations,
        fixed_bytes=round(max(0.0, live.peak - activations * batch)),
        step_seconds=seconds / batch,
        parameters=sum(p.numel() for p in method.parameters() if p.requires_grad),
        state_bytes=sum(t.numel() * t.element_size() for t in (*method.parameters(), *method.buffers())),
        view_bytes=sum(v[0].numel() * 4 for v in given.views),
        world=world,
        sent={what: size / batch for what, size in told.sent.items()},
        synced_bytes=round(told.synced),
        calls=told.calls,
    )


class Live(TorchDispatchMode):
    """The largest sum of bytes of the tensors that were made inside and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _place(tensor) not in old:
                self._made(tensor)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known:
            return
        self._known[place] = weakref.finalize(storage, self._freed, place, size)
        self._now += size
        self.peak = max(self.peak, self._now)

    def _freed(self, place: int, size: int) -> None:
        del self._known[place]
        self._now -= size


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Ranks:
    """Stands in for torch.distributed: rank 0 of ``world`` that all hold the same. Counts what a rank sends in a ring."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, world: int) -> None:
        self.world = world
        self.calls = 0
        self.sent: dict[str, float] = defaultdict(float)
        """Bytes by what they are; of exchanged rows those that change their rank, on the average."""
        self.synced = 0.0
        """Bytes of SyncBatchNorm."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return self.world

    def all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        for part in parts:
            part.copy_(x)
        self._count("embeddings (all-gather)", (self.world - 1) * x.nbytes)

    def reduce_scatter_tensor(self, out: Tensor, x: Tensor) -> None:
        out.copy_(x[: len(out)])
        self._count("their gradients (reduce-scatter)", (self.world - 1) / self.world * x.nbytes)

    def all_to_all_single(
        self, out: Tensor, x: Tensor, receive: list[int] | None = None, send: list[int] | None = None
    ) -> None:
        """Rows of the batch that change their rank (``send`` says how many go where), or gradients of gathered ones."""
        out.copy_(x)
        what = "their gradients (reduce-scatter)" if send is None else "shuffled images and keys (all-to-all)"
        self._count(what, (self.world - 1) / self.world * x.nbytes)

    def sync(self, norm: nn.Module, _: Any, out: Tensor) -> None:
        """What SyncBatchNorm sends for a call of this layer: mean, inverse deviation and count to all, backward two sums."""
        width, backward = int(norm.num_features), out.requires_grad  # type: ignore[arg-type]
        self.calls += 1 + backward
        self.synced += (self.world - 1) * (2 * width + 1) * 4
        self.synced += backward * 2 * (self.world - 1) / self.world * 2 * width * 4

    def _count(self, what: str, size: float) -> None:
        self.calls += 1
        self.sent[what] += size


def traffic(config: RunConfig, channels: int, classes: int, batch: int, device: torch.device, world: int) -> Ranks:
    """What a rank of ``world`` with ``batch`` images sends in a step: the method's own calls, answered and counted here."""
    told = Ranks(world)
    # SyncBatchNorm needs a real group: its layers are left as they are, and counted.
    alone = replace(config, model=replace(config.model, sync_bn=False))
    with mock.patch.object(dist, "dist", told), mock.patch.object(networks.Queue, "enqueue", return_value=None):
        method = build(alone, channels, classes, world, device)
        for layer in method.modules() if config.model.sync_bn else ():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.register_forward_hook(told.sync)
        output = method(random_batch(config, channels, classes, batch, device), random_mined(config, device))
        output.loss.backward()
        method.after_step(output.keep, Progress(0, 1, 0))
    return told


def build(config: RunConfig, channels: int, classes: int, world: int, device: torch.device) -> Method:
    """The method of a run as its loop has it, for images of so many channels and weak labels of so many classes."""
    from raycon.training import job

    facts = Facts(1 << 30, classes, None, config.train.batch, world, config.data.size, config.train.epochs)
    method = job.build_method(config, facts, channels).to(device).train()
    if config.model.channels_last:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return method


def random_batch(config: RunConfig, channels: int, classes: int, batch: int, device: torch.device) -> Batch:
    """Random images in the sizes of the method's views."""
    from raycon.nn import views as specs

    grey = (0.5,) * channels
    names = config.method.needs().views
    sides = [specs.view_spec(config.data.views, name, config.data.size, grey, grey).size for name in names]
    images = tuple(torch.randn(batch, channels, side, side, device=device) for side in sides)
    if config.model.channels_last:
        images = tuple(view.contiguous(memory_format=torch.channels_last) for view in images)
    row = torch.arange(batch, device=device)
    return Batch(images, row, row % max(classes, 1))


_ROWS = 1024  # that the random snapshot knows


def random_mined(config: RunConfig, device: torch.device) -> Mined:
    """A random snapshot, as the method looks it up after its warm-up."""
    needs: Needs = config.method.needs()
    epochs = max(config.train.epochs, needs.from_epoch + 1)
    if not needs.snapshot:
        return Mined(None, (), 1, epochs - 1, epochs - 1, epochs)
    dim = int(getattr(config.method, "dim", 0))
    found = Snapshot(
        0,
        tuple(torch.randint(k, (_ROWS,)) for k in needs.clusterings),
        tuple(nn.functional.normalize(torch.randn(k, dim), dim=1) for k in needs.clusterings),
        tuple(torch.full((k,), 0.2) for k in needs.clusterings),
        torch.randint(_ROWS, (_ROWS, needs.neighbours)) if needs.neighbours else None,
    )
    return Mined(found.to(device), needs.clusterings, 1, epochs - 1, epochs - 1, epochs)


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
    assumed, counted = assumed or Assumed(), counted.at(world)
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
        "scratch": max(0, counted.fixed_bytes - counted.parameters * 4),
        "optimiser": counted.parameters * 4 * moments,
        "activations": int(counted.activation_bytes * micro * half),
        "views": counted.view_bytes * local,
        "snapshot": refresh.snapshot_bytes if refresh else 0,
    }
    gradients = 2 * (world - 1) / world * counted.parameters * 4
    network = {what: size * local for what, size in counted.sent.items()}
    network |= {"BatchNorm statistics": float(counted.synced_bytes)}
    waited = sum(network.values())
    network = {"gradients (ring all-reduce)": gradients} | network
    flops = counted.step_flops * local
    compute = flops / assumed.flops
    hidden = assumed.overlap * compute * 2 / 3  # backward is two thirds of a step
    latency = counted.calls * assumed.latency * math.log2(world)
    return RunPlan(
        rows=rows,
        world=world,
        batch=config.train.batch,
        steps=steps,
        epochs=config.train.epochs,
        rank_bytes=rank_bytes,
        step_flops=flops,
        compute_seconds=compute,
        network_bytes={name: round(size) for name, size in network.items() if size},
        network_seconds=(gradients + waited) / assumed.network + latency,
        exposed_seconds=waited / assumed.network + latency + max(0.0, gradients / assumed.network - hidden),
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
