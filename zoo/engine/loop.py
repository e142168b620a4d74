"""The training loop of every task, on Hugging Face Accelerate: one process, several GPUs, several nodes.

The random numbers of a batch depend only on the seed, the batch and the process, so a run that was killed at any moment
and continued ends with the same weights as one that was not. Those of order and augmentation do not even depend on the
number of processes, only on how many images they see at a time together; so neither do the losses. What draws its own
numbers in each process is the exception: dropout, stochastic depth, shuffled scans, pairs that are mixed; and so are
statistics of a batch.
"""

import contextlib
import copy
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed
from torch import Tensor, nn

from zoo.config import TrainConfig
from zoo.engine.build import build_optimizer
from zoo.engine.checkpoint import Checkpoint, ModelCard, save_checkpoint, save_weights
from zoo.engine.distributed import (
    StopRequest,
    explain_lost_process,
    on_main_process,
    raise_together,
    same_everywhere,
    share_buffers,
    start_processes,
)
from zoo.engine.memory import BatchTrial, advise_batch_size, is_out_of_memory, resized, try_batch_sizes
from zoo.engine.report import RunReport, StopWatch
from zoo.engine.run_folder import find_start, prepare_output, read_log, write_log
from zoo.engine.sharding import MovingAverage, fill_whole, scatter, shard, whole
from zoo.engine.task import Batches, Place, Task, find_task
from zoo.optional import require

