"""The central types: what travels between loader, method, index and loop.

Shape letters: B samples on this rank, N rows of the data set, D feature width, k clusters, K neighbours, V views.
A position in the data set is a *row* (0 <= row < N); "index" always means the feature index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Batch(NamedTuple):
    """B samples on this rank, on the device."""

    views: tuple[Tensor, ...]
    """Each (B, C, H, W) float32 or bfloat16, normalised; one per name in ``Needs.views``."""
    row: Tensor
    """(B,) int64, 0 <= row < N."""
    label: Tensor
    """(B,) int64 weak / coarse label, -1 where there is none."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A method's shopping list: the loop buys, the method never shops."""

    views: tuple[str, ...] = ("strong", "strong")
    """The name of the ViewSpec of each view, in order. A view "neighbour" is of the image of a neighbour of the row, one
    of the ``neighbours`` in the snapshot (before there is one: of the row itself)."""
    warmup_views: tuple[str, ...] = ()
    """In the first ``warmup_view_epochs`` epochs these take the place of ``views``; as many."""
    warmup_view_epochs: int = 0
    group: int = 1
    """Put rows of one cluster of the snapshot's first clustering (of one weak label, when ``labels``) into a batch in
    groups of so many; 1: a plain shuffle."""
    labels: bool = False
    """Weak labels are used; a data set without them is an error at start-up."""
    clusterings: tuple[int, ...] = ()
    """The number of clusters k of each clustering wanted in the snapshot."""
    neighbours: int = 0
    """How many nearest neighbours of each row are wanted in the snapshot."""
    refresh_epochs: int = 1
    """A new snapshot every so many epochs."""
    from_epoch: int = 0
    """The first epoch (0-based) that needs a snapshot."""
    spherical: bool = False
    """Clusterings by cosine (centroids renormalised in every iteration)."""
    temperature: float = 0.0
    """The mean of the concentrations (PCL's phi); 0 when they are not wanted."""

    @property
    def snapshot(self) -> bool:
        return bool(self.clusterings or self.neighbours)


class Snapshot(NamedTuple):
    """What mining found: immutable, versioned, saved in the checkpoint, identical on every rank."""

    version: int
    """The epoch whose start it was made at."""
    assignment: tuple[Tensor, ...]
    """Per clustering (N,) int64: the cluster of each row."""
    prototypes: tuple[Tensor, ...]
    """Per clustering (k, D) float32, unit rows."""
    concentration: tuple[Tensor, ...]
    """Per clustering (k,) float32: PCL's phi, mean = ``Needs.temperature``; empty tuple when not wanted."""
    neighbours: Tensor | None
    """(N, K) int64 rows, nearest first, self excluded; None when not wanted."""

    def to(self, device: torch.device) -> Snapshot:
        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device) for t in tensors)

        neighbours = None if self.neighbours is None else self.neighbours.to(device)
        return Snapshot(
            self.version, move(self.assignment), move(self.prototypes), move(self.concentration), neighbours
        )


class Mined(NamedTuple):
    """What a training step is told besides its batch. Looked up in local tensors: no call leaves the process."""

    snapshot: Snapshot | None
    """The snapshot in force, on the device; None before ``Needs.from_epoch``."""
    used: tuple[int, ...]
    """Per clustering: one more than the largest cluster id that a row is assigned to."""
    seed: int
    """One key per step, the same on all ranks and after a resume: whatever the step draws follows from it."""
    epoch: int = 0
    step: int = 0
    """Global step, 0-based."""
    steps: int = 1
    """All steps of the run."""


class Output(NamedTuple):
    loss: Tensor
    """Scalar."""
    keep: Mapping[str, Tensor]
    """What ``after_step`` needs from this step (keys to enqueue, ...), detached."""
    metrics: Mapping[str, Tensor]
    """Scalars to log, detached; read by the loop only when it logs."""


class Progress(NamedTuple):
    """Where the run stands: after ``step`` (0-based) of ``steps`` in all."""

    step: int
    steps: int
    epoch: int


class Images(NamedTuple):
    """A block of rows as the evaluation view sees them."""

    images: Tensor
    """(B, C, H, W) float, normalised, on the device."""
    row: Tensor
    """(B,) int64."""


