"""All randomness of the data: the order of rows and the counter-based stream of view parameters.

Pure functions of their keys, the same on every rank, loader, machine and after every resume. The generator is
SplitMix64 (Steele, Lea, Flood 2014) used as a hash of a counter; it is small enough to be repeated inside compiled
loops (``mix64``), and its outputs are 24-bit floats, exact in float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_MASK = 0xFFFFFFFFFFFFFFFF


def mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words that looks random. Arrays of uint64 in, the same out."""
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def key(*words: int) -> int:
    """One 64-bit key from a sequence of integers (seed, epoch, ...); every word changes all bits."""
    state = 0
    for word in words:
        mixed = np.array([(state + (word + 1) * int(_GAMMA)) & _MASK], dtype=np.uint64)
        state = int(mix64(mixed)[0])
    return state


def uniforms(seed: int, epoch: int, rows: NDArray[np.int64], view: int, slots: int) -> NDArray[np.float32]:
    """(len(rows), slots) float32 in [0, 1): the numbers that decide view ``view`` of each row in this epoch.

    Slot j of a row is a function of (seed, epoch, row, view, j) alone, whichever rank or batch the row is in.
    """
    base = np.uint64(key(seed, epoch, view))
    row_state = mix64((np.asarray(rows).astype(np.uint64) + np.uint64(1)) * _GAMMA + base)
    counter = (np.arange(1, slots + 1, dtype=np.uint64) * _GAMMA)[None, :]
    bits = mix64(row_state[:, None] + counter)
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def epoch_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """The order of rows of an epoch: a permutation of 0..rows-1, a pure function of (seed, epoch)."""
    return np.random.Generator(np.random.Philox(key=key(seed, epoch, 0x0D0E))).permutation(rows)


def batch_rows(order: NDArray[np.int64], step: int, batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """The rows of ``rank`` in global batch ``step``: global batches do not depend on the number of ranks."""
    local = batch // world
    first = step * batch + rank * local
    return order[first : first + local]


def shard_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """The contiguous rows [first, last) that ``rank`` embeds: every row once, no padding."""
    return rows * rank // world, rows * (rank + 1) // world
