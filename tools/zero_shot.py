"""Measures what a model of two towers can do untrained: name classes, or find images by captions and the other way.

Classes, a run of ours:  python -m zoo.tools.zero_shot runs/clip_vim_nano_fashion_scenes
Classes in folders:      python -m zoo.tools.zero_shot runs/my_clip --data folder --root /data/pets --split val
Any model of open_clip:  python -m zoo.tools.zero_shot ViT-B-32 --weights laion2b_s34b_b79k --data fashion_mnist
Captions:                python -m zoo.tools.zero_shot runs/my_clip --data pairs --root /data/photos --split test
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from zoo.config import ClipConfig, ClipDataConfig, ZeroShotConfig
from zoo.data import Normalize
from zoo.data.captions import caption_loader, open_captions
from zoo.engine import evaluate, settings_beside
from zoo.tools.arguments import positive
from zoo.zero_shot import Contrastive, ZeroShotClassifier, embed_pairs, load_contrastive, open_classes, pair_recall

CAPTIONED = ("fashion_scenes", "pairs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.zero_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a run, .safetensors file of a run, or name of a model of open_clip")
    parser.add_argument("--weights", help="for a model name: a file, or the tag of published weights")
    parser.add_argument(
        "--data",
        help="fashion_mnist, folder or another name of images with classes; fashion_scenes or pairs for captions; "
        "default the run's images with classes",
    )
    parser.add_argument("--root", help="folder of the data")
    parser.add_argument("--split", help="which part; default the run's, or val")
    parser.add_argument("--samples", type=positive, help="use this many images of data held in memory, or pairs")
    parser.add_argument("--templates", nargs="+", help="prompts with {} for a class; default the run's")
    parser.add_argument("--class-names", nargs="+", help="in label order; default the folders' names")
    parser.add_argument("--fill", type=float, help="share of the side that an image takes; the rest is black")
    parser.add_argument("--bad-files", choices=("error", "skip"), default="error", help="for unreadable images")
    parser.add_argument("--batch-size", type=positive, default=128, help="images at a time; default 128")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode files; default 4")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="default fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        tower = load_contrastive(options.model, options.weights, options.device)
        measure = _retrieval if options.data in CAPTIONED else _accuracy
        print(json.dumps({"model": tower.name, **measure(tower, options)}, indent=4))
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _accuracy(tower: Contrastive, options: argparse.Namespace) -> dict[str, str | float]:
    settings = {name: getattr(options, name) for name in ("data", "root", "split", "samples", "templates", "fill")}
    settings["class_names"] = options.class_names
    config = replace(_own_settings(options), **{name: value for name, value in settings.items() if value is not None})
    if config.data is None:
        raise ValueError("the model has no images with classes of its own; give --data, for example fashion_mnist")
    loader, present, names = open_classes(
        config,
        tower.preprocessing,
        options.batch_size,
        options.workers,
        options.bad_files,
        device=options.device,
    )
    classifier = ZeroShotClassifier(tower.model, tower.tokenizer, names, config.templates)
    scores = evaluate(classifier, loader, present, len(names), options.precision)
    return {"data": config.data, "templates": config.templates, "top1": scores.top1, "top5": scores.top5}


def _retrieval(tower: Contrastive, options: argparse.Namespace) -> dict[str, str | float]:
    config = ClipDataConfig(
        name=options.data,
        root=options.root,
        val_split=options.split or "val",
        val_samples=options.samples,
        bad_files=options.bad_files,
        img_size=tower.preprocessing.size[0],
        batch_size=options.batch_size,
        workers=options.workers,
    )
    data = open_captions(config, training=False)
    tokens = tower.tokenizer(list(data.captions)).to(options.device)
    normalize = Normalize(tower.preprocessing.mean, tower.preprocessing.std).to(options.device)
    loader = caption_loader(data, tower.preprocessing, config, device=options.device)
    images, texts = embed_pairs(tower.model, loader, tokens, normalize, options.precision)
    recall = pair_recall(images, texts, data.image_ids, data.caption_ids)
    return {"data": config.name, "pairs": len(data), **recall}


def _own_settings(options: argparse.Namespace) -> ZeroShotConfig:
    """What the run was measured with while it trained; for other images, its prompts and frame alone."""
    config = settings_beside(options.model)
    own = config.zero_shot if isinstance(config, ClipConfig) else ZeroShotConfig()
    return own if options.data in (None, own.data) else ZeroShotConfig(templates=own.templates, fill=own.fill)


if __name__ == "__main__":
    sys.exit(main())
