"""Files that chance has altered: a reader gives what it promises or its one kind of error, soon and in little memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from raycon import methods
from raycon.core.config import ConfigError, Facts, problems_of, to_dict
from raycon.data_loaders import cifar_files
from raycon.data_loaders.datasets import fashion_mnist, open_dataset
from raycon.index import persist
from raycon.index.sources import open_source
from raycon.nn import published
from raycon.recipes import recipe
from raycon.training import checkpoint

Guarded = Callable[[Callable[[], object]], None]

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**32 - 1, 2**63, 10**400]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def altered(base: bytes, head: int = 0) -> st.SearchStrategy[bytes]:
    """``base`` with some of its bytes replaced (of the first ``head``, where it is given), taken out or put in, or cut."""
    end = min(head, len(base)) or len(base)
    piece = st.one_of(
        st.binary(max_size=9), st.sampled_from([b"\xff" * 4, b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7])
    )
    edits = st.lists(st.tuples(st.integers(0, end), st.integers(0, 9), piece), min_size=1, max_size=4)

    def apply(edits: list[tuple[int, int, bytes]], cut: int | None) -> bytes:
        content = base
        for at, gone, put in edits:
            content = content[:at] + put + content[at + gone :]
        return content if cut is None else content[:cut]

    return st.builds(apply, edits, st.one_of(st.none(), st.none(), st.integers(0, len(base))))


def changed(tree: dict[str, Any], paths: list[tuple[Any, ...]]) -> st.SearchStrategy[dict[str, Any]]:
    """A copy of a JSON tree with other values at some of ``paths``, or without them."""

    def apply(edits: list[tuple[tuple[Any, ...], Any, bool]]) -> dict[str, Any]:
        copy = json.loads(json.dumps(tree))
        for path, value, gone in edits:
            with contextlib.suppress(KeyError, TypeError, IndexError):  # an edit before took its place
                place = copy
                for part in path[:-1]:
                    place = place[part]
                if gone:
                    del place[path[-1]]
                else:
                    place[path[-1]] = value
        return copy

    return st.lists(st.tuples(st.sampled_from(paths), JSON, st.booleans()), min_size=1, max_size=3).map(apply)


# --- data sets --------------------------------------------------------------------------------------------------

IDX = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (5, 4, 4)) + bytes(range(80))


@given(content=altered(IDX), packed=st.booleans())
def test_idx(content: bytes, packed: bool, file: Path, guarded: Guarded) -> None:
    place = file.with_suffix(".gz") if packed else file
    place.write_bytes(gzip.compress(content, 1) if packed else content)

    def read() -> None:
        with contextlib.suppress(ConfigError):
            assert fashion_mnist.read_idx(place, (5, 4, 4)).shape == (5, 4, 4)

    guarded(read)


@given(content=altered(gzip.compress(IDX, 1)))
def test_packed_idx(content: bytes, file: Path, guarded: Guarded) -> None:
    place = file.with_suffix(".gz")
    place.write_bytes(content)

    def read() -> None:
        with contextlib.suppress(ConfigError):
            assert fashion_mnist.read_idx(place, (5, 4, 4)).shape == (5, 4, 4)

    guarded(read)


def _batch(protocol: int) -> bytes:
    return pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, np.int64(2)]}, protocol)


def _opcodes() -> st.SearchStrategy[bytes]:
    """Programs for the unpickler: operations in any order, the globals that are allowed among them."""
    words = st.sampled_from(
        [b"(", b".", b"0", b"2", b"N", b"}", b"]", b")", b"R", b"b", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"\x87",
         b"\x94", b"\x93", b"\x81", b"K\x01", b"J\xff\xff\xff\x7f", b"q\x00", b"h\x00", b"r\xff\xff\xff\xff",
         b"\x8e\xff\xff\xff\xff\xff\xff\xff\x0f", b"B\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"C\x04\x00\x01\x02\x03",
         b"X\x02\x00\x00\x00u1", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
         b"c_codecs\nencode\n", b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy._core.multiarray\nscalar\n",
         b"cos\nsystem\n", b"\x95\xff\xff\xff\xff\xff\xff\xff\x0f"]
    )  # fmt: skip
    return st.lists(words, max_size=25).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


@given(content=st.one_of(altered(_batch(2)), altered(_batch(4), head=200), altered(_batch(5), head=200), _opcodes()))
@example(content=b"\x80\x02Nr" + (2**32 - 1).to_bytes(4, "little") + b".")
def test_cifar(content: bytes, file: Path, guarded: Guarded) -> None:
    file.write_bytes(content)

    def read() -> None:
        with contextlib.suppress(ConfigError):
            batch = cifar_files.read(file.parent, "cifar10", "x", file.name, labels=10)
            assert batch["data"].nbytes <= len(content)
            assert len(batch["labels"]) == len(batch["data"])
            assert batch["labels"].min(initial=0) >= 0

    guarded(read)


LIST = b"a.png 0\nsub/b c.png 1\nc.png 2\n"
TABLE = b'path,label,split\na.png,cat,train\n"sub/b c.png",dog,val\nc.png,cat,train\n'


@given(content=st.one_of(altered(LIST), altered(TABLE), st.text(max_size=60).map(str.encode)), table=st.booleans())
def test_lists_and_tables(content: bytes, table: bool, file: Path, guarded: Guarded) -> None:
    root = file.parent / "images"
    (root / "sub").mkdir(parents=True, exist_ok=True)
    (root / "a.png").touch()
    file.write_bytes(content)

    def read() -> None:
        with contextlib.suppress(ConfigError):
            found = open_dataset("image-table" if table else "image-list", root, listing=str(file))
            for row in range(len(found)):
                inside = os.path.normpath(str(found.path(row)))
                assert inside.startswith(f"{root}/"), inside
            assert found.label.min() >= -1

    guarded(read)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from raycon.data_loaders.write_ffcv import write_beton

    dataset = open_dataset("digits").subset(np.arange(40))
    file = tmp_path_factory.mktemp("beton") / "digits.beton"
    write_beton(dataset, file)
    return dataset, file


@pytest.mark.ffcv
@given(data=st.data())
def test_beton(data: st.DataObject, beton: tuple[Any, Path], file: Path, guarded: Guarded) -> None:
    """What is found whole and of this data holds the images of all its rows."""
    from raycon.data_loaders.write_ffcv import beton_problem, import_ffcv

    dataset, whole = beton
    content = whole.read_bytes()
    table = 40 * 24
    part = data.draw(st.sampled_from(["head", "table"]))
    if part == "head":
        file.write_bytes(data.draw(altered(content[:4000])) + content[4000:])
    else:
        file.write_bytes(content[:-table] + data.draw(altered(content[-table:])))

    def read() -> None:
        if beton_problem(file, dataset) is None:
            reader = import_ffcv().reader.Reader(str(file))
            for row, (_, start, size) in enumerate(reader.alloc_table.tolist()):
                assert file.read_bytes()[start : start + size] == dataset.images[row].tobytes()

    guarded(read)


# --- checkpoints and weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raycon.core.types import Snapshot

    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    snapshot = Snapshot(3, (torch.zeros(5, dtype=torch.int64),), (torch.ones(2, 4),), (torch.ones(2),), None)
    folder = tmp_path_factory.mktemp("saved")
    return checkpoint.save(folder, network, optimizer, snapshot, {"step": 7, "epoch": 1, "evaluate": False})


@given(data=st.data())
def test_checkpoints(data: st.DataObject, saved: Path, file: Path, guarded: Guarded) -> None:
    """state.json altered as text or as values; or a file of tensors altered, and its sum made to fit."""
    copy = file.parent / "00000007"
    copy.mkdir(exist_ok=True)
    for source in saved.iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    state = json.loads((saved / "state.json").read_text())
    kind = data.draw(st.sampled_from(["text", "values", "tensors"]))
    if kind == "text":
        (copy / "state.json").write_bytes(data.draw(altered((saved / "state.json").read_bytes())))
    elif kind == "values":
        paths = [(k,) for k in state] + [("files", k) for k in state["files"]] + [("optimizer", "param_groups")]
        paths += [("files", "model.safetensors", k) for k in ("bytes", "sha256")]
        (copy / "state.json").write_text(json.dumps(data.draw(changed(state, paths))))
    else:
        name = data.draw(st.sampled_from(sorted(state["files"])))
        content = data.draw(altered((saved / name).read_bytes()))
        (copy / name).write_bytes(content)
        state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (copy / "state.json").write_text(json.dumps(state))

    def read() -> None:
        with contextlib.suppress(checkpoint.CheckpointError):
            found = checkpoint.load(copy)
            assert found.step >= 0
            assert all(float(t.double().sum()) is not None for t in found.model.values())

    guarded(read)


def _pth(legacy: bool) -> bytes:
    buffer = io.BytesIO()
    content = {
        "epoch": 3,
        "state_dict": {"module.conv1.weight": torch.ones(2, 3, 3, 3), "module.fc.bias": torch.zeros(4)},
    }
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _again(pickled: bytes) -> bytes:
    """The archive of ``_pth`` with another pickle in it, and sums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_pth(legacy=False))) as archive, zipfile.ZipFile(buffer, "w") as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, pickled if entry.filename.endswith(".pkl") else archive.read(entry))
    return buffer.getvalue()


