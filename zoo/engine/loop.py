"""The training loop of image classifiers, on Hugging Face Accelerate: one process, several GPUs, several nodes.

Every epoch starts from random numbers that depend only on the seed, the epoch and the process, so a run that was killed
at any moment and continued ends with the same weights as one that was not.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from zoo.config import TrainConfig
from zoo.data import BatchAugment, make_loader, open_split
from zoo.engine.build import build_loss, build_model, build_optimizer
from zoo.engine.checkpoint import Checkpoint, save_checkpoint, save_weights
from zoo.engine.evaluate import evaluate, explain_nonfinite
from zoo.engine.graph import capture_training
from zoo.engine.report import EpochMeter, RunReport
from zoo.engine.run_folder import find_start, prepare_output, read_log, write_log
from zoo.optional import require

__all__ = ["TrainResult", "train"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` achieved.

    Attributes:
        output: The run's folder.
        log: One dictionary per epoch, keys :data:`zoo.engine.run_folder.LOG_COLUMNS`.
        best: The row with the highest validation accuracy.
        trained: Number of epochs that this call trained; 0 if the run was finished before.
    """

    output: Path
    log: list[dict[str, float]]
    best: dict[str, float]
    trained: int


def train(config: TrainConfig) -> TrainResult:
    """Trains a classifier as configured, evaluating and saving after every epoch.

    The run's folder and its pictures are described in :mod:`zoo.engine.checkpoint` and :mod:`zoo.engine.report`.

    Args:
        config: See :class:`zoo.config.TrainConfig`.

    Returns:
        The log and where the files are.

    Raises:
        OSError: If the output folder cannot be written, or holds a run and ``resume`` is not set.
        ValueError: If data, model and configuration do not fit together.
        FloatingPointError: If the loss is not finite; the message names the first module whose output is not.
        KeyboardInterrupt: On Ctrl-C or SIGTERM; the last checkpoint is whole.
    """
    accelerator = require("accelerate").Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=config.cpu,
        gradient_accumulation_steps=config.optim.grad_accum,
    )
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    if device.type == "cpu" and config.precision != "fp32":
        _logger.warning("precision=%s is emulated on most CPUs and many times slower than fp32", config.precision)
    output = Path(config.output)
    checkpoint = find_start(config)
    if accelerator.is_main_process:
        prepare_output(output, config, checkpoint)

    random_seed(config.seed, rank=0)  # the same initial weights everywhere
    with accelerator.main_process_first():  # a download happens once
        train_data, class_names = open_split(config.data, config.data.train_split, training=True)
        val_data, _ = open_split(config.data, config.data.val_split, class_names=class_names)
    model, card = build_model(config, train_data, class_names)
    if checkpoint:
        model.load_state_dict(checkpoint.weights)
    model.to(device)

    shares = {"device": device, "seed": config.seed, "rank": rank, "world_size": world_size}
    train_loader = make_loader(train_data, card.preprocessing, config.data, augment=config.augment, **shares)
    val_loader = make_loader(val_data, card.preprocessing, config.data, **shares)
    augment = BatchAugment(
        card.preprocessing.mean,
        card.preprocessing.std,
        crop_padding=config.augment.crop_padding,
        flip=config.augment.flip,
        erase=config.augment.erase,
    ).to(device)
    mixup, criterion = build_loss(config, card.kwargs["num_classes"])

    updates = len(train_loader) // config.optim.grad_accum  # per epoch
    if not updates:
        raise ValueError(
            f"an epoch has {len(train_loader)} batches, fewer than optim.grad_accum={config.optim.grad_accum}; "
            "lower data.batch_size or optim.grad_accum"
        )
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    optimizer, scheduler = build_optimizer(config, model, updates)
    start, best = 0, None
    if checkpoint:
        start, best = checkpoint.training["epoch"], checkpoint.training["best"]
        _restore(checkpoint, optimizer, scheduler, ema, accelerator)
    log = [row for row in read_log(output) if row["epoch"] <= start]
    plain_model = model  # what is evaluated and saved: without the wrapper of several processes
    if config.compile:
        model.compile()
    if config.cuda_graph:
        if device.type != "cuda" or world_size > 1:
            raise ValueError(f"cuda_graph=true needs one GPU, not {world_size} processes on {device.type}")
        shape = (config.data.batch_size, card.preprocessing.in_chans, *card.preprocessing.size)
        capture_training(model, shape, config.precision)
    model, prepared_optimizer = accelerator.prepare(model, optimizer)

    evaluated = ema.module if ema else plain_model
    progress = _Progress(start * updates, config.optim.epochs * updates, accelerator.is_main_process)
    report = RunReport(config, card) if accelerator.is_main_process else None
    with _sigterm_as_interrupt(), progress, report or contextlib.nullcontext():
        for epoch in range(start, config.optim.epochs):
            began = time.perf_counter()
            random_seed(config.seed + epoch * world_size, rank)
            train_loader.set_epoch(epoch)
            model.train()
            total_loss, meter = torch.zeros((), device=device), EpochMeter()
            batches = islice(train_loader, updates * config.optim.grad_accum)
            for step, (images, labels) in enumerate(meter.watch(batches)):
                inputs, targets = _prepare_batch(images, labels, augment, mixup)
                with accelerator.accumulate(model):
                    logits = model(inputs).float()
                    loss = criterion(logits, targets)
                    if not torch.isfinite(loss):
                        raise FloatingPointError(_describe_failure(loss, epoch, step, plain_model, inputs, output))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and config.optim.clip_grad:
                        accelerator.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
                    prepared_optimizer.step()
                    prepared_optimizer.zero_grad()
                total_loss += loss.detach()
                meter.add(logits, targets)
                if accelerator.sync_gradients:
                    update = epoch * updates + (step + 1) // config.optim.grad_accum
                    if ema:
                        ema.update(plain_model, step=update)
                    lr = optimizer.param_groups[0]["lr"]
                    scheduler.step_update(update)
                    progress.advance(epoch, loss)

            steps = updates * config.optim.grad_accum
            train_loss = accelerator.reduce(total_loss, "mean").item() / steps
            train_seconds = time.perf_counter() - began
            scores = evaluate(
                evaluated, val_loader, augment.normalize, card.kwargs["num_classes"], precision=config.precision
            )
            row = {
                "epoch": epoch + 1,
                "lr": lr,  # of the last update
                "train_loss": train_loss,
                "train_top1": meter.top1(card.kwargs["num_classes"]),
                "val_loss": scores.loss,
                "top1": scores.top1,
                "top5": scores.top5,
                "images_per_second": steps * config.data.batch_size * world_size / train_seconds,
                "data_seconds": meter.data_seconds,
                "seconds": time.perf_counter() - began,
            }
            log.append(row)
            is_best = best is None or row["top1"] > best["top1"]
            best = row if is_best else best
            if accelerator.is_main_process:
                card = replace(card, epoch=epoch + 1, top1=scores.top1)
                write_log(output, log)
                if is_best:
                    save_weights(output / "best.safetensors", evaluated.state_dict(), card)
                save_weights(output / "last.safetensors", evaluated.state_dict(), card)
                state = _state(optimizer, scheduler, ema, accelerator, best)
                save_checkpoint(output, epoch + 1, plain_model.state_dict(), state, card)
                progress.report(row)
                report.after_epoch(log)
            accelerator.wait_for_everyone()
    accelerator.end_training()  # leaves the process group: a process that exits inside of it can abort
    if report:
        with _sigterm_as_interrupt():
            report.finish(evaluated, val_data, log, config.optim.epochs - start)
    return TrainResult(output, log, best, config.optim.epochs - start)


