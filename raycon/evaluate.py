"""Evaluate an encoder on downstream tasks.

python -m raycon.evaluate CHECKPOINT [TASK ...] [--dotted.option value ...]

CHECKPOINT: a run directory (its newest checkpoint), one of its checkpoints/<step>, or a file of weights: raycon's
exports, the papers' .pth.tar and .ckpt, a torchvision or timm state dict.
TASK: an evaluation, with the published protocol after a colon and another data set than the run's after an @:
knn, linear:pcl, finetune:1, knn@cifar10, transfer@all. Without a TASK: those of the run's configuration.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from raycon.core import program
from raycon.core.address import fetched
from raycon.core.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    RunConfig,
    absolute_places,
    evaluation_problems,
)
from raycon.evals.base import Outcome, Task, names, parse, read_results

if TYPE_CHECKING:
    from raycon.evals.on_checkpoint import Subject
    from raycon.training.storage import Store

logger = logging.getLogger("raycon")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets."""

    data: DataConfig = field(default_factory=DataConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    seed: int = 0
    runtime: Literal["ray", "local"] = "ray"
    """ray: each evaluation is a task of the cluster of RAY_ADDRESS, or of one started here; local: one after the other."""
    shards: int = 1
    """Ray tasks that share the extraction of a data set's features."""
    threads: int = 1
    """CPU threads of each task."""
    every: bool = False
    """All checkpoints of the run, not only the newest."""
    controls: bool = False
    """Also raw pixels and the encoder before training (runs only)."""
    out: str = ""
    """Where the numbers are added; empty: evaluations.json of the run, or FILE.evaluations.json beside a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 all done, 1 an evaluation failed, 2 the request was wrong."""
    return program.run("raycon.evaluate", lambda arguments: run(*read(arguments)), argv)


# --- the command line -------------------------------------------------------------------------------------------


def read(arguments: list[str]) -> tuple[Path, list[Task], Options]:
    """The checkpoint, the tasks and the options. Exits for --help; raises ConfigError with everything that is wrong."""
    import tyro

    rest = list(arguments)
    words = []
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    about = f"{__doc__}\nEvaluations: {', '.join(names())}"
    base = Options()
    problems = []
    if words:
        try:
            words[0] = str(fetched(words[0]))
            base = defaults(Path(words[0]))
        except ConfigError as error:
            problems += error.problems
    elif not {"-h", "--help"} & set(rest):
        raise ConfigError(["give a CHECKPOINT: a run directory, a checkpoint folder or a file of weights"])
    options = tyro.cli(Options, default=base, args=rest, description=about, prog="python -m raycon.evaluate")
    tasks: list[Task] = []
    try:
        tasks = parse(words[1:] or options.evals.names)
    except ConfigError as error:
        problems += error.problems
    problems += evaluation_problems(options.evals)
    problems += [f"{n} = {getattr(options, n)}: give 1 or more" for n in ("shards", "threads")
                 if getattr(options, n) < 1]  # fmt: skip
    if not tasks and not problems:
        problems.append(f"no evaluation asked for: give one or more of {', '.join(names())}")
    run_dir = program.run_of(Path(words[0]))
    if run_dir is None:
        problems += [f"--{name} goes with a run directory, {words[0]} is none" for name in ("every", "controls")
                     if getattr(options, name)]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    data, evals = absolute_places(options.data, options.evals)
    return Path(words[0]), tasks, dataclasses.replace(options, data=data, evals=evals)


def defaults(place: Path) -> Options:
    """The options of the run that ``place`` belongs to; else the general ones with images of 224 pixels."""
    if not place.exists():
        raise ConfigError([f"{place}: no such run, checkpoint or file"])
    run_dir = program.run_of(place)
    if run_dir is None:
        if place.is_dir() and not any((place / n).is_file() for n in ("model.safetensors", "state.json")):
            raise ConfigError([f"{place} is neither a run, nor a checkpoint, nor a folder with model.safetensors"])
        return Options(data=DataConfig(name=""))
    from raycon.methods import read_config

    config = read_config(run_dir / "config.yaml")
    return Options(data=config.data, evals=config.evals, seed=config.seed, threads=config.scaling.threads)


# --- running ----------------------------------------------------------------------------------------------------


def run(place: Path, tasks: list[Task], options: Options) -> int:
    """Evaluate, keep the numbers, print the table. Under torchrun all ranks do together what trains on several ranks
    (detection); then rank 0 does the rest alone, and is the one that keeps and prints."""
    import torch.distributed

    from raycon.core import dist
    from raycon.evals import on_checkpoint
    from raycon.training.runtime import join_torchrun

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.runtime == "ray":
        raise ConfigError(["runtime = ray: under torchrun give --runtime local, or --evals.workers N without torchrun"])
    store = store_of(place, options)
    made = subjects(place, options)
    if not options.data.name and any(not t.data and not on_checkpoint.without_data(t, options.evals) for t in tasks):
        raise ConfigError([f"{place} does not say which images to use: give --data.name"])
    if problems := on_checkpoint.problems(made[0], tasks) + out_problems(made[0].file):
        raise ConfigError(problems)
    run_tasks = on_ray(options) if options.runtime == "ray" else here(options)
    join_torchrun()
    failed, first = False, dist.rank() == 0
    if dist.world() > 1:
        together = [t for t in tasks if on_checkpoint.on_several(t, options.evals)]
        failed = evaluated(made, together, run_tasks, first, store)
        tasks = [t for t in tasks if t not in together]
        torch.distributed.destroy_process_group()
    if first:
        failed |= evaluated(made, tasks, run_tasks, first, store)
        sys.stdout.write(f"kept in {made[0].file if store is None else f'{store.address}/{made[0].file.name}'}\n")
    return int(failed)


def evaluated(made: list[Subject], tasks: list[Task], run_tasks: RunTasks, tell: bool, store: Store | None) -> bool:
    """Run the tasks on each subject; with ``tell`` keep and print the numbers. Did any fail?"""
    from raycon.evals import on_checkpoint

    failed = False
    for subject in made if tasks else []:
        label = str(subject.entry.get("control") or subject.entry["checkpoint"])
        with progress(label if tell else "", len(set(tasks))) as done:
            outcome = run_tasks(subject, tasks, done)
        failed |= bool(outcome.failed)
        if tell:
            on_checkpoint.keep(subject, outcome)
            sys.stdout.write(table(label, outcome))
            if store is not None:
                for file in (subject.file, subject.metrics):
                    if file is not None and file.exists():
                        store.put(file, file.name)
    return failed


def store_of(place: Path, options: Options) -> Store | None:
    """Where the numbers of a run that was fetched from an address go back to; None for all else.

    Raises ConfigError while the run is being trained: its own process would write over them.
    """
    from raycon.core.address import is_address, working_folder

    run_dir = program.run_of(place)
    if run_dir is None or options.out:
        return None
    from raycon.methods import read_config
    from raycon.training import storage

    address = read_config(run_dir / "config.yaml").run.dir
    if not is_address(address) or run_dir.resolve() != working_folder(address).resolve():
        return None
    store = storage.Store(address)
    if who := store.holder()[0]:
        raise ConfigError([f"{address} is being trained in by {who}: wait for its end, or give --out FILE"])
    return store


def out_problems(file: Path) -> list[str]:
    """What would keep the numbers from being added to a file: told before hours are spent on them."""
    if not file.parent.is_dir() or file.is_dir() or not os.access(file.parent, os.W_OK):
        return [f"{file} cannot be written: give --out FILE in a folder that is there"]
    try:
        read_results(file)
    except (ValueError, OSError) as error:
        return [f"{error} (or give another --out FILE)"]
    return []


def subjects(place: Path, options: Options) -> list[Subject]:
    """What is evaluated, in order. Raises ConfigError when it cannot be read."""
    from raycon.evals import on_checkpoint
    from raycon.methods import read_config
    from raycon.training import checkpoint

    run_dir = program.run_of(place)
    if run_dir is None:
        return [of_file(place, options)]
    config = dataclasses.replace(
        read_config(run_dir / "config.yaml"), data=options.data, evals=options.evals, seed=options.seed
    )
    if options.every:
        paths = checkpoint.steps(run_dir / "checkpoints")
    elif (place / checkpoint.STATE).is_file():
        paths = [place]
    else:
        newest, refused = checkpoint.newest(run_dir / "checkpoints")
        for text in refused:
            logger.warning("passed over: %s", text)
        paths = [] if newest is None else [newest]
    if not paths:
        raise ConfigError([f"{run_dir}: no readable checkpoint in checkpoints/"])
    try:
        made = [on_checkpoint.of_run(run_dir, path, config) for path in paths]
    except checkpoint.CheckpointError as error:
        raise ConfigError([str(error)]) from None
    made += on_checkpoint.controls_of(made[-1], run_dir) if options.controls else []
    out = Path(options.out) if options.out else None
    return [dataclasses.replace(s, file=out or s.file, metrics=None if out else s.metrics) for s in made]


def of_file(place: Path, options: Options) -> Subject:
    """The encoder in a file of weights."""
    from raycon.evals.on_checkpoint import Subject
    from raycon.training.interop import FileError, load_encoder, preparation

    try:
        encoder, about = load_encoder(place)
    except FileError as error:
        raise ConfigError([str(error)]) from None
    known = preparation(about)
    if not known.known:
        logger.warning("%s does not say how its images were normalised: taken are mean %s, std %s",
                       place, known.mean, known.std)  # fmt: skip
    size = known.size if options.data.size == DataConfig().size else options.data.size
    config = RunConfig(seed=options.seed, data=dataclasses.replace(options.data, size=size), evals=options.evals)
    beside = place / "evaluations.json" if place.is_dir() else place.with_name(place.name + ".evaluations.json")
    entry = {"step": int(about.facts.get("step") or 0), "epoch": int(about.facts.get("epochs") or 0)}
    return Subject(
        config=config, own="", encoder=encoder, mean=known.mean, std=known.std, entry=entry | {"checkpoint": place.name},
        file=Path(options.out) if options.out else beside,
        cache=Path(options.data.cache or Path.home() / ".cache" / "raycon"),
    )  # fmt: skip


Done = Callable[[Task, Outcome], None]
RunTasks = Callable[["Subject", "list[Task]", Done], Outcome]


def here(options: Options) -> RunTasks:
    import torch

    from raycon.evals import on_checkpoint
    from raycon.training.runtime import choose_device

    torch.set_num_threads(options.threads)
    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    return lambda subject, tasks, done: on_checkpoint.run_here(subject, tasks, device, done)


def on_ray(options: Options) -> RunTasks:
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise ConfigError(["runtime = ray: Ray is not installed; pip install 'raycon[ray]', or give --runtime local"])
    from raycon.on_ray import evaluate, trainer

    trainer.connect()
    if problems := evaluate.placement_problems(options.evals):
        raise ConfigError(problems)
    return lambda subject, tasks, done: evaluate.run(subject, tasks, options.shards, options.threads, done)


class Bar:
    """A bar on a terminal that moves when an evaluation has ended."""

    def __init__(self, label: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("evaluate {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=total)

    def __enter__(self) -> Done:
        self._progress.start()
        return self._done

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _done(self, task: Task, outcome: Outcome) -> None:
        self._progress.console.print(f"{task.name} {'failed' if outcome.failed else 'done'}", highlight=False)
        self._progress.advance(self._task)


def progress(label: str, total: int) -> AbstractContextManager[Done]:
    return Bar(label, total) if label and sys.stderr.isatty() else nullcontext(lambda task, outcome: None)


def table(label: str, outcome: Outcome) -> str:
    """The numbers as aligned text, then what failed."""
    shown = {k: v for k, v in outcome.results.items() if not k.endswith("/failed")}
    width = max([len(k) for k in shown] + [1])
    lines = [f"{label}:"] + [f"  {k:{width}}  {v:.6g}" for k, v in sorted(shown.items())]
    lines += [f"  {name} failed: {text}" for name, text in outcome.failed.items()]
    lines += [f"  seconds: {json.dumps({k: round(v, 1) for k, v in outcome.seconds.items()})}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
