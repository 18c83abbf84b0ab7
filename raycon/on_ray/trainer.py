"""Run a configuration on Ray: start or join a cluster, start the index actors, train, evaluate beside it."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, ValidationConfig, ValidationTaskConfig
from ray.train.v2._internal.exceptions import CollectiveTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raycon import methods
from raycon.core import log
from raycon.core.address import working_folder
from raycon.core.config import ConfigError, Facts, RunConfig, from_dict, to_dict, world_sizes
from raycon.on_ray import here
from raycon.on_ray.desk import start_desk
from raycon.on_ray.placement import HeadLost, head_address, head_answers, missing, per_worker, watched
from raycon.on_ray.placement import problems as placement_problems
from raycon.on_ray.runtime import NOTICES
from raycon.training import checkpoint, storage
from raycon.training.runtime import Kept
from raycon.training.storage import Store

logger = logging.getLogger("raycon")

NAMESPACE = "raycon"
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
FAILURE_FILE = "failure.json"
RAYS_LIST = "checkpoint_manager_snapshot.json"
NOTICED_S = 60.0
"""How long a rank that lost the others after a notice waits for Ray to see that a node is gone (15 to 30 s)."""


class RunFailed(RuntimeError):
    """The run ended without finishing; the message is the cause."""


def connect(dashboard_port: int = 0) -> None:
    """Join the cluster of RAY_ADDRESS (inside a job: always set), or start one on this machine, loopback only.

    dashboard_port: when a cluster is started, with a dashboard there; Ray frees what a killed Train run held only with
    its help (needed where runs are led by actors that may die: sweeps).
    """
    if ray.is_initialized():
        return
    # Reports should not wait for a slow poll, nor a checkpoint for the news that a node goes.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": "WARNING", "log_to_driver": False}
    if address == "local":
        os.environ.setdefault(NOTICES, "0")  # nobody takes this machine away with notice: a process and a barrier less
        if dashboard_port:  # named to the processes to come: where several clusters run, Ray would not find its own
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard_port}"
            quiet["dashboard_port"] = dashboard_port
        # None: a dashboard that does not come up in time (a loaded machine) is no reason not to run.
        here.start(include_dashboard=None if dashboard_port else False, **quiet)
    else:
        ray.init(address=address, **quiet)


def fit(config: RunConfig, run_dir: Path, facts: Facts) -> None:
    """Train ``config`` in ``run_dir`` to its end, with all evaluations. Raises ConfigError and RunFailed."""
    from raycon.index.service import Saved
    from raycon.on_ray.index import start_index, stop_index
    from raycon.training.job import feature_dim

    connect()
    problems = placement_problems(config)
    if problems := problems or held_problems(run_dir):
        raise ConfigError(problems)
    store = storage.of(config)
    (run_dir / FAILURE_FILE).unlink(missing_ok=True)
    desk = None
    if store is not None:
        store.delete(FAILURE_FILE)
        desk = start_desk(desk_name := f"desk:{run_dir.name}:{os.getpid()}", run_dir)
    dim = feature_dim(config)
    spec = None
    if dim:
        saved = None
        if config.mining.persist:
            saved = Saved(folder=run_dir / "index", rows=facts.rows, write=True)
        spec = start_index(
            run_dir.name, facts.rows, dim, config.mining, index_namespace(run_dir), seed=config.seed, saved=saved
        )
    forget_reports(run_dir, store)
    trainer = build_trainer(config, run_dir, spec, desk_name if desk is not None else "")
    lost: Exception | None = None
    head = head_address()
    try:
        with watched(config, run_dir):
            trainer.fit()
    except Exception as error:
        lost = error
    finally:
        if spec is not None and head_answers(head):  # else they are gone, and asking for them waits
            stop_index(spec)
    if isinstance(lost, HeadLost):
        raise RunFailed(str(lost)) from lost
    if (text := failed(run_dir, store)) is not None:
        (run_dir / FAILURE_FILE).write_text(text, encoding="utf-8")
        raise RunFailed(json.loads(text)["error"])
    if isinstance(lost, ray.train.ControllerError) and "Startup" in type(lost.controller_failure).__name__:
        raise RunFailed(f"after scaling.wait-s = {config.scaling.wait_s:g}: {missing(config)} ({lost})") from lost
    if lost is not None:
        raise RunFailed(
            f"lost workers more than scaling.max-failures = {config.scaling.max_failures} times: {lost}"
        ) from lost


def forget_reports(run_dir: Path, store: Store | None) -> None:
    """Ray Train's own list of checkpoints, which it refuses to go on from once raycon has pruned one of them (or Ray is of
    another version). The run directory is the truth: what waits for an evaluation is told anew."""
    if store is None:
        (run_dir / RAYS_LIST).unlink(missing_ok=True)
    else:
        store.delete(RAYS_LIST)


def owed(run_dir: Path, store: Store | None) -> list[str]:
    """The checkpoints whose evaluation is still to come."""
    if store is not None:
        return store.owed()
    return checkpoint.owed(run_dir / "checkpoints", Kept(run_dir).evaluated)


def failed(run_dir: Path, store: Store | None) -> str | None:
    """What a rank wrote down when it failed in a way that would come again."""
    if store is not None:
        data = store.get(FAILURE_FILE)
        return None if data is None else data.decode()
    file = run_dir / FAILURE_FILE
    return file.read_text(encoding="utf-8") if file.exists() else None


def index_namespace(run_dir: Path) -> str:
    """Where the index actors of a run are found by their names: two runs whose directories have one last part differ."""
    return f"{NAMESPACE}:{run_dir}"


def held_problems(run_dir: Path, seconds: float = 30.0) -> list[str]:
    """Does another driver hold the index of this very run? That of a driver just killed goes by itself: it is awaited."""
    from raycon.on_ray.index import coordinator_name

    wanted = {"name": coordinator_name(run_dir.name), "namespace": index_namespace(run_dir)}
    end = time.monotonic() + seconds
    while wanted in ray.util.list_named_actors(all_namespaces=True):
        if time.monotonic() > end:
            return [f"run.dir = {str(run_dir)!r} is being trained in by another job of this cluster: wait for it, stop it, or "
                    "give another directory"]  # fmt: skip
        time.sleep(0.5)
    return []


def build_trainer(config: RunConfig, run_dir: Path, spec: Any, desk: str = "") -> ray.train.torch.TorchTrainer:
    """The Ray Train run of a configuration. ``spec``: the started index, or None. ``desk``: see on_ray/desk.py."""
    scaling = config.scaling
    store, system, place = storage.of(config), None, run_dir
    # It only waits for tasks of its own, which hold what evals.cpus and evals.gpus say.
    evaluating: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "max_retries": 2}
    if store is not None:
        system, root = storage.opened(store)
        place = Path(root)
        node = ray.get_runtime_context().get_node_id()  # it adds to evaluations.json, which lies here
        evaluating["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    # A group that is placed on reservations of a lost node waits this out before it is placed anew.
    start_s = int(os.environ.setdefault(START_TIMEOUT, "20" if scaling.min_workers else "60"))
    # Ray's own barriers (a report, the question after a notice) would wait for a rank that hangs for ever.
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = f"{scaling.timeout_s:g}"
    # Threads only: secrets (a wandb key) must come from the nodes' own environment, Ray logs what stands here.
    env = {"OMP_NUM_THREADS": str(scaling.threads)}
    kind, more = ray.train.torch.TorchTrainer, {}
    workers: int | tuple[int, int] = scaling.workers
    if scaling.min_workers:
        from raycon.on_ray.elastic import ElasticTrainer

        kind, more = ElasticTrainer, {"sizes": world_sizes(config)}
        workers = (scaling.min_workers, scaling.workers)
    return kind(
        _worker,
        train_loop_config={
            "config": to_dict(config),
            "run_dir": str(run_dir),
            "index": spec,
            "desk": desk,
            "owed": owed(run_dir, store),
        },
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=bool(scaling.gpus_per_worker),
            resources_per_worker=per_worker(config),
            elastic_resize_monitor_interval_s=scaling.resize_s,
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.gpus_per_worker else "gloo", timeout_s=scaling.timeout_s
        ),
        run_config=ray.train.RunConfig(
            name=place.name,
            storage_path=str(place.parent),
            storage_filesystem=system,
            failure_config=FailureConfig(
                max_failures=scaling.max_failures,
                controller_failure_limit=max(1, math.ceil(scaling.wait_s / start_s)),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=None),  # raycon prunes its own checkpoints
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": env},
        ),
        validation_config=ValidationConfig(
            fn=_evaluate,
            task_config=ValidationTaskConfig(fn_kwargs={"run_dir": str(run_dir), "threads": scaling.threads}),
            ray_remote_kwargs=evaluating,
        ),
        **more,
    )


def _worker(given: dict[str, Any]) -> None:
    """One Ray Train worker: a rank."""
    import ray.train.torch

    from raycon.on_ray.index import RayIndex
    from raycon.on_ray.runtime import MARK, RayRuntime
    from raycon.training import job
    from raycon.training.runtime import no_index

    config = from_dict(given["config"], methods.options(given["config"]["method"]["name"]))
    store = storage.of(config)
    run_dir = Path(given["run_dir"]) if store is None else working_folder(store.address)  # of this machine
    run_dir.mkdir(parents=True, exist_ok=True)
    if failed(run_dir, store) is not None:
        return  # a rank failed in a way that would come again: do not try, the driver reads the cause
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    index = RayIndex(given["index"], rank, world) if given["index"] is not None else no_index()
    runtime = RayRuntime(run_dir, index, device, config.evals.wait_s, store, given["desk"], given["owed"])
    mirror = None
    if rank == 0:
        shutil.rmtree(run_dir / f".{MARK}", ignore_errors=True)  # of an earlier attempt
        if store is not None:
            for name in store.names(f".{MARK}"):
                store.delete(name)
            mirror = storage.Mirror(store, run_dir, own=True)
            mirror.start()
    try:
        job.train_rank(config, run_dir, device, runtime)
        if mirror is not None:
            mirror.close()
    except (*job.STOPS, ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
        # Not the loss of a process: it would come again. Raising ends the other ranks too.
        text = json.dumps({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        if store is not None:
            store.put_bytes(text.encode(), FAILURE_FILE)
        else:
            (run_dir / FAILURE_FILE).write_text(text, encoding="utf-8")
        raise
    except (RuntimeError, CollectiveTimeoutError) as error:
        if world > 1 and "timed out" in str(error).lower():
            text = waited_in_vain(run_dir, rank, world, config.scaling.timeout_s, store, given["desk"])
            raise RuntimeError(text) from error
        if runtime.noticed:
            # The other ranks notice a lost node before Ray does. Once Ray has, it ends this rank too and charges no failure;
            # an error that comes first would be charged.
            time.sleep(NOTICED_S)
        raise
    finally:
        runtime.close()


def waited_in_vain(
    run_dir: Path, rank: int, world: int, seconds: float, store: Store | None = None, desk: str = ""
) -> str:
    """Name the ranks that kept the others waiting; the lowest of the others writes it down."""
    from raycon.on_ray.runtime import silent_ranks

    silent = silent_ranks(run_dir, rank, world, store)
    who = f"rank {', '.join(map(str, silent))}" if silent else "no single rank (the network between them, then)"
    text = f"ranks waited for {seconds:g} s (scaling.timeout-s) and did not hear from {who}: starting again"
    if rank == min(set(range(world)) - set(silent)):
        line = {"kind": "event", "step": 0, "text": text}
        if desk:
            ray.get(ray.get_actor(desk).append.remote(line))
        else:
            log.append_line(run_dir / "metrics.jsonl", line)
    return text


def _evaluate(checkpoint: ray.train.Checkpoint, run_dir: str, threads: int) -> dict[str, Any]:
    """A downstream task: evaluations of one checkpoint. Whatever goes wrong stays here."""
    from raycon.on_ray import evaluate

    store = storage.of(methods.read_config(Path(run_dir) / "config.yaml"))
    evaluated = Kept(Path(run_dir)).evaluated if store is None else store.evaluated
    if evaluated(int(Path(checkpoint.path).name)):
        return {}  # asked for twice, by a worker group and by the one after it
    try:
        with storage.evaluated_here(Path(run_dir), Path(checkpoint.path)) as path:
            entry = evaluate.of_run(Path(run_dir), path, threads)
    except Exception as error:
        text = f"evaluation of {checkpoint.path} failed: {type(error).__name__}: {error}"
        log.append_line(Path(run_dir) / "metrics.jsonl", {"kind": "event", "step": 0, "text": text})
        raise
    return dict(entry["results"])
