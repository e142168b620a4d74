"""Augmentation for segmentation and detection: images, masks and boxes that change together."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coder
from torchvision.ops import masks_to_boxes

from zoo.data.dense import (
    box_flip,
    large_scale_jitter,
    multi_scale_resize,
    segmentation_augment,
    segmentation_resize,
)
from zoo.heads.detection_targets import check_targets

MEAN = (0.485, 0.456, 0.406)


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    """A smooth image, so that JPEG hardly changes it."""
    start = np.random.default_rng(seed).integers(0, 60, 3)
    ramp = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    return (ramp + start).astype(np.uint8)


def labels(height: int = 20, width: int = 30, classes: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def disc(height: int, width: int, center: tuple[int, int], radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return ((rows - center[0]) ** 2 + (columns - center[1]) ** 2 <= radius**2).astype(np.uint8)


def coded(mask: np.ndarray, channels: int = 3) -> np.ndarray:
    """An image that shows the labels, so that it is seen whether both are moved alike."""
    return np.repeat((40 + 50 * mask)[..., None], channels, 2).astype(np.uint8)


def coarse(height: int = 90, width: int = 120, classes: int = 4, seed: int = 0) -> np.ndarray:
    """Labels in squares of 10 pixels."""
    return np.kron(labels(height // 10, width // 10, classes, seed), np.ones((10, 10), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), 70])
def test_segmentation_augment_moves_image_and_mask_together(size, channels):
    mask = coarse()
    height, width = (size, size) if isinstance(size, int) else size
    transform = segmentation_augment(size, distort=False, mean=MEAN[:channels])
    padded = 0
    for seed in range(12):
        image, found = transform(coded(mask, channels), mask, seeded(seed))
        assert image.shape == (height, width, channels) and found.shape == (height, width)
        assert image.dtype == found.dtype == np.uint8 and set(np.unique(found)) <= {0, 1, 2, 3, 255}
        outside = found == 255
        padded += outside.any()
        assert (image[outside] == np.round(255 * np.array(MEAN[:channels]))).all()
        if outside.any():  # below and to the right
            assert (
                not outside[0, 0] and outside[-1, -1] and (outside == (outside.all(1)[:, None] | outside.all(0))).all()
            )
        near = np.abs(image[..., 0].astype(int) - (40 + 50 * found.astype(int))) <= 2
        assert near[~outside].mean() > 0.6  # all but the edges of squares, which are blurred
    assert 0 < padded < 12 or isinstance(size, int)


def test_segmentation_augment_scales_between_its_bounds():
    """A single square of 40 pixels shows the scale."""
    mask = np.zeros((100, 100), np.uint8)
    mask[30:70, 30:70] = 1
    transform = segmentation_augment(200, base_size=100, cat_max_ratio=1, flip=0, distort=False)
    areas = [(transform(coded(mask), mask, seeded(seed))[1] == 1).sum() for seed in range(60)]
    scales = np.sqrt(areas) / 40
    assert scales.min() < 0.65 and scales.max() > 1.85
    assert scales.min() >= 0.48 and scales.max() <= 2.02


def test_long_images_are_not_enlarged_without_bound():
    mask = coarse(20, 2000)
    image, _ = segmentation_resize(100)(coded(mask), mask, seeded())
    assert image.shape == (4, 400, 3)
    image, _ = segmentation_resize(100, longest_side=3000)(coded(mask), mask, seeded())
    assert image.shape == (30, 3000, 3)


def test_no_class_fills_a_crop():
    mask = np.zeros((200, 200), np.uint8)
    mask[:, 120:] = 1
    mask[:60] = 255
    limited, free = (segmentation_augment(60, 200, (1, 1), ratio, 0, False) for ratio in (0.75, 1.0))

    def shares(transform):
        for seed in range(40):
            counts = np.bincount(transform(coded(mask), mask, seeded(seed))[1].ravel(), minlength=256)[:255]
            yield counts.max() / max(counts.sum(), 1)

    found, unlimited = np.array(list(shares(limited))), np.array(list(shares(free)))
    assert (found <= 0.75).mean() > 0.85 > 0.5 > (unlimited <= 0.75).mean()
    only = np.zeros((80, 80), np.uint8)
    assert (limited(coded(only), only, seeded())[1] == 0).all()  # one class alone: the last try is taken


def test_colours_change_and_masks_do_not():
    mask, image = coarse(60, 60), picture(60, 60)
    transform = segmentation_augment(60, 60, (1, 1), 1.0, 0, distort=True)
    changes = []
    for seed in range(40):
        changed, found = transform(image, mask, seeded(seed))
        assert (found == mask).all()
        changes.append(changed.astype(int) - image)
    means = np.array([change.mean() for change in changes])
    assert (np.array([np.abs(change).max() for change in changes]) == 0).sum() in range(9)  # each of four by a half
    assert means.min() < -10 and means.max() > 10
    assert any(np.abs(change.mean((0, 1)) - change.mean()).max() > 3 for change in changes)  # hue and saturation


def test_evaluation_scales_images_and_keeps_masks():
    mask = coarse(90, 120)
    image, found = segmentation_resize(45)(coded(mask), mask, seeded())
    assert image.shape == (45, 60, 3) and (found == mask).all()
    assert np.abs(image[2:5, 2:5, 0].astype(int) - (40 + 50 * int(mask[5, 5]))).max() <= 1


def objects(count: int = 5, height: int = 80, width: int = 100, with_masks: bool = True, seed: int = 1) -> tuple:
    generator = np.random.default_rng(seed)
    masks = np.stack(
        [disc(height, width, generator.integers(15, 65, 2), generator.integers(4, 15)) for _ in range(count)]
    )
    boxes = masks_to_boxes(torch.from_numpy(masks)).numpy() + np.array([0, 0, 1, 1], np.float32)
    image = np.repeat((masks * np.arange(1, count + 1)[:, None, None] * 40).max(0)[..., None], 3, 2).astype(np.uint8)
    target = {
        "boxes": boxes,
        "labels": np.arange(count),
        "image_id": np.array(5),
        "area": masks.sum((1, 2)).astype(np.float32),
        "iscrowd": np.zeros(count, np.int64),
    }
    return image, target | ({"masks": masks} if with_masks else {})


DETECTION = {
    "flip": lambda: box_flip(0.5),
    "multi_scale": lambda: multi_scale_resize((40, 80, 120), 133),
    "jitter": lambda: large_scale_jitter(96, scale=(0.3, 2.5)),
}


@pytest.mark.parametrize("name", DETECTION)
def test_boxes_and_masks_stay_together(name):
    transform = DETECTION[name]()
    image, target = objects()
    seen = set()
    for seed in range(25):
        changed, found = transform(image, target, seeded(seed))
        count = len(found["labels"])
        assert found["masks"].shape == (count, *changed.shape[:2]) and found["boxes"].shape == (count, 4)
        assert {key: value.dtype.name for key, value in found.items()} == {
            **dict.fromkeys(("labels", "image_id", "iscrowd"), "int64"),
            **{"boxes": "float32", "area": "float32", "masks": "uint8"},
        }
        seen.add((count, *changed.shape[:2]))
        tight = np.array([coder.toBbox(coder.encode(np.asfortranarray(mask))) for mask in found["masks"]]).reshape(
            -1, 4
        )
        tight[:, 2:] += tight[:, :2]
        assert np.abs(tight - found["boxes"]).max(initial=0) <= (1e-4 if name != "multi_scale" else 1.6)
        assert (found["area"] == found["masks"].sum((1, 2))).all() and (found["area"] > 0).all()
        for label, mask in zip(found["labels"], found["masks"], strict=True):  # each mask lies where its object is seen
            if mask.sum() > 60 and label == 4:  # the brightest is in front
                assert np.abs(changed[mask > 0].astype(int) - 200).mean() < 30
        check_targets(
            [torch.from_numpy(changed).permute(2, 0, 1)],
            [{k: torch.from_numpy(np.asarray(v)) for k, v in found.items()}],
            5,
            True,
        )
    if name == "jitter":
        assert {shape[1:] for shape in seen} == {(96, 96)} and min(
            count for count, *_ in seen
        ) < 5  # some objects were cut off
    if name == "multi_scale":
        assert {shape[1:] for shape in seen} == {(40, 50), (80, 100), (106, 133)}


@pytest.mark.parametrize("name", DETECTION)
def test_boxes_without_masks_follow_likewise(name):
    transform = DETECTION[name]()
    image, target = objects()
    without = {key: value for key, value in target.items() if key != "masks"}
    for seed in range(10):
        changed, found = transform(image, target, seeded(seed))
        again, boxes = transform(image, without, seeded(seed))
        assert (changed == again).all() and "masks" not in boxes
        places = [list(boxes["labels"]).index(label) for label in found["labels"]]
        inside = found["boxes"] - boxes["boxes"][places]  # what is seen of an object lies in what is left of its box
        assert inside[:, :2].min(initial=0) >= -1 and inside[:, 2:].max(initial=0) <= 1
        assert boxes["area"] == pytest.approx((boxes["boxes"][:, 2:] - boxes["boxes"][:, :2]).prod(1))


def test_flip_mirrors_exactly():
    image, target = objects()
    changed, found = box_flip(1.0)(image, target, seeded())
    assert (changed == image[:, ::-1]).all() and (found["masks"] == target["masks"][..., ::-1]).all()
    assert found["boxes"] == pytest.approx(
        np.stack(
            [100 - target["boxes"][:, 2], target["boxes"][:, 1], 100 - target["boxes"][:, 0], target["boxes"][:, 3]], 1
        ),
        abs=1e-4,
    )
    assert (box_flip(0.0)(image, target, seeded())[0] == image).all()


def test_a_cut_object_gets_the_box_of_what_is_left():
    """A ring's box is not the clipped box of the whole ring where a crop leaves an arc of it."""
    image = np.zeros((100, 100, 3), np.uint8)
    ring = disc(100, 100, (50, 50), 45) - disc(100, 100, (50, 50), 40)
    target = objects(1, 100, 100)[1] | {"masks": ring[None], "boxes": np.array([[5, 5, 96, 96]], np.float32)}
    transform, differences = large_scale_jitter(100, scale=(2, 2), flip=0), 0
    for seed in range(10):
        _, found = transform(image, target, seeded(seed))
        without = transform(image, {k: v for k, v in target.items() if k != "masks"}, seeded(seed))[1]
        if len(found["boxes"]):
            rows, columns = np.nonzero(found["masks"][0])
            assert found["boxes"][0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            differences += np.abs(found["boxes"] - without["boxes"]).max() > 1.5
    assert differences


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("name", DETECTION)
def test_images_without_objects_are_changed_too(name, with_masks):
    image, target = objects(with_masks=with_masks)
    empty = {key: value if key == "image_id" else value[:0] for key, value in target.items()}
    changed, found = DETECTION[name]()(image, empty, seeded())
    assert found["boxes"].shape == (0, 4) and found["labels"].dtype == np.int64 and found["boxes"].dtype == np.float32
    assert not with_masks or found["masks"].shape == (0, *changed.shape[:2])


def test_steps_draw_numbers_of_their_own():
    """Whether an image is mirrored says nothing about its scale."""
    image, target = objects(1)
    transform = multi_scale_resize(tuple(range(50, 151)), 1000)
    facts = []
    for seed in range(150):
        changed, found = transform(image, target, seeded(seed))
        mirrored = found["boxes"][0, 0] / changed.shape[1] != pytest.approx(target["boxes"][0, 0] / 100, abs=0.01)
        facts.append((mirrored, changed.shape[0]))
    assert 0.35 < np.mean([mirrored for mirrored, _ in facts]) < 0.65
    assert abs(np.corrcoef(np.array(facts, float).T)[0, 1]) < 0.25


def test_wrong_arguments_of_transforms():
    with pytest.raises(ValueError, match=r"cat_max_ratio=0 has to be above 0"):
        segmentation_augment(64, cat_max_ratio=0)
    with pytest.raises(ValueError, match=r"scale=\(2\.0, 0\.5\) makes 128 to 32 of 64 pixels"):
        segmentation_augment(64, scale=(2.0, 0.5))
    with pytest.raises(ValueError, match="makes 0 to"):
        large_scale_jitter(64, scale=(0.0, 1.0))
