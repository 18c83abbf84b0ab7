"""Evaluations: kNN, the linear probe, the SVM protocol, and what training feels of evaluations beside it.

One thread on each side, interleaved, CPU seconds. The last claims are wall time on two cores, training held on one and
the other work on the other; controls say what any work there costs, whatever it is.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Row, at_least, at_most, interleave, main, shown
from raycon.core.config import EvalConfig, override
from raycon.evals import FeatureSets, knn, linear, svm

CLASSES = 100
TEMPERATURE = 0.07


def clusters(rows: int, dim: int, seed: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """(rows, dim) features around one centre per class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    label = torch.randint(0, classes, (rows,), generator=generator)
    return centre[label] + 4 * torch.randn(rows, dim, generator=generator), label


def nearest_neighbours(queries: int, repeats: int) -> list[Row]:
    """k = 20, cosine, weights exp(cosine / 0.07): the same votes on all sides."""
    from sklearn.neighbors import KNeighborsClassifier

    train, label = clusters(60_000, 512, 0)
    test, truth = clusters(queries, 512, 1)
    sets = FeatureSets(train, label, test, truth)
    found: dict[str, float] = {}

    def ours() -> None:
        numbers = knn.Evaluation(EvalConfig(knn_k=(20,), knn_temperature=TEMPERATURE)).run(sets)
        found["ours"] = numbers["knn/top1_k20"]

    def theirs() -> None:
        other = KNeighborsClassifier(
            20, algorithm="brute", metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE), n_jobs=1
        )
        found["sklearn"] = 100 * other.fit(train.numpy(), label.numpy()).score(test.numpy(), truth.numpy())

    def plain() -> None:
        stored, asked, right = F.normalize(train), F.normalize(test), 0
        for first in range(0, queries, 1024):
            cosine, row = (asked[first : first + 1024] @ stored.T).topk(20)
            votes = torch.zeros(len(row), CLASSES).scatter_add_(1, label[row], (cosine / TEMPERATURE).exp())
            right += int((votes.argmax(1) == truth[first : first + 1024]).sum())
        found["torch"] = 100 * right / queries

    def product() -> None:
        for first in range(0, queries, 1024):
            torch.mm(test[first : first + 1024], train.T)

    cpu = interleave({"ours": ours, "sklearn": theirs, "torch": plain, "product": product}, repeats)
    name = f"kNN of {queries} queries in 60000 x 512, CPU s"
    return [
        at_most(f"{name}: sklearn brute", cpu["ours"], cpu["sklearn"], 1.0, cpu["product"]),
        at_most(f"{name}: torch.topk", cpu["ours"], cpu["torch"], 1.0, cpu["product"]),
        at_most("kNN: percent right, difference to sklearn", abs(found["ours"] - found["sklearn"]), 1.0, 0.05),
        at_most("kNN: percent right, difference to torch.topk", abs(found["ours"] - found["torch"]), 1.0, 0.05),
    ]


def probes(rows: int, repeats: int) -> list[Row]:
    """All settings of the fast linear probe together against one after the other."""
    x, y = clusters(rows, 512, 2, classes=10)
    rate_P, decay_P = torch.tensor(list(itertools.product(linear.RATES, linear.DECAYS))).T

    def together() -> None:
        linear.fit(x, y, 10, 5, 0, rate_P, decay_P)

    def in_turn() -> None:
        for p in range(len(rate_P)):
            linear.fit(x, y, 10, 5, 0, rate_P[p : p + 1], decay_P[p : p + 1])

    cpu = interleave({"together": together, "in turn": in_turn}, repeats)
    name = f"{len(rate_P)} probes of {rows} x 512, 5 passes: one after another / together, CPU s"
    return [at_least(name, cpu["in turn"], cpu["together"], 2.0)]


