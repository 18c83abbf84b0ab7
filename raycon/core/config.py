"""RunConfig: every option of a run, one name for each everywhere (command line, sweep, wandb, config file).

Plain dataclasses that tyro reads; importing this file imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from raycon.core.types import Needs

T = TypeVar("T")


class ConfigError(ValueError):
    """All that is wrong with a configuration, found at start-up; each problem names the option and the fix."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {p}" for p in problems)
        super().__init__(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the configuration:\n{lines}")


@dataclass(frozen=True)
class Facts:
    """What is known of the data and the machine when a configuration is checked."""

    rows: int
    """N, images to train on."""
    classes: int
    """Number of weak labels; 0 when there are none."""
    image: tuple[int, int, int] | None
    """(C, H, W) when all images have one size."""
    batch: int
    """Global batch: images per optimiser step over all ranks."""
    world: int
    size: int
    """Side of a training view in pixels."""
    epochs: int


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What every method has. A method's file holds its own ``Options(MethodOptions)``."""

    name: str = ""
    """The method: the name of its file in raycon/methods."""

    def needs(self) -> Needs:
        """What the loop must provide for the method."""
        return Needs()

    def problems(self, facts: Facts) -> list[str]:
        """What makes these options unusable with this data: one line each, with the dotted option and the fix."""
        return []

    def warnings(self, facts: Facts) -> list[str]:
        """Options that will have no effect or hardly what one expects."""
        return []


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    encoder: str = "resnet50"
    """resnet10/18/34/50/101/152, resnext50_32x4d, ..., any torchvision classifier, or timm:NAME."""
    width: int = 64
    """Channels of a ResNet's first stage; 64 is the published network."""
    stem: Literal["imagenet", "small", "small-stride2"] = "imagenet"
    """imagenet: 7x7/2 and max-pool; small: 3x3/1 (images of 32 px or less); small-stride2: 3x3/2, half the cost."""
    zero_init_residual: bool = False
    """Start each residual branch at zero."""
    weights: str = ""
    """A file (.safetensors or .pth) with encoder weights to start from; empty: random."""
    sync_bn: bool = False
    """Synchronise BatchNorm statistics over ranks."""
    channels_last: bool = True
    """Store images channels-last: faster convolutions on CPU and GPU."""
    compile: bool = False
    """torch.compile the encoder."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    name: str = "digits"
    """The data set: the name of its reader in data_loaders/datasets."""
    root: str = ""
    """Where its files are: a folder, or for some data sets s3://..., gs://...; empty: the usual places."""
    listing: str = ""
    """A file that lists the images (image-list, image-table), the classes or the metadata (docs/data.md); {split} in
    it becomes the split's name."""
    columns: tuple[str, ...] = ()
    """What the columns of data.listing are: path label weak, for a table as ROLE=COLUMN."""
    level: str = ""
    """Which weak labels, where a data set has several (docs/data.md)."""
    on_error: Literal["fail", "skip"] = "fail"
    """skip: read all images once before the run and leave the unreadable ones out, with their number in the log."""
    decode: Literal["always", "once"] = "always"
    """once: image files of one size are decoded once, into a file in data.cache that is mapped (docs/loaders.md)."""
    loader: Literal["auto", "ffcv", "ray", "torch"] = "auto"
    """auto: ffcv where it is installed, else torch; the choice is printed."""
    size: int = 224
    """Side of a training view in pixels."""
    views: str = "mocov2"
    """The augmentation preset in raycon/nn/views.py; a method names its views (strong, weak, ...) in it."""
    augment: Literal["auto", "batched", "fused"] = "auto"
    """How views are made on a CPU: in batched steps, or fused into compiled loops (needs Numba); auto: fused where an
    epoch is worth compiling for (docs/loaders.md). The same views up to float32 rounding."""
    workers: int = 0
    """Loader processes (torch), threads (ffcv) or tasks at once (ray) per rank; 0: the loader works in the training
    process, of Ray as many tasks as there are CPUs."""
    nodes: str = ""
    """Label KEY=VALUE of the nodes on which the ray loader reads and decodes (ray start --labels); empty: any node."""
    cache: str = ""
    """Where converted data is kept; empty: .cache beside the run directory (.beton), or else ~/.cache/raycon."""
    validation: float = 0.0
    """Share of the training images held out by (seed, row): not trained on, and what evaluations score instead of the
    test split. For sweeps; 0: none."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    epochs: int = 200
    batch: int = 256
    """Images per step over all ranks."""
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = 0.03
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """linear: lr x batch/256; sqrt: lr x sqrt(batch)."""
    momentum: float = 0.9
    """Of SGD and LARS."""
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay: Literal["all", "no-bias-bn", "no-1d", "no-bias-bn-by-name"] = "all"
    """What decays and LARS rescales: all; not biases and normalisation layers (by type, or by name as WCL); not vectors."""
    trust: float = 0.001
    """LARS trust coefficient."""
    schedule: Literal["cosine", "cosine-closed", "cosine-epoch", "step", "constant"] = "cosine"
    """cosine: per step to 0; cosine-closed: SCE's, warm-up one step shorter; cosine-epoch: PCL's and MoCo's, once per
    epoch, never 0; step: x0.1 at milestones."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which ``step`` multiplies the learning rate by 0.1."""
    warmup_epochs: float = 0.0
    """Linear warm-up from warmup_start x lr."""
    warmup_start: float = 0.0
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    accumulate: int = 1
    """Micro-batches per step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the networks; similarities and losses stay fp32."""
    tf32: bool = True
    """On a GPU, let fp32 matrix products use TF32."""


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    shards: int = 2
    """Index shards: Ray actors (or parts of this process without Ray)."""
    iterations: int = 20
    """Lloyd iterations per restart."""
    redo: int = 5
    """Restarts per clustering; the lowest objective is kept."""
    init: Literal["cold", "warm"] = "cold"
    """cold: the papers' fresh random start each time; warm: from the last assignment (the first time, from a sample)."""
    threads: int = 1
    """CPU threads per shard."""
    memory_gb: float = 0.0
    """Most memory one shard may hold; 0: what the machine has free."""
    algorithm: Literal["exact", "minibatch", "hierarchical"] = "exact"
    """k-means by Lloyd over all rows (the papers'); by slices of the rows; on two levels (k of 10,000s and more)."""
    balanced: bool = False
    """Even out the clusters' sizes by a weight per cluster (algorithm = exact only)."""
    neighbours: Literal["exact", "ivf", "hnsw"] = "exact"
    """ivf, hnsw: approximate, at the recall below (measured on a sample in every refresh); for 50,000 rows and more."""
    recall: float = 0.995
    """Share of the true neighbours that ivf and hnsw must find."""
    storage: Literal["fp32", "fp16"] = "fp32"
    """fp16: half the memory; the exact rows lie in a scratch file (TMPDIR) for those that rounding leaves in doubt."""
    engine: Literal["auto", "faiss", "torch"] = "auto"
    """auto: on a CPU torch with compiled loops where numba is installed, else faiss, else torch alone."""
    device: Literal["cpu", "gpu"] = "cpu"
    """gpu: the shards compute on a CUDA device; the features stay in the machine's memory."""
    lag: int = 0
    """0: training waits for each refresh; 1: a refresh is made while the next epoch trains on the snapshot before."""
    persist: bool = False
    """Ray: each shard writes its features to <run>/index, so that a lost actor comes back with them."""
    cpus: float = 0.0
    """CPUs that Ray sets aside for each shard; 0: shards work on what training leaves."""
    gpus: float = 0.0
    """Share of a GPU that Ray sets aside for each shard (device = gpu)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0
    """Save every so many steps besides the epoch ends; 0: at epoch ends only."""
    every_epochs: int = 1
    keep: int = 3
    """Checkpoints kept besides the last; 0: all."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    names: tuple[str, ...] = ("knn", "linear")
    """Evaluations, by the names of their files in raycon/evals."""
    every_epochs: int = 0
    """Also during the run, every so many epochs; 0: at the end only."""
    wait_s: float = 0.0
    """Ray: training waits for each evaluation during the run, so many seconds at most; 0: it goes on. For sweeps
    whose evaluations take longer than an epoch: no trial trains on that its score would stop."""
    knn_k: tuple[int, ...] = (1, 20, 200)
    knn_temperature: float = 0.07
    linear_epochs: int = 100
    """Passes of the linear probe over the features."""
    epochs: int = 0
    """Epochs of fine-tuning and of the published linear protocols; 0: the published number."""
    label_list: str = ""
    """A file that names the labelled images for fine-tuning, one per line; empty: class-balanced, from the seed."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Images per class of the low-shot SVMs."""
    shot_runs: int = 5
    svm_costs: tuple[float, ...] = (0.5,)
    """C of the SVMs; each is reported by itself when there are several."""
    retrieval_positional: bool = False
    """Leave out whatever comes first, as MaskCon's code does, and not the query itself."""
    roots: str = ""
    """A folder that holds other data sets (name@DATA), each in a folder of its name; empty: their usual places."""
    coco: str = ""
    """Where the detection data is: a folder in COCO's layout."""
    iterations: int = 0
    """Steps of the detection training; 0: the published number."""
    retries: int = 1
    """How often an evaluation that crashed is tried again before it is reported as failed."""
    cpus: float = 0.0
    """CPUs that Ray sets aside for each evaluation's task; 0: it runs on what training leaves."""
    gpus: float = 0.0
    """GPUs of each task that runs the network: features, fine-tuning, the published linear protocols, detection."""
    workers: int = 1
    """Ray Train workers of an evaluation that trains on several (detection), each with ``cpus`` (at least 1) and ``gpus``."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """online: offline where its server cannot be reached or WANDB_MODE says so."""
    project: str = "raycon"
    """wandb project."""
    group: str = ""
    """wandb group (default: the recipe); a sweep puts its trials into one."""
    wandb_ranks: bool = False
    """A wandb run for every rank (its times, its machine's load), grouped by the name of the run."""
    tensorboard: bool = False
    """Also write TensorBoard files, in the run directory."""
    every_steps: int = 10
    quiet: bool = False
    """Only warnings and the result on the terminal; short: --quiet."""
    json: bool = False
    """Every record of metrics.jsonl as a line of JSON on standard output; short: --json-log."""
    report: Literal["full", "light"] = "full"
    """full: at the end of the run the report gets map, clusters and neighbours, from a sample of the images."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    workers: int = 2
    """Ray Train workers (ranks)."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    threads: int = 1
    """CPU threads of each rank's torch operations."""
    max_failures: int = 3
    """How often a run recovers from the loss of a worker; -1: always. A node that goes with notice does not count."""
    min_workers: int = 0
    """Elastic: go on with so few workers when nodes go, and grow back; the global batch stays as it is. 0: always
    ``workers``. Short: --scaling.workers MIN:MAX."""
    on_fewer: Literal["accumulate", "follow"] = "accumulate"
    """Elastic, on fewer workers than ``workers``. accumulate: the same optimiser steps, each from several micro-batches.
    follow: a worker keeps its batch, so that steps are smaller and more, each with so much less learning rate; the rows
    come in the same order, and what is counted as a step is that of all ``workers``. Where a batch cannot be cut so
    (``train.accumulate`` does not divide its parts), it is accumulated."""
    resize_s: float = 60.0
    """Elastic: how often the run looks whether it can grow (it restarts from a checkpoint to do so)."""
    timeout_s: float = 1800.0
    """How long a rank waits for the others before the run restarts without the one that does not answer."""
    wait_s: float = 1800.0
    """How long workers may wait for their place in the cluster before the run ends, saying what is missing."""
    autoscaling: bool = False
    """The cluster grows by itself: do not refuse more workers than fit it now."""


@dataclass(frozen=True, kw_only=True)
class RunDirConfig:
    dir: str = ""
    """The run directory; empty: runs/<recipe>-<options that differ>-<time>."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    recipe: str = ""
    """The recipe this configuration started from."""
    seed: int = 0
    """Everything random follows from it."""
    runtime: Literal["ray", "local"] = "ray"
    """ray: Ray Train; local: this process, or the ranks torchrun started."""
    run: RunDirConfig = field(default_factory=RunDirConfig)
    method: MethodOptions = field(default_factory=MethodOptions)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)


# --- words for checks: each returns what is wrong, [] when nothing is ---


def above_zero(option: str, value: float) -> list[str]:
    return [] if value > 0 else [f"{option} = {value}: give a number above 0"]


def at_least(option: str, value: float, least: float) -> list[str]:
    return [] if value >= least else [f"{option} = {value}: give {least} or more"]


def within(option: str, value: float, low: float, high: float) -> list[str]:
    return [] if low <= value <= high else [f"{option} = {value}: give a number from {low} to {high}"]


def queue_divides(option: str, size: int, facts: Facts) -> list[str]:
    """A queue takes whole batches: the global batch must divide it."""
    if size >= facts.batch and size % facts.batch == 0:
        return []
    near = max(facts.batch, round(size / facts.batch) * facts.batch)
    return [f"{option} = {size} is not a multiple of train.batch = {facts.batch}: give {near}, say"]


def clusters_fit(option: str, clusters: tuple[int, ...], facts: Facts) -> list[str]:
    """k-means needs at least as many rows as clusters."""
    return [f"{option} has k = {k}: give 1 or more" for k in clusters if k < 1] + [
        f"{option} has k = {k}, more than the {facts.rows} images: give a smaller k" for k in clusters if k > facts.rows
    ]


# --- in and out -------------------------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict, tuples as lists: what YAML, wandb and Ray carry."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    result = plain(config)
    assert isinstance(result, dict)
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def from_dict(tree: Mapping[str, Any], method_options: type[MethodOptions]) -> RunConfig:
    """The RunConfig of a nested dict. Raises ConfigError naming every unknown option and every wrong value."""
    problems: list[str] = []
    config = _build(RunConfig, tree, "", problems, {"method": method_options})
    if problems:
        raise ConfigError(problems)
    assert config is not None
    return config


def override(config: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """A copy with dotted options replaced: ``override(config, {"method.temperature": 0.1})``. Raises ConfigError."""
    tree = to_dict(config)
    known = flatten(tree)
    problems = [_unknown(name, list(known)) for name in options if name not in known]
    if problems:
        raise ConfigError(problems)
    for name, value in options.items():
        *parents, last = name.split(".")
        place = tree
        for parent in parents:
            place = place[parent]
        place[last] = value
    return from_dict(tree, type(config.method))


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        k for k in known if k.split(".")[-1] == name.split(".")[-1]
    ]
    hint = f"; did you mean {near[0]!r}?" if near else "; --help lists all options"
    return f"unknown option {name!r}{hint}"


def _build(
    cls: type[T], tree: Mapping[str, Any], path: str, problems: list[str], swap: Mapping[str, type] | None = None
) -> T | None:
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not isinstance(tree, Mapping):
        problems.append(f"{path.rstrip('.') or 'configuration'}: expected a group of options, got {reprlib.repr(tree)}")
        return None
    problems += [_unknown(path + str(name), [path + f for f in fields]) for name in tree if name not in fields]
    values: dict[str, Any] = {}
    for name in fields:
        if name not in tree:
            continue
        kind = (swap or {}).get(name, hints[name])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[name] = _build(kind, tree[name], f"{path}{name}.", problems)
        else:
            try:
                values[name] = _convert(kind, tree[name])
            except (TypeError, ValueError, OverflowError):
                problems.append(f"{path}{name} = {reprlib.repr(tree[name])}: expected {_describe(kind)}")
    return None if problems else cls(**values)


def _convert(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _convert(typing.get_args(kind)[0], value)
    if origin is Literal:
        if value in typing.get_args(kind):
            return value
    elif origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            try:
                return _convert(option, value)
            except (TypeError, ValueError, OverflowError):
                continue
    elif origin is tuple:
        items = typing.get_args(kind)
        if isinstance(value, (list, tuple)):
            if len(items) == 2 and items[1] is Ellipsis:
                return tuple(_convert(items[0], v) for v in value)
            if len(items) == len(value):
                return tuple(_convert(k, v) for k, v in zip(items, value, strict=True))
    elif kind is type(None):
        if value is None:
            return None
    elif isinstance(value, bool) != (kind is bool):
        pass  # a bool is an int for Python, not for us
    elif kind in (bool, int, str) and isinstance(value, kind):
        return value
    elif kind is float and isinstance(value, (int, float, str)):
        return float(value)  # YAML reads 1e-4 as text
    raise ValueError(value)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Annotated:
        return _describe(typing.get_args(kind)[0])
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return getattr(kind, "__name__", None) if typing.get_origin(kind) is None else str(kind)  # type: ignore[return-value]


def read_tree(file: Path) -> Any:
    """What a YAML file says: plain values, nothing of it is run. Raises ConfigError naming the file and what is wrong.

    Aliases (*name) are refused: a few lines of them can stand for more values than fit in any memory.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such file"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file} is no YAML: {error}"]) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise ConfigError([f"{file} cannot be read ({getattr(error, 'strerror', None) or error})"]) from None
    try:
        if "*" in text and (
            alias := next((e for e in yaml.parse(text, loader) if isinstance(e, yaml.AliasEvent)), None)
        ):
            raise yaml.YAMLError(f"the alias *{alias.anchor}: write out what it stands for")
        return yaml.load(text, loader)
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # Besides YAMLError: what PyYAML lets through of values like !!bool x, 2026-99-99 or a thousand brackets.
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError([f"{file} is no YAML of options: {words}"]) from None


