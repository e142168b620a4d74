"""From the configuration to batches: which data set, which preprocessing, which loader."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import str_to_interp_mode
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from zoo.config import AugmentConfig, DataConfig
from zoo.data.elpv import load_elpv
from zoo.data.fashion_mnist import load_fashion_mnist
from zoo.data.files import FileLoader, class_names_of, open_files
from zoo.data.memory import TensorData, TensorLoader, load_digits
from zoo.data.shards import open_shards

__all__ = ["IN_MEMORY", "Preprocessing", "image_transform", "make_loader", "open_split", "resolve_preprocessing"]

IN_MEMORY = ("digits", "fashion_mnist", "elpv", "elpv_binary")
ELPV_SIZE = 224  # pixels, of the 300 that the images have
CROP_PADDING = 4  # pixels on every side before a simple crop


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input; stored with every checkpoint.

    Attributes:
        size: Height and width in pixels.
        in_chans: Channels: 1 (grey) or 3 (RGB).
        mean: Subtracted per channel, images in 0..1.
        std: Divided by per channel.
        interpolation: How images are resized: ``bilinear``, ``bicubic``, ...
        crop_pct: Share of the resized image's shorter side that is kept, at the centre.
        crop_mode: ``center``; ``squash`` to resize to the size whatever the image's shape; ``border`` to pad it.
    """

    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @property
    def data_config(self) -> dict[str, Any]:
        """The same as timm's configs have it."""
        own = asdict(self)
        return {"input_size": (own.pop("in_chans"), *own.pop("size")), **own}


def open_split(
    config: DataConfig, split: str, training: bool = False, class_names: tuple[str, ...] | None = None
) -> tuple[TensorData | Dataset, tuple[str, ...] | None]:
    """Opens one split of the configured data.

    Args:
        config: The data section of the configuration.
        split: Name of the split.
        training: Whether it will be used for training (only streams care).
        class_names: Class names in label order, if they are already known from another split or a checkpoint.

    Returns:
        The data set, and its class names in label order (None if the format does not tell).

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or its classes are not among ``class_names``.
    """
    if config.name in IN_MEMORY:
        data = _load_in_memory(config, split).first(config.train_samples if training else config.val_samples)
        return (data.resized(config.img_size) if config.img_size else data), data.class_names
    labels = {name: index for index, name in enumerate(class_names)} if class_names else None
    if config.name in ("folder", "tar"):
        dataset = open_files(config.name, config.root, split, labels, config.bad_files)
    elif config.name == "shards":
        dataset = open_shards(config.root, split, check=not training, bad_files=config.bad_files)
    else:
        dataset = open_files(
            config.name,
            config.root,
            split,
            is_training=training,
            batch_size=config.batch_size,
            num_samples=config.train_samples if training else config.val_samples,
            download=config.download,
            input_img_mode="",
        )
    return dataset, class_names_of(dataset) or class_names


def _load_in_memory(config: DataConfig, split: str) -> TensorData:
    if config.name == "digits":
        return load_digits(split)
    if config.name == "fashion_mnist":
        return load_fashion_mnist(split, config.root, config.download)
    classes = 2 if config.name == "elpv_binary" else 4
    return load_elpv(split, classes, config.img_size or ELPV_SIZE, config.root)


def resolve_preprocessing(config: DataConfig, dataset: TensorData | Dataset | None, model: nn.Module) -> Preprocessing:
    """Settles size and normalisation: the configuration wins, then the data's own values, then the model's."""
    if isinstance(dataset, TensorData):
        return Preprocessing(
            size=tuple(dataset.images.shape[-2:]),
            in_chans=dataset.images.shape[1],
            mean=tuple(config.mean or dataset.mean),
            std=tuple(config.std or dataset.std),
        )
    of_model = resolve_model_data_config(model)
    in_chans = config.in_chans or 3
    mean, std = (_per_channel(of_model[key], in_chans) for key in ("mean", "std"))
    return Preprocessing(
        size=(config.img_size, config.img_size) if config.img_size else tuple(of_model["input_size"][-2:]),
        in_chans=in_chans,
        mean=tuple(config.mean or mean),
        std=tuple(config.std or std),
        interpolation=of_model["interpolation"],
        crop_pct=config.crop_pct or of_model["crop_pct"],
        crop_mode=of_model["crop_mode"],
    )


