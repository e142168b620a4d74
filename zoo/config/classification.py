"""Settings of image classification."""

from dataclasses import dataclass, field

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.settings import TrainConfig

__all__ = ["AugmentConfig", "ClassificationConfig", "DataConfig", "DistillConfig"]


@dataclass
class DataConfig:
    """Which images are used and how they are read.

    Attributes:
        name: ``digits`` (inside scikit-learn), ``fashion_mnist``, ``elpv`` (solar cells by four probabilities of a
            defect) or ``elpv_binary`` (functional or defective), ``folder`` (``root/<split>/<class>/<image>``),
            ``tar`` (``root/<split>.tar`` or ``root/<split>/*.tar`` holding such class folders), ``shards`` (WebDataset
            files read in any order, see :mod:`zoo.data.shards`), or any name with a prefix that timm reads: ``wds/...``
            (the same as a stream), ``hfds/...``, ``hfids/...``, ``tfds/...``, ``torch/...``.
        root: Folder of the data.
        train_split: Name of the training split (a sub-folder for ``folder``).
        val_split: Name of the split that is evaluated after every epoch.
        train_samples: Use this many training images of data held in memory (``digits``, ``fashion_mnist``, ``elpv``),
            default all; or how many a stream has (``wds/``) that cannot tell.
        val_samples: Number of validation images, likewise.
        download: Fetch data sets that can be fetched if they are not on this machine.
        bad_files: What to do with truncated and non-image files in a folder or in shards: ``error``, or ``skip`` with a
            report.
        img_size: Side of the square images that the model sees, in pixels; default the data's own size for ``digits``
            and ``fashion_mnist``, 224 for ``elpv``, the model's for files.
        crop_pct: Share of the resized image's side that is kept when files are evaluated; default the model's.
        in_chans: Image channels of files, 1 or 3, default 3; data held in memory are grey.
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
    crop_pct: float | None = None
    in_chans: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 128
    workers: int = 4

    def __post_init__(self) -> None:
        require_choice("data.bad_files", self.bad_files, ("error", "skip"))
        require_range("data.batch_size", self.batch_size, 1)
        require_range("data.workers", self.workers, 0)
        require_that(
            self.crop_pct is None or 0 < self.crop_pct <= 1, f"data.crop_pct must be in (0, 1], got {self.crop_pct}"
        )
        if self.in_chans is not None:
            require_choice("data.in_chans", self.in_chans, (1, 3))


@dataclass
class AugmentConfig:
    """What is done to training images. Evaluation images are only resized, cropped at the centre and normalised.

    Attributes:
        repeats: Every image that an epoch draws is in it this many times, each time augmented anew, and the epoch is no
            longer for it: so it draws fewer images (repeated augmentation, arXiv 1901.09335, as in DeiT). Several
            processes get the copies of an image in turn.
        min_scale: Random resized crop keeps at least this share of the area (files only); 1 keeps everything.
        simple_crop: Instead resize the shorter side to the image size, pad by four reflected pixels and crop a square
            at random (DeiT III, arXiv 2204.07118; files only).
        color_jitter: Strength of brightness, contrast and saturation jitter, also beside a policy (files only).
        auto_augment: timm's augmentation policy, for example ``rand-m9-mstd0.5-inc1`` for RandAugment, or ``3a`` for
            3-Augment: grey, solarised or blurred (files only).
        crop_padding: Shift by up to this many pixels in each direction, filled with zeros.
        flip: Probability of a horizontal flip.
        erase: Probability that a random rectangle is replaced by noise.
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off.
        mix_prob: Probability that a batch is mixed when mixup or cutmix is on.
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.
    """

    repeats: int = 1
    min_scale: float = 0.08
    simple_crop: bool = False
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
        require_range("augment.repeats", self.repeats, 1)
        for name in ("min_scale", "flip", "erase", "mix_prob", "label_smoothing"):
            require_range(f"augment.{name}", getattr(self, name), 0, 1)
        for name in ("color_jitter", "crop_padding", "mixup", "cutmix"):
            require_range(f"augment.{name}", getattr(self, name), 0)


@dataclass
class DistillConfig:
    """From whom the model learns besides the labels, see :mod:`zoo.engine.distill`.

    The loss is ``label_weight`` times that of the labels plus ``weight`` times that of the teacher.

    Attributes:
        teacher: A run's folder or a ``.safetensors`` file of one; the name of a model with weights, ours or timm's; or
            ``ema`` for the moving average of the model itself (MESA, arXiv 2205.14083). Default none.
        previous: Folders or files of runs whose logits are added to the model's, in training and evaluation, and which
            stay as they are: the model learns what they leave (progressive distillation, arXiv 2503.01727).
        kind: ``soft`` for the Kullback-Leibler divergence from the teacher's probabilities, ``hard`` for the
            cross-entropy with the teacher's first guess, ``logits`` for the mean squared difference of the logits.
        weight: Factor of the teacher's loss.
        label_weight: Factor of the labels' loss; default ``1 - weight``.
        temperature: Divides the logits before the softmax of ``soft``, whose gradient is kept at its size by the square
            of this factor.
        start_epoch: Epochs that are trained on the labels alone before.
    """

    teacher: str | None = None
    previous: list[str] = field(default_factory=list)
    kind: str = "soft"
    weight: float = 0.5
    label_weight: float | None = None
    temperature: float = 1.0
    start_epoch: int = 0

    def __post_init__(self) -> None:
        require_choice("distill.kind", self.kind, ("soft", "hard", "logits"))
        require_range("distill.weight", self.weight, 0)
        require_range("distill.start_epoch", self.start_epoch, 0)
        require_that(self.temperature > 0, f"distill.temperature must be above 0, got {self.temperature}")
        if self.label_weight is None:
            require_that(self.weight <= 1, f"distill.weight={self.weight} is above 1; set distill.label_weight too")
        else:
            require_range("distill.label_weight", self.label_weight, 0)
        require_that(
            not (self.teacher == "ema" and self.previous),
            "distill.teacher=ema knows nothing of the students in distill.previous; name another teacher, or none",
        )


@dataclass
class ClassificationConfig(TrainConfig):
    """Settings of a run that trains an image classifier.

    Attributes:
        data: The images.
        augment: What is done to training images.
        distill: From whom the model learns besides the labels.
        loss: ``cross_entropy``, or ``bce`` for the mean binary cross-entropy of every class on its own.
        scores: ``accuracy`` logs top-1 and top-5; ``balanced`` logs balanced accuracy, macro F1 and AUROC too, which
            weigh all classes alike, and the best weights are those of the highest balanced accuracy.
    """

    task: str = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    loss: str = "cross_entropy"
    scores: str = "accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("loss", self.loss, ("cross_entropy", "bce"))
        require_choice("scores", self.scores, ("accuracy", "balanced"))
        require_that(
            self.distill.teacher != "ema" or self.ema_decay is not None,
            "distill.teacher=ema is the moving average of the model; set ema_decay",
        )
        mixing = self.augment.mixup > 0 or self.augment.cutmix > 0
        require_that(
            not mixing or self.data.batch_size % 2 == 0,
            f"mixup and cutmix pair the images of a batch: data.batch_size must be even, got {self.data.batch_size}",
        )
