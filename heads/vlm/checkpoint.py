"""Released checkpoints of Cobra (arXiv 2403.14520) and ML-Mamba (arXiv 2407.19832) under this package's names.

Their files hold connector and language model in sections, ``projector`` and ``llm_backbone``, in ML-Mamba also ``mlp``
and ``bidirectional_mamba``; vision towers come from timm and are not in them.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.backbones.layers.ssd import stack_ssd_parameters
from zoo.heads.vlm.decoder import convert_mamba_names

__all__ = ["checkpoint_filter_fn", "convert_connector", "flatten_sections"]

OURS = ("connector.", "language_model.", "vision.")
# Their names of connectors' parts, as patterns, and ours. The first that fits the beginning of a name is used.
CONNECTOR_NAMES = (
    (r"bidirectional_mamba\.layers\.", "blocks."),
    (r"bidirectional_mamba\.norm_f\.", "norm."),
    (r"mlp\.0\.", "proj.0."),
    (r"projector\.projector\.4\.peg\.0\.", "position."),
    (r"projector\.projector\.(\d+)\.", r"layers.\1."),
    (r"projector\.projector\.", "proj."),
)
BLOCK_MLP = {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}  # SwiGLU's gate, value and output in ML-Mamba, and in timm


def flatten_sections(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint of sections, ``{"projector": {...}, "llm_backbone": {...}}``, by dotted name."""
    flat = {}
    for name, value in checkpoint.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": tensor for inner, tensor in flatten_sections(value).items()})
        elif isinstance(value, Tensor):
            flat[name] = value
    return flat


def convert_connector(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A connector's weights from the sections ``projector``, ``mlp`` and ``bidirectional_mamba``."""
    scanned = any(name.startswith("bidirectional_mamba.") for name in state_dict)
    converted = {}
    for name, tensor in stack_ssd_parameters(state_dict).items():
        for pattern, ours in CONNECTOR_NAMES:
            renamed, found = re.subn(f"^{pattern}", ours, name)
            if found:
                name = f"mlp.{renamed}" if scanned and renamed.startswith("layers.") else renamed
                break
        converted[re.sub(r"\.mlp\.(w[123])\.", lambda match: f".mlp.{BLOCK_MLP[match[1]]}.", name)] = tensor
    return converted


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a vision-language model under our names; those that have them already are returned as they are.

    Vision towers, which released files leave out, keep their weights. Where embedding and output layer of the model
    are one tensor, the output layer is left out.
    """
    if all(name.startswith(OURS) for name in state_dict):
        return dict(state_dict)
    connector, language = {}, {}
    for name, tensor in state_dict.items():
        if name.endswith("lm_head.weight"):  # under several prefixes
            language["lm_head.weight"] = tensor
        elif name.startswith("llm_backbone."):
            language[name.removeprefix("llm_backbone.").removeprefix("llm.")] = tensor
        else:
            connector[name] = tensor
    converted = {f"connector.{name}": tensor for name, tensor in convert_connector(connector).items()}
    converted |= {f"language_model.{name}": tensor for name, tensor in convert_mamba_names(language).items()}
    expected = model.state_dict()
    if "language_model.lm_head.weight" not in expected:
        converted.pop("language_model.lm_head.weight", None)
    return converted | {name: tensor for name, tensor in expected.items() if name.startswith("vision.")}
