"""The feature index as Ray actors: S shards hold the rows, one coordinator runs raycon/index over them.

The driver calls ``start_index`` before training; the workers talk to it through ``RayIndex``. Features go to the
shards, and the snapshot comes back, through the object store; no call leaves the process during a training step.

Failures: a shard actor that died is restarted empty by Ray and says MissingRows; a restarted coordinator computes its
snapshot again. Waiting is unlimited as long as the actor waited for answers ``ping``, which never queues behind work.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raycon.core.config import MiningConfig
from raycon.core.types import Needs, Snapshot
from raycon.index.local import part
from raycon.index.mine import mine
from raycon.index.shard import Shard, as_features, check_finite

logger = logging.getLogger(__name__)

_ACTOR: dict[str, Any] = {
    "num_cpus": 0,  # a shard works while the trainers wait: it must not take a core that their group needs
    "max_restarts": -1,
    "max_task_retries": -1,
    "concurrency_groups": {"work": 1},
}
_IN_FLIGHT = 16
_MB = 1e6


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """Where an index is and what it is: plain data for the workers' configuration.

    The actors live as long as the process that started them keeps the spec it got from ``start_index``.
    """

    run_name: str
    namespace: str
    rows: int
    dim: int
    mining: MiningConfig
    seed: int
    silence_s: float
    """How long an actor may leave a ping unanswered (a restart included) before the index counts as lost."""
    actors: tuple[Any, ...] = field(default=(), compare=False, repr=False)
    """The handles that keep the actors alive; they stay in the process that started them."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "actors": ()}

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The rows [first, last) of each shard."""
        return part(self.rows, self.mining.shards)

    @property
    def shard_names(self) -> list[str]:
        return [f"{self.run_name}/index/{i}" for i in range(len(self.ranges))]

    @property
    def coordinator_name(self) -> str:
        return f"{self.run_name}/index/coordinator"


@ray.remote(**_ACTOR)
class IndexShard:
    """A raycon.index.shard.Shard behind Ray."""

    def __init__(self, first_row: int, last_row: int, dim: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._shard = Shard(first_row, last_row, dim, threads)

    def ping(self) -> None:
        """Answers at once whatever the shard works at."""

    @ray.method(concurrency_group="work")
    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._shard, method)(*args)


@ray.remote(**_ACTOR)
class IndexCoordinator:
    """Holds no features: runs the refresh over the shards once and keeps its result for all ranks."""

    def __init__(self, spec: IndexSpec) -> None:
        self._spec = spec
        self._shards: list[Any] = []
        self._made: tuple[Any, Any, dict[str, float]] | None = None

    def ping(self) -> None:
        """Answers at once whatever the coordinator works at."""

    def spec(self) -> IndexSpec:
        return self._spec

    @ray.method(concurrency_group="work")
    def snapshot(self, version: int, needs: Needs, previous: Any) -> tuple[list[Any], dict[str, float]]:
        """([a reference to the packed snapshot], metrics); computed once while the same features are asked for."""
        key = (version, needs, None if previous is None else previous[0], self._fan_out("stamp"))
        if self._made is None or self._made[0] != key:
            made, metrics = mine(
                self._fan_out,
                self._spec.rows,
                version,
                needs,
                self._spec.mining,
                self._spec.seed,
                None if previous is None else _unpack(previous),
            )
            self._made = (key, ray.put(_pack(made)), metrics)
        return [self._made[1]], self._made[2]

    def _fan_out(self, method: str, *args: Any) -> list[Any]:
        if not self._shards:
            self._shards = [ray.get_actor(name, self._spec.namespace) for name in self._spec.shard_names]
        sent = [ray.put(arg) if isinstance(arg, np.ndarray) else arg for arg in args]  # once, not once per shard
        calls = [shard.call.remote(method, *sent) for shard in self._shards]
        return [
            _wait(call, shard, name, self._spec.silence_s)
            for call, shard, name in zip(calls, self._shards, self._spec.shard_names, strict=True)
        ]


class RayIndex:
    """A FeatureIndex over a started index, for one of ``world`` ranks (torch.distributed initialised when > 1)."""

    def __init__(self, spec: IndexSpec, rank: int = 0, world: int = 1) -> None:
        self.previous: Snapshot | None = None
        """The snapshot a warm start begins at: the last one made, or the one a checkpoint held."""
        self._spec, self._rank, self._world = spec, rank, world
        self._shards = [ray.get_actor(name, spec.namespace) for name in spec.shard_names]
        self._coordinator = ray.get_actor(spec.coordinator_name, spec.namespace)
        self._sent: list[tuple[int, Any]] = []

    def add(self, version: int, first_row: int, features: Any) -> None:
        """Send (n, dim) features of rows ``first_row ..`` to the shards that own them; they arrive by ``snapshot``.

        Raises ValueError for rows that do not exist and numbers that are not finite.
        """
        block = as_features(features, self._spec.dim)
        last_row = first_row + len(block)
        if first_row < 0 or last_row > self._spec.rows:
            raise ValueError(f"rows {first_row} .. {last_row}: the index holds rows 0 .. {self._spec.rows}")
        check_finite(block, first_row)
        for number, (first, last) in enumerate(self._spec.ranges):
            first, last = max(first, first_row), min(last, last_row)
            if first < last:
                part_ND = block[first - first_row : last - first_row]
                self._sent.append((number, self._shards[number].call.remote("put", version, first, part_ND)))
        while len(self._sent) > _IN_FLIGHT:  # bounds what the object store holds
            self._arrived(*self._sent.pop(0))

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        """The same snapshot on every rank; the first rank that asks has it computed.

        Raises MissingRows or ValueError, on every rank; RuntimeError when an actor is lost for good.
        """
        self._together(self._all_arrived)  # no rank asks before every rank's rows are there
        snapshot, metrics = self._together(lambda: self._fetch(version, needs))
        self.previous = snapshot
        return snapshot, metrics

    def close(self) -> None:
        """Forget what was sent. The actors belong to the driver: ``stop_index``."""
        self._sent.clear()

    def _arrived(self, number: int, call: Any) -> None:
        _wait(call, self._shards[number], self._spec.shard_names[number], self._spec.silence_s)

    def _all_arrived(self) -> None:
        while self._sent:
            self._arrived(*self._sent.pop())

    def _fetch(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        name, silence_s = self._spec.coordinator_name, self._spec.silence_s
        previous = None
        if self._spec.mining.init == "warm" and self.previous is not None:
            previous = _pack(self.previous._replace(concentration=(), neighbours=None))
        for _ in range(3):
            call: Any = self._coordinator.snapshot.remote(version, needs, previous)
            (reference,), metrics = _wait(call, self._coordinator, name, silence_s)
            try:
                return _unpack(_wait(reference, self._coordinator, name, silence_s)), metrics
            except ObjectLostError:  # the coordinator died since: started again, it makes the same snapshot
                logger.warning("%s was lost with its snapshot: asking again", name)
        raise RuntimeError(f"{name} was lost three times while handing over version {version}")

    def _together(self, action: Any) -> Any:
        """Do ``action`` on every rank; when it failed on one, raise on all: else the others would wait for it."""
        error: Exception | None = None
        result = None
        try:
            result = action()
        except Exception as caught:
            error = caught
        errors: list[Any] = [error]
        if self._world > 1:
            errors = [None] * self._world
            dist.all_gather_object(errors, error)
        for failure in errors:
            if failure is not None:
                raise failure
        return result


def start_index(
    run_name: str,
    rows: int,
    dim: int,
    mining: MiningConfig,
    namespace: str,
    seed: int,
    start_timeout_s: float = 120.0,
    silence_s: float = 120.0,
) -> IndexSpec:
    """Start the actors of an index, or find those of this name; keep the spec as long as they shall live.

    Raises ValueError when the features do not fit into memory or the name is taken by another index, RuntimeError when
    the actors do not come up in time. Nothing is allocated before the first features arrive.
    """
    spec = IndexSpec(
        run_name=run_name, namespace=namespace, rows=rows, dim=dim, mining=mining, seed=seed, silence_s=silence_s
    )
    names = {
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == namespace
    }
    memory = _check_memory(spec, exists=spec.coordinator_name in names)
    common = {"namespace": namespace, "get_if_exists": True, "scheduling_strategy": "SPREAD"}
    shards = [
        IndexShard.options(name=name, memory=memory, **common).remote(first, last, dim, mining.threads)  # type: ignore[attr-defined]
        for name, (first, last) in zip(spec.shard_names, spec.ranges, strict=True)
    ]
    coordinator = IndexCoordinator.options(name=spec.coordinator_name, **common).remote(spec)  # type: ignore[attr-defined]
    actors = (coordinator, *shards)
    try:
        ray.get([actor.ping.remote() for actor in actors], timeout=start_timeout_s)
    except GetTimeoutError:
        raise RuntimeError(
            f"the {len(shards)} index actors of {run_name!r} did not start within {start_timeout_s:g} s; each asks for "
            f"{memory / _MB:.0f} MB, free are {ray.available_resources()}"
        ) from None
    found = ray.get(coordinator.spec.remote(), timeout=silence_s)
    if found != spec:
        raise ValueError(f"an index named {run_name!r} exists with other settings ({found}): choose another run name")
    return replace(spec, actors=actors)


def stop_index(spec: IndexSpec) -> None:
    """End the actors; nothing happens when they are gone."""
    for name in (spec.coordinator_name, *spec.shard_names):
        try:
            ray.kill(ray.get_actor(name, spec.namespace), no_restart=True)
        except ValueError:
            logger.debug("%s is gone already", name)


def _check_memory(spec: IndexSpec, exists: bool) -> int:
    """Bytes one shard needs at most: its features x 1.3 + 64 MB. Raises ValueError when there is less."""
    shards = len(spec.ranges)
    need = int(1.3 * math.ceil(spec.rows / shards) * spec.dim * 4 + 64 * _MB)
    what = f"an index of {spec.rows} x {spec.dim} features needs {need * shards / _MB:.0f} MB on {shards} actors"
    limit = spec.mining.memory_gb * 1e9
    if limit and need > limit:
        raise ValueError(
            f"{what}, mining.memory_gb = {spec.mining.memory_gb:g} allows {limit * shards / _MB:.0f} MB: "
            "raise mining.memory_gb or mining.shards"
        )
    free = ray.available_resources().get("memory", 0.0)
    if not exists and need * shards > free:
        raise ValueError(f"{what}, the cluster has {free / _MB:.0f} MB free: add nodes or stop other jobs")
    return need


def _wait(call: Any, actor: Any, name: str, silence_s: float) -> Any:
    """The result of a call to ``actor``, however long it takes, or what it raised.

    Raises RuntimeError when pings stay unanswered.
    """
    while True:
        ready, _ = ray.wait([call], timeout=silence_s)
        try:
            if ready:
                return ray.get(call, timeout=silence_s)
            ray.get(actor.ping.remote(), timeout=silence_s)
        except RayTaskError as error:
            raise error.cause from error
        except (GetTimeoutError, RayActorError) as error:
            raise RuntimeError(f"the index actor {name!r} is lost: no answer for {silence_s:g} s") from error


def _pack(snapshot: Snapshot) -> tuple[Any, ...]:
    """A snapshot as numpy arrays: those travel through the object store without being copied."""

    def arrays(tensors: Any) -> list[Any]:
        return [tensor.cpu().numpy() for tensor in tensors]

    neighbours = None if snapshot.neighbours is None else snapshot.neighbours.numpy()
    return (
        snapshot.version,
        arrays(snapshot.assignment),
        arrays(snapshot.prototypes),
        arrays(snapshot.concentration),
        neighbours,
    )


def _unpack(packed: tuple[Any, ...]) -> Snapshot:
    """The snapshot in memory of its own: what lies in the object store is read-only and shared."""

    def tensors(arrays: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(array) for array in arrays)

    version, assignment, prototypes, concentration, neighbours = packed
    return Snapshot(
        version,
        tensors(assignment),
        tensors(prototypes),
        tensors(concentration),
        None if neighbours is None else torch.tensor(neighbours),
    )
