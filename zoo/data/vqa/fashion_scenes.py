"""Questions about fashion scenes (:mod:`zoo.data.scenes`), which are drawn when they are asked about.

Every answer to a question's text is equally likely, so that language alone is right once in as many times as there are
choices.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from zoo.data.scenes import FashionScenes
from zoo.data.vqa.answers import short_answer
from zoo.data.vqa.benchmark import SHORT_ANSWER, Benchmark, Sample, posed, register_benchmark, submission_json
from zoo.data.vqa.files import choose_split
from zoo.optional import require

__all__ = ["SceneQuestions", "open_fashion_scenes"]

SPLITS = ("test", "val", "train")
SCENES = 1000  # of a split


class SceneQuestions(Benchmark):
    """Exact match.

    Args:
        scenes: What the questions are about.
        limit: Take so many questions only, the first ones.
        instruction: Whether to append to questions how short the answer should be.
    """

    def __init__(self, scenes: FashionScenes, limit: int | None = None, instruction: bool = False) -> None:
        numbers = require("tqdm").tqdm(
            range(len(scenes)), f"drawing {scenes.split} scenes", unit="scene", disable=None, leave=False
        )
        asked = (sample for number in numbers for sample in _samples(scenes, number, instruction))
        super().__init__("fashion_scenes", scenes.split, list(itertools.islice(asked, limit)))
        numbers.close()
        self.scenes = scenes
        self._drawn: tuple[int, Image.Image] | None = None  # questions about one scene follow each other

    def image(self, sample: Sample) -> Image.Image:
        """Draws the scene."""
        number = int(sample.id.split("-")[1])
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, Image.fromarray(self.scenes[number].image)
        return self._drawn[1]

    def credit(self, sample: Sample, answer: str) -> float:
        """1 for the reference, else 0."""
        return float(short_answer(answer) == sample.answers[0])

    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """``answers.json``, a list of question_id and answer."""
        asked = [sample.id for sample in self.samples if sample.id in answers]
        rows = [{"question_id": key, "answer": short_answer(answers[key])} for key in asked]
        return {"answers.json": submission_json(rows)}


@register_benchmark("fashion_scenes")
def open_fashion_scenes(
    root: Path | None = None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = False,
    bad_files: str = "error",
    img_size: int = 64,
) -> SceneQuestions:
    """Opens the questions about the first 1000 scenes.

    Arguments and errors are those of :func:`~zoo.data.vqa.open_benchmark`, and those below. Splits are ``test`` (the
    default), ``val`` and ``train``.

    Args:
        root: Folder of the files of Fashion-MNIST, of which scenes are composed; default as :class:`FashionScenes`.
        instruction: Off by default here: models with the scenes' closed vocabulary do not know its words.
        bad_files: Without effect, as no image is read.
        img_size: Side of the scenes in pixels; the default is that of training on them.

    Raises:
        FileNotFoundError: If Fashion-MNIST is nowhere.
    """
    split = choose_split("fashion_scenes", split, SPLITS)
    return SceneQuestions(FashionScenes(split, SCENES, size=img_size, root=root), limit, instruction)


def _samples(scenes: FashionScenes, number: int, instruction: bool) -> list[Sample]:
    return [
        Sample(
            id=f"{scenes.split}-{number:06d}-{question.kind}",
            image=None,
            question=posed(question.text, SHORT_ANSWER if instruction else None),
            answers=(question.answer,),
            choices=question.choices,
            groups=(("kind", question.kind),),
        )
        for question in scenes[number].questions
    ]
