"""What a scene will show and what will be asked about it, decided before any pixel is drawn.

The answers come first. A layout of places is drawn without knowing the classes, the questions are chosen by looking at
the places alone, and only then do the classes move in, in random order. So no class is more often the answer to a
question than another, whatever its shape, and counts, yes and no are drawn uniformly. Drawing tries until the pixels
agree with the plan; it never changes the plan.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zoo.data.scenes.language import (
    COLORS,
    CORNERS,
    DIRECTIONS,
    ITEM_NAMES,
    MAX_COUNT,
    Question,
    ask_color,
    ask_corner,
    ask_count,
    ask_presence,
    ask_relation,
    caption_of,
)

__all__ = ["MAX_ITEMS", "Plan", "draw_plan", "further_questions"]

MAX_ITEMS = 6
SMALLEST, LARGEST = 0.16, 0.47  # longer side of an item, as a fraction of the image's side
CLOSEST = 0.24  # distance between the middles of two items, as a fraction of the sum of their sides
TOLD = 2  # relations in a caption, at most

# An item is left of another one if it is farther to the left than up or down. Plans demand a clear case: the sideways
# part of the distance is at most 0.6 of the part along, and for other items at least 1 / 0.6. Pixels may weaken that.
PLANNED_RATIO, DRAWN_RATIO = 0.6, 0.8
# Likewise an item at a corner is this far from the middle lines, as a fraction of the side; and no other comes closer.
PLANNED_MARGIN, DRAWN_MARGIN = 0.06, 0.02


@dataclass(frozen=True)
class Plan:
    """A scene before it is drawn. Positions are fractions of the image's side; items are listed from back to front.

    Attributes:
        centers: Where the middle of every item's box goes, float64 (n, 2), x and y.
        sides: Longer side of every item, float64 (n,).
        labels: Class of every item.
        colors: Colour name of every item.
        caption: Names the items and tells how some lie to each other.
        questions: At most one of each kind.
        told: The caption's relations (direction, reference, item).
        relation: The relation that is asked for: the item is the only one in that direction from the reference.
        corner: The corner that is asked for and the only item there.
    """

    centers: np.ndarray
    sides: np.ndarray
    labels: tuple[int, ...]
    colors: tuple[str, ...]
    caption: str
    questions: tuple[Question, ...]
    told: tuple[tuple[str, int, int], ...]
    relation: tuple[str, int, int] | None
    corner: tuple[str, int] | None

    def holds_at(self, centers: np.ndarray) -> bool:
        """Whether caption and answers are still right when the items are seen at other places, (n, 2)."""
        if any(not _towards(centers, ref, direction, DRAWN_RATIO)[item] for direction, ref, item in self.told):
            return False
        if self.relation:
            direction, reference, item = self.relation
            if _only_one_towards(centers, reference, direction, DRAWN_RATIO) != item:
                return False
        if self.corner:
            corner, item = self.corner
            return _only_one_at(centers, corner, DRAWN_MARGIN) == item
        return True


def draw_plan(rng: np.random.Generator) -> Plan:
    """Draws the layout, then the questions by place, then the classes.

    All randomness is uniform integers and fractions, the parts of NumPy's generator that do not change with versions.
    """
    asked_count = int(rng.integers(MAX_COUNT + 1))
    groups = _draw_groups(rng, asked_count)
    centers, sides = _draw_layout(rng, len(groups))
    sizes = np.bincount(groups, minlength=len(ITEM_NAMES))
    alone = [item for item, group in enumerate(groups) if sizes[group] == 1]
    relation = _find_relation(rng, centers, alone)
    corner = _find_corner(rng, centers)
    told = _find_told(centers, alone)

    classes = [int(label) for label in _shuffled(rng, len(ITEM_NAMES))]  # class of every group, also of empty ones
    names = list(COLORS)
    colors = tuple(names[rng.integers(len(names))] for _ in groups)
    labels = tuple(classes[group] for group in groups)

    present = bool(rng.integers(2))
    candidates = np.flatnonzero((sizes > 0) == present)
    questions = [ask_count(classes[0], asked_count), ask_presence(classes[_pick(rng, candidates)], present)]
    if corner:
        questions.append(ask_corner(corner[0], labels[corner[1]]))
    if relation:
        direction, reference, item = relation
        questions.append(ask_relation(direction, labels[reference], labels[item]))
    if alone:
        item = _pick(rng, alone)
        questions.append(ask_color(labels[item], colors[item]))

    order = [int(item) for item in np.argsort(centers[:, 0], kind="stable")]
    caption = caption_of(labels, colors, order, told)
    return Plan(centers, sides, labels, colors, caption, tuple(questions), told, relation, corner)


def further_questions(labels: Sequence[int], colors: Sequence[str], centers: np.ndarray) -> tuple[Question, ...]:
    """All questions about a colour, a corner or a relation to which items at ``centers`` (n, 2) are a single answer.

    Classes and colours took their places at random, so here, too, no answer is more likely than another. That would not
    be so for counts, of which most are zero or one.
    """
    alone = [item for item, label in enumerate(labels) if labels.count(label) == 1]
    corners = {corner: _only_one_at(centers, corner, DRAWN_MARGIN) for corner in CORNERS}
    relations = {
        (direction, reference): _only_one_towards(centers, reference, direction, DRAWN_RATIO)
        for reference in alone
        for direction in DIRECTIONS
    }
    return (
        *(ask_color(labels[item], colors[item]) for item in alone),
        *(ask_corner(corner, labels[item]) for corner, item in corners.items() if item is not None),
        *(
            ask_relation(direction, labels[reference], labels[item])
            for (direction, reference), item in relations.items()
            if item is not None
        ),
    )


def _draw_groups(rng: np.random.Generator, asked_count: int) -> list[int]:
    """The group of every item; items of a group share a class. Group 0 has ``asked_count`` items, others 1 to 3."""
    total = int(rng.integers(max(1, asked_count), MAX_ITEMS + 1))
    groups = [0] * asked_count
    last = 0
    while len(groups) < total:
        joins = last > 0 and rng.integers(6) == 0 and groups.count(last) < MAX_COUNT
        last += 0 if joins else 1
        groups.append(last)
    return [groups[item] for item in _shuffled(rng, total)]


def _draw_layout(rng: np.random.Generator, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, 2) and longer sides (n,) of items that lie in the image, many of them close to an earlier one."""
    largest = min(LARGEST, 0.9 / np.sqrt(total))
    centers, sides = np.zeros((total, 2)), np.zeros(total)
    for item in range(total):
        side = SMALLEST + (largest - SMALLEST) * rng.random()
        close = item > 0 and rng.integers(2) == 0
        for tries in itertools.count(1):  # ends: small items at any place find room
            if close and tries <= 10:
                neighbour = rng.integers(item)
                reach = 0.4 * (sides[neighbour] + side)
                center = centers[neighbour] + reach * (2 * rng.random(2) - 1)
            else:
                center = side / 2 + (1 - side) * rng.random(2)
            inside = ((center >= side / 2) & (center <= 1 - side / 2)).all()
            apart = np.abs(centers[:item] - center).max(1)
            if inside and (apart >= np.maximum(CLOSEST * (sides[:item] + side), 0.14)).all():
                break
            if tries % 10 == 0:
                side = max(0.9 * side, SMALLEST)
        centers[item], sides[item] = center, side
    return centers, sides


