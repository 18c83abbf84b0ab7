"""Damaged, foreign and malicious files: each is refused with its name and what to do; none of its code is run."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raycon.core import program
from raycon.core.config import ConfigError

Refused = Callable[[str, list[str]], str]


class Evil:
    """Unpickled, it makes a file ``ran`` in the current folder."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def check(said: str, *words: str) -> None:
    for word in words:
        assert word in said, said
    assert not Path("ran").exists(), "code of a file was run"


# --- configurations ---------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
YAMLS: list[tuple[str, bytes, list[str]]] = [
    ("a list", b"- a\n- b\n", ["method.name"]),
    ("nothing", b"", ["method.name"]),
    ("broken", b"a: [", ["no YAML"]),
    ("not text", b"\xff\xfe\x00\x01", ["no YAML"]),
    ("no method", b"train:\n  epochs: 3\n", ["method.name"]),
    ("a method that is a list", b"method: [pcl]\n", ["method.name"]),
    ("an unknown method", b"method: {name: pclx}\n", ["method.name = 'pclx'", "did you mean 'pcl'"]),
    ("a method with a path", b"method: {name: ../core/config}\n", ["method.name = '../core/config'"]),
    ("an unknown option", b"method: {name: pcl}\ntrain: {epoch: 3}\n", ["train.epoch", "did you mean 'train.epochs'"]),
    ("a wrong type", b"method: {name: pcl}\ntrain: {epochs: [1, 2]}\n", ["train.epochs = [1, 2]", "expected int"]),
    ("a group that is a number", b"method: {name: pcl}\ntrain: 7\n", ["train", "group of options, got 7"]),
    ("yes for a number", b"method: {name: pcl}\ntrain: {epochs: yes}\n", ["train.epochs = True", "expected int"]),
    ("a number too large", b"method: {name: pcl}\ntrain: {lr: 1" + b"0" * 400 + b"}\n", ["train.lr", "expected float"]),
    ("a number of 9,000 digits", b"seed: " + b"9" * 9000, ["no YAML of options"]),
    ("a date that is none", b"seed: 2026-99-99\n", ["no YAML of options"]),
    ("a thousand brackets", b"a: " + b"[" * 5000 + b"]" * 5000, ["c.yaml"]),
    ("a Python tag", b"!!python/object/apply:os.system ['touch ran']", ["no YAML of options", "python/object"]),
    ("a Python name", b"seed: !!python/name:os.system\n", ["no YAML of options", "python/name"]),
    ("a tag that does not fit", b"seed: !!bool x\n", ["no YAML of options"]),
    ("a billion laughs", LAUGHS.encode(), ["alias *a", "write out"]),
    ("one that holds itself", b"method: &m {name: pcl, self: *m}\n", ["alias *m"]),
]


@pytest.mark.parametrize(("content", "words"), [y[1:] for y in YAMLS], ids=[y[0] for y in YAMLS])
def test_configurations(content: bytes, words: list[str], place: Path, refused: Refused) -> None:
    (place / "c.yaml").write_bytes(content)
    check(refused("pretrain", ["--config", "c.yaml"]), "c.yaml", *words)


def test_a_configuration_that_is_a_folder(place: Path, refused: Refused) -> None:
    (place / "c.yaml").mkdir()
    check(refused("pretrain", ["--config", "c.yaml"]), "c.yaml", "cannot be read")


@pytest.mark.parametrize(
    "content", ["format: 7\n", "a: [", "!!python/object/apply:os.system ['touch ran']", "format: 1\n"]
)
def test_sweeps(content: str, place: Path, refused: Refused) -> None:
    (place / "s").mkdir()
    (place / "s" / "sweep.yaml").write_text(content)
    check(refused("sweep", ["--resume", "s"]), "sweep.yaml")


@pytest.mark.parametrize("name", ["evaluate", "embed", "export"])
def test_a_run_whose_configuration_is_damaged(name: str, run_dir: Path, refused: Refused) -> None:
    (run_dir / "config.yaml").write_text("method: {name: pcl}\ntrain: {epoch: 3}\n")
    more = {"evaluate": ["knn", "--runtime", "local"], "embed": ["digits"], "export": []}
    check(refused(name, ["run", *more[name]]), "train.epoch", "did you mean 'train.epochs'")


