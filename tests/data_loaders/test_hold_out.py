"""The validation split of train: by seed and row, nothing lost, nothing shared, never the test split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from raycon.core.config import ConfigError
from raycon.data_loaders.datasets import open_dataset
from raycon.data_loaders.hold_out import held_out_rows, hold_out
from raycon.evals import on_checkpoint
from raycon.recipes import recipe
from raycon.training import job


def test_rows_follow_from_seed_and_row_alone() -> None:
    short, long = held_out_rows(1000, 0.2, seed=3), held_out_rows(4000, 0.2, seed=3)
    assert (short == long[:1000]).all()  # more rows change nothing for the first ones
    assert abs(long.mean() - 0.2) < 0.02
    assert (held_out_rows(4000, 0.1, seed=3) <= long).all()  # a smaller share holds out a part of the same rows
    assert abs((long & held_out_rows(4000, 0.2, seed=4)).mean() - 0.04) < 0.02


def test_the_two_sides_are_the_whole() -> None:
    whole = open_dataset("digits")
    kept, held = hold_out(whole, 0.25, seed=0)
    mask = held_out_rows(len(whole), 0.25, seed=0)
    assert len(kept) + len(held) == len(whole)
    assert np.array_equal(kept.block(np.arange(len(kept))), whole.block(np.flatnonzero(~mask)))
    assert np.array_equal(held.label, whole.label[mask])
    assert (kept.split, held.split) == ("train", "validation")
    assert len({whole.fingerprint, kept.fingerprint, held.fingerprint}) == 3


def test_runs_train_and_score_on_train_only() -> None:
    base = recipe("quickstart")
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, validation=0.25))
    whole, trained = job.open_data(base), job.open_data(config)
    stored, scored = on_checkpoint.open_sets(config)
    assert np.array_equal(trained.label, stored.label)
    assert sorted([*trained.label, *scored.label]) == sorted(whole.label)
    assert on_checkpoint.open_sets(base)[1].split == "test"
    assert job.facts_of(config, trained, 1).rows == len(trained) < len(whole)


@pytest.mark.parametrize("share", [0.0, 1.0, 1e-9, float("nan")])
def test_shares_that_leave_a_side_empty(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation"):
        hold_out(open_dataset("digits"), share, seed=0)
