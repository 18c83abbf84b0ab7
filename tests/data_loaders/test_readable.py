"""What cannot be read is named, and left out when that is wanted; damaged files of every kind are refused, never crash."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from raycon.core.config import ConfigError, DataConfig
from raycon.data_loaders import cifar_files, readable, tables
from raycon.data_loaders.datasets import FileSet, decode, fashion_mnist, open_config, open_dataset

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def jpeg(seed: int, quality: int = 90) -> bytes:
    out, generator = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eight images: 2 cut off, 3 no image at all, 5 empty."""
    root = tmp_path / "images"
    for i in range(8):
        file = root / ("ab"[i % 2]) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes({2: jpeg(i)[:-200], 3: b"no image", 5: b""}.get(i, jpeg(i)))
    return root


def names(dataset: FileSet) -> list[str]:
    return [Path(dataset.where(row)).name for row in range(len(dataset))]


def test_unreadable_images_are_left_out_with_a_count(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig(name="image-folder", root=str(images), on_error="skip", cache=str(tmp_path / "cache"))
    found = open_config(config)
    assert isinstance(found, FileSet)
    assert names(found) == ["0.jpg", "4.jpg", "6.jpg", "1.jpg", "7.jpg"]
    assert found.label.tolist() == [0, 0, 0, 1, 1]
    assert found.dropped == 3
    assert "3 of 8 images cannot be read and are left out" in caplog.text
    for name in ("2.jpg", "3.jpg", "5.jpg"):
        assert name in caplog.text
    kept = json.loads(next((tmp_path / "cache").glob("*.unreadable.json")).read_text(encoding="utf-8"))
    assert kept["images"] == 8
    assert len(kept["unreadable"]) == 3

    def never(*_: object) -> None:
        raise AssertionError("the images were read again")

    with monkeypatch.context() as patched:
        patched.setattr(readable, "look", never)
        assert names(open_config(config)) == names(found)  # type: ignore[arg-type]
    (images / "a" / "2.jpg").write_bytes(jpeg(2))  # mended: looked at again
    assert open_config(config).dropped == 2
    assert open_config(DataConfig(name="image-folder", root=str(images))).dropped == 0


def test_files_that_are_gone_are_left_out(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("a/0.jpg 0\na/absent.jpg 1\nb/1.jpg 2\n", encoding="utf-8")
    config = DataConfig(
        name="image-list", root=str(images), listing=str(listing), on_error="skip", cache=str(tmp_path / "cache")
    )
    found = open_config(config)
    assert (found.label.tolist(), found.dropped) == ([0, 2], 1)
    assert "absent.jpg: no such file" in caplog.text
    whole = open_dataset("image-list", str(images), listing=str(listing))
    with pytest.raises(ValueError, match=r"absent\.jpg: cannot be read.*--data\.on-error skip"):
        _ = whole.fingerprint


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(b"x")
    config = DataConfig(name="image-folder", root=str(tmp_path / "images"), on_error="skip", cache=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="none of its 1 images can be read"):
        open_config(config)


def test_a_quick_look_finds_what_a_full_one_finds(images: Path) -> None:
    """JPEGs are looked at in 1/8 of their size: damage anywhere in the file must still show."""
    file = images / "a" / "0.jpg"
    whole = file.read_bytes()
    for kept in range(len(whole) - 1, 100, -len(whole) // 12):
        file.write_bytes(whole[:kept])
        found = open_dataset("image-folder", images)
        assert isinstance(found, FileSet)
        assert (readable.look(found, 0).problem == "") == (refusal(lambda: decode(whole[:kept], "x")) == ""), kept  # noqa: B023


def test_what_is_seen_of_an_image(images: Path) -> None:
    found = open_dataset("image-folder", images)
    assert isinstance(found, FileSet)
    seen = list(readable.look_at(found, np.arange(8)))
    assert [s.row for s in seen] == list(range(8))
    assert (seen[0].height, seen[0].width, seen[0].size) == (40, 60, (images / "a" / "0.jpg").stat().st_size)
    assert [bool(s.problem) for s in seen] == [False, True, False, False, False, True, True, False]
    assert len({s.digest for s in seen}) == 8


# --- damaged files ----------------------------------------------------------------------------------------------


def broken(whole: bytes) -> st.SearchStrategy[bytes]:
    """``whole`` with some bytes changed, cut out or put in."""
    place = st.integers(0, len(whole))
    edit = st.tuples(place, place, st.binary(max_size=8))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        data = whole
        for a, b, new in edits:
            data = data[: min(a, b)] + new + data[max(a, b) if abs(a - b) < 16 else min(a, b) :]
        return data

    return st.lists(edit, min_size=1, max_size=4).map(apply) | st.binary(max_size=64)


IDX = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(range(24))
BATCH = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [3, 4]}, protocol=2)
TABLE = b'path,label,weak\n"a/0.jpg",1,x\nb/1.jpg,0,y\n'


def refusal(call: Callable[[], object]) -> str:
    """What a user is told; empty when all is well. Any other exception is a failure of the test."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


@few
@given(broken(IDX))
def test_damaged_idx_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i").write_bytes(data)
    found: list[np.ndarray] = []
    told = refusal(lambda: found.append(fashion_mnist.read_idx(tmp_path / "i", (2, 3, 4))))
    assert (str(tmp_path / "i") in told) != (data[:16] == IDX[:16] and len(data) == len(IDX))
    assert told or found[0].tobytes() == data[16:]


@few
@given(broken(BATCH))
def test_damaged_batches_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "b").write_bytes(data)
    found: list[Any] = []
    told = refusal(lambda: found.append(cifar_files.read(tmp_path, "cifar10", "x", "b", labels=10)))
    if told:
        assert str(tmp_path / "b") in told
    else:
        assert found[0]["data"].shape == (len(found[0]["labels"]), 3072)
        assert ((found[0]["labels"] >= 0) & (found[0]["labels"] < 10)).all()


@few
@given(broken(TABLE))
def test_damaged_tables_are_refused(tmp_path: Path, data: bytes) -> None:
    file, roles = tmp_path / "t.csv", ("path", "label")
    file.write_bytes(data)
    found: list[tables.Listed] = []
    told = refusal(lambda: found.append(tables.collect(tables.csv_lines(file, roles), roles, tmp_path, ("train",))))
    if told:
        assert "t.csv" in told
    else:
        assert len(found[0].files) == len(found[0].columns["label"].code)
        assert not any(name.startswith((b"/", b"..")) for name in found[0].files)


@few
@given(broken(jpeg(0, quality=30)))
def test_damaged_images_are_refused_or_read(data: bytes) -> None:
    found: list[np.ndarray] = []
    told = refusal(lambda: found.append(decode(data, "the image")))
    assert "the image: not a readable image" in told or found[0].shape[2] == 3
