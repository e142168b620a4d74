"""Images with captions: fashion scenes in memory, or image files listed in a CSV or JSON file; and their tokens."""

import csv
import difflib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from zoo.config import AugmentConfig, ClipAugmentConfig, ClipDataConfig
from zoo.data.files import FileLoader, report_bad_files, why_unreadable
from zoo.data.loaders import Preprocessing, image_transform
from zoo.data.memory import TensorData, TensorLoader
from zoo.data.scenes import FashionScenes, Scene, drawn, split_words, vocabulary
from zoo.optional import require

__all__ = [
    "CaptionFiles",
    "CaptionedImages",
    "Tokenizer",
    "WordTokenizer",
    "build_tokenizer",
    "caption_loader",
    "draw_captioned",
    "number_distinct",
    "open_captions",
    "read_pairs",
    "words_of",
]

_logger = logging.getLogger(__name__)

TRAIN_SCENES, VAL_SCENES = 8000, 1000
COLUMNS = ("image", "caption")
FIRST_WORD = 1  # number of it; 0 is the padding


class Tokenizer(Protocol):
    """Texts to tokens, as open_clip's tokenizers do it."""

    vocab_size: int
    context_length: int

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Returns int64 tokens (N, L), padded with zeros; every text ends with the largest token."""


class WordTokenizer:
    """Whole words and punctuation marks of a closed vocabulary, without regard to case.

    Args:
        words: The vocabulary, as :func:`zoo.data.scenes.split_words` splits texts.
        context_length: Tokens of a text, its beginning and end included.

    Attributes:
        pad: Token behind the end of a text.
        sot: Token at the beginning.
        eot: Token at the end, the largest.
        vocab_size: Number of tokens.

    Raises:
        ValueError: If there are no words, or one of them twice.
    """

    def __init__(self, words: Iterable[str], context_length: int = 77) -> None:
        self.words = tuple(words)
        self.context_length = context_length
        self.number = {word: number for number, word in enumerate(self.words, FIRST_WORD)}
        if not self.words or len(self.number) != len(self.words):
            raise ValueError(f"a vocabulary has at least one word and none twice, got {len(self.words)} words")
        self.pad = 0
        self.sot = FIRST_WORD + len(self.words)
        self.eot = self.sot + 1
        self.vocab_size = self.eot + 1

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON holds them."""
        return {"words": list(self.words), "context_length": self.context_length}

    def encode(self, text: str) -> list[int]:
        """Tokens of the words alone, without beginning, end and padding.

        Raises:
            ValueError: For a word that is not in the vocabulary; the message names the nearest.
        """
        words = split_words(text)
        for word in words:
            if word not in self.number:
                near = difflib.get_close_matches(word, self.words, n=3, cutoff=0.0)
                raise ValueError(f"the vocabulary has no word {word!r} (in {text!r}); nearest are {', '.join(near)}")
        return [self.number[word] for word in words]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text up to the first end, in lower case."""
        words = []
        for token in tokens:
            if token == self.eot:
                break
            if FIRST_WORD <= token < self.sot:
                words.append(self.words[token - FIRST_WORD])
        return re.sub(r" ([^a-z\s])", r"\1", " ".join(words))

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts to int64 tokens (N, L) with beginning, end and padding.

        Raises:
            ValueError: For an unknown word, or a text that is too long.
        """
        length = context_length or self.context_length
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), length), self.pad, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            numbers = [self.sot, *self.encode(text), self.eot]
            if len(numbers) > length:
                raise ValueError(
                    f"{text!r} has {len(numbers)} tokens with both ends, more than context_length={length}"
                )
            row[: len(numbers)] = torch.tensor(numbers)
        return tokens


def build_tokenizer(context_length: int, words: Sequence[str] | None = None) -> Tokenizer:
    """The tokenizer of a vocabulary; without one, that of open_clip, which cuts long texts off.

    Raises:
        ModuleNotFoundError: If open_clip is needed and not installed.
    """
    if words is not None:
        return WordTokenizer(words, context_length)
    return require("open_clip", "vlm").SimpleTokenizer(context_length=context_length)


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """N pairs of an image and a caption.

    Attributes:
        images: Images in memory whose labels are their numbers, or :class:`CaptionFiles`.
        captions: Caption of every pair.
        image_ids: Number of every pair's image, int64 (N,): an image can have several captions.
        caption_ids: Number of every pair's caption, int64 (N,): images can share one.
        words: The vocabulary if it is known beforehand, else None.
    """

    images: "TensorData | CaptionFiles"
    captions: tuple[str, ...]
    image_ids: Tensor
    caption_ids: Tensor
    words: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.captions)


class CaptionFiles(Dataset):
    """Image files and their numbers.

    Args:
        files: The files.

    Attributes:
        transform: Maps a PIL image to a uint8 tensor (C, H, W); to be set before use.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Reads an image."""
        with Image.open(self.files[index]) as image:
            return self.transform(image), index


