"""Folders, lists and tables, on disk and at addresses."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycon.core.config import ConfigError, DataConfig
from raycon.data_loaders.datasets import FileSet, ImageSet, open_config, open_dataset
from raycon.index.metadata import attribute_clusters

NAMES = ("cats/one.png", "cats/a b.png", "dogs/two.png", "dogs/deep/er.png")


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(out, format="PNG")
    return out.getvalue()


def colours(dataset: ImageSet) -> list[int]:
    return [int(dataset.read(row)[0, 0, 0]) for row in range(len(dataset))]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    return tmp_path / "images"


@pytest.fixture
def memory() -> Iterator[str]:
    """An address with the same images below train, and a list and a table beside them."""
    import fsspec

    system = fsspec.filesystem("memory")
    for i, name in enumerate(NAMES):
        system.pipe(f"/bucket/train/{name}", png(i))
    system.pipe("/bucket/train/.hidden/x.png", b"")
    system.pipe("/bucket/val/dogs/v.png", png(9))
    system.pipe("/bucket/list.txt", b"train/dogs/two.png 1\ntrain/cats/a b.png 0\n")
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def written(file: Path, *lines: str) -> str:
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


# --- folders ----------------------------------------------------------------------------------------------------


def test_images_may_lie_deeper_in_a_class_folder(images: Path) -> None:
    (images / "dogs" / "back").symlink_to(images / "dogs", target_is_directory=True)
    (images / ".hidden").mkdir()
    (images / "cats" / "notes.txt").write_text("x", encoding="utf-8")
    found = open_dataset("image-folder", images)
    assert colours(found) == [1, 0, 3, 2]
    assert found.classes == ("cats", "dogs")


def test_the_classes_of_every_split_are_those_of_train(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    root.mkdir()
    images.rename(root / "train")
    for split, number in (("val", 7), ("test", 8)):
        (root / split / "dogs").mkdir(parents=True)
        (root / split / "dogs" / "x.png").write_bytes(png(number))
    for split, number in (("val", 7), ("test", 8)):
        found = open_dataset("image-folder", root, split)
        assert (found.label.tolist(), colours(found), found.classes) == ([1], [number], ("cats", "dogs"))
    assert "1 of 2 classes have no images: cats" in caplog.text
    (root / "val" / "birds").mkdir()
    with pytest.raises(ConfigError, match="classes that the train split does not have: birds"):
        open_dataset("image-folder", root, "val")


def test_an_empty_class_keeps_its_number_and_is_warned_about(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "cows").mkdir()
    found = open_dataset("image-folder", images)
    assert found.classes == ("cats", "cows", "dogs")
    assert np.bincount(found.label).tolist() == [2, 0, 2]
    assert "1 of 3 classes have no images: cows" in caplog.text


def test_folders_at_an_address(memory: str) -> None:
    found = open_dataset("image-folder", memory)
    assert isinstance(found, FileSet)
    assert found.classes == ("cats", "dogs")
    assert colours(found) == [1, 0, 3, 2]
    assert found.label.tolist() == [0, 0, 1, 1]
    assert found.where(0) == "memory://bucket/train/cats/a b.png"
    assert found.path(0) is None
    np.testing.assert_array_equal(found.sizes(), [len(png(i)) for i in (1, 0, 3, 2)])
    assert open_dataset("image-folder", memory, "test").label.tolist() == [1]
    first = found.fingerprint
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/train/cats/one.png", png(0) + b"more")
    assert open_dataset("image-folder", memory).fingerprint != first
    fsspec.filesystem("memory").rm("/bucket/train/cats/one.png")
    with pytest.raises(ValueError, match=r"memory://bucket/train/cats/one\.png: cannot be read"):
        found.read(1)
    with pytest.raises(ConfigError, match="read from a local folder only"):
        open_dataset("cifar10", memory)


# --- lists ------------------------------------------------------------------------------------------------------


def test_lists(images: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "list.txt", "dogs/two.png 1", "", f"{images}/cats/a b.png  0", "cats/one.png -1")
    found = open_dataset("image-list", images, listing=file)
    assert (found.label.tolist(), colours(found)) == ([1, 0, -1], [2, 1, 0])
    assert (found.classes, found.weak.tolist()) == (("0", "1"), [-1, -1, -1])
    file = written(tmp_path / "list.txt", "big 3 cats/a b.png", "small 0 dogs/two.png")
    found = open_dataset("image-list", images, listing=file, columns=("weak", "label", "path"))
    assert (found.label.tolist(), found.weak.tolist(), colours(found)) == ([3, 0], [0, 1], [1, 2])
    assert found.weak_classes == ("big", "small")
    file = written(images / "list.txt", "cats/a b.png", "dogs/two.png")
    found = open_config(DataConfig(name="image-list", listing=file, columns=("path",)))
    assert (found.label.tolist(), colours(found)) == ([-1, -1], [1, 2])
    with pytest.raises(ConfigError, match=r"no split 'test'.*there are train"):
        open_dataset("image-list", images, "test", listing=file)


def test_the_numbers_of_named_classes_are_those_of_train(images: Path, tmp_path: Path) -> None:
    written(tmp_path / "train.txt", "cats/one.png cat", "dogs/two.png dog", "cats/a b.png bird")
    written(tmp_path / "val.txt", "dogs/two.png dog")
    found = open_dataset("image-list", images, "test", listing=str(tmp_path / "{split}.txt"))
    assert (found.label.tolist(), found.classes) == ([2], ("bird", "cat", "dog"))
    written(tmp_path / "val.txt", "dogs/two.png cow")
    with pytest.raises(ConfigError, match=r"val\.txt, label: label 'cow' is none of the train split's"):
        open_dataset("image-list", images, "val", listing=str(tmp_path / "{split}.txt"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("../../etc/passwd.png 1", r"line 2: '\.\./\.\./etc/passwd\.png' leads out of data\.root"),
        ("/etc/passwd.png 1", "line 2: .* leads out of data.root"),
        ("cats/../../x.png 1", "leads out"),
        ("s3://other/x.png 1", "is not below data"),
        ("alone", r"line 2: 'alone' has not 2 parts.*--data\.columns path"),
        ("cats/one.png 1000000", "label 1000000 among 2 different labels"),
    ],
)
def test_wrong_lines_are_named(line: str, words: str, images: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "list.txt", "cats/one.png 0", line)
    with pytest.raises(ConfigError, match=words):
        open_dataset("image-list", images, listing=file)


def test_lists_that_cannot_be_meant(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"data\.listing is not given"):
        open_dataset("image-list", images)
    with pytest.raises(ConfigError, match="no such file"):
        open_dataset("image-list", images, listing=str(tmp_path / "absent.txt"))
    file = written(tmp_path / "list.txt", "one.png 0")
    with pytest.raises(ConfigError, match=r"its first image .*one.png' is not there; is data.root right"):
        open_dataset("image-list", images, listing=file)
    with pytest.raises(ConfigError, match="give path, label, weak"):
        open_dataset("image-list", images, listing=file, columns=("path", "size"))
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        open_dataset("image-list", images, listing=file)
    open_dataset("digits", listing=file)
    assert "data.listing" in caplog.text
    assert "no effect: digits has no such option" in caplog.text


def test_lists_at_an_address(memory: str) -> None:
    found = open_dataset("image-list", memory, listing=f"{memory}/list.txt")
    assert (found.label.tolist(), colours(found)) == ([1, 0], [2, 1])
    assert open_dataset("image-list", listing=f"{memory}/list.txt").fingerprint == found.fingerprint


# --- tables -----------------------------------------------------------------------------------------------------

HEADER = ["", "file", "species", "family", "part", "wing", "beak", "tail"]
ROWS = [
    ["0", "cats/one.png", "tabby", "cat", "train", "no", "no", "long"],
    ["1", "dogs/two.png", "poodle", "dog", "train", "no", "no", "short"],
    ["2", "cats/a b.png", "manx", "cat", "train", "no", "no", "none"],
    ["3", "dogs/deep/er.png", "poodle", "dog", "val", "no", "no", "long"],
]
COLUMNS = ("path=file", "label=species", "weak=family", "split=part")


def tables(folder: Path) -> list[str]:
    """The same table as CSV, TSV and Parquet."""
    import pyarrow
    import pyarrow.parquet

    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, delimiter=mark).writerows([HEADER, *ROWS])
    table = pyarrow.table(dict(zip(HEADER, map(list, zip(*ROWS, strict=True)), strict=True)))
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=2)
    return [str(folder / f"t.{ending}") for ending in ("csv", "tsv", "parquet")]


def test_tables(images: Path, tmp_path: Path) -> None:
    for file in tables(tmp_path):
        train = open_dataset("image-table", images, listing=file, columns=COLUMNS)
        assert (train.label.tolist(), colours(train), train.weak.tolist()) == ([2, 1, 0], [0, 2, 1], [0, 1, 0])
        assert (train.classes, train.weak_classes) == (("manx", "poodle", "tabby"), ("cat", "dog"))
        test = open_dataset("image-table", images, "test", listing=file, columns=COLUMNS)
        assert (test.label.tolist(), test.weak.tolist(), colours(test)) == ([1], [1], [3])


def test_attributes_make_weak_labels(images: Path, tmp_path: Path) -> None:
    for file in tables(tmp_path):
        columns = ("path=file", "attributes=wing,tail,family")
        found = open_dataset("image-table", images, listing=file, columns=columns, level="1")
        assert found.attribute_names == ("wing", "tail", "family")
        text = np.array([[row[5], row[7], row[3]] for row in ROWS])
        expected = attribute_clusters(text, 1)  # the tail
        pairs = {(int(a), int(b)) for a, b in zip(found.weak, expected, strict=True)}
        assert len(pairs) == len(set(found.weak.tolist())) == len(set(expected.tolist())) == 3
        with pytest.raises(ConfigError, match=r"data\.level = '4'.*1 \.\. 3"):
            open_dataset("image-table", images, listing=file, columns=columns, level="4")


def test_tables_with_the_usual_names_need_no_columns(images: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    file = written(tmp_path / "t.csv", 'label,path,"split"', '1,"cats/a b.png",train', "0,dogs/two.png,test")
    assert open_dataset("image-table", images, listing=file).label.tolist() == [1]
    assert colours(open_dataset("image-table", images, "test", listing=file)) == [2]
    table = pyarrow.table({"path": ["cats/one.png", "dogs/two.png"], "label": [3, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert open_dataset("image-table", images, listing=str(tmp_path / "t.parquet")).label.tolist() == [3, 0]


def test_wrong_tables_are_named(images: Path, tmp_path: Path) -> None:
    def refused(words: str, *lines: str, columns: tuple[str, ...] = (), name: str = "t.csv") -> None:
        file = written(tmp_path / name, *lines)
        with pytest.raises(ConfigError, match=words):
            open_dataset("image-table", images, listing=file, columns=columns)

    refused(r"t\.csv has no column 'path'; it has 'file', 'label'", "file,label", "cats/one.png,1")
    refused(r"t\.csv: line 3 has 1 cells, the header 2", "path,label", "cats/one.png,1", "cats/one.png")
    refused(r"t\.csv: line 2: no label", "path,label", "cats/one.png,")
    refused(r"t\.csv: line 3: '\.\./x\.png' leads out", "path,label", "cats/one.png,1", "../x.png,1")
    refused("give ROLE=COLUMN", "path,label", "cats/one.png,1", columns=("label",))
    refused("not a Parquet file", "path,label", "cats/one.png,1", name="t.parquet")
    refused(r"t\.csv: no line of split train; there are a, b", "path,split", "cats/one.png,a", "cats/one.png,b")
    refused("lists no images", "path,label")
    file = written(tmp_path / "t.csv", "path,label", "cats/one.png,1")
    with pytest.raises(ConfigError, match=r"no split 'test'.*there are train"):
        open_dataset("image-table", images, "test", listing=file)


def test_a_table_at_an_address(memory: str, tmp_path: Path) -> None:
    import fsspec

    for file in tables(tmp_path):
        with Path(file).open("rb") as handle:
            fsspec.filesystem("memory").pipe(f"/bucket/{Path(file).name}", handle.read())
        listing = f"{memory}/{Path(file).name}"
        found = open_dataset("image-table", f"{memory}/train", listing=listing, columns=COLUMNS)
        assert (found.label.tolist(), colours(found)) == ([2, 1, 0], [0, 2, 1])


def test_a_list_of_thirty_thousand_is_a_few_arrays(tmp_path: Path) -> None:
    """One object per image would show in the pickle that goes to every worker, and in the number of objects."""
    import gc
    import pickle

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "000000.jpg").write_bytes(b"")
    file = written(tmp_path / "list.txt", *(f"a/{i:06d}.jpg {i % 100}" for i in range(30_000)))
    gc.collect()
    before = len(gc.get_objects())
    found = open_dataset("image-list", tmp_path, listing=file)
    gc.collect()
    assert len(gc.get_objects()) - before < 2_000
    assert len(pickle.dumps(found)) < 30_000 * (12 + 8 + 8) + 10_000
    assert found.label[-1] == 99


def test_warnings_are_of_our_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        open_dataset("digits", level="3")
    assert caplog.records[0].name.startswith("raycon.")


def test_what_is_odd_about_a_list_is_warned_about(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "list.txt", "cats/one.png 3", "dogs/two.png 1", "cats/../cats/one.png 1")
    found = open_dataset("image-list", images, listing=file)
    assert len(found) == 3
    assert "1 images are listed more than once" in caplog.text
    assert "cats/one.png' for one" in caplog.text
    assert "2 of 4 classes have no images: 0, 2" in caplog.text
