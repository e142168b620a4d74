"""Our backbones inside segmentation_models_pytorch, mmengine and mmsegmentation, where these are installed."""

import importlib.util
import json
import pickle
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import zoo

ROOT = Path(__file__).parents[1]
NANO = ("vmamba_nano", "efficient_vmamba_nano", "mamba_vision_nano", "vim_nano", "plain_mamba_nano", "local_vim_nano")
HEIGHT, WIDTH = 48, 80  # not square; a multiple of all strides of the nano models
NORM = dict(type="BN", requires_grad=True)


def missing(*modules: str) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def skip_without(*modules: str) -> pytest.MarkDecorator:
    absent = missing(*modules)
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}: pip install 'vision-ssm-zoo[seg]'")


needs_smp = skip_without("segmentation_models_pytorch")


@pytest.fixture(scope="module")
def adapter() -> ModuleType:
    """``zoo.heads.mmseg``, imported before mmsegmentation, as in a config."""
    absent = missing("mmengine", "mmcv", "mmseg", "ftfy", "regex")
    if absent:
        pytest.skip(f"needs {', '.join(absent)}: pip install 'vision-ssm-zoo[seg]'")
    pytest.importorskip("cv2", reason="OpenCV, which mmcv needs, lacks a system library", exc_type=ImportError)
    if not hasattr(pkgutil, "find_loader"):
        pytest.skip("mmengine needs Python below 3.14")
    ours = importlib.import_module("zoo.heads.mmseg")
    importlib.import_module("mmseg.models")
    return ours


