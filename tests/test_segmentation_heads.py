"""Segmentation: every family with every head, equality with mmsegmentation, losses, prediction by windows."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from zoo import backbones
from zoo.heads import create_head, layers, list_heads, register_head
from zoo.heads.dense_backbone import DenseBackbone
from zoo.heads.mmseg_weights import load_segmentor_weights
from zoo.heads.rescale_pyramid import RescalePyramid
from zoo.heads.segmentor import IGNORED, Segmentor, predict_segmentation, slide_logits
from zoo.segmentor import create_segmentor

CLASSES = 5
COLUMN = dict(patch_size=16, embed_dim=32, depth=4)
STAGES = dict(dims=16, depths=(1, 1, 1, 1))
SMALL = {
    "a2mamba_pico": dict(dims=(16, 32, 32), depths=(1, 1, 1), num_heads=(2, 2, 2), projection_dim=32),
    "adventurer_nano": dict(COLUMN, d_state=8, head_dim=16),
    "efficient_vmamba_nano": STAGES,
    "lbvim_nano": COLUMN,
    "local_vim_nano": COLUMN,
    "local_vmamba_nano": STAGES,
    "mamba_vision_nano": dict(dim=16, depths=(1, 1, 1, 1), num_heads=(2, 4)),
    "plain_mamba_nano": COLUMN,
    "shuffle_mamba_nano": COLUMN,
    "vim_micro": COLUMN,
    "vmamba_nano": STAGES,
}
WIDTHS, STRIDES = [16, 24, 32, 48], [4, 8, 16, 32]


def small(name: str = "vim_micro", head: str = "uper_net", **options) -> Segmentor:
    kwargs = {**SMALL[name], **options.pop("backbone_kwargs", {})}
    return create_segmentor(name, head, CLASSES, channels=16, backbone_kwargs=kwargs, **options)


def batch(height: int = 64, width: int = 96, size: int = 2) -> tuple[Tensor, Tensor]:
    """Images, and masks of which some pixels are not labelled."""
    masks = torch.randint(0, CLASSES, (size, height, width))
    masks[:, :8] = IGNORED
    return torch.randn(size, 3, height, width), masks


def untouched(model: nn.Module) -> list[str]:
    """Parameters without a finite gradient."""
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


class PerPixel(nn.Module):
    """A segmentor whose logits of a pixel depend on this pixel alone, so that windows change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def test_every_family_is_tested():
    stems = {name.rpartition("_")[0] for name in SMALL}
    assert stems == set(backbones.FAMILIES)


@pytest.mark.parametrize("name", SMALL)
def test_every_head_trains_on_every_family(name):
    images, masks = batch()
    model = small(name)
    heads = {"uper_net": model.decode_head}
    maps = model.decode_head.in_channels, model.decode_head.in_strides
    heads |= {head: create_head(head, *maps, CLASSES, 16) for head in list_heads("segmentation") if head not in heads}
    for head, module in heads.items():
        model.zero_grad(set_to_none=True)
        model.decode_head = module
        model.loss(images, masks).backward()
        unread = ("norms.", "neck.") if head == "fcn" else ()  # it reads one map
        assert [name for name in untouched(model) if not any(part in name for part in unread)] == []
    assert model.eval()(images).shape == (2, CLASSES, 64, 96)


def test_maps_of_columnar_backbones_are_rescaled():
    """To the usual four strides, or as near to them as patches allow; other counts of maps too."""
    for patch, strides in ((16, [4, 8, 16, 32]), (8, [4, 8, 16, 32]), (4, [4, 8, 16, 32]), (2, [2, 4, 8, 16])):
        assert small(backbone_kwargs=dict(patch_size=patch), auxiliary=False).decode_head.in_strides == strides
    model = small(backbone_kwargs=dict(out_indices=(-1,)))
    assert isinstance(model.neck, RescalePyramid) and model.decode_head.in_strides == [4, 8, 16, 32]
    assert small(backbone_kwargs=dict(out_indices=(1, 3))).decode_head.in_strides == [4, 8]
    assert isinstance(small("vmamba_nano").neck, nn.Identity)


