"""LocalVMamba: every option trains, any image size runs, directions lead where they say."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from zoo.backbones.local_vmamba import (
    ALL_DIRECTIONS,
    SMALL_DIRECTIONS,
    TINY_DIRECTIONS,
    LocalSS2D,
    LocalVMamba,
    from_upstream,
)
from zoo.backbones.scans.local import local_order
from zoo.kernels import selective_scan

TINY = dict(patch_size=2, depths=(1, 2, 1), dims=16, d_state=4, num_classes=5)
TINY |= dict(directions=(("h", "h_flip", "w2", "w7_flip"), ("v", "v_flip", "w2_flip", "w7")))

OPTIONS = {
    "released": dict(),
    "windows": dict(lb_window=4, feature_norms=(0, 2)),
    "small_parts": dict(directions=(("w3_flip",), ("v", "w2")), dims=(16, 24, 32), ssm_ratio=1.0, dt_rank=3, d_conv=5),
    "map": dict(global_pool="", d_conv=1),
}
SIZES = [(97, 131), (40, 24), (11, 18)]


def make(**options) -> LocalVMamba:
    torch.manual_seed(0)
    return LocalVMamba(**{**TINY, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1)
    final, features = model.forward_intermediates(torch.randn(4, 3, 32, 32))
    logits = model.forward_head(final)
    assert logits.shape == ((4, 4, 4, 5) if options.get("global_pool") == "" else (4, 5))
    (logits.square().sum() + sum(f.square().sum() for f in features)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(options, size):
    model = make(**options).eval()
    with torch.no_grad():
        features = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    cells = [side // 2 for side in size]
    for feature, dim in zip(features, model.dims, strict=True):
        assert feature.shape == (1, dim, *cells)
        cells = [-(-side // 2) for side in cells]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def make_mixer(**options) -> LocalSS2D:
    """A mixer with parameters large enough for the scans to matter beside the skip connection."""
    torch.manual_seed(0)
    mixer = LocalSS2D(8, **{"d_state": 3, "dt_rank": 2, "directions": ALL_DIRECTIONS, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def walk_by_hand(mixer: LocalSS2D, x: torch.Tensor) -> torch.Tensor:
    """The mixer with padded and reordered copies, direction by direction, as the authors describe it."""
    H, W = x.shape[1:3]
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), *mixer.conv.parameters(), padding=1, groups=x.shape[3])
    u, ssm, outputs = F.silu(convolved.flatten(2).transpose(1, 2)), mixer.ssm, []
    for k, direction in enumerate(mixer.directions):
        order = local_order(direction, H, W)
        walked = F.pad(u, (0, 0, 0, len(order) - H * W))[:, order]
        dt, B, C = (walked @ ssm.x_proj_weight[k].t()).split(ssm.splits, dim=-1)
        delta, A = dt @ ssm.dt_proj_weight[k].t(), -ssm.A_log[k].exp()
        options = dict(delta_softplus=True, window=ssm.lb_window)
        y = selective_scan(walked, delta, A, B, C, ssm.D[k], None, ssm.dt_bias[k], **options)
        y = torch.zeros_like(y).index_copy(1, order, y)[:, : H * W]
        outputs.append(y * mixer.attention(y))
    if mixer.direction_weight is not None:
        weights = mixer.direction_weight.softmax(0)
        outputs = [F.layer_norm(y, y.shape[-1:]) * weight for y, weight in zip(outputs, weights, strict=True)]
    return mixer.out_proj(mixer.out_norm(sum(outputs)).view_as(z) * F.silu(z))


@pytest.mark.parametrize("grid", [(3, 5), (7, 14), (5, 2), (1, 6), (1, 1)])
@pytest.mark.parametrize("options", [dict(), dict(lb_window=4), dict(search=True)], ids=str)
def test_mixer_equals_the_definition(grid, options):
    mixer = make_mixer(**options)
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for run in (mixer, lambda x: walk_by_hand(mixer, x)):
        y = run(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


def test_transposed_map():
    """Rows of a map are columns of the transposed one, on rectangles too."""
    rows, columns = make_mixer(directions=("h", "h_flip")), make_mixer(directions=("v", "v_flip"))
    columns.load_state_dict({**rows.state_dict(), "conv.weight": rows.conv.weight.detach().transpose(2, 3)})
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(columns(x.transpose(1, 2)).transpose(1, 2), rows(x))


def test_sixteen_bit_model():
    model = make().eval()
    images = torch.randn(2, 3, 32, 48)
    expected = model(images)
    tolerance = dict(rtol=0.05, atol=0.05 * expected.abs().max().item())
    for dtype in (torch.bfloat16, torch.float16):
        logits = copy.deepcopy(model).to(dtype)(images.to(dtype))
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, **tolerance)


def test_directions_of_released_models():
    assert (len(TINY_DIRECTIONS), len(SMALL_DIRECTIONS)) == (15, 33)
    for name, directions in (("local_vmamba_tiny", TINY_DIRECTIONS), ("local_vmamba_small", SMALL_DIRECTIONS)):
        model = timm.create_model(name, device="meta")
        blocks = [block for stage in model.stages for block in stage.blocks]
        assert tuple(block.mixer.directions for block in blocks) == directions
    for own in TINY_DIRECTIONS + SMALL_DIRECTIONS:
        assert list(own) == sorted(own, key=ALL_DIRECTIONS.index) and len(set(own)) == 4
    assert sum(p.numel() for p in timm.create_model("local_vmamba_nano", device="meta").parameters()) <= 3e6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = LocalVMamba(**{**TINY, **options})
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="max"), "global_pool='max'"),
        (dict(directions=(("h", "w0"),)), "direction 'w0'"),
        (dict(directions=("h", "v")), "one for every block"),
        (dict(directions=()), "one for every block"),
        (dict(dims=(8, 16)), r"dims=\(8, 16\)"),
        (dict(feature_norms=(3,)), r"feature_norms=\(3,\)"),
        (dict(d_conv=4), "got 4"),
        (dict(lb_window=3), "lb_window=3"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def as_authors_store(model: LocalVMamba) -> dict[str, torch.Tensor]:
    """A model's weights as the authors' code names and shapes them."""
    leaves = {"conv": "conv2d", "ssm.A_log": "A_logs", "ssm.D": "Ds", "ssm.dt_bias": "dt_projs_bias"}
    leaves |= {"ssm.x_proj_weight": "x_proj_weight", "ssm.dt_proj_weight": "dt_projs_weight"}
    leaves |= {"attention.reduce": "multi_scan.attn.global_reduce", "attention.norm": "multi_scan.attn.norm"}
    leaves |= {"attention.select": "multi_scan.attn.channel_select"}
    state_dict = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("stem.conv1", "patch_embed.0").replace("stem.norm1", "patch_embed.2")
        name = name.replace("stages.", "layers.").replace(".mixer.", ".op.").replace("feature_norms.", "outnorm")
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest}"
        for ours, theirs in leaves.items():
            name = name.replace(f".op.{ours}", f".op.{theirs}")
        if name.startswith(("norm.", "head.")):
            name = f"classifier.{name}"
        state_dict[name] = tensor.flatten(0, 1) if name.endswith(("A_logs", "Ds")) else tensor
    return state_dict


@pytest.mark.parametrize("form", ["authors", "envelope", "dense", "ours"])
def test_checkpoints_of_all_forms_load(form):
    model = make(feature_norms=(0, 1, 2))
    state_dict = model.state_dict() if form == "ours" else as_authors_store(model)
    fresh = make(feature_norms=(0, 1, 2))
    if form == "dense":
        state_dict = {f"backbone.{name}": t for name, t in state_dict.items() if not name.startswith("classifier.")}
        state_dict["decode_head.conv_seg.weight"] = torch.zeros(2, 2, 1, 1)
        fresh.prune_intermediate_layers([0, 1, 2], prune_norm=True)
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    zoo.load_into(fresh, {"state_dict": state_dict} if form == "envelope" else state_dict)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_released_weights_are_refused_where_they_do_not_belong(monkeypatch):
    """The authors' page links this model's file for LocalVim-S too."""
    monkeypatch.setattr("zoo.backbones.FAMILIES", ("local_vim", "local_vmamba"))  # asking all of them takes its time
    weights = as_authors_store(timm.create_model("local_vmamba_small", device="meta"))
    with pytest.raises(ValueError, match=r"do not fit this LocalVim.*fit local_vmamba_small"):
        zoo.load_into(timm.create_model("local_vim_small", device="meta"), weights)


def test_upstream_arguments_are_checked():
    assert from_upstream("SS2D", dict(d_model=16)).direction_weight is not None
    with pytest.raises(ValueError, match="new_trick"):
        from_upstream("VSSM", dict(new_trick=True, directions=[["h"]]))
    with pytest.raises(ValueError, match="FancyVSSM"):
        from_upstream("FancyVSSM", {})
