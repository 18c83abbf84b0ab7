"""Images in tar archives and in Parquet files: rows, labels, and what is refused, in the true formats."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycon.core.config import ConfigError, DataConfig
from raycon.core.types import LoaderPlan
from raycon.data_loaders import open_loader, shards
from raycon.data_loaders.datasets import FileSet, ImageSet, image_parquet, open_config, open_dataset
from raycon.data_loaders.write_ffcv import beton_problem, write_beton
from raycon.nn import views

KINDS = ["torch", pytest.param("ffcv", marks=pytest.mark.ffcv), pytest.param("ray", marks=pytest.mark.ray)]


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6 + number, 5), (number, 0, 0)).save(out, format="PNG")
    return out.getvalue()


def jpeg(number: int) -> bytes:
    """Smooth and of a size of its own."""
    out, generator = io.BytesIO(), np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    coarse.resize((40 + number, 33 + number % 5), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def colours(dataset: ImageSet) -> list[int]:
    return [int(dataset.read(row)[0, 0, 0]) for row in range(len(dataset))]


def tar(file: Path, members: dict[str, bytes], **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards of train (3 + 2 images) and one of val; labels, JSON, and members that are nothing of a sample's."""
    folder = tmp_path / "set"
    samples = [
        {f"in/{i:03}.png": png(i), f"in/{i:03}.cls": b"%d\n" % (i % 3), f"in/{i:03}.json": b'{"kind": "k%d"}' % (i % 2)}
        for i in range(6)
    ]
    for name, part in (("train-000000", samples[:3]), ("train-000001", samples[3:5]), ("val-000000", samples[5:])):
        tar(folder / f"{name}.tar", {"in/._x.png": b"x", "README": b"x"} | {k: v for s in part for k, v in s.items()})
    return folder


def test_rows_and_labels_of_archives(root: Path, tmp_path: Path) -> None:
    found = open_dataset("image-shards", root, cache=tmp_path / "cache")
    assert isinstance(found, FileSet)
    assert colours(found) == [0, 1, 2, 3, 4]
    assert found.label.tolist() == [0, 1, 2, 0, 1]
    assert found.where(3) == f"{root}/train-000001.tar/in/003.png"
    assert found.path(3) is None
    np.testing.assert_array_equal(found.sizes(), [len(png(i)) for i in range(5)])
    assert found.encoded(4) == png(4)
    assert found.encoded_many([4, 0, 4]) == [png(4), png(0), png(4)]
    val = open_dataset("image-shards", root, "test", cache=tmp_path / "cache")
    assert (colours(val), val.label.tolist(), len(val.classes)) == ([5], [2], 3)
    part = found.subset(np.array([4, 1]))
    assert (colours(part), part.label.tolist()) == ([4, 1], [1, 1])
    for columns, label, weak, classes in (
        (("label=json:kind",), [0, 1, 0, 1, 0], [-1] * 5, ("k0", "k1")),
        (("label=cls", "weak=json:kind"), [0, 1, 2, 0, 1], [0, 1, 0, 1, 0], ("0", "1", "2")),
        (("label=folder",), [0] * 5, [-1] * 5, ("in",)),
        (("weak=cls",), [-1] * 5, [0, 1, 2, 0, 1], ()),
    ):
        named = open_dataset("image-shards", root, columns=columns, cache=tmp_path / "cache")
        assert (named.label.tolist(), named.weak.tolist(), named.classes) == (label, weak, classes)