def _inner() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_pth(legacy=False))) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(".pkl")))


@given(content=st.one_of(altered(_pth(False)), altered(_pth(True)), altered(_inner()).map(_again), _opcodes()))
def test_weight_files(content: bytes, file: Path, guarded: Guarded) -> None:
    place = file.with_suffix(".pth")
    place.write_bytes(content)

    def read() -> None:
        with contextlib.suppress(published.FileError):
            found = published.read(place)
            assert isinstance(found, dict)
            published.recognise(found, str(place))

    guarded(read)


@given(data=st.data())
def test_safetensors(data: st.DataObject, saved: Path, file: Path, guarded: Guarded) -> None:
    place = file.with_suffix(".safetensors")
    place.write_bytes(data.draw(altered((saved / "model.safetensors").read_bytes())))

    def read() -> None:
        published.card_in(place)
        with contextlib.suppress(published.FileError):
            published.recognise(published.read(place), str(place))

    guarded(read)


# --- features ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    for first, last in ((0, 6), (6, 10)):
        writer = persist.PartWriter(folder, 0, first, last, 10, 4)
        writer.write(np.ones((last - first, 4), np.float32))
        writer.close()
    return folder


@given(data=st.data())
def test_parts_of_an_index(data: st.DataObject, index: Path, file: Path, guarded: Guarded) -> None:
    """Altered manifests and arrays. What is read in spite of it is what was written."""
    copy = file.parent / "index"
    copy.mkdir(exist_ok=True)
    for source in index.iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    manifest, array = copy / "rows-0-6.json", copy / "rows-0-6.v0.npy"
    tree = json.loads(manifest.read_text())
    kind = data.draw(st.sampled_from(["text", "values", "array"]))
    if kind == "text":
        manifest.write_bytes(data.draw(altered(manifest.read_bytes())))
    elif kind == "values":
        manifest.write_text(json.dumps(data.draw(changed(tree, [(k,) for k in tree]))))
    else:
        array.write_bytes(data.draw(altered(array.read_bytes())))

    def read() -> None:
        with contextlib.suppress(persist.DamagedPart):
            parts = persist.whole(copy)
            for _, block in persist.read_range(copy, parts[0].version, 0, 10):
                assert (block == 1).all()

    guarded(read)


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((7, 3), np.float32))
    return buffer.getvalue()