def save_yaml(config: RunConfig, file: Path) -> None:
    import yaml

    file.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


# --- checks -----------------------------------------------------------------------------------------------------


def problems_of(config: RunConfig, facts: Facts) -> list[str]:
    """All that can be said against a configuration before anything starts; empty when it is fine."""
    train, found = config.train, []

    def require(condition: bool, text: str) -> None:
        if not condition:
            found.append(text)

    for name, value in flatten(to_dict(config)).items():
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name} = {value}: give a finite number")
    require(train.epochs >= 1, f"train.epochs = {train.epochs}: give 1 or more")
    require(train.batch >= 2, f"train.batch = {train.batch}: give 2 or more")
    require(train.lr > 0, f"train.lr = {train.lr}: give a number above 0")
    require(0 <= train.momentum < 1, f"train.momentum = {train.momentum}: give 0 <= momentum < 1")
    require(train.weight_decay >= 0, f"train.weight_decay = {train.weight_decay}: give 0 or more")
    require(train.warmup_epochs >= 0, f"train.warmup_epochs = {train.warmup_epochs}: give 0 or more")
    require(
        train.warmup_epochs < train.epochs or train.epochs < 1,
        f"train.warmup_epochs = {train.warmup_epochs} leaves nothing of train.epochs = {train.epochs}",
    )
    require(train.accumulate >= 1, f"train.accumulate = {train.accumulate}: give 1 or more")
    require(train.trust > 0, f"train.trust = {train.trust}: give a number above 0")
    require(train.clip >= 0, f"train.clip = {train.clip}: give 0 (off) or more")
    parts = facts.world * max(train.accumulate, 1)
    require(
        train.batch % parts == 0,
        f"train.batch = {train.batch} does not divide over {facts.world} ranks x train.accumulate = "
        f"{train.accumulate}: give a multiple of {parts}",
    )
    require(
        facts.rows >= train.batch,
        f"train.batch = {train.batch} is more than the {facts.rows} images of data.name = {config.data.name!r}",
    )
    require(config.data.size >= 4, f"data.size = {config.data.size}: give 4 pixels or more")
    require(
        0 <= config.data.validation < 1,
        f"data.validation = {config.data.validation}: give a share from 0 (none held out) to below 1",
    )
    require(config.data.workers >= 0, f"data.workers = {config.data.workers}: give 0 or more")
    require(config.model.width >= 1, f"model.width = {config.model.width}: give 1 or more")
    require(config.mining.shards >= 1, f"mining.shards = {config.mining.shards}: give 1 or more")
    require(config.mining.iterations >= 1, f"mining.iterations = {config.mining.iterations}: give 1 or more")
    require(config.mining.redo >= 1, f"mining.redo = {config.mining.redo}: give 1 or more")
    require(0 < config.mining.recall <= 1, f"mining.recall = {config.mining.recall}: give a number above 0, at most 1")
    require(
        not config.mining.balanced or config.mining.algorithm == "exact",
        f"mining.balanced goes with mining.algorithm = exact only: {config.mining.algorithm} does not balance",
    )
    require(
        config.mining.algorithm != "hierarchical" or config.mining.init == "cold",
        "mining.init = warm does nothing with mining.algorithm = hierarchical, which starts anew: give cold",
    )
    require(config.mining.lag in (0, 1), f"mining.lag = {config.mining.lag}: give 0 (wait for a refresh) or 1")
    require(config.mining.cpus >= 0, f"mining.cpus = {config.mining.cpus}: give 0 or more")
    require(config.mining.gpus >= 0, f"mining.gpus = {config.mining.gpus}: give 0 or more")
    require(
        config.mining.gpus == 0 or config.mining.device == "gpu",
        f"mining.gpus = {config.mining.gpus} does nothing with mining.device = cpu: give --mining.device gpu",
    )
    require(config.mining.threads >= 1, f"mining.threads = {config.mining.threads}: give 1 or more")
    require(
        config.mining.memory_gb >= 0, f"mining.memory_gb = {config.mining.memory_gb}: give 0 (what is free) or more"
    )
    require(config.log.every_steps >= 1, f"log.every_steps = {config.log.every_steps}: give 1 or more")
    require(
        config.checkpoint.every_steps >= 0, f"checkpoint.every_steps = {config.checkpoint.every_steps}: give 0 or more"
    )
    require(
        config.checkpoint.every_epochs >= 1,
        f"checkpoint.every_epochs = {config.checkpoint.every_epochs}: give 1 or more",
    )
    require(config.checkpoint.keep >= 0, f"checkpoint.keep = {config.checkpoint.keep}: give 0 (all) or more")
    require(
        config.evals.every_epochs >= 0, f"evals.every_epochs = {config.evals.every_epochs}: give 0 (at the end) or more"
    )
    require(
        config.evals.knn_temperature > 0,
        f"evals.knn_temperature = {config.evals.knn_temperature}: give a number above 0",
    )
    require(
        bool(config.evals.knn_k) and min(config.evals.knn_k) >= 1, f"evals.knn_k = {config.evals.knn_k}: give 1 or more"
    )
    found += evaluation_problems(config.evals)
    require(config.scaling.workers >= 1, f"scaling.workers = {config.scaling.workers}: give 1 or more")
    require(config.scaling.threads >= 1, f"scaling.threads = {config.scaling.threads}: give 1 or more")
    require(
        config.scaling.max_failures >= -1,
        f"scaling.max_failures = {config.scaling.max_failures}: give -1 (no limit) or more",
    )
    found += elastic_problems(config)
    return found + config.method.problems(facts)


