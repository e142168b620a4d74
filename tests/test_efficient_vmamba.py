"""EfficientVMamba: every option trains, any image size runs, the timm interface holds, scans see their sub-grids."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import nn

import zoo
from zoo.backbones.efficient_vmamba import AtrousSS2D, EfficientVMamba, checkpoint_filter_fn, from_upstream
from zoo.backbones.layers.ss2d import SS2D
from zoo.backbones.scans import scan_paths
from zoo.kernels import selective_scan

TINY = dict(depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_classes=5)

OPTIONS = {
    "released": dict(),
    "mlp": dict(mlp_ratio=2.0, downsample="conv2x2", feature_norms=(0, 1, 2, 3)),
    "sparse": dict(rate=3, d_state=4, dt_rank=2, ssm_ratio=1.5, patch_size=2),
    "dense": dict(rate=1, downsample="conv3x3", dims=8),
    "lb_window": dict(lb_window=4),
}
SIZES = [(97, 131), (64, 40), (33, 36)]
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(**options) -> EfficientVMamba:
    torch.manual_seed(0)
    return EfficientVMamba(**{**TINY, **options})


@every_option
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.1, drop_rate=0.1)
    final, features = model.forward_intermediates(torch.randn(3, 3, 64, 64))
    logits = model.forward_head(final)
    assert logits.shape == (3, 5)
    sum(x.square().sum() for x in (logits, *features)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_option
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(options, size):
    model = make(**options).eval()
    with torch.no_grad():
        final, features = model.forward_intermediates(torch.randn(1, 3, *size))
    grid = [side // model.strides[0] for side in size]
    for dim, feature in zip(model.dims, features, strict=True):
        assert feature.shape == (1, dim, *grid)
        grid = [(side + (options.get("downsample") != "conv2x2")) // 2 for side in grid]
    assert final.shape == (1, *features[-1].shape[2:], model.dims[-1]) and torch.isfinite(final).all()


@every_option
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 60, 44)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def make_mixer(**options) -> AtrousSS2D:
    """A mixer with parameters large enough for the scans to matter beside the skip connection."""
    torch.manual_seed(0)
    mixer = AtrousSS2D(8, d_state=3, **options).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def walk_by_hand(mixer: AtrousSS2D, x: torch.Tensor) -> torch.Tensor:
    """The mixer path by path on reordered copies, padding cells included."""
    H, W = x.shape[1:3]
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), *mixer.conv.parameters(), padding=1, groups=x.shape[3])
    u = F.silu(convolved.flatten(2).transpose(1, 2))
    padded = torch.cat([u, torch.zeros_like(u[:, :1])], dim=1)  # the last token is what -1 reads
    y, ssm = torch.zeros_like(padded), mixer.ssm
    for k, path in enumerate(scan_paths("atrous", H, W, rate=mixer.rate).long()):
        walked = padded[:, path]
        dt, B, C = F.linear(walked, ssm.x_proj_weight[k]).split(ssm.splits, dim=-1)
        delta, A = F.linear(dt, ssm.dt_proj_weight[k]), -ssm.A_log[k].exp()
        out = selective_scan(
            walked, delta, A, B, C, ssm.D[k], None, ssm.dt_bias[k], delta_softplus=True, window=ssm.lb_window
        )
        y[:, path] += out
    return mixer.out_proj(mixer.out_norm(y[:, :-1]).unflatten(1, (H, W)) * F.silu(z))


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (5, 2), (1, 6), (1, 1)])
@pytest.mark.parametrize("options", [dict(), dict(rate=3), dict(rate=1), dict(lb_window=4)], ids=str)
def test_mixer_equals_the_definition(grid, options):
    mixer = make_mixer(**options)
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for run in (mixer, lambda x: walk_by_hand(mixer, x)):
        y = run(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


def test_steps_of_one_path_per_cell_are_enough():
    """The plain SS2D works out step sizes of all paths for every cell, which are read on one of them only."""
    mixer = make_mixer()
    plain = SS2D(8, d_state=3, scan="atrous").double()
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(x))


def test_cells_see_earlier_cells_of_their_sub_grid_only():
    mixer = make_mixer()
    mixer.conv = torch.nn.Identity()
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3, 2] += 1  # an odd row and an even column, scanned column by column
    differs = (mixer(x) != mixer(changed)).any(-1)[0]
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[3::2, 2] = expected[1::2, 4] = True
    assert torch.equal(differs, expected)


def test_block_adds_gated_branches():
    block = make().stages[0].blocks[0].eval()
    x = torch.randn(2, 5, 4, 8)
    normed = block.norm(x)
    convolved = nn.Sequential(*block.conv_branch)(normed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = x
    for branch in (block.mixer(normed), convolved):
        mean = F.layer_norm(branch, (8,)).mean((1, 2))
        weights = torch.sigmoid(block.gate.select(F.gelu(block.gate.reduce(mean))))
        expected = expected + branch * weights[:, None, None]
    torch.testing.assert_close(sum(block(x)), expected)  # stream and update


def test_sixteen_bit_model():
    model = make().eval()
    images = torch.randn(2, 3, 64, 80)
    expected = model(images)
    logits = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    for given in (logits, mixed):
        torch.testing.assert_close(given.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64


def test_evaluation_before_training():
    """Tables made in inference mode serve autograd too."""
    model = make()
    images = torch.randn(2, 3, 84, 92)
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()


def test_gradient_checkpointing_changes_nothing():
    model, images = make().eval(), torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_intermediates_agree_with_forward():
    model = make(feature_norms=(0,)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        final = model.forward_features(images)
        also_final, features = model.forward_intermediates(images, norm=True, output_fmt="NHWC")
        plain = model.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close([also_final, features[3]], [final, final])
    torch.testing.assert_close(model.norm(plain[3].permute(0, 2, 3, 1)), final)
    torch.testing.assert_close(plain[2].permute(0, 2, 3, 1), features[2])
    assert (features[0].mean(-1).abs() < 1e-5).all() and (features[1].mean(-1).abs() > 1e-3).any()


def test_pruned_model_gives_the_same_intermediates():
    model = make(feature_norms=(0, 1, 2, 3)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert len(model.stages) == len(model.feature_info) == 3 and set(model.feature_norms) == {"0", "2"}
    features = model.forward_intermediates(images, [0, 2], intermediates_only=True)
    torch.testing.assert_close(features, expected)
    sum(f.square().sum() for f in features).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_features_only_through_timm():
    model = timm.create_model("efficient_vmamba_tiny", features_only=True, dims=8)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [8, 16, 32, 64]
    features = model(torch.randn(1, 3, 160, 96))
    assert [f.shape[2:] for f in features] == [(40, 24), (20, 12), (10, 6), (5, 3)]


def test_nano_is_small_and_sees_small_images():
    model = timm.create_model("efficient_vmamba_nano").eval()
    assert sum(p.numel() for p in model.parameters()) <= 3e6
    final, features = model.forward_intermediates(torch.randn(1, 3, 32, 32))
    assert [f.shape[-1] for f in features] == [16, 8, 4, 2]
    assert model.forward_head(final).shape == (1, 10)


def test_classifier_can_be_replaced():
    model = make().to(torch.bfloat16).eval()
    model.reset_classifier(0)
    images = torch.randn(2, 3, 64, 64).bfloat16()
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().weight.dtype == torch.bfloat16


@every_option
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = EfficientVMamba(**{**TINY, **options})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.isfinite(tensor).all(), name
            spreads = (tensor.std(correction=0), fresh[name].std(correction=0))
            torch.testing.assert_close(*spreads, rtol=0.6, atol=1e-3, msg=name)


def test_weight_decay_and_layer_decay_groups():
    model = make(feature_norms=(3,))
    exempt = model.no_weight_decay()
    assert exempt <= {name for name, _ in model.named_parameters()}
    assert {f"stages.1.blocks.1.mixer.ssm.{leaf}" for leaf in ("A_log", "D", "dt_bias")} <= exempt
    groups = param_groups_layer_decay(model, 0.1, exempt, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    ordered = (model.stem.conv1, model.stages[0].blocks[0].norm, model.stages[1].blocks[0].norm, model.head)
    scales = [scale[id(layer.weight)] for layer in ordered]
    assert scales == sorted(scales) and len(set(scales)) == 4 and scales[-1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="token"), "global_pool='token'"),
        (dict(lb_window=3), "lb_window=3"),
        (dict(rate=0), "rate must be at least 1, got 0"),
        (dict(depths=(1, 2, 3)), r"depths=\(1, 2, 3\)"),
        (dict(dims=(8, 16, 33, 64)), "dims=.* must be even"),
        (dict(dims=6), "at least 8 channels, got 6"),
        (dict(downsample="v3"), "downsample='v3'"),
        (dict(feature_norms=(4,)), r"feature_norms=\(4,\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


THEIRS = {
    "conv_pwl": "conv_pw2.0",
    "conv_pw": "conv_pw.0",
    "conv_dw": "conv_dw.0",
    "bn1": "conv_pw.1",
    "bn2": "conv_dw.1",
    "bn3": "conv_pw2.1",
    "mixer.ssm.dt_proj_weight": "op.dt_projs_weight",
    "mixer.ssm.dt_bias": "op.dt_projs_bias",
    "mixer.ssm.x_proj_weight": "op.x_proj_weight",
    "mixer.ssm.A_log": "op.A_logs",
    "mixer.ssm.D": "op.Ds",
    "mixer.conv": "op.conv2d",
    "mixer": "op",
    "gate.norm": "se.norm",
    "gate.reduce": "se.global_reduce",
    "gate.select": "se.channel_select",
    "stem.conv1": "patch_embed.0",
    "stem.norm1": "patch_embed.2",
    "head": "classifier.head",
}


def upstream_names(model: EfficientVMamba) -> dict[str, torch.Tensor]:
    """A model's weights under the authors' names."""
    converted = {}
    for name, tensor in model.state_dict().items():
        ours = name
        if name.startswith("norm."):
            name = f"classifier.{name}"
        for inner, theirs in THEIRS.items():
            if f".{inner}." in f".{ours}.":
                name = f".{name}.".replace(f".{inner}.", f".{theirs}.", 1).strip(".")
                break
        if name.endswith(("A_logs", "Ds")):
            tensor = tensor.flatten(0, 1)
        parts = name.split(".")
        if parts[0] == "feature_norms":
            name = f"outnorm{parts[1]}.{parts[2]}"
        elif parts[2:3] == ["downsample"]:
            stage = int(parts[1]) - 1
            place = "downsample" if stage < 2 else str(len(model.stages[stage].blocks) + 2)
            layer = {"conv": "1", "norm": "3"}.get(parts[3]) if hasattr(model.stages[1].downsample, "conv") else None
            name = ".".join(["layers", str(stage), place, layer or parts[3], parts[4]])
        elif parts[0] == "stages" and int(parts[1]) >= 2:
            name = ".".join(["layers", parts[1], str(int(parts[3]) + 1), *parts[4:]])
        converted[name.replace("stages.", "layers.")] = tensor
    return converted


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("envelope", ["state_dict", "model", "ema_model", None])
@pytest.mark.parametrize("downsample", ["merge", "conv2x2"])
def test_checkpoints_of_the_authors(prefix, envelope, downsample):
    options = dict(downsample=downsample, mlp_ratio=2.0, feature_norms=(0, 3))
    source, model = make(**options), make(**options)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    state_dict = {prefix + name: tensor for name, tensor in upstream_names(source).items()}
    assert not any("stages" in name or "mixer" in name or "gate" in name for name in state_dict)
    zoo.load_into(model, {envelope: state_dict} if envelope else state_dict)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in source.state_dict().items())
    assert checkpoint_filter_fn(ours, model).keys() == ours.keys()
    zoo.load_into(make(num_classes=0, **options), state_dict)


def test_upstream_arguments_are_checked():
    args = dict(depths=[1] * 4, dims=8, mlp_ratio=0.0, downsample_version="v1")
    assert from_upstream("EfficientVSSM", dict(args, d_state=4)).stages[0].blocks[0].mixer.ssm.A_log.shape[-1] == 16
    with pytest.raises(ValueError, match="new_trick"):
        from_upstream("EfficientVSSM", dict(args, new_trick=True))
    with pytest.raises(ValueError, match="patch_norm must be True"):
        from_upstream("EfficientVSSM", dict(args, patch_norm=False))
    with pytest.raises(ValueError, match="OtherVSSM"):
        from_upstream("OtherVSSM", args)


def test_compiles_to_one_graph():
    model = make(depths=(1, 1, 1, 1)).eval()
    images = torch.randn(2, 3, 52, 68)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_fx_feature_extraction():
    model = make().eval()
    images = torch.randn(2, 3, 64, 64)
    extracted = timm.models.create_feature_extractor(model, {"stages.1": "map", "head": "logits"})(images)
    torch.testing.assert_close(extracted["logits"], model(images))
    assert extracted["map"].shape == (2, 8, 8, 16)
