"""Weight files of others: opened without running code, recognised by their keys, renamed as torchvision names a ResNet.

Which keys mean what (a leading ``module.`` of a parallel wrapper is taken off first):

    maskcon    encoder_q.net.*, encoder_q.projector.*, encoder_q.classifer.*, encoder_k.*, queue, coarse_labels
    moco       encoder_q.*, encoder_q.fc.* (head v1) or fc.0.*, fc.2.* (v2), encoder_k.*, queue: MoCo v1/v2 and PCL
    sce        trunk.*, projector.layers.*, predictor.layers.*, momentum_trunk.*, momentum_projector.*, queue (Lightning)
    raycon     student.encoder.* or network.*: the model.safetensors of a checkpoint
    clinfonce  encoder.*, head.*: Cl-InfoNCE with one head (shortcut.* is read as downsample.*)
    wcl        net.*, head1.*, head2.*: WCL, and Cl-InfoNCE with two heads
    plain      conv1.*, bn1.*, layer1.*: a torchvision or timm state dict; its fc.* is left out

Shape letters: C channels of an image, F feature width.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from raycon.core.config import ModelConfig

_PREFIXES = {
    "maskcon": "encoder_q.net.",
    "moco": "encoder_q.",
    "sce": "trunk.",
    "raycon": "student.encoder.",
    "raycon (supervised)": "network.",
    "clinfonce": "encoder.",
    "wcl": "net.",
    "plain": "",
}
"""Format and where its encoder's tensors are, in the order in which they are tried."""


class FileError(ValueError):
    """A weight file that cannot be used: the message names it, what is wrong, and what to do."""


# --- opening ----------------------------------------------------------------------------------------------------


class _Inert:
    """Stands for an object that is of no use here: takes whatever it is given and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _dict_of(*_: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


_STAND_INS: dict[str, Any] = {
    # OmegaConf containers: hyper-parameters in Lightning's files.
    **{
        f"omegaconf.{name}": _Inert
        for name in (
            "dictconfig.DictConfig",
            "listconfig.ListConfig",
            "base.ContainerMetadata",
            "base.Metadata",
            "nodes.AnyNode",
            "nodes.StringNode",
            "nodes.IntegerNode",
            "nodes.FloatNode",
            "nodes.BooleanNode",
            "nodes.PathNode",
            "nodes.BytesNode",
        )
    },
    **{f"typing.{name}": _Inert for name in ("Any", "Dict", "List", "Tuple", "Optional", "Union")},
    **{f"builtins.{name}": _Inert for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")},
    **{f"__builtin__.{name}": _Inert for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "object")},
    "collections.defaultdict": _dict_of,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    # Command-line options (Cl-InfoNCE) and scores as numpy numbers.
    "argparse.Namespace": _Inert,
    "pathlib.PosixPath": _Inert,
    "numpy.dtype": _Inert,
    "numpy.core.multiarray.scalar": _Inert,
    "numpy._core.multiarray.scalar": _Inert,
    "_codecs.encode": _Inert,
}
"""Classes that known files name besides tensors, and the harmless stand-in each is replaced by: none of them is run."""


def read(file: Path) -> dict[str, Any]:
    """What is in a ``.safetensors`` file (its tensors) or one that ``torch.save`` wrote. Runs nothing of the file's.

    Raises FileError when it is missing, damaged, not a dictionary, or needs a class that is not on the list above: a
    file may otherwise run whatever its author wanted.
    """
    if not file.is_file():
        raise FileError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        if _unpacks(file):
            raise FileError(f"{file}: compressed, which torch.save never does; unpack it, or fetch it again")
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise FileError(f"{file}: damaged, or no weight file ({str(error)[:200]})") from None
        raise FileError(
            f"{file} needs the class or function {named[1]}: such a file can run any code when it is opened, so it is "
            "refused. Open it yourself where you trust it, and save its tensors alone: "
            "torch.save({'state_dict': ...}, FILE)"
        ) from None
    except FileError:
        raise
    except Exception as error:  # torch and safetensors raise a dozen kinds for damaged files
        raise FileError(f"{file}: damaged, or no weight file ({type(error).__name__}: {str(error)[:200]})") from None
    if not isinstance(content, dict):
        raise FileError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors; save a state_dict")
    size = file.stat().st_size
    for name, tensor in tensors_of(content).items():
        if tensor.numel() * tensor.element_size() > size:
            raise FileError(
                f"{file}: {name} of shape {tuple(tensor.shape)} is larger than the file: damaged, or made to fill the "
                "memory; fetch it again"
            )
    return content


def _unpacks(file: Path) -> bool:
    """Is it a zip archive that holds more than it is long? ``torch.save`` never compresses."""
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size
    except Exception:  # no zip archive, or a damaged one, which torch will refuse
        return False


def header(file: Path) -> dict[str, str]:
    """The text metadata of a ``.safetensors`` file; {} when there is none to be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError:
        return {}


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in what was read: the dictionary itself, or what is under ``state_dict`` or ``model``.

    Names without a parallel wrapper's ``module.``; {} when there are no tensors.
    """
    for place in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(place), Mapping):
            content = content[place]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if tensors and all(k.startswith("module.") for k in tensors):
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return {re.sub(r"^(encoder|net)\.module\.", r"\1.", k): v for k, v in tensors.items()}


# --- recognising ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A recognised file."""

    format: str
    """moco, maskcon, sce, raycon, clinfonce, wcl or plain: see the head of this file."""
    encoder: dict[str, Tensor]
    """The encoder's tensors under torchvision's names; without its classifier or projection ``fc``."""
    model: ModelConfig
    """Encoder, width and stem, from the shapes."""
    channels: int
    """C."""
    tensors: dict[str, Tensor]
    """All tensors under their own names, a wrapper's ``module.`` taken off."""


