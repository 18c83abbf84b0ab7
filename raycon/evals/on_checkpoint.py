"""Evaluate a checkpoint of a run: build its encoder, extract features once, run evaluations, keep the numbers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from raycon import methods
from raycon.core import log
from raycon.core.config import Facts, RunConfig, from_dict
from raycon.core.types import LoaderPlan
from raycon.evals import features
from raycon.evals.base import FeatureSets, Outcome, append_results, run_all


def read_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run. Raises ConfigError for unknown options, FileNotFoundError without a run."""
    tree = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    return from_dict(tree, methods.options(tree["method"]["name"]))


def evaluate(
    run_dir: Path, checkpoint: Path, names: Iterable[str] = (), device: torch.device | None = None, threads: int = 0
) -> dict[str, Any]:
    """Evaluate ``checkpoint`` of ``run_dir``; ``names`` empty: those of the configuration.

    Adds the entry to evaluations.json and a line to metrics.jsonl, and returns it.
    """
    from raycon.training import checkpoint as checkpoints  # a sibling on this floor, for its file format

    if threads:
        torch.set_num_threads(threads)
    config = read_config(run_dir)
    saved = checkpoints.load(checkpoint)
    device = device or torch.device("cpu")
    train, test = open_sets(config)
    encoder = build_encoder(config, train, saved.model).to(device)
    sets = extract(config, encoder, train, test, run_dir, device)
    entry = {"step": saved.step, "epoch": saved.state["epoch"], "checkpoint": checkpoint.name}
    return keep(run_dir, entry, run_all(names or config.evals.names, config.evals, sets, config.seed))


def controls(run_dir: Path, names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The same evaluations of raw pixels and of the encoder before training: what any result is held against."""
    config = read_config(run_dir)
    train, test = open_sets(config)
    entries = []
    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels": lambda x: features.pixels(x, train.mean, train.std),
        "untrained": build_encoder(config, train, None),
    }
    for control, encoder in encoders.items():
        sets = extract(config, encoder, train, test, run_dir, torch.device("cpu"))
        entry = {"step": 0, "epoch": 0, "checkpoint": "", "control": control}
        entries.append(keep(run_dir, entry, run_all(names or config.evals.names, config.evals, sets, config.seed)))
    return entries


def keep(run_dir: Path, entry: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
    entry |= {"results": outcome.results, "failed": outcome.failed, "seconds": outcome.seconds}
    append_results(run_dir / "evaluations.json", entry)
    line = {"kind": "evaluation", "step": entry["step"], "epoch": entry["epoch"], **outcome.results}
    log.append_line(run_dir / "metrics.jsonl", line | ({"control": entry["control"]} if "control" in entry else {}))
    return entry


def open_sets(config: RunConfig) -> tuple[Any, Any]:
    """The train split and the test split (None where the data set has none).

    With ``data.validation``, the rows held out of training stand in for the test split, which is not opened.
    """
    if config.data.validation:
        from raycon.training import job

        return job.open_data(config), job.open_data(config, "validation")
    datasets = importlib.import_module("raycon.data_loaders.datasets")
    train = datasets.open_dataset(config.data.name, config.data.root, "train")
    try:
        return train, datasets.open_dataset(config.data.name, config.data.root, "test")
    except ValueError:
        return train, None


def build_encoder(config: RunConfig, dataset: Any, state: dict[str, Tensor] | None) -> nn.Module:
    """The encoder of a run: from a checkpoint's tensors, or as it was before training."""
    from raycon.nn import networks

    torch.manual_seed(config.seed)
    encoder = networks.build_encoder(replace(config.model, weights=""), len(dataset.mean))
    classes = len(dataset.weak_classes) or int(dataset.weak.max(initial=-1)) + 1
    facts = Facts(len(dataset), classes, dataset.image, config.train.batch, 1, config.data.size, config.train.epochs)
    method = methods.module(config.method.name).build(config.method, encoder, facts)
    if state is not None:
        method.load_state_dict(state)
    trained: nn.Module = method.encoder()
    return trained.eval()


def extract(
    config: RunConfig, encoder: Callable[[Tensor], Tensor], train: Any, test: Any, run_dir: Path, device: torch.device
) -> FeatureSets:
    from raycon.nn import views

    loaders = importlib.import_module("raycon.data_loaders")
    spec = views.eval_spec(config.data.size, train.mean, train.std)

    def scan(dataset: Any) -> Any:
        cache = Path(config.data.cache or run_dir.parent / ".cache")
        plan = LoaderPlan(
            specs=(), eval_spec=spec, batch=min(512, len(dataset)), seed=0, rank=0, world=1, device=device, cache=cache
        )
        return loaders.open_loader("torch", dataset, plan).scan()

    train_label = torch.as_tensor(train.label)
    if test is None:
        return features.extract_sets(encoder, scan(train), train_label)
    return features.extract_sets(encoder, scan(train), train_label, scan(test), torch.as_tensor(test.label))


def last_entry(run_dir: Path) -> dict[str, Any] | None:
    """The newest evaluation of the run itself."""
    file = run_dir / "evaluations.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    own = [e for e in entries if "control" not in e]
    return max(own, key=lambda e: e["step"]) if own else None
