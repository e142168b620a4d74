"""Conversations about images: fashion scenes in memory, or files in the format of LLaVA's instruction data.

LLaVA's format is a JSON file with a list of objects::

    {"id": "train-000001", "image": "coco/0001.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is left of the bag?"},
        {"from": "gpt", "value": "A boot."}]}

``image`` is a path from the folder of images, or a list of them; text without images has none. The text has
``<image>`` once for every image. Turns of ``human`` and ``gpt`` alternate.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.config import VlmDataConfig
from zoo.data.captions import words_of
from zoo.data.files import report_bad_files, why_unreadable
from zoo.data.scenes import FashionScenes, Scene, drawn, vocabulary
from zoo.data.scenes.language import DESCRIBE
from zoo.optional import require

__all__ = [
    "CAPTION",
    "PLACEHOLDER",
    "Conversation",
    "Conversations",
    "draw_conversations",
    "open_conversations",
    "open_split",
    "read_llava",
]

_logger = logging.getLogger(__name__)

PLACEHOLDER = "<image>"
CAPTION = "caption"
KINDS = ("presence", "count", "corner", "relation", "color", CAPTION)  # those first that name the fewest items
ROLES = ("human", "gpt")
TRAIN_SCENES, VAL_SCENES = 8000, 1000


@dataclass(frozen=True)
class Conversation:
    """What is said about images.

    Attributes:
        name: What it is called in messages.
        turns: Pairs of question and answer; questions have ``<image>`` once for every image.
        images: Numbers of the images.
        kind: What is asked, ``count`` for example, or ``caption``; empty if it is not known.
        difficulty: Items of the scene; 0 if it is not known.
    """

    name: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[int, ...] = ()
    kind: str = ""
    difficulty: int = 0


@dataclass(frozen=True, eq=False)
class Conversations:
    """N conversations and their M images.

    Attributes:
        samples: The conversations.
        images: uint8 (M, 3, H, W), or M files.
        place: Where they are from, for messages.
        words: The vocabulary if it is known beforehand.
    """

    samples: tuple[Conversation, ...]
    images: Tensor | tuple[Path, ...]
    place: str
    words: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, numbers: Iterable[int]) -> "Conversations":
        """The conversations of these numbers, in that order."""
        return replace(self, samples=tuple(self.samples[number] for number in numbers))

    def vocabulary(self) -> tuple[str, ...]:
        """The words and punctuation marks, sorted."""
        texts = (text for sample in self.samples for turn in sample.turns for text in turn)
        return self.words or words_of(text.replace(PLACEHOLDER, " ") for text in texts)


def open_conversations(config: VlmDataConfig, seed: int = 0) -> tuple[Conversations, Conversations]:
    """Opens the training and the validation split of the configured data.

    Args:
        config: The data section of the configuration.
        seed: Decides which questions of a scene share a conversation.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged.
    """
    return open_split(config, True, seed), open_split(config, False, seed)


def open_split(config: VlmDataConfig, training: bool, seed: int = 0) -> Conversations:
    """The same for one of them."""
    split = config.train_split if training else config.val_split
    count = config.train_samples if training else config.val_samples
    if config.name == "fashion_scenes":
        count = count or (TRAIN_SCENES if training else VAL_SCENES)
        scenes = FashionScenes(split, count, config.image_size, root=config.root, download=config.download)
        if not training:
            return draw_conversations(scenes, config.texts, 1, config.workers)
        return draw_conversations(
            scenes, config.texts, config.turns, config.workers, seed, all_questions=config.all_questions
        )
    if not config.root:
        raise ValueError("data 'llava' needs data.root, the folder of the JSON files")
    root = Path(config.root)
    path = root / f"{split or config.train_split}.json"
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in root.glob("*.json"))) or "no JSON file"
        raise FileNotFoundError(f"there is no {path}, but {there}; set data.root and the split's name")
    data = read_llava(path, Path(config.images) if config.images else root / "images", config.bad_files)
    if config.val_split is None:
        data = _hold_out(data, config.val_samples, training)
    return data.take(range(min(count or len(data), len(data))))


def _hold_out(data: Conversations, count: int, training: bool) -> Conversations:
    """The conversations without some that are evenly spread over them, or these."""
    if count >= len(data):
        raise ValueError(
            f"data.val_samples={count} of the {len(data)} conversations in {data.place} leave none to train"
        )
    held = {number * len(data) // count for number in range(count)}
    return data.take(sorted(set(range(len(data))) - held) if training else sorted(held))


def read_llava(path: Path, folder: Path, bad_files: str = "error") -> Conversations:
    """Reads a file of LLaVA's format and checks the images, with a progress bar on a terminal.

    Args:
        path: The JSON file.
        folder: Folder of the images.
        bad_files: What to do with conversations that are not of the format or whose images cannot be read: ``error``,
            or ``skip`` with a report.

    Raises:
        ValueError: If the file is no list, has bad conversations under ``error``, or no good ones.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} has to be a list of conversations, not {type(rows).__name__}")
    parsed = [(_name(number, row), *_parse(row)) for number, row in enumerate(rows)]  # name, turns, images, problem
    named = dict.fromkeys(image for _, _, images, _ in parsed for image in images)
    unreadable = _unreadable(folder, list(named))
    bad = {name: problem for name, _, _, problem in parsed if problem}
    bad |= {name: unreadable[image] for name, _, images, _ in parsed for image in images if image in unreadable}
    report_bad_files(bad, len(rows), path, bad_files, "conversations", "cannot be used")
    good = [(name, turns, images) for name, turns, images, _ in parsed if name not in bad]
    if not good:
        raise ValueError(f"{path} has no conversation that can be used")
    number = {
        image: index for index, image in enumerate(dict.fromkeys(image for *_, images in good for image in images))
    }
    samples = [Conversation(name, turns, tuple(number[image] for image in images)) for name, turns, images in good]
    return Conversations(tuple(samples), tuple(folder / image for image in number), str(path))


