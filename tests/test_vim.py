"""Vim: every option trains, any image size runs, and the hot path copies nothing."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.backbones.layers.class_token import insert_class_tokens, split_class_tokens
from zoo.backbones.layers.mamba import MambaMixer, local_window
from zoo.backbones.layers.position import resample_pos_embed
from zoo.backbones.vim import VisionMamba, checkpoint_filter_fn, from_upstream
from zoo.heads.rescale_pyramid import RescalePyramid

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_classes=5)

OPTIONS = {
    "released": dict(),
    "overlapping": dict(stride=4),
    "first_token": dict(class_token="first", rope=True),
    "both_tokens": dict(class_token="both", rope=True, rope_residual=False),
    "middle_token_rope": dict(rope=True),
    "middle_token_rope_as_authors": dict(rope=True, rope_class_first=True),
    "average": dict(class_token=None, global_pool="avg"),
    "average_beside_token": dict(global_pool="avg"),
    "last": dict(class_token=None, global_pool="last"),
    "max_logit": dict(class_token=None, global_pool="max_logit", merge="sum"),
    "shared": dict(directions="shared", merge="sum", layer_scale=0.1),
    "forward": dict(directions="forward", norm_layer="layernorm", residual_in_fp32=False),
    "pairs": dict(directions="forward", paired_blocks=True, class_token=None, global_pool="avg", rope=True),
    "pairs_of_two_ways": dict(paired_blocks=True),
    "alternating": dict(directions="forward", alternate=True, lb_window=None),
    "windows": dict(lb_window=4),
    "shuffled": dict(layer_shuffle=1.0, shuffle_per_sample=True),
    "no_positions": dict(pos_embed=False, d_state=4, d_conv=3, expand=1, dt_rank=3),
}


def make(**options) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(**{**TINY, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
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


def test_large_non_square_image():
    model = make(embed_dim=16, depth=1).eval()
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(1, 3, 192, 320))
    assert tokens.shape == (1, 24 * 40 + 1, 16)


def test_margin_is_padded_or_ignored():
    image = torch.randn(1, 3, 37, 37)
    padded, cut = make(), make(img_size=37, pad_input=False)
    assert padded.forward_features(image).shape[1] == 5 * 5 + 1
    assert cut.forward_features(image).shape[1] == 4 * 4 + 1
    cut.load_state_dict(padded.state_dict())
    torch.testing.assert_close(cut(image), padded(image[..., :32, :32]))


def test_fixed_size_is_enforced():
    model = make(dynamic_img_size=False)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(AssertionError, match="set_input_size"):
        model(torch.randn(1, 3, 40, 32))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("place", ["middle", "first", "both", None])
@pytest.mark.parametrize("patches", [1, 8, 9])
def test_class_tokens_go_in_and_come_out(place, patches):
    count = {"both": 2, None: 0}.get(place, 1)
    tokens, extra = torch.randn(2, patches, 4), torch.randn(2, count, 4)
    together = insert_class_tokens(tokens, extra, place)
    assert together.shape == (2, patches + count, 4)
    if place == "middle":
        assert torch.equal(together[:, patches // 2], extra[:, 0])
    for got, expected in zip(split_class_tokens(together, place), (tokens, extra), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("place", ["middle", "first", "both"])
def test_resampling_keeps_class_rows(place):
    rows = 2 if place == "both" else 1
    patches, classes = torch.ones(1, 16, 8), torch.full((1, rows, 8), 7.0)
    resampled = resample_pos_embed(insert_class_tokens(patches, classes, place), (4, 4), (5, 7), place)
    got_patches, got_classes = split_class_tokens(resampled, place)
    torch.testing.assert_close(got_patches, torch.ones(1, 35, 8))
    assert torch.equal(got_classes, classes)


def test_pooling_choices():
    images = torch.randn(2, 3, 32, 32)
    model = make(global_pool="")
    tokens = model.forward_features(images)
    assert model(images).shape == (2, 17, 5)
    expected = {
        "token": tokens[:, 8],
        "last": tokens[:, -1],
        "avg": torch.cat([tokens[:, :8], tokens[:, 9:]], dim=1).mean(1),
    }
    for pool, feature in expected.items():
        model.reset_classifier(5, pool)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), feature)
        torch.testing.assert_close(model(images), model.head(feature))
    model.reset_classifier(5, "max_logit")
    torch.testing.assert_close(model(images), model.head(tokens).amax(1))


def test_two_class_tokens_are_averaged():
    model = make(class_token="both")
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(model.pool(tokens), (tokens[:, 0] + tokens[:, -1]) / 2)


def test_sixteen_bit_model_keeps_a_float32_stream():
    model = make(depth=4).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    streams = []
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.blocks[2].register_forward_hook(lambda block, args, output: streams.append((args[0].dtype, output.dtype)))
    logits = half(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    assert streams == [(torch.float32, torch.bfloat16)]
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_intermediates_agree_with_forward(options):
    model = make(**options).eval()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = model.forward_features(images)
        final, features = model.forward_intermediates(images, norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(final, tokens)
    patches, classes = split_class_tokens(tokens, model.class_token)
    torch.testing.assert_close(features[-1][0].flatten(2).transpose(1, 2), patches)
    torch.testing.assert_close(features[-1][1], classes)
    assert len(features) == len(model.feature_info)


def test_intermediates_source_and_format():
    model = make(depth=3).eval()
    images = torch.randn(1, 3, 32, 32)
    streams = model.forward_intermediates(images, intermediates_only=True)
    updates = model.forward_intermediates(images, intermediates_only=True, source="mixer")
    torch.testing.assert_close(streams[2] - streams[1], updates[2], rtol=1e-4, atol=1e-5)
    flat = model.forward_intermediates(images, [0], intermediates_only=True, output_fmt="NLC")[0]
    torch.testing.assert_close(flat.transpose(1, 2).reshape(1, 32, 4, 4), streams[0])
    with pytest.raises(ValueError, match="residual"):
        model.forward_intermediates(images, source="residual")
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_a_new_patch_size_must_keep_the_stride_whole():
    with pytest.raises(ValueError, match="patch_size=4"):
        make(stride=5).set_input_size(patch_size=4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = VisionMamba(**{**TINY, **options})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, msg=name)


def test_published_initialisation():
    mixer = MambaMixer(64)
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(2, 128, 16))
    assert (mixer.D == 1).all()


@pytest.mark.parametrize("directions", ["bidirectional", "shared", "forward"])
def test_flipped_mixer_is_the_mixer_on_flipped_tokens(directions):
    mixer, flipped = MambaMixer(16, directions=directions), MambaMixer(16, directions=directions, flipped=True)
    flipped.load_state_dict(mixer.state_dict())
    tokens = torch.randn(2, 9, 16)
    torch.testing.assert_close(flipped(tokens), mixer(tokens.flip(1)).flip(1))
    assert (flipped(tokens) - mixer(tokens)).abs().max() > 1e-4


def test_alternating_blocks_read_every_second_time_from_the_end():
    model = make(depth=3, alternate=True)
    assert [block.mixer.reverse for block in model.blocks] == [(False, True), (True, False), (False, True)]
    pairs = make(depth=4, directions="forward", alternate=True, paired_blocks=True)
    flags = [(pair.forward_block.mixer.reverse, pair.backward_block.mixer.reverse) for pair in pairs.blocks]
    assert flags == [((False,), (True,)), ((True,), (False,))]


@pytest.mark.parametrize("directions", ["bidirectional", "shared", "forward", 2])
def test_mixer_follows_a_table(directions):
    """A table of the tokens in order changes nothing; another one is followed by the scan, not by the convolution."""
    mixer = MambaMixer(16, directions=directions, d_conv=1)  # one tap: the convolution knows no neighbours
    tokens = torch.randn(2, 9, 16)
    paths = len(mixer.reverse)
    torch.testing.assert_close(mixer(tokens, torch.arange(9).expand(paths, -1)), mixer(tokens))
    order = torch.randperm(9)
    expected = mixer(tokens[:, order])[:, order.argsort()]
    torch.testing.assert_close(mixer(tokens, order.expand(paths, -1)), expected)


def test_numbered_paths_have_their_own_parameters_and_tables():
    mixer = MambaMixer(16, directions=3, merge="sum", layer_scale=None)
    tokens, tables = torch.randn(2, 6, 16), torch.stack([torch.randperm(6) for _ in range(3)])
    expected = 0
    for k in range(3):
        single = MambaMixer(16, directions=1, merge="sum")
        state = {n: p if n.endswith("proj.weight") else p[k : k + 1] for n, p in mixer.state_dict().items()}
        single.load_state_dict(state)
        expected = expected + single(tokens, tables[k : k + 1])
    torch.testing.assert_close(mixer(tokens, tables), expected)


def test_published_windows():
    assert [local_window(length) for length in (1, 128, 129, 256, 257, 5000)] == [4, 4, 8, 8, 16, 16]
    chosen, fixed = MambaMixer(16, window=None), MambaMixer(16, window=4)
    fixed.load_state_dict(chosen.state_dict())
    for length, same in ((50, True), (130, False)):
        tokens = torch.randn(1, length, 16)
        assert torch.equal(chosen(tokens), fixed(tokens)) is same


def test_window_lets_tokens_see_the_later_ones_of_their_window():
    """With one direction and windows of 4, token 5 sees all before it and tokens 6 and 7."""
    mixer = MambaMixer(8, directions="forward", d_conv=1, window=4)
    tokens = torch.randn(1, 12, 8, requires_grad=True)
    mixer(tokens)[0, 5].square().sum().backward()
    assert tokens.grad.abs().sum(-1).ne(0)[0].tolist() == [True] * 8 + [False] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(class_token="end"), "class_token='end'"),
        (dict(global_pool="max"), "global_pool='max'"),
        (dict(class_token=None), "needs a class token"),
        (dict(directions="v2"), "directions='v2'"),
        (dict(merge="max"), "merge='max'"),
        (dict(norm_layer="bn"), "norm_layer='bn'"),
        (dict(rope=True, embed_dim=30), "divisible by 4"),
        (dict(paired_blocks=True, depth=3), "even depth, got 3"),
        (dict(img_size=4, pad_input=False), "no room for a patch"),
        (dict(lb_window=6), "window=6"),
        (dict(layer_shuffle=1.5), "probability, got 1.5"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_hot_path_neither_flips_nor_copies():
    """Between its projections a mixer runs the kernels, batched products and views, nothing else."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    mixer = MambaMixer(32).eval()
    tokens = torch.randn(2, 17, 32)
    with torch.no_grad(), Recorder() as recorder:
        mixer(tokens)
    views = {"t", "view", "_unsafe_view", "transpose", "split", "split_with_sizes", "expand", "unflatten", "slice"}
    computing = [op for op in recorder.ops if op not in views | {"unsqueeze", "detach", "promote_types"}]
    expected = ["mm", "causal_conv1d", "bmm", "bmm", "exp", "neg", "selective_scan", "mm", "mul"]
    assert computing == expected


