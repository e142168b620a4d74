"""LocalVim: the classifier, and the orders of its windows."""

import torch
from torch import Tensor, nn

from zoo.backbones.local_vim import from_upstream
from zoo.backbones.scans.window import window
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a model, or makes the tables that a case names."""
    return _tables(case) if case.mode == "tables" else _classifier(case)


def _classifier(case: Case) -> dict[str, Tensor]:
    """Features, logits, every block's stream and output, and the image's gradient of sum(logits^2)."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    outputs = {}

    def record(index: int) -> None:
        def hook(block: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[f"output.residual{index}"], outputs[f"output.hidden{index}"] = args[0], output

        model.blocks[index].register_forward_hook(hook)

    for index in range(len(model.blocks)):
        record(index)
    image = case.inputs()["image"]
    tokens = model.forward_features(image)
    outputs["output.features"] = model.pool(tokens)
    outputs["output.logits"] = model.forward_head(tokens)
    outputs["output.logits"].square().sum().backward()
    return {**outputs, "grad.input": image.grad}


def _tables(case: Case) -> dict[str, Tensor]:
    """Orders by windows of every grid and window size in the case."""
    outputs = {}
    for name in case.expected:
        _, grid, size = name.removeprefix("output.").split("_")
        H, W = map(int, grid.split("x"))
        outputs[name] = window(H, W, int(size.removeprefix("w")))[0].to(torch.int32)
    return outputs
