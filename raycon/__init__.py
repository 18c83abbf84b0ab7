"""raycon: distributed contrastive pretraining of image encoders on Ray.

In a checkout the folders ``data_loaders``, ``tuning`` and ``cluster`` lie beside this package; in a wheel they lie
inside it. Either way they are imported as ``raycon.data_loaders`` and so on.
"""

from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "data_loaders").is_dir() and (_here.parent / "data_loaders").is_dir():
    __path__.append(str(_here.parent))
