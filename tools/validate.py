"""Measures how good a model is: accuracy of classifiers, mIoU of segmentors, average precision of detectors.

A run of ours:          python -m zoo.tools.validate runs/micro_digits
With other settings:    python -m zoo.tools.validate runs/scenes inference.scales=[0.75,1,1.25] inference.flip=true
Published weights:      python -m zoo.tools.validate vim_tiny_patch16_224 --root /data/imagenet --split val
Weights in a file:      python -m zoo.tools.validate vim_tiny_patch16_224 --checkpoint vim_t.pth --root /data/imagenet
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from zoo.config import ClassificationConfig, DataConfig, TrainConfig
from zoo.engine import ModelCard, load_any, scores_row, settings_beside, write_results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a run, .safetensors file of a run, or name of a model")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the run's")
    parser.add_argument("--checkpoint", help="weights for a model name; default the published ones")
    parser.add_argument(
        "--data", dest="name", help="data set; default the run's, or folder (see zoo.config.DataConfig)"
    )
    parser.add_argument("--root", help="folder of the data")
    parser.add_argument("--split", dest="val_split", help="split to evaluate; default the run's, or val")
    parser.add_argument("--bad-files", choices=("error", "skip"), help="for unreadable images; default error")
    parser.add_argument("--img-size", type=int, help="side of the images in pixels, for a model name")
    parser.add_argument("--batch-size", type=int, help="images at a time; default the run's, or 128")
    parser.add_argument("--workers", type=int, help="processes that decode files; default the run's, or 4")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    parser.add_argument("--results-file", help="also write the row to this .csv or .json file")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        model, card = load_any(options.model, options.checkpoint, options.img_size, options.device)
        row = scores_row(model, card, _config(options, card))
        print(json.dumps(row, indent=4))
        if options.results_file:
            write_results(row, options.results_file)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _config(options: argparse.Namespace, card: ModelCard) -> TrainConfig:
    """The run's own settings where there are any, with what the command line says instead."""
    config = settings_beside(options.model, options.overrides)
    if config is None and card.task != "classification":
        raise ValueError(f"{options.model} has no config.yaml of its run beside it, which tells how to evaluate it")
    config = config or ClassificationConfig(data=DataConfig(name=card.data))
    names = ("name", "root", "val_split", "bad_files", "batch_size", "workers")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.batch_size and card.task != "classification":
        given["val_batch_size"] = options.batch_size
    return replace(config, data=replace(config.data, **given), precision=options.precision)


if __name__ == "__main__":
    sys.exit(main())
