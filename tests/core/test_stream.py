from __future__ import annotations

import numpy as np
import pytest

from raycon.core import stream


def splitmix(z: int) -> int:
    """SplitMix64's finaliser in plain integers."""
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_mix_equals_plain_integers() -> None:
    words = [0, 1, 2**63, 2**64 - 1, 123456789]
    assert stream.mix64(np.array(words, dtype=np.uint64)).tolist() == [splitmix(w) for w in words]


def test_numbers_of_a_row_do_not_depend_on_its_batch() -> None:
    rows = np.array([5, 17, 2_000_000_000, 0])
    together = stream.uniforms(1, 2, rows, 0, 12)
    for i, row in enumerate(rows):
        assert (stream.uniforms(1, 2, np.array([row]), 0, 12)[0] == together[i]).all()


@pytest.mark.parametrize("change", [{"seed": 9}, {"epoch": 9}, {"view": 9}])
def test_every_key_matters(change: dict[str, int]) -> None:
    base = {"seed": 1, "epoch": 2, "view": 0}
    rows = np.arange(50)
    a = stream.uniforms(base["seed"], base["epoch"], rows, base["view"], 8)
    changed = base | change
    b = stream.uniforms(changed["seed"], changed["epoch"], rows, changed["view"], 8)
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.15
    assert (a != b).mean() > 0.99


def test_numbers_are_uniform_and_uncorrelated() -> None:
    u = stream.uniforms(0, 0, np.arange(20_000), 1, 16)
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.002
    assert abs(u.var() - 1 / 12) < 0.001
    correlation = np.corrcoef(u.T) - np.eye(16)
    assert np.abs(correlation).max() < 0.03
    neighbours = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(neighbours) < 0.03


@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    order = stream.epoch_order(3, 4, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    for step in range(1000 // 64):
        parts = [stream.batch_rows(order, step, 64, rank, world) for rank in range(world)]
        assert (np.concatenate(parts) == order[step * 64 : (step + 1) * 64]).all()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_cover_every_row_once(world: int) -> None:
    ranges = [stream.shard_range(1000, r, world) for r in range(world)]
    assert [row for first, last in ranges for row in range(first, last)] == list(range(1000))


def test_keys_do_not_collide_in_small_grids() -> None:
    keys = {stream.key(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(keys) == 8000