def image_transform(
    preprocessing: Preprocessing, augment: AugmentConfig | None = None
) -> Callable[[Image.Image], Tensor]:
    """Builds the transform of single images: PIL image to uint8 tensor (C, H, W).

    Args:
        preprocessing: Size and interpolation.
        augment: Augmentation of training images; default resizes and crops at the centre.
    """
    if augment is None:
        transform = create_transform(
            (preprocessing.in_chans, *preprocessing.size),
            interpolation=preprocessing.interpolation,
            crop_pct=preprocessing.crop_pct,
            crop_mode=preprocessing.crop_mode,
            normalize=False,
        )
    else:
        crop, change, to_tensor = transforms_imagenet_train(
            preprocessing.size,
            scale=(augment.min_scale, 1.0),
            ratio=(1.0, 1.0) if augment.min_scale == 1 else (3 / 4, 4 / 3),
            hflip=0.0,  # done on whole batches, like erasing
            color_jitter=augment.color_jitter or None,
            force_color_jitter=True,
            auto_augment=augment.auto_augment,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            normalize=False,
            separate=True,
        )
        crop = _simple_crop(preprocessing) if augment.simple_crop else crop
        transform = transforms.Compose([crop, change, to_tensor])
    return partial(_convert_and_transform, "L" if preprocessing.in_chans == 1 else "RGB", transform)


def make_loader(
    dataset: TensorData | Dataset,
    preprocessing: Preprocessing,
    config: DataConfig,
    device: torch.device | str,
    augment: AugmentConfig | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> TensorLoader | FileLoader:
    """Builds the loader that fits the data set: both kinds yield uint8 images (B, C, H, W) and labels (B,).

    Args:
        dataset: What :func:`open_split` returned.
        preprocessing: Size and colour of the images.
        config: The data section: batch size and workers.
        device: Where batches go.
        augment: Augmentation of training images; default is an evaluation loader: in order, complete, unchanged.
        seed: Seed of order and augmentation.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If the augmentation asks for what data in memory cannot do.
    """
    training = augment is not None
    shares = {"training": training, "seed": seed, "rank": rank, "world_size": world_size}
    shares["repeats"] = augment.repeats if training else 1
    if isinstance(dataset, TensorData):
        if training and (augment.auto_augment or augment.color_jitter or augment.simple_crop):
            raise ValueError(
                "augment.auto_augment, augment.color_jitter and augment.simple_crop work on image files; for "
                f"{config.name} use augment.crop_padding, augment.flip, augment.erase, augment.mixup and augment.cutmix"
            )
        return TensorLoader(dataset, config.batch_size, device, **shares)
    transform = image_transform(preprocessing, augment)
    return FileLoader(dataset, transform, config.batch_size, config.workers, device, **shares)


def _simple_crop(preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    """Resizes the shorter side to the model's and cuts the model's image out at a random place."""
    resize = transforms.Resize(max(preprocessing.size), str_to_interp_mode(preprocessing.interpolation))
    cut = transforms.RandomCrop(preprocessing.size, CROP_PADDING, padding_mode="reflect")
    return transforms.Compose([resize, cut])


def _convert_and_transform(mode: str, transform: Callable[[Image.Image], Tensor], image: Image.Image) -> Tensor:
    return transform(image.convert(mode))


def _per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """RGB statistics for RGB images, their average for grey ones."""
    if len(values) == in_chans:
        return tuple(values)
    return (sum(values) / len(values),) * in_chans
