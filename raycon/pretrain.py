"""Pretrain an image encoder.

python -m raycon.pretrain RECIPE [--dotted.option value ...]
python -m raycon.pretrain --config FILE [--dotted.option value ...]
python -m raycon.pretrain --resume RUN_DIR

--quiet: only warnings and the result; --json-log: metrics as lines of JSON; --debug: where an error came from.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycon import methods
from raycon.core import log
from raycon.core.address import address_problems, is_address, place_of, working_folder
from raycon.core.config import (
    ConfigError,
    RunConfig,
    absolute_places,
    flatten,
    problems_of,
    save_yaml,
    to_dict,
)
from raycon.recipes import first_line, recipe, recipes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raycon.training.storage import Mirror

logger = logging.getLogger("raycon")


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 finished, 1 the run failed, 2 the request was wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    short = {"--quiet": "--log.quiet", "--json-log": "--log.json"}
    arguments = [short.get(a, a) for a in arguments if a != "--debug"]
    try:
        config, resume = parse(arguments)
        return run(config, resume, ["python", "-m", "raycon.pretrain", *arguments])
    except ConfigError as error:
        if debug:
            raise
        print(f"raycon.pretrain: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("raycon.pretrain: stopped at once; the last checkpoint is whole", file=sys.stderr)  # noqa: T201
        return 130
    except (RuntimeError, FloatingPointError, OSError, ValueError) as error:
        if debug:
            raise
        hint = f"\n{OUT_OF_MEMORY}" if "out of memory" in str(error).lower() else ""
        print(f"raycon.pretrain: {type(error).__name__}: {error}{hint}\n(--debug shows where)", file=sys.stderr)  # noqa: T201
        return 1


OUT_OF_MEMORY = (
    "The same step in less memory: --train.accumulate 2 (or 4), --train.precision bf16; else a smaller --train.batch or "
    "--data.size. python -m raycon.doctor --plan RECIPE says what takes the memory."
)


# --- the command line -------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[RunConfig, Path | None]:
    """The configuration asked for, and the run directory to resume. Exits for --help; raises ConfigError."""
    import tyro

    rest = list(arguments)
    file, resume = _take(rest, "--config"), _take(rest, "--resume")
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    given = [g for g in (named, file, resume) if g]
    wants_help = "--help" in rest or "-h" in rest
    if len(given) > 1 or (not given and not wants_help):
        raise ConfigError([f"give one of RECIPE, --config FILE, --resume RUN_DIR (got {len(given)})\n{recipe_list()}"])
    if named:
        base = recipe(named)
    elif file:
        base = read_yaml(Path(file))
    elif resume:
        base, where = configuration_of(resume)
        base = dataclasses.replace(base, run=dataclasses.replace(base.run, dir=where))
    else:
        base = recipe("quickstart")
    about = f"{__doc__}\n{recipe_list()}\n\nThe options below are shown with the values of {named or 'quickstart'}."
    if named:
        about = f"{named}: {recipes()[named].__doc__}\n{about}"
    rest = elastic(rest)
    config = tyro.cli(RunConfig, default=base, args=rest, description=about, prog="python -m raycon.pretrain")
    return config, place_of(resume) if resume else None


def configuration_of(run_dir: str) -> tuple[RunConfig, str]:
    """The configuration of a run, and where it is: its absolute path, or its address."""
    if not is_address(run_dir):
        return read_yaml(Path(run_dir) / "config.yaml"), str(Path(run_dir).resolve())
    import tempfile

    from raycon.training import storage

    try:
        data = storage.Store(run_dir).get("config.yaml")
    except storage.StorageError as error:
        raise ConfigError([f"--resume {error}"]) from error
    if data is None:
        raise ConfigError([f"--resume {run_dir}: holds no run (no config.yaml)"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_bytes(data)
        return read_yaml(file), run_dir.rstrip("/")


def elastic(arguments: list[str]) -> list[str]:
    """--scaling.workers MIN:MAX, written as the two options that it is."""
    found = list(arguments)
    value = _take(found, "--scaling.workers")
    if value is None or ":" not in value:
        return arguments
    match = re.fullmatch(r"(\d+):(\d+)", value)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError([f"--scaling.workers {value}: give a number, or MIN:MAX with 1 <= MIN <= MAX"])
    return [*found, f"--scaling.min-workers={match[1]}", f"--scaling.workers={match[2]}"]


def _take(arguments: list[str], option: str) -> str | None:
    """Remove ``--option VALUE`` or ``--option=VALUE`` and return the value."""
    for i, argument in enumerate(arguments):
        if argument.startswith(option + "="):
            return arguments.pop(i).split("=", 1)[1]
        if argument == option:
            if i + 1 == len(arguments):
                raise ConfigError([f"{option}: give a value after it"])
            del arguments[i]
            return arguments.pop(i)
    return None


def recipe_list() -> str:
    width = max(map(len, recipes()))
    return "Recipes:\n" + "\n".join(f"  {name:{width}}  {first_line(name)}" for name in recipes())


def read_yaml(file: Path) -> RunConfig:
    """The configuration in a YAML file. Raises ConfigError when it is missing, no YAML, or names unknown options."""
    return methods.read_config(file)


# --- a run ------------------------------------------------------------------------------------------------------


def run(config: RunConfig, resume: Path | None, command: list[str]) -> int:
    """Check everything, train, evaluate, report."""
    from raycon.core import dist
    from raycon.training.runtime import join_torchrun

    if config.runtime == "local":
        join_torchrun()
    run_dir = Path(dist.gather_objects(str(choose_run_dir(config)))[0])
    if not is_address(config.run.dir):
        return run_here(config, run_dir, resume, command, None)
    if problems := address_problems(config.run.dir):
        raise ConfigError(problems)
    if "/" not in config.run.dir.partition("://")[2].strip("/"):
        raise ConfigError(
            [f"run.dir = {config.run.dir!r}: give a folder of its own in it, {config.run.dir.rstrip('/')}/NAME"]
        )
    from raycon.training import storage

    if dist.rank() != 0:
        run_dir = working_folder(config.run.dir)  # of this machine
        run_dir.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        return run_here(config, run_dir, resume, command, None)
    held = lock(run_dir)
    try:
        with storage.leading(config.run.dir, run_dir) as mirror:
            dist.barrier()
            return run_here(config, run_dir, resume, command, mirror)
    finally:
        held.close()


def run_here(config: RunConfig, run_dir: Path, resume: Path | None, command: list[str], mirror: Mirror | None) -> int:
    """``run`` in ``run_dir``; ``mirror`` keeps the store of its address equal to it (rank 0)."""
    from raycon import report
    from raycon.core import dist
    from raycon.training import job
    from raycon.training.runtime import STOP_FILE

    config = absolute(config, run_dir)
    world = config.scaling.workers if config.runtime == "ray" else dist.world()
    if resume is None and dist.gather_objects(same_run(config, run_dir))[0]:
        logger.info("%s holds this very run: going on with it", config.run.dir)
        resume = run_dir
    problems = start_problems(config, run_dir, resume, world)
    dataset = None
    try:
        dataset = job.open_data(config)
    except ConfigError as error:
        problems += error.problems
    if dataset is not None:
        facts = job.facts_of(config, dataset, world)
        problems += problems_of(config, facts) + labels_problems(config, facts)
        problems += network_problems(config, dataset) + crop_problems(config, facts)
    if problems:
        raise ConfigError(problems)
    held = lock(run_dir) if dist.rank() == 0 and mirror is None else None
    if dist.rank() == 0:
        prepare(config, run_dir, resume, command)
        for warning in config.method.warnings(facts):
            logger.warning("warning: %s", warning)
        logger.info("run directory: %s", config.run.dir)
    dist.barrier()
    (run_dir / STOP_FILE).unlink(missing_ok=True)
    if mirror is not None:
        mirror.start()
    if config.runtime == "ray":
        from raycon.on_ray import trainer

        trainer.connect()  # here, in the main thread, before our signal handlers take the place of Ray's
    started = time.monotonic()
    with stop_on_signal(run_dir / STOP_FILE, f"python -m raycon.pretrain --resume {config.run.dir}"):
        if dist.rank() != 0:
            run_local(config, run_dir)
            return 0
        shown = log.Displays(log.display(config.log.quiet, config.log.json), report.Live(run_dir))
        with log.Follower(run_dir / "metrics.jsonl", shown):
            if config.runtime == "ray":
                beside_signals(lambda: trainer.fit(config, run_dir, facts))
            else:
                run_local(config, run_dir)
    if mirror is not None:
        mirror.bring_back()
    status = finish(config, run_dir, time.monotonic() - started)
    if held is not None:
        held.close()
    return status


def run_local(config: RunConfig, run_dir: Path) -> None:
    """Train in this process (and those of torchrun beside it), then evaluate the checkpoints that wanted it."""
    from raycon.core import dist
    from raycon.evals import on_checkpoint
    from raycon.index.local import LocalIndex
    from raycon.training import job, storage
    from raycon.training.runtime import LocalRuntime, choose_device, no_index

    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")))
    index = no_index()
    if dim := job.feature_dim(config):
        rows = len(job.open_data(config))
        index = LocalIndex(rows, dim, config.mining, config.seed, dist.rank(), dist.world())
    runtime = LocalRuntime(run_dir, index, device, storage.of(config))
    try:
        job.train_rank(config, run_dir, device, runtime)
    finally:
        runtime.close()
    if dist.rank() == 0:
        for checkpoint in runtime.pending:
            on_checkpoint.evaluate(run_dir, checkpoint, device=device)


def finish(config: RunConfig, run_dir: Path, seconds: float) -> int:
    """The last words: numbers, where the run is, how to see the report."""
    from raycon import report
    from raycon.evals import on_checkpoint
    from raycon.training.runtime import STOP_FILE

    stopped = (run_dir / STOP_FILE).exists()
    page = report.write(run_dir, gather=config.log.report == "full" and not stopped)  # who stops it does not wait
    try:
        if log.tracks(config):
            from raycon.report import board

            shown = board.read(run_dir)
            log.publish(config, run_dir, shown.step, shown.pictures, shown.tables)
    except Exception as error:  # the run is over and whole; what a tracker could not take lies in the run directory
        logger.warning("wandb or TensorBoard: %s: %s", type(error).__name__, error)
    entry = on_checkpoint.last_entry(run_dir)
    lines = []
    if entry is not None:
        lines += [f"{name:24} {value:.2f}" for name, value in sorted(entry["results"].items()) if "/top1" in name]
        lines += [f"{name} failed: {text}" for name, text in entry["failed"].items()]
    verb = "stopped after" if stopped else "finished in"
    lines.append(f"{verb} {seconds:.0f} s; the run directory is {config.run.dir}")
    if stopped:
        lines.append(f"go on with:      python -m raycon.pretrain --resume {config.run.dir}")
    lines.append(f"see the report:  python -m webbrowser {page.as_uri()}")
    print("\n".join(lines), file=sys.stderr if config.log.json else sys.stdout, flush=True)
    return 0


@contextmanager
def stop_on_signal(file: Path, resume: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a checkpoint and a clean end; a second one ends at once."""

    def ask(number: int, frame: Any) -> None:
        if file.exists():
            raise KeyboardInterrupt
        file.touch()
        logger.warning("stopping: saving a checkpoint first (once more: stop at once). Go on with: %s", resume)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def beside_signals(work: Callable[[], None]) -> None:
    """Do ``work`` in a thread: Ray, in the main thread, would put its own signal handlers in place of ours."""
    with ThreadPoolExecutor(1, thread_name_prefix="raycon-fit") as pool:
        future = pool.submit(work)
        while not future.done():
            wait([future], timeout=0.5)  # returns to the interpreter, which then runs signal handlers
        future.result()


