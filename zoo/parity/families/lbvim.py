"""LBVim: its scan, the classifier, and the segmentation backbone."""

import torch
from torch import Tensor, nn

from zoo.backbones.lbvim import LBVim, from_upstream
from zoo.kernels import selective_scan_fn
from zoo.parity.case import Case
from zoo.parity.families.selective_scan import run_scan

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a case of the scan or of any of the authors' classes."""
    if case.mode == "op":
        return _scan(case)
    if case.class_name != "BiVisionMamba":
        raise ValueError(f"no builder for {case.class_name!r}")
    return _dense(case) if "out_indices" in case.kwargs else _classifier(case)


def _scan(case: Case) -> dict[str, Tensor]:
    """Output with and without gate, last state, the plain scan's output, and gradients of sum(out * dout)."""
    results = run_scan(case, "dout")
    inputs = case.inputs()
    inputs.pop("dout")
    softplus, window = case.kwargs["delta_softplus"], case.kwargs["window"]
    with torch.no_grad():
        plain = selective_scan_fn(**inputs, delta_softplus=softplus)
        inputs.pop("z", None)
        ungated = selective_scan_fn(**inputs, delta_softplus=softplus, window=window)
    return {**results, "output.plain_scan_out": plain, "output.y_pregate": ungated}


def _as_read(model: LBVim, index: int, tokens: Tensor) -> Tensor:
    """Tokens (B, L, D) in the order in which a block, or the norm after the last one, gets them from the authors."""
    return tokens.flip(1) if model.alternate and index % 2 else tokens


def _classifier(case: Case) -> dict[str, Tensor]:
    """Tokens, feature, logits, every block's stream and output, and the image's gradient of sum(logits^2)."""
    model = case.load(from_upstream(case.kwargs))
    outputs = {}

    def record(index: int) -> None:
        def hook(block: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[f"output.residual{index}"] = _as_read(model, index, args[0])
            outputs[f"output.hidden{index}"] = _as_read(model, index, output)

        model.blocks[index].register_forward_hook(hook)

    for index in range(len(model.blocks)):
        record(index)
    image = case.inputs()["image"]
    tokens = model.forward_features(image)
    outputs["output.tokens"] = _as_read(model, len(model.blocks), tokens)
    outputs["output.features"] = model.pool(tokens)
    outputs["output.logits"] = model.forward_head(tokens)
    outputs["output.logits"].square().sum().backward()
    return {**outputs, "grad.input": image.grad}


def _dense(case: Case) -> dict[str, Tensor]:
    """Mixer outputs as the authors' backbone for segmentation returns them, and the gradient of a weighted sum."""
    model = case.load(from_upstream(case.kwargs))
    image = case.inputs()["image"]
    features = model.forward_intermediates(image, case.kwargs["out_indices"], intermediates_only=True)
    loss = 0
    for feature in features:
        weights = torch.linspace(-1, 1, feature.numel(), device=case.device, dtype=torch.float32)
        loss = loss + (feature * weights.view(feature.shape)).sum()
    loss.backward()
    outputs = {f"output.features{i}": feature for i, feature in enumerate(features)}
    return {**outputs, "grad.input": image.grad}
