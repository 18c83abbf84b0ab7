"""``Method.positives``: the targets the report shows, against loops that follow the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raycon import methods
from raycon.core.config import Facts, ModelConfig
from raycon.core.types import Mined, Snapshot
from raycon.methods.base import Method
from raycon.nn import networks

B = 12
LABEL = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, -1])
ROW = torch.arange(B) * 3


def make(name: str, **options: Any) -> Method:
    torch.manual_seed(0)
    facts = Facts(100, 3, (1, 8, 8), 4, 1, 8, 10)
    encoder = networks.build_encoder(ModelConfig(encoder="resnet10", width=4, stem="small"), 1)
    built: Method = methods.module(name).build(methods.configure(name, **options), encoder, facts)
    return built.eval()


def images() -> torch.Tensor:
    return torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def target(method: Method, snapshot: Snapshot | None = None, epoch: int = 5) -> np.ndarray:
    found = method.positives(images(), ROW, LABEL, Mined(snapshot, (), 0, epoch))
    assert found is not None
    assert found.shape == (B, B)
    assert not found.requires_grad
    return found.double().numpy()


def keys(method: Method) -> np.ndarray:
    with torch.no_grad():
        return method.features(images()).double().numpy()


def test_sce_mixes_the_own_image_with_the_teacher() -> None:
    method = make("sce", queue=16, coefficient=0.3, teacher_temperature=0.05)
    key, found = keys(method), target(method)
    for i in range(B):
        logits = np.array([0.0 if j == i else key[i] @ key[j] / 0.05 for j in range(B)])
        soft = np.exp(logits - logits.max())
        wanted = 0.7 * soft / soft.sum()
        wanted[i] += 0.3
        assert found[i] == pytest.approx(wanted, abs=1e-5)


def test_sce_masked_by_labels_stays_within_them() -> None:
    found = target(make("sce", queue=16, coefficient=0.5, mask="labels", official_zero=False))
    for i in range(B):
        outside = [j for j in range(B) if j != i and (LABEL[j] != LABEL[i] or LABEL[i] < 0)]
        assert found[i, outside] == pytest.approx(0)
    assert found.sum(1) == pytest.approx(1, abs=1e-5)
    assert found[-1, -1] == pytest.approx(1)  # no label: only itself


def test_maskcon_is_soft_within_the_coarse_class() -> None:
    method = make("maskcon", queue=16, weight=0.8, soft_temperature=0.1)
    key, found = keys(method), target(method)
    for i in range(B):
        same = [j for j in range(B) if j != i and LABEL[j] == LABEL[i] and LABEL[i] >= 0]
        weight = np.zeros(B)
        weight[same] = np.exp(np.array([key[i] @ key[j] for j in same]) / 0.1)
        weight /= weight.max() if same else 1
        weight[i] = 1
        wanted = 0.8 * weight / weight.sum()
        wanted[i] += 0.2
        assert found[i] == pytest.approx(wanted, abs=1e-5)
    assert make("maskcon", queue=16, mode="coins").positives(images(), ROW, LABEL, Mined(None, (), 0)) is None


def test_wcl_is_uniform_over_components() -> None:
    method = make("wcl", dim=8, hidden=16)
    with torch.no_grad():
        second = method.embed_each(method.student, images())[1].double().numpy()  # type: ignore[arg-type]
    cosine = second @ second.T
    np.fill_diagonal(cosine, -9)
    component = np.arange(B)
    for _ in range(B):  # labels spread along edges until nothing moves
        for i, j in enumerate(cosine.argmax(1)):
            component[component == component[i]] = component[j]
    found = target(method)
    for i in range(B):
        members = [j for j in range(B) if j != i and component[j] == component[i]]
        assert members
        assert found[i] == pytest.approx(np.isin(np.arange(B), members) / len(members))


@pytest.mark.parametrize(
    ("name", "options"), [("supcon", {}), ("clinfonce", {"clusters": "labels", "warmup_epochs": 0})]
)
def test_labels_two_views_of_others_and_one_of_itself(name: str, options: dict[str, Any]) -> None:
    found = target(make(name, **options))
    for i in range(B):
        views = [2.0 * (LABEL[j] == LABEL[i] and LABEL[i] >= 0) if j != i else 1.0 for j in range(B)]
        assert found[i] == pytest.approx(np.array(views) / sum(views), abs=1e-6)


def test_clusters_of_the_snapshot() -> None:
    method = make("clinfonce", clusters="kmeans", k=4, warmup_epochs=2, form="dual", dim=8, hidden=16)
    snapshot = Snapshot(0, (torch.arange(100) % 4,), (torch.zeros(4, 8),), (), None)
    found = target(method, snapshot)
    same = (ROW[:, None] % 4 == ROW[None, :] % 4).double().numpy()
    assert found == pytest.approx(same / same.sum(1, keepdims=True), abs=1e-6)
    assert method.positives(images(), ROW, LABEL, Mined(snapshot, (), 0, 1)) is None  # before the clusters


def test_nearest_and_relations() -> None:
    method = make("nnclr", queue=16, projector=(16,), predictor=(16,), dim=8)
    cosine = keys(method) @ keys(method).T
    np.fill_diagonal(cosine, -9)
    assert (target(method).argmax(1) == cosine.argmax(1)).all()
    method = make("ressl", queue=16, projector=(16,), dim=8, teacher_temperature=0.04)
    logits = keys(method) @ keys(method).T / 0.04
    np.fill_diagonal(logits, -np.inf)
    soft = np.exp(logits - logits.max(1, keepdims=True))
    assert target(method) == pytest.approx(soft / soft.sum(1, keepdims=True), abs=1e-5)


@pytest.mark.parametrize("name", ["moco", "simclr", "mocov3", "pcl", "supervised"])
def test_the_others_have_none(name: str) -> None:
    options = {"pcl": {"clusters": (20,), "negatives": 8, "queue": 16}, "moco": {"queue": 16}}.get(name, {})
    assert make(name, **options).positives(images(), ROW, LABEL, Mined(None, (), 0)) is None
