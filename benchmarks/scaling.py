"""Scaling: the same work per rank on 1 and more ranks, what a step sends against the least, and plans against both.

    python -m benchmarks.scaling [--quick] [--json FILE]

Ranks are processes of this machine (a GPU each where there are any, else a thread each; gloo), started by torchrun, with
128 images of Fashion-MNIST a rank. Runs of 1 rank and of more are taken in turns. Where cores are shared, two ranks are
slower than one for more reasons than their traffic: so they are also held against ranks that start together and do not
talk.

Sent: what the kernel says a rank has written (sockets, and the few lines of a log), over the steps between two records.
The least: gradients in a ring, 2 (W - 1) / W x 4 bytes a parameter; rows that a method must gather, (W - 1) x 4 D bytes
each, as much again where they have a gradient; ids; for shuffle-BN the images that change their rank, and their keys back.
The plan: `python -m raycon.doctor --plan`, with the speed of one rank and of an all-reduce as measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.methods_fashion import part_of
from raycon.core import dist
from raycon.core.config import CheckpointConfig, EvalConfig, LogConfig, RunConfig, RunDirConfig
from raycon.core.log import NoMetrics
from raycon.data_loaders import open_loader
from raycon.data_loaders.datasets import open_dataset
from raycon.index.local import LocalIndex
from raycon.recipes import recipe
from raycon.training import cost, job, loop
from raycon.training.runtime import LocalRuntime, choose_device, join_torchrun, no_index

PER_RANK, EVERY = 128, 10
MUST: Mapping[str, tuple[int, int, int, int]] = {
    "clinfonce": (2, 2, 1, 0),
    "maskcon": (1, 0, 1, 1),
    "moco": (1, 0, 0, 1),
    "mocov3": (2, 0, 0, 0),
    "nnclr": (3, 2, 0, 0),
    "pcl": (1, 0, 0, 1),
    "ressl": (1, 0, 0, 1),
    "sce": (1, 0, 0, 1),
    "simclr": (2, 2, 0, 0),
    "supcon": (2, 2, 1, 0),
    "supervised": (0, 0, 0, 0),
    "wcl": (4, 0, 2, 0),
}
"""Of each method, per image: embeddings that all ranks must have, those of them that carry gradient, ids, shuffled images."""


def configure(method: str, world: int, steps: int, folder: Path) -> RunConfig:
    """The recipe of a method with PER_RANK images a rank; snapshots and queues from the first step."""
    base = recipe(f"fashion-mnist-{method}-cpu")
    options: dict[str, Any] = {}
    for field in dataclasses.fields(base.method):
        if field.name in ("warmup_epochs", "warmup_view_epochs", "from_epoch"):
            options[field.name] = 0
        elif field.name == "queue":
            options["queue"] = 32 * PER_RANK * world
        elif field.name == "clusters" and isinstance(getattr(base.method, field.name), tuple):
            options["clusters"] = (20, 40)
        elif field.name == "negatives" and isinstance(getattr(base.method, field.name), int):
            options["negatives"] = 16
        elif field.name == "k":
            options["k"] = 20
    return dataclasses.replace(
        base,
        runtime="local",
        run=RunDirConfig(dir=str(folder)),
        method=dataclasses.replace(base.method, **options),
        data=dataclasses.replace(base.data, name="fashion-mnist-coarse", loader="torch"),
        train=dataclasses.replace(base.train, epochs=1, batch=PER_RANK * world, warmup_epochs=0),
        mining=dataclasses.replace(base.mining, shards=world),
        checkpoint=CheckpointConfig(every_epochs=1, keep=1),
        evals=EvalConfig(names=()),
        log=LogConfig(quiet=True, every_steps=EVERY),
    )


# --- a rank -----------------------------------------------------------------------------------------------------


class Recorder(NoMetrics):
    """(step, wall seconds, bytes written) whenever the loop logs."""

    def __init__(self) -> None:
        self.told: list[tuple[int, float, int]] = []

    def write(self, kind: str, step: int, **values: Any) -> None:
        if kind == "train":
            self.told.append((step, time.perf_counter(), written()))


def written() -> int:
    """Bytes that this process has written, sockets included; 0 where /proc does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split(":")[1]) for line in lines if line.startswith("wchar"))


