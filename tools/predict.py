"""Classifies image files, segments them, finds objects in them or answers questions about them, and draws the results.

A run of ours:          python -m zoo.tools.predict runs/micro_digits scans/ --output out
Published weights:      python -m zoo.tools.predict vim_tiny_patch16_224 cat.jpg "shop/**/*.png"
Segmentation, windows:  python -m zoo.tools.predict runs/streets photos/ --set inference.mode=slide
Questions:              python -m zoo.tools.predict runs/my_vlm photos/ --question "How many bags are there?"

Classification writes predictions.csv and a labelled contact sheet, predictions.png: where a file's folder is named
after a class, its frame is green for a right answer, red for a wrong one. What segmentation and detection write is
listed in docs/dense.md. With --question, predictions.csv has a line for every image and question, and the sheet shows
the answers to the first.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.assistant import Assistant
from zoo.engine import find_images, load_any, predict_into, settings_beside
from zoo.engine.predict import answer_into
from zoo.tools.arguments import positive

RESULTS = {
    "classification": "predictions.csv",
    "detection": "predictions.json",
    "segmentation": "predictions.json",
}


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
    parser.add_argument("--batch-size", type=int, help="images at a time; default 64, 8 for detection and questions")
    parser.add_argument("--shown", type=int, default=64, help="largest number of images on the sheet; default 64")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that is drawn; default 0.5")
    parser.add_argument("--bad-files", choices=("error", "skip"), default="skip", help="default: report and skip")
    parser.add_argument("--question", action="append", help="for vision-language models; repeatable")
    parser.add_argument("--tokenizer", help="folder of a published one's tokenizer; default gets it from the hub")
    parser.add_argument("--max-tokens", type=positive, default=256, help="longest answer; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="setting that wins over the run's; repeatable"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
        if options.question:
            assistant = Assistant.load(options.model, options.checkpoint, options.tokenizer, options.device)
            files = find_images(options.images, options.bad_files)
            limits = dict(batch_size=options.batch_size or 8, max_new_tokens=options.max_tokens, shown=options.shown)
            print(answer_into(output, assistant, files, options.question, **limits))
            print(f"Table: {output / 'predictions.csv'}   sheet: {output / 'predictions.png'}")
            return 0
        model, card = load_any(options.model, options.checkpoint, options.img_size, options.device)
        if card.task == "vlm":
            raise ValueError(f"{options.model} answers questions; ask one with --question")
        files = find_images(options.images, options.bad_files)
        settings = settings_beside(options.model, options.set)
        summary = predict_into(
            output, model, card, files, settings, options.batch_size, shown=options.shown, threshold=options.threshold
        )
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary)
    print(f"Table: {output / RESULTS[card.task]}   sheet: {output / 'predictions.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
