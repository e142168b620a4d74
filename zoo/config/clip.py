"""Settings of contrastive training of images with their captions."""

from dataclasses import dataclass, field
from typing import Any

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.settings import ModelConfig, TrainConfig

__all__ = ["ClipAugmentConfig", "ClipConfig", "ClipDataConfig", "ClipModelConfig", "ZeroShotConfig"]

SCENE_SIZE = 64


@dataclass
class ClipModelConfig(ModelConfig):
    """Two towers, see :func:`zoo.heads.clip.create_clip`.

    ``name``, ``pretrained``, ``checkpoint``, ``drop_path`` and ``kwargs`` are those of the vision model; its classifier
    is left out, so ``num_classes`` has no meaning.

    Attributes:
        text: Text tower: ``mamba2`` or ``transformer``.
        embed_dim: Width of the common features.
        context_length: Tokens of a text; shorter ones are padded.
        tokenizer: ``bpe`` for open_clip's, of 49,408 tokens; ``words`` for the words of the training captions.
        text_kwargs: Further arguments of the text tower, for example ``{width: 256, layers: 4}``.
        lock_vision: Train the text tower and the projection only (arXiv 2111.07991).
        unlocked_groups: With ``lock_vision``, train the last so many groups of layers of the vision model too.
    """

    name: str = "vmamba_nano"
    text: str = "mamba2"
    embed_dim: int = 512
    context_length: int = 77
    tokenizer: str = "bpe"
    text_kwargs: dict[str, Any] = field(default_factory=dict)
    lock_vision: bool = False
    unlocked_groups: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("model.text", self.text, ("mamba2", "transformer"))
        require_choice("model.tokenizer", self.tokenizer, ("bpe", "words"))
        require_range("model.embed_dim", self.embed_dim, 1)
        require_range("model.context_length", self.context_length, 3)
        require_range("model.unlocked_groups", self.unlocked_groups, 0)
        require_that(
            self.lock_vision or not self.unlocked_groups,
            "model.unlocked_groups has no effect without model.lock_vision",
        )


@dataclass
class ClipDataConfig:
    """Which images with captions are used and how they are read.

    Attributes:
        name: ``fashion_scenes`` (composed of Fashion-MNIST), or ``pairs`` for ``root/<split>.csv`` or
            ``root/<split>.json``: rows, or a list of objects, with ``image`` (path from that file) and ``caption``.
        root: Folder of the data; of ``fashion_scenes`` that of Fashion-MNIST's files, if they are not found.
        train_split: Name of the training split.
        val_split: Name of the split that is evaluated after every epoch.
        train_samples: Use this many training pairs; default all, and 8,000 of ``fashion_scenes``.
        val_samples: Number of validation pairs, likewise; default all, and 1,000 of ``fashion_scenes``.
        download: Fetch Fashion-MNIST if it is not on this machine.
        bad_files: What to do with images that are missing or damaged and captions that are empty: ``error``, or
            ``skip`` with a report.
        img_size: Side of the square images that the model sees, in pixels; default the vision model's, and 64 of
            ``fashion_scenes``.
        crop_pct: Share of the resized image's side that is kept when files are evaluated.
        mean: Per-channel mean that is subtracted (images in 0..1); default the vision model's.
        std: Per-channel standard deviation that is divided by, likewise.
        batch_size: Pairs per step and process; every caption is compared to the images of all processes.
        workers: Processes that read images or draw scenes.
    """

    name: str = "fashion_scenes"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_samples: int | None = None
    val_samples: int | None = None
    download: bool = True
    bad_files: str = "error"
    img_size: int | None = None
    crop_pct: float = 1.0
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 256
    workers: int = 4

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, ("fashion_scenes", "pairs"))
        require_choice("data.bad_files", self.bad_files, ("error", "skip"))
        for name in ("train_samples", "val_samples"):
            value = getattr(self, name)
            require_range(f"data.{name}", 2 if value is None else value, 2)
        require_range("data.batch_size", self.batch_size, 1)
        require_range("data.workers", self.workers, 0)
        require_range("data.img_size", 1 if self.img_size is None else self.img_size, 1)
        require_that(0 < self.crop_pct <= 1, f"data.crop_pct must be in (0, 1], got {self.crop_pct}")

    @property
    def image_size(self) -> int | None:
        """``img_size`` with its default; None for the vision model's."""
        return self.img_size or (SCENE_SIZE if self.name == "fashion_scenes" else None)


