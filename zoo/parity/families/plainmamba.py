"""PlainMamba: the classifier with its feature maps, and the tables of its scans."""

import torch
from torch import Tensor

from zoo.backbones.plain_mamba import from_upstream
from zoo.backbones.scans.snake import snake, snake_moves
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a model, or makes the tables that a case names."""
    return _tables(case) if case.mode == "tables" else _model(case)


def _model(case: Case) -> dict[str, Tensor]:
    """Final tokens, feature maps, logits, and the image's gradient of sum(logits^2)."""
    kwargs = case.kwargs
    model = case.load(from_upstream(case.class_name, kwargs, case.spec.get("num_classes", 1000)))
    image = case.inputs()["image"]
    indices = kwargs.get("out_indices", [len(model.blocks) - 1])
    tokens, features = model.forward_intermediates(image, indices, norm=True)
    logits = model.forward_head(tokens)
    logits.square().sum().backward()
    maps = {f"output.features{i}": feature for i, feature in enumerate(features)}
    return {**maps, "output.tokens": tokens, "output.logits": logits, "grad.input": image.grad}


def _tables(case: Case) -> dict[str, Tensor]:
    """Orders, inverse orders and moves of every grid in the case."""
    outputs = {}
    for name in case.expected:
        kind, size = name.removeprefix("output.").split("_")
        H, W = map(int, size.split("x"))
        orders = snake(H, W)
        inverse = torch.argsort(orders, dim=1)
        outputs[name] = {"orders": orders, "inverse": inverse, "directions": snake_moves(H, W)}[kind]
    return outputs
