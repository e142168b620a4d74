"""From the configuration to the data, the loader and the model of segmentation and detection."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo
from zoo.config import DenseDataConfig, DenseModelConfig, DetectionConfig, SegmentationConfig
from zoo.data import Preprocessing
from zoo.data.dense import (
    DenseLoader,
    DenseTransform,
    DetectionData,
    SegmentationData,
    box_flip,
    large_scale_jitter,
    make_dense_loader,
    open_detection,
    open_segmentation,
    segmentation_augment,
    segmentation_resize,
)
from zoo.data.scenes import FashionScenes
from zoo.data.scenes_data import DrawnScenes, ScenesWithBoxes, ScenesWithMasks, draw_scenes
from zoo.detector import create_detector
from zoo.engine.build import recompute
from zoo.engine.checkpoint import ModelCard
from zoo.segmentor import create_segmentor

__all__ = [
    "box_loader",
    "build_detector",
    "build_segmentor",
    "mask_loader",
    "open_boxes",
    "open_masks",
]

TRAIN_SCENES, VAL_SCENES = 8000, 1000
WITH_MASKS = ("mask_rcnn",)  # heads that predict them

Names = tuple[str, ...]
MaskData = SegmentationData | ScenesWithMasks
BoxData = DetectionData | ScenesWithBoxes


def open_masks(config: SegmentationConfig, training: bool, class_names: Names | None = None) -> MaskData:
    """Opens the training or the validation split of data for segmentation.

    Args:
        config: The complete configuration.
        training: Which of the two.
        class_names: Names in label order, if they are known from another split or a card.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If it is damaged, or its classes are not these.
    """
    data = config.data
    if data.name == "fashion_scenes":
        dataset = ScenesWithMasks(_draw(data, data.img_size, training))
        _check_names(dataset.class_names, class_names)
        return dataset
    dataset = open_segmentation(
        data.name,
        _root(data),
        data.train_split if training else data.val_split,
        class_names=class_names,
        in_chans=data.in_chans,
        bad_files=data.bad_files,
    )
    return dataset.first(data.train_samples if training else data.val_samples)


def open_boxes(config: DetectionConfig, training: bool, class_names: Names | None = None) -> BoxData:
    """Opens the training or the validation split of data for detection; see :func:`open_masks`."""
    data = config.data
    if data.name == "fashion_scenes":
        dataset = ScenesWithBoxes(_draw(data, data.img_size, training))
        _check_names(dataset.class_names, class_names)
        return dataset
    dataset = open_detection(
        _root(data),
        data.train_split if training else data.val_split,
        training=training,
        masks=config.model.head in WITH_MASKS,
        class_names=class_names,
        keep_empty=data.keep_empty,
        in_chans=data.in_chans,
        bad_files=data.bad_files,
    )
    return dataset.first(data.train_samples if training else data.val_samples)


def mask_loader(
    dataset: MaskData, preprocessing: Preprocessing, config: SegmentationConfig, training: bool, **shares: Any
) -> DenseLoader:
    """Builds the loader of :func:`open_masks`'s data; ``shares`` are the device and this process's place."""
    return make_dense_loader(
        dataset,
        _batch_size(config.data, training),
        training,
        _mask_transform(config, training, preprocessing.mean),
        seed=config.seed,
        workers=config.data.workers,
        **shares,
    )


def _mask_transform(config: SegmentationConfig, training: bool, mean: Sequence[float]) -> DenseTransform | None:
    augment, size = config.augment, config.data.img_size
    if training:
        scale = tuple(augment.scale)
        return segmentation_augment(
            config.crop_size, size, scale, augment.cat_max_ratio, augment.flip, augment.distort, mean
        )
    return None if config.data.name == "fashion_scenes" else segmentation_resize(size)  # scenes have the size


def box_loader(
    dataset: BoxData, preprocessing: Preprocessing, config: DetectionConfig, training: bool, **shares: Any
) -> DenseLoader:
    """Builds the loader of :func:`open_boxes`'s data, likewise."""
    return make_dense_loader(
        dataset,
        _batch_size(config.data, training),
        training,
        _box_transform(config, preprocessing.mean) if training else None,
        seed=config.seed,
        workers=config.data.workers,
        **shares,
    )


def _box_transform(config: DetectionConfig, mean: Sequence[float]) -> DenseTransform | None:
    augment = config.augment
    if augment.jitter:
        return large_scale_jitter(config.data.max_size, tuple(augment.jitter), augment.flip, mean)
    return box_flip(augment.flip) if augment.flip else None


