"""Pictures of tensors, for reports."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import Tensor


def view_grid(views: Sequence[Tensor], gap: int = 2, height: int = 64) -> bytes:
    """A PNG of V x (B, C, H, W) views: a column per sample, a row per view, small images enlarged to ``height``.

    Each view is stretched to its own range, so normalised tensors need no mean and std.
    """
    from PIL import Image

    rows = []
    for view_BCHW in views:
        low = view_BCHW.amin((1, 2, 3), keepdim=True)
        high = view_BCHW.amax((1, 2, 3), keepdim=True)
        scaled = (view_BCHW - low) / (high - low).clamp_min(1e-6)
        times = max(1, height // scaled.shape[2])
        large = scaled.repeat_interleave(times, 2).repeat_interleave(times, 3)
        padded = torch.nn.functional.pad(large, (0, gap, 0, gap), value=1.0)
        rows.append(torch.cat(list(padded), dim=2))
    width = max(r.shape[2] for r in rows)
    rows = [torch.nn.functional.pad(r, (0, width - r.shape[2]), value=1.0) for r in rows]
    picture_CHW = (torch.cat(rows, dim=1) * 255).round().to(torch.uint8)
    if picture_CHW.shape[0] == 1:
        picture_CHW = picture_CHW.expand(3, -1, -1)
    out = io.BytesIO()
    Image.fromarray(picture_CHW.permute(1, 2, 0).contiguous().numpy()).save(out, "PNG")
    return out.getvalue()
