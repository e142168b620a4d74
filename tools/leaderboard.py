"""Collects finished runs of one recipe into a table.

    python -m zoo.tools.train classification/nano_fashion_mnist model.name=lbvim_nano output=runs/nano/lbvim_nano
    python -m zoo.tools.leaderboard runs/nano/* --output results/fashion_mnist.csv --device "one NVIDIA H200"

A row holds the scores of the last epoch's weights, parameters in millions, 10^9 floating-point operations of one
image (forward, two for a multiply-add, scans included; of classifiers and segmentors), training images per second
(median over the epochs after the first), and the command that repeats the run: its settings are the recipe's but for
those that the command names. Runs that differ in nothing but ``seed`` share a row, with the mean and the standard
deviation (of the sample) of every score. Images per second of several runs that shared a GPU say little;
``--benchmark FILE`` takes them from what ``python -m zoo.tools.benchmark models --mode train`` measured instead.
"""

import argparse
import csv
import json
import logging
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.config import TrainConfig, load_config
from zoo.engine import load_trained, read_log
from zoo.engine.task import find_task

RECIPE = "classification/nano_fashion_mnist"
NO_SCORES = {"epoch", "lr", "train_loss", "train_top1", "val_loss", "images_per_second", "data_seconds", "seconds"}
NO_MATTER = ("output", "resume", "data.root", "data.workers", "data.download")  # where and how, not what

_logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", default="results/fashion_mnist.csv", help="default %(default)s")
    parser.add_argument("--recipe", default=RECIPE, help="what the runs have in common; default %(default)s")
    parser.add_argument("--benchmark", metavar="FILE", help="JSON file with the models' training images per second")
    parser.add_argument("--device", default=_this_device(), help="what they were trained on; default this machine's")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        rows = collect(options.runs, options.recipe)
        if options.benchmark:
            _take_speeds(rows, Path(options.benchmark))
        write_table(rows, options.output, options.device)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items() if name != "command"))
    print(f"{len(rows)} runs in {options.output}")
    return 0


def collect(runs: Sequence[str | Path], recipe: str = RECIPE) -> list[dict[str, Any]]:
    """Makes the rows of the table, best first; one for all seeds of a run. Unfinished runs are reported and left out.

    Where the runs are of several data sets, a column says of which, and the rows of one stay together.

    Args:
        runs: Folders of runs.
        recipe: Configuration that the runs' settings are compared with.

    Raises:
        FileNotFoundError: If a folder holds no run or no weights.
        ValueError: If no run is finished, two of them have the same settings, or their tasks differ.
    """
    seeds, tasks = {}, set()  # rows of the same settings but for the seed, by seed
    own_seed = load_config(recipe).seed
    for run in map(Path, runs):
        if not (run / "config.yaml").is_file():
            raise FileNotFoundError(f"{run} holds no run: there is no config.yaml")
        config, log = load_config(str(run / "config.yaml")), read_log(run)
        if not log or log[-1]["epoch"] < config.optim.epochs:
            _logger.warning("%s is left out: %d of %d epochs", run, len(log), config.optim.epochs)
            continue
        tasks.add(config.task)
        group = seeds.setdefault(training_command({**asdict(config), "seed": own_seed}, recipe), {})
        if config.seed in group:
            raise ValueError(f"several runs have the same settings: {group[config.seed]['command']}")
        group[config.seed] = _row(run, config, log, recipe)
    if not seeds:
        raise ValueError(f"none of the runs is finished: {', '.join(map(str, runs))}")
    if len(tasks) > 1:
        raise ValueError(f"runs of several tasks have no scores in common: {', '.join(sorted(tasks))}")
    rows = [row for group in seeds.values() for row in group.values()]
    if len(rows) > len(seeds):
        rows = _means(seeds)
    if len({row["data"] for row in rows}) == 1:
        rows = [{name: value for name, value in row.items() if name != "data"} for row in rows]
    goal = find_task(tasks.pop()).goal
    return sorted(rows, key=lambda row: (row.get("data", ""), -row[goal], row["model"]))


def _row(run: Path, config: TrainConfig, log: Sequence[Mapping[str, float]], recipe: str) -> dict[str, Any]:
    """What the table says about a run."""
    model, card = load_trained(run / "last.safetensors")
    size = (1, card.preprocessing.in_chans, *card.preprocessing.size)
    takes_images = config.task in ("classification", "segmentation")  # detectors take lists, towers texts too
    return {
        "data": config.data.name,
        "model": config.model.name.partition(".")[0],  # a tag tells where the run started from
        **({"head": config.model.head} if hasattr(config.model, "head") else {}),
        "img_size": size[-1],
        **{name: value for name, value in log[-1].items() if name not in NO_SCORES},
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 3),
        **({"gflops": round(count_flops(model, size) / 1e9, 4)} if takes_images else {}),
        "train_samples_per_sec": round(statistics.median(e["images_per_second"] for e in log[1:] or log)),
        "epochs": config.optim.epochs,
        "command": training_command(asdict(config), recipe),
    }


def _means(seeds: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row for all seeds of a command, with means and deviations of the scores."""
    rows = []
    for command, group in seeds.items():
        row = {}
        for name, value in next(iter(group.values())).items():
            values = [other[name] for other in group.values()]
            if name == "train_samples_per_sec":
                row[name] = round(statistics.median(values))
            elif isinstance(value, float) and name not in ("param_count", "gflops"):
                row[name] = round(statistics.mean(values), 4)
                row[f"{name}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else ""
            else:
                row[name] = value
        rows.append({**row, "seeds": " ".join(map(str, sorted(group))), "command": command})
    return rows


def _take_speeds(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Replaces the training images per second of rows by those of a benchmark's file; what it lacks is left empty."""
    records = json.loads(path.read_text())["records"]
    speeds = {record["model"].partition(".")[0]: record.get("train_samples_per_sec") for record in records}
    for row in rows:
        speed = speeds.get(row["model"])
        row["train_samples_per_sec"] = "" if speed is None else round(speed)


def count_flops(model: nn.Module, size: Sequence[int]) -> int:
    """Floating-point operations of one forward of an input of this size (B, C, H, W), 2 for a multiply-add."""
    model = model.eval().requires_grad_(False)  # some layers count a backward's FLOPs where gradients are possible
    parameter = next(model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(size, device=parameter.device, dtype=parameter.dtype))
    return counter.get_total_flops()


def training_command(settings: Mapping[str, Any], recipe: str) -> str:
    """The command that trains with these settings: the recipe and what differs from it."""
    common = dict(_flat(asdict(load_config(recipe))))
    own = {name: value for name, value in _flat(settings) if name not in NO_MATTER}
    changes = [f"{name}={_written(own[name])}" for name in own if name not in common or own[name] != common[name]]
    gone = [f"{name}=null" for name in common if name not in own and name not in NO_MATTER]
    return " ".join(["python -m zoo.tools.train", recipe, *changes, *gone])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    """A setting as the command line takes it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"'{text}'" if set(text) & set(" []{},") else text


def write_table(rows: Sequence[Mapping[str, Any]], path: str | Path, device: str) -> None:
    """Writes the rows as CSV below a comment that says what they were measured with.

    Args:
        rows: As from :func:`collect`.
        path: File; folders are made.
        device: What the runs were trained on.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = f"vision-ssm-zoo {zoo.__version__}, torch {torch.__version__}, timm {timm.__version__}"
    with path.open("w", newline="") as file:
        file.write(f"# Trained on {device}; {versions}. Made by: python -m zoo.tools.leaderboard\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _this_device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU ({platform.machine()})"


if __name__ == "__main__":
    sys.exit(main())