def build_segmentor(config: SegmentationConfig, class_names: Names) -> tuple[nn.Module, ModelCard]:
    """Creates the segmentor for classes and writes down how.

    Args:
        config: The complete configuration.
        class_names: Names in label order.

    Returns:
        The model on the CPU, and its card.

    Raises:
        ValueError: If the number of classes is too small, or names or weights do not fit.
    """
    height, width = config.crop_size
    names = _all_names(config.model, class_names)
    kwargs = {
        "head": config.model.head,
        "num_classes": len(names),
        "img_size": [height, width],
        "backbone_kwargs": _backbone_kwargs(config.model, config.data.in_chans),
        **config.model.head_kwargs,
    }
    model = create_segmentor(config.model.name, **kwargs, **_weights(config.model))
    if config.grad_checkpointing:
        recompute(model, config.grad_checkpointing)
    preprocessing = Preprocessing(
        (height, width), config.data.in_chans, model.mean, model.std, crop_pct=min(height, width) / config.data.img_size
    )
    return model, ModelCard(config.model.name, kwargs, names, preprocessing, config.data.name, task="segmentation")


def build_detector(config: DetectionConfig, class_names: Names) -> tuple[nn.Module, ModelCard]:
    """Creates the detector for classes and writes down how; see :func:`build_segmentor`."""
    data = config.data
    names = _all_names(config.model, class_names)
    backbone_kwargs = _backbone_kwargs(config.model, data.in_chans)
    if data.min_size == [data.max_size] and _has_positions(config.model.name):
        backbone_kwargs.setdefault("img_size", data.max_size)  # all images are squares of this size
    kwargs = {
        "head": config.model.head,
        "num_classes": len(names),
        "min_size": list(data.min_size),
        "max_size": data.max_size,
        **({"size_divisible": data.max_size} if config.augment.jitter else {}),
        "backbone_kwargs": backbone_kwargs,
        **config.model.head_kwargs,
    }
    model = create_detector(config.model.name, **kwargs, **_weights(config.model))
    if config.grad_checkpointing:
        recompute(model, config.grad_checkpointing)
    backbone = model.backbone
    preprocessing = Preprocessing((data.min_size[-1], data.max_size), data.in_chans, backbone.mean, backbone.std)
    return model, ModelCard(config.model.name, kwargs, names, preprocessing, data.name, task="detection")


def _draw(data: DenseDataConfig, size: int, training: bool) -> DrawnScenes:
    split = data.train_split if training else data.val_split
    count = (data.train_samples or TRAIN_SCENES) if training else (data.val_samples or VAL_SCENES)
    return draw_scenes(FashionScenes(split, count, size, root=data.root, download=data.download), data.workers)


def _check_names(own: Names, wanted: Names | None) -> None:
    if wanted is not None and wanted[: len(own)] != own:
        raise ValueError(f"fashion_scenes have the classes {', '.join(own)}, the model {', '.join(wanted)}")


def _root(data: DenseDataConfig) -> Path:
    if not data.root:
        raise ValueError(f"data {data.name!r} needs data.root, the folder of the images")
    return Path(data.root)


def _batch_size(data: DenseDataConfig, training: bool) -> int:
    return data.batch_size if training else data.val_batch_size or data.batch_size


def _all_names(model: DenseModelConfig, class_names: Names) -> Names:
    """The data's classes, and numbers for what the model has beyond them."""
    count = model.num_classes or len(class_names)
    if count < len(class_names):
        raise ValueError(f"model.num_classes is {count}, but the data has {len(class_names)} classes")
    return (*class_names, *(str(label) for label in range(len(class_names), count)))


def _weights(model: DenseModelConfig) -> dict[str, Any]:
    """Where the backbone's weights come from; not for the card, as the run's own weights hold them."""
    return {"pretrained": model.pretrained, "checkpoint": model.checkpoint}


def _backbone_kwargs(model: DenseModelConfig, in_chans: int) -> dict[str, Any]:
    kwargs = {"in_chans": in_chans, "drop_path_rate": model.drop_path, **model.kwargs}
    if model.patch_size is not None and _is_cut_into_patches(model.name):
        kwargs.setdefault("patch_size", model.patch_size)
    return kwargs


def _is_cut_into_patches(name: str) -> bool:
    return "patch_size" in inspect.signature(type(_plan(name)).__init__).parameters


def _has_positions(name: str) -> bool:
    return hasattr(_plan(name), "set_input_size")


def _plan(name: str) -> nn.Module:
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return zoo.create_model(name)
