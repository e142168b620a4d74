"""ScienceQA (Lu et al., arXiv 2209.09513; https://scienceqa.github.io): school questions with two to five options.

About half of them have an image; the others are about text alone. ``scienceqa_image`` is the half with images, which
vision-language models mostly report. Of the published files these are read, in the folder itself or, as in the
repository, in ``data/scienceqa/``:

* ``problems.json`` and ``pid_splits.json``
* ``images/{train,val,test}/<id>/image.png``
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.data.vqa.answers import OPTIONS, chosen_option
from zoo.data.vqa.benchmark import OPTION_LETTER, Benchmark, Sample, posed, register_benchmark, submission_json
from zoo.data.vqa.files import choose_split, find, needs_root, read_json, readable, require_entries

__all__ = ["ScienceQA", "open_scienceqa", "open_scienceqa_image"]

SPLITS = ("test", "val", "train", "minitest", "minival", "trainval")
ENTRIES = ("question", "choices", "answer", "hint", "image", "grade", "subject", "split")
LAST_LOWER_GRADE = 6


class ScienceQA(Benchmark):
    """Accuracy; an answer that names no option is wrong."""

    def credit(self, sample: Sample, answer: str) -> float:
        """1 for the letter of the right option, else 0."""
        chosen = chosen_option(answer, len(sample.choices))
        return float(chosen is not None and OPTIONS[chosen] == sample.answers[0])

    def submission(self, answers: Mapping[str, str]) -> dict[str, str]:
        """``answers.json`` as ScienceQA's program takes it: ``results`` are numbers of options by question, from 0.

        An answer that names none is -1. ``outputs`` are the answers in words.
        """
        asked = [sample for sample in self.samples if sample.id in answers]
        chosen = {sample.id: chosen_option(answers[sample.id], len(sample.choices)) for sample in asked}
        results = {key: -1 if number is None else number for key, number in chosen.items()}
        outputs = {key: answers[key] for key in results}
        return {"answers.json": submission_json({"results": results, "outputs": outputs})}


@register_benchmark("scienceqa")
def open_scienceqa(
    root: Path | None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = True,
    bad_files: str = "error",
) -> ScienceQA:
    """Opens ScienceQA; arguments and errors are those of :func:`~zoo.data.vqa.open_benchmark`.

    Splits are ``test`` (the default), ``val``, ``train``, ``minitest``, ``minival`` and ``trainval``. A question's
    context comes before it.
    """
    return _open("scienceqa", root, split, False, limit, instruction, bad_files)


@register_benchmark("scienceqa_image")
def open_scienceqa_image(
    root: Path | None,
    split: str | None = None,
    *,
    limit: int | None = None,
    instruction: bool = True,
    bad_files: str = "error",
) -> ScienceQA:
    """Opens the questions of ScienceQA that have an image; otherwise as :func:`open_scienceqa`."""
    return _open("scienceqa_image", root, split, True, limit, instruction, bad_files)


def _open(
    name: str,
    root: Path | None,
    split: str | None,
    with_image: bool,
    limit: int | None,
    instruction: bool,
    bad_files: str,
) -> ScienceQA:
    root, split = needs_root(name, root), choose_split(name, split, SPLITS)
    home = find(root, "problems.json", "data/scienceqa/problems.json").parent
    problems, ids = read_json(home / "problems.json"), read_json(find(home, "pid_splits.json"))
    require_entries(ids, (split,), str(home / "pid_splits.json"))
    require_entries(problems, ids[split], str(home / "problems.json"))
    samples = [_sample(key, problems[key], home, instruction) for key in ids[split]]
    samples = [sample for sample in samples if sample.image is not None or not with_image]
    return ScienceQA(name, split, readable(samples[:limit], home / "images", bad_files))


def _sample(key: str, problem: Mapping[str, Any], home: Path, instruction: bool) -> Sample:
    where = f"{home / 'problems.json'}: problem {key}"
    require_entries(problem, ENTRIES, where)
    choices, answer = tuple(problem["choices"]), problem["answer"]
    if not 1 <= len(choices) <= len(OPTIONS) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where} has {len(choices)} choices and the answer {answer!r}, counted from 0")
    image, hint = problem["image"], (problem["hint"] or "").strip()
    question = posed(
        problem["question"],
        OPTION_LETTER if instruction else None,
        before=[f"Context: {hint}"] if hint else [],
        after=[f"{letter}. {choice}" for letter, choice in zip(OPTIONS, choices, strict=False)],
    )
    file = home / "images" / problem["split"] / key / image if image else None
    return Sample(key, file, question, (OPTIONS[answer],), choices, _groups(problem, bool(hint), bool(image), where))


def _groups(problem: Mapping[str, Any], text: bool, image: bool, where: str) -> tuple[tuple[str, str], ...]:
    """Subject, kinds of context (a question with both counts for both), and half of the grades, as in the paper."""
    contexts = [name for name, there in (("text", text), ("image", image), ("none", not (text or image))) if there]
    number = problem["grade"].removeprefix("grade")
    if not number.isdecimal():
        raise ValueError(f"{where} has the grade {problem['grade']!r}; it must be grade1 to grade12")
    grades = "1-6" if int(number) <= LAST_LOWER_GRADE else "7-12"
    return ("subject", problem["subject"]), *(("context", name) for name in contexts), ("grade", grades)
