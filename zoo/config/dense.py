"""Settings that segmentation and detection share: a backbone with a head, and images with masks or boxes."""

from dataclasses import dataclass, field
from typing import Any

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.settings import ModelConfig

__all__ = ["DenseDataConfig", "DenseModelConfig"]


@dataclass
class DenseModelConfig(ModelConfig):
    """A backbone, whose settings are those of :class:`~zoo.config.ModelConfig`, and a head.

    ``pretrained`` and ``checkpoint`` are weights of the backbone, of a classifier for example. ``kwargs`` are arguments
    of :class:`zoo.heads.dense_backbone.DenseBackbone` and of the backbone's constructor.

    Attributes:
        head: Name of the head, see ``zoo.list_heads``.
        head_kwargs: Further arguments of ``zoo.create_segmentor`` or ``zoo.create_detector``, those of the head's class
            among them, for example ``{channels: 128}``.
        patch_size: Pixels to a cell of the backbone's finest map, of all its maps if it is columnar; default the
            model's own. Backbones that are not cut into patches, as ResNets, keep theirs.
    """

    name: str = "vmamba_nano"
    head: str = ""
    head_kwargs: dict[str, Any] = field(default_factory=dict)
    patch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("model.patch_size", 1 if self.patch_size is None else self.patch_size, 1)


@dataclass
class DenseDataConfig:
    """Which images are used and how they are read.

    Attributes:
        name: Name of the data.
        root: Folder of the data; of ``fashion_scenes`` that of Fashion-MNIST's files, if they are not found.
        train_split: Name of the training split.
        val_split: Name of the split that is evaluated after every epoch.
        train_samples: Use this many training images; default all, and 8,000 of ``fashion_scenes``.
        val_samples: Number of validation images, likewise; default all, and 1,000 of ``fashion_scenes``.
        download: Fetch Fashion-MNIST if it is not on this machine.
        bad_files: What to do with images and annotations that cannot be used: ``error``, or ``skip`` with a report.
        in_chans: Image channels, 1 or 3.
        batch_size: Images per step and process.
        val_batch_size: The same for evaluation; default ``batch_size``.
        workers: Processes that read images and augment them.
    """

    name: str = "fashion_scenes"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_samples: int | None = None
    val_samples: int | None = None
    download: bool = True
    bad_files: str = "error"
    in_chans: int = 3
    batch_size: int = 16
    val_batch_size: int | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        for name in ("train_samples", "val_samples", "val_batch_size"):
            value = getattr(self, name)
            require_range(f"data.{name}", 1 if value is None else value, 1)
        require_choice("data.bad_files", self.bad_files, ("error", "skip"))
        require_choice("data.in_chans", self.in_chans, (1, 3))
        require_that(
            self.name != "fashion_scenes" or self.in_chans == 3,
            "fashion_scenes are coloured: data.in_chans has to be 3",
        )
        require_range("data.batch_size", self.batch_size, 1)
        require_range("data.workers", self.workers, 0)
