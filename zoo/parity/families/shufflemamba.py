"""ShuffleMamba: both classifiers, shuffled training steps with stored orders, and the segmentation backbone."""

import torch
from torch import Tensor, nn

from zoo.backbones.layers.layer_shuffle import TokenOrder
from zoo.backbones.shuffle_mamba import ShuffleMamba, from_upstream
from zoo.parity.case import Case

__all__ = ["run"]


class StoredOrders(nn.Module):
    """Stands in for a model's ``layer_shuffle``: block i reads the tokens in row i of a table (n, L)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.orders = [TokenOrder(row, row.argsort()) for row in table.long()]

    def forward(self, x: Tensor) -> list[TokenOrder]:
        """The stored orders, whatever the tokens."""
        return self.orders


def run(case: Case) -> dict[str, Tensor]:
    """Runs a case of any of the authors' classes."""
    model = case.load(from_upstream(case.spec["class"], case.kwargs))
    image = case.inputs()["image"]
    outputs = _dense(case, model, image) if "out_indices" in case.kwargs else _classifier(case, model, image)
    return {**outputs, "grad.input": image.grad}


def _classifier(case: Case, model: ShuffleMamba, image: Tensor) -> dict[str, Tensor]:
    """Feature and logits, and where orders are stored the logits without them; gradients of sum(logits^2)."""
    outputs = {}
    if case.mode.lower() == "train":
        with torch.no_grad():
            outputs["output.logits_eval"] = model.eval()(image)
        model.train()
        model.layer_shuffle = StoredOrders(case.group("input")["perms"].to(case.device))
    tokens = model.forward_features(image)
    outputs["output.features"] = model.pool(tokens)
    outputs["output.logits"] = model.forward_head(tokens)
    outputs["output.logits"].square().sum().backward()
    return outputs


def _dense(case: Case, model: ShuffleMamba, image: Tensor) -> dict[str, Tensor]:
    """Mixer outputs, for the last block the normed stream instead; gradients of the sum of their squares."""
    indices = case.kwargs["out_indices"]
    features = model.forward_intermediates(image, indices, intermediates_only=True, source="mixer")
    if indices[-1] == len(model.blocks) - 1:
        features[-1:] = model.forward_intermediates(image, [indices[-1]], intermediates_only=True, norm=True)
    sum(feature.square().sum() for feature in features).backward()
    return {f"output.features{i}": feature for i, feature in enumerate(features)}
