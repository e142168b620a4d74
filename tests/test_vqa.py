"""Benchmarks of question answering: small files in the published formats, their faults, and runs that continue."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.fashion_mnist import DEBIAN_FOLDER
from zoo.data.scenes import FashionScenes
from zoo.data.vqa import list_benchmarks, open_benchmark, register_benchmark
from zoo.data.vqa.fashion_scenes import SceneQuestions
from zoo.engine.vqa import add_result, ask, blank_image, write_answers, write_scores
from zoo.engine.vqa_scores import score_answers

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
NAMED = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
needs_photos = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


class ColorNamer:
    """Answers every question with the colour of its image, and one without an image with ``nothing``."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, images, questions, batch_size=8, **options):
        assert len(images) == len(questions) <= batch_size
        self.asked += questions
        return [self._color_of(shown) for shown in images]

    def _color_of(self, shown) -> str:
        if not shown:
            return "nothing"
        (image,) = shown
        with image if isinstance(image, Image.Image) else Image.open(image) as picture:
            mean = np.asarray(picture.convert("RGB"), float).mean((0, 1))
        return min(NAMED, key=lambda name: np.abs(mean - NAMED[name]).sum())


def write_image(path: Path, color: str, size: tuple[int, int] = (24, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, NAMED[color]).save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def ten(*answers: str) -> list[dict]:
    """Ten people's answers, the last of those given by all who are left."""
    said = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said, 1)]


