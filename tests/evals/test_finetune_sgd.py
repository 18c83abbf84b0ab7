"""Fine-tuning, its label lists, and the published linear protocols."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raycon.core import stream
from raycon.core.config import ConfigError, EvalConfig, ModelConfig
from raycon.data_loaders.datasets import open_dataset
from raycon.evals import FeatureSets, Source, features, finetune, linear, sgd
from raycon.evals.protocols import FINETUNE, LINEAR, Training
from raycon.nn import networks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.manual_seed(0)
    encoder = networks.build_encoder(ModelConfig(encoder="resnet10", width=8, stem="small"), 1)
    train, test = (open_dataset("digits", "", split) for split in ("train", "test"))
    return Source(
        encoder=encoder, train=train.subset(np.arange(500)), test=test, size=8, mean=train.mean, std=train.std,
        device=torch.device("cpu"), cache=tmp_path_factory.mktemp("cache"),
    )  # fmt: skip


def test_balanced_rows() -> None:
    label = np.repeat([0, 1, 2, -1], [100, 30, 3, 10])[np.random.default_rng(0).permutation(143)]
    ten, one = finetune.balanced(label, 10, 5), finetune.balanced(label, 1, 5)
    assert np.bincount(label[ten]).tolist() == [10, 3, 1]
    assert np.bincount(label[one]).tolist() == [1, 1, 1]
    assert set(one) <= set(ten), "1 % is part of 10 %"
    assert (np.diff(ten) > 0).all()
    assert np.array_equal(ten, finetune.balanced(label, 10, 5))
    assert not np.array_equal(ten, finetune.balanced(label, 10, 6))
    assert np.array_equal(finetune.balanced(label, 100, 0), np.flatnonzero(label >= 0))


class Named:
    """Images with files, as far as a list needs them."""

    name = "named"

    def __init__(self, *files: str) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def path(self, row: int) -> Path:
        return Path("/data") / self.files[row]


def test_list_files(tmp_path: Path) -> None:
    data, file = Named("dog/a.png", "dog/b.png", "cat/b.png", "cat/c.png"), tmp_path / "list.txt"
    file.write_text("c.png\n\na.png\n")
    assert finetune.listed(file, data).tolist() == [0, 3]
    file.write_text("cat/b.png\n")
    assert finetune.listed(file, data).tolist() == [2]
    file.write_text("3\n1\n3\n")
    assert finetune.listed(file, data).tolist() == [1, 3]
    for content, word in (("b.png\n", "fits two images"), ("a.png\nz.png\n", "1 of 2 lines .* 'z.png'"),
                          ("4\n", "1 of 1 lines .* '4'"), ("\n", "is empty")):  # fmt: skip
        file.write_text(content)
        with pytest.raises(ConfigError, match=word):
            finetune.listed(file, data)
    with pytest.raises(ConfigError, match="cannot be read"):
        finetune.listed(tmp_path / "no.txt", data)


def test_schedules_are_the_published_ones() -> None:
    pcl = LINEAR["pcl"]
    rates = [pcl.lr * sgd.decay(pcl, e * 10, 10, 100) for e in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([5, 5, 0.5, 0.5, 0.05, 0.05])
    assert sgd.rates(LINEAR["sce"], 1024) == (pytest.approx(0.4), 0)
    assert sgd.rates(LINEAR["wcl"], 4096) == (pytest.approx(3.2), 0)
    assert sgd.decay(LINEAR["clinfonce"], 1000, 10, 100) == pytest.approx(1e-3)
    mopro = FINETUNE["1-mopro"][0]
    assert [sgd.decay(mopro, e, 1, 40) for e in (19, 20, 30)] == pytest.approx([1, 0.2, 0.04])
    assert sgd.decay(pcl, 6, 1, 10) == pytest.approx(0.1), "with fewer epochs the milestones come earlier"


def test_a_frozen_encoder_stays_as_it_is_and_the_probe_is_plain_sgd(source: Source) -> None:
    training = Training(source="test", epochs=2, batch=100, lr=0.5, milestones=(1,), weight_decay=1e-3)
    before = {k: v.clone() for k, v in source.encoder.state_dict().items()}
    encoder = copy.deepcopy(source.encoder)
    batches, per_epoch = sgd.image_batches(source, _labelled(source), 100, training, seed=3)
    head = sgd.fit(training, encoder, encoder.features, 10, batches, per_epoch, 100, 2, 3, source.device)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())

    torch.manual_seed(stream.key(3, 0x5D6) >> 1)
    other = nn.Linear(encoder.features, 10)
    nn.init.normal_(other.weight, std=0.01)
    nn.init.zeros_(other.bias)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    encoder.eval()
    assert per_epoch == 5
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.5 * 0.1**epoch
        for x, y in batches(epoch):
            with torch.no_grad():
                feature = encoder(x)
            optimizer.zero_grad()
            F.cross_entropy(other(feature), y).backward()
            optimizer.step()
    assert torch.allclose(head.weight, other.weight, atol=1e-5)


def _labelled(source: Source) -> object:
    return dataclasses.replace(source.train, weak=source.train.label)


def test_augmented_batches_carry_fine_labels_of_the_rows_asked_for(source: Source) -> None:
    rows = np.array([3, 50, 51, 400])
    part = source.train.subset(rows)
    part = dataclasses.replace(part, weak=part.label)
    batches, per_epoch = sgd.image_batches(source, part, 4, LINEAR["clinfonce"], seed=0)
    assert per_epoch == 1
    (x, y), (again, _) = next(batches(0)), next(batches(1))
    assert sorted(y.tolist()) == sorted(source.train.label[rows].tolist())
    assert x.shape == (4, 1, 8, 8)
    assert not torch.equal(x, again)


def test_fine_tuning_trains_everything_and_leaves_the_encoder(source: Source) -> None:
    before = {k: v.clone() for k, v in source.encoder.state_dict().items()}
    few = finetune.preset(EvalConfig(epochs=1), 0, "10").run_on(source)
    assert few["finetune/labels"] == pytest.approx(50, abs=5)
    assert few == finetune.preset(EvalConfig(epochs=1), 0, "10").run_on(source), "deterministic"
    full = finetune.Evaluation(EvalConfig(epochs=15)).run_on(source)
    assert full["finetune/labels"] == 500
    assert full["finetune/top1"] > 25
    assert full["finetune/top5"] > full["finetune/top1"]
    assert all(torch.equal(v, before[k]) for k, v in source.encoder.state_dict().items())
    encoder = copy.deepcopy(source.encoder)
    training = Training(source="test", epochs=1, batch=100, lr=0.1, trunk_lr=0.1)
    batches, per_epoch = sgd.image_batches(source, _labelled(source), 100, training, 0)
    sgd.fit(training, encoder, encoder.features, 10, batches, per_epoch, 100, 1, 0, source.device)
    changed = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == len(before)


def test_protocols_end_to_end(source: Source, tmp_path: Path) -> None:
    config = EvalConfig(epochs=3)
    online = linear.preset(config, 0, "pcl").run_on(source)
    assert set(online) == {"linear/top1", "linear/top5"}
    train = features.extract(source.encoder, features.scan(source, source.train), 500)
    test = features.extract(source.encoder, features.scan(source, source.test), len(source.test))
    sets = FeatureSets(train, torch.as_tensor(source.train.label), test, torch.as_tensor(source.test.label))
    once = linear.preset(EvalConfig(epochs=30), 0, "clinfonce-once").run(sets)
    assert once["linear/top1"] > 40
    with pytest.raises(ValueError, match="no test split"):
        linear.preset(config, 0, "pcl").run_on(_without_test(source))
    file = tmp_path / "rows.txt"
    file.write_text("\n".join(map(str, range(40))))
    listed = finetune.Evaluation(EvalConfig(epochs=1, label_list=str(file))).run_on(source)
    assert listed["finetune/labels"] == 40


def _without_test(source: Source) -> Source:
    return dataclasses.replace(source, test=None)


def test_shards_of_an_extraction_are_its_parts(source: Source) -> None:
    whole = features.extract(source.encoder, features.scan(source, source.test), len(source.test))
    ends = [0, 120, 240, 360]
    parts = [
        features.extract(source.encoder, features.scan(source, source.test, rank=r, world=3), b - a, a)
        for r, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_a_gray_set_for_a_colour_encoder_is_refused(source: Source) -> None:
    with pytest.raises(ConfigError, match=r"'digits' has 1 channel\(s\), the encoder takes 3"):
        features.scan(dataclasses.replace(source, mean=(0.5,) * 3, std=(0.5,) * 3), source.test)
