"""Pictures of detections: boxes, masks, class names and scores on the image."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_dtype
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

__all__ = ["draw_detections"]

# Light enough for the black names on them, and apart from each other for the colour-blind too where classes are few.
COLORS = ("#e69f00", "#56b4e9", "#00c08b", "#f0e442", "#ff7f5c", "#d59bc4", "#9fa8ff", "#b5e61d", "#c9b08b", "#b8b8b8")


def draw_detections(
    image: Tensor,
    prediction: Mapping[str, Tensor],
    class_names: Sequence[str],
    threshold: float = 0.5,
    line_width: int = 2,
    mask_opacity: float = 0.45,
) -> Tensor:
    """Draws what a detector found in an image, or what a target says is there. The best is drawn last, on top.

    Args:
        image: (C, H, W) of 1 or 3 channels; floating numbers from 0 to 1, or bytes.
        prediction: ``boxes`` (N, 4) and ``labels`` (N,); where there are, ``scores`` (N,) and ``masks`` (N, H, W) or
            (N, 1, H, W), of which what exceeds one half is drawn.
        class_names: Name of every label.
        threshold: Detections of a lower score are left out.
        line_width: Width of the boxes' lines in pixels.
        mask_opacity: How much masks cover of the image, 0 to 1.

    Returns:
        Bytes (3, H, W), on the CPU.

    Raises:
        ValueError: If the image has another shape, or a label has no name.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"cannot draw on an image of shape {tuple(image.shape)}; give (1 or 3, height, width)")
    canvas = to_dtype(image.detach().cpu(), torch.uint8, scale=True).expand(3, -1, -1).contiguous()
    boxes, labels = prediction["boxes"].detach().float().cpu(), prediction["labels"].cpu()
    scores = prediction["scores"].detach().float().cpu() if "scores" in prediction else None
    order = _worst_first(scores, threshold) if scores is not None else torch.arange(len(boxes))
    if not len(order):
        return canvas

    numbers = labels[order].tolist()
    if not 0 <= min(numbers) <= max(numbers) < len(class_names):
        raise ValueError(f"labels {min(numbers)} to {max(numbers)} are drawn, but there are {len(class_names)} names")
    colors = [COLORS[number % len(COLORS)] for number in numbers]
    captions = [class_names[number] for number in numbers]
    if scores is not None:
        captions = [f"{name} {score:.2f}" for name, score in zip(captions, scores[order].tolist(), strict=True)]
    if "masks" in prediction:
        masks = prediction["masks"].detach().cpu()[order].reshape(len(order), *canvas.shape[1:]) > 0.5
        for mask, color in zip(masks, colors, strict=True):  # one by one: where masks overlap, all at once draw black
            canvas = draw_segmentation_masks(canvas, mask, alpha=mask_opacity, colors=color)
    return draw_bounding_boxes(canvas, boxes[order], captions, colors=colors, width=line_width, fill_labels=True)


def _worst_first(scores: Tensor, threshold: float) -> Tensor:
    """Indices of the scores that reach the threshold, rising."""
    order = scores.argsort()
    return order[scores[order] >= threshold]
