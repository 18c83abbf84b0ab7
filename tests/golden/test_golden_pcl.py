"""PCL against vectors made by its official code: losses, queue, EMA, schedules, shuffle-BN, whole training steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raycon import methods
from raycon.core import dist
from raycon.core.config import Facts, TrainConfig
from raycon.core.types import Batch, Mined, Progress, Snapshot
from raycon.methods import pcl
from raycon.nn import losses, networks, optim
from raycon.training import loop
from tests.helpers import Golden, golden_files, on_ranks


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1)


def mined(snapshot: Snapshot | None = None, used: tuple[int, ...] = (), seed: int = 0) -> Mined:
    return Mined(snapshot, used, seed)


def facts(batch: int = 4, rows: int = 100) -> Facts:
    return Facts(rows=rows, classes=0, image=None, batch=batch, world=1, size=8, epochs=1)


class Identity(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def build(golden: Golden, dim: int, **options: object) -> pcl.PCL:
    """PCL whose networks are the identity: views are embeddings before normalisation."""
    settings = golden.settings
    made = methods.configure(
        "pcl", queue=settings["r"], temperature=settings["T"], dim=dim, negatives=settings["r"], **options
    )
    method = pcl.PCL(made, Identity(dim), dim)
    method.student.head = nn.Identity()
    method.teacher.net.head = nn.Identity()
    return method


def test_infonce(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_infonce*"):
        method = build(g, g["q"].shape[1])
        method.queue.keys.copy_(g["queue"].T)
        query = g["q_raw"].requires_grad_()
        batch = Batch((query, g["k_raw"]), torch.arange(len(query)), torch.full((len(query),), -1))
        output = method(batch, mined())
        logits = losses.queue_logits(unit(g["q_raw"]), unit(g["k_raw"]), g["queue"].T, g.settings["T"])
        close(logits, g["logits"], 2e-6)
        close(output.loss.detach(), g["loss"], 3e-7)
        close(100 * output.metrics["accuracy/instance"], g["acc1"][0], 1e-4)
        output.loss.backward()
        assert query.grad is not None
        close(query.grad, g["grad_q_raw"], 2e-7)
        method.after_step(output.keep, Progress(0, 1, 0))
        close(method.queue.keys.T, g["queue_after"], 1e-6)
        assert int(method.queue.pointer) == int(g["ptr_after"])


def test_queue_wraps(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_queue*"):
        queue = networks.Queue(g.settings["r"], g.settings["D"])
        queue.keys.copy_(g["queue0"].T)
        for step, keys in enumerate(g["keys"]):
            queue.enqueue(keys)
            close(queue.keys.T, g["queue"][step], 0)
            assert int(queue.pointer) == int(g["ptr"][step])


def test_ema(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_ema*"):
        student = nn.Linear(*g["k0"].shape[::-1], bias=False)
        teacher = networks.Twin(student)
        teacher.net.weight.copy_(g["k0"])
        for q, k in zip(g["q"], g["k"], strict=True):
            with torch.no_grad():
                student.weight.copy_(q)
            teacher.follow(student, g.settings["m"])
            close(teacher.net.weight.detach(), k, 1e-7)


def test_protonce(golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for g in golden_files(golden_dir, "pcl_protonce*"):
        kinds = range(len(g.settings["ks"]))
        snapshot = Snapshot(
            0,
            tuple(g[f"k{m}_im2cluster"] for m in kinds),
            tuple(g[f"k{m}_centroids"] for m in kinds),
            tuple(g[f"k{m}_density"] for m in kinds),
            None,
        )
        # The official draws (Python's random.sample) are given; everything else is ours.
        drawn = iter([g[f"k{m}_neg_ids"] for m in kinds] * 2)

        def fixed(used: int, size: int, exclude: torch.Tensor, number: int, seed: int) -> tuple[torch.Tensor, ...]:
            ids = next(drawn)  # noqa: B023
            assert len(ids) == number
            assert not set(ids.tolist()) & set(exclude.tolist())
            return ids, torch.ones(number, dtype=torch.bool)

        monkeypatch.setattr(losses, "sample_excluding", fixed)
        method = build(g, g.settings["D"])
        method.queue.keys.copy_(g["queue"].T)
        used = tuple(int(a.max()) + 1 for a in snapshot.assignment)
        query = g["q_raw"].requires_grad_()
        batch = Batch((query, g["k_raw"]), g["index"], torch.full((len(query),), -1))
        output = method(batch, mined(snapshot, used))
        close(output.metrics["loss/instance"], g["loss_infonce"], 3e-7)
        close(output.metrics["loss/prototype"], g["loss_proto"], 3e-7)
        close(output.loss.detach(), g["loss_total"], 5e-7)
        close(100 * output.metrics["accuracy/prototype"], g["acc_proto"].mean(), 1e-3)
        output.loss.backward()
        assert query.grad is not None
        close(query.grad, g["grad_q_raw_total"], 2e-7)
        unit_query = g["q"].requires_grad_()
        loss, _ = method.prototype_loss(unit_query, g["index"], mined(snapshot, used))
        loss.backward()
        assert unit_query.grad is not None
        close(unit_query.grad, g["grad_q_proto"], 2e-7)
        for m in kinds:
            column = torch.cat([snapshot.assignment[m][g["index"]], g[f"k{m}_neg_ids"]])
            logits = losses.prototype_logits(g["q"], snapshot.prototypes[m][column], snapshot.concentration[m][column])
            close(logits, g[f"k{m}_logits"], 3e-6)
            close(losses.cross_entropy(logits, g[f"k{m}_labels"]), g[f"k{m}_loss"], 3e-7)


class Tiny(nn.Module):
    """The encoder of the official traces, its ``fc`` taken off."""

    features = 8

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(6, 8, bias=False)
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.l1(x)))


def put(module: networks.Branch, golden: Golden, prefix: str) -> None:
    """Load ``prefix``l1.weight, ``prefix``bn.*, ``prefix``fc.* into encoder and head."""
    state = {n[len(prefix) :]: golden[n] for n in golden.names(prefix)}
    module.load_state_dict({(f"head.{k[3:]}" if k.startswith("fc.") else f"encoder.{k}"): v for k, v in state.items()})


def compare(module: networks.Branch, golden: Golden, prefix: str, only: str = "") -> None:
    # fp32 rounding (sums in another order, batches shuffled officially) grows to 5e-6 over these steps of lr 0.3.
    for name, value in module.state_dict().items():
        theirs = prefix + (f"fc.{name[5:]}" if name.startswith("head.") else name[len("encoder.") :])
        if only in name:
            torch.testing.assert_close(value, golden[theirs], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_training_traces(golden_dir: Path) -> None:
    """Whole steps through the real step of the loop: forward, backward, optimiser, EMA, queue.

    The official code moves the teacher before the next forward, raycon after the optimiser: raycon's teacher
    parameters after step t are the official ones after step t+1, its BatchNorm statistics those after step t.
    """
    for g in golden_files(golden_dir, "pcl_train_trace*"):
        s = g.settings
        head = "mlp" if any("fc.0" in n for n in g.names()) else "linear"
        options = methods.configure(
            "pcl", queue=s["r"], temperature=s["T"], dim=s["D"], momentum=s["m"], head=head, clusters=(4,)
        )
        method = pcl.PCL(options, Tiny(), Tiny.features)
        put(method.student, g, "s0/encoder_q.")
        put(method.teacher.net, g, "s0/encoder_k.")
        method.queue.keys.copy_(g["s0/queue"].T)
        train = TrainConfig(lr=s["lr"], momentum=s["momentum"], weight_decay=s["weight_decay"])
        optimizer = optim.build_optimizer(method, train)
        steps = len(g["x_q"])
        for step in range(steps):
            batch = Batch((g["x_q"][step], g["x_k"][step]), torch.arange(s["B"]), torch.full((s["B"],), -1))
            output = loop.forward_backward(method, batch, mined(), 1)
            close(output.loss.detach(), g["loss"][step], 3e-6)
            optimizer.step()
            method.after_step(output.keep, Progress(step, steps, 0))
            optimizer.zero_grad()
            now, following = f"s{step + 1}/", f"s{step + 2}/"
            compare(method.student, g, now + "encoder_q.")
            compare(method.teacher.net, g, now + "encoder_k.", only="running")
            close(method.queue.keys.T, g[now + "queue"], 3e-6)
            assert int(method.queue.pointer) == int(g[now + "queue_ptr"])
            if following + "queue" in g:
                compare(method.teacher.net, g, following + "encoder_k.", only="weight")


def shuffled_step(folder: str) -> dict[str, torch.Tensor]:
    """One rank's part of the official two-process step."""
    (g,) = golden_files(Path(folder), "pcl_ddp2_step")
    rank, s = dist.rank(), g.settings
    options = methods.configure("pcl", queue=s["r"], temperature=s["T"], dim=4, momentum=s["m"], head="linear")
    method = pcl.PCL(options, Tiny(), Tiny.features)
    put(method.student, g, "init/encoder_q.")
    put(method.teacher.net, g, "init/encoder_k.")
    method.queue.keys.copy_(g["init/queue"].T)
    method.teacher.follow(method.student, s["m"])  # the official order: before the forward
    key = method.embed_shuffled(method.teacher, g["x_k"][rank], g["perm"].numpy())
    query = method.embed(method.student, g["x_q"][rank])
    logits = losses.queue_logits(query, key, method.queue.keys, s["T"])
    loss = losses.cross_entropy(logits, losses.first_column(logits))
    loss.backward()
    method.queue.enqueue(dist.gather(key))
    grad = method.student.encoder.l1.weight.grad
    return {
        "logits": logits.detach(),
        "loss": loss.detach(),
        "grad": grad,
        "grad_mean": dist.mean(grad),
        "kmean": method.teacher.net.encoder.bn.running_mean,
        "kvar": method.teacher.net.encoder.bn.running_var,
        "qmean": method.student.encoder.bn.running_mean,
        "queue": method.queue.keys.T,
    }


