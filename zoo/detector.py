"""Object detection and instance segmentation on any backbone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from zoo.heads.dense_backbone import DenseBackbone
from zoo.heads.detector import ImageSize, PyramidBackbone
from zoo.heads.feature_pyramid import ExtraLevels, FeaturePyramid, RescaledFeaturePyramid
from zoo.heads.registry import create_head, list_heads
from zoo.heads.simple_pyramid import SimplePyramid
from zoo.weights import load_checkpoint

__all__ = ["Pyramid", "create_detector"]

Pyramid = Literal["fpn", "simple", "rescale"]

ONE_STAGE = ("retina_net", "fcos")  # they classify every cell, so the finest maps are left out and coarser ones added


def create_detector(
    backbone: str,
    head: str = "mask_rcnn",
    num_classes: int = 80,
    pretrained: bool = False,
    *,
    checkpoint: str | Path | None = None,
    pyramid: Pyramid | None = None,
    pyramid_channels: int = 256,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    img_size: int | Sequence[int] | None = None,
    size_divisible: int | None = None,
    frozen_stages: int | None = None,
    grad_checkpointing: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    **head_kwargs: Any,
) -> nn.Module:
    """Creates a detector; what it takes and gives is said at :class:`zoo.heads.detector.FasterRCNN`.

    Args:
        backbone: Name of a model of this zoo or of timm, with or without tag.
        head: ``"mask_rcnn"``, ``"faster_rcnn"``, ``"retina_net"`` or ``"fcos"``.
        num_classes: Classes without background; labels count from 0.
        pretrained: Whether to load the backbone's published weights.
        checkpoint: File with other weights for the backbone.
        pyramid: What makes levels of several strides of the backbone's maps. ``"fpn"``, a feature pyramid network, is
            the default for hierarchical backbones and takes their last four maps, or three for one-stage heads;
            ``"simple"``, the simple feature pyramid of ViTDet, is the default for columnar ones and takes the last map;
            ``"rescale"``, for columnar ones too, brings each map to a stride of its own before a feature pyramid
            network.
        pyramid_channels: Channels of every level.
        min_size: Pixels to which shorter sides of images are brought; of several, training draws one.
        max_size: Pixels that longer sides do not exceed.
        img_size: Size (H, W) or side to which all images are stretched instead.
        size_divisible: Batches are padded to multiples of it. Default: the coarsest stride.
        frozen_stages: Stages of the backbone (blocks of columnar ones) that are not trained, besides its stem; 0 for
            the stem alone. Default: everything is trained.
        grad_checkpointing: Whether the backbone's blocks are recomputed in the backward, for less memory.
        backbone_kwargs: Arguments of :class:`~zoo.heads.dense_backbone.DenseBackbone` and of the model:
            ``out_indices``, ``drop_path_rate``, ``in_chans``... By default maps have norms of their own for ``"fpn"``
            and go through the final norm for the others.
        **head_kwargs: Arguments of the head's class: ``score_threshold``, ``anchor_sizes``...

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If head, pyramid or an argument is not known, or they do not fit together.
    """
    if head not in list_heads("detection"):
        raise ValueError(f"head={head!r} is no detector; use one of {', '.join(list_heads('detection'))}")
    if pyramid is not None and pyramid not in get_args(Pyramid):
        raise ValueError(f"pyramid={pyramid!r} is not known; use one of {', '.join(get_args(Pyramid))}")
    one_stage = head in ONE_STAGE
    size = ImageSize(min_size, max_size, img_size, size_divisible)
    options, pyramid = _backbone_options(backbone, dict(backbone_kwargs or {}), pyramid, one_stage)
    weights = None if checkpoint is None else load_checkpoint(checkpoint)
    body = DenseBackbone(backbone, pretrained, weights, grad_checkpointing=grad_checkpointing, **options)
    fpn = _create_pyramid(pyramid, body, pyramid_channels, one_stage)
    detector = create_head(head, PyramidBackbone(body, fpn), num_classes, image_size=size, **head_kwargs)
    if frozen_stages is not None:
        detector.freeze_stages(frozen_stages)
    return detector


def _backbone_options(
    backbone: str, options: dict[str, Any], pyramid: Pyramid | None, one_stage: bool
) -> tuple[dict[str, Any], Pyramid]:
    """Arguments of the backbone, with what the pyramid wants where the caller says nothing, and the pyramid."""
    with torch.device("meta"):
        plan = DenseBackbone(backbone, **options)
    columnar = len(set(plan.strides)) == 1
    pyramid = pyramid or ("simple" if columnar else "fpn")
    wanted = {"fpn": 3 if one_stage else 4, "simple": 1, "rescale": 3 if one_stage else 4}[pyramid]
    if pyramid == "rescale" and len(plan.out_indices) < wanted:
        wanted = 1  # all levels from the last map
    defaults = {"out_indices": plan.out_indices[-wanted:], "feature_norms": pyramid == "fpn"}
    return {**defaults, **options}, pyramid


def _create_pyramid(pyramid: Pyramid, body: DenseBackbone, channels: int, one_stage: bool) -> nn.Module:
    extra: ExtraLevels = "p6p7" if one_stage else "pool"
    if pyramid == "fpn":
        return FeaturePyramid(body.channels, body.strides, channels, extra)
    if len(set(body.strides)) > 1:
        raise ValueError(
            f"pyramid={pyramid!r} is for maps of one stride, {body.model_name} has {body.strides}; use 'fpn'"
        )
    strides = (8, 16, 32) if one_stage else (4, 8, 16, 32)
    create = SimplePyramid if pyramid == "simple" else RescaledFeaturePyramid
    return create(body.channels[-1], body.strides[-1], channels, strides, extra)
