"""The picture panels of the page, drawn from a ``Panels``: map, clusters, positives, retrieval, confusion.

All pictures are tiles of one sheet, which the page holds once. Every tile carries its words (class, row, numbers) as
the text that hovering shows and that a screen reader reads.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.report.charts import number
from raycon.report.panel_file import Panels

ACROSS = 64
"""Tiles in a row of the sheet."""
SHEET_BYTES = 5_500_000
"""Of the sheet in the page: a larger one is stored as JPEG of falling quality."""
COLOURINGS_MOST = 12


class Sheet:
    """The pictures of a page as one image."""

    def __init__(self, panels: Panels) -> None:
        self.tiles: NDArray[np.uint8] = panels.arrays["tiles"]
        self._arrays, self._about = panels.arrays, panels.about
        self.down = max(1, -(-len(self.tiles) // ACROSS))

    def words(self, tile: int) -> str:
        """What a tile shows: class, coarse class, split and row."""
        said = []
        for what, names in (("tile_label", self._about["classes"]), ("tile_weak", self._about["weak_classes"])):
            label = int(self._arrays[what][tile])
            if label >= 0:
                said.append(str(names[label]) if label < len(names) else str(label))
        split = "test" if self._arrays["tile_split"][tile] else "train"
        return f"{' / '.join(said) or 'image'}, {split} row {self._arrays['tile_row'][tile]}"

    def tag(self, tile: int, more: str = "", css: str = "") -> str:
        """One picture as a tag; "" for tile -1."""
        if tile < 0:
            return ""
        words = escape(self.words(tile) + (f", {more}" if more else ""), quote=True)
        return (
            f'<i class="tile{" " + css if css else ""}" style="--x:{tile % ACROSS};--y:{tile // ACROSS}" role="img" '
            f'aria-label="{words}"></i>'
        )

    def style(self) -> str:
        """The style sheet that holds the image; every picture of the page is a part of it."""
        data, kind = self._encoded()
        source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return f".tile{{--w:{ACROSS};--h:{self.down};background-image:url({source})}}"

    def _encoded(self) -> tuple[bytes, str]:
        from PIL import Image

        count, side, _, channels = self.tiles.shape
        sheet = np.zeros((self.down * side, ACROSS * side, channels), dtype=np.uint8)
        for t in range(count):
            top, left = t // ACROSS * side, t % ACROSS * side
            sheet[top : top + side, left : left + side] = self.tiles[t]
        image = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
        found = []
        forms: list[tuple[str, dict[str, Any]]] = [("png", {"optimize": True})]
        forms += [("jpeg", {"quality": quality}) for quality in (85, 70, 50, 30)]
        for kind, options in forms:
            out = io.BytesIO()
            image.save(out, kind, **options)
            found.append((out.getvalue(), kind))
            if len(found[-1][0]) * 4 / 3 <= SHEET_BYTES:
                return found[-1]
        return min(found, key=lambda pair: len(pair[0]))


def sections(panels: Panels, sheet: Sheet) -> list[tuple[str, str, str]]:
    """(anchor, heading, HTML) of every panel that has something to show."""
    drawn = [
        ("map", "Map of the embeddings", _map(panels, sheet)),
        ("montage", "What was mined: clusters", _montage(panels, sheet)),
        ("positives", "Positives used", _positives(panels, sheet)),
        ("retrieval", "Nearest images", _retrieval(panels, sheet)),
        ("confusion", "What the linear probe confuses", _confusion(panels)),
    ]
    return [panel for panel in drawn if panel[2]]


def said_of(panels: Panels) -> str:
    """One sentence on what the panels are of."""
    about = panels.about
    return (
        f"Pictures and numbers below are of the checkpoint of step {about['step']:,}, from a fixed sample of the images; "
        f"made in {about['seconds']:.0f} s."
    )


# --- the map ----------------------------------------------------------------------------------------------------


def _map(panels: Panels, sheet: Sheet) -> str:
    arrays, about = panels.arrays, panels.about
    if "map_tile" not in arrays:
        return ""
    layouts = {"PCA" if n == "map_pca" else n[4:]: n for n in arrays if n.startswith("map_") and n not in ("map_tile",)
               and not n.startswith("map_by_")}  # fmt: skip
    ordered = sorted(layouts, key=lambda name: name == "PCA")  # the map that shows neighbours first
    colourings = [n for n in arrays if n.startswith("map_by_")][:COLOURINGS_MOST]
    data: dict[str, Any] = {
        "tile": arrays["map_tile"].tolist(),
        "words": [sheet.words(int(t)) for t in arrays["map_tile"]],
        "at": {n: (arrays[layouts[n]] * 1000).round().astype(int).reshape(-1).tolist() for n in ordered},
        "by": {n.removeprefix("map_by_"): arrays[n].tolist() for n in colourings},
        "names": {"fine class": about["classes"], "coarse class": about["weak_classes"]},
        "across": ACROSS,
    }
    switches = _switch("layout", "Layout", ordered) + _switch("by", "Colour", list(data["by"]))
    label = (
        f"Map of {len(data['tile']):,} embedded images in two dimensions, layouts {', '.join(ordered)}, "
        f"coloured by {', '.join(data['by']) or 'nothing'}"
    )
    of = f"{len(data['tile']):,} of {about['rows'][0]:,} train images"
    return (
        f'<div class="box map" data-map="{escape(json.dumps(data, separators=(",", ":")))}">'
        f'<div class="switches">{switches}</div>'
        f'<div class="mapplot"><canvas role="img" tabindex="0" aria-label="{escape(label)}"></canvas></div>'
        '<ul class="legend pick"></ul>'
        f'<p class="soft">{of}, unit features of the encoder. Hover (or tap) shows the image; a click on a name shows '
        f"only its points. The first two principal components hold {about['pca_share']:.0%} of the variance; "
        "distances between far points of a t-SNE or UMAP map mean nothing.</p></div>"
    )


def _switch(name: str, head: str, choices: Sequence[str]) -> str:
    buttons = "".join(
        f'<button type="button" data-{name}="{escape(c, quote=True)}" aria-pressed="{str(i == 0).lower()}">{escape(c)}'
        "</button>"
        for i, c in enumerate(choices)
    )
    return f'<span class="switch" role="group" aria-label="{head}"><span class="soft">{head}</span>{buttons}</span>'


# --- clusters ---------------------------------------------------------------------------------------------------


def _montage(panels: Panels, sheet: Sheet) -> str:
    folds = []
    for i, told in enumerate(panels.about.get("clusterings", [])):
        tiles, ids = panels.arrays[f"cluster_{i}_tile"], panels.arrays[f"cluster_{i}_id"]
        k, used = told["k"], told["used"]
        pure = "" if told["purity"] is None else f" · purity {told['purity']:.1%}"
        head = f"Clustering {i}: {used:,} of {k:,} clusters in use{pure}"
        said = (
            f"{k - used:,} empty, {told['single']:,} of one image, median size {told['median']:,.0f}. Purity is the share "
            f"of images in the majority class of their cluster; tightest by {told['by']}; "
            f"{tiles.shape[1]} images each, evenly spaced over the cluster."
        )
        parts, first = [], 0
        for group, count in told["groups"].items():
            rows = "".join(
                _cluster_row(sheet, int(ids[j]), told["clusters"][j], tiles[j], panels.about["classes"])
                for j in range(first, first + count)
            )
            parts.append(f"<h3>{escape(group)}</h3>{rows}")
            first += count
        open_ = " open" if i == 0 else ""
        folds.append(
            f'<details class="box"{open_}><summary>{escape(head)}</summary><p class="soft">{escape(said)}</p>'
            f'<div class="groups">{"".join(f"<div>{p}</div>" for p in parts)}</div></details>'
        )
    return f'<div class="folds">{"".join(folds)}</div>' if folds else ""


def _cluster_row(
    sheet: Sheet, cluster: int, told: dict[str, Any], tiles: NDArray[np.int32], classes: Sequence[str]
) -> str:
    words = [f"#{cluster}", f"{told['size']:,} images"]
    if told["purity"] is not None:
        name = classes[told["label"]] if told["label"] < len(classes) else str(told["label"])
        words.append(f"{told['purity']:.0%} {name}")
    if told["phi"] is not None:
        words.append(f"φ {number(told['phi'])}")
    elif told["spread"] is not None:
        words.append(f"spread {number(told['spread'])}")
    pictures = "".join(sheet.tag(int(t)) for t in tiles)
    return f'<div class="strip"><div class="what">{escape(" · ".join(words))}</div><div class="tiles">{pictures}</div></div>'


# --- positives --------------------------------------------------------------------------------------------------


def _positives(panels: Panels, sheet: Sheet) -> str:
    arrays, parts = panels.arrays, []
    if "positive_anchor" in arrays:
        about = panels.about["positives"]
        right = "" if about["right"] is None else f" Of the rest {about['right']:.0%} lies on images of the same class."
        said = (
            f"How {panels.about['method']} spreads the target of an image over {about['candidates']:,} images (the next "
            "ones of the run's own order, in the evaluation view; they stand for its batch or queue). "
            f"{about['with']:.0%} of the images have others as positives, {number(about['number'])} on average; "
            f"{about['own']:.0%} of the weight stays on the image itself.{right} The bar is the weight; a frame is green "
            "for the same class, red for another."
        )
        rows = []
        for a, anchor in enumerate(arrays["positive_anchor"].tolist()):
            weight = arrays["positive_weight"][a]
            shown = "".join(
                f'<span class="weighed">{sheet.tag(int(t), f"weight {w:.2%}", frame(panels, anchor, int(t)))}'
                f'<b class="bar" style="--p:{min(1.0, float(w) / max(float(weight[0]), 1e-12)):.3f}"></b></span>'
                for t, w in zip(arrays["positive_tile"][a], weight, strict=True)
                if t >= 0
            )
            own = f"own share {arrays['positive_own'][a]:.0%}"
            listed = f"others {float(weight[arrays['positive_tile'][a] >= 0].sum()):.1%}"
            tail = shown or '<span class="soft">no other image</span>'
            rows.append(
                f'<div class="strip"><div class="what">{own} · shown {listed}</div>'
                f'<div class="tiles">{sheet.tag(anchor, own, "anchor")}<span class="arrow">→</span>{tail}</div></div>'
            )
        parts.append(f'<p class="soft">{escape(said)}</p><div class="strips">{"".join(rows)}</div>')
    if "member_anchor" in arrays:
        last = len(panels.about["clusterings"]) - 1
        parts.append(
            f'<h3>Others of the same cluster</h3><p class="soft">Images and others of their cluster in clustering {last}, '
            "evenly spaced over it; green: the same class, red: another.</p>"
            + _strips(panels, sheet, "member", lambda a, j: "")
        )
    if "neighbour_anchor" in arrays:
        parts.append("<h3>Mined nearest neighbours</h3>" + _strips(panels, sheet, "neighbour", lambda a, j: ""))
    return f'<div class="box">{"".join(parts)}</div>' if parts else ""


def frame(panels: Panels, anchor: int, tile: int) -> str:
    """ "right" or "wrong": whether two pictures are of one class, as a CSS class; "" where one has none."""
    label = panels.arrays["tile_label"]
    if tile < 0 or label[anchor] < 0 or label[tile] < 0:
        return ""
    return "right" if label[anchor] == label[tile] else "wrong"


def _strips(panels: Panels, sheet: Sheet, name: str, more: Callable[[int, int], str]) -> str:
    """A strip per anchor of ``<name>_anchor``: the anchor, then its tiles with green and red frames."""
    anchors, tiles = panels.arrays[f"{name}_anchor"], panels.arrays[f"{name}_tile"]
    rows = []
    for a, anchor in enumerate(anchors.tolist()):
        shown = "".join(sheet.tag(int(t), more(a, j), frame(panels, anchor, int(t))) for j, t in enumerate(tiles[a]))
        rows.append(
            f'<div class="strip"><div class="tiles">{sheet.tag(anchor, "", "anchor")}<span class="arrow">→</span>{shown}'
            "</div></div>"
        )
    return f'<div class="strips">{"".join(rows)}</div>'


# --- retrieval and confusion ------------------------------------------------------------------------------------


def _retrieval(panels: Panels, sheet: Sheet) -> str:
    arrays = panels.arrays
    if "retrieval_query" not in arrays:
        return ""
    about = panels.about["retrieval"]
    label = arrays["tile_label"]
    tiles, query = arrays["retrieval_tile"], arrays["retrieval_query"]
    known = label[query] >= 0
    share = ""
    if known.any():
        hits = (label[tiles] == label[query][:, None])[known].mean()
        share = f" {hits:.0%} of the images shown are of the query's class."
    given = Panels(panels.about, {**arrays, "retrieval_anchor": query})
    strips = _strips(given, sheet, "retrieval", lambda a, j: f"cosine {arrays['retrieval_cosine'][a, j]:.3f}")
    said = (
        f"The {tiles.shape[1]} nearest of {about['gallery']:,} sampled {about['split']} images by cosine of the encoder's "
        f"features, nearest first; green: the query's class, red: another.{share}"
    )
    return f'<div class="box"><p class="soft">{escape(said)}</p>{strips}</div>'


def _confusion(panels: Panels) -> str:
    if "confusion" not in panels.arrays:
        return ""
    table, about = panels.arrays["confusion"], panels.about["confusion"]
    names = [str(n) for n in panels.about["classes"]]
    totals = np.maximum(table.sum(1, keepdims=True), 1)
    share = table / totals
    head = "".join(f'<th scope="col"><span>{escape(n)}</span></th>' for n in names)
    rows = []
    for i, name in enumerate(names):
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss"}" style="--p:{share[i, j]:.3f}" '
            f'title="{escape(name, quote=True)} taken for {escape(names[j], quote=True)}: {table[i, j]} of {totals[i, 0]}">'
            f"{f'{share[i, j]:.0%}'.rstrip('%') if share[i, j] >= 0.005 else ''}</td>"
            for j in range(len(names))
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    wrong = [(int(table[i, j]), i, j) for i in range(len(names)) for j in range(len(names)) if i != j and table[i, j]]
    worst = "; ".join(f"{names[i]} for {names[j]} ({n})" for n, i, j in sorted(wrong, reverse=True)[:5])
    said = (
        f"Rows: the class; columns: what the probe says, in percent of the row. A quick probe for this picture, trained on "
        f"{about['train']:,} sampled train images and tried on {about['test']:,} test images: {about['top1']:.1f} % right "
        f"(the evaluations above use all images). Most often taken: {worst or 'nothing wrong'}."
    )
    return (
        f'<div class="box"><p class="soft">{escape(said)}</p><div class="scroll"><table class="confusion">'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></div>"
    )
