"""Trains a model.

One process:        python -m zoo.tools.train vim/micro_digits
Other settings:     python -m zoo.tools.train vim/micro_digits optim.lr=3e-3 output=runs/second
Continue a run:     python -m zoo.tools.train vim/micro_digits resume=auto
Own file:           python -m zoo.tools.train my_recipe.yaml data.root=/data/flowers
Largest batch:      python -m zoo.tools.train vim/tiny_imagefolder data.root=/data/flowers --find-batch-size
Eight GPUs:         torchrun --nproc_per_node=8 -m zoo.tools.train vim/tiny_imagefolder data.root=/data/flowers
Divided model:      torchrun --nproc_per_node=8 -m zoo.tools.train vim/tiny_imagefolder strategy=fsdp

Four machines with eight GPUs each: the same command on every machine, which all see the same output folder. With
resume=auto a run is continued after any of them has failed, by torchrun itself up to three times:

    torchrun --nnodes=4 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_endpoint=FIRST_MACHINE:29500 \\
        -m zoo.tools.train vim/tiny_imagefolder data.root=/data/flowers output=/shared/flowers resume=auto

Under Slurm, srun starts one torchrun on every machine of a job. SIGTERM, here 300 s before the job's time is over, has
the state saved, and the same job submitted again continues:

    #SBATCH --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 --signal=TERM@300
    srun torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID \\
        --rdzv_endpoint=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500 \\
        -m zoo.tools.train vim/tiny_imagefolder data.root=/data/flowers output=/shared/flowers resume=auto

data.batch_size is that of one process. Machines on whose own disks the data lie need it under the same path.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence

import torch

from zoo.config import list_configs, load_config
from zoo.engine import TrainResult, train
from zoo.engine.loop import find_batch_size
from zoo.engine.memory import BatchTrial
from zoo.tools.tables import aligned


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done or stopped by SIGTERM, 1 failed, 130 interrupted."""
    options = _parser().parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        config = load_config(options.config, options.overrides)
        if options.find_batch_size:
            return _show_trials(find_batch_size(config, options.find_batch_size))
        result = train(config)
    except (OSError, ValueError, ModuleNotFoundError, FloatingPointError, MemoryError) as error:
        print(f"error{f' in process {rank}' if rank else ''}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is trained is saved, continue with resume=auto", file=sys.stderr)
        return 130
    if not rank:
        print(_summary(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.train",
        description=__doc__,
        epilog="packaged configurations:\n  " + "\n  ".join(list_configs()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file, or the name of a packaged configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--find-batch-size",
        nargs="?",
        type=int,
        const=1024,
        metavar="LIMIT",
        help="do not train, but try 2, 4, 8, ... images per batch until one does not fit or LIMIT (1024) is reached",
    )
    return parser


def _show_trials(trials: Iterable[BatchTrial]) -> int:
    rows, largest = [["data.batch_size", "images/s", "peak memory"]], None
    for trial in trials:
        memory = f"{trial.peak_bytes / 2**30:.2f} GiB" if trial.peak_bytes else ""
        rows.append([str(trial.batch_size), f"{trial.images_per_second:.0f}" if trial.fits else "does not fit", memory])
        largest = trial.batch_size if trial.fits else largest
    print("\n".join(aligned(rows)))
    if largest is None:
        print("error: not even the smallest batch fits into memory", file=sys.stderr)
        return 1
    print(f"Largest power of two that was trained: data.batch_size={largest}")
    return 0


def _summary(result: TrainResult) -> str:
    if not result.complete:
        return f"stopped as asked; the state is saved in {result.output}, continue with resume=auto"
    lines = [
        f"Trained {result.trained} epochs; the run in {result.output} is complete.",
        f"Best {result.goal_label}: {result.best[result.goal]:.2f} after epoch {result.best['epoch']}",
        f"Weights: {result.output / 'best.safetensors'}   log: {result.output / 'log.csv'}",
    ]
    if peak := torch.cuda.max_memory_allocated():  # 0 without a GPU
        lines.append(f"Peak memory of this process's GPU: {peak / 2**30:.2f} GiB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
