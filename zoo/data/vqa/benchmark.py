"""What a benchmark of visual question answering is, and how one is opened by name.

A benchmark is one file: how its questions are read and posed, what an answer is worth, and in which form answers are
submitted. What all have in common is here; how scores are gathered is in :mod:`zoo.engine.vqa_scores`.
"""

import difflib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

__all__ = [
    "OPTION_LETTER",
    "SHORT_ANSWER",
    "Benchmark",
    "Sample",
    "list_benchmarks",
    "open_benchmark",
    "posed",
    "register_benchmark",
    "submission_json",
]

# How LLaVA-1.5 (arXiv 2310.03744) asks for answers that can be compared; models trained on its data expect it.
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: Unique within the benchmark.
        image: File of the image; None if there is none, or the benchmark draws it.
        question: What the model is asked, instruction included.
        answers: Reference answers, several people's in some benchmarks; none if they are not published.
        choices: Answers to choose from, if the question has such.
        groups: Pairs such as ``("answer type", "number")``: parts of the benchmark that are scored by themselves too.
        counts: Whether it counts in the scores; some benchmarks have questions that only serve other purposes.
    """

    id: str
    image: Path | None
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()
    counts: bool = True


class Benchmark(ABC):
    """Questions, and what answers to them are worth.

    Args:
        name: As of :func:`list_benchmarks`.
        split: Which part of it.
        samples: The questions.

    Attributes:
        yes_no: Whether all answers are yes or no, of which precision and recall are told too.
    """

    yes_no: ClassVar[bool] = False

    def __init__(self, name: str, split: str, samples: Sequence[Sample]) -> None:
        self.name, self.split, self.samples = name, split, tuple(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def image(self, sample: Sample) -> Path | Image.Image | None:
        """The image of a question, None for a question about text alone."""
        return sample.image

    @abstractmethod
    def credit(self, sample: Sample, answer: str) -> float:
        """What an answer to a question with references is worth, 0 to 1."""

    @abstractmethod
    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """Contents of the files that the benchmark's own evaluation takes, by name.

        Args:
            answers: By the question's id; questions without an answer are left out.
        """


Opener = Callable[..., Benchmark]
_OPENERS: dict[str, Opener] = {}


def register_benchmark(name: str) -> Callable[[Opener], Opener]:
    """Decorator that makes a benchmark available by name.

    The function takes ``root`` and ``split`` (either may be None) and keyword arguments with defaults, among them
    ``limit``, ``instruction`` and ``bad_files`` as in :func:`open_benchmark`.

    Raises:
        ValueError: If another function has the name.
    """

    def register(opener: Opener) -> Opener:
        known = _OPENERS.get(name)
        if known is not None and known.__module__ != opener.__module__:
            raise ValueError(f"the name {name!r} belongs to {known.__module__}; take another")
        _OPENERS[name] = opener
        return opener

    return register


def list_benchmarks() -> list[str]:
    """Names of all benchmarks."""
    return sorted(_OPENERS)


def open_benchmark(name: str, root: str | Path | None = None, split: str | None = None, **options: Any) -> Benchmark:
    """Opens one split of a benchmark and checks the images of the questions that will be asked.

    Args:
        name: One of :func:`list_benchmarks`.
        root: Folder of its files, laid out as they are published. The benchmark's own file says which are read.
        split: Which part; default the one that is usually reported.
        **options: ``limit``: take so many questions only, the first ones; default all. ``instruction``: whether to
            append to questions how short the answer should be; default True. ``bad_files``: what becomes of questions
            whose image is missing or cannot be read, ``error`` (default) or ``skip``. Further ones of single
            benchmarks: ``ocr`` of TextVQA, ``img_size`` of the fashion scenes.

    Raises:
        FileNotFoundError: If a file or folder is not there.
        ValueError: If there is no such benchmark, split or option, a file is damaged or lacks what it should have, or
            images are bad under ``bad_files="error"``.
    """
    if name not in _OPENERS:
        nearest = difflib.get_close_matches(name, _OPENERS, n=3, cutoff=0.4) or list_benchmarks()
        raise ValueError(f"there is no benchmark {name!r}; did you mean {', '.join(nearest)}?")
    known = [parameter.name for parameter in inspect.signature(_OPENERS[name]).parameters.values()][2:]
    strangers = sorted(set(options) - set(known))
    if strangers:
        raise ValueError(f"the benchmark {name} has no option {', '.join(strangers)}; it has {', '.join(known)}")
    if options.get("limit") is not None and options["limit"] < 1:
        raise ValueError(f"limit={options['limit']} must be at least 1; leave it out to ask everything")
    return _OPENERS[name](None if root is None else Path(root), split, **options)


def posed(question: str, instruction: str | None, *, before: Sequence[str] = (), after: Sequence[str] = ()) -> str:
    """A question's lines: what comes before, the question, what comes after, and the instruction last, if any."""
    return "\n".join([*before, question, *after, *([instruction] if instruction else [])])


def submission_json(content: Any, indent: int | None = 1) -> str:
    """The text of a JSON file; without indent, of one line of a file with an object on each."""
    return json.dumps(content, ensure_ascii=False, indent=indent) + "\n"
