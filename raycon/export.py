"""Take an encoder elsewhere: export a checkpoint (ours, or a paper's file) to a format that others read.

python -m raycon.export CHECKPOINT --format torchvision|timm|safetensors|hf|onnx|torchscript|torch-export [--out OUT]
python -m raycon.export FILE --format run --recipe RECIPE --out RUN_DIR [--dotted.option value ...]

CHECKPOINT: a run directory, a checkpoint in it, or a weight file: of raycon.export, torchvision, timm, MoCo, PCL, WCL,
Cl-InfoNCE, SCE or MaskCon. The format of a file is recognised, and none of its code is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raycon.core import program
from raycon.core.address import fetched
from raycon.core.config import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from raycon.training.interop import About

FORMATS = {
    "torchvision": "a state dict for torchvision's network of the same name, without fc",
    "timm": "a state dict for timm's network, num_classes=0",
    "safetensors": "the tensors with a card in the header",
    "hf": "a folder for the Hugging Face hub: model.safetensors, config.json, README.md; --push OWNER/NAME uploads it",
    "onnx": "an ONNX file, its numbers checked by onnxruntime",
    "torchscript": "a TorchScript file",
    "torch-export": "a torch.export program (.pt2)",
    "run": "a run directory that raycon.pretrain --resume goes on with: networks, momentum encoder, queue, optimiser",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns the exit status: 0 done, 1 the export failed, 2 the request was wrong."""
    return program.run("raycon.export", answer, argv)


def answer(arguments: list[str]) -> int:
    options, rest = parser().parse_known_args(arguments)
    if rest and options.format != "run":
        raise ConfigError([f"unknown option {rest[0]!r}; --help lists all options"])
    options.checkpoint = fetched(options.checkpoint)
    try:
        written = import_run(options, rest) if options.format == "run" else export(options)
    except ValueError as error:
        if type(error).__name__ in ("FileError", "CheckpointError"):  # named, so that --help does without torch
            raise ConfigError([str(error)]) from error
        raise
    sys.stdout.write(written)
    return 0


def parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:13} {about}" for name, about in FORMATS.items())
    made = argparse.ArgumentParser(
        prog="python -m raycon.export",
        description=f"{__doc__}\nFormats:\n{formats}",
        epilog=program.HINT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("checkpoint", metavar="CHECKPOINT")
    made.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    made.add_argument("--out", type=Path, help="file or folder to write; default: NAME-FORMAT in this folder")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")
    made.add_argument("--encoder", default="", help="the network, for a file that is no ResNet (as model.encoder)")
    made.add_argument("--stem", default="", choices=("", "imagenet", "small", "small-stride2"),
                      help="small or small-stride2: the stride of a 3x3 stem cannot be seen (default: small)")  # fmt: skip
    made.add_argument("--size", type=int, default=0, help="side of the images to trace with (onnx, torchscript, ...)")
    made.add_argument(
        "--push", default="", metavar="OWNER/NAME", help="hf: upload the folder (as a private repository)"
    )
    made.add_argument("--public", action="store_true", help="--push: create a public repository")
    made.add_argument("--recipe", default="", help="run: the recipe that says how to go on")
    return made


def export(options: argparse.Namespace) -> str:
    """Write the file or folder; returns what to tell."""
    problems = []
    if options.recipe:
        problems.append("--recipe is for --format run")
    if options.push and options.format != "hf":
        problems.append(f"--push is for --format hf, not {options.format}")
    if options.size < 0:
        problems.append(f"--size {options.size}: give a number of pixels above 0")
    if problems:
        raise ConfigError(problems)
    from raycon.training import interop, publish

    encoder, about = interop.load_encoder(options.checkpoint, encoder=options.encoder, stem=options.stem)
    out = options.out or default_out(about, options.format, publish.SUFFIXES[options.format])
    files = publish.write(encoder, about, options.format, out, options.size, options.overwrite)
    lines = [summary(encoder, about), *(f"wrote {f}" for f in files)]
    if options.push:
        lines.append(f"pushed to {publish.push(out, options.push, private=not options.public)}")
    name = out.name if options.format != "hf" else str(out)
    return "\n".join(lines) + f"\n\n{publish.snippet(about, options.format, name)}\n"


def default_out(about: About, kind: str, suffix: str) -> Path:
    """NAME-FORMAT.SUFFIX in this folder; NAME is the run's, or the file's."""
    source = Path(about.source)
    name = source.parent.parent.name if about.config is not None and source.is_dir() else source.name.split(".")[0]
    return Path(f"{name or 'encoder'}-{kind}{suffix}")


def summary(encoder: nn.Module, about: About) -> str:
    """One line: what was read."""
    model = about.model
    count = sum(p.numel() for p in encoder.parameters())
    return (
        f"read {about.source}: {model.encoder}, width {model.width}, stem {model.stem}, {about.channels} channels, "
        f"{about.features} features, {count:,} parameters ({about.format})"
    )


def import_run(options: argparse.Namespace, rest: list[str]) -> str:
    """Make a run of a paper's file; returns what to tell."""
    problems = []
    if not options.recipe:
        problems.append("--recipe: say how to go on; python -m raycon.pretrain lists the recipes")
    if options.out is None:
        problems.append("--out: give the run directory to make")
    problems += [f"--{name} is not for --format run" for name in ("encoder", "push", "overwrite", "size")
                 if getattr(options, name)]  # fmt: skip
    if problems:
        raise ConfigError(problems)
    from raycon import pretrain
    from raycon.training import interop

    asked = rest if not options.stem else [*rest, "--model.stem", options.stem]
    config, _ = pretrain.parse([options.recipe, *asked])
    done = interop.import_run(options.checkpoint, pretrain.absolute(config, options.out.absolute()), options.out)
    lines = [f"{name} = {value} (the file's)" for name, value in done.taken.items()]
    lines += [f"note: {text}" for text in done.notes]
    lines.append(f"{done.step} steps are behind it; go on with: python -m raycon.pretrain --resume {done.run_dir}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
