"""Connected components of nearest-neighbour graphs against scipy's."""

from __future__ import annotations

import pytest
import torch

from raycon.nn import graph


def partition(label: torch.Tensor) -> list[list[int]]:
    """The sets of equal labels, in an order that does not depend on what the labels are."""
    return sorted(torch.nonzero(label == v).flatten().tolist() for v in label.unique())


def by_search(neighbour: torch.Tensor) -> list[list[int]]:
    """The same by scipy where it is installed, else by merging sets edge by edge."""
    rows = len(neighbour)
    try:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components
    except ImportError:
        sets = [{i} for i in range(rows)]
        for i, j in enumerate(neighbour.tolist()):
            joined = sets[i] | sets[j]
            for member in joined:
                sets[member] = joined
        return sorted({tuple(sorted(s)) for s in sets})  # type: ignore[arg-type, return-value]
    ones = torch.ones(rows).numpy()
    edges = coo_matrix((ones, (torch.arange(rows).numpy(), neighbour.numpy())), shape=(rows, rows))
    return partition(torch.from_numpy(connected_components(edges, directed=False)[1]))


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17, 257, 1000])
def test_nearest_neighbours_give_scipys_components(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    unit = torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-9).argmax(1)
    label = graph.components(nearest)
    assert [list(p) for p in by_search(nearest)] == partition(label)
    assert torch.equal(label[label], label)  # a label is a node of its component
    assert torch.equal(label[nearest], label)


@pytest.mark.parametrize("rows", [2, 3, 7, 64, 100, 129])
def test_any_arrows_do(rows: int) -> None:
    """Long cycles and long tails, as ties could make them."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        arrows = torch.randint(rows, (rows,), generator=generator)
        assert [list(p) for p in by_search(arrows)] == partition(graph.components(arrows))
    chain = torch.arange(rows).sub(1).clamp_min(0)
    assert graph.components(chain).tolist() == [0] * rows
    ring = torch.arange(rows).add(1).remainder(rows)
    assert graph.components(ring).tolist() == [0] * rows
    two = torch.arange(rows) ^ 1
    if rows % 2 == 0:
        assert len(graph.components(two).unique()) == rows // 2
