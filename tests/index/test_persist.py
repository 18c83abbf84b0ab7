"""Features on disk: what was written comes back, and nothing else does."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from raycon.core.config import MiningConfig
from raycon.core.types import MissingRows, Needs
from raycon.index import persist
from raycon.index.local import LocalIndex
from raycon.index.persist import DamagedPart, PartWriter, clear, read_range, whole
from raycon.index.service import Saved, SavedShard

ROWS, DIM = 900, 12


def features(seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(ROWS, DIM)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def write(folder: Path, x: np.ndarray, parts: int = 2, version: int = 0, storage: persist.Storage = "float32") -> None:
    for i in range(parts):
        first, last = len(x) * i // parts, len(x) * (i + 1) // parts
        writer = PartWriter(folder, version, first, last, len(x), x.shape[1], storage)
        for start in range(first, last, 77):
            writer.write(x[start : min(start + 77, last)])
        writer.close()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persist, "PIECE_BYTES", 100 * DIM * 4)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_any_range_comes_back_from_any_parts(tmp_path: Path, storage: persist.Storage) -> None:
    x = features()
    write(tmp_path, x, 4, storage=storage)
    kept = x if storage == "float32" else x.astype(np.float16).astype(np.float32)
    for first, last in ((0, ROWS), (0, 1), (899, 900), (220, 230), (224, 680), (5, 5)):
        blocks = list(read_range(tmp_path, 0, first, last))
        assert np.concatenate([b for _, b in blocks] or [x[:0]]).tobytes() == kept[first:last].tobytes()
        assert [row for row, _ in blocks] == list(np.cumsum([first, *(len(b) for _, b in blocks)])[:-1])
    # Plain files that numpy reads by itself.
    np.testing.assert_array_equal(
        np.load(tmp_path / "rows-0-225.v0.npy", allow_pickle=False), kept[:225].astype(storage)
    )
    assert [(p.first_row, p.last_row, p.storage) for p in whole(tmp_path)] == [
        (0, 225, storage), (225, 450, storage), (450, 675, storage), (675, 900, storage),
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["first", "last", "header", "cut", "grown"])
def test_every_altered_byte_is_found_and_its_rows_named(tmp_path: Path, place: str) -> None:
    x = features()
    write(tmp_path, x, 1)
    file = tmp_path / "rows-0-900.v0.npy"
    data = bytearray(file.read_bytes())
    header = len(data) - x.nbytes
    if place == "cut":
        data = data[:-1]
    elif place == "grown":
        data[20] = ord(" ")
    else:
        data[{"first": header, "last": len(data) - 1, "header": 3}[place]] ^= 4
    file.write_bytes(data)
    named = {"first": "rows 0 .. 100 are", "last": "rows 800 .. 900 are", "cut": "rows 800 .. 900 are"}.get(place, "")
    with pytest.raises(DamagedPart, match=rf"rows-0-900.v0.npy: {named}"):
        list(read_range(tmp_path, 0, 0, ROWS))
    if place in ("first", "last", "cut"):  # the sound pieces can be read
        assert len(list(read_range(tmp_path, 0, 100, 800))) == 7


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    x = features()
    with pytest.raises(DamagedPart, match="no index here"):
        whole(tmp_path)
    write(tmp_path, x, 3)
    with pytest.raises(DamagedPart, match=r"rows 0 \.\. 900 of version 1 are not there"):
        list(read_range(tmp_path, 1, 0, ROWS))
    manifest = tmp_path / "rows-300-600.json"
    text = manifest.read_text()
    manifest.unlink()
    with pytest.raises(DamagedPart, match=r"rows 300 \.\. 600 are missing"):
        whole(tmp_path)
    with pytest.raises(DamagedPart, match=r"rows 300 \.\. 900 of version 0 are not there"):
        list(read_range(tmp_path, 0, 10, ROWS))
    for broken in ("[1", "{}", json.dumps({**json.loads(text), "piece_rows": 0}),
                   json.dumps({**json.loads(text), "last_row": 5}), json.dumps({**json.loads(text), "rows": "x"})):  # fmt: skip
        manifest.write_text(broken)
        with pytest.raises(DamagedPart, match=r"rows-300-600.json: unreadable"):
            whole(tmp_path)
    # A name in a manifest cannot lead out of the folder.
    manifest.write_text(json.dumps({**json.loads(text), "file": "../../etc/passwd"}))
    with pytest.raises(DamagedPart, match=str(tmp_path / "passwd")):
        list(read_range(tmp_path, 0, 300, 600))
    manifest.write_text(text)
    (tmp_path / "rows-300-600.v0.npy").unlink()
    with pytest.raises(DamagedPart, match=r"rows-300-600.v0.npy: unreadable"):
        list(read_range(tmp_path, 0, 0, ROWS))
    write(tmp_path / "other", x[:450], 1)
    (tmp_path / "other" / "rows-0-450.json").rename(tmp_path / "rows-0-450.json")
    manifest.unlink()
    with pytest.raises(DamagedPart, match="of different indexes"):
        whole(tmp_path)
    clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_version_replaces_the_one_before_whole_or_not_at_all(tmp_path: Path) -> None:
    old, new = features(0), features(1)
    write(tmp_path, old, 1, version=3)
    writer = PartWriter(tmp_path, 4, 0, ROWS, ROWS, DIM)
    writer.write(new[:500])
    assert next(iter(read_range(tmp_path, 3, 0, 9)))[1].tobytes() == old[:9].tobytes()
    writer.abandon()
    write(tmp_path, new, 1, version=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows-0-900.json", "rows-0-900.v4.npy"]
    assert next(iter(read_range(tmp_path, 4, 0, 9)))[1].tobytes() == new[:9].tobytes()


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path, 0, 0, 2, 2, 1, "float16")
    with pytest.raises(ValueError, match="65504"):
        writer.write(np.array([[1.0], [7e4]], dtype=np.float32))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_writes_what_is_mined_and_finds_it_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, saved = features(), Saved(folder=tmp_path, rows=ROWS, write=True)
    shard = SavedShard(100, 400, DIM, saved=saved)
    shard.put(2, 100, x[100:300])
    assert shard.state(2).missing == 100
    assert not list(tmp_path.iterdir())  # only a whole version is written
    shard.put(2, 300, x[300:400])
    state = shard.state(2)
    assert len(list(tmp_path.iterdir())) == 2
    restarted = SavedShard(100, 400, DIM, saved=saved)
    assert restarted.held() == SavedShard(100, 400, DIM, saved=saved).held() == 2
    assert SavedShard(100, 400, DIM).held() is None
    assert restarted.state(2) == state
    np.testing.assert_array_equal(restarted.gather(2, np.arange(ROWS))[1], x[100:400])
    assert restarted.state(3).missing == 300  # another version is not there
    # The first new row takes the manifest away: from here on the disk is behind.
    restarted.put(2, 100, x[:1])
    assert SavedShard(100, 400, DIM, saved=saved).state(2).missing == 300
    assert restarted.state(2).missing == 0
    assert SavedShard(100, 400, DIM, saved=saved).gather(2, np.array([100]))[1].tobytes() == x[:1].tobytes()
    with (tmp_path / "rows-100-400.v2.npy").open("ab") as handle:
        handle.truncate(9000)
    with caplog.at_level(logging.WARNING):
        damaged = SavedShard(100, 400, DIM, saved=saved)
        assert damaged.state(2).missing > 0
    assert "rows-100-400.v2.npy: rows 200 .. 300 are cut off or altered" in caplog.text
    assert "cut off" in damaged.refused(2)
    damaged.put(2, 100, x[100:400])
    assert damaged.state(2).missing == 0


@pytest.mark.parametrize("shards", [1, 3])
def test_an_index_opened_from_disk_equals_one_that_was_filled(tmp_path: Path, shards: int) -> None:
    x, needs = features(), Needs(clusterings=(9,), neighbours=2)
    write(tmp_path, x, 2)
    filled = LocalIndex(ROWS, DIM, MiningConfig(shards=2, redo=1), seed=0)
    filled.add(0, 0, x)
    opened = LocalIndex(
        ROWS, DIM, MiningConfig(shards=shards, redo=1), seed=0, saved=Saved(folder=tmp_path, rows=ROWS, write=False)
    )
    a, b = filled.snapshot(0, needs)[0], opened.snapshot(0, needs)[0]
    assert a.assignment[0].equal(b.assignment[0])
    assert a.prototypes[0].equal(b.prototypes[0])
    assert len(list(tmp_path.iterdir())) == 4  # nothing written, nothing taken away
    damaged = tmp_path / "rows-450-900.v0.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = LocalIndex(ROWS, DIM, MiningConfig(), seed=0, saved=Saved(folder=tmp_path, rows=ROWS, write=False))
    with pytest.raises(MissingRows, match=r"rows-450-900.v0.npy: rows 850 \.\. 900 are cut off or altered"):
        again.snapshot(0, needs)
    with pytest.raises(MissingRows, match=r"rows-450-900.v0.npy"):
        again.search(x[:1], 1)
