"""Mask R-CNN (arXiv 1703.06870), Faster R-CNN (1506.01497), RetinaNet (1708.02002) and FCOS (1904.01355).

The detectors are torchvision's, with its anchors, losses, samplers and parameter names, on a backbone of ours behind a
feature pyramid. What this module changes:

1. Classes count from 0 and without background, here and in every target and prediction.
2. Images are normalised with the backbone's mean and standard deviation, by torchvision's transform and nowhere else.
3. Anchors, and the scales at which regions are pooled, come from the pyramid's strides. torchvision guesses the scales
   from the first batch, wrongly where images are padded a lot.
4. Under autocast, convolutions and linear layers of backbone, pyramid and heads run in the lower precision; anchors,
   what the heads predict, and with these boxes, losses and suppression of overlaps are float32.
5. Targets are checked before they are used.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from zoo.heads.detection_targets import Target, check_targets
from zoo.heads.registry import register_head

__all__ = ["FCOS", "FasterRCNN", "ImageSize", "MaskRCNN", "PyramidBackbone", "RetinaNet"]

Images = Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class ImageSize:
    """How images are resized and padded before they enter the backbone. Boxes and masks follow, and are taken back.

    The default scales both sides alike. To pad to squares as ViTDet does, set ``min_size``, ``max_size`` and
    ``size_divisible`` to the same number.

    Attributes:
        min_size: Length in pixels to which the shorter side is brought; of several, one is drawn for each image in
            training, and the last is used in evaluation.
        max_size: Length that the longer side never exceeds.
        fixed_size: Size (H, W) or side of all images, which are stretched to it; ``min_size`` and ``max_size`` are not
            used then.
        size_divisible: Batches are padded to sizes that are multiples of it. Default: the coarsest stride.

    Raises:
        ValueError: If a size is not positive, or ``min_size`` exceeds ``max_size``.
    """

    min_size: int | Sequence[int] = 800
    max_size: int = 1333
    fixed_size: int | Sequence[int] | None = None
    size_divisible: int | None = None

    def __post_init__(self) -> None:
        smallest, fixed = _as_tuple(self.min_size), _as_tuple(self.fixed_size or ())
        if not smallest or min(smallest) < 1 or max(smallest) > self.max_size:
            raise ValueError(f"min_size={self.min_size} has to lie between 1 and max_size={self.max_size}")
        if self.fixed_size is not None and (len(fixed) not in (1, 2) or min(fixed) < 1):
            raise ValueError(f"fixed_size={self.fixed_size} is no image size; give (height, width) or one side")
        if self.size_divisible is not None and self.size_divisible < 1:
            raise ValueError(f"size_divisible={self.size_divisible} has to be positive")

    def transform_options(self, backbone: "PyramidBackbone") -> dict[str, Any]:
        """The arguments of torchvision's transform."""
        fixed = _as_tuple(self.fixed_size or ())
        return dict(
            min_size=_as_tuple(self.min_size),
            max_size=self.max_size,
            fixed_size=(fixed[-1], fixed[0]) if fixed else None,  # torchvision wants the width first
            size_divisible=self.size_divisible or backbone.size_divisible,
            image_mean=list(backbone.mean),
            image_std=list(backbone.std),
        )


