"""python -m raycon.data: what it says of a data set is true, and nothing odd about the files goes unsaid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raycon import data
from raycon.core.config import DataConfig
from raycon.data_loaders.datasets import names, open_config, open_dataset
from raycon.data_loaders.overview import contact_sheet, overview


def picture(file: Path, seed: int, height: int = 30, width: int = 40) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that can be odd: an empty class, a cut-off image, copies in the split and across the splits."""
    root = tmp_path / "set"
    for i in range(4):
        picture(root / "train" / "cat" / f"{i}.png", i, height=20 + 10 * i)
        picture(root / "train" / "dog" / f"{i}.jpg", 10 + i)
    (root / "train" / "cow").mkdir()
    (root / "train" / "dog" / "copy.png").write_bytes((root / "train" / "cat" / "2.png").read_bytes())
    file = root / "train" / "dog" / "1.jpg"
    file.write_bytes(file.read_bytes()[:-100])
    picture(root / "test" / "cat" / "9.png", 99)
    (root / "test" / "cat" / "8.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    return root


def test_all_that_is_odd_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet, out = tmp_path / "sheet.png", tmp_path / "found.json"
    options = ["image-folder", "--data.root", str(folder), "--sheet", str(sheet), "--json", str(out)]
    assert data.main(options) == 1  # an image cannot be read
    text = capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["classes"] == {"cat": 4, "cow": 0, "dog": 5}
    assert (found["height"], found["width"]) == ([20, 30, 50], [40, 40, 40])
    assert [bad["file"] for bad in found["unreadable"]] == [str(folder / "train" / "dog" / "1.jpg")]
    assert f"{folder / 'train' / 'dog' / '1.jpg'}: " in text
    assert "image-folder, split train: 9 images of any size" in text
    assert "1 of 3 classes have no images: cow" in text
    assert "1 images are copies of others in the same split" in text
    assert "some copies have different labels" in text
    assert "1 images of split test are copies of ones in this split" in text
    with Image.open(sheet) as image:
        assert image.size == (150 + 10 * 74, 2 * 74)
    options += ["--data.on-error", "skip", "--data.cache", str(tmp_path / "cache"), "--check", "all"]
    assert data.main(options) == 0
    text = capsys.readouterr().out
    assert "8 images of any size" in text
    assert "1 unreadable images were left out" in text


def test_a_part_is_read_and_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(["image-folder", "--data.root", str(folder), "--check", "2", "--no-sheet"]) == 0
    assert "2 of 9 images were read (--check all" in capsys.readouterr().out
    assert data.main(["image-folder", "--data.root", str(folder), "--check", "0", "--no-sheet"]) == 0
    assert "0 of 0 images that were read" in capsys.readouterr().out


def test_arrays_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data.main(["digits", "--split", "test", "--json", "found.json"]) == 0
    digits = open_dataset("digits", split="test")
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert list(found["classes"].values()) == np.bincount(digits.label).tolist()
    assert found["weak_classes"] == {}
    assert (found["image"], found["checked"], found["warnings"]) == ([1, 8, 8], 360, [])
    assert Path("digits-test.png").is_file()
    assert "360 images, 1x8x8" in capsys.readouterr().out


def test_the_coarse_map_and_labels_that_are_no_hierarchy() -> None:
    import dataclasses

    digits = dataclasses.replace(
        open_dataset("digits"), weak=open_dataset("digits").label // 4, weak_classes=("low", "middle", "high")
    )
    found = overview(digits, None, 0)
    assert found.coarse_map == {"low": list("0123"), "middle": list("4567"), "high": list("89")}
    assert found.warnings == []
    mixed = dataclasses.replace(digits, weak=np.arange(len(digits)) % 3)
    assert "not unions of fine ones" in overview(mixed, None, 0).warnings[0]


def test_a_sheet_replaces_a_sheet_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits, file = open_dataset("digits"), tmp_path / "x.png"
    contact_sheet(digits, file)
    contact_sheet(digits.subset(np.arange(5)), file)
    with Image.open(file) as image:
        shown = np.asarray(image.convert("L"))[:72, 150:222]
    expected = np.asarray(Image.fromarray(digits.read(0)[..., 0]).resize((72, 72), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(shown, expected)
    Image.new("RGB", (3, 3)).save(file)
    before = file.read_bytes()
    assert data.main(["digits", "--sheet", str(file)]) == 2
    assert "there is another file of this name" in capsys.readouterr().err
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digit"], "did you mean 'digits'"),
        (["digits", "--split", "val"], "no split 'val'"),
        (["digits", "--check", "some"], "--check some: give a number"),
        (["image-folder"], "--data.root FOLDER"),
        (["write-ffcv", "digits"], "give --out FILE, or --data.cache"),
        (["write-ffcv", "digits", "--out", "x", "--workers", "0"], "--workers 0: give 1 or more"),
    ],
)
def test_wrong_requests(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_it_lists_the_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert data.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert all(len(line.split(None, 1)[1]) > 20 for line in lines)


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from raycon import data\n"
        "try: data.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pandas', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.ffcv
def test_a_converted_set_is_found_by_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raycon.data_loaders.write_ffcv import beton_problem, ensure_beton

    cache = tmp_path / "cache"
    options = ["write-ffcv", "image-folder", "--data.root", str(folder)]
    assert data.main([*options, "--data.cache", str(cache), "--data.on-error", "skip"]) == 0
    assert "8 images written and verified" in capsys.readouterr().out
    config = DataConfig(name="image-folder", root=str(folder), on_error="skip", cache=str(cache))
    dataset = open_config(config)
    file = next(cache.glob("*.beton"))
    when = file.stat().st_mtime_ns
    assert ensure_beton(dataset, cache) == file
    assert file.stat().st_mtime_ns == when
    assert data.main([*options, "--data.cache", str(cache), "--data.on-error", "skip"]) == 0
    assert "is there already, whole" in capsys.readouterr().out
    out = tmp_path / "b.beton"
    out.write_bytes(b"something else")
    assert data.main([*options, "--out", str(out)]) == 2
    assert "too short to be a .beton file: remove it" in capsys.readouterr().err
    assert out.read_bytes() == b"something else"
    assert beton_problem(file, dataset) is None


@pytest.mark.ray
@pytest.mark.ffcv
def test_tasks_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["write-ffcv", "image-folder", "--data.root", str(folder), "--out"]
    assert data.main([*options, str(tmp_path / "a.beton")]) == 0
    assert data.main([*options, str(tmp_path / "b.beton"), "--workers", "2"]) == 0
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
