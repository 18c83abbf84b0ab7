"""Encoders in: from raycon's checkpoints, from the papers' files, from what ``raycon.export`` wrote.

    encoder, about = load_encoder("runs/quickstart/checkpoints/last")
    encoder, about = load_encoder("PCL_v2_epoch200.pth.tar")

The full state of the papers' files, to go on pretraining: ``import_run``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import raycon
from raycon import methods
from raycon.core.config import ConfigError, ModelConfig, RunConfig, from_dict, override, problems_of, save_yaml, to_dict
from raycon.evals.base import read_results
from raycon.methods.base import Method
from raycon.nn import networks, optim, published
from raycon.nn.published import FileError
from raycon.training import checkpoint, job


@dataclass(frozen=True)
class About:
    """What is known of an encoder besides its weights."""

    source: str
    """The file or directory it came from."""
    format: str
    """raycon, moco (MoCo and PCL), wcl (and Cl-InfoNCE with two heads), clinfonce, sce, maskcon, plain."""
    model: ModelConfig
    channels: int
    """C of the images it takes."""
    features: int
    """F: it gives (B, F)."""
    config: RunConfig | None = None
    """Of the raycon run, when it is one's."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a card says: method, data, epochs, step, preprocessing, evaluations, as far as it is known."""


# --- encoders ---------------------------------------------------------------------------------------------------


def load_encoder(path: str | Path, *, encoder: str = "", stem: str = "") -> tuple[nn.Module, About]:
    """The encoder in ``path``, in evaluation mode on the CPU, and what is known of it: (B, C, H, W) -> (B, F).

    path: a raycon run directory (its last checkpoint), a checkpoint directory, a folder with ``model.safetensors`` (as
    ``raycon.export`` writes for Hugging Face), a ``.safetensors`` file, or one of ``torch.save``. Format and network are
    recognised; every tensor must fit. No code of a file is run.
    encoder: the network (as ``model.encoder``), for a file that does not say it and is no ResNet. stem: small or
    small-stride2, which shapes do not tell apart (small).
    Raises FileError or checkpoint.CheckpointError naming the file, what is wrong and the remedy.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if (place / "checkpoints").is_dir():
            newest, refused = checkpoint.newest(place / "checkpoints")
            if newest is None:
                raise FileError(f"{place}: no readable checkpoint in this run: {'; '.join(refused) or 'there is none'}")
            return _of_checkpoint(newest)
        if (place / checkpoint.STATE).is_file():
            return _of_checkpoint(place.resolve())
        if not (place / checkpoint.MODEL).is_file():
            raise FileError(f"{place}: neither a run, nor a checkpoint, nor a folder with {checkpoint.MODEL}")
        return _of_file(place / checkpoint.MODEL, card_of(place), encoder, stem)
    return _of_file(place, card_of(place), encoder, stem)


def _of_checkpoint(path: Path) -> tuple[nn.Module, About]:
    saved = checkpoint.load(path)
    run_dir = path.parent.parent
    if not (run_dir / "config.yaml").is_file():
        raise FileError(f"{run_dir}: no config.yaml, which says what network {path.name} is of; keep the run together")
    config = methods.read_config(run_dir / "config.yaml")
    for prefix in ("student.encoder.", "network."):
        state = {k[len(prefix) :]: v for k, v in saved.model.items() if k.startswith(prefix)}
        if state:
            break
    else:
        raise FileError(f"{path}: method {config.method.name!r} keeps no encoder under a known name")
    channels = _channels(state)
    net = networks.build_encoder(replace(config.model, weights=""), channels)
    _fill(net, state, str(path))
    known: dict[str, Any] = {"method": config.method.name, "data": config.data.name, "step": saved.step}
    known |= {"epochs": saved.state.get("epoch"), "preprocessing": _preprocessing(config)}
    known |= {"evaluations": _evaluations(run_dir, saved.step)}
    return net.eval(), About(str(path), "raycon", config.model, channels, _width(net), config, known)


def _of_file(file: Path, card: Mapping[str, Any], encoder: str, stem: str) -> tuple[nn.Module, About]:
    content = published.read(file)
    said = card.get("encoder", {})
    encoder = encoder or str(said.get("name", ""))
    if encoder and encoder not in networks._RESNETS:
        kind, state = published.encoder_for(content, str(file))
        model, channels = ModelConfig(encoder=encoder), int(said.get("channels", 3))
    else:
        found = published.recognise(content, str(file), stem or str(said.get("stem", "")))
        kind, state, model, channels = found.format, found.encoder, found.model, found.channels
        if encoder and encoder != model.encoder:
            raise FileError(f"{file}: encoder = {encoder!r}, but the tensors are of a {model.encoder}")
    try:
        net = networks.build_encoder(model, channels)
    except ConfigError as error:
        raise FileError(f"{file}: {error.problems[0]}") from None
    _fill(net, state, str(file))
    epoch = content.get("epoch")
    known: dict[str, Any] = {k: card[k] for k in ("method", "data", "epochs", "step", "preprocessing", "evaluations")
                             if k in card}  # fmt: skip
    if isinstance(epoch, int) and "epochs" not in known:
        known["epochs"] = epoch
    config = None
    if isinstance(card.get("config"), Mapping):
        try:
            config = from_dict(card["config"], methods.options(card["config"]["method"]["name"]))
        except (ConfigError, KeyError, TypeError):
            config = None  # a card of another version of raycon: the weights are what matters
    return net.eval(), About(str(file), kind, model, channels, _width(net), config, known)


def _fill(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put an encoder's tensors in, all of them and nothing else (a classifier and missing BatchNorm counters aside)."""
    own = net.state_dict()
    if isinstance(net, networks._Classifier) and not any(k.startswith("net.") for k in state):
        state = {f"net.{k}": v for k, v in state.items()}
    counters = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")}  # files of old do not have them
    missing = [k for k in own if k not in state and k not in counters]
    wrong = [k for k, v in state.items() if k in own and v.shape != own[k].shape]
    unknown = [k for k in state if k not in own and not k.removeprefix("net.").startswith(_CLASSIFIERS)]
    problems = [f"{len(names)} tensors {what}, the first is {names[0]}" for what, names in
                (("missing", missing), ("of another shape", wrong), ("unknown", unknown)) if names]  # fmt: skip
    if problems:
        raise FileError(
            f"{source}: not the {getattr(net, 'name', '') or type(net).__name__} expected: {'; '.join(problems)}"
        )
    net.load_state_dict(counters | {k: v for k, v in state.items() if k in own})


