"""Pictures for the report and for wandb, as PNG bytes.

Shape letters: B samples, C channels, H/W pixels, V views.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 72
"""Side in pixels that small images are enlarged to, about; images of more than 2 x this are reduced to it."""
_ACROSS = 8
_GAP, _WIDE_GAP = 2, 10


def view_grid(
    views: Sequence[Tensor], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> bytes:
    """The views of each sample side by side, several samples in a row, as a PNG with transparent gaps.

    ``views``: per view (B, C, H, W) float, normalised; views may differ in H and W (multi-crop). With ``mean`` and
    ``std`` per channel the normalisation is undone; without, each channel's own range over all views becomes 0 to 255.
    C = 1 is shown grey, of C >= 3 the first three channels in colour, of C = 2 the first. Raises ValueError for no
    views, views of different B, or other shapes.
    """
    shapes = [tuple(v.shape) for v in views]
    if not shapes or any(len(s) != 4 or 0 in s or s[:2] != shapes[0][:2] for s in shapes):
        raise ValueError(f"views of shapes {shapes}: give one (B, C, H, W) tensor per view, B and C the same in all")
    from PIL import Image

    samples, channels = shapes[0][:2]
    # The first view has the tile size, so smaller crops stay smaller beside it.
    width, height = shapes[0][3], shapes[0][2]
    across = max(1, min(samples, _ACROSS // len(views)))
    down = -(-samples // across)
    zoom = max(1, round(_TILE / width)) if width <= 2 * _TILE else 2 * _TILE / width
    tile_w, tile_h = round(width * zoom), round(height * zoom)
    block_w = len(views) * tile_w + (len(views) - 1) * _GAP
    size = across * block_w + (across - 1) * _WIDE_GAP, down * tile_h + (down - 1) * _WIDE_GAP
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    for v, images in enumerate(_bytes(views, channels, mean, std)):
        resample = Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX
        for b, pixels in enumerate(images):
            tile = Image.fromarray(pixels)
            tile = tile.resize((round(tile.width * zoom), round(tile.height * zoom)), resample)
            x = (b % across) * (block_w + _WIDE_GAP) + v * (tile_w + _GAP)
            sheet.paste(tile.convert("RGBA"), (x, (b // across) * (tile_h + _WIDE_GAP)))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _bytes(
    views: Sequence[Tensor], channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> list[np.ndarray]:
    """Per view (B, H, W, 3) or (B, H, W) uint8."""
    shown = 3 if channels >= 3 else 1
    arrays = [v.detach().float().cpu().numpy()[:, :shown].transpose(0, 2, 3, 1) for v in views]
    if mean is not None and std is not None:
        # 0 and 1 before the normalisation.
        low, scale = -np.asarray(mean[:shown]) / np.asarray(std[:shown]), 1.0 / np.asarray(std[:shown])
    else:
        every = np.concatenate([a.reshape(-1, shown) for a in arrays])
        low, scale = every.min(0), np.maximum(every.max(0) - every.min(0), 1e-6)
    pixels = [np.nan_to_num((a - low) / scale).clip(0.0, 1.0) * 255.0 for a in arrays]
    images = [p.round().astype(np.uint8) for p in pixels]
    return [i[..., 0] if shown == 1 else i for i in images]