def test_maps_reduced_by_convolutions():
    """Halved once for every factor of 2, all of them trained, and odd sizes rounded up as by the convolutions."""
    model = small(backbone_kwargs=dict(patch_size=4), reduction="conv")
    convolutions = [sum(isinstance(layer, nn.Conv2d) for layer in level.modules()) for level in model.neck.levels]
    assert convolutions == [0, 1, 2, 3]
    model.loss(torch.randn(2, 3, 44, 60), torch.randint(CLASSES, (2, 44, 60))).backward()
    assert untouched(model) == []
    maps = model.neck([torch.randn(2, model.backbone.channels[0], 11, 15)] * 4)
    assert [tuple(level.shape[-2:]) for level in maps] == [(11, 15), (6, 8), (3, 4), (2, 2)]
    with pytest.raises(ValueError, match="reduction='mean' is not known; use one of pool, conv"):
        small(reduction="mean")


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_nano"])
def test_any_image_size(name):
    model = small(name, img_size=(64, 96)).eval()
    for height, width in ((64, 96), (70, 101), (33, 64)):
        assert model(torch.randn(1, 3, height, width)).shape == (1, CLASSES, height, width)


@pytest.mark.parametrize("sizes", [((8, 12), (32, 48)), ((7, 5), (50, 33)), ((1, 3), (9, 3)), ((20, 31), (6, 31))])
def test_gradient_of_a_resize(sizes):
    """By products of matrices, as maps on GPUs take it: torch's own in float64, and close to it in bfloat16."""
    size, resized = sizes
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, *resized, dtype=torch.float64)
    y = layers._Resize.apply(x, resized)
    expected = F.interpolate(x, resized, mode="bilinear")
    assert torch.equal(y, expected)
    (d_expected,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], d_expected)

    narrow = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(layers._Resize.apply(narrow, resized), narrow, grad.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - d_expected).norm() <= 8e-3 * d_expected.norm()