_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.")


def _width(net: nn.Module) -> int:
    return int(net.features)  # type: ignore[arg-type]


def _channels(state: Mapping[str, Tensor]) -> int:
    """C, from the first convolution of the state dict."""
    return next((int(v.shape[1]) for v in state.values() if v.ndim == 4), 3)


def _folder_card(folder: Path) -> dict[str, Any]:
    """The card in the config.json of a folder, as ``raycon.export --format hf`` writes it; {} when there is none."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = content.get("raycon") if isinstance(content, dict) else None
    if isinstance(found, dict):
        return found if published.sane(found) else {}
    if isinstance(content, dict) and "architecture" in content:
        name = str(content["architecture"])
        return {"encoder": {"name": name if name in networks._RESNETS else f"timm:{name}"}}
    return {}


def _evaluations(run_dir: Path, step: int) -> dict[str, float]:
    """The numbers of the run's own evaluations of a step."""
    numbers: dict[str, float] = {}
    for entry in read_results(run_dir / "evaluations.json"):
        if entry.get("step") == step and "control" not in entry:
            numbers |= entry.get("results", {})
    return numbers


def _preprocessing(config: RunConfig) -> dict[str, Any]:
    """How images are prepared for the encoder; mean and std are the data set's and missing when it is not here."""
    size = config.data.size
    views = importlib.import_module("raycon.nn.views")
    spec = views.eval_spec(size, (0.0,), (1.0,))
    found = {"size": size, "resize": spec.resize, "interpolation": "bilinear"}
    try:
        dataset = job.open_data(config)
    except (ConfigError, OSError, ImportError):
        return found
    return found | {"mean": list(dataset.mean), "std": list(dataset.std)}


def card_of(path: Path) -> dict[str, Any]:
    """The card in or beside an exported file, or in an exported folder; {} when there is none."""
    if path.is_dir():
        return _folder_card(path)
    return published.card_in(path) if path.is_file() else {}


@dataclass(frozen=True)
class Preparation:
    """How images are made ready for an encoder: centre crops of ``size`` pixels, normalised per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    known: bool
    """False: nobody said it, and ImageNet's numbers stand in (0.5 for grey images)."""


