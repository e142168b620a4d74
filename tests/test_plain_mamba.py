"""PlainMamba: every option trains, any image size runs, the scans see what they should."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.backbones.plain_mamba import PlainMamba, SnakeMixer, checkpoint_filter_fn, from_upstream
from zoo.backbones.scans.snake import snake, snake_moves
from zoo.kernels import selective_scan

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, stem_width=16, num_classes=5)

OPTIONS = {
    "released": dict(dwconv_blocks=(0,)),
    "token_pairing": dict(pairing="token", stem_convs=2),
    "windows": dict(lb_window=4),
    "shuffled": dict(layer_shuffle=1.0),
    "small_parts": dict(stem_convs=0, d_state=8, conv_size=3, expand=1, dt_rank=3, feature_norms=(1,)),
    "per_token": dict(global_pool="", patch_size=4),
}
SIZES = [(97, 131), (40, 24), (5, 17)]


def make(**options) -> PlainMamba:
    torch.manual_seed(0)
    return PlainMamba(**{**TINY, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1)
    images = torch.randn(3, 3, 32, 32)
    tokens, features = model.forward_intermediates(images)
    logits = model.forward_head(tokens)
    assert logits.shape[-1] == 5 and logits.dim() == (3 if options.get("global_pool") == "" else 2)
    (logits.square().sum() + features[1].square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(options, size):
    model = make(**options).eval()
    image = torch.randn(1, 3, *size)
    patch = model.patch_embed.patch_size
    with torch.no_grad():
        logits, (feature,) = model(image), model.forward_intermediates(image, 1, intermediates_only=True)
        assert feature.shape == (1, 32, -(-size[0] // patch), -(-size[1] // patch))
        model.set_input_size(size)
        torch.testing.assert_close(model(image), logits)  # resampled once or at every call


def test_large_non_square_image():
    model = make(embed_dim=16, depth=1).eval()
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 192, 320)).shape == (1, 24 * 40, 16)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def make_mixer(**options) -> SnakeMixer:
    """A mixer with parameters large enough for the scans to matter beside the skip connection."""
    torch.manual_seed(0)
    mixer = SnakeMixer(8, d_state=3, conv_size=3, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def walk_by_hand(mixer: SnakeMixer, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The mixer with reordered copies, path by path and in scan order, as the paper and the authors describe it."""
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    image = x.transpose(1, 2).reshape(len(x), -1, *grid)
    convolved = F.conv2d(image, *mixer.conv.parameters(), padding=mixer.conv.padding, groups=image.shape[1])
    u = F.silu(convolved).flatten(2).transpose(1, 2).contiguous()
    total = torch.zeros_like(u)
    for path, moves in zip(snake(*grid), snake_moves(*grid), strict=True):
        walked = u[:, path]
        dt, B, C = mixer.x_proj(u if mixer.pairing == "position" else walked).split(mixer.splits, dim=-1)
        delta, A, B = mixer.dt_proj(dt), -mixer.A_log.exp(), B + mixer.direction_B[moves]
        window = mixer.lb_window
        y = selective_scan(walked, delta, A, B, C, mixer.D, None, mixer.dt_bias, delta_softplus=True, window=window)
        total[:, path] += y
    return mixer.out_proj(total * F.silu(z))


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (5, 2), (1, 6), (6, 1), (1, 1)])
@pytest.mark.parametrize("pairing", ["position", "token"])
@pytest.mark.parametrize("lb_window", [1, 4])
def test_mixer_equals_the_definition(grid, pairing, lb_window):
    mixer = make_mixer(pairing=pairing, lb_window=lb_window)
    x = torch.randn(2, grid[0] * grid[1], 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for run in (mixer, lambda *args: walk_by_hand(mixer, *args)):
        y = run(x, grid)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


def test_pairings_differ():
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    position, token = (make_mixer(pairing=pairing)(x, (3, 4)) for pairing in ("position", "token"))
    assert (position - token).abs().max() > 1e-2


def test_transposed_image_with_transposed_parameters():
    """Rows and columns are treated alike: only the names of the moves differ."""
    mixer, transposed = make_mixer(pairing="token"), make_mixer(pairing="token")
    state_dict = mixer.state_dict()
    state_dict["conv.weight"] = state_dict["conv.weight"].transpose(2, 3)
    state_dict["direction_B"] = state_dict["direction_B"][[0, 4, 3, 2, 1]]  # right and down, left and up
    transposed.load_state_dict(state_dict)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    expected = mixer(x.flatten(1, 2), (3, 5)).view(2, 3, 5, 8).transpose(1, 2)
    torch.testing.assert_close(transposed(x.transpose(1, 2).flatten(1, 2), (5, 3)).view(2, 5, 3, 8), expected)


def test_hot_path_neither_permutes_nor_copies_activations():
    """Besides the kernel, products and views there is one look-up, of the narrow step parameters."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    views = {"t", "view", "_unsafe_view", "transpose", "permute", "split", "split_with_sizes", "expand", "unflatten"}
    views |= {"slice", "unsqueeze", "detach", "promote_types"}
    for pairing, lookups in (("position", 2), ("token", 1)):  # one is the table of five moves
        mixer = SnakeMixer(32, pairing=pairing).eval()
        tokens = torch.randn(2, 15, 32)
        mixer(tokens, (3, 5))  # makes the tables
        with torch.no_grad(), Recorder() as recorder:
            mixer(tokens, (3, 5))
        computing = sorted(op for op in recorder.ops if op not in views)
        products = ["addmm"] * 2 + ["mm"] * 2
        expected = ["add", *products, "convolution", "exp", *["index"] * lookups, "neg", "selective_scan", "silu_"]
        assert computing == sorted(expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = PlainMamba(**{**TINY, **options})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.isfinite(tensor).all(), name
            torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, equal_nan=True, msg=name)


def test_initial_step_sizes():
    step = F.softplus(SnakeMixer(64).dt_bias)
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01


def test_weight_decay_spares_the_directions():
    assert "blocks.1.mixer.direction_B" in make().no_weight_decay()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="token"), "global_pool='token'"),
        (dict(pairing="cell"), "pairing='cell'"),
        (dict(lb_window=3), "lb_window=3"),
        (dict(patch_size=7), "even.*got 7"),
        (dict(img_size=0), "has no pixels"),
        (dict(dwconv_blocks=(3,)), r"dwconv_blocks=\(3,\)"),
        (dict(feature_norms=(-1,)), r"feature_norms=\(-1,\)"),
        (dict(layer_shuffle=2), "got 2"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_checkpoint_of_another_size_fits():
    state_dict = make().state_dict()
    larger = make(img_size=(48, 64), num_classes=0)
    fitted = checkpoint_filter_fn({"state_dict": state_dict}, larger)
    assert fitted["pos_embed"].shape == (1, 48, 32)
    larger.load_state_dict(fitted)
    with pytest.raises(ValueError, match="15 rows"):
        checkpoint_filter_fn({"pos_embed": torch.zeros(1, 15, 32)}, larger)


def test_step_bias_of_the_authors_is_doubled_once():
    model = make(depth=1)
    theirs = {"backbone.layers.0.mamba.dt_proj.bias": torch.ones(64)}
    ours = checkpoint_filter_fn(theirs, model)
    assert torch.equal(ours["blocks.0.mixer.dt_bias"], torch.full((64,), 2.0))
    assert torch.equal(checkpoint_filter_fn(ours, model)["blocks.0.mixer.dt_bias"], ours["blocks.0.mixer.dt_bias"])


def test_upstream_arguments_are_checked():
    with pytest.raises(ValueError, match="new_trick"):
        from_upstream("PlainMamba", dict(new_trick=True))
    with pytest.raises(ValueError, match="use_rms_norm=True"):
        from_upstream("PlainMamba", dict(layer_cfgs=dict(use_rms_norm=True)))
    with pytest.raises(ValueError, match="FancyMamba"):
        from_upstream("FancyMamba", {})