@pytest.fixture
def vqav2(tmp_path):
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    asked = [(42000, 42, "What color is it?"), (42001, 42, "Is it green?"), (73000, 73, "What color is it?")]
    questions = [{"image_id": image, "question": text, "question_id": key} for key, image, text in asked]
    said = {42000: ten("red"), 42001: ten("yes", "no"), 73000: ten("green", "green", "blue")}
    annotations = [
        {
            **{"question_type": "what color" if key % 2 == 0 else "is it", "multiple_choice_answer": "red"},
            **{"answers": said[key], "image_id": image, "question_id": key},
            **{"answer_type": "other" if key % 2 == 0 else "yes/no"},
        }
        for key, image, _ in asked
    ]
    for split in ("val2014", "test-dev2015"):
        content = {**head, "task_type": "Open-Ended", "questions": questions}
        write_json(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json", content)
    write_json(tmp_path / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    write_image(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg", "red")
    write_image(tmp_path / "val2014" / "COCO_val2014_000000000073.jpg", "green")
    write_image(tmp_path / "test2015" / "COCO_test2015_000000000042.jpg", "red")
    write_image(tmp_path / "test2015" / "COCO_test2015_000000000073.jpg", "green")
    return tmp_path


@pytest.fixture
def gqa(tmp_path):
    def question(text: str, image: str, answer: str, structural: str, semantic: str, balanced: bool = True) -> dict:
        return {
            **{"question": text, "imageId": image, "answer": answer, "fullAnswer": f"It is {answer}."},
            **{"isBalanced": balanced, "groups": {"global": None, "local": "x"}, "entailed": [], "equivalent": []},
            **{"types": {"structural": structural, "semantic": semantic, "detailed": "x"}, "annotations": {}},
            **{"semantic": [], "semanticStr": ""},
        }

    questions = {
        "201": question("What color is the wall?", "n1", "red", "query", "attr"),
        "202": question("Is the wall red?", "n1", "yes", "verify", "attr"),
        "203": question("What color is the sea?", "n2", "blue", "query", "attr", balanced=False),
    }
    write_json(tmp_path / "questions" / "testdev_balanced_questions.json", questions)
    write_json(tmp_path / "questions" / "testdev_all_questions.json", questions)
    bare = {key: {name: q[name] for name in ("question", "imageId", "isBalanced")} for key, q in questions.items()}
    write_json(tmp_path / "test_balanced_questions.json", bare)
    write_image(tmp_path / "images" / "n1.jpg", "red")
    write_image(tmp_path / "images" / "n2.jpg", "blue")
    return tmp_path


@pytest.fixture
def textvqa(tmp_path):
    def record(key: int, image: str, text: str, answers: list[str] | None) -> dict:
        common = {"question_id": key, "image_id": image, "question": text, "question_tokens": text.split()}
        size = {"image_width": 24, "image_height": 16, "image_classes": ["Sign"], "set_name": "val"}
        return {**common, **size, **({} if answers is None else {"answers": answers})}

    for split, answers in (("val", ["Green"] * 4 + ["grün"] * 6), ("test", None)):
        data = [record(34602, "0a1", "what color is the sign?", answers), record(34603, "0b2", "and this?", answers)]
        head = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(tmp_path / f"TextVQA_0.5.1_{split}.json", {**head, "data": data})
    words = [{"image_id": "0a1", "ocr_tokens": ["STOP", "4.50"], "ocr_info": []}]
    words.append({"image_id": "0b2", "ocr_tokens": [], "ocr_info": []})
    write_json(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_name": "textvqa", "data": words})
    for folder in ("train_images", "test_images"):
        write_image(tmp_path / folder / "0a1.jpg", "green")
        write_image(tmp_path / folder / "0b2.jpg", "blue")
    return tmp_path


@pytest.fixture
def pope(tmp_path):
    for number, subset in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a car in the image?"},
            {"question_id": 2, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a cup in the image?"},
        ]
        lines = [json.dumps({**row, "label": label}) for row, label in zip(rows, ("yes", "no"), strict=True)]
        path = tmp_path / "output" / "coco" / f"coco_pope_{subset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines[: 1 + number]) + "\n")
    write_image(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg", "red")
    return tmp_path


@pytest.fixture
def scienceqa(tmp_path):
    def problem(text: str, choices: list[str], answer: int, hint: str, image: str | None, grade: str) -> dict:
        return {
            **{"question": text, "choices": choices, "answer": answer, "hint": hint, "image": image, "grade": grade},
            **{"task": "closed choice", "subject": "natural science", "topic": "physics", "category": "Light"},
            **{"skill": "Colors", "lecture": "", "solution": "", "split": "test"},
        }

    problems = {
        "4": problem("Which color?", ["red", "blue"], 0, "Look at the wall.", "image.png", "grade2"),
        "5": problem("Which is heavier?", ["lead", "wood", "air"], 0, "", None, "grade8"),
        "6": problem("Which color?", ["red", "blue"], 1, "", "image.png", "grade12"),
        "9": problem("Not in the test split?", ["yes", "no"], 0, "", None, "grade3"),
    }
    write_json(tmp_path / "data" / "scienceqa" / "problems.json", problems)
    write_json(tmp_path / "data" / "scienceqa" / "pid_splits.json", {"train": ["9"], "test": ["5", "4", "6"]})
    for key, color in (("4", "red"), ("6", "blue")):
        write_image(tmp_path / "data" / "scienceqa" / "images" / "test" / key / "image.png", color)
    return tmp_path


def test_vqav2_val(vqav2):
    benchmark = open_benchmark("vqav2", vqav2)
    assert (benchmark.name, benchmark.split, len(benchmark)) == ("vqav2", "val", 3)
    first, second, _ = benchmark.samples
    assert first.question == f"What color is it?\n{SHORT}"
    assert first.image == benchmark.image(first) == vqav2 / "val2014" / "COCO_val2014_000000000042.jpg"
    assert second.answers == ("yes", *["no"] * 9)
    assert second.groups == (("answer type", "yes/no"), ("question type", "is it"))
    assert open_benchmark("vqav2", str(vqav2), instruction=False).samples[0].question == "What color is it?"
    assert [sample.id for sample in open_benchmark("vqav2", vqav2, limit=2).samples] == ["42000", "42001"]


def test_vqav2_from_question_to_score(vqav2, tmp_path):
    benchmark = open_benchmark("vqav2", vqav2)
    answers = ask(ColorNamer(), benchmark, tmp_path / "out", {}, batch_size=2)
    assert answers == {"42000": "red", "42001": "red", "73000": "green"}
    scores = score_answers(benchmark, answers)
    assert scores.overall == pytest.approx({"questions": 3, "accuracy": 100 * (1 + 0 + 0.6) / 3})
    (path,) = write_answers(benchmark, answers, tmp_path / "out")
    assert json.loads(path.read_text())[0] == {"question_id": 42000, "answer": "red"}
    saved = json.loads(write_scores(scores, tmp_path / "out").read_text())
    assert saved["parts"]["answer type"]["other"]["accuracy"] == pytest.approx(80)


def test_splits_without_published_answers(vqav2, gqa, textvqa):
    for name, split in (("vqav2", "test-dev"), ("gqa", "test_balanced"), ("textvqa", "test")):
        benchmark = open_benchmark(name, vqav2, split)
        assert len(benchmark) >= 2
        assert not any(sample.answers for sample in benchmark.samples)
        assert benchmark.submission({sample.id: "x" for sample in benchmark.samples})


def test_gqa(gqa):
    benchmark = open_benchmark("gqa", gqa, "testdev_all")
    assert [sample.counts for sample in benchmark.samples] == [True, True, False]
    assert benchmark.samples[0].groups == (("answer", "open"), ("structure", "query"), ("meaning", "attribute"))
    assert benchmark.samples[1].groups[0] == ("answer", "binary")
    assert open_benchmark("gqa", gqa).split == "testdev_balanced"
    rows = json.loads(benchmark.submission({"201": "Red.", "203": "blue"})["answers.json"])
    assert rows == [{"questionId": "201", "prediction": "red"}, {"questionId": "203", "prediction": "blue"}]


def test_textvqa_with_and_without_read_words(textvqa):
    plain, read = open_benchmark("textvqa", textvqa), open_benchmark("textvqa", textvqa, ocr=True)
    assert plain.samples[0].question == f"what color is the sign?\n{SHORT}"
    assert read.samples[0].question == f"Reference OCR token: STOP, 4.50\nwhat color is the sign?\n{SHORT}"
    assert read.samples[1].question == f"and this?\n{SHORT}"  # nothing was read there
    assert score_answers(plain, {"34602": "green", "34603": "GRÜN"}).overall["accuracy"] == 100


def test_pope_takes_turns_and_answers_in_the_files_order(pope):
    benchmark = open_benchmark("pope", pope)
    ids = [sample.id for sample in benchmark.samples]
    assert ids == ["random-1", "popular-1", "adversarial-1", "popular-2", "adversarial-2"]
    files = benchmark.submission(dict.fromkeys(ids, "No.") | {"popular-2": "Yes"})
    assert list(files) == [f"coco_pope_{subset}_answers.json" for subset in ("random", "popular", "adversarial")]
    rows = [json.loads(line) for line in files["coco_pope_popular_answers.json"].splitlines()]
    assert rows[1] == {"question": "Is there a cup in the image?", "answer": "Yes"}
    scores = score_answers(benchmark, dict.fromkeys(ids, "Yes"))
    assert {name: row["accuracy"] for name, row in scores.parts["subset"].items()} == {
        **{"random": 100, "popular": 50, "adversarial": 50}
    }
    assert scores.overall["yes_ratio"] == 100


def test_scienceqa_with_and_without_images(scienceqa, tmp_path):
    benchmark = open_benchmark("scienceqa", scienceqa)
    text, image, _ = benchmark.samples
    assert text.question == f"Which is heavier?\nA. lead\nB. wood\nC. air\n{LETTER}"
    assert text.image is None
    assert image.question == f"Context: Look at the wall.\nWhich color?\nA. red\nB. blue\n{LETTER}"
    assert image.groups == (
        *(("subject", "natural science"), ("context", "text"), ("context", "image")),
        ("grade", "1-6"),
    )
    assert text.groups[1:] == (("context", "none"), ("grade", "7-12"))
    half = open_benchmark("scienceqa_image", scienceqa)
    assert [sample.id for sample in half.samples] == ["4", "6"]
    assert ask(ColorNamer(), benchmark, tmp_path / "out", {})["5"] == "nothing"
    content = json.loads(benchmark.submission({"4": "A.", "5": "nothing", "6": "The answer is B."})["answers.json"])
    assert content["results"] == {"5": -1, "4": 0, "6": 1}
    assert content["outputs"]["6"] == "The answer is B."


def drawn_items() -> tuple[np.ndarray, np.ndarray]:
    """A shaded ellipse of another shape for each of ten classes."""
    y, x = np.mgrid[:28, :28] * 2 - 27
    sizes = [(9 + 2 * label, 27 - label) for label in range(10)]
    images = [np.where((x * h) ** 2 + (y * w) ** 2 <= (w * h) ** 2, 120 + x - y, 0) for w, h in sizes]
    return np.array(images).clip(0, 255).astype(np.uint8), np.arange(10)


def test_fashion_scenes():
    scenes = FashionScenes("test", 20, size=64, items=drawn_items())
    benchmark = SceneQuestions(scenes, limit=12)
    assert (benchmark.name, benchmark.split, len(benchmark)) == ("fashion_scenes", "test", 12)
    assert len(SceneQuestions(scenes)) == sum(len(scenes[number].questions) for number in range(20))
    third = next(sample for sample in benchmark.samples if sample.id.startswith("test-000002-"))
    image = benchmark.image(third)
    assert np.array_equal(np.asarray(image), scenes[2].image)
    assert image is benchmark.image(third)
    question = scenes[2].questions[0]
    assert (third.question, third.answers, third.choices) == (question.text, (question.answer,), question.choices)
    scores = score_answers(benchmark, {sample.id: f"{sample.answers[0].upper()}." for sample in benchmark.samples})
    assert scores.overall["accuracy"] == 100
    assert scores.parts["kind"]["presence"]["chance"] == 50
    submitted = json.loads(benchmark.submission({third.id: "Red."})["answers.json"])
    assert submitted == [{"question_id": third.id, "answer": "red"}]


@needs_photos
def test_fashion_scenes_by_name():
    benchmark = open_benchmark("fashion_scenes", limit=12, img_size=64)
    assert (benchmark.split, len(benchmark)) == ("test", 12)
    assert "\n" not in benchmark.samples[0].question  # no instruction
    assert benchmark.image(benchmark.samples[0]).size == (64, 64)


def test_names_splits_and_options_are_checked(vqav2):
    assert list_benchmarks() == ["fashion_scenes", "gqa", "pope", "scienceqa", "scienceqa_image", "textvqa", "vqav2"]
    with pytest.raises(ValueError, match="no benchmark 'vqa'; did you mean vqav2"):
        open_benchmark("vqa", vqav2)
    with pytest.raises(ValueError, match="vqav2 has the splits val, train, test-dev, test, got 'dev'"):
        open_benchmark("vqav2", vqav2, "dev")
    with pytest.raises(ValueError, match="the benchmark vqav2 has no option ocr; it has limit, instruction"):
        open_benchmark("vqav2", vqav2, ocr=True)
    with pytest.raises(ValueError, match="vqav2 needs root"):
        open_benchmark("vqav2")
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        open_benchmark("vqav2", vqav2, limit=0)
    with pytest.raises(ValueError, match=r"'gqa' belongs to zoo\.data\.vqa\.gqa"):
        register_benchmark("gqa")(lambda root, split: None)


def test_files_that_are_not_there(vqav2):
    (vqav2 / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no v2_mscoco_val2014_annotations\.json in .* found there: test2015"):
        open_benchmark("vqav2", vqav2)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_benchmark("gqa", vqav2 / "nowhere")


@pytest.mark.parametrize("content, problem", [("", "is empty"), ('{"questions": [', "is not JSON, or was cut off")])
def test_damaged_files(vqav2, gqa, content, problem):
    (vqav2 / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(content)
    (gqa / "questions" / "testdev_balanced_questions.json").write_text(content)
    for name in ("vqav2", "gqa"):
        with pytest.raises(ValueError, match=problem):
            open_benchmark(name, vqav2)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_other_files_than_the_published(vqav2, gqa, textvqa, scienceqa):
    write_json(vqav2 / "v2_OpenEnded_mscoco_val2014_questions.json", [1])
    with pytest.raises(ValueError, match="has no list 'questions', so it is not the published file"):
        open_benchmark("vqav2", vqav2)
    write_json(gqa / "questions" / "testdev_balanced_questions.json", {})
    with pytest.raises(ValueError, match="has no questions by their ids"):
        open_benchmark("gqa", gqa)
    edit(textvqa / "TextVQA_0.5.1_val.json", lambda content: content["data"].clear())
    with pytest.raises(ValueError, match="the list 'data' is empty"):
        open_benchmark("textvqa", textvqa)
    edit(scienceqa / "data" / "scienceqa" / "problems.json", lambda content: content.pop("6"))
    with pytest.raises(ValueError, match=r"problems\.json has no '6'"):
        open_benchmark("scienceqa", scienceqa)


def test_records_that_lack_something(vqav2, gqa, textvqa, pope, scienceqa):
    edit(vqav2 / "v2_OpenEnded_mscoco_val2014_questions.json", lambda content: content["questions"][1].pop("image_id"))
    with pytest.raises(ValueError, match="record 1 of 'questions' has no 'image_id'"):
        open_benchmark("vqav2", vqav2)
    edit(gqa / "questions" / "testdev_balanced_questions.json", lambda content: content["202"].pop("types"))
    with pytest.raises(ValueError, match="'types' of question 202 has no 'structural' and no 'semantic'"):
        open_benchmark("gqa", gqa)
    edit(textvqa / "TextVQA_0.5.1_val.json", lambda content: content["data"][1].pop("answers"))
    with pytest.raises(ValueError, match="question 34603 has no 'answers'"):
        open_benchmark("textvqa", textvqa)
    edit(textvqa / "TextVQA_0.5.1_val.json", lambda content: content["data"][1].update(answers=["x"] * 10))
    edit(textvqa / "TextVQA_Rosetta_OCR_v0.2_val.json", lambda content: content["data"].pop(0))
    with pytest.raises(ValueError, match="Rosetta's file lacks the image 0a1 of question 34602"):
        open_benchmark("textvqa", textvqa, ocr=True)
    path = pope / "output" / "coco" / "coco_pope_popular.json"
    path.write_text(path.read_text().replace('"no"', '"maybe"'))
    with pytest.raises(ValueError, match="label on line 2 is 'maybe'; it must be yes or no"):
        open_benchmark("pope", pope)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="line 2 is not JSON, or was cut off"):
        open_benchmark("pope", pope)
    edit(scienceqa / "data" / "scienceqa" / "problems.json", lambda content: content["4"].update(answer=2))
    with pytest.raises(ValueError, match="problem 4 has 2 choices and the answer 2, counted from 0"):
        open_benchmark("scienceqa", scienceqa)


def test_questions_and_annotations_of_different_releases(vqav2):
    edit(vqav2 / "v2_mscoco_val2014_annotations.json", lambda content: content["annotations"].pop(1))
    with pytest.raises(
        ValueError, match="1 questions have no annotation: 42001; take both files from the same release"
    ):
        open_benchmark("vqav2", vqav2)
    edit(vqav2 / "v2_OpenEnded_mscoco_val2014_questions.json", lambda content: content["questions"].pop(1))
    assert len(open_benchmark("vqav2", vqav2)) == 2
    edit(vqav2 / "v2_OpenEnded_mscoco_val2014_questions.json", lambda content: content["questions"].pop(1))
    with pytest.raises(ValueError, match="1 annotations have no question: 73000"):
        open_benchmark("vqav2", vqav2)


def test_questions_twice(vqav2):
    path = vqav2 / "v2_OpenEnded_mscoco_val2014_questions.json"
    edit(path, lambda content: content["questions"].append(content["questions"][0]))
    with pytest.raises(ValueError, match="has the question 42000 more than once"):
        open_benchmark("vqav2", vqav2)


def test_bad_images_are_errors_or_left_out(vqav2, caplog):
    (vqav2 / "val2014" / "COCO_val2014_000000000042.jpg").unlink()
    damaged = vqav2 / "val2014" / "COCO_val2014_000000000073.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"2 of 2 files in .*val2014 are not readable images(.|\n)*there is no such file"
    ):
        open_benchmark("vqav2", vqav2)
    write_image(damaged, "green")
    benchmark = open_benchmark("vqav2", vqav2, bad_files="skip")
    assert [sample.id for sample in benchmark.samples] == ["73000"]
    assert "1 of 2 files" in caplog.text and "left out" in caplog.text
    damaged.unlink()
    with pytest.raises(ValueError, match="no question is left"):
        open_benchmark("vqav2", vqav2, bad_files="skip")
    with pytest.raises(ValueError, match="bad_files='ignore' must be error or skip"):
        open_benchmark("vqav2", vqav2, bad_files="ignore")


def test_images_of_questions_beyond_the_limit_are_not_looked_at(vqav2):
    (vqav2 / "val2014" / "COCO_val2014_000000000073.jpg").unlink()
    assert len(open_benchmark("vqav2", vqav2, limit=2)) == 2


def test_an_interrupted_run_continues(vqav2, tmp_path):
    class Failing(ColorNamer):
        def answer(self, images, questions, batch_size=8, **options):
            if self.asked:
                raise RuntimeError("the power is out")
            return super().answer(images, questions, batch_size, **options)

    benchmark, folder = open_benchmark("vqav2", vqav2), tmp_path / "out"
    with pytest.raises(RuntimeError, match="the power is out"):
        ask(Failing(), benchmark, folder, {"model": "a"}, batch_size=2)
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"id": "73000", "question": "What co')  # a line that was not finished
    second = ColorNamer()
    answers = ask(second, benchmark, folder, {"model": "a"}, batch_size=2)
    assert second.asked == [benchmark.samples[2].question]
    assert answers == {"42000": "red", "42001": "red", "73000": "green"}
    third = ColorNamer()
    assert ask(third, benchmark, folder, {"model": "a"}) == answers
    assert third.asked == []
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 3


def test_a_higher_limit_asks_the_rest(vqav2, tmp_path):
    model = ColorNamer()
    ask(model, open_benchmark("vqav2", vqav2, limit=1), tmp_path / "out", {})
    assert len(ask(model, open_benchmark("vqav2", vqav2), tmp_path / "out", {})) == 3
    assert len(model.asked) == 3


def test_answers_of_one_kind_in_a_folder(vqav2, tmp_path):
    benchmark = open_benchmark("vqav2", vqav2)
    ask(ColorNamer(), benchmark, tmp_path / "out", {"model": "a", "image": "real"})
    with pytest.raises(ValueError, match=r"holds other answers \(image was real, is blank\); name another folder"):
        ask(ColorNamer(), benchmark, tmp_path / "out", {"model": "a", "image": "blank"}, blank=True)


def test_damaged_answers_are_named(vqav2, tmp_path):
    benchmark = open_benchmark("vqav2", vqav2)
    ask(ColorNamer(), benchmark, tmp_path / "out", {})
    path = tmp_path / "out" / "answers.jsonl"
    path.write_text(path.read_text().replace('"answer": "red"', '"text": "red"', 1))
    with pytest.raises(ValueError, match="line 1 is no answer"):
        ask(ColorNamer(), benchmark, tmp_path / "out", {})


def test_models_must_answer_everything(vqav2, tmp_path):
    class Silent(ColorNamer):
        def answer(self, images, questions, batch_size=8, **options):
            return []

    with pytest.raises(ValueError, match="3 questions need 3 texts, but the model returned"):
        ask(Silent(), open_benchmark("vqav2", vqav2), tmp_path / "out", {})


def test_blank_images_leave_the_language_alone(vqav2, scienceqa, tmp_path):
    answers = ask(ColorNamer(), open_benchmark("vqav2", vqav2), tmp_path / "a", {}, blank=True)
    assert set(answers.values()) == {"grey"}
    answers = ask(ColorNamer(), open_benchmark("scienceqa", scienceqa), tmp_path / "b", {}, blank=True)
    assert answers == {"5": "nothing", "4": "grey", "6": "grey"}
    path = vqav2 / "val2014" / "COCO_val2014_000000000042.jpg"
    assert blank_image(path).size == (24, 16)
    assert blank_image(path) is blank_image(Image.new("L", (24, 16)))


def test_results_of_benchmarks_share_a_file(tmp_path):
    path = tmp_path / "new" / "results.csv"
    about = {"model": "a", "benchmark": "gqa", "split": "val", "image": "real", "questions": 3}
    add_result({**about, "accuracy": 10.0}, path)
    add_result({**about, "benchmark": "pope", "accuracy": 20.0, "f1": 0.5}, path)
    add_result({**about, "accuracy": 30.0}, path)  # in the place of the first
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["benchmark"], row["accuracy"], row["f1"]) for row in rows] == [
        ("pope", "20.0", "0.5"),
        ("gqa", "30.0", ""),
    ]
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="holds no results, it has no column model, benchmark"):
        add_result(about, tmp_path / "other.csv")
    assert (tmp_path / "other.csv").read_text() == "epoch,loss\n1,2\n"
