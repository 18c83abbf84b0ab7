"""Axes, thinning and the grid of views."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from raycon.nn import pictures
from raycon.report import charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.013, 0.061, [0.02, 0.03, 0.04, 0.05, 0.06]), (-3, 3, [-2, 0, 2]), (5, 5, [5])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.123456, "0.1235"), (1234.5, "1234"), (56789, "56.79k"), (-2.5e6, "-2.5M"), (1e-5, "1e-05")],
)
def test_number(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[7000] = (7000.0, -5.0)
    thin = charts._thin(points)
    assert len(thin) <= 1.1 * charts._MOST_POINTS
    assert {points[4321], points[7000], points[0], points[-1]} <= set(thin)
    assert thin == sorted(thin)
    for length in (1, 7, 400, 401, 9999):
        kept = charts._thin_at(length)
        assert (kept[0], kept[-1]) == (0, length - 1)
        assert len(kept) <= charts._MOST_POINTS + 1


def test_moving_average_of_a_line_is_the_line() -> None:
    points = [(float(i), 3.0 * i) for i in range(200)]
    assert np.allclose(charts._moving_average(points), points)


def test_histogram_counts_everything() -> None:
    drawn = charts.histogram("sizes", [(1, 4), (100, 2), (50, 1)], "rows", "clusters", bins=10)
    assert drawn.count("<rect") == 3
    assert "rows 1 to 10: 4" in drawn
    assert "rows 41 to 50: 1" in drawn
    assert "rows 91 to 100: 2" in drawn


def test_points_lie_where_they_should() -> None:
    drawn = charts.line_chart("t", [charts.Series("t", [(0, 0), (1, 5), (2, 10)])], "step")
    corners = drawn.split('points="')[1].split('"')[0].split()
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, c.split(","))) for c in corners)
    assert (x0, x2) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert y0 > y1 > y2
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.2)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.2)
    assert charts.line_chart("t", [charts.Series("t", [(0, float("nan"))])], "step") == ""


def tiles(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_view_grid_places_and_unnormalises() -> None:
    # Sample b of view v is a flat grey of (10 b + v) / 255; 5 samples of 2 views: 4 samples in the first row.
    views = [torch.stack([torch.full((1, 36, 36), (10 * b + v) / 255) for b in range(5)]) for v in (0, 1)]
    mean, std = (0.5,), (0.2,)
    sheet = tiles(pictures.view_grid([(v - 0.5) / 0.2 for v in views], mean, std))
    assert sheet.shape == (2 * 72 + 10, 4 * (2 * 72 + 2) + 3 * 10, 4)
    for b in range(5):
        for v in (0, 1):
            y, x = (b // 4) * 82 + 30, (b % 4) * 156 + v * 74 + 30
            assert sheet[y, x].tolist() == [10 * b + v] * 3 + [255]
    assert sheet[100, 400].tolist() == [0, 0, 0, 0]  # no sample there
    assert sheet[30, 72].tolist() == [0, 0, 0, 0]  # the gap


def test_view_grid_without_statistics_uses_the_range() -> None:
    view = torch.zeros(1, 3, 4, 4)
    view[0, 0, 0, 0], view[0, 1, 0, 0] = 5.0, -5.0
    sheet = tiles(pictures.view_grid([view]))
    assert sheet[0, 0].tolist() == [255, 0, 0, 255]
    assert sheet[-1, -1].tolist() == [0, 255, 0, 255]


def test_view_grid_of_large_and_of_different_sizes() -> None:
    sheet = tiles(pictures.view_grid([torch.rand(2, 3, 224, 224), torch.rand(2, 3, 96, 96)]))
    assert sheet.shape[0] == 144
    with pytest.raises(ValueError, match="same in all"):
        pictures.view_grid([torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8)])


def test_a_series_without_points_leaves_the_others_their_colours() -> None:
    given = [charts.Series("a", []), charts.Series("b", [(0, 1), (1, 2)])]
    drawn = charts.line_chart("t", given, "step")
    assert 'class="line c1"' in drawn
    assert 'class="key c1"' in drawn
    assert "c0" not in drawn
