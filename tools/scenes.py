"""Writes fashion scenes, composed from Fashion-MNIST: boxes and masks, semantic masks, or conversations about images.

python -m zoo.tools.scenes --format coco    --output scenes-coco      # detection, instance segmentation
python -m zoo.tools.scenes --format ade     --output scenes-ade       # semantic segmentation
python -m zoo.tools.scenes --format llava   --output scenes-llava     # captions, questions and answers
python -m zoo.tools.scenes --format preview --output .                # scenes_examples.png: a look at twelve

The same arguments give the same files on every machine. A folder that is there already is used as it is, and an
interrupted call continues where it stopped.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.data.scenes import FashionScenes, plot_scenes, write_ade, write_coco, write_llava
from zoo.tools.arguments import positive

WRITERS = {"coco": write_coco, "ade": write_ade, "llava": write_llava}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, choices=(*WRITERS, "preview"), help="what to write")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--train", type=positive, default=8000, metavar="N", help="training scenes; default 8000")
    parser.add_argument("--val", type=positive, default=1000, metavar="N", help="validation scenes; default 1000")
    parser.add_argument("--size", type=positive, default=256, metavar="N", help="side of the images; default 256")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other scenes; default 0")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes, 0 for none besides this one; default one per core",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the Fashion-MNIST files, if not found")
    parser.add_argument(
        "--shown", type=positive, default=12, metavar="N", help="validation scenes in a preview; default 12"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    common = dict(size=options.size, seed=options.seed, root=options.root)
    try:
        if options.format == "preview":
            scenes = FashionScenes("val", options.shown, **common)
            options.output.mkdir(parents=True, exist_ok=True)
            place = options.output / "scenes_examples.png"
            plot_scenes([scenes[i] for i in range(len(scenes))], place)
            print(f"{len(scenes)} scenes: {place}")
        else:
            train = FashionScenes("train", options.train, **common)
            val = FashionScenes("val", options.val, **common)
            place = WRITERS[options.format](options.output, train, val, options.workers)
            print(f"{len(train)} training and {len(val)} validation scenes of {options.size} px: {place}")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
