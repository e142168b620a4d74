"""Classifies image files: writes predictions.csv and a labelled contact sheet, predictions.png.

A run of ours:          python -m zoo.tools.predict runs/micro_digits scans/ --output out
Published weights:      python -m zoo.tools.predict vim_tiny_patch16_224 cat.jpg "shop/**/*.png"

Where a file's folder is named after a class, its frame on the sheet is green for a right answer, red for a wrong one.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from zoo.engine import find_images, load_any, predict_files, write_predictions
from zoo.plots import plot_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a run, .safetensors file of a run, or name of a model")
    parser.add_argument("images", nargs="+", help="image files, folders, or quoted patterns")
    parser.add_argument("--output", default="runs/predictions", help="folder for the results; default %(default)s")
    parser.add_argument("--checkpoint", help="weights for a model name; default the published ones")
    parser.add_argument("--img-size", type=int, help="side of the images in pixels, for a model name")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time; default 64")
    parser.add_argument("--shown", type=int, default=64, help="largest number of images on the sheet; default 64")
    parser.add_argument("--bad-files", choices=("error", "skip"), default="skip", help="default: report and skip")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        model, card = load_any(options.model, options.checkpoint, options.img_size, options.device)
        files = find_images(options.images, options.bad_files)
        predictions = predict_files(model, card, files, options.batch_size)
        write_predictions(predictions, output / "predictions.csv")
        known = [prediction for prediction in predictions if prediction.truth is not None]
        summary = f"{card.model}: {len(predictions)} images"
        if known:
            right = sum(prediction.correct for prediction in known)
            summary += f", {right} of the {len(known)} with a known class are right"
        shown = predictions[: options.shown]
        mode = "L" if card.preprocessing.in_chans == 1 else "RGB"
        plot_images(
            [Image.open(prediction.file).convert(mode) for prediction in shown],
            [f"{prediction.label}\n({prediction.probability:.0%})" for prediction in shown],
            [prediction.correct for prediction in shown],
            output / "predictions.png",
            summary if len(shown) == len(predictions) else f"{summary} (the first {len(shown)} are shown)",
        )
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary)
    print(f"Table: {output / 'predictions.csv'}   sheet: {output / 'predictions.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
