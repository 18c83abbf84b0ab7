"""Embed a data set: the features of every image, with rows, paths and labels, as Parquet or npy files.

python -m raycon.embed CHECKPOINT DATASET [--out DIR] [--format parquet|npy] [--runtime local|ray] [--workers N]

CHECKPOINT: a run directory, a checkpoint in it, or a weight file of raycon.export, torchvision, timm or the papers.
DATASET: the name of a data set, or a folder of images (that is image-folder with --data.root).
Stopped half-way, the same command goes on where it was.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raycon.core import program
from raycon.core.address import fetched
from raycon.core.config import ConfigError, DataConfig, EvalConfig, absolute_places

if TYPE_CHECKING:
    from raycon.training.embedding import Work
    from raycon.training.interop import About

logger = logging.getLogger("raycon")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line sets."""

    data: DataConfig = field(default_factory=DataConfig)
    split: str = "train"
    """Of the data set."""
    out: str = ""
    """The folder to write; empty: embeddings/NAME-DATASET-SPLIT here."""
    format: Literal["parquet", "npy"] = "parquet"
    """parquet: a file per part, a row per image; npy: one array each of features, rows, labels, weak labels, paths."""
    runtime: Literal["local", "ray"] = "local"
    """local: this process; ray: tasks of the cluster of RAY_ADDRESS, or of one started here."""
    workers: int = 2
    """ray: parts that are made at a time."""
    cpus: float = 1.0
    """ray: CPUs of each."""
    gpus: float = 0.0
    """ray: GPUs of each."""
    part: int = 16384
    """Images per part: what is lost at most when the work is stopped, and kept in memory per worker."""
    half: bool = False
    """Write features as float16."""
    threads: int = 1
    """CPU threads of each worker."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 done, 1 it failed, 2 the request was wrong, 130 interrupted."""
    return program.run("raycon.embed", answer, argv, kept=_KEPT)


_KEPT = "Finished parts are kept: the same command goes on with the others."


def answer(arguments: list[str]) -> int:
    sys.stdout.write(run(*read(arguments)))
    return 0


# --- the command line -------------------------------------------------------------------------------------------


def read(arguments: list[str]) -> tuple[Path, Options]:
    """The checkpoint and the options. Exits for --help; raises ConfigError with everything that is wrong."""
    import tyro

    rest, words = list(arguments), []
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    if len(words) != 2 and not {"-h", "--help"} & set(rest):
        raise ConfigError([f"give CHECKPOINT and DATASET (got {len(words)}): --help shows how"])
    if len(words) == 2:
        words[0] = str(fetched(words[0]))
    base = defaults(Path(words[0]), words[1]) if len(words) == 2 else Options()
    options = tyro.cli(Options, default=base, args=rest, description=__doc__, prog="python -m raycon.embed")
    problems = [f"{n} = {getattr(options, n)}: give 1 or more" for n in ("workers", "part", "threads")
                if getattr(options, n) < 1]  # fmt: skip
    problems += [f"{n} = {getattr(options, n)}: give 0 or more" for n in ("cpus", "gpus") if getattr(options, n) < 0]
    if options.data.size < 1:
        problems.append(f"data.size = {options.data.size}: give 1 or more pixels")
    if options.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        problems.append("format = parquet: pyarrow is not installed; pip install pyarrow, or give --format npy")
    if problems:
        raise ConfigError(problems)
    data, _ = absolute_places(options.data, EvalConfig())
    return Path(words[0]), dataclasses.replace(options, data=data)


def defaults(checkpoint: Path, dataset: str) -> Options:
    """The options of the run that a checkpoint belongs to; ``data.*`` only where it is the same data set."""
    if not checkpoint.exists():
        raise ConfigError([f"{checkpoint}: no such run, checkpoint or file"])
    data, name, root = None, dataset, ""
    if (run_dir := program.run_of(checkpoint)) is not None:
        from raycon.methods import read_config

        data = read_config(run_dir / "config.yaml").data
    if Path(dataset).is_dir() and dataset not in importlib.import_module("raycon.data_loaders.datasets").names():
        name, root = "image-folder", str(Path(dataset).absolute())
    if data is None:
        from raycon.training.interop import card_of

        said = card_of(checkpoint).get("preprocessing") or {}
        data = DataConfig(name=name, root=root, size=int(said.get("size") or DataConfig().size))
    elif root or name != data.name:
        data = DataConfig(name=name, root=root, size=data.size, workers=data.workers, cache=data.cache)
    return Options(data=dataclasses.replace(data, validation=0.0))