def images(height: int = HEIGHT, width: int = WIDTH, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


def assert_all_learn(model: nn.Module) -> None:
    """Every parameter has a gradient, and all are finite."""
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def backward(features: Any) -> None:
    sum((feature * torch.randn_like(feature)).sum() for feature in features).backward()


@needs_smp
@pytest.mark.parametrize(
    "name, depth", [("vmamba_tiny", 5), ("vmamba_nano", 4), ("efficient_vmamba_nano", 4), ("mamba_vision_nano", 3)]
)
def test_smp_unet(name, depth):
    """The nano models' maps have strides from 2 or 1 on, so that a decoder takes 4 or 3 steps instead of 5."""
    import segmentation_models_pytorch as smp

    widths = (64, 48, 32, 24, 16)[-depth:]
    model = smp.Unet(f"tu-{name}", encoder_weights=None, encoder_depth=depth, decoder_channels=widths, classes=5)
    logits = model(images(64, 96))
    assert logits.shape == (2, 5, 64, 96)
    backward([logits])
    assert_all_learn(model.decoder)
    used = [parameter.grad is not None for parameter in model.encoder.parameters()]
    assert all(used)


@needs_smp
def test_smp_keeps_features_of_timm():
    import segmentation_models_pytorch as smp

    encoder = smp.Unet("tu-vmamba_nano", encoder_weights=None, encoder_depth=4, decoder_channels=(8,) * 4).encoder
    x = images()
    extractor = timm.create_model("vmamba_nano", features_only=True)
    extractor.load_state_dict(encoder.model.state_dict())
    features = encoder.eval()(x)
    assert features[0] is x
    for feature, expected in zip(features[1:], extractor.eval()(x), strict=True):
        torch.testing.assert_close(feature, expected)


def test_missing_operators_raise_when_called(adapter):
    if not adapter.replace_missing_operators():
        pytest.skip("mmcv has its compiled operators")
    from mmcv.ops import RoIAlign
    from mmcv.ops.info import get_compiler_version
    from mmengine.utils.dl_utils import mmcv_full_available

    assert not mmcv_full_available()
    with pytest.raises(RuntimeError, match="get_compiler_version is a compiled operator of mmcv"):
        get_compiler_version()
    with pytest.raises(RuntimeError, match=r"roi_align_forward is a compiled operator.*replace mmcv-lite by mmcv"):
        RoIAlign(2)(images(), torch.tensor([[0.0, 1.0, 1.0, 9.0, 9.0]]))
    assert not hasattr(sys.modules["mmcv._ext"], "__path__")


@pytest.mark.parametrize("name", ["vmamba_nano", "efficient_vmamba_nano"])
def test_mmseg_timm_backbone(adapter, name):
    from mmseg.registry import MODELS

    options = dict(features_only=True, pretrained=False, feature_norms=(0, 1, 2, 3))
    backbone = MODELS.build(dict(type="TIMMBackbone", model_name=name, **options))
    backbone.init_weights()
    features = backbone(images())
    assert [tuple(f.shape[1:]) for f in features] == [(32, 24, 40), (64, 12, 20), (128, 6, 10), (256, 3, 5)]
    backward(features)
    assert_all_learn(backbone)


@pytest.mark.parametrize("name", NANO)
def test_zoo_backbone(adapter, name):
    from mmseg.registry import MODELS

    backbone = MODELS.build(dict(type="ZooBackbone", model_name=name, grad_checkpointing=True))
    backbone.init_weights()
    features = backbone(images())
    assert isinstance(features, tuple) and len(features) == len(backbone.out_indices) == 4
    for feature, channels, stride in zip(features, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (2, channels, HEIGHT // stride, WIDTH // stride)
    backward(features)
    assert_all_learn(backbone)


def test_zoo_backbone_takes_other_models_of_timm(adapter):
    backbone = adapter.ZooBackbone("mambaout_femto", out_indices=(1, -1))
    features = backbone(images(64, 96, 1))
    assert [tuple(feature.shape[1:]) for feature in features] == [(96, 8, 12), (288, 2, 3)]
    assert list(backbone.norms) == ["1", "3"]


def test_columnar_features_are_those_of_the_blocks(adapter):
    """By default after each quarter of the blocks; with ``norm`` through the norm that the classifier reads."""
    assert adapter.ZooBackbone("vim_micro").out_indices == [1, 3, 5, 7]
    backbone = adapter.ZooBackbone("vim_micro", out_indices=(-1, 2), feature_norms=False, norm=True).eval()
    assert (backbone.out_indices, backbone.channels, backbone.strides) == ([2, 7], [96, 96], [4, 4])
    model = zoo.create_model("vim_micro", num_classes=0).eval()
    model.load_state_dict(backbone.model.state_dict())
    x = images()
    expected = model.forward_intermediates(x, indices=(2, 7), norm=True, intermediates_only=True)
    for feature, wanted in zip(backbone(x), expected, strict=True):
        torch.testing.assert_close(feature, wanted)


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_micro"])
def test_norms_of_features(adapter, name):
    """A feature with a norm has mean 0 and variance 1 over its channels; only the chosen ones have one."""
    backbone = adapter.ZooBackbone(name, out_indices=(0, 1, 3), feature_norms=(1, 3)).eval()
    features = backbone(images(32, 32))
    normed = [torch.allclose(f.var(1, correction=0), torch.ones(()), atol=1e-2) for f in features]
    assert normed == [False, True, True]
    assert not [n for n, _ in backbone.named_parameters() if n.startswith("model.norm.")]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(out_indices=(0, 4)), r"out_indices=\(0, 4\).*use 0 to 3"),
        (dict(feature_norms=(-5,)), r"feature_norms=\(-5,\).*use 0 to 3"),
        (dict(init_cfg=dict(type="TruncNormal", std=0.02)), r"init_cfg=.*initialise themselves"),
        (dict(pretrained="a.pth", init_cfg=dict(type="Pretrained", checkpoint="b.pth")), "both name weights"),
        (dict(pretrained=True, init_cfg=dict(type="Pretrained", checkpoint="b.pth")), "both name weights"),
    ],
)
def test_wrong_options(adapter, options, message):
    with pytest.raises(ValueError, match=message):
        adapter.ZooBackbone("vmamba_nano", **options)


def test_unknown_arguments_are_not_swallowed(adapter):
    with pytest.raises(TypeError, match="depth_of_thought"):
        adapter.ZooBackbone("vmamba_nano", depth_of_thought=3)


