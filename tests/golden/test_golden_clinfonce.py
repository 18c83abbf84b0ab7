"""Cl-InfoNCE against vectors made by its official code: both losses, k-means, information measures, schedules."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raycon import methods
from raycon.core import dist
from raycon.core.config import MiningConfig, TrainConfig
from raycon.core.types import Batch, Mined, Needs
from raycon.evals.clusters import agreement
from raycon.index import metadata
from raycon.index.density import density
from raycon.index.local import LocalIndex
from raycon.methods import clinfonce
from raycon.nn import losses, optim
from tests.helpers import Golden, golden_files, on_ranks


def close(ours: torch.Tensor, theirs: torch.Tensor, rtol: float, atol: float, what: str = "") -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


def build(**options: object) -> clinfonce.ClInfoNCE:
    made = methods.configure("clinfonce", **options)
    return clinfonce.ClInfoNCE(made, nn.Identity(), 1, rows=100)  # type: ignore[arg-type]


# --- one head ---------------------------------------------------------------------------------------------------

CASE = re.compile(r"(?P<case>.+)_t(?P<t>[\d.]+)_(?P<mode>all|one)(_base(?P<base>[\d.]+))?_loss")


def single(g: Golden, case: str, temperature: float, anchors: str, base: float) -> tuple[torch.Tensor, ...]:
    """Loss and its gradients: to the unit features and to the raw embeddings."""
    raw = g["raw"].requires_grad_()
    features = F.normalize(raw, dim=2)
    features.retain_grad()
    rows = torch.arange(len(raw))
    method = build(temperature=temperature, base_temperature=base, anchors=anchors, clusters="instances")
    if case == "masked":
        stacked = torch.cat(list(features.unbind(1)))
        own = losses.own_columns(stacked, 0)
        logits = losses.pair_logits(stacked, stacked, temperature, own)
        times = raw.shape[1]
        positive = g["mask_asym"].bool().repeat(times, times).scatter(1, own[:, None], False)
        loss = temperature / base * losses.cross_entropy(logits, losses.uniform_over(positive))
    elif case == "none":  # the whole method, its network replaced by the embeddings
        method.student = nn.Identity()  # type: ignore[assignment]
        batch = Batch(features.unbind(1), rows, torch.full((len(raw),), -1))
        loss = method(batch, Mined(None, (), 0)).loss
    else:
        loss, _ = method.single_loss(features.unbind(1), g[f"labels_{case}"])
    loss.backward()
    assert raw.grad is not None
    assert features.grad is not None
    return loss.detach(), features.grad, raw.grad


def test_single_head(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "clinfonce_supcon*"):
        cases = [m for n in g.names() if (m := CASE.fullmatch(n))]
        assert cases
        for m in cases:
            name = m[0].removesuffix("_loss")
            base = float(m["base"] or g["base_temperature"])
            anchors = {"all": "all", "one": "first"}[m["mode"]]
            loss, to_features, to_raw = single(g, m["case"], float(m["t"]), anchors, base)
            close(loss, g[f"{name}_loss"], 1e-5, 0, name)
            close(loss, g[f"{name}_loss_f64"], 1e-5, 0, name)
            if m["case"] != "none":  # there the features are normalised once more
                close(to_features, g[f"{name}_grad_feat"], 1e-4, 1e-6, name)
            close(to_raw, g[f"{name}_grad_raw"], 1e-4, 1e-6, name)


def test_three_views_and_an_image_without_positives(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "clinfonce_edge*"):
        method, label = build(temperature=0.1), g["labels"]
        raw = g["raw_3view"].requires_grad_()
        loss, _ = method.single_loss(F.normalize(raw, dim=2).unbind(1), label)
        loss.backward()
        assert raw.grad is not None
        close(loss.detach(), g["loss_3view"], 1e-5, 0, g.name)
        close(raw.grad, g["grad_raw_3view"], 1e-4, 1e-6, g.name)

        # One view: officially 0/0. Here an image without positives adds nothing.
        assert g["loss_1view"].isnan()
        unit = F.normalize(g["raw_1view"][:, 0], dim=1)
        found, _ = method.single_loss([unit], label)
        expected = 0.0
        for i in range(len(unit)):
            others = [j for j in range(len(unit)) if j != i]
            total = math.log(sum(math.exp(float(unit[i] @ unit[j]) / 0.1) for j in others))
            same = [float(unit[i] @ unit[j]) / 0.1 - total for j in others if label[j] == label[i]]
            expected -= sum(same) / max(len(same), 1) / len(unit) * 0.1 / 0.07
        assert float(found) == pytest.approx(expected, rel=1e-5)


# --- two heads --------------------------------------------------------------------------------------------------


class Columns(nn.Module):
    """A head that picks some of the columns: views are the raw outputs of both heads side by side."""

    def __init__(self, which: slice) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.which]


def runs(g: Golden) -> list[tuple[str, int]]:
    """(case, number of ranks) of a file."""
    found = [re.fullmatch(r"(.+)_w(\d+)_inst_loss", n) for n in g.names()]
    return [(m[1], int(m[2])) for m in found if m]


def dual_rank(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's part of every case that has a run with so many ranks."""
    world, rank, found = dist.world(), dist.rank(), {}
    for g in golden_files(Path(folder), "clinfonce_dualhead*"):
        width, local = g["h1_v1"].shape[1], len(g["h1_v1"]) // world
        mine = slice(rank * local, (rank + 1) * local)
        for case, ranks in runs(g):
            if ranks != world:
                continue
            source = "kmeans" if case == "none" else "labels"  # k-means before its first clustering
            method = build(form="dual", temperature=float(g["temperature"]), clusters=source, hidden=1)
            method.student.first, method.student.second = Columns(slice(width)), Columns(slice(width, None))
            raw = {n: g[n][mine].clone().requires_grad_() for n in ("h1_v1", "h2_v1", "h1_v2", "h2_v2")}
            views = tuple(torch.cat([raw[f"h1_v{v}"], raw[f"h2_v{v}"]], dim=1) for v in (1, 2))
            none = torch.full((local,), -1)
            label = none if case == "none" else g[f"labels_{case}"][mine]
            output = method(Batch(views, torch.arange(local) + rank * local, label), Mined(None, (), 0))
            output.loss.backward()
            found[f"{g.name}/{case}"] = {
                "inst_loss": output.metrics["loss/instance"],
                "total_loss": output.loss.detach(),
            }
            if case != "none":
                found[f"{g.name}/{case}"]["cluster_loss"] = output.metrics["loss/cluster"]
            found[f"{g.name}/{case}"] |= {f"grad_{n}": t.grad for n, t in raw.items() if t.grad is not None}
    return found