@pytest.mark.ranks
def test_two_ranks_with_shuffle_bn(golden_dir: Path) -> None:
    (g,) = golden_files(golden_dir, "pcl_ddp2_step")
    for rank, ours in enumerate(on_ranks(2, shuffled_step, str(golden_dir))):
        # As in pcl_infonce and in whole traces: logits of 2 in the last bits, gradients behind a BatchNorm. On a second
        # processor they are up to 2.1e-6 away.
        for name, atol in {
            "logits": 2e-6,
            "loss": 1e-6,
            "grad": 3e-6,
            "kmean": 1e-6,
            "kvar": 1e-6,
            "qmean": 1e-6,
        }.items():
            close(ours[name], g[name][rank], atol)
        close(ours["grad_mean"], g["grad_mean"], 3e-6)
        close(ours["queue"], g["queue"], 1e-6)


def test_schedules(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "pcl_misc*"):
        s = g.settings
        for schedule, name in (("step", "lr_step"), ("cosine-epoch", "lr_cos")):
            train = TrainConfig(
                lr=s["lr"],
                epochs=s["epochs"],
                schedule=schedule,
                milestones=tuple(s["milestones"]),  # type: ignore[arg-type]
            )
            ours = [optim.lr_at(train, epoch * 7 + 3, 7) for epoch in range(s["epochs"])]
            np.testing.assert_allclose(ours, g[name].numpy(), rtol=1e-12)