# --- checks and files -------------------------------------------------------------------------------------------


def choose_run_dir(config: RunConfig) -> Path:
    """``run.dir``, or runs/<recipe>-<options that differ from it>-<time>, never one that exists."""
    if is_address(config.run.dir):
        return working_folder(config.run.dir)
    if config.run.dir:
        return Path(config.run.dir).expanduser().absolute()
    name = [config.recipe or config.method.name]
    if config.recipe in recipes():
        default = flatten(to_dict(recipe(config.recipe)))
        own = flatten(to_dict(config))
        skip = ("run.", "log.", "recipe", "data.root", "data.cache")
        changed = {k: v for k, v in own.items() if not k.startswith(skip) and default.get(k) != v}
        name += [f"{k.split('.')[-1]}={v}" for k, v in changed.items()]
    name.append(time.strftime("%Y%m%d-%H%M%S"))
    readable = re.sub(r"[^A-Za-z0-9=._-]+", "_", "-".join(name))[-120:].lstrip("-_.")
    folder, number = Path("runs").absolute(), 1
    path = folder / readable
    while path.exists():
        number += 1
        path = folder / f"{readable}-{number}"
    return path


def absolute(config: RunConfig, run_dir: Path) -> RunConfig:
    """Ray's workers run elsewhere: every path is made absolute once, here."""
    cache = config.data.cache
    if not cache and not is_address(config.run.dir):  # else each machine has its own beside its working folder
        cache = str(run_dir.parent / ".cache")
    data, evals = absolute_places(dataclasses.replace(config.data, cache=cache), config.evals)
    weights = config.model.weights
    if weights and not weights.startswith("torchvision:"):
        weights = str(Path(weights).expanduser().absolute())
    where = config.run.dir.rstrip("/") if is_address(config.run.dir) else str(run_dir)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=where),
        data=data,
        model=dataclasses.replace(config.model, weights=weights),
        evals=evals,
    )


