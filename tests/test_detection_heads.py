"""Detectors on every family of backbones, against torchvision; their targets; pictures of what they find."""

import copy
import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import box_iou

from zoo.backbones import FAMILIES
from zoo.detector import create_detector
from zoo.draw import draw_detections
from zoo.heads.detection_targets import check_targets
from zoo.heads.detector import ImageSize, PyramidBackbone
from zoo.heads.feature_pyramid import FeaturePyramid
from zoo.heads.registry import create_head, list_heads
from zoo.heads.simple_pyramid import SimplePyramid

HEIGHT, WIDTH, CLASSES = 64, 96, 3
COLUMN = dict(depth=2, embed_dim=32, patch_size=16)
BACKBONES = {  # one of each family, as small as its class allows
    "a2mamba": ("a2mamba_pico", dict(dims=(32, 32, 64), depths=(1, 1, 1), stem_stride=4)),
    "adventurer": ("adventurer_nano", COLUMN),
    "efficient_vmamba": ("efficient_vmamba_nano", dict(dims=16)),
    "lbvim": ("lbvim_nano", COLUMN),
    "local_vim": ("local_vim_nano", COLUMN),
    "local_vmamba": ("local_vmamba_nano", dict(dims=16, patch_size=4)),
    "mamba_vision": ("mamba_vision_nano", dict(dim=16, depths=(1, 1, 2, 2), stem_stride=2)),
    "plain_mamba": ("plain_mamba_nano", COLUMN),
    "shuffle_mamba": ("shuffle_mamba_nano", COLUMN),
    "vim": ("vim_micro", COLUMN),
    "vmamba": ("vmamba_nano", dict(dims=16, depths=(1, 1, 1, 1), patch_size=4)),
}
SMALL_HEADS = {
    "faster_rcnn": dict(representation_size=32, rpn_post_nms_top_n_train=50, box_batch_size_per_image=32),
    "fcos": {},
    "mask_rcnn": dict(
        representation_size=32, mask_channels=16, rpn_post_nms_top_n_train=50, box_batch_size_per_image=32
    ),
    "retina_net": {},
}
HEADS = tuple(SMALL_HEADS)


def make(head: str, family: str = "vim", **kwargs) -> nn.Module:
    name, options = BACKBONES[family]
    options = {**options, **kwargs.pop("backbone_kwargs", {})}
    defaults = dict(pyramid_channels=64 if head == "fcos" else 16, min_size=HEIGHT, max_size=WIDTH, **SMALL_HEADS[head])
    return create_detector(name, head, CLASSES, backbone_kwargs=options, **{**defaults, **kwargs})


def make_target(boxes: list[list[float]], labels: list[int], height: int = HEIGHT, width: int = WIDTH) -> dict:
    """Boxes whose masks fill them."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[round(y1) : round(y2), round(x1) : round(x2)] = 1
    return dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64), masks=masks)


def batch(channels: int = 3) -> tuple[list[Tensor], list[dict]]:
    """Two images of different sizes, of which the second is narrower."""
    images = [torch.rand(channels, HEIGHT, WIDTH), torch.rand(channels, HEIGHT, 80)]
    targets = [make_target([[5, 6, 40, 50], [30, 10, 90, 60]], [0, 2]), make_target([[10, 10, 70, 50]], [1], width=80)]
    return images, targets


def assert_learns(detector: nn.Module, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
    """Finite float32 losses, and finite gradients of every parameter, not all zero in the backbone's first layer."""
    losses = detector(images, targets)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    trained = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None] == []
    assert all(grad.isfinite().all() for grad in trained.values())
    first = next(grad for name, grad in trained.items() if name.startswith("backbone.body.") and grad.ndim > 1)
    assert first.abs().max() > 0
    return losses


