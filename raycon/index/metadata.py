"""Clusters from what is known of the data besides the images: attributes, a class tree, a column of a table.

Pure functions, arrays in and dense cluster ids 0..Z-1 out; only the partition has a meaning, never the number of a
cluster. Sources: Cl-InfoNCE (Tsai et al. 2022, arXiv 2106.02869 and 2202.06670) and its published tables.

Shape letters: N rows, A attributes, L levels.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def dense(*columns_N: NDArray[np.generic]) -> NDArray[np.int64]:
    """(N,) ids 0..Z-1: equal for rows that are equal in all columns; numbered in sorted order, the first column first."""
    combined_N = np.zeros(len(columns_N[0]), dtype=np.int64)
    for column_N in columns_N:
        value_N = np.unique(column_N, return_inverse=True)[1].reshape(-1)
        # Numbered anew after every column, so that the product stays below N x N.
        combined_N = np.unique(combined_N * len(value_N) + value_N, return_inverse=True)[1].reshape(-1)
    return combined_N.astype(np.int64)


def entropy(value_N: NDArray[np.generic]) -> float:
    """The entropy of a column in bits."""
    count = np.unique(value_N, return_counts=True)[1]
    p = count / count.sum()
    return float(-(p * np.log2(p)).sum())


def attribute_clusters(table_NA: NDArray[np.generic], number: int) -> NDArray[np.int64]:
    """(N,) clusters: the ``number`` attributes of highest entropy are kept, and rows with equal values in all are one.

    Of attributes with the same entropy the earlier columns are kept (the authors' script is not published). A larger
    number splits the clusters of a smaller one. Raises ValueError when there are fewer attributes.
    """
    if not 1 <= number <= table_NA.shape[1]:
        raise ValueError(f"{number} of {table_NA.shape[1]} attributes: give 1 .. {table_NA.shape[1]}")
    entropy_A = np.array([entropy(column) for column in table_NA.T])
    kept = np.argsort(-entropy_A, kind="stable")[:number]
    return dense(*(table_NA[:, a] for a in kept))


def hierarchy_clusters(path_NL: NDArray[np.generic], level: int) -> NDArray[np.int64]:
    """(N,) clusters: the tree is cut at depth ``level``; rows below the same node of that depth are one cluster.

    path_NL: per row the nodes from the root's children (column 0, depth 1) down to its class; a class that ends higher
    up is followed by blanks and so stays a cluster of its own. Raises ValueError for a level outside 1..L.
    """
    if not 1 <= level <= path_NL.shape[1]:
        raise ValueError(f"level {level} of a tree of {path_NL.shape[1]} levels: give 1 .. {path_NL.shape[1]}")
    return dense(*path_NL[:, :level].T)


def binary_tree(count: int, level: int) -> NDArray[np.int64]:
    """(count,) node ids of ``count`` leaves ``level`` merges up: 0: each its own, then neighbours in pairs, and so on."""
    return np.arange(count) >> level


def split_classes(class_N: NDArray[np.int64], granularity: int) -> NDArray[np.int64]:
    """(N,) clusters that split every class, so that I(Z;T) stays H(T): 0: the classes themselves, the largest useful
    number, ceil(log2(size of the largest class)): single rows; in between each step halves the clusters.

    Inside a class the rows are paired in the order of NumPy's permutation with seed 0, begun anew for every class.
    """
    largest = int(np.unique(class_N, return_counts=True)[1].max())
    level = max(levels_of(largest) - granularity, 0)
    inside_N = np.zeros_like(class_N)
    for label in np.unique(class_N):
        members = np.flatnonzero(class_N == label)
        order = np.random.RandomState(0).permutation(len(members))
        inside_N[members[order]] = binary_tree(len(members), level)
    return dense(class_N, inside_N)


def levels_of(count: int) -> int:
    """Merges until a binary tree of ``count`` leaves is one node."""
    return (count - 1).bit_length()


# --- tables -----------------------------------------------------------------------------------------------------


def read_table(file: Path) -> tuple[list[str], NDArray[np.str_]]:
    """(names of the columns, (N, columns) cells as text) of a CSV with a header, one line per row of the data set.

    The first column is dropped when its name is empty (an index), and a last line of index -1, where the published
    tables keep the number of distinct values. Raises ValueError for an unreadable or ragged file.
    """
    try:
        with open(file, newline="", encoding="utf-8") as handle:
            header, *lines = list(csv.reader(handle))
        if not header:
            raise ValueError("its first line is empty")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{file}: not a table that can be read ({error})") from None
    if ragged := [i for i, line in enumerate(lines, start=2) if len(line) != len(header)]:
        raise ValueError(f"{file}: line {ragged[0]} has not the {len(header)} columns of the header")
    if lines and not header[0]:
        lines = lines[:-1] if lines[-1][0].split(".")[0] == "-1" else lines
        header, lines = header[1:], [line[1:] for line in lines]
    return header, np.array(lines, dtype=np.str_).reshape(len(lines), len(header))


def table_clusters(file: Path, kind: str, columns: Sequence[str], granularity: int, rows: int) -> NDArray[np.int64]:
    """(rows,) clusters from a table of the training rows in their order.

    kind: attributes (``attribute_clusters``), hierarchy (``hierarchy_clusters``) or column (one column, as it is).
    columns: which columns to read, all when empty; for a hierarchy from the coarsest level on. Raises ValueError
    naming what is wrong with the table.
    """
    header, cells = read_table(file)
    if len(cells) != rows:
        raise ValueError(
            f"{file} has {len(cells)} lines, the data {rows} images: give one line for each, in their order"
        )
    if missing := [c for c in columns if c not in header]:
        raise ValueError(f"{file} has no column {missing[0]!r}; it has {', '.join(header)}")
    chosen = cells[:, [header.index(c) for c in columns]] if columns else cells
    if kind == "attributes":
        return attribute_clusters(chosen, granularity)
    if kind == "hierarchy":
        return hierarchy_clusters(chosen, granularity)
    if chosen.shape[1] != 1:
        raise ValueError(f"{chosen.shape[1]} columns of {file}: name the one to take")
    return dense(chosen[:, 0])