def recognise(content: Mapping[str, Any], source: str, stem: str = "") -> Found:
    """The format of what ``read`` gave, its encoder and which network that is.

    stem: which of the two 3x3 stems (small, small-stride2) it is; shapes do not tell them apart, "" is ``small``.
    Raises FileError naming ``source`` when no ResNet is found in it, or one that raycon does not have.
    """
    tensors = tensors_of(content)
    if not tensors:
        raise FileError(f"{source}: no tensors in it (keys: {', '.join(map(str, list(content)[:8])) or 'none'})")
    for kind, prefix in _PREFIXES.items():
        if f"{prefix}conv1.weight" in tensors and f"{prefix}layer1.0.conv1.weight" in tensors:
            inside = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            encoder = {
                k.replace(".shortcut.", ".downsample."): v
                for k, v in inside.items()
                if re.match(r"(conv1|bn1|layer[1-4])\.", k)
            }
            others = [k for k in inside if not re.match(r"(conv1|bn1|layer[1-4]|fc|projector|classifer)\.", k)]
            if others and prefix:
                raise FileError(f"{source}: {prefix}{others[0]} belongs to no ResNet ({len(others)} such tensors)")
            model, channels = model_of(encoder, source, stem)
            return Found(kind.split()[0], encoder, model, channels, tensors)
    some = ", ".join(list(tensors)[:4])
    raise FileError(
        f"{source}: no ResNet found in its {len(tensors)} tensors ({some}, ...). Known are the files of MoCo, PCL, WCL, "
        "Cl-InfoNCE, SCE and MaskCon, raycon's own, and torchvision's and timm's ResNets; for another network of "
        "torchvision or timm give its name as the encoder"
    )


_GROUPED: dict[tuple[str, tuple[int, ...], tuple[int, int]], str] = {
    ("bottleneck", (3, 4, 6, 3), (128, 128)): "wide_resnet50_2",
    ("bottleneck", (3, 4, 23, 3), (128, 128)): "wide_resnet101_2",
    ("bottleneck", (3, 4, 6, 3), (128, 4)): "resnext50_32x4d",
    ("bottleneck", (3, 4, 23, 3), (256, 8)): "resnext101_32x8d",
    ("bottleneck", (3, 4, 23, 3), (256, 4)): "resnext101_64x4d",
}
"""By kind of block, blocks per stage, and (out, in) channels of the first stage's 3x3 convolution."""


