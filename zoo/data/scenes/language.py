"""The English of the fashion scenes: captions, questions with one-word answers, and their closed vocabulary."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "COLORS",
    "CORNERS",
    "DESCRIBE",
    "DIRECTIONS",
    "ITEM_NAMES",
    "MAX_COUNT",
    "Question",
    "ask_color",
    "ask_corner",
    "ask_count",
    "ask_presence",
    "ask_relation",
    "caption_of",
    "noun_of",
    "split_words",
    "vocabulary",
]

# One word per class of Fashion-MNIST, in its order. Trousers come in pairs.
ITEM_NAMES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PAIRED = "trousers"

COLORS = {
    "red": (222, 44, 48),
    "orange": (245, 138, 30),
    "yellow": (246, 222, 60),
    "green": (52, 164, 74),
    "blue": (50, 92, 222),
    "purple": (142, 62, 178),
    "pink": (250, 150, 196),
    "white": (248, 248, 248),
}
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # unit steps (x, y)
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}  # halves (x, y)
NUMBERS = ("zero", "one", "two", "three")
MAX_COUNT = 3  # items of one class in a scene
DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: ``count``, ``presence``, ``corner``, ``relation`` or ``color``.
        text: The question.
        answer: The right one of ``choices``.
        choices: All answers that scenes give to this text, each equally often; one in ``len(choices)`` is chance.
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...]


def ask_count(label: int, count: int) -> Question:
    """How many items of a class there are; 0 to ``MAX_COUNT``."""
    return Question("count", f"How many {_plural(label)} are there?", NUMBERS[count], NUMBERS)


def ask_presence(label: int, present: bool) -> Question:
    """Whether there is any item of a class."""
    return Question("presence", f"Is there {_one(label)}?", "yes" if present else "no", ("yes", "no"))


def ask_corner(corner: str, label: int) -> Question:
    """The class of the only item in a quarter of the image."""
    return Question("corner", f"Which item is at the {corner}?", ITEM_NAMES[label], ITEM_NAMES)


def ask_relation(direction: str, reference: int, label: int) -> Question:
    """The class of the only item in a direction from the only item of class ``reference``."""
    others = tuple(name for name in ITEM_NAMES if name != ITEM_NAMES[reference])
    return Question("relation", f"What is {direction} the {ITEM_NAMES[reference]}?", ITEM_NAMES[label], others)


def ask_color(label: int, color: str) -> Question:
    """The colour of the only item of a class."""
    return Question("color", f"What color {_is(label)} the {ITEM_NAMES[label]}?", color, tuple(COLORS))


def noun_of(label: int, color: str = "") -> str:
    """One item, to follow an article: ``orange coat``, ``pair of trousers``."""
    words = f"{color} {ITEM_NAMES[label]}".strip()
    return f"pair of {words}" if ITEM_NAMES[label] == PAIRED else words


def caption_of(
    labels: Sequence[int], colors: Sequence[str], order: Sequence[int], told: Sequence[tuple[str, int, int]]
) -> str:
    """Names all items, then says how some of them lie to each other.

    Args:
        labels: Class of every item.
        colors: Colour of every item.
        order: The items in the order in which their classes are to be named.
        told: Relations ``(direction, reference, item)`` between items that are the only ones of their class.
    """
    classes = list(dict.fromkeys(labels[item] for item in order))
    parts = []
    for label in classes:
        items = [item for item in order if labels[item] == label]
        alone = len(items) == 1
        parts.append(_one(label, colors[items[0]]) if alone else f"{NUMBERS[len(items)]} {_plural(label)}")
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    sentences = [listed[0].upper() + listed[1:]]
    for direction, reference, item in told:
        name = ITEM_NAMES[labels[item]]
        sentences.append(f"The {name} {_is(labels[item])} {direction} the {ITEM_NAMES[labels[reference]]}")
    return ". ".join(sentences) + "."


def split_words(text: str) -> list[str]:
    """Splits a text of the scenes into the words and punctuation marks of :func:`vocabulary`."""
    return re.findall(r"[a-z-]+|[^a-z\s]", text.lower())


def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark that captions, questions and answers are made of, sorted."""
    texts = [DESCRIBE, *NUMBERS, *COLORS, *ITEM_NAMES, *DIRECTIONS]
    texts.append(caption_of([0, 2, 3], ["red", "red", "orange"], [0, 1, 2], []))  # an article for vowels, comma, "and"
    for label in range(len(ITEM_NAMES)):
        texts += [ask_count(label, 0).text, ask_relation("above", label, 0).text, ask_color(label, "red").text]
        texts += [*ask_presence(label, True).choices, ask_presence(label, True).text]
    texts += [ask_corner(corner, 0).text for corner in CORNERS]
    return tuple(sorted({word for text in texts for word in split_words(text)}))


def _one(label: int, color: str = "") -> str:
    noun = noun_of(label, color)
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(label: int) -> str:
    name = ITEM_NAMES[label]
    if name == PAIRED:
        return f"pairs of {name}"
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _is(label: int) -> str:
    return "are" if ITEM_NAMES[label] == PAIRED else "is"
