"""Scores of segmentation and detection, against hand-made cases, scikit-learn and pycocotools itself."""

import contextlib
import io
import json
import multiprocessing
import os
import socket

import accelerate
import numpy as np
import pytest
import torch
from pycocotools import mask as coder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import confusion_matrix

from zoo.engine import dense_metrics
from zoo.engine.dense_metrics import DetectionScores, SegmentationScores

HEIGHT, WIDTH = 120, 150


def random_masks(seed: int, classes: int = 5, images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and masks of which a tenth does not count."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, 17, 23, generator=generator)
    masks = torch.randint(0, classes, (images, 17, 23), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.1] = 255
    return logits, masks


def random_instances(seed: int, images: int = 12) -> tuple[list[dict], list[dict]]:
    """Predictions and targets of images with overlapping ellipses, some of them crowds, some found, some not."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]

    def ellipse(center: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return ((rows + 0.5 - center[0]) / radii[0]) ** 2 + ((columns + 0.5 - center[1]) / radii[1]) ** 2 <= 1

    def around(masks: np.ndarray) -> torch.Tensor:
        boxes = coder.toBbox(coder.encode(np.asfortranarray(masks.transpose(1, 2, 0)).astype(np.uint8)))
        boxes[:, 2:] += boxes[:, :2]
        return torch.from_numpy(boxes).float()

    predictions, targets = [], []
    for number in range(images):
        count = 0 if number == 3 else int(generator.integers(1, 9))
        centers = generator.uniform((20, 20), (HEIGHT - 20, WIDTH - 20), (count, 2))
        radii = generator.uniform(4, 55, (count, 1)) * generator.uniform(0.6, 1, (count, 2))
        labels = generator.integers(0, 4, count)
        there = [ellipse(*shape) for shape in zip(centers, radii, strict=True)]
        found = [
            ellipse(center + generator.normal(0, 2, 2), radius * 1.05)
            for center, radius in zip(centers, radii, strict=True)
        ]
        kept = [index for index in range(count) if generator.random() < 0.8 and found[index].any()]
        extra = [ellipse(generator.uniform((9, 9), (90, 90)), generator.uniform(4, 30, 2)) for _ in range(2)]
        masks = np.stack([*(found[index] for index in kept), *extra])
        changed = np.where(generator.random(count) < 0.85, labels, (labels + 1) % 4)[kept]
        predictions.append(
            {
                "boxes": around(masks),
                "labels": torch.from_numpy(np.concatenate([changed, generator.integers(0, 4, 2)])),
                "scores": torch.from_numpy(generator.random(len(masks))).float(),
                "masks": torch.from_numpy(masks).float().unsqueeze(1) * 0.9,
            }
        )
        whole = np.stack(there) if there else np.zeros((0, HEIGHT, WIDTH), bool)
        targets.append(
            {
                "boxes": around(whole) if count else torch.zeros(0, 4),
                "labels": torch.from_numpy(labels),
                "masks": torch.from_numpy(whole).to(torch.uint8),
                "area": torch.from_numpy(whole.sum((1, 2))).float(),
                "iscrowd": torch.from_numpy((generator.random(count) < 0.15).astype(np.int64)),
            }
        )
    return predictions, targets


def coco_scores(predictions: list[dict], targets: list[dict]) -> dict[str, float]:
    """What pycocotools makes of the same, written in its own format."""

    def entry(image: int, index: int, objects: dict) -> dict:
        left, top, right, bottom = objects["boxes"][index].tolist()
        mask = objects["masks"][index].squeeze().gt(0.5).numpy().astype(np.uint8)
        code = coder.encode(np.asfortranarray(mask))
        return {
            "image_id": image,
            "category_id": int(objects["labels"][index]),
            "bbox": [left, top, right - left, bottom - top],
            "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        }

    truth = {
        "info": {},
        "images": [{"id": image, "height": HEIGHT, "width": WIDTH} for image in range(len(targets))],
        "categories": [{"id": label, "name": str(label)} for label in range(4)],
        "annotations": [],
    }
    for image, target in enumerate(targets):
        for index in range(len(target["labels"])):
            facts = {"area": float(target["area"][index]), "iscrowd": int(target["iscrowd"][index])}
            truth["annotations"].append(entry(image, index, target) | facts | {"id": len(truth["annotations"]) + 1})
    results = [
        entry(image, index, prediction) | {"score": float(prediction["scores"][index])}
        for image, prediction in enumerate(predictions)
        for index in range(len(prediction["labels"]))
    ]
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            stripped = [
                {k: v for k, v in r.items() if k != ("segmentation" if kind == "bbox" else "bbox")} for r in results
            ]
            evaluation = COCOeval(reference, reference.loadRes(json.loads(json.dumps(stripped))), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
            found = np.where(evaluation.stats[:6] < 0, np.nan, evaluation.stats[:6])
            scores |= {f"{name}_{key}": float(value) for key, value in zip(keys, found, strict=True)}
    return scores


def test_segmentation_by_hand():
    masks = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]])
    found = torch.tensor([[[0, 0, 1, 1], [1, 3, 3, 0]]])
    scores = SegmentationScores(5)
    scores.update(found, masks)
    result = scores.compute()
    # class 0: 2 of 3 found; class 1: 2 of 3, and one of class 0 taken for it; 3 of one image is not there: no class
    assert scores.class_iou()[:2] == pytest.approx([2 / 3, 2 / 4])
    assert np.isnan(scores.class_iou()[2:]).all()
    assert result == pytest.approx({"miou": (2 / 3 + 1 / 2) / 2, "macc": 2 / 3, "aacc": 4 / 6})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segmentation_against_scikit_learn(dtype):
    scores, found, true = SegmentationScores(7), [], []
    for seed in range(3):
        logits, masks = random_masks(seed)
        logits = torch.cat([logits, torch.full_like(logits[:, :2], -9.0)], 1).to(dtype)  # two classes never occur
        scores.update(logits, masks)
        found.append(logits.argmax(1)[masks != 255])
        true.append(masks[masks != 255])
    matrix = confusion_matrix(torch.cat(true), torch.cat(found), labels=range(5)).astype(float)
    right, rows, columns = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    assert scores.class_iou()[:5] == pytest.approx(right / (rows + columns - right))
    expected = {
        "miou": (right / (rows + columns - right)).mean(),
        "macc": (right / rows).mean(),
        "aacc": right.sum() / matrix.sum(),
    }
    assert scores.compute() == pytest.approx(expected)


def test_segmentation_forgets_and_refuses():
    scores = SegmentationScores(3)
    with pytest.raises(ValueError, match="no pixels to score"):
        scores.compute()
    scores.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 255))
    with pytest.raises(ValueError, match="no pixels to score"):
        scores.compute()
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 2\) do not fit masks \(1, 4, 4\)"):
        scores.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"masks have the labels \[7\], but there are 3 classes"):
        scores.update(torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 7]]]))
    with pytest.raises(ValueError, match=r"predictions have the labels \[3\]"):
        scores.update(torch.tensor([[[0, 3]]]), torch.tensor([[[0, 1]]]))
    scores.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    assert scores.compute() == {"miou": 1.0, "macc": 1.0, "aacc": 1.0}
    scores.reset()
    scores.update(torch.tensor([[[0, 1]]]), torch.tensor([[[1, 0]]]))
    assert scores.compute() == {"miou": 0.0, "macc": 0.0, "aacc": 0.0}


def test_detection_by_hand():
    """Two objects of a class; the better of two detections is right: precision 1 up to recall 1/2, then 0."""
    target = {"boxes": torch.tensor([[0.0, 0, 20, 20], [40, 40, 80, 80]]), "labels": torch.tensor([2, 2])}
    prediction = {
        "boxes": torch.tensor([[0.0, 0, 20, 20], [50, 0, 70, 20]]),
        "labels": torch.tensor([2, 2]),
        "scores": torch.tensor([0.9, 0.8]),
    }
    scores = DetectionScores()
    scores.update([prediction], [target])
    found = scores.compute()
    at_recalls = 51 / 101  # of the recalls 0, 0.01, ..., 1 those up to a half
    assert found["box_ap"] == pytest.approx(at_recalls)
    assert found["box_ap50"] == pytest.approx(at_recalls)
    assert found["box_ap_small"] == pytest.approx(1.0)
    assert found["box_ap_medium"] == pytest.approx(0.0)
    assert np.isnan(found["box_ap_large"])
    assert not [name for name in found if name.startswith("mask")]


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_detection_against_pycocotools(backend, monkeypatch):
    monkeypatch.setattr(dense_metrics, "find_spec", lambda name: name == backend)
    predictions, targets = random_instances(0)
    assert sum(int(target["iscrowd"].sum()) for target in targets) >= 2
    scores = DetectionScores(masks=True)
    for start in range(0, len(targets), 5):
        scores.update(predictions[start : start + 5], targets[start : start + 5])
    expected = coco_scores(predictions, targets)
    assert 0.1 < expected["mask_ap"] < 0.9
    assert scores.compute() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    scores.update([], [])
    assert scores.compute() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    scores.reset()
    scores.update(predictions[:6], targets[:6])
    assert scores.compute() == pytest.approx(coco_scores(predictions[:6], targets[:6]), abs=1e-6, nan_ok=True)


def test_scores_of_classes():
    """The mean of the classes' scores is the score; each is that of the class alone."""
    predictions, targets = random_instances(0)
    scores, alone = DetectionScores(masks=True), DetectionScores()
    scores.update(predictions, targets)
    of_classes, total = scores.class_scores(), scores.compute()
    assert sorted(of_classes) == [0, 1, 2, 3]
    for name in ("box_ap", "mask_ap"):
        assert np.mean([found[name] for found in of_classes.values()]) == pytest.approx(total[name], abs=1e-6)
    labels = torch.cat([target["labels"][target["iscrowd"] == 0] for target in targets])
    assert [found["objects"] for found in of_classes.values()] == labels.bincount(minlength=4).tolist()
    only = [[{k: v[each["labels"] == 2] for k, v in each.items()} for each in part] for part in (predictions, targets)]
    alone.update(*only)
    assert alone.class_scores()[2]["box_ap"] == pytest.approx(of_classes[2]["box_ap"], abs=1e-6)
    alone.update([predictions[0] | {"labels": torch.full_like(predictions[0]["labels"], 3)}], [targets[3]])
    assert np.isnan(alone.class_scores()[3]["box_ap"])  # there is none of them


def test_masks_are_kept_as_codes():
    predictions, targets = random_instances(1)
    scores = DetectionScores(masks=True)
    scores.update(predictions, targets)
    codes = [code for image in scores.metric.detection_mask for _, code in image]
    assert len(codes) == sum(len(prediction["labels"]) for prediction in predictions)
    assert max(map(len, codes)) < 400 < HEIGHT * WIDTH
    masks = torch.cat([prediction["masks"][:, 0] > 0.5 for prediction in predictions]).numpy()
    decoded = coder.decode([{"size": [HEIGHT, WIDTH], "counts": code} for code in codes]).transpose(2, 0, 1)
    assert (decoded == masks).all()


def test_detection_in_other_precisions():
    predictions, targets = random_instances(2)
    halves = [
        {key: value.bfloat16() if key in ("scores", "masks") else value for key, value in prediction.items()}
        for prediction in predictions
    ]
    rounded = [prediction | {"scores": prediction["scores"].bfloat16().float()} for prediction in predictions]
    first, second = DetectionScores(masks=True), DetectionScores(masks=True)
    first.update(halves, targets)
    second.update(rounded, targets)
    assert first.compute() == pytest.approx(second.compute(), nan_ok=True)


def test_detection_refuses_what_does_not_fit():
    predictions, targets = random_instances(3, images=2)
    scores = DetectionScores(masks=True)
    with pytest.raises(ValueError, match="no images to score"):
        scores.compute()
    with pytest.raises(ValueError, match="predictions for 2 images and targets for 1"):
        scores.update(predictions, targets[:1])
    with pytest.raises(ValueError, match="masks"):
        scores.update([{k: v for k, v in predictions[0].items() if k != "masks"}], targets[:1])


def score_share(rank: int, port: int, results: multiprocessing.Queue) -> None:
    """Of three processes, the first has one image more than the second, and the third has none."""
    torch.set_num_threads(1)  # threads of the parent do not exist here
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    accelerate.PartialState._reset_state()
    state = accelerate.PartialState(cpu=True)
    segmentation, detection = SegmentationScores(5), DetectionScores(masks=True)
    predictions, targets = random_instances(0, images=5)
    if rank < 2:
        detection.update(predictions[rank::2], targets[rank::2])
        for seed in range(rank, 3, 2):
            segmentation.update(*random_masks(seed))
    scores = [segmentation.compute(), detection.compute()]
    results.put([*scores, detection.class_scores() if rank == 2 else None])  # one of them asks alone
    state.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork")
def test_processes_with_different_numbers_of_images_score_the_whole():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=score_share, args=(rank, port, results)) for rank in range(3)]
    try:
        for process in processes:
            process.start()
        found = [results.get(timeout=120) for _ in processes]
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    segmentation, detection = SegmentationScores(5), DetectionScores(masks=True)
    detection.update(*random_instances(0, images=5))
    for seed in range(3):
        segmentation.update(*random_masks(seed))
    for pixels, boxes, of_classes in found:
        assert pixels == pytest.approx(segmentation.compute())
        assert boxes == pytest.approx(detection.compute(), nan_ok=True)
        for label, expected in detection.class_scores().items() if of_classes else ():
            assert of_classes[label] == pytest.approx(expected, nan_ok=True)
    assert sum(of_classes is not None for *_, of_classes in found) == 1