def test_the_list_of_runs_tells_of_a_damaged_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raycon import runs

    (run_dir / "config.yaml").write_text(LAUGHS)
    assert runs.main(["list", "."]) == 0
    assert "alias *a" in capsys.readouterr().out


# --- run directories and checkpoints ----------------------------------------------------------------------------


def test_a_directory_that_holds_a_run(run_dir: Path, refused: Refused) -> None:
    said = refused("pretrain", ["quickstart", "--runtime", "local", "--run.dir", "run"])
    check(said, "run.dir", "holds a run", "--resume")


def test_a_directory_below_a_file(place: Path, refused: Refused) -> None:
    (place / "file").touch()
    check(refused("pretrain", ["quickstart", "--runtime", "local", "--run.dir", "file/run"]), "run.dir", "give another")


def _altered(step: Path, name: str, content: bytes) -> None:
    """A file of a checkpoint replaced, the sums in state.json made to fit: only its content is wrong."""
    import hashlib

    (step / name).write_bytes(content)
    state = json.loads((step / "state.json").read_text())
    state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "state.json").write_text(json.dumps(state))


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(step: Path) -> None:
        state = json.loads((step / "state.json").read_text())
        changed = change(state)
        (step / "state.json").write_text(json.dumps(state if changed is None else changed))

    return apply


def _cut(step: Path) -> None:
    content = (step / "model.safetensors").read_bytes()
    (step / "model.safetensors").write_bytes(content[: len(content) // 2])


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "cut off": _cut,
    "no model": lambda s: (s / "model.safetensors").unlink(),
    "state is no JSON": lambda s: (s / "state.json").write_bytes(b"\xff{"),
    "state is a list": _state(lambda s: [1]),
    "state of another format": _state(lambda s: s.update(format=99)),
    "state without sums": _state(lambda s: s.update(files={})),
    "sums that are a list": _state(lambda s: s.update(files=["model.safetensors", "optimizer.safetensors"])),
    "a step that is a word": _state(lambda s: s.update(step="eleven")),
    "a negative step": _state(lambda s: s.update(step=-1)),
    "no snapshot version": _state(lambda s: s.pop("snapshot_version")),
    "a snapshot that is not there": _state(lambda s: s.update(snapshot_version=3)),
    "no optimiser": _state(lambda s: s.pop("optimizer")),
    "an optimiser that is a word": _state(lambda s: s.update(optimizer={"param_groups": "all"})),
    "a deep state": lambda s: (s / "state.json").write_text("[" * 100_000),
    "no tensors": lambda s: _altered(s, "model.safetensors", b"no tensors"),
    "a header larger than the file": lambda s: _altered(s, "model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    "a pickle": lambda s: _altered(s, "model.safetensors", pickle.dumps(Evil())),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(kind: str, run_dir: Path, refused: Refused) -> None:
    CHECKPOINTS[kind](run_dir / "checkpoints" / "00000011")
    check(refused("pretrain", ["--resume", "run"]), "--resume", "no readable checkpoint", "00000011")


@pytest.mark.parametrize("name", ["evaluate", "embed", "export"])
def test_checkpoints_of_other_programs(name: str, run_dir: Path, refused: Refused) -> None:
    _cut(run_dir / "checkpoints" / "00000011")
    more = {"evaluate": ["knn", "--runtime", "local"], "embed": ["digits"], "export": []}
    check(refused(name, ["run", *more[name]]), "no readable checkpoint")
    check(refused(name, ["run/checkpoints/00000011", *more[name]]), "cut off or altered", "an older checkpoint")


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"step": 1, "results": 3}]'])
def test_evaluations_are_not_lost_in_a_damaged_file(content: str, run_dir: Path, refused: Refused) -> None:
    (run_dir / "evaluations.json").write_text(content)
    said = refused("evaluate", ["run", "knn", "--runtime", "local"])
    check(said, "evaluations.json", "move it away", "--out FILE")
    check(refused("pretrain", ["--resume", "run"]), "evaluations.json", "move it away")


# --- weights ----------------------------------------------------------------------------------------------------


def _saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def _compressed() -> bytes:
    """A small zip archive that unpacks to 100 MB."""
    with zipfile.ZipFile(io.BytesIO(_saved({"conv1.weight": torch.zeros(4)}))) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, bytes(10**8) if "/data/" in name else content)
    return buffer.getvalue()


