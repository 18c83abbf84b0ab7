"""Wrong options of every program: each is refused with the option, the value and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raycon import methods
from raycon.core.config import override, save_yaml

from .conftest import small

Refused = Callable[[str, list[str]], str]

QUICK = ["quickstart", "--runtime", "local"]

PRETRAIN: list[tuple[list[str], list[str]]] = [
    (["quickstrat"], ["no recipe 'quickstrat'", "did you mean 'quickstart'"]),
    ([], ["give one of RECIPE"]),
    (["quickstart", "--resume", "x"], ["give one of RECIPE"]),
    (["quickstart", "--method.tau", "0.1"], ["--method.tau"]),
    (["quickstart", "--train.epochs", "many"], ["--train.epochs", "many"]),
    (["quickstart", "--data.loader", "turbo"], ["--data.loader", "turbo", "torch"]),
    (["quickstart", "--runtime", "slurm"], ["--runtime", "slurm", "local"]),
    ([*QUICK, "--train.epochs", "0"], ["train.epochs = 0", "give 1 or more"]),
    ([*QUICK, "--train.batch", "0"], ["train.batch = 0", "give 2 or more"]),
    (["quickstart", "--scaling.workers", "0"], ["scaling.workers = 0", "give 1 or more"]),
    ([*QUICK, "--train.batch", "1000000"], ["train.batch = 1000000", "1437 images"]),
    ([*QUICK, "--train.lr", "inf"], ["train.lr = inf", "finite"]),
    ([*QUICK, "--train.lr", "-0.1"], ["train.lr = -0.1", "above 0"]),
    ([*QUICK, "--train.weight-decay", "nan"], ["train.weight_decay = nan", "finite"]),
    ([*QUICK, "--train.momentum", "1"], ["train.momentum = 1.0", "momentum < 1"]),
    ([*QUICK, "--train.warmup-epochs", "500"], ["train.warmup_epochs = 500", "train.epochs = 100"]),
    ([*QUICK, "--train.accumulate", "3"], ["train.accumulate = 3", "give a multiple of 3"]),
    ([*QUICK, "--train.clip", "-1"], ["train.clip = -1", "give 0 (off) or more"]),
    ([*QUICK, "--data.size", "1"], ["data.size = 1", "4 pixels or more"]),
    ([*QUICK, "--data.validation", "1.5"], ["data.validation = 1.5", "share"]),
    ([*QUICK, "--data.workers", "-2"], ["data.workers = -2", "0 or more"]),
    ([*QUICK, "--data.name", "digitz"], ["data.name = 'digitz'", "did you mean 'digits'"]),
    ([*QUICK, "--data.views", "mocov9"], ["data.views = mocov9", "mocov2"]),
    ([*QUICK, "--model.encoder", "resnet51"], ["model.encoder = 'resnet51'"]),
    ([*QUICK, "--model.width", "0"], ["model.width = 0", "1 or more"]),
    ([*QUICK, "--mining.shards", "0"], ["mining.shards = 0", "1 or more"]),
    ([*QUICK, "--mining.recall", "2"], ["mining.recall = 2", "at most 1"]),
    ([*QUICK, "--mining.gpus", "1"], ["mining.gpus = 1", "--mining.device gpu"]),
    ([*QUICK, "--mining.lag", "2"], ["mining.lag = 2", "give 0"]),
    ([*QUICK, "--evals.names", "svn"], ["evals.names", "'svn'", "svm"]),
    ([*QUICK, "--evals.knn-k", "0"], ["evals.knn_k", "1 or more"]),
    ([*QUICK, "--evals.names", "detection"], ["--evals.coco FOLDER"]),
    ([*QUICK, "--evals.names", "knn@digitz"], ["knn@digitz", "did you mean 'digits'"]),
    ([*QUICK, "--evals.names", "finetune:1", "--evals.label-list", "no.txt"], ["evals.label_list", "no.txt", "no such file"]),
    ([*QUICK, "--evals.workers", "0"], ["evals.workers = 0", "1 or more"]),
    ([*QUICK, "--evals.svm-costs", "-1"], ["evals.svm_costs has -1", "above 0"]),
    ([*QUICK, "--checkpoint.keep", "-1"], ["checkpoint.keep = -1", "0 (all) or more"]),
    ([*QUICK, "--log.every-steps", "0"], ["log.every_steps = 0", "1 or more"]),
    ([*QUICK, "--scaling.max-failures", "-2"], ["scaling.max_failures = -2", "-1 (no limit)"]),
    (["quickstart", "--scaling.timeout-s", "0"], ["scaling.timeout_s = 0.0", "above 0"]),
    (["quickstart", "--scaling.wait-s", "-1"], ["scaling.wait_s = -1.0", "above 0"]),
    (["quickstart", "--scaling.resize-s", "nan"], ["scaling.resize_s = nan", "finite"]),
    (["quickstart", "--scaling.workers", "4:2"], ["--scaling.workers 4:2", "MIN:MAX"]),
    (["quickstart", "--scaling.min-workers", "3"], ["scaling.min_workers = 3", "from 0 to 2"]),
    (["quickstart", "--scaling.cpus-per-worker", "-1"], ["scaling.cpus_per_worker = -1.0", "0 or more"]),
    (["quickstart", "--scaling.cpus-per-worker", "0"], ["scaling.cpus_per_worker = 0", "above 0"]),
    (["quickstart", "--scaling.gpus-per-worker", "-2"], ["scaling.gpus_per_worker = -2.0", "0 or more"]),
    (["quickstart", "--scaling.workers", "1:2", "--scaling.cpus-per-worker", "0.5"], ["scaling.cpus_per_worker = 0.5", "whole number"]),
    (["quickstart", "--scaling.threads", "0"], ["scaling.threads = 0", "1 or more"]),
    ([*QUICK, "--evals.cpus", "-1"], ["evals.cpus = -1", "0 or more"]),
    ([*QUICK, "--mining.cpus", "-1"], ["mining.cpus = -1", "0 or more"]),
    (["quickstart", "--scaling.workers", "3"], ["train.batch = 128", "give a multiple of 3"]),
    ([*QUICK, "--method.temperature", "0"], ["method.temperature = 0", "above 0"]),
    ([*QUICK, "--method.momentum", "1.2"], ["method.momentum = 1.2", "from 0 to 1"]),
    ([*QUICK, "--method.queue", "100"], ["method.queue = 100", "multiple of train.batch", "give 128"]),
    ([*QUICK, "--method.negatives", "60"], ["method.negatives = 60", "smallest k = 60"]),
    ([*QUICK, "--method.clusters", "60", "5000"], ["k = 5000", "1437 images", "smaller k"]),
    ([*QUICK, "--model.weights", "nowhere.pth"], ["model.weights", "nowhere.pth", "no such file"]),
    ([*QUICK, "--model.weights", "torchvision:BEST"], ["model.weights", "torchvision:BEST"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), PRETRAIN, ids=[" ".join(a) or "nothing" for a, _ in PRETRAIN])
def test_pretrain(arguments: list[str], words: list[str], refused: Refused) -> None:
    said = refused("pretrain", arguments)
    for word in words:
        assert word in said, said


METHODS = [
    ("sce", {"coefficient": 1.5}, ["method.coefficient = 1.5", "from 0 to 1"]),
    ("sce", {"coefficient": -0.1}, ["method.coefficient = -0.1", "from 0 to 1"]),
    ("sce", {"temperature": -1.0}, ["method.temperature = -1.0", "above 0"]),
    ("sce", {"teacher_temperature": 0.0}, ["method.teacher_temperature = 0.0", "above 0"]),
    ("sce", {"queue": 100}, ["method.queue = 100", "keys of a step", "give 128"]),
    ("sce", {"mask": "labels"}, ["needs weak labels", "data.name = 'digits' has none"]),
    ("sce", {"mask": "clusters", "clusters": 9999}, ["method.clusters has k = 9999", "1437 images"]),
    ("sce", {"views": ("weak",)}, ["method.views", "two or more"]),
    ("maskcon", {"weight": 1.5}, ["method.weight = 1.5", "from 0 to 1"]),
    ("maskcon", {"weight": -0.5}, ["method.weight = -0.5", "from 0 to 1"]),
    ("maskcon", {"weight": 1.0}, ["'maskcon' needs weak labels", "data.name = 'digits' has none"]),
    ("maskcon", {"soft_temperature": 0.0}, ["method.soft_temperature = 0.0", "above 0"]),
    ("supcon", {}, ["'supcon' needs weak labels"]),
    ("supervised", {}, ["'supervised' needs weak labels"]),
    ("wcl", {"crops": 2, "neighbours": 5000}, ["method.neighbours = 5000", "1436"]),
    ("clinfonce", {"k": 0}, ["method.k has k = 0", "1 or more"]),
    ("clinfonce", {"clusters": "column"}, ["method.table = ''", "CSV"]),
    ("clinfonce", {"clusters": "labels"}, ["needs weak labels"]),
    ("nnclr", {"queue": 130}, ["method.queue = 130", "give 128"]),
    ("simclr", {"temperature": 0.0}, ["method.temperature = 0.0", "above 0"]),
    ("mocov3", {"views": ("strong-alpha", "strong-beta")}, ["strong-alpha", "digits"]),
]


@pytest.mark.parametrize(("name", "options", "words"), METHODS, ids=[f"{n} {o}" for n, o, _ in METHODS])
def test_methods(name: str, options: dict[str, object], words: list[str], place: Path, refused: Refused) -> None:
    import dataclasses

    fit = {"queue": 512} if any(f.name == "queue" for f in dataclasses.fields(methods.options(name))) else {}
    config = dataclasses.replace(small(), method=methods.configure(name, **(fit | options)))
    save_yaml(config, place / "config.yaml")
    said = refused("pretrain", ["--config", "config.yaml"])
    for word in words:
        assert word in said, said


def test_small_crops_wider_than_the_images(place: Path, refused: Refused) -> None:
    import dataclasses

    base = override(small(), {"data.size": 96})
    config = dataclasses.replace(base, method=methods.configure("wcl", crops=2, hidden=16))
    save_yaml(config, place / "config.yaml")
    said = refused("pretrain", ["--config", "config.yaml"])
    for word in ("data.size = 96", "'neighbour'", "41 pixels", "images' 8", "smaller size"):
        assert word in said, said


def test_all_that_is_wrong_comes_at_once(refused: Refused) -> None:
    said = refused("pretrain", [*QUICK, "--train.batch=63", "--method.temperature=-1", "--data.views=x", "--evals.names", "y",
                                "--model.encoder=z", "--checkpoint.keep=-3"])  # fmt: skip
    for word in ("method.temperature", "data.views", "evals.names", "model.encoder", "checkpoint.keep"):
        assert word in said, said


OTHERS: list[tuple[str, list[str], list[str]]] = [
    ("evaluate", [], ["give a CHECKPOINT"]),
    ("evaluate", ["nowhere", "knn"], ["nowhere", "no such run"]),
    ("evaluate", ["run", "kmn"], ["'kmn'", "knn"]),
    ("evaluate", ["run", "linear:better"], ["linear:better", "linear:pcl"]),
    ("evaluate", ["run", "knn", "--evals.knn-k", "x"], ["--evals.knn-k", "x"]),
    ("evaluate", ["run", "lowshot", "--evals.shots", "0"], ["evals.shots has 0", "1 or more"]),
    ("evaluate", ["run", "knn", "--threads", "0"], ["threads = 0", "1 or more"]),
    (
        "evaluate",
        ["run", "knn", "--runtime", "local", "--out", "no/such/file.json"],
        ["no/such/file.json", "--out FILE"],
    ),
    ("evaluate", ["run", "knn@digitz", "--runtime", "local"], ["digitz", "did you mean 'digits'"]),
    ("evaluate", ["run", "detection", "--runtime", "local"], ["--evals.coco FOLDER"]),
    ("embed", ["run"], ["give CHECKPOINT and DATASET", "got 1"]),
    ("embed", ["nowhere", "digits"], ["nowhere", "no such run"]),
    ("embed", ["run", "digitz"], ["digitz", "did you mean 'digits'"]),
    ("embed", ["run", "digits", "--part", "0"], ["part = 0", "1 or more"]),
    ("embed", ["run", "digits", "--split", "dev"], ["'dev'", "train"]),
    ("embed", ["run", "digits", "--format", "csv"], ["--format", "csv", "npy"]),
    ("embed", ["run", "digits", "--out", "run"], ["--out run exists", "another folder"]),
    ("export", ["nowhere"], ["nowhere", "no such file"]),
    ("export", ["run", "--format", "tflite"], ["--format", "tflite", "onnx"]),
    ("export", ["run", "--size", "-3"], ["--size -3", "above 0"]),
    ("export", ["run", "--push", "a/b"], ["--push is for --format hf"]),
    ("export", ["run", "--recipe", "quickstart"], ["--recipe is for --format run"]),
    ("export", ["run", "--formt", "onnx"], ["--formt"]),
    ("export", ["run", "--format", "timm", "--out", "x.pth"], ["--format timm", "width 2", "safetensors"]),
    ("export", ["run", "--out", "run/config.yaml"], ["run/config.yaml", "--overwrite"]),
    ("export", ["run", "--format", "run"], ["--recipe", "--out"]),
    ("data", ["digitz"], ["digitz", "did you mean 'digits'"]),
    ("data", ["digits", "--split", "dev"], ["'dev'", "train"]),
    ("data", ["digits", "--check", "-5"], ["--check", "-5"]),
    ("data", ["digits", "--roots", "x"], ["--roots"]),
    ("data", ["image-folder"], ["image-folder", "--data.root"]),
    ("data", ["image-folder", "--data.root", "nowhere"], ["nowhere"]),
    ("data", ["image-list"], ["data.listing is not given", "train.txt"]),
    ("data", ["image-list", "--data.listing", "no.txt"], ["no.txt", "no such file"]),
    ("data", ["cifar100"], ["--data.root", "cifar-100-python"]),
    ("data", ["write-ffcv", "digits"], ["--out FILE", "--data.cache"]),
    ("data", ["write-ffcv", "digits", "--out", "x.beton", "--workers", "0"], ["--workers 0", "1 or more"]),
    ("runs", ["list", "nowhere"], ["nowhere", "no such folder"]),
    ("runs", ["list", ".", "--where", "loss"], ["--where 'loss'", "KEY=VALUE"]),
    ("runs", ["list", ".", "--sort", "method.tau"], ["--sort 'method.tau'"]),
    ("runs", ["list", ".", "--limit", "-1"], ["--limit -1", "1 or more"]),
    ("runs", ["show", "nowhere"], ["nowhere", "no run directory"]),
    ("runs", ["compare", "run"], ["two run directories"]),
    ("runs", ["prune", "."], ["--where"]),
    ("runs", ["prune", ".", "--where", "method=pcl"], ["--yes"]),
    ("report", ["nowhere"], ["nowhere is not a run directory"]),
    ("report", ["."], [". is not a run directory", "config.yaml"]),
    ("report", ["run", "--rows", "5"], ["--rows 5", "30 or more"]),
    ("report", ["run", "run", "--out", "."], ["--out . is a directory", "file name"]),
    ("index", ["build", "nowhere.npy", "--out", "x"], ["nowhere.npy", "no such file"]),
    ("index", ["build", "features.txt", "--out", "x"], ["features.txt", "no such file"]),
    ("index", ["plan", "--rows", "0", "--dim", "8", "--gflops", "1"], ["rows", "0"]),
    ("index", ["find"], ["find", "search"]),
    ("doctor", ["--plan", "nonsense"], ["no recipe 'nonsense'"]),
    ("doctor", ["--plan", "quickstart", "--gpus", "-1"], ["--gpus -1", "0 (the default) or more"]),
    ("doctor", ["--method.dim", "3"], ["--method.dim", "--plan RECIPE"]),
    ("sweep", [], ["give a STUDY"]),
    ("sweep", ["temprature"], ["temprature"]),
    ("sweep", ["--resume", "nowhere"], ["nowhere", "holds no sweep"]),
    ("sweep", ["sce-temperature", "--space", "train.lr=between(1,2)"], ["train.lr=between(1,2)", "uniform(low, high)"]),
    ("sweep", ["sce-temperature", "--space", "train.lr=uniform(2,1)"], ["train.lr", "the lower one first"]),
    ("sweep", ["sce-temperature", "--space", "train.lr=none"], ["does not search train.lr"]),
    ("sweep", ["sce-temperature", "--searcher", "magic"], ["--searcher", "magic", "random"]),
    ("sweep", ["sce-temperature", "--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    ("submit", [], ["give a RECIPE", "--resume RUN_DIR"]),
    ("submit", ["quickstart"], ["--storage DIR"]),
    ("submit", ["quickstart", "--storage", "here"], ["'here", "absolute path"]),
    (
        "submit",
        ["quickstart", "--storage", "/s", "--name", "../../etc/x"],
        ["--name", "'../../etc/x'", "letters, digits"],
    ),
    ("submit", ["quickstart", "--storage", "/s", "--name", "a b;rm"], ["--name", "'a_b_rm'"]),
    ("submit", ["quickstart", "--storage", "/s", "--program", "os.path"], ["--program 'os.path'", "module of raycon"]),
    ("submit", ["quickstart", "--storage", "/s", "--env", "WANDB_API_KEY=x"], ["--env WANDB_API_KEY", "secrets"]),
    ("submit", ["quickstart", "--storage", "/s", "--env", "=x"], ["--env", "NAME=VALUE"]),
    (
        "submit",
        ["quickstart", "--storage", "/s", "--address", "cluster:8265"],
        ["--address 'cluster:8265'", "http://HOST"],
    ),
    ("submit", ["quickstrat", "--storage", "/s", "--dry-run"], ["no recipe 'quickstrat'"]),
    ("submit", ["--config", "nowhere.yaml", "--storage", "/s", "--dry-run"], ["--config nowhere.yaml", "no such file"]),
    ("lister", ["things"], ["no list things", "recipes"]),
]


@pytest.mark.parametrize(("program", "arguments", "words"), OTHERS, ids=[f"{p} {' '.join(a)}" for p, a, _ in OTHERS])
def test_the_other_programs(
    program: str, arguments: list[str], words: list[str], run_dir: Path, refused: Refused
) -> None:
    said = refused(program, arguments)
    for word in words:
        assert word in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trials", "0"], ["--trials 0", "1 or more"]),
        (["--validation", "0"], ["--validation 0", "test split"]),
        (["--metric", "knn/top9"], ["--metric knn/top9", "knn gives"]),
        (["--space", "method.tau=uniform(0.1,1)"], ["method.tau", "unknown option"]),
        (["--space", "method.temperature=uniform(-1,1)"], ["method.temperature = uniform(-1, 1)", "above 0"]),
        (["--space", "scaling.workers=integers(1,2)"], ["scaling.workers", "the sweep sets it"]),
        (["--dir", "."], ["is not empty", "directory of its own"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_sweeps_that_cannot_be(arguments: list[str], words: list[str], run_dir: Path, refused: Refused) -> None:
    said = refused("sweep", ["pcl-temperature", "--recipe", "quickstart", *arguments])
    for word in words:
        assert word in said, said