def machines(quick: bool) -> list[Row]:
    """PCL's whole SVM protocol on features of VOC2007's shape, against the bare calls that fit and ask its 520 SVMs."""
    from sklearn.svm import LinearSVC

    rows, dim = (1000, 512) if quick else (5011, 2048)
    rng = np.random.default_rng(0)
    sets = []
    for seed in (3, 4):
        x, _ = clusters(rows, dim, seed, classes=20)
        label = torch.from_numpy(rng.choice([-1, 0, 1], (rows, 20), p=[0.9, 0.03, 0.07]).astype(np.int8))
        sets.append(
            (x + 2.0 * (label > 0).float() @ torch.randn(20, dim, generator=torch.Generator().manual_seed(7)), label)
        )
    (train, train_y), (test, test_y) = sets
    nothing = torch.zeros(rows, dtype=torch.int64)
    given = FeatureSets(train, nothing, test, nothing, train_multi=train_y, test_multi=test_y)

    def bare() -> None:
        unit, other, label, stream = svm.unit(train), svm.unit(test), train_y.numpy(), random.Random(0)
        for k in (*[k for k in (1, 2, 4, 8, 16) for _ in range(5)], 0):
            rows = svm.draw(label, k, stream)
            for c in range(20):
                machine = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
                machine.fit(unit[rows], np.where(label[rows, c] > 0, 1, -1)).decision_function(other)

    protocol = svm.Evaluation(EvalConfig())
    cpu = interleave({"protocol": lambda: protocol.run(given), "bare": bare}, 1)
    name = f"SVM protocol, {rows} x {dim}, 20 classes, full and 25 low-shot draws, CPU s: scikit-learn's calls alone"
    return [at_most(name, cpu["protocol"], cpu["bare"], 1.5)]


def memory(quick: bool) -> list[Row]:
    """What kNN takes beyond features of ImageNet's size, which lie in a file that is mapped: all but a few rows are 0."""
    rows = IMAGENET // 10 if quick else IMAGENET
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as fresh:
        beyond, right = fresh.apply(_knn_in_file, (Path(folder) / "features", rows))
    name = f"kNN of 256 queries in {rows} x 2048 (k = 200), GB beyond the features: the features"
    return [
        at_most(name, beyond, rows * 2048 * 4 / 1e9, 1.0 if quick else 0.1),
        at_least("the same: percent right, of what is right", right, 100.0, 1.0),
    ]


IMAGENET = 1_281_167