def world_sizes(config: RunConfig) -> list[int]:
    """The numbers of workers a run may have: those that the global batch divides over, if it is elastic."""
    scaling = config.scaling
    if not scaling.min_workers:
        return [scaling.workers]
    return [w for w in range(scaling.min_workers, scaling.workers + 1) if config.train.batch % w == 0]


def elastic_problems(config: RunConfig) -> list[str]:
    """What is wrong with the time limits, the range of workers and what each asks for."""
    scaling = config.scaling
    found = above_zero("scaling.timeout_s", scaling.timeout_s) + above_zero("scaling.wait_s", scaling.wait_s)
    found += above_zero("scaling.resize_s", scaling.resize_s)
    found += within("scaling.min_workers", scaling.min_workers, 0, max(scaling.workers, 0))
    shares = {"cpus_per_worker": scaling.cpus_per_worker, "gpus_per_worker": scaling.gpus_per_worker}
    for name, share in shares.items():
        found += at_least(f"scaling.{name}", share, 0)
        if scaling.min_workers and share % 1 != 0:  # Ray counts wrongly how many of those would fit
            found.append(f"scaling.{name} = {share}: an elastic run takes whole ones; give a whole number")
    if not any(shares.values()):
        found.append(
            "scaling.cpus_per_worker = 0 and scaling.gpus_per_worker = 0: give a number above 0 for one of them"
        )
    if not found and scaling.min_workers and scaling.min_workers not in world_sizes(config):
        found.append(
            f"train.batch = {config.train.batch} does not divide over scaling.min_workers = {scaling.min_workers}: it "
            "stays the same whatever the number of workers; give another number of either"
        )
    return found


