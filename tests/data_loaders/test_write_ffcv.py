"""The .beton file: exact, written once, never used half-written or foreign."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from raycon.core.config import ConfigError
from raycon.data_loaders.datasets import ArraySet, ImageSet, open_dataset
from raycon.data_loaders.write_ffcv import beton_problem, ensure_beton, pack, write_beton

pytestmark = pytest.mark.ffcv


@pytest.fixture(scope="module")
def digits() -> ArraySet:
    dataset = open_dataset("digits", split="test")
    assert isinstance(dataset, ArraySet)
    return dataclasses.replace(dataset, weak=dataset.label // 3)


def test_stock_ffcv_reads_it_exactly(digits: ArraySet, tmp_path: Path) -> None:
    from ffcv.loader import Loader, OrderOption

    images = np.random.default_rng(0).integers(0, 256, (360, 95, 97, 3), dtype=np.uint8)  # several pages
    dataset = dataclasses.replace(digits, images=images, mean=(0.5,) * 3, std=(0.5,) * 3)
    write_beton(dataset, tmp_path / "a.beton")
    for os_cache in (True, False):
        loader = Loader(
            str(tmp_path / "a.beton"), 50, 1, os_cache=os_cache, order=OrderOption.RANDOM, seed=1, drop_last=False
        )
        seen = []
        for image, row, label in loader:
            rows = row[:, 0].numpy()
            np.testing.assert_array_equal(image.numpy(), images[rows])
            np.testing.assert_array_equal(label[:, 0].numpy(), dataset.weak[rows])
            seen += rows.tolist()
        assert sorted(seen) == list(range(360))


def test_damaged_and_foreign_files_are_found_and_written_again(
    digits: ArraySet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = ensure_beton(digits, tmp_path)
    whole, when = file.read_bytes(), file.stat().st_mtime_ns
    assert ensure_beton(digits, tmp_path) == file
    assert file.stat().st_mtime_ns == when
    end = len(whole)
    flipped = bytearray(whole)
    flipped[2**21 + 3] ^= 1  # a pixel of the first image
    wrong = {
        "too short": whole[:10],
        "not written to its end": whole[: end // 2],
        "its end": whole + b"\0",
        "not a .beton": b"x" * end,
        "image 0 differs": bytes(flipped),
    }
    for problem, content in wrong.items():
        file.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ensure_beton(digits, tmp_path)
        assert problem in caplog.text
        assert file.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {file.name, file.with_suffix(".lock").name}


def test_other_data_get_another_file(digits: ArraySet, tmp_path: Path) -> None:
    other = dataclasses.replace(digits, weak=digits.label)
    first, second = ensure_beton(digits, tmp_path), ensure_beton(other, tmp_path)
    assert first != second
    assert beton_problem(first, other) == "its row numbers or labels differ"
    fewer = dataclasses.replace(digits, images=digits.images[:9], label=digits.label[:9], weak=digits.weak[:9])
    assert beton_problem(first, fewer) == "it holds 360 images, not 9"
    colour = dataclasses.replace(digits, images=np.zeros((360, 8, 8, 3), np.uint8), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert "its images are" in str(beton_problem(first, colour))


def _ensure(dataset: ImageSet, folder: Path, written: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    from raycon.data_loaders import write_ffcv

    plain = write_ffcv.write_beton

    def counted(dataset: ImageSet, file: Path) -> None:
        plain(dataset, file)
        written.put("written")

    write_ffcv.write_beton = counted  # type: ignore[assignment]
    written.put(str(ensure_beton(dataset, folder)))


@pytest.mark.slow  # each process imports FFCV
def test_processes_at_the_same_time_write_it_once(digits: ArraySet, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    written = context.Queue()
    processes = [context.Process(target=_ensure, args=(digits, tmp_path, written)) for _ in range(2)]
    for process in processes:
        process.start()
    answers = [written.get(timeout=120) for _ in range(3)]
    for process in processes:
        process.join()
    assert sorted(answers)[-1] == "written"
    assert len(set(answers)) == 2


def test_a_file_that_goes_away_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in ("0.png", "1.png"):
        (source / name).write_bytes(b"x")
    dataset = open_dataset("image-folder", source)

    def goes_away(rows: int) -> None:
        (source / "1.png").unlink(missing_ok=True)

    with pytest.raises(ValueError, match=r"1\.png: cannot be read"):
        write_beton(dataset, out / "a.beton", goes_away)
    assert list(out.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(digits: ArraySet, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data\.cache: cannot write .*file/sub"):
        ensure_beton(digits, tmp_path / "file" / "sub")


class Killed(BaseException):
    """What a signal does to the process, as far as the file is concerned."""


@pytest.fixture
def many(digits: ArraySet) -> ArraySet:
    """60 MB of images: two spans."""
    images = np.random.default_rng(0).integers(0, 256, (60, 600, 600, 3), dtype=np.uint8)
    few = {"label": digits.label[:60], "weak": digits.weak[:60]}
    return dataclasses.replace(digits, images=images, mean=(0.5,) * 3, std=(0.5,) * 3, **few)


def test_a_stopped_writer_s_work_is_gone_on_with(
    many: ArraySet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, told = tmp_path / "a.beton", []

    def stop(rows: int) -> None:
        if rows:
            raise Killed

    with pytest.raises(Killed):
        write_beton(many, file, stop)
    assert not file.exists()
    with caplog.at_level(logging.INFO):
        write_beton(many, file, told.append)
    assert "going on after" in caplog.text
    assert 0 < told[0] < 60
    assert told[-1] == 60
    assert beton_problem(file, many) is None
    write_beton(many, tmp_path / "b.beton")
    assert file.read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.beton", "b.beton"}
    with pytest.raises(Killed):
        write_beton(many, file, stop)
    other = many.subset(np.arange(60)[::-1])
    write_beton(other, file, told.append)  # the leftovers are of other data
    assert beton_problem(file, other) is None


def test_all_of_the_file_is_read_again(many: ArraySet, tmp_path: Path) -> None:
    file = tmp_path / "a.beton"
    part = file.with_name(".a.beton.part")

    def damage(rows: int) -> None:
        if rows == 60:
            with part.open("r+b") as out:
                out.seek(2**21 + 1000)
                out.write(b"damaged")

    with pytest.raises(OSError, match=r"images 0 \.\. \d+ were not written correctly"):
        write_beton(many, file, damage)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_mix(many: ArraySet, tmp_path: Path) -> None:
    def second(rows: int) -> None:
        with pytest.raises(ConfigError, match="being written by another process"):
            write_beton(many, tmp_path / "a.beton")

    write_beton(many, tmp_path / "a.beton", second)
    assert beton_problem(tmp_path / "a.beton", many) is None


@pytest.mark.ray
def test_tasks_write_the_same_file(tmp_path: Path) -> None:
    import ray
    from PIL import Image

    from raycon.on_ray import here
    from raycon.on_ray.tasks import in_order

    generator = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(generator.integers(0, 256, (2400, 2000, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png", compress_level=0
        )
    dataset = open_dataset("image-folder", tmp_path)
    write_beton(dataset, tmp_path / "here.beton")
    here.start(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        write_beton(dataset, tmp_path / "there.beton", fetch=lambda data, spans: in_order(pack, data, spans, workers=2))
        with pytest.raises(ValueError, match=r"1\.png: cannot be read"):
            write_beton(
                dataset,
                tmp_path / "bad.beton",
                lambda rows: (tmp_path / "1.png").unlink(missing_ok=True),
                lambda data, spans: in_order(pack, data, spans, workers=2),
            )
    finally:
        ray.shutdown()
    assert (tmp_path / "here.beton").read_bytes() == (tmp_path / "there.beton").read_bytes()
