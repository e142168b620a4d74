"""From a model to a graph of operators, and the proof that what was made of the graph computes the same."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from zoo.tools.exporting.subject import Subject

__all__ = ["Comparison", "Images", "compare", "quiet", "trace"]

LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch.__trace", "onnxscript", "onnx_ir")
EXAMPLE_BATCH = 2  # a graph traced with one image would take one only


@dataclass(frozen=True)
class Images:
    """What images a file is for.

    Attributes:
        channels: Channels.
        size: Height and width in pixels.
        batch: Number of images, or None for any.
        any_size: Whether other heights and widths are taken too.
    """

    channels: int
    size: tuple[int, int]
    batch: int | None = None
    any_size: bool = False

    def samples(self) -> Iterator[Tensor]:
        """Random images of several shapes that the file has to take."""
        generator = torch.Generator().manual_seed(1)
        height, width = self.size
        others = [(height - height // 4, width + width // 3 + 1), (height + height // 2 - 3, width)]
        for size in [self.size, *(others if self.any_size else [])]:
            for batch in (1, 3) if self.batch is None else (self.batch,):
                yield torch.randn(batch, self.channels, *size, generator=generator)

    def __str__(self) -> str:
        batch = "any number of images" if self.batch is None else f"{self.batch} image{'s' * (self.batch > 1)}"
        size = "any size" if self.any_size else f"{self.size[0]} x {self.size[1]} pixels"
        return f"{batch} of {size} and {self.channels} channel{'s' * (self.channels > 1)}"


class Comparison(NamedTuple):
    """How close logits are.

    Attributes:
        difference: The largest difference; not a number if any logit is not.
        spread: Standard deviation of the logits.
    """

    difference: float
    spread: float


def trace(subject: Subject, images: Images) -> ExportedProgram:
    """The graph of a model's forward.

    Raises:
        ValueError: If the model does not take images of this size.
        RuntimeError: If it cannot be traced.
    """
    subject.model(torch.zeros(1, images.channels, *images.size))  # what it has to say about a size, it says here
    dynamic, size = {}, images.size
    if images.batch is None:
        dynamic[0] = torch.export.Dim("batch")
    if images.any_size:
        # Sizes of 1 are fixed in a graph, so there must be more than one cell or window along each side.
        size = tuple(2 * side - side // 8 for side in size)
        dynamic |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    example = torch.zeros(images.batch or EXAMPLE_BATCH, images.channels, *size)
    with quiet():
        return torch.export.export(subject.model, (example,), dynamic_shapes=(dynamic,))


def compare(subject: Subject, images: Images, run: Callable[[Tensor], Tensor]) -> Comparison:
    """Compares a model's logits with those of ``run`` on random images."""
    pairs = [(subject.model(x), run(x)) for x in images.samples()]
    difference = torch.stack([(given - expected).abs().max() for expected, given in pairs]).max()
    return Comparison(difference.item(), torch.cat([expected for expected, _ in pairs]).std().item())


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch says about its own affairs while it exports; errors still get through."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
