"""Data for detection in the format of COCO: what is read, bad input, batches."""

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coder
from pycocotools.coco import COCO

from zoo.data.dense import (
    large_scale_jitter,
    make_dense_loader,
    open_detection,
)
from zoo.heads.detection_targets import check_targets

ORIENTATION = 0x0112  # EXIF's tag


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    """A smooth image, so that JPEG hardly changes it."""
    start = np.random.default_rng(seed).integers(0, 60, 3)
    ramp = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    return (ramp + start).astype(np.uint8)


# Detection: the format


def disc(height: int, width: int, center: tuple[int, int], radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return ((rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2).astype(np.uint8)


def code_of(mask: np.ndarray, compressed: bool) -> dict:
    if compressed:
        code = coder.encode(np.asfortranarray(mask))
        return {"size": code["size"], "counts": code["counts"].decode()}
    flat = np.concatenate([[0], mask.ravel(order="F"), [1 - mask.ravel(order="F")[-1]]])
    counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts}


@pytest.fixture
def coco(tmp_path):
    """Four images: three kinds of masks and a crowd; objects partly and wholly outside; nothing; only a crowd."""
    one, two = disc(40, 60, (15, 20), 8), disc(40, 60, (20, 40), 10)
    images = [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 3, "file_name": "b.jpg", "height": 40, "width": 60},
        {"id": 11, "file_name": "c.png", "height": 24, "width": 32},
        {"id": 12, "file_name": "d.png"},
    ]
    star = [10.0, 5.0, 30.5, 8.0, 22.0, 30.25, 8.0, 20.0]
    triangle = [40.0, 30.0, 50.0, 30.0, 45.0, 38.0]
    crowd = code_of(disc(40, 60, (20, 30), 18), compressed=False)
    content = {
        "images": images,
        "categories": [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 17, "name": "bird"}],
        "annotations": [
            {"image_id": 7, "category_id": 90, "bbox": [8, 5, 42, 33], "segmentation": [star, triangle], "area": 400.5},
            {"image_id": 7, "category_id": 2, "bbox": [12, 7, 17, 17], "segmentation": code_of(one, True), "area": 197},
            {"image_id": 7, "category_id": 17, "bbox": [30, 10, 21, 21], "segmentation": code_of(two, False)},
            {"image_id": 7, "category_id": 90, "bbox": [12, 2, 37, 37], "segmentation": crowd, "iscrowd": 1},
            {"image_id": 3, "category_id": 2, "bbox": [-5.5, 30, 20, 30], "segmentation": [triangle], "area": 40},
            {"image_id": 3, "category_id": 2, "bbox": [60, 0, 10, 10], "segmentation": [triangle], "area": 40},
            {"image_id": 3, "category_id": 2, "bbox": [20, 10, 0, 10], "segmentation": [triangle], "area": 40},
            {"image_id": 12, "category_id": 2, "bbox": [0, 0, 9, 9], "segmentation": [triangle], "iscrowd": 1},
        ],
    }
    for number, annotation in enumerate(content["annotations"]):
        annotation |= {"id": number + 1, "iscrowd": annotation.get("iscrowd", 0)}
    for number, record in enumerate(images):
        size = record.get("height", 40), record.get("width", 60)
        save(tmp_path / "images/train" / record["file_name"], picture(*size, number))
    write(tmp_path, content)
    return tmp_path, content


def write(root: Path, content: object, split: str = "train") -> Path:
    path = root / f"annotations/instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_coco(coco, caplog, capsys):
    root, content = coco
    data = open_detection(root, "train")
    assert data.class_names == ("cat", "bird", "dog")  # in the order of 2, 17 and 90
    assert data.image_ids == [7, 3, 11, 12] and data.sizes == [(40, 60), (40, 60), (24, 32), (40, 60)]
    image, target = data[0]
    assert (image == picture(40, 60, 0)).all()
    kinds = {key: (value.shape, value.dtype.name) for key, value in target.items()}
    assert kinds == {
        "boxes": ((4, 4), "float32"),
        "labels": ((4,), "int64"),
        "masks": ((4, 40, 60), "uint8"),
        "image_id": ((), "int64"),
        "area": ((4,), "float32"),
        "iscrowd": ((4,), "int64"),
    }
    assert target["labels"].tolist() == [2, 0, 1, 2] and target["iscrowd"].tolist() == [0, 0, 0, 1]
    assert target["boxes"][0].tolist() == [8, 5, 50, 38] and int(target["image_id"]) == 7
    capsys.readouterr()
    reference = COCO(root / "annotations/instances_train.json")
    for index, annotation in enumerate(content["annotations"][:4]):
        assert (target["masks"][index] == reference.annToMask(annotation)).all() and target["masks"][index].any()
    assert target["area"][:2].tolist() == [400.5, 197]
    assert target["area"][2] == target["masks"][2].sum()  # where the file does not say
    assert data[1][1]["boxes"].tolist() == [[0, 30, 14.5, 40]]  # clipped; the others have nothing left
    assert "2 of 8 boxes in" in caplog.text and caplog.text.count("boxes") == 1
    assert data[2][1]["masks"].shape == (0, 24, 32) and data[2][1]["boxes"].shape == (0, 4)