def _prepare_batch(images: Tensor, labels: Tensor, augment: BatchAugment, mixup: Mixup | None) -> tuple[Tensor, Tensor]:
    inputs = augment(images)
    return mixup(inputs, labels) if mixup else (inputs, labels)


def _describe_failure(loss: Tensor, epoch: int, step: int, model: nn.Module, inputs: Tensor, output: Path) -> str:
    place = f"the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}"
    kept = f"the weights of the last whole epoch are in {output}" if epoch else "no epoch was finished"
    advice = "try a lower optim.lr, optim.clip_grad, or precision=bf16 or fp32"
    return f"{place}: {explain_nonfinite(model, inputs)}; {kept}; {advice}"


def _state(
    optimizer: torch.optim.Optimizer, scheduler: Any, ema: ModelEmaV3 | None, accelerator: Any, best: dict[str, float]
) -> dict[str, Any]:
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "ema": ema.module.state_dict() if ema else None,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "best": best,
    }


def _restore(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, scheduler: Any, ema: ModelEmaV3 | None, accelerator: Any
) -> None:
    state = checkpoint.training
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if ema and state["ema"]:
        ema.module.load_state_dict(state["ema"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])


class _Progress:
    """One bar with the remaining time over all epochs, on a terminal; otherwise a line per epoch."""

    def __init__(self, done: int, total: int, is_main_process: bool) -> None:
        disable = None if is_main_process else True  # None shows it on a terminal only
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
            f"val loss {row['val_loss']:.4f}  top-1 {row['top1']:.2f} %  {row['images_per_second']:.0f} images/s"
        )
        with require("tqdm.contrib.logging").logging_redirect_tqdm([logging.getLogger()]):
            _logger.info(line)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treats SIGTERM (a job scheduler's stop) like Ctrl-C: the loop ends there, what is on disk stays whole."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
