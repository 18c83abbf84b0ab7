"""The picture panels of a report as PNG files and tables: for wandb and TensorBoard, for slides and papers.

The numbers and pictures are those of ``panels.npz``; what the page draws with its style sheet and script is drawn here
with Pillow. Nothing is computed anew.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from raycon.report import panel_file
from raycon.report.panel_file import Panels
from raycon.report.panels import Sheet, frame

_TILE = 48
"""Side in pixels of a picture in a strip, about: small images are enlarged by a whole number."""
_GAP, _BAR = 4, 7
_BACK, _TEXT, _SOFT, _GRID = "#ffffff", "#1c2430", "#5b6675", "#dfe3e9"
_RIGHT, _WRONG, _ACCENT = "#17723a", "#b3261e", "#2563c9"
_COLOURS = (
    "#2563c9",
    "#e0701a",
    "#15803d",
    "#d6246e",
    "#7e3fb5",
    "#b59a00",
    "#0e93ab",
    "#8a5a3b",
    "#c62323",
    "#5b6675",
)
_MAP = 860
"""Side in pixels of a drawn map."""
_LISTED = 40
"""Values of a colouring that get a line in the legend."""


class Table(NamedTuple):
    """Cells are text, numbers, or PNG pictures (bytes)."""

    columns: list[str]
    rows: list[list[Any]]


class Board(NamedTuple):
    """What a tracker is given of a report."""

    step: int
    """Of the checkpoint that the panels are of."""
    pictures: dict[str, bytes]
    tables: dict[str, Table]


def read(run_dir: Path) -> Board:
    """The board of a run directory; empty when no panels were made there. Raises ValueError for a damaged panels.npz."""
    file = Path(run_dir) / panel_file.FILE
    return draw(panel_file.load(file)) if file.exists() else Board(0, {}, {})


def draw(panels: Panels) -> Board:
    """All panels that have something to show, as pictures and tables named ``report/...``."""
    pen = _Pen(panels)
    images: dict[str, Image.Image] = {}
    tables: dict[str, Table] = {}
    for part in (_map, _clusters, _positives, _strips_of, _retrieval, _confusion):
        part(pen, panels, images, tables)
    return Board(
        int(panels.about["step"]),
        {f"report/{name}": _png(image) for name, image in images.items()},
        {f"report/{name}": table for name, table in tables.items()},
    )


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


class _Pen:
    """Draws strips of tiles, lines of text, and puts them below each other."""

    def __init__(self, panels: Panels) -> None:
        self.sheet = Sheet(panels)
        self.panels = panels
        self._tiles = panels.arrays["tiles"]
        side = self._tiles.shape[1]
        self.side = side * max(1, round(_TILE / side))
        self.font = ImageFont.load_default(13)
        self.bold = ImageFont.load_default(15)

    def tile(self, number: int, css: str = "") -> Image.Image:
        """One picture with its frame: "right", "wrong", "anchor" or none."""
        pixels = self._tiles[number]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
        image = image.resize((self.side, self.side), Image.Resampling.NEAREST)
        colour = {"right": _RIGHT, "wrong": _WRONG, "anchor": _ACCENT}.get(css)
        if colour:
            ImageDraw.Draw(image).rectangle((0, 0, self.side - 1, self.side - 1), outline=colour, width=3)
        return image

    def strip(
        self, tiles: Sequence[int], anchor: int = -1, weights: Sequence[float] = (), frames: bool = False
    ) -> Image.Image:
        """The anchor (-1: none), then the tiles (-1 left out), each above a bar of its weight where there are weights."""
        shown = [(i, int(t)) for i, t in enumerate(tiles) if t >= 0]
        step, left = self.side + _GAP, (self.side + 6 * _GAP if anchor >= 0 else 0)
        height = self.side + (_BAR + 3 if len(weights) else 0)
        image = Image.new("RGB", (max(left + step * len(shown), step), height), _BACK)
        pen = ImageDraw.Draw(image)
        if anchor >= 0:
            image.paste(self.tile(anchor, "anchor"), (0, 0))
            x, y = self.side + 2 * _GAP, self.side // 2
            pen.polygon([(x, y - 5), (x + 8, y), (x, y + 5)], fill=_SOFT)
        most = max(list(weights) or [1.0])
        for place, (i, tile) in enumerate(shown):
            css = frame(self.panels, anchor, tile) if frames else ""
            x = left + place * step
            image.paste(self.tile(tile, css), (x, 0))
            if len(weights):
                y = self.side + 3
                pen.rectangle((x, y, x + self.side - 1, y + _BAR - 1), fill=_GRID)
                wide = round((self.side - 1) * float(weights[i]) / max(most, 1e-12))
                pen.rectangle((x, y, x + wide, y + _BAR - 1), fill=_ACCENT)
        return image

    def stack(self, title: str, lines: Sequence[tuple[str, Image.Image]]) -> Image.Image:
        """Strips below each other, each under its words."""
        wide = max([image.width for _, image in lines] + [int(self.bold.getlength(title))])
        wide = max([wide] + [int(self.font.getlength(words)) for words, _ in lines]) + 24
        high = 44 + sum(image.height + (20 if words else 0) + 10 for words, image in lines)
        sheet = Image.new("RGB", (wide, high), _BACK)
        pen = ImageDraw.Draw(sheet)
        pen.text((12, 12), title, fill=_TEXT, font=self.bold)
        y = 40
        for words, image in lines:
            if words:
                pen.text((12, y), words, fill=_SOFT, font=self.font)
                y += 20
            sheet.paste(image, (12, y))
            y += image.height + 10
        return sheet


# --- one function per panel -------------------------------------------------------------------------------------


def map_picture(panels: Panels) -> bytes | None:
    """The map of a run in its first colouring, as a PNG; None where there is none."""
    colourings, layouts = _layouts(panels)
    if not layouts:
        return None
    layout, (by, value_B) = next(iter(layouts)), next(iter(colourings.items()))
    return _png(scatter(_Pen(panels), layouts[layout], value_B, _names(panels, by), _title(layouts, layout, by)))


def _layouts(panels: Panels) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Colourings and layouts of the map by name; the layout that shows neighbours first."""
    arrays = panels.arrays
    if "map_tile" not in arrays:
        return {}, {}
    colourings = {n.removeprefix("map_by_"): arrays[n] for n in arrays if n.startswith("map_by_")}
    found = [n for n in arrays if n.startswith("map_") and n != "map_tile" and not n.startswith("map_by_")]
    layouts = {"PCA" if n == "map_pca" else n[4:]: arrays[n] for n in sorted(found, key=lambda n: n == "map_pca")}
    return colourings or {"": np.zeros(len(arrays["map_tile"]), dtype=np.int32)}, layouts


