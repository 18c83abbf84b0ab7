"""kNN against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from raycon.core.config import EvalConfig
from raycon.evals import FeatureSets, knn
from raycon.index import engine


@pytest.fixture(scope="module")
def digits() -> FeatureSets:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    return FeatureSets(x[:1400], y[:1400], x[1400:], y[1400:])


@pytest.fixture(params=["faiss", "torch"])
def either_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "faiss":
        pytest.importorskip("faiss")
    chosen = engine.load(request.param)
    monkeypatch.setattr(engine, "load", lambda: chosen)
    return str(request.param)


def test_same_as_sklearn_with_the_same_weights(digits: FeatureSets, either_engine: str) -> None:
    ks, temperature = (1, 7, 50), 0.1
    ours = knn.Evaluation(EvalConfig(knn_k=ks, knn_temperature=temperature)).run(digits)
    for k in ks:
        other = KNeighborsClassifier(
            k, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(digits.train.double().numpy(), digits.train_label.numpy())
        expected = 100 * other.score(digits.test.double().numpy(), digits.test_label.numpy())
        assert ours[f"knn/top1_k{k}"] == pytest.approx(expected, abs=1e-9)


def test_leave_one_out_is_by_row_not_by_distance(either_engine: str) -> None:
    # Rows 0 and 1 are equal, so each is the other's neighbour; a positional rule would drop the wrong one.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    cosine, row = knn.nearest(F.normalize(x), F.normalize(x), 1, leave_one_out=True)
    assert row.flatten().tolist() == [1, 0, 3, 2]
    assert cosine.flatten().tolist() == pytest.approx([1, 1, 1 / 1.01**0.5, 1 / 1.01**0.5], abs=1e-6)
    labels = torch.tensor([0, 1, 2, 2])
    found = knn.Evaluation(EvalConfig(knn_k=(1,))).run(FeatureSets(x, labels, x, labels))
    assert found == {"knn/loo_top1_k1": 50.0}


def test_leave_one_out_among_many_equal_rows(either_engine: str) -> None:
    x = torch.ones(9, 3) / 3**0.5
    _, row = knn.nearest(x, x, 2, leave_one_out=True)
    assert row.shape == (9, 2)
    assert not (row == torch.arange(9)[:, None]).any()


def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch, either_engine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, stored = (F.normalize(torch.randn(n, 5, generator=generator)) for n in (70, 90))
    best, row = (query.double() @ stored.double().T).topk(6)
    monkeypatch.setattr(knn, "_QUERIES", 16)
    monkeypatch.setattr(knn, "_GATHERED", 100)
    found_best, found_row = knn.nearest(query, stored, 6)
    assert torch.equal(found_row, row)
    assert torch.allclose(found_best.double(), best, atol=1e-6)
    monkeypatch.setattr(knn, "_STORED", 5 * 13)  # seven blocks of the stored rows, the last incomplete
    monkeypatch.setattr(knn, "_SHARED", 2)
    assert torch.equal(knn.nearest(7 * query, 3 * stored, 6)[1], row)
    best, row = ((stored.double() @ stored.double().T).fill_diagonal_(-9)).topk(6)
    assert torch.equal(knn.nearest(stored, stored, 6, leave_one_out=True)[1], row)


def test_vote_by_hand() -> None:
    cosine = torch.tensor([[0.9, 0.8, 0.8]])
    label = torch.tensor([[2, 0, 0]])
    # e^(.9/t) against 2 e^(.8/t): equal at t = 0.1 / ln 2 = 0.144.
    assert knn.vote(cosine, label, 3, 0.14).item() == 2
    assert knn.vote(cosine, label, 3, 0.15).item() == 0
    assert knn.vote(cosine, label, 3, 1e-4).item() == 2  # no overflow


def test_too_large_k(digits: FeatureSets, caplog: pytest.LogCaptureFixture) -> None:
    found = knn.Evaluation(EvalConfig(knn_k=(1, 5000))).run(digits)
    assert list(found) == ["knn/top1_k1"]
    assert "5000" in caplog.text
    with pytest.raises(ValueError, match=r"evals.knn_k = \(5000,\)"):
        knn.Evaluation(EvalConfig(knn_k=(5000,))).run(digits)
