"""How answers in words are compared: each benchmark's published rules.

VQA's rules are described at https://visualqa.org/evaluation.html; where its program, of which published numbers are,
does otherwise than the description, the program is followed. TextVQA adds to them what its evaluation does first.
"""

import re
from collections.abc import Sequence

__all__ = [
    "chosen_option",
    "short_answer",
    "soft_accuracy",
    "textvqa_answer",
    "vqa_answer",
    "vqa_reference",
    "yes_or_no",
]

PEOPLE_TO_AGREE = 3  # with an answer, for full credit
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # neither apostrophes nor colons, nor periods, which have a rule of their own
PERIOD = re.compile(r"\.(?!\d)")  # of decimal numbers it stays
COMMA_IN_NUMBER = re.compile(r"\d,\d")

# Contractions that are recognised with one of their apostrophes missing. Words that are others without it (we'd, I'll)
# are not among them.
CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've shouldn't
    somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
    there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, sign in enumerate(word)
    if sign == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the other way round in the published table

OPTIONS = "ABCDE"
FIRST_OPTION = re.compile(r"\(?([A-E])(?:[).:]+\s|[).:]*\s*(?:\n|$))")  # A, (A), A. word, but not the article
STATED_OPTION = re.compile(r"[Aa]nswer is:? \(?([A-E])\b")


def vqa_answer(answer: str) -> str:
    """A model's answer as VQA compares it: no punctuation, lower case, digits, no articles, apostrophes restored."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [DIGITS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_reference(answer: str) -> str:
    """A reference of VQA as it is compared: they are published in lower case, with digits and without articles."""
    return _without_punctuation(answer)


def textvqa_answer(answer: str) -> str:
    """An answer, a model's or a reference, as TextVQA compares it."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_answer(answer)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """How many people agree with an answer, 0 to 1: three out of nine are enough, in the mean over who is left out.

    Args:
        answer: The answer as it is compared.
        references: Several people's answers, as they are compared, usually ten.
    """
    agreeing = sum(reference == answer for reference in references)
    with_one_less = agreeing * min(1.0, (agreeing - 1) / PEOPLE_TO_AGREE) if agreeing else 0.0
    others = (len(references) - agreeing) * min(1.0, agreeing / PEOPLE_TO_AGREE)
    return (with_one_less + others) / len(references)


def short_answer(answer: str) -> str:
    """An answer in lower case without space around it and periods at its end, as GQA's exact match is applied to text.

    GQA itself has no rule. LLaVA's evaluation does this; Cobra's removes all punctuation, so that no answer with a
    hyphen is ever right.
    """
    return answer.strip().rstrip(".").lower()


def yes_or_no(answer: str) -> str:
    """``no`` if the first sentence has the word no or not, else ``yes``, as POPE reads answers.

    Any space separates words here, where POPE's program knows blanks only.
    """
    words = answer.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def chosen_option(answer: str, count: int) -> int | None:
    """The number of the option, from 0, that an answer names by its letter; None if it names none of ``count``."""
    found = FIRST_OPTION.match(answer.strip()) or STATED_OPTION.search(answer)
    number = OPTIONS.index(found[1]) if found else count
    return number if number < count else None


def _without_punctuation(text: str) -> str:
    """Marks beside a blank are removed, others become one; in a text with a comma between digits all are removed."""
    in_number = COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if in_number or beside_blank else " ")
    return PERIOD.sub("", cleaned)
