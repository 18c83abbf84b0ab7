"""The feature index against the arithmetic limit: python -m benchmarks.index [--quick] [--json FILE]

"Floor" is torch.mm of the same shapes, in blocks of 1024 rows into one output, one thread, in the same process.
The features are the 128 first principal components of Fashion-MNIST, where Debian's dataset-fashion-mnist is
installed, else made-up ones: unit rows around 500 random directions.

Letters: N rows, K clusters or neighbours, D feature width.
"""

from __future__ import annotations

import gzip
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, at_least, at_most, interleave, main
from raycon.core.config import MiningConfig
from raycon.core.types import Needs
from raycon.index import kmeans
from raycon.index.density import density
from raycon.index.engine import EngineName
from raycon.index.local import LocalIndex, part
from raycon.index.merge import FanOut, merge_steps
from raycon.index.neighbours import search
from raycon.index.shard import Shard

DIM = 128
FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
Features = NDArray[np.float32]


def unit(x: Features) -> Features:
    result: Features = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return result


def made_up(rows: int, seed: int = 0) -> Features:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(500, DIM)) / math.sqrt(DIM)
    noise = rng.normal(size=(rows, DIM)) / math.sqrt(DIM)
    return unit((centres[rng.integers(0, 500, rows)] + 0.7 * noise).astype(np.float32))


def features() -> Features:
    """60,000 unit rows."""
    if not FASHION.exists():
        return made_up(60_000)
    with gzip.open(FASHION) as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784).astype(np.float32)
    pixels -= pixels.mean(0)
    return unit(pixels @ np.linalg.eigh(pixels.T @ pixels)[1][:, : -DIM - 1 : -1])


def shards_of(x: Features, count: int, engine: EngineName = "auto") -> list[Shard]:
    shards = [Shard(first, last, DIM, 1, engine) for first, last in part(len(x), count)]
    for shard in shards:
        shard.put(0, shard.first_row, x[shard.first_row : shard.last_row])
    return shards


def in_turn(shards: list[Shard]) -> FanOut:
    def fan_out(method: str, *args: Any) -> list[Any]:
        return [getattr(shard, method)(*args) for shard in shards]

    return fan_out


def floor_of(x: Features, columns: Features) -> Callable[[], None]:
    """x @ columns.T and nothing else."""
    rows, columns_DK = torch.from_numpy(x), torch.from_numpy(columns).T
    out = torch.empty(1024, len(columns))

    def run() -> None:
        for start in range(0, len(rows), 1024):
            block = rows[start : start + 1024]
            torch.mm(block, columns_DK, out=out[: len(block)])

    return run


def shard_step(x: Features, repeats: int) -> list[Row]:
    import faiss

    k = 1000
    start = x[kmeans.faiss_permutation(len(x), k, 1)]
    faiss.omp_set_num_threads(1)
    engines: tuple[EngineName, EngineName] = ("faiss", "torch")
    by_faiss, by_torch = (shards_of(x, 1, engine)[0] for engine in engines)

    def faiss_kmeans() -> Any:
        theirs = faiss.Kmeans(DIM, k, niter=1, max_points_per_centroid=len(x))
        theirs.train(x, init_centroids=start)

    cpu = interleave(
        {
            "floor": floor_of(x, start),
            "faiss engine": lambda: by_faiss.step(0, start, len(x), 1.0),
            "torch engine": lambda: by_torch.step(0, start, len(x), 1.0),
            "faiss.Kmeans": faiss_kmeans,
        },
        repeats,
    )
    name, floor = f"shard step, {len(x)} x {DIM}, k = {k}, CPU s", cpu["floor"]
    theirs = faiss.Kmeans(DIM, k, niter=10, max_points_per_centroid=len(x))
    theirs.train(x, init_centroids=start)
    ours = kmeans.lloyd(in_turn([by_faiss]), kmeans.Data(0, len(x), 1.0), start, 10)
    return [
        at_most(f"{name}: floor", cpu["faiss engine"], floor, 1.15, floor),
        at_most(f"{name}: without faiss: floor", cpu["torch engine"], floor, 1.3, floor),
        at_most(f"{name}: one iteration of faiss.Kmeans", cpu["faiss engine"], cpu["faiss.Kmeans"], 1.05, floor),
        at_most(
            "objective after 10 iterations: faiss.Kmeans", ours.objective, float(np.asarray(theirs.obj)[-1]), 1.001
        ),
    ]


def any_shards(x: Features) -> list[Row]:
    data, k = kmeans.Data(0, len(x), 1.0), 200
    found = [kmeans.official(in_turn(shards_of(x, s)), data, k, seed=0, iterations=5, redo=1) for s in (1, 2, 3, 4)]
    equal = sum(np.array_equal(found[0].centroids_KD, f.centroids_KD) and found[0][1:] == f[1:] for f in found)
    return [at_least("1, 2, 3, 4 shards: runs with the same bits", equal, 4, 1.0)]


