"""Files of ``torch.export``, which keep this zoo's operators as nodes, and so its kernels."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zoo.tools.exporting.output import step
from zoo.tools.exporting.subject import Subject
from zoo.tools.exporting.tracing import Images, quiet, trace

__all__ = ["METADATA", "write_torch_export"]

METADATA = "metadata.json"  # the name under which ``extra_files`` of torch.export.load finds what ONNX files say, too


def write_torch_export(subject: Subject, images: Images, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a model's graph as ``.pt2``.

    Args:
        subject: Model.
        images: What images the file is for.
        path: File.

    Returns:
        A function that runs the file, loaded again.

    Raises:
        ValueError: If the model does not take such images.
        RuntimeError: If it cannot be traced.
    """
    with step("tracing the model"):
        program = trace(subject, images)
    with step("writing the file"), quiet():
        torch.export.save(program, path, extra_files={METADATA: json.dumps(subject.metadata(), indent=1)})
    with step("reading it again"), quiet():
        module = torch.export.load(path).module()

    def run(x: Tensor) -> Tensor:
        try:
            return module(x)
        except AssertionError as guard:
            shape = " x ".join(map(str, x.shape))
            raise ValueError(
                f"the graph is not for images of shape {shape}; leave out --dynamic-size ({guard})"
            ) from guard

    return run
