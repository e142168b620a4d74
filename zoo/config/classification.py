"""Settings of image classification."""

from dataclasses import dataclass, field

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.settings import TrainConfig

__all__ = ["AugmentConfig", "ClassificationConfig", "DataConfig"]


@dataclass
class DataConfig:
    """Which images are used and how they are read.

    Attributes:
        name: ``digits`` (inside scikit-learn), ``fashion_mnist``, ``folder`` (``root/<split>/<class>/<image>``),
            ``tar`` (``root/<split>.tar`` or ``root/<split>/*.tar`` holding such class folders), or any name with a
            prefix that timm reads: ``wds/...``, ``hfds/...``, ``hfids/...``, ``tfds/...``, ``torch/...``.
        root: Folder of the data.
        train_split: Name of the training split (a sub-folder for ``folder``).
        val_split: Name of the split that is evaluated after every epoch.
        train_samples: Use this many training images of ``digits`` and ``fashion_mnist``, default all; or how many a
            stream has (``wds/``) that cannot tell.
        val_samples: Number of validation images, likewise.
        download: Fetch data sets that can be fetched if they are not on this machine.
        bad_files: What to do with truncated and non-image files in a folder: ``error``, or ``skip`` with a report.
        img_size: Side of the square images that the model sees, in pixels; default the data's own size for ``digits``
            and ``fashion_mnist``, the model's for files.
        in_chans: Image channels, 1 or 3; default 1 for ``digits`` and ``fashion_mnist``, 3 for files.
        mean: Per-channel mean that is subtracted (images in 0..1); default the data's or the model's.
        std: Per-channel standard deviation that is divided by, likewise.
        batch_size: Images per step and process.
        workers: Processes that decode files; unused for data held in memory.
    """

    name: str = "digits"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_samples: int | None = None
    val_samples: int | None = None
    download: bool = True
    bad_files: str = "error"
    img_size: int | None = None
    in_chans: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 128
    workers: int = 4

    def __post_init__(self) -> None:
        require_choice("data.bad_files", self.bad_files, ("error", "skip"))
        require_range("data.batch_size", self.batch_size, 1)
        require_range("data.workers", self.workers, 0)
        if self.in_chans is not None:
            require_choice("data.in_chans", self.in_chans, (1, 3))


@dataclass
class AugmentConfig:
    """What is done to training images. Evaluation images are only resized, cropped at the centre and normalised.

    Attributes:
        min_scale: Random resized crop keeps at least this share of the area (files only); 1 keeps everything.
        color_jitter: Strength of brightness, contrast and saturation jitter (files only).
        auto_augment: timm's augmentation policy, for example ``rand-m9-mstd0.5-inc1`` for RandAugment (files only).
        crop_padding: Shift by up to this many pixels in each direction, filled with zeros.
        flip: Probability of a horizontal flip.
        erase: Probability that a random rectangle is replaced by noise.
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off.
        mix_prob: Probability that a batch is mixed when mixup or cutmix is on.
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.
    """

    min_scale: float = 0.08
    color_jitter: float = 0.0
    auto_augment: str | None = None
    crop_padding: int = 0
    flip: float = 0.5
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_scale", "flip", "erase", "mix_prob", "label_smoothing"):
            require_range(f"augment.{name}", getattr(self, name), 0, 1)
        for name in ("color_jitter", "crop_padding", "mixup", "cutmix"):
            require_range(f"augment.{name}", getattr(self, name), 0)


@dataclass
class ClassificationConfig(TrainConfig):
    """Settings of a run that trains an image classifier.

    Attributes:
        data: The images.
        augment: What is done to training images.
    """

    task: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        mixing = self.augment.mixup > 0 or self.augment.cutmix > 0
        require_that(
            not mixing or self.data.batch_size % 2 == 0,
            f"mixup and cutmix pair the images of a batch: data.batch_size must be even, got {self.data.batch_size}",
        )
