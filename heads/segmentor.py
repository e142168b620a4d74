"""Semantic segmentation: a backbone, a neck, a head, their loss, and prediction of whole images or window by window.

Windows lie as in mmsegmentation: in steps of a stride, those that would leave the image moved inside, and logits
averaged where they overlap.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.heads.decode_head import DecodeHead
from zoo.heads.layers import channels_last, resize, summed_cross_entropy

__all__ = ["IGNORED", "Segmentor", "check_masks", "predict_segmentation", "slide_logits"]

IGNORED = 255  # label of pixels that nobody has labelled
MOST_LOGITS = 1 << 26  # made at a time for the loss, of a pixel and a class each: 256 MiB


class Segmentor(nn.Module):
    """Logits of every pixel.

    Attributes:
        num_classes: Classes K.
        mean: Mean of the images' channels, from 0 to 1, by which images are to be normalised.
        std: Their standard deviation.

    Args:
        backbone: Module from images (B, C, H, W) to maps, as :class:`~zoo.heads.dense_backbone.DenseBackbone`.
        neck: Module from these maps to those that the heads read: ``nn.Identity()``, or
            :class:`~zoo.heads.rescale_pyramid.RescalePyramid` for maps of one stride.
        decode_head: Head that predicts.
        auxiliary_head: Head whose loss helps in training.
        auxiliary_weight: Weight of that loss.
        class_weights: Weight of every class in the losses. Default: equal.

    Raises:
        ValueError: If the heads' classes or ``class_weights`` are not as many, or more than 255.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        decode_head: DecodeHead,
        auxiliary_head: DecodeHead | None = None,
        auxiliary_weight: float = 0.4,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = decode_head.num_classes
        if self.num_classes > IGNORED:
            raise ValueError(f"num_classes={self.num_classes} exceeds {IGNORED}, which is the label of ignored pixels")
        if auxiliary_head is not None and auxiliary_head.num_classes != self.num_classes:
            raise ValueError(f"one head has {self.num_classes} classes, the other {auxiliary_head.num_classes}")
        if class_weights is not None and len(class_weights) != self.num_classes:
            raise ValueError(f"{len(class_weights)} class_weights for {self.num_classes} classes; give one for each")
        self.backbone, self.neck = backbone, neck
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head
        self.auxiliary_weight = auxiliary_weight
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        self.mean, self.std = tuple(backbone.mean), tuple(backbone.std)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Logits, or with masks the loss.

        Args:
            images: Images (B, C, H, W), normalised.
            masks: See :meth:`loss`.

        Returns:
            Logits (B, K, H, W), or the mean loss.

        Raises:
            ValueError: If images or masks are not as described.
        """
        if masks is not None:
            return self.loss(images, masks)
        return resize(self.decode_head(self._features(images)), images.shape[-2:])

    def loss(self, images: Tensor, masks: Tensor) -> Tensor:
        """Cross-entropy of all labelled pixels, with that of the auxiliary head times its weight.

        Args:
            images: Images (B, C, H, W), normalised.
            masks: Label of every pixel (B, H, W), from 0 to K - 1, or 255 for those that do not count.

        Returns:
            The mean, float32; 0 if no pixel counts.

        Raises:
            ValueError: If images or masks are not as described; the message names the labels.
        """
        check_masks(images, masks, self.num_classes)
        features = self._features(images)
        loss = self._cross_entropy(self.decode_head(features), masks)
        if self.auxiliary_head is not None:
            loss = loss + self.auxiliary_weight * self._cross_entropy(self.auxiliary_head(features), masks)
        return loss

    def _features(self, images: Tensor) -> Sequence[Tensor]:
        if images.dim() != 4 or images.shape[1] != len(self.mean):
            raise ValueError(f"expected images (B, {len(self.mean)}, H, W), got {tuple(images.shape)}")
        return self.neck([channels_last(feature) for feature in self.backbone(images)])

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Mean over the labelled pixels of all images, each with the weight of its class.

        Logits of the images' size are the largest tensors of a training step. They are made of a few images at a time,
        and again in the backward instead of being kept.
        """
        count = max(1, MOST_LOGITS // (logits.shape[1] * masks[0].numel()))
        sums = [
            checkpoint(self._sum_over_pixels, *each, use_reentrant=False, preserve_rng_state=False)  # draws nothing
            for each in zip(logits.split(count), masks.split(count), strict=True)
        ]
        total, weight = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
        return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def _sum_over_pixels(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropy of some images' pixels, and of their weights."""
        masks = masks.long()
        logits = resize(logits.float(), masks.shape[-2:]).permute(0, 2, 3, 1).flatten(0, 2)  # (pixels, K)
        total = summed_cross_entropy(logits, masks.flatten(), IGNORED, self.class_weights)
        counts = masks != IGNORED
        weights = counts if self.class_weights is None else counts * self.class_weights[masks.where(counts, 0)]
        return total, weights.sum(dtype=torch.float32)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backbone's blocks are recomputed in the backward instead of kept."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Order of parameters by name for layer-wise decay: the backbone's groups, then neck and heads together."""
        matcher = self.backbone.group_matcher(coarse=coarse)

        def group(name: str) -> float:
            return matcher(name.removeprefix("backbone.")) if name.startswith("backbone.") else math.inf

        return group


def check_masks(images: Tensor, masks: Tensor, num_classes: int) -> None:
    """Checks shape and labels of masks.

    Args:
        images: Images (B, C, H, W).
        masks: Labels (B, H, W).
        num_classes: Classes K.

    Raises:
        ValueError: If there is not one label for each pixel, or one is neither 0 to K - 1 nor 255.
    """
    expected = (images.shape[0], *images.shape[-2:])
    if tuple(masks.shape) != expected:
        raise ValueError(f"images {tuple(images.shape)} need masks {expected}, got {tuple(masks.shape)}")
    if masks.is_floating_point():
        raise ValueError(f"masks hold labels, so {masks.dtype} has to be an integer type")
    if torch.compiler.is_compiling() or (masks.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # the values are not known then
    wrong = (masks != IGNORED) & ((masks < 0) | (masks >= num_classes))
    if wrong.any():
        raise ValueError(
            f"masks have the labels {masks[wrong].unique().tolist()}, but {num_classes} classes have the labels 0 to "
            f"{num_classes - 1}, and {IGNORED} stands for pixels that do not count; correct them or set num_classes"
        )


@torch.no_grad()
def predict_segmentation(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    crop_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Tensor:
    """Probabilities of every pixel's classes, averaged over several views of the images.

    Beside the result, one view's logits are in memory at a time.

    Args:
        model: Segmentor in evaluation mode.
        images: Images (B, C, H, W), normalised.
        crop_size: Windows' size (H, W) or side, to predict window by window. Default: whole images.
        stride: Windows' steps, see :func:`slide_logits`.
        scales: Sizes of the views, relative to the images.
        flip: Whether each view is also seen mirrored, left to right.

    Returns:
        Probabilities (B, K, H, W), float32; the best class is ``.argmax(1)``.

    Raises:
        ValueError: If the model is in training mode, or an argument makes no sense.
    """
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode; call model.eval() first")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales={tuple(scales)} has to hold positive numbers")
    if stride is not None and crop_size is None:
        raise ValueError(f"stride={stride} needs a crop_size")
    size, total = images.shape[-2:], None
    for scale, mirrored in product(scales, (False, True) if flip else (False,)):
        view = images if scale == 1 else _scaled(images, scale)
        view = view.flip(-1) if mirrored else view
        logits = model(view) if crop_size is None else slide_logits(model, view, crop_size, stride)
        logits = logits.flip(-1) if mirrored else logits
        probabilities = resize(logits.float(), size).softmax(1)
        total = probabilities if total is None else total.add_(probabilities)
    return total.div_(len(scales) * (2 if flip else 1))


def _scaled(images: Tensor, scale: float) -> Tensor:
    size = [max(round(side * scale), 1) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)


@torch.no_grad()
def slide_logits(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    crop_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
) -> Tensor:
    """Logits predicted window by window, averaged where windows overlap.

    Args:
        model: Segmentor in evaluation mode.
        images: Images (B, C, H, W), normalised. An image smaller than the window is one window.
        crop_size: Windows' size (H, W) or side.
        stride: Steps (H, W) from window to window, or one for both. Default: two thirds of the window.

    Returns:
        Logits (B, K, H, W), float32.

    Raises:
        ValueError: If windows would leave gaps, or a size is not positive.
    """
    crop = to_2tuple(crop_size)
    step = to_2tuple(stride) if stride is not None else tuple(max(side * 2 // 3, 1) for side in crop)
    if min(*crop, *step) < 1:
        raise ValueError(f"crop_size={crop_size} and stride={stride} have to be positive")
    if crop[0] < step[0] or crop[1] < step[1]:
        raise ValueError(f"windows of crop_size={crop_size} leave gaps with stride={stride}; lower the stride")
    height, width = images.shape[-2:]
    total, counts = None, images.new_zeros(height, width, dtype=torch.float32)
    for rows, columns in product(_windows(height, crop[0], step[0]), _windows(width, crop[1], step[1])):
        logits = model(images[..., rows, columns])
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width, dtype=torch.float32)
        total[..., rows, columns] += logits
        counts[rows, columns] += 1
    return total.div_(counts)


def _windows(length: int, window: int, step: int) -> Iterator[slice]:
    """Windows over one side of an image, the last one moved inside."""
    for index in range(math.ceil(max(length - window, 0) / step) + 1):
        end = min(index * step + window, length)
        yield slice(max(end - window, 0), end)
