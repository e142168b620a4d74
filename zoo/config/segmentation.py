"""Settings of semantic segmentation."""

from dataclasses import dataclass, field

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.dense import DenseDataConfig, DenseModelConfig
from zoo.config.settings import TrainConfig

__all__ = [
    "SegmentationAugmentConfig",
    "SegmentationConfig",
    "SegmentationDataConfig",
    "SegmentationInferenceConfig",
    "SegmentationModelConfig",
]


@dataclass
class SegmentationModelConfig(DenseModelConfig):
    """A segmentor, see :class:`~zoo.config.DenseModelConfig`."""

    head: str = "uper_net"


@dataclass
class SegmentationDataConfig(DenseDataConfig):
    """Images with masks; the other settings are those of :class:`~zoo.config.DenseDataConfig`.

    Attributes:
        name: ``fashion_scenes`` (composed of Fashion-MNIST), ``ade20k``, ``cityscapes``, ``voc`` or ``folder``, whose
            layouts are described in :mod:`zoo.data.dense.masks`.
        img_size: Length in pixels to which the shorter side of images is brought, before augmentation scales them, and
            for evaluation. Fashion scenes are drawn of this size.
    """

    img_size: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("data.name", self.name, ("fashion_scenes", "ade20k", "cityscapes", "voc", "folder"))
        require_range("data.img_size", self.img_size, 1)


@dataclass
class SegmentationAugmentConfig:
    """What is done to training images.

    Attributes:
        crop_size: Height and width of training images in pixels; default a square of ``data.img_size``.
        scale: Least and largest factor by which images are scaled before.
        cat_max_ratio: How much of a crop one class may fill, 0 to 1, of ten crops that are tried.
        flip: Probability of a horizontal flip.
        distort: Change brightness, contrast, saturation and hue, each with probability one half.
    """

    crop_size: list[int] | None = None
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    distort: bool = True

    def __post_init__(self) -> None:
        _require_size("augment.crop_size", self.crop_size)
        require_that(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1],
            f"augment.scale has to be a least and a largest factor, got {self.scale}",
        )
        require_that(0 < self.cat_max_ratio <= 1, f"augment.cat_max_ratio must be in (0, 1], got {self.cat_max_ratio}")
        require_range("augment.flip", self.flip, 0, 1)


@dataclass
class SegmentationInferenceConfig:
    """How an image is predicted, in evaluation and afterwards.

    Attributes:
        mode: ``whole`` for whole images, ``slide`` for windows whose logits are averaged where they overlap.
        crop_size: Height and width of a window in pixels; default that of training images.
        stride: Vertical and horizontal step from window to window; default two thirds of the window.
        scales: Factors at which the image is seen, whose probabilities are averaged.
        flip: See each of them mirrored too.
    """

    mode: str = "whole"
    crop_size: list[int] | None = None
    stride: list[int] | None = None
    scales: list[float] = field(default_factory=lambda: [1.0])
    flip: bool = False

    def __post_init__(self) -> None:
        require_choice("inference.mode", self.mode, ("whole", "slide"))
        _require_size("inference.crop_size", self.crop_size)
        _require_size("inference.stride", self.stride)
        require_that(
            bool(self.scales) and min(self.scales) > 0,
            f"inference.scales has to hold positive factors, got {self.scales}",
        )


@dataclass
class SegmentationConfig(TrainConfig):
    """Settings of a run that trains a segmentor.

    Attributes:
        data: The images.
        augment: What is done to training images.
        inference: How images are predicted.
    """

    task: str = "segmentation"
    model: SegmentationModelConfig = field(default_factory=SegmentationModelConfig)
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    augment: SegmentationAugmentConfig = field(default_factory=SegmentationAugmentConfig)
    inference: SegmentationInferenceConfig = field(default_factory=SegmentationInferenceConfig)

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of training images."""
        return tuple(self.augment.crop_size or (self.data.img_size,) * 2)

    @property
    def window(self) -> tuple[int, int] | None:
        """Height and width of the windows that are predicted; None for whole images."""
        return tuple(self.inference.crop_size or self.crop_size) if self.inference.mode == "slide" else None


def _require_size(key: str, size: list[int] | None) -> None:
    require_that(
        size is None or (len(size) == 2 and min(size) > 0), f"{key} has to be a height and a width, got {size}"
    )
