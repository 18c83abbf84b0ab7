"""How healthy a feature space is: pure functions of a sample of features, to see a collapse while it happens.

Shape letters: B samples, D feature width. All return a float32 scalar tensor on the device of the features, and expect
a sample (a batch or a few thousand rows), not a whole data set. A row of zeros stays zero when normalised.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_std(features_BD: Tensor) -> Tensor:
    """Standard deviation of each dimension of the unit features, averaged and multiplied by sqrt(D): 0 to 1.

    1: evenly spread over the sphere; 0: all features are the same, a complete collapse (Chen and He 2021, SimSiam,
    section 4.1, where it is compared with 1 / sqrt(D)).
    """
    unit_BD = F.normalize(features_BD.detach().float())
    return unit_BD.std(0, correction=0).mean() * math.sqrt(features_BD.shape[1])


def effective_rank(features_BD: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023, equation 1): exp of the entropy of the normalised singular values, 1 to min(B, D).

    Of the features as they are, neither centred nor normalised; 0 when all are zero. It can only show as many
    dimensions as there are rows: give B of several D.
    """
    x = features_BD.detach().double()
    # Singular values from the smaller Gram matrix: relative error about 1e-8 of the largest, far below what counts here.
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    rank = torch.special.entr(p).sum().exp()
    return (rank * (singular.sum() > 0)).float()


def alignment(one_BD: Tensor, other_BD: Tensor, power: float = 2.0) -> Tensor:
    """Mean distance ** power between the unit features of two views of the same samples, 0 (equal) to 2 ** power.

    Wang and Isola 2020, equation for L_align.
    """
    if one_BD.shape != other_BD.shape:
        raise ValueError(f"views of shapes {tuple(one_BD.shape)} and {tuple(other_BD.shape)}: give the same samples")
    gap_BD = F.normalize(one_BD.detach().float()) - F.normalize(other_BD.detach().float())
    return gap_BD.norm(dim=1).pow(power).mean()


def uniformity(features_BD: Tensor, sharpness: float = 2.0) -> Tensor:
    """log of the mean over pairs i < j of exp(-sharpness * squared distance) of unit features: 0 when all are the same,
    -4 * sharpness at most for opposite ones, about -2 * sharpness when evenly spread in many dimensions.

    Wang and Isola 2020, equation for L_uniform. Takes B x B memory.
    """
    rows = len(features_BD)
    if rows < 2:
        raise ValueError(f"uniformity of {rows} rows: give 2 or more")
    unit_BD = F.normalize(features_BD.detach().float())
    squared_pairs = torch.pdist(unit_BD).square()
    return (-sharpness * squared_pairs).logsumexp(0) - math.log(rows * (rows - 1) // 2)