def preparation(about: About) -> Preparation:
    said = about.facts.get("preprocessing") or {}
    mean = said.get("mean") or ((0.485, 0.456, 0.406) if about.channels == 3 else (0.5,) * about.channels)
    std = said.get("std") or ((0.229, 0.224, 0.225) if about.channels == 3 else (0.5,) * about.channels)
    return Preparation(int(said.get("size") or 224), tuple(mean), tuple(std), "mean" in said and "std" in said)


def card(about: About) -> dict[str, Any]:
    """What a card says of an encoder: plain JSON; paths and names of this machine are left out."""
    model = {"name": about.model.encoder, "width": about.model.width, "stem": about.model.stem}
    model |= {"channels": about.channels, "features": about.features}
    found: dict[str, Any] = {"raycon": raycon.__version__, "format": about.format, "encoder": model, **about.facts}
    if about.config is not None:
        tree = to_dict(about.config)
        tree.pop("run")
        tree["data"] |= {"root": "", "cache": ""}
        tree["model"]["weights"] = Path(tree["model"]["weights"]).name
        found["config"] = tree
    return found


# --- the full state ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What became of a paper's file."""

    run_dir: Path
    step: int
    """Steps done, from which the run goes on."""
    taken: dict[str, Any]
    """Options that the file decides, by dotted name."""
    notes: list[str]
    """What the file has that has no place in the run, and what it does not have: every tensor is accounted for."""


_METHODS = {"moco": ("pcl", "moco"), "wcl": ("wcl", "clinfonce"), "clinfonce": ("clinfonce",), "sce": ("sce",),
            "maskcon": ("maskcon",)}  # fmt: skip
"""The methods whose state a format can be."""


