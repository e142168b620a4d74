"""Scores of answers to the questions of a benchmark, overall and for its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from zoo.data.vqa import Benchmark, Sample
from zoo.optional import require

__all__ = ["Scores", "score_answers"]

Row = dict[str, float]
RATES = ("accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class Scores:
    """Scores in percent; every row also has the number of ``questions``.

    Attributes:
        overall: ``accuracy``; where questions have choices, ``chance``: what guessing among them gives. For questions
            of yes and no ``precision``, ``recall`` and ``f1`` of yes too, and ``yes_ratio``, the share of questions
            that are answered yes; all of these are means over the parts, as published ones of POPE are.
        parts: The same of parts of the benchmark, by their kind (``"answer type"``) and name (``"number"``).
    """

    overall: Row
    parts: Mapping[str, Mapping[str, Row]]


def score_answers(benchmark: Benchmark, answers: Mapping[str, str]) -> Scores:
    """Compares answers with the references.

    Args:
        benchmark: The questions.
        answers: By the question's id, to all questions that count.

    Raises:
        ModuleNotFoundError: If torchmetrics is needed and missing.
        ValueError: If references are not published, or answers are missing.
    """
    counted = [sample for sample in benchmark.samples if sample.counts and sample.answers]
    if not counted:
        raise ValueError(
            f"no question of {benchmark.name} {benchmark.split} has a published answer that counts; submit what was "
            "answered to the benchmark's server"
        )
    missing = [sample.id for sample in counted if sample.id not in answers]
    if missing:
        raise ValueError(f"{len(missing)} of {len(counted)} questions have no answer, the first is {missing[0]}")
    credits = {sample.id: benchmark.credit(sample, answers[sample.id]) for sample in counted}
    summarize = _yes_no_row if benchmark.yes_no else _row
    parts: dict[str, dict[str, list[Sample]]] = {}
    for sample in counted:
        for kind, name in sample.groups:
            parts.setdefault(kind, {}).setdefault(name, []).append(sample)
    rows = {
        kind: {name: summarize(members, credits) for name, members in sorted(names.items())}
        for kind, names in parts.items()
    }
    overall = summarize(counted, credits)
    if benchmark.yes_no and rows:
        overall = _mean_row(list(next(iter(rows.values())).values()))
    return Scores(overall, rows)


def _row(samples: Sequence[Sample], credits: Mapping[str, float]) -> Row:
    row: Row = {"questions": len(samples), "accuracy": _percent([credits[sample.id] for sample in samples])}
    if all(sample.choices for sample in samples):
        row["chance"] = _percent([1 / len(sample.choices) for sample in samples])
    return row


def _yes_no_row(samples: Sequence[Sample], credits: Mapping[str, float]) -> Row:
    metrics = require("torchmetrics.functional.classification")
    labels = torch.tensor([int(sample.answers[0] == "yes") for sample in samples])
    right = torch.tensor([int(credits[sample.id]) for sample in samples])
    predicted = torch.where(right > 0, labels, 1 - labels)
    binary = {rate: getattr(metrics, f"binary_{rate}_score" if rate == "f1" else f"binary_{rate}") for rate in RATES}
    rates = {rate: 100 * function(predicted, labels).item() for rate, function in binary.items()}
    return {"questions": len(samples), **rates, "yes_ratio": _percent(predicted.tolist())}


def _mean_row(rows: Sequence[Row]) -> Row:
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return {**means, "questions": sum(row["questions"] for row in rows)}


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
