"""Prototype sampling of few among many, which is drawn another way than in small cases: distinct, allowed, uniform."""

from __future__ import annotations

import pytest
import torch

from raycon.nn import losses


@pytest.mark.parametrize(("used", "number"), [(16384, 4000), (50_000, 12_000), (100_000, 16_384)])
def test_ids_are_distinct_and_allowed(used: int, number: int) -> None:
    exclude = torch.arange(0, 64).repeat_interleave(2)
    ids, valid = losses.sample_excluding(used, used + 7, exclude, number, seed=3)
    assert ids.dtype == torch.int64
    assert valid.all()
    assert len(ids.unique()) == number == len(ids) == len(valid)
    assert int(ids.min()) >= 64
    assert int(ids.max()) < used
    assert ids.equal(losses.sample_excluding(used, used + 7, exclude, number, seed=3)[0])
    assert not ids.equal(losses.sample_excluding(used, used + 7, exclude, number, seed=4)[0])


def test_every_id_is_drawn_as_often_at_every_place() -> None:
    """400 draws of 2,000 of 20,000 - 10: counts of ids in 100 equal ranges, over all places and over the first 100."""
    exclude = torch.arange(10) * 1999
    drawn = torch.stack([losses.sample_excluding(20_000, 20_000, exclude, 2000, seed)[0] for seed in range(400)])
    for part in (drawn, drawn[:, :100], drawn[:, -100:]):
        count = torch.bincount(part.flatten() // 200, minlength=100).double()
        expected = part.numel() / 100
        chi2 = float(((count - expected) ** 2 / expected).sum())
        assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, standard deviation 14


def test_small_cases_keep_their_draws() -> None:
    """A permutation as before: recorded losses depend on it."""
    exclude = torch.tensor([3, 3, 7])
    generator = torch.Generator().manual_seed(11)
    order = [i for i in torch.randperm(1000, generator=generator).tolist() if i not in (3, 7)]
    assert losses.sample_excluding(1000, 1000, exclude, 5, seed=11)[0].tolist() == order[:5]
