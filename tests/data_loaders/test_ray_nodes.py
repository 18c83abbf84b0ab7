"""The Ray Data loader on a cluster of two nodes: one decodes, the other trains; and how far reading runs ahead."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raycon.core.config import ConfigError
from raycon.core.types import LoaderPlan
from raycon.data_loaders import open_loader
from raycon.data_loaders.datasets import FileSet, no_labels
from raycon.nn import views
from tests.helpers import free_port

ray = pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROWS, SIDE = 600, 64
ROW_BYTES = 2 * 3 * SIDE**2
PATIENCE = "RAY_agent_register_timeout_ms"


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """The ids of a node of one CPU, where this process trains, and of one that is labelled to decode."""
    from ray.cluster_utils import Cluster

    store = 100 * 2**20
    os.environ[PATIENCE] = "120000"  # of a node's helpers, when the machine is busy
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2, "object_store_memory": store, "include_dashboard": False,
            "dashboard_agent_listen_port": free_port(),
        },
    )  # fmt: skip
    try:
        worker = cluster.add_node(num_cpus=2, object_store_memory=store, labels={"work": "decode"})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield {"train": cluster.head_node.node_id, "decode": worker.node_id}
    finally:
        ray.shutdown()
        cluster.shutdown()
        del os.environ[PATIENCE]


def counted(folder: Path) -> tuple[FileSet, Path]:
    """600 rows of 3 images; reading one notes the node in a file."""
    generator = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    notes = folder / "notes"

    @dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
    class Counted(FileSet):  # inside, so that it travels to the tasks
        notes: Path

        def encoded(self, row: int) -> bytes:
            import ray

            with self.notes.open("a") as out:
                out.write(f"{ray.get_runtime_context().get_node_id()}\n")
            return super().encoded(row)

    dataset = Counted(
        name="counted", split="train", label=no_labels(ROWS), weak=no_labels(ROWS), mean=(0.5,) * 3, std=(0.25,) * 3,
        root=folder, files=np.resize(np.array([b"0.png", b"1.png", b"2.png"]), ROWS), notes=notes,
    )  # fmt: skip
    return dataset, notes


def plan_of(dataset: FileSet, **options: Any) -> LoaderPlan:
    spec = views.view_spec("mocov2", "weak", SIDE, dataset.mean, dataset.std)
    return LoaderPlan(
        specs=(spec, spec), eval_spec=views.eval_spec(SIDE, dataset.mean, dataset.std), batch=20, seed=0, rank=0, world=1,
        device=torch.device("cpu"), augment="batched", **options,
    )  # fmt: skip


def test_one_node_decodes_and_reading_ahead_is_bounded(
    nodes: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raycon.data_loaders import ray_data

    monkeypatch.setattr(ray_data, "BLOCK_BYTES", 10 * ROW_BYTES)
    monkeypatch.setattr(ray_data, "AHEAD_BYTES", 80 * ROW_BYTES)  # four batches
    dataset, notes = counted(tmp_path)
    loader = open_loader("ray", dataset, plan_of(dataset, nodes="work=decode"))
    reference = open_loader("torch", dataset.subset(np.arange(ROWS)), plan_of(dataset))
    stream = loader.train(0)
    first = next(stream)

    @ray.remote(num_cpus=1, label_selector={"work": "decode"})
    def nothing() -> None:
        pass

    for _ in range(30):  # as long as it takes 30 other tasks to have had their turn on that node
        ray.get(nothing.remote(), timeout=60)
    ahead = len(notes.read_text().splitlines())
    assert ahead >= 20
    # Four batches in the object store and as many in the hands of tasks and of the iterator, of 600 rows.
    assert ahead <= 240, "reading is not held back"
    found = [first, *stream]
    assert set(notes.read_text().split()) == {nodes["decode"]}
    assert len(notes.read_text().split()) == ROWS
    notes.write_text("")
    for one, two in zip(found, reference.train(0), strict=True):
        assert torch.equal(one.row, two.row)
        assert all(torch.equal(a, b) for a, b in zip(one.views, two.views, strict=True))


def test_labels_that_no_node_has(nodes: dict[str, str], tmp_path: Path) -> None:
    dataset, _ = counted(tmp_path)
    for wanted, told in (
        ("work", "'work': give KEY=VALUE"),
        ("work=paint", r"'work=paint': no node with a CPU has this label \(work=decode\); start one with ray start"),
    ):
        with pytest.raises(ConfigError, match=told):
            open_loader("ray", dataset, plan_of(dataset, nodes=wanted))


def test_the_label_is_for_ray_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset, _ = counted(tmp_path)
    open_loader("torch", dataset, plan_of(dataset, nodes="work=decode")).close()
    assert "data.nodes = 'work=decode' has no effect" in caplog.text