def over_ray(x: Features, repeats: int) -> list[Row]:
    """Wall seconds of one step on 1 and on 2 actors of one thread, and on the same shard in this process."""
    import ray

    from raycon.on_ray.index import RayIndex, start_index, stop_index

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="raycon")
    start = x[kmeans.faiss_permutation(len(x), 1000, 1)]
    specs, steps = [], {}
    for count in (1, 2):
        spec = start_index(f"bench{count}", len(x), DIM, MiningConfig(shards=count), "raycon", seed=0)
        RayIndex(spec).add(0, 0, x)
        shards = [ray.get_actor(name, "raycon") for name in spec.shard_names]
        ray.get([shard.call.remote("missing", 0) for shard in shards], timeout=60)

        def step(shards: list[Any] = shards) -> None:
            sent = ray.put(start)
            calls = [shard.call.remote("step", 0, sent, len(x), 1.0) for shard in shards]
            merge_steps(ray.get(calls, timeout=120))

        specs.append(spec)
        steps[f"ray {count}"] = step
    (shard,) = shards_of(x, 1)
    wall = interleave({**steps, "local": lambda: shard.step(0, start, len(x), 1.0)}, repeats, time.perf_counter)
    for spec in specs:
        stop_index(spec)
    ray.shutdown()
    name = f"step of {len(x)} x {DIM}, k = 1000, wall s"
    overhead = max(wall["ray 1"] - wall["local"], 0.0)
    return [
        at_least(f"{name}: 1 Ray shard / 2 Ray shards", wall["ray 1"], wall["ray 2"], 1.85),
        at_most(f"{name}: Ray's share of one shard's step", overhead, wall["local"], 0.06),
        at_most(f"{name}: Ray's overhead against 13 ms", overhead, 0.013, 1.0),
    ]