def open_captions(config: ClipDataConfig, training: bool) -> CaptionedImages:
    """Opens the training or the validation split of the configured data.

    Args:
        config: The data section of the configuration.
        training: Which of the two.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged.
    """
    split = config.train_split if training else config.val_split
    count = config.train_samples if training else config.val_samples
    if config.name == "fashion_scenes":
        count = count or (TRAIN_SCENES if training else VAL_SCENES)
        scenes = FashionScenes(split, count, config.image_size, root=config.root, download=config.download)
        return draw_captioned(scenes, config.workers)
    if not config.root:
        raise ValueError("data 'pairs' needs data.root, the folder of the CSV or JSON files")
    paths = [Path(config.root) / f"{split}{suffix}" for suffix in (".csv", ".json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is neither {paths[0]} nor {paths[1]}; set data.root and the split's name")
    files, captions = read_pairs(path, config.bad_files)
    files, captions = files[:count], captions[:count]
    return CaptionedImages(CaptionFiles(files), tuple(captions), number_distinct(files), number_distinct(captions))


def read_pairs(path: Path, bad_files: str = "error") -> tuple[list[Path], list[str]]:
    """Reads which caption belongs to which image, and checks the images.

    Args:
        path: A CSV file with the columns ``image`` and ``caption``, or a JSON file with a list of such objects. Images
            are named by their path from its folder.
        bad_files: What to do with images that cannot be read and captions without a word: ``error``, or ``skip`` with a
            report.

    Returns:
        Files and captions.

    Raises:
        ValueError: If the file is not of that form, has bad rows under ``error``, or no good ones.
    """
    rows = _read_json(path) if path.suffix == ".json" else _read_csv(path)
    spoken = [(path.parent / image, caption.strip()) for image, caption in rows if caption.strip()]
    if len(spoken) < len(rows):
        names = [image for image, caption in rows if not caption.strip()]
        problem = f"{len(names)} of {len(rows)} captions in {path} are empty, the first one is of {names[0]!r}"
        if bad_files == "error":
            raise ValueError(f"{problem}; remove these rows, or leave them out with data.bad_files=skip")
        _logger.warning("%s; they are left out", problem)
    files = list(dict.fromkeys(file for file, _ in spoken))
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_why_bad, files))
    bad = {file: reason for file, reason in zip(files, reasons, strict=True) if reason}
    names = {str(file.relative_to(path.parent)): reason for file, reason in bad.items()}
    report_bad_files(names, len(files), path, bad_files)
    good = [(file, caption) for file, caption in spoken if file not in bad]
    if not good:
        raise ValueError(f"{path} has no pair of a readable image and a caption")
    return [file for file, _ in good], [caption for _, caption in good]


def draw_captioned(scenes: FashionScenes, workers: int = 0) -> CaptionedImages:
    """Draws scenes with their captions into memory, with a progress bar on a terminal.

    Args:
        scenes: What is to be drawn, at least one scene.
        workers: Processes that draw; 0 draws in this one.
    """
    images = torch.empty((len(scenes), 3, scenes.size, scenes.size), dtype=torch.uint8)
    captions = []
    for index, (image, caption) in enumerate(drawn(scenes, _caption, workers)):
        images[index] = image.permute(2, 0, 1)
        captions.append(caption)
    numbers = torch.arange(len(scenes))
    data = TensorData(images, numbers, class_names=(), mean=(), std=())
    return CaptionedImages(data, tuple(captions), numbers, number_distinct(captions), vocabulary())


def words_of(captions: Iterable[str]) -> tuple[str, ...]:
    """The words and punctuation marks of captions, sorted."""
    return tuple(sorted({word for caption in captions for word in split_words(caption)}))


def number_distinct(values: Sequence[Any]) -> Tensor:
    """Equal numbers for equal values, int64 (N,), in the order in which they first appear."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def caption_loader(
    data: CaptionedImages,
    preprocessing: Preprocessing,
    config: ClipDataConfig,
    augment: ClipAugmentConfig | None = None,
    **shares: Any,
) -> TensorLoader | FileLoader:
    """Builds the loader of images, uint8 (B, 3, H, W), and of the numbers of their pairs (B,).

    Args:
        data: What :func:`open_captions` returned.
        preprocessing: Size of the images.
        config: The data section: batch size and workers.
        augment: Augmentation of training images; default is an evaluation loader: in order, complete, unchanged.
        **shares: The device, this process's place, and the seed.

    Raises:
        ValueError: If there are fewer pairs than training needs for a batch.
    """
    shares["training"] = augment is not None
    if isinstance(data.images, TensorData):
        return TensorLoader(data.images, config.batch_size, **shares)
    crop = AugmentConfig(min_scale=augment.min_scale, color_jitter=augment.color_jitter) if augment else None
    transform = image_transform(preprocessing, crop)
    return FileLoader(data.images, transform, config.batch_size, config.workers, **shares)


def _read_csv(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} lacks the column {' and '.join(missing)}; its first line has to name image and caption, "
                f"and it names {', '.join(reader.fieldnames or ()) or 'nothing'}"
            )
        return [(row["image"] or "", row["caption"] or "") for row in reader]


def _read_json(path: Path) -> list[tuple[str, str]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    good = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(name), str) for name in COLUMNS) for row in rows
    )
    if not good:
        raise ValueError(f'{path} has to be a list of objects {{"image": "...", "caption": "..."}}')
    return [(row["image"], row["caption"]) for row in rows]


def _why_bad(file: Path) -> str | None:
    return why_unreadable(file) if file.is_file() else "there is no such file"


def _caption(scene: Scene) -> str:
    return scene.caption
