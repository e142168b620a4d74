"""The training loop of every task, on Hugging Face Accelerate: one process, several GPUs, several nodes.

The random numbers of a batch depend only on the seed, the batch and the process, so a run that was killed at any moment
and continued ends with the same weights as one that was not.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from zoo.config import TrainConfig
from zoo.engine.build import build_optimizer
from zoo.engine.checkpoint import Checkpoint, save_checkpoint, save_weights
from zoo.engine.report import RunReport, StopWatch
from zoo.engine.run_folder import find_start, prepare_output, read_log, write_log
from zoo.engine.task import Batches, Place, Task, find_task
from zoo.optional import require

__all__ = ["TrainResult", "train"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` achieved.

    Attributes:
        output: The run's folder.
        log: One dictionary per epoch.
        best: The row with the highest score; None if no epoch is finished.
        trained: Number of epochs that this call finished; 0 if the run was finished before.
        goal: The column of the score.
        goal_label: What it is called.
        complete: Whether all epochs are trained; if not, the run was asked to stop and can be continued.
    """

    output: Path
    log: list[dict[str, float]]
    best: dict[str, float] | None
    trained: int
    goal: str
    goal_label: str
    complete: bool


def train(config: TrainConfig) -> TrainResult:
    """Trains a model as configured, evaluating and saving after every epoch.

    On SIGTERM the state is saved after the update at hand and the function returns; Ctrl-C does the same and raises.
    The run's folder and its pictures are described in :mod:`zoo.engine.checkpoint` and :mod:`zoo.engine.report`.

    Args:
        config: See :mod:`zoo.config`.

    Returns:
        The log and where the files are.

    Raises:
        OSError: If the output folder cannot be written, or holds a run and ``resume`` is not set.
        ValueError: If data, model and configuration do not fit together.
        FloatingPointError: If the loss is not finite; the message names the first module whose output is not.
        KeyboardInterrupt: On Ctrl-C; a second one does not wait for the state to be saved.
    """
    accelerator = require("accelerate").Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=config.cpu,
        gradient_accumulation_steps=config.optim.grad_accum,
    )
    place = Place(accelerator.device, accelerator.process_index, accelerator.num_processes)
    if place.device.type == "cpu" and config.precision != "fp32":
        _logger.warning("precision=%s is emulated on most CPUs and many times slower than fp32", config.precision)
    checkpoint = find_start(config)
    if accelerator.is_main_process:
        prepare_output(Path(config.output), config, checkpoint)

    random_seed(config.seed, rank=0)  # the same initial weights everywhere
    with accelerator.main_process_first():  # a download happens once
        task = find_task(config.task)(config, place)
    run = _Run(config, accelerator, task, checkpoint)
    stop = _StopRequest(accelerator)
    report = RunReport(config, task) if accelerator.is_main_process else None
    with stop, run.progress, report or contextlib.nullcontext():
        while run.epoch < config.optim.epochs and run.train_epoch(stop):
            run.finish_epoch()
            if report:
                report.after_epoch(run.log)
            accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the process group: a process that exits inside of it can abort
    complete = run.epoch == config.optim.epochs
    if report and complete:
        report.finish(run.evaluated, run.log, run.trained)
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return TrainResult(Path(config.output), run.log, run.best, run.trained, task.goal, task.goal_label, complete)


