"""Settings of object detection and instance segmentation."""

from dataclasses import dataclass, field

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.dense import DenseDataConfig, DenseModelConfig
from zoo.config.settings import TrainConfig

__all__ = ["DetectionAugmentConfig", "DetectionConfig", "DetectionDataConfig", "DetectionModelConfig"]


@dataclass
class DetectionModelConfig(DenseModelConfig):
    """A detector, see :class:`~zoo.config.DenseModelConfig`; ``mask_rcnn`` predicts masks too."""

    head: str = "mask_rcnn"


@dataclass
class DetectionDataConfig(DenseDataConfig):
    """Images with boxes and masks; the other settings are those of :class:`~zoo.config.DenseDataConfig`.

    Attributes:
        name: ``fashion_scenes`` (composed of Fashion-MNIST) or ``coco``, which is any data in COCO's format, see
            :func:`zoo.data.dense.open_detection`.
        img_size: Side of fashion scenes in pixels.
        min_size: Lengths in pixels to which the shorter side of images is brought: training draws one for each image,
            evaluation takes the last.
        max_size: Pixels that the longer side does not exceed.
        keep_empty: Train on images without objects too.
    """

    img_size: int = 256
    min_size: list[int] = field(default_factory=lambda: [800])
    max_size: int = 1333
    keep_empty: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("data.name", self.name, ("fashion_scenes", "coco"))
        require_that(
            bool(self.min_size) and 0 < min(self.min_size) <= max(self.min_size) <= self.max_size,
            f"data.min_size has to hold lengths between 1 and data.max_size={self.max_size}, got {self.min_size}",
        )


@dataclass
class DetectionAugmentConfig:
    """What is done to training images.

    Attributes:
        flip: Probability of a horizontal flip.
        jitter: Large-scale jitter (arXiv 2012.07177): least and largest length of the longer side, relative to
            ``data.max_size``, to a square of which images are then cropped and padded. ``data.min_size`` has to be the
            same one length. Default none, as in recipes of 12 and 36 epochs.
    """

    flip: float = 0.5
    jitter: list[float] | None = None

    def __post_init__(self) -> None:
        require_range("augment.flip", self.flip, 0, 1)
        require_that(
            self.jitter is None or (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]),
            f"augment.jitter has to be a least and a largest factor, got {self.jitter}",
        )


@dataclass
class DetectionConfig(TrainConfig):
    """Settings of a run that trains a detector.

    Attributes:
        data: The images.
        augment: What is done to training images.
    """

    task: str = "detection"
    model: DetectionModelConfig = field(default_factory=DetectionModelConfig)
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    augment: DetectionAugmentConfig = field(default_factory=DetectionAugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_that(
            self.augment.jitter is None or self.data.min_size == [self.data.max_size],
            f"augment.jitter makes squares of data.max_size={self.data.max_size}: data.min_size has to be "
            f"[{self.data.max_size}], got {self.data.min_size}",
        )