def _stretched() -> bytes:
    """Tensors of a terabyte, of which the file holds one number."""
    return _saved({f"{n}.weight": torch.zeros(1).expand(2**38) for n in ("conv1", "layer1.0.conv1")})


WEIGHTS: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "nothing": (lambda: b"", ["damaged, or no weight file"]),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(500), ["damaged, or no weight file"]),
    "code": (lambda: _saved({"state_dict": Evil()}), ["can run any code", "save its tensors alone"]),
    "code of old": (lambda: _saved(Evil(), _use_new_zipfile_serialization=False), ["can run any code"]),
    "a bare pickle": (lambda: pickle.dumps(Evil()), ["w.pth"]),
    "a tensor": (lambda: _saved(torch.zeros(3)), ["not a dictionary", "state_dict"]),
    "no tensors": (lambda: _saved({"epoch": 3}), ["no tensors in it"]),
    "no network": (lambda: _saved({"a": torch.zeros(3)}), ["no ResNet found"]),
    "compressed": (_compressed, ["compressed, which torch.save never does"]),
    "stretched": (_stretched, ["larger than the file"]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind: str, place: Path, refused: Refused) -> None:
    make, words = WEIGHTS[kind]
    (place / "w.pth").write_bytes(make())
    check(refused("export", ["w.pth", "--out", "out"]), "w.pth", *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "w.pth", "knn", "--data.name", "digits", "--runtime", "local"],
        ["embed", "w.pth", "digits"],
        ["pretrain", "quickstart", "--runtime", "local", "--model.weights", "w.pth"],
        ["export", "w.pth", "--format", "run", "--recipe", "quickstart", "--out", "new"],
    ],
    ids=lambda a: a[0],
)
def test_weights_that_run_code(arguments: list[str], place: Path, refused: Refused) -> None:
    (place / "w.pth").write_bytes(_saved({"state_dict": Evil()}))
    check(refused(arguments[0], arguments[1:]), "w.pth", "can run any code")


def test_a_card_with_nonsense_in_it(place: Path) -> None:
    """The weights are what matters: a card that cannot be is passed over."""
    from raycon.nn import published

    good = {"raycon": "1", "encoder": {"name": "resnet18", "channels": 3}, "preprocessing": {"size": 32, "mean": [0.5]}}
    for change in ({"encoder": "x"}, {"encoder": {"channels": 10**9}}, {"preprocessing": {"size": "big"}},
                   {"preprocessing": {"mean": "grey"}}, {"preprocessing": [1]}):  # fmt: skip
        (place / "w.json").write_text(json.dumps(good | change))
        assert published.card_in(place / "w.pth") == {}, change
    (place / "w.json").write_text("[" * 100_000)
    assert published.card_in(place / "w.pth") == {}
    (place / "w.json").write_text(json.dumps(good))
    assert published.card_in(place / "w.pth") == good


# --- data -------------------------------------------------------------------------------------------------------


def _idx(shape: tuple[int, ...], size: int) -> bytes:
    return bytes((0, 0, 8, len(shape))) + b"".join(n.to_bytes(4, "big") for n in shape) + bytes(size)


FASHION: dict[str, tuple[str, bytes, list[str]]] = {
    "no idx file": ("", b"not an idx file", ["not an idx file"]),
    "of another shape": ("", _idx((10, 28, 28), 7840), ["holds an array of (10, 28, 28)", "another data set's"]),
    "cut off": ("", _idx((60_000, 28, 28), 1000), ["1016 bytes", "fetch it again"]),
    "sizes of 2^32": ("", _idx((2**32 - 1,) * 3, 100), ["4294967295"]),
    "a broken gz": (".gz", b"\x1f\x8b\x08\x00garbage", ["cannot be read", "fetch it again"]),
    "a gz of a gigabyte": (".gz", gzip.compress(_idx((60_000, 28, 28), 10**8), 1), ["fetch it again"]),
}


