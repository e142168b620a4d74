"""Training steps of small models without waiting for the host, which issues kernels slower than a GPU runs them."""

import torch
from torch import Tensor, nn

from zoo.engine.evaluate import autocast

__all__ = ["capture_training"]


def capture_training(model: nn.Module, shape: tuple[int, ...], precision: str, *others: Tensor) -> None:
    """Captures a model's forward and backward of training in CUDA graphs, which its calls in training mode replay.

    Parameters, buffers and gradients stay the model's own; calls in evaluation mode run as before. Random numbers, as
    of stochastic depth, follow the device's generator.

    Args:
        model: Model on a GPU, neither compiled nor wrapped.
        shape: Of all batches, (B, C, H, W).
        precision: ``fp32``, ``bf16`` or ``fp16``, as it will be trained.
        *others: What the model is called with besides, as targets: tensors like those of all batches.
    """
    training = model.training
    images = torch.randn(shape, device=next(model.parameters()).device)
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]  # warming up moves running statistics
    # Warming up, capturing and training have a stream each; torch would warn of it in every run, first while capturing.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # A weight that autocast narrowed once and kept would be what every replay reads.
    with autocast(images.device, precision, keep_weights=False):
        torch.cuda.make_graphed_callables(model.train(), (images, *others), allow_unused_input=True)
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
    model.train(training)
