"""Encoders out: files that torchvision, timm, Hugging Face, onnxruntime, TorchScript and torch.export read.

Each is written next to its name first and put in place when it is complete and was checked: read back by the library
it is for, where that is possible without its model zoo, and its features compared. A card (JSON) goes with it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raycon.core.config import ConfigError
from raycon.nn import networks
from raycon.training.interop import About, card

SUFFIXES = {
    "torchvision": ".pth",
    "timm": ".pth",
    "safetensors": ".safetensors",
    "hf": "",
    "onnx": ".onnx",
    "torchscript": ".pt",
    "torch-export": ".pt2",
}
"""The formats and what their files end with; hf is a folder."""

TOLERANCE = 1e-4
"""Largest difference of a feature from the encoder's own, relative to the features' spread, that a file may have."""


def write(encoder: nn.Module, about: About, kind: str, out: Path, size: int = 0, overwrite: bool = False) -> list[Path]:
    """Write ``encoder`` to ``out`` in a format of SUFFIXES, and its card. Returns the files.

    out: a file, beside it goes ``<out>.json``; a folder for hf. size: side of the images that onnx, torchscript and
    torch-export are traced with (0: the size it was trained with, else 224); any batch size works afterwards.
    Raises ConfigError when the format cannot hold the network, a library is missing, or ``out`` exists; ValueError when
    what was written gives other features.
    """
    problems = _problems(about, kind)
    beside = [] if kind == "hf" else [out.with_suffix(".json")]
    for file in (out, *beside):
        if file.exists() and not overwrite:
            problems.append(f"--out: {file} exists: give another name, or --overwrite")
    if out.is_dir() and overwrite and not (kind == "hf" and _is_ours(out)):
        problems.append(f"--overwrite: {out} is a folder that raycon.export did not write: give another name")
    if problems:
        raise ConfigError(problems)
    size = size or int(about.facts.get("preprocessing", {}).get("size", 224))
    facts = card(about) | {"file_format": kind, "load": snippet(about, kind, out.name)}
    encoder = encoder.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.{os.getpid()}.part{SUFFIXES[kind]}")
    try:
        if kind == "hf":
            _folder(encoder, about, facts, work)
        elif kind in ("torchvision", "timm"):
            torch.save(library_state(encoder), work)
        elif kind == "safetensors":
            _safetensors(library_state(encoder), facts, work)
        else:
            images = torch.randn(2, about.channels, size, size, generator=torch.Generator().manual_seed(0))
            {"onnx": _onnx, "torchscript": _torchscript, "torch-export": _torch_export}[kind](
                encoder, images, facts, work
            )
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True) if work.is_dir() else work.unlink(missing_ok=True)
        work.with_name(work.name + ".data").unlink(missing_ok=True)
    for file in beside:
        _write_text(file, json.dumps(facts, indent=1, ensure_ascii=False))
    return [out, *beside]


def _problems(about: About, kind: str) -> list[str]:
    import importlib.util

    name = about.model.encoder
    found = []
    if kind not in SUFFIXES:
        return [f"--format {kind!r}: there are {', '.join(SUFFIXES)}"]
    timm_name = name.startswith("timm:")
    if kind == "torchvision" and timm_name:
        found.append(f"--format torchvision: {name} is timm's; choose timm, safetensors, hf, onnx or torch-export")
    if kind == "timm" and not timm_name and name not in networks._RESNETS and not _same_in_timm(name):
        found.append(f"--format timm: timm names the tensors of {name} otherwise; choose torchvision or safetensors")
    if kind in ("torchvision", "timm") and about.model.width != 64:
        found.append(
            f"--format {kind}: it has no {name} of width {about.model.width}; choose safetensors (read by "
            "raycon.training.interop.load_encoder), onnx, torchscript or torch-export"
        )
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime")}.get(kind, ())
    if missing := [m for m in needed if importlib.util.find_spec(m) is None]:
        found.append(f"--format {kind} needs {', '.join(missing)}: pip install 'raycon[export]'")
    return found


def _is_ours(folder: Path) -> bool:
    """Did ``write`` make this folder?"""
    try:
        return "raycon" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _same_in_timm(name: str) -> bool:
    return name.startswith(("resnext", "wide_resnet"))


def library_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names that torchvision or timm gives them, on the CPU, contiguous."""
    state = encoder.state_dict()
    inner = "net." if isinstance(encoder, networks._Classifier) else ""
    return {k.removeprefix(inner): v.detach().cpu().contiguous() for k, v in state.items()}


# --- one function per format ------------------------------------------------------------------------------------


