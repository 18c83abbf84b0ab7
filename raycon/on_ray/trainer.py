"""Run a configuration on Ray: start or join a cluster, start the index actors, train, evaluate beside it."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, ValidationConfig, ValidationTaskConfig

from raycon import methods
from raycon.core import log
from raycon.core.config import ConfigError, Facts, RunConfig, from_dict, to_dict

logger = logging.getLogger("raycon")

NAMESPACE = "raycon"
FAILURE_FILE = "failure.json"


class RunFailed(RuntimeError):
    """The run ended without finishing; the message is the cause."""


def connect(dashboard_port: int = 0) -> None:
    """Join the cluster of RAY_ADDRESS (inside a job: always set), or start one on this machine, loopback only.

    dashboard_port: when a cluster is started, with a dashboard there; Ray frees what a killed Train run held only with
    its help (needed where runs are led by actors that may die: sweeps).
    """
    if ray.is_initialized():
        return
    # Restarts should not wait for a minute on stale reservations, nor reports for a slow poll.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    quiet: dict[str, Any] = {"namespace": NAMESPACE, "logging_level": "WARNING", "log_to_driver": False}
    if address == "local":
        if dashboard_port:  # named to the processes to come: where several clusters run, Ray would not find its own
            os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard_port}"
            quiet["dashboard_port"] = dashboard_port
        # None: a dashboard that does not come up in time (a loaded machine) is no reason not to run.
        ray.init(address="local", include_dashboard=None if dashboard_port else False, **quiet)
    else:
        ray.init(address=address, **quiet)


def placement_problems(config: RunConfig) -> list[str]:
    """Why the cluster can never place this run: what is asked for and what is there. [] when it can, or may grow."""
    scaling, there = config.scaling, ray.cluster_resources()
    if scaling.autoscaling:
        return []  # what is missing may yet be started
    free = ray.available_resources()
    found = []
    for what, each in (("CPU", scaling.cpus_per_worker), ("GPU", scaling.gpus_per_worker)):
        most = max((n["Resources"].get(what, 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)
        if each * scaling.workers > there.get(what, 0.0) or each > most:
            found.append(
                f"scaling.workers = {scaling.workers} x {each:g} {what} each can never be placed: the cluster has "
                f"{there.get(what, 0):g} {what} on {len(ray.nodes())} node(s), {free.get(what, 0):g} of them free; "
                f"lower scaling.workers or scaling.{what.lower()}s-per-worker, or add nodes "
                "(--scaling.autoscaling when they come by themselves)"
            )
    mining = config.mining
    if config.method.needs().snapshot and not found:
        shares = (("CPU", mining.cpus, scaling.cpus_per_worker), ("GPU", mining.gpus, scaling.gpus_per_worker))
        for what, each, worker in shares:
            workers = worker * scaling.workers
            if each and workers + each * mining.shards > there.get(what, 0.0):
                found.append(
                    f"mining.{what.lower()}s = {each:g} x mining.shards = {mining.shards} beside {workers:g} {what} for "
                    f"the workers can never be placed: the cluster has {there.get(what, 0):g} {what}; lower one of them, "
                    "or add nodes"
                )
    return found


def fit(config: RunConfig, run_dir: Path, facts: Facts) -> None:
    """Train ``config`` in ``run_dir`` to its end, with all evaluations. Raises ConfigError and RunFailed."""
    from raycon.index.service import Saved
    from raycon.on_ray.index import start_index, stop_index
    from raycon.training.job import feature_dim

    connect()
    if problems := placement_problems(config):
        raise ConfigError(problems)
    (run_dir / FAILURE_FILE).unlink(missing_ok=True)
    dim = feature_dim(config)
    spec = None
    if dim:
        saved = None
        if config.mining.persist:
            saved = Saved(folder=run_dir / "index", rows=facts.rows, write=True)
        spec = start_index(
            run_dir.name, facts.rows, dim, config.mining, namespace=NAMESPACE, seed=config.seed, saved=saved
        )
    scaling = config.scaling
    resources = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        resources["GPU"] = scaling.gpus_per_worker
    # Threads only: secrets (a wandb key) must come from the nodes' own environment, Ray logs what stands here.
    env = {"OMP_NUM_THREADS": str(scaling.threads)}
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"config": to_dict(config), "run_dir": str(run_dir), "index": spec},
        scaling_config=ScalingConfig(
            num_workers=scaling.workers, use_gpu=bool(scaling.gpus_per_worker), resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if scaling.gpus_per_worker else "gloo", timeout_s=1800
        ),
        run_config=ray.train.RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.parent),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=None),  # raycon prunes its own checkpoints
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": env},
        ),
        validation_config=ValidationConfig(
            fn=_evaluate,
            task_config=ValidationTaskConfig(fn_kwargs={"run_dir": str(run_dir), "threads": scaling.threads}),
            # It only waits for tasks of its own, which hold what evals.cpus and evals.gpus say.
            ray_remote_kwargs={"num_cpus": 0, "num_gpus": 0, "max_retries": 2},
        ),
    )
    lost: Exception | None = None
    try:
        trainer.fit()
    except Exception as error:
        lost = error
    finally:
        if spec is not None:
            stop_index(spec)
    failure = run_dir / FAILURE_FILE
    if failure.exists():
        raise RunFailed(json.loads(failure.read_text(encoding="utf-8"))["error"])
    if lost is not None:
        raise RunFailed(f"lost workers more than scaling.max-failures = {scaling.max_failures} times: {lost}") from lost


def _worker(given: dict[str, Any]) -> None:
    """One Ray Train worker: a rank."""
    import ray.train.torch

    from raycon.on_ray.index import RayIndex
    from raycon.on_ray.runtime import RayRuntime
    from raycon.training import job
    from raycon.training.runtime import no_index

    config = from_dict(given["config"], methods.options(given["config"]["method"]["name"]))
    run_dir = Path(given["run_dir"])
    failure = run_dir / FAILURE_FILE
    if failure.exists():
        return  # a rank failed in a way that would come again: do not try, the driver reads the cause
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    index = RayIndex(given["index"], rank, world) if given["index"] is not None else no_index()
    try:
        job.train_rank(config, run_dir, device, RayRuntime(run_dir, index, device))
    except (*job.STOPS, ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
        # Not the loss of a process: it would come again. Raising ends the other ranks too.
        text = json.dumps({"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        failure.write_text(text, encoding="utf-8")
        raise


def _evaluate(checkpoint: ray.train.Checkpoint, run_dir: str, threads: int) -> dict[str, Any]:
    """A downstream task: evaluations of one checkpoint. Whatever goes wrong stays here."""
    from raycon.on_ray import evaluate

    try:
        entry = evaluate.of_run(Path(run_dir), Path(checkpoint.path), threads)
    except Exception as error:
        text = f"evaluation of {checkpoint.path} failed: {type(error).__name__}: {error}"
        log.append_line(Path(run_dir) / "metrics.jsonl", {"kind": "event", "step": 0, "text": text})
        raise
    return dict(entry["results"])
