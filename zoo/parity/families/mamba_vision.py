"""MambaVision: its mixer, the classifier, and the backbone of dense prediction."""

import torch
from torch import Tensor

from zoo.backbones.mamba_vision import MambaVisionMixer, from_upstream, upstream_names_to_ours
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a case of any of the authors' classes."""
    return _mixer(case) if case.class_name == "MambaVisionMixer" else _model(case)


def _mixer(case: Case) -> dict[str, Tensor]:
    """Output, and the tokens' gradient of sum(y^2)."""
    kwargs = case.kwargs
    mixer = MambaVisionMixer(kwargs.pop("d_model"), **kwargs)
    mixer.load_state_dict(upstream_names_to_ours(case.group("state")))
    x = case.inputs()["x"]
    y = mixer.to(case.device, case.dtype)(x)
    y.square().sum().backward()
    return {"output.y": y, "grad.x": x.grad}


def _model(case: Case) -> dict[str, Tensor]:
    """Features of all stages, for a classifier also the pooled feature and logits; the image's gradient.

    The gradient is of the sum of the squared logits, or of the squared features where there is no classifier.
    """
    model = case.load(from_upstream(case.class_name, case.kwargs))
    image = case.inputs()["image"]
    final, features = model.forward_intermediates(image)
    outputs = {f"output.features{i}": feature for i, feature in enumerate(features)}
    if "out_indices" not in case.kwargs:
        outputs["output.pooled"] = model.pool(final)
        outputs["output.logits"] = model.forward_head(final)
    scored = [outputs["output.logits"]] if "output.logits" in outputs else features
    torch.stack([x.square().sum() for x in scored]).sum().backward()
    return {**outputs, "grad.input": image.grad}