@given(content=altered(_npy(), head=128))
def test_feature_tables(content: bytes, file: Path, guarded: Guarded) -> None:
    place = file.with_suffix(".npy")
    place.write_bytes(content)

    def read() -> None:
        with contextlib.suppress(ConfigError):
            source = open_source(place)
            assert sum(len(block) for _, block in source.blocks("l2")) == source.rows

    guarded(read)


# --- configurations ---------------------------------------------------------------------------------------------

TREE = to_dict(recipe("quickstart"))
FACTS = Facts(rows=1437, classes=0, image=(1, 8, 8), batch=128, world=2, size=16, epochs=100)
OPTIONS: list[tuple[str, ...]] = [
    (group, *rest)
    for group in TREE
    for rest in ([(k,) for k in TREE[group]] if isinstance(TREE[group], dict) else [()])
]


@given(content=st.one_of(altered(yaml.safe_dump(TREE).encode()), st.text(max_size=80).map(str.encode)))
@example(content=b"method: &m {name: pcl, self: *m}")
@example(content=b"seed: !!timestamp x")
def test_configuration_files(content: bytes, file: Path, guarded: Guarded) -> None:
    file.write_bytes(content)

    def read() -> None:
        with contextlib.suppress(ConfigError):
            config = methods.read_config(file)
            problems_of(config, FACTS)

    guarded(read)


@given(
    tree=changed(TREE, OPTIONS), name=st.sampled_from([n for n in methods.names() if n != "supervised"]), data=st.data()
)
def test_values_of_options(tree: dict[str, Any], name: str, data: st.DataObject, file: Path, guarded: Guarded) -> None:
    """Every value of every option of every method: refused as a whole, or checked without an exception."""
    fields = dataclasses.fields(methods.options(name))
    if isinstance(tree.get("method"), dict):
        tree["method"] = {
            "name": name,
            data.draw(st.sampled_from([f.name for f in fields if f.name != "name"])): data.draw(JSON),
        }
    file.write_text(yaml.safe_dump(tree))

    def read() -> None:
        with contextlib.suppress(ConfigError):
            config = methods.read_config(file)
            facts = dataclasses.replace(FACTS, batch=max(1, config.train.batch), epochs=config.train.epochs)
            assert all(isinstance(problem, str) for problem in problems_of(config, facts))
            config.method.needs()
            config.method.warnings(facts)

    guarded(read)
