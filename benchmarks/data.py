"""Loaders and views against others, and against the least the machine could take: python -m benchmarks.data
[--quick] [--json FILE]

One thread on each side, in turns, CPU seconds of this process (of Ray: of all its processes). Tiny images: 256 rows of
Fashion-MNIST as colour images of 32 x 32 (made-up ones without Debian's dataset-fashion-mnist), two MoCo v2 views, uint8
to normalised tensors. Photos: made-up ones of 500 x 375 pixels, JPEG quality 90, about 60 kB. Rows that compare with
lightly and kornia need ``pip install 'raycon[bench]'`` and are left out, with a word on standard error, without.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, at_least, at_most, interleave, main
from raycon.core.types import LoaderPlan
from raycon.data_loaders import open_loader
from raycon.data_loaders.common import crops_of
from raycon.data_loaders.datasets import IMAGENET_MEAN, IMAGENET_STD, ArraySet, FileSet, ImageSet, no_labels
from raycon.data_loaders.photos import Photo
from raycon.nn import views

FASHION = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
TINY = 32
BATCH = 256
HEIGHT, WIDTH, SIDE = 375, 500, 224
MEAN, STD = IMAGENET_MEAN, IMAGENET_STD


def tiny_set(rows: int) -> ArraySet:
    """``rows`` colour images of 32 x 32."""
    if FASHION.exists():
        with gzip.open(FASHION) as file:
            grey = np.frombuffer(file.read(16 + min(rows, 60_000) * 784), np.uint8, offset=16).reshape(-1, 28, 28)
        grey = np.pad(grey, ((0, 0), (2, 2), (2, 2)))
    else:
        grey = np.random.default_rng(0).integers(0, 256, (min(rows, 60_000), TINY, TINY), dtype=np.uint8)
    tint = np.array([256, 200, 150], np.uint16)  # so that saturation and hue have something to do
    images = np.resize((grey[..., None] * tint >> 8).astype(np.uint8), (rows, TINY, TINY, 3))
    return ArraySet(
        name="tiny", split="train", label=no_labels(rows), weak=no_labels(rows), mean=MEAN, std=STD, images=images
    )


def photo_set(folder: Path, rows: int, files: int = 48) -> FileSet:
    """``rows`` rows of ``files`` JPEGs of 500 x 375 at quality 90: noise on several scales, about as compressible as
    photographs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for row in range(files):
        total = torch.full((1, 3, HEIGHT, WIDTH), 128.0)
        for lines, strength in ((4, 60), (12, 40), (40, 25), (120, 14), (HEIGHT, 6)):
            noise = rng.normal(size=(1, 3, lines, lines * 4 // 3 + 1)).astype(np.float32) * strength
            noise[:, 1:] = 0.4 * noise[:, 1:] + 0.6 * noise[:, :1]
            total += torch.nn.functional.interpolate(torch.from_numpy(noise), (HEIGHT, WIDTH), mode="bicubic")
        pixels = total[0].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{row:05}.jpg", quality=90)
    names = np.resize(np.array([b"%05d.jpg" % row for row in range(files)]), rows)
    return FileSet(
        name="photos", split="train", label=no_labels(rows), weak=no_labels(rows), mean=MEAN, std=STD, root=folder,
        files=names,
    )  # fmt: skip


def plan_of(dataset: ImageSet, size: int, batch: int, cache: Path, **options: Any) -> LoaderPlan:
    spec = views.view_spec("mocov2", "strong", size, dataset.mean, dataset.std)
    return LoaderPlan(
        specs=(spec, spec), eval_spec=views.eval_spec(size, dataset.mean, dataset.std), batch=batch, seed=0, rank=0,
        world=1, device=torch.device("cpu"), cache=cache, **options,
    )  # fmt: skip


def epoch_of(kind: str, dataset: ImageSet, plan: LoaderPlan) -> Callable[[], None]:
    """One epoch after another of a loader that stays open, as in a run."""
    loader, epochs = open_loader(kind, dataset, plan), iter(range(10**6))

    def run() -> None:
        for _ in loader.train(next(epochs)):
            pass

    return run


class PerSample(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Two views a sample, made by a transform: how it is usually done."""

    def __init__(self, images: Any, transform: Callable[[Any], Any]) -> None:
        self._images, self._transform = images, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self._images[row]
        return self._transform(image), self._transform(image)


def in_a_dataloader(images: Any, transform: Callable[[Any], Any]) -> Callable[[], None]:
    loader = torch.utils.data.DataLoader(PerSample(images, transform), batch_size=BATCH, shuffle=True)

    def run() -> None:
        for _ in loader:
            pass

    return run


def torchvision_views(size: int) -> Callable[[Any], Any]:
    """MoCo v2's views on uint8 tensors, as torchvision's documentation advises: floats come last."""
    import torchvision.transforms.v2 as T

    taps = views.view_spec("mocov2", "strong", size, MEAN, STD).kernel
    pipeline: Callable[[Any], Any] = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(0.2),
            T.RandomApply([T.GaussianBlur(taps, (0.1, 2.0))], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToDtype(torch.float32, scale=True),
            T.Normalize(list(MEAN), list(STD)),
        ]
    )
    return pipeline


def absent(name: str) -> bool:
    missing = importlib.util.find_spec(name) is None
    if missing:
        sys.stderr.write(f"{name} is not installed (pip install 'raycon[bench]'): no row compares with it\n")
    return missing


def others_tiny(images: NDArray[np.uint8]) -> dict[str, Callable[[], None]]:
    """torchvision, lightly and kornia, each as it is meant to be used: two views of all images."""
    unit = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    sides = {"torchvision": in_a_dataloader(list(unit), torchvision_views(TINY))}
    if not absent("lightly"):
        from lightly.transforms import MoCoV2Transform
        from PIL import Image

        transform: Callable[[Any], Any] = MoCoV2Transform(input_size=TINY)  # in a list of two tensors
        both = [Image.fromarray(image) for image in images]

        def lightly() -> None:
            made = [transform(image) for image in both]
            torch.stack([one for one, _ in made]), torch.stack([two for _, two in made])

        sides["lightly"] = lightly
    if not absent("kornia"):
        import kornia.augmentation as K

        pipeline = torch.nn.Sequential(
            K.RandomResizedCrop((TINY, TINY), scale=(0.2, 1.0)),
            K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
            K.RandomHorizontalFlip(),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

        def kornia() -> None:
            x = unit.float() / 255
            pipeline(x), pipeline(x)

        sides["kornia"] = kornia
    return sides


def tiny(cache: Path, repeats: int) -> list[Row]:
    """Two 32-pixel views of 256 images: the loaders' paths, other people's, and the floor: moving the bytes."""
    dataset = tiny_set(BATCH)
    plan = plan_of(dataset, TINY, BATCH, cache)
    sides = others_tiny(dataset.images)
    sides["batched"] = epoch_of("torch", dataset, dataclasses.replace(plan, augment="batched"))
    fused = importlib.util.find_spec("numba") is not None
    if fused:
        sides["fused"] = epoch_of("torch", dataset, dataclasses.replace(plan, augment="fused"))
        for part in ("crop", "crop and jitter", "crop and blur"):
            off = {} if "jitter" in part else {"jitter": 0.0}
            off |= {"gray": 0.0} | ({} if "blur" in part else {"blur": 0.0})
            spec = dataclasses.replace(plan.specs[0], **off)
            part_plan = dataclasses.replace(plan, specs=(spec, spec), augment="fused")
            sides[f"fused, {part} only"] = epoch_of("torch", dataset, part_plan)
    if fused and importlib.util.find_spec("ffcv") is not None:
        # Several batches of work, or FFCV's start of an epoch would be most of what is seen.
        many = tiny_set(16 * BATCH)
        sides["ffcv"] = epoch_of("ffcv", many, plan_of(many, TINY, BATCH, cache, augment="fused"))
    pixels = torch.from_numpy(dataset.images)

    def floor() -> None:
        for _ in plan.specs:
            torch.empty(BATCH, TINY, TINY, 3).copy_(pixels)

    cpu = interleave({**sides, "floor": floor}, repeats)
    if "ffcv" in cpu:
        cpu["ffcv"] /= 16
    best = min((name for name in ("batched", "fused", "ffcv") if name in cpu), key=cpu.__getitem__)
    what = f"two {TINY} px MoCo v2 views of {BATCH}, CPU s"
    limits = {"torchvision": 30, "lightly": 20, "kornia": 5}
    rows = [
        at_least(f"{what}: {other} / {best}", cpu[other], cpu[best], limit, cpu["floor"])
        for other, limit in limits.items()
        if other in cpu
    ]
    rows.append(at_least(f"{what}: torchvision / batched", cpu["torchvision"], cpu["batched"], 12, cpu["floor"]))
    for name in cpu:
        if name.startswith(("fused", "ffcv")):
            rows.append(at_least(f"{what}: torchvision / {name}", cpu["torchvision"], cpu[name], 30, cpu["floor"]))
    return rows


def decoders(photos: list[Photo]) -> dict[str, Callable[[], None]]:
    """Ways to decode all photos once to RGB and do nothing else."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    from raycon.data_loaders import jpeg

    tensors = [torch.from_numpy(photo.data.copy()) for photo in photos]

    def pil() -> None:
        for photo in photos:
            np.asarray(Image.open(io.BytesIO(photo.data.tobytes())).convert("RGB"))

    def torchvision() -> None:
        for data in tensors:
            decode_jpeg(data, ImageReadMode.RGB)

    def turbo() -> None:
        for photo in photos:
            jpeg.decode(photo.data, HEIGHT, WIDTH)

    sides = {"decode with PIL": pil, "decode with torchvision.io": torchvision}
    if jpeg.size(photos[0].data) is not None:
        sides["decode with libjpeg-turbo"] = turbo
    return sides


def large(folder: Path, rows: int, repeats: int) -> list[Row]:
    """Two 224-pixel views from JPEGs: the crops alone, and all of it."""
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    dataset = photo_set(folder, rows)
    plan = plan_of(dataset, SIDE, rows, folder, augment="fused")
    photos = [Photo(np.frombuffer(dataset.encoded(row), np.uint8), dataset.where(row)) for row in range(rows)]
    sides = decoders(photos)
    order = np.arange(rows)
    sides["two crops"] = lambda: _drop(crops_of(photos, plan, order, 0))
    sides["ours, torch loader"] = epoch_of("torch", dataset, plan)
    if importlib.util.find_spec("ffcv") is not None:
        sides["ours, ffcv"] = epoch_of("ffcv", dataset, plan)

    class Decoded:
        def __len__(self) -> int:
            return rows

        def __getitem__(self, row: int) -> torch.Tensor:
            return decode_jpeg(read_file(dataset.where(row)), ImageReadMode.RGB)

    sides["torchvision DataLoader"] = in_a_dataloader(Decoded(), torchvision_views(SIDE))
    cpu = interleave(sides, repeats)
    decode = min(seconds for name, seconds in cpu.items() if name.startswith("decode"))
    what = f"two {SIDE} px views of {rows} JPEGs, CPU s"
    result = [at_least(f"{what}: decode only / two uint8 crops", decode, cpu["two crops"], 0.7, decode)]
    for name in ("ours, torch loader", "ours, ffcv"):
        if name in cpu:
            claim = f"{what}: torchvision DataLoader / {name}"
            result.append(at_least(claim, cpu["torchvision DataLoader"], cpu[name], 2.5, decode))
    augment = cpu["ours, torch loader"] - cpu["two crops"]
    result.append(at_most(f"{what}: share of colours and blur in all", augment, cpu["ours, torch loader"], 1.0, decode))
    for name, seconds in cpu.items():
        if name.startswith("decode"):
            result.append(at_most(f"{what}: fastest decoder / {name}", decode, seconds, 1.0))
    return result


def _drop(_: object) -> None:
    pass


def decoding_once(folder: Path, rows: int, repeats: int) -> list[Row]:
    """Tiny images that are PNG files: read and decoded each time, or mapped from the file of data.decode = once."""
    from PIL import Image

    from raycon.data_loaders.decoded import decode_once

    pixels = tiny_set(rows)
    for row in range(rows):
        Image.fromarray(pixels.read(row)).save(folder / f"{row:05}.png")
    files = FileSet(
        name="icons", split="train", label=pixels.label, weak=pixels.weak, mean=MEAN, std=STD, root=folder,
        files=np.array([b"%05d.png" % row for row in range(rows)]),
    )  # fmt: skip
    once = decode_once(files, folder / "cache")
    sides = {
        name: epoch_of("torch", dataset, plan_of(dataset, TINY, BATCH, folder, augment="fused"))
        for name, dataset in (("each time", files), ("once", once), ("in memory", pixels))
    }
    cpu = interleave(sides, repeats)
    what = f"two {TINY} px views of {rows:,} PNG files, CPU s"
    return [
        at_least(f"{what}: decoding each time / once (mapped)", cpu["each time"], cpu["once"], 3, cpu["in memory"]),
        at_most(f"{what}: decoded once (mapped) / an array in memory", cpu["once"], cpu["in memory"], 1.25),
    ]


def tree_seconds() -> float:
    """CPU seconds of this process and of all below it, also of those that have ended."""
    import psutil

    me = psutil.Process()
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        try:
            spent = child.cpu_times()
            total += spent.user + spent.system + spent.children_user + spent.children_system
        except psutil.NoSuchProcess:
            continue
    return float(total)


def tree_mb() -> float:
    """Memory of this process and all below it, shared pages divided among those who share them."""
    import psutil

    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def over_ray(folder: Path, quick: bool) -> list[Row]:
    """Ray Data against the torch loader: images per CPU second of all processes, and memory over an epoch."""
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    many = 1536 if quick else 6144
    photos = photo_set(folder, many)
    small = tiny_set(60_000)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    cases: list[tuple[str, ImageSet, LoaderPlan, float]] = [
        (f"{SIDE} px views of {many} JPEGs", photos, plan_of(photos, SIDE, 64, folder, augment="fused"), 0.6),
        (
            f"{TINY} px views of 60,000 images in memory",
            small,
            plan_of(small, TINY, BATCH, folder, augment="fused"),
            0.0,
        ),
    ]
    result = []
    for name, dataset, plan, limit in cases:
        sides = {kind: epoch_of(kind, dataset, plan) for kind in ("torch", "ray")}
        cpu = interleave(sides, 1 if quick else 2, tree_seconds)
        result.append(at_least(f"two {name}, CPU s of all processes: torch / ray", cpu["torch"], cpu["ray"], limit))
    loader, memory = open_loader("ray", photos, cases[0][2]), []
    for step, _ in enumerate(loader.train(99)):
        if step % max(1, loader.steps // 8) == 0:
            memory.append(tree_mb())
    half = len(memory) // 2
    ray.shutdown()
    claim = f"MB (PSS) of all processes, {many} JPEGs over Ray Data: second half of the epoch / first"
    return [*result, at_most(claim, max(memory[half:]), max(memory[:half]), 1.1)]


def start_and_growth(cache: Path, repeats: int) -> list[Row]:
    """The first batch of an epoch of up to 1.28 million rows, and the cost of whole epochs."""
    spec = dataclasses.replace(views.view_spec("fashion", "strong", 8, (0.5,), (0.5,)), jitter=0.0)

    def loader_of(rows: int) -> Any:
        images = np.broadcast_to(np.zeros((1, 8, 8, 1), np.uint8), (rows, 8, 8, 1))
        dataset = ArraySet(
            name="grown", split="train", label=no_labels(rows), weak=no_labels(rows), mean=(0.5,), std=(0.5,),
            images=images,
        )  # fmt: skip
        plan = plan_of(dataset, 8, BATCH, cache, augment="fused")
        return open_loader("torch", dataset, dataclasses.replace(plan, specs=(spec, spec)))

    def first_batch(loader: Any) -> Callable[[], None]:
        def run() -> None:
            batches: Iterator[Any] = loader.train(0)
            next(batches)

        return run

    def whole(loader: Any, epochs: int) -> Callable[[], None]:
        return lambda: _drop(sum(1 for _ in range(epochs) for _ in loader.train(0)))

    starts = interleave({str(n): first_batch(loader_of(n)) for n in (20_000, 1_280_000)}, repeats)
    # As many rows in every turn: a longer turn is interrupted more often, and finds its caches emptied.
    sizes = (20_000, 40_000, 80_000)
    turns = interleave({str(n): whole(loader_of(n), sizes[-1] // n) for n in sizes}, repeats)
    epochs = [turns[str(n)] * n / sizes[-1] for n in sizes]
    exponent = float(np.polyfit(np.log(sizes), np.log(epochs), 1)[0])
    per_row = epochs[-1] / sizes[-1]
    begin = starts["1280000"]
    return [
        at_most("first batch of an epoch of 1,280,000 rows, CPU s: against 0.1 s", begin, 0.1, 1.0, starts["20000"]),
        at_most("the same, as a share of reading that epoch's 8 px images", begin, per_row * 1_280_000, 0.02),
        at_most("CPU time of an epoch grows as N to the power", exponent, 1.0, 1.1),
    ]


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    repeats = 5 if quick else 15
    with tempfile.TemporaryDirectory(prefix="raycon-bench-") as name:
        folders = [Path(name) / part for part in ("tiny", "large", "ray", "grown", "once")]
        for folder in folders:
            folder.mkdir()
        rows = tiny(folders[0], repeats)
        rows += large(folders[1], 96 if quick else 192, max(3, repeats // 2))
        rows += start_and_growth(folders[3], repeats)
        rows += decoding_once(folders[4], 1024 if quick else 4096, max(3, repeats // 2))
        if absent("ray"):
            return rows
        return rows + over_ray(folders[2], quick)


if __name__ == "__main__":
    begun = time.perf_counter()
    main(__doc__ or "", measure)
    sys.stderr.write(f"took {time.perf_counter() - begun:.0f} s\n")
