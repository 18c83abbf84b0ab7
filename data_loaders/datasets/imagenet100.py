"""imagenet100: 100 classes of ImageNet-1k, from its folders train and val (which may hold the other classes too).

Two lists of classes are in use. The one of CMC (Tian et al. 2020), which SCE uses, is here. Cl-InfoNCE's was drawn from
the WordNet tree: give its file of wnids, one a line, as data.listing; or the folder of its metadata
(meta_data_train.csv, meta_data_val.csv), whose column label_gran_<data.level> (level_12, say) then has the weak labels.
"""

from __future__ import annotations

from pathlib import Path

from raycon.core.config import ConfigError

from .. import files, rank_h
from . import IMAGENET_MEAN, IMAGENET_STD, FileSet
from .imagenet import open_folders

REMOTE = True
CMC = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303
"""


def open_split(root: Path | str | None, split: str, listing: str = "", level: str = "") -> FileSet:
    """Splits train and val (test is another name of val). Raises ConfigError for classes that are not there."""
    place = files.place_of(listing) if listing else None
    if isinstance(place, Path) and place.is_dir():
        if isinstance(root, str):
            raise ConfigError([f"data.root = {root!r}: with metadata tables, imagenet100 is read from a local folder"])
        return rank_h.open_tables(
            "imagenet100", root, split, listing, level, places=("",), mean=IMAGENET_MEAN, std=IMAGENET_STD
        )
    if level:
        raise ConfigError(
            [
                f"data.level = {level!r}: for imagenet100 it names a column of the metadata; give their folder as data.listing"
            ]
        )
    classes = tuple(CMC.split())
    if place is not None:
        classes = tuple(sorted(line.split()[0] for line in files.read_lines(place)))
        if len(set(classes)) != len(classes) or len(classes) != 100:
            raise ConfigError(
                [f"data.listing = {listing!r} names {len(set(classes))} classes: give 100 wnids, one a line"]
            )
    return open_folders("imagenet100", root, split, len(classes), classes)