@pytest.mark.parametrize("kind", FASHION)
def test_fashion_mnist(kind: str, place: Path, refused: Refused) -> None:
    ending, content, words = FASHION[kind]
    (place / f"train-images-idx3-ubyte{ending}").write_bytes(content)
    (place / "train-labels-idx1-ubyte").write_bytes(_idx((60_000,), 60_000))
    check(refused("data", ["fashion-mnist", "--data.root", "."]), "train-images-idx3-ubyte", *words)


def _batch(rows: int = 4, **changed: Any) -> dict[str, Any]:
    labels = {"fine_labels": [0] * rows, "coarse_labels": [0] * rows}
    return {"data": np.zeros((rows, 3072), np.uint8), **labels, **changed}


def _far() -> bytes:
    """Ten bytes that make Python fill 32 GB of memo."""
    return b"\x80\x02Nr" + (2**32 - 1).to_bytes(4, "little") + b"."


_STRETCHED = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**7, 3072), (0, 0))
CIFAR: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "code": (lambda: pickle.dumps(Evil()), ["which no image batch needs"]),
    "code in a label": (lambda: pickle.dumps(_batch(fine_labels=[Evil()] * 4)), ["which no image batch needs"]),
    "nothing": (lambda: b"", ["cannot be read"]),
    "a list": (lambda: pickle.dumps([1]), ["no batch of images"]),
    "cut off": (lambda: pickle.dumps(_batch())[:2000], ["cannot be read"]),
    "floats": (lambda: pickle.dumps(_batch(data=np.zeros((4, 3072)))), ["3 x 32 x 32 bytes"]),
    "another size": (lambda: pickle.dumps(_batch(data=np.zeros((4, 12), np.uint8))), ["3 x 32 x 32 bytes"]),
    "too few labels": (lambda: pickle.dumps(_batch(fine_labels=[1])), ["fine_labels"]),
    "a label too large": (
        lambda: pickle.dumps(_batch(fine_labels=[0, 1, 100, 3])),
        ["row 2 has fine_labels 100", "0..99"],
    ),
    "a label below 0": (
        lambda: pickle.dumps(_batch(coarse_labels=[0, -1, 0, 3])),
        ["row 1 has coarse_labels -1", "0..19"],
    ),
    "a label that is a word": (lambda: pickle.dumps(_batch(fine_labels=list("abcd"))), ["row 0 has fine_labels 'a'"]),
    "a far place": (_far, ["puts a thing at place 4294967295"]),
    "a length of 2^60": (lambda: b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".", ["cannot be read"]),
}


@pytest.mark.parametrize("kind", CIFAR)
def test_cifar(kind: str, place: Path, refused: Refused) -> None:
    make, words = CIFAR[kind]
    (place / "train").write_bytes(make())
    check(refused("data", ["cifar100", "--data.root", "."]), "train", "fetch it again", *words)


