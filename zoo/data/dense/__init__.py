"""Data for dense tasks: images with masks for semantic segmentation, with boxes and instance masks for detection."""

from zoo.data.dense.coco import DetectionData, open_detection
from zoo.data.dense.images import IGNORED, read_image
from zoo.data.dense.loaders import AugmentedData, DenseLoader, make_dense_loader
from zoo.data.dense.masks import SegmentationData, open_segmentation
from zoo.data.dense.transforms import (
    DenseTransform,
    box_flip,
    large_scale_jitter,
    multi_scale_resize,
    segmentation_augment,
    segmentation_resize,
)

__all__ = [
    "IGNORED",
    "AugmentedData",
    "DenseLoader",
    "DenseTransform",
    "DetectionData",
    "SegmentationData",
    "box_flip",
    "large_scale_jitter",
    "make_dense_loader",
    "multi_scale_resize",
    "open_detection",
    "open_segmentation",
    "read_image",
    "segmentation_augment",
    "segmentation_resize",
]
