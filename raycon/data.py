"""Look at a data set, or convert it.

python -m raycon.data                                  the data sets there are
python -m raycon.data DATASET [--data.root FOLDER]     counts, classes, sizes, unreadable files, a contact sheet
python -m raycon.data write-ffcv DATASET --out FILE    convert it to an FFCV file (.beton)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycon.core import program
from raycon.core.config import ConfigError, DataConfig
from raycon.data_loaders import datasets

if TYPE_CHECKING:
    from raycon.data_loaders.datasets import ImageSet

CHECKED = 20_000
"""Images that are read to their end when nothing else is said."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 all well, 1 unreadable images or a failure, 2 the request was wrong."""
    return program.run("raycon.data", answer, argv)


def answer(arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if not arguments:
        for name in datasets.names():
            sys.stdout.write(f"{name:20}  {datasets.about(name).removeprefix(f'{name}: ')}\n")
        return 0
    if arguments[0] == "write-ffcv":
        return write_ffcv(_parser("write-ffcv").parse_args(arguments[1:]))
    return inspect(_parser("").parse_args(arguments))


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m raycon.data {verb}".rstrip(),
        description=__doc__,
        epilog=program.HINT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("dataset", metavar="DATASET", help="a data set's name; without any argument they are listed")
    parser.add_argument("--split", default="train", help="train (default), val, test, or what else the data set has")
    add = parser.add_argument_group("the data set (as in a run)").add_argument
    add("--data.root", dest="root", default="", help="where its files are: a folder, s3://..., gs://...")
    add("--data.listing", dest="listing", default="", help="a file that lists its images, classes or metadata")
    add("--data.columns", dest="columns", nargs="+", default=(), help="what the columns of data.listing are")
    add("--data.level", dest="level", default="", help="which weak labels, where there are several")
    add(
        "--data.on-error",
        dest="on_error",
        choices=("fail", "skip"),
        default="fail",
        help="skip: leave out unreadable images",
    )
    add(
        "--data.decode",
        dest="decode",
        choices=("always", "once"),
        default="always",
        help="once: keep images of one size decoded in data.cache",
    )
    add("--data.cache", dest="cache", default="", help="where converted data and what is known of it are kept")
    if verb == "write-ffcv":
        parser.add_argument(
            "--out", type=Path, help="the file to write; else its place in data.cache, where a run looks"
        )
        parser.add_argument("--workers", type=int, default=1, help="Ray tasks that read images; 1: this process alone")
    else:
        parser.add_argument(
            "--check", default=str(CHECKED), help=f"images to read: a number ({CHECKED:,}) or all; 0: none"
        )
        parser.add_argument("--sheet", type=Path, help="contact sheet (PNG); default DATASET-SPLIT.png in this folder")
        parser.add_argument("--no-sheet", action="store_true", help="make no contact sheet")
        parser.add_argument("--json", type=Path, help="also write the findings to this file")
    return parser


def _config(options: argparse.Namespace) -> DataConfig:
    cache = str(Path(options.cache).expanduser().absolute()) if options.cache else ""
    return DataConfig(
        name=options.dataset,
        root=options.root,
        listing=options.listing,
        columns=tuple(options.columns),
        level=options.level,
        on_error=options.on_error,
        decode=options.decode,
        cache=cache,
    )


def inspect(options: argparse.Namespace) -> int:
    """Print what is in a data set."""
    from raycon.data_loaders.overview import contact_sheet, overview

    if options.check != "all" and not options.check.isdigit():
        raise ConfigError([f"--check {options.check}: give a number of images, or all"])
    config = _config(options)
    dataset = datasets.open_config(config, options.split)
    whole = options.check == "all" or (dataset.image is not None and options.check != "0")  # arrays are soon read
    check = len(dataset) if whole else int(options.check)
    found = overview(dataset, _other_split(config, options.split), check)
    sys.stdout.write(found.text())
    if not options.no_sheet:
        sheet = options.sheet or Path(f"{dataset.name}-{dataset.split}.png")
        contact_sheet(dataset, sheet)
        sys.stdout.write(f"contact sheet: {sheet}\n")
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(found), indent=1), encoding="utf-8")
    return 1 if found.unreadable else 0


def _other_split(config: DataConfig, split: str) -> ImageSet | None:
    """The split that should have nothing in common with ``split``; None where there is none."""
    for other in ("train",) if split not in ("train", "trainval") else ("test", "val"):
        try:
            return datasets.open_config(config, other)
        except ValueError:
            continue
    return None


def write_ffcv(options: argparse.Namespace) -> int:
    """Write a data set as a .beton file."""
    problems = []
    if (options.out is None) == (not options.cache):
        problems.append("give --out FILE, or --data.cache FOLDER (the file then gets the name by which a run finds it)")
    if options.workers < 1:
        problems.append(f"--workers {options.workers}: give 1 or more")
    if problems:
        raise ConfigError(problems)
    from raycon.data_loaders.progress import progress
    from raycon.data_loaders.write_ffcv import beton_problem, write_beton

    dataset = datasets.open_config(_config(options), options.split)
    file = (
        options.out.expanduser().absolute()
        if options.out
        else Path(options.cache).expanduser().absolute() / f"{dataset.fingerprint}.beton"
    )
    if file.exists():
        problem = beton_problem(file, dataset)
        if problem is None:
            sys.stdout.write(f"{file} is there already, whole and of this data\n")
            return 0
        if options.out:
            raise ConfigError([f"--out {file} is there, but {problem}: remove it, or give another name"])
    file.parent.mkdir(parents=True, exist_ok=True)
    with _tasks(dataset, options.workers) as fetch, progress("images written", len(dataset)) as tell:
        write_beton(dataset, file, tell, fetch)
    size = file.stat().st_size / 1e6
    sys.stdout.write(f"{len(dataset):,} images written and verified: {file} ({size:,.1f} MB)\n")
    return 0


@contextlib.contextmanager
def _tasks(dataset: ImageSet, workers: int) -> Iterator[Any]:
    """How ``write_beton`` is to read the images: by Ray tasks, or None: by itself."""
    if workers > 1 and dataset.image is not None:
        sys.stderr.write(f"--workers {workers} has no effect: the images of {dataset.name} are in memory\n")
    elif workers > 1 and importlib.util.find_spec("ray") is None:
        sys.stderr.write(f"--workers {workers} has no effect: Ray is not installed (pip install 'raycon[ray]')\n")
    elif workers > 1:
        import ray

        from raycon.data_loaders.write_ffcv import pack
        from raycon.on_ray import tasks, trainer

        def fetch(dataset: ImageSet, spans: Iterable[Any]) -> Iterator[bytes]:
            return tasks.in_order(pack, dataset, spans, workers)

        trainer.connect()
        try:
            yield fetch
        finally:
            ray.shutdown()
        return
    yield None


if __name__ == "__main__":
    sys.exit(main())