# --- running ----------------------------------------------------------------------------------------------------


def run(checkpoint: Path, options: Options) -> str:
    """Embed what is missing; returns what to tell."""
    from raycon.core.stream import shard_range
    from raycon.training import embedding, interop

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        encoder, about = interop.load_encoder(checkpoint)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    dataset = importlib.import_module("raycon.data_loaders.datasets").open_config(options.data, options.split)
    rows = len(dataset)
    parts = -(-rows // options.part)
    work = prepare(encoder, about, dataset, options, parts)
    identity = {"encoder": embedding.digest(encoder), "data": dataset.fingerprint, "size": work.source.size}
    identity |= {"mean": list(work.source.mean), "std": list(work.source.std), "half": options.half}
    out = Path(options.out or Path("embeddings") / f"{_name(about)}-{options.data.name}-{options.split}")
    folder = embedding.Folder(out, options.format, identity, rows, parts, about.features)
    if folder.complete:
        folder.finish(dataset)
        return f"{out} is complete already: {rows} rows of {about.features} features\n"
    missing = folder.missing()
    before = rows - sum(end - first for first, end in (shard_range(rows, p, parts) for p in missing))
    progress = importlib.import_module("raycon.data_loaders.progress").progress
    with progress(f"embed {options.data.name} {options.split}", rows) as show:
        done = before
        for part, found in zip(missing, made(work, missing, options), strict=True):
            folder.put(part, found, dataset)
            done += len(found)
            show(done)
    folder.finish(dataset)
    again = f" ({before} of them from before)" if before else ""
    return f"wrote {out}: {rows} rows{again} of {about.features} features, as {options.format}\n"


def prepare(encoder: Any, about: About, dataset: Any, options: Options, parts: int) -> Work:
    """What makes a part: the encoder with the data set, prepared as the encoder's own images were."""
    import torch

    from raycon.evals.base import Source
    from raycon.training.embedding import Work
    from raycon.training.interop import preparation
    from raycon.training.runtime import choose_device

    known = preparation(about)
    if not known.known:
        logger.warning(
            "%s does not say how its images were normalised: taken are mean %s, std %s",
            about.source, known.mean, known.std,
        )  # fmt: skip
    if len(dataset.mean) != about.channels:
        raise ConfigError(
            [
                f"data.name = {options.data.name!r} has {len(dataset.mean)} channel(s), the encoder takes {about.channels}"
            ]
        )
    device = torch.device("cuda" if options.gpus else "cpu") if options.runtime == "ray" else choose_device(0)
    source = Source(
        encoder=encoder, train=dataset, test=None, size=options.data.size, mean=known.mean, std=known.std, device=device,
        cache=Path(options.data.cache or Path.home() / ".cache" / "raycon"), workers=options.data.workers,
    )  # fmt: skip
    return Work(source=source, parts=parts, half=options.half, threads=options.threads)


def made(work: Work, missing: list[int], options: Options) -> Iterator[Any]:
    """The features of each missing part, in order."""
    from raycon.training.embedding import embed_part

    if options.runtime == "local":
        yield from (embed_part(work, part) for part in missing)
        return
    try:
        import ray
    except ImportError:
        raise ConfigError(
            ["runtime = ray: Ray is not installed; pip install 'raycon[ray]', or give --runtime local"]
        ) from None

    from raycon.on_ray import tasks, trainer

    trainer.connect()
    for option, what in (("cpus", "CPU"), ("gpus", "GPU")):
        asked = getattr(options, option)
        most = max((n["Resources"].get(what, 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)
        if asked > most:
            raise ConfigError([f"{option} = {asked:g} can never be placed: no node has more than {most:g} {what}"])
    yield from tasks.in_order(embed_part, work, missing, options.workers, options.cpus, options.gpus)


def _name(about: About) -> str:
    """The run's name, or the file's."""
    source = Path(about.source)
    return source.parent.parent.name if about.config is not None and source.is_dir() else source.name.split(".")[0]


if __name__ == "__main__":
    sys.exit(main())
