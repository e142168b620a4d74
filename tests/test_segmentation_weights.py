"""Released segmentors: the authors' names and numbers inside ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo.heads.dense_backbone import misfits
from zoo.heads.mmseg_weights import convert_mmseg_weights, load_segmentor_weights
from zoo.segmentor import create_segmentor

ROOT = Path(__file__).parents[1]
CLASSES = 5
COLUMN = dict(patch_size=16, embed_dim=32, depth=4)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The authors' weights of a small backbone, and image and features."""
    tensors = load_file(ROOT / "tests" / "goldens" / f"{name}.safetensors")
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    return state, {key: tensor for key, tensor in tensors.items() if not key.startswith("state.")}


GOLDENS = {
    "vim/dense_seg_fpn_hidden": ("vim_micro", dict(COLUMN, img_size=64)),
    "lbvim/dense_seg_posinterp_outmap": ("lbvim_nano", dict(COLUMN, img_size=64, feature_dim=24)),
    "plainmamba/l1_like_nonsquare_interp": (
        "plain_mamba_nano",
        dict(COLUMN, depth=3, img_size=64, dwconv_blocks=(0,), pairing="position", out_indices=(0, 2)),
    ),
}


@pytest.mark.parametrize("case", GOLDENS)
def test_segmentors_with_the_authors_backbones(case):
    """Their weights by their names inside a segmentor of mmsegmentation give their features."""
    name, kwargs = GOLDENS[case]
    model = create_segmentor(name, num_classes=CLASSES, channels=16, authors_layout=True, backbone_kwargs=kwargs)
    state, tensors = golden(case)
    heads = {k: t + 0.5 if t.is_floating_point() else t for k, t in model.state_dict().items() if "_head." in k}
    state = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if not key.startswith("head.")}
    weights = {f"backbone.{key}": tensor for key, tensor in state.items()}
    load_segmentor_weights(model, {**weights, **heads})
    assert torch.equal(model.decode_head.conv_seg.weight, heads["decode_head.conv_seg.weight"])
    features = model.eval().neck(model.backbone(tensors["input.image"]))
    for index, feature in enumerate(features):
        torch.testing.assert_close(feature, tensors[f"output.features{index}"], rtol=1e-4, atol=5e-5)
    load_segmentor_weights(model, model.state_dict())  # ours pass too
    del heads["decode_head.conv_seg.bias"]
    with pytest.raises(ValueError, match=r"1 missing, for example decode_head.conv_seg.bias.*authors_layout"):
        load_segmentor_weights(model, {**weights, **heads})


def norms(template: str, widths: dict[int, int]) -> dict[str, list[int]]:
    return {f"{template.format(index)}.{leaf}": [w] for index, w in widths.items() for leaf in ("weight", "bias")}


FPN = {
    **{f"fpn1.{layer}.weight": [192, 192, 2, 2] for layer in (0, 3)},
    **{f"fpn1.{layer}.bias": [192] for layer in (0, 1, 3)},
    **{f"fpn1.1.{leaf}": [192] for leaf in ("weight", "running_mean", "running_var")},
    "fpn1.1.num_batches_tracked": [],
    "fpn2.0.weight": [192, 192, 2, 2],
    "fpn2.0.bias": [192],
    "pos_embed": [1, 1024, 192],
}
STAGE_NORMS = {width: {i: width * 2**i for i in range(4)} for width in (48, 80, 96)}
QUARTERS = dict.fromkeys((5, 11, 17, 23), 192)
RELEASED = {  # names that dense models have beside those of the classifier
    "vmamba_tiny_s1l8": norms("outnorm{}", STAGE_NORMS[96]),
    "vmamba_vanilla_tiny": norms("outnorm{}", STAGE_NORMS[96]),
    "local_vmamba_tiny": norms("outnorm{}", STAGE_NORMS[96]),
    "efficient_vmamba_tiny": norms("outnorm{}", STAGE_NORMS[48]),
    "mamba_vision_t": norms("outnorm{}", STAGE_NORMS[80]),
    "local_vim_tiny": {
        **norms("outnorm_{}", dict.fromkeys((4, 9, 14, 19), 192)),
        **{f"layers.{index}.norm.bias": [192] for index in range(20)},
    },
    "lbvim_tiny_patch16_224": {
        **norms("outnorm_{}", QUARTERS),
        **{f"layers.{index}.norm.bias": [192] for index in range(24)},
    },
    "plainmamba_l1": norms("norm_layer{}", dict.fromkeys((5, 11, 17), 192)),
    "vim_tiny_patch16_224": FPN,
}


@pytest.mark.parametrize("name", RELEASED)
def test_names_of_released_segmentors(name):
    """All names and shapes of a released classifier and of what the authors add for segmentation find their places."""
    keys = json.loads((ROOT / "tests" / "keys" / f"{name}.json").read_text())["state_dict"]
    unused = ("head.", "classifier.head", "classifier.norm", "cls_token", "rope.")
    shapes = {key.removeprefix("backbone."): shape for key, shape in keys.items() if not key.startswith(unused)}
    with torch.device("meta"):
        weights = {f"backbone.{key}": torch.empty(shape) for key, shape in {**shapes, **RELEASED[name]}.items()}
        size = 512 if name.startswith("vim") else None
        model = create_segmentor(name, authors_layout=True, img_size=size)
    weights |= {key: t for key, t in model.state_dict().items() if "_head." in key}
    assert misfits(convert_mmseg_weights(weights, model), model.state_dict()) == []
    dropped = {key: t for key, t in weights.items() if "norm_layer5." not in key and "outnorm" not in key}
    if len(dropped) < len(weights):
        with pytest.raises(ValueError, match="the weights norm the features"):
            convert_mmseg_weights(dropped, model)


def test_weights_that_belong_to_no_segmentor():
    model = create_segmentor("vim_micro", num_classes=CLASSES, channels=16, backbone_kwargs=COLUMN)
    with pytest.raises(ValueError, match=r"no name starts with 'backbone.'.*blocks"):
        load_segmentor_weights(model, {"blocks.0.weight": torch.zeros(1)})