def _knn_in_file(file: Path, rows: int) -> tuple[float, float]:
    """(GB, percent right): the peak of this process's own memory above what it was, mapped files aside."""
    torch.set_num_threads(1)
    stored = np.memmap(file, np.float32, "w+", shape=(rows, 2048))
    there = np.linspace(0, rows - 1, 1000).astype(np.int64)
    rng = np.random.default_rng(0)
    stored[there] = rng.normal(size=(len(there), 2048)).astype(np.float32)
    label = torch.zeros(rows, dtype=torch.int64)
    label[torch.from_numpy(there)] = torch.arange(1000)
    asked = rng.choice(1000, 256)
    query = torch.from_numpy(stored[there[asked]] + rng.normal(size=(256, 2048)).astype(np.float32))
    sets = FeatureSets(torch.from_numpy(stored), label, query, torch.from_numpy(asked))
    small = torch.randn(2000, 2048)
    knn.Evaluation(EvalConfig(knn_k=(1,))).run(
        FeatureSets(small, label[:2000], small, label[:2000])
    )  # libraries loaded
    ended, seen = threading.Event(), [_own_memory()]

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(_own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    numbers = knn.Evaluation(EvalConfig(knn_k=(1, 200), knn_temperature=TEMPERATURE)).run(sets)
    ended.set()
    thread.join()
    return (max(seen) - seen[0]) / 1e9, numbers["knn/top1_k200"]


def _own_memory() -> int:
    """Bytes of this process that are no file's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


BESIDE = {
    "kNN": "a kNN evaluation",
    "loop": "an empty loop",
    "products": "products in its cache",
    "training": "the same training step",
}


def beside_training(steps: int, turns: int) -> list[Row]:
    """Median wall time of a training step (MoCo on digits, this process) while a Ray process works on the other core.

    The controls: an empty loop (neither memory nor vectors: shared clocks and cores that are one), products of matrices
    that stay in its cache (vectors as well), another process that does the same training.
    """
    import ray

    from raycon.on_ray import here

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return []
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    here.start(num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="raycon")
    os.sched_setaffinity(0, cores[:1])
    try:
        step = training_step()
        other = ray.remote(num_cpus=1)(Other).remote(cores[1])
        for kind in BESIDE:
            ray.get(other.work.remote(kind, 0.1))  # it is there, and what it needs is built
        walls: dict[str, list[float]] = {name: [] for name in ("alone", *BESIDE)}
        cpu: dict[str, list[float]] = {name: [] for name in walls}
        for _ in range(turns):
            for name in walls:
                waiting = [other.work.remote(name, 0.5) for _ in range(3)] if name != "alone" else []
                for _ in range(steps):
                    if waiting and ray.wait(waiting[:1], timeout=0)[0]:
                        waiting = [*waiting[1:], other.work.remote(name, 0.5)]
                    start, before = time.perf_counter(), time.thread_time()
                    step()
                    cpu[name].append(time.thread_time() - before)
                    walls[name].append(time.perf_counter() - start)
                ray.get(waiting)
    finally:
        ray.shutdown()
        os.sched_setaffinity(0, cores)
    wall = {name: statistics.median(values) for name, values in walls.items()}
    title = "training step, wall s, with {} on the other core: alone".format
    return [
        at_most(title(BESIDE["kNN"]), wall["kNN"], wall["alone"], 1.05, wall["loop"]),
        *(shown(f"{title(BESIDE[k])} (control)", wall[k], wall["alone"]) for k in BESIDE if k != "kNN"),
        shown("training step beside a kNN: its CPU s of its wall s", statistics.median(cpu["kNN"]), wall["kNN"]),
        at_most("training step beside a kNN: beside the dearest control", wall["kNN"],
                max(wall[k] for k in BESIDE if k != "kNN"), 1.05),
    ]  # fmt: skip


class Other:
    """What works beside the training, on a core of its own."""

    def __init__(self, core: int) -> None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        x, y = clusters(4000, 256, 5)
        self.sets = FeatureSets(x, y, x[:1000], y[:1000])
        self.small, self.step = torch.randn(128, 128), training_step()

    def work(self, kind: str, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            if kind == "kNN":
                knn.Evaluation(EvalConfig(knn_k=(20,))).run(self.sets)
            elif kind == "products":
                for _ in range(100):
                    torch.mm(self.small, self.small)
            elif kind == "training":
                self.step()
            else:
                for _ in range(10_000):
                    pass


def training_step() -> Callable[[], None]:
    """One step of MoCo on digits, batches from memory."""
    from raycon.core.types import Batch, Mined
    from raycon.nn import optim
    from raycon.recipes import recipe
    from raycon.training import job, loop

    config = override(recipe("quickstart"), {"model.width": 32})
    dataset = job.open_data(config)
    method: Any = job.build_method(config, job.facts_of(config, dataset, 1), 1).train()
    optimizer = optim.build_optimizer(method, config.train)
    views = torch.randn(2, config.train.batch, 1, config.data.size, config.data.size)
    batch = Batch(tuple(views), torch.arange(config.train.batch), torch.full((config.train.batch,), -1))

    def step() -> None:
        loop.forward_backward(method, batch, Mined(None, (), 0), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    return [
        *nearest_neighbours(1024 if quick else 10_000, 1 if quick else 3),
        *probes(5000 if quick else 20_000, 3),
        *machines(quick),
        *memory(quick),
        *beside_training(10 if quick else 25, 3 if quick else 4),
    ]


if __name__ == "__main__":
    main(__doc__ or "", measure)