class _Run:
    """The state of a run and how it moves on.

    Attributes:
        epoch: Number of finished epochs.
        update: Number of updates after them.
        log: Rows of the finished epochs.
        best: The one with the highest score.
        trained: How many of them this process has seen.
        evaluated: The model that is evaluated and kept: the moving average if there is one.
    """

    def __init__(self, config: TrainConfig, accelerator: Any, task: Task, checkpoint: Checkpoint | None) -> None:
        self.config = config
        self.accelerator = accelerator
        self.task = task
        self.output = Path(config.output)
        self.model = task.model
        if checkpoint:
            self.model.load_state_dict(checkpoint.weights)
        self.model.to(task.place.device)
        self.updates = config.optim.epoch_updates or len(task.train_loader) // config.optim.grad_accum
        self._check_epoch()
        self.ema = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.evaluated = self.ema.module if self.ema else self.model
        self.optimizer, self.scheduler = build_optimizer(config, self.model, self.updates)
        self.epoch, self.update, self.trained = 0, 0, 0
        self.best: dict[str, float] | None = None
        self._reset_sums()
        if checkpoint:
            self._restore(checkpoint.training)
        self.log = [row for row in read_log(self.output) if row["epoch"] <= self.epoch]
        if config.compile:
            self.model.compile()
        if config.cuda_graph:
            self._capture()
        self.step = _LossOf(task, self.model)
        self.step, self.prepared = accelerator.prepare(self.step, self.optimizer)
        done, total = self.epoch * self.updates + self.update, config.optim.epochs * self.updates
        self.progress = _Progress(done, total, task.goal, accelerator.is_main_process)

    def _check_epoch(self) -> None:
        if not self.updates:
            raise ValueError(
                f"an epoch has {len(self.task.train_loader)} batches, fewer than "
                f"optim.grad_accum={self.config.optim.grad_accum}; lower data.batch_size or optim.grad_accum"
            )

    def _capture(self) -> None:
        place = self.task.place
        if place.device.type != "cuda" or place.world_size > 1:
            raise ValueError(f"cuda_graph=true needs one GPU, not {place.world_size} processes on {place.device.type}")
        self.task.capture()

    def train_epoch(self, stop: "_StopRequest") -> bool:
        """Trains to the end of the epoch; returns False if it was asked to stop before, and has saved its state."""
        accumulated, first = self.config.optim.grad_accum, self._first_batch()
        self.model.train()
        batches = _batches(self.task.train_loader, first, (self.updates - self.update) * accumulated)
        for number, batch in enumerate(self.watch.watch(batches), first):
            self._seed(number)
            with self.accelerator.accumulate(self.step):
                self.loss_sum += self._learn_from(batch)
            if not self.accelerator.sync_gradients:
                continue
            self._finish_update()
            if self.update < self.updates:
                if stop.requested():
                    self._save_state()
                    return False
                if self.config.checkpoint_every and self.update % self.config.checkpoint_every == 0:
                    self._save_state()
        return True

    def _first_batch(self) -> int:
        """Number of the next batch, counted over all epochs. Whole passes leave out what does not fill an update."""
        accumulated = self.config.optim.grad_accum
        per_epoch = self.updates * accumulated if self.config.optim.epoch_updates else len(self.task.train_loader)
        return self.epoch * per_epoch + self.update * accumulated

    def _seed(self, batch: int) -> None:
        place = self.task.place
        random_seed(((self.config.seed * 1_000_003 + batch) * place.world_size + place.rank) % 2**32)

    def _learn_from(self, batch: Any) -> Tensor:
        loss = self.step(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._describe_failure(loss))
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and self.config.optim.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.prepared.step()
        self.prepared.zero_grad()
        return loss.detach()

    def _finish_update(self) -> None:
        self.update += 1
        total = self.epoch * self.updates + self.update
        if self.ema:
            self.ema.update(self.model, step=total)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step_update(total)
        self.progress.advance(self.epoch, self.loss_sum / (self.update * self.config.optim.grad_accum))

    def finish_epoch(self) -> None:
        """Evaluates, logs and saves."""
        began = time.perf_counter()
        steps = self.updates * self.config.optim.grad_accum
        train_loss = self.accelerator.reduce(self.loss_sum, "mean").item() / steps
        scores = {**self.task.train_scores(), **self.task.evaluate(self.evaluated)}
        images = steps * self.config.data.batch_size * self.task.place.world_size
        row = {
            "epoch": self.epoch + 1,
            "lr": self.lr,  # of the last update
            "train_loss": train_loss,
            **{column: scores[column] for column in self.task.columns},
            "images_per_second": images / self.watch.train_seconds,  # of training alone
            "data_seconds": self.watch.data_seconds,  # how long the main process waited for training batches
            "seconds": self.watch.train_seconds + time.perf_counter() - began,  # of training and evaluation
        }
        self.log.append(row)
        is_best = self.best is None or row[self.task.goal] > self.best[self.task.goal]
        self.best = row if is_best else self.best
        self.epoch, self.update, self.trained = self.epoch + 1, 0, self.trained + 1
        if self.accelerator.is_main_process:
            card = replace(self.task.card, epoch=self.epoch, scores=scores)
            write_log(self.output, self.log)
            if is_best:
                save_weights(self.output / "best.safetensors", self.evaluated.state_dict(), card)
            save_weights(self.output / "last.safetensors", self.evaluated.state_dict(), card)
            self.progress.report(row)
        self._reset_sums()
        self._save_state()

    def _reset_sums(self) -> None:
        self.loss_sum = torch.zeros((), device=self.task.place.device)
        self.watch = StopWatch()
        self.task.reset_train_scores()

    def _save_state(self) -> None:
        """Writes a checkpoint; every process has to call it."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "best": self.best,
            "loss_sum": self.accelerator.reduce(self.loss_sum, "mean").cpu(),
            "train_state": {name: tensor.cpu() for name, tensor in self.task.train_state().items()},
            "watch": asdict(self.watch),
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.output, self.epoch, self.update, self.model.state_dict(), state, self.task.card)

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.update, self.best = state["epoch"], state["update"], state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema and state["ema"]:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.update:
            self.loss_sum += state["loss_sum"].to(self.loss_sum.device)
            self.watch = StopWatch(**state["watch"])
            self.task.reset_train_scores(state["train_state"])

    def _describe_failure(self, loss: Tensor) -> str:
        place = f"the loss is {loss.item()} in epoch {self.epoch + 1}, update {self.update + 1}"
        kept = f"the weights of the last whole epoch are in {self.output}" if self.epoch else "no epoch was finished"
        advice = "try a lower optim.lr, optim.clip_grad, or precision=bf16 or fp32"
        return f"{place}: {self.task.explain_failure()}; {kept}; {advice}"


class _LossOf(nn.Module):
    """A task's loss as a module, for several processes and mixed precision are wrapped around a module's forward."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.task.loss(self.model, batch)


