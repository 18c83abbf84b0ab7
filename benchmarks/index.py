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
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, at_least, at_most, interleave, main, shown
from raycon import methods
from raycon.core.config import MiningConfig
from raycon.core.types import Mined as StepInfo
from raycon.core.types import Needs, Progress
from raycon.data_loaders import open_loader
from raycon.data_loaders.datasets import open_dataset
from raycon.index import engine, fast, kmeans
from raycon.index.ann import Mined, approximate_neighbours
from raycon.index.density import density
from raycon.index.engine import EngineName
from raycon.index.local import LocalIndex, part
from raycon.index.merge import FanOut, merge_steps
from raycon.index.mine import assign, local_shards
from raycon.index.neighbours import search
from raycon.index.shard import Shard
from raycon.nn.losses import sample_excluding
from raycon.recipes import recipe
from raycon.training import job

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

    k, data = 1000, kmeans.Data(0, len(x), 1.0)
    start = x[kmeans.faiss_permutation(len(x), k, 1)]
    faiss.omp_set_num_threads(1)
    (ours,), (by_faiss,) = shards_of(x, 1, "torch"), shards_of(x, 1, "faiss")

    def faiss_kmeans() -> Any:
        theirs = faiss.Kmeans(DIM, k, niter=1, max_points_per_centroid=len(x))
        theirs.train(x, init_centroids=start)

    def torch_alone() -> None:
        with patch.object(engine, "_has_numba", lambda: False):
            ours.step(0, start, len(x), 1.0)

    cpu = interleave(
        {
            "floor": floor_of(x, start),
            "ours": lambda: ours.step(0, start, len(x), 1.0),
            "torch alone": torch_alone,
            "faiss engine": lambda: by_faiss.step(0, start, len(x), 1.0),
            "faiss.Kmeans": faiss_kmeans,
        },
        repeats,
    )
    name, floor = f"shard step, {len(x)} x {DIM}, k = {k}, CPU s", cpu["floor"]
    theirs = faiss.Kmeans(DIM, k, niter=5, max_points_per_centroid=len(x))
    theirs.train(x, init_centroids=start)
    found = kmeans.lloyd(in_turn([ours]), data, start, 5)
    return [
        at_most(f"{name}: floor", cpu["ours"], floor, 1.15, floor),
        at_most(f"{name}: torch alone, without compiled loops: floor", cpu["torch alone"], floor, 1.3, floor),
        shown(f"{name}: mining.engine = faiss: floor", cpu["faiss engine"], floor, floor),
        at_most(f"{name}: one iteration of faiss.Kmeans", cpu["ours"], cpu["faiss.Kmeans"], 1.05, floor),
        at_most(
            "objective after 5 iterations: faiss.Kmeans", found.objective, float(np.asarray(theirs.obj)[-1]), 1.001
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

    @ray.remote(num_cpus=1)
    def product(rows: Features, columns: Features) -> float:
        torch.set_num_threads(1)
        run = floor_of(rows.copy(), columns.copy())
        return interleave({"it": run}, 3 * repeats, time.perf_counter)["it"]

    given = ray.put(x), ray.put(start)
    alone = ray.get(product.remote(*given), timeout=120)
    both = max(ray.get([product.remote(*given) for _ in range(2)], timeout=120))
    (shard,) = shards_of(x, 1)
    wall = interleave({**steps, "local": lambda: shard.step(0, start, len(x), 1.0)}, repeats, time.perf_counter)
    for spec in specs:
        stop_index(spec)
    ray.shutdown()
    name = f"step of {len(x)} x {DIM}, k = 1000, wall s"
    overhead = max(wall["ray 1"] - wall["local"], 0.0)
    return [
        at_least(f"{name}: 1 Ray shard / 2 Ray shards", wall["ray 1"], wall["ray 2"], 1.85),
        shown(
            f"{name}: the bare product on two cores at once, of twice the work of one core (control)", 2 * alone, both
        ),
        at_most(f"{name}: Ray's share of one shard's step", overhead, wall["local"], 0.06),
        at_most(f"{name}: Ray's overhead against 13 ms", overhead, 0.013, 1.0),
    ]


def simulated(old: Features) -> Features:
    """A drift between two epochs: noise 0.3 and a random rotation of the whole space."""
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].astype(np.float32)
    return unit((old + 0.3 / math.sqrt(DIM) * rng.normal(size=old.shape).astype(np.float32)) @ turn)


def trained(rows: int, epochs: int, last: int) -> list[Features]:
    """(rows, 128) momentum features of a real MoCo training after each of its ``last`` last epochs (of 1,797 digits where
    Fashion-MNIST is not installed)."""
    name = "fashion-mnist-moco-cpu" if FASHION.exists() else "quickstart"
    base = recipe(name)
    options = methods.configure("moco", queue=1024, dim=DIM, momentum=0.99)
    run = replace(base, method=options, train=replace(base.train, epochs=epochs, batch=128), runtime="local")
    dataset = open_dataset(base.data.name)
    if rows < len(dataset):
        dataset = replace(dataset, images=dataset.images[:rows], label=dataset.label[:rows], weak=dataset.weak[:rows])
    method = job.build_method(run, job.facts_of(run, dataset, 1), len(dataset.mean))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], base.train.lr, 0.9)
    found: list[Features] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = job.loader_plan(run, dataset, Path(folder), torch.device("cpu"), 1, 0)
        loader = open_loader("torch", dataset, plan)
        for epoch in range(epochs):
            method.train()
            for i, batch in enumerate(loader.train(epoch)):
                step = epoch * loader.steps + i
                output = method(batch, StepInfo(None, (), seed=step, epoch=epoch, step=step))
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
                method.after_step(output.keep, Progress(step, epochs * loader.steps, epoch))
            method.eval()
            if epoch >= epochs - last:
                with torch.no_grad():
                    found.append(unit(torch.cat([method.features(block.images) for block in loader.scan()]).numpy()))
        loader.close()
    return found