def absolute_places(data: DataConfig, evals: EvalConfig) -> tuple[DataConfig, EvalConfig]:
    """With every path made absolute (addresses stay as they are): Ray's workers run elsewhere."""

    def whole(place: str) -> str:
        return place if not place or "://" in place else str(Path(place).expanduser().absolute())

    where = whole(data.root), whole(data.listing), whole(data.cache)
    return dataclasses.replace(data, root=where[0], listing=where[1], cache=where[2]), dataclasses.replace(
        evals, coco=whole(evals.coco), roots=whole(evals.roots), label_list=whole(evals.label_list)
    )


def evaluation_problems(evals: EvalConfig) -> list[str]:
    """What is wrong with the numbers of ``evals.*`` beyond those of kNN."""
    found = at_least("evals.linear_epochs", evals.linear_epochs, 1) + at_least("evals.epochs", evals.epochs, 0)
    found += at_least("evals.iterations", evals.iterations, 0) + at_least("evals.retries", evals.retries, 0)
    found += at_least("evals.shot_runs", evals.shot_runs, 1) + at_least("evals.workers", evals.workers, 1)
    found += [f"evals.shots has {k}: give 1 or more" for k in evals.shots if k < 1]
    found += [f"evals.svm_costs has {c}: give numbers above 0" for c in evals.svm_costs if not c > 0]
    if not evals.svm_costs:
        found.append("evals.svm_costs is empty: give 0.5, say")
    for name in ("cpus", "gpus", "wait_s"):
        found += at_least(f"evals.{name}", getattr(evals, name), 0)
    return found
