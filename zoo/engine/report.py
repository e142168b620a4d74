"""What a run shows of itself while it trains and when it is finished.

A run's folder holds, besides what :mod:`zoo.engine.checkpoint` lists and what the task makes of the best weights::

    curves.png       loss, scores and learning rate over the epochs, drawn while the run trains
    tensorboard/     the log as TensorBoard reads it, if asked for

All of it follows from the log, the best weights and the validation data. Nothing here draws a random number or is
needed to continue a run, and what cannot be made is reported and does not stop it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from zoo.config import TrainConfig
from zoo.engine.figures import can_draw, draw_curves
from zoo.engine.task import Task
from zoo.optional import require

__all__ = ["RunReport", "StopWatch", "TensorBoardLog"]

_logger = logging.getLogger(__name__)

WAITING_SHARE = 0.2  # of an epoch, beyond which waiting for data is reported
DRAWING_SHARE = 0.05  # of the time, at most, goes into drawing curves

Log = Sequence[dict[str, float]]


@dataclass
class StopWatch:
    """Where the time of an epoch of training goes.

    Attributes:
        train_seconds: All of it.
        data_seconds: How long batches were waited for. The host's clock: where it runs ahead of the device, as it does
            not while every loss is looked at, part of that time is hidden behind the device's work.
    """

    train_seconds: float = 0.0
    data_seconds: float = 0.0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches and measures how long each is waited for, the start of worker processes included."""
        began = time.perf_counter()
        for batch in batches:
            waited = time.perf_counter()
            self.data_seconds += waited - began
            yield batch
            self.train_seconds += time.perf_counter() - began
            began = time.perf_counter()


class RunReport:
    """The pictures and tables of a run, for its main process. A context: leaving it closes what is open.

    Args:
        config: The complete configuration.
        task: What is trained.
    """

    def __init__(self, config: TrainConfig, task: Task) -> None:
        self.config = config
        self.task = task
        self.output = Path(config.output)
        self.can_draw = can_draw(warn=True)
        self.tensorboard = _open_tensorboard(self.output) if config.tensorboard else None
        self.next_drawing = 0.0
        self.said: set[str] = set()

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: object) -> None:
        if self.tensorboard:
            self.tensorboard.close()

    def after_epoch(self, log: Log) -> None:
        """Reports a finished epoch: a warning if it was spent waiting, the curves, TensorBoard.

        Args:
            log: All rows up to this epoch.
        """
        self._warn_of_waiting(log[-1])
        if self.tensorboard:
            self._attempt("the log for TensorBoard", lambda: self.tensorboard.add(log))
        began = time.monotonic()
        if began >= self.next_drawing or log[-1]["epoch"] >= self.config.optim.epochs:
            self._draw_curves(log)
            now = time.monotonic()
            self.next_drawing = now + (now - began) / DRAWING_SHARE

    def finish(self, model: nn.Module, log: Log, trained: int) -> None:
        """Makes what a finished run leaves, of its best weights; what is there and up to date stays.

        Args:
            model: On its device, without a wrapper; the best weights are loaded into it.
            log: All rows.
            trained: How many epochs this call of the training loop has trained.
        """
        if log and _is_older(self.output / "curves.png", self.output / "log.csv"):
            self._draw_curves(log)
        weights = self.output / "best.safetensors"
        if not weights.exists():  # continued from another run's checkpoint and never better than it
            weights = self.output / "last.safetensors"
        if trained > 0 or any(_is_older(self.output / name, weights) for name in self.task.report_files()):
            self._attempt("the report of the best weights", lambda: self._report_weights(weights, model))

    def _report_weights(self, weights: Path, model: nn.Module) -> None:
        model.load_state_dict(load_file(weights))
        model.eval()
        self.task.report(model, weights, self._attempt)
        made = [name for name in self.task.report_files() if not _is_older(self.output / name, weights)]
        if made:
            _logger.info("Report of the %s weights in %s: %s", weights.stem, self.output, ", ".join(made))

    def _draw_curves(self, log: Log) -> None:
        task, epochs = self.task, f"{log[-1]['epoch']} of {self.config.optim.epochs} epochs"
        title = f"{task.card.model} on {task.card.data}, {epochs}"
        if self.can_draw:
            path = self.output / "curves.png"
            self._attempt("curves.png", lambda: draw_curves(log, path, title, task.panels, task.goal))

    def _warn_of_waiting(self, row: dict[str, float]) -> None:
        if row["data_seconds"] <= WAITING_SHARE * row["seconds"] or "waiting" in self.said:
            return
        self.said.add("waiting")
        waited = f"waited for its data for {row['data_seconds']:.1f} of its {row['seconds']:.1f} s"
        _say(f"Epoch {row['epoch']} {waited}; {self.task.advice_on_waiting()}")

    def _attempt(self, what: str, make: Callable[[], None]) -> None:
        """Makes something, or says once why it could not be made: a run is worth more than its pictures."""
        try:
            make()
        except Exception as error:  # drawing and writing can fail in many ways: a full disk, a strange class name
            if what not in self.said:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                _say(f"Not made: {what} ({reason}); training is not affected")
            self.said.add(what)


class TensorBoardLog:
    """Writes a run's log for TensorBoard, into the folder ``tensorboard`` of the run.

    A run that is continued writes its whole log again and takes the earlier records back, so that no epoch is missing
    and none is shown twice.

    Args:
        output: The run's folder.

    Raises:
        ModuleNotFoundError: If the package ``tensorboard`` is not installed.
    """

    def __init__(self, output: Path) -> None:
        require("tensorboard")  # torch's error would not say how to install it
        self.writer_type = require("torch.utils.tensorboard").SummaryWriter
        self.folder = output / "tensorboard"
        self.writer: Any = None

    def add(self, log: Log) -> None:
        """Writes the newest row; the first call writes all of them."""
        rows = log[-1:]
        if self.writer is None:
            rows = log
            self.writer = self.writer_type(self.folder, purge_step=int(log[0]["epoch"]))
        now = time.time() - sum(row["seconds"] for row in rows)
        for row in rows:
            now += row["seconds"]
            for column, value in row.items():
                if column != "epoch":
                    self.writer.add_scalar(_tag(column), value, row["epoch"], walltime=now)
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.writer is not None:
            self.writer.close()


def _tag(column: str) -> str:
    """TensorBoard's group for a column, and its name."""
    if column.endswith("loss"):
        return f"loss/{column}"
    group = "training" if column in ("lr", "images_per_second", "data_seconds", "seconds") else "scores"
    return f"{group}/{column}"


def _open_tensorboard(output: Path) -> TensorBoardLog | None:
    try:
        return TensorBoardLog(output)
    except ImportError as error:
        _logger.warning("tensorboard=true has no effect: %s", error)
        return None


def _is_older(path: Path, source: Path) -> bool:
    """Whether a file was made before what it is made from, or never."""
    return not path.exists() or (source.exists() and path.stat().st_mtime < source.stat().st_mtime)


def _say(line: str) -> None:
    """Logs a warning without breaking the progress bar."""
    with require("tqdm.contrib.logging").logging_redirect_tqdm([logging.getLogger()]):
        _logger.warning(line)