class Loader(Protocol):
    """One contract for FFCV, Ray Data and torch: same rows, same order, same view parameters."""

    kind: str
    """ffcv, ray or torch: which one "auto" chose."""
    rows: int
    """N."""
    steps: int
    """Batches per epoch on this rank (drop-last)."""
    stopwatch: AbstractContextManager[object]
    """Entered while the loading process itself makes the views of a batch; the loop puts its clock here."""

    def train(self, epoch: int, first_step: int = 0, snapshot: Snapshot | None = None) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on: a pure function of (seed, epoch, rank, world, snapshot).

        snapshot: its neighbours are what views of a neighbour's image are drawn from (without: of the row itself), its
        first clustering what rows are grouped by.
        """
        ...

    def scan(self) -> Iterator[Images]:
        """This rank's rows ``N*rank//world .. N*(rank+1)//world``, in order, each once, in the evaluation view."""
        ...

    def close(self) -> None: ...


class FeatureIndex(Protocol):
    """Where mining happens. Every rank calls each method equally often (they are collective).

    A cache: when a part of it was lost, ``snapshot`` raises MissingRows on every rank and the loop fills it again.
    """

    previous: Snapshot | None
    """The snapshot a warm start begins at; the loop sets it after a resume."""

    def add(self, version: int, first_row: int, features: Any) -> None:
        """Hand over (n, D) float32 unit features of rows ``first_row .. first_row + n``. Repeating it is harmless.

        Raises ValueError when a feature is not finite.
        """
        ...

    def begin(self, version: int, needs: Needs) -> None:
        """Start to make the snapshot that ``snapshot`` of the same arguments then waits for, and return at once.

        All rows of ``version`` have been added; nothing may be added before that ``snapshot`` has returned or raised.
        """
        ...

    def snapshot(self, version: int, needs: Needs) -> tuple[Snapshot, dict[str, float]]:
        """Cluster and mine the features of ``version``; the same on every rank (CPU tensors), and metrics."""
        ...

    def close(self) -> None: ...


class MissingRows(RuntimeError):
    """A part of the index was lost or never filled for this version: fill it again."""


class Runtime(Protocol):
    """Everything the loop wants from the outside world."""

    rank: int
    world: int
    device: torch.device
    index: FeatureIndex
    refused: list[str]
    """What was wrong with newer checkpoints than the one ``restore`` gave."""

    def restore(self) -> Path | None:
        """The checkpoint to go on from, None at the beginning."""
        ...

    def landed(self, path: Path, keep: int) -> None:
        """A checkpoint is complete in the run directory: bring it to where it outlives this machine, and drop there all
        but the last and ``keep`` more. Called on rank 0, in the thread that wrote it; what it raises ends the run."""
        ...

    def evaluated(self, step: int) -> bool:
        """Has the checkpoint of this step been evaluated? Asked on rank 0."""
        ...

    def report(self, metrics: dict[str, float], checkpoint: Path | None, evaluate: bool) -> None:
        """A checkpoint has landed (``checkpoint`` on rank 0, None elsewhere); ``evaluate`` it beside the training.

        Every rank calls it equally often: it may be a barrier.
        """
        ...

    def metrics(self, tracker: Any) -> Any:
        """Where rank 0 writes its metrics, a core.log.Metrics; ``tracker``: a core.log.Trackers told of them too."""
        ...

    def should_stop(self) -> bool:
        """The same answer on every rank."""
        ...

    def should_save(self) -> bool:
        """A checkpoint is wanted at once: a machine is about to be taken away. The same answer on every rank."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoaderPlan:
    """What a loader is asked for; every loader answers the same plan with the same stream."""

    specs: tuple[Any, ...]
    """One raycon.nn.views.ViewSpec per training view."""
    warmup_specs: tuple[Any, ...] = ()
    """Those of the first ``warmup_epochs`` epochs, as many."""
    warmup_epochs: int = 0
    neighbour_views: int = 0
    """The last so many views are of a neighbour's image, see ``Loader.train``."""
    group: int = 1
    """``Needs.group``."""
    group_by_label: bool = False
    """Of one weak label, not of one cluster of the snapshot."""
    eval_spec: Any
    """The ViewSpec of ``scan``: resize and centre crop, no randomness."""
    batch: int
    """Global batch; this rank gets ``batch // world`` rows of it."""
    seed: int
    rank: int
    world: int
    device: torch.device
    workers: int = 0
    """Helper processes or threads; 0: none."""
    cache: Path | None = None
    """Where converted data may be kept (absolute)."""
    channels_last: bool = True
    """Give views in torch.channels_last memory format."""
    augment: str = "auto"
    """``data.augment``: auto, batched or fused."""
    nodes: str = ""
    """``data.nodes``: label of the nodes that the ray loader's tasks run on."""
    bf16: bool = False
    """Training views in bfloat16: made in float32 and rounded at the end, as autocast would do it."""
