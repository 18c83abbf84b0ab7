"""The engines against brute force in float64, in all forms, and the check that refuses what the machine has not got."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch

from raycon.index import engine as engines
from raycon.index.engine import Engine, TorchEngine, load


def made(rows: int, columns: int, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, c = (rng.normal(size=(n, dim)).astype(np.float32) for n in (rows, columns))
    return x, c, ((x[:, None].astype(np.float64) - c[None]) ** 2).sum(-1)


@pytest.fixture(params=["faiss", "compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if request.param == "faiss":
        pytest.importorskip("faiss")
        return load("faiss")
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(engines, "_has_numba", lambda: request.param == "compiled")
    return load("torch")


def test_auto_needs_faiss_only_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    for numba, name in ((True, "torch"), (False, "faiss")):
        monkeypatch.setattr(engines, "_has_numba", lambda numba=numba: numba)
        assert load("auto").name == name


@pytest.mark.parametrize("columns", [1, 2, 300, 5000])  # 5000: more than are compared at a time
def test_nearest_and_second(engine: Engine, columns: int) -> None:
    x, c, sqdist = made(70, columns)
    found = engine.nearest(c, second=True)(torch.from_numpy(x))
    np.testing.assert_array_equal(found.label_N.numpy(), sqdist.argmin(1))
    np.testing.assert_allclose(found.sqdist_N.numpy(), sqdist.min(1), atol=2e-5)
    second = np.sort(sqdist, axis=1)[:, 1] if columns > 1 else np.full(70, np.inf)
    assert found.second_N is not None
    np.testing.assert_allclose(found.second_N.numpy(), second, atol=2e-5)
    assert engine.nearest(c)(torch.from_numpy(x)).second_N is None


def test_of_equal_centroids_the_lowest(engine: Engine) -> None:
    x, c, sqdist = made(60, 40)
    twice = np.concatenate([c, c])
    np.testing.assert_array_equal(engine.nearest(twice)(torch.from_numpy(x)).label_N.numpy(), sqdist.argmin(1))


def test_weights_move_the_choice_and_not_the_distance() -> None:
    x, c, sqdist = made(200, 30)
    weight = np.random.default_rng(1).normal(size=30) * 5
    found = TorchEngine().nearest(c, weight_K=weight)(torch.from_numpy(x))
    label = (sqdist + weight).argmin(1)
    assert (label != sqdist.argmin(1)).mean() > 0.2
    np.testing.assert_array_equal(found.label_N.numpy(), label)
    np.testing.assert_allclose(found.sqdist_N.numpy(), sqdist[np.arange(200), label], atol=5e-5)


@pytest.mark.parametrize(("rows", "count"), [(5, 5), (300, 1), (300, 7), (3000, 25), (9000, 40)])
def test_search(engine: Engine, rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_CPU_SCORES", 100_000)  # several blocks
    monkeypatch.setattr(engines, "_QUERIES", 70)
    x, queries, sqdist = made(rows, 90)
    found, position = engine.search(queries, x, count)
    wanted = np.argsort(sqdist, axis=0, kind="stable")[:count].T
    np.testing.assert_array_equal(position, wanted)
    np.testing.assert_allclose(found, np.take_along_axis(sqdist.T, wanted, 1), atol=2e-5)


def test_search_among_equal_rows(engine: Engine) -> None:
    """More ties than are wanted: any of them, but never one twice and never a farther row."""
    x = np.zeros((2000, 4), np.float32)
    x[:3] = 1
    found, position = engine.search(np.zeros((6, 4), np.float32), x, 10)
    assert not found.any()
    assert (position >= 3).all()
    assert all(len(set(row)) == 10 for row in position.tolist())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"mining.device = gpu but torch .* finds no CUDA device here: give cpu"):
        load("auto", "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engines, "_faiss_gpus", lambda: 0)
    if importlib.util.find_spec("faiss"):
        (problem,) = engines.problems("faiss", "gpu")
        assert "sees no GPU" in problem
    assert engines.problems("torch", "gpu") == []


def test_two_faiss_distributions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = engines.faiss_distributions()
    assert len(installed) <= 1
    assert engines.problems() == []
    found = {"faiss-cpu", "faiss-gpu"}
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda name: [name] if name in found else [])
    with pytest.raises(ValueError, match="faiss-cpu and faiss-gpu are installed, which write the same folder"):
        load("auto")
    assert load("torch").name == "torch"


def test_faiss_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"mining.engine = faiss but faiss is not installed: pip install 'raycon\[cpu\]'"
    ):
        load("faiss")
    assert load("auto").name == "torch"
    (problem,) = engines.problems("auto", graph=True)
    assert problem.startswith("mining.neighbours = hnsw needs faiss on the CPU")


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_gives_the_same_labels(tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        x, c, sqdist = made(3000, 5000, dim=64)
        device = load("auto", "gpu")
        found = device.nearest(c, second=True)(torch.from_numpy(x).to(device.device))
        np.testing.assert_array_equal(found.label_N.cpu().numpy(), sqdist.argmin(1))
        np.testing.assert_allclose(found.sqdist_N.cpu().numpy(), sqdist.min(1), rtol=1e-5)
        assert found.second_N is not None
        np.testing.assert_allclose(found.second_N.cpu().numpy(), np.sort(sqdist, axis=1)[:, 1], rtol=1e-5)
        near, position = device.search(c[:50], x, 9)
        np.testing.assert_array_equal(position, np.argsort(sqdist[:, :50], axis=0)[:9].T)
        np.testing.assert_allclose(near, np.sort(sqdist[:, :50], axis=0)[:9].T, rtol=1e-5)
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