__all__ = ["TrainResult", "find_batch_size", "train"]

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
    The run's folder and its pictures are described in :mod:`zoo.engine.checkpoint` and :mod:`zoo.engine.report`; all
    processes have to see the same folder. An error that all processes know of is raised in the main one, and the others
    exit with status 1.

    Args:
        config: See :mod:`zoo.config`.

    Returns:
        The log and where the files are.

    Raises:
        OSError: If the output folder cannot be written, or holds a run and ``resume`` is not set.
        ValueError: If data, model and configuration do not fit together.
        FloatingPointError: If the loss is not finite; the message names the first module whose output is not.
        MemoryError: If a batch does not fit into the device's memory; the message says which batch size would.
        ConnectionError: If another process has ended.
        KeyboardInterrupt: On Ctrl-C; a second one does not wait for the state to be saved.
    """
    accelerator, place = start_processes(config)
    with explain_lost_process(place.world_size > 1):
        return _train(config, accelerator, place)


def _train(config: TrainConfig, accelerator: Any, place: Place) -> TrainResult:
    if place.device.type == "cpu" and config.precision != "fp32":
        _logger.warning("precision=%s is emulated on most CPUs and many times slower than fp32", config.precision)
    checkpoint = find_start(config)
    _check_start(config, place, checkpoint)
    on_main_process(lambda: prepare_output(Path(config.output), config, checkpoint))
    task = _open_task(config, accelerator, place)
    run = _Run(config, accelerator, task, checkpoint)
    stop = StopRequest(accelerator)
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
        report.finish(run.evaluated.to(place.device), run.log, run.trained)
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    return TrainResult(Path(config.output), run.log, run.best, run.trained, task.goal, task.goal_label, complete)


def find_batch_size(config: TrainConfig, limit: int) -> Iterator[BatchTrial]:
    """Tries updates of 2, 4, 8, ... images in one process until one does not fit. Nothing is saved.

    Args:
        config: See :mod:`zoo.config`; the images are those of its first batch, repeated.
        limit: Largest number of images. It matters without a GPU: an operating system that has no memory left may end
            processes instead of refusing them memory.

    Raises:
        ValueError: If there are several processes, or data, model and configuration do not fit together.
    """
    config = replace(config, cuda_graph=False)  # whose memory is of one batch size
    accelerator, place = start_processes(config)
    if place.world_size > 1:
        raise ValueError(f"batch sizes are tried in one process, not in {place.world_size}")
    task = _open_task(config, accelerator, place)
    run = _Run(config, accelerator, task, None)
    run.model.train()
    batch = next(_batches(task.train_loader, 0, 1))
    return try_batch_sizes(lambda count: run.learn_alone(resized(batch, count)), place.device, limit)


def _open_task(config: TrainConfig, accelerator: Any, place: Place) -> Task:
    random_seed(config.seed, rank=0)  # the same initial weights everywhere
    with accelerator.local_main_process_first():  # a download happens once on every machine
        return find_task(config.task)(config, place)


def _check_start(config: TrainConfig, place: Place, checkpoint: Checkpoint | None) -> None:
    """Makes sure that all processes continue from the same state, and with batches of the same size."""
    state = checkpoint.training if checkpoint else {}
    if not same_everywhere((state.get("epoch"), state.get("update"))):
        raise ValueError(
            f"the processes do not see the same checkpoint in {config.output}; it has to be a folder that all machines "
            f"share. Process {place.rank} sees {checkpoint.path if checkpoint else 'none'}"
        )
    images = config.data.batch_size * place.world_size
    if state.get("update") and state["images"] != images:
        raise ValueError(
            f"{checkpoint.path} was saved within an epoch whose batches have {state['images']} images over all "
            f"processes, not {images}: change data.batch_size, or continue from the end of an epoch with resume=PATH"
        )


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
        self.updates = config.optim.epoch_updates or len(task.train_loader) // config.optim.grad_accum
        self._check_epoch()
        self._build(checkpoint)
        self.epoch, self.update, self.trained, self.lr = 0, 0, 0, 0.0
        self.best: dict[str, float] | None = None
        self._reset_sums()
        if checkpoint:
            self._restore(checkpoint.training)
        self.log = [row for row in read_log(self.output) if row["epoch"] <= self.epoch]
        done, total = self.epoch * self.updates + self.update, config.optim.epochs * self.updates
        self.progress = _Progress(done, total, task.goal, accelerator.is_main_process)

    def _check_epoch(self) -> None:
        if not self.updates:
            raise ValueError(
                f"an epoch has {len(self.task.train_loader)} batches, fewer than "
                f"optim.grad_accum={self.config.optim.grad_accum}; lower data.batch_size or optim.grad_accum"
            )

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Makes the moving average, the optimizer and what is run, with the weights of a checkpoint if there is one."""
        config, place = self.config, self.task.place
        self.sharded = config.strategy == "fsdp" and place.world_size > 1
        if checkpoint:
            self.model.load_state_dict(checkpoint.weights)
        if not self.sharded:
            self.model.to(place.device)
        self.ema = MovingAverage(self.model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        if self.ema and checkpoint and checkpoint.training["ema"]:
            self.ema.module.load_state_dict(checkpoint.training["ema"])
        self.evaluated = self.ema.module if self.ema else self.model
        self.step: nn.Module = _LossOf(self.task, self.model)
        if self.sharded:
            self.evaluated = copy.deepcopy(self.evaluated)  # as only the forward of a divided model can be called
            shard(self.step, place.device)
            if self.ema:
                shard(self.ema.module, place.device)
        self.optimizer, self.scheduler = build_optimizer(config, self.model, self.updates, place.world_size)
        if config.compile:
            self.model.compile()
        if config.cuda_graph:
            self._capture()
        if self.sharded:
            self.prepared = self.accelerator.prepare(self.optimizer)
        else:
            self.step, self.prepared = self.accelerator.prepare(self.step, self.optimizer)
        self.unsettled = place.world_size > 2 and not self.sharded

    def _capture(self) -> None:
        place = self.task.place
        if place.device.type != "cuda" or place.world_size > 1:
            raise ValueError(f"cuda_graph=true needs one GPU, not {place.world_size} processes on {place.device.type}")
        self.task.capture()

    def train_epoch(self, stop: StopRequest) -> bool:
        """Trains to the end of the epoch; returns False if it was asked to stop before, and has saved its state."""
        accumulated, first = self.config.optim.grad_accum, self._first_batch()
        self.model.train()
        self.task.begin(self.epoch, self.ema.module if self.ema else None)
        batches = _batches(self.task.train_loader, first, (self.updates - self.update) * accumulated)
        for number, batch in enumerate(self.watch.watch(batches), first):
            with self.accelerator.accumulate(self.step):
                self.loss_sum += self._learn_from(batch, number)
            if not self.accelerator.sync_gradients:
                continue
            self._finish_update()
            if stop.requested():
                self._save_state()
                return False
            every = self.config.checkpoint_every
            if every and self.update % every == 0 and self.update < self.updates:
                self._save_state()
        return True

    def _first_batch(self) -> int:
        """Number of the next batch, counted over all epochs. Whole passes leave out what does not fill an update."""
        accumulated = self.config.optim.grad_accum
        per_epoch = self.updates * accumulated if self.config.optim.epoch_updates else len(self.task.train_loader)
        return self.epoch * per_epoch + self.update * accumulated

    def _seed(self, batch: int) -> None:
        place, seed = self.task.place, self.config.seed * 1_000_003 + batch
        random_seed((seed * place.world_size + place.rank) % 2**32)
        place.generator.manual_seed(seed)

    def _learn_from(self, batch: Any, number: int) -> Tensor:
        """Adds the gradients of a batch, updates if it is the update's last, and returns the mean of all losses."""
        try:
            if self.unsettled:
                self._settle(batch)
            self._seed(number)
            with self.accelerator.autocast():
                loss = self.step(batch)
            mean = self.accelerator.reduce(loss.detach(), "mean")  # tells every process of another's infinity
            if not torch.isfinite(mean):
                raise_together(FloatingPointError(self._describe_failure(loss)))
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.config.optim.clip_grad:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
            self.prepared.step()
            self.prepared.zero_grad()
            return mean
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise MemoryError(self._describe_shortage(batch))  # not in the handler, where the batch's tensors still live

    def _settle(self, batch: Any) -> None:
        """Lets data parallelism see in which order gradients come, which leaves everything else as it is.

        From its second backward on, it adds them up in packets of that order, and the last bit of a sum of more than
        two depends on the packets. A continued run has to begin with those that it was interrupted with.
        """
        self.unsettled = False
        scores, buffers = self.task.train_state(), [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.accelerator.backward(self.step(batch))
        self.optimizer.zero_grad()
        self.task.reset_train_scores(scores)
        for buffer, value in buffers:
            buffer.copy_(value)

    def learn_alone(self, batch: Any) -> None:
        """Makes an update without the other processes: not to train, only to see whether there is memory for it."""
        with self.accelerator.autocast():
            loss = self.task.loss(self.model, batch)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # a backward would send them to the others
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

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
        train_loss = self.loss_sum.item() / steps
        model = self._model_to_evaluate()
        scores = {**self.task.train_scores(), **self.task.evaluate(model)}
        self._report_unreadable()
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
        card = replace(self.task.card, epoch=self.epoch, scores=scores)
        on_main_process(lambda: self._write_epoch(model, card, is_best))
        if self.sharded:
            self.evaluated.cpu()  # it would take room from training
        self._reset_sums()
        self._save_state()

    def _model_to_evaluate(self) -> nn.Module:
        """The weights to evaluate and keep, the same in every process, as an ordinary model."""
        if self.sharded:
            fill_whole(self.evaluated.to(self.task.place.device), self.ema.module if self.ema else self.model)
        share_buffers(self.evaluated)
        return self.evaluated

    def _write_epoch(self, model: nn.Module, card: ModelCard, is_best: bool) -> None:
        write_log(self.output, self.log)
        for name in ("best", "last") if is_best else ("last",):
            save_weights(self.output / f"{name}.safetensors", model.state_dict(), card)
        self.progress.report(self.log[-1])

    def _report_unreadable(self) -> None:
        """Names the images of the epoch that could not be read; loaders that go on without them have a list."""
        names = getattr(self.task.train_loader, "unreadable", list)()
        names = sorted(require("accelerate.utils").gather_object(names))
        if names:
            count = f"{len(names)} images could not be read and were replaced by others"
            shown = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
            _logger.warning("Epoch %d: %s: %s", self.epoch + 1, count, shown)

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
            "lr": self.lr,
            "loss_sum": self.loss_sum,
            "train_state": self.task.train_state(),
            "watch": asdict(self.watch),
            "images": self.config.data.batch_size * self.task.place.world_size,
        }
        weights, state = whole((self.model.state_dict(), state), keep=self.accelerator.is_main_process)
        on_main_process(lambda: save_checkpoint(self.output, self.epoch, self.update, weights, state, self.task.card))

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.update, self.best, self.lr = (state[name] for name in ("epoch", "update", "best", "lr"))
        self.optimizer.load_state_dict(scatter(state["optimizer"], self.optimizer))
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.update:
            self.loss_sum += state["loss_sum"].to(self.loss_sum.device)
            self.watch = StopWatch(**state["watch"])
            self.task.reset_train_scores(state["train_state"])

    def _describe_failure(self, loss: Tensor) -> str:
        """Says where the loss stopped being finite; every process has to call it, also one whose own loss is."""
        if self.sharded:
            fill_whole(self.evaluated.to(self.task.place.device), self.model)
            self.task.model = self.evaluated.train()
        reason = None
        if not torch.isfinite(loss):
            process = f" in process {self.task.place.rank}" if self.task.place.world_size > 1 else ""
            reason = f"the loss is {loss.item()}{process} in epoch {self.epoch + 1}, update {self.update + 1}"
            reason += f": {self.task.explain_failure()}"
        reason = next(filter(None, require("accelerate.utils").gather_object([reason])))
        kept = f"the weights of the last whole epoch are in {self.output}" if self.epoch else "no epoch was finished"
        advice = "try a lower optim.lr, optim.clip_grad, or precision=bf16 or fp32"
        return f"{reason}; {kept}; {advice}"

    def _describe_shortage(self, batch: Any) -> str:
        """Says which batch size would fit into memory; for this it makes updates that are no use."""
        self.optimizer.zero_grad()
        others_needed = self.task.place.world_size > 1 and (self.sharded or not self.task.loss_is_local)
        learn = None if others_needed else lambda count: self.learn_alone(resized(batch, count))
        size, accumulated = self.config.data.batch_size, self.config.optim.grad_accum
        return advise_batch_size(learn, self.task.place.device, size, accumulated)


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