def test_coco_for_training(coco, caplog):
    root, _ = coco
    caplog.set_level(logging.WARNING)
    data = open_detection(root, "train", training=True)
    assert data.image_ids == [7, 3]
    assert "2 of 4 images in" in caplog.text and "have no objects" in caplog.text
    assert [len(data[index][1]["labels"]) for index in range(2)] == [3, 1]
    assert not data[0][1]["iscrowd"].any()
    everything = open_detection(root, "train", training=True, keep_empty=True)
    assert everything.image_ids == [7, 3, 11, 12] and len(everything[3][1]["boxes"]) == 0
    assert everything.first(3).image_ids == [7, 3, 11] and len(everything.first(3)) == 3
    boxes = open_detection(root, "train", masks=False)[0][1]
    assert "masks" not in boxes and boxes["area"].tolist() == [400.5, 197, 21 * 21, 37 * 37]
    assert open_detection(root, "train", in_chans=1)[0][0].shape == (40, 60, 1)
    copy = pickle.loads(pickle.dumps(data))
    assert all((copy[0][1][key] == value).all() for key, value in data[0][1].items())


def test_coco_elsewhere_and_with_known_classes(coco, tmp_path):
    root, content = coco
    (root / "images/train").rename(root / "pictures")
    file = write(root, content, "other")
    data = open_detection(
        root, "val", annotations=file, images=root / "pictures", class_names=("dog", "cow", "bird", "cat")
    )
    assert data.class_names == ("dog", "cow", "bird", "cat") and data[0][1]["labels"].tolist() == [0, 3, 2, 0]
    with pytest.raises(ValueError, match="categories that are not known: bird; known are: dog, cat"):
        open_detection(root, "other", images=root / "pictures", class_names=("dog", "cat"))
    (root / "pictures").rename(root / "other")
    assert len(open_detection(root, "other")) == 4
    with pytest.raises(FileNotFoundError, match=r"neither .*images/val nor .*val; name the folder"):
        open_detection(root, "val")


