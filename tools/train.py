"""Trains a model.

One process:        python -m zoo.tools.train vim/micro_digits
Other settings:     python -m zoo.tools.train vim/micro_digits optim.lr=3e-3 output=runs/second
Continue a run:     python -m zoo.tools.train vim/micro_digits resume=auto
Own file:           python -m zoo.tools.train my_recipe.yaml data.root=/data/flowers
Eight GPUs:         torchrun --nproc_per_node=8 -m zoo.tools.train vim/tiny_imagefolder data.root=/data/flowers
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from zoo.config import list_configs, load_config
from zoo.engine import TrainResult, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done or stopped by SIGTERM, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.train",
        description=__doc__,
        epilog="packaged configurations:\n  " + "\n  ".join(list_configs()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, or the name of a packaged configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    options = parser.parse_args(arguments)
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_process else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    try:
        config = load_config(options.config, options.overrides)
        result = train(config)
    except (OSError, ValueError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is trained is saved, continue with resume=auto", file=sys.stderr)
        return 130
    if is_main_process:
        print(_summary(result))
    return 0


def _summary(result: TrainResult) -> str:
    if not result.complete:
        return f"stopped as asked; the state is saved in {result.output}, continue with resume=auto"
    return (
        f"Trained {result.trained} epochs; the run in {result.output} is complete.\n"
        f"Best {result.goal_label}: {result.best[result.goal]:.2f} after epoch {result.best['epoch']}\n"
        f"Weights: {result.output / 'best.safetensors'}   log: {result.output / 'log.csv'}"
    )


if __name__ == "__main__":
    sys.exit(main())