def _find_relation(rng: np.random.Generator, centers: np.ndarray, alone: list[int]) -> tuple[str, int, int] | None:
    """A random direction and reference, among the items alone in their group, for which there is a single answer."""
    cases = [(direction, reference) for direction in DIRECTIONS for reference in alone]
    for case in _shuffled(rng, len(cases)):
        direction, reference = cases[case]
        item = _only_one_towards(centers, reference, direction, PLANNED_RATIO)
        if item is not None:
            return direction, reference, item
    return None


def _find_corner(rng: np.random.Generator, centers: np.ndarray) -> tuple[str, int] | None:
    """A random corner that a single item occupies, and that item."""
    corners = list(CORNERS)
    for corner in (corners[k] for k in _shuffled(rng, len(corners))):
        item = _only_one_at(centers, corner, PLANNED_MARGIN)
        if item is not None:
            return corner, item
    return None


def _find_told(centers: np.ndarray, alone: list[int]) -> tuple[tuple[str, int, int], ...]:
    """The relations to tell: between the closest pairs of items alone in their group, each item being told of once."""
    found = []
    for reference in alone:
        for direction in DIRECTIONS:
            there = _towards(centers, reference, direction, PLANNED_RATIO)
            found += [
                (float(np.abs(centers[item] - centers[reference]).max()), direction, reference, item)
                for item in alone
                if there[item] and item < reference
            ]
    told: dict[int, tuple[str, int, int]] = {}
    for _, direction, reference, item in sorted(found):
        if len(told) < TOLD:
            told.setdefault(item, (direction, reference, item))
    return tuple(told.values())


def _towards(centers: np.ndarray, reference: int, direction: str, ratio: float) -> np.ndarray:
    """Which items lie in a direction from the reference, bool (n,); with a small ratio only the clear cases."""
    x, y = DIRECTIONS[direction]
    offset = centers - centers[reference]
    along, across = offset[:, 0] * x + offset[:, 1] * y, offset[:, 0] * y + offset[:, 1] * x
    return (along > 0) & (np.abs(across) <= ratio * along)


def _only_one_towards(centers: np.ndarray, reference: int, direction: str, ratio: float) -> int | None:
    """The item that clearly lies in a direction from the reference, if no other one does even unclearly."""
    clear = np.flatnonzero(_towards(centers, reference, direction, ratio))
    likely = np.flatnonzero(_towards(centers, reference, direction, 1 / ratio))
    return int(clear[0]) if len(clear) == len(likely) == 1 else None


def _only_one_at(centers: np.ndarray, corner: str, margin: float) -> int | None:
    """The item that is clearly in a quarter of the image, if no other one is even unclearly."""
    depth = ((centers - 0.5) * (2 * np.array(CORNERS[corner]) - 1)).min(1)  # into the quarter, from the middle lines
    clear, likely = np.flatnonzero(depth >= margin), np.flatnonzero(depth >= -margin)
    return int(clear[0]) if len(clear) == len(likely) == 1 else None


def _shuffled(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.argsort(rng.random(count), kind="stable")


def _pick(rng: np.random.Generator, options: np.ndarray | list[int]) -> int:
    return int(options[rng.integers(len(options))])
