"""Fashion scenes: ground truth that agrees with the pixels, answers that language alone does not give, exports."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from zoo.data.fashion_mnist import DEBIAN_FOLDER
from zoo.data.scenes import (
    ITEM_NAMES,
    FashionScenes,
    plot_scenes,
    split_words,
    vocabulary,
    write_ade,
    write_coco,
    write_llava,
)
from zoo.data.scenes.compose import MIN_VISIBLE
from zoo.data.scenes.cutouts import Cutouts, find_masks
from zoo.data.scenes.language import COLORS, DESCRIBE
from zoo.data.scenes.plan import draw_plan
from zoo.tools.scenes import main

needs_photos = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
PLURALS = {**{f"{name}s": name for name in ITEM_NAMES}, "dresses": "dress", "trousers": "trousers"}


def drawn_items() -> tuple[np.ndarray, np.ndarray]:
    """Two shaded ellipses per class, flat ones, upright ones, some with a hole like a handle."""
    y, x = np.mgrid[:28, :28] * 2 - 27
    images, labels = [], []
    for label in range(10):
        for shade in (3, 5):
            wide, high = 9 + 2 * label, 27 - label
            image = np.where((x * high) ** 2 + (y * wide) ** 2 <= (wide * high) ** 2, 120 + shade * (x - y) // 3, 0)
            if label == 8:
                image[x**2 + (y + 8) ** 2 <= 49] = 0
            images.append(image)
            labels.append(label)
    return np.array(images).clip(0, 255).astype(np.uint8), np.array(labels)


ITEMS = drawn_items()


def drawn_scenes(split: str = "train", count: int = 40, size: int = 96, seed: int = 0) -> FashionScenes:
    return FashionScenes(split, count, size=size, seed=seed, items=ITEMS)


@pytest.fixture(scope="module")
def scenes():
    dataset = drawn_scenes(count=120)
    return [dataset[i] for i in range(len(dataset))]


def digest(scene) -> str:
    parts = [scene.image, scene.semantic, scene.masks, scene.boxes, scene.labels, scene.visible]
    content = b"".join(part.tobytes() for part in parts) + repr((scene.colors, scene.caption, scene.questions)).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def test_scenes_are_constants():
    """Whoever changes these numbers raises GENERATOR_VERSION."""
    assert digest(drawn_scenes()[7]) == "096a5e33df1fa11b"
    assert digest(drawn_scenes("val", size=57, seed=3)[0]) == "7927c8a159d2d1bd"


def test_scene_depends_on_seed_split_and_index_alone():
    dataset = drawn_scenes()
    np.random.seed(1)
    first = digest(dataset[7])
    dataset[3]
    assert digest(dataset[7]) == first == digest(drawn_scenes(count=8)[7])
    others = [dataset[8], drawn_scenes("val")[7], drawn_scenes("test")[7], drawn_scenes(seed=1)[7]]
    assert len({first, *map(digest, others)}) == 5
    with pytest.raises(IndexError, match="scene 40 of 40"):
        dataset[40]


@pytest.mark.parametrize("size", [33, 96, 256])
def test_masks_boxes_and_classes_agree(size):
    dataset = drawn_scenes(count=12, size=size)
    for i in range(len(dataset)):
        scene = dataset[i]
        n = len(scene.labels)
        assert 1 <= n <= 6
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (n, size, size) and scene.masks.dtype == bool
        assert scene.semantic.dtype == np.uint8 and scene.boxes.dtype == np.float32
        assert scene.masks.sum(0).max() == 1  # of two items only the front one is visible
        assert (scene.masks.any(0) == (scene.semantic > 0)).all()
        for mask, box, label in zip(scene.masks, scene.boxes, scene.labels, strict=True):
            assert (scene.semantic[mask] == label + 1).all()
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_items_are_of_many_sizes_and_numbers():
    dataset = drawn_scenes(count=60, size=256)
    found = [dataset[i] for i in range(len(dataset))]
    longest = np.concatenate([(s.boxes[:, 2:] - s.boxes[:, :2]).max(1)[s.visible == 1] for s in found])
    assert 30 <= longest.min() < 50 and 100 < longest.max() <= 125
    assert {len(scene.labels) for scene in found} == {1, 2, 3, 4, 5, 6}


def test_every_item_stays_visible_and_some_are_occluded(scenes):
    occluded = 0
    for scene in scenes:
        assert scene.visible.min() >= MIN_VISIBLE
        assert scene.visible[-1] == 1  # nothing is in front of the last one
        for item in np.flatnonzero(scene.visible < 1):
            left, top, right, bottom = scene.boxes[item]
            in_front = scene.boxes[item + 1 :] + np.array([-1, -1, 1, 1])
            touching = (in_front[:, 0] < right) & (in_front[:, 2] > left)
            assert (touching & (in_front[:, 1] < bottom) & (in_front[:, 3] > top)).any()
            occluded += scene.visible[item] < 0.95
    total = sum(len(scene.labels) for scene in scenes)
    assert 0.1 * total < occluded < 0.5 * total


def test_pixels_have_the_named_colors(scenes):
    names = list(COLORS)
    directions = np.array([COLORS[name] for name in names], float)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for scene in scenes:
        for mask, color in zip(scene.masks, scene.colors, strict=True):
            pixel = np.median(scene.image[mask].astype(float), 0)
            assert names[(directions @ pixel).argmax()] == color


def middle(scene) -> np.ndarray:
    """Centre of every box as a fraction of the side."""
    return (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2 / len(scene.semantic)


def lies(scene, item: int, direction: str, reference: int) -> bool:
    """Whether an item is, for example, farther to the left of the reference than above or below it."""
    dx, dy = (middle(scene)[item] - middle(scene)[reference]).tolist()
    return {
        "left of": dx < 0 and -dx > abs(dy),
        "right of": dx > 0 and dx > abs(dy),
        "above": dy < 0 and -dy > abs(dx),
        "below": dy > 0 and dy > abs(dx),
    }[direction]


def only_of(scene, name: str) -> int:
    (item,) = np.flatnonzero(scene.labels == ITEM_NAMES.index(name))
    return int(item)


def right_answer(scene, text: str) -> str:
    """Answers a question from labels, colours and boxes."""
    names = [ITEM_NAMES[label] for label in scene.labels]
    if found := re.fullmatch(r"How many (?:pairs of )?(\S+) are there\?", text):
        return ("zero", "one", "two", "three")[names.count(PLURALS[found[1]])]
    if found := re.fullmatch(r"Is there (?:an?|a pair of) (\S+)\?", text):
        return "yes" if found[1] in names else "no"
    if found := re.fullmatch(r"Which item is at the (top|bottom) (left|right)\?", text):
        x, y = middle(scene).T
        there = ((y < 0.5) == (found[1] == "top")) & ((x < 0.5) == (found[2] == "left"))
        (item,) = np.flatnonzero(there)
        return names[item]
    if found := re.fullmatch(r"What is (left of|right of|above|below) the (\S+)\?", text):
        reference = only_of(scene, found[2])
        (item,) = (i for i in range(len(names)) if lies(scene, i, found[1], reference))
        return names[item]
    found = re.fullmatch(r"What color (?:is|are) the (\S+)\?", text)
    return scene.colors[only_of(scene, found[1])]


def test_answers_are_right(scenes):
    kinds = Counter()
    for scene in scenes:
        for question in scene.questions:
            assert right_answer(scene, question.text) == question.answer
            assert question.answer in question.choices
            kinds[question.kind] += 1
    assert set(kinds) == {"count", "presence", "corner", "relation", "color"}
    assert kinds["count"] == kinds["presence"] == len(scenes)
    assert min(kinds.values()) > 0.3 * len(scenes)


def test_captions_are_right(scenes):
    related = 0
    for scene in scenes:
        listed, *relations = scene.caption.removesuffix(".").lower().split(". ")
        described = Counter()
        for part in re.split(r", | and ", listed):
            if found := re.fullmatch(r"(two|three) (?:pairs of )?(\S+)", part):
                described[PLURALS[found[2]]] = ("two", "three").index(found[1]) + 2
            else:
                found = re.fullmatch(r"(?:an?|a pair of) (\S+) (\S+)", part)
                described[found[2]] = 1
                assert scene.colors[only_of(scene, found[2])] == found[1]
        assert described == Counter(ITEM_NAMES[label] for label in scene.labels)
        for sentence in relations:
            found = re.fullmatch(r"the (\S+) (?:is|are) (left of|right of|above|below) the (\S+)", sentence)
            assert lies(scene, only_of(scene, found[1]), found[2], only_of(scene, found[3]))
            related += 1
    assert related > len(scenes) / 3


def plans(seed: int, count: int) -> list:
    sequences = (np.random.SeedSequence((seed, i)) for i in range(count))
    return [draw_plan(np.random.Generator(np.random.PCG64(sequence))) for sequence in sequences]


def prior_accuracy(seen: list, held_out: list) -> dict[str, tuple[float, float, int]]:
    """Per kind of question: how often the commonest answer to the same text is right, chance, number of questions."""
    answers = defaultdict(Counter)
    for question in seen:
        answers[question.text][question.answer] += 1
    hits, chances = defaultdict(list), defaultdict(list)
    for question in held_out:
        if answers[question.text]:
            hits[question.kind].append(answers[question.text].most_common(1)[0][0] == question.answer)
            chances[question.kind].append(1 / len(question.choices))
    return {kind: (np.mean(hits[kind]), np.mean(chances[kind]), len(hits[kind])) for kind in hits}


def margin(chance: float, number: int) -> float:
    return 3.5 * math.sqrt(chance * (1 - chance) / number)


def test_language_alone_scores_at_chance():
    seen, held_out = drawn_scenes("train", 500, size=32), drawn_scenes("val", 400, size=32)
    seen, held_out = ([q for i in range(len(part)) for q in part[i].questions] for part in (seen, held_out))
    accuracy = prior_accuracy(seen, held_out)
    assert set(accuracy) == {"count", "presence", "corner", "relation", "color"}
    for kind, (found, chance, number) in accuracy.items():
        assert number > 150
        assert found < chance + margin(chance, number), kind
    tilted = [q for number, q in enumerate(held_out) if q.answer != "no" or number % 3]  # a third of the noes is gone
    found, chance, number = prior_accuracy(tilted, tilted)["presence"]
    assert found > chance + margin(chance, number)


def test_further_questions_have_their_answers_equally_often():
    """All that can be asked, and nothing twice; what is most likely without looking is right as often as chance."""
    scenes = drawn_scenes(count=800, size=48)
    answers = defaultdict(Counter)
    for scene in (scenes[i] for i in range(len(scenes))):
        texts = [question.text for question in (*scene.questions, *scene.further)]
        assert len(set(texts)) == len(texts)
        assert sum(question.kind == "color" for question in (*scene.questions, *scene.further)) == sum(
            count == 1 for count in Counter(scene.labels.tolist()).values()
        )
        for question in scene.further:
            assert right_answer(scene, question.text) == question.answer
            answers[question.kind, question.choices if question.kind != "relation" else ()][question.answer] += 1
    assert {kind for kind, _ in answers} == {"color", "corner", "relation"}
    for counted in answers.values():
        assert max(counted.values()) / counted.total() < 1.4 / len(counted)


def test_every_question_has_all_its_answers_equally_often():
    answers, choices = defaultdict(Counter), {}
    for plan in plans(seed=0, count=2000):
        for question in plan.questions:
            answers[question.text][question.answer] += 1
            choices[question.text] = question.choices
    assert len(answers) == 10 + 10 + 4 + 40 + 10  # every text that there is
    excess = []
    for text, counted in answers.items():
        total, chance = counted.total(), 1 / len(choices[text])
        assert set(counted) <= set(choices[text])
        assert max(counted.values()) / total < chance + 1.3 * margin(chance, total), text
        squares = sum((counted[choice] - total * chance) ** 2 for choice in choices[text]) / (total * chance)
        freedom = len(choices[text]) - 1
        excess.append((squares - freedom) / math.sqrt(2 * freedom))  # 0 on average if all are equally likely
    assert abs(np.mean(excess)) < 4 / math.sqrt(len(excess))


def test_vocabulary_is_what_is_used(scenes):
    texts = [DESCRIBE]
    for source in (*scenes, *plans(seed=1, count=400)):
        texts += [source.caption, *(part for q in source.questions for part in (q.text, q.answer))]
    assert {word for text in texts for word in split_words(text)} == set(vocabulary())
    assert list(vocabulary()) == sorted(set(vocabulary()))
    assert split_words("A red t-shirt, two bags.") == ["a", "red", "t-shirt", ",", "two", "bags", "."]


def test_plan_does_not_depend_on_the_size():
    small, large = drawn_scenes(size=64)[5], drawn_scenes(size=128)[5]
    assert small.caption == large.caption and small.questions == large.questions


def test_masks_fill_thin_holes_and_keep_handles_open():
    photos = np.zeros((5, 28, 28), np.uint8)
    photos[0, 4:24, 4:24] = 200
    photos[0, 6:8, 6:20] = 0  # a stripe
    photos[0, 12:18, 10:18] = 5  # a handle, not quite black
    photos[1] = 200  # fills the photo
    photos[2, ::2] = 200  # no outline
    photos[3, :, 4:24], photos[3, 5:, 10:18] = 40, 220  # someone before a grey wall
    masks, clear = find_masks(photos)
    assert clear.tolist() == [True, True, False, False, False]
    assert masks[0, 6:8, 6:20].all() and not masks[0, 13:17, 11:17].any()
    assert masks[0].sum() == pytest.approx(20 * 20 - 6 * 8, abs=8)  # corners are rounded
    assert masks[1, 1:-1, 1:-1].all()


def test_cutouts_are_as_large_as_asked_for():
    cutouts, rng = Cutouts(*ITEMS), np.random.default_rng(0)
    for label in range(10):
        for side in (20, 57, 120):
            shade, opacity = cutouts.draw(rng, label, side)
            inside = opacity >= 0.5
            extent = max(np.ptp(np.flatnonzero(inside.any(axis))) + 1 for axis in (0, 1))
            assert abs(extent - side) <= 0.06 * side + 1
            assert 0.3 < np.median(shade[inside]) <= 1 and shade[inside].min() > 0.2  # no black ground shines through


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(split="dev"), "splits train, val, test, got 'dev'"),
        (dict(size=31), "at least 32 pixels, got 31"),
        (dict(count=-1), "count -1"),
        (dict(seed=-1), "seed -1"),
        (dict(items=(ITEMS[0].astype(float), ITEMS[1])), "float64"),
        (dict(items=(ITEMS[0], ITEMS[1][:-1])), r"\(19,\)"),
        (dict(items=(ITEMS[0][:0], ITEMS[1][:0])), "'t-shirt' has a clear outline"),
        (dict(items=(ITEMS[0], ITEMS[1] + 1)), "0 to 9, got 1 to 10"),
        (dict(items=(ITEMS[0], ITEMS[1] % 9)), "'boot' has a clear outline"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FashionScenes(**{"split": "train", "count": 3, "items": ITEMS, **arguments})


def test_missing_photos_are_an_error_that_says_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        FashionScenes("val", 3, root=tmp_path)


@needs_photos
def test_scenes_of_real_photos():
    dataset = FashionScenes("val", 30)
    usable = [len(numbers) for numbers in dataset.cutouts.of_class]
    assert min(usable) > 900 and sum(usable) > 9800  # of 1,000 per class
    areas = [(dataset.cutouts.pixels[numbers] > 0).mean() for numbers in dataset.cutouts.of_class]
    assert all(0.2 < area < 0.7 for area in areas)
    assert digest(dataset[4]) == "a4c9b9c8d691b15c"
    for scene in (dataset[i] for i in range(len(dataset))):
        for question in scene.questions:
            assert right_answer(scene, question.text) == question.answer


def read_back(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_coco_folder_is_read_by_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    train, val = drawn_scenes(count=5), drawn_scenes("val", 3)
    folder = write_coco(tmp_path / "deep" / "coco", train, val)
    for split, scenes in (("train", train), ("val", val)):
        truth = coco.COCO(folder / "annotations" / f"instances_{split}.json")
        assert [category["name"] for category in truth.loadCats(truth.getCatIds())] == list(ITEM_NAMES)
        assert truth.getImgIds() == list(range(1, len(scenes) + 1))
        for number in truth.getImgIds():
            scene, (image,) = scenes[number - 1], truth.loadImgs(number)
            assert (image["height"], image["width"]) == scene.semantic.shape
            assert (read_back(folder / "images" / split / image["file_name"]) == scene.image).all()
            annotations = truth.loadAnns(truth.getAnnIds(number))
            assert [annotation["category_id"] - 1 for annotation in annotations] == scene.labels.tolist()
            for annotation, mask, box in zip(annotations, scene.masks, scene.boxes, strict=True):
                assert (truth.annToMask(annotation) == mask).all()
                assert annotation["area"] == mask.sum() and annotation["iscrowd"] == 0
                left, top, width, height = annotation["bbox"]
                assert [left, top, left + width, top + height] == box.tolist()
        perfect = truth.loadRes([{**annotation, "score": 1.0} for annotation in truth.dataset["annotations"]])
        for kind in ("bbox", "segm"):
            score = evaluation.COCOeval(truth, perfect, kind)
            score.evaluate()
            score.accumulate()
            score.summarize()
            assert score.stats[0] == pytest.approx(1.0)


def test_coco_folder_is_read_by_torchvision(tmp_path):
    pytest.importorskip("pycocotools")
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2

    train = drawn_scenes(count=4)
    folder = write_coco(tmp_path / "coco", train, drawn_scenes("val", 1))
    read = CocoDetection(folder / "images" / "train", folder / "annotations" / "instances_train.json")
    assert len(read) == 4
    wrapped = wrap_dataset_for_transforms_v2(read, target_keys=("boxes", "masks", "labels"))
    for number in range(4):
        (image, target), scene = wrapped[number], train[number]
        assert (np.asarray(image) == scene.image).all()
        assert (target["boxes"].numpy() == scene.boxes).all()
        assert (target["masks"].numpy() == scene.masks).all()
        assert (target["labels"].numpy() == scene.labels + 1).all()


def test_ade_folder_counts_classes_from_one(tmp_path):
    train, val = drawn_scenes(count=4), drawn_scenes("val", 2)
    folder = write_ade(tmp_path / "ade", train, val)
    for split, scenes in (("training", train), ("validation", val)):
        names = [path.name for path in sorted((folder / "images" / split).iterdir())]
        assert names == [path.name for path in sorted((folder / "annotations" / split).iterdir())]
        assert len(names) == len(scenes)
        for name, scene in zip(names, (scenes[i] for i in range(len(scenes))), strict=True):
            assert (read_back(folder / "images" / split / name) == scene.image).all()
            annotation = read_back(folder / "annotations" / split / name)
            assert annotation.min() == 1 and annotation.max() <= 11
            assert (annotation - 1 == scene.semantic).all()


def test_llava_folder_holds_captions_and_questions(tmp_path):
    train, val = drawn_scenes(count=4), drawn_scenes("val", 2)
    folder = write_llava(tmp_path / "llava", train, val)
    for split, scenes in (("train", train), ("val", val)):
        records = json.loads((folder / f"{split}.json").read_text())
        assert len({record["id"] for record in records}) == len(records)
        expected = []
        for i in range(len(scenes)):
            texts = [(DESCRIBE, scenes[i].caption), *((q.text, q.answer) for q in scenes[i].questions)]
            expected += [(f"{split}/{i + 1:06d}.png", f"<image>\n{asked}", answer) for asked, answer in texts]
            assert (read_back(folder / "images" / split / f"{i + 1:06d}.png") == scenes[i].image).all()
        found = []
        for record in records:
            human, gpt = record["conversations"]
            assert set(record) == {"id", "image", "conversations"}
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            found.append((record["image"], human["value"], gpt["value"]))
        assert found == expected


class Interrupted(FashionScenes):
    """Stops at a scene, as if the user had pressed Ctrl-C."""

    stop = 3

    def __getitem__(self, index):
        if index == self.stop:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_interrupted_export_continues(tmp_path):
    train, val = drawn_scenes(count=5), drawn_scenes("val", 2)
    output = tmp_path / "ade"
    with pytest.raises(KeyboardInterrupt):
        write_ade(output, Interrupted("train", 5, size=96, items=ITEMS), val)
    assert not output.exists()
    (partial,) = tmp_path.iterdir()
    written = {path: path.stat().st_mtime_ns for path in partial.rglob("*.png")}
    assert len(written) == 6
    (partial / "images" / "training" / ".writing.000004.png").write_bytes(b"half a pic")  # as a kill would leave it
    write_ade(output, train, val)
    assert list(tmp_path.iterdir()) == [output]
    for path, time in written.items():
        assert (output / path.relative_to(partial)).stat().st_mtime_ns == time  # not written again
    assert contents(output) == contents(write_ade(tmp_path / "again", train, val, workers=2))


def test_folder_is_reused_or_refused(tmp_path):
    val = drawn_scenes("val", 1)
    output = write_llava(tmp_path / "scenes", drawn_scenes(count=2), val)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    write_llava(output, drawn_scenes(count=2), val)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    others = [drawn_scenes(count=3), drawn_scenes(count=2, seed=1), drawn_scenes(count=2, size=64)]
    darker = FashionScenes("train", 2, size=96, items=(ITEMS[0] // 2, ITEMS[1]))
    for other in (*others, darker):
        with pytest.raises(FileExistsError, match="holds other scenes"):
            write_llava(output, other, val)
    with pytest.raises(FileExistsError, match=r'"format": "llava".*"format": "ade"'):
        write_ade(output, drawn_scenes(count=2), val)
    (tmp_path / "thesis" / "chapter").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for name in ("thesis", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is not a folder of fashion scenes"):
            write_ade(tmp_path / name, drawn_scenes(count=2), val)
    (tmp_path / "empty").mkdir()
    assert (write_ade(tmp_path / "empty", drawn_scenes(count=2), val) / "scenes.json").is_file()


def test_preview_is_a_picture(tmp_path, scenes):
    plot_scenes(scenes[:3], tmp_path / "sheet.png", columns=2)
    sheet = read_back(tmp_path / "sheet.png")
    assert sheet.shape[0] > 500 and len(np.unique(sheet)) > 50


@needs_photos
def test_tool_writes_a_folder_and_a_preview(tmp_path, capsys):
    common = ["--size", "64", "--train", "3", "--val", "2", "--workers", "0", "--output"]
    assert main(["--format", "llava", *common, str(tmp_path / "scenes")]) == 0
    assert "3 training and 2 validation scenes of 64 px" in capsys.readouterr().out
    assert len(list((tmp_path / "scenes" / "images").rglob("*.png"))) == 5
    assert main(["--format", "preview", "--shown", "2", *common, str(tmp_path)]) == 0
    assert (tmp_path / "scenes_examples.png").is_file()


def test_tool_reports_missing_photos(tmp_path, capsys):
    assert main(["--format", "ade", "--output", str(tmp_path / "out"), "--root", str(tmp_path)]) == 1
    assert "dataset-fashion-mnist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
