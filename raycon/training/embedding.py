"""Features of every image of a data set as files: parts that are complete or not there, and a manifest.

    DIR/_manifest.json         what was embedded with what; "complete": true at the end
    DIR/part-00000.parquet     columns row, path, label, weak, feature (fixed-size list of D floats)
or
    DIR/features.npy           (N, D); row i is row i of the data set
    DIR/labels.npy  weak.npy   (N,) int64, -1 where there is none
    DIR/rows.npy    paths.npy  (N,) int64; (N,) UTF-8 bytes, how messages name the image
    (while it is made: features-00000.npy, ...)

A part is the rows N*p//P .. N*(p+1)//P, so which parts there are does not depend on who makes them.

Shape letters: N rows, P parts, n rows of a part, D feature width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raycon.core.config import ConfigError
from raycon.core.stream import shard_range
from raycon.evals import features
from raycon.evals.base import Source

Format = Literal["parquet", "npy"]
MANIFEST = "_manifest.json"  # readers of Parquet folders pass over what begins with _


@dataclass(frozen=True, kw_only=True)
class Work:
    """What makes a part. Can be pickled."""

    source: Source
    """Its ``train`` is the data set."""
    parts: int
    half: bool = False
    """Features as float16."""
    threads: int = 1


def embed_part(work: Work, part: int) -> NDArray[np.floating[Any]]:
    """(n, D) float32, or float16 when ``half``: the features of a part's rows, in order.

    Raises ValueError naming an image that cannot be read, and when a feature is not finite.
    """
    torch.set_num_threads(work.threads)
    source = work.source
    first, end = shard_range(len(source.train), part, work.parts)
    source.encoder.to(source.device)
    blocks = features.scan(source, source.train, rank=part, world=work.parts)
    found = features.extract(source.encoder, blocks, end - first, first)
    if not bool(torch.isfinite(found).all()):
        row = first + int((~torch.isfinite(found)).any(1).nonzero()[0])
        raise ValueError(f"the encoder's features of {source.train.where(row)} are not finite")
    return np.asarray(found.half().numpy() if work.half else found.numpy())


def digest(encoder: nn.Module) -> str:
    """16 hexadecimal digits that change when a weight or a buffer does."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in encoder.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Folder:
    """The folder of one embedding: knows which parts are there, and puts new ones in place."""

    def __init__(
        self, path: Path, kind: Format, identity: Mapping[str, Any], rows: int, parts: int, width: int
    ) -> None:
        """Begin or go on. Raises ConfigError when the folder holds another embedding, or something else."""
        self.path, self.kind, self.rows, self.parts, self.width = path, kind, rows, parts, width
        self._identity = dict(identity)
        self._head: dict[str, Any] = {"raycon": "embedding", "format": kind, "rows": rows, "parts": parts}
        self._head |= {"features": width, "identity": self._identity}
        file = path / MANIFEST
        self.complete = False
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                if (
                    not isinstance(found, dict)
                    or not isinstance(found.get("identity"), dict)
                    or "complete" not in found
                ):
                    raise ValueError("not as raycon.embed writes it")
            except (OSError, ValueError, RecursionError) as error:
                raise ConfigError([f"{file} cannot be read ({error}): give --out another folder"]) from None
            if differences := self._differences(found):
                raise ConfigError([f"--out {path} holds another embedding ({differences}): give another folder"])
            self.complete = bool(found["complete"])
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError([f"--out {path} exists and is no embedding: give another folder"])
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._write_manifest(complete=False)

    def _differences(self, found: Mapping[str, Any]) -> str:
        then = dict(found.get("identity", {})) | {k: found.get(k) for k in self._head if k != "identity"}
        now = self._identity | {k: v for k, v in self._head.items() if k != "identity"}
        keys = [k for k in dict.fromkeys([*then, *now]) if then.get(k) != now.get(k)]
        return ", ".join(f"{k} {then.get(k)!r}, now {now.get(k)!r}" for k in keys)

    def missing(self) -> list[int]:
        """The parts that are not there yet, or cannot be read."""
        return [] if self.complete else [p for p in range(self.parts) if not self._whole(p)]

    def part_file(self, part: int) -> Path:
        return self.path / (f"part-{part:05d}.parquet" if self.kind == "parquet" else f"features-{part:05d}.npy")

    def _whole(self, part: int) -> bool:
        file = self.part_file(part)
        first, end = shard_range(self.rows, part, self.parts)
        if not file.is_file():
            return False
        try:
            if self.kind == "npy":
                return np.load(file, mmap_mode="r", allow_pickle=False).shape == (end - first, self.width)
            import pyarrow.parquet

            return bool(pyarrow.parquet.read_metadata(file).num_rows == end - first)
        except (OSError, ValueError):  # pyarrow's own errors are ValueErrors
            return False

    def put(self, part: int, found: NDArray[np.floating[Any]], dataset: Any) -> None:
        """Write a part: complete under its name, or not at all."""
        first, end = shard_range(self.rows, part, self.parts)
        assert found.shape == (end - first, self.width), found.shape
        work = self.path / f".{self.part_file(part).name}.{os.getpid()}.part"
        try:
            if self.kind == "npy":
                with work.open("wb") as handle:
                    np.save(handle, found, allow_pickle=False)
            else:
                _write_parquet(work, found, np.arange(first, end), dataset)
            _settle(work, self.part_file(part))
        finally:
            work.unlink(missing_ok=True)

    def finish(self, dataset: Any) -> None:
        """All parts are there: for npy make the arrays of them; then the manifest says that it is complete."""
        assert not self.missing()
        if self.kind == "npy" and not self.complete:
            self._assemble(dataset)
        self._write_manifest(complete=True)
        self.complete = True
        if self.kind == "npy":
            for part in range(self.parts):
                self.part_file(part).unlink(missing_ok=True)

    def _assemble(self, dataset: Any) -> None:
        kind = np.load(self.part_file(0), mmap_mode="r", allow_pickle=False).dtype
        work = self.path / ".features.npy.part"
        whole = np.lib.format.open_memmap(work, mode="w+", dtype=kind, shape=(self.rows, self.width))
        for part in range(self.parts):
            first, end = shard_range(self.rows, part, self.parts)
            whole[first:end] = np.load(self.part_file(part), mmap_mode="r", allow_pickle=False)
        whole.flush()
        del whole
        _settle(work, self.path / "features.npy")
        rows = np.arange(self.rows)
        arrays = {"rows": rows, "labels": dataset.label, "weak": dataset.weak, "paths": paths(dataset, rows)}
        for name, array in arrays.items():
            work = self.path / f".{name}.npy.part"
            with work.open("wb") as handle:
                np.save(handle, array, allow_pickle=False)
            _settle(work, self.path / f"{name}.npy")

    def _write_manifest(self, complete: bool) -> None:
        work = self.path / f".{MANIFEST}.part"
        work.write_text(json.dumps(self._head | {"complete": complete}, indent=1), encoding="utf-8")
        _settle(work, self.path / MANIFEST)


def paths(dataset: Any, rows: NDArray[np.int64]) -> NDArray[np.bytes_]:
    """(n,) how each image is named: its file or address, else data set, split and row; UTF-8."""
    return np.array([os.fsencode(dataset.where(int(row))) for row in rows], dtype=np.bytes_)


def _write_parquet(file: Path, found: NDArray[np.floating[Any]], rows: NDArray[np.int64], dataset: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    flat = pyarrow.array(np.ascontiguousarray(found).reshape(-1))
    names = [name.decode("utf-8", "backslashreplace") for name in paths(dataset, rows)]
    columns = {
        "row": pyarrow.array(rows),
        "path": pyarrow.array(names, type=pyarrow.string()),
        "label": pyarrow.array(np.asarray(dataset.label)[rows]),
        "weak": pyarrow.array(np.asarray(dataset.weak)[rows]),
        "feature": pyarrow.FixedSizeListArray.from_arrays(flat, found.shape[1]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def _settle(work: Path, file: Path) -> None:
    """On disk, then under its name."""
    with work.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(work, file)