def test_which_archives(root: Path, tmp_path: Path) -> None:
    def rows(split: str, listing: str = "") -> list[int]:
        return colours(open_dataset("image-shards", root, split, listing=listing, cache=tmp_path))

    assert rows("train", "train-{000000..000001}.tar") == [0, 1, 2, 3, 4]
    assert rows("train", "{split}-*1.tar") == [3, 4]
    assert rows("val", "{split}-{000000..000000}.tar") == [5]
    assert rows("train", "*.tar") == [0, 1, 2, 3, 4, 5]
    (root / "train-000000.tar").rename(root / "part-0-of-3.tar")
    (root / "train-000001.tar").rename(root / "part-2-of-3.tar")
    with pytest.raises(ConfigError, match=r"of the 3 files part-.* number 1 is missing"):
        rows("train")
    (root / "part-0-of-3.tar").rename(root / "part-1-of-2.tar")
    (root / "part-2-of-3.tar").rename(root / "part-2-of-2.tar")
    assert open_dataset("image-shards", root, cache=tmp_path).label.tolist() == [0, 1, 2, 0, 1]  # not those of val
    for listing, told in (
        ("train-{000000..000002}.tar", r"train-000000\.tar: No such file"),
        ("../*.tar", "below data.root"),
        ("/etc/*.tar", "below data.root"),
        ("x-{5..1}.tar", "counts from 5 to 1"),
        ("nothing*.tar", r"has no nothing\*\.tar"),
    ):
        with pytest.raises(ConfigError, match=told):
            rows("train", listing)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        rows("dev")


def test_what_is_where_is_found_out_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> ImageSet:
        return open_dataset("image-shards", root, cache=tmp_path / "cache")

    first = opened().fingerprint

    def never(*_: object) -> None:
        raise AssertionError("the archives were read again")

    with monkeypatch.context() as patched:
        patched.setattr(shards, "scan_tar", never)
        assert opened().fingerprint == first
    for file in (tmp_path / "cache" / "shards").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])  # damaged: made anew
    assert opened().fingerprint == first
    tar(root / "train-000001.tar", {"7.png": png(7), "7.cls": b"1"})
    assert colours(opened()) == [0, 1, 2, 7]
    assert opened().fingerprint != first


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a.png": png(1), "a.cls": b"1", "b.cls": b"1"}, "sample 'b' has no image .cls."),
        ({"a.cls": b"1", "b.png": png(1), "a.png": png(1)}, "sample 'a' has no image"),
        ({"a.png": png(1), "a.jpg": b"x"}, "sample 'a' has 2 images"),
        ({"a.png": png(1), "a.cls": b"1", "b.png": png(1)}, "only 1 of 2 samples have a label"),
        ({"a.png": png(1), "a.cls": b"\0\1"}, "'a.cls' is no label"),
        ({"a.png": png(1), "a.cls": b""}, "'a.cls' is no label"),
        ({"a.txt": b"1"}, "sample 'a' has no image"),
        ({"a": b"1"}, "holds no images"),
    ],
)
def test_samples_that_are_wrong_are_named(tmp_path: Path, members: dict[str, bytes], told: str) -> None:
    tar(tmp_path / "train" / "x.tar", members)
    with pytest.raises(ConfigError, match=f"x.tar: .*{told}"):
        open_dataset("image-shards", tmp_path, cache=tmp_path / "cache")