def test_pretrained(adapter):
    """Published weights are those of timm's builder, and mmengine does not initialise over them."""
    backbone = adapter.ZooBackbone("vim_nano.fashion_mnist", pretrained=True, out_indices=(4, 7), in_channels=1)
    expected = timm.create_model("vim_nano.fashion_mnist", pretrained=True).state_dict()
    backbone.init_weights()
    own = backbone.model.state_dict()
    assert "blocks.7.norm.weight" in own and "blocks.8.norm.weight" not in own
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def shifted(model: nn.Module) -> dict[str, Tensor]:
    """Weights that no initialisation gives."""
    return {name: t + 0.5 if t.is_floating_point() else t for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "kind, prefix", [("classifier", None), ("backbone", None), ("segmentor", "backbone."), ("safetensors", None)]
)
@pytest.mark.parametrize("name", ["vmamba_nano", "vim_micro"])
def test_init_cfg(adapter, tmp_path, name, kind, prefix):
    """Weights of a classifier, of a backbone of this class, and of what mmsegmentation saves."""
    from mmengine.model import ModuleList
    from safetensors.torch import save_file

    backbone = adapter.ZooBackbone(name, out_indices=(0, 2))
    whole = kind in ("classifier", "safetensors")
    weights = shifted(zoo.create_model(name) if whole else backbone)
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "segmentor":
        names = {f"backbone.{name}": tensor for name, tensor in weights.items()}
        torch.save({"state_dict": {**names, "decode_head.conv.weight": torch.zeros(1)}, "meta": {}}, path)
    else:
        torch.save(weights, path)
    init_cfg = dict(type="Pretrained", checkpoint=str(path), prefix=prefix)
    loaded = adapter.ZooBackbone(name, out_indices=(0, 2), init_cfg=init_cfg)
    ModuleList([loaded]).init_weights()  # as part of a larger model
    for own, tensor in loaded.state_dict().items():
        if not (whole and "norms." in own):
            key = own.removeprefix("model.") if whole else own
            torch.testing.assert_close(tensor, weights[key], rtol=0, atol=0)


def test_init_cfg_with_the_authors_segmentor(adapter, tmp_path):
    """Their names, below ``backbone.``, with norms of all four features; the model takes what it has."""
    keys = json.loads((ROOT / "tests" / "keys" / "vmamba_tiny_s1l8.json").read_text())["state_dict"]
    authors = {f"backbone.{name}": torch.rand(shape) for name, shape in keys.items() if "classifier" not in name}
    for index, width in enumerate((96, 192, 384, 768)):
        authors |= {f"backbone.outnorm{index}.{leaf}": torch.rand(width) for leaf in ("weight", "bias")}
    path = str(tmp_path / "upernet.pth")
    torch.save({"meta": {}, "state_dict": {**authors, "decode_head.conv_seg.bias": torch.rand(150)}}, path)
    init_cfg = dict(type="Pretrained", checkpoint=path, prefix="backbone.")
    backbone = adapter.ZooBackbone("vmamba_tiny_s1l8", out_indices=(1, 2), init_cfg=init_cfg)
    backbone.init_weights()
    assert list(backbone.model.feature_norms) == ["1", "2"]
    assert torch.equal(backbone.model.feature_norms["2"].weight, authors["backbone.outnorm2.weight"])
    assert torch.equal(backbone.model.stem.conv1.weight, authors["backbone.patch_embed.0.weight"])
    assert torch.equal(backbone.model.stages[2].blocks[3].norm.bias, authors["backbone.layers.2.blocks.3.norm.bias"])


def test_weights_that_do_not_fit(adapter, tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save(zoo.create_model("vmamba_nano").state_dict(), path)
    with pytest.raises(ValueError, match=r"weights.pth do not fit: \d+ missing.*model_name"):
        adapter.ZooBackbone("local_vmamba_nano", pretrained=path).init_weights()
    with pytest.raises(ValueError, match=r"no name in .* starts with prefix='backbone\.'"):
        init_cfg = dict(type="Pretrained", checkpoint=path, prefix="backbone")
        adapter.ZooBackbone("vmamba_nano", init_cfg=init_cfg).init_weights()


def segmentor(backbone: dict, channels: list[int], **options: Any) -> dict:
    """Config of a UPerNet with an auxiliary FCN head."""
    head = dict(channels=16, num_classes=150, norm_cfg=NORM, align_corners=False)
    loss = dict(type="CrossEntropyLoss", avg_non_ignore=True)
    return dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor",
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            size=(HEIGHT, WIDTH),
        ),
        backbone=backbone,
        decode_head=dict(type="UPerHead", in_channels=channels, in_index=[0, 1, 2, 3], loss_decode=loss, **head),
        auxiliary_head=dict(type="FCNHead", in_channels=channels[2], in_index=2, num_convs=1, loss_decode=loss, **head),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
        **options,
    )


