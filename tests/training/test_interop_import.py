"""The full state of a paper's file becomes a run: networks, momentum encoder, queue and optimiser, tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raycon import methods, pretrain
from raycon.core.config import ConfigError, ModelConfig, RunConfig
from raycon.nn import networks, optim
from raycon.nn.published import FileError
from raycon.recipes import recipe
from raycon.training import checkpoint, interop, job

ROWS = 1437  # images of digits' train split
WIDTH, FEATURES = 4, 32


def backbone(seed: int) -> dict[str, Tensor]:
    """A narrow ResNet-18 for digits under torchvision's names, every tensor a different one."""
    torch.manual_seed(seed)
    config = ModelConfig(encoder="resnet18", width=WIDTH, stem="small")
    return randomised(networks.build_encoder(config, channels=1).state_dict())


def randomised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else torch.tensor(7) for k, v in state.items()}


def head(*layers: nn.Module) -> dict[str, Tensor]:
    return randomised(nn.Sequential(*layers).state_dict())


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    buffers = ("running_mean", "running_var", "num_batches_tracked", "queue", "queue_ptr", "coarse_labels")
    return {k: v for k, v in state.items() if not k.endswith(buffers)}


def sgd(state: dict[str, Tensor], groups: list[list[str]], key: str = "momentum_buffer") -> dict[str, Any]:
    """An optimiser's state over parameters in groups; the momentum of ``encoder_k`` and the like is absent."""
    order = [n for g in groups for n in g]
    frozen = ("encoder_k", "module.encoder_k", "momentum_")
    moving = {i: {key: state[n] * 10} for i, n in enumerate(order) if not n.startswith(frozen)}
    first, made = 0, []
    for group in groups:
        made.append({"lr": 0.1, "momentum": 0.9, "params": list(range(first, first + len(group)))})
        first += len(group)
    return {"state": moving, "param_groups": made}


def ring(dim: int, size: int) -> dict[str, Tensor]:
    return {"queue": torch.randn(dim, size), "queue_ptr": torch.tensor([64])}


def pcl(version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    def fc() -> dict[str, Tensor]:
        if version == 1:
            return prefixed("fc.", randomised(nn.Linear(FEATURES, 16).state_dict()))
        return prefixed("fc.", head(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 16)))

    both = prefixed("encoder_q.", backbone(1) | fc()) | prefixed("encoder_k.", backbone(2) | fc())
    state = prefixed("module.", both | ring(16, 128))
    optimizer = sgd(state, [list(parameters(state))])
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}, both | ring(16, 128)


def config(method: Any, **train: Any) -> RunConfig:
    """The quickstart with another method, on this process."""
    base = recipe("quickstart")
    made = dataclasses.replace(base.train, batch=64, epochs=8, optimizer="sgd", decay="all", **train)
    none = dataclasses.replace(base.evals, names=())
    return dataclasses.replace(base, method=method, train=made, runtime="local", evals=none)


def imported(tmp_path: Path, content: Any, wanted: RunConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Import a file and read the run back: (its tensors, momentum by the method's names, what import_run said)."""
    torch.save(content, tmp_path / "paper.pth")
    said = interop.import_run(tmp_path / "paper.pth", wanted, tmp_path / "run")
    made = methods.read_config(tmp_path / "run" / "config.yaml")
    dataset = job.open_data(made)
    method = job.build_method(made, job.facts_of(made, dataset, 1), 1)
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "last")
    method.load_state_dict(saved.model)
    optimizer = optim.build_optimizer(method, made.train)
    optimizer.load_state_dict(saved.optimizer)
    names = {id(p): n for n, p in method.named_parameters()}
    momentum = {names[id(p)]: s["momentum_buffer"] for p, s in optimizer.state.items()}
    return dict(saved.model), momentum, said


def same(model: dict[str, Tensor], ours: str, theirs: dict[str, Tensor]) -> None:
    """Every tensor below ``ours`` is one of ``theirs`` and the other way round."""
    found = {k[len(ours) :]: v for k, v in model.items() if k.startswith(ours)}
    assert found.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in found.items())


