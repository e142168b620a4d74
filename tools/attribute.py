"""Shows where in images the evidence for a class lies: writes a sheet of images and maps over them, attributions.png.

A run of ours:          python -m zoo.tools.attribute runs/micro_digits scans/ --output out
Published weights:      python -m zoo.tools.attribute vim_tiny_patch16_224 cat.jpg --method grad_cam
For a class you name:   python -m zoo.tools.attribute vim_tiny_patch16_224 cat.jpg --target "Egyptian cat"

Images are shown as the model sees them, resized and cropped. Bright yellow is where the evidence is strongest.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from zoo.data import Normalize, image_transform
from zoo.engine import ModelCard, find_images, load_any
from zoo.engine.attribution import METHODS, attribute, overlay
from zoo.engine.figures import shorten
from zoo.plots import plot_images
from zoo.tools.arguments import positive

COLUMNS = 8  # of the sheet: four images, each with its map beside it
LONGEST_CAPTION = 18  # characters above an image
NAMES_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.attribute",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a run, .safetensors file of a run, or name of a model")
    parser.add_argument("images", nargs="+", help="image files, folders, or quoted patterns")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="default %(default)s")
    parser.add_argument("--target", help="name of the class to look for; default the predicted one of every image")
    parser.add_argument("--output", default="runs/attributions", help="folder for the sheet; default %(default)s")
    parser.add_argument("--checkpoint", help="weights for a model name; default the published ones")
    parser.add_argument("--img-size", type=positive, help="side of the images in pixels, for a model name")
    parser.add_argument("--batch-size", type=positive, default=16, help="images at a time; default %(default)s")
    parser.add_argument("--shown", type=positive, default=32, help="largest number of images; default %(default)s")
    parser.add_argument("--bad-files", choices=("error", "skip"), default="skip", help="default: report and skip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        model, card = load_any(options.model, options.checkpoint, options.img_size, options.device)
        if card.task != "classification":
            raise ValueError(f"{options.model} is a model for {card.task}; only classifiers attribute to a class")
        target = None if options.target is None else _class_index(card, options.target)
        files = find_images(options.images, options.bad_files)
        shown = files[: options.shown]
        pictures, captions = [], []
        for start in range(0, len(shown), options.batch_size):
            batch = shown[start : start + options.batch_size]
            images, maps, guesses = _attribute_files(model, card, batch, target, options.method)
            for file, image, heat, guess in zip(batch, images, maps, guesses, strict=True):
                pictures += [image.expand(3, -1, -1).permute(1, 2, 0).numpy(), overlay(image, heat)]
                captions += [shorten(file.name, LONGEST_CAPTION), guess]
        title = f"{card.model}, {options.method}" + (f" of {shorten(options.target)}" if options.target else "")
        if len(shown) < len(files):
            title += f" (the first {len(shown)} of {len(files)} images)"
        sheet = output / "attributions.png"
        plot_images(pictures, captions, [None] * len(pictures), sheet, title, COLUMNS)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{card.model}: {len(shown)} images, {options.method}\nSheet: {sheet}")
    return 0


def _attribute_files(
    model: nn.Module, card: ModelCard, files: Sequence[Path], target: int | None, method: str
) -> tuple[Tensor, Tensor, list[str]]:
    """Images as the model sees them, uint8 (B, C, H, W), their maps (B, H, W), and class and probability in words."""
    transform = image_transform(card.preprocessing)
    images = torch.stack([transform(Image.open(file)) for file in files])
    device = next(model.parameters()).device
    inputs = Normalize(card.preprocessing.mean, card.preprocessing.std).to(device)(images.to(device))
    with torch.no_grad():
        probabilities = model(inputs).float().softmax(-1).cpu()
    labels = probabilities.argmax(-1) if target is None else torch.full((len(files),), target)
    maps = attribute(model, inputs, labels, method)
    guesses = [
        f"{shorten(card.shown_names[label], LONGEST_CAPTION)}\n({probability[label]:.0%})"
        for label, probability in zip(labels.tolist(), probabilities, strict=True)
    ]
    return images, maps, guesses


def _class_index(card: ModelCard, name: str) -> int:
    """The label of a class by its name in the data or its description."""
    for names in (card.class_names, card.shown_names):
        if name in names:
            return names.index(name)
    known = [*card.shown_names[:NAMES_SHOWN], *(["..."] if len(card.shown_names) > NAMES_SHOWN else [])]
    raise ValueError(f"{card.model} has no class {name!r}; its classes are {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
