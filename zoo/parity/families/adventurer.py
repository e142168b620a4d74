"""Adventurer: the classifier with the output of every block."""

from torch import Tensor, nn

from zoo.backbones.adventurer import from_upstream
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Feature, logits, every block's output, and the image's gradient of sum(logits^2)."""
    if case.class_name != "Adventurer":
        raise ValueError(f"no builder for {case.class_name!r}")
    model = case.load(from_upstream(case.kwargs))
    outputs = {}

    def record(index: int) -> None:
        def hook(block: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            outputs[f"output.block{index}"] = output

        model.blocks[index].register_forward_hook(hook)

    for index in range(len(model.blocks)):
        record(index)
    image = case.inputs()["image"]
    tokens = model.forward_features(image)
    logits = model.forward_head(tokens)
    logits.square().sum().backward()
    return {
        **outputs,
        "output.features": model.pool(tokens),
        "output.logits": logits,
        "grad.input": image.grad,
    }
