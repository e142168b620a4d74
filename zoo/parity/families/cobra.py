"""Cobra: its three connectors, and connector and Mamba language model with the loss."""

import torch
from torch import Tensor

from zoo.heads.registry import create_head
from zoo.heads.vlm import VisionLanguageModel, convert_connector, create_decoder, mamba_config
from zoo.parity.case import Case

__all__ = ["run"]

CONNECTORS = {
    "FusedMLPProjector": "fused_mlp_connector",
    "FusedLDPProjector": "ldp_connector",
    "MLPProjector": "mlp_connector",
}
ARCHITECTURES = {"fused-gelu-mlp": "fused_mlp_connector", "gelu-mlp": "mlp_connector", "fused-ldpnet": "ldp_connector"}


def run(case: Case) -> dict[str, Tensor]:
    """Tokens of a connector and the features' gradient of their squared sum, or logits and loss of the model."""
    if case.class_name == "CobraVLM.forward":
        return _model(case)
    if case.class_name not in CONNECTORS:
        raise ValueError(f"no builder for {case.class_name!r}")
    sizes = case.kwargs
    connector = create_head(CONNECTORS[case.class_name], sizes.pop("vision_dim"), sizes.pop("llm_dim"), **sizes)
    state = {f"projector.{name}": tensor for name, tensor in case.group("state").items()}
    connector = case.load(connector, convert_connector(state))
    patches = case.inputs()["patches"]
    out = connector(patches)
    out.square().sum().backward()
    return {"output.out": out, "grad.input.patches": patches.grad}


def _model(case: Case) -> dict[str, Tensor]:
    """Rows with an image come first in the expected logits, then those without."""
    kwargs = case.kwargs
    width = kwargs["d_model"]
    connector = create_head(ARCHITECTURES[kwargs["arch"]], kwargs["vision_dim"], width)
    fields = {name: kwargs[name] for name in ("d_model", "n_layer", "vocab_size", "rms_norm")}
    config = mamba_config({**fields, "norm_epsilon": kwargs["norm_eps"], "ssm_cfg": {"d_state": kwargs["d_state"]}})
    model = case.load(VisionLanguageModel(None, connector, create_decoder(config)))
    inputs = case.inputs()
    with_image = inputs["multimodal_indices"]
    rows = torch.arange(len(inputs["input_ids"]), device=with_image.device)
    order = torch.cat([with_image, rows[~torch.isin(rows, with_image)]])
    output = model(
        inputs["input_ids"][order],
        labels=inputs["labels"][order],
        image_features=inputs["patch_features"][with_image],
        image_counts=[int(position < len(with_image)) for position in range(len(rows))],
        all_logits=True,
    )
    return {"output.logits": output.logits, "output.loss": output.loss[None]}
