"""POPE (Li et al., arXiv 2305.10355; https://github.com/AoiDragon/POPE): is an object in the image, yes or no?

Half of the objects are not there: chosen at random, among those that images have most often, or among those that go
most often with what is there. Of the published files these are read:

* ``coco_pope_{random,popular,adversarial}.json``, an object on each line, in the folder itself, in ``coco/`` or, as in
  the repository, ``output/coco/``; sets made with the authors' program of other images have another name than coco
* images by the name in the questions, in ``val2014/``, ``images/val2014/`` or ``images/``
"""

from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

from zoo.data.vqa.answers import yes_or_no
from zoo.data.vqa.benchmark import SHORT_ANSWER, Benchmark, Sample, posed, register_benchmark, submission_json
from zoo.data.vqa.files import find, needs_root, read_json_lines, readable, refuse_repeated, require_entries

__all__ = ["POPE", "open_pope"]

SUBSETS = ("random", "popular", "adversarial")
ENTRIES = ("question_id", "image", "text", "label")


class POPE(Benchmark):
    """Yes or no; every subset is scored by itself."""

    yes_no = True

    def credit(self, sample: Sample, answer: str) -> float:
        """1 for the reference, else 0."""
        return float(yes_or_no(answer) == sample.answers[0])

    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """A file for each subset with question and answer on each line, as POPE's program takes them, in its order."""
        lines = defaultdict(list)
        for sample in self.samples:
            if sample.id in answers:
                subset = sample.id.partition("-")[0]
                row = {"question": sample.question.split("\n")[0], "answer": answers[sample.id]}
                lines[subset].append(submission_json(row, indent=None))
        return {f"{self.split}_pope_{subset}_answers.json": "".join(rows) for subset, rows in lines.items()}


@register_benchmark("pope")
def open_pope(
    root: Path | None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = True,
    bad_files: str = "error",
) -> POPE:
    """Opens POPE; arguments and errors are those of :func:`~zoo.data.vqa.open_benchmark`.

    All three subsets are asked, in turns, so that the first questions are of all of them. A split is a set of images,
    ``coco`` (the default) or the name of another in the files' names.
    """
    root, split = needs_root("pope", root), split or "coco"
    images = find(root, "val2014", "images/val2014", "images")
    parts = []
    for subset in SUBSETS:
        name = f"{split}_pope_{subset}.json"
        path = find(root, name, f"{split}/{name}", f"output/{split}/{name}")
        part = _samples(path, subset, images, SHORT_ANSWER if instruction else None)
        refuse_repeated(part, path)
        parts.append(part)
    samples = [sample for turn in zip_longest(*parts) for sample in turn if sample is not None]
    return POPE("pope", split, readable(samples[:limit], images, bad_files))


def _samples(path: Path, subset: str, images: Path, instruction: str | None) -> list[Sample]:
    samples = []
    for number, record in enumerate(read_json_lines(path), 1):
        require_entries(record, ENTRIES, f"{path}: line {number}")
        if record["label"] not in ("yes", "no"):
            raise ValueError(f"{path}: the label on line {number} is {record['label']!r}; it must be yes or no")
        key, question = f"{subset}-{record['question_id']}", posed(record["text"], instruction)
        groups = (("subset", subset),)
        samples.append(Sample(key, images / record["image"], question, (record["label"],), groups=groups))
    return samples