def model_of(encoder: Mapping[str, Tensor], source: str, stem: str = "") -> tuple[ModelConfig, int]:
    """The network (encoder, width, stem) and the channels of a ResNet's tensors under torchvision's names.

    Raises FileError for one that raycon does not have.
    """
    from raycon.nn.networks import _RESNETS

    first = encoder["conv1.weight"]
    if first.ndim != 4 or first.shape[2:] not in ((7, 7), (3, 3)):
        raise FileError(f"{source}: the first convolution has shape {tuple(first.shape)}; 7x7 and 3x3 ones are known")
    width, channels = int(first.shape[0]), int(first.shape[1])
    stems = ("imagenet",) if first.shape[2] == 7 else ("small", "small-stride2")
    if stem and stem not in stems:
        raise FileError(f"{source}: stem = {stem!r}, but the first convolution is {first.shape[2]}x{first.shape[3]}")
    depths = tuple(
        len({k.split(".")[1] for k in encoder if k.startswith(f"layer{stage}.") and k.endswith("conv1.weight")})
        for stage in (1, 2, 3, 4)
    )
    kind = "bottleneck" if "layer1.0.conv3.weight" in encoder else "basic"
    inner = encoder.get("layer1.0.conv2.weight")
    inner_shape = (0, 0) if inner is None else (int(inner.shape[0]), int(inner.shape[1]))
    name = next((n for n, (k, d) in _RESNETS.items() if (k, d) == (kind, depths) and inner_shape == (width, width)), "")
    grouped = _GROUPED.get((kind, depths, inner_shape), "")
    if not name and grouped and width == 64 and stems == ("imagenet",):
        name = grouped
    if not name:
        raise FileError(
            f"{source}: a ResNet of {kind} blocks {depths}, width {width} and a first 3x3 convolution of {inner_shape} "
            f"channels is none of {', '.join([*_RESNETS, *_GROUPED.values()])}"
        )
    chosen = cast('Literal["imagenet", "small", "small-stride2"]', stem or stems[0])
    return ModelConfig(encoder=name, width=width, stem=chosen), channels


def encoder_for(content: Mapping[str, Any], source: str) -> tuple[str, dict[str, Tensor]]:
    """The format and the encoder's tensors, for a network that is known already: also those that are no ResNets.

    Names are the network's own (torchvision's, timm's); a raycon checkpoint of such a network, and a state dict of
    ``raycon.nn.networks`` with its ``net.``, are given those names too.
    """
    try:
        found = recognise(content, source)
        return found.format, found.encoder
    except FileError:
        tensors = tensors_of(content)
        for prefix in ("student.encoder.", "network.", ""):
            for inner in ("net.", ""):
                inside = {k[len(prefix + inner) :]: v for k, v in tensors.items() if k.startswith(prefix + inner)}
                if inside and (prefix or not inner or len(inside) == len(tensors)):
                    return ("raycon" if prefix else "plain"), inside
        raise


@contextmanager
def option(name: str) -> Iterator[None]:
    """Turn a FileError into a ConfigError of an option."""
    from raycon.core.config import ConfigError

    try:
        yield
    except FileError as error:
        raise ConfigError([f"{name}: {error}"]) from None


def card_in(file: Path) -> dict[str, Any]:
    """The card that ``raycon.export`` wrote into or beside a file; {} when there is none."""
    texts = []
    if file.suffix == ".safetensors":
        texts.append(header(file).get("raycon", ""))
    beside = file.with_suffix(".json")
    if beside.is_file():
        texts.append(beside.read_text(encoding="utf-8", errors="replace"))
    for text in texts:
        try:
            card = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(card, dict) and "raycon" in card and "encoder" in card and sane(card):
            return card
    return {}


def sane(card: Mapping[str, Any]) -> bool:
    """Are the parts of a card that others compute with of the right kind?"""
    encoder, how = card.get("encoder", {}), card.get("preprocessing") or {}
    if not isinstance(encoder, dict) or not isinstance(how, dict):
        return False
    colours = [how[key] for key in ("mean", "std") if how.get(key)]
    lists = all(isinstance(c, list) and all(isinstance(v, (int, float)) for v in c) for c in colours)
    whole = [encoder.get("channels", 3), *(how[key] for key in ("size", "resize") if key in how)]
    return lists and all(type(number) is int and 0 < number < 100_000 for number in whole)
