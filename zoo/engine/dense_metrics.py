"""Scores of dense tasks: intersection over union of semantic segmentation, COCO's average precision of detection.

Both are gathered batch by batch and, under several processes, over all of them, however many images each has.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.optional import require

__all__ = ["DetectionScores", "SegmentationScores"]

# The very numbers of pycocotools: torchmetrics has them in single precision, by which some scores differ by 0.002.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALL_THRESHOLDS = np.linspace(0, 1, 101).tolist()
AVERAGE_PRECISION = {  # our names by those of torchmetrics
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}


class SegmentationScores:
    """Intersection over union and accuracy of pixels.

    Args:
        num_classes: Number of classes K.
        ignore_index: Label of pixels that do not count.
        device: Where predictions and masks are.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.confusion = require("torchmetrics.classification").MulticlassConfusionMatrix(
            num_classes, ignore_index=ignore_index, validate_args=False
        )
        self.confusion.to(device)

    def reset(self) -> None:
        """Forgets everything that was added."""
        self.confusion.reset()

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Adds logits (B, K, H, W) of any float dtype, or predicted labels (B, H, W), and masks (B, H, W).

        Raises:
            ValueError: If shapes do not fit, or a label is not a class.
        """
        labels = predictions.detach().argmax(1) if predictions.is_floating_point() else predictions
        if labels.shape != masks.shape:
            raise ValueError(f"predictions {tuple(predictions.shape)} do not fit masks {tuple(masks.shape)}")
        counted = masks != self.ignore_index
        for name, values in (("masks", masks), ("predictions", labels)):
            wrong = counted & ((values < 0) | (values >= self.num_classes))
            if wrong.any():
                raise ValueError(
                    f"{name} have the labels {values[wrong].unique().tolist()}, but there are {self.num_classes} "
                    "classes (from 0)"
                )
        self.confusion.update(labels, masks)

    def compute(self) -> dict[str, float]:
        """Returns the scores, each in 0..1, by name. Classes of which no mask has a pixel do not count.

        * ``miou``: mean over classes of the intersection of prediction and truth over their union;
        * ``macc``: mean over classes of the share of their pixels that are right;
        * ``aacc``: share of all pixels that are right.

        Raises:
            ValueError: If no pixel was added that counts.
        """
        found, _, right = self._counts()
        there = found > 0
        return {
            "miou": self._iou()[there].mean().item(),
            "macc": (right / found)[there].mean().item(),
            "aacc": (right.sum() / found.sum()).item(),
        }

    def class_iou(self) -> list[float]:
        """Returns the intersection over union of every class, NaN where no mask has a pixel of it.

        Raises:
            ValueError: If no pixel was added that counts.
        """
        return self._iou().tolist()

    def _iou(self) -> Tensor:
        found, predicted, right = self._counts()
        return torch.where(found > 0, right / (found + predicted - right), torch.nan)

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of every class in the masks, in the predictions, and in both."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a process that has no images
            confusion = self.confusion.compute().cpu().double()  # a row per true class
        if not confusion.any():
            raise ValueError("there are no pixels to score")
        return confusion.sum(1), confusion.sum(0), confusion.diagonal()


class DetectionScores:
    """Average precision as COCO defines it (arXiv 1405.0312), of boxes and, if asked for, of masks.

    What is kept of a mask is its run-length code, some hundred bytes.

    Args:
        masks: Whether masks are scored too.

    Raises:
        ModuleNotFoundError: If torchmetrics, or both faster-coco-eval and pycocotools, are missing.
    """

    def __init__(self, masks: bool = False) -> None:
        self.masks = masks
        self.kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
        backend = "faster_coco_eval" if find_spec("faster_coco_eval") else "pycocotools"
        require(backend, "det")
        self.backend = backend
        self.metric = self._create()
        self._whole: dict[str, list[Any]] | None = None  # what all processes have gathered
        self._found, self._there = _Columns(), _Columns()

    def reset(self) -> None:
        """Forgets everything that was added."""
        self.metric.reset()
        self._whole = None

    def update(self, predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> None:
        """Adds what a detector found in images, and what is there.

        Args:
            predictions: For each image ``boxes`` (N, 4) as x1, y1, x2, y2, ``labels`` (N,), ``scores`` (N,) and, where
                masks are scored, ``masks`` (N, 1, H, W) or (N, H, W), of which what exceeds one half counts.
            targets: For each image ``boxes`` (M, 4), ``labels`` (M,), where masks are scored ``masks`` (M, H, W), and
                where known ``iscrowd`` (M,) and ``area`` (M,), by which COCO tells small objects from large ones.

        Raises:
            ValueError: If they are not as many, or something is missing.
        """
        self._whole = None
        if len(predictions) != len(targets):
            raise ValueError(f"got predictions for {len(predictions)} images and targets for {len(targets)}")
        for found, there in zip(predictions, targets, strict=True):
            found = self._prepared(found, self._found, "boxes", "scores", "labels")
            there = self._prepared(there, self._there, "boxes", "labels", "iscrowd", "area")
            self.metric.update([found], [there])

    def compute(self) -> dict[str, float]:
        """Returns the scores, each in 0..1, by name.

        ``box_ap`` is the mean over thresholds of 0.50 to 0.95 and over classes, ``box_ap50`` and ``box_ap75`` are of
        single thresholds, ``box_ap_small``, ``box_ap_medium`` and ``box_ap_large`` of objects of less than 32^2, of
        more, and of more than 96^2 pixels; NaN where there are no such objects. Those of masks start with ``mask``.

        Raises:
            ValueError: If no image was added.
        """
        found = self._computed(self._create())
        return {
            f"{name}_{ours}": _known(found[f"{prefix}{theirs}"])
            for name, prefix in self._prefixes()
            for theirs, ours in AVERAGE_PRECISION.items()
        }

    def class_scores(self) -> dict[int, dict[str, float]]:
        """Returns for every label that occurs the number of ``objects`` without crowds, ``box_ap`` and ``mask_ap``.

        Under several processes, one of them may ask alone after all have called :meth:`compute`.

        Raises:
            ValueError: If no image was added.
        """
        found = self._computed(self._create(class_metrics=True))
        labels = torch.cat(self._whole["groundtruth_labels"])[torch.cat(self._whole["groundtruth_crowds"]) == 0]
        scores = {}
        for place, label in enumerate(found["classes"].reshape(-1).tolist()):
            scores[label] = {"objects": int((labels == label).sum())}
            for name, prefix in self._prefixes():
                scores[label][f"{name}_ap"] = _known(found[f"{prefix}map_per_class"].reshape(-1)[place])
        return scores

    def _create(self, class_metrics: bool = False) -> Any:
        metric = require("torchmetrics.detection", "det").MeanAveragePrecision(
            iou_type=tuple(self.kinds),
            iou_thresholds=IOU_THRESHOLDS,
            rec_thresholds=RECALL_THRESHOLDS,
            class_metrics=class_metrics,
            backend=self.backend,
            sync_on_compute=False,
        )
        metric.warn_on_many_detections = False  # that COCO counts the best hundred of an image is its definition
        return metric

    def _computed(self, metric: Any) -> dict[str, Tensor]:
        """Results of a new metric that is given what all processes have gathered."""
        if self._whole is None:
            own = self.metric.metric_state
            states = _of_all_processes(own)
            self._whole = {name: [item for state in states for item in state[name]] for name in own}
        if not self._whole["groundtruth_labels"]:
            raise ValueError("there are no images to score")
        for name, items in self._whole.items():
            setattr(metric, name, items)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a metric that was not updated
            return metric.compute()

    def _prefixes(self) -> list[tuple[str, str]]:
        """Our names of what is scored, and how torchmetrics' names of its scores begin."""
        return [(name, f"{kind}_" if len(self.kinds) > 1 else "") for kind, name in self.kinds.items()]

    def _prepared(self, image: Mapping[str, Tensor], columns: "_Columns", *keys: str) -> dict[str, Tensor]:
        prepared = {key: image[key].detach().cpu() for key in keys if key in image}
        prepared |= {key: prepared[key].float() for key in ("boxes", "scores") if key in prepared}
        return prepared | ({"masks": columns(image["masks"].detach())} if self.masks and "masks" in image else {})


def _known(score: Tensor) -> float:
    return score.item() if score >= 0 else float("nan")


class _Columns:
    """Bytes on the CPU for one image's masks, stored column by column, in which order they are coded.

    They are used again for every image. Large arrays that come and go while small codes stay would leave gaps in the
    heap that nothing fits into: evaluations grew by gigabytes.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __call__(self, masks: Tensor) -> Tensor:
        """Masks (N, 1, H, W) or (N, H, W) to zeros and ones (N, H, W), valid until the next call."""
        masks = masks.flatten(0, 1) if masks.ndim == 4 else masks
        if masks.numel() > self.buffer.numel():
            self.buffer = torch.empty(masks.numel(), dtype=torch.uint8)
        columns = self.buffer[: masks.numel()].view(masks.transpose(1, 2).shape)
        for column, mask in zip(columns, masks, strict=True):
            column.copy_((mask > 0.5).T)
        return columns.transpose(1, 2)


def _of_all_processes(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has gathered. torchmetrics' own way needs the same number of images in each of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    return require("accelerate.utils").gather_object([state])