def assert_detections(detector: nn.Module, predictions: list[dict], sizes: list[tuple[int, int]]) -> None:
    for prediction, (height, width) in zip(predictions, sizes, strict=True):
        count = len(prediction["boxes"])
        shapes = dict(boxes=(count, 4), labels=(count,), scores=(count,))
        if detector.predicts_masks:
            shapes["masks"] = (count, 1, height, width)
        assert {key: tuple(value.shape) for key, value in prediction.items()} == shapes
        assert all(value.dtype == torch.float32 for key, value in prediction.items() if key != "labels")
        assert prediction["labels"].dtype == torch.int64
        assert ((prediction["labels"] >= 0) & (prediction["labels"] < CLASSES)).all()
        assert (prediction["boxes"] >= 0).all()
        assert (prediction["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert (prediction["scores"].diff() <= 0).all()


def test_all_families_are_here():
    assert set(BACKBONES) == set(FAMILIES)
    assert set(list_heads("detection")) == set(HEADS)


@pytest.mark.parametrize("head", ["mask_rcnn", "retina_net"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_detects(family, head):
    detector = make(head, family, score_threshold=0.0)
    images, targets = batch()
    assert_learns(detector, images, targets)
    with torch.inference_mode():
        predictions = detector.eval()(images)
    assert all(len(prediction["boxes"]) for prediction in predictions)
    assert_detections(detector, predictions, [(HEIGHT, WIDTH), (HEIGHT, 80)])


@pytest.mark.parametrize("family", ["vmamba", "vim"])
@pytest.mark.parametrize("head", ["faster_rcnn", "fcos"])
def test_other_heads_learn_and_detect(head, family):
    detector = make(head, family, score_threshold=0.0)
    images, targets = batch()
    assert_learns(detector, images, targets)
    with torch.inference_mode():
        assert_detections(detector, detector.eval()(images), [(HEIGHT, WIDTH), (HEIGHT, 80)])


def test_timm_model_with_rescaled_pyramid_and_grey_images():
    """Other models of timm; Vim's neck before a feature pyramid network; one channel, normalised by its own numbers."""
    detector = create_detector("resnet18", "retina_net", CLASSES, pyramid_channels=16, min_size=HEIGHT, max_size=WIDTH)
    assert detector.backbone.body.strides == [8, 16, 32]
    assert_learns(detector, *batch())
    for head in ("faster_rcnn", "retina_net"):
        detector = make(head, pyramid="rescale", backbone_kwargs=dict(in_chans=1))
        assert detector.transform.image_mean == [(0.485 + 0.456 + 0.406) / 3]
        assert_learns(detector, *batch(channels=1))


@pytest.mark.parametrize(
    "head, reference_class, own_options",
    [
        ("faster_rcnn", detection.FasterRCNN, dict(representation_size=1024)),
        ("fcos", detection.FCOS, {}),
        ("mask_rcnn", detection.MaskRCNN, dict(representation_size=1024, mask_channels=256)),
        ("retina_net", detection.RetinaNet, {}),
    ],
)
def test_agrees_with_torchvision(head, reference_class, own_options):
    """Same parameters, same losses, same detections as torchvision's class made with its own defaults."""
    two_stage = head.endswith("rcnn")
    regions = dict(box_batch_size_per_image=8, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=5)
    options = regions if two_stage else {}
    ours = make(head, **own_options, **options)
    shift = 1 if two_stage else 0  # for the background
    size = dict(min_size=HEIGHT, max_size=WIDTH, image_mean=ours.backbone.mean, image_std=ours.backbone.std)
    reference = reference_class(copy.deepcopy(ours.backbone), CLASSES + shift, **size, **options)
    reference.load_state_dict(ours.state_dict())

    images, targets = batch()
    shifted = [dict(target, labels=target["labels"] + shift) for target in targets]
    torch.manual_seed(1)
    losses = ours(images, targets)
    torch.manual_seed(1)
    torch.testing.assert_close(dict(losses), dict(reference(images, shifted)))
    ours.eval(), reference.eval()
    ours.score_thresh = reference.score_thresh = 0.0
    with torch.inference_mode():
        for prediction, expected in zip(ours(images), reference(images), strict=True):
            assert len(prediction["boxes"])
            torch.testing.assert_close(prediction, expected | {"labels": expected["labels"] - shift})


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects(head):
    detector = make(head, "vmamba")
    images, targets = batch()
    empty = [make_target([], []), make_target([], [], width=80)]
    assert_learns(detector, images, empty)
    assert_learns(detector, images, [targets[0], empty[1]])
    with torch.inference_mode():
        predictions = make(head, score_threshold=0.999).eval()(images)
    assert [len(prediction["boxes"]) for prediction in predictions] == [0, 0]
    assert_detections(detector, predictions, [(HEIGHT, WIDTH), (HEIGHT, 80)])


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_autocast(head, device):
    detector = make(head, score_threshold=0.0).to(device)
    images, targets = batch()
    images = [image.to(device) for image in images]
    targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
    torch.manual_seed(1)
    expected = detector(images, targets)
    torch.manual_seed(1)
    with torch.autocast(device.type, torch.bfloat16):
        losses = assert_learns(detector, images, targets)
        with torch.inference_mode():
            predictions = detector.eval()(images)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=0.1, atol=0.05)
    predictions = [{key: value.cpu() for key, value in prediction.items()} for prediction in predictions]
    assert_detections(detector, predictions, [(HEIGHT, WIDTH), (HEIGHT, 80)])


@pytest.mark.parametrize("head", ["faster_rcnn", "retina_net"])
def test_anchors_are_exact_in_bfloat16(head):
    detector = make(head)
    generator = detector.rpn.anchor_generator if head == "faster_rcnn" else detector.anchor_generator
    images = detection.image_list.ImageList(torch.zeros(1, 3, 800, 1344), [(800, 1344)])
    maps = [torch.zeros(1, 1, math.ceil(800 / s), math.ceil(1344 / s)) for s in detector.backbone.strides]
    expected = detection.anchor_utils.AnchorGenerator(generator.sizes, generator.aspect_ratios)(images, maps)
    given = generator(images, [feature.bfloat16() for feature in maps])
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    torch.testing.assert_close(generator(images, maps), expected, rtol=0, atol=0)  # nothing rounded stays behind


def test_regions_are_pooled_at_the_right_scale_in_padded_batches():
    """torchvision infers scales from heights, which padding to squares makes twice as large here."""
    detector = make("faster_rcnn", min_size=128, max_size=128, size_divisible=128)
    image = torch.rand(3, 64, 128)
    assert detector.transform([image])[0].tensors.shape[-2:] == (128, 128)
    with torch.inference_mode():
        detector.eval()([image])
    assert detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    mapper = detector.roi_heads.box_roi_pool.map_levels
    assert (mapper.k_min, mapper.k_max) == (2, 5)


def test_one_drawn_image_is_learnt():
    """A square and a disc, found with their classes and masks after some steps."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    disc = (columns - 68) ** 2 + (rows - 36) ** 2 < 20**2
    image = torch.rand(3, HEIGHT, WIDTH) * 0.1 + 0.1
    image[0, 12:44, 8:40] = 0.9
    image[2][disc] = 0.9
    target = make_target([[8, 12, 40, 44], [49, 17, 88, 56]], [0, 1])
    target["masks"][1] = disc
    regions = dict(rpn_post_nms_top_n_train=200, box_batch_size_per_image=128)
    width = dict(pyramid_channels=32, representation_size=64, mask_channels=32)
    detector = make("mask_rcnn", backbone_kwargs=dict(patch_size=8), **width, **regions)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=50)
    for _ in range(50):
        optimizer.zero_grad()
        sum(detector([image], [target]).values()).backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        prediction = detector.eval()([image])[0]
    for label in (0, 1):
        best = int((prediction["labels"] == label).nonzero()[0])
        assert box_iou(prediction["boxes"][best : best + 1], target["boxes"][label : label + 1]) > 0.5
        mask, expected = prediction["masks"][best, 0] > 0.5, target["masks"][label].bool()
        assert (mask & expected).sum() > 0.5 * (mask | expected).sum()


def test_grad_checkpointing_gives_the_same_gradients():
    plain, saving = make("retina_net", "vmamba"), make("retina_net", "vmamba", grad_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    for detector in (plain, saving):
        torch.manual_seed(1)
        assert_learns(detector, *batch())
    for (name, parameter), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family, stages, first_trained", [("vmamba", 2, "stages.2."), ("vim", 1, "blocks.1.")])
def test_frozen_stages(family, stages, first_trained):
    detector = make("retina_net", family, frozen_stages=stages, grad_checkpointing=True)
    names = [name.removeprefix("backbone.body.model.") for name, p in detector.named_parameters() if p.requires_grad]
    assert next(name for name in names if name.startswith(("stages", "blocks"))).startswith(first_trained)
    assert not [name for name in names if name.startswith(("stem", "patch_embed", "pos_embed"))]
    frozen = [p for p in detector.parameters() if not p.requires_grad]
    before = [parameter.clone() for parameter in frozen]
    sum(detector(*batch()).values()).backward()
    torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1).step()
    assert frozen and all(torch.equal(parameter, old) for parameter, old in zip(frozen, before, strict=True))
    detector.eval().train()
    model = detector.backbone.body.model
    assert not (model.stages[0] if family == "vmamba" else model.blocks[0]).training
    assert (model.stages[3] if family == "vmamba" else model.blocks[1]).training


def test_freezing_more_than_there_is():
    with pytest.raises(ValueError, match=r"cannot freeze 9 stages; the backbone has 4"):
        make("retina_net", "vmamba", frozen_stages=9)


@pytest.mark.parametrize("family", ["vmamba", "vim"])
def test_layer_decay(family):
    detector = make("faster_rcnn", family)
    skipped = detector.no_weight_decay()
    assert skipped and skipped <= dict(detector.named_parameters()).keys()
    groups = param_groups_layer_decay(detector, 0.05, skipped, layer_decay=0.5)
    scale = {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    named = dict(detector.named_parameters())
    assert len(scale) == len(named)
    assert all(scale[p] == 1 for name, p in named.items() if not name.startswith("backbone.body.model."))
    assert all(decay[named[name]] == 0 for name in skipped)
    body = [scale[p] for name, p in named.items() if name.startswith("backbone.body.model.") and "norm" not in name]
    assert body == sorted(body) and body[0] < body[-1] < 1


def test_image_sizes():
    images = [torch.rand(3, 50, 100), torch.rand(3, 120, 40)]
    detector = make("retina_net", img_size=(64, 32), score_threshold=0.0)
    assert detector.transform(images)[0].tensors.shape == (2, 3, 64, 32)
    with torch.inference_mode():
        predictions = detector.eval()(torch.rand(2, 3, 50, 100))
    assert_detections(detector, predictions, [(50, 100)] * 2)
    assert max(prediction["boxes"][:, 2].max() for prediction in predictions) > 64  # back in the image's pixels
    batched = make("retina_net", min_size=(32, 48), max_size=64).eval().transform(images)[0]
    assert batched.image_sizes == [(32, 64), (64, 21)]  # the last of several sizes, up to the longest
    assert batched.tensors.shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(min_size=100, max_size=90), r"min_size=100 has to lie between 1 and max_size=90"),
        (dict(fixed_size=(1, 2, 3)), r"fixed_size=\(1, 2, 3\) is no image size"),
        (dict(size_divisible=0), r"size_divisible=0 has to be positive"),
    ],
)
def test_wrong_image_sizes(options, problem):
    with pytest.raises(ValueError, match=problem):
        ImageSize(**options)


@pytest.mark.parametrize(
    "create, problem",
    [
        (
            lambda: create_detector("vim_nano", "upernet"),
            r"head='upernet' is no detector; use one of faster_rcnn, fcos",
        ),
        (lambda: create_detector("vim_nano", pyramid="bi"), r"pyramid='bi' is not known; use one of fpn, simple"),
        (lambda: make("retina_net", "vmamba", pyramid="simple", backbone_kwargs=dict(out_indices=(2, 3))), "use 'fpn'"),
        (lambda: make("fcos", pyramid_channels=32), r"fcos norms 32 groups of channels; give 64, 96 or more, not 32"),
        (lambda: make("retina_net", anchor_sizes=[[8]]), r"anchor_sizes has 1 entries, the pyramid 5 levels"),
        (
            lambda: create_detector("vim_micro", "fcos", 0, backbone_kwargs=COLUMN),
            r"num_classes=0 has to be",
        ),
    ],
)
def test_wrong_arguments(create, problem):
    with pytest.raises(ValueError, match=problem):
        create()


def test_fcos_on_a_map_of_every_pixel():
    pyramid = FeaturePyramid((8, 8), (1, 2), 64)
    body = nn.Identity()
    body.mean, body.std, body.strides = (0.5,), (0.5,), [1, 2]
    with pytest.raises(ValueError, match=r"fcos needs strides from 2 on, got \[1, 2, 4\]"):
        create_head("fcos", PyramidBackbone(body, pyramid), CLASSES)


@pytest.mark.parametrize(
    "change, problem",
    [
        (
            dict(boxes=[[5, 6, 5, 50]]),
            r"image 1 of the batch \(image_id 42\), box 0: \[5.0, 6.0, 5.0, 50.0\] has no",
        ),
        (dict(boxes=[[5, 6, math.nan, 50]]), r"image 1 .*box 0: .* has no area"),
        (dict(boxes=[[5, 6, 96.5, 50]]), r"image 1 .*box 0: .* leaves the image of 96 x 64 pixels"),
        (dict(boxes=[[-1, 6, 20, 50]]), r"image 1 .*box 0: .* leaves the image of 96 x 64 pixels"),
        (dict(labels=[3]), r"image 1 .*box 0: label 3 is not one of the classes 0 to 2"),
        (dict(labels=[-1]), r"label -1 is not one of the classes"),
        (dict(labels=[0, 1]), r"1 boxes and labels of shape \(2,\)"),
        (dict(labels=[0.0]), r"labels of shape \(1,\) and torch.float32; give a whole number"),
        (dict(boxes=[5, 6, 20, 50]), r"boxes of shape \(4,\); give \(N, 4\)"),
        (
            dict(masks=torch.zeros(1, 32, 96)),
            r"masks of shape \(1, 32, 96\); give one of the image's size .*: \(1, 64, 96\)",
        ),
        (dict(masks=None), r"image 1 .* has no 'masks'; its target holds \['boxes', 'image_id', 'labels'\]"),
        (dict(labels=None), r"has no 'labels'"),
    ],
)
def test_wrong_targets(change, problem):
    wrong = make_target([[5, 6, 20, 50]], [1]) | dict(image_id=torch.tensor(42))
    wrong |= {key: torch.as_tensor(value) for key, value in change.items() if value is not None}
    wrong = {key: value for key, value in wrong.items() if change.get(key, 0) is not None}
    images = [torch.rand(3, HEIGHT, WIDTH)] * 2
    with pytest.raises(ValueError, match=problem):
        check_targets(images, [make_target([[0, 0, 96, 64]], [2]), wrong], CLASSES, with_masks=True)


def test_wrong_batches():
    detector = make("retina_net")
    images, targets = batch()
    with pytest.raises(ValueError, match=r"got no targets for 2 images"):
        detector(images)
    with pytest.raises(ValueError, match=r"got 1 targets for 2 images"):
        detector(images, targets[:1])
    with pytest.raises(ValueError, match=r"label 7 is not one of the classes 0 to 2"):
        detector(images, [targets[0], dict(targets[1], labels=torch.tensor([7]))])
    with pytest.raises(ValueError, match=r"image 1 of the batch has shape \(1, 64, 80\) .*takes \(3, height, width\)"):
        detector([images[0], images[1][:1]], targets)
    with pytest.raises(ValueError, match=r"torch.uint8; .*floating numbers from 0 to 1"):
        detector([(image * 255).byte() for image in images], targets)
    with pytest.raises(ValueError, match=r"got no images"):
        detector.eval()([])


def test_targets_are_left_as_they_were():
    """Other types are converted, what is not needed is left out, and the caller's target stays."""
    target = make_target([[5, 6, 40, 50]], [2])
    target["labels"] = target["labels"].int()
    kept = {key: value.clone() for key, value in target.items()}
    checked = check_targets([torch.rand(3, HEIGHT, WIDTH)], [target], CLASSES, with_masks=False)[0]
    assert checked["labels"].dtype == torch.int64 and "masks" not in checked
    make("retina_net")([torch.rand(3, HEIGHT, WIDTH)], [target])
    torch.testing.assert_close(target, kept, rtol=0, atol=0)


def test_draw_detections():
    image = torch.full((1, 60, 90), 0.5)
    prediction = dict(
        boxes=torch.tensor([[5.0, 5, 40, 50], [30, 20, 85, 55], [2, 2, 20, 20]]),
        labels=torch.tensor([1, 0, 1]),
        scores=torch.tensor([0.9, 0.8, 0.1]),
        masks=torch.zeros(3, 1, 60, 90),
    )
    prediction["masks"][0, 0, 30:45, 10:25] = 0.8
    prediction["masks"][1, 0, 30:45, 60:80] = 0.4
    drawn = draw_detections(image, prediction, ["cat", "dog"])
    assert drawn.shape == (3, 60, 90) and drawn.dtype == torch.uint8
    grey = torch.tensor([127, 127, 127], dtype=torch.uint8)
    assert not torch.equal(drawn[:, 38, 15], grey)  # in a mask
    assert torch.equal(drawn[:, 40, 70], grey)  # in one below one half
    assert torch.equal(drawn[:, 2, 10], grey)  # where a box below the threshold would be
    assert not torch.equal(drawn[:, 5, 39], grey)  # on a box
    target = {key: prediction[key] for key in ("boxes", "labels")} | dict(masks=prediction["masks"][:, 0] > 0.5)
    assert not torch.equal(draw_detections(image, target, ["cat", "dog"])[:, 2, 10], grey)
    assert (draw_detections(image, prediction, ["cat", "dog"], threshold=1.0) == 127).all()
    with pytest.raises(ValueError, match=r"labels 0 to 1 are drawn, but there are 1 names"):
        draw_detections(image, prediction, ["cat"])
    with pytest.raises(ValueError, match=r"cannot draw on an image of shape \(2, 60, 90\)"):
        draw_detections(image.expand(2, -1, -1), prediction, ["cat", "dog"])


def test_defaults_follow_the_backbone():
    """Real models, without weights: maps, levels and normalisation."""
    cases = [("efficient_vmamba_tiny", "mask_rcnn"), ("vim_tiny_patch16_224", "retina_net"), ("resnet18", "mask_rcnn")]
    for name, head in cases:
        with torch.device("meta"):
            detector = create_detector(name, head)
        assert detector.backbone.strides == ([4, 8, 16, 32, 64] if head == "mask_rcnn" else [8, 16, 32, 64, 128])
        assert detector.backbone.body.strides == ([16] if name.startswith("vim") else [4, 8, 16, 32])
        assert isinstance(detector.backbone.fpn, SimplePyramid if name.startswith("vim") else FeaturePyramid)
        assert tuple(detector.transform.image_mean) == timm.get_pretrained_cfg(name).mean
        assert detector.transform.size_divisible == 32 and detector.num_classes == 80
    assert detector.backbone.body.out_indices == [1, 2, 3, 4]
