"""ShuffleMamba: where class tokens and registers stand, the joined feature, any size."""

import json
from pathlib import Path

import pytest
import torch

import zoo
from zoo.backbones.shuffle_mamba import (
    ShuffleMamba,
    ShuffleMambaReg,
    checkpoint_filter_fn,
    from_upstream,
    split_registers,
    spread_registers,
)

GOLDENS = Path(__file__).parent / "goldens" / "shufflemamba"
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=5)
OPTIONS = {
    "class_token": (ShuffleMamba, dict()),
    "layernorm": (ShuffleMamba, dict(norm_layer="layernorm", residual_in_fp32=False)),
    "no_token": (ShuffleMamba, dict(class_token=None, global_pool="avg")),
    "windows": (ShuffleMamba, dict(lb_window=None, shuffle_per_sample=True)),
    "registers": (ShuffleMambaReg, dict(num_registers=3)),
    "reduced": (ShuffleMambaReg, dict(num_registers=4, register_reduce=2)),
    "reduced_layernorm": (ShuffleMambaReg, dict(num_registers=4, register_reduce=4, norm_layer="layernorm")),
    "registers_average": (ShuffleMambaReg, dict(num_registers=4, register_reduce=2, global_pool="avg")),
}


def make(name, **options) -> ShuffleMamba:
    model_class, own = OPTIONS[name]
    torch.manual_seed(0)
    return model_class(**{**TINY, **own, **options})


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_gets_a_gradient(name):
    model = make(name, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [(97, 131), (40, 24), (5, 17)])
def test_any_image_size(name, size):
    model = make(name).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits = model(image)
        model.set_input_size(img_size=size)
        torch.testing.assert_close(model(image), logits)  # resampled once or at every call


@pytest.mark.parametrize("name", OPTIONS)
def test_images_of_a_batch_do_not_mix(name):
    model = make(name).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("case", ["eval_reg_registers", "eval_reg_cls_reduce"])
def test_registers_stand_where_the_authors_put_them(case):
    spec = json.loads((GOLDENS / f"{case}.json").read_text())
    count = spec["kwargs"]["num_cls_tokens"]
    numbers = torch.arange(16.0).view(1, 16, 1), torch.arange(16.0, 16.0 + count).view(1, count, 1)
    together = spread_registers(*numbers)
    assert together.flatten().tolist() == spec["token_idx"]
    assert torch.equal(together[:, spec["cls_positions"]], numbers[1])


@pytest.mark.parametrize("patches", [1, 3, 4, 5, 12, 13, 196])
@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_registers_go_in_and_come_out(patches, count):
    tokens, registers = torch.randn(2, patches, 4), torch.randn(2, count, 4)
    together = spread_registers(tokens, registers)
    assert together.shape == (2, patches + count, 4)
    for got, expected in zip(split_registers(together, count), (tokens, registers), strict=True):
        assert torch.equal(got, expected)


def test_class_token_comes_first():
    model = make("class_token", num_classes=0).eval()
    images = torch.randn(2, 3, 40, 32)
    tokens, _ = model.embed(images)
    torch.testing.assert_close(tokens[:, 0], (model.cls_token + model.pos_embed[:, :1])[:, 0].expand(2, -1))
    torch.testing.assert_close(model(images), model.forward_features(images)[:, 0])


def test_feature_joins_the_registers():
    images = torch.randn(2, 3, 32, 32)
    plain = make("registers").eval()
    tokens = plain.forward_features(images)
    torch.testing.assert_close(plain.forward_head(tokens, pre_logits=True), tokens[:, [4, 9, 14]].flatten(1))
    reduced = make("reduced").eval()
    tokens = reduced.forward_features(images)
    joined = torch.cat([tokens[:, i] @ reduced.neck.weight.T for i in (3, 7, 11, 15)], dim=1)
    expected = joined * torch.rsqrt(joined.square().mean(1, keepdim=True) + 1e-5) * reduced.norm_neck.weight
    torch.testing.assert_close(reduced.pool(tokens), expected)
    assert reduced.head_hidden_size == reduced.head.in_features == expected.shape[1] == 64


