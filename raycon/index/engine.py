"""The inner loops of the index, by torch (with compiled loops where numba is installed) or faiss, on the CPU or a GPU.

The one module that imports faiss, and only when an engine is made. All engines compute squared L2 distances in
float32 as |x|^2 + |c|^2 - 2 x.c, never below 0, and never hold an (n, k) array: what they take beside the rows given
is bounded by ``block`` x 4096 scores, so a GPU's memory does not depend on the size of the data set.

Shape letters: N rows of a block, Q queries, K centroids or neighbours, D feature width.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EngineName = Literal["auto", "faiss", "torch"]
DeviceName = Literal["cpu", "gpu"]

CPU_BLOCK = 1024
GPU_BLOCK = 16384
_CENTROIDS = 4096
"""Centroids compared at a time by torch: bounds its scores to 16 MB on a CPU, 256 MB on a GPU."""
_CPU_SCORES = 4 * 2**20
"""Scores of a search at a time on a CPU without compiled loops: 16 MB."""
_TILE = (1024, 1024)
"""Rows and columns of a product on a CPU, for the compiled loops: smaller ones stay in the cache but make the product
itself slower by more than that saves."""
_QUERIES = 8192
"""Queries searched at a time."""
_GPU_SEARCH = 65536
"""Rows searched at a time on a GPU: 256 MB of scores for 1024 queries."""
_DISTRIBUTIONS = (
    *("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss-cuda", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cu13"),
    *("faiss-gpu-cu12-cuvs", "faiss-gpu-cu13-cuvs"),
)
"""All that install a folder faiss/."""
_FAISS_TEMP = 256 * 2**20
"""Bytes of scratch that faiss may take on a GPU (it takes 1.5 GB unless told)."""


class Found(NamedTuple):
    """The nearest centroid of each row of a block, on the engine's device."""

    sqdist_N: Tensor
    """Squared distance, float32."""
    label_N: Tensor
    """int64; of equally near centroids the lowest."""
    second_N: Tensor | None
    """Squared distance to the second nearest, inf when there is one centroid; None when it was not asked for."""


class Nearest(Protocol):
    """From rows (N, D), float32 on the engine's device, to what was found; their squared norms (N,) where they are known."""

    def __call__(self, rows: Tensor, squares_N: Tensor | None = None) -> Found: ...


