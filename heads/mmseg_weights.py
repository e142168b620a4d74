"""Weights of whole segmentors as mmsegmentation saves them, the authors' released ones too, for our segmentors.

The heads have the same names. The backbone's are translated by the file that defines its family. What rescales the maps
of columnar backbones is a neck here; the authors of Vim keep it in the backbone (``fpn1`` to ``fpn4``), mmsegmentation
in ``Feature2Pyramid``.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from zoo.heads.dense_backbone import misfits
from zoo.heads.rescale_pyramid import RescalePyramid
from zoo.heads.segmentor import Segmentor

__all__ = ["convert_mmseg_weights", "load_segmentor_weights"]

FEATURE_NORM = re.compile(r"(?:outnorm_?|out_map_|norm_layer)(\d+)\.")  # as the authors call norms of features


def load_segmentor_weights(segmentor: Segmentor, weights: Mapping[str, Tensor]) -> None:
    """Loads weights of a whole segmentor, ours or mmsegmentation's; every name and shape has to fit.

    Args:
        segmentor: Segmentor of the same backbone and heads, for the authors' weights with their layout: see
            :func:`zoo.segmentor.create_segmentor`.
        weights: Tensors by name, as :func:`zoo.load_checkpoint` reads them from a file.

    Raises:
        ValueError: If they do not fit.
    """
    weights = convert_mmseg_weights(weights, segmentor)
    problems = misfits(weights, segmentor.state_dict())
    if problems:
        raise ValueError(
            f"the weights do not fit this segmentor: {'; '.join(problems)}. Create it with the backbone, heads, "
            "channels and num_classes that they belong to, and with authors_layout=True for weights of the authors"
        )
    segmentor.load_state_dict(weights)


def convert_mmseg_weights(weights: Mapping[str, Tensor], segmentor: Segmentor) -> dict[str, Tensor]:
    """mmsegmentation's and the authors' names to those of a segmentor; ours are kept.

    Args:
        weights: Tensors by name, those of the backbone below ``backbone.``.
        segmentor: What they are for; its own weights are not touched.

    Raises:
        ValueError: If there is no backbone among the weights, or it norms other features than the segmentor's.
    """
    backbone, converted = {}, {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "neck" or re.match(r"backbone\.fpn\d\.", name):
            converted[_neck_name(name, segmentor.neck)] = tensor
        elif part == "backbone":
            backbone[rest] = tensor
        else:
            converted[name] = tensor
    if not backbone:
        raise ValueError(
            f"no name starts with 'backbone.', so this is no segmentor; one is {next(iter(weights), None)}"
        )
    if backbone.keys().isdisjoint(segmentor.backbone.state_dict()):
        _check_feature_norms(backbone, segmentor)
        backbone = segmentor.backbone.convert(backbone)
    return {**converted, **{f"backbone.{name}": tensor for name, tensor in backbone.items()}}


def _check_feature_norms(backbone: Mapping[str, Tensor], segmentor: Segmentor) -> None:
    """Raises an error unless the authors' weights norm the features that the segmentor norms: families drop others."""
    normed = sorted({int(found[1]) for name in backbone if (found := FEATURE_NORM.match(name))})
    if normed != segmentor.backbone.normed:
        raise ValueError(
            f"the weights norm the features {normed}, this segmentor {segmentor.backbone.normed}; create it with "
            f"authors_layout=True, or with feature_norms={normed} in backbone_kwargs"
        )


def _neck_name(name: str, neck: nn.Module) -> str:
    """Name of a parameter in our neck; as it is if the neck has no such level."""
    of_vim = re.fullmatch(r"backbone\.fpn(\d)\.(.*)", name)
    if of_vim is not None:
        return f"neck.levels.{int(of_vim[1]) - 1}.{of_vim[2]}"
    of_mmseg = re.fullmatch(r"neck\.upsample_(\d)x\.(.*)", name)
    if of_mmseg is not None and isinstance(neck, RescalePyramid):
        stride = neck.in_stride // int(of_mmseg[1])
        if stride in neck.out_strides:
            return f"neck.levels.{neck.out_strides.index(stride)}.{of_mmseg[2]}"
    return name