@pytest.mark.parametrize("name", ["vmamba_nano", "vim_micro"])
def test_mmseg_encoder_decoder(adapter, name):
    from mmengine.registry import DefaultScope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    columnar = name == "vim_micro"
    channels = [96] * 4 if columnar else [32, 64, 128, 256]
    neck = dict(type="Feature2Pyramid", embed_dim=96, rescales=[4, 2, 1, 0.5], norm_cfg=NORM) if columnar else None
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(segmentor(dict(type="ZooBackbone", model_name=name), channels, neck=neck))
    model.init_weights()
    labels = [PixelData(data=torch.randint(0, 150, (1, HEIGHT, WIDTH))) for _ in range(2)]
    samples = [SegDataSample(gt_sem_seg=label, metainfo=dict(img_shape=(HEIGHT, WIDTH))) for label in labels]
    losses = model.loss(images(), samples)
    (losses["decode.loss_ce"] + losses["aux.loss_ce"]).backward()
    assert_all_learn(model)
    with torch.no_grad():
        logits = model.eval()(images(), mode="tensor")
    assert logits.shape[:2] == (2, 150)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """Random images and labels in the folders of ADE20K."""
    rng = np.random.default_rng(0)
    for kind, suffix, channels, values in (("images", "jpg", (3,), 256), ("annotations", "png", (), 151)):
        folder = tmp_path / "ade" / kind / "training"
        folder.mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, values, (HEIGHT + 8, WIDTH + 16, *channels), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.{suffix}")
    return tmp_path / "ade"


def test_mmengine_runner_trains_and_resumes(adapter, ade, tmp_path, monkeypatch):
    """A config file in some folder: two iterations, a checkpoint, and a third iteration from it."""
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmengine.runner import Runner

    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", reduce_zero_label=True),
        dict(type="RandomResize", scale=(WIDTH + 16, HEIGHT + 8), ratio_range=(0.9, 1.5), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(HEIGHT, WIDTH), cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    folders = dict(img_path="images/training", seg_map_path="annotations/training")
    content = dict(
        custom_imports=dict(imports=["zoo.heads.mmseg"], allow_failed_imports=False),
        default_scope="mmseg",
        model=segmentor(dict(type="ZooBackbone", model_name="vmamba_nano"), [32, 64, 128, 256]),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type="InfiniteSampler", shuffle=True),
            dataset=dict(type="ADE20KDataset", data_root=str(ade), data_prefix=folders, pipeline=pipeline),
        ),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=2),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1)),
        log_processor=dict(by_epoch=False),
        log_level="WARNING",
        work_dir=str(tmp_path / "run"),
    )
    (tmp_path / "config.py").write_text("\n".join(f"{name} = {value!r}" for name, value in content.items()))
    monkeypatch.chdir(tmp_path)
    config = Config.fromfile("config.py")
    with DefaultScope.overwrite_default_scope("mmseg"):
        runner = Runner.from_cfg(config)
        before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
        runner.train()
        trained = runner.model.backbone.model.stages[0].blocks[0]
        assert all(
            not torch.equal(p, before[f"backbone.model.stages.0.blocks.0.{n}"]) for n, p in trained.named_parameters()
        )

        config.merge_from_dict({"train_cfg.max_iters": 3, "resume": True, "experiment_name": "resumed"})
        resumed = Runner.from_cfg(config)
        resumed.train()
    assert resumed.iter == 3
    assert (tmp_path / "run" / "iter_3.pth").exists()
    assert resumed.message_hub.get_scalar("train/loss").data[0].size == 3


class Reaching:
    """Pickles as an attribute of an allowed class."""

    def __reduce__(self) -> tuple:
        return getattr, (np.ndarray, "tofile")


def test_checkpoints_reach_only_for_methods_of_histories(adapter, tmp_path):
    path = str(tmp_path / "reaching.pth")
    torch.save({"state_dict": Reaching()}, path)
    with pytest.raises(pickle.UnpicklingError, match="may not ask for the attribute 'tofile'"):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"reaching.pth holds more than weights.*zoo.load_checkpoint"):
        adapter.ZooBackbone("vmamba_nano", pretrained=path).init_weights()