class Engine(Protocol):
    name: str
    device: torch.device
    block: int
    """Rows of one call; results of a row depend on its place in the call, so callers keep to one grid."""

    def nearest(self, centroids_KD: NDArray[np.float32], second: bool = False) -> Nearest:
        """A function that finds the nearest of the centroids."""
        ...

    def search(
        self, queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Of each query the ``count`` <= N nearest rows, nearest first: squared distances and positions, (Q, count)."""
        ...

    def use_threads(self, threads: int) -> None:
        """CPU threads of this engine's calls made from the calling thread."""
        ...


class TorchEngine:
    """Products by torch. On a CPU the squared norms ride along as one more column of the product, and the loops that torch
    has not are compiled where numba is installed."""

    name = "torch"

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.block = CPU_BLOCK if self.device.type == "cpu" else GPU_BLOCK
        self._scratch = torch.empty(0, device=self.device)
        self._wide: dict[str, Tensor] = {}

    def nearest(
        self, centroids_KD: NDArray[np.float32], second: bool = False, weight_K: NDArray[np.float64] | None = None
    ) -> Nearest:
        """``weight_K``: nearest by squared distance plus the centroid's weight (a power diagram); the distances
        returned are without it."""
        centroids = torch.tensor(centroids_KD, dtype=torch.float32, device=self.device)  # a copy: it may be read-only
        offset_K = centroids.square().sum(1)
        weights = None
        if weight_K is not None:
            weights = torch.tensor(weight_K, dtype=torch.float32, device=self.device)
            offset_K = offset_K + weights
        if self.device.type == "cpu" and _has_numba():
            return self._nearest_compiled(centroids * -2, offset_K, second, weights)
        if self.device.type == "cpu":
            wide = torch.cat([centroids * -2, offset_K[:, None]], 1)
        parts = [slice(start, start + _CENTROIDS) for start in range(0, len(centroids), _CENTROIDS)]

        def block(rows: Tensor, squares_N: Tensor | None = None) -> Found:
            if self.device.type == "cpu":
                wide_rows = self._with_ones("rows", rows)
            best_N = torch.full((len(rows),), torch.inf, device=self.device)
            label_N = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
            second_N = best_N.clone() if second else None
            for part in parts:
                if self.device.type == "cpu":
                    score = torch.mm(wide_rows, wide[part].T, out=self._memory(len(rows), len(wide[part])))
                else:
                    score = self._scores(rows, centroids[part], offset_K[part])
                value_N, place_N = _lowest(score)
                if second_N is not None:
                    score.scatter_(1, place_N[:, None], torch.inf)
                    others_N = torch.minimum(second_N, score.amin(1))
                    second_N = torch.minimum(others_N, torch.maximum(best_N, value_N))
                if len(parts) == 1:
                    best_N, label_N = value_N, place_N
                    break
                closer_N = value_N < best_N
                best_N = torch.where(closer_N, value_N, best_N)
                label_N = torch.where(closer_N, place_N + part.start, label_N)
            squared_N = _squares(rows) if squares_N is None else squares_N
            if weights is not None:
                best_N = best_N - weights[label_N]
            if second_N is not None:
                second_N = second_N.add_(squared_N).clamp_min_(0)
            return Found(best_N.add_(squared_N).clamp_min_(0), label_N, second_N)

        return block

    def _nearest_compiled(self, doubled_KD: Tensor, offset_K: Tensor, second: bool, weight_K: Tensor | None) -> Nearest:
        """``nearest`` of centroids times -2, in tiles."""
        from raycon.index import compiled

        tall, broad = _TILE
        parts = [
            (start, doubled_KD[start : start + broad].T, offset_K[start : start + broad].numpy())
            for start in range(0, len(doubled_KD), broad)
        ]

        def block(rows: Tensor, squares_N: Tensor | None = None) -> Found:
            total = len(rows)
            best_N, label_N = np.full(total, np.inf, dtype=np.float32), np.zeros(total, dtype=np.int64)
            second_N = np.full(total if second else 0, np.inf, dtype=np.float32)
            for first in range(0, total, tall):
                some, inside = rows[first : first + tall], slice(first, first + tall)
                answer = best_N[inside], label_N[inside], second_N[inside]
                for start, columns, offset in parts:
                    score = torch.mm(some, columns, out=self._memory(len(some), len(offset))).numpy()
                    in_parts(len(some), functools.partial(compiled.take_lowest, score, offset, start, *answer))
            squared_N = squares(rows.numpy()) if squares_N is None else squares_N.numpy()
            sqdist_N = best_N if weight_K is None else best_N - weight_K.numpy()[label_N]
            sqdist_N += squared_N
            np.maximum(sqdist_N, 0, out=sqdist_N)
            if second:
                second_N += squared_N
                np.maximum(second_N, 0, out=second_N)
            found = Found(torch.from_numpy(sqdist_N), torch.from_numpy(label_N), None)
            return found._replace(second_N=torch.from_numpy(second_N)) if second else found

        return block

    def search(
        self, queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if len(queries_QD) > _QUERIES:  # bounds the scores held
            starts = range(0, len(queries_QD), _QUERIES)
            found = [self.search(queries_QD[start : start + _QUERIES], rows_ND, count) for start in starts]
            return np.concatenate([sqdist for sqdist, _ in found]), np.concatenate([position for _, position in found])
        queries = torch.tensor(queries_QD, device=self.device)
        if self.device.type == "cpu" and _has_numba():
            best, position = self._search_compiled(queries, rows_ND, count)
        elif self.device.type == "cpu":
            best, position = self._search_cpu(queries, rows_ND, count)
        else:
            best, position = self._search_gpu(queries, rows_ND, count)
        sqdist = best.add_(queries.square().sum(1, keepdim=True)).clamp_min_(0)
        return sqdist.cpu().numpy(), position.cpu().numpy()

    def _search_gpu(self, queries: Tensor, rows_ND: NDArray[np.float32], count: int) -> tuple[Tensor, Tensor]:
        best = torch.empty(len(queries), 0, device=self.device)
        position = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for start in range(0, len(rows_ND), _GPU_SEARCH):
            block = torch.from_numpy(rows_ND[start : start + _GPU_SEARCH]).to(self.device)
            score = self._scores(queries, block, block.square().sum(1))
            near, where = score.topk(min(count, len(block)), largest=False)
            best, position = torch.cat([best, near], 1), torch.cat([position, where + start], 1)
            best, order = best.topk(min(count, best.shape[1]), largest=False)
            position = position.gather(1, order)
        return best, position

    def _search_compiled(self, queries: Tensor, rows_ND: NDArray[np.float32], count: int) -> tuple[Tensor, Tensor]:
        from raycon.index import compiled

        total = len(queries)
        best_QK = np.full((total, count), np.inf, dtype=np.float32)
        position_QK = np.full((total, count), -1, dtype=np.int64)
        doubled, squared_N = queries * -2, squares(rows_ND)
        tall, broad = max(_TILE), _TILE[1]
        for start in range(0, len(rows_ND), broad):
            block = torch.from_numpy(rows_ND[start : start + broad]).T
            offset = squared_N[start : start + broad]
            for first in range(0, total, tall):
                some = doubled[first : first + tall]
                score = torch.mm(some, block, out=self._memory(len(some), block.shape[1])).numpy()
                inside = slice(first, first + len(some))
                keep = functools.partial(
                    compiled.keep_nearest, score, offset, start, best_QK[inside], position_QK[inside]
                )
                in_parts(len(some), keep)
        order = np.lexsort((position_QK, best_QK))
        return (
            torch.from_numpy(np.take_along_axis(best_QK, order, 1)),
            torch.from_numpy(np.take_along_axis(position_QK, order, 1)),
        )

    def _search_cpu(self, queries: Tensor, rows_ND: NDArray[np.float32], count: int) -> tuple[Tensor, Tensor]:
        """Scores are compared with a bound of the last one wanted, and the few that are below are sorted: half the time
        of topk. The bound: every group of columns has a least score, and the count-th of these is not below it."""
        total, rows_Q = len(queries), np.arange(len(queries))
        limit_Q = np.full(total, np.inf, dtype=np.float32)
        kept: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []  # query, position, score
        size = min(max(_CPU_SCORES // max(total, 1), 4 * count, 256), len(rows_ND))
        for start in range(0, len(rows_ND), size):
            rows = rows_ND[start : start + size]
            block, squared = torch.from_numpy(rows), torch.from_numpy(np.einsum("nd,nd->n", rows, rows))
            score = self._scores(queries, block, squared)
            if start == 0 and len(block) > 4 * count:
                group = len(block) // (4 * count)
                least = score.as_strided((total, group, 4 * count), (len(block), 4 * count, 1)).amin(1)
                limit_Q = least.kthvalue(count, 1).values.numpy()
            flat = np.flatnonzero(score.numpy() <= limit_Q[:, None])
            query, column = np.divmod(flat, len(block))
            kept.append((query, column + start, score.numpy().ravel()[flat]))
            last = start + size >= len(rows_ND)
            if last or sum(len(q) for q, _, _ in kept) > 8 * count * total:
                query, position, value = (np.concatenate(part) for part in zip(*kept, strict=True))
                order = np.lexsort((value, query))
                first = np.searchsorted(query[order], rows_Q)
                order = order[np.arange(len(order)) - first[query[order]] < count]
                kept = [(query[order], position[order], value[order])]
                if len(order) == total * count:  # each query has as many as it wants, and the last bounds what follows
                    limit_Q = value[order].reshape(total, count)[:, -1]
        _, position, value = kept[0]
        return torch.from_numpy(value.reshape(total, count)), torch.from_numpy(position.reshape(total, count))

    def _scores(self, rows: Tensor, columns: Tensor, offset: Tensor) -> Tensor:
        """offset - 2 rows @ columns.T, in memory that the next call overwrites."""
        with _full_precision(self.device):
            return torch.addmm(offset, rows, columns.T, alpha=-2, out=self._memory(len(rows), len(columns)))

    def _memory(self, rows: int, columns: int) -> Tensor:
        """Memory for scores that the next call gives away again: fresh memory costs page faults."""
        if len(self._scratch) < rows * columns:
            self._scratch = torch.empty(rows * columns, device=self.device)
        return self._scratch[: rows * columns].view(rows, columns)

    def _with_ones(self, name: str, rows: Tensor) -> Tensor:
        """The rows (N, D) and a column of ones, in memory that the next call of this name overwrites."""
        shape = (len(rows), rows.shape[1] + 1)
        wide = self._wide.get(name)
        if wide is None or len(wide) < shape[0] or wide.shape[1] != shape[1]:
            wide = self._wide[name] = torch.ones(shape)
        wide = wide[: shape[0]]
        wide[:, :-1] = rows
        wide[:, -1] = 1
        return wide

    def use_threads(self, threads: int) -> None:
        """Nothing: torch's thread count belongs to the process or thread, whose owner has set it."""


class FaissEngine:
    name = "faiss"
    device = torch.device("cpu")
    block = CPU_BLOCK

    def __init__(self) -> None:
        import faiss

        self._faiss: Any = faiss

    def nearest(self, centroids_KD: NDArray[np.float32], second: bool = False) -> Nearest:
        centroids_KD = np.ascontiguousarray(centroids_KD, dtype=np.float32)
        wanted = 2 if second and len(centroids_KD) > 1 else 1

        def block(rows: Tensor, squares_N: Tensor | None = None) -> Found:
            sqdist_NK, label_NK = self._faiss.knn(rows.numpy(), centroids_KD, wanted)
            sqdist, label = torch.from_numpy(sqdist_NK), torch.from_numpy(label_NK)
            second_N = None
            if second:
                second_N = sqdist[:, 1] if wanted == 2 else torch.full((len(rows),), torch.inf)
            return Found(sqdist[:, 0], label[:, 0], second_N)

        return block

    def search(
        self, queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        sqdist_QK, position_QK = self._faiss.knn(np.ascontiguousarray(queries_QD), rows_ND, count)
        return sqdist_QK, position_QK

    def use_threads(self, threads: int) -> None:
        self._faiss.omp_set_num_threads(threads)

    def graph(self, rows_ND: NDArray[np.float32]) -> Callable[[NDArray[np.float32], int, int], tuple[Any, Any]]:
        """Build an HNSW graph (32 links, a copy of the rows in it); returns search(queries, count, breadth)."""
        index = self._faiss.IndexHNSWFlat(rows_ND.shape[1], 32)
        index.hnsw.efConstruction = 80
        index.add(np.ascontiguousarray(rows_ND))

        def search(queries_QD: NDArray[np.float32], count: int, breadth: int) -> tuple[Any, Any]:
            parameters = self._faiss.SearchParametersHNSW(efSearch=breadth)
            return index.search(np.ascontiguousarray(queries_QD), count, params=parameters)  # type: ignore[no-any-return]

        return search


class FaissGpuEngine(TorchEngine):
    """Neighbours by faiss on the GPU. k-means stays torch's: faiss would send the rows there for every pass as well,
    and adds the clusters up in float32."""

    name = "faiss"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        import faiss

        self._faiss: Any = faiss
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_FAISS_TEMP)

    def search(
        self, queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if count > 2048:  # the most that faiss finds on a GPU
            return super().search(queries_QD, rows_ND, count)
        sqdist_QK, position_QK = self._faiss.knn_gpu(
            self._resources,
            np.ascontiguousarray(queries_QD),
            rows_ND,
            count,
            device=self.device.index,
            vectorsMemoryLimit=_FAISS_TEMP,
        )
        return sqdist_QK, position_QK


def load(name: EngineName = "auto", device: DeviceName = "cpu") -> Engine:
    """The engine. ``auto`` on a CPU: torch with compiled loops, else (no numba) faiss, else torch alone.

    The BLAS that faiss-cpu 1.15 carries is older than many processors and then falls back to loops of 20 years ago: on a
    Xeon of 2023 a pass of k-means took 5.6 times torch's product, where torch with compiled loops takes 1.2 (LOG.md).

    Raises ValueError naming what is missing.
    """
    found = problems(name, device)
    if found:
        raise ValueError("; ".join(found))
    has_faiss = importlib.util.find_spec("faiss") is not None
    if device == "gpu":
        place = torch.device("cuda", torch.cuda.current_device())
        return FaissGpuEngine(place) if name != "torch" and has_faiss and _faiss_gpus() else TorchEngine(place)
    if name == "faiss" or (name == "auto" and has_faiss and not _has_numba()):
        return FaissEngine()
    return TorchEngine()


def problems(
    name: EngineName = "auto", device: DeviceName = "cpu", option: str = "mining", graph: bool = False
) -> list[str]:
    """Why this machine cannot give what is asked: one line each with the option and the fix, [] when it can.

    ``graph``: neighbours by HNSW are wanted, which faiss alone has, on the CPU.
    faiss itself would fall back to the CPU without a word when a GPU is asked for and there is none.
    """
    found = []
    present = importlib.util.find_spec("faiss") is not None
    if name == "faiss" and not present:
        found.append(f"{option}.engine = faiss but faiss is not installed: pip install 'raycon[cpu]', or give torch")
    if name != "torch" and len(several := faiss_distributions()) > 1:
        found.append(
            f"{' and '.join(several)} are installed, which write the same folder faiss/: pip uninstall them all, then "
            f"install one, or give {option}.engine = torch"
        )
    if graph and (name == "torch" or device == "gpu" or not present):
        found.append(
            f"{option}.neighbours = hnsw needs faiss on the CPU (here: engine = {name}, device = {device}, faiss "
            f"{'installed' if present else 'not installed'}): give {option}.neighbours = ivf"
        )
    if device == "gpu" and not torch.cuda.is_available():
        found.append(f"{option}.device = gpu but torch {torch.__version__} finds no CUDA device here: give cpu")
    elif device == "gpu" and name == "faiss" and present and not _faiss_gpus():
        found.append(
            f"{option}.engine = faiss and {option}.device = gpu, but the faiss installed here sees no GPU: "
            f"install 'raycon[gpu]' in place of faiss-cpu, or give {option}.engine = torch"
        )
    return found


def faiss_distributions() -> list[str]:
    """The names of the installed distributions that bring faiss; empty where it was built by hand."""
    return [name for name in _DISTRIBUTIONS if any(importlib.metadata.Distribution.discover(name=name))]


def _faiss_gpus() -> int:
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def _lowest(score_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest value of each row and the first place it stands at."""
    if score_NK.device.type != "cpu":
        value_N, place_N = score_NK.min(1)
        return value_N, place_N
    first_N = np.empty(len(score_NK), dtype=np.int64)

    def part(first: int, last: int) -> None:
        score_NK.numpy()[first:last].argmin(1, out=first_N[first:last])  # a quarter of the time of torch's min

    in_parts(len(score_NK), part)
    place_N = torch.from_numpy(first_N)
    return score_NK.gather(1, place_N[:, None])[:, 0], place_N


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1) if rows.device.type != "cpu" else torch.from_numpy(squares(rows.numpy()))


def squares(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared norms (N,); those of a row do not depend on the others."""
    result: NDArray[np.float32] = np.einsum("nd,nd->n", rows_ND, rows_ND)
    return result


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def add_up(
    rows_ND: Tensor, label_N: Tensor, magic: float, sums_KD: Tensor, counts_K: Tensor, scratch: list[Tensor]
) -> None:
    """Add the rows (N, D), each number rounded by adding and subtracting ``magic``, to the sums (K, D), float64, of their
    clusters, and count them. ``scratch``: empty at first, kept by the caller from block to block."""
    if rows_ND.device.type == "cpu" and _has_numba():
        from raycon.index import compiled

        arrays = [tensor.numpy() for tensor in (rows_ND, label_N, sums_KD, counts_K)]
        rows, label, sums, counts = arrays
        in_parts(rows_ND.shape[1], functools.partial(compiled.add_up, rows, label, magic, sums, counts))
        return
    if not scratch or len(scratch[0]) < len(rows_ND):  # fresh memory costs page faults
        scratch[:] = [torch.empty(rows_ND.shape, dtype=torch.float64, device=rows_ND.device)]
    sums_KD.index_add_(0, label_N, scratch[0][: len(rows_ND)].copy_(rows_ND).add_(magic).sub_(magic))
    counts_K += torch.bincount(label_N, minlength=len(counts_K))


def exact_distances(
    queries_QD: NDArray[np.float32], rows_ND: NDArray[np.float32], position_QK: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Squared distances (Q, K) of each query to the rows at its positions: float32 differences, float64 sums."""
    sqdist_QK = np.empty(position_QK.shape)
    if _has_numba():
        from raycon.index import compiled

        loops = functools.partial(compiled.exact_distances, queries_QD, rows_ND, position_QK, sqdist_QK)
        in_parts(len(queries_QD), loops)
        return sqdist_QK
    rows = torch.from_numpy(rows_ND)
    for start in range(0, len(queries_QD), 64):  # small enough for the cache
        query = torch.tensor(queries_QD[start : start + 64])
        near = rows[torch.from_numpy(position_QK[start : start + 64])]
        near.sub_(query[:, None]).square_()
        sqdist_QK[start : start + 64] = near.sum(-1, dtype=torch.float64).numpy()
    return sqdist_QK


def choose_near(rows_ND: Tensor, label_N: Tensor, centroids_KD: Tensor, near_KM: Tensor) -> Tensor:
    """For each row the nearest of its cluster's centroid and of those that ``near_KM`` names beside it: labels (N,).

    Each row's distances are added up by themselves, so they do not depend on which rows it comes with.
    """
    if rows_ND.device.type == "cpu" and _has_numba():
        from raycon.index import compiled

        chosen_N = np.empty(len(rows_ND), dtype=np.int64)
        arrays = [tensor.numpy() for tensor in (rows_ND, label_N, centroids_KD, near_KM)]
        in_parts(len(rows_ND), functools.partial(compiled.choose_near, *arrays, chosen_N))
        return torch.from_numpy(chosen_N)
    candidate_NM = torch.cat([label_N[:, None], near_KM[label_N]], 1)
    step_NMD = centroids_KD[candidate_NM].sub_(rows_ND[:, None])
    place_N = step_NMD.square_().sum(-1).cpu().numpy().argmin(1)  # the first of equal ones
    return candidate_NM.gather(1, torch.from_numpy(place_N).to(candidate_NM.device)[:, None])[:, 0]


def in_parts(total: int, work: Callable[[int, int], None]) -> None:
    """work(first, last) on parts of 0 .. total: one for each thread that torch may use from this one."""
    threads = min(torch.get_num_threads(), total)
    if threads <= 1:
        work(0, total)
        return
    ends = [total * i // threads for i in range(threads + 1)]
    for done in [_threads(threads).submit(work, a, b) for a, b in itertools.pairwise(ends)]:
        done.result()


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="index-loops")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, whatever the training has set: its 10-bit mantissa would move rows between clusters."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