def _names(panels: Panels, by: str) -> Sequence[str]:
    names: dict[str, Sequence[str]] = {
        "fine class": panels.about["classes"],
        "coarse class": panels.about["weak_classes"],
    }
    return names.get(by, ())


def _title(layouts: dict[str, NDArray[Any]], layout: str, by: str) -> str:
    return f"{layout} of {len(layouts[layout]):,} embeddings{', by ' + by if by else ''}"


def _map(pen: _Pen, panels: Panels, images: dict[str, Image.Image], tables: dict[str, Table]) -> None:
    """A picture per colouring of the map that shows neighbours, PCA in the first colouring, and all points as a table."""
    arrays = panels.arrays
    colourings, layouts = _layouts(panels)
    if not layouts:
        return
    main = next(iter(layouts))
    wanted = [(main, by) for by in colourings]
    wanted += [("PCA", next(iter(colourings)))] if main != "PCA" else []
    for layout, by in wanted:
        images[f"map/{layout}{' by ' + by if by else ''}"] = scatter(
            pen, layouts[layout], colourings[by], _names(panels, by), _title(layouts, layout, by)
        )
    columns = ["row", *(f"{layout} {axis}" for layout in layouts for axis in "xy"), *(by for by in colourings if by)]
    rows = []
    for i, row in enumerate(arrays["tile_row"][arrays["map_tile"]].tolist()):
        at = [float(v) for layout in layouts.values() for v in layout[i]]
        rows.append([row, *at, *(_named(int(v[i]), _names(panels, by)) for by, v in colourings.items() if by)])
    tables["map"] = Table(columns, rows)


def _named(value: int, names: Sequence[str]) -> str:
    if value < 0:
        return "none"
    return str(names[value]) if value < len(names) else str(value)


