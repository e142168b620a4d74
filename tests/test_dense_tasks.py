"""Segmentation and detection through the engine, on tiny scenes: settings, data, runs, scores, reports, predictions."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from zoo.config import list_configs, load_config
from zoo.data.scenes import ITEM_NAMES, FashionScenes, write_ade, write_coco
from zoo.data.scenes_data import ScenesWithBoxes, ScenesWithMasks, draw_scenes
from zoo.engine import find_images, load_trained, predict_into, read_log, scores_row, settings_beside, train
from zoo.engine.build import build_optimizer
from zoo.engine.dense_build import build_detector, build_segmentor, open_boxes, open_masks
from zoo.engine.dense_evaluate import Gallery, SegmentationPredictor
from zoo.engine.dense_metrics import DetectionScores, SegmentationScores
from zoo.engine.dense_report import class_ap_rows, class_iou_rows, color_mask, palette_of
from zoo.engine.task import Place, find_task

SIZE = 48
CLASSES = ("ground", *ITEM_NAMES)
TINY = ["model.kwargs={dims: 8, depths: [1, 1, 1, 1]}", "model.patch_size=4"]
RUN = ["data.batch_size=2", "data.workers=0", "optim.epochs=2", "optim.epoch_updates=2", "optim.warmup_updates=1"]
OPTIONS = {
    "segmentation": [*RUN, f"data.img_size={SIZE}", "model.head_kwargs={channels: 16, norm: group}"],
    "detection": [
        *(*RUN, f"data.min_size=[{SIZE}]", f"data.max_size={SIZE}"),
        "model.head_kwargs={pyramid_channels: 16, representation_size: 32, mask_channels: 16, max_detections: 5}",
    ],
}
TASKS = tuple(OPTIONS)
RECIPES = [name for name in list_configs() if name.startswith(("segmentation/", "detection/"))]
LIGHT = {f"segmentation/{name}" for name in ("nano_fashion_scenes", "vim/tiny_ade20k", "mamba_vision/tiny_ade20k")}
LIGHT |= {f"detection/{name}" for name in ("nano_fashion_scenes", "vim/tiny_coco", "vmamba/tiny_coco_3x")}
CPU = Place(torch.device("cpu"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def items():
    """Rings and bars instead of photos."""
    y, x = np.mgrid[:28, :28] - 13.5
    shapes = [
        np.where(np.hypot(x / (1 + label % 3), y / (1 + label // 3)) < 12 - label % 4, 150, 0) for label in range(10)
    ]
    return np.array(shapes).astype(np.uint8), np.arange(10)


@pytest.fixture(scope="module")
def scenes():
    return [FashionScenes(split, count, SIZE, items=items()) for split, count in (("train", 6), ("val", 3))]


@pytest.fixture(scope="module")
def folders(scenes, tmp_path_factory):
    """The scenes in the layouts of ADE20K, with its names of classes, and of COCO."""
    root = tmp_path_factory.mktemp("scenes")
    ade = write_ade(root / "ade", *scenes)
    for place in ("images", "masks"):  # the layout of one's own data too
        for split, theirs in (("train", "training"), ("val", "validation")):
            (root / "own" / place / split).mkdir(parents=True)
            for path in (ade / ("images" if place == "images" else "annotations") / theirs).iterdir():
                pixels = np.array(Image.open(path))
                pixels = pixels if place == "images" else pixels - 1
                Image.fromarray(pixels).save(root / "own" / place / split / path.name)
    (root / "own" / "classes.txt").write_text("\n".join(CLASSES))
    return {"segmentation": root / "own", "detection": write_coco(root / "coco", *scenes)}


def small_config(task, folders, output, *overrides, model=TINY):
    name = f"{task}/nano_fashion_scenes"
    source = ["data.name=" + {"segmentation": "folder", "detection": "coco"}[task], f"data.root={folders[task]}"]
    fixed = ["cpu=true", "precision=fp32", "data.val_batch_size=null", f"output={output}"]
    return load_config(name, [*model, *OPTIONS[task], *source, *fixed, *overrides])


@pytest.fixture(scope="module")
def runs(folders, tmp_path_factory):
    """A finished run of each task."""
    root = tmp_path_factory.mktemp("runs")
    for task in TASKS:
        train(small_config(task, folders, root / task))
        AcceleratorState._reset_state(reset_partial_state=True)
    return {task: root / task for task in TASKS}


def test_scenes_in_memory_are_the_scenes(scenes):
    drawn = draw_scenes(scenes[0])
    with_masks, with_boxes = ScenesWithMasks(drawn), ScenesWithBoxes(drawn).first(4)
    assert (len(with_masks), len(with_boxes), with_masks.sizes[0]) == (6, 4, (SIZE, SIZE))
    for index in range(4):
        scene, (image, mask), (_, target) = scenes[0][index], with_masks[index], with_boxes[index]
        assert np.array_equal(image, scene.image)
        assert np.array_equal(mask, scene.semantic)
        for key, expected in (("masks", scene.masks), ("boxes", scene.boxes), ("labels", scene.labels)):
            assert np.array_equal(target[key], expected)
        assert target["area"].tolist() == scene.masks.sum((1, 2)).tolist()
    with pytest.raises(ValueError, match="read-only"):
        with_masks[0][0][:] = 0


@pytest.mark.parametrize(
    "name", [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_recipe_loads_and_its_model_builds(name):
    config = load_config(name, ["model.pretrained=false"])
    build = build_segmentor if config.task == "segmentation" else build_detector
    with torch.device("meta"):
        model, card = build(config, tuple(map(str, range(7))))
        model.eval()
        if config.task == "segmentation":
            height, width = config.crop_size
            assert model(torch.empty(2, 3, height, width)).shape == (2, 7, height, width)
        else:
            levels = model.backbone(torch.empty(1, 3, 256, 320))
            assert [level.shape[-2:] for level in levels.values()] == [
                (math.ceil(256 / stride), math.ceil(320 / stride)) for stride in model.backbone.strides
            ]
        again = find_task(card.task).create_model(card)
        assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["vim_nano", "lbvim_nano", "efficient_vmamba_nano", "resnet18"])
def test_scenes_recipe_takes_any_backbone(task, name):
    config = load_config(f"{task}/nano_fashion_scenes", [f"model.name={name}", "model.patch_size=8"])
    build = build_segmentor if task == "segmentation" else build_detector
    with torch.device("meta"):
        model, _ = build(config, ITEM_NAMES)
    backbone = model.backbone if task == "segmentation" else model.backbone.body
    assert backbone.strides[0] == {"resnet18": 2 if task == "segmentation" else 4}.get(name, 8)
    optimizer, _ = build_optimizer(config, model, updates=10, world_size=1)
    assert len({group["weight_decay"] for group in optimizer.param_groups}) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_counts_updates_and_clips(name):
    """Scans diverge without: every recipe keeps clipping and a warm-up shorter than an epoch."""
    optim = load_config(name).optim
    assert optim.clip_grad
    assert 0 < optim.warmup_updates <= (optim.epoch_updates or 1000)


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("segmentation", "data.name=coco", "data.name must be one of fashion_scenes, ade20k"),
        ("segmentation", "augment.crop_size=[64]", "augment.crop_size has to be a height and a width"),
        ("segmentation", "inference.mode=tiles", "inference.mode must be one of whole, slide"),
        ("segmentation", "augment.scale=[2.0, 0.5]", "least and a largest factor"),
        ("detection", "data.min_size=[512]", "between 1 and data.max_size=256"),
        ("detection", "augment.jitter=[0.1]", "augment.jitter has to be"),
        ("detection", "data.in_chans=1", "fashion_scenes are coloured"),
        ("detection", "optim.schedule=multistep", "needs optim.milestones"),
        ("detection", "model.head_kwarg.x=1", "did you mean 'model.head_kwargs'"),
    ],
)
def test_wrong_setting_is_explained(task, override, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        load_config(f"{task}/nano_fashion_scenes", [override])


def test_data_needs_a_root_and_known_classes(folders, tmp_path):
    config = small_config("segmentation", folders, tmp_path)
    with pytest.raises(ValueError, match=r"needs data\.root"):
        open_masks(replace(config, data=replace(config.data, root=None)), training=True)
    config = small_config("detection", folders, tmp_path)
    with pytest.raises(ValueError, match="categories that are not known"):
        open_boxes(config, training=False, class_names=("cat",))
    with pytest.raises(ValueError, match=r"model\.num_classes is 3, but the data has 10"):
        build_detector(replace(config, model=replace(config.model, num_classes=3)), ITEM_NAMES)


def stop_at(update, monkeypatch, task):
    """Kills the run, as Ctrl-C would, in this update."""
    kind, calls = find_task(task), []
    loss = kind.loss

    def counted(self, model, batch):
        calls.append(None)
        if len(calls) == update:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    monkeypatch.setattr(kind, "loss", counted)


@pytest.mark.parametrize("task", TASKS)
def test_killed_run_continues_bit_for_bit(runs, folders, tmp_path, monkeypatch, task):
    """Killed in the last of four updates, and continued after the third."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(4, patch, task)
        train(small_config(task, folders, tmp_path, "checkpoint_every=1"))
    train(small_config(task, folders, tmp_path, "resume=auto", "checkpoint_every=1"))
    first, second = (load_file(folder / "last.safetensors") for folder in (runs[task], tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [[row["train_loss"] for row in read_log(folder)] for folder in (runs[task], tmp_path)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("task", TASKS)
def test_run_describes_and_shows_itself(runs, task):
    model, card = load_trained(runs[task])
    assert card.class_names == (CLASSES if task == "segmentation" else ITEM_NAMES)
    assert (card.task, card.model, model.training) == (task, "vmamba_nano", False)
    with Image.open(runs[task] / "predictions.png") as sheet:
        assert min(sheet.size) > 500
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 20
    lines = (runs[task] / "classes.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == list(card.class_names)
    assert (runs[task] / "curves.png").exists()


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_a_run_are_those_of_its_log(runs, task):
    model, card = load_trained(runs[task] / "last.safetensors")
    row, logged = scores_row(model, card, settings_beside(str(runs[task]))), read_log(runs[task])[-1]
    columns = ("val_loss", "miou", "aacc") if task == "segmentation" else ("box_ap50", "mask_ap")
    assert [row[name] for name in columns] == pytest.approx([logged[name] for name in columns], rel=1e-3, abs=1e-3)


def test_segmentation_scores_agree_with_plain_formulas(runs, folders):
    model, card = load_trained(runs["segmentation"] / "last.safetensors")
    config = settings_beside(str(runs["segmentation"]))
    data = open_masks(config, training=False)
    predict = SegmentationPredictor(model, card, config.inference)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    losses = []
    for image, mask in (data[index] for index in range(len(data))):
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        logits = model(((pixels / 255 - mean) / std).unsqueeze(0))
        assert torch.allclose(predict(pixels.unsqueeze(0)), logits.softmax(1), atol=1e-5)
        losses.append(F.cross_entropy(logits, torch.from_numpy(mask).long().unsqueeze(0)).item())
    assert read_log(runs["segmentation"])[-1]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_windows_scales_and_mirroring_of_a_run(runs):
    overrides = ["inference.mode=slide", "inference.crop_size=[32,40]", "inference.scales=[0.75,1.0]"]
    config = settings_beside(str(runs["segmentation"]), [*overrides, "inference.flip=true"])
    model, card = load_trained(runs["segmentation"])
    predict = SegmentationPredictor(model, card, config.inference)
    image = torch.randint(0, 255, (1, 3, 50, 71), dtype=torch.uint8)
    seen = predict(image)
    assert seen.shape == (1, 11, 50, 71)
    assert torch.allclose(seen.sum(1), torch.ones(1, 50, 71), atol=1e-5)
    assert torch.allclose(seen.flip(-1), predict(image.flip(-1)), atol=1e-5)
    with pytest.raises(ValueError, match="there are no settings"):
        settings_beside("vim_micro", ["inference.flip=true"])


def test_files_are_segmented(runs, folders, tmp_path):
    model, card = load_trained(runs["segmentation"])
    Image.new("RGB", (61, 37), "teal").save(tmp_path / "000001.png")
    files = find_images([str(folders["segmentation"] / "images" / "val"), str(tmp_path / "000001.png")])
    output = tmp_path / "out"
    output.mkdir()
    assert "4 images segmented into 11 classes" in predict_into(output, model, card, files)
    content = json.loads((output / "predictions.json").read_text())
    assert content["classes"] == list(CLASSES)
    for record in content["images"]:
        with Image.open(record["file"]) as image, Image.open(output / record["labels"]) as labels:
            assert (labels.mode, labels.size) == ("P", image.size)
            shares = np.bincount(np.asarray(labels).ravel(), minlength=11) / np.asarray(labels).size
        assert record["shares"] == {
            name: pytest.approx(share, abs=1e-4) for name, share in zip(CLASSES, shares, strict=True) if share
        }
    assert {path.name for path in (output / "drawn").iterdir()} >= {"000001.png", "000001-2.png"}
    assert (output / "predictions.png").exists()


def test_objects_in_files_are_found(runs, folders, tmp_path):
    from pycocotools import mask as coder

    model, card = load_trained(runs["detection"])
    model.roi_heads.score_thresh = 0.0
    files = find_images([str(folders["detection"] / "images" / "val")])
    summary = predict_into(tmp_path, model, card, files, batch_size=2, threshold=0.0)
    records = json.loads((tmp_path / "predictions.json").read_text())
    assert f"{len(records)} objects" in summary
    assert {record["image_id"] for record in records} == {1, 2, 3}
    expected = model([torch.from_numpy(np.array(Image.open(files[0]))).permute(2, 0, 1) / 255])[0]
    mine = [record for record in records if record["image_id"] == 1]
    assert [record["score"] for record in mine] == pytest.approx(expected["scores"].tolist(), abs=1e-4)
    left, top, width, height = mine[0]["bbox"]
    assert [left, top, left + width, top + height] == pytest.approx(expected["boxes"][0].tolist(), abs=0.05)
    assert card.class_names[mine[0]["category_id"] - 1] == mine[0]["category_name"]
    assert np.array_equal(coder.decode(mine[0]["segmentation"]), (expected["masks"][0, 0] > 0.5).numpy())
    assert len(list((tmp_path / "drawn").iterdir())) == 3


def test_tables_of_classes():
    scores = SegmentationScores(3)
    scores.update(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 255]]]))
    assert class_iou_rows(scores, ("a", "b", "c")) == [
        {"class": "a", "pixels": "33.33", "iou": "50.00", "accuracy": "100.00"},
        {"class": "b", "pixels": "66.67", "iou": "50.00", "accuracy": "50.00"},
        {"class": "c", "pixels": "0.00", "iou": "", "accuracy": ""},
    ]
    boxes, masks = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 30]]), torch.zeros(2, 48, 48, dtype=torch.uint8)
    masks[0, :9, :9], masks[1, 20:30, 20:40] = 1, 1
    truth = {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks}
    found = truth | {"scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0])}
    scores = DetectionScores(masks=True)
    scores.update([found], [truth])
    scores.compute()
    assert class_ap_rows(scores, ("a", "b", "c")) == [
        {"class": "a", "objects": 1, "box_ap": "100.00", "mask_ap": "100.00"},
        {"class": "b", "objects": 0, "box_ap": "", "mask_ap": ""},
        {"class": "c", "objects": 1, "box_ap": "0.00", "mask_ap": "0.00"},
    ]


def test_pictures_show_evenly_spaced_images_and_paint_classes():
    gallery = Gallery(total=10, wanted=4)
    for index in range(10):
        gallery.add(torch.full((3, 1, 1), index), torch.zeros(1, 1), torch.zeros(1, 1))
    assert [int(image[0]) for image, *_ in gallery.samples] == [0, 2, 5, 7]
    image = torch.full((1, 1, 3), 100, dtype=torch.uint8)
    painted = color_mask(image, torch.tensor([[0, 1, 255]]), palette_of(("a", "b")), opacity=0.5)
    assert painted[:, 0].T.tolist() == [[100, 100, 100], [114, 50, 50], [178, 178, 178]]


@pytest.mark.parametrize("task", TASKS)
def test_layers_learn_slower_the_deeper_they_lie(task):
    config = load_config(f"{task}/nano_fashion_scenes", [*TINY, *OPTIONS[task], "optim.layer_decay=0.5"])
    build = build_segmentor if task == "segmentation" else build_detector
    model, _ = build(config, ITEM_NAMES)
    optimizer, _ = build_optimizer(config, model, updates=10)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    prefix = "backbone.model." if task == "segmentation" else "backbone.body.model."
    names = dict(model.named_parameters())
    rates = {name: group_of[id(parameter)]["lr_scale"] for name, parameter in names.items()}
    assert rates[f"{prefix}stem.conv1.weight"] < rates[f"{prefix}stages.3.blocks.0.norm.weight"] < 1
    assert {rates[name] for name in names if not name.startswith("backbone.") or ".fpn." in name} == {1.0}
    logs = [name for name in names if name.endswith("A_log")]
    assert len(logs) == 4
    assert all(group_of[id(names[name])]["weight_decay"] == 0 for name in logs)


def test_schedules_count_updates(tmp_path):
    def rates(*overrides):
        options = ["optim.epochs=4", "optim.lr=1.0", "optim.min_lr=0", "optim.warmup_lr=0", *overrides]
        config = load_config("segmentation/nano_fashion_scenes", options)
        optimizer, scheduler = build_optimizer(config, torch.nn.Linear(1, 1), updates=10)
        found = []
        for update in range(1, 41):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step_update(update)
        return found

    poly = rates("optim.schedule=poly", "optim.warmup_updates=4", "optim.power=2.0")
    assert poly[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 0.81])
    assert poly[20] == pytest.approx(0.25)
    steps = rates("optim.schedule=multistep", "optim.milestones=[2,3]", "optim.warmup_updates=0")
    assert [steps[update] for update in (1, 15, 25, 35)] == pytest.approx([1, 1, 0.1, 0.01])


