"""The folder of a run: checked before training, its log, and whether it may be continued."""

import csv
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.config import TrainConfig, load_config, save_config
from zoo.engine.checkpoint import Checkpoint, find_checkpoint
from zoo.files import replacing

__all__ = ["find_start", "prepare_output", "read_log", "write_log"]

_logger = logging.getLogger(__name__)

MAY_DIFFER = (
    *("output", "resume", "checkpoint_every", "cpu", "compile", "tensorboard"),
    *("data.root", "data.workers", "data.download"),
)


def read_log(output: str | Path) -> list[dict[str, float]]:
    """Reads ``log.csv`` of a run's folder; an empty list if there is none."""
    path = Path(output) / "log.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "epoch": int(row["epoch"])} for row in rows]


def write_log(output: Path, log: list[dict[str, float]]) -> None:
    """Writes ``log.csv``, one row per epoch, in one step; the newest row has all columns."""
    with replacing(output / "log.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(log[-1]), restval="nan")  # of epochs trained before there was such a column
        writer.writeheader()
        writer.writerows({key: _rounded(value) for key, value in row.items()} for row in log)


def _rounded(value: float) -> float:
    """Six significant digits are enough for a log."""
    return value if isinstance(value, int) or not math.isfinite(value) else float(f"{value:.6g}")


def find_start(config: TrainConfig) -> Checkpoint | None:
    """Returns the checkpoint to continue from, or None to start anew.

    Raises:
        FileNotFoundError: If ``resume`` is a path without a checkpoint.
        ValueError: If there are checkpoints and none can be read.
    """
    if config.resume is None:
        return None
    place = config.output if config.resume == "auto" else config.resume
    checkpoint = find_checkpoint(place)
    if checkpoint is None and config.resume != "auto":
        raise FileNotFoundError(f"resume={config.resume}: there is no checkpoint")
    return checkpoint


def prepare_output(output: Path, config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Makes sure, before any time is spent, that the run can be saved and does not overwrite another one.

    Raises:
        FileExistsError: If there is a run in the folder that is not to be continued.
        ValueError: If it is to be continued with other settings.
        OSError: If the folder cannot be written.
    """
    saved = output / "config.yaml"
    if saved.exists() and config.resume is None:
        raise FileExistsError(
            f"{output} already holds a run; continue it (resume=auto), remove it, or choose another output=..."
        )
    if checkpoint and saved.exists():
        changes = _differences(asdict(load_config(str(saved))), asdict(config))
        if changes and config.resume == "auto":
            raise ValueError(
                f"{output} holds a run with other settings ({'; '.join(changes)}); choose another output=..., "
                f"or continue it with these settings by resume={checkpoint.path}"
            )
        if changes:
            _logger.warning("Continuing %s with other settings: %s", checkpoint.path, "; ".join(changes))
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to the output folder {output}: {error.strerror}; choose another output=..."
        ) from error
    save_config(config, saved)
    if checkpoint and checkpoint.training["epoch"] < config.optim.epochs:
        _logger.info("Continuing from %s", checkpoint.path)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lists the settings that matter for the result and are not the same."""
    changes = []
    for name in new:
        key = prefix + name
        if isinstance(new[name], dict) and isinstance(old.get(name), dict):
            changes += _differences(old[name], new[name], f"{key}.")
        elif key not in MAY_DIFFER and old.get(name) != new[name]:
            changes.append(f"{key} was {old.get(name)}, is {new[name]}")
    return changes
