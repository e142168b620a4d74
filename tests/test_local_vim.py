"""LocalVim: every option trains, any image size runs, routes lead where they should."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.backbones.layers.class_token import split_class_tokens
from zoo.backbones.local_vim import LocalMixer, LocalVim, checkpoint_filter_fn, from_upstream
from zoo.backbones.scans.local import local_order
from zoo.kernels import selective_scan

DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w3", "w3_flip")
TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, directions=(DIRECTIONS[:4], DIRECTIONS[4:]))
TINY |= dict(num_classes=5)

OPTIONS = {
    "rope": dict(rope=True),
    "class_token": dict(class_token=True, global_pool="token"),
    "class_token_rope": dict(class_token=True, rope=True, global_pool="", norm_layer="layernorm"),
    "average_beside_token": dict(class_token=True, residual_in_fp32=False),
    "windows": dict(lb_window=4, directions=(("w3_flip",), ("v", "w2"))),
    "shuffled": dict(layer_shuffle=1.0),
    "small_parts": dict(d_state=8, d_conv=3, expand=1, dt_rank=3, feature_norms=(1,)),
}
SIZES = [(97, 131), (40, 24), (5, 17)]


def make(**options) -> LocalVim:
    torch.manual_seed(0)
    return LocalVim(**{**TINY, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1)
    tokens, features = model.forward_intermediates(torch.randn(3, 3, 32, 32))
    logits = model.forward_head(tokens)
    assert logits.shape[-1] == 5 and logits.dim() == (3 if options.get("global_pool") == "" else 2)
    (logits.square().sum() + features[1].square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(options, size):
    model = make(**options).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits, (feature,) = model(image), model.forward_intermediates(image, 1, intermediates_only=True)
        assert feature.shape == (1, 32, -(-size[0] // 8), -(-size[1] // 8))
        if not options.get("rope"):  # rotary tables are those of the model's own size
            model.set_input_size(img_size=size)
            torch.testing.assert_close(model(image), logits)  # resampled once or at every call


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 4), (3, 5), (6, 3), (5, 1)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_orders_visit_every_token_once(direction, grid, class_token):
    order = local_order(direction, *grid, class_token)
    tokens = grid[0] * grid[1]
    assert sorted(order.tolist()) == list(range(len(order)))
    if class_token:
        assert order[tokens // 2] == tokens // 2
        order = torch.cat([order[: tokens // 2], order[tokens // 2 + 1 :]])
        order = order - (order > tokens // 2).long()
    flipped = direction.removesuffix("_flip") if direction.endswith("_flip") else f"{direction}_flip"
    opposite = local_order(flipped, *grid)
    cells, opposite_cells = order[order < tokens], opposite[opposite < tokens]
    assert torch.equal(cells, opposite_cells.flip(0))
    padding = order[order >= tokens]
    assert torch.equal(padding, torch.arange(tokens, len(order)))


def test_orders_of_a_small_grid():
    expected = {
        "h": [0, 1, 2, 3, 4, 5],
        "v": [0, 3, 1, 4, 2, 5],
        "v_flip": [5, 2, 4, 1, 3, 0],
        "w2": [0, 1, 3, 4, 2, 6, 5, 7],
        "w2_flip": [6, 5, 7, 2, 4, 3, 1, 0],
    }
    assert {direction: local_order(direction, 2, 3).tolist() for direction in expected} == expected
    assert local_order("v_flip", 2, 3, class_token=True).tolist() == [6, 2, 5, 3, 1, 4, 0]


def make_mixer(directions, dim=8, **options) -> LocalMixer:
    """A mixer with parameters large enough for the scans to matter beside the skip connection."""
    torch.manual_seed(0)
    mixer = LocalMixer(dim, directions, d_state=3, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def walk_by_hand(mixer: LocalMixer, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The mixer with padded and reordered copies, direction by direction, as the paper and the authors describe it."""
    length, total = x.shape[1], 0
    xz = mixer.in_proj(x)
    for k, direction in enumerate(mixer.directions):
        order = local_order(direction, *grid, mixer.class_token)
        padded = F.pad(xz, (0, 0, 0, len(order) - length))
        u, z = padded[:, order].chunk(2, dim=-1)
        taps = mixer.conv_weight.shape[-1]
        u = F.pad(u.transpose(1, 2), (taps - 1, 0))
        u = F.silu(F.conv1d(u, mixer.conv_weight[k].unsqueeze(1), mixer.conv_bias[k], groups=u.shape[1]))
        u = u.transpose(1, 2).contiguous()
        projected, rank = u @ mixer.x_proj_weight[k].t(), mixer.dt_proj_weight.shape[-1]
        dt, B, C = projected[..., :rank], *projected[..., rank:].chunk(2, dim=-1)
        delta, A = dt @ mixer.dt_proj_weight[k].t(), -mixer.A_log[k].exp()
        bias, window = mixer.dt_bias[k], mixer.lb_window
        y = selective_scan(u, delta, A, B, C, mixer.D[k], z, bias, delta_softplus=True, window=window)
        y = torch.zeros_like(y).index_copy(1, order, y)[:, :length]
        total = total + y * mixer.attention(y)
    return mixer.out_proj(total)


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (5, 2), (1, 6), (1, 1)])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("lb_window", [1, 4])
def test_mixer_equals_the_definition(grid, class_token, lb_window):
    mixer = make_mixer(DIRECTIONS, class_token=class_token, lb_window=lb_window)
    x = torch.randn(2, grid[0] * grid[1] + class_token, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for run in (mixer, lambda *args: walk_by_hand(mixer, *args)):
        y = run(x, grid)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("directions", "same", "change"),
    [
        (("v", "w2_flip"), ("h", "w2_flip"), None),
        (("v", "v_flip"), ("h", "h_flip"), lambda x: x.transpose(1, 2)),
        (("h_flip", "v_flip", "w2_flip"), ("h", "v", "w2"), lambda x: x.flip(1, 2)),
        (("w1", "w1_flip", "w6"), ("h", "h_flip", "h"), lambda x: x),
    ],
)
def test_directions_on_a_changed_image(directions, same, change):
    """Columns are rows of the transposed image, flips are scans of the turned image, on any grid."""
    mixer, other = make_mixer(directions), make_mixer(same)
    image = torch.randn(2, 6, 6, 8, dtype=torch.float64) if "w6" in directions else torch.randn(2, 4, 6, 8).double()

    def run(mixer: LocalMixer, image: torch.Tensor) -> torch.Tensor:
        return mixer(image.flatten(1, 2), image.shape[1:3]).view(image.shape)

    if change is None:
        assert (run(mixer, image) - run(other, image)).abs().max() > 1e-2
    else:
        torch.testing.assert_close(run(mixer, image), change(run(other, change(image))))