def rank(names: list[str], steps: int, out: Path) -> None:
    """Train every method for some steps; rank 0 writes {method: records, "allreduce": seconds}."""
    join_torchrun()
    torch.set_num_threads(1)
    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    world, me = dist.world(), dist.rank()
    whole = open_dataset("fashion-mnist-coarse")
    found: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            config = configure(name, world, steps, folder)
            dataset = part_of(whole, PER_RANK * world * steps, "coarse")
            facts = job.facts_of(config, dataset, world)
            loader = open_loader("torch", dataset, job.loader_plan(config, dataset, folder, device, world, me))
            method = job.build_method(config, facts, len(dataset.mean))
            dim = job.feature_dim(config)
            index = LocalIndex(len(dataset), dim, config.mining, config.seed, me, world) if dim else no_index()
            recorder = Recorder()
            loop.train(config, method, loader, LocalRuntime(folder, index, device), recorder, folder)
            loader.close()
            found[name] = recorder.told
    if world > 1:
        found["allreduce"] = allreduce_seconds(device)
    if me == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    if world > 1:
        torch.distributed.destroy_process_group()


def allreduce_seconds(device: torch.device, sizes: tuple[int, ...] = (1 << 10, 1 << 20)) -> dict[str, float]:
    """Median seconds of an all-reduce of so many bytes."""
    found = {}
    for size in sizes:
        x, taken = torch.ones(size // 4, device=device), []
        for _ in range(30):
            begin = time.perf_counter()
            torch.distributed.all_reduce(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
        found[str(size)] = statistics.median(taken)
    return found


# --- all of them ------------------------------------------------------------------------------------------------


def launch(world: int, names: list[str], steps: int, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", "benchmarks.scaling", "--rank", *names, "--steps", str(steps), "--out", str(out)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)


def run(world: int, names: list[str], steps: int, alone: int = 1) -> dict[str, Any]:
    """Records of a launch; with ``alone`` > 1 of the first of so many that start together and do not talk."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(alone)]
        started = [launch(world, names, steps, out) for out in outs]
        states = [process.wait() for process in started]
        if any(states):
            raise RuntimeError(f"ranks of benchmarks.scaling --rank {' '.join(names)} failed")
        found: dict[str, Any] = json.loads(outs[0].read_text(encoding="utf-8"))
        return found


def step_seconds(told: list[list[float]]) -> float:
    """The median over the intervals between records."""
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(told))


def sent_per_step(told: list[list[float]]) -> float:
    """Between the first and the last record; a checkpoint is written after that."""
    first, last = told[0], told[-1]
    return (last[2] - first[2]) / (last[0] - first[0])


def least(method: str, world: int, parameters: int, dim: int, image_bytes: int) -> float:
    """Bytes that a rank must send in a step."""
    rows, with_gradient, ids, shuffled = MUST[method]
    gathered = (world - 1) * PER_RANK * ((rows + with_gradient) * dim * 4 + ids * 8)
    moved = (world - 1) / world * PER_RANK * shuffled * (image_bytes + dim * 4)
    return 2 * (world - 1) / world * parameters * 4 + gathered + moved


def counted(method: str, world: int) -> tuple[RunConfig, cost.Counted]:
    config = configure(method, world, 1, Path("unused"))
    return config, cost.count(config, 1, 4, batch=32, world=world)


def volume(world: int, steps: int) -> list[harness.Row]:
    """What a rank of each method sends against the least, and against its plan."""
    if written() == 0:
        sys.stderr.write("/proc/self/io does not say what a process writes: bytes are not measured\n")
        return []
    told, rows = run(world, list(MUST), steps), []
    for method in MUST:
        config, one = counted(method, world)
        sent, dim = sent_per_step(told[method]), int(getattr(config.method, "dim", 0))
        fewest = least(method, world, one.parameters, dim, config.data.size**2 * 4)
        planned = sum(cost.plan(config, one, 60_000, world).network_bytes.values())
        what = f"{method} on {world} ranks: bytes that a rank sends in a step"
        rows.append(harness.at_most(f"{what} / the least", sent, fewest, 1.05, floor=fewest))
        rows.append(harness.between(f"{what}: planned / sent", planned, sent, 0.95, 1.05))
    return rows


def speed(worlds: list[int], names: list[str], steps: int, repeats: int, gpu: bool) -> list[harness.Row]:
    """Step times of 1 and of more ranks, and what the plan says of them."""
    seconds: dict[tuple[str, str], list[float]] = {}
    reduce: dict[int, list[dict[str, float]]] = {world: [] for world in worlds}
    for _ in range(repeats):
        for world in worlds:
            told = run(world, names, steps)
            if world > 1:
                reduce[world].append(told["allreduce"])
            together = run(1, names, steps, alone=world) if world > 1 and not gpu else told
            for name in names:
                seconds.setdefault((name, f"{world}"), []).append(step_seconds(told[name]))
                seconds.setdefault((name, f"{world} alone"), []).append(step_seconds(together[name]))
    rows = []
    for name in names:
        one = statistics.median(seconds[name, "1"])
        for world in worlds[1:]:
            many, apart = seconds[name, f"{world}"], seconds[name, f"{world} alone"]
            median = statistics.median(many)
            what = f"{name}, {PER_RANK} images a rank"
            row = harness.shown(f"{what}: steps/s of {world} ranks / of 1", 1 / median, 1 / one)
            rows.append(harness.paired(row, seconds[name, "1"], many))
            if not gpu:
                claim = f"{what}: step of {world} ranks / of {world} that do not talk (s)"
                rows.append(harness.paired(harness.at_most(claim, median, statistics.median(apart), 1.2), many, apart))
            rows += planned_steps(name, world, one if gpu else statistics.median(apart), median, reduce[world], gpu)
    return rows


def planned_steps(
    name: str, world: int, apart: float, measured: float, reduce: list[dict[str, float]], gpu: bool
) -> list[harness.Row]:
    """The plan of this step from the time of a rank alone and of an all-reduce, and what it says of 64 GPUs."""
    config, one = counted(name, world)
    small, large = (statistics.median(r[key] for r in reduce) for key in sorted(reduce[0], key=int))
    sizes = sorted(int(key) for key in reduce[0])
    rate = 2 * (world - 1) / world * (sizes[1] - sizes[0]) / max(large - small, 1e-9)
    assumed = cost.Assumed(
        flops=one.step_flops * PER_RANK / apart,
        network=rate,
        overlap=0.7 if gpu else 0.0,  # cores that compute also carry the bytes
        latency=small / max(1.0, (world - 1).bit_length()),
    )
    found = cost.plan(config, one, 60_000, world, assumed)
    what = f"{name}, {PER_RANK} images a rank: step of {world} ranks (s): planned / measured"
    return [harness.between(what, found.step_seconds, measured, 0.85, 1.15)]


def measure(quick: bool) -> list[harness.Row]:
    gpu = torch.cuda.is_available()
    most = torch.cuda.device_count() if gpu else min(2, os.cpu_count() or 1)
    if most < 2:
        sys.stderr.write(f"{most} {'GPU' if gpu else 'core'}: nothing to scale over\n")
        return []
    worlds = [w for w in (1, 2, 4, 8) if w <= most]
    rows = [] if gpu else volume(2, 20 if quick else 60)
    if gpu:
        sys.stderr.write("bytes are measured on gloo only: what NCCL sends is not told by the kernel\n")
    return rows + speed(worlds, ["moco", "simclr"], 60 if quick else 150, 1 if quick else 5, gpu)


def main(argv: list[str] | None = None) -> list[harness.Row]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--rank", nargs="+", metavar="METHOD")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked, rest = parser.parse_known_args(argv)
    if asked.rank:
        rank(asked.rank, asked.steps, asked.out)
        return []
    return harness.main(__doc__ or "", measure, rest)


if __name__ == "__main__":
    main()