def single_rank(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """The single-head loss of this rank's share of each ``rand`` case, and its share of the averaged gradient."""
    found = {}
    for g in golden_files(Path(folder), "clinfonce_supcon*"):
        local = len(g["raw"]) // dist.world()
        mine = slice(dist.rank() * local, (dist.rank() + 1) * local)
        raw = g["raw"][mine].clone().requires_grad_()
        method = build(temperature=float(g["temps"][-1]), base_temperature=float(g["base_temperature"]))
        loss, _ = method.single_loss(F.normalize(raw, dim=2).unbind(1), g["labels_rand"][mine])
        loss.backward()
        assert raw.grad is not None
        found[g.name] = {"loss": loss.detach(), "grad": raw.grad / dist.world()}
    return found


def on_rank(folder: str) -> tuple[dict[str, dict[str, torch.Tensor]], ...]:
    return dual_rank(folder), single_rank(folder)


@pytest.mark.ranks
def test_dual_head_and_both_over_ranks(golden_dir: Path) -> None:
    files = golden_files(golden_dir, "clinfonce_dualhead*")
    for world in sorted({w for g in files for _, w in runs(g)}):
        both = on_ranks(world, on_rank, str(golden_dir)) if world > 1 else [on_rank(str(golden_dir))]
        ranks, singles = [dual for dual, _ in both], [single for _, single in both]
        for g, case in [(file, c) for file in files for c, w in runs(file) if w == world]:
            parts, what = [r[f"{g.name}/{case}"] for r in ranks], f"{g.name}, {case}, {world} ranks"
            for name in ("inst_loss", "cluster_loss", "total_loss"):
                if (theirs := f"{case}_w{world}_{name}") in g:
                    ours = torch.stack([p[name] for p in parts])
                    close(ours, g[theirs], 1e-5, 1e-7, f"{what}, {name}")
                    close(ours, g[f"{theirs}_f64"], 1e-5, 1e-6, f"{what}, {name} in float64")
            for name in ("h1_v1", "h1_v2", "h2_v1", "h2_v2"):
                if (theirs := f"{case}_w{world}_grad_{name}") in g:
                    zero = torch.zeros(len(g[name]) // world, g[name].shape[1])
                    grad = torch.cat([p.get(f"grad_{name}", zero) for p in parts])
                    close(grad, g[theirs], 1e-4, 1e-6, f"{what}, {name}")
        # The single-head loss is officially of one process; over ranks it is that of the whole batch.
        for g in golden_files(golden_dir, "clinfonce_supcon*"):
            if len(g["raw"]) % world == 0:
                parts, name = [s[g.name] for s in singles], f"rand_t{float(g['temps'][-1]):g}_all"
                close(torch.stack([p["loss"] for p in parts]).mean(), g[f"{name}_loss"], 1e-5, 0, g.name)
                close(torch.cat([p["grad"] for p in parts]), g[f"{name}_grad_raw"], 1e-4, 1e-6, g.name)


# --- clusters ---------------------------------------------------------------------------------------------------


def test_concentration_and_kmeans(golden_dir: Path) -> None:
    """The official concentrations from the official assignments, and our clustering as good as the official one."""
    for g in golden_files(golden_dir, "clinfonce_kmeans*"):
        x, ks, temperature = g["x"].numpy(), g["ks"].tolist(), float(g["temp"])
        index = LocalIndex(len(x), x.shape[1], MiningConfig(shards=2, iterations=20, redo=5), seed=0)
        index.add(0, 0, x)
        snapshot, metrics = index.snapshot(0, Needs(clusterings=tuple(ks)))
        index.close()
        for i, k in enumerate(ks):
            for repository, scale in (("main", temperature), ("in100", 1.0)):
                name = f"{repository}_k{k}_"
                assignment, sqdist = g[name + "im2cluster"].numpy(), g[name + "sqdist"].numpy()
                found = density(sqdist, assignment, k, scale)
                np.testing.assert_allclose(found.phi_K, g[name + "density"], rtol=1e-5, err_msg=g.name + name)
                assert metrics[f"index/{i}/objective"] <= 1.001 * sqdist.astype(np.float64).sum(), (g.name, name)
                if np.array_equal(snapshot.assignment[i], assignment):  # so it is with the shipped vectors
                    np.testing.assert_allclose(snapshot.prototypes[i], g[name + "centroids"], atol=1e-5)


def test_information_in_bits(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "clinfonce_info*"):
        t = g["T"]
        for name in g.names("Z_"):
            z = g[name]
            entropy_z, entropy_t, z_given_t, t_given_z, shared, joint = g[f"{name[2:]}_vals"].tolist()
            ours = agreement(z, t)
            assert ours["information"] == pytest.approx(shared, abs=1e-9), name
            assert ours["leftover"] == pytest.approx(z_given_t, abs=1e-9), name
            assert agreement(t, z)["leftover"] == pytest.approx(t_given_z, abs=1e-9), name
            assert metadata.entropy(z.numpy()) == pytest.approx(entropy_z, abs=1e-9), name
            assert metadata.entropy(t.numpy()) == pytest.approx(entropy_t, abs=1e-9), name
            assert metadata.entropy(metadata.dense(z.numpy(), t.numpy())) == pytest.approx(joint, abs=1e-9), name


def partition(label: np.ndarray) -> np.ndarray:
    return label[:, None] == label[None, :]


def test_synthetic_hierarchies(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "clinfonce_info*"):
        for name in g.names("hier_n"):
            count, level = map(int, re.findall(r"\d+", name))
            np.testing.assert_array_equal(partition(metadata.binary_tree(count, level)), partition(g[name].numpy()))
            assert level <= max(metadata.levels_of(count), 1)
        label = g["fixI_class"].numpy()
        columns = sorted(g.names("fixI_label_gran_"), key=lambda n: -int(n.rsplit("_", 1)[1]))
        for name, (left, shared) in zip(columns, g["fixI_stats"].tolist(), strict=True):
            ours = metadata.split_classes(label, int(name.rsplit("_", 1)[1]))
            np.testing.assert_array_equal(partition(ours), partition(g[name].numpy()), err_msg=name)
            measured = agreement(torch.from_numpy(ours), torch.from_numpy(label))
            assert measured["leftover"] == pytest.approx(left, abs=1e-9)
            assert measured["information"] == pytest.approx(shared, abs=1e-9)


# --- schedules --------------------------------------------------------------------------------------------------


def test_schedules(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "clinfonce_sched*"):
        epochs, lr, least = int(g["epochs"]), float(g["learning_rate"]), float(g["min_lr"])
        end, warmup = lr * float(g["lr_decay_rate"]) ** 3, int(float(g["warmup_percent"]) * epochs)
        numbers = range(1, epochs + 1)
        ours = {
            "warmup": [max(optim.warmup_cosine(e, warmup, epochs, lr, start=least, end=end), least) for e in numbers],
            "cosine": [optim.warmup_cosine(e, 0, epochs, lr, end=end) for e in numbers],
            "exp_decay": [max(lr * float(g["exp_decay_rate"]) ** (e - 1), least) for e in numbers],
        }
        for name, values in ours.items():
            np.testing.assert_allclose(values, g[name], rtol=1e-9, err_msg=name)
        run_epochs, warm, per_epoch, peak = g["in100_cfg"].tolist()
        train = TrainConfig(epochs=int(run_epochs), lr=peak, warmup_epochs=warm, schedule="cosine")
        steps = [optim.lr_at(train, step, int(per_epoch)) for step in range(len(g["in100_iter_lr"]))]
        np.testing.assert_allclose(steps, g["in100_iter_lr"], rtol=1e-9, atol=1e-15)
