"""Accuracy of a classifier, and why its output is not finite."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.data import FileLoader, TensorLoader
from zoo.engine.class_balance import ClassBalance
from zoo.optional import require

__all__ = ["Evaluation", "autocast", "evaluate", "explain_nonfinite"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """Scores over a whole data set.

    Attributes:
        loss: Mean cross-entropy, without label smoothing.
        top1: Percentage of images whose first guess is right.
        top5: Percentage of images whose first five guesses hold the right class.
    """

    loss: float
    top1: float
    top5: float


def autocast(device: torch.device, precision: str, keep_weights: bool = True) -> contextlib.AbstractContextManager:
    """Returns the context of automatic mixed precision.

    Args:
        device: Where the model is.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        keep_weights: Whether a weight that was narrowed is kept until the context ends.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision], cache_enabled=keep_weights)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: TensorLoader | FileLoader,
    normalize: Callable[[Tensor], Tensor],
    num_classes: int,
    precision: str = "fp32",
    balance: ClassBalance | None = None,
) -> Evaluation:
    """Runs a model over a data set; under several processes each runs its share and all get the total.

    Args:
        model: Maps (B, C, H, W) to logits (B, num_classes).
        loader: Yields uint8 images and labels on the model's device.
        normalize: Maps uint8 images to the model's input.
        num_classes: Number of classes.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        balance: Scores that are to be gathered too.

    Raises:
        ValueError: If the loader yields nothing, or a label that is not a class.
    """
    metrics = require("torchmetrics")
    classification = require("torchmetrics.classification")
    device = next(model.parameters()).device
    settings = {"num_classes": num_classes, "validate_args": False}
    loss = metrics.MeanMetric().to(device)
    top1 = classification.MulticlassAccuracy(average="micro", **settings).to(device)
    top5 = classification.MulticlassAccuracy(top_k=min(5, num_classes), average="micro", **settings).to(device)

    model.eval()
    seen, largest = 0, torch.zeros((), dtype=torch.long, device=device)
    for images, labels in loader:
        with autocast(device, precision):
            logits = model(normalize(images))
        logits = logits.float()
        seen += len(labels)
        largest = torch.maximum(largest, labels.max())
        labels = labels.clamp(max=num_classes - 1)  # reported below, without waiting for the device in every step
        loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        top1.update(logits, labels)
        top5.update(logits, labels)
        if balance:
            balance.update(logits, labels)
    if not seen:
        raise ValueError("there are no images to evaluate")
    if largest >= num_classes:
        raise ValueError(f"the data has the label {int(largest)}, but the model knows {num_classes} classes (from 0)")
    return Evaluation(
        loss=loss.compute().item(),
        top1=100 * top1.compute().item(),
        top5=100 * top5.compute().item(),
    )


@torch.no_grad()
def explain_nonfinite(model: nn.Module, inputs: Tensor) -> str:
    """Runs a batch again and says where the first NaN or infinity appears.

    Args:
        model: The model whose loss was not finite.
        inputs: The batch that it saw.

    Returns:
        A sentence that names the inputs, a parameter, or the first module with a non-finite output.
    """
    if not inputs.isfinite().all():
        return "the input images are not finite"
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name!r} is not finite, so an earlier update was already wrong"

    for module in model.modules():
        module.__dict__.pop("forward", None)  # a captured graph, which calls no hooks

    found: list[str] = []

    def look(name: str, module: nn.Module, output: object) -> None:
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        if any(torch.is_tensor(tensor) and not tensor.isfinite().all() for tensor in tensors):
            found.append(f"the first module with a non-finite output is {name!r} ({type(module).__name__})")

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name or "the model", module, output))
        for name, module in model.named_modules()
    ]
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "every module's output is finite when the batch is run again: the loss overflowed"