def test_coco_turns_images_like_its_annotations(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    pixels = picture(20, 30)
    save(tmp_path / "images/train/a.png", pixels, exif=exif)
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    for (height, width), expected in (((20, 30), pixels), ((30, 20), np.rot90(pixels))):
        record = {"id": 1, "file_name": "a.png", "height": height, "width": width}
        write(tmp_path, {"images": [record], "annotations": [annotation], "categories": [{"id": 1, "name": "x"}]})
        assert (open_detection(tmp_path, "train", masks=False)[0][0] == expected).all()


# Detection: bad input


def test_missing_and_damaged_images(coco, caplog):
    root, content = coco
    (root / "images/train/a.png").unlink()
    (root / "images/train/b.jpg").write_bytes(b"no picture")
    content["images"][2]["width"] = 33
    write(root, content)
    with pytest.raises(ValueError) as error:
        open_detection(root, "train")
    text = str(error.value)
    assert text.startswith("3 of 4 files")
    for name, reason in {
        "a.png": "there is no file",
        "b.jpg": "cannot read the image",
        "c.png": "the image has 24 x 32 pixels (height x width), but its annotations 24 x 33",
    }.items():
        assert any(f"  {name}: " in line and reason in line for line in text.splitlines()), text
    assert open_detection(root, "train", bad_files="skip").image_ids == [12]
    assert "3 of 4 files" in caplog.text
    with pytest.raises(ValueError, match="has an object to train on"):
        open_detection(root, "train", training=True, bad_files="skip")
    (root / "images/train/d.png").unlink()
    with pytest.raises(ValueError, match="names no image that is in"):
        open_detection(root, "train", bad_files="skip")


def test_bad_annotations_are_listed(coco, caplog):
    root, content = coco
    line = [1.0, 1.0, 9.0, 9.0]
    spoilt = [
        ({"image_id": 99}, "there is no image 99"),
        ({"category_id": 5}, "there is no category 5"),
        ({"bbox": [1, 2, 3]}, r"its box [1, 2, 3] is not four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "is not four finite numbers"),
        ({"segmentation": [line]}, "its mask has no polygon of three corners or more"),
        ({"segmentation": None}, "it has no mask"),
        ({"segmentation": {"size": [4, 6], "counts": "abc"}}, "its mask is of the size [4, 6], its image of [40, 60]"),
        ({"segmentation": {"size": [40, 60], "counts": [2000, 300]}}, "its mask has 2300 pixels, its image 2400"),
    ]
    good = content["annotations"]
    for number, (change, _) in enumerate(spoilt):
        content["annotations"] = [*content["annotations"], good[0] | {"id": 100 + number} | change]
    write(root, content)
    with pytest.raises(ValueError) as error:
        open_detection(root, "train")
    text = str(error.value)
    assert text.startswith(f"{len(spoilt)} of {len(good) + len(spoilt)} annotations")
    for number, (_, reason) in enumerate(spoilt):
        assert any(
            line.startswith(f"  annotation {100 + number}: ") and reason in line for line in text.splitlines()
        ), reason
    caplog.clear()
    data = open_detection(root, "train", bad_files="skip")
    assert len(data[0][1]["labels"]) == 4
    assert f"{len(spoilt)} of {len(good) + len(spoilt)} annotations" in caplog.text
    with pytest.raises(ValueError, match="4 of 16 annotations"):
        open_detection(root, "train", masks=False)  # those without a good mask will do


@pytest.mark.parametrize("counts", ["abc", "PPYo0"])
def test_broken_codes_of_masks_are_named(coco, counts):
    root, content = coco
    content["annotations"][1]["segmentation"] = {"size": [40, 60], "counts": counts}
    write(root, content)
    with pytest.raises(ValueError, match=r"a mask in the annotations of .*a\.png is broken"):
        open_detection(root, "train")[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: [], "no list 'images'"),
        (lambda content: {k: v for k, v in content.items() if k != "annotations"}, "no list 'annotations'"),
        (lambda content: content | {"images": [{"id": 1}]}, "entry 0 of 'images' has no 'file_name'"),
        (lambda content: content | {"categories": [{}]}, "entry 0 of 'categories' has no 'id' and no 'name'"),
        (
            lambda content: content | {"images": [*content["images"], content["images"][0]]},
            r"a\.png and a\.png have the same id 7",
        ),
        (
            lambda content: content | {"images": [{"id": "x", "file_name": "a.png"}]},
            "image id 'x' is not a whole number",
        ),
    ],
)
def test_files_of_another_format(coco, change, message):
    root, content = coco
    write(root, change(content))
    with pytest.raises(ValueError, match=message):
        open_detection(root, "train")


def test_broken_json(coco):
    root, _ = coco
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match=r"instances_train\.json is not JSON, or was cut off: .*line 1 column"):
        open_detection(root, "train")
    (root / "images/val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"instances_val\.json; found beside it: instances_train\.json"):
        open_detection(root, "val")


def test_batches_for_detectors(coco):
    root, _ = coco
    data = open_detection(root, "train", training=True)
    loader = make_dense_loader(data, 2, True, large_scale_jitter(64), workers=1)
    ((images, targets),) = list(loader)
    assert isinstance(images, list) and [image.shape for image in images] == [(3, 64, 64)] * 2
    assert all(image.dtype == torch.uint8 and image.is_contiguous() for image in images)
    checked = check_targets(images, targets, 3, with_masks=True)
    assert [len(target["boxes"]) for target in checked] == [len(target["labels"]) for target in targets]
    evaluation = make_dense_loader(open_detection(root, "train"), 3)
    batches = list(evaluation)
    assert [len(images) for images, _ in batches] == [3, 1] and len(evaluation) == 2
    assert [int(target["image_id"]) for _, targets in batches for target in targets] == [7, 3, 11, 12]
    assert batches[0][0][2].shape == (3, 24, 32)