def warm_start(old: Features, repeats: int) -> list[Row]:
    """A simulated drift between two epochs: noise 0.3 and a random rotation of the whole space."""
    rows = len(old)
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].astype(np.float32)
    new = unit((old + 0.3 / math.sqrt(DIM) * rng.normal(size=old.shape).astype(np.float32)) @ turn)
    k, data = rows // 60, kmeans.Data(0, rows, 1.0)
    before, now = in_turn(shards_of(old, 2)), in_turn(shards_of(new, 2))
    first = kmeans.official(before, data, k, seed=0, iterations=20, redo=1)
    label_N = np.concatenate([labels for labels, _ in before("assign", 0, first.centroids_KD)])

    def objective(found: kmeans.Clustering) -> float:
        return merge_steps(now("step", 0, found.centroids_KD, rows, 1.0))[2]

    runs: dict[str, Callable[[], kmeans.Clustering]] = {
        "cold": lambda: kmeans.official(now, data, k, seed=0, iterations=20, redo=1),
        "warm": lambda: kmeans.warm(now, data, label_N, k, iterations=1),
    }
    cpu = interleave(runs, repeats)
    name = f"warm labels, 1 iteration, {rows} x {DIM}, k = {k}"
    result = [
        at_most(f"{name}: objective of 20 cold ones", objective(runs["warm"]()), objective(runs["cold"]()), 1.0),
        at_most(f"{name}: their CPU s", cpu["warm"], cpu["cold"], 1 / 15),
    ]
    ks = (k // 4, k // 2, k)
    seconds, objectives = {}, {}
    for init in ("cold", "warm"):
        index = LocalIndex(rows, DIM, MiningConfig(init=init, iterations=20, redo=5), seed=0)
        if init == "warm":
            index.add(0, 0, old)
            short = LocalIndex(rows, DIM, MiningConfig(iterations=20, redo=1), seed=0)
            short.add(0, 0, old)
            index.previous = short.snapshot(0, Needs(clusterings=ks, temperature=0.2))[0]
            short.close()
        index.add(1, 0, new)
        begun = time.process_time()
        _, metrics = index.snapshot(1, Needs(clusterings=ks, temperature=0.2))
        seconds[init] = time.process_time() - begun
        objectives[init] = sum(metrics[f"index/{i}/objective"] for i in range(3))
        index.close()
    whole = f"PCL's E-step, warm against 20 iterations x 5 restarts, {rows} x {DIM}, k = {ks}"
    return [
        *result,
        at_most(f"{whole}: CPU s", seconds["warm"], seconds["cold"], 1 / 30),
        at_most(f"{whole}: objective", objectives["warm"], objectives["cold"], 1.005),
    ]


def nearest(x: Features, queries: int, repeats: int) -> list[Row]:
    fan_out, block = in_turn(shards_of(x, 2)), x[:queries]
    floor_block = floor_of(x, block[:1024])

    def ours() -> None:
        for start in range(0, queries, 1024):
            search(fan_out, 0, block[start : start + 1024], 20, np.arange(start, min(start + 1024, queries)))

    def floor() -> None:
        for _ in range(0, queries, 1024):
            floor_block()

    def torch_topk() -> None:
        rows, wanted = torch.from_numpy(x), torch.from_numpy(block)
        for start in range(0, queries, 1024):
            (wanted[start : start + 1024] @ rows.T).topk(20)

    cpu = interleave({"ours": ours, "floor": floor, "torch": torch_topk}, repeats)
    name = f"exact top-20 of {queries} queries in {len(x)} x {DIM}, 2 shards, CPU s"
    return [
        at_most(f"{name}: floor", cpu["ours"], cpu["floor"], 1.3, cpu["floor"]),
        at_most(f"{name}: torch.topk", cpu["ours"], cpu["torch"], 1.0, cpu["floor"]),
    ]


def concentrations(rows: int, repeats: int) -> list[Row]:
    rng = np.random.default_rng(0)
    k = rows // 20
    label_N, sqdist_N = rng.integers(0, k, rows), rng.uniform(0, 2, rows).astype(np.float32)

    def python_loop() -> None:
        distances: list[list[float]] = [[] for _ in range(k)]
        for label, sqdist in zip(label_N, sqdist_N, strict=True):
            distances[label].append(sqdist)
        raw = np.zeros(k)
        for c, mine in enumerate(distances):
            if len(mine) > 1:
                raw[c] = (np.asarray(mine) ** 0.5).mean() / np.log(len(mine) + 10)
        raw.clip(*np.percentile(raw, (10, 90)))

    cpu = interleave({"ours": lambda: density(sqdist_N, label_N, k, 0.2), "loop": python_loop}, repeats)
    return [at_most(f"concentration, {rows} rows, k = {k}: Python loop, CPU s", cpu["ours"], cpu["loop"], 1 / 50)]


def _peak_mb() -> float:
    """The most memory this process ever had (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) / 1024


def _peak(rows: int, k: int, answer: Any) -> None:
    """In a process of its own: megabytes by which a filled shard at work exceeds an empty one, at its peak."""
    torch.set_num_threads(1)
    small = made_up(1024)
    warm_up = Shard(0, 1024, DIM)
    warm_up.put(0, 0, small)
    warm_up.step(0, small[:64], 1024, 1.0)
    before = _peak_mb()
    shard = Shard(0, rows, DIM)
    for first in range(0, rows, 4000):
        shard.put(0, first, made_up(min(4000, rows - first), first))
    centroids = shard.gather(0, np.arange(k))[1]
    shard.step(0, centroids, rows, 1.0)
    shard.assign(0, centroids)
    shard.search(0, centroids[:1024], np.arange(1024), 20)
    answer.put(_peak_mb() - before)


def memory(rows: int, k: int) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(rows, k, answer))
    process.start()
    used = answer.get(timeout=300)
    process.join()
    features = rows * DIM * 4 / 2**20
    claim = f"peak MB of a shard of {rows} x {DIM}, k = {k}: 1.3 x features + 64"
    return [at_most(claim, used, 1.3 * features + 64, 1.0, features)]


def linear(x: Features, repeats: int) -> list[Row]:
    """The exponent of the step's time in n and in k, fitted over three doublings."""
    result = []
    for letter, sizes in (
        ("n", [(len(x) // d, 500) for d in (4, 2, 1)]),
        ("k", [(len(x) // 4, k) for k in (500, 1000, 2000)]),
    ):
        runs = {}
        for rows, k in sizes:
            (shard,) = shards_of(x[:rows], 1)
            runs[str((rows, k))] = lambda shard=shard, k=k, rows=rows: shard.step(0, x[:k], rows, 1.0)
        cpu = list(interleave(runs, repeats).values())
        exponent = float(np.polyfit(np.log([1, 2, 4]), np.log(cpu), 1)[0])
        result.append(at_most(f"step's CPU time grows as {letter} to the power", exponent, 1.0, 1.1))
    return result


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    x = features()
    repeats = 3 if quick else 7
    return [
        *shard_step(x, repeats),
        *any_shards(x[:20_000]),
        *over_ray(x, 2 * repeats),
        *warm_start(x[:20_000] if quick else x, 1 if quick else 3),
        *nearest(x, 2048 if quick else 10_000, repeats),
        *concentrations(200_000, repeats),
        *memory(200_000, 2000),
        *linear(x, repeats),
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