def _name(number: int, row: Any) -> str:
    """What a row is called in messages."""
    given = row.get("id") if isinstance(row, dict) else None
    return f"row {number}" if given is None else f"row {number} (id {given})"


def _parse(row: Any) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...], str | None]:
    """Turns, names of images, and what is wrong with a row."""
    try:
        images = _images_of(row)
        return _turns_of(row, len(images)), images, None
    except ValueError as error:
        return (), (), str(error)


def _images_of(row: Any) -> tuple[str, ...]:
    if not isinstance(row, dict):
        raise ValueError(f"is no object with conversations, but {type(row).__name__}")
    images = row.get("image")
    images = [] if images is None or images == "" else images
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"image has to be the name of a file or a list of names, and is {images!r}")
    return tuple(images)


def _turns_of(row: dict[str, Any], images: int) -> tuple[tuple[str, str], ...]:
    said = row.get("conversations")
    if not isinstance(said, list) or not said:
        raise ValueError(f"conversations is {'missing' if said is None else 'no list of turns, or empty'}")
    for number, turn in enumerate(said):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise ValueError(f"turn {number} has to have from and value, which are texts")
        if turn["from"] != ROLES[number % 2]:
            raise ValueError(f"turn {number} is from {turn['from']!r} and should be from {ROLES[number % 2]!r}")
    if len(said) % 2:
        raise ValueError("the last turn has no answer")
    turns = tuple((said[at]["value"], said[at + 1]["value"]) for at in range(0, len(said), 2))
    for number, (question, answer) in enumerate(turns):
        if not answer.strip():
            raise ValueError(f"the answer in turn {2 * number + 1} is empty")
        if not question.strip():
            raise ValueError(f"the question in turn {2 * number} is empty")
        if PLACEHOLDER in answer:
            raise ValueError(f"the answer in turn {2 * number + 1} has a placeholder {PLACEHOLDER}")
    placeholders = sum(question.count(PLACEHOLDER) for question, _ in turns)
    if placeholders != images:
        raise ValueError(f"the text has {placeholders} placeholders {PLACEHOLDER} for {images} images")
    return turns


