"""From nearest neighbours to connected components, on the device, without asking the host.

A graph in which every node points at one other (its nearest neighbour) is special: following the arrows, every node ends
in the one cycle of its component. So components need no search: the arrows are doubled (i -> n[i] -> n[n[i]] -> ...) a
number of times that depends on B alone, and the label is the smallest node of the cycle a node ends in.

Legend: B nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def components(neighbour_B: Tensor) -> Tensor:
    """(B,) int64 labels: equal exactly for nodes that edges {i, neighbour_B[i]}, taken in both directions, connect.

    neighbour_B: (B,) int64 in 0..B-1. A label is a node of its component: the smallest of those on its cycle. Cycles of
    any length are right; nearest neighbours have cycles of two, longer ones only among ties. ceil(log2 B) + 1 rounds
    of integer look-ups: the same labels on every device and rank (WCL, arXiv 2110.04770, takes them from scipy).
    """
    reached_B = neighbour_B
    # After r rounds: the node 2^r arrows away, and the smallest of the 2^r nodes passed on the way there.
    smallest_B = torch.arange(len(neighbour_B), device=neighbour_B.device)
    for _ in range(max(len(neighbour_B) - 1, 1).bit_length()):
        smallest_B = torch.minimum(smallest_B, smallest_B[reached_B])
        reached_B = reached_B[reached_B]
    # B arrows away every node is on its cycle, and B more arrows go all the way round it.
    return smallest_B[reached_B]
