"""What the picture panels of a report show, computed once from a checkpoint and the data set, and kept as ``panels.npz``.

At most ROWS images are embedded (train and test together), so the work and the file do not grow with the data set;
what needs no features (cluster sizes, purity) is counted over all rows. raycon/report/panel_file.py keeps it,
raycon/report/panels.py draws it.

Shape letters: N rows of the data set, B sampled rows, T tiles (pictures), D feature width, K neighbours, C classes.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from raycon import methods
from raycon.core import stream
from raycon.core.config import RunConfig
from raycon.core.types import Images, LoaderPlan, Mined, Snapshot
from raycon.methods.base import Method
from raycon.report.panel_file import FORMAT, Panels

logger = logging.getLogger("raycon")

ROWS = 5000
"""Images embedded at most; three fifths of them train rows, the rest test rows."""
ROWS_SLOW = 500
"""The same where an image costs much: more than 64 pixels a side without a GPU."""
TILE = 40
"""Longest side in pixels of a kept picture; smaller images are kept as they are."""
MOSAIC = 6
"""Clusters shown per montage: largest, tightest, most mixed."""
MEMBERS = 12
STRIPS = 12
POSITIVES = 10
QUERIES = 20
NEIGHBOURS = 10
CANDIDATES = 2048
"""Images that stand for a queue in the panel of positives."""
CLASSES = 40
"""Confusions of more classes are not drawn."""
_PANEL = 0xA11E


class _Tiles:
    """Pictures by (split, row), each kept once."""

    def __init__(self) -> None:
        self._place: dict[tuple[int, int], int] = {}

    def of(self, split: int, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The tile numbers of rows (of any shape); -1 stays -1."""
        flat = [
            -1 if row < 0 else self._place.setdefault((split, row), len(self._place))
            for row in rows.reshape(-1).tolist()
        ]
        return np.array(flat, dtype=np.int32).reshape(rows.shape)

    def keys(self) -> NDArray[np.int64]:
        """(T, 2): split (0 train, 1 test) and row."""
        return np.array(list(self._place), dtype=np.int64).reshape(-1, 2)