@dataclass
class ClipAugmentConfig:
    """What is done to training images. Captions stay as they are, so what they tell must stay true.

    Attributes:
        min_scale: Random resized crop keeps at least this share of the area (files only); 1 keeps everything.
        color_jitter: Strength of brightness, contrast and saturation jitter (files only).
        crop_padding: Shift by up to this many pixels in each direction, filled with zeros.
        flip: Probability of a horizontal flip, which makes left and right wrong.
        erase: Probability that a random rectangle is replaced by noise.
        black_point: Values below a random share of the brightness range, up to this one, become black, and the others
            are stretched: shadows and backgrounds darker than those of the training images look familiar then.
    """

    min_scale: float = 0.9
    color_jitter: float = 0.0
    crop_padding: int = 0
    flip: float = 0.0
    erase: float = 0.0
    black_point: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_scale", "flip", "erase"):
            require_range(f"augment.{name}", getattr(self, name), 0, 1)
        require_that(0 <= self.black_point < 1, f"augment.black_point must be in [0, 1), got {self.black_point}")
        for name in ("color_jitter", "crop_padding"):
            require_range(f"augment.{name}", getattr(self, name), 0)


@dataclass
class ZeroShotConfig:
    """Images with classes, which are predicted from the classes' names after every epoch.

    Attributes:
        data: ``fashion_mnist``, ``folder`` (``root/<split>/<class>/<image>``) or another name of
            :class:`~zoo.config.DataConfig`; default none.
        root: Folder of the data.
        split: Which part.
        samples: Use this many images of data held in memory; default all.
        class_names: Names in label order as prompts have them; default the folders' names, and for ``fashion_mnist``
            one word, or ``pair of trousers``.
        templates: Prompts, whose features are averaged; ``{}`` is the name of a class.
        fill: Share of the image's side that they are resized to; the rest is a black frame. For models that have only
            seen things smaller than a whole image.
    """

    data: str | None = None
    root: str | None = None
    split: str = "val"
    samples: int | None = None
    class_names: list[str] | None = None
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    fill: float = 1.0

    def __post_init__(self) -> None:
        require_that(0 < self.fill <= 1, f"zero_shot.fill must be in (0, 1], got {self.fill}")
        require_that(
            bool(self.templates) and all("{}" in template for template in self.templates),
            f"zero_shot.templates has to hold prompts with a place {{}} for the class, got {self.templates}",
        )


@dataclass
class ClipConfig(TrainConfig):
    """Settings of a run that trains an image tower and a text tower on pairs.

    Attributes:
        data: The images and captions.
        augment: What is done to training images.
        zero_shot: Images with classes that are predicted from the classes' names.
        loss: ``clip`` for the cross-entropy among the pairs of a batch (arXiv 2103.00020); ``siglip`` for every pair on
            its own (arXiv 2303.15343). ``optim.grad_accum`` adds no pairs to a batch.
    """

    task: str = "clip"
    model: ClipModelConfig = field(default_factory=ClipModelConfig)
    data: ClipDataConfig = field(default_factory=ClipDataConfig)
    augment: ClipAugmentConfig = field(default_factory=ClipAugmentConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    loss: str = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("loss", self.loss, ("clip", "siglip"))
        require_that(
            self.optim.layer_decay is None, "optim.layer_decay does not go through two towers; use model.lock_vision"
        )