def start_problems(config: RunConfig, run_dir: Path, resume: Path | None, world: int) -> list[str]:
    """What is wrong with names and places."""
    from raycon import evals
    from raycon.evals import on_checkpoint
    from raycon.nn import views

    found = []
    kept = "config.yaml" if is_address(config.run.dir) else "checkpoints"  # those of a store are fetched when needed
    if resume is None and (run_dir / kept).exists():
        found.append(
            f"run.dir = {config.run.dir!r} holds a run: go on with --resume {config.run.dir}, or give another directory"
        )
    elif resume is not None:
        found += resume_problems(resume)
    there = next(p for p in (run_dir, *run_dir.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found.append(f"run.dir = {str(run_dir)!r} cannot be written ({there} is no writable directory): give another")
    try:
        tasks = evals.parse(config.evals.names)
    except ConfigError as error:
        found += error.problems
    else:
        found += on_checkpoint.start_problems(config, tasks)
    for name in config.method.needs().views:
        try:
            views.view_spec(config.data.views, name, config.data.size, (0.5,), (0.5,))
        except ConfigError as error:
            found += [p for p in error.problems if p not in found]
    found += loader_problems(config) + log.tracker_problems(config)
    weights = config.model.weights
    if weights and not weights.startswith("torchvision:") and not Path(weights).is_file():
        found.append(f"model.weights = {weights!r}: no such file")
    if config.method.needs().snapshot:
        from raycon.index import engine

        device = config.mining.device if config.runtime == "local" else "cpu"  # Ray's shards may be elsewhere
        found += engine.problems(config.mining.engine, device, graph=config.mining.neighbours == "hnsw")
    if is_address(config.run.dir) and config.mining.persist:
        found.append("mining.persist: the index keeps its files in the run directory, which must be a folder for it: leave "
                     f"it out, or give another run.dir than {config.run.dir!r}")  # fmt: skip
    if config.runtime == "ray":
        import importlib.util

        if importlib.util.find_spec("ray") is None:
            found.append("runtime = ray: Ray is not installed; pip install 'raycon[ray]', or give --runtime local")
    return found


def same_run(config: RunConfig, run_dir: Path) -> bool:
    """Does the directory hold a run of these very options? What says where, how loud and on how many is no matter.

    So a job that is given again after its machine was lost goes on, whoever gives it.
    """
    file = run_dir / "config.yaml"
    if not (is_address(config.run.dir) or (run_dir / "checkpoints").is_dir()) or not file.is_file():
        return False
    try:
        there = read_yaml(file)
    except ConfigError:
        return False
    return dataclasses.replace(there, run=config.run, log=config.log, scaling=config.scaling) == config


def lock(run_dir: Path) -> Any:
    """Hold the run directory until the result is closed or this process ends, however it ends.

    Raises ConfigError when another process holds it: two runs would write over each other.
    """
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / ".lock"
    handle = file.open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise ConfigError(
            [f"run.dir = {str(run_dir)!r} is being trained in by {holder}: wait for it, stop it, or give another"]
        ) from None
    except OSError as error:  # a file system without locks
        logger.warning("warning: %s: no lock (%s); see to it that no two runs write here", run_dir, error)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    handle.flush()
    return handle


def resume_problems(resume: Path) -> list[str]:
    from raycon.evals.base import read_results
    from raycon.training import checkpoint

    found = []
    path, refused = checkpoint.newest(resume / "checkpoints")
    if path is None and refused:
        found.append(f"--resume {resume}: no readable checkpoint: {'; '.join(refused)}")
    try:
        read_results(resume / "evaluations.json")
    except ValueError as error:  # training looks into it at every checkpoint
        found.append(f"--resume {resume}: {error}")
    return found


def loader_problems(config: RunConfig) -> list[str]:
    import importlib.util

    module = {"ffcv": "ffcv", "ray": "ray"}.get(config.data.loader)
    if module and importlib.util.find_spec(module) is None:
        return [f"data.loader = {module}: {module} is not installed; pip install 'raycon[{module}]', or choose torch"]
    return []


def labels_problems(config: RunConfig, facts: Any) -> list[str]:
    found = config.method.problems(facts)
    if config.method.needs().labels and facts.classes == 0:
        found.append(
            f"method.name = {config.method.name!r} needs weak labels; data.name = {config.data.name!r} has none"
        )
    return found


def network_problems(config: RunConfig, dataset: Any) -> list[str]:
    """Build the encoder once, to see whether it can be: with the weights of a file, else without memory for any."""
    import torch

    from raycon.nn import networks

    file = config.model.weights if Path(config.model.weights).is_file() else ""
    try:
        with torch.device("cpu" if file else "meta"):
            encoder = networks.build_encoder(dataclasses.replace(config.model, weights=file), len(dataset.mean))
        if config.model.weights.startswith("torchvision:"):
            networks.published_url(encoder, config.model.weights)
    except ConfigError as error:
        return error.problems
    return []


def crop_problems(config: RunConfig, facts: Any) -> list[str]:
    """Small crops (of multi-crop, and of neighbours) that would be wider than the whole images."""
    from raycon.nn import views

    found = []
    for name in dict.fromkeys(config.method.needs().views):
        if facts.image is None or not name.startswith(("local", "neighbour")):
            continue
        try:
            wide = views.view_spec(config.data.views, name, config.data.size, (0.5,), (0.5,)).size
        except ConfigError:
            continue  # start_problems says it
        if wide > min(facts.image[1:]):
            found.append(
                f"data.size = {config.data.size} makes the small crop {name!r} of data.views = {config.data.views!r} "
                f"{wide} pixels wide, more than the images' {min(facts.image[1:])}: give a smaller size, or data with "
                "larger images"
            )
    return found


def prepare(config: RunConfig, run_dir: Path, resume: Path | None, command: list[str]) -> None:
    """Make the run directory and write what a person needs to repeat the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log.attach_log_file(run_dir, config.log.quiet)
    file = run_dir / "config.yaml"
    if resume and file.exists() and read_yaml(file) != config:
        old = run_dir / f"config.until-{time.strftime('%Y%m%d-%H%M%S')}.yaml"
        file.rename(old)
        logger.info("options differ from before: the old configuration is %s", old.name)
    save_yaml(config, file)
    with (run_dir / "command.txt").open("a", encoding="utf-8") as handle:
        handle.write(shlex.join(command) + "\n")
    (run_dir / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")


def environment() -> dict[str, str]:
    """Versions and machine, for the run directory."""
    import raycon

    found = {
        "raycon": raycon.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
    }
    for name in ("torch", "torchvision", "numpy", "ray", "faiss-cpu", "faiss-gpu", "ffcv", "wandb"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
