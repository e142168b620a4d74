"""How many images a device's memory holds in training: advice when a batch was too large, and the largest that fits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from zoo.optional import require

__all__ = ["BatchTrial", "advise_batch_size", "is_out_of_memory", "resized", "same_update", "try_batch_sizes"]

SMALL_BATCHES = (2, 4)  # whose memory tells what an image needs, and what is needed without any
MARGIN = 0.95  # of the memory that is free: it is not handed out without gaps

Learn = Callable[[int], None]


@dataclass(frozen=True)
class BatchTrial:
    """An update that was tried.

    Attributes:
        batch_size: Images.
        fits: Whether there was memory for it.
        images_per_second: Of a second update; NaN if it does not fit.
        peak_bytes: Largest memory in use, of a GPU; else 0.
    """

    batch_size: int
    fits: bool
    images_per_second: float = float("nan")
    peak_bytes: int = 0


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    return require("accelerate.utils.memory").should_reduce_batch_size(error)


def resized(batch: Any, count: int) -> Any:
    """A batch of as many samples, repeated or left out.

    Args:
        batch: Tensors (B, ...) and lists of B samples, in tuples and dictionaries; what else there is stays.
        count: Samples of the result.
    """
    if isinstance(batch, Tensor) and batch.ndim:
        return batch[torch.arange(count, device=batch.device) % len(batch)]
    if isinstance(batch, list):
        return [batch[index % len(batch)] for index in range(count)]
    if isinstance(batch, tuple):
        return tuple(resized(part, count) for part in batch)
    if isinstance(batch, Mapping):
        return {name: resized(part, count) for name, part in batch.items()}
    return batch


def same_update(batch_size: int, grad_accum: int, largest: int) -> tuple[int, int]:
    """Splits an update into more and smaller batches.

    Args:
        batch_size: Images per batch.
        grad_accum: Batches per update.
        largest: Images per batch at most.

    Returns:
        The largest batch size up to ``largest`` that divides the update, even if ``batch_size`` is (pairs are mixed),
        and the number of such batches in it.
    """
    images = batch_size * grad_accum
    fitting = [size for size in range(1, min(largest, batch_size) + 1) if images % size == 0]
    even = [size for size in fitting if size % 2 == 0] if batch_size % 2 == 0 else []
    size = max(even or fitting or [1])
    return size, images // size


def advise_batch_size(learn: Learn | None, device: torch.device, batch_size: int, grad_accum: int) -> str:
    """Says what to set after a batch did not fit.

    Args:
        learn: Makes an update from so many images, which measures what memory they need; None to go by halves.
        device: Where.
        batch_size: Images of the batch that did not fit.
        grad_accum: Batches per update.
    """
    cause = f"data.batch_size={batch_size} does not fit into the memory of this device"
    measured = None
    if learn and device.type == "cuda" and batch_size > max(SMALL_BATCHES):
        measured = _measure_largest(learn, device)
    largest = batch_size // 2 if measured is None else min(measured, batch_size - 1)
    less = "less is needed with grad_checkpointing=block, precision=bf16, or a smaller data.img_size"
    if largest < 1:
        return f"{cause}, and neither does a smaller one; {less}"
    size, count = same_update(batch_size, grad_accum, largest)
    estimate = "" if measured is None else f"; about {largest} images do"
    settings = f"data.batch_size={size} optim.grad_accum={count}"
    return f"{cause}{estimate}: set {settings}, which makes the same updates; {less}"


def _measure_largest(learn: Learn, device: torch.device) -> int:
    """Images whose update fits, from the memory of two small ones; 0 if not even these do."""
    try:
        learn(SMALL_BATCHES[0])  # after which the optimizer has its state
        few, more = (_peak(learn, count, device) for count in SMALL_BATCHES)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return 0
        raise
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device.index) * total  # a bare cuda is refused
    available = MARGIN * min(free + torch.cuda.memory_reserved(device), allowed)
    per_image = max(more - few, 1) / (SMALL_BATCHES[1] - SMALL_BATCHES[0])
    return int(SMALL_BATCHES[0] + (available - few) / per_image)


def _peak(learn: Learn, count: int, device: torch.device) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    learn(count)
    return torch.cuda.max_memory_allocated(device)


def try_batch_sizes(learn: Learn, device: torch.device, limit: int) -> Iterator[BatchTrial]:
    """Tries updates of 2, 4, 8, ... images up to a limit, until one does not fit.

    Args:
        learn: Makes an update from so many images.
        device: Where.
        limit: Largest number of images.
    """
    size = 2
    while size <= limit:
        trial = _try(learn, device, size)
        yield trial
        if not trial.fits:
            return
        size *= 2


def _try(learn: Learn, device: torch.device, size: int) -> BatchTrial:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        learn(size)  # kernels are compiled and memory is reserved
        began = perf_counter()
        learn(size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return BatchTrial(size, fits=False)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = perf_counter() - began
    return BatchTrial(size, True, size / seconds, torch.cuda.max_memory_allocated(device) if on_gpu else 0)
