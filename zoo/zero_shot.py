"""What a model of two towers can do without further training: find images by text and the other way, and name classes.

tower = load_contrastive("runs/vim_nano_fashion_scenes")
loader, present, names = open_classes(ZeroShotConfig(data="fashion_mnist"), tower.preprocessing)
scores = evaluate(ZeroShotClassifier(tower.model, tower.tokenizer, names, templates), loader, present, len(names))
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import DataConfig, ZeroShotConfig
from zoo.data import FileLoader, Normalize, Preprocessing, TensorLoader, make_loader, open_split
from zoo.data.captions import Tokenizer, build_tokenizer
from zoo.data.scenes import ITEM_NAMES, noun_of
from zoo.engine.checkpoint import load_trained
from zoo.engine.evaluate import autocast
from zoo.optional import require

__all__ = [
    "Contrastive",
    "ZeroShotClassifier",
    "embed_pairs",
    "load_contrastive",
    "open_classes",
    "pair_recall",
    "retrieval_recall",
]

RANKS = (1, 5, 10)
CHUNK = 1024  # queries at a time


@dataclass(frozen=True)
class Contrastive:
    """A model and how it wants its inputs.

    Attributes:
        name: Of its vision model, or of open_clip's configuration.
        model: With ``encode_image`` and ``encode_text``, in evaluation mode.
        tokenizer: Of texts.
        preprocessing: Of images.
    """

    name: str
    model: nn.Module
    tokenizer: Tokenizer
    preprocessing: Preprocessing


def load_contrastive(name: str, weights: str | None = None, device: torch.device | str = "cpu") -> Contrastive:
    """Loads a model from a run of ours, or any of open_clip.

    Args:
        name: A run's folder, a ``.safetensors`` file of a run, or a model name that open_clip knows, those of this zoo
            (``zoo-vim_small``) among them.
        weights: For a model name, the tag of published weights, or a file.
        device: Where the model goes.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If there is no such model, or there are no weights for it.
    """
    if Path(name).exists():
        model, card = load_trained(name, device)
        if card.task != "clip":
            raise ValueError(f"{name} was trained for {card.task}, not for pairs of images and texts")
        return Contrastive(card.model, model, build_tokenizer(**card.kwargs["tokenizer"]), card.preprocessing)
    open_clip = require("open_clip", "vlm")
    from zoo.heads import clip  # noqa: F401 registers this zoo's configurations

    if ":" not in name and name not in open_clip.list_models():
        raise ValueError(f"there is no run at {name!r} and no such model; see open_clip.list_models()")
    if not weights and ":" not in name:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"the model name {name!r} needs weights: a file{' or one of ' if tags else ''}{tags}")
    try:
        model = open_clip.create_model(name, pretrained=weights, device=device, require_pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"{name} with {weights}: {error}") from error
    wanted = open_clip.get_model_preprocess_cfg(model)
    preprocessing = Preprocessing(
        size=tuple(model.visual.image_size),
        in_chans=3,
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        interpolation=wanted["interpolation"],
        crop_mode="squash" if wanted["resize_mode"] == "squash" else "center",
    )
    return Contrastive(name, model.eval(), open_clip.get_tokenizer(name), preprocessing)


class ZeroShotClassifier(nn.Module):
    """Classifies images by the features of their classes' names.

    Args:
        model: Model of two towers.
        tokenizer: Its tokenizer.
        class_names: Names in label order.
        templates: Prompts with ``{}`` for the name; their features are averaged.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Tokenizer, class_names: Sequence[str], templates: Sequence[str]
    ) -> None:
        super().__init__()
        build = require("open_clip", "vlm").build_zero_shot_classifier
        self.model = model.eval()
        device = next(model.parameters()).device
        weights = build(model, tokenizer, list(class_names), list(templates), device=device)
        self.register_buffer("class_features", weights.float(), persistent=False)  # (D, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) to logits (B, classes)."""
        features = self.model.encode_image(images, normalize=True)
        return self.model.logit_scale.exp() * (features.float() @ self.class_features)


def open_classes(
    config: ZeroShotConfig,
    preprocessing: Preprocessing,
    batch_size: int = 128,
    workers: int = 4,
    bad_files: str = "error",
    download: bool = True,
    **shares: Any,
) -> tuple[TensorLoader | FileLoader, nn.Module, tuple[str, ...]]:
    """Opens images with classes for a model of two towers.

    Args:
        config: Which images, and how large they appear.
        preprocessing: How the model wants them.
        batch_size: Images at a time.
        workers: Processes that decode files.
        bad_files: What to do with unreadable files: ``error``, or ``skip`` with a report.
        download: Fetch data sets that can be fetched if they are not on this machine.
        **shares: The device, by default the CPU, and this process's place.

    Returns:
        A loader of bytes and labels, what makes the model's inputs of these bytes, and the classes' names.

    Raises:
        FileNotFoundError: If the data is not there.
        ValueError: If there are not as many names as classes.
    """
    size = tuple(max(1, round(config.fill * side)) for side in preprocessing.size)
    data = DataConfig(
        name=config.data,
        root=config.root,
        val_split=config.split,
        val_samples=config.samples,
        download=download,
        bad_files=bad_files,
        img_size=min(size),  # of data in memory, which are square
        batch_size=batch_size,
        workers=workers,
    )
    dataset, found = open_split(data, config.split)
    default = tuple(map(noun_of, range(len(ITEM_NAMES)))) if config.data == "fashion_mnist" else _readable(found)
    names = tuple(config.class_names or default)
    if found and len(names) != len(found):
        raise ValueError(f"there are {len(names)} class names for the {len(found)} classes {', '.join(found)}")
    shares = {"device": "cpu", **shares}
    inner = Preprocessing(**{**vars(preprocessing), "size": size})
    device = shares["device"]
    loader = make_loader(dataset, inner, data, **shares)
    return loader, _Framed(preprocessing).to(device), names


