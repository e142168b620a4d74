"""From the configuration to the model, its loss, its optimizer and its schedule."""

import logging
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import Dataset

import zoo
from zoo.config import ClassificationConfig, OptimConfig, TrainConfig
from zoo.data import TensorData, resolve_preprocessing
from zoo.engine.checkpoint import ModelCard
from zoo.weights import load_features

__all__ = ["build_loss", "build_model", "build_optimizer", "lr_factor"]

FUSED = ("adam", "adamw")  # of timm's names for torch's optimisers

_logger = logging.getLogger(__name__)


def build_model(
    config: ClassificationConfig, data: TensorData | Dataset, class_names: tuple[str, ...] | None
) -> tuple[nn.Module, ModelCard]:
    """Creates the model for the data and writes down how.

    Args:
        config: The complete configuration.
        data: The training data, for its channels and normalisation.
        class_names: Its classes in label order; None if it does not tell, then ``model.num_classes`` has to be set.

    Returns:
        The model on the CPU, and its card.

    Raises:
        ValueError: If the number of classes is unknown or too small, or the start checkpoint does not fit.
    """
    num_classes = config.model.num_classes or len(class_names or ())
    if not num_classes:
        raise ValueError(f"the data {config.data.name} does not tell its classes; set model.num_classes")
    if class_names and num_classes < len(class_names):
        raise ValueError(f"model.num_classes is {num_classes}, but the data has {len(class_names)} classes")
    names = list(class_names or ())
    names += [str(index) for index in range(len(names), num_classes)]
    kwargs = {
        "num_classes": num_classes,
        "in_chans": data.images.shape[1] if isinstance(data, TensorData) else config.data.in_chans or 3,
        "drop_path_rate": config.model.drop_path,
        **config.model.kwargs,
    }
    model = zoo.create_model(config.model.name, pretrained=config.model.pretrained, **kwargs)
    if config.model.checkpoint:
        load_features(model, zoo.load_checkpoint(config.model.checkpoint))
    if config.grad_checkpointing:
        recompute(model, config.grad_checkpointing)
    preprocessing = resolve_preprocessing(config.data, data, model)
    return model, ModelCard(config.model.name, kwargs, tuple(names), preprocessing, data=config.data.name)


def recompute(model: nn.Module, scope: str) -> None:
    """Lets a model of ours or of timm compute activations again in the backward instead of keeping them.

    Args:
        model: The model.
        scope: ``block``, which all models know, or ``scan``.

    Raises:
        ValueError: If the model knows no such scope.
    """
    if scope == "block":
        model.set_grad_checkpointing()
        return
    try:
        model.set_grad_checkpointing(scope=scope)
    except TypeError as error:  # it has no scopes
        raise ValueError(f"{type(model).__name__} cannot recompute {scope!r}; use 'block'") from error


def build_loss(config: ClassificationConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Returns Mixup, which makes soft targets with the smoothing already in them, or None, and the loss."""
    augment = config.augment
    if config.loss == "bce":
        criterion = BinaryCrossEntropy(smoothing=augment.label_smoothing)  # which leaves soft targets as they are
    else:
        criterion = nn.CrossEntropyLoss(label_smoothing=augment.label_smoothing)
    if not (augment.mixup or augment.cutmix):
        return None, criterion
    mixup = Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        label_smoothing=augment.label_smoothing,
        num_classes=num_classes,
    )
    return mixup, criterion if config.loss == "bce" else nn.CrossEntropyLoss()


def lr_factor(config: TrainConfig, world_size: int) -> float:
    """What learning rates are multiplied by for the number of images per update, see ``optim.lr_batch_size``."""
    if config.optim.lr_batch_size is None:
        return 1.0
    images = config.data.batch_size * config.optim.grad_accum * world_size
    if images != config.optim.lr_batch_size:
        _logger.info(
            "Learning rates are those for %d images per update, scaled to %d", config.optim.lr_batch_size, images
        )
    return images / config.optim.lr_batch_size


def build_optimizer(
    config: TrainConfig, model: nn.Module, updates: int, world_size: int = 1
) -> tuple[torch.optim.Optimizer, Any]:
    """Builds the optimizer and its schedule.

    Args:
        config: The complete configuration.
        model: Whose parameters are optimised.
        updates: Updates per epoch.
        world_size: Number of processes.

    Returns:
        timm's optimizer with its weight-decay groups, and its schedule, which is stepped per update.
    """
    optim, factor = config.optim, lr_factor(config, world_size)
    lr = factor * optim.lr
    optimizer = create_optimizer_v2(
        _with_rates(model, optim),
        opt=optim.name,
        lr=lr,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
        **({"betas": tuple(optim.betas)} if optim.betas else {}),
        **({"fused": True} if _steps_in_one_kernel(config, model) else {}),
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=optim.schedule,
        num_epochs=optim.epochs - optim.cooldown_epochs,
        decay_milestones=optim.milestones,
        decay_rate=optim.power if optim.schedule == "poly" else optim.decay_rate,
        warmup_epochs=optim.warmup_epochs if optim.warmup_updates is None else optim.warmup_updates / updates,
        warmup_lr=lr / 100 if optim.warmup_lr is None else factor * optim.warmup_lr,
        min_lr=factor * optim.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return optimizer, scheduler


def _steps_in_one_kernel(config: TrainConfig, model: nn.Module) -> bool:
    """Whether torch's one kernel for all parameters runs: its loop keeps the host busy for milliseconds.

    Not with float16, where a step that overflows is left out inside it, unseen by the loop.
    """
    on_gpu = all(parameter.device.type == "cuda" for parameter in model.parameters())
    return on_gpu and config.optim.name in FUSED and config.strategy != "fsdp" and config.precision != "fp16"


def _with_rates(model: nn.Module, optim: OptimConfig) -> nn.Module | list[dict[str, Any]]:
    """The model, or the groups of its parameters where parts have learning rates of their own, in proportion to all."""
    if not optim.part_lr:
        return model
    proportions = {part: lr / optim.lr for part, lr in optim.part_lr.items()}
    groups = model.parameter_groups(proportions, optim.weight_decay)
    for group in groups:
        group["lr_scale"] = group.pop("lr")  # by which the schedule multiplies its rates
    return groups
