"""Vim: the classifier, the segmentation and detection backbones, and the resampling of position embeddings."""

import math

import torch
from torch import Tensor, nn

from zoo.backbones.layers.position import resample_pos_embed
from zoo.backbones.vim import VisionMamba, from_upstream
from zoo.heads.rescale_pyramid import RescalePyramid
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a case of any of the authors' classes."""
    runners = {
        "VisionMamba": _classifier,
        "VisionMambaSeg": _dense,
        "VisionMambaDet": _dense,
        "interpolate_pos_embed": _position,
    }
    if case.class_name not in runners:
        raise ValueError(f"no builder for {case.class_name!r}")
    return runners[case.class_name](case)


def _classifier(case: Case) -> dict[str, Tensor]:
    """Features, logits, every block's stream and output, and the image's gradient of sum(logits^2)."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    outputs = {}

    def record(index: int) -> None:
        def hook(block: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
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


def _dense(case: Case) -> dict[str, Tensor]:
    """Feature maps as the authors' segmentation or detection backbone returns them."""
    kwargs = case.kwargs
    segmentation = case.class_name == "VisionMambaSeg"
    backbone = from_upstream(case.class_name, kwargs)
    state = case.group("state")
    neck_state = {name: state.pop(name) for name in list(state) if name.startswith("fpn")}
    backbone = case.load(backbone, state)
    image = case.inputs()["image"]
    features = _dense_features(backbone, image, kwargs, segmentation)
    if segmentation and kwargs.get("if_fpn", True):
        neck = RescalePyramid(backbone.embed_dim, backbone.patch_embed.patch_size[0])
        renamed = {f"levels.{int(name[3]) - 1}.{name[5:]}": tensor for name, tensor in neck_state.items()}
        features = case.load(neck, renamed)(features)
    sum(feature.square().sum() for feature in features).backward()
    outputs = {f"output.features{i}": feature for i, feature in enumerate(features)}
    return {**outputs, "grad.input": image.grad}


def _dense_features(backbone: VisionMamba, image: Tensor, kwargs: dict, segmentation: bool) -> list[Tensor]:
    """The maps before the neck: mixer outputs, or the residual stream with its own treatment of the last block."""
    depth = len(backbone.blocks)
    indices = kwargs.get("out_indices", [3, 5, 7, 11]) if segmentation else [depth - 1]
    residual = kwargs.get("use_residual_as_feature", False) if segmentation else True
    if not residual:
        return backbone.forward_intermediates(image, indices, intermediates_only=True, source="mixer")
    features = backbone.forward_intermediates(image, indices, intermediates_only=True)
    last = kwargs.get("last_layer_process", "none")
    if indices[-1] == depth - 1 and last != "add":
        options = {"none": dict(source="mixer"), "add & norm": dict(norm=True)}[last]
        features[-1:] = backbone.forward_intermediates(image, [depth - 1], intermediates_only=True, **options)
    return features


def _position(case: Case) -> dict[str, Tensor]:
    """Position embeddings on another grid: class row first (as the authors), none, or in the middle (as released)."""
    inputs = case.group("input")
    outputs = {}
    for name in case.expected:
        new_side = math.isqrt(int(name.rsplit("_to", 1)[1]))
        class_token = "first" if "extra1" in name else "middle" if "midaware" in name else None
        source = next(key for key in inputs if ("cls" in key) == (class_token is not None))
        pos_embed = inputs[source].to(case.device, case.dtype)
        old_side = math.isqrt(pos_embed.shape[1] - (class_token is not None))
        if class_token == "middle":
            middle = old_side * old_side // 2
            pos_embed, class_token = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1), None
        outputs[name] = resample_pos_embed(pos_embed, (old_side, old_side), (new_side, new_side), class_token)
    return outputs