def test_archives_that_are_wrong_are_named(root: Path, tmp_path: Path) -> None:
    def refused(told: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=told):
            open_dataset("image-shards", root, cache=tmp_path / "cache", **options)

    file = root / "train-000001.tar"
    whole = file.read_bytes()
    for cut in (700, 1024 + 512, whole.rstrip(b"\0").__len__(), len(whole.rstrip(b"\0")) // 512 * 512 + 512):
        file.write_bytes(whole[:cut])
        refused(r"train-000001\.tar: (not a whole|does not end|holds no images|sample .* has no)")
    file.write_bytes(gzip.compress(whole))
    refused(r"train-000001\.tar: not a whole uncompressed tar")
    file.write_bytes(whole)
    file.rename(root / "train-000001.tar.gz")
    refused("must not be compressed", listing="train-*.tar*")
    with tarfile.open(root / "train-000001.tar", "w") as out:
        link = tarfile.TarInfo("../../etc/passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)
    refused(r"'\.\./\.\./etc/passwd\.png' is a link")


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    """Long names and such that point elsewhere are only names."""
    long = "d" * 120 + "/" + "e" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar(tmp_path / "a" / "train" / "x.tar", {f"../../{long}.png": png(3), "/abs.png": png(4)}, format=form)
        found = open_dataset("image-shards", tmp_path / "a", cache=tmp_path / "cache")
        assert colours(found) == [3, 4]
        assert long in found.where(0)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "cache"]


def test_an_archive_that_is_cut_off_later_is_named(root: Path, tmp_path: Path) -> None:
    found = open_dataset("image-shards", root, cache=tmp_path / "cache")
    (root / "train-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-000001\.tar/in/003\.png: cannot be read .*cut off meanwhile"):
        found.read(3)
    (root / "train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"in/003\.png: cannot be read .*No such file"):
        found.read(3)


@pytest.fixture
def address(root: Path) -> Iterator[str]:
    import fsspec

    system = fsspec.filesystem("memory")
    for file in root.iterdir():
        system.pipe(f"/shards/{file.name}", file.read_bytes())
    yield "memory://shards"
    system.rm("/shards", recursive=True)


def test_archives_at_an_address(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_dataset("image-shards", address, cache=tmp_path / "cache")
    assert isinstance(found, FileSet)
    assert (colours(found), found.label.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2, 0, 1])
    assert found.where(0) == "memory://shards/train-000000.tar/in/000.png"
    requests: list[tuple[int, int]] = []
    original = FileSet._fetched

    def counted(self: FileSet, rows: Any, places: Any, starts: Any, ends: Any) -> list[bytes]:
        requests.extend(zip(starts, ends, strict=True))
        return original(self, rows, places, starts, ends)

    monkeypatch.setattr(FileSet, "_fetched", counted)
    assert found.encoded_many([3, 1, 3]) == [png(3), png(1), png(3)]
    assert len(requests) == 2
    requests.clear()
    assert found.encoded_many(range(5)) == [png(i) for i in range(5)]
    assert len(requests) == 2  # a shard at once
    monkeypatch.setattr(shards, "_GAP_BYTES", 0)
    requests.clear()
    assert found.encoded_many([4, 2, 0, 1, 3]) == [png(i) for i in (4, 2, 0, 1, 3)]
    assert sum(b - a for a, b in requests) == sum(len(png(i)) for i in range(5))
    twin = open_dataset("image-shards", address, listing="train-00000{0..1}.tar", cache=tmp_path / "cache")
    assert colours(twin) == [0, 1, 2, 3, 4]
    import fsspec

    fsspec.filesystem("memory").rm("/shards/train-000001.tar")
    with pytest.raises(ValueError, match=r"train-000001\.tar/in/003\.png: cannot be read"):
        found.read(3)


# --- Parquet ----------------------------------------------------------------------------------------------------


def parquet(file: Path, images: list[bytes | None], struct: bool = True, **columns: Any) -> Path:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    column: Any = [{"bytes": data, "path": None} for data in images] if struct else images
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if struct else pyarrow.binary()
    table = pyarrow.table({"image": pyarrow.array(column, kind)} | columns)
    features = {"label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, file, row_group_size=2)
    return file


@pytest.mark.parametrize("struct", [True, False])
def test_rows_and_labels_of_parquet_files(tmp_path: Path, struct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "set", tmp_path / "cache"
    parquet(root / "train-00000-of-00002.parquet", [png(i) for i in range(3)], struct, label=[2, 0, 2], kind=[*"xyx"])
    parquet(root / "train-00001-of-00002.parquet", [jpeg(3), png(4)], struct, label=[0, 0], kind=[*"yy"])
    parquet(root / "validation-00000-of-00001.parquet", [png(5)], struct, label=[1], kind=["y"])
    found = open_dataset("image-parquet", root, cache=cache)
    assert isinstance(found, FileSet)
    assert [found.encoded(row) for row in range(5)] == [png(0), png(1), png(2), jpeg(3), png(4)]
    assert (found.label.tolist(), found.classes) == ([2, 0, 2, 0, 0], ("ant", "bee", "cow"))
    assert found.where(4) == f"{root}/train-00001-of-00002.parquet/1"
    val = open_dataset("image-parquet", root, "test", cache=cache)
    assert (val.label.tolist(), colours(val), val.classes) == ([1], [5], found.classes)

    def never(*_: object) -> None:
        raise AssertionError("the images were copied again")

    with monkeypatch.context() as patched:
        patched.setattr(image_parquet, "_copy", never)
        again = open_dataset("image-parquet", root, cache=cache)
        assert again.fingerprint == found.fingerprint
        other = open_dataset("image-parquet", root, columns=("label=kind", "weak=label"), cache=cache)
    assert (other.label.tolist(), other.classes) == ([0, 1, 0, 1, 1], ("x", "y"))
    assert (other.weak.tolist(), other.encoded(3)) == ([2, 0, 2, 0, 0], jpeg(3))  # type: ignore[attr-defined]
    assert not list(cache.rglob("*.part"))
    for archive in (cache / "shards").glob("*.tar"):
        archive.unlink()
    with pytest.raises(ValueError, match=r"parquet/1: cannot be read .*data\.cache must be a folder that every node"):
        found.read(4)
    assert open_dataset("image-parquet", root, cache=cache).encoded(4) == png(4)  # type: ignore[attr-defined]


def test_parquet_files_that_are_wrong_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = tmp_path / "set", tmp_path / "cache"

    def refused(told: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=told):
            open_dataset("image-parquet", root, cache=cache, **options)
        assert not list(cache.rglob("*.part"))

    file = parquet(root / "train.parquet", [png(0), None, png(2)], label=[0, 1, None])
    refused(r"has no train/\*\.parquet")
    file.rename(root / "a.parquet")
    refused(r"a\.parquet: row 1 has no image")
    parquet(root / "a.parquet", [png(0), png(1)], label=[0, None])
    refused(r"a\.parquet: row 1 has no label")
    parquet(root / "a.parquet", [png(0), png(1)], label=[0, 3])
    refused(r"row 1 has label 3, not one of 0\.\.2")
    refused("no column for weak=kind; it has image, label", columns=("weak=kind",))
    refused("column 'label' holds int64", columns=("image=label",))
    (root / "a.parquet").write_bytes(b"PAR1 nothing")
    refused(r"a\.parquet: not a Parquet file")
    parquet(root / "a.parquet", [png(0), png(1)], label=[0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(image_parquet.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 50}))
        refused("need .* GB there, 0.0 GB are free")
    assert colours(open_dataset("image-parquet", root, cache=cache)) == [0, 1]


def test_parquet_files_at_an_address(tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    file = parquet(tmp_path / "x.parquet", [png(3), png(4)], label=[1, 0])
    system.pipe("/parquet/train/x.parquet", file.read_bytes())
    found = open_dataset("image-parquet", "memory://parquet", cache=tmp_path / "cache")
    assert (colours(found), found.label.tolist()) == ([3, 4], [1, 0])
    assert found.where(0) == "memory://parquet/train/x.parquet/0"
    system.rm("/parquet", recursive=True)


# --- in use -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileSet]:
    """17 photos as a folder, as two archives and as two Parquet files."""
    base = tmp_path_factory.mktemp("forms")
    images = [jpeg(i) for i in range(17)]
    for i, data in enumerate(images):
        (base / "folder" / f"{i:02}.jpg").parent.mkdir(exist_ok=True)
        (base / "folder" / f"{i:02}.jpg").write_bytes(data)
    parts = (range(9), range(9, 17))
    for n, part in enumerate(parts):
        members = {f"{i:02}.{e}": d for i in part for e, d in (("jpg", images[i]), ("cls", b"%d" % (i % 3)))}
        tar(base / "shards" / "train" / f"{n}.tar", members)
        parquet(base / "parquet" / "train" / f"{n}.parquet", [images[i] for i in part], label=[i % 3 for i in part])
    found = {
        "folder": open_dataset("image-folder", base / "folder"),
        "shards": open_dataset("image-shards", base / "shards", cache=base / "cache"),
        "parquet": open_dataset("image-parquet", base / "parquet", cache=base / "cache"),
    }
    return {name: dataset for name, dataset in found.items() if isinstance(dataset, FileSet)}


@pytest.mark.parametrize("form", ["shards", "parquet"])
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_is_that_of_a_folder(forms: dict[str, FileSet], tmp_path: Path, form: str, kind: str) -> None:
    folder, dataset = forms["folder"], pickle.loads(pickle.dumps(forms[form]))
    spec = views.view_spec("mocov2", "strong", 24, dataset.mean, dataset.std)
    plan = LoaderPlan(
        specs=(spec, spec), eval_spec=views.eval_spec(24, dataset.mean, dataset.std), batch=4, seed=3, rank=1, world=2,
        device=torch.device("cpu"), cache=tmp_path, augment="batched",
    )  # fmt: skip
    reference, other = open_loader("torch", folder, plan), open_loader(kind, dataset, plan)
    for epoch, first in ((0, 0), (1, 2)):
        for one, two in zip(reference.train(epoch, first), other.train(epoch, first), strict=True):
            assert torch.equal(one.row, two.row)
            assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))
    for image, twin in zip(reference.scan(), other.scan(), strict=True):
        assert torch.equal(image.images, twin.images)
    reference.close()
    other.close()


def test_damaged_images_in_archives_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {f"{i}.{e}": d for i in range(4) for e, d in (("png", png(i) if i != 2 else b"x"), ("cls", b"%d" % i))}
    tar(tmp_path / "set" / "train" / "0.tar", members)
    config = DataConfig(name="image-shards", root=str(tmp_path / "set"), on_error="skip", cache=str(tmp_path / "cache"))
    found = open_config(config)
    assert (found.label.tolist(), found.dropped, colours(found)) == ([0, 1, 3], 1, [0, 1, 3])
    assert "0.tar/2.png: of no known format" in caplog.text


@pytest.mark.ffcv
def test_archives_become_a_beton(forms: dict[str, FileSet], tmp_path: Path) -> None:
    write_beton(forms["shards"], tmp_path / "x.beton")
    assert beton_problem(tmp_path / "x.beton", forms["shards"]) is None
    assert beton_problem(tmp_path / "x.beton", forms["folder"]) is None  # the same images


def test_indexing_holds_no_object_per_image(tmp_path: Path) -> None:
    tar(tmp_path / "train" / "0.tar", {f"{i:05}.png": b"x" for i in range(3000)})
    found = open_dataset("image-shards", tmp_path, cache=tmp_path / "cache")
    assert len(pickle.dumps(found)) < 3000 * 80
    assert len(list(itertools.islice(found.encoded_many(range(3000)), 3))) == 3  # type: ignore[attr-defined]


def test_a_run_on_archives_reports_what_was_left_out(tmp_path: Path) -> None:
    """From archives of which one image is damaged, decoded once, in bf16, to the report."""
    from raycon import pretrain

    def image(number: int) -> bytes:
        out, generator = io.BytesIO(), np.random.default_rng(number)
        Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(out, "PNG")
        return out.getvalue()

    members = {f"{i:02}.{e}": d for i in range(41) for e, d in (("png", image(i) if i != 7 else b"x"), ("cls", b"0"))}
    tar(tmp_path / "set" / "train" / "0.tar", members)
    options = [
        "quickstart", "--method.clusters=16", "--method.negatives=4", "--method.warmup-epochs=1", "--runtime=local",
        "--data.name=image-shards", f"--data.root={tmp_path / 'set'}", f"--data.cache={tmp_path / 'cache'}",
        "--data.on-error=skip", "--data.decode=once", "--data.loader=torch", "--train.batch=8", "--train.epochs=1",
        "--train.warmup-epochs=0", "--train.precision=bf16", "--model.width=4", "--evals.names",
        f"--run.dir={tmp_path / 'run'}", "--log.quiet",
    ]  # fmt: skip
    assert pretrain.main(options) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (left_out,) = [event for event in events if "dropped" in event]
    assert left_out["dropped"] == 1
    assert "1 unreadable images left out, 40 stay" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert len(list((tmp_path / "cache").glob("*.decoded.npy"))) == 1
