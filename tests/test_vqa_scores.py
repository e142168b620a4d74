"""Scores of question answering: the published rules for comparing answers, and scores worked out by hand."""

import pytest

from zoo.data.vqa import Sample
from zoo.data.vqa.answers import (
    CONTRACTIONS,
    chosen_option,
    short_answer,
    soft_accuracy,
    textvqa_answer,
    vqa_answer,
    vqa_reference,
    yes_or_no,
)
from zoo.data.vqa.gqa import GQA
from zoo.data.vqa.pope import POPE
from zoo.data.vqa.scienceqa import ScienceQA
from zoo.data.vqa.textvqa import TextVQA
from zoo.data.vqa.vqav2 import VQAv2
from zoo.engine.vqa_scores import score_answers


@pytest.mark.parametrize(
    "given, compared",
    [
        ("A red Bus.", "red bus"),  # articles, capitals, periods
        ("the Two dogs", "2 dogs"),
        ("none", "0"),
        ("Ten\n", "10"),
        ("eleven", "eleven"),  # number words end at ten
        ("dont know", "don't know"),
        ("shouldntve", "shouldntve"),  # one missing apostrophe is recognised, two are not
        ("shouldn'tve", "shouldn't've"),
        ("well", "well"),  # another word without its apostrophe
        ("girl's", "girl's"),  # apostrophes and colons stay
        ("2:50 pm", "2:50 pm"),
        ("3.5 kg.", "3.5 kg"),
        ("100,978", "100978"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits joins everything, as in VQA's program
        ("black\tand white!", "black and white"),
        ("", ""),
    ],
)
def test_vqa_compares(given, compared):
    assert vqa_answer(given) == compared


def test_every_contraction_lacks_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    rest = {short: full for short, full in CONTRACTIONS.items() if short != "somebody'd"}
    assert all(full.count("'") == short.count("'") + 1 for short, full in rest.items())
    assert CONTRACTIONS["somebody'd"] == "somebodyd"


def test_references_only_lose_their_punctuation():
    assert vqa_reference("the Two t-shirts.") == "the Two t shirts"


@pytest.mark.parametrize(
    "given, compared",
    [("Joe's, Diner?", "joe 's diner"), ("1,000", "1000"), ("THE one.", "1"), ("co-op", "co op")],
)
def test_textvqa_compares(given, compared):
    assert textvqa_answer(given) == compared


@pytest.mark.parametrize("agreeing, credit", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_of_ten(agreeing, credit):
    """With 3 of 10: leaving one of them out, 2 of 9 agree (2/3, three times); else 3 (1, seven times): 0.9."""
    assert soft_accuracy("bus", ["bus"] * agreeing + ["car"] * (10 - agreeing)) == pytest.approx(credit)


@pytest.mark.parametrize(
    "answer, read",
    [
        ("Yes", "yes"),
        ("No, there is none.", "no"),
        ("There is not a dog. Yes.", "no"),
        ("Yes. There is no cat.", "yes"),  # the first sentence decides
        ("NO", "yes"),  # as POPE's program: these words in these capitals only
        ("no\nindeed", "no"),
        ("", "yes"),
    ],
)
def test_yes_or_no(answer, read):
    assert yes_or_no(answer) == read


@pytest.mark.parametrize(
    "answer, number",
    [
        ("B", 1),
        (" (C) ", 2),
        ("A.", 0),
        ("B. because of this", 1),
        ("C\nbecause", 2),
        ("The answer is B.", 1),
        ("So the answer is (C)", 2),
        ("A dog", None),  # an article
        ("the answer is a dog", None),
        ("D", None),  # there are three
        ("", None),
    ],
)
def test_chosen_option(answer, number):
    assert chosen_option(answer, 3) == number


def test_short_answer():
    assert short_answer(" Left. \n") == "left"
    assert short_answer("t-shirt") == "t-shirt"


def ten(**counts: int) -> tuple[str, ...]:
    return tuple(word for word, count in counts.items() for _ in range(count))


def test_vqav2_by_type():
    samples = [
        Sample("1", None, "?", ten(yes=7, no=3), groups=(("answer type", "yes/no"), ("question type", "is the"))),
        Sample("2", None, "?", ("2",) * 8 + ("3", "4"), groups=(("answer type", "number"), ("question type", "how"))),
        Sample("3", None, "?", ("t-shirt",) * 2 + ("shirt",) * 8, groups=(("answer type", "other"),)),
        Sample("4", None, "?", ("t-shirt",) * 10, groups=(("answer type", "other"),)),
    ]
    scores = score_answers(VQAv2("vqav2", "val", samples), {"1": "No.", "2": "two", "3": "T-shirt", "4": "t-shirt"})
    # 3 of 10: 0.9; 8 of 10: 1; 2 of 10: 0.6; the last is 0, as VQA's program leaves references that all agree alone
    assert scores.overall == pytest.approx({"questions": 4, "accuracy": 100 * (0.9 + 1 + 0.6 + 0) / 4})
    assert scores.parts["answer type"]["other"] == pytest.approx({"questions": 2, "accuracy": 30})
    assert scores.parts["question type"] == {
        "how": pytest.approx({"questions": 1, "accuracy": 100}),
        "is the": pytest.approx({"questions": 1, "accuracy": 90}),
    }


def test_textvqa_brings_references_to_the_same_form():
    sample = Sample("1", None, "?", ("Joe's Diner",) * 3 + ("diner",) * 7)
    scores = score_answers(TextVQA("textvqa", "val", [sample]), {"1": "joe's diner?"})
    assert scores.overall == pytest.approx({"questions": 1, "accuracy": 90})
    assert scores.parts == {}


def test_gqa_counts_balanced_questions_only():
    def sample(key: str, answer: str, structure: str, meaning: str, counts: bool = True) -> Sample:
        kind = "open" if structure == "query" else "binary"
        groups = (("answer", kind), ("structure", structure), ("meaning", meaning))
        return Sample(key, None, "?", (answer,), groups=groups, counts=counts)

    samples = [
        sample("1", "left", "query", "relation"),
        sample("2", "yes", "verify", "attribute"),
        sample("3", "no", "verify", "object"),
        sample("4", "no", "verify", "object", counts=False),
    ]
    scores = score_answers(GQA("gqa", "testdev_all", samples), {"1": "Left.", "2": "yes", "3": "yes"})
    assert scores.overall == pytest.approx({"questions": 3, "accuracy": 200 / 3})
    assert scores.parts["answer"]["binary"] == pytest.approx({"questions": 2, "accuracy": 50})
    assert scores.parts["answer"]["open"] == pytest.approx({"questions": 1, "accuracy": 100})
    assert list(scores.parts["meaning"]) == ["attribute", "object", "relation"]


def test_pope_by_subset():
    def sample(key: str, label: str, subset: str) -> Sample:
        return Sample(f"{subset}-{key}", None, "?", (label,), groups=(("subset", subset),))

    labels = ("yes", "yes", "no", "no")
    samples = [sample(str(n), label, subset) for subset in ("random", "popular") for n, label in enumerate(labels)]
    said = {"random": ("Yes", "No", "No", "Yes"), "popular": ("Yes, a dog", "Yes", "no", "There is not.")}
    answers = {f"{subset}-{n}": text for subset, texts in said.items() for n, text in enumerate(texts)}
    scores = score_answers(POPE("pope", "coco", samples), answers)
    # random: one of two yes is found, and one of two that are called yes is right
    even = {"questions": 4, "accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50}
    whole = {"questions": 4, "accuracy": 100, "precision": 100, "recall": 100, "f1": 100, "yes_ratio": 50}
    assert scores.parts["subset"] == {"popular": pytest.approx(whole), "random": pytest.approx(even)}
    assert scores.overall == pytest.approx(dict.fromkeys(even, 75) | {"questions": 8, "yes_ratio": 50})


def test_pope_of_a_model_that_says_no():
    samples = [Sample(f"random-{n}", None, "?", (label,)) for n, label in enumerate(("yes", "no", "no"))]
    scores = score_answers(POPE("pope", "coco", samples), {sample.id: "no" for sample in samples})
    nothing = {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert scores.overall == pytest.approx({"questions": 3, "accuracy": 200 / 3, **nothing})


def test_scienceqa_by_subject_context_and_grade():
    def sample(key: str, answer: str, choices: int, *groups: tuple[str, str]) -> Sample:
        return Sample(key, None, "?", (answer,), choices=("x",) * choices, groups=groups)

    text, image, none = (("context", name) for name in ("text", "image", "none"))
    samples = [
        sample("1", "A", 2, ("subject", "natural science"), text, image, ("grade", "1-6")),
        sample("2", "B", 4, ("subject", "social science"), image, ("grade", "7-12")),
        sample("3", "C", 4, ("subject", "natural science"), none, ("grade", "7-12")),
    ]
    scores = score_answers(ScienceQA("scienceqa", "test", samples), {"1": "A", "2": "The answer is B.", "3": "E"})
    chance = 100 * (1 / 2 + 1 / 4 + 1 / 4) / 3
    assert scores.overall == pytest.approx({"questions": 3, "accuracy": 200 / 3, "chance": chance})
    contexts = {name: row["accuracy"] for name, row in scores.parts["context"].items()}
    assert contexts == {"image": 100, "none": 0, "text": 100}
    assert scores.parts["context"]["image"]["questions"] == 2
    assert scores.parts["subject"]["natural science"]["accuracy"] == 50
    assert scores.parts["grade"]["7-12"]["accuracy"] == 50


def test_missing_answers_are_named():
    benchmark = GQA("gqa", "testdev_balanced", [Sample("7", None, "?", ("a",)), Sample("8", None, "?", ("b",))])
    with pytest.raises(ValueError, match="1 of 2 questions have no answer, the first is 8"):
        score_answers(benchmark, {"7": "a"})


def test_without_references_there_is_no_score():
    with pytest.raises(ValueError, match=r"no question of gqa test_balanced has a published answer .* server"):
        score_answers(GQA("gqa", "test_balanced", [Sample("7", None, "?")]), {"7": "a"})