def gather(run_dir: Path, rows: int = 0, device: torch.device | None = None) -> Panels:
    """The panels of a run's newest checkpoint. ``rows``: images to embed; 0: ROWS, or ROWS_SLOW where they cost much.

    Raises ValueError when the run has no readable checkpoint, ConfigError when its data set or configuration cannot be
    opened.
    """
    from raycon.evals import on_checkpoint
    from raycon.training import checkpoint, job

    begin = time.perf_counter()
    path, refused = checkpoint.newest(run_dir / "checkpoints")
    if path is None:
        raise ValueError(f"{run_dir} has no readable checkpoint{': ' + refused[0] if refused else ''}")
    saved = checkpoint.load(path)
    config = methods.read_config(run_dir / "config.yaml")
    train, test = on_checkpoint.open_sets(config)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = job.build_method(config, job.facts_of(config, train, 1), len(train.mean))
    method.load_state_dict(saved.model)
    method.to(device).eval()
    rows = rows or (ROWS if config.data.size <= 64 or device.type == "cuda" else ROWS_SLOW)

    panels, tiles = Panels(), _Tiles()
    panels.about = {
        "format": FORMAT,
        "step": saved.step,
        "epoch": saved.state["epoch"],
        "data": config.data.name,
        "method": config.method.name,
        "rows": [len(train), 0 if test is None else len(test)],
        "classes": list(train.classes) or _numbered(train.label),
        "weak_classes": list(train.weak_classes) or _numbered(train.weak),
    }
    train_row = _chosen(len(train), rows if test is None else rows * 3 // 5, config.seed)
    test_row = np.empty(0, dtype=np.int64) if test is None else _chosen(len(test), rows * 2 // 5, config.seed)
    encode = method.encoder()
    train_BD = _embed(encode, _images(config, run_dir, train, train_row, device))
    test_BD = _embed(encode, _images(config, run_dir, test, test_row, device)) if len(test_row) else train_BD[:0]

    _map(panels, tiles, train, train_row, train_BD, saved.snapshot, config.seed)
    _retrieval(panels, tiles, train, train_row, train_BD, test, test_row, test_BD)
    _confusion(panels, config, train, train_row, train_BD, test, test_row, test_BD)
    if saved.snapshot is not None:
        if saved.snapshot.assignment:
            picture = _images(config, run_dir, train, train_row, device)
            _clusters(panels, tiles, train, train_row, _embed(method.features, picture), saved.snapshot)
            _members(panels, tiles, train, saved.snapshot.assignment[-1].numpy(), config.seed)
        if saved.snapshot.neighbours is not None:
            _mined_neighbours(panels, tiles, saved.snapshot.neighbours.numpy(), config.seed)
    _positives(panels, tiles, config, run_dir, method, train, saved.snapshot, saved.state, device)
    _pictures(panels, tiles, train, test)
    panels.about["seconds"] = round(time.perf_counter() - begin, 2)
    return panels


# --- images and features ----------------------------------------------------------------------------------------


def _chosen(rows: int, wanted: int, seed: int) -> NDArray[np.int64]:
    """``wanted`` distinct rows, the same in every report of the run, in rising order."""
    return np.sort(stream.epoch_order(stream.key(seed, _PANEL) >> 1, 0, rows)[: max(1, wanted)])


def _numbered(label: NDArray[np.int64]) -> list[str]:
    return [str(i) for i in range(int(label.max(initial=-1)) + 1)]


def _images(config: RunConfig, run_dir: Path, dataset: Any, rows: NDArray[np.int64], device: torch.device) -> Any:
    """Blocks of the rows in the evaluation view (``Images`` whose row counts from 0)."""
    from raycon.nn import views

    plan = LoaderPlan(
        specs=(),
        eval_spec=views.eval_spec(config.data.size, dataset.mean, dataset.std),
        batch=min(256, len(rows)),
        seed=0,
        rank=0,
        world=1,
        device=device,
        cache=Path(config.data.cache or run_dir.parent / ".cache"),
    )
    loaders = importlib.import_module("raycon.data_loaders")
    return loaders.open_loader("torch", dataset.subset(rows), plan).scan()


@torch.inference_mode()
def _embed(encode: Any, blocks: Any) -> Tensor:
    """(B, D) float32 on the CPU, in the order of the rows."""
    found: list[tuple[Images, Tensor]] = [(block, encode(block.images).float().cpu()) for block in blocks]
    order = torch.cat([block.row.cpu() for block, _ in found]).argsort()
    return torch.cat([out for _, out in found])[order].clone()


def _pictures(panels: Panels, tiles: _Tiles, train: Any, test: Any) -> None:
    """tiles (T, S, S, C) uint8 and tile_split, tile_row, tile_label, tile_weak (T,)."""
    from PIL import Image

    keys = tiles.keys()
    side = TILE
    if train.image is not None:
        side = min(TILE, max(train.image[1:]))
    shown = np.zeros((len(keys), side, side, 1 if len(train.mean) == 1 else 3), dtype=np.uint8)
    label, weak = np.full(len(keys), -1), np.full(len(keys), -1)
    for t, (split, row) in enumerate(keys.tolist()):
        dataset = test if split else train
        label[t], weak[t] = dataset.label[row], dataset.weak[row]
        pixels = dataset.read(row)
        pixels = pixels[..., :1] if shown.shape[3] == 1 else np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3))
        if pixels.shape[:2] != (side, side):
            image = Image.fromarray(pixels[..., 0] if shown.shape[3] == 1 else np.ascontiguousarray(pixels))
            image.thumbnail((side, side), Image.Resampling.BOX)
            small = np.asarray(image)
            pixels = small[..., None] if small.ndim == 2 else small
        top, left = (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2
        shown[t, top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    panels.arrays |= {
        "tiles": shown,
        "tile_split": keys[:, 0].astype(np.int8),
        "tile_row": keys[:, 1],
        "tile_label": label.astype(np.int32),
        "tile_weak": weak.astype(np.int32),
    }


# --- the map ----------------------------------------------------------------------------------------------------


def _map(
    panels: Panels,
    tiles: _Tiles,
    train: Any,
    row_B: NDArray[np.int64],
    features_BD: Tensor,
    snapshot: Snapshot | None,
    seed: int,
) -> None:
    """map_tile (B,), map_<layout> (B, 2) in 0..1 and map_by_<colouring> (B,): -1 where there is none."""
    unit_BD = F.normalize(features_BD)
    panels.arrays["map_tile"] = tiles.of(0, row_B)
    pca_B2, share = pca(unit_BD, 2)
    panels.arrays["map_pca"] = _in_square(pca_B2)
    panels.about["pca_share"] = share
    if len(row_B) >= 20:
        name, found = _neighbour_embedding(pca(unit_BD, 50)[0], seed)
        panels.arrays[f"map_{name}"] = _in_square(found)
    for colouring, value in (("fine class", train.label), ("coarse class", train.weak)):
        if int(value.max(initial=-1)) >= 0:
            panels.arrays[f"map_by_{colouring}"] = value[row_B].astype(np.int32)
    for i, assignment in enumerate(() if snapshot is None else snapshot.assignment):
        panels.arrays[f"map_by_clustering {i}"] = assignment.numpy()[row_B].astype(np.int32)


def pca(features_BD: Tensor, dimensions: int) -> tuple[Tensor, float]:
    """(B, dimensions) scores on the first principal components (0 beyond D) and the share of the variance they hold."""
    centred = (features_BD - features_BD.mean(0)).double()
    value, vector = torch.linalg.eigh(centred.T @ centred)
    wanted = min(dimensions, centred.shape[1])
    axes = vector[:, -wanted:].flip(1)
    # The sign of an axis is arbitrary: the largest entry is made positive, so that two reports look alike.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    total = float(value.clamp_min(0).sum())
    share = float(value[-wanted:].clamp_min(0).sum()) / total if total > 0 else 1.0
    scores = centred @ axes
    return F.pad(scores, (0, dimensions - wanted)).float(), share


def _neighbour_embedding(reduced_BD: Tensor, seed: int) -> tuple[str, Tensor]:
    """A map that keeps neighbours together: UMAP or openTSNE where installed, else scikit-learn's t-SNE."""
    given = reduced_BD.numpy()
    perplexity = min(30.0, (len(given) - 1) / 3)
    if importlib.util.find_spec("openTSNE") is not None:
        from openTSNE import TSNE

        return "t-SNE", torch.from_numpy(np.asarray(TSNE(perplexity=perplexity, random_state=seed).fit(given)))
    if importlib.util.find_spec("umap") is not None:
        import umap

        return "UMAP", torch.from_numpy(np.asarray(umap.UMAP(random_state=seed).fit_transform(given)))
    from sklearn.manifold import TSNE as ExactTSNE

    method = ExactTSNE(perplexity=perplexity, max_iter=500, init="pca", random_state=seed, n_jobs=1)
    return "t-SNE", torch.from_numpy(method.fit_transform(given))


def _in_square(at_B2: Tensor) -> NDArray[np.float32]:
    """Moved and scaled, alike in both directions, into 0..1."""
    low, high = at_B2.min(0).values, at_B2.max(0).values
    centred = (at_B2 - (low + high) / 2) / float((high - low).max().clamp_min(1e-12))
    return (centred + 0.5).clamp(0, 1).numpy().astype(np.float32)


# --- clusters ---------------------------------------------------------------------------------------------------


def _clusters(
    panels: Panels, tiles: _Tiles, train: Any, row_B: NDArray[np.int64], mined_BD: Tensor, snapshot: Snapshot
) -> None:
    """Per clustering i: cluster_<i>_id (M,), _tile (M, MEMBERS), and in ``about["clusterings"]`` their numbers.

    Counts and purity are over all rows. The spread of a cluster is 1 - the mean cosine of its sampled rows to its
    prototype (three rows or more), "tightest" means the smallest concentration phi (PCL), or spread where there is none.
    """
    told = []
    unit_BD = F.normalize(mined_BD)
    for i, (assignment, prototype_kD) in enumerate(zip(snapshot.assignment, snapshot.prototypes, strict=True)):
        id_N = assignment.numpy()
        k = len(prototype_kD)
        size_k = np.bincount(id_N, minlength=k)
        purity_k, label_k = purity(id_N, train.label, k)
        cosine_B = (unit_BD * prototype_kD[assignment[torch.from_numpy(row_B)]]).sum(1).double().numpy()
        seen_k = np.bincount(id_N[row_B], minlength=k)
        sum_k = np.bincount(id_N[row_B], weights=cosine_B, minlength=k)
        spread_k = np.where(seen_k >= 3, 1 - sum_k / np.maximum(seen_k, 1), np.nan)
        phi_k = snapshot.concentration[i].double().numpy() if snapshot.concentration else np.full(k, np.nan)
        tight_k = np.where(size_k >= 3, phi_k if snapshot.concentration else spread_k, np.nan)
        groups = {"largest": np.argsort(-size_k, kind="stable")[:MOSAIC]}
        groups["tightest"] = _first(tight_k, MOSAIC, spread_k)  # phi is clipped at its tenth percentile: many are equal
        groups["most mixed"] = _first(np.where((size_k >= 5) & np.isfinite(purity_k), purity_k, np.nan), MOSAIC)
        groups = {name: found[size_k[found] > 0] for name, found in groups.items() if len(found)}
        shown = np.array([c for found in groups.values() for c in found], dtype=np.int64)
        panels.arrays[f"cluster_{i}_id"] = shown
        panels.arrays[f"cluster_{i}_tile"] = tiles.of(0, np.stack([_spaced(id_N, int(c)) for c in shown]))
        known = np.isfinite(purity_k)
        told.append(
            {
                "k": k,
                "used": int((size_k > 0).sum()),
                "single": int((size_k == 1).sum()),
                "median": float(np.median(size_k[size_k > 0])),
                "purity": float((purity_k[known] * size_k[known]).sum() / size_k[known].sum()) if known.any() else None,
                "by": "concentration phi" if snapshot.concentration else "spread",
                "groups": {name: len(found) for name, found in groups.items()},
                "clusters": [
                    {
                        "size": int(size_k[c]),
                        "purity": _or_none(purity_k[c]),
                        "label": int(label_k[c]),
                        "spread": _or_none(spread_k[c]),
                        "phi": _or_none(phi_k[c]),
                    }
                    for c in shown.tolist()
                ],
            }
        )
    panels.about["clusterings"] = told


def purity(
    id_N: NDArray[np.int64], label_N: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per cluster the share of its labelled rows in their majority class (nan: no labelled row) and that class (-1)."""
    known = label_N >= 0
    classes = int(label_N.max(initial=-1)) + 1
    share_k, label_k = np.full(k, np.nan), np.full(k, -1, dtype=np.int64)
    if classes == 0:
        return share_k, label_k
    # Pairs that occur only: k x classes may be large.
    pair, count = np.unique(id_N[known].astype(np.int64) * classes + label_N[known], return_counts=True)
    order = np.lexsort((-count, pair // classes))
    cluster, first = np.unique((pair // classes)[order], return_index=True)
    total = np.bincount(id_N[known], minlength=k)
    share_k[cluster] = count[order][first] / total[cluster]
    label_k[cluster] = (pair % classes)[order][first]
    return share_k, label_k


def _first(value_k: NDArray[np.float64], number: int, then_k: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """The clusters with the smallest values (of equal ones those with the smallest ``then_k``), nan never."""
    order = np.lexsort((value_k if then_k is None else then_k, value_k))[:number]
    return order[np.isfinite(value_k[order])]


def _spaced(id_N: NDArray[np.int64], cluster: int) -> NDArray[np.int64]:
    """(MEMBERS,) rows of a cluster, evenly spaced over all of them, -1 where it has fewer."""
    rows = np.flatnonzero(id_N == cluster)
    chosen = rows[np.linspace(0, len(rows) - 1, min(MEMBERS, len(rows))).astype(int)]
    return np.pad(chosen, (0, MEMBERS - len(chosen)), constant_values=-1)


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- positives --------------------------------------------------------------------------------------------------


def _positives(
    panels: Panels,
    tiles: _Tiles,
    config: RunConfig,
    run_dir: Path,
    method: Method,
    train: Any,
    snapshot: Snapshot | None,
    state: dict[str, Any],
    device: torch.device,
) -> None:
    """positive_anchor (A,), positive_tile (A, POSITIVES), positive_weight (A, POSITIVES), positive_own (A,).

    The images are those of the next batches in the run's own order: as many as a batch has, or as the queue holds (at
    most CANDIDATES). The method itself says how its target is spread over them.
    """
    queue = int(getattr(config.method, "queue", 0))
    wanted = min(len(train), max(min(config.train.batch, 2 * CANDIDATES), min(queue, CANDIDATES)))
    epoch = int(state["epoch"])
    row_B = stream.epoch_order(config.seed, epoch, len(train))[:wanted]
    blocks = list(_images(config, run_dir, train, row_B, device))
    order = torch.cat([b.row for b in blocks]).argsort()
    images = torch.cat([b.images for b in blocks])[order]
    mined = Mined(
        None if snapshot is None else snapshot.to(device), (), 0, epoch, int(state["step"]), int(state["steps"])
    )
    with torch.inference_mode():
        row, label = torch.from_numpy(row_B).to(device), torch.from_numpy(train.weak[row_B]).to(device)
        target_BB = method.positives(images, row, label, mined)
    if target_BB is None:
        return
    target_BB = target_BB.float().cpu().clone()
    own_B = target_BB.diagonal().clone()
    target_BB.fill_diagonal_(0)
    anchor_A = _anchors(train.label[row_B], STRIPS)
    weight_AK, at_AK = target_BB[anchor_A].topk(min(POSITIVES, len(row_B) - 1), dim=1)
    rows_AK = np.where(weight_AK.numpy() > 0, row_B[at_AK.numpy()], -1)
    label_B = train.label[row_B]
    panels.arrays |= {
        "positive_anchor": tiles.of(0, row_B[anchor_A]),
        "positive_tile": tiles.of(0, rows_AK),
        "positive_weight": weight_AK.numpy().astype(np.float32),
        "positive_own": own_B[anchor_A].numpy().astype(np.float32),
    }
    others = target_BB.sum(1)
    right = float("nan")
    if (label_B >= 0).all() and float(others.sum()) > 0:
        same = torch.from_numpy(label_B[:, None] == label_B[None, :])
        right = float((target_BB * same).sum() / others.sum())
    panels.about["positives"] = {
        "candidates": len(row_B),
        "epoch": epoch,
        "with": float((others > 0).double().mean()),
        "number": float((target_BB > 0).sum(1).double().mean()),
        "own": float(own_B.double().mean()),
        "right": _or_none(right),
    }


def _anchors(label_B: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Places of images whose classes take turns, in the order of the batch."""
    seen: dict[int, int] = {}
    turn = np.empty(len(label_B), dtype=np.int64)
    for i, label in enumerate(label_B.tolist()):
        turn[i] = seen[label] = seen.get(label, -1) + 1
    return np.lexsort((label_B, turn))[:number]


def _members(panels: Panels, tiles: _Tiles, train: Any, id_N: NDArray[np.int64], seed: int) -> None:
    """member_anchor (A,), member_tile (A, POSITIVES): images with others of their cluster of the last clustering."""
    sampled = _chosen(len(id_N), 200, seed)
    row_A = sampled[_anchors(train.label[sampled], STRIPS)]
    tile_AK = np.full((len(row_A), POSITIVES), -1, dtype=np.int64)
    for a, row in enumerate(row_A.tolist()):
        others = np.flatnonzero(id_N == id_N[row])
        others = others[others != row]
        chosen = others[np.linspace(0, len(others) - 1, min(POSITIVES, len(others))).astype(int)]
        tile_AK[a, : len(chosen)] = chosen
    panels.arrays |= {"member_anchor": tiles.of(0, row_A), "member_tile": tiles.of(0, tile_AK)}


def _mined_neighbours(panels: Panels, tiles: _Tiles, neighbour_NK: NDArray[np.int64], seed: int) -> None:
    """neighbour_anchor (A,), neighbour_tile (A, <= POSITIVES): the snapshot's nearest rows."""
    row_A = _chosen(len(neighbour_NK), STRIPS, seed)
    panels.arrays["neighbour_anchor"] = tiles.of(0, row_A)
    panels.arrays["neighbour_tile"] = tiles.of(0, neighbour_NK[row_A, :POSITIVES])


# --- retrieval and confusion ------------------------------------------------------------------------------------


def _retrieval(
    panels: Panels,
    tiles: _Tiles,
    train: Any,
    train_row: NDArray[np.int64],
    train_BD: Tensor,
    test: Any,
    test_row: NDArray[np.int64],
    test_BD: Tensor,
) -> None:
    """retrieval_query (Q,), retrieval_tile (Q, K), retrieval_cosine (Q, K): sampled test rows (train rows where there
    is no test split) among themselves, the query itself left out."""
    split, dataset, row_B, features_BD = (
        (0, train, train_row, train_BD) if test is None else (1, test, test_row, test_BD)
    )
    if len(row_B) < 2:
        return
    unit_BD = F.normalize(features_BD)
    query_Q = _anchors(dataset.label[row_B], QUERIES)
    cosine_QB = unit_BD[query_Q] @ unit_BD.T
    cosine_QB[torch.arange(len(query_Q)), torch.from_numpy(query_Q)] = -torch.inf
    cosine_QK, at_QK = cosine_QB.topk(min(NEIGHBOURS, len(row_B) - 1), dim=1)
    panels.arrays |= {
        "retrieval_query": tiles.of(split, row_B[query_Q]),
        "retrieval_tile": tiles.of(split, row_B[at_QK.numpy()]),
        "retrieval_cosine": cosine_QK.numpy().astype(np.float32),
    }
    panels.about["retrieval"] = {"split": "test" if split else "train", "gallery": len(row_B)}


def _confusion(
    panels: Panels,
    config: RunConfig,
    train: Any,
    train_row: NDArray[np.int64],
    train_BD: Tensor,
    test: Any,
    test_row: NDArray[np.int64],
    test_BD: Tensor,
) -> None:
    """confusion (C, C): sampled test rows of class i that a linear probe on the sampled train rows takes for class j."""
    from raycon.evals import linear

    classes = len(panels.about["classes"])
    if test is None or not 2 <= classes <= CLASSES:
        return
    train_label, test_label = torch.from_numpy(train.label[train_row]), torch.from_numpy(test.label[test_row])
    known, tested = train_label >= 0, test_label >= 0
    if int(known.sum()) < 20 or int(tested.sum()) < 1 or int(test_label.max()) >= classes:
        return
    rate, decay = torch.tensor([4.0]), torch.tensor([1e-5])
    epochs = min(config.evals.linear_epochs, 50)
    probes = linear.fit(train_BD[known], train_label[known], classes, epochs, config.seed, rate, decay)
    guess = probes.logits(test_BD[tested])[0].argmax(1)
    pair = test_label[tested] * classes + guess
    table = torch.bincount(pair, minlength=classes * classes).view(classes, classes).numpy()
    panels.arrays["confusion"] = table.astype(np.int32)
    panels.about["confusion"] = {
        "train": int(known.sum()),
        "test": int(tested.sum()),
        "top1": 100.0 * float(np.trace(table)) / int(tested.sum()),
    }
