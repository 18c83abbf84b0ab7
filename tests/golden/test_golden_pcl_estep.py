"""PCL's E-step against the authors' code: assignment, counts, every stage of the concentration, prototypes.

Letters: N rows, K clusters, D feature width.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from raycon.core.config import MiningConfig
from raycon.core.types import Needs
from raycon.index.density import density
from raycon.index.local import LocalIndex
from raycon.index.shard import Shard
from tests.helpers import golden_files


@pytest.mark.parametrize("engine", ["faiss", "torch"])
@pytest.mark.parametrize("shards", [1, 3])
def test_estep_equals_the_authors(golden_dir: Path, engine: str, shards: int) -> None:
    if engine == "faiss":
        pytest.importorskip("faiss")
    for file in golden_files(golden_dir, "pcl_estep_*"):
        features = file["features"].numpy()
        cut = [len(features) * i // shards for i in range(shards + 1)]
        parts = [Shard(a, b, features.shape[1], engine=engine) for a, b in itertools.pairwise(cut)]
        for part in parts:
            part.put(0, part.first_row, features[part.first_row : part.last_row])
        for i, k in enumerate(file.settings["ks"]):
            stage = {name.removeprefix(f"k{i}_"): file[name].numpy() for name in file.names(f"k{i}_")}
            answers = [part.assign(0, stage["centroids_raw"]) for part in parts]
            label = np.concatenate([a[0] for a in answers])
            sqdist = np.concatenate([a[1] for a in answers])
            where = f"{file.name}, k = {k}"
            np.testing.assert_array_equal(label, stage["im2cluster"], err_msg=where)
            np.testing.assert_array_equal(np.bincount(label, minlength=k), stage["counts"], err_msg=where)
            np.testing.assert_allclose(sqdist, stage["sqdist"], atol=2e-6, err_msg=where)
            # The distances of the file: two engines round them differently in the last bits.
            found = density(stage["sqdist"], label, k, file.settings["T"])
            np.testing.assert_allclose(found.raw_K, stage["density_raw"], rtol=1e-6, err_msg=where)
            np.testing.assert_allclose(found.filled_K, stage["density_filled"], rtol=1e-6, err_msg=where)
            np.testing.assert_allclose(found.bounds, stage["percentiles"], rtol=1e-6, err_msg=where)
            np.testing.assert_allclose(found.clipped_K, stage["density_clipped"], rtol=1e-6, err_msg=where)
            np.testing.assert_allclose(found.phi_K, stage["density"], atol=5e-8, rtol=0, err_msg=where)


def test_whole_refresh_is_as_good_as_the_authors(golden_dir: Path) -> None:
    """From features alone, by our k-means: another rounding may end in another optimum, hardly a worse one."""
    for file in golden_files(golden_dir, "pcl_estep_*"):
        if file["k0_objective"].isnan():
            continue  # its centroids were supplied
        features, ks, temperature = file["features"].numpy(), file.settings["ks"], file.settings["T"]
        index = LocalIndex(len(features), features.shape[1], MiningConfig(shards=2, iterations=20, redo=5), seed=0)
        index.add(0, 0, features)
        snapshot, metrics = index.snapshot(0, Needs(clusterings=tuple(ks), temperature=temperature))
        index.close()
        for i in range(len(ks)):
            theirs = float(file[f"k{i}_sqdist"].double().sum())
            assert metrics[f"index/{i}/objective"] <= 1.01 * theirs, (file.name, i)
            assert float(snapshot.concentration[i].mean()) == pytest.approx(temperature, rel=1e-6)
            np.testing.assert_allclose(np.linalg.norm(snapshot.prototypes[i].numpy(), axis=1), 1, atol=1e-6)
            if snapshot.assignment[i].equal(file[f"k{i}_im2cluster"]):  # so it is here, for all three
                np.testing.assert_allclose(snapshot.prototypes[i], file[f"k{i}_centroids"], atol=1e-6)
                np.testing.assert_allclose(snapshot.concentration[i], file[f"k{i}_density"], atol=1e-6)