def test_hot_path_copies_only_for_the_convolution_off_the_rows():
    """Rows need no reordering at all; the other orders one look-up before and one after the convolution."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for directions, lookups in ((("h", "h_flip"), 0), (("h", "h_flip", "v", "w2_flip"), 4)):
        mixer = LocalMixer(32, directions).eval()
        tokens = torch.randn(2, 16, 32)
        mixer(tokens, (4, 4))  # makes the tables
        with torch.no_grad(), Recorder() as recorder:
            mixer(tokens, (4, 4))
        copies = {"flip", "index", "gather", "clone", "copy_", "_to_copy", "cat", "roll", "stack", "pad"}
        assert copies.isdisjoint(recorder.ops)
        assert recorder.ops.count("index_select") == lookups
        assert recorder.ops.count("selective_scan") == len(directions)


def test_sixteen_bit_model_keeps_a_float32_stream():
    model = make(rope=True).eval()
    images = torch.randn(2, 3, 32, 48)
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
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64


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
    assert len(features) == len(model.feature_info) == 3


def test_intermediates_source_and_format():
    model = make(feature_norms=(1,)).eval()
    images = torch.randn(1, 3, 32, 32)
    streams = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    updates = model.forward_intermediates(images, intermediates_only=True, source="mixer")
    flat = model.forward_intermediates(images, [1], intermediates_only=True, output_fmt="NLC", source="mixer")[0]
    torch.testing.assert_close(flat.transpose(1, 2).reshape(1, 32, 4, 4), updates[1])
    assert (flat.mean(-1).abs() < 1e-5).all()  # its own norm
    bare = make().eval()
    bare.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("feature_norms")})
    second = bare.forward_intermediates(images, [1], intermediates_only=True)[0]
    torch.testing.assert_close(streams[1] - second, updates[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="residual"):
        model.forward_intermediates(images, source="residual")
    with pytest.raises(ValueError, match="NHWC"):
        model.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = LocalVim(**{**TINY, **options})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        if tensor.numel() >= 64:  # enough of a sample
            torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, msg=name)


def test_initial_step_sizes():
    step = F.softplus(LocalMixer(64, DIRECTIONS).dt_bias)
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="max"), "global_pool='max'"),
        (dict(global_pool="token"), "needs a class token"),
        (dict(directions=(("h", "w0"),)), "direction 'w0'"),
        (dict(directions=("h", "v")), "one for every block"),
        (dict(directions=((),)), "one for every block"),
        (dict(lb_window=3), "lb_window=3"),
        (dict(norm_layer="bn"), "norm_layer='bn'"),
        (dict(rope=True, embed_dim=30), "divisible by 4"),
        (dict(feature_norms=(3,)), r"feature_norms=\(3,\)"),
        (dict(layer_shuffle=2), "got 2"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_checkpoint_of_another_size_fits():
    state_dict = make(class_token=True).state_dict()
    larger = make(img_size=(48, 64), class_token=True, num_classes=0)
    fitted = checkpoint_filter_fn({"state_dict": state_dict}, larger)
    assert fitted["pos_embed"].shape == (1, 49, 32)
    larger.load_state_dict(fitted)
    with pytest.raises(ValueError, match="15 patch rows"):
        checkpoint_filter_fn({"pos_embed": torch.zeros(1, 15, 32)}, make())


def test_norms_of_the_authors_dense_models_load():
    model = make(feature_norms=(1,), num_classes=0)
    theirs = {
        "layers.0.norm.weight": torch.ones(32),
        "outnorm_1.weight": torch.ones(32),
        "norm_f.weight": torch.ones(32),
    }
    assert set(checkpoint_filter_fn(theirs, model)) == {"blocks.0.norm.weight", "feature_norms.1.weight", "norm.weight"}


def test_upstream_arguments_are_checked():
    directions = [["h", "v"]]
    with pytest.raises(ValueError, match="if_new_trick"):
        from_upstream("VisionMamba", dict(if_new_trick=True, directions=directions, final_pool_type="mean"))
    with pytest.raises(ValueError, match="if_rope_residual must be True"):
        from_upstream("VisionMamba", dict(if_rope=True, if_rope_residual=False, directions=directions))
    with pytest.raises(ValueError, match="final_pool_type='max'"):
        from_upstream("VisionMamba", dict(final_pool_type="max", directions=directions))
    with pytest.raises(ValueError, match="VisionMamba2"):
        from_upstream("VisionMamba2", {})
