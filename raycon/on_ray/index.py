"""The feature index as Ray actors: S shards hold the rows, one coordinator runs raycon/index over them.

The driver calls ``start_index`` before training; the workers talk to it through ``RayIndex``. Features go to the
shards, and the snapshot comes back, through the object store; no call leaves the process during a training step.

Failures: a shard actor that died is restarted by Ray and takes its rows from disk when it wrote them there
(mining.persist), else it says MissingRows and is filled again; a restarted coordinator computes its snapshot again.
Waiting is unlimited as long as the actor waited for answers ``ping``, which never queues behind work.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raycon.core.config import ConfigError, MiningConfig
from raycon.core.types import Needs, Snapshot
from raycon.index.local import part
from raycon.index.persist import clear
from raycon.index.plan import shard_bytes
from raycon.index.service import Miner, Saved, SavedShard, cosines, search_rows
from raycon.index.shard import as_features, check_finite
from raycon.on_ray.meters import CoordinatorMeters, ShardMeters

logger = logging.getLogger(__name__)

OFF_SPOT = {"ray.io/market-type": "!spot"}
"""Label selector of what should not be lost with a spot node. Nodes without the label match."""
_ACTOR: dict[str, Any] = {
    "num_cpus": 0,  # a shard may work while the trainers wait: it need not take a core that their group needs
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
    saved: Saved | None = None
    """Where the shards find their features again after they were lost; the folder must be seen by all nodes."""
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
        return coordinator_name(self.run_name)


def coordinator_name(run_name: str) -> str:
    return f"{run_name}/index/coordinator"


@ray.remote(**_ACTOR)
class IndexShard:
    """A raycon.index.service.SavedShard behind Ray."""

    def __init__(self, spec: IndexSpec, number: int) -> None:
        mining = spec.mining
        torch.set_num_threads(mining.threads)
        kind = (spec.dim, mining.threads, mining.engine, mining.device, mining.storage)
        self._shard = SavedShard(*spec.ranges[number], *kind, saved=spec.saved)
        self._meters = ShardMeters(spec.run_name, number)

    def ping(self) -> None:
        """Answers at once whatever the shard works at."""

    @ray.method(concurrency_group="work")
    def call(self, method: str, *args: Any) -> Any:
        with self._meters.call(method, args):
            return getattr(self._shard, method)(*args)


@ray.remote(**_ACTOR)
class IndexCoordinator:
    """Holds no features: runs the refresh over the shards once and keeps its result for all ranks."""

    def __init__(self, spec: IndexSpec) -> None:
        self._spec = spec
        self._shards: list[Any] = []
        self._made: tuple[Any, Any, dict[str, float]] | None = None
        self._miner = Miner(self._fan_out, len(spec.ranges), spec.rows, spec.mining, spec.seed)
        self._meters = CoordinatorMeters(spec.run_name)

    def ping(self) -> None:
        """Answers at once whatever the coordinator works at."""

    def spec(self) -> IndexSpec:
        return self._spec

    def progress(self) -> int:
        """Passes over the data of the refresh under way, or of the last one."""
        return self._miner.progress()

    @ray.method(concurrency_group="work")
    def snapshot(self, version: int, needs: Needs, previous: Any) -> tuple[list[Any], dict[str, float]]:
        """([a reference to the packed snapshot], metrics); computed once while the same features are asked for."""
        key = (version, needs, None if previous is None else previous[0], self._fan_out("stamp"))
        if self._made is None or self._made[0] != key:
            made, metrics = self._miner.make(version, needs, None if previous is None else _unpack(previous))
            # Stamped once more: rows that came back from disk meanwhile are the same features.
            self._made = ((*key[:3], self._fan_out("stamp")), ray.put(_pack(made)), metrics)
            self._meters.refreshed(version, metrics)
        return [self._made[1]], self._made[2]

    def _fan_out(self, method: str, *args: Any) -> list[Any]:
        if not self._shards:
            self._shards = [ray.get_actor(name, self._spec.namespace) for name in self._spec.shard_names]
        return _call_all(self._shards, self._spec, method, *args)


class RayIndex:
    """A FeatureIndex over a started index, for one of ``world`` ranks (torch.distributed initialised when > 1)."""

    def __init__(self, spec: IndexSpec, rank: int = 0, world: int = 1) -> None:
        self.previous: Snapshot | None = None
        """The snapshot a warm start begins at: the last one made, or the one a checkpoint held."""
        self._spec, self._rank, self._world = spec, rank, world
        self._shards = [ray.get_actor(name, spec.namespace) for name in spec.shard_names]
        self._coordinator = ray.get_actor(spec.coordinator_name, spec.namespace)
        self._sent: list[tuple[int, Any]] = []
        self._begun: Any = None
        """Keeps the call alive."""

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

    def begin(self, version: int, needs: Needs) -> None:
        """Have the coordinator start; ``snapshot`` asks for the same and is given what it made.

        Raises ValueError, on every rank.
        """
        self._together(self._all_arrived)  # no rank starts before every rank's rows are there
        if self._rank == 0:
            self._begun = self._coordinator.snapshot.remote(version, needs, self._warm_start())

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        """The same snapshot on every rank; the first rank that asks has it computed.

        Raises MissingRows or ValueError, on every rank; RuntimeError when an actor is lost for good.
        """
        self._together(self._all_arrived)  # no rank asks before every rank's rows are there
        snapshot, metrics = self._together(lambda: self._fetch(version, needs))
        self.previous, self._begun = snapshot, None
        return snapshot, metrics

    def search(
        self, features: Any, count: int, version: int | None = None, own_Q: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ``count`` rows most similar to each of (Q, dim) unit features: rows and cosines, both (Q, count).

        See ``search_rows``; any rank may ask alone. Raises MissingRows and ValueError.
        """
        row_QK, sqdist_QK = search_rows(self.call, version, self._spec.rows, self._spec.dim, features, count, own_Q)
        return row_QK, cosines(sqdist_QK)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of ``SavedShard`` on every shard: the answers in row order."""
        self._all_arrived()
        return _call_all(self._shards, self._spec, method, *args)

    def progress(self) -> int:
        """Passes over the data made so far by the refresh under way or the last one."""
        passes: int = ray.get(self._coordinator.progress.remote(), timeout=self._spec.silence_s)
        return passes

    def close(self) -> None:
        """Forget what was sent. The actors belong to the driver: ``stop_index``."""
        self._sent.clear()

    def _arrived(self, number: int, call: Any) -> None:
        _wait(call, self._shards[number], self._spec.shard_names[number], self._spec.silence_s)

    def _all_arrived(self) -> None:
        while self._sent:
            self._arrived(*self._sent.pop())

    def _warm_start(self) -> Any:
        if self._spec.mining.init != "warm" or self.previous is None:
            return None
        return _pack(self.previous._replace(concentration=(), neighbours=None))

    def _fetch(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        name, silence_s = self._spec.coordinator_name, self._spec.silence_s
        previous = self._warm_start()
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
    saved: Saved | None = None,
) -> IndexSpec:
    """Start the actors of an index, or find those of this name; keep the spec as long as they shall live.

    Raises ConfigError when the features do not fit into memory, ValueError when the name is taken by another index,
    RuntimeError when the actors do not come up in time. Nothing is allocated before the first features arrive. A new
    index forgets what shards of an earlier one wrote to ``saved``.
    """
    spec = IndexSpec(
        run_name=run_name,
        namespace=namespace,
        rows=rows,
        dim=dim,
        mining=mining,
        seed=seed,
        silence_s=silence_s,
        saved=saved,
    )
    names = {
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == namespace
    }
    exists = spec.coordinator_name in names
    memory = _check_memory(spec, exists)
    if saved is not None and saved.write and not exists:
        clear(saved.folder)
    common: dict[str, Any] = {"namespace": namespace, "get_if_exists": True, "scheduling_strategy": "SPREAD"}
    common["label_selector"] = OFF_SPOT  # of a cluster whose nodes say so
    shard: Any = IndexShard
    shards = [
        shard.options(name=name, num_cpus=mining.cpus, num_gpus=mining.gpus, memory=memory, **common).remote(
            spec, number
        )
        for number, name in enumerate(spec.shard_names)
    ]
    coordinator = IndexCoordinator.options(name=spec.coordinator_name, **common).remote(spec)  # type: ignore[attr-defined]
    actors = (coordinator, *shards)
    try:
        ray.get([actor.ping.remote() for actor in actors], timeout=start_timeout_s)
    except GetTimeoutError:
        if not exists:
            stop_index(spec)  # else they would wait on for their place
        raise RuntimeError(
            f"the {len(shards)} index actors of {run_name!r} did not start within {start_timeout_s:g} s; each asks for "
            f"{memory / _MB:.0f} MB and mining.cpus = {mining.cpus:g}, mining.gpus = {mining.gpus:g}; free are {ray.available_resources()}"
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
    """Bytes one shard needs at most. Raises ConfigError when there is less, in all or on every node."""
    shards = len(spec.ranges)
    need = shard_bytes(spec.rows, spec.dim, shards, spec.mining.storage)
    what = f"an index of {spec.rows} x {spec.dim} features needs {need * shards / _MB:.0f} MB on {shards} actors"
    limit = spec.mining.memory_gb * 1e9
    if limit and need > limit:
        raise ConfigError(
            [
                f"{what}, mining.memory_gb = {spec.mining.memory_gb:g} allows {limit * shards / _MB:.0f} MB: "
                "raise mining.memory_gb or mining.shards"
            ]
        )
    if exists:
        return need
    free = ray.available_resources().get("memory", 0.0)
    if need * shards > free:
        raise ConfigError([f"{what}, the cluster has {free / _MB:.0f} MB free: add nodes or stop other jobs"])
    nodes = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    if sum(int(node // need) for node in nodes) < shards:
        raise ConfigError(
            [
                f"{what} of {need / _MB:.0f} MB each, and the nodes have {', '.join(f'{n / _MB:.0f}' for n in nodes)} MB: "
                "raise mining.shards, so that each is smaller, or add nodes"
            ]
        )
    return need


def _call_all(shards: list[Any], spec: IndexSpec, method: str, *args: Any) -> list[Any]:
    sent = [ray.put(arg) if isinstance(arg, np.ndarray) else arg for arg in args]  # once, not once per shard
    calls = [shard.call.remote(method, *sent) for shard in shards]
    return [
        _wait(call, shard, name, spec.silence_s)
        for call, shard, name in zip(calls, shards, spec.shard_names, strict=True)
    ]


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
