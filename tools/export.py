"""Writes a model for use elsewhere, and proves that the file computes what the model computes.

    python -m zoo.tools.export vim_tiny_patch16_224 --pretrained --format onnx --output vim_tiny.onnx
    python -m zoo.tools.export runs/micro_digits --format onnx --output digits.onnx
    python -m zoo.tools.export vmamba_tiny --checkpoint vmamba_t.pth --img-size 384 512 --format torch_export \\
        --output vmamba_tiny.pt2
    python -m zoo.tools.export vim_nano --pretrained --format safetensors-hub --output hub/vim_nano

onnx             one file for runtimes that know nothing of torch. Scans are loops over the tokens inside the graph.
torch_export     a graph for torch.export.load; it runs on this package's kernels, so import zoo before loading it.
safetensors-hub  a folder for the Hugging Face hub, which timm.create_model("local-dir:...", pretrained=True) loads.

Files take normalised float32 images (batch, channels, height, width) of any number and one size, and give logits. The
metadata of a file names model, input size, mean, std, classes and licence.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from zoo.tools.arguments import positive
from zoo.tools.exporting.hub_folder import write_hub_folder
from zoo.tools.exporting.onnx_file import ANY_SIZE, require_onnx, write_onnx
from zoo.tools.exporting.output import size_of, staged, step
from zoo.tools.exporting.subject import Subject, load_subject
from zoo.tools.exporting.torch_file import write_torch_export
from zoo.tools.exporting.tracing import Images, compare

FILES = {"onnx": ".onnx", "torch_export": ".pt2"}  # formats of one file, and how its name ends
HUB = "safetensors-hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed, 130 interrupted."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.format == HUB and (options.batch is not None or options.dynamic_size):
        parser.error(f"--batch and --dynamic-size are about graphs; {HUB} writes none")
    try:
        export(options)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The tool's options."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="name of a model, folder of a run, or .safetensors file of a run")
    parser.add_argument("--format", required=True, choices=(*FILES, HUB), help="what to write, see above")
    parser.add_argument("--output", required=True, type=Path, help="file to write, or folder for safetensors-hub")
    parser.add_argument(
        "--img-size",
        type=positive,
        nargs="+",
        metavar="PIXELS",
        help="height and width, or one side; a graph is for this size alone; default that of the weights",
    )
    parser.add_argument(
        "--dynamic-size",
        action="store_true",
        help="let a graph take other sizes too; in ONNX only for families whose graphs hold at every size: "
        f"{', '.join(ANY_SIZE)}",
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="fix the number of images; default any number")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help="weights, ours or the authors'")
    weights.add_argument("--pretrained", action="store_true", help="published weights; default random ones")
    parser.add_argument("--num-classes", type=positive, metavar="N", help="classes; default those of the model")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference between logits; default %(default)s"
    )
    return parser


@torch.no_grad()  # for training the scan saves states, whose number a graph fixes
def export(options: argparse.Namespace) -> None:
    """Writes and verifies what the options ask for; leaves nothing behind if that fails.

    Raises:
        OSError: If something cannot be read, downloaded or written.
        ValueError: If there is no such model, weights or images do not fit, or the result differs from the model.
        RuntimeError: If the model cannot be traced or translated, or the file cannot be run.
        ModuleNotFoundError: If a package is missing.
    """
    check_output(options.output, options.format)
    if options.format == "onnx":
        require_onnx()
    with staged(options.output) as path:
        with step(f"creating {options.model}"):
            size = image_size(options.img_size)
            subject = load_subject(options.model, options.checkpoint, options.pretrained, options.num_classes, size)
        preprocessing = subject.preprocessing
        images = Images(preprocessing.in_chans, preprocessing.size, options.batch, options.dynamic_size)
        run = write(subject, images, options.format, path)
        with step("comparing it with the model on random images"):
            found = compare(subject, images, run)
        print(f"largest difference between logits {found.difference:.1e}, their standard deviation {found.spread:.2g}")
        if not found.difference <= options.tolerance:  # which is how a difference that is no number fails, too
            raise ValueError(
                f"what was written differs from {subject.name} by more than {options.tolerance:g} and was removed; if "
                "its logits are so large that this is their precision, raise --tolerance"
            )
    print(f"{options.output}: {subject.name}, weights {subject.weights}, {size_of(options.output) / 1e6:.1f} MB")
    if options.format != HUB:
        print(f"takes {images}, gives {subject.model.num_classes} logits for each")
    if options.format == "torch_export" and options.dynamic_size:
        print("sizes that the graph does not hold at are refused when it is run")


def check_output(output: Path, kind: str) -> None:
    """Raises ValueError unless the output can be of that kind."""
    suffix = FILES.get(kind)
    if suffix is not None and output.suffix != suffix:
        raise ValueError(f"{output} does not end in {suffix}, which is what {kind} writes")
    if suffix is not None and output.is_dir():
        raise ValueError(f"{output} is a folder; {kind} writes a file")
    if suffix is None and output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; {kind} writes a folder")


def image_size(sides: Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width from what was given.

    Raises:
        ValueError: If there are more than two.
    """
    if sides is None:
        return None
    if len(sides) > 2:
        raise ValueError(f"--img-size takes height and width, got {len(sides)} numbers")
    return sides[0], sides[-1]


def write(subject: Subject, images: Images, kind: str, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a format; returns a function that runs what was written."""
    if kind == "onnx":
        return write_onnx(subject, images, path)
    if kind == "torch_export":
        return write_torch_export(subject, images, path)
    return write_hub_folder(subject, path)


if __name__ == "__main__":
    sys.exit(main())