class PyramidBackbone(nn.Module):
    """Backbone and pyramid: what torchvision's detectors call a backbone.

    Attributes:
        out_channels: Channels of every level.
        strides: Strides of the levels in pixels.
        size_divisible: Images whose sides are multiples of it fit all maps without remainder.

    Args:
        body: Module from images (B, C, H, W) to a list of maps, with ``strides`` of these and the images' ``mean`` and
            ``std``, as :class:`~zoo.heads.dense_backbone.DenseBackbone`.
        fpn: Module from these maps to levels by name, as those of :mod:`zoo.heads.feature_pyramid` and
            :mod:`zoo.heads.simple_pyramid`.
    """

    def __init__(self, body: nn.Module, fpn: nn.Module) -> None:
        super().__init__()
        self.body, self.fpn = body, fpn
        self.mean, self.std = tuple(body.mean), tuple(body.std)
        self.out_channels, self.strides, self.num_maps = fpn.out_channels, list(fpn.strides), fpn.num_maps
        self.size_divisible = math.lcm(*body.strides, *self.strides[: self.num_maps])
        self.frozen = False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to levels (B, out_channels, H / stride, W / stride) by name."""
        return self.fpn(self.body(images))

    def freeze_stages(self, stages: int) -> None:
        """Excludes the backbone's stem and first stages (blocks of columnar models) from training.

        Their dropout, drop path and statistics of batch norms stay as in evaluation too.

        Args:
            stages: How many, besides the stem.

        Raises:
            ValueError: If there are not so many.
        """
        order = self.body.group_matcher(coarse=True)
        groups = {name: order(name) for name, _ in self.body.named_parameters()}
        last = max(group for group in groups.values() if group < math.inf)  # beyond are new norms, which stay trainable
        if not 0 <= stages <= last:
            raise ValueError(
                f"cannot freeze {stages} stages; the backbone has {int(last)}, and 0 freezes its stem alone"
            )
        for name, parameter in self.body.named_parameters():
            if groups[name] <= stages:
                parameter.requires_grad_(False)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """Switches all but frozen stages to training, or everything to evaluation."""
        super().train(mode)
        if self.frozen:
            for module in self.body.modules():
                if {parameter.requires_grad for parameter in module.parameters()} == {False}:
                    module.eval()
        return self


class _Detector:
    """What the four detectors share; a mix-in before torchvision's class, whose ``forward`` it wraps."""

    first_label: ClassVar[int] = 0  # torchvision's number for our class 0
    predicts_masks: ClassVar[bool] = False

    num_classes: int
    backbone: PyramidBackbone

    def forward(self, images: Images, targets: Sequence[Target] | None = None) -> Any:
        """Losses in training, detections in evaluation.

        Args:
            images: Images (C, H, W) of any sizes, from 0 to 1, not normalised.
            targets: In training, for each image ``boxes`` (N, 4) as x1, y1, x2, y2 in pixels, ``labels`` (N,) from 0 to
                ``num_classes`` - 1, and for Mask R-CNN ``masks`` (N, H, W) of zeros and ones. N may be 0. Ignored in
                evaluation.

        Returns:
            In training, the losses by name; their sum is to be minimised. In evaluation, for each image ``boxes``
            (N, 4) in its pixels, ``labels`` (N,) and ``scores`` (N,), best first, and for Mask R-CNN ``masks``
            (N, 1, H, W), the probability of every pixel.

        Raises:
            ValueError: If images or targets are not as described; the message names image and box.
        """
        images = _check_images(images, len(self.backbone.mean))
        if self.training:
            targets = check_targets(images, targets, self.num_classes, self.predicts_masks)
            return super().forward(images, [t | {"labels": t["labels"] + self.first_label} for t in targets])
        return [p | {"labels": p["labels"] - self.first_label} for p in super().forward(images)]

    def freeze_stages(self, stages: int) -> None:
        """See :meth:`PyramidBackbone.freeze_stages`."""
        self.backbone.freeze_stages(stages)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backbone's blocks are recomputed in the backward instead of kept."""
        self.backbone.body.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {f"backbone.body.{name}" for name in self.backbone.body.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Order of parameters by name for layer-wise decay: the backbone's groups, then pyramid and head together."""
        matcher = self.backbone.body.group_matcher(coarse=coarse)

        def group(name: str) -> float:
            return matcher(name.removeprefix("backbone.body.")) if name.startswith("backbone.body.") else math.inf

        return group

    def _predict_in_float32(self, *modules: nn.Module) -> None:
        """Converts what these modules return, which is float16 or bfloat16 under autocast."""
        for module in modules:
            module.register_forward_hook(_to_float32)


@register_head("faster_rcnn", task="detection")
class FasterRCNN(_Detector, detection.FasterRCNN):
    """Boxes by proposals and their classification.

    Args:
        backbone: Backbone with pyramid.
        num_classes: Classes without background.
        image_size: How images are resized and padded. Default: shorter sides to 800 pixels.
        anchor_sizes: Sides in pixels of the anchors, for each level. Default: one, 8 times the stride.
        aspect_ratios: Heights of anchors over their widths.
        representation_size: Width of the two linear layers that see a pooled region.
        score_threshold: Detections of lower score are dropped.
        nms_threshold: Intersection over union above which the better of two boxes of a class suppresses the other.
        max_detections: Most detections of an image.
        **kwargs: Further arguments of torchvision's class, ``rpn_...`` and ``box_...``.

    Raises:
        ValueError: If ``anchor_sizes`` are not as many as levels.
    """

    first_label = 1  # 0 is the background

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int = 80,
        *,
        image_size: ImageSize | None = None,
        anchor_sizes: Sequence[Sequence[int]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        representation_size: int = 1024,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        **kwargs: Any,
    ) -> None:
        num_torchvision_classes = _check_num_classes(num_classes) + self.first_label
        pool = _RegionPool(backbone, output_size=7)
        super().__init__(
            backbone,
            rpn_anchor_generator=_Anchors.at(backbone.strides, anchor_sizes, aspect_ratios, scale=8),
            box_roi_pool=pool,
            box_head=TwoMLPHead(backbone.out_channels * math.prod(pool.output_size), representation_size),
            box_predictor=FastRCNNPredictor(representation_size, num_torchvision_classes),
            box_score_thresh=score_threshold,
            box_nms_thresh=nms_threshold,
            box_detections_per_img=max_detections,
            **(image_size or ImageSize()).transform_options(backbone),
            **kwargs,
        )
        self.num_classes = num_classes
        self._predict_in_float32(self.rpn.head, self.roi_heads.box_predictor)


@register_head("mask_rcnn", task="detection")
class MaskRCNN(FasterRCNN):
    """Faster R-CNN with a mask for each box.

    Args:
        backbone: Backbone with pyramid.
        num_classes: Classes without background.
        mask_channels: Width of the convolutions that see a pooled region.
        **kwargs: Arguments of :class:`FasterRCNN`.
    """

    predicts_masks = True

    def __init__(
        self, backbone: PyramidBackbone, num_classes: int = 80, *, mask_channels: int = 256, **kwargs: Any
    ) -> None:
        super().__init__(backbone, num_classes, **kwargs)
        heads = self.roi_heads
        heads.mask_roi_pool = _RegionPool(backbone, output_size=14)
        heads.mask_head = MaskRCNNHeads(backbone.out_channels, [mask_channels] * 4, dilation=1)
        heads.mask_predictor = MaskRCNNPredictor(mask_channels, mask_channels, num_classes + self.first_label)
        self._predict_in_float32(heads.mask_predictor)


@register_head("retina_net", task="detection")
class RetinaNet(_Detector, detection.RetinaNet):
    """Boxes by classification of every anchor with the focal loss.

    Args:
        backbone: Backbone with pyramid; the paper's starts at stride 8 and ends with P6 and P7.
        num_classes: Classes without background.
        image_size: How images are resized and padded. Default: shorter sides to 800 pixels.
        anchor_sizes: Sides in pixels of the anchors, for each level. Default: three, from 4 times the stride to below
            8 times.
        aspect_ratios: Heights of anchors over their widths.
        score_threshold: Detections of lower score are dropped.
        nms_threshold: Intersection over union above which the better of two boxes of a class suppresses the other.
        max_detections: Most detections of an image.
        **kwargs: Further arguments of torchvision's class.

    Raises:
        ValueError: If ``anchor_sizes`` are not as many as levels.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int = 80,
        *,
        image_size: ImageSize | None = None,
        anchor_sizes: Sequence[Sequence[int]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 300,
        **kwargs: Any,
    ) -> None:
        octaves = (1, 2 ** (1 / 3), 2 ** (2 / 3))
        super().__init__(
            backbone,
            _check_num_classes(num_classes) + self.first_label,
            anchor_generator=_Anchors.at(backbone.strides, anchor_sizes, aspect_ratios, scale=4, octaves=octaves),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            **(image_size or ImageSize()).transform_options(backbone),
            **kwargs,
        )
        self.num_classes = num_classes
        self._predict_in_float32(self.head)


@register_head("fcos", task="detection")
class FCOS(_Detector, detection.FCOS):
    """Boxes from every cell, by the distances to their four sides.

    Args:
        backbone: Backbone with pyramid; the paper's starts at stride 8 and ends with P6 and P7.
        num_classes: Classes without background.
        image_size: How images are resized and padded. Default: shorter sides to 800 pixels.
        score_threshold: Detections of lower score are dropped.
        nms_threshold: Intersection over union above which the better of two boxes of a class suppresses the other.
        max_detections: Most detections of an image.
        **kwargs: Further arguments of torchvision's class.

    Raises:
        ValueError: If the pyramid's channels or strides do not suit the head.
    """

    def __init__(
        self,
        backbone: PyramidBackbone,
        num_classes: int = 80,
        *,
        image_size: ImageSize | None = None,
        score_threshold: float = 0.2,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        **kwargs: Any,
    ) -> None:
        if backbone.out_channels % 32 or backbone.out_channels < 64:  # one channel of one cell cannot be normed
            raise ValueError(f"fcos norms 32 groups of channels; give 64, 96 or more, not {backbone.out_channels}")
        if min(backbone.strides) < 2:
            raise ValueError(f"fcos needs strides from 2 on, got {backbone.strides}; leave out the finest map")
        super().__init__(
            backbone,
            _check_num_classes(num_classes) + self.first_label,
            anchor_generator=_Anchors.at(backbone.strides, None, (1.0,), scale=1),
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=max_detections,
            **(image_size or ImageSize()).transform_options(backbone),
            **kwargs,
        )
        self.num_classes = num_classes
        self._predict_in_float32(self.head)


class _Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 or better whatever the maps are: bfloat16 rounds 1001 pixels to 1000."""

    @classmethod
    def at(
        cls,
        strides: Sequence[int],
        sizes: Sequence[Sequence[int]] | None,
        aspect_ratios: Sequence[float],
        scale: int,
        octaves: Sequence[float] = (1,),
    ) -> "_Anchors":
        """Anchors of these sizes, or of sizes in proportion to the strides."""
        if sizes is None:
            sizes = [[int(scale * stride * octave) for octave in octaves] for stride in strides]
        if len(sizes) != len(strides):
            raise ValueError(f"anchor_sizes has {len(sizes)} entries, the pyramid {len(strides)} levels: {strides}")
        return cls(tuple(tuple(level) for level in sizes), (tuple(aspect_ratios),) * len(sizes))

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class _RegionPool(MultiScaleRoIAlign):
    """torchvision's pooling of regions from all levels but the extra ones, told at which scales they are."""

    def __init__(self, backbone: PyramidBackbone, output_size: int) -> None:
        super().__init__([str(i) for i in range(backbone.num_maps)], output_size, sampling_ratio=2)
        strides = backbone.strides[: backbone.num_maps]
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))


def _check_images(images: Images, channels: int) -> list[Tensor]:
    images = list(images)
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != channels or not image.is_floating_point():
            raise ValueError(
                f"image {index} of the batch has shape {tuple(image.shape)} and {image.dtype}; the backbone takes "
                f"({channels}, height, width), floating numbers from 0 to 1"
            )
    if not images:
        raise ValueError("got no images; give at least one")
    return images


def _check_num_classes(num_classes: int) -> int:
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} has to be at least 1; the background is not counted")
    return num_classes


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _to_float32(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: float16 and bfloat16 tensors in tuples, lists and dictionaries to float32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if isinstance(output, dict):
        return {key: _to_float32(module, args, value) for key, value in output.items()}
    return type(output)(_to_float32(module, args, value) for value in output)
