"""Data sets: what is read equals the files, and what is wrong with files is said."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycon.core.config import ConfigError
from raycon.data_loaders.datasets import fashion_mnist, names, open_dataset


def test_a_file_is_a_registered_data_set() -> None:
    assert {"digits", "fashion-mnist", "image-folder"} <= set(names())


def test_unknown_names_get_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"'fashion_mnist'.*did you mean 'fashion-mnist'.*digits, .*fashion-mnist"):
        open_dataset("fashion_mnist")
    with pytest.raises(ConfigError, match=r"no split 'validation'.*train, test"):
        open_dataset("digits", split="validation")


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source, train, test = load_digits(), open_dataset("digits"), open_dataset("digits", split="test")
    assert (len(train), len(test), train.image) == (1437, 360, (1, 8, 8))
    both = np.concatenate([train.block(np.arange(1437)), test.block(np.arange(360))])
    assert both.dtype == np.uint8
    assert both.shape == (1797, 8, 8, 1)
    assert np.abs(both[..., 0] / 255 * 16 - source.images).max() <= 16 / 255 / 2 + 1e-9
    np.testing.assert_array_equal(np.concatenate([train.label, test.label]), source.target)
    assert (train.weak == -1).all()
    pixels = train.block(np.arange(len(train))) / 255
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (train.mean[0], train.std[0]), atol=1e-4)
    np.testing.assert_array_equal(train.block(np.array([7, 3, 7]))[1], train.read(3))


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_idx_files_are_read_zipped_and_plain(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 3, 4), dtype=np.uint8)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx_bytes(array)))
    for name in ("a", "a.gz"):
        np.testing.assert_array_equal(fashion_mnist.read_idx(tmp_path / name, (5, 3, 4)), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes, expected 76"),
        (lambda data: data + b"\0", "bytes, expected 76"),
        (lambda data: b"\0\0\x0d\3" + data[4:], "not an idx file"),
        (lambda data: data[:6], "not an idx file"),
        (lambda data: data[:7] + b"\x06" + data[8:], "expected \\(5, 3, 4\\)"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path: Path, damage: object, message: str) -> None:
    data = idx_bytes(np.zeros((5, 3, 4), dtype=np.uint8))
    (tmp_path / "broken-idx").write_bytes(damage(data))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=f"broken-idx.*{message}"):
        fashion_mnist.read_idx(tmp_path / "broken-idx", (5, 3, 4))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(data)[:-6])
    with pytest.raises(ConfigError, match=r"cut\.gz"):
        fashion_mnist.read_idx(tmp_path / "cut.gz", (5, 3, 4))


def test_fashion_mnist_is_read_from_a_folder(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (10_000, 28, 28), dtype=np.uint8)
    label = generator.integers(0, 10, 10_000).astype(np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(label), 1))
    dataset = open_dataset("fashion-mnist", tmp_path, "test")
    np.testing.assert_array_equal(dataset.block(np.array([9, 4]))[..., 0], images[[9, 4]])
    np.testing.assert_array_equal(dataset.label, label)
    assert (dataset.image, len(dataset.classes)) == ((1, 28, 28), 10)


def test_missing_fashion_mnist_says_all_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nothing")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(ConfigError, match=r"apt-get install.*--data\.root.*internet"):
        open_dataset("fashion-mnist", tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, five images of several sizes; b/10 sorts before b/9."""
    generator = np.random.default_rng(1)
    for name, height, width in (("a/1.png", 20, 31), ("b/9.png", 40, 16), ("b/10.PNG", 12, 12), ("a/0.jpg", 25, 50)):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    Image.fromarray(generator.integers(0, 256, (9, 11), dtype=np.uint8)).save(tmp_path / "train" / "b" / "gray.png")
    return tmp_path


def test_image_folders(folder: Path) -> None:
    dataset = open_dataset("image-folder", folder)
    found = [str(dataset.path(row).relative_to(folder / "train")) for row in range(len(dataset))]  # type: ignore[union-attr]
    assert found == ["a/0.jpg", "a/1.png", "b/10.PNG", "b/9.png", "b/gray.png"]
    assert dataset.label.tolist() == [0, 0, 1, 1, 1]
    assert dataset.classes == ("a", "b")
    assert dataset.image is None
    with Image.open(folder / "train" / "b" / "9.png") as image:
        np.testing.assert_array_equal(dataset.read(3), np.asarray(image))
    gray = dataset.read(4)
    assert gray.shape == (9, 11, 3)
    assert (gray[..., 0] == gray[..., 2]).all()


def test_flat_folders_have_no_labels(folder: Path) -> None:
    dataset = open_dataset("image-folder", folder / "train" / "a")
    assert dataset.label.tolist() == [-1, -1]
    assert dataset.classes == ()


def test_folder_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data\.root FOLDER"):
        open_dataset("image-folder")
    with pytest.raises(ConfigError, match="test or val"):
        open_dataset("image-folder", folder, "test")
    with pytest.raises(ConfigError, match="not a folder"):
        open_dataset("image-folder", folder / "absent")
    (folder / "train" / "loose.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match="beside and inside"):
        open_dataset("image-folder", folder)


def test_unreadable_images_are_named(folder: Path) -> None:
    file = folder / "train" / "a" / "0.jpg"
    file.write_bytes(file.read_bytes()[:200])
    dataset = open_dataset("image-folder", folder)
    with pytest.raises(ValueError, match=r"a/0\.jpg: not a readable image"):
        dataset.read(0)
    file.unlink()
    with pytest.raises(ValueError, match=r"a/0\.jpg: cannot be read"):
        dataset.read(0)


def test_fingerprints_follow_the_data(folder: Path) -> None:
    first = open_dataset("image-folder", folder).fingerprint
    assert open_dataset("image-folder", folder).fingerprint == first
    file = folder / "train" / "a" / "1.png"
    Image.fromarray(np.zeros((20, 31, 3), dtype=np.uint8)).save(file)
    assert open_dataset("image-folder", folder).fingerprint != first
    digits = {open_dataset("digits", split=split).fingerprint for split in ("train", "train", "test")}
    assert len(digits) == 2


def test_data_sets_travel(folder: Path) -> None:
    dataset = open_dataset("image-folder", folder)
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy.read(2), dataset.read(2))
    assert copy.fingerprint == dataset.fingerprint