def below(state: dict[str, Tensor], prefix: str, but: str = "nothing") -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix) and not k.startswith(but)}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["pcl", "moco"])
def test_pcl_and_moco(tmp_path: Path, version: int, name: str) -> None:
    content, state = pcl(version)
    options = {"clusters": (100, 200), "negatives": 8, "warmup_epochs": 1} if name == "pcl" else {}
    model, momentum, said = imported(tmp_path, content, config(methods.configure(name, **options)))
    state = below(content["state_dict"], "module.")
    for ours, theirs in (("student.", "encoder_q."), ("teacher.net.", "encoder_k.")):
        same(model, f"{ours}encoder.", below(state, theirs, f"{theirs}fc."))
        same(model, f"{ours}head.", below(state, f"{theirs}fc."))
    assert torch.equal(model["queue.keys"], state["queue"].T)
    assert (int(model["queue.pointer"]), said.step) == (64, 3 * (ROWS // 64))
    assert said.taken["method.head"] == ("linear" if version == 1 else "mlp")
    assert said.taken | {"method.dim": 16, "method.queue": 128, "model.width": WIDTH} == said.taken
    assert said.notes == []
    assert len(momentum) == len([n for n in model if n.startswith("student") and n in parameters(model)])
    for key, value in momentum.items():
        assert torch.equal(value, 10 * model[key]), key


def test_wcl_and_its_two_groups(tmp_path: Path) -> None:
    heads: dict[str, Tensor] = {}
    for name in ("head1", "head2"):
        made = networks.mlp_head(FEATURES, (24, 24), 12, bias=True)
        heads |= prefixed(f"{name}.", randomised(made.state_dict()))
    state = prefixed("module.", prefixed("net.", backbone(1)) | heads)
    names = list(parameters(state))
    bare = [n for n in names if "bn" in n or "bias" in n]
    optimizer = sgd(state, [bare, [n for n in names if n not in bare]])
    content = {"model": state, "optimizer": optimizer, "epoch": 2}
    wanted = config(methods.configure("wcl"))
    model, momentum, said = imported(tmp_path, content, wanted)
    state = below(state, "module.")
    same(model, "student.encoder.", below(state, "net."))
    same(model, "student.first.", below(state, "head1."))
    same(model, "student.second.", below(state, "head2."))
    assert all(torch.equal(v, 10 * model[k]) for k, v in momentum.items())
    assert (said.taken["method.hidden"], said.taken["method.dim"], said.notes) == (24, 12, [])


def test_clinfonce_one_head(tmp_path: Path) -> None:
    mlp = prefixed("head.", head(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 16)))
    encoder = {k.replace("downsample", "shortcut"): v for k, v in prefixed("encoder.module.", backbone(1)).items()}
    state = encoder | mlp
    content = {"model": state, "epoch": 4, "optimizer": sgd(state, [list(parameters(state))])}
    model, momentum, said = imported(tmp_path, content, config(methods.configure("clinfonce", k=50)))
    same(
        model,
        "student.encoder.",
        {k.replace("shortcut", "downsample"): v for k, v in below(encoder, "encoder.module.").items()},
    )
    same(model, "student.head.", below(mlp, "head."))
    assert all(torch.equal(v, 10 * model[k]) for k, v in momentum.items())
    assert said.notes == []


def test_sce_of_lightning(tmp_path: Path) -> None:
    def projector() -> dict[str, Tensor]:
        parts = [nn.Linear(FEATURES, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16, bias=False)]
        return prefixed("layers.", head(*parts, nn.BatchNorm1d(16, affine=False)))

    predictor = head(nn.Linear(16, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 16, bias=False))
    parts = {"trunk.": backbone(1), "projector.": projector(), "predictor.": prefixed("layers.", predictor)}
    parts |= {"momentum_trunk.": backbone(2), "momentum_projector.": projector()}
    state = {k: v for prefix, part in parts.items() for k, v in prefixed(prefix, part).items()} | ring(16, 128)
    trained = [n for n in parameters(state) if not n.startswith("momentum_")]
    content = {"epoch": 1, "global_step": 50, "state_dict": state}
    content["optimizer_states"] = [sgd(state, [trained], key="mu")]
    wanted = config(methods.configure("sce", symmetric=False))
    model, momentum, said = imported(tmp_path, content, wanted)
    same(model, "student.encoder.", parts["trunk."])
    same(model, "teacher.net.encoder.", parts["momentum_trunk."])
    numbers = {"linear1": 0, "bn1": 1, "linear2": 3, "bn2": 4}
    pairs = {"student.head.": "projector.", "teacher.net.head.": "momentum_projector.", "predictor.": "predictor."}
    for ours, theirs in pairs.items():
        assert len(below(model, ours)) == len(parts[theirs])
        for name, value in below(model, ours).items():
            layer, leaf = name.split(".")
            assert torch.equal(value, parts[theirs][f"layers.{numbers[layer]}.{leaf}"])
    assert said.step == 50
    assert said.taken["method.projector"] == [24]
    assert (said.taken["method.projector_norm"], said.taken["method.predictor"]) == (True, [48])
    assert all(torch.equal(v, 10 * model[k]) for k, v in momentum.items())
    assert any(k.startswith("predictor.") for k in momentum)


@pytest.mark.parametrize("mode", ["maskcon", "coins"])
def test_maskcon(tmp_path: Path, mode: str) -> None:
    def one(seed: int) -> dict[str, Tensor]:
        projector = head(nn.Linear(FEATURES, 20), nn.ReLU(), nn.Linear(20, 16))
        classes = randomised(nn.Linear(FEATURES, 1).state_dict())  # digits have no coarse labels
        return prefixed("net.", backbone(seed)) | prefixed("projector.", projector) | prefixed("classifer.", classes)

    state = prefixed("encoder_q.", one(1)) | prefixed("encoder_k.", one(2)) | ring(16, 128)
    state["coarse_labels"] = torch.randint(2, (128,))
    wanted = config(methods.configure("maskcon", mode=mode))
    model, momentum, said = imported(tmp_path, state, wanted)
    same(model, "student.encoder.", below(state, "encoder_q.net."))
    same(model, "teacher.net.head.", below(state, "encoder_k.projector."))
    assert torch.equal(model["queue.labels"], state["coarse_labels"])
    left = [n for n in said.notes if "classifer" in n]
    assert len(left) == (4 if mode == "maskcon" else 2)  # the momentum encoder's classifier has no place in either
    assert any("no optimiser state" in n for n in said.notes)
    assert said.step == 0
    assert all(not v.any() for v in momentum.values())
    if mode == "coins":
        same(model, "classifier.", below(state, "encoder_q.classifer."))


@pytest.mark.slow
def test_the_run_goes_on(tmp_path: Path) -> None:
    """``raycon.pretrain --resume`` trains on from the imported step to the end."""
    content, _ = pcl(2)
    torch.save(content | {"epoch": 7}, tmp_path / "paper.pth")
    wanted = config(methods.configure("moco", momentum=0.9))
    interop.import_run(tmp_path / "paper.pth", wanted, tmp_path / "run")
    assert pretrain.main(["--resume", str(tmp_path / "run"), "--log.quiet"]) == 0
    found = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert [int(p.name) for p in found] == [7 * (ROWS // 64), 8 * (ROWS // 64)]


def test_wrong_requests_leave_nothing(tmp_path: Path) -> None:
    content, _ = pcl(2)
    torch.save(content, tmp_path / "paper.pth")
    torch.save(
        {k: v for k, v in content["state_dict"].items() if "encoder_q" in k and ".fc" not in k}, tmp_path / "half.pth"
    )
    moco = config(methods.configure("moco"))
    cases: list[tuple[str, RunConfig, type[ValueError], str]] = [
        ("half.pth", moco, FileError, "encoder only, no heads: start a run from it with --model.weights"),
        ("paper.pth", config(methods.configure("wcl")), ConfigError, "'wcl': .* is of pcl or moco"),
        ("paper.pth", dataclasses.replace(moco, train=dataclasses.replace(moco.train, epochs=3, warmup_epochs=0)), ConfigError, "3 behind"),
        ("paper.pth", dataclasses.replace(moco, train=dataclasses.replace(moco.train, batch=48)), ConfigError, "queue = 128"),
        ("paper.pth", dataclasses.replace(moco, data=dataclasses.replace(moco.data, name="nowhere")), ConfigError, "nowhere"),
    ]  # fmt: skip
    for name, wanted, kind, words in cases:
        with pytest.raises(kind, match=words):
            interop.import_run(tmp_path / name, wanted, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    interop.import_run(tmp_path / "paper.pth", moco, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        interop.import_run(tmp_path / "paper.pth", moco, tmp_path / "run")


def test_an_optimiser_that_does_not_fit_is_said(tmp_path: Path) -> None:
    content, _ = pcl(1)
    content["optimizer"]["param_groups"][0]["params"].pop()
    _, momentum, said = imported(tmp_path, content, config(methods.configure("moco")))
    assert "parameters are not the file's" in said.notes[0]
    assert all(not v.any() for v in momentum.values())
