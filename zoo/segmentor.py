"""Semantic segmentation on any backbone: everything wired by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.heads.dense_backbone import DenseBackbone
from zoo.heads.layers import Norm
from zoo.heads.registry import create_head, list_heads
from zoo.heads.rescale_pyramid import Reduction, RescalePyramid
from zoo.heads.segmentor import Segmentor
from zoo.weights import load_checkpoint

__all__ = ["create_segmentor"]

AUXILIARY_CHANNELS = 256


@dataclass(frozen=True)
class Layout:
    """What the heads read of a backbone.

    Attributes:
        backbone: Arguments of :class:`~zoo.heads.dense_backbone.DenseBackbone` and of the model.
        last_through_final_norm: Whether the last map goes through the model's final norm instead of its own.
        rescale: Whether maps of one stride are brought to several.
        auxiliary_index: Map that the auxiliary head reads.
    """

    backbone: Mapping[str, Any] = field(default_factory=dict)
    last_through_final_norm: bool = False
    rescale: bool = True
    auxiliary_index: int = -2


MIXER = Layout(dict(source="mixer", norm_layer="layernorm"), rescale=False, auxiliary_index=-1)
VIM = dict(source="mixer", feature_norms=False, class_token=None, global_pool="avg")
AUTHORS_LAYOUTS = {  # by the beginning of the model's name, the first that fits
    "efficient_vmamba": Layout(),
    "lbvim": MIXER,
    "local_vim": MIXER,
    "local_vmamba": Layout(),
    "mamba_vision_s": Layout(dict(window_size=(160, 56))),  # one window covers the whole map
    "mamba_vision": Layout(dict(window_size=(64, 32))),
    "plain": Layout(last_through_final_norm=True, rescale=False, auxiliary_index=-1),
    "vim_small": Layout(dict(VIM, rope=True, rope_residual=True)),
    "vim": Layout(VIM),
    "vmamba": Layout(),
}


def create_segmentor(
    backbone: str,
    head: str = "uper_net",
    num_classes: int = 150,
    pretrained: bool = False,
    *,
    checkpoint: str | Path | None = None,
    channels: int = 512,
    norm: Norm = "batch",
    auxiliary: bool = True,
    reduction: Reduction = "pool",
    class_weights: Sequence[float] | None = None,
    img_size: int | Sequence[int] | None = None,
    authors_layout: bool = False,
    grad_checkpointing: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    **head_kwargs: Any,
) -> Segmentor:
    """Creates a segmentor.

    Each map of the backbone goes through a norm of its own. Hierarchical backbones give all their maps to the head;
    those of columnar ones, after each quarter of the blocks, are brought to four strides first.

    Args:
        backbone: Name of a model of this zoo or of timm, with or without tag.
        head: ``"uper_net"``, ``"seg_former"`` (light) or ``"fcn"``.
        num_classes: Classes K, at most 255.
        pretrained: Whether to load the backbone's published weights.
        checkpoint: File with other weights for the backbone. For weights of a whole segmentor see
            :func:`zoo.heads.mmseg_weights.load_segmentor_weights`.
        channels: Width of the head.
        norm: Norm of neck and heads: ``"batch"``, or ``"group"`` for small batches.
        auxiliary: Whether an FCN head on the last map but one helps in training.
        reduction: How maps of a columnar backbone are brought to coarser strides: by ``"pool"``, as in released
            weights, or ``"conv"``, which has more to learn and does better from fine strides; see
            :class:`~zoo.heads.rescale_pyramid.RescalePyramid`.
        class_weights: Weight of every class in the loss.
        img_size: Size (H, W) or side that position embeddings are made for, where there are any. Images of other sizes
            work too, at the price of resampling them every time.
        authors_layout: Whether features, neck and auxiliary head are those of the authors' code for segmentation, which
            their released weights need.
        grad_checkpointing: Whether the backbone's blocks are recomputed in the backward, for less memory.
        backbone_kwargs: Arguments of :class:`~zoo.heads.dense_backbone.DenseBackbone` and of the model:
            ``out_indices``, ``drop_path_rate``, ``in_chans``...
        **head_kwargs: Arguments of the head's class: ``dropout``, ``pool_scales``...

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a name is not known, weights do not fit, or ``authors_layout`` is asked of a family whose authors
            have not published any.
    """
    if head not in list_heads("segmentation"):
        raise ValueError(f"head={head!r} does no segmentation; use one of {', '.join(list_heads('segmentation'))}")
    layout = _authors_layout(backbone) if authors_layout else Layout()
    weights = None if checkpoint is None else load_checkpoint(checkpoint)
    options = _backbone_options(backbone, layout, dict(backbone_kwargs or {}), img_size)
    body = DenseBackbone(backbone, pretrained, weights, grad_checkpointing=grad_checkpointing, **options)
    neck, maps = _create_neck(body, layout, norm, reduction)
    decode_head = create_head(head, *maps, num_classes, channels, norm=norm, **head_kwargs)
    auxiliary_head = None
    if auxiliary:
        index = max(layout.auxiliary_index, -len(body.channels))
        auxiliary_head = create_head("fcn", *maps, num_classes, AUXILIARY_CHANNELS, index=index, norm=norm)
    return Segmentor(body, neck, decode_head, auxiliary_head, class_weights=class_weights)


def _authors_layout(backbone: str) -> Layout:
    for prefix, layout in AUTHORS_LAYOUTS.items():
        if backbone.startswith(prefix):
            return layout
    raise ValueError(f"the authors of {backbone} have published no layout for segmentation; leave authors_layout out")


def _backbone_options(
    backbone: str, layout: Layout, given: dict[str, Any], img_size: int | Sequence[int] | None
) -> dict[str, Any]:
    """Arguments of the backbone: what the caller gives, else what the layout says."""
    options = {"norm": layout.last_through_final_norm, "feature_norms": True, **layout.backbone, **given}
    with torch.device("meta"):
        plan = DenseBackbone(backbone, **options)
    if layout.last_through_final_norm:
        options["feature_norms"] = given.get("feature_norms", plan.out_indices[:-1])
    if img_size is not None and hasattr(plan.model, "set_input_size"):
        options["img_size"] = img_size
    return options


def _create_neck(
    body: DenseBackbone, layout: Layout, norm: Norm, reduction: Reduction
) -> tuple[nn.Module, tuple[list[int], list[int]]]:
    """The neck, and channels and strides of its maps."""
    in_stride = body.strides[0]
    if len(set(body.strides)) > 1 or not layout.rescale:
        return nn.Identity(), (body.channels, body.strides)
    if len(set(body.channels)) > 1:
        raise ValueError(f"the maps of {body.model_name} have one stride but {body.channels} channels")
    finest = max(min(4, in_stride), in_stride // 4)  # as usual, or as fine as the neck can make it
    levels = 4 if len(body.channels) == 1 else len(body.channels)
    strides = [finest * 2**level for level in range(levels)]
    neck = RescalePyramid(body.channels[0], in_stride, strides, norm, reduction)
    return neck, (neck.out_channels, list(neck.out_strides))