@pytest.mark.parametrize("task", TASKS)
def test_failure_names_the_module(folders, tmp_path, task):
    kind = find_task(task)(small_config(task, folders, tmp_path), CPU)
    batch = next(iter(kind.train_loader))
    next(kind.model.parameters()).data.fill_(math.nan)
    kind.model.train()
    try:
        assert not kind.loss(kind.model, batch).isfinite()
    except ValueError:  # torchvision's anchors cannot be sorted
        pytest.skip("torchvision raised before the loss was computed")
    assert "is not finite" in kind.explain_failure()


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_run_in_bfloat16_with_average_and_recomputation(folders, tmp_path, task):
    options = ["precision=bf16", "ema_decay=0.9", "grad_checkpointing=block"]
    result = train(small_config(task, folders, tmp_path, *options))
    assert math.isfinite(result.log[-1]["train_loss"])


JITTER = {"segmentation": [], "detection": ["augment.jitter=[0.5, 1.5]"]}  # after which all batches have one size


@pytest.mark.parametrize("task", TASKS)
def test_captured_modules_see_the_batches_there_are(folders, tmp_path, task, monkeypatch):
    """Those of a segmentor are images and masks, those of a detector's backbone images."""
    captured, seen = [], []
    monkeypatch.setattr(f"zoo.engine.tasks.{task}.capture_training", lambda *given: captured.append(given))
    kind = find_task(task)(small_config(task, folders, tmp_path, *JITTER[task]), CPU)
    kind.capture()
    [(module, shape, precision, *masks)] = captured

    def note(_, inputs):
        seen.append(tuple(inputs[0].shape))
        assert [(x.shape, x.dtype) for x in inputs[1:]] == [(x.shape, x.dtype) for x in masks]

    module.register_forward_pre_hook(note)
    for batch in kind.train_loader:
        kind.loss(kind.model.train(), batch)
    assert set(seen) == {shape} and precision == "fp32" and len(masks) == (task == "segmentation")


