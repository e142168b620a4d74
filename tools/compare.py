"""Compares runs: draws their curves over each other and prints what each has reached.

    python -m zoo.tools.compare runs/first runs/second
    python -m zoo.tools.compare runs/nano/* --metric top1 val_loss images_per_second --output nano.png

Unfinished runs are shown as far as they are, so it can be called while runs train. Columns of the table: the best value
of each metric with its epoch, and the value of the last epoch; training images per second (median over the epochs after
the first) and the hours of all epochs.
"""

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.engine import read_log
from zoo.engine.figures import draw_runs
from zoo.optional import require
from zoo.tools.tables import aligned

ALWAYS_THERE = ("lr", "train_loss", "images_per_second", "data_seconds", "seconds")
LOW_IS_GOOD = ("train_loss", "val_loss", "data_seconds", "seconds")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run as far as it is.

    Attributes:
        folder: Where it is.
        log: One dictionary per epoch, at least one.
        epochs: How many it is to have; None if the folder does not tell.
    """

    folder: Path
    log: list[dict[str, float]]
    epochs: int | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--output", default="compare.png", help="the picture; default %(default)s")
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="COLUMN",
        help="columns of the log, the first one sorts the table; default top1 val_loss, or all scores of another task",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        runs = read_runs(options.runs)
        metrics = choose_metrics(runs, options.metric)
        print(format_table(table(runs, metrics)))
        output = Path(options.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_runs({name: run.log for name, run in runs.items()}, metrics, output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(runs)} runs in {output}")
    return 0


def read_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Reads the logs of runs. A run without a finished epoch is reported and left out.

    Args:
        folders: Folders of runs; one that is given twice counts once.

    Returns:
        The runs by the shortest names that tell them apart: ends of their paths.

    Raises:
        FileNotFoundError: If a folder is not there or holds no run.
        ValueError: If a log cannot be read, or no run has a finished epoch.
    """
    unique = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [run for folder in unique if (run := _read_run(folder))]
    if not runs:
        raise ValueError(f"no epoch is finished in any of: {', '.join(map(str, folders))}")
    return dict(zip(_short_names([run.folder for run in runs]), runs, strict=True))


def choose_metrics(runs: dict[str, Run], wanted: Sequence[str] | None) -> list[str]:
    """The columns to show: those wanted; else those of classifiers, or all scores that the first run has.

    Raises:
        ValueError: If no run has values of one that is wanted.
    """
    columns = list(dict.fromkeys(column for run in runs.values() for column in run.log[-1] if column != "epoch"))
    if not wanted:
        scores = [column for column in columns if column not in ALWAYS_THERE]
        return [name for name in ("top1", "val_loss") if name in scores] or scores
    for metric in wanted:
        if not any(best_row(run.log, metric) for run in runs.values()):
            raise ValueError(f"no log has values of {metric}; choose another --metric of {', '.join(columns)}")
    return list(wanted)


def _read_run(folder: Path) -> Run | None:
    settings = folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if not settings.is_file() and not (folder / "log.csv").is_file():
        raise FileNotFoundError(f"{folder} holds no run: there is neither config.yaml nor log.csv")
    try:
        log = read_log(folder)
        needed = {"epoch", "images_per_second", "seconds"} - set(log[0] if log else ())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'log.csv'} is not the log of a run: {error}") from error
    if not log:
        _logger.warning("%s is left out: no epoch is finished", folder)
        return None
    if needed:
        raise ValueError(f"{folder / 'log.csv'} is not the log of a run: no column {', '.join(sorted(needed))}")
    return Run(folder, log, _planned_epochs(settings))


def _planned_epochs(settings: Path) -> int | None:
    """How many epochs a run is to have; other settings are not looked at, as today's rules may refuse old ones."""
    yaml = require("yaml")
    try:
        return int(yaml.safe_load(settings.read_text())["optim"]["epochs"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Names of different folders, with as many parents as it takes to tell them apart."""
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def table(runs: dict[str, Run], metrics: Sequence[str]) -> list[dict[str, str]]:
    """Makes a row per run, the best one in the first metric first; values are written out."""
    best = {name: best_row(run.log, metrics[0]) for name, run in runs.items()}
    sign = 1 if metrics[0] in LOW_IS_GOOD else -1
    order = sorted(runs, key=lambda name: sign * best[name][metrics[0]] if best[name] else math.inf)
    return [_table_row(name, runs[name], metrics) for name in order]


def _table_row(name: str, run: Run, metrics: Sequence[str]) -> dict[str, str]:
    done = run.log[-1]["epoch"]
    row = {"run": name, "epochs": f"{done}" if run.epochs in (None, done) else f"{done} of {run.epochs}"}
    for metric in metrics:
        best = best_row(run.log, metric)
        row[f"best {metric} (epoch)"] = f"{_number(best[metric])} ({best['epoch']})" if best else "-"
        row[f"final {metric}"] = _number(run.log[-1].get(metric, math.nan))
    row["images/s"] = f"{statistics.median(epoch['images_per_second'] for epoch in run.log[1:] or run.log):.0f}"
    row["hours"] = f"{sum(epoch['seconds'] for epoch in run.log) / 3600:.2f}"
    return row


def best_row(log: Sequence[dict[str, float]], metric: str) -> dict[str, float] | None:
    """The epoch with the best finite value, the first one of equals; None if there is none."""
    rows = [row for row in log if math.isfinite(row.get(metric, math.nan))]
    choose = min if metric in LOW_IS_GOOD else max
    return choose(rows, key=lambda row: row[metric], default=None)


def _number(value: float) -> str:
    """Two decimals for percentages and the like, four significant digits for small values."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if value >= 10 else f"{value:.4g}"


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Lays rows out in columns below their headings."""
    return "\n".join(aligned([list(rows[0]), *(list(row.values()) for row in rows)]))


if __name__ == "__main__":
    sys.exit(main())
