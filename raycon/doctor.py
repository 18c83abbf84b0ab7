"""Check this machine, and plan a run before anyone pays for it.

python -m raycon.doctor                                   what is here, what is missing, how to mend it
python -m raycon.doctor --plan RECIPE [--gpus N] [--images N] [--dotted.option value ...]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raycon.core import program
from raycon.core.config import ConfigError

if TYPE_CHECKING:
    from raycon.training.cost import Assumed, Counted, RunPlan

State = Literal["ok", "note", "bad"]
_MARKS = {"ok": "ok  ", "note": "note", "bad": "BAD "}


@dataclass(frozen=True)
class Check:
    """One line of the answer."""

    name: str
    state: State
    """note: works, but something is worth knowing; bad: something will fail."""
    text: str
    fix: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 all well, 1 something is bad, 2 the request was wrong."""
    return program.run("raycon.doctor", answer, arguments)


def answer(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m raycon.doctor",
        description=__doc__,
        epilog=program.HINT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", metavar="RECIPE", help="memory, time and traffic of a recipe (or a YAML file)")
    parser.add_argument("--gpus", type=int, default=0, help="plan: ranks, one GPU each (0: scaling.workers, CPUs)")
    parser.add_argument("--images", type=float, default=0, help="plan: images of the data set (0: those that are here)")
    parser.add_argument("--tflops", type=float, default=0, help="plan: 10^12 operations a rank sustains per second "
                        "(default: 100 per GPU; without --gpus what this machine does)")  # fmt: skip
    parser.add_argument("--gbit", type=float, default=100, help="plan: Gbit/s of each rank's network (default: 100)")
    parser.add_argument("--shard-gflops", type=float, default=0, help="plan: 10^9 operations an index shard sustains "
                        "per second (default: measured here)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
    parser.add_argument("--fast", action="store_true", help="leave out what takes more than a second")
    asked, rest = parser.parse_known_args(arguments)
    if asked.plan is None:
        if rest:
            raise ConfigError([f"unknown option {rest[0]!r}: dotted options go with --plan RECIPE"])
        return report_checks(asked.fast, asked.json)
    try:
        return report_plan(asked, rest)
    except ConfigError:
        raise
    except ValueError as error:  # a run of these numbers cannot be
        raise ConfigError([str(error)]) from error


# --- checks -----------------------------------------------------------------------------------------------------


def report_checks(fast: bool, as_json: bool) -> int:
    found = list(run_checks(fast))
    bad = sum(check.state == "bad" for check in found)
    if as_json:
        sys.stdout.write(json.dumps([asdict(check) for check in found], indent=1) + "\n")
        return 1 if bad else 0
    width = max(len(check.name) for check in found)
    for check in found:
        sys.stdout.write(f"{_MARKS[check.state]}  {check.name:{width}}  {check.text}\n")
        if check.fix:
            sys.stdout.write(f"{'':{width + 8}}-> {check.fix}\n")
    notes = sum(check.state == "note" for check in found)
    sys.stdout.write(f"\n{len(found)} checks: {bad} bad, {notes} worth a look\n")
    return 1 if bad else 0


def run_checks(fast: bool = False) -> Iterator[Check]:
    """Every check in order; one that crashes is itself a bad check."""
    checks: list[Callable[[], Iterator[Check]]] = [versions, machine, gpus, collectives, faiss_library]
    checks += [lambda: ffcv_library(fast), ray_cluster, disks, trackers]
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # the others must still be told
            name = getattr(check, "__name__", "ffcv").replace("_", " ").replace("<lambda>", "ffcv")
            yield Check(name, "bad", f"the check itself failed: {type(error).__name__}: {error}")


def versions() -> Iterator[Check]:
    import raycon

    found = [f"raycon {raycon.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "torchvision", "numpy", "ray", "ffcv", "wandb"):
        if version := _version(name):
            found.append(f"{name} {version}")
    yield Check("versions", "ok", ", ".join(found))
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield Check("Python", "bad", f"{platform.python_version()} is not supported", "use Python 3.10 to 3.13")
    if (_version("torch") or "").split("+")[0] == "2.13.0":
        yield Check("torch", "bad", "torch 2.13.0 is excluded by raycon's requirements", "pip install 'torch!=2.13.0'")


def machine() -> Iterator[Check]:
    from raycon.index.plan import cores, free_memory

    usable, free = cores(), free_memory()
    said = f"{usable} usable CPU cores, {'unknown' if free is None else _size(free)} memory free"
    yield Check("machine", "note" if free is not None and free < 2e9 else "ok", said,
                "less than 2 GB: even small runs on Ray will be tight" if free is not None and free < 2e9 else "")  # fmt: skip
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 4096:
        yield Check("open files", "note", f"limit {files}", "Ray wants many: ulimit -n 65536 before a large run")


def gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
            yield Check("GPU", "bad", f"there is a driver, but torch {torch.__version__} sees no GPU",
                        "install a torch build for this driver's CUDA version, or check CUDA_VISIBLE_DEVICES")  # fmt: skip
        else:
            yield Check("GPU", "note", "none: runs use the CPU", "recipes ending in -cpu are sized for that")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        torch.ones(8, device=f"cuda:{i}").sum().item()  # really works
        state: State = "ok" if free > 0.8 * total else "note"
        fix = "" if state == "ok" else "others use it: nvidia-smi shows who"
        yield Check(f"GPU {i}", state, f"{name}, {_size(free)} of {_size(total)} free", fix)


def collectives() -> Iterator[Check]:
    """Start a process group of one and reduce, per backend that is built in."""
    import tempfile

    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Check(
            "collectives", "bad", "torch was built without torch.distributed", "install a standard build of torch"
        )
        return
    backends = ["gloo"] if dist.is_gloo_available() else []
    if torch.cuda.is_available() and dist.is_nccl_available():
        backends.append("nccl")
    if dist.is_initialized():
        yield Check("collectives", "ok", f"a process group runs already ({dist.get_backend()})")
        return
    for backend in backends:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                device = "cuda" if backend == "nccl" else "cpu"
                dist.all_reduce(torch.ones(4, device=device))
            finally:
                dist.destroy_process_group()
        more = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else ""
        yield Check(
            backend, "ok", f"{backend}{more} works (one process; several machines need open ports between them)"
        )
    if not backends:
        yield Check("collectives", "bad", "neither gloo nor NCCL is built in", "install a standard build of torch")


def faiss_library() -> Iterator[Check]:
    from raycon.index import engine

    there = engine.faiss_distributions()
    if len(there) > 1:
        yield Check("faiss", "bad", f"{' and '.join(there)} are installed: all write the same folder",
                    f"pip uninstall -y {' '.join(there)}, then install one of them")  # fmt: skip
        return
    if importlib.util.find_spec("faiss") is None:
        yield Check("faiss", "note", "not installed: the index works through torch",
                    "pip install 'raycon[cpu]' or 'raycon[gpu]'")  # fmt: skip
        return
    import faiss
    import torch

    count = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    said = f"{there[0] if there else 'faiss'} {faiss.__version__}, {count} GPU{'s' if count != 1 else ''}"
    if torch.cuda.is_available() and not count:
        yield Check("faiss", "note", f"{said}: clustering runs on the CPU though there is a GPU",
                    "pip uninstall faiss-cpu; pip install 'raycon[gpu]'; or mining.engine torch")  # fmt: skip
    else:
        yield Check("faiss", "ok", said)


def ffcv_library(fast: bool) -> Iterator[Check]:
    if importlib.util.find_spec("ffcv") is None:
        yield Check("FFCV", "note", "not installed: --data.loader auto takes the torch loader",
                    "make setup builds it (needs libopencv-dev, libturbojpeg0-dev, pkg-config)")  # fmt: skip
    elif fast:
        yield Check("FFCV", "ok", f"{_version('ffcv')} is installed (not loaded: --fast)")
    else:
        try:
            importlib.import_module("ffcv.libffcv")  # its compiled part, where a missing library shows
        except (ImportError, OSError) as error:
            yield Check(
                "FFCV", "bad", f"installed, but it cannot be loaded: {error}", "make setup FORCE=1 builds it again"
            )
        else:
            yield Check("FFCV", "ok", f"{_version('ffcv')} loads")


def ray_cluster() -> Iterator[Check]:
    if importlib.util.find_spec("ray") is None:
        yield Check("Ray", "note", "not installed: only --runtime local", "pip install 'raycon[ray]'")
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        yield Check("Ray", "ok", f"{_version('ray')}; RAY_ADDRESS is not set: a run starts Ray on this machine")
        return
    import ray

    began = not ray.is_initialized()
    try:
        if began:
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        alive = [n for n in ray.nodes() if n["Alive"]]
        whole, free = ray.cluster_resources(), ray.available_resources()
        said = ", ".join(f"{free.get(k, 0):g} of {whole.get(k, 0):g} {k}s free" for k in ("CPU", "GPU"))
        yield Check("Ray", "ok", f"{address}: {len(alive)} node(s), {said}")
        others = {str(n.get("RayVersion", "")) for n in alive} - {"", ray.__version__}
        if others:
            yield Check("Ray versions", "bad", f"here {ray.__version__}, there {', '.join(sorted(others))}",
                        "use one version of Ray on all machines")  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        yield Check("Ray", "bad", f"RAY_ADDRESS = {address}: {str(error).splitlines()[0]}",
                    "start the cluster, correct RAY_ADDRESS, or unset it to start Ray here")  # fmt: skip
    finally:
        if began and ray.is_initialized():
            ray.shutdown()


def disks() -> Iterator[Check]:
    for name, place, least, why in (
        ("run directory", Path.cwd(), 2e9, "checkpoints and converted data go here (--run.dir, --data.cache)"),
        ("temporary files", Path(os.environ.get("TMPDIR", "/tmp")), 2e9, "Ray spills objects here (set TMPDIR)"),
        ("/dev/shm", Path("/dev/shm"), 1e9, "loader workers and Ray's object store live here (docker: --shm-size=8g)"),
    ):
        if not place.is_dir():
            continue
        usage = shutil.disk_usage(place)
        low = usage.free < least
        writable = os.access(place, os.W_OK)
        state: State = "bad" if not writable else "note" if low else "ok"
        said = f"{place}: {_size(usage.free)} of {_size(usage.total)} free" + ("" if writable else ", not writable")
        yield Check(name, state, said, why if state != "ok" else "")


def trackers() -> Iterator[Check]:
    from raycon.core.log import reachable

    if importlib.util.find_spec("wandb") is None:
        yield Check("wandb", "ok", "not installed; metrics.jsonl and the report need nothing")
        return
    key = bool(os.environ.get("WANDB_API_KEY")) or _netrc("api.wandb.ai")
    if not key:
        yield Check("wandb", "ok", f"{_version('wandb')}, no key here: --log.wandb offline works")
    elif reachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")):
        yield Check("wandb", "ok", f"{_version('wandb')}, a key, and its server answers: --log.wandb online works")
    else:
        yield Check("wandb", "note", f"{_version('wandb')}, its server does not answer: runs log offline",
                    "wandb sync RUN_DIR/wandb/offline-run-* sends them later")  # fmt: skip


def _netrc(host: str) -> bool:
    """Is there a login for a host? The file's content goes no further."""
    import netrc

    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


# --- plans ------------------------------------------------------------------------------------------------------


def report_plan(asked: argparse.Namespace, rest: list[str]) -> int:
    """Count one small step of the recipe here, and plan the whole run."""
    for name, value in (("--gpus", asked.gpus), ("--images", asked.images), ("--tflops", asked.tflops)):
        if value < 0:
            raise ConfigError([f"{name} {value}: give 0 (the default) or more"])
    if asked.gbit <= 0 or asked.shard_gflops < 0:
        raise ConfigError([f"--gbit {asked.gbit}, --shard-gflops {asked.shard_gflops}: give numbers above 0"])
    from raycon import pretrain
    from raycon.index import plan as index_plan
    from raycon.training import cost

    source = ["--config", asked.plan] if asked.plan.endswith((".yaml", ".yml")) else [asked.plan]
    config, _ = pretrain.parse([*source, *rest])
    rows, channels, classes = _data(config, int(asked.images))
    world = asked.gpus or config.scaling.workers
    with _one_thread():
        counted = cost.count(config, channels, classes, world=world)
        shard = asked.shard_gflops * 1e9 or index_plan.measured_rate()
    here = counted.step_flops / counted.step_seconds
    sustained = asked.tflops * 1e12 or (100e12 if asked.gpus else here)
    assumed = cost.Assumed(
        flops=sustained,
        network=asked.gbit * 1e9 / 8,
        index=index_plan.Machine(flops=shard, network=asked.gbit * 1e9 / 8),
    )
    found = cost.plan(config, counted, rows, world, assumed)
    table = cost.scaling_table(config, counted, rows, world, assumed)
    if asked.json:
        told = cost.as_dict(found) | {"counted": asdict(counted), "assumed": asdict(assumed)}
        told["scaling_table"] = [cost.as_dict(one) for one in table]
        sys.stdout.write(json.dumps(told, indent=1, default=float) + "\n")
    else:
        measured = not asked.gpus and not asked.tflops
        sys.stdout.write("\n".join(plan_lines(asked.plan, config, counted, found, table, assumed, measured)) + "\n")
    return 0


def _data(config: Any, images: int) -> tuple[int, int, int]:
    """(rows, channels, weak classes) of the data set; with ``images`` it need not be here."""
    from raycon.training import job

    try:
        dataset = job.open_data(config)
    except ConfigError as error:
        if images:
            return images, 3, 1
        raise ConfigError([*error.problems, "or plan without it: --images N"]) from None
    facts = job.facts_of(config, dataset, 1)
    return images or len(dataset), len(dataset.mean), facts.classes


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan_lines(
    name: str,
    config: Any,
    counted: Counted,
    found: RunPlan,
    table: Sequence[RunPlan],
    assumed: Assumed,
    measured: bool,
) -> list[str]:
    """The plan in words."""
    local = found.batch // found.world
    lines = [
        f"{name}: {config.method.name}, {config.model.encoder}, {found.rows:,} images, {found.epochs} epochs of "
        f"{found.steps:,} steps, batch {found.batch} on {found.world} ranks ({local} each)",
        "",
        f"Memory of a rank: {_size(sum(found.rank_bytes.values()))}",
        *(f"  {_size(size):>10}  {what}" for what, size in found.rank_bytes.items() if size),
        "",
        f"A step of a rank: {_number(found.step_flops)}FLOP, {_time(found.compute_seconds)} of computing",
        f"  {counted.parameters:,} trained parameters; {_number(counted.step_flops)}FLOP per image and all its views",
    ]
    if found.network_bytes:
        lines += [
            f"  network: {_size(sum(found.network_bytes.values()))} sent by each rank, {_time(found.network_seconds)}, of "
            f"which {_time(found.exposed_seconds)} are not hidden behind the backward pass",
            *(f"  {_size(size):>10}  {what}" for what, size in found.network_bytes.items()),
        ]
    if found.index is not None:
        index = found.index
        lines += [
            "",
            f"Mining, {found.refreshes} refreshes of {_time(found.embed_seconds + index.seconds)} each",
            f"  features: {_size(index.added_bytes)} of {index.rows:,} x {index.dim} on {config.mining.shards} shards, "
            f"{_size(index.shard_bytes)} at most on each; coordinator {_size(index.coordinator_bytes)}",
            f"  embedding all images: {_time(found.embed_seconds)}",
            f"  clustering (k = {', '.join(f'{k:,}' for k in index.clusters) or 'none'}): {_number(index.flops)}FLOP, "
            f"{index.passes} passes, {_time(index.compute_seconds)}",
            f"  over the network: {_size(index.sent_bytes)} out, {_size(index.received_bytes)} back, "
            f"{_time(index.network_seconds)}; Ray's calls {_time(index.call_seconds)}",
        ]
        lines += [f"  {line}" for line in e_steps(index)]
        if index.problems(assumed.index):
            lines += [f"  ! {problem}" for problem in index.problems(assumed.index)]
    lines += scaling_lines(table)
    rate = found.batch / found.step_seconds
    lines += [
        "",
        f"The whole run: {_time(found.seconds)} ({found.seconds * found.world / 3600:,.4g} rank-hours), "
        f"{rate:,.0f} images/s between refreshes; {found.scaling:.0%} of linear scaling",
        *advice(config, found),
        "",
        "Assumed",
        f"  a rank sustains {_number(assumed.flops)}FLOP/s"
        + (" (measured: one thread of this machine)" if measured else ""),
        f"  each rank's network carries {assumed.network * 8 / 1e9:g} Gbit/s; gradients travel behind "
        f"{assumed.overlap:.0%} of the backward pass",
        f"  a shard sustains {_number(assumed.index.flops)}FLOP/s",
        "  not counted: reading and decoding images, evaluations, checkpoints, stragglers"
        + ("; bf16 halves activations" if config.train.precision == "bf16" else ""),
    ]
    return lines


def e_steps(index: Any) -> list[str]:
    """A line per clustering: what one E-step (one pass over all rows) costs. 2 N k D operations; every shard is sent the
    centroids and returns sums, counts and distances."""
    return [
        f"one E-step of k = {k:,}: {_number(2.0 * index.rows * k * index.dim)}FLOP over all shards, "
        f"{_size(index.feature_bytes)} of features read on each, {_size(index.shards * k * index.dim * 4)} out, "
        f"{_size(index.shards * k * (index.dim * 8 + 8))} back"
        for k in index.clusters
    ]


def advice(config: Any, found: RunPlan) -> list[str]:
    """What to change where one thing takes most of the run."""
    if found.index is None:
        mining = 0.0
    else:
        mining = found.refreshes * (found.embed_seconds + found.index.seconds) / found.seconds
    lines = []
    if mining > 0.3:
        warm = "" if config.mining.init == "warm" else "--mining.init warm (2 iterations in place of all restarts), "
        lines.append(f"  ! mining is {mining:.0%} of it: {warm}a larger --method.refresh-epochs, more --mining.shards")
    if found.exposed_seconds > 0.2 * found.step_seconds:
        lines.append(
            f"  ! the network is {found.exposed_seconds / found.step_seconds:.0%} of a step: more images per rank "
            "(--train.batch, --train.accumulate), a faster network (--gbit)"
        )
    return lines


def scaling_lines(table: Sequence[RunPlan]) -> list[str]:
    """How the run would scale with as many images per rank as here."""
    if len(table) < 2:
        return []
    lines = [
        "",
        "Scaling, the same images per rank and step",
        "   ranks     batch        step    images/s   of linear   whole run   (mining included)",
    ]
    for one in table:
        rate = one.rows * one.epochs / one.seconds
        lines.append(
            f"  {one.world:6,}  {one.batch:8,}  {_time(one.step_seconds):>10}  {rate:10,.0f}  {one.scaling:10.0%}  "
            f"{_time(one.seconds):>10}"
        )
    return lines


def _size(size: float) -> str:
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size:.0f} B"


def _number(value: float) -> str:
    for unit, one in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= one:
            return f"{value / one:.3g} {unit}"
    return f"{value:.3g} "


def _time(seconds: float) -> str:
    for unit, one in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * one:
            return f"{seconds / one:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    sys.exit(main())