def _safetensors(state: dict[str, Tensor], facts: Mapping[str, Any], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, file, metadata={"format": "pt", "raycon": json.dumps(facts, ensure_ascii=False)})


def _folder(encoder: nn.Module, about: About, facts: Mapping[str, Any], folder: Path) -> None:
    """model.safetensors, config.json (timm's, so that timm reads a standard network from the folder) and README.md."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _safetensors(library_state(encoder), facts, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hub_config(about, facts), indent=1), encoding="utf-8")
    (folder / "README.md").write_text(model_card(about, facts), encoding="utf-8")


def hub_config(about: About, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a Hugging Face folder: the card, and what timm needs when it has the network."""
    found: dict[str, Any] = {"raycon": dict(facts)}
    model = about.model
    name = model.encoder.removeprefix("timm:")
    if (model.stem, model.width) != ("imagenet", 64) or name == "resnet10":
        return found
    if not (model.encoder.startswith("timm:") or model.encoder in networks._RESNETS or _same_in_timm(name)):
        return found
    how = facts.get("preprocessing", {})
    size = int(how.get("size", 224))
    settings: dict[str, Any] = {"input_size": [about.channels, size, size], "num_classes": 0, "classifier": "fc"}
    settings |= {"interpolation": "bilinear", "crop_pct": round(size / int(how.get("resize", size)), 4)}
    settings |= {k: how[k] for k in ("mean", "std") if k in how}
    found |= {"architecture": name, "num_classes": 0, "num_features": about.features, "pretrained_cfg": settings}
    if about.channels != 3:
        found["model_args"] = {"in_chans": about.channels}
    return found


def _onnx(encoder: nn.Module, images: Tensor, facts: Mapping[str, Any], file: Path) -> None:
    import onnx
    import onnxruntime

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own parts
        program = torch.onnx.export(
            encoder,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for name in ("load", "config", "encoder", "preprocessing"):
        if name in facts:
            model.metadata_props.add(key=name, value=json.dumps(facts[name], ensure_ascii=False))
    if model.ByteSize() < 2**31 - 2**20:  # protobuf's limit; larger ones keep their tensors in a file beside
        onnx.save(model, str(file))
    else:
        raise ValueError("the network has more than 2 GB of weights: choose safetensors or torch-export")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["features"], {"images": x.numpy()})[0])

    _compare(encoder, run, images, "onnx")


def _torchscript(encoder: nn.Module, images: Tensor, facts: Mapping[str, Any], file: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(encoder, images, check_trace=False)
        torch.jit.save(traced, str(file), _extra_files={"card.json": json.dumps(facts)})
        _compare(encoder, torch.jit.load(str(file), map_location="cpu"), images, "torchscript")


def _torch_export(encoder: nn.Module, images: Tensor, facts: Mapping[str, Any], file: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(encoder, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"card.json": json.dumps(facts)})
    file.write_bytes(buffer.getvalue())
    _compare(encoder, torch.export.load(str(file)).module(), images, "torch-export")


def _compare(encoder: nn.Module, other: Any, images: Tensor, kind: str) -> None:
    """Features of another number of images than it was traced with. Raises ValueError when they differ."""
    more = torch.cat([images, images.flip(0), images.flip(3)])[:5]
    with torch.no_grad():
        own, theirs = encoder(more), other(more)
    difference = float((own - theirs).abs().max() / own.std().clamp_min(1e-12))
    if own.shape != theirs.shape or not difference <= TOLERANCE:
        raise ValueError(
            f"--format {kind}: features differ from the encoder's by {difference:.2g} of their spread (shape "
            f"{tuple(theirs.shape)}, not {tuple(own.shape)}): nothing is written. This is a fault of the exporter for "
            "this network; choose another format"
        )


# --- words ------------------------------------------------------------------------------------------------------


def snippet(about: About, kind: str, name: str) -> str:
    """Python that loads the file and gives features; it runs where the file lies."""
    model, stem = about.model, about.model.stem
    if kind in ("safetensors", "hf"):
        return (f'from raycon.training.interop import load_encoder\n\nencoder, about = load_encoder("{name}")')  # fmt: skip
    if kind == "torchscript":
        return f'import torch\n\nencoder = torch.jit.load("{name}")'
    if kind == "torch-export":
        return f'import torch\n\nencoder = torch.export.load("{name}").module()'
    if kind == "onnx":
        return (
            f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}")\n'
            'features = session.run(["features"], {"images": images})[0]  # images: float32 (B, C, H, W)'
        )
    lines = ["import torch"]
    channels = f", in_chans={about.channels}" if about.channels != 3 else ""
    if kind == "timm" and model.encoder != "resnet10":
        lines += ["import timm", ""]
        lines.append(f'net = timm.create_model("{model.encoder.removeprefix("timm:")}", num_classes=0{channels})')
    elif model.encoder == "resnet10":
        module = "timm.models.resnet" if kind == "timm" else "torchvision.models.resnet"
        more = f", num_classes=0{channels}" if kind == "timm" else ""
        lines += [f"from {module} import BasicBlock, ResNet", "", f"net = ResNet(BasicBlock, [1, 1, 1, 1]{more})"]
    else:
        lines += ["import torchvision", "", f'net = torchvision.models.get_model("{model.encoder}")']
    if stem != "imagenet":
        stride = 1 if stem == "small" else 2
        lines.append(f"net.conv1 = torch.nn.Conv2d({about.channels}, 64, 3, {stride}, 1, bias=False)")
        lines.append("net.maxpool = torch.nn.Identity()")
    elif about.channels != 3 and kind == "torchvision":
        lines.append(f"net.conv1 = torch.nn.Conv2d({about.channels}, 64, 7, 2, 3, bias=False)")
    if kind == "torchvision":
        place = next((p for p in ("fc", "classifier", "heads", "head") if _has(model.encoder, p)), "fc")
        lines.append(f"net.{place} = torch.nn.Identity()")
    lines.append(f'net.load_state_dict(torch.load("{name}", weights_only=True))')
    lines.append("encoder = net.eval()")
    return "\n".join(lines)