class _Framed(nn.Module):
    """Bytes (B, C, h, w), grey or RGB, to normalised images (B, 3, H, W) with the given in the middle of black."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.size
        self.in_chans = preprocessing.in_chans
        self.normalize = Normalize(preprocessing.mean, preprocessing.std)

    def forward(self, images: Tensor) -> Tensor:
        height, width = (full - own for full, own in zip(self.size, images.shape[-2:], strict=True))
        margins = (width // 2, width - width // 2, height // 2, height - height // 2)
        return self.normalize(F.pad(images.expand(-1, self.in_chans, -1, -1), margins))


@torch.no_grad()
def embed_pairs(
    model: nn.Module,
    loader: TensorLoader | FileLoader,
    tokens: Tensor,
    normalize: Callable[[Tensor], Tensor],
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Features of images and of their texts; under several processes each runs its share and all get the whole.

    Args:
        model: Model of two towers.
        loader: Yields uint8 images and the numbers of their pairs on the model's device.
        tokens: Of all N texts, (N, L).
        normalize: Maps uint8 images to the model's input.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        Features of the images and of the texts, normalised, float32 (N, D) each, in the order of the data.

    Raises:
        ValueError: If there are no pairs.
    """
    model.eval()
    parts = []
    for images, numbers in loader:
        with autocast(images.device, precision):
            image_features = model.encode_image(normalize(images), normalize=True)
            text_features = model.encode_text(tokens[numbers].long(), normalize=True)
        parts.append((image_features.float(), text_features.float(), numbers))
    if not parts:
        raise ValueError("there are no pairs to evaluate")
    images, texts, numbers = (_gather(torch.cat(part)) for part in zip(*parts, strict=True))
    order = numbers.argsort()
    return images[order], texts[order]


def pair_recall(
    image_features: Tensor, text_features: Tensor, image_ids: Tensor, caption_ids: Tensor, ranks: Iterable[int] = RANKS
) -> dict[str, float]:
    """Recall of captions by images and of images by captions.

    Every different image and every different caption counts once: an image may have several captions and a caption
    several images, and each of them is right.

    Args:
        image_features: Of the image of every pair, (N, D).
        text_features: Of its caption, (N, D).
        image_ids: Equal numbers for pairs with the same image, (N,).
        caption_ids: Equal numbers for pairs with the same caption, (N,).
        ranks: The k of recall@k.

    Returns:
        Percentages ``i2t_recall<k>`` and ``t2i_recall<k>``.
    """
    device = image_features.device
    first_image, image = _first_of_each(image_ids.to(device))
    first_text, text = _first_of_each(caption_ids.to(device))
    images, texts = image_features[first_image], text_features[first_text]
    pairs = torch.stack([image, text], dim=1)
    found = {
        "i2t": retrieval_recall(images, texts, pairs, ranks),
        "t2i": retrieval_recall(texts, images, pairs.flip(1), ranks),
    }
    return {f"{way}_recall{k}": 100 * share for way, shares in found.items() for k, share in shares.items()}


def retrieval_recall(queries: Tensor, gallery: Tensor, pairs: Tensor, ranks: Iterable[int] = RANKS) -> dict[int, float]:
    """Share of queries that have a right item among the k most similar ones.

    Equal similarities count against the model: one that gives the same feature to everything finds nothing.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        pairs: Which queries and items belong together, int64 (P, 2); every query has at least one item.
        ranks: The k of recall@k.

    Returns:
        The share for every k, 0 to 1.
    """
    places = []
    for start in range(0, len(queries), CHUNK):
        scores = queries[start : start + CHUNK] @ gallery.T  # (q, G)
        here = (pairs[:, 0] >= start) & (pairs[:, 0] < start + len(scores))
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[pairs[here, 0] - start, pairs[here, 1]] = True
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        places.append((~right & ~(scores < best)).sum(dim=1))  # wrong items before the first right one
    place = torch.cat(places)
    return {k: (place < k).float().mean().item() for k in ranks}


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where every number first appears (K,), and which of them each is (N,)."""
    _, which = ids.unique(return_inverse=True)
    numbers = torch.arange(len(ids), device=ids.device)
    first = torch.full((int(which.max()) + 1,), len(ids), device=ids.device)
    return first.scatter_reduce(0, which, numbers, "amin"), which


def _gather(tensor: Tensor) -> Tensor:
    """What all processes have, one after the other; their shares may differ in length."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    return torch.cat(require("torchmetrics.utilities.distributed").gather_all_tensors(tensor))


def _readable(names: Sequence[str] | None) -> tuple[str, ...]:
    """Folder names as words."""
    if not names:
        raise ValueError("the data does not tell its classes; set zero_shot.class_names")
    return tuple(name.replace("_", " ") for name in names)
