"""What is in a data set, and what is odd about it: counts, classes, sizes, unreadable files, copies; and a sheet of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycon.core.config import ConfigError

from .datasets import FileSet, ImageSet
from .progress import progress
from .readable import Seen, look_at

SHOWN = 8
"""Names, files or classes in one line or list of the text form."""
_MARK = ("Software", "raycon contact sheet")


@dataclass(kw_only=True)
class Overview:
    """The findings, ready for JSON."""

    name: str
    split: str
    images: int
    image: tuple[int, int, int] | None
    """(C, H, W) when all images have one size."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: dict[str, int]
    """Images of each fine class; with several labels to an image, those that certainly have it."""
    weak_classes: dict[str, int]
    several_labels: bool
    unlabelled: int
    """Images without a fine label."""
    coarse_map: dict[str, list[str]]
    """The fine classes that each weak class has images of; {} without both."""
    attributes: int
    annotations: str
    dropped: int
    checked: int
    """Images that were read to their end."""
    height: tuple[int, int, int] | None = None
    """Least, median and greatest of those."""
    width: tuple[int, int, int] | None = None
    megabytes: float = 0.0
    """Of the files that were read, or of all pixels in memory."""
    unreadable: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a terminal."""
        size = "x".join(map(str, self.image)) if self.image else "of many sizes"
        lines = [f"{self.name}, split {self.split}: {self.images:,} images, {size} (channels x height x width)"]
        if not self.image:
            lines[0] = f"{self.name}, split {self.split}: {self.images:,} images of any size"
        if self.height and self.width:
            lines.append(
                f"sizes: height {_spread(self.height)}, width {_spread(self.width)}, {self.megabytes:,.1f} MB"
                f"{'' if self.image else ' of files'} in {self.checked:,} images"
            )
        lines.append(f"pixels: mean {_numbers(self.mean)}, standard deviation {_numbers(self.std)} of 0..1")
        lines += _classes("fine labels", self.classes, self.unlabelled, self.several_labels)
        lines += _classes("weak labels", self.weak_classes, 0, False)
        lines += [f"  {weak}: {_some(fine)}" for weak, fine in list(self.coarse_map.items())[: 4 * SHOWN]]
        if len(self.coarse_map) > 4 * SHOWN:
            lines.append(f"  and {len(self.coarse_map) - 4 * SHOWN} more")
        if self.attributes:
            lines.append(f"attributes: {self.attributes}")
        if self.annotations:
            lines.append(f"annotations: {self.annotations}")
        if not self.image:
            lines.append(f"unreadable: {len(self.unreadable)} of {self.checked:,} images that were read")
            lines += [f"  {bad['file']}: {bad['problem']}" for bad in self.unreadable[: 4 * SHOWN]]
            if len(self.unreadable) > 4 * SHOWN:
                lines.append(f"  and {len(self.unreadable) - 4 * SHOWN} more (--json FILE has all)")
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines) + "\n"


def _spread(three: tuple[int, int, int]) -> str:
    return str(three[0]) if three[0] == three[2] else f"{three[0]} .. {three[2]} (median {three[1]})"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _classes(what: str, counts: dict[str, int], without: int, several: bool) -> list[str]:
    if not counts:
        return [f"{what}: none"]
    least, most = min(counts.values()), max(counts.values())
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    more = ", several to an image" if several else ""
    more += f"; {without:,} images have none" if without and not several else ""
    return [f"{what}: {len(counts)} classes of {each} images{more} ({_some(list(counts))})"]


def overview(dataset: ImageSet, other: ImageSet | None, check: int) -> Overview:
    """Look at a data set; ``check``: how many images to read to their end, evenly spaced.

    other: the split that should have nothing in common with it.
    """
    found = Overview(
        name=dataset.name,
        split=dataset.split,
        images=len(dataset),
        image=dataset.image,
        mean=dataset.mean,
        std=dataset.std,
        classes=_fine(dataset),
        weak_classes=_counts(dataset.weak, dataset.weak_classes),
        several_labels=dataset.targets is not None,
        unlabelled=int((dataset.label < 0).sum()),
        coarse_map=_coarse_map(dataset),
        attributes=0 if dataset.attributes is None else dataset.attributes.shape[1],
        annotations=dataset.annotations,
        dropped=dataset.dropped,
        checked=0,
    )
    if empty := [name for name, count in found.classes.items() if count == 0]:
        found.warnings.append(f"{len(empty)} of {len(found.classes)} classes have no images: {_some(empty)}")
    split = sum(len(fine) for fine in found.coarse_map.values()) - len(set().union(*found.coarse_map.values(), ()))
    if split > 0:
        found.warnings.append("weak labels are not unions of fine ones: some fine classes are in several of them")
    if dataset.dropped:
        found.warnings.append(f"{dataset.dropped} unreadable images were left out (data.on-error = skip)")
    digests = _read(dataset, found, check)
    _copies(dataset, digests, found)
    if other is not None:
        _overlap(dataset, digests, other, check, found)
    return found


def _fine(dataset: ImageSet) -> dict[str, int]:
    if dataset.targets is not None:
        return dict(zip(dataset.classes, (dataset.targets == 1).sum(axis=0).tolist(), strict=True))
    return _counts(dataset.label, dataset.classes)


def _counts(label: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, int]:
    if (label < 0).all():
        return {}
    count = np.bincount(label[label >= 0], minlength=len(names)).tolist()
    return {names[i] if i < len(names) else str(i): n for i, n in enumerate(count)}


def _coarse_map(dataset: ImageSet) -> dict[str, list[str]]:
    both = (dataset.label >= 0) & (dataset.weak >= 0)
    if not both.any() or not dataset.weak_classes or not dataset.classes:
        return {}
    pairs = np.unique(np.stack([dataset.weak[both], dataset.label[both]]), axis=1).T.tolist()
    found: dict[str, list[str]] = {}
    for weak, fine in pairs:
        found.setdefault(dataset.weak_classes[weak], []).append(dataset.classes[fine])
    return found


def _rows(dataset: ImageSet, check: int) -> NDArray[np.int64]:
    """``check`` rows, evenly spaced."""
    return np.unique(np.linspace(0, len(dataset) - 1, min(check, len(dataset))).astype(np.int64))


def _digests(dataset: ImageSet, rows: NDArray[np.int64], decode: bool) -> Iterator[Seen]:
    if isinstance(dataset, FileSet):
        yield from look_at(dataset, rows, decode)
        return
    assert dataset.image is not None
    _, height, width = dataset.image
    for row in rows.tolist():
        pixels = np.ascontiguousarray(dataset.read(row))
        yield Seen(row, height, width, pixels.nbytes, hashlib.blake2b(pixels.data, digest_size=12).digest(), "")


def _read(dataset: ImageSet, found: Overview, check: int) -> dict[bytes, list[int]]:
    """Read images; fill in what is seen of them. By digest the rows that have it."""
    rows = _rows(dataset, check) if check else np.empty(0, dtype=np.int64)
    digests: dict[bytes, list[int]] = {}
    heights, widths, size = [], [], 0
    with progress("images read", len(rows)) as tell:
        for done, seen in enumerate(_digests(dataset, rows, decode=True), start=1):
            if seen.problem:
                found.unreadable.append({"file": dataset.where(seen.row), "problem": seen.problem})
            else:
                heights.append(seen.height)
                widths.append(seen.width)
                digests.setdefault(seen.digest, []).append(seen.row)
            size += max(seen.size, 0)
            tell(done)
    found.checked, found.megabytes = len(rows), size / 1e6
    if heights:
        found.height, found.width = _three(heights), _three(widths)
    if 0 < found.checked < len(dataset):
        found.warnings.append(f"{found.checked:,} of {len(dataset):,} images were read (--check all: every one)")
    return digests


def _three(values: list[int]) -> tuple[int, int, int]:
    return min(values), int(np.median(values)), max(values)


def _copies(dataset: ImageSet, digests: dict[bytes, list[int]], found: Overview) -> None:
    if isinstance(dataset, FileSet) and (again := len(dataset) - len(np.unique(dataset.files))):
        found.warnings.append(f"{again} images are listed more than once")
    if copies := [rows for rows in digests.values() if len(rows) > 1]:
        first = " and ".join(dataset.where(row) for row in copies[0][:2])
        number = sum(len(rows) - 1 for rows in copies)
        found.warnings.append(f"{number} images are copies of others in the same split, {first} for one")
        if any(len(set(dataset.label[rows].tolist())) > 1 for rows in copies):
            found.warnings.append("some copies have different labels")


def _overlap(dataset: ImageSet, digests: dict[bytes, list[int]], other: ImageSet, check: int, found: Overview) -> None:
    same = 0
    if isinstance(dataset, FileSet) and isinstance(other, FileSet) and str(dataset.root) == str(other.root):
        same = len(np.intersect1d(dataset.files, other.files))
    if same:
        found.warnings.append(f"{same} files are also in split {other.split}")
    shared = [
        (digests[seen.digest][0], seen.row)
        for seen in _digests(other, _rows(other, check) if check else _rows(other, 0), decode=False)
        if seen.digest in digests
    ]
    if len(shared) > same:
        pair = f"{dataset.where(shared[0][0])} is {other.where(shared[0][1])}"
        found.warnings.append(f"{len(shared)} images of split {other.split} are copies of ones in this split: {pair}")


# --- pictures ---------------------------------------------------------------------------------------------------


def contact_sheet(dataset: ImageSet, file: Path, side: int = 72, columns: int = 10, most_rows: int = 16) -> None:
    """A PNG of ``columns`` images of each of the first classes, evenly spaced among them; without classes, of all.

    Replaces an older contact sheet. Raises ConfigError for a file that is something else, or cannot be written.
    """
    from PIL import Image, ImageDraw, PngImagePlugin

    if file.exists() and not _is_sheet(file):
        raise ConfigError([f"--sheet {file}: there is another file of this name; give another, or move it away"])
    groups = _groups(dataset, columns, most_rows)
    margin = 150 if any(name for name, _ in groups) else 0
    sheet = Image.new("RGB", (margin + columns * (side + 2), len(groups) * (side + 2)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for line, (name, rows) in enumerate(groups):
        draw.text((4, line * (side + 2) + side // 2 - 6), name[:24], fill=(0, 0, 0))
        for column, row in enumerate(rows):
            corner = (margin + column * (side + 2), line * (side + 2))
            try:
                pixels = dataset.read(row)
            except ValueError:  # listed as unreadable already
                draw.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), fill=(160, 160, 160))
                continue
            image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
            smooth = Image.Resampling.LANCZOS if min(image.size) > side else Image.Resampling.NEAREST
            scale = side / max(image.size)
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), smooth)
            sheet.paste(image, (corner[0] + (side - image.width) // 2, corner[1] + (side - image.height) // 2))
    marked = PngImagePlugin.PngInfo()
    marked.add_text(*_MARK)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file, format="PNG", pnginfo=marked)
    except OSError as error:
        raise ConfigError([f"--sheet {file}: cannot be written ({error.strerror or error})"]) from error


def _is_sheet(file: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return dict(image.info).get(_MARK[0]) == _MARK[1]
    except OSError:
        return False


def _groups(dataset: ImageSet, columns: int, most_rows: int) -> list[tuple[str, list[int]]]:
    """(title, rows) of each line of the sheet."""
    label: NDArray[np.int64] = dataset.label if (dataset.label >= 0).any() else dataset.weak
    names: Any = dataset.classes if label is dataset.label else dataset.weak_classes
    lines = []
    for number in np.unique(label[label >= 0])[:most_rows].tolist():
        rows = np.flatnonzero(label == number)
        picked = rows[np.unique(np.linspace(0, len(rows) - 1, min(columns, len(rows))).astype(np.int64))]
        lines.append((names[number] if number < len(names) else str(number), picked.tolist()))
    if lines:
        return lines
    rows = _rows(dataset, columns * most_rows)
    return [("", rows[first : first + columns].tolist()) for first in range(0, len(rows), columns)]