def test_released_position_embedding_fits_other_models():
    """The class row of a released checkpoint is in the middle: it is kept there, or dropped."""
    state_dict = make().state_dict()
    state_dict["pos_embed"] = torch.arange(17.0).view(1, 17, 1).expand(1, 17, 32).clone()
    larger = make(img_size=48)
    fitted = checkpoint_filter_fn(state_dict, larger)["pos_embed"]
    assert fitted.shape == larger.pos_embed.shape
    assert (fitted[:, 18] == 8).all()
    headless = make(class_token=None, global_pool="avg", num_classes=0)
    fitted = checkpoint_filter_fn(state_dict, headless)
    assert fitted["pos_embed"][0, :, 0].tolist() == [*range(8), *range(9, 17)]
    headless.load_state_dict(fitted)
    with pytest.raises(ValueError, match="15 patch rows"):
        checkpoint_filter_fn({"pos_embed": torch.zeros(1, 15, 32)}, headless)


def test_patch_projection_is_resampled_to_the_models_patch():
    fitted = checkpoint_filter_fn(make().state_dict(), make(patch_size=4, img_size=16))
    assert fitted["patch_embed.proj.weight"].shape == (32, 3, 4, 4)


def test_upstream_arguments_are_checked():
    with pytest.raises(ValueError, match="if_new_trick"):
        from_upstream("VisionMamba", dict(if_new_trick=True))
    with pytest.raises(ValueError, match="VisionMamba2"):
        from_upstream("VisionMamba2", {})
    with pytest.raises(TypeError, match="conv_layers"):
        from_upstream("VisionMamba", dict(depth=1, ssm_cfg=dict(conv_layers=2)))


def test_rescale_pyramid_levels():
    maps = [torch.randn(1, 6, 4, 8) for _ in range(4)]
    for stride, sizes in ((16, (16, 8, 4, 2)), (8, (8, 4, 2, 1))):
        levels = RescalePyramid(6, stride)(maps)
        assert [level.shape[2] for level in levels] == list(sizes)
        assert [level.shape[3] for level in levels] == [2 * size for size in sizes]
    assert len(RescalePyramid(6)(maps[:1])) == 4
    with pytest.raises(ValueError, match="got 3"):
        RescalePyramid(6)(maps[:3])
    with pytest.raises(ValueError, match="stride 14"):
        RescalePyramid(6, 14)
