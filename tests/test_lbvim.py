"""LBVim: what alternating directions and windows compute, the attention pool, any size."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

import zoo
from zoo.backbones.layers.mamba import local_window
from zoo.backbones.lbvim import LBVim, checkpoint_filter_fn, from_upstream

KEYS = Path(__file__).parent / "keys"
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_classes=5)
ATTN = dict(global_pool="attn", pool_heads=4)
OPTIONS = {
    "published": dict(),
    "attention": ATTN,
    "even_depth": dict(depth=2),
    "fixed_window": dict(window=16, norm_layer="layernorm"),
    "plain": dict(window=1, alternate=False, residual_in_fp32=False),
    "token": dict(class_token="middle", global_pool="token"),
    "attention_beside_token": dict(class_token="first", **ATTN),
    "tokenwise": dict(global_pool=""),
    "shuffled": dict(layer_shuffle=1.0),
}
DENSE = dict(feature_norms=(0, 2), feature_dim=12, feature_source="mixer")


def make(**options) -> LBVim:
    torch.manual_seed(0)
    return LBVim(**{**TINY, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1)
    model(torch.randn(3, 3, 32, 32)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [(97, 131), (40, 24), (5, 17)])
def test_any_image_size(options, size):
    model = make(**options).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits = model(image)
        model.set_input_size(img_size=size)
        torch.testing.assert_close(model(image), logits)  # resampled once or at every call


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("options", [dict(depth=3), dict(depth=4), dict(depth=3, window=16)])
def test_alternating_directions_equal_flipping_the_stream_after_every_layer(options):
    """The authors' way: every mixer reads forwards, and the tokens are flipped. 35 tokens do not fill windows of 4."""
    model = make(**options, num_classes=0).eval()
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(image, source="mixer")
        stream, _ = model.embed(image)
        forwards = make(**options, alternate=False, num_classes=0)
        forwards.load_state_dict(model.state_dict())
        for index, block in enumerate(forwards.blocks):
            update = block(stream)
            in_raster_order = update.flip(1) if index % 2 else update
            torch.testing.assert_close(maps[index].flatten(2).transpose(1, 2), in_raster_order)
            stream = (stream + update).flip(1)
        final = model.norm(stream)
    torch.testing.assert_close(tokens, final.flip(1) if model.depth % 2 else final)


def test_window_follows_the_length_unless_given():
    chosen = make().eval()
    with torch.no_grad():
        for size, window in (((32, 32), 4), ((104, 80), 8), ((136, 128), 16)):
            image = torch.randn(1, 3, *size)
            assert local_window(size[0] * size[1] // 64) == window
            logits = chosen(image)
            for given in (4, 8, 16):
                fixed = make(window=given).eval()
                assert torch.equal(fixed(image), logits) is (given == window)


def test_attention_pool_is_a_softmax_of_the_latent_over_the_tokens():
    model = make(**ATTN).eval()
    tokens = torch.randn(2, 7, 32)
    attention, norm = model.attn_pool, model.pool_norm
    keys, values = attention.kv(tokens).unflatten(-1, (2, 4, 8)).unbind(2)  # (B, L, heads, channels of a head)
    query = attention.latent.view(4, 8)
    weights = (torch.einsum("hc,blhc->bhl", query, keys) / 8**0.5).softmax(-1)
    pooled = torch.einsum("bhl,blhc->bhc", weights, values).flatten(1)
    expected = (pooled - pooled.mean(-1, keepdim=True)) / (pooled.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.pool(tokens), expected * norm.weight + norm.bias)
    assert attention.latent.std() < 2 * 32**-0.5 and attention.latent.any()


def test_classifier_and_pool_can_be_replaced():
    model = make(**ATTN).to(torch.bfloat16).eval()
    images = torch.randn(2, 3, 32, 32).bfloat16()
    latent = model.attn_pool.latent
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.attn_pool.latent is latent
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, 32) and model.attn_pool is None and model.pool_norm is None
    model.reset_classifier(3, "attn")
    assert model(images).shape == (2, 3) and model.attn_pool.kv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_intermediates_agree_with_forward(options):
    model = make(**options).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = model.forward_features(images)
        final, features = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(final, tokens)
    assert [f.shape for f in features] == [(2, 32, 4, 6)] * model.depth
    torch.testing.assert_close(features[-1].flatten(2).transpose(1, 2), model.split_tokens(tokens)[0])


def test_features_of_the_dense_model_are_mapped_and_normed_updates():
    model = make(**DENSE).eval()
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        features = model.forward_intermediates(images, intermediates_only=True)
        _, updates = make().eval().forward_intermediates(images, source="mixer")
        for index, (feature, update) in enumerate(zip(features, updates, strict=True)):
            if index in DENSE["feature_norms"]:
                parts = model.feature_norms[str(index)]
                update = parts.norm(parts.map(update.movedim(1, -1))).movedim(-1, 1)
            torch.testing.assert_close(feature, update)
        streams = model.forward_intermediates(images, source="stream", intermediates_only=True)
        _, expected = make().eval().forward_intermediates(images)
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in model.feature_info] == [12, 32, 12]
    torch.testing.assert_close(streams[1], expected[1])


