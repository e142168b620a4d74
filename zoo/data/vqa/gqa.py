"""GQA (Hudson and Manning, arXiv 1902.09506; https://gqadataset.org): compositional questions with a single answer.

Of the published files these are read, in the folder itself or, as the archives unpack, in ``questions/``:

* ``{testdev,val,train,test,challenge,submission}_{balanced,all}_questions.json``; the splits from ``test`` on have no
  answers
* ``images/<imageId>.jpg``
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.data.vqa.answers import short_answer
from zoo.data.vqa.benchmark import SHORT_ANSWER, Benchmark, Sample, posed, register_benchmark, submission_json
from zoo.data.vqa.files import choose_split, find, needs_root, read_json, readable, require_entries

__all__ = ["GQA", "open_gqa"]

PARTS = ("testdev", "val", "train", "test", "challenge", "submission")
SPLITS = [f"{part}_{kind}" for kind in ("balanced", "all") for part in PARTS]
SEMANTIC = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}


class GQA(Benchmark):
    """Exact match, of balanced questions only, also where all are asked."""

    def credit(self, sample: Sample, answer: str) -> float:
        """1 for the reference, else 0."""
        return float(short_answer(answer) == sample.answers[0])

    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """``answers.json``, a list of questionId and prediction, as GQA's server and ``eval.py`` take it."""
        asked = [sample.id for sample in self.samples if sample.id in answers]
        rows = [{"questionId": key, "prediction": short_answer(answers[key])} for key in asked]
        return {"answers.json": submission_json(rows)}


@register_benchmark("gqa")
def open_gqa(
    root: Path | None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = True,
    bad_files: str = "error",
) -> GQA:
    """Opens GQA; arguments and errors are those of :func:`~zoo.data.vqa.open_benchmark`.

    Splits are named as the files, ``testdev_balanced`` (the default), ``val_balanced``, ``testdev_all`` and so on.
    """
    root, split = needs_root("gqa", root), choose_split("gqa", split, SPLITS)
    path = find(root, f"{split}_questions.json", f"questions/{split}_questions.json")
    questions = read_json(path)
    if not isinstance(questions, dict) or not questions:
        raise ValueError(f"{path} has no questions by their ids, so it is not the published file")
    images = find(root, "images")
    samples = []
    for key, record in questions.items():
        require_entries(record, ("question", "imageId", "isBalanced"), f"{path}: question {key}")
        answers, groups = (record["answer"],) if "answer" in record else (), ()
        if answers:
            require_entries(record.get("types"), ("structural", "semantic"), f"{path}: 'types' of question {key}")
            groups = _groups(record["types"])
        image = images / f"{record['imageId']}.jpg"
        question = posed(record["question"], SHORT_ANSWER if instruction else None)
        samples.append(Sample(key, image, question, answers, groups=groups, counts=bool(record["isBalanced"])))
    return GQA("gqa", split, readable(samples[:limit], images, bad_files))


def _groups(types: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    structural, semantic = types["structural"], types["semantic"]
    return (
        ("answer", "open" if structural == "query" else "binary"),
        ("structure", structural),
        ("meaning", SEMANTIC.get(semantic, semantic)),
    )
