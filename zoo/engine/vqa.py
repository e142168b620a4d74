"""Asks a model the questions of a benchmark; what is answered is kept, so that an interrupted run continues."""

import csv
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from zoo.data.vqa import Benchmark, Sample
from zoo.engine.vqa_scores import Scores
from zoo.files import replacing
from zoo.optional import require

__all__ = ["Answerer", "add_result", "ask", "blank_image", "write_answers", "write_scores"]

ANSWERS, SETTINGS, SCORES = "answers.jsonl", "settings.json", "scores.json"
GREY = (128, 128, 128)
KEYS = ("model", "benchmark", "split", "image", "questions")  # columns that tell rows of results apart

Picture = Path | Image.Image


class Answerer(Protocol):
    """Anything that answers questions about images."""

    def answer(
        self, images: list[list[Picture]], questions: list[str], batch_size: int = 8, **options: Any
    ) -> list[str]:
        """Answers to questions, each with its images, of which there may be none; ``batch_size`` at a time."""


def ask(
    model: Answerer,
    benchmark: Benchmark,
    folder: str | Path,
    settings: Mapping[str, Any],
    *,
    blank: bool = False,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, str]:
    """Asks what has not been answered in this folder yet.

    Every batch of answers is on the disk before the next one is asked.

    Args:
        model: Who is asked.
        benchmark: The questions.
        folder: Where ``answers.jsonl`` is kept, an answer on each line; it is made.
        settings: What the answers depend on, kept as ``settings.json``: answers in a folder are of one kind.
        blank: Whether grey images of the same size take the images' place: what is right then, language alone gives.
        batch_size: Questions at a time.
        **options: Passed to the model.

    Returns:
        Answers by the questions' ids, to all questions.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If it holds answers under other settings or is damaged, or the model returns something else than
            one text for each question.
    """
    folder = Path(folder)
    _keep_settings(folder, settings)
    known = _read_answers(folder / ANSWERS)
    open_questions = [sample for sample in benchmark.samples if sample.id not in known]
    bar = require("tqdm").tqdm(
        *(None, f"{benchmark.name} {benchmark.split}", len(benchmark)),
        **dict(initial=len(benchmark) - len(open_questions), unit="question", disable=None, dynamic_ncols=True),
    )
    with bar, (folder / ANSWERS).open("a", encoding="utf-8") as file:
        for batch in _batches(open_questions, batch_size):
            images = [_images(benchmark, sample, blank) for sample in batch]
            texts = model.answer(images, [sample.question for sample in batch], batch_size=batch_size, **options)
            if len(texts) != len(batch) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{len(batch)} questions need {len(batch)} texts, but the model returned {texts!r}")
            for sample, text in zip(batch, texts, strict=True):
                known[sample.id] = text
                row = {"id": sample.id, "question": sample.question, "answer": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(batch))
    return {sample.id: known[sample.id] for sample in benchmark.samples}


def blank_image(image: Picture) -> Image.Image:
    """A grey image of the same size."""
    if isinstance(image, Image.Image):
        return _grey(image.size)
    with Image.open(image) as file:
        return _grey(file.size)


@functools.lru_cache(maxsize=8)
def _grey(size: tuple[int, int]) -> Image.Image:
    """The same object for every image of a size: models need not look at it more than once."""
    return Image.new("RGB", size, GREY)


def write_answers(benchmark: Benchmark, answers: Mapping[str, str], folder: str | Path) -> list[Path]:
    """Writes answers in the form in which the benchmark takes them; returns the files.

    Raises:
        OSError: If they cannot be written.
    """
    paths = []
    for name, content in benchmark.submission(answers).items():
        paths.append(Path(folder) / name)
        with replacing(paths[-1]) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return paths


def write_scores(scores: Scores, folder: str | Path) -> Path:
    """Writes ``scores.json``; returns its path."""
    path = Path(folder) / SCORES
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(asdict(scores), indent=1) + "\n")
    return path


def add_result(row: Mapping[str, str | int | float], path: str | Path) -> None:
    """Adds a row to a CSV file, in the place of one of the same model, benchmark, split, images and questions.

    Columns that only some benchmarks have are empty for the others.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If it is there and has other columns than results have.
    """
    path = Path(path)
    rows: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in KEYS if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"{path} holds no results, it has no column {', '.join(missing)}; name another file")
            rows = [old for old in reader if any(old[name] != str(row[name]) for name in KEYS)]
    rows = [*rows, row]
    columns = list(dict.fromkeys(name for each in rows for name in each))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _images(benchmark: Benchmark, sample: Sample, blank: bool) -> list[Picture]:
    image = benchmark.image(sample)
    if image is None:
        return []
    return [blank_image(image) if blank else image]


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings of a new folder, or makes sure that they are those of its answers."""
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(settings))
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}; name another folder") from error
        changes = [
            f"{name} was {found.get(name)}, is {wanted.get(name)}"
            for name in dict.fromkeys([*found, *wanted])
            if found.get(name) != wanted.get(name)
        ]
        if changes:
            raise ValueError(f"{folder} holds other answers ({'; '.join(changes)}); name another folder or remove it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(wanted, indent=1) + "\n")


def _read_answers(path: Path) -> dict[str, str]:
    """What has been answered; a last line that a killed run left half is removed from the file."""
    if not path.exists():
        return {}
    with path.open("rb+") as file:
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        file.truncate(len(whole))
    answers = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            answers[row["id"]] = row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no answer: {error!r}; remove the line to ask again") from error
    return answers