def test_dense_features_through_timm():
    options = dict(depth=4, embed_dim=32, out_indices=(1, 2), feature_norms=(1, 2, 3), feature_source="mixer")
    model = timm.create_model("lbvim_nano", features_only=True, feature_dim=24, **options)
    features = model(torch.randn(1, 3, 20, 28))
    assert [f.shape for f in features] == [(1, 24, 10, 14)] * 2
    assert model.feature_info.channels() == [24, 24]
    assert all(torch.isfinite(f).all() and abs(f.mean()) < 1e-5 for f in features)
    norms = [name.split(".")[2] for name in model.state_dict() if "feature_norms" in name]
    assert set(norms) == {"1", "2"}


def test_authors_dense_checkpoint_loads():
    published = dict(if_abs_pos_embed=True, final_pool_type="mean", depth=2, embed_dim=16, img_size=32, patch_size=8)
    model = from_upstream({**published, "out_indices": [0, 1], "out_dim": 8})
    state = {n: torch.randn_like(t) for n, t in model.state_dict().items()}
    theirs = {re.sub(r"^feature_norms\.(\d)\.map\.", r"out_map_\1.", n): t for n, t in state.items()}
    theirs = {re.sub(r"^feature_norms\.(\d)\.norm\.", r"outnorm_\1.", n): t for n, t in theirs.items()}
    assert {"out_map_0.bias", "outnorm_1.weight"} <= set(theirs)
    zoo.load_into(model, theirs)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not [n for n in state if n.startswith(("head", "norm"))]
    same_width = from_upstream({**published, "out_indices": [1], "out_dim": 16})
    assert [n for n in same_width.state_dict() if "map" in n] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = LBVim(**{**TINY, **options})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, msg=name)


def test_weight_decay_spares_the_latent():
    model = make(**ATTN)
    exempt = model.no_weight_decay()
    assert {"attn_pool.latent", "pos_embed", "blocks.2.mixer.A_log"} <= exempt <= set(dict(model.named_parameters()))
    assert "attn_pool.latent" not in make().no_weight_decay()


def upstream_state(name):
    """Random weights under the authors' names, with ``layers`` cut to the first."""
    spec = json.loads((KEYS / f"{name}.json").read_text())["state_dict"]
    return {n: torch.randn(s) for n, s in spec.items() if not n.startswith("layers.") or n.startswith("layers.0.")}


def test_authors_checkpoint_loads_with_and_without_its_head():
    state = upstream_state("lbvim_528_patch16_224_atthead")
    options = dict(depth=1, checkpoint_path=None)
    model = zoo.create_model("lbvim_528_patch16_224_atthead", **options)
    zoo.load_into(model, {"model": state})
    assert torch.equal(model.attn_pool.latent, state["head.0.latent"])
    assert torch.equal(model.pool_norm.bias, state["head.0.post_norm.bias"])
    assert torch.equal(model.head.weight, state["head.1.weight"])
    assert torch.equal(model.blocks[0].mixer.conv_weight[0], state["layers.0.mixer.conv1d.weight"][:, 0])
    headless = zoo.create_model("lbvim_528_patch16_224_atthead", num_classes=0, global_pool="avg", **options)
    zoo.load_into(headless, state)
    zoo.load_into(headless, model.state_dict())  # and from our own names
    assert torch.equal(headless.blocks[0].mixer.A_log, model.blocks[0].mixer.A_log)


def test_checkpoint_of_another_size_is_resampled():
    state = make().state_dict()
    larger = make(img_size=(48, 64))
    fitted = checkpoint_filter_fn(state, larger)
    assert fitted["pos_embed"].shape == larger.pos_embed.shape == (1, 48, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=5), "window=5"),
        (dict(window=0), "window=0"),
        (dict(global_pool="attention"), "'attn'"),
        (dict(global_pool="attn", pool_heads=5), "pool_heads=5 does not divide embed_dim=32"),
        (dict(global_pool="token"), "needs a class token"),
        (dict(feature_norms=(1, 3)), r"feature_norms=\(1, 3\) names a block that is not among the 3"),
        (dict(feature_source="residual"), "feature_source='residual'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(if_new_trick=True), "if_new_trick"),
        (dict(bimamba_type="v2", lbm=True), "bimamba_type='v2': two-way scans"),
        (dict(last_n_layer_vim=2), "last_n_layer_vim"),
        (dict(if_cls_token=True), "class tokens"),
        (dict(if_abs_pos_embed=False), "position embedding"),
        (dict(final_pool_type="max"), "'mean'"),
        (dict(head_type="mlp"), "head_type='mlp'"),
    ],
)
def test_upstream_arguments_are_checked(kwargs, message):
    published = dict(if_abs_pos_embed=True, final_pool_type="mean", depth=1, embed_dim=16)
    with pytest.raises(ValueError, match=message):
        from_upstream({**published, **kwargs})
