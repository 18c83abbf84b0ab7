"""Every method on Fashion-MNIST with one and the same encoder, epochs and batch: python -m benchmarks.methods_fashion

Accuracy of k nearest neighbours (k = 20) and of a linear probe on the ten fine classes, and recall@1 among the test
images, held against raw pixels, the untrained encoder and supervised training. Methods that use weak labels see four
coarse classes (tops, trousers, footwear, bags). Each method runs with the options of its recipe fashion-mnist-METHOD-cpu.

    --quick                      within 4 minutes on 2 cores: proves that it works, too short to rank methods
    (nothing)                    about an hour on 2 cores
    --rows 60000 --epochs 200 --encoder resnet18 --width 64 --stem small      on a GPU

The table goes to stdout, claims to --json, a page to --docs (docs/results-fashion.md unless --quick).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.harness import Row, at_least, table
from raycon import evals, methods
from raycon.core.config import (
    CheckpointConfig,
    ConfigError,
    EvalConfig,
    LogConfig,
    MethodOptions,
    RunConfig,
    RunDirConfig,
    problems_of,
)
from raycon.core.log import NoMetrics
from raycon.core.types import LoaderPlan
from raycon.data_loaders import open_loader
from raycon.data_loaders.datasets import ImageSet, open_dataset
from raycon.evals import features
from raycon.index.local import LocalIndex
from raycon.nn import views
from raycon.nn.networks import build_encoder
from raycon.recipes import recipe, recipes
from raycon.training import job, loop
from raycon.training.runtime import LocalRuntime, choose_device, no_index

Labels = Literal["none", "coarse", "fine"]
CONTROLS = ("raw pixels", "untrained encoder")
FINE = "supervised (fine labels)"


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    rows: int
    test_rows: int
    epochs: int
    batch: int
    encoder: str
    width: int
    stem: Literal["imagenet", "small", "small-stride2"]
    linear_epochs: int
    seed: int


@dataclass(frozen=True)
class Entry:
    """One run: a method and the labels it sees."""

    name: str
    options: MethodOptions
    labels: Labels


@dataclass(frozen=True)
class Result:
    name: str
    labels: str
    knn: float
    linear: float
    recall: float
    seconds: float
    """Of the training."""


def entries(wanted: list[str]) -> list[Entry]:
    """All methods of raycon, the modes of MaskCon, and supervised training on the fine labels; or those named."""
    found = []
    for name in methods.names():
        named = f"fashion-mnist-{name}-cpu"
        options = recipe(named).method if named in recipes() else methods.configure(name)
        found.append(Entry(name, options, "coarse" if options.needs().labels else "none"))
        if name == "supervised":
            found.append(Entry(FINE, options, "fine"))
        if name == "maskcon":
            modes = {"grafit": ("grafit", 0.5), "coins": ("coins", 0.5), "grafit w=1 (supcon)": ("grafit", 1.0)}
            modes["selfcon"] = ("maskcon", 0.0)
            for mode, (kind, weight) in modes.items():
                changed = dataclasses.replace(options, mode=kind, weight=weight)  # type: ignore[call-arg]
                found.append(Entry(mode, changed, "coarse" if weight else "none"))
    if unknown := sorted(set(wanted) - {e.name for e in found}):
        raise ConfigError([f"--methods: no {', '.join(unknown)}; there are {', '.join(e.name for e in found)}"])
    return [e for e in found if not wanted or e.name in wanted]


def fitted(options: MethodOptions, setting: Setting, recipe_epochs: int) -> MethodOptions:
    """The options at this size: queues that the data fill twice at most, clusters and warm-ups in proportion."""
    share, changed = setting.rows / 60_000, dict[str, Any]()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "queue":
            changed["queue"] = max(min(value, 2 * setting.rows) // setting.batch, 1) * setting.batch
        elif field.name == "clusters" and isinstance(value, tuple):
            changed["clusters"] = tuple(max(round(k * share), 10 * (i + 1)) for i, k in enumerate(value))
        elif field.name in ("k", "negatives") and isinstance(value, int) and value:
            changed[field.name] = max(round(value * share), 4)
        elif field.name in ("warmup_epochs", "warmup_view_epochs", "from_epoch"):
            changed[field.name] = round(value * setting.epochs / recipe_epochs)
    return dataclasses.replace(options, **changed)


def configure(entry: Entry, setting: Setting, folder: Path) -> RunConfig:
    """The run: the recipe's optimiser and views, this benchmark's encoder, epochs and batch."""
    named = f"fashion-mnist-{entry.options.name}-cpu"
    base = recipe(named if named in recipes() else "fashion-mnist-moco-cpu")
    train = dataclasses.replace(
        base.train,
        epochs=setting.epochs,
        batch=setting.batch,
        warmup_epochs=base.train.warmup_epochs * setting.epochs / base.train.epochs,
    )
    model = dataclasses.replace(base.model, encoder=setting.encoder, width=setting.width, stem=setting.stem)
    return dataclasses.replace(
        base,
        seed=setting.seed,
        runtime="local",
        run=RunDirConfig(dir=str(folder)),
        method=fitted(entry.options, setting, base.train.epochs),
        model=model,
        data=dataclasses.replace(base.data, name="fashion-mnist-coarse"),
        train=train,
        checkpoint=CheckpointConfig(every_epochs=setting.epochs, keep=1),
        evals=EvalConfig(names=(), knn_k=(20,), linear_epochs=setting.linear_epochs),
        log=LogConfig(quiet=True),
    )


def part_of(dataset: ImageSet, rows: int, labels: Labels) -> ImageSet:
    """The first rows of a data set, with the weak labels that a method may see."""
    label, weak = dataset.label[:rows], dataset.weak[:rows]
    names = dataset.weak_classes
    if labels == "fine":
        weak, names = label, dataset.classes
    elif labels == "none":
        weak, names = weak * 0 - 1, ()
    return dataclasses.replace(
        dataset,
        images=dataset.images[:rows],  # type: ignore[call-arg,attr-defined]
        label=label,
        weak=weak,
        weak_classes=names,
    )


def train(config: RunConfig, dataset: ImageSet, folder: Path, device: torch.device) -> torch.nn.Module:
    """The trained encoder. Raises ConfigError when the options do not fit this size."""
    facts = job.facts_of(config, dataset, 1)
    if problems := problems_of(config, facts):
        raise ConfigError(problems)
    loader = open_loader("torch", dataset, job.loader_plan(config, dataset, folder, device, 1, 0))  # type: ignore[arg-type]
    method = job.build_method(config, facts, len(dataset.mean))
    dim = job.feature_dim(config)
    index = LocalIndex(len(dataset), dim, config.mining, config.seed, 0, 1) if dim else no_index()
    try:
        loop.train(config, method, loader, LocalRuntime(folder, index, device), NoMetrics(), folder)
    finally:
        loader.close()
    return method.encoder().eval()


def evaluate(
    encoder: Any, config: RunConfig, dataset: ImageSet, test: ImageSet, device: torch.device
) -> tuple[float, float, float]:
    """kNN accuracy, linear accuracy and recall@1 on the fine classes, in percent."""

    def scan(which: ImageSet) -> Any:
        spec = views.eval_spec(config.data.size, which.mean, which.std)
        plan = LoaderPlan(specs=(), eval_spec=spec, batch=min(512, len(which)), seed=0, rank=0, world=1, device=device)
        return open_loader("torch", which, plan).scan()

    labels = [torch.as_tensor(d.label) for d in (dataset, test)]
    sets = features.extract_sets(encoder, scan(dataset), labels[0], scan(test), labels[1])
    outcome = evals.run_all(("knn", "linear", "retrieval"), config.evals, sets, config.seed)
    if outcome.failed:
        raise RuntimeError(f"evaluation failed: {outcome.failed}")
    found = outcome.results
    return found["knn/top1_k20"], found["linear/top1"], found["retrieval/recall_at_1"]


def measure(setting: Setting, wanted: list[str], device: torch.device) -> tuple[list[Result], dict[str, str]]:
    """All results, controls first, and why any method was left out."""
    whole, test = open_dataset("fashion-mnist-coarse"), open_dataset("fashion-mnist-coarse", split="test")
    test = part_of(test, setting.test_rows, "coarse")
    results: list[Result] = []
    left_out: dict[str, str] = {}
    chosen = entries(wanted)
    with tempfile.TemporaryDirectory() as temporary:
        first = configure(chosen[0], setting, Path(temporary))
        data = part_of(whole, setting.rows, "none")
        torch.manual_seed(setting.seed)
        untrained = build_encoder(first.model, len(whole.mean)).eval().to(device)
        for name, encoder in zip(
            CONTROLS, (lambda x: features.pixels(x, whole.mean, whole.std), untrained), strict=True
        ):
            results.append(Result(name, "none", *evaluate(encoder, first, data, test, device), 0.0))
        for number, entry in enumerate(chosen):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            data = part_of(whole, setting.rows, entry.labels)
            started = time.perf_counter()
            try:
                config = configure(entry, setting, folder)
                encoder = train(config, data, folder, device)
            except (ConfigError, loop.NotFinite) as error:
                left_out[entry.name] = str(error)
                continue
            seconds = time.perf_counter() - started
            results.append(Result(entry.name, entry.labels, *evaluate(encoder, config, data, test, device), seconds))
            show(results[-1])
    return results, left_out


def show(result: Result) -> None:
    """One line of progress on stderr: a long run must be seen to live."""
    sys.stderr.write(
        f"{result.name:26} kNN {result.knn:5.2f}  linear {result.linear:5.2f}  recall@1 {result.recall:5.2f}  "
        f"{result.seconds:.0f} s\n"
    )


def claims(results: list[Result]) -> list[Row]:
    """Every trained method above both controls; weak labels above none; MaskCon above SupCon in fine recall."""
    by_name = {r.name: r for r in results}
    rows = []
    pixels, untrained = (by_name[name] for name in CONTROLS)
    for r in results[len(CONTROLS) :]:
        for what in ("knn", "linear"):
            best = max(getattr(pixels, what), getattr(untrained, what))
            rows.append(at_least(f"{what} accuracy: {r.name} over the better control", getattr(r, what), best, 1.0))
    pairs = [("maskcon", "selfcon"), ("grafit", "selfcon"), ("coins", "selfcon")]
    pairs += [("maskcon", "grafit w=1 (supcon)"), ("maskcon", "supcon")]
    for better, worse in pairs:
        if better in by_name and worse in by_name:
            ours, other = by_name[better].recall, by_name[worse].recall
            rows.append(at_least(f"fine recall@1: {better} over {worse}", ours, other, 1.0))
    return rows


def page(results: list[Result], left_out: dict[str, str], setting: Setting, rows: list[Row]) -> str:
    """The results as Markdown."""
    lines = [
        "# Every method on Fashion-MNIST",
        "",
        f"`python -m benchmarks.methods_fashion`: {setting.encoder}, width {setting.width}, stem {setting.stem}; "
        f"{setting.epochs} epochs over {setting.rows} images, batch {setting.batch}, seed {setting.seed}; "
        f"{setting.test_rows} test images. Ten fine classes; *coarse* labels are tops, trousers, footwear, bags. Percent.",
        "",
        "| method | labels | kNN (k = 20) | linear | recall@1 | training, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in results:
        lines.append(
            f"| {r.name} | {r.labels} | {r.knn:.2f} | {r.linear:.2f} | {r.recall:.2f} | {f'{r.seconds:.0f}' if r.seconds else ''} |"
        )
    failing = [row.claim for row in rows if not row.holds]
    lines += ["", f"{len(rows) - len(failing)} of {len(rows)} expectations hold."]
    if failing:
        lines += ["", "Not so: " + "; ".join(failing) + "."]
    lines += [f"\nLeft out: {name}: {text}" for name, text in left_out.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 4 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims and the results as JSON rows")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="write a page; default docs/results-fashion.md")
    parser.add_argument("--methods", nargs="*", default=[], metavar="NAME", help="these only")
    parser.add_argument("--rows", type=int, help="training images")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--encoder", default="resnet10")
    parser.add_argument("--width", type=int)
    parser.add_argument("--stem", default="small-stride2", choices=("imagenet", "small", "small-stride2"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    sizes = {"rows": 4096, "epochs": 4, "batch": 128, "width": 8} if args.quick else {}
    sizes = {"rows": 20_480, "epochs": 12, "batch": 256, "width": 16} | sizes
    sizes = {name: getattr(args, name) or value for name, value in sizes.items()}
    setting = Setting(
        test_rows=2000 if args.quick else 10_000,
        linear_epochs=20 if args.quick else 100,
        encoder=args.encoder,
        stem=args.stem,
        seed=args.seed,
        **sizes,
    )
    results, left_out = measure(setting, args.methods, choose_device(0))
    rows = claims(results)
    text = page(results, left_out, setting, rows)
    sys.stdout.write(text + "\n" + table(rows))
    docs = args.docs or (None if args.quick else Path(__file__).parent.parent / "docs" / "results-fashion.md")
    if docs is not None:
        docs.write_text(text, encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