def _unreadable(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """What is wrong with images, by name."""

    def check(name: str) -> str | None:
        file = folder / name
        return why_unreadable(file) if file.is_file() else "there is no such file"

    with ThreadPoolExecutor() as pool:
        reasons = require("tqdm").tqdm(
            pool.map(check, names), "checking images", len(names), unit="image", disable=None, leave=False
        )
        found = dict(zip(names, reasons, strict=True))
    return {name: f"image {folder / name}: {reason}" for name, reason in found.items() if reason}


def draw_conversations(
    scenes: FashionScenes,
    texts: str = "all",
    turns: int = 1,
    workers: int = 0,
    seed: int = 0,
    all_questions: bool = False,
) -> Conversations:
    """Draws scenes with their conversations into memory, with a progress bar on a terminal.

    Args:
        scenes: What is to be drawn, at least one scene.
        texts: ``captions``, ``questions`` or ``all``.
        turns: Turns of one conversation, at most. It begins with a question of any kind; others follow in the order of
            how few items they give away. The caption, which names all, comes last, or it is a conversation of its own.
        workers: Processes that draw; 0 draws in this one.
        seed: Of this choice.
        all_questions: Whether to ask all that is known of a scene, instead of one question of a kind.
    """
    _logger.info("drawing %d scenes of %s", len(scenes), scenes.split)
    images = torch.empty((len(scenes), 3, scenes.size, scenes.size), dtype=torch.uint8)
    samples: list[Conversation] = []
    generator = torch.Generator().manual_seed(seed)
    for index, (image, told) in enumerate(drawn(scenes, partial(_told, all_questions=all_questions), workers)):
        images[index] = image.permute(2, 0, 1)
        about = partial(_about, f"{scenes.split}-{index}", index, told.items)
        caption = [] if texts == "questions" else [(CAPTION, DESCRIBE, told.caption)]
        asked = [] if texts == "captions" else told.questions
        for group in _grouped([*caption, *asked], turns, generator):
            kind = group[0][0] if len(group) == 1 else ""
            samples.append(about([turn[1:] for turn in group], kind))
    place = f"the fashion scenes of {scenes.split}"
    return Conversations(tuple(samples), images, place, vocabulary())


def _grouped(
    said: list[tuple[str, str, str]], turns: int, generator: torch.Generator
) -> Iterator[list[tuple[str, str, str]]]:
    """Divides what is said of a scene among conversations; see :func:`draw_conversations`."""
    if turns > 1:
        said = [said[number] for number in torch.randperm(len(said), generator=generator).tolist()]
        kinds = sorted({turn[0] for turn in said})
        first = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        opening = next(turn for turn in said if turn[0] == first)
        said = sorted(said, key=lambda turn: (turn is not opening, KINDS.index(turn[0])))
        if first == CAPTION:
            yield [said.pop(0)]
    for at in range(0, len(said), turns):
        yield said[at : at + turns]


def _about(name: str, image: int, items: int, turns: Sequence[tuple[str, str]], kind: str) -> Conversation:
    """A conversation about one image, which comes before the first question."""
    (question, answer), *others = turns
    return Conversation(name, ((f"{PLACEHOLDER}\n{question}", answer), *others), (image,), kind, items)


class _Told(NamedTuple):
    """What is known of a scene: its caption; kind, text and answer of every question; how many items it has."""

    caption: str
    questions: list[tuple[str, str, str]]
    items: int


def _told(scene: Scene, all_questions: bool) -> _Told:
    asked = (*scene.questions, *scene.further) if all_questions else scene.questions
    questions = [(question.kind, question.text, question.answer) for question in asked]
    return _Told(scene.caption, questions, len(scene.labels))