def _batches(loader: Batches, first: int, count: int) -> Iterator[Any]:
    """Yields so many batches of an endless row of passes, from the given one on."""
    while count > 0:
        epoch, begin = divmod(first, len(loader))
        loader.set_epoch(epoch, begin)
        taken = min(count, len(loader) - begin)
        yield from islice(loader, taken)
        first, count = first + taken, count - taken


class _Progress:
    """One bar with the remaining time over all epochs, on a terminal; otherwise a line per epoch."""

    def __init__(self, done: int, total: int, goal: str, is_main_process: bool) -> None:
        disable = None if is_main_process else True  # None shows it on a terminal only
        self.goal = goal
        self.bar = require("tqdm").tqdm(
            initial=done, total=total, unit="step", disable=disable, dynamic_ncols=True, smoothing=0.05
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self, epoch: int, loss: Tensor) -> None:
        if self.bar.update():  # true when the bar is redrawn: reading the loss waits for the device
            self.bar.set_description(f"epoch {epoch + 1}", refresh=False)
            self.bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    def report(self, row: dict[str, float]) -> None:
        line = (
            f"epoch {row['epoch']:3d}  lr {row['lr']:.2e}  train loss {row['train_loss']:.4f}  "
            f"{self.goal} {row[self.goal]:.2f}  {row['images_per_second']:.0f} images/s"
        )
        with require("tqdm.contrib.logging").logging_redirect_tqdm([logging.getLogger()]):
            _logger.info(line)


class _StopRequest:
    """Notes SIGTERM (a job scheduler's stop) and Ctrl-C, so that the loop stops where it can save its state.

    Attributes:
        signal: The signal that came, or None.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether any process was asked to stop; every process has to call it."""
        return self.accelerator.check_trigger()

    def _note(self, number: int, _: object) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second one
        self.signal = number
        self.accelerator.set_trigger()

    def __enter__(self) -> "_StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may set signal handlers
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
