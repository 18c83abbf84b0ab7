"""An index of any features: build, search, cluster, look at it, and plan one.

    python -m raycon.index build FEATURES --out DIR        write an index that can tell when a byte was altered
    python -m raycon.index search INDEX --queries FILE     the nearest rows of each query
    python -m raycon.index cluster INDEX -k 100 1000       exact k-means
    python -m raycon.index stats INDEX                     sizes, norms, duplicates, effective rank; checks every byte
    python -m raycon.index plan --rows N --dim D -k ...    memory, arithmetic, traffic and time, before any of it

FEATURES is a .npy (N, D), a Parquet table with a column of lists, or a folder of such; INDEX is what build wrote, or
FEATURES. With --ray the shards are actors on the cluster of RAY_ADDRESS (or one started here).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycon.core import program
from raycon.core.config import ConfigError, MiningConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from raycon.index.sources import Source

NAME = "python -m raycon.index"


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 done, 1 it failed, 2 the request was wrong."""
    return program.run("raycon.index", answer, argv)


def answer(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    _COMMANDS[options.command](options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, epilog=program.HINT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about, allow_abbrev=False)

    def table(to: argparse.ArgumentParser) -> None:
        to.add_argument("--column", default="", help="the Parquet column, when several hold lists of floats")
        to.add_argument("--metric", choices=("cosine", "l2"), default=None, help="of FEATURES; cosine (default): "
                        "rows are brought to unit length. An index knows its own")  # fmt: skip

    def shards(to: argparse.ArgumentParser) -> None:
        to.add_argument("--shards", type=int, default=2, help="parts of the index (default 2)")
        to.add_argument("--threads", type=int, default=1, help="CPU threads of each shard (default 1)")
        to.add_argument("--ray", action="store_true", help="shards are Ray actors")

    def output(to: argparse.ArgumentParser, text: str, needed: bool = False) -> None:
        to.add_argument("--out", type=Path, required=needed, help=text)
        to.add_argument("--overwrite", action="store_true", help="replace what is there")

    build = command("build", "Write an index: parts with a checksum of every 16 MB.")
    build.add_argument("features", type=Path, metavar="FEATURES")
    output(build, "the folder of the index", needed=True)
    table(build)
    build.add_argument("--storage", choices=("float32", "float16"), default="float32", help="float16: half the size")
    shards(build)

    search = command("search", "The nearest rows of each query, exactly.")
    search.add_argument("index", type=Path, metavar="INDEX")
    which = search.add_mutually_exclusive_group(required=True)
    which.add_argument("--queries", type=Path, help="features of the same width, as FEATURES")
    which.add_argument("--rows", type=int, nargs="+", help="rows of the index; each is left out of its own answer")
    search.add_argument("-k", type=int, default=10, help="how many (default 10)")
    output(search, "an .npz: rows (Q, k), similarity (Q, k) (l2: distance); else a table is printed")
    table(search)
    shards(search)

    cluster = command("cluster", "Exact k-means; several k in one go.")
    cluster.add_argument("index", type=Path, metavar="INDEX")
    cluster.add_argument("-k", type=int, nargs="+", required=True, help="numbers of clusters")
    output(cluster, "an .npz: for each k assignment_<k> (N,), centroids_<k> (k, D), the means of the rows")
    cluster.add_argument("--iterations", type=int, default=20, help="of each restart (default 20)")
    cluster.add_argument("--redo", type=int, default=1, help="restarts; the best is kept (default 1)")
    cluster.add_argument("--warm", type=Path, help="start from the assignments of an .npz written before")
    cluster.add_argument("--spherical", action="store_true", help="centroids of unit length in every iteration")
    cluster.add_argument("--seed", type=int, default=0)
    table(cluster)
    shards(cluster)

    stats = command("stats", "Read every row once, check it, and say what is there.")
    stats.add_argument("index", type=Path, metavar="INDEX")
    stats.add_argument("--json", action="store_true", help="one JSON object")
    table(stats)

    plan = command("plan", "What a refresh will need: memory, arithmetic, traffic and time. Runs nothing of that size.")
    plan.add_argument("--rows", type=int, required=True)
    plan.add_argument("--dim", type=int, required=True)
    plan.add_argument("-k", type=int, nargs="*", default=[], help="numbers of clusters")
    plan.add_argument("--shards", type=int, default=2)
    plan.add_argument("--neighbours", type=int, default=0, help="neighbours of every row, exactly")
    plan.add_argument("--iterations", type=int, default=20)
    plan.add_argument("--redo", type=int, default=5)
    plan.add_argument("--warm", action="store_true", help="from the last labels")
    plan.add_argument("--storage", choices=("fp32", "fp16"), default="fp32")
    plan.add_argument("--gflops", type=float, default=0.0, help="of one shard; default: one core here, measured")
    plan.add_argument("--gbit", type=float, default=10.0, help="of a node's network (default 10)")
    plan.add_argument("--memory-gb", type=float, default=0.0, help="for each shard: says how many are needed")
    plan.add_argument("--json", action="store_true", help="one JSON object")
    return parser


# --- commands ---------------------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> None:
    import shutil

    from raycon.index.persist import clear
    from raycon.index.service import Saved
    from raycon.index.sources import open_source

    _check(options)
    out: Path = options.out
    if any(out.glob("rows-*")) and not options.overwrite:
        raise ConfigError([f"--out {out} holds an index: give another folder, or --overwrite"])
    source, metric = open_source(options.features, options.column), options.metric or "cosine"
    work = out.resolve().with_name(
        f".{out.resolve().name}.{os.getpid()}.part"
    )  # what is in ``out`` stays until the end
    try:
        if options.ray:
            saved = Saved(folder=work, rows=source.rows, write=True, storage=options.storage, metric=metric)
            with _actors(options, source.rows, source.dim, saved) as index:
                _fill(index, source.rows, source.blocks(metric))
                index.call("state", 0)  # a whole shard writes its part
        else:
            _write_parts(source, metric, work, options.shards, options.storage)
        clear(out)
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(work.iterdir(), key=lambda f: f.suffix, reverse=True):  # manifests last
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(f.stat().st_size for f in out.glob("rows-*.npy"))
    _say(f"{source.rows} x {source.dim} features, {metric}, {options.storage}, {size / 1e6:.1f} MB in {out}")


def _write_parts(source: Source, metric: str, folder: Path, parts: int, storage: Any) -> None:
    """As the shards of an index write them, one after the other and with no more memory than a block."""
    from raycon.index.local import part
    from raycon.index.persist import PartWriter

    ranges, writer, left = iter(part(source.rows, parts)), None, 0
    with _bar("writing", source.rows) as advance:
        for first_row, block in source.blocks(metric):
            done = 0
            while done < len(block):
                if writer is None:
                    first, last = next(ranges)
                    writer, left = (
                        PartWriter(folder, 0, first, last, source.rows, source.dim, storage, metric),
                        last - first,
                    )
                piece = block[done : done + left]
                writer.write(piece)
                done, left = done + len(piece), left - len(piece)
                if not left:
                    writer.close()
                    writer = None
            advance(first_row + len(block))


def _search(options: argparse.Namespace) -> None:
    import numpy as np

    from raycon.index.service import cosines, search_rows
    from raycon.index.sources import open_source

    _check(options)
    with ExitStack() as stack:
        index, facts = stack.enter_context(_opened(options))
        own = None
        if options.rows:
            if wrong := [r for r in options.rows if not 0 <= r < facts["rows"]]:
                raise ConfigError([f"--rows {wrong[0]}: the index holds rows 0 .. {facts['rows'] - 1}"])
            own = np.array(options.rows, dtype=np.int64)
            queries = np.empty((len(own), facts["dim"]), dtype=np.float32)
            for where, block in index.call("gather", 0, own):
                queries[where] = block
        else:
            table = open_source(options.queries, options.column)
            if table.dim != facts["dim"]:
                raise ConfigError(
                    [f"--queries {options.queries}: rows of {table.dim} numbers, the index: {facts['dim']}"]
                )
            queries = np.concatenate([block for _, block in table.blocks(facts["metric"])])
        if not 1 <= options.k <= facts["rows"] - (own is not None):
            raise ConfigError([f"-k {options.k}: give 1 .. {facts['rows'] - (own is not None)}"])
        found = []
        with _bar("searching", len(queries)) as advance:
            for start in range(0, len(queries), 1024):
                of = None if own is None else own[start : start + 1024]
                found.append(
                    search_rows(
                        index.call, 0, facts["rows"], facts["dim"], queries[start : start + 1024], options.k, of
                    )
                )
                advance(min(start + 1024, len(queries)))
    row_QK, sqdist_QK = (np.concatenate(parts) for parts in zip(*found, strict=True))
    name = "similarity" if facts["metric"] == "cosine" else "distance"
    value_QK = cosines(sqdist_QK) if facts["metric"] == "cosine" else np.sqrt(sqdist_QK).astype(np.float32)
    if options.out:
        _write_npz(options.out, {"rows": row_QK, name: value_QK})
        _say(f"{len(row_QK)} queries x {options.k} rows in {options.out}")
        return
    for query, (rows, values) in enumerate(zip(row_QK, value_QK, strict=True)):
        label = f"row {own[query]}" if own is not None else f"query {query}"
        _say(f"{label}: " + "  ".join(f"{r} ({v:.4f})" for r, v in zip(rows, values, strict=True)))


def _cluster(options: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from raycon.core.types import Needs, Snapshot
    from raycon.index.merge import merge_steps

    _check(options, "iterations", "redo")
    ks = tuple(options.k)
    if len(set(ks)) < len(ks):
        raise ConfigError([f"-k {' '.join(map(str, ks))}: the same number twice"])
    with _opened(options) as (index, facts):
        if wrong := [k for k in ks if not 1 <= k <= facts["rows"]]:
            raise ConfigError([f"-k {k}: the index has {facts['rows']} rows; give 1 .. {facts['rows']}" for k in wrong])
        if options.warm:
            labels = tuple(torch.from_numpy(a) for a in _read_warm(options.warm, ks, facts["rows"]))
            # A warm start needs labels only; centroids stand for their number.
            index.previous = Snapshot(-1, labels, tuple(torch.zeros(k, facts["dim"]) for k in ks), (), None)
        snapshot, metrics = _watched(index, Needs(clusterings=ks, spherical=options.spherical))
        arrays: dict[str, NDArray[Any]] = {}
        radius = max(state.radius for state in index.call("state", 0))
        for k, label in zip(ks, snapshot.assignment, strict=True):
            arrays[f"assignment_{k}"] = label.numpy()
            parts = index.call("label_sums", 0, label.numpy(), k, facts["rows"], radius)
            sums_KD, counts_K, _ = merge_steps(parts)
            with np.errstate(invalid="ignore"):
                arrays[f"centroids_{k}"] = (sums_KD / counts_K[:, None]).astype(np.float32)  # NaN: no row
    for i, k in enumerate(ks):
        of = {name.split("/")[-1]: value for name, value in metrics.items() if name.startswith(f"index/{i}/")}
        drift = f"  AMI with {options.warm} {metrics[f'mining/{i}/ami']:.4f}" if options.warm else ""
        _say(f"k {k}: objective {of['objective']:.6g}  passes {of['iterations']:.0f}  in use {of['used']:.0f}  largest "
             f"{of['largest']:.0f}  imbalance {of['imbalance']:.3f}{drift}")  # fmt: skip
    _say(f"{metrics['mining/seconds']:.1f} s")
    if options.out:
        _write_npz(options.out, arrays)
        _say(f"assignments and centroids in {options.out}")


def _stats(options: argparse.Namespace) -> None:
    import numpy as np

    facts, blocks = _table_of(options)
    rows, dim = facts["rows"], facts["dim"]
    total, cross = np.zeros(dim), np.zeros((dim, dim))
    low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
    norms, keys = np.empty(rows), np.empty(rows, dtype=np.uint64)
    weights = np.random.default_rng(0).integers(1, 2**63, dim, dtype=np.uint64) * 2 + 1
    with _bar("reading", rows) as advance:
        for first, block in blocks:
            wide = block.astype(np.float64)
            total += wide.sum(0)
            cross += wide.T @ wide
            low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
            norms[first : first + len(block)] = np.linalg.norm(wide, axis=1)
            bits = (block + np.float32(0)).view(np.uint32).astype(np.uint64)  # + 0: -0 and 0 are equal
            keys[first : first + len(block)] = (bits * weights).sum(1, dtype=np.uint64)  # wraps around: a hash
            advance(first + len(block))
    mean = total / rows
    spectrum = np.linalg.eigvalsh(cross / rows - np.outer(mean, mean)).clip(0)
    p = spectrum[spectrum > 0] / max(spectrum.sum(), np.finfo(np.float64).tiny)
    found = facts | {
        "norm_least": float(norms.min()),
        "norm_mean": float(norms.mean()),
        "norm_largest": float(norms.max()),
        "norm_of_mean": float(np.linalg.norm(mean)),
        "duplicates": rows - len(np.unique(keys)),
        "constant_columns": int((low == high).sum()),
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
    }
    if options.json:
        _say(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        _say(f"{name.replace('_', ' '):{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")


def _plan(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from raycon.index.plan import Machine, measured_rate, plan, shards_for

    flops = options.gflops * 1e9 or measured_rate(options.dim)
    machine = Machine(flops=flops, network=options.gbit * 1e9 / 8, memory=options.memory_gb * 1e9)
    shards = options.shards
    try:
        needed = shards_for(options.rows, options.dim, machine.memory, options.storage) if machine.memory else shards
        made = plan(
            options.rows, options.dim, options.k, shards, neighbours=options.neighbours, iterations=options.iterations,
            redo=options.redo, warm=options.warm, storage=options.storage, machine=machine,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if options.json:
        _say(json.dumps(asdict(made) | {"seconds": made.seconds, "shards_needed": needed}))
        return

    def size(value: float) -> str:
        return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"

    lines = {
        "features": f"{size(made.added_bytes)} in all, {size(made.feature_bytes)} on each of {made.shards} shards",
        "a shard at most": size(made.shard_bytes),
        "the coordinator at most": size(made.coordinator_bytes),
        "a snapshot": f"{size(made.snapshot_bytes)}: on every rank and in each checkpoint",
        "passes over the data": f"{made.passes}",
        "arithmetic": f"{made.flops:.3g} FLOP: {made.compute_seconds:,.1f} s at {flops / 1e9:,.0f} GFLOP/s a shard",
        "coordinator to shards": size(made.sent_bytes),
        "shards to coordinator": f"{size(made.received_bytes)}; both {made.network_seconds:,.1f} s at {options.gbit:g} Gbit/s",
        "calls": f"{made.call_seconds:,.1f} s",
        "a refresh": f"{made.seconds:,.1f} s",
    }
    for name, text in lines.items():
        _say(f"{name:24} {text}")
    for problem in made.problems(machine):
        _say(f"does not fit: {problem}")


_COMMANDS = {"build": _build, "search": _search, "cluster": _cluster, "stats": _stats, "plan": _plan}


# --- what they share --------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace, *counts: str) -> None:
    problems = [
        f"--{name} {value}: give 1 or more"
        for name in ("shards", "threads", *counts)
        if (value := getattr(options, name)) < 1
    ]
    out = options.out
    if out is not None and options.command != "build":
        if out.exists() and not options.overwrite:
            problems.append(f"--out {out} exists: give another file, or --overwrite")
        if out.suffix != ".npz":
            problems.append(f"--out {out}: give a name that ends in .npz")
        if not out.parent.is_dir():
            problems.append(f"--out {out}: there is no folder {out.parent}")
    if options.ray:
        import importlib.util

        if importlib.util.find_spec("ray") is None:
            problems.append("--ray: Ray is not installed; pip install 'raycon[ray]', or leave it out")
    if problems:
        raise ConfigError(problems)


def _table_of(options: argparse.Namespace) -> tuple[dict[str, Any], Iterator[tuple[int, NDArray[np.float32]]]]:
    """What is known of an INDEX, and its rows. Raises ConfigError, DamagedPart."""
    from raycon.index.persist import read_range, whole
    from raycon.index.sources import open_source

    path: Path = options.index
    if path.is_dir() and any(path.glob("rows-*-*.json")):
        parts = whole(path)
        first = parts[0]
        if options.metric not in (None, first.metric):
            raise ConfigError([f"--metric {options.metric}: {path} was built for {first.metric}; build another"])
        facts = {"rows": first.rows, "dim": first.dim, "metric": first.metric, "storage": first.storage}
        facts |= {"parts": len(parts), "version": first.version}
        return facts, read_range(path, first.version, 0, first.rows)
    source, metric = open_source(path, options.column), options.metric or "cosine"
    return {"rows": source.rows, "dim": source.dim, "metric": metric}, source.blocks(metric)


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An INDEX as a FeatureIndex that holds version 0, and what is known of it."""
    facts, blocks = _table_of(options)
    with ExitStack() as stack:
        if options.ray:
            index = stack.enter_context(_actors(options, facts["rows"], facts["dim"], None))
        else:
            from raycon.index.local import LocalIndex

            index = LocalIndex(facts["rows"], facts["dim"], _mining(options), getattr(options, "seed", 0))
            stack.callback(index.close)
        _fill(index, facts["rows"], blocks)
        yield index, facts


def _mining(options: argparse.Namespace) -> MiningConfig:
    return MiningConfig(
        shards=options.shards,
        threads=options.threads,
        iterations=getattr(options, "iterations", 1),
        redo=getattr(options, "redo", 1),
        init="warm" if getattr(options, "warm", None) else "cold",
    )


@contextmanager
def _actors(options: argparse.Namespace, rows: int, dim: int, saved: Any) -> Iterator[Any]:
    import ray

    from raycon.on_ray.index import RayIndex, start_index, stop_index
    from raycon.on_ray.trainer import NAMESPACE, connect

    started = not ray.is_initialized()
    connect()
    try:
        name = f"index-program-{os.getpid()}-{os.urandom(4).hex()}"
        spec = start_index(
            name, rows, dim, _mining(options), namespace=NAMESPACE, seed=getattr(options, "seed", 0), saved=saved
        )
        try:
            yield RayIndex(spec)
        finally:
            stop_index(spec)
    finally:
        if started:
            ray.shutdown()


def _fill(index: Any, rows: int, blocks: Iterator[tuple[int, NDArray[np.float32]]]) -> None:
    with _bar("reading", rows) as advance:
        for first_row, block in blocks:
            index.add(0, first_row, block)
            advance(first_row + len(block))


def _watched(index: Any, needs: Any) -> tuple[Any, dict[str, float]]:
    """``index.snapshot``, with its passes counted on a terminal."""
    from concurrent.futures import ThreadPoolExecutor, wait

    with ThreadPoolExecutor(1) as pool, _bar("clustering: passes", None) as advance:
        future = pool.submit(index.snapshot, 0, needs)
        while not wait([future], timeout=0.5).done:
            advance(index.progress())
        found: tuple[Any, dict[str, float]] = future.result()
    return found


def _read_warm(file: Path, ks: Sequence[int], rows: int) -> list[NDArray[np.int64]]:
    """The assignments of an .npz that ``cluster`` wrote. Raises ConfigError naming all that does not fit."""
    import numpy as np

    found, problems = [], []
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for k in ks:
                if f"assignment_{k}" not in arrays.files:
                    problems.append(f"--warm {file} has no assignment_{k}; there are {', '.join(arrays.files)}")
                    continue
                label = arrays[f"assignment_{k}"]
                if label.shape != (rows,) or label.dtype.kind != "i" or label.min() < 0 or label.max() >= k:
                    problems.append(
                        f"--warm {file}: assignment_{k} does not give each of {rows} rows a cluster below {k}"
                    )
                found.append(label.astype(np.int64))
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
        problems.append(f"--warm {file} is no .npz that can be read: {str(error)[:200]}")
    if problems:
        raise ConfigError(problems)
    return found


def _write_npz(file: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """All or nothing."""
    import numpy as np

    work = file.with_name(f".{file.name}.{os.getpid()}.npz")
    try:
        np.savez(work, **arrays)  # type: ignore[arg-type]
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Any]:
    """A progress bar on a terminal, nothing in a log; the value given is called with how many are done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
