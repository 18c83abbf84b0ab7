"""Where the processes of a run may stand: what the cluster can never place, what it does not place for long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.util

from raycon.core import log
from raycon.core.config import RunConfig
from raycon.on_ray import evaluate

logger = logging.getLogger("raycon")

LOOK_S = 2.0
SAY_AFTER_S = 60.0
"""How long workers wait for their place before it is said what is missing; said again after as long."""
HEAD_S = 10.0
"""How long the cluster's head may be out of reach before that is said. Ray ends the process after 60 s."""


class HeadLost(RuntimeError):
    """The message says which head, and how to go on."""


def per_worker(config: RunConfig) -> dict[str, float]:
    """What Ray sets aside for each training worker."""
    scaling = config.scaling
    found = {"CPU": scaling.cpus_per_worker}
    if scaling.gpus_per_worker:
        found["GPU"] = scaling.gpus_per_worker
    return found


def problems(config: RunConfig) -> list[str]:
    """Why the cluster can never place this run: what is asked for and what is there. [] when it can, or may grow."""
    scaling, there = config.scaling, ray.cluster_resources()
    if scaling.autoscaling:
        return []  # what is missing may yet be started
    free, least = ray.available_resources(), scaling.min_workers or scaling.workers
    option = "scaling.min_workers" if scaling.min_workers else "scaling.workers"
    found = []
    for what, each in (("CPU", scaling.cpus_per_worker), ("GPU", scaling.gpus_per_worker)):
        most = max((n["Resources"].get(what, 0.0) for n in ray.nodes() if n["Alive"]), default=0.0)
        if each * least > there.get(what, 0.0) or each > most:
            found.append(
                f"{option} = {least} x {each:g} {what} each can never be placed: the cluster has "
                f"{there.get(what, 0):g} {what} on {len(ray.nodes())} node(s), {free.get(what, 0):g} of them free; "
                f"lower {option} or scaling.{what.lower()}s-per-worker, or add nodes "
                "(--scaling.autoscaling when they come by themselves)"
            )
    mining = config.mining
    if config.method.needs().snapshot and not found:
        shares = (("CPU", mining.cpus, scaling.cpus_per_worker), ("GPU", mining.gpus, scaling.gpus_per_worker))
        for what, each, worker in shares:
            workers = worker * least
            if each and workers + each * mining.shards > there.get(what, 0.0):
                found.append(
                    f"mining.{what.lower()}s = {each:g} x mining.shards = {mining.shards} beside {workers:g} {what} for "
                    f"the workers can never be placed: the cluster has {there.get(what, 0):g} {what}; lower one of them, "
                    "or add nodes"
                )
    if config.evals.names:
        found += evaluate.placement_problems(config.evals)
    return found


def head_address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def head_answers(head: str) -> bool:
    return log.reachable(f"tcp://{head}", 2.0)


def without_head(head: str, run_dir: Path) -> str:
    return (
        f"the head of the cluster ({head}) is gone: this run ends; go on with --resume {run_dir} when there is one again, "
        "or on another cluster"
    )


@contextmanager
def watched(config: RunConfig, run_dir: Path) -> Iterator[None]:
    """Say, in the log and in metrics.jsonl, what is missing whenever the workers have no place for a minute, and that the
    head is gone: Ray ends this process soon after, and its words do not tell how to go on. What ended the work without a
    head is raised as HeadLost."""
    ended, said_gone, head = threading.Event(), threading.Event(), head_address()

    def say(text: str) -> None:
        logger.warning("%s", text)
        log.append_line(run_dir / "metrics.jsonl", {"kind": "event", "step": 0, "text": text})

    def look() -> None:
        since = said = seen = time.monotonic()
        while not ended.wait(LOOK_S):
            if not head_answers(head):
                if time.monotonic() - seen >= HEAD_S and not said_gone.is_set():
                    said_gone.set()
                    say(without_head(head, run_dir))
                continue
            seen = time.monotonic()
            said_gone.clear()
            try:
                placed = any(group["state"] == "CREATED" for group in _groups(per_worker(config)))
            except Exception as error:  # the cluster may be going; the run itself will tell
                logger.debug("placement groups: %s", error)
                continue
            now = time.monotonic()
            if placed:
                since = said = now
            elif now - said >= SAY_AFTER_S:
                said = now
                say(f"waiting for {now - since:.0f} s: {missing(config)}")

    thread = threading.Thread(target=look, name="raycon-placement", daemon=True)
    thread.start()
    try:
        yield
    except Exception as error:
        if head_answers(head):
            raise
        text = without_head(head, run_dir)
        if not said_gone.is_set():
            say(text)
        raise HeadLost(text) from error
    finally:
        ended.set()
        thread.join(timeout=10.0)


def missing(config: RunConfig) -> str:
    """What the workers ask for, and what is there and free."""
    each, scaling = per_worker(config), config.scaling
    there, free = ray.cluster_resources(), ray.available_resources()
    asked = " + ".join(f"{amount:g} {what}" for what, amount in each.items())
    have = ", ".join(f"{there.get(what, 0):g} {what} ({free.get(what, 0):g} free)" for what in each)
    return f"{scaling.min_workers or scaling.workers} workers of {asked} each have no place; the cluster has {have}"


def _groups(each: dict[str, float]) -> list[dict[str, Any]]:
    """The placement groups whose every bundle is that of one of our workers."""
    return [
        group
        for group in ray.util.placement_group_table().values()
        if group["bundles"] and all(_same(bundle, each) for bundle in group["bundles"].values())
    ]


def _same(bundle: dict[str, float], each: dict[str, float]) -> bool:
    return all(abs(bundle.get(what, 0.0) - amount) < 1e-6 for what, amount in each.items())