def test_wrong_masks_are_told_of_a_captured_segmentor(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.engine.tasks.segmentation.capture_training", lambda *given: None)
    kind = find_task("segmentation")(small_config("segmentation", folders, tmp_path), CPU)
    kind.capture()
    images, masks = next(iter(kind.train_loader))
    with pytest.raises(ValueError, match=r"masks have the labels \[77\]"):
        kind.loss(lambda *inputs: inputs[0].sum(), (images, torch.full_like(masks, 77)))


def test_backbones_are_not_captured_for_batches_of_any_size(folders, tmp_path):
    kind = find_task("detection")(small_config("detection", folders, tmp_path), CPU)
    with pytest.raises(ValueError, match="cuda_graph=true does not work for detection, whose batches have no fixed"):
        kind.capture()


SMALL_MODELS = {
    "vmamba": TINY,
    "vim": ["model.name=vim_nano.untrained", "model.kwargs={embed_dim: 16, depth: 2}", "model.patch_size=8"],
    "resnet": ["model.name=resnet18"],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_nothing_is_left_on_the_cpu(folders, tmp_path, train_elsewhere, task, name):
    config = small_config(task, folders, tmp_path, *JITTER[task], model=SMALL_MODELS[name])
    assert {"segmentation": "miou", "detection": "box_ap"}[task] in train_elsewhere(config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_captured_segmentor_trains_as_the_eager_one(folders, tmp_path, name):
    losses = []
    for captured in ("false", "true"):
        options = ["cpu=false", "precision=bf16", f"cuda_graph={captured}", "model.head_kwargs.dropout=0.0"]
        config = small_config("segmentation", folders, tmp_path / captured, *options, model=SMALL_MODELS[name])
        losses.append(train(config).log[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("captured", ["false", "true"])
def test_run_on_gpu(folders, tmp_path, task, name, captured):
    """Training, evaluation and prediction, with loaders in other processes."""
    options = ["cpu=false", "precision=bf16", "ema_decay=0.9", "data.workers=1", f"cuda_graph={captured}"]
    options += JITTER[task]
    result = train(small_config(task, folders, tmp_path / "run", *options, model=SMALL_MODELS[name]))
    assert math.isfinite(result.log[-1]["train_loss"])
    model, card = load_trained(tmp_path / "run" / "last.safetensors")
    files = find_images([str(folders[task] / "images" / "val")])
    predict_into(tmp_path, model.cuda(), card, files, threshold=0.0)
    assert (tmp_path / "predictions.json").is_file()