def _has(name: str, place: str) -> bool:
    """Does torchvision's network call its classifier so?"""
    if name in networks._RESNETS:
        return place == "fc"
    from torchvision import models

    with torch.device("meta"):
        return isinstance(getattr(models.get_model(name), place, None), nn.Module)


def model_card(about: About, facts: Mapping[str, Any]) -> str:
    """The README.md of a Hugging Face folder."""
    model, how = about.model, facts.get("preprocessing", {})
    tags = "\n".join(f"  - {t}" for t in ("raycon", "self-supervised-learning", "contrastive-learning"))
    library = "library_name: timm\n" if "architecture" in hub_config(about, facts) else ""
    lines = [f"---\ntags:\n{tags}\n{library}pipeline_tag: image-feature-extraction\n---\n"]
    title = f"{model.encoder} by {facts['method']}" if "method" in facts else model.encoder
    lines.append(f"# {title}\n")
    lines.append(
        f"An image encoder: (B, {about.channels}, H, W) in, (B, {about.features}) out. Width {model.width}, stem "
        f"`{model.stem}`."
    )
    told = {"method": "Pretrained with", "data": "on", "epochs": "for (epochs)", "step": "steps"}
    lines += ["", "| | |", "|---|---|"]
    lines += [f"| {words} | {facts[key]} |" for key, words in told.items() if key in facts]
    lines.append(f"| read from | {about.format} |")
    if how:
        prepared = f"shorter side to {how.get('resize')}, centre crop {how.get('size')}, {how.get('interpolation')}"
        statistics = f"; mean {how['mean']}, std {how['std']} of pixels in 0..1" if "mean" in how else ""
        lines.append(f"| images | {prepared}{statistics} |")
    if facts.get("evaluations"):
        lines += ["", "| evaluation | value |", "|---|---|"]
        lines += [f"| {k} | {v:.4g} |" for k, v in sorted(facts["evaluations"].items())]
    lines += ["", "```python", snippet(about, "hf", "FOLDER"), "```", ""]
    if library:
        lines += ["or, without raycon:", "", "```python", "import timm", "",
                  'encoder = timm.create_model("local-dir:FOLDER", pretrained=True).eval()', "```", ""]  # fmt: skip
    if "config" in facts:
        lines += ["The whole configuration is in `config.json` under `raycon.config`.", ""]
    return "\n".join(lines)


def _write_text(file: Path, text: str) -> None:
    work = file.with_name(f".{file.name}.{os.getpid()}.part")
    work.write_text(text, encoding="utf-8")
    os.replace(work, file)


def push(folder: Path, repository: str, private: bool = True) -> str:
    """Upload a folder to the Hugging Face hub and return its address. Needs a login there (``hf auth login``).

    Raises ConfigError when huggingface_hub is missing or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ConfigError(["--push needs huggingface_hub: pip install 'raycon[export]'"]) from None
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Encoder from raycon"))
    except Exception as error:  # refusals, no login and no network come as errors of several libraries
        raise ConfigError(
            [f"--push {repository}: {type(error).__name__}: {error}; the folder {folder} is complete, push again later"]
        ) from None
