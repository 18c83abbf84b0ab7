"""MaskCon against vectors made by its official code: losses of all modes, queue, bank fill, whole training runs,
schedule, encoder, retrieval, label tables, augmentation operations.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raycon import methods
from raycon.core.config import EvalConfig, ModelConfig, TrainConfig
from raycon.core.types import Batch, Mined, Progress
from raycon.data_loaders import coarse
from raycon.evals import retrieval
from raycon.evals.base import FeatureSets
from raycon.methods import maskcon
from raycon.nn import auto_augment, losses, networks, optim
from raycon.training import loop


class Vectors:
    """One golden file: arrays by name, and what its sidecar says (this paper's have their settings at the top)."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as data:
            self._arrays = {k: data[k] for k in data.files}
        self.about: dict[str, Any] = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))

    def __getitem__(self, name: str) -> Tensor:
        return torch.as_tensor(np.array(self._arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self, prefix: str = "") -> list[str]:
        return [k for k in self._arrays if k.startswith(prefix)]


def vectors(folder: Path, pattern: str) -> list[Vectors]:
    found = sorted(folder.glob(f"{pattern}.npz"))
    if not found:
        pytest.skip(f"{folder} has no {pattern}")
    return [Vectors(f) for f in found]


def close(ours: Tensor, theirs: Tensor, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(ours.detach(), theirs.to(ours.dtype), rtol=rtol, atol=atol, equal_nan=True)


class Identity(nn.Module):
    """Views are projections before normalisation."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Fixed(nn.Module):
    """A classifier whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def build(g: Vectors, run: dict[str, Any], official: bool) -> maskcon.MaskCon:
    options = methods.configure(
        "maskcon",
        mode=run["mode"],
        weight=run["w"],
        temperature=run["t0"],
        soft_temperature=run.get("t", 0.05),
        official_targets=official,
        dim=g.about["D"],
        queue=g.about["K"],
    )
    method = maskcon.MaskCon(options, Identity(g.about["D"]), g.about["D"], g.about["num_classes"])
    method.student.head = method.teacher.net.head = nn.Identity()
    if method.classifier is not None:
        method.classifier = Fixed(g["cls_logits"])
    fill(method, g["queue"], g["queue_labels"])
    return method


def fill(method: maskcon.MaskCon, queue_DK: Tensor, label_K: Tensor, pointer: int = 0) -> None:
    assert method.queue.labels is not None
    method.queue.keys.copy_(queue_DK.T)
    method.queue.labels.copy_(label_K)
    method.queue.pointer.fill_(pointer)


def queue_is(method: maskcon.MaskCon, queue_DK: Tensor, label_K: Tensor, pointer: Tensor, **tolerance: float) -> None:
    close(method.queue.keys.T, queue_DK, **tolerance)
    assert torch.equal(method.queue.labels, label_K)
    assert int(method.queue.pointer) == int(pointer)


def run_loss(g: Vectors, run: dict[str, Any], official: bool) -> tuple[maskcon.MaskCon, Any, Tensor]:
    """A forward and backward; the method, its output, and the gradient of the raw projections."""
    method = build(g, run, official)
    query = g["raw_q"].requires_grad_()
    batch = Batch((query, g["raw_k"]), torch.arange(len(query)), g["labels"])
    output = method(batch, Mined(None, (), 0))
    output.loss.backward()
    assert query.grad is not None
    return method, output, query.grad


def tolerance(run: dict[str, Any], atol: float = 2e-6) -> dict[str, float]:
    """Where the official form has lost digits to underflow (it is off the stable formula), one quantum of what is left
    may be rounded the other way."""
    loss, stable = float(run["loss"]), float(run.get("safe64_loss", run["loss"]))
    lost = abs(loss - stable) > 3e-6 * abs(stable)
    return {"rtol": 2e-3, "atol": 2e-3} if lost else {"rtol": 2e-5, "atol": atol}


def test_the_official_losses_of_all_modes(golden_dir: Path) -> None:
    """Values, gradients, soft labels and NaN where the official code has NaN, with the official form of the targets."""
    for g in vectors(golden_dir, "maskcon_loss_*"):
        for run in g.about["runs"]:
            name = run["prefix"]
            method, output, gradient = run_loss(g, run, official=True)
            close(output.loss, g[f"{name}_loss"], **tolerance(run))
            close(gradient, g[f"{name}_grad_raw_q"], **tolerance(run, 1e-6))
            assert bool(output.loss.isnan()) == bool(run.get("official_nan", False))
            if f"{name}_labels" in g:
                close(method.target(g["k"], g["labels"]), g[f"{name}_labels"], **tolerance(run, 1e-6))
            if f"{name}_grad_cls" in g:
                assert isinstance(method.classifier, Fixed)
                assert method.classifier.logits.grad is not None
                close(method.classifier.logits.grad, g[f"{name}_grad_cls"], atol=1e-6)
            if run["mode"] == "coins":
                close(output.metrics["loss/coarse"], g[f"{name}_cls_per_sample"].mean())
                close(output.metrics["loss/instance"], g[f"{name}_selfcon_per_sample"].mean())


def test_the_parts_of_the_official_losses(golden_dir: Path) -> None:
    """Logits, rescaled similarities, targets, gradient of the normalised query and losses per row, where recorded."""
    for g in vectors(golden_dir, "maskcon_loss_*"):
        mask = losses.same_cluster(g["labels"], g["queue_labels"])
        for run in g.about["runs"]:
            name = run["prefix"]
            query = g["q"].requires_grad_()
            logits = losses.queue_logits(query, g["k"], g["queue"].T, run["t0"])
            if f"{name}_logits" in g:
                close(logits, g[f"{name}_logits"], atol=5e-6)
            target = build(g, run, official=True).target(g["k"], g["labels"]) if run["mode"] != "coins" else None
            if f"{name}_soft_rescaled" in g:
                soft = losses.masked_similarity(g["k"], g["queue"].T, mask, run["t"], official=True)
                close(soft, g[f"{name}_soft_rescaled"], **tolerance(run))
                close(losses.own_and(soft), g[f"{name}_maskcon_target"], **tolerance(run))
            if f"{name}_supcon_target" in g:
                close(losses.own_and(mask), g[f"{name}_supcon_target"])
            if f"{name}_loss_per_sample" in g:
                assert target is not None
                rows = [losses.cross_entropy(logits[i : i + 1], target[i : i + 1]) for i in range(len(query))]
                close(torch.stack(rows), g[f"{name}_loss_per_sample"], **tolerance(run))
            if f"{name}_supcon_per_sample" in g:
                supcon = losses.own_and(mask)
                rows = [losses.cross_entropy(logits[i : i + 1], supcon[i : i + 1]) for i in range(len(query))]
                close(torch.stack(rows), g[f"{name}_supcon_per_sample"])
            if target is not None and f"{name}_grad_q" in g:
                losses.cross_entropy(logits, target).backward()
                assert query.grad is not None
                close(query.grad, g[f"{name}_grad_q"], **tolerance(run, 1e-6))


def test_the_safe_losses_agree_and_never_fail(golden_dir: Path) -> None:
    """The default targets: the official value where it is sound, and float64's stable formula everywhere."""
    for g in vectors(golden_dir, "maskcon_loss_*"):
        for run in g.about["runs"]:
            _, output, gradient = run_loss(g, run, official=False)
            assert bool(gradient.isfinite().all())
            if "safe64_loss" in run:
                assert output.loss.item() == pytest.approx(float(run["safe64_loss"]), rel=2e-5)
                close(output.loss, g[f"{run['prefix']}_safe64_loss"])
            else:
                close(output.loss, g[f"{run['prefix']}_loss"])


def test_the_queue_carries_labels(golden_dir: Path) -> None:
    for g in vectors(golden_dir, "maskcon_loss_*"):
        if "queue_after" in g:
            method, output, _ = run_loss(g, g.about["runs"][0], official=False)
            method.after_step(output.keep, Progress(0, 1, 0))
            queue_is(method, g["queue_after"], g["queue_labels_after"], g["queue_ptr_after"])


# --- whole runs -------------------------------------------------------------------------------------------------


class Tiny(nn.Sequential):
    """The encoder of the official traces; its state-dict names are theirs (net.0, net.1)."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__(nn.Linear(inputs, features), nn.BatchNorm1d(features), nn.ReLU())
        self.features = features


PARTS = {"net": "encoder", "projector": "head"}


def put(branch: networks.Branch, g: Vectors, prefix: str) -> None:
    state = {}
    for name in g.names(prefix):
        part, rest = name[len(prefix) :].split(".", 1)
        if part in PARTS:
            state[f"{PARTS[part]}.{rest}"] = g[name]
    branch.load_state_dict(state)


def compare(branch: networks.Branch, g: Vectors, prefix: str, skip: str = "-") -> None:
    theirs = {v: k for k, v in PARTS.items()}
    for name, value in branch.state_dict().items():
        part, rest = name.split(".", 1)
        if skip not in name:
            close(value, g[f"{prefix}{theirs[part]}.{rest}"], rtol=2e-4, atol=5e-6)


def official_batches(g: Vectors) -> list[Batch]:
    found = []
    for i in range(g.about["batches_per_epoch"]):
        views = (g[f"batch{i}/im_q"], g[f"batch{i}/im_k"])
        found.append(Batch(views, torch.arange(len(views[0])), g[f"batch{i}/coarse"]))
    return found


def forever(batches: list[Batch]) -> Iterator[Batch]:
    return itertools.cycle(batches)


def test_training_traces(golden_dir: Path) -> None:
    """Bank fill, then every step through the real step of the loop.

    The official code moves the teacher before the forward of a step, raycon after the optimiser of the step before:
    the same trajectory, compared where both have moved.
    """
    for g in vectors(golden_dir, "maskcon_trace_*"):
        s = g.about
        inputs, features = g["batch0/im_q"].shape[1], g["init/encoder_q.net.0.weight"].shape[0]
        options = methods.configure(
            "maskcon",
            mode=s["mode"],
            weight=s["w"],
            temperature=s["t0"],
            soft_temperature=s["t"],
            dim=s["dim"],
            hidden=len(g["init/encoder_q.projector.0.bias"]),
            queue=s["K"],
            momentum=s["ema_m"],
        )
        method = maskcon.MaskCon(options, Tiny(inputs, features), features, s["num_classes"])
        put(method.student, g, "init/encoder_q.")
        put(method.teacher.net, g, "init/encoder_k.")
        fill(method, g["init/queue"], g["init/coarse_labels"], int(g["init/queue_ptr"]))
        if method.classifier is not None:
            method.classifier.load_state_dict({k: g[f"init/encoder_q.classifer.{k}"] for k in ("weight", "bias")})
        batches = official_batches(g)

        method.before_training(forever(batches), seed=0)
        queue_is(method, g["bank/queue"], g["bank/coarse_labels"], g["bank/queue_ptr"])
        for name in g.names("bank/encoder_k.net."):
            value = method.teacher.net.state_dict()[name.replace("bank/encoder_k.net.", "encoder.")]
            close(value, g[name])

        train = TrainConfig(
            lr=s["base_lr"],
            epochs=s["epochs"],
            warmup_epochs=s["warm_up"],
            schedule="cosine",
            momentum=s["sgd_momentum"],
            weight_decay=s["weight_decay"],
        )
        optimizer = optim.build_optimizer(method, train)
        for step in range(len(g["loss"])):
            lr = optim.lr_at(train, step, s["batches_per_epoch"])
            assert lr == pytest.approx(float(g["lr"][step]), rel=1e-9, abs=1e-15)
            optim.set_lr(optimizer, lr)
            output = loop.forward_backward(method, batches[step % len(batches)], Mined(None, (), 0), 1)
            close(output.loss, g["loss"][step], rtol=2e-4)
            recorded = f"step{step}/queue" in g
            if recorded:  # both teachers have followed the student of the step before
                compare(method.teacher.net, g, f"step{step}/encoder_k.")
            optimizer.step()
            method.after_step(output.keep, Progress(step, len(g["loss"]), 0))
            optimizer.zero_grad()
            if recorded:
                compare(method.student, g, f"step{step}/encoder_q.")
                now = [g[f"step{step}/{n}"] for n in ("queue", "coarse_labels", "queue_ptr")]
                queue_is(method, *now, rtol=2e-4, atol=5e-6)
                if method.classifier is not None:
                    for name, value in method.classifier.state_dict().items():
                        close(value, g[f"step{step}/encoder_q.classifer.{name}"], rtol=2e-4, atol=5e-6)
        method.eval()
        feature = method.encoder()(torch.cat([b.views[0] for b in batches]))
        close(feature, g["final/feat_eval"], rtol=2e-4, atol=2e-5)


def test_schedule(golden_dir: Path) -> None:
    for g in vectors(golden_dir, "maskcon_lr*"):
        for run in g.about["runs"]:
            train = TrainConfig(
                lr=run["base_lr"], epochs=run["epochs"], warmup_epochs=run["warm_up"], schedule="cosine"
            )
            theirs = g[run["array"]].numpy()
            ours = [optim.lr_at(train, step, run["iters_per_epoch"]) for step in range(len(theirs))]
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)


def test_encoder(golden_dir: Path) -> None:
    """The network of every image size with the official formula's weights: features, classes, projections."""
    for g in vectors(golden_dir, "maskcon_encoder*"):
        s = g.about
        for name, run in s["runs"].items():
            size = int(name.removeprefix("size"))
            stem = "small" if size <= 64 else "imagenet"
            encoder = networks.build_encoder(ModelConfig(encoder=s["arch"], stem=stem), channels=3)  # type: ignore[arg-type]
            options = methods.configure("maskcon", mode="coins", dim=s["dim"], queue=8)
            method = maskcon.MaskCon(options, encoder, encoder.features, s["num_classes"])  # type: ignore[arg-type]
            assert method.classifier is not None
            parts = {"net": encoder, "projector": method.student.head, "classifer": method.classifier}
            parameters = {f"{part}.{n}": p for part, m in parts.items() for n, p in m.named_parameters()}
            assert sum(p.numel() for p in parameters.values()) == run["param_count"]
            assert [[n, list(p.shape)] for n, p in parameters.items()] == run["params_in_order"]
            for j, (n, p) in enumerate(parameters.items()):
                p.data.copy_(formula(n, p.shape, j, s["phase"]))
            count = s["batch"] * 3 * size * size
            image = torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + s["phase"])
            image = image.float().view(s["batch"], 3, size, size)
            method.eval()
            with torch.no_grad():
                feature = encoder(image)
                close(feature, g[f"{name}/feat_eval"], rtol=1e-3, atol=1e-5)
                close(method.classifier(feature), g[f"{name}/cls_eval"], rtol=1e-3, atol=1e-5)
                close(method.student.head(feature), g[f"{name}/proj_eval"], rtol=1e-3, atol=1e-5)
                method.train()
                close(encoder(image), g[f"{name}/feat_train"], rtol=1e-3, atol=5e-5)


def formula(name: str, shape: torch.Size, j: int, phase: float) -> Tensor:
    """The sidecar's weights: parameter j as a function of its shape and name."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    base = torch.sin(0.7310585 * i + phase * (j + 1) + 0.001 * i * (i % 97)).view(shape)
    if len(shape) > 1:
        return (base * math.sqrt(2 / (base.numel() / shape[0]))).float()
    return (1 + 0.1 * base if name.endswith("weight") else 0.1 * base).float()


# --- augmentation -----------------------------------------------------------------------------------------------


def pictures(hwc: Tensor) -> Tensor:
    """(..., H, W, C) uint8 to (n, C, H, W) float32 in [0, 1]."""
    return hwc.reshape(-1, *hwc.shape[-3:]).permute(0, 3, 1, 2).float() / 255


def grey_values(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_every_operation_gives_pil_s_grey_values(golden_dir: Path) -> None:
    """All operations, magnitudes and signs in one batch, exactly."""
    for g in vectors(golden_dir, "maskcon_augment*"):
        code, magnitude, expected = [], [], []
        for name in g.names():
            operation, _, sign = name.rpartition("_")
            if operation not in auto_augment.OPERATIONS:
                continue
            levels = g.about["mags"][: len(g[name])]
            for level, image in zip(levels, g[name], strict=True):
                code.append([auto_augment.OPERATIONS.index(operation), -1])
                magnitude.append([auto_augment.magnitude(operation, level) * (-1 if sign == "m" else 1), 0.0])
                expected.append(image)
        assert len(expected) >= len(auto_augment.OPERATIONS)
        batch = pictures(g["image"]).repeat(len(expected), 1, 1, 1)
        actual = grey_values(auto_augment.apply_(batch, np.array(code), np.array(magnitude)))
        assert torch.equal(actual, torch.stack(expected))


def test_the_policy_is_the_official_one(golden_dir: Path) -> None:
    for g in vectors(golden_dir, "maskcon_augment*"):
        for ours, theirs in zip(auto_augment.POLICIES, g.about["policy"], strict=True):
            for step, (name, magnitude) in zip(ours, ((theirs[1], theirs[2]), (theirs[4], theirs[5])), strict=True):
                assert step[0] == name
                if name in auto_augment._LEVELS:
                    assert auto_augment.magnitude(name, step[2]) == pytest.approx(magnitude, abs=1e-12)
            assert (ours[0][1], ours[1][1]) == (theirs[0], theirs[3])
        # The official draws for the recorded sequence, from Python's generator; everything else is ours.
        described = g.about["arrays"]["policy_seq"]["desc"]
        generator = random.Random(int(re.search(r"random\.seed\((\d+)\)", described)[1]))  # type: ignore[index]
        code, magnitude = [], []
        for _ in g["policy_seq"]:
            policy = auto_augment.POLICIES[generator.randint(0, len(auto_augment.POLICIES) - 1)]
            row = []
            for name, probability, level in policy:
                row.append((-1, 0.0))
                if generator.random() < probability:
                    sign = generator.choice([-1, 1]) if name in auto_augment.SIGNED else 1
                    row[-1] = (auto_augment.OPERATIONS.index(name), sign * auto_augment.magnitude(name, level))
            code.append([c for c, _ in row])
            magnitude.append([m for _, m in row])
        batch = pictures(g["image"]).repeat(len(code), 1, 1, 1)
        actual = grey_values(auto_augment.apply_(batch, np.array(code), np.array(magnitude)))
        assert torch.equal(actual, g["policy_seq"])


# --- retrieval and labels ---------------------------------------------------------------------------------------


def test_recall(golden_dir: Path) -> None:
    """The run without ties exactly, by the official rule and by identity; those with ties but for the tied rows."""
    for g in vectors(golden_dir, "maskcon_recall*"):
        ks = g.about["K"]
        for name in g.about["runs"]:
            feature, tied = g["features"], 0
            if f"{name}/zero_rows" in g:
                feature[g[f"{name}/zero_rows"]] = 0
                tied = len(g[f"{name}/zero_rows"])
            if f"{name}/features_row" in g:
                feature[g[f"{name}/row"]] = g[f"{name}/features_row"]
                tied = 2 * len(g[f"{name}/row"])
            own = retrieval.hits(feature, g["fine_labels"], ks)
            official = retrieval.hits(feature, g["fine_labels"], ks, positional=True)
            slack = tied / len(feature) + 1e-7
            np.testing.assert_allclose(own.double().mean(0), g[f"{name}/recall_identity_loo64"], atol=slack, rtol=0)
            np.testing.assert_allclose(official.double().mean(0), g[f"{name}/recall"], atol=slack, rtol=0)
            if not tied:
                assert torch.equal(official, g[f"{name}/hits"])
                sets = FeatureSets(feature, g["fine_labels"], feature, g["fine_labels"])
                numbers = retrieval.Evaluation(EvalConfig()).run(sets)
                expected = dict(zip(ks, 100 * g[f"{name}/recall_identity_loo64"].numpy(), strict=True))
                recall = {k: v for k, v in numbers.items() if "recall_at" in k}
                assert recall == pytest.approx({f"retrieval/recall_at_{k}": expected[k] for k in ks})


def test_coarse_labels(golden_dir: Path) -> None:
    tables = {
        "cars196_coarse": coarse.cars196(),
        "cifar100_coarse": coarse.cifar100(),
        "imagenet32_to_imagenet": coarse.imagenet32_to_imagenet(),
        "imagenet_to_coarse12": coarse.imagenet(),
    }
    for kind in ("good", "bad"):
        tables[f"cifartoy_{kind}_fine"] = coarse.cifartoy_fine(kind)
        tables[f"cifartoy_{kind}_coarse"] = coarse.cifartoy_coarse(kind)
    for g in vectors(golden_dir, "maskcon_coarse*"):
        for name in g.names():
            np.testing.assert_array_equal(tables[name], g[name])
            if name in g.about["hist"]:
                assert np.bincount(tables[name][tables[name] >= 0]).tolist() == g.about["hist"][name]
            digest = hashlib.sha256(tables[name].astype("<i2").tobytes()).hexdigest()
            assert digest == g.about["sha256"][name]
