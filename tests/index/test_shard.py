"""One shard: what it refuses, and that its sums and distances do not depend on how rows are cut into shards."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from raycon.core.types import MissingRows
from raycon.index.merge import merge_steps
from raycon.index.shard import BLOCK, Shard, exact_terms


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def shards_of(features: np.ndarray, cuts: list[int], engine: Any, version: int = 0) -> list[Shard]:
    ends = [0, *cuts, len(features)]
    shards = [Shard(a, b, features.shape[1], engine=engine) for a, b in itertools.pairwise(ends)]
    for shard in shards:
        shard.put(version, shard.first_row, features[shard.first_row : shard.last_row])
    return shards


@pytest.fixture(params=["faiss", "torch"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return str(request.param)


def test_step_equals_plain_numpy(engine: str) -> None:
    rng = np.random.default_rng(0)
    x, c = unit(rng, 2500, 24), unit(rng, 40, 24)
    (shard,) = shards_of(x, [], engine)
    sums, counts, objective = shard.step(0, c, len(x), 1.0)
    distance = ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(-1)
    label = distance.argmin(1)
    wanted = np.zeros((40, 24))
    np.add.at(wanted, label, x.astype(np.float64))
    np.testing.assert_array_equal(counts, np.bincount(label, minlength=40))
    np.testing.assert_allclose(sums, wanted, atol=1e-8)
    assert objective == pytest.approx(distance.min(1).sum(), rel=1e-6)
    found_label, found_sqdist = shard.assign(0, c)
    np.testing.assert_array_equal(found_label, label)
    np.testing.assert_allclose(found_sqdist, distance.min(1), atol=1e-6)


@pytest.mark.parametrize("cuts", [[1], [1024], [700, 701], [13, 1500, 2047], [2999]])
@pytest.mark.parametrize("dim", [16, 128])
def test_any_cut_gives_the_same_bits(engine: str, cuts: list[int], dim: int) -> None:
    rng = np.random.default_rng(dim)
    x, c = unit(rng, 3000, dim), unit(rng, 70, dim)
    (whole,) = shards_of(x, [], engine)
    parts = shards_of(x, cuts, engine)
    one = merge_steps([whole.step(0, c, len(x), 1.0)])
    many = merge_steps([p.step(0, c, len(x), 1.0) for p in parts])
    np.testing.assert_array_equal(one[0], many[0])
    np.testing.assert_array_equal(one[1], many[1])
    assert one[2] == many[2]
    np.testing.assert_array_equal(whole.assign(0, c)[1], np.concatenate([p.assign(0, c)[1] for p in parts]))


def test_exact_terms_add_up_in_any_order() -> None:
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.normal(size=5000) * 10.0 ** rng.uniform(-9, 0, 5000)).clamp(-1, 1)
    terms = exact_terms(x, 5000.0)
    assert float((terms - x).abs().max()) <= 5000 * 2.0**-50
    orders = {float(terms[torch.from_numpy(rng.permutation(5000))].cumsum(0)[-1]) for _ in range(20)}
    assert orders == {math.fsum(terms.tolist())}


def test_label_sums_are_the_sums_of_the_labels(engine: str) -> None:
    rng = np.random.default_rng(1)
    x, label = unit(rng, 2100, 8), rng.integers(0, 5, 2100)
    sums, counts, _ = merge_steps([s.label_sums(0, label, 6, 2100, 1.0) for s in shards_of(x, [800], engine)])
    for c in range(5):
        np.testing.assert_allclose(sums[c], x[label == c].astype(np.float64).sum(0), atol=1e-8)
    assert counts.tolist() == [*np.bincount(label), 0]
    assert not sums[5].any()


def test_versions_never_mix() -> None:
    rng = np.random.default_rng(2)
    x = unit(rng, 50, 4)
    shard = Shard(100, 150, 4)
    assert shard.missing(0) == 50
    shard.put(0, 100, x[:30])
    assert shard.missing(0) == 20
    shard.put(0, 110, x[10:30])  # again: harmless
    assert shard.missing(0) == 20
    with pytest.raises(MissingRows, match=r"20 of rows 100 \.\. 150 of version 0"):
        shard.assign(0, x[:2])
    shard.put(0, 130, x[30:])
    assert shard.missing(0) == 0
    before = shard.stamp()
    shard.put(1, 100, x[:1])
    assert shard.stamp() != before
    assert (shard.missing(0), shard.missing(1)) == (50, 49)
    for call in (lambda: shard.step(0, x[:2], 50, 1.0), lambda: shard.gather(0, np.arange(2))):
        with pytest.raises(MissingRows):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite_naming_the_row(bad: float) -> None:
    x = np.zeros((5000, 3), np.float32)
    x[4321, 2] = bad
    shard = Shard(1000, 6000, 3)
    with pytest.raises(ValueError, match="features of row 5321 are not finite"):
        shard.put(0, 1000, x)
    assert shard.missing(0) == 5000


def test_refuses_foreign_rows_and_widths() -> None:
    shard = Shard(10, 20, 3)
    with pytest.raises(ValueError, match=r"rows 15 \.\. 21 do not lie in this shard's 10 \.\. 20"):
        shard.put(0, 15, np.zeros((6, 3), np.float32))
    with pytest.raises(ValueError, match=r"shape \(2, 4\): expected \(n, 3\)"):
        shard.put(0, 10, np.zeros((2, 4), np.float32))


def test_read_only_arrays_are_taken(engine: str) -> None:
    """What comes out of an object store is read-only."""
    rng = np.random.default_rng(5)
    x, c = unit(rng, BLOCK + 5, 8), unit(rng, 7, 8)
    own, label = np.arange(len(x)), np.zeros(len(x), np.int64)
    for array in (x, c, own, label):
        array.flags.writeable = False
    (shard,) = shards_of(x, [], engine)
    shard.step(0, c, len(x), 1.0)
    shard.search(0, x[:9], own[:9], 3)
    shard.label_sums(0, label, 7, len(x), 1.0)
    assert np.array_equal(shard.gather(0, own[3:5])[1], x[3:5])