@pytest.mark.parametrize("most_logits", [1, 1 << 26])
def test_loss_is_the_mean_of_labelled_pixels(monkeypatch, most_logits):
    """With and without weights of classes; the auxiliary head's counts 0.4 times; nothing labelled is no loss."""
    monkeypatch.setattr("zoo.heads.segmentor.MOST_LOGITS", most_logits)  # image by image, or all at once
    images, masks = batch()
    for weights in (None, [1.0, 2.0, 0.5, 3.0, 0.0]):
        model = small("vmamba_nano", class_weights=weights).eval()
        features = model.backbone(images)
        weight = None if weights is None else torch.tensor(weights)
        expected = [
            F.cross_entropy(
                F.interpolate(head(features), masks.shape[-2:], mode="bilinear"), masks, weight, ignore_index=IGNORED
            )
            for head in (model.decode_head, model.auxiliary_head)
        ]
        loss = model(images, masks.to(torch.uint8) if weights else masks)
        torch.testing.assert_close(loss, expected[0] + 0.4 * expected[1])
    loss = model.loss(images, torch.full_like(masks, IGNORED))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_training_learns():
    """Squares of two colours are found on noise, in one view and in several by windows."""
    colors = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5], [-1.0, 1.0, 0.5]])

    def draw(size: int = 4) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(size, 48, 64, dtype=torch.long)
        for mask in masks:
            for label in (1, 2):
                row, column = int(torch.randint(32, ())), int(torch.randint(48, ()))
                mask[row : row + 16, column : column + 16] = label
        return colors[masks].permute(0, 3, 1, 2) + 0.3 * torch.randn(size, 3, 48, 64), masks

    def overlap(prediction: Tensor, masks: Tensor) -> float:
        """Mean intersection over union."""
        found, true = (F.one_hot(labels, CLASSES)[..., :3].bool() for labels in (prediction, masks))
        return float(((found & true).sum((0, 1, 2)) / (found | true).sum((0, 1, 2))).mean())

    model = small("vmamba_nano", "seg_former")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(50):
        optimizer.zero_grad()
        model(*draw()).backward()
        optimizer.step()
    images, masks = draw(8)
    single = overlap(predict_segmentation(model.eval(), images).argmax(1), masks)
    several = overlap(predict_segmentation(model, images, 48, 32, (1.0, 1.5), flip=True).argmax(1), masks)
    assert single > 0.7 and several > 0.7


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_nano"])
def test_bf16_autocast(name):
    """The loss is float32 and near that without autocast; gradients are finite."""
    images, masks = batch()
    model = small(name, "seg_former", grad_checkpointing=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(images, masks)
        assert model(images).dtype == torch.bfloat16
    loss.backward()
    assert loss.dtype == torch.float32 and untouched(model) == []
    torch.testing.assert_close(loss, model.loss(images, masks), rtol=0.05, atol=0)


def test_norms():
    """Group norm trains on a single image, batch norm says why not; batch norms become those of all processes."""
    images, masks = batch(size=1)
    model = small(norm="group")
    model.loss(images, masks).backward()
    assert untouched(model) == []
    assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with pytest.raises(ValueError, match=r"a batch of one image.*norm='group'"):
        small().loss(images, masks)
    model = small().eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(synced.decode_head.bottleneck.bn, nn.SyncBatchNorm)
    assert isinstance(synced.decode_head.bottleneck.act, nn.ReLU)


@pytest.mark.parametrize("name", ["vim_micro", "vmamba_nano"])
def test_layer_decay(name):
    """The stem learns slowest; norms of features, neck and heads at the full rate."""
    model = small(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    new = ("neck.", "decode_head.", "auxiliary_head.", "backbone.norms.", "backbone.model.feature_norms.")
    assert {scale for name, scale in by_name.items() if name.startswith(new)} == {1.0}
    old = [scale for name, scale in by_name.items() if not name.startswith(new)]
    assert max(old) == 0.5 and min(old) == 0.5 ** len(set(old))
    stem = "patch_embed.proj" if name == "vim_micro" else "stem.conv1"
    assert by_name[f"backbone.model.{stem}.weight"] == min(old)
    assert model.no_weight_decay() <= set(by_name) and model.no_weight_decay()


# Equality with mmsegmentation


@pytest.fixture(scope="module")
def mmseg() -> ModuleType:
    """mmsegmentation, imported behind the stand-in for operators that mmcv-lite lacks."""
    for module in ("mmengine", "mmcv", "mmseg", "ftfy", "regex"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install 'vision-ssm-zoo[seg]'")
    pytest.importorskip("cv2", reason="OpenCV, which mmcv needs, lacks a system library", exc_type=ImportError)
    if not hasattr(pkgutil, "find_loader"):
        pytest.skip("mmengine needs Python below 3.14")
    importlib.import_module("zoo.heads.mmseg")
    return importlib.import_module("mmseg.models")


HEADS = {
    "uper_net": ("UPerHead", {}, {}),
    "seg_former": ("SegformerHead", {}, {}),
    "fcn": ("FCNHead", dict(index=2, num_convs=2, concat_input=True), dict(in_index=2, num_convs=2)),
}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("head", HEADS)
def test_heads_equal_those_of_mmsegmentation(mmseg, head, norm):
    """Logits and gradients, in training and evaluation, with the same parameters by the same names."""
    theirs, own_options, their_options = HEADS[head]
    ours = create_head(head, WIDTHS, STRIDES, CLASSES, 64, norm=norm, dropout=0.0, **own_options)
    one_map = theirs == "FCNHead"
    reference = mmseg.build_head(
        dict(
            type=theirs,
            in_channels=WIDTHS[2] if one_map else WIDTHS,
            **(their_options if one_map else dict(in_index=[0, 1, 2, 3])),
            channels=64,
            num_classes=CLASSES,
            dropout_ratio=0.0,
            norm_cfg=dict(type="BN") if norm == "batch" else dict(type="GN", num_groups=32),
            align_corners=False,
        )
    )
    reference.load_state_dict(ours.state_dict())
    features = [torch.randn(2, width, -(-70 // s), -(-90 // s)) for width, s in zip(WIDTHS, STRIDES, strict=True)]
    results = []
    for module in (ours, reference):
        maps = [feature.clone().requires_grad_() for feature in features]
        logits = module.train()(maps)
        logits.square().sum().backward()
        results.append([logits, module.eval()(features), *(m.grad for m in maps if m.grad is not None)])
        results[-1] += [parameter.grad for _, parameter in sorted(module.named_parameters())]
    for own, expected in zip(*results, strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5 * max(scale, 1))


@pytest.mark.parametrize("size", [(64, 96), (50, 91), (32, 32), (24, 70)])
def test_windows_equal_those_of_mmsegmentation(mmseg, size):
    """Sizes that windows fit and not; an image lower than a window."""
    images = torch.randn(2, 3, *size)
    model = small("vmamba_nano", "seg_former").eval()
    settings = SimpleNamespace(crop_size=(32, 48), stride=(21, 32))
    stand_in = SimpleNamespace(
        test_cfg=settings, out_channels=CLASSES, encode_decode=lambda window, metas: model(window)
    )
    with torch.no_grad():
        expected = mmseg.EncoderDecoder.slide_inference(stand_in, images, [{}])
    torch.testing.assert_close(slide_logits(model, images, (32, 48), (21, 32)), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_mmsegmentation_with_our_backbones(mmseg):
    """What mmsegmentation saves of a model with ``ZooBackbone`` and its own neck and heads."""
    adapter = importlib.import_module("zoo.heads.mmseg")
    theirs = nn.Module()
    theirs.backbone = adapter.ZooBackbone("vim_micro", **COLUMN)
    theirs.neck = importlib.import_module("mmseg.models.necks").Feature2Pyramid(32, norm_cfg=dict(type="BN"))
    ours = small("vim_micro", auxiliary=False)
    theirs.decode_head = ours.decode_head
    load_segmentor_weights(ours, theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    features = theirs.eval().backbone(images)
    for own, expected in zip(ours.eval().neck(ours.backbone(images)), theirs.neck(features), strict=True):
        torch.testing.assert_close(own, expected)


# Prediction


def test_prediction_of_whole_images_and_windows():
    images = torch.randn(2, 3, 40, 56)
    model = PerPixel().eval()
    expected = model(images).softmax(1)
    for options in (dict(), dict(crop_size=16), dict(crop_size=(64, 24), stride=7), dict(crop_size=16, flip=True)):
        torch.testing.assert_close(predict_segmentation(model, images, **options), expected)
    network = small("vmamba_nano", "seg_former").eval()
    torch.testing.assert_close(predict_segmentation(network, images, 64), network(images).softmax(1))


def test_prediction_of_several_views():
    """The mean of all views' probabilities; a mirrored image has the mirrored result."""
    images = torch.randn(1, 3, 40, 56)
    model = small("vmamba_nano", "seg_former").eval()

    def view(size: tuple[int, int], mirrored: bool) -> Tensor:
        x = F.interpolate(images, size, mode="bilinear", antialias=size[0] < 40)
        logits = model(x.flip(3)).flip(3) if mirrored else model(x)
        return F.interpolate(logits, (40, 56), mode="bilinear").softmax(1)

    with torch.no_grad():
        views = [view(size, mirrored) for size in ((20, 28), (40, 56), (60, 84)) for mirrored in (False, True)]
    options = dict(scales=(0.5, 1.0, 1.5), flip=True)
    probabilities = predict_segmentation(model, images, **options)
    torch.testing.assert_close(probabilities, torch.stack(views).mean(0))
    torch.testing.assert_close(predict_segmentation(model, images.flip(3), **options), probabilities.flip(3))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(crop_size=16, stride=17), "crop_size=16 leave gaps with stride=17"),
        (dict(crop_size=(16, 32), stride=(8, 40)), r"crop_size=\(16, 32\) leave gaps"),
        (dict(crop_size=0), "crop_size=0.*positive"),
        (dict(crop_size=16, stride=-1), "stride=-1 have to be positive"),
        (dict(stride=16), "stride=16 needs a crop_size"),
        (dict(scales=()), r"scales=\(\)"),
        (dict(scales=(1.0, 0.0)), r"scales=\(1.0, 0.0\)"),
    ],
)
def test_prediction_with_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        predict_segmentation(PerPixel().eval(), torch.randn(1, 3, 40, 40), **options)


def test_prediction_wants_evaluation_mode():
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        predict_segmentation(PerPixel(), torch.randn(1, 3, 8, 8))


# Wrong arguments


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, y: (x, y.index_fill(1, torch.tensor(9), CLASSES + 2)), r"labels \[7\], but 5 classes.*0 to 4"),
        (lambda x, y: (x, torch.where(y == 3, -1, y)), r"labels \[-1\]"),
        (lambda x, y: (x[:, :1], y), r"expected images \(B, 3, H, W\), got \(2, 1, 64, 96\)"),
        (lambda x, y: (x[0], y[0]), r"got \(3, 64, 96\)|need masks"),
        (lambda x, y: (x, y[:, :32]), r"need masks \(2, 64, 96\), got \(2, 32, 96\)"),
        (lambda x, y: (x, y.float()), "integer type"),
    ],
)
def test_wrong_batches(spoil: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        small("vmamba_nano", "seg_former").loss(*spoil(*batch()))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(head="uper"), r"head='uper' does no segmentation; use one of fcn, seg_former, uper_net"),
        (dict(norm="layer"), "norm='layer' is not known"),
        (dict(class_weights=[1.0]), "1 class_weights for 5 classes"),
        (dict(name="adventurer_nano", authors_layout=True), "authors of adventurer_nano have published no layout"),
        (dict(name="vmamba_nano", backbone_kwargs=dict(source="mixer")), "source='mixer' is not known to VMamba"),
        (dict(backbone_kwargs=dict(out_indices=(4,))), r"out_indices=\(4,\).*use 0 to 3"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_heads_check_their_maps():
    with pytest.raises(ValueError, match="do not belong together"):
        create_head("uper_net", [16, 32], [4], CLASSES)
    with pytest.raises(ValueError, match="index=3 is not among the 2 maps"):
        create_head("fcn", [16, 32], [4, 8], CLASSES, index=3)
    with pytest.raises(ValueError, match="num_classes=256 exceeds 255"):
        create_segmentor("vim_micro", "seg_former", 256)
    head = create_head("seg_former", [16, 32], [4, 8], CLASSES, 16)
    with pytest.raises(ValueError, match=r"maps of \[16, 32\] channels, got \[16, 16\]"):
        head([torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)])


def test_registry():
    assert {"uper_net", "seg_former", "fcn"} <= set(list_heads()) and list_heads("segmentation") == sorted(HEADS)
    with pytest.raises(ValueError, match=r"no head is for task='sgmentation'; there are .*segmentation"):
        list_heads("sgmentation")
    with pytest.raises(ValueError, match="there is no head 'upernet'; did you mean uper_net"):
        create_head("upernet")
    with pytest.raises(ValueError, match=r"the name 'fcn' belongs to zoo.heads.fcn.FCN"):
        register_head("fcn")(PerPixel)


# Backbones


def test_dense_backbone_sources():
    """What a block adds to the stream, by the difference of the streams around it."""
    images = torch.randn(1, 3, 64, 96)
    stream = DenseBackbone("vim_micro", norm=False, **COLUMN).eval()
    mixer = DenseBackbone("vim_micro", norm=False, source="mixer", **COLUMN).eval()
    mixer.load_state_dict(stream.state_dict())
    added = stream(images)[2] - stream(images)[1]
    torch.testing.assert_close(mixer(images)[2], added, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["efficient_vmamba_nano", "local_vmamba_nano"])
def test_dense_backbone_resamples_patches(name):
    """Weights for patches of 2 pixels see in a patch twice as large what they saw before."""
    small = DenseBackbone(name, norm=False).eval()
    large = DenseBackbone(name, norm=False, patch_size=4, checkpoint=small.model.state_dict()).eval()
    patches = torch.rand(8, 3, 2, 2)
    enlarged = F.interpolate(patches, scale_factor=2, mode="bicubic", antialias=True)
    torch.testing.assert_close(large.model.stem(enlarged), small.model.stem(patches), rtol=1e-3, atol=1e-3)


def test_dense_backbone_weights(tmp_path):
    """Of a classifier, tensors or a file; of a backbone of this class; what does not fit or is given twice."""
    classifier = backbones.vim.VisionMamba(**COLUMN, num_classes=7)
    path = tmp_path / "weights.pth"
    torch.save({"model": classifier.state_dict()}, path)
    options = dict(out_indices=(0, 2), feature_norms=True, **COLUMN, class_token="middle", global_pool="token")
    loaded = DenseBackbone("vim_micro", checkpoint=path, **options)
    again = DenseBackbone("vim_micro", checkpoint=loaded.state_dict(), **options)
    for backbone in (loaded, again):
        assert torch.equal(backbone.model.blocks[2].mixer.A_log, classifier.blocks[2].mixer.A_log)
    with pytest.raises(ValueError, match=r"the weights in the checkpoint do not fit: .*of another shape"):
        DenseBackbone("vim_micro", checkpoint=classifier.state_dict(), **{**options, "embed_dim": 48})
    grey = DenseBackbone("vim_micro", checkpoint=path, **options, in_chans=1)
    image = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(grey.eval()(image), loaded.eval()(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    torch.save({"model": backbones.vim.VisionMamba(**COLUMN, in_chans=1).state_dict()}, path)
    coloured = DenseBackbone("vim_micro", checkpoint=path, **options).eval()
    grey = DenseBackbone("vim_micro", checkpoint=path, **options, in_chans=1).eval()
    torch.testing.assert_close(grey(image), coloured(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="two sources of weights"):
        DenseBackbone("vim_nano.fashion_mnist", pretrained=True, checkpoint=path)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        DenseBackbone("vim_micro", checkpoint=tmp_path / "none.pth")
    torch.save({"model": classifier.state_dict(), "args": SimpleNamespace()}, path)
    with pytest.raises(ValueError, match=r"holds more than weights.*zoo.load_checkpoint"):
        DenseBackbone("vim_micro", checkpoint=path, **options)


def test_normalisation():
    assert DenseBackbone("vim_micro", **COLUMN).mean == (0.485, 0.456, 0.406)
    assert DenseBackbone("vim_micro", in_chans=5, **COLUMN).std == (sum((0.229, 0.224, 0.225)) / 3,) * 5
    model = small(backbone_kwargs=dict(in_chans=5))
    assert len(model.mean) == 5 and model.eval()(torch.randn(1, 5, 64, 96)).shape == (1, CLASSES, 64, 96)
