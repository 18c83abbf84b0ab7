"""Rows stored as fp16: the labels of fp32, from half the memory."""

from __future__ import annotations

import errno
import os
from typing import Any

import numpy as np
import pytest

from raycon.index.merge import merge_steps
from raycon.index.shard import BLOCK, Shard


def pair_of(x: np.ndarray, cut: int, engine: str = "auto", **options: Any) -> list[Shard]:
    shards = [Shard(a, b, x.shape[1], engine=engine, **options) for a, b in ((0, cut), (cut, len(x)))]
    for shard in shards:
        shard.put(0, shard.first_row, x[shard.first_row : shard.last_row])
    return shards


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("engine", ["faiss", "torch"])
@pytest.mark.parametrize("cut", [0, 1500, 4096])
def test_labels_are_those_of_fp32(engine: str, cut: int) -> None:
    """Rows far from the origin and close to each other: rounding moves many to another cluster. And equal centroids."""
    if engine == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    x, c = (0.25 + 0.02 * rng.normal(size=(n, 16)) for n in (4500, 40))
    x, c = x.astype(np.float32), np.concatenate([c, c[:3]]).astype(np.float32)
    (full,) = pair_of(x, 0, engine)[1:]
    wanted, sqdist = full.assign(0, c)
    half = pair_of(x, cut, engine, storage="fp16")
    label = np.concatenate([s.assign(0, c)[0] for s in half])
    np.testing.assert_array_equal(label, wanted)
    np.testing.assert_allclose(np.concatenate([s.assign(0, c)[1] for s in half]), sqdist, atol=2e-3)
    rounded = Shard(0, len(x), 16, engine=engine)  # without looking at the originals labels differ
    rounded.put(0, 0, x.astype(np.float16).astype(np.float32))
    assert (rounded.assign(0, c)[0] != wanted).any()
    doubts = [s.doubt() for s in half]
    assert sum(d.rescored for d in doubts) > 0
    assert sum(d.assigned for d in doubts) == 2 * len(x)
    assert [s.doubt() for s in half] == [(0, 0), (0, 0)]


def test_few_rows_are_in_doubt_and_memory_is_half() -> None:
    rng = np.random.default_rng(1)
    x, c = unit(rng, 6000, 64), unit(rng, 50, 64)
    (_, half) = pair_of(x, 0, storage="fp16")
    assert half._features_ND.nbytes == x.nbytes / 2
    half.assign(0, c)
    assert half.doubt().rescored < 0.03 * len(x)
    np.testing.assert_array_equal(half.gather(0, np.array([5, 4000]))[1], x[[5, 4000]])  # the originals
    np.testing.assert_array_equal(half.features(0, 10, 30), x[10:30])


def test_sums_do_not_depend_on_the_cut() -> None:
    rng = np.random.default_rng(2)
    x, c = unit(rng, 3 * BLOCK + 100, 12), unit(rng, 30, 12)
    results = [merge_steps([s.step(0, c, len(x), 1.0) for s in pair_of(x, cut, storage="fp16")]) for cut in (0, 1500)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    (_, full) = pair_of(x, 0)
    exact = full.step(0, c, len(x), 1.0)
    np.testing.assert_array_equal(results[0][1], exact.counts_K)
    np.testing.assert_allclose(results[0][0], exact.sums_KD, atol=0.05)


def test_neighbours_are_those_of_fp32() -> None:
    x = unit(np.random.default_rng(3), 2000, 8)
    own = np.arange(len(x))
    (_, full), (_, half) = pair_of(x, 0), pair_of(x, 0, storage="fp16")
    wanted, found = full.search(0, x, own, 6), half.search(0, x, own, 6)
    assert (wanted[1] == found[1]).mean() > 0.999
    same = wanted[1] == found[1]
    np.testing.assert_array_equal(wanted[0][same], found[0][same])  # the distances are those of the originals


def test_what_fp16_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.full((3, 4), 7e4, np.float32)
    with pytest.raises(ValueError, match="above 65504, the most that fp16 holds: scale the features, or use"):
        Shard(0, 3, 4, storage="fp16").put(0, 0, x)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"scratch file, for which .* has no room: set TMPDIR"):
        Shard(0, 3, 4, storage="fp16").put(0, 0, x[:, :4] / 7e4)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_a_gpu_clusters_alike(storage: Any) -> None:
    import torch

    rng = np.random.default_rng(4)
    x, c = unit(rng, 40_000, 64), unit(rng, 300, 64)
    torch.cuda.reset_peak_memory_stats()
    (_, cpu), (_, gpu) = pair_of(x, 0), pair_of(x, 0, device="gpu", storage=storage)
    near = np.abs(cpu.assign(0, c)[1] - gpu.assign(0, c)[1])
    assert near.max() < 2e-3
    assert (cpu.assign(0, c)[0] != gpu.assign(0, c)[0]).mean() < 1e-4  # float32 ties
    a, b = cpu.step(0, c, len(x), 1.0), gpu.step(0, c, len(x), 1.0)
    assert np.abs(a.counts_K - b.counts_K).max() <= 2
    again = gpu.step(0, c, len(x), 1.0)  # exact sums: atomics in any order
    np.testing.assert_array_equal(b.sums_KD, again.sums_KD)
    assert torch.cuda.max_memory_allocated() < 600 * 2**20