LISTS: dict[str, tuple[bytes, list[str]]] = {
    "one that leads out": (b"ok.png 0\n../../../etc/passwd 1\n", ["line 2", "leads out of data.root"]),
    "one that leads out in the middle": (b"a/../../x.png 0\n", ["line 1", "leads out of data.root"]),
    "one from the root": (b"/etc/passwd 0\n", ["line 1", "leads out of data.root"]),
    "an address": (b"s3://bucket/x.png 0\n", ["line 1", "not below data.root"]),
    "a zero byte": (b"a\x00b.png 0\n", ["line 1", "not the path of an image"]),
    "a path of 5,000 letters": (b"a" * 5000 + b" 0\n", ["line 1", "5000 letters"]),
    "no label": (b"ok.png 0\nok.png\n", ["line 2", "has not 2 parts", "--data.columns path"]),
    "a label below -1": (b"ok.png -2\n", ["label '-2'"]),
    "a label far too large": (b"ok.png 99999999\n", ["label 99999999", "number classes from 0"]),
    "nothing": (b"\n\n", ["lists no images"]),
    "not text": (b"\xff\xfe\x00 0\n", ["not a text file"]),
    "files that are not there": (b"a.png 0\nb.png 1\n", ["a.png", "data.root"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(kind: str, place: Path, refused: Refused) -> None:
    content, words = LISTS[kind]
    (place / "ok.png").touch()
    (place / "l.txt").write_bytes(content)
    check(refused("data", ["image-list", "--data.listing", "l.txt"]), "l.txt", *words)


TABLES: dict[str, tuple[bytes, list[str], list[str]]] = {
    "nothing": (b"", [], ["no column 'path'"]),
    "no such column": (b"a,b\n1,2\n", [], ["no column 'path'", "path=COLUMN"]),
    "a short line": (b"path,label\nok.png\n", [], ["line 2", "1 cells", "the header 2"]),
    "one that leads out": (b"path,label\n../x.png,1\n", [], ["line 2", "leads out of data.root"]),
    "a cell without a value": (b"path,label\nok.png,\n", [], ["line 2", "no label"]),
    "a field of a megabyte": (b"path,label\n" + b"x" * 10**6 + b",1\n", [], ["not a CSV file"]),
    "a role that is none": (b"path,label\nok.png,1\n", ["--data.columns", "file=path"], ["'file=path'", "ROLE=COLUMN"]),
    "attributes that are not there": (b"path\nok.png\n", ["--data.level", "3"], ["data.level = '3'", "attributes="]),
    "no split of that name": (b"path,split\nok.png,dev\n", [], ["no line of split train", "dev"]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(kind: str, place: Path, refused: Refused) -> None:
    content, more, words = TABLES[kind]
    (place / "ok.png").touch()
    (place / "t.csv").write_bytes(content)
    check(refused("data", ["image-table", "--data.listing", "t.csv", *more]), *words)


def test_tables_as_parquet(place: Path, refused: Refused) -> None:
    pytest.importorskip("pyarrow")
    (place / "t.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    check(refused("data", ["image-table", "--data.listing", "t.parquet"]), "t.parquet", "not a Parquet file")


RANK_H: dict[str, tuple[str, list[str]]] = {
    "nothing": ("", ["meta_data_train.csv", "not a table"]),
    "a blank first line": ("\n\n", ["meta_data_train.csv", "first line is empty"]),
    "a field of a megabyte": (",path,class\n0," + "x" * 10**6 + ",1\n", ["meta_data_train.csv", "not a table"]),
    "no class": (",path\n0,a.jpg\n", ["no column 'class'"]),
    "one that leads out": (",path,class\n0,../../x.jpg,1\n", ["leads out of data.root"]),
    "a class that is no number": (",path,class\n0,ok.png,bird\n", ["a label is not a number"]),
    "a class that is nan": (",path,class\n0,ok.png,nan\n", ["image 0 has a label that is no class"]),
}


@pytest.mark.parametrize("kind", RANK_H)
def test_metadata_tables(kind: str, place: Path, refused: Refused) -> None:
    content, words = RANK_H[kind]
    (place / "rank_H").mkdir()
    (place / "rank_H" / "meta_data_train.csv").write_text(content)
    (place / "ok.png").touch()
    check(refused("data", ["zappos50k", "--data.root", "."]), *words)


def test_annotations_of_cars(place: Path, refused: Refused) -> None:
    pytest.importorskip("scipy")
    (place / "devkit").mkdir()
    for content in (b"", b"MATLAB 5.0 MAT-file" + bytes(200), b"\x00" * 600):
        (place / "devkit" / "cars_train_annos.mat").write_bytes(content)
        check(refused("data", ["cars196", "--data.root", "."]), "cars_train_annos.mat", "cannot be read")


def test_folders_without_images(place: Path, refused: Refused) -> None:
    (place / "images" / "train" / "cat").mkdir(parents=True)
    check(refused("data", ["image-folder", "--data.root", "images"]), "images")


@pytest.mark.parametrize(("field", "word"), [("label", "label 10"), ("weak", "weak label 10")])
def test_labels_that_are_no_class(field: str, word: str) -> None:
    """A reader that does not look would make a classifier of the wrong width, or read beyond a table."""
    import dataclasses

    from raycon.training import job

    from .conftest import small

    config = small()
    data = job.open_data(config)
    label = data.label.copy()
    label[3] = 10
    wrong = dataclasses.replace(data, weak_classes=data.classes, weak=data.label)
    assert job.facts_of(config, wrong, 1).classes == 10
    with pytest.raises(ConfigError, match=f"'digits': row 3 has {word}, and 1 rows.*0..9"):
        job.facts_of(config, dataclasses.replace(wrong, **{field: label}), 1)
    label[3] = -2
    with pytest.raises(ConfigError, match=r"row 3 has .*label -2.*-1 for none"):
        job.facts_of(config, dataclasses.replace(data, **{field: label}), 1)


@pytest.mark.ffcv
def test_a_converted_file_of_something_else(place: Path, refused: Refused) -> None:
    (place / "x.beton").write_bytes(b"my thesis")
    check(refused("data", ["write-ffcv", "digits", "--out", "x.beton"]), "x.beton", "remove it, or give another name")


# --- features and indexes ---------------------------------------------------------------------------------------


def _npy(array: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def _with(row: int, value: float) -> bytes:
    array = np.ones((20, 4), np.float32)
    array[row] = value
    return _npy(array)


def _claims(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(64)


FEATURES: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "nothing": (lambda: b"", ["no array that can be read"]),
    "text": (lambda: b"1 2 3\n", ["no array that can be read"]),
    "objects": (lambda: _npy(np.array([Evil()], dtype=object), allow_pickle=True), ["no array that can be read"]),
    "a pickle": (lambda: pickle.dumps(Evil()), ["no array that can be read"]),
    "a zip archive": (lambda: b"PK\x03\x04" + bytes(50), ["no array that can be read"]),
    "one dimension": (lambda: _npy(np.zeros(4, np.float32)), ["shape (4,)", "(N, D)"]),
    "integers": (lambda: _npy(np.zeros((4, 4), int)), ["int64", "floats"]),
    "no rows": (lambda: _npy(np.zeros((0, 4), np.float32)), ["(0, 4)"]),
    "nan": (lambda: _with(7, float("nan")), ["row 7", "not finite", "drop the row"]),
    "a zero row": (lambda: _with(5, 0.0), ["row 5 is zero", "--metric l2"]),
    "a terabyte of claims": (lambda: _claims((2**36, 8)), ["no array that can be read"]),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_features(kind: str, place: Path, refused: Refused) -> None:
    make, words = FEATURES[kind]
    (place / "f.npy").write_bytes(make())
    check(refused("index", ["build", "f.npy", "--out", "i"]), "f.npy", *words)


@pytest.fixture
def index(place: Path) -> Path:
    from raycon.index.__main__ import main

    np.save(place / "f.npy", np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32))
    assert main(["build", "f.npy", "--out", "i"]) == 0
    return place / "i"


INDEX: list[tuple[list[str], list[str]]] = [
    (["build", "f.npy", "--out", "i"], ["--out i holds an index", "--overwrite"]),
    (["build", "f.npy", "--out", "j", "--shards", "0"], ["--shards 0", "1 or more"]),
    (["search", "i", "--rows", "60"], ["--rows 60", "0 .. 59"]),
    (["search", "i", "--rows", "1", "-k", "0"], ["-k 0", "1 .. 59"]),
    (["search", "i", "--queries", "nowhere.npy"], ["nowhere.npy", "no such file"]),
    (["search", "i", "--rows", "1", "--out", "x.txt"], ["--out x.txt", ".npz"]),
    (["search", "i", "--rows", "1", "--out", "no/x.npz"], ["--out no/x.npz", "no folder"]),
    (["search", "i", "--rows", "1", "--metric", "l2"], ["--metric l2", "built for cosine"]),
    (["cluster", "i", "-k", "61"], ["-k 61", "1 .. 60"]),
    (["cluster", "i", "-k", "3", "3"], ["twice"]),
    (["cluster", "i", "-k", "3", "--redo", "0"], ["--redo 0", "1 or more"]),
    (["cluster", "i", "-k", "3", "--warm", "f.npy"], ["--warm f.npy"]),
    (["stats", "."], ["."]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), INDEX, ids=[" ".join(a) for a, _ in INDEX])
def test_index(arguments: list[str], words: list[str], index: Path, refused: Refused) -> None:
    if arguments == ["stats", "."]:
        (index.parent / "f.npy").rename(index.parent / "f.txt")
        for file in index.iterdir():
            file.unlink()
    check(refused("index", arguments), *words)


def _manifest(**changed: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = sorted(folder.glob("rows-*.json"))[0]
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return apply


def _flip(folder: Path) -> None:
    file = sorted(folder.glob("rows-*.npy"))[0]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


PARTS: dict[str, Callable[[Path], None]] = {
    "a byte altered": _flip,
    "a part gone": lambda f: sorted(f.glob("rows-*"))[0].unlink(),
    "a name that leads out": _manifest(file="../../f.npy"),
    "a name that is a number": _manifest(file=7),
    "rows beyond": _manifest(rows=10**12),
    "a width of 10^12": _manifest(dim=10**12),
    "pieces of no rows": _manifest(piece_rows=0),
    "an unknown metric": _manifest(metric=["cosine"]),
    "another format": _manifest(format=2),
    "no JSON": lambda f: sorted(f.glob("rows-*.json"))[0].write_bytes(b"\xff"),
    "a deep one": lambda f: sorted(f.glob("rows-*.json"))[0].write_text("[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_an_index(kind: str, index: Path, refused: Refused) -> None:
    PARTS[kind](index)
    said = refused("index", ["stats", "i"])
    check(said, "i")
    assert "again" in said, said


def test_embeddings_of_another(run_dir: Path, refused: Refused) -> None:
    out = run_dir.parent / "e"
    out.mkdir()
    for content in ("{", "[]", "{}", '{"identity": {}, "complete": true}', "[" * 100_000):
        (out / "_manifest.json").write_text(content)
        check(refused("embed", ["run", "digits", "--out", "e"]), "another folder")


# --- as a person meets it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(
            ["raycon.pretrain", "quickstart", "--train.epochs", "0"], ["train.epochs = 0"], marks=pytest.mark.slow
        ),
        pytest.param(["raycon.export", "w.pth"], ["w.pth", "can run any code"], marks=pytest.mark.slow),
        pytest.param(["raycon.index", "build", "f.npy", "--out", "i"], ["f.npy"], marks=pytest.mark.slow),
        (["raycon.data", "image-list", "--data.listing", "l.txt"], ["leads out of data.root"]),
        (["raycon.report", "."], ["not a run directory"]),
    ],
    ids=lambda v: v[0],
)
def test_processes(arguments: list[str], words: list[str], place: Path) -> None:
    (place / "w.pth").write_bytes(_saved({"state_dict": Evil()}))
    (place / "l.txt").write_text("../../x.png 0\n")
    (place / "f.npy").write_bytes(b"no array")
    before = sorted(place.rglob("*"))
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=place,
        env=_environment(root),
    )
    assert done.returncode == 2, done
    check(done.stderr, arguments[0], *words)
    assert "Traceback" not in done.stderr
    assert sorted(place.rglob("*")) == before


def _environment(root: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(root)}


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(arguments: list[str]) -> int:
        assert arguments == ["a"]
        raise ConfigError(["a = 1: give 2"])

    def failing(arguments: list[str]) -> int:
        raise OSError("disk full")

    assert program.run("raycon.x", wrong, ["a"]) == 2
    assert program.run("raycon.x", failing, []) == 1
    said = capsys.readouterr().err
    assert "raycon.x: 1 problem in the configuration:\n  - a = 1: give 2\n" in said
    assert "raycon.x: OSError: disk full\n(--debug shows where)\n" in said
    with pytest.raises(ConfigError):
        program.run("raycon.x", wrong, ["--debug", "a"])
    with pytest.raises(OSError, match="disk full"):
        program.run("raycon.x", failing, ["--debug"])
