"""Three loaders, one stream: rows, order, labels and views, compared with each other and with one row at a time."""

from __future__ import annotations

import dataclasses
import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycon.core.config import ConfigError
from raycon.core.stream import epoch_order, uniforms
from raycon.core.types import Batch, LoaderPlan, Snapshot
from raycon.data_loaders import open_loader
from raycon.data_loaders.common import StreamLoader
from raycon.data_loaders.datasets import ArraySet, FileSet, ImageSet, open_dataset
from raycon.nn import views

AUGMENT = [
    "batched",
    pytest.param("fused", marks=pytest.mark.skipif(find_spec("numba") is None, reason="Numba is not installed")),
]
pytestmark = pytest.mark.usefixtures("cluster")
KINDS = ["torch", pytest.param("ffcv", marks=pytest.mark.ffcv), pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def small() -> ArraySet:
    """300 digits with weak labels, of one size."""
    digits = open_dataset("digits")
    assert isinstance(digits, ArraySet)
    return dataclasses.replace(
        digits, images=digits.images[:300], label=digits.label[:300], weak=digits.label[:300] // 2
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> FileSet:
    """23 smooth JPEG and PNG images, no two of one size, with weak labels."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    for row in range(23):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((30 + 3 * row, 75 - 2 * row), Image.Resampling.BICUBIC).save(
            root / f"{row:02}.{'jpg' if row % 2 else 'png'}", quality=90
        )
    dataset = open_dataset("image-folder", root)
    assert isinstance(dataset, FileSet)
    return dataclasses.replace(dataset, weak=np.arange(23) % 4)


def plan(dataset: ImageSet, cache: Path, **options: Any) -> LoaderPlan:
    size = 8 if dataset.image else 24
    strong = views.view_spec("mocov2", "strong", size, dataset.mean, dataset.std)
    other = views.view_spec("simclr", "strong", size - 2, dataset.mean, dataset.std)
    chosen: dict[str, Any] = {
        "specs": (strong, other),
        "eval_spec": views.eval_spec(size, dataset.mean, dataset.std, resize=size + 3),
        "batch": 64 if dataset.image else 6,
        "seed": 5,
        "rank": 0,
        "world": 1,
        "device": torch.device("cpu"),
        "cache": cache,
    }
    return LoaderPlan(**chosen | options)


def one_by_one(dataset: ImageSet, plan: LoaderPlan, epoch: int, step: int) -> Batch:
    """A batch made of single rows by what the contract says, the whole augmentation in floating point."""
    order, local = epoch_order(plan.seed, epoch, len(dataset)), plan.batch // plan.world
    first = step * plan.batch + plan.rank * local
    rows = order[first : first + local]
    made = []
    for number, spec in enumerate(plan.specs):
        parts = []
        for row in rows:
            pixels = torch.from_numpy(dataset.read(row).copy()).permute(2, 0, 1)[None]
            drawn = uniforms(plan.seed, epoch, np.array([row]), number, views.SLOTS)
            params = views.draw(spec, drawn, pixels.shape[2], pixels.shape[3])
            parts.append(views.make_view(pixels, spec, params))
        made.append(torch.cat(parts))
    return Batch(tuple(made), torch.from_numpy(rows), torch.from_numpy(dataset.weak[rows]))


def assert_equal(found: Batch, expected: Batch, atol: float) -> None:
    torch.testing.assert_close(found.row, expected.row, rtol=0, atol=0)
    torch.testing.assert_close(found.label, expected.label, rtol=0, atol=0)
    assert len(found.views) == len(expected.views)
    for one, other in zip(found.views, expected.views, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_follow_the_contract(small: ArraySet, cache: Path, kind: str, augment: str) -> None:
    for world, first_step in ((1, 2), (2, 1)):
        for rank in range(world):
            asked = plan(small, cache, rank=rank, world=world, augment=augment)
            loader = open_loader(kind, small, asked)
            assert (loader.kind, loader.rows, loader.steps) == (kind, 300, 300 // 64)
            batches = list(loader.train(3, first_step))
            assert len(batches) == loader.steps - first_step
            for step, batch in enumerate(batches, first_step):
                assert all(view.is_contiguous(memory_format=torch.channels_last) for view in batch.views)
                assert_equal(batch, one_by_one(small, asked, 3, step), atol=1e-5)
            loader.close()


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("kind", KINDS)
def test_photos_follow_the_contract(photos: FileSet, cache: Path, kind: str, augment: str) -> None:
    asked = plan(photos, cache, rank=1, world=2, batch=8, augment=augment)
    loader = open_loader(kind, photos, asked)
    batches = list(loader.train(1))
    assert len(batches) == 2
    # A crop is rounded to whole grey values; the colour operations and the division by std multiply that error.
    plain = [dataclasses.replace(spec, jitter=0.0, gray=0.0, blur=0.0) for spec in asked.specs]
    for step, batch in enumerate(batches):
        assert_equal(batch, one_by_one(photos, asked, 1, step), atol=0.08)
    gentle = open_loader(kind, photos, dataclasses.replace(asked, specs=tuple(plain)))
    expected = one_by_one(photos, gentle.plan, 1, 0)
    assert_equal(next(gentle.train(1)), expected, atol=1.01 / 255 / 0.224)
    loader.close()
    gentle.close()


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("data", ["small", "photos"])
def test_loaders_agree_to_the_bit(
    data: str, cache: Path, kind: str, augment: str, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(data)
    asked = plan(dataset, cache, rank=1, world=2, augment=augment, workers=2 if kind == "ffcv" else 0)
    reference, other = open_loader("torch", dataset, asked), open_loader(kind, dataset, asked)
    for epoch, first_step in ((0, 0), (1, 1)):
        for one, two in zip(reference.train(epoch, first_step), other.train(epoch, first_step), strict=True):
            assert_equal(two, one, atol=0)
    for image, twin in zip(reference.scan(), other.scan(), strict=True):
        assert torch.equal(image.row, twin.row)
        assert torch.equal(image.images, twin.images)


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["small", "photos"])
def test_views_of_neighbours_and_of_the_warmup(
    data: str, cache: Path, kind: str, augment: str, request: pytest.FixtureRequest
) -> None:
    """The last two views are of images of the row's neighbours, and the first epoch has its own views."""
    dataset = request.getfixturevalue(data)
    mean, std, size = dataset.mean, dataset.std, 8 if dataset.image else 24
    plain = views.ViewSpec(size=size, jitter=0, gray=0, blur=0, mean=mean, std=std)
    small = dataclasses.replace(plain, size=size // 2, crop_scale=(0.1, 0.5))
    whole = dataclasses.replace(plain, crop_scale=(1.0, 1.0), flip=0.0)
    asked = plan(
        dataset, cache, rank=1, world=2, specs=(plain, small, small), warmup_specs=(whole, small, small),
        warmup_epochs=1, neighbour_views=2, batch=64 if dataset.image else 6, augment=augment,
    )  # fmt: skip
    rows = len(dataset)
    neighbours = torch.stack([torch.arange(1, rows + 1) % rows, torch.arange(5, rows + 5) % rows], dim=1)
    chosen: set[int] = set()
    for epoch, table in ((0, neighbours), (1, neighbours), (1, None)):
        loader = open_loader(kind, dataset, asked)
        snapshot = None if table is None else Snapshot(0, (), (), (), table)
        for step, batch in enumerate(itertools.islice(loader.train(epoch, 1, snapshot), 1), 1):
            first = one_by_one(dataset, dataclasses.replace(asked, specs=(plain if epoch else whole,)), epoch, step)
            atol = 1e-5 if dataset.image else 1.01 / 255 / 0.224
            torch.testing.assert_close(batch.views[0], first.views[0], rtol=0, atol=atol)
            assert torch.equal(batch.row, first.row)
            assert torch.equal(batch.label, first.label)
            for view in (1, 2):
                for at, row in enumerate(batch.row.tolist()[:12]):
                    candidates = [row] if table is None else table[row].tolist()
                    drawn = uniforms(asked.seed, epoch, np.array([row]), view, views.SLOTS)
                    fits = []
                    for other in candidates:
                        pixels = torch.from_numpy(dataset.read(other).copy()).permute(2, 0, 1)[None]
                        made = views.make_view(pixels, small, views.draw(small, drawn, *pixels.shape[2:]))
                        fits.append(torch.allclose(batch.views[view][at : at + 1], made, rtol=0, atol=atol))
                    assert any(fits), (kind, epoch, step, view, row)
                    chosen |= {fits.index(True) + len(candidates) * view} if fits.count(True) == 1 else set()
        loader.close()
    # Without neighbours: 2 and 3, the row itself (1 candidate); with them both neighbours of both views.
    assert {2, 3, 4, 5} <= chosen


def test_batches_of_groups(small: ArraySet, cache: Path) -> None:
    """Rows of one cluster, or of one label, in groups of 4 of one batch and rank; every row at most once an epoch."""
    cluster = torch.arange(300) % 23
    snapshot = Snapshot(0, (cluster,), (torch.zeros(23, 2),), (), None)
    label = dataclasses.replace(small, weak=np.where(np.arange(300) % 3 == 0, -1, small.weak))
    kinds = (("cluster", small, cluster.numpy(), False), ("label", label, label.weak, True))
    for kind, dataset, of_row, by_label in kinds:
        orders = {}
        for world in (1, 2):
            plans = [plan(dataset, cache, rank=r, world=world, group=4, group_by_label=by_label) for r in range(world)]
            loaders = [open_loader("torch", dataset, p) for p in plans]
            steps = zip(*(loader.train(2, 0, snapshot) for loader in loaders), strict=True)
            orders[world] = [row for batches in steps for batch in batches for row in batch.row.tolist()]
        assert orders[1] == orders[2]
        groups = np.array(orders[1]).reshape(-1, 4)
        assert len(np.unique(groups)) == groups.size == 256
        one = (of_row[groups] == of_row[groups][:, :1]).all(1) & (of_row[groups] >= 0).all(1)
        # 23 clusters of 13 or 14 rows give 69 whole groups of 75; 5 labels of about 40 among 200 about 48.
        assert one.mean() > (0.85 if kind == "cluster" else 0.55)
        assert not (of_row[groups[~one]] == of_row[groups[~one]][:, :1]).all(1).any() or by_label
        later = next(open_loader("torch", dataset, plans[0]).train(2, 1, snapshot)).row.tolist()
        assert later == orders[1][64:96]
        assert (
            len(set(np.flatnonzero(one).tolist()) - set(range(len(one) // 2))) > 10
        )  # whole groups all over the epoch
    plain = [b.row.tolist() for b in open_loader("torch", small, plan(small, cache)).train(2)]
    ungrouped = open_loader("torch", small, plan(small, cache, group=4))
    assert [b.row.tolist() for b in ungrouped.train(2)] == plain  # no snapshot yet


def test_the_choice_of_neighbours_is_even_and_the_same_everywhere(small: ArraySet, cache: Path) -> None:
    from raycon.data_loaders.common import sources

    asked = plan(small, cache, neighbour_views=1)
    table = torch.arange(4000)[:, None] * 4 + torch.arange(4)
    rows = np.arange(4000)
    found = sources(asked, rows, 3, table)
    np.testing.assert_array_equal(found[:, 0], rows)
    share = np.bincount(found[:, 1] - 4 * rows, minlength=4) / len(rows)
    assert np.abs(share - 0.25).max() < 0.03
    np.testing.assert_array_equal(sources(asked, rows[::-7], 3, table), found[::-7])
    assert (sources(asked, rows, 4, table) != found).any()


@pytest.mark.parametrize("kind", KINDS)
def test_scan_covers_each_row_once_over_the_ranks(small: ArraySet, photos: FileSet, cache: Path, kind: str) -> None:
    for dataset, worlds in ((small, (1, 3)), (photos, (2,))):
        for world in worlds:
            found = []
            for rank in range(world):
                loader = open_loader(kind, dataset, plan(dataset, cache, rank=rank, world=world, batch=6))
                for block in loader.scan():
                    found += block.row.tolist()
                    pixels = torch.from_numpy(dataset.read(int(block.row[-1])).copy()).permute(2, 0, 1)[None]
                    expected = views.eval_view(pixels, loader.plan.eval_spec)
                    atol = 1e-5 if dataset.image else 1.01 / 255 / 0.224
                    torch.testing.assert_close(block.images[-1:], expected, rtol=0, atol=atol)
                loader.close()
            assert found == list(range(len(dataset)))


def test_ranks_share_out_the_same_global_batches(small: ArraySet, cache: Path) -> None:
    def rows(world: int) -> list[list[int]]:
        loaders = [open_loader("torch", small, plan(small, cache, rank=rank, world=world)) for rank in range(world)]
        steps = zip(*(loader.train(2) for loader in loaders), strict=True)
        return [[row for batch in step for row in batch.row.tolist()] for step in steps]

    assert rows(1) == rows(2) == rows(4)
    flat = [row for step in rows(1) for row in step]
    assert len(set(flat)) == len(flat) == 256


@pytest.mark.parametrize(
    ("data", "kind", "augment"),
    [
        *(pytest.param(data, "torch", augment) for data in ("small", "photos") for augment in ("batched", "fused")),
        pytest.param("small", "ffcv", "fused", marks=pytest.mark.ffcv),
        pytest.param("photos", "ffcv", "batched", marks=pytest.mark.ffcv),
        pytest.param("small", "ray", "fused", marks=pytest.mark.ray),
        pytest.param("photos", "ray", "batched", marks=pytest.mark.ray),
    ],
)
def test_the_stream_is_elastic(data: str, cache: Path, kind: str, augment: str, request: pytest.FixtureRequest) -> None:
    """An epoch's rows and views on 1, 2 and 3 ranks; and gone on with, in its middle, by other numbers of ranks."""
    if augment == "fused":
        pytest.importorskip("numba")
    dataset = request.getfixturevalue(data)
    batch, epoch = (60, 4) if dataset.image else (6, 4)

    def steps(world: int, first: int, last: int, kind: str = kind) -> list[list[tuple[int, tuple[torch.Tensor, ...]]]]:
        found: list[list[tuple[int, tuple[torch.Tensor, ...]]]] = [[] for _ in range(first, last)]
        for rank in range(world):
            loader = open_loader(
                kind, dataset, plan(dataset, cache, batch=batch, rank=rank, world=world, augment=augment)
            )
            for step, part in enumerate(itertools.islice(loader.train(epoch, first), last - first)):
                rows = part.row.tolist()
                found[step] += [(row, tuple(v[at] for v in part.views)) for at, row in enumerate(rows)]
            loader.close()
        return found

    all_steps = len(dataset) // batch
    reference = steps(1, 0, all_steps, "torch")
    order = epoch_order(5, epoch, len(dataset))[: all_steps * batch]
    assert [row for step in reference for row, _ in step] == order.tolist()
    resumed = steps(3, 0, 1) + steps(1, 1, 2) + steps(2, 2, all_steps)
    for found in (*(steps(world, 0, all_steps) for world in (1, 2, 3)), resumed):
        for one, two in zip(found, reference, strict=True):
            assert [row for row, _ in one] == [row for row, _ in two]
            for (_, views_one), (_, views_two) in zip(one, two, strict=True):
                for a, b in zip(views_one, views_two, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0 if augment == "fused" else 2e-5)


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("data", ["small", "photos"])
def test_bf16_views_are_rounded_fp32_ones(
    data: str, cache: Path, kind: str, augment: str, request: pytest.FixtureRequest
) -> None:
    dataset = request.getfixturevalue(data)
    asked = plan(dataset, cache, rank=1, world=2, augment=augment)
    loaders = [open_loader(kind, dataset, dataclasses.replace(asked, bf16=bf16)) for bf16 in (False, True)]
    for whole, half in itertools.islice(zip(*(loader.train(1) for loader in loaders), strict=True), 2):
        assert torch.equal(whole.row, half.row)
        for one, two in zip(whole.views, half.views, strict=True):
            assert two.dtype == torch.bfloat16
            assert two.is_contiguous(memory_format=torch.channels_last)
            assert (two.float() - one).abs().le(one.abs() * 2.0**-8).all()  # 8 bits, to the nearest
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_may_be_left_early(small: ArraySet, cache: Path, kind: str) -> None:
    loader = open_loader(kind, small, plan(small, cache))
    expected = [batch.row.tolist() for batch in loader.train(1)]
    for _ in range(3):
        left = loader.train(0)
        next(left)
        left.close()  # type: ignore[attr-defined]
    assert [batch.row.tolist() for batch in loader.train(1)] == expected
    assert list(loader.train(0, loader.steps)) == []


@pytest.mark.slow
def test_helper_processes_change_nothing(photos: FileSet, cache: Path) -> None:
    with_helpers = open_loader("torch", photos, plan(photos, cache, workers=2))
    without = open_loader("torch", photos, plan(photos, cache))
    early = with_helpers.train(0)
    next(early)
    del early
    for epoch in (0, 1):
        for one, two in zip(without.train(epoch, 1), with_helpers.train(epoch, 1), strict=True):
            assert_equal(two, one, atol=0)
    for image, twin in zip(without.scan(), with_helpers.scan(), strict=True):
        assert torch.equal(image.images, twin.images)
    with_helpers.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unreadable_image_is_named(photos: FileSet, tmp_path: Path, kind: str) -> None:
    for file in photos.root.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = tmp_path / "11.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    dataset = open_dataset("image-folder", tmp_path)
    loader = open_loader(kind, dataset, plan(dataset, tmp_path))
    with pytest.raises(Exception, match=r"11\.jpg: not a readable image"):
        list(loader.scan())


@pytest.mark.ray
def test_ray_keeps_the_order_of_many_blocks(photos: FileSet, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raycon.data_loaders import ray_data

    asked = plan(photos, cache)
    reference, other = open_loader("torch", photos, asked), open_loader("ray", photos, asked)
    monkeypatch.setattr(ray_data, "BLOCK_BYTES", 1)  # a task per row
    for tasks in (1000, 13):  # at most so many in one Ray Dataset of rows for batches of 6
        monkeypatch.setattr(ray_data, "TASKS", tasks)
        for one, two in zip(reference.train(0), other.train(0), strict=True):
            assert_equal(two, one, atol=0)


@pytest.mark.ray
def test_ray_works_inside_a_rank_that_holds_all_cpus(small: ArraySet, cache: Path) -> None:
    import ray

    def rows(kind: str, asked: LoaderPlan) -> list[int]:
        return [row for batch in open_loader(kind, small, asked).train(0) for row in batch.row.tolist()]

    for cpus, world in ((1, 2), (2, 1)):
        plans = [plan(small, cache, rank=rank, world=world) for rank in range(world)]
        found = ray.get([ray.remote(num_cpus=cpus)(rows).remote("ray", asked) for asked in plans], timeout=60)
        assert found == [rows("torch", asked) for asked in plans]


def test_plans_that_cannot_be_served(small: ArraySet, cache: Path) -> None:
    with pytest.raises(ConfigError, match="batch = 9 does not divide over 2 ranks"):
        open_loader("torch", small, plan(small, cache, batch=9, world=2))
    with pytest.raises(ConfigError, match="batch = 301 is more than the 300 images"):
        open_loader("torch", small, plan(small, cache, batch=301))
    with pytest.raises(ConfigError, match="'tensorflow': there are auto, ffcv, ray, torch"):
        open_loader("tensorflow", small, plan(small, cache))


@pytest.mark.parametrize("how", ["absent", "broken"])
def test_auto_falls_back_to_torch(small: ArraySet, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    from raycon.data_loaders import ffcv

    def broken() -> None:
        raise ImportError("FFCV cannot be imported: install raycon[ffcv]")

    monkeypatch.setattr(ffcv, "import_ffcv", broken)
    if how == "absent":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert open_loader("auto", small, plan(small, cache)).kind == "torch"
    with pytest.raises(ConfigError, match=r"'ffcv': .*install raycon\[ffcv\]"):
        open_loader("ffcv", small, plan(small, cache))


@pytest.mark.ffcv
def test_auto_takes_ffcv_and_leaves_torchs_threads_alone(small: ArraySet, cache: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        loader = open_loader("auto", small, plan(small, cache))
        assert loader.kind == "ffcv"
        assert len(list(loader.train(0))) == loader.steps
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_loaders_satisfy_the_protocol(small: ArraySet, cache: Path) -> None:
    from raycon.core.types import Loader

    loader: Loader = open_loader("torch", small, plan(small, cache))
    assert isinstance(loader, StreamLoader)
