"""WCL against vectors made by its official code: losses, labels, gradients on 1 to 4 ranks, head, optimiser, schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raycon import methods
from raycon.core import dist
from raycon.core.config import TrainConfig
from raycon.core.types import Batch, Mined
from raycon.methods import wcl
from raycon.nn import graph, losses, networks, optim
from tests.helpers import Golden, golden_files, on_ranks

NOT_STEPS = {"wcl_head", "wcl_optim"}


def close(ours: torch.Tensor, theirs: torch.Tensor, rtol: float, atol: float, what: str = "") -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


class Columns(nn.Module):
    """A head that picks some of the columns: views are the raw outputs of both heads side by side."""

    def __init__(self, which: slice) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.which]


def steps(folder: Path) -> list[Golden]:
    return [g for g in golden_files(folder, "wcl_*") if not any(g.name.startswith(n) for n in NOT_STEPS)]


def worlds(golden: Golden) -> list[int]:
    """The numbers of ranks that a case was run with."""
    return [int(n[1:].removesuffix("_inst_loss")) for n in golden.names("w") if n.endswith("_inst_loss")]


def one_rank(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's part of every case that has a run with so many ranks."""
    world, rank, found = dist.world(), dist.rank(), {}
    for g in steps(Path(folder)):
        if world not in worlds(g):
            continue
        width = g["h1_v1"].shape[1]
        options = methods.configure("wcl", temperature=float(g["temperature"]))
        method = wcl.WCL(options, nn.Identity(), 1)  # type: ignore[arg-type]
        method.student.first, method.student.second = Columns(slice(width)), Columns(slice(width, None))
        local = len(g["h1_v1"]) // world
        mine = slice(rank * local, (rank + 1) * local)
        raw = {n: g[n][mine].clone().requires_grad_() for n in ("h1_v1", "h2_v1", "h1_v2", "h2_v2")}
        views = tuple(torch.cat([raw[f"h1_v{v}"], raw[f"h2_v{v}"]], dim=1) for v in (1, 2))
        rows = torch.arange(local) + rank * local
        output = method(Batch(views, rows, torch.full((local,), -1)), Mined(None, (), 0))
        output.loss.backward()
        anchor = torch.cat([F.normalize(g[f"h1_v{v}"][mine]) for v in (1, 2)])
        own = losses.own_columns(anchor, rank)
        unit = [F.normalize(raw[f"h2_v{v}"].detach()) for v in (1, 2)]
        found[g.name] = {
            "inst_loss": output.metrics["loss/instance"],
            "weak_loss": output.metrics["loss/weak"],
            "total_loss": output.loss.detach(),
            "components": output.metrics["weak/components"],
            "logits": losses.pair_logits(anchor, dist.gather(anchor), float(g["temperature"]), own),
            "targets": losses.other_view(anchor, rank),
            "labels": torch.stack(method.weak_loss(*unit)[1]),
        } | {f"grad_{n}": t.grad for n, t in raw.items() if t.grad is not None}
    return found


def official_columns(local: int, rank: int, world: int) -> torch.Tensor:
    """Where the official column blocks [own view 1, own view 2, others' view 1, others' view 2] are among ours, which
    are, rank by rank, view 1 and view 2."""
    first = torch.arange(local)
    others = [r for r in range(world) if r != rank]
    blocks = [first + 2 * local * rank, first + 2 * local * rank + local]
    blocks += [first + 2 * local * r for r in others] + [first + 2 * local * r + local for r in others]
    return torch.cat(blocks)


def partition(label: torch.Tensor) -> torch.Tensor:
    return label[:, None] == label[None, :]


@pytest.mark.ranks
def test_steps(golden_dir: Path) -> None:
    for world in sorted({w for g in steps(golden_dir) for w in worlds(g)}):
        ranks = on_ranks(world, one_rank, str(golden_dir)) if world > 1 else [one_rank(str(golden_dir))]
        compare(golden_dir, world, ranks)