def test_classifier_and_pool_can_be_replaced():
    model = make("reduced").to(torch.bfloat16).eval()
    images = torch.randn(2, 3, 32, 32).bfloat16()
    neck = model.neck
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.neck is neck
    model.reset_classifier(0)
    assert model(images).shape == (2, 64) == (2, model.head_hidden_size)
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, 32) and model.neck is None and model.norm_neck is None
    model.reset_classifier(3, "token")
    assert model(images).shape == (2, 3) and model.neck.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", OPTIONS)
def test_intermediates_agree_with_forward(name):
    model = make(name).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = model.forward_features(images)
        final, features = model.forward_intermediates(images, norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(final, tokens)
    patches, extra = model.split_tokens(tokens)
    assert features[-1][0].shape == (2, 32, 4, 6)
    torch.testing.assert_close(features[-1][0].flatten(2).transpose(1, 2), patches)
    torch.testing.assert_close(features[-1][1], extra)


@pytest.mark.parametrize("name", OPTIONS)
def test_meta_model_is_initialised_after_to_empty(name):
    with torch.device("meta"):
        model = make(name)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(name).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, msg=name)


def test_weight_decay_spares_the_registers():
    model = make("reduced")
    names = set(dict(model.named_parameters()))
    assert {"cls_token", "pos_embed", "pos_embed_cls", "blocks.1.mixer.D"} <= model.no_weight_decay() <= names


def test_checkpoint_fits_other_sizes_and_models_without_tokens():
    """The class row of ours and of the authors' checkpoints comes first: it is kept there, or dropped."""
    state = make("class_token").state_dict()
    state["pos_embed"] = torch.arange(17.0).view(1, 17, 1).expand(1, 17, 32).clone()
    larger = make("class_token", img_size=48)
    fitted = checkpoint_filter_fn(state, larger)["pos_embed"]
    assert fitted.shape == larger.pos_embed.shape and (fitted[:, 0] == 0).all() and (fitted[:, 1:] >= 0.4).all()
    dense = make("no_token", num_classes=0)
    fitted = checkpoint_filter_fn(state, dense)
    assert fitted["pos_embed"][0, :, 0].tolist() == [*range(1, 17)]
    dense.load_state_dict(fitted)


def test_register_checkpoint_fits_other_sizes_and_poolings(monkeypatch):
    state = make("reduced").state_dict()
    larger = make("reduced", img_size=(48, 64))
    zoo.load_into(larger, state)
    assert larger.pos_embed.shape == (1, 48, 32)
    assert torch.equal(larger.pos_embed_cls, state["pos_embed_cls"])
    zoo.load_into(make("registers_average", num_classes=0), state)
    monkeypatch.setattr("zoo.backbones.FAMILIES", ("shuffle_mamba",))  # asking all what fits takes its time
    with pytest.raises(ValueError, match="norm_neck"):
        zoo.load_into(make("reduced"), {name: t for name, t in state.items() if name != "norm_neck.weight"})


def test_models_shuffle_as_published():
    assert zoo.create_model("shufflemamba_small_patch16_224", device="meta").layer_shuffle.rate == 0.5
    assert zoo.create_model("shufflemamba_reg_small_patch16_224", device="meta").layer_shuffle.rate == 0.1
    assert zoo.create_model("shuffle_mamba_nano", device="meta").layer_shuffle.rate == 0.1  # ours


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("class_token", dict(class_token="end"), "class_token='end'"),
        ("class_token", dict(layer_shuffle=-1), "probability, got -1"),
        ("registers", dict(num_registers=0), "num_registers=0"),
        ("reduced", dict(register_reduce=3), "register_reduce=3 must divide num_registers=4"),
        ("reduced", dict(embed_dim=33), "embed_dim=33"),
        ("reduced", dict(global_pool="max"), "global_pool='max'"),
    ],
)
def test_bad_arguments_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)


def test_upstream_arguments_are_checked():
    with pytest.raises(ValueError, match="if_new_trick"):
        from_upstream("models_reg.py:VisionMamba", dict(if_new_trick=True))
    with pytest.raises(ValueError, match="models_other"):
        from_upstream("models_other.py:VisionMamba", {})
