"""VQA v2 (Goyal et al., arXiv 1612.00837; https://visualqa.org): questions about photos of COCO, ten answers each.

Of the published files these are read, in the folder itself, and images also in ``images/``:

* ``v2_OpenEnded_mscoco_{train2014,val2014,test-dev2015,test2015}_questions.json``
* ``v2_mscoco_{train2014,val2014}_annotations.json``; the answers of the test splits are not published
* ``{train2014,val2014,test2015}/COCO_val2014_000000000042.jpg`` and so on
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.data.vqa.answers import soft_accuracy, vqa_answer, vqa_reference
from zoo.data.vqa.benchmark import SHORT_ANSWER, Benchmark, Sample, posed, register_benchmark, submission_json
from zoo.data.vqa.files import (
    choose_split,
    find,
    needs_root,
    read_json,
    readable,
    records_of,
    refuse_repeated,
)

__all__ = ["VQAv2", "open_vqav2"]

SPLITS = {  # what the names of its files and of its images' folder have
    "val": ("val2014", "val2014"),
    "train": ("train2014", "train2014"),
    "test-dev": ("test-dev2015", "test2015"),
    "test": ("test2015", "test2015"),
}
IDS_SHOWN = 5


class VQAv2(Benchmark):
    """Soft accuracy over ten answers."""

    def credit(self, sample: Sample, answer: str) -> float:
        """As VQA's program: references that all agree are compared as they are published."""
        references = sample.answers
        if len(set(references)) > 1:
            references = [vqa_reference(reference) for reference in references]
        return soft_accuracy(vqa_answer(answer), references)

    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """``answers.json``, a list of question_id and answer, as VQA's evaluation server and program take it."""
        asked = [sample.id for sample in self.samples if sample.id in answers]
        rows = [{"question_id": int(number), "answer": vqa_answer(answers[number])} for number in asked]
        return {"answers.json": submission_json(rows)}


@register_benchmark("vqav2")
def open_vqav2(
    root: Path | None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = True,
    bad_files: str = "error",
) -> VQAv2:
    """Opens VQA v2; arguments and errors are those of :func:`~zoo.data.vqa.open_benchmark`.

    Splits are ``val`` (the default), ``train``, ``test-dev`` and ``test``.
    """
    root, split = needs_root("vqav2", root), choose_split("vqav2", split, list(SPLITS))
    files, folder = SPLITS[split]
    path = find(root, f"v2_OpenEnded_mscoco_{files}_questions.json")
    questions = records_of(read_json(path), "questions", ("question_id", "image_id", "question"), path)
    annotations = {} if split.startswith("test") else _annotations(root, files, questions)
    images = find(root, folder, f"images/{folder}")
    samples = []
    for record in questions:
        annotation = annotations.get(record["question_id"])
        groups = () if annotation is None else _groups(annotation)
        answers = () if annotation is None else tuple(answer["answer"] for answer in annotation["answers"])
        image = images / f"COCO_{folder}_{int(record['image_id']):012d}.jpg"
        question = posed(record["question"], SHORT_ANSWER if instruction else None)
        samples.append(Sample(str(record["question_id"]), image, question, answers, groups=groups))
    refuse_repeated(samples, path)
    return VQAv2("vqav2", split, readable(samples[:limit], images, bad_files))


def _groups(annotation: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return ("answer type", annotation["answer_type"]), ("question type", annotation["question_type"])


def _annotations(root: Path, files: str, questions: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Annotations by question, exactly one for each.

    Raises:
        ValueError: If questions and annotations are not of each other.
    """
    path = find(root, f"v2_mscoco_{files}_annotations.json")
    entries = ("question_id", "answers", "answer_type", "question_type")
    found = {record["question_id"]: record for record in records_of(read_json(path), "annotations", entries, path)}
    asked = [record["question_id"] for record in questions]
    without, strangers = [key for key in asked if key not in found], sorted(set(found) - set(asked))
    for problem, keys in (("questions have no annotation", without), ("annotations have no question", strangers)):
        if keys:
            shown = ", ".join(map(str, keys[:IDS_SHOWN])) + (", ..." if len(keys) > IDS_SHOWN else "")
            raise ValueError(f"{path}: {len(keys)} {problem}: {shown}; take both files from the same release")
    for key, record in found.items():
        if not record["answers"] or not all("answer" in answer for answer in record["answers"]):
            raise ValueError(f"{path}: the annotation of question {key} has no answers")
    return found