def compare(golden_dir: Path, world: int, ranks: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    for g in [g for g in steps(golden_dir) if world in worlds(g)]:
        local = len(g["h1_v1"]) // world
        for rank, found in enumerate(r[g.name] for r in ranks):
            what = f"{g.name}, rank {rank} of {world}"
            for name in ("inst_loss", "weak_loss", "total_loss"):
                close(found[name], g[f"w{world}_{name}"][rank], 1e-5, 1e-7, f"{what}, {name}")
                close(found[name], g[f"w{world}_{name}_f64"][rank], 1e-5, 1e-6, f"{what}, {name} in float64")
            for label, view in zip(found["labels"], ("v1", "v2"), strict=True):
                assert torch.equal(partition(label), partition(g[f"cc_{view}"])), what
            number = sum(g.about["components"].values()) / 2 if "components" in g.about else None
            assert number is None or float(found["components"]) == number
            columns = official_columns(local, rank, world)
            own = losses.own_columns(found["logits"], rank)
            # The self column is taken out officially, excluded here.
            kept = columns[None, :] != own[:, None]
            target = g[f"w{world}_inst_targets"][rank]
            theirs = torch.stack([columns[k][t] for k, t in zip(kept, target, strict=True)])
            assert torch.equal(theirs, found["targets"]), what
            if (name := f"w{world}_inst_logits") in g:
                logits = found["logits"][:, columns][kept].reshape(2 * local, -1)
                close(logits, g[name][rank], 1e-5, 1e-5, what)
        for name in ("h1_v1", "h1_v2", "h2_v1", "h2_v2"):
            grad = torch.cat([r[g.name].get(f"grad_{name}", torch.zeros(local, g[name].shape[1])) for r in ranks])
            close(grad, g[f"w{world}_grad_{name}"], 1e-4, 1e-6, f"{g.name} on {world}, gradient of {name}")


def test_neighbours_and_labels(golden_dir: Path) -> None:
    for g in steps(golden_dir):
        for view in ("v1", "v2"):
            unit = F.normalize(g[f"h2_{view}"])
            nearest = losses.pair_logits(unit, unit, 1.0, torch.arange(len(unit))).argmax(1)
            assert torch.equal(nearest, g[f"nn_{view}"]), (g.name, view)
            label = graph.components(g[f"nn_{view}"])
            assert torch.equal(partition(label), partition(g[f"cc_{view}"])), (g.name, view)


def test_each_direction_of_the_weak_loss(golden_dir: Path) -> None:
    for g in steps(golden_dir):
        for view, other in (("1", "2"), ("2", "1")):
            unit, label = F.normalize(g[f"h2_v{view}"]), g[f"cc_v{other}"]
            own = torch.arange(len(unit))
            logits = losses.pair_logits(unit, unit, float(g["temperature"]), own)
            target = losses.uniform_over(losses.same_cluster(label, label, own))
            for name in (f"w1_weak_dir{view}", f"w1_weak_dir{view}_f64"):
                close(losses.cross_entropy(logits, target), g[name][0], 1e-5, 1e-6, f"{g.name}, {name}")


def test_head(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "wcl_head_*"):
        hidden = [len(g["param.linear1.bias"]), len(g["param.linear2.bias"])]
        head = networks.mlp_head(g["x"].shape[1], hidden, g["y_train"].shape[1], bias=True)
        params = {n.removeprefix("param."): g[n] for n in g.names("param.")}
        missing, unexpected = head.load_state_dict(params, strict=False)
        assert not unexpected
        assert all(n.endswith("num_batches_tracked") for n in missing)
        x = g["x"].requires_grad_()
        y = head(x)
        close(y, g["y_train"], 0, 1e-5, g.name)
        close(F.normalize(y), g["y_train_normalised"], 0, 1e-5, g.name)
        (g["cotangent"] * F.normalize(y)).sum().backward()
        assert x.grad is not None
        close(x.grad, g["grad_x"], 0, 1e-5, g.name)
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None
            close(parameter.grad, g[f"grad.{name}"], 0, 1e-5, f"{g.name}, {name}")
        for name in g.names("after."):
            close(head.state_dict()[name.removeprefix("after.")], g[name], 0, 1e-5, f"{g.name}, {name}")
        close(head.eval()(g["x"]), g["y_eval"], 0, 1e-5, g.name)


def test_lars(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "wcl_optim_*"):
        names = [n.removeprefix("init.") for n in g.names("init.")]
        module = nn.ParameterDict({n: nn.Parameter(g[f"init.{n}"].clone()) for n in names})
        train = TrainConfig(
            optimizer="lars",
            momentum=float(g["momentum"]),
            weight_decay=float(g["weight_decay"]),
            trust=float(g["trust_coef"]),
            decay="no-bias-bn-by-name",  # type: ignore[arg-type]
        )
        optimizer = optim.build_optimizer(module, train)
        for step, lr in enumerate(g["lrs"].tolist()):
            for n in names:
                module[n].grad = g[f"grad{step}.{n}"].clone()
            optim.set_lr(optimizer, lr)
            optimizer.step()
            for n in names:
                close(module[n].detach(), g[f"step{step}.{n}"], 1e-5, 1e-8, f"{g.name}, step {step}, {n}")


def test_the_schedule(golden_dir: Path) -> None:
    for g in golden_files(golden_dir, "wcl_optim_*"):
        epochs, warmup, per_epoch, lr = g["sched_cfg"].tolist()
        train = TrainConfig(epochs=int(epochs), lr=lr, warmup_epochs=warmup, schedule="cosine")
        ours = [optim.lr_at(train, step, int(per_epoch)) for step in range(len(g["sched_lr"]))]
        close(torch.tensor(ours, dtype=torch.float64), g["sched_lr"], 1e-9, 1e-12, g.name)