def warm_start(epochs: list[Features], what: str, repeats: int) -> list[Row]:
    """The features of one epoch after the other: the last one's clusterings, from the labels of the one before."""
    rows, old, new = len(epochs[0]), epochs[-2], epochs[-1]
    k, data = rows // 60, kmeans.Data(0, rows, 1.0)
    before, now = in_turn(shards_of(old, 2)), in_turn(shards_of(new, 2))
    first = kmeans.official(before, data, k, seed=0, iterations=20, redo=1)
    label_N = np.concatenate([labels for labels, _ in before("assign", 0, first.centroids_KD)])

    def objective(found: kmeans.Clustering) -> float:
        return merge_steps(now("step", 0, found.centroids_KD, rows, 1.0))[2]

    local = local_shards(MiningConfig())

    def beside(centroids_KD: Features, count: int) -> NDArray[np.int64]:
        return local(centroids_KD[:1]).engine.search(centroids_KD, centroids_KD, count)[1]

    def warm(moves: int) -> kmeans.Clustering:
        return kmeans.warm(now, data, [label_N], [k], beside, moves=moves)[0][0]

    runs: dict[str, Callable[[], kmeans.Clustering]] = {
        "cold": lambda: kmeans.official(now, data, k, seed=0, iterations=20, redo=1),
        "warm": lambda: warm(kmeans.MOVES),
        "one": lambda: warm(0),
    }
    cpu = interleave(runs, repeats)
    reached = {name: objective(run()) for name, run in runs.items()}
    drift = float(np.einsum("nd,nd->n", old, new).mean())
    what = f"{what} (mean cosine {drift:.2f})"
    name = f"{rows} x {DIM}, k = {k}, {what}"
    result = [
        shown(f"warm labels, 1 iteration alone, {name}: objective of 20 cold ones", reached["one"], reached["cold"]),
        shown(f"warm labels, 1 iteration alone, {name}: their CPU s", cpu["one"], cpu["cold"]),
        at_most(
            f"warm labels, moves and 1 iteration, {name}: objective of 20 cold ones",
            reached["warm"],
            reached["cold"],
            1.0,
        ),
        at_most(f"warm labels, moves and 1 iteration, {name}: their CPU s", cpu["warm"], cpu["cold"], 1 / 15),
    ]
    needs = Needs(clusterings=(k // 4, k // 2, k), temperature=0.2)
    seconds, objectives = {}, {}
    for init in ("cold", "warm"):
        index = LocalIndex(rows, DIM, MiningConfig(init=init, iterations=20, redo=5), seed=0)
        for version, x in enumerate(epochs[:-1] if init == "warm" else []):
            index.add(version, 0, x)
            index.snapshot(version, needs)
        index.add(len(epochs), 0, new)
        before_it, took = index.previous, []
        for _ in range(1 if init == "cold" else 3):
            index.previous, begun = before_it, time.process_time()
            _, metrics = index.snapshot(len(epochs), needs)
            took.append(time.process_time() - begun)
        seconds[init] = statistics.median(took)
        objectives[init] = sum(metrics[f"index/{i}/objective"] for i in range(3))
        index.close()
    whole = (
        f"PCL's E-step, warm (snapshot {len(epochs)} of a run) against 20 iterations x 5 restarts, {rows} x {DIM}, "
        f"k = {needs.clusterings}, {what}"
    )
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


def half_precision(x: Features, repeats: int) -> list[Row]:
    """fp16 storage: labels against fp32's in 5 iterations of k-means, rows assigned anew, CPU time of a step."""
    k, rows = 1000, len(x)
    (full,) = shards_of(x, 1)
    half = Shard(0, rows, DIM, storage="fp16")
    half.put(0, 0, x)
    centroids, equal, assigned = x[kmeans.faiss_permutation(rows, k, 1)], 0, 0
    rescored = 0
    for _ in range(5):
        equal += int((full.assign(0, centroids)[0] == half.assign(0, centroids)[0]).sum())
        doubt = half.doubt()
        rescored, assigned = rescored + doubt.rescored, assigned + doubt.assigned
        sums, counts, _ = full.step(0, centroids, rows, 1.0)
        centroids = kmeans.update(sums, counts, rows, False)
    cpu = interleave(
        {"half": lambda: half.step(0, centroids, rows, 1.0), "full": lambda: full.step(0, centroids, rows, 1.0)},
        repeats,
    )
    name = f"fp16 storage, {rows} x {DIM}, k = {k}"
    return [
        at_least(f"{name}: labels equal to fp32's", equal, assigned, 1.0),
        at_most(f"{name}: rows assigned anew", rescored, assigned, 0.03),
        at_most(f"{name}: CPU s of a step: fp32", cpu["half"], cpu["full"], 2.0),
    ]


def all_pairs(x: Features, what: str, repeats: int) -> list[Row]:
    """The 20 nearest of every row, the building of the lists and the measuring of the recall included."""
    fan_out, local, found = in_turn(shards_of(x, 2)), local_shards(MiningConfig()), dict[str, Mined]()
    part_of_floor = floor_of(x, x[: len(x) // 12])

    def ours() -> None:
        data = kmeans.Data(0, len(x), 1.0)
        found["ours"] = approximate_neighbours(fan_out, data, 20, local, recall=0.995, seed=0)

    cpu = interleave({"ours": ours, "floor": part_of_floor}, repeats)
    floor = cpu["floor"] * 12
    name = f"20 neighbours of all {len(x)} x {DIM} by lists, 2 shards, {what}"
    return [
        at_most(f"{name}: CPU s: exact floor", cpu["ours"], floor, 0.35, floor),
        at_least(f"{name}: recall on 512 other rows", found["ours"].recall, 1.0, 0.995),
    ]


def fast_clusterings(x: Features, k: int, repeats: int) -> list[Row]:
    """The algorithms for large k against 20 cold iterations: CPU time with the assignment, and objective."""
    data, fan_out, local = kmeans.Data(0, len(x), 1.0), in_turn(shards_of(x, 2)), local_shards(MiningConfig())

    def start() -> Features:
        return fast.sampled_start(fan_out, data, k, local, seed=0)

    def alone(running: kmeans.Running) -> kmeans.Clustering:
        return kmeans.together(fan_out, data, [running])[0]

    runs: dict[str, Callable[[], kmeans.Clustering]] = {
        "cold": lambda: kmeans.official(fan_out, data, k, seed=0, iterations=20, redo=1),
        "sampled start": lambda: alone(fast.run_fast(fan_out, data, k, local, seed=0, iterations=20)),
        "mini-batch": lambda: alone(fast.run_minibatch(fan_out, data, k, start(), seed=0)),
        "hierarchical": lambda: fast.hierarchical(fan_out, data, k, local, seed=0, iterations=20),
    }
    objective: dict[str, float] = {}

    def timed(name: str) -> Callable[[], None]:
        def run() -> None:
            objective[name] = float(assign(fan_out, 0, runs[name]())[1].sum(dtype=np.float64))

        return run

    cpu = interleave({name: timed(name) for name in runs}, repeats)
    result = []
    for name, share, worse in (("sampled start", 1.0, 1.005), ("mini-batch", 0.6, 1.02), ("hierarchical", 0.4, 1.05)):
        what = f"{name}, {len(x)} x {DIM}, k = {k}, against 20 cold iterations"
        result.append(at_most(f"{what}: CPU s", cpu[name], cpu["cold"], share))
        result.append(at_most(f"{what}: objective", objective[name], objective["cold"], worse))
    return result


def prototype_sampling(repeats: int) -> list[Row]:
    """Negatives of a step of PCL: 16,384 of 100,000 prototypes without those of a batch of 256."""
    own = torch.randint(0, 100_000, (256,), generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        for seed in range(10):
            sample_excluding(100_000, 100_000, own, 16_384, seed)

    def python_sets() -> None:
        for _ in range(10):
            everything = [i for i in range(100_000)]  # noqa: C416
            random.sample(tuple(set(everything) - set(own.tolist())), 16_384)

    cpu = interleave({"ours": ours, "sets": python_sets}, repeats)
    return [at_most("16384 of 100000 prototypes: Python's sets, CPU s of 10", cpu["ours"], cpu["sets"], 1 / 50)]


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
        *warm_start(
            [x[:10_000] if quick else x, simulated(x[:10_000] if quick else x)], "simulated drift", 1 if quick else 3
        ),
        *warm_start(trained(*((8_192, 4, 3) if quick else (20_480, 16, 8))), "real drift", 1 if quick else 3),
        *half_precision(x, repeats),
        *nearest(x, 2048 if quick else 10_000, repeats),
        *all_pairs(x, "Fashion-MNIST" if FASHION.exists() else "made up", 1 if quick else 3),
        *fast_clusterings(x[:20_000] if quick else x, 1000 if quick else 4000, 1),
        *concentrations(200_000, repeats),
        *prototype_sampling(repeats),
        *memory(100_000 if quick else 200_000, 2000),
        *linear(x, repeats),
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
