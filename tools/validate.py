"""Measures the accuracy of a model.

A run of ours:          python -m zoo.tools.validate runs/micro_digits
Published weights:      python -m zoo.tools.validate vim_tiny_patch16_224 --root /data/imagenet --split val
Weights in a file:      python -m zoo.tools.validate vim_tiny_patch16_224 --checkpoint vim_t.pth --root /data/imagenet
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from zoo.config import DataConfig, load_config
from zoo.engine import load_any, result_row, validate, write_results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a run, .safetensors file of a run, or name of a model")
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
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        model, card = load_any(options.model, options.checkpoint, options.img_size, options.device)
        scores = validate(model, card, _data_config(options, card.data), options.precision)
        row = result_row(model, card, scores)
        print(json.dumps(row, indent=4))
        if options.results_file:
            write_results(row, options.results_file)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _data_config(options: argparse.Namespace, trained_on: str) -> DataConfig:
    """The run's own data section where there is one, with what the command line says instead."""
    folder = Path(options.model)
    saved = (folder if folder.is_dir() else folder.parent) / "config.yaml"
    base = load_config(str(saved)).data if folder.exists() and saved.exists() else DataConfig(name=trained_on)
    names = ("name", "root", "val_split", "bad_files", "batch_size", "workers")
    return replace(base, **{name: getattr(options, name) for name in names if getattr(options, name) is not None})


if __name__ == "__main__":
    sys.exit(main())
