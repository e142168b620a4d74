"""TextVQA (Singh et al., arXiv 1904.08920; https://textvqa.org): questions about text in photos, ten answers each.

Of the published files these are read, in the folder itself:

* ``TextVQA_0.5.1_{train,val,test}.json``; the answers of ``test`` are not published
* ``TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json``, if the words that Rosetta reads are to be part of the questions
* ``train_images/<image_id>.jpg``, of the validation images too, and ``test_images/<image_id>.jpg``
"""

from collections.abc import Mapping
from pathlib import Path

from zoo.data.vqa.answers import soft_accuracy, textvqa_answer
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

__all__ = ["TextVQA", "open_textvqa"]

FOLDERS = {"val": "train_images", "train": "train_images", "test": "test_images"}


class TextVQA(Benchmark):
    """Soft accuracy over ten answers."""

    def credit(self, sample: Sample, answer: str) -> float:
        """Answer and references are brought to the same form first."""
        return soft_accuracy(textvqa_answer(answer), [textvqa_answer(reference) for reference in sample.answers])

    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """``answers.json``, a list of question_id and answer, as TextVQA's evaluation server takes it."""
        asked = [sample.id for sample in self.samples if sample.id in answers]
        rows = [{"question_id": int(number), "answer": textvqa_answer(answers[number])} for number in asked]
        return {"answers.json": submission_json(rows)}


@register_benchmark("textvqa")
def open_textvqa(
    root: Path | None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = True,
    bad_files: str = "error",
    ocr: bool = False,
) -> TextVQA:
    """Opens TextVQA.

    Arguments and errors are those of :func:`~zoo.data.vqa.open_benchmark`, and those below. Splits are ``val`` (the
    default), ``train`` and ``test``.

    Args:
        ocr: Whether the words that Rosetta read in the image come before the question, named as LLaVA does. After it,
            where LLaVA puts them, a state-space model answers worse than without them (Cobra, arXiv 2403.14520).
    """
    root, split = needs_root("textvqa", root), choose_split("textvqa", split, list(FOLDERS))
    path = find(root, f"TextVQA_0.5.1_{split}.json")
    questions = records_of(read_json(path), "data", ("question_id", "image_id", "question"), path)
    words = _words(root, split) if ocr else {}
    images = find(root, FOLDERS[split])
    samples = []
    for record in questions:
        key, answers = record["question_id"], tuple(record.get("answers") or ())
        if not answers and split != "test":
            raise ValueError(f"{path}: question {key} has no 'answers'")
        if ocr and record["image_id"] not in words:
            raise ValueError(f"{path}: Rosetta's file lacks the image {record['image_id']} of question {key}")
        known = words.get(record["image_id"])
        before = [f"Reference OCR token: {', '.join(known)}"] if known else []
        question = posed(record["question"], SHORT_ANSWER if instruction else None, before=before)
        samples.append(Sample(str(key), images / f"{record['image_id']}.jpg", question, answers))
    refuse_repeated(samples, path)
    return TextVQA("textvqa", split, readable(samples[:limit], images, bad_files))


def _words(root: Path, split: str) -> dict[str, list[str]]:
    """Words that Rosetta read, by image."""
    path = find(root, f"TextVQA_Rosetta_OCR_v0.2_{split}.json")
    records = records_of(read_json(path), "data", ("image_id", "ocr_tokens"), path)
    return {record["image_id"]: record["ocr_tokens"] for record in records}