def scatter(
    pen: _Pen, at_B2: NDArray[np.float32], value_B: NDArray[np.int32], names: Sequence[str], title: str
) -> Image.Image:
    """Points in the unit square (y up) coloured by a whole number, with a legend of at most _LISTED lines."""
    values = sorted({int(v) for v in value_B})
    listed = values if 1 < len(values) <= _LISTED else []
    legend = 22 + max((int(pen.font.getlength(_named(v, names))) for v in listed), default=0) if listed else 0
    twice = Image.new("RGB", (2 * _MAP, 2 * _MAP), _BACK)  # drawn double and reduced: round points
    draw_on = ImageDraw.Draw(twice)
    size = max(3.0, min(9.0, 260 / max(len(at_B2), 1) ** 0.5))
    order = np.random.default_rng(0).permutation(len(at_B2))  # no class lies on top of all others
    for i in order.tolist():
        x, y = 16 + float(at_B2[i, 0]) * (2 * _MAP - 32), 16 + (1 - float(at_B2[i, 1])) * (2 * _MAP - 32)
        draw_on.ellipse((x - size, y - size, x + size, y + size), fill=_colour(int(value_B[i]), bool(names)))
    sheet = Image.new("RGB", (_MAP + legend + 24, _MAP + 40), _BACK)
    sheet.paste(twice.resize((_MAP, _MAP), Image.Resampling.BOX), (0, 40))
    ink = ImageDraw.Draw(sheet)
    ink.text((12, 12), title, fill=_TEXT, font=pen.bold)
    for line, value in enumerate(listed):
        y = 52 + 20 * line
        ink.ellipse((_MAP + 6, y, _MAP + 16, y + 10), fill=_colour(value, bool(names)))
        ink.text((_MAP + 22, y - 3), _named(value, names), fill=_TEXT, font=pen.font)
    return sheet


def _colour(value: int, named: bool) -> tuple[int, ...] | str:
    """As on the page: ten chosen colours for classes, then hues a golden angle apart."""
    if value < 0:
        return "#888888"
    if named and value < len(_COLOURS):
        return _COLOURS[value]
    red, green, blue = colorsys.hls_to_rgb((value * 137.508 + 215) % 360 / 360, 0.44 + (value >> 2) % 3 * 0.07, 0.65)
    return round(255 * red), round(255 * green), round(255 * blue)


def _clusters(pen: _Pen, panels: Panels, images: dict[str, Image.Image], tables: dict[str, Table]) -> None:
    """Per clustering its montage, and a table with a strip of pictures per cluster."""
    classes = panels.about["classes"]
    for i, told in enumerate(panels.about.get("clusterings", [])):
        ids, tiles = panels.arrays[f"cluster_{i}_id"], panels.arrays[f"cluster_{i}_tile"]
        groups = [group for group, count in told["groups"].items() for _ in range(count)]
        lines, rows = [], []
        for j, (group, numbers) in enumerate(zip(groups, told["clusters"], strict=True)):
            strip = pen.strip(tiles[j].tolist())
            label = _named(numbers["label"], classes)
            words = [group, f"#{ids[j]}", f"{numbers['size']:,} images"]
            words += [] if numbers["purity"] is None else [f"{numbers['purity']:.0%} {label}"]
            words += [f"{name} {numbers[name]:.3g}" for name in ("phi", "spread") if numbers[name] is not None]
            lines.append((", ".join(words), strip))
            row = [group, int(ids[j]), numbers["size"], numbers["purity"], label, numbers["phi"], numbers["spread"]]
            rows.append([*row, _png(strip)])
        pure = "" if told["purity"] is None else f", purity {told['purity']:.1%}"
        title = f"Clustering {i}: {told['used']:,} of {told['k']:,} clusters in use{pure}"
        images[f"clusters/{i}"] = pen.stack(title, lines)
        columns = ["group", "cluster", "images", "purity", "class", "concentration", "spread", "pictures"]
        tables[f"clusters/{i}"] = Table(columns, rows)