def import_run(source: str | Path, config: RunConfig, run_dir: Path) -> Imported:
    """Make ``run_dir`` a run that goes on where a paper's file stopped: networks, momentum encoder, queue, optimiser.

    Sizes (encoder, widths, queue, heads) are the file's; the rest is ``config``'s, and its data must be here, for they
    say how many steps an epoch has. The position is the file's ``global_step``, or its ``epoch`` times the steps.
    Go on with ``python -m raycon.pretrain --resume RUN_DIR``. What cannot be in the file (the clustering of PCL, the
    order of the data) starts anew.
    Raises FileError, or ConfigError naming every problem; nothing is written then.
    """
    file = Path(source).expanduser()
    content = published.read(file)
    found = published.recognise(content, str(file), config.model.stem if config.model.stem != "imagenet" else "")
    if found.format not in _METHODS or not _heads(found):
        raise FileError(
            f"{file} ({found.format}) holds an encoder only, no heads: start a run from it with --model.weights {file}"
        )
    if config.method.name not in _METHODS[found.format]:
        raise ConfigError(
            [f"method.name = {config.method.name!r}: {file} is of {' or '.join(_METHODS[found.format])}; "
             "choose a recipe of such a method"]
        )  # fmt: skip
    if (run_dir / "checkpoints").exists():
        raise ConfigError([f"{run_dir} holds a run already: give another directory"])
    taken = options_of(found, config.method.name)
    config = override(config, {**taken, "model.weights": "", "run.dir": str(run_dir.absolute())})
    dataset = job.open_data(config)
    facts = job.facts_of(config, dataset, 1)
    if problems := problems_of(config, facts):
        raise ConfigError([f"with what {file} says: {p}" for p in problems])
    if len(dataset.mean) != found.channels:
        raise ConfigError(
            [f"data.name = {config.data.name!r} has {len(dataset.mean)} channels, {file} {found.channels}"]
        )
    per_epoch = facts.rows // config.train.batch
    steps, step = config.train.epochs * per_epoch, _position(content, per_epoch, file)
    if step >= steps:
        raise ConfigError(
            [f"train.epochs = {config.train.epochs}: {file} has {step / per_epoch:g} behind it; give more"]
        )
    method = job.build_method(config, facts, found.channels)
    notes = _fill_method(method, found, file)
    optimizer = optim.build_optimizer(method, config.train)
    notes += _fill_optimizer(optimizer, method, found, content, config)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_yaml(config, run_dir / "config.yaml")
    state = {"step": step, "epoch": step // per_epoch, "steps": steps, "per_epoch": per_epoch, "world": 1}
    more = {"method": config.method.name, "seed": config.seed, "evaluate": False, "imported": file.name}
    checkpoint.save(run_dir / "checkpoints", method, optimizer, None, state | more)
    return Imported(run_dir, step, taken, notes)


def _heads(found: published.Found) -> bool:
    """Are there tensors besides the encoder's?"""
    first = {"moco": "encoder_q.fc.", "maskcon": "encoder_q.projector.", "sce": "projector.", "clinfonce": "head."}
    return any(k.startswith(first.get(found.format, "head1.")) for k in found.tensors)


def _position(content: Mapping[str, Any], per_epoch: int, file: Path) -> int:
    if isinstance(content.get("global_step"), int):  # Lightning counts optimiser steps, its epoch is one behind
        return int(content["global_step"])
    epoch = content.get("epoch")
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        return 0  # MaskCon's code saved none: its state dict alone says no position
    return epoch * per_epoch


def options_of(found: published.Found, method: str) -> dict[str, Any]:
    """The options that the shapes in a file decide, by dotted name."""
    t = found.tensors
    taken: dict[str, Any] = {"model.encoder": found.model.encoder, "model.width": found.model.width,
                             "model.stem": found.model.stem}  # fmt: skip
    if found.format == "moco":
        mlp = "encoder_q.fc.2.weight" in t
        last = t["encoder_q.fc.2.weight" if mlp else "encoder_q.fc.weight"]
        taken |= {"method.head": "mlp" if mlp else "linear", "method.dim": len(last)}
    elif found.format == "wcl":
        taken |= {"method.dim": len(t["head1.linear3.weight"]), "method.hidden": len(t["head1.linear1.weight"])}
        taken |= {"method.form": "dual"} if method == "clinfonce" else {}
    elif found.format == "clinfonce":
        taken |= {"method.dim": len(t["head.2.weight"]), "method.form": "single"}
    elif found.format == "maskcon":
        taken |= {"method.dim": len(t["encoder_q.projector.2.weight"])}
        taken |= {"method.hidden": len(t["encoder_q.projector.0.weight"])}
    elif found.format == "sce":
        projector, predictor = _layers(t, "projector"), _layers(t, "predictor")
        taken |= {"method.projector": projector[:-1], "method.dim": projector[-1], "method.predictor": predictor[:-1]}
        end = max(int(k.split(".")[2]) for k in t if k.startswith("projector.layers."))
        taken["method.projector_norm"] = f"projector.layers.{end}.running_mean" in t
    if "queue" in t and found.format != "wcl":
        taken["method.queue"] = int(t["queue"].shape[1])
    return taken


def _layers(tensors: Mapping[str, Tensor], head: str) -> list[int]:
    """The output widths of the Linear layers of one of SCE's heads, in order."""
    found = {int(k.split(".")[2]): len(v) for k, v in tensors.items()
             if k.startswith(f"{head}.layers.") and v.ndim == 2}  # fmt: skip
    return [found[i] for i in sorted(found)]


def _fill_method(method: Method, found: published.Found, file: Path) -> list[str]:
    """Put every tensor of a file into the method. Raises FileError when one is missing or does not fit."""
    own = method.state_dict()
    given: dict[str, Tensor] = {}
    notes = []
    for name, value in found.tensors.items():
        place = our_name(name, found.format, method)
        if place is None or place not in own:
            notes.append(f"{name} {tuple(value.shape)} has no place in method {type(method).__name__} and is left out")
        elif place.endswith("queue.keys"):
            given[place] = value.T.contiguous()
        elif place.endswith("queue.pointer"):
            given[place] = value.reshape(())
        else:
            given[place] = value
    wrong = [f"{k} {tuple(v.shape)}, not {tuple(own[k].shape)}" for k, v in given.items() if v.shape != own[k].shape]
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    if wrong or missing:
        first = f"of another shape: {wrong[0]}" if wrong else f"missing: {missing[0]}"
        raise FileError(f"{file}: {len(wrong) + len(missing)} tensors of the method do not come from it, {first}")
    method.load_state_dict(own | given)
    return notes


def our_name(name: str, kind: str, method: Method) -> str | None:
    """The name in the method of a tensor of a file of format ``kind``; None where there is none."""
    if name == "queue":
        return "queue.keys"
    if name == "queue_ptr":
        return "queue.pointer"
    if name == "coarse_labels":
        return "queue.labels"
    inner = "net." if isinstance(method.encoder(), networks._Classifier) else ""
    for theirs, ours in _PLACES[kind].items():
        if name.startswith(theirs):
            rest = name[len(theirs) :]
            if kind == "sce" and rest.startswith("layers."):
                _, number, leaf = rest.split(".")
                part = method.get_submodule(ours.rstrip("."))
                names = [n for n, _ in part.named_children()]
                return f"{ours}{names[int(number)]}.{leaf}" if int(number) < len(names) else None
            if ours.endswith("encoder."):
                rest = inner + rest.replace("shortcut.", "downsample.")
            return ours + rest
    return None


_PLACES = {
    "moco": {
        "encoder_q.fc.": "student.head.",
        "encoder_k.fc.": "teacher.net.head.",
        "encoder_q.": "student.encoder.",
        "encoder_k.": "teacher.net.encoder.",
    },
    "maskcon": {
        "encoder_q.net.": "student.encoder.",
        "encoder_q.projector.": "student.head.",
        "encoder_q.classifer.": "classifier.",
        "encoder_k.net.": "teacher.net.encoder.",
        "encoder_k.projector.": "teacher.net.head.",
    },
    "wcl": {"net.": "student.encoder.", "head1.": "student.first.", "head2.": "student.second."},
    "clinfonce": {"encoder.": "student.encoder.", "head.": "student.head."},
    "sce": {
        "trunk.": "student.encoder.",
        "projector.": "student.head.",
        "predictor.": "predictor.",
        "momentum_trunk.": "teacher.net.encoder.",
        "momentum_projector.": "teacher.net.head.",
    },
}
"""Per format, what a name begins with and what that is here; the first that fits."""


def _fill_optimizer(
    optimizer: torch.optim.Optimizer,
    method: Method,
    found: published.Found,
    content: Mapping[str, Any],
    config: RunConfig,
) -> list[str]:
    """The momentum of each parameter out of a file, when it has any. Returns what was not taken and why."""
    states = content.get("optimizer_states")
    state = states[0] if isinstance(states, list) and states else content.get("optimizer")
    if not isinstance(state, Mapping) or "state" not in state or "param_groups" not in state:
        return ["the file holds no optimiser state: momentum starts at zero"]
    if config.train.optimizer == "adamw":
        return ["train.optimizer = adamw has no use for the momentum in the file: it starts anew"]
    names = [n for n, v in found.tensors.items() if not n.endswith(("running_mean", "running_var"))
             and v.is_floating_point() and n not in ("queue", "queue_ptr")]  # fmt: skip
    trained = [n for n in names if not n.startswith("momentum_")] if found.format == "sce" else names
    groups = [list(g["params"]) for g in state["param_groups"]]
    order = _order(trained, [len(g) for g in groups])
    if order is None:
        sizes = " + ".join(str(len(g)) for g in groups)
        return [f"the optimiser's {sizes} parameters are not the file's {len(trained)}: momentum starts at zero"]
    parameters = dict(method.named_parameters())
    ours = {id(p) for g in optimizer.param_groups for p in g["params"]}
    notes, moving = [], []
    for index, name in zip((i for g in groups for i in g), order, strict=True):
        entry = state["state"].get(index, {})
        value = next((entry[k] for k in ("momentum_buffer", "mu") if isinstance(entry.get(k), Tensor)), None)
        parameter = parameters.get(our_name(name, found.format, method) or "")
        if value is None or parameter is None or id(parameter) not in ours:
            continue  # no gradient ever reached it (a teacher's), or it has no place, which is noted already
        if value.shape != parameter.shape:
            return [
                f"the momentum of {name} has shape {tuple(value.shape)}: the order is not known, all starts at zero"
            ]
        moving.append((parameter, value))
    for parameter, value in moving:
        optimizer.state[parameter]["momentum_buffer"] = value.to(parameter.dtype).clone()
    if len(moving) < len(ours):
        notes.append(f"{len(ours) - len(moving)} of {len(ours)} parameters have no momentum in the file: zero")
    return notes


def _order(names: list[str], sizes: list[int]) -> list[str] | None:
    """The file's parameters in the optimiser's order: one group as they come, or WCL's two, split by name."""
    if sizes == [len(names)]:
        return names
    bare = [n for n in names if "bn" in n or "bias" in n]
    plain = [n for n in names if not ("bn" in n or "bias" in n)]
    for parts in ((plain, bare), (bare, plain)):
        if sizes == [len(p) for p in parts]:
            return parts[0] + parts[1]
    return None