def _positives(pen: _Pen, panels: Panels, images: dict[str, Image.Image], tables: dict[str, Table]) -> None:
    """Images and those that share their target, with bars of the weights."""
    arrays = panels.arrays
    if "positive_anchor" not in arrays:
        return
    lines, rows = [], []
    for a, anchor in enumerate(arrays["positive_anchor"].tolist()):
        weight, tiles = arrays["positive_weight"][a].tolist(), arrays["positive_tile"][a].tolist()
        own = float(arrays["positive_own"][a])
        strip = pen.strip(tiles, anchor, weight, frames=True)
        lines.append((f"own share {own:.0%}", strip))
        listed = ", ".join(f"{w:.3g}" for w, t in zip(weight, tiles, strict=True) if t >= 0)
        rows.append([pen.sheet.words(anchor), own, listed, _png(strip)])
    images["positives"] = pen.stack(f"Positives of {panels.about['method']}: the bar is the weight", lines)
    tables["positives"] = Table(["image", "own share", "weights", "pictures"], rows)


def _strips_of(pen: _Pen, panels: Panels, images: dict[str, Image.Image], tables: dict[str, Table]) -> None:
    """Members of the same cluster and mined neighbours, where there are any."""
    arrays = panels.arrays
    for name, title in (("member", "Others of the same cluster"), ("neighbour", "Mined nearest neighbours")):
        if f"{name}_anchor" in arrays:
            pairs = zip(arrays[f"{name}_anchor"].tolist(), arrays[f"{name}_tile"].tolist(), strict=True)
            lines = [("", pen.strip(tiles, anchor, frames=True)) for anchor, tiles in pairs]
            images[f"positives/{name}s"] = pen.stack(title, lines)


def _retrieval(pen: _Pen, panels: Panels, images: dict[str, Image.Image], tables: dict[str, Table]) -> None:
    arrays = panels.arrays
    if "retrieval_query" not in arrays:
        return
    label, lines, rows = arrays["tile_label"], [], []
    for query, tiles in zip(arrays["retrieval_query"].tolist(), arrays["retrieval_tile"], strict=True):
        strip = pen.strip(tiles.tolist(), query, frames=True)
        lines.append(("", strip))
        right = int((label[tiles] == label[query]).sum()) if label[query] >= 0 else None
        rows.append([pen.sheet.words(query), right, len(tiles), _png(strip)])
    about = panels.about["retrieval"]
    title = f"Nearest of {about['gallery']:,} {about['split']} images; green: the class of the query"
    images["nearest images"] = pen.stack(title, lines)
    tables["nearest images"] = Table(["query", "of its class", "of", "pictures"], rows)


def _confusion(pen: _Pen, panels: Panels, images: dict[str, Image.Image], tables: dict[str, Table]) -> None:
    if "confusion" not in panels.arrays:
        return
    table, names = panels.arrays["confusion"], [str(n) for n in panels.about["classes"]]
    tables["confusion"] = Table(["class", *names], [[n, *line] for n, line in zip(names, table.tolist(), strict=True)])
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    cell, left = 40, 24 + max(int(pen.font.getlength(n)) for n in names)
    image = Image.new("RGB", (left + cell * len(names) + 12, 40 + left + cell * len(names) + 12), _BACK)
    ink = ImageDraw.Draw(image)
    top1 = panels.about["confusion"]["top1"]
    ink.text((12, 12), f"Rows: the class; columns: a quick linear probe, {top1:.1f} % right", fill=_TEXT, font=pen.bold)
    for i, name in enumerate(names):
        y = 40 + left + i * cell
        ink.text((left - 8, y + cell // 2), name, fill=_TEXT, font=pen.font, anchor="rm")
        upright = Image.new("RGB", (left - 8, cell), _BACK)
        ImageDraw.Draw(upright).text((0, cell // 2), name, fill=_TEXT, font=pen.font, anchor="lm")
        image.paste(upright.rotate(90, expand=True), (left + i * cell, 48))
        for j in range(len(names)):
            base = np.array([0x17, 0x72, 0x3A] if i == j else [0xB3, 0x26, 0x1E])
            part = float(share[i, j]) * (0.55 if i == j else 0.9)
            fill = tuple(int(v) for v in (255 + (base - 255) * part).round())
            x = left + j * cell
            ink.rectangle((x, y, x + cell - 2, y + cell - 2), fill=fill)
            if share[i, j] >= 0.005:
                words = f"{100 * share[i, j]:.0f}"
                ink.text((x + cell // 2, y + cell // 2), words, fill=_TEXT, font=pen.font, anchor="mm")
    images["confusion"] = image
