"""MambaVision: every option trains, any image size runs, the timm interface holds, mixers and windows are right."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

import zoo
from zoo.backbones.mamba_vision import (
    MambaVision,
    MambaVisionMixer,
    checkpoint_filter_fn,
    cut_windows,
    from_upstream,
    join_windows,
)

TINY = dict(stem_width=4, dim=8, depths=(1, 1, 3, 2), num_heads=(2, 4), window_size=(3, 2), num_classes=5)

OPTIONS = {
    "released": dict(layer_scale=1e-5),
    "fine_stem": dict(stem_stride=1, depths=(2, 1, 1, 1)),
    "half_stem": dict(stem_stride=2, window_size=(8, 4), mlp_ratio=2.5),
    "lb_window": dict(lb_window=4, d_state=4),
    "all_scales": dict(layer_scale=0.1, layer_scale_conv=0.1, qk_norm=True, d_conv=4, feature_norms=(0, 1, 2, 3)),
}
SIZES = [(97, 131), (40, 64), (5, 17)]
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(**options) -> MambaVision:
    torch.manual_seed(0)
    return MambaVision(**{**TINY, **options})


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
    for i, feature in enumerate(features):
        stride = model.feature_info[i]["reduction"]
        assert feature.shape == (1, 8 * 2**i, -(-size[0] // stride), -(-size[1] // stride))
    assert final.shape == features[-1].shape and torch.isfinite(final).all()


@every_option
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 60, 44)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("grid", [(6, 9), (7, 5), (1, 8)])
def test_windows_hold_their_cells_row_by_row(size, grid):
    x = torch.randn(2, 4, *grid)
    windows = cut_windows(x, size)
    rows, columns = (math.ceil(side / size) for side in grid)
    padded = F.pad(x, (0, columns * size - grid[1], 0, rows * size - grid[0]))
    expected = [
        image[:, i * size : (i + 1) * size, j * size : (j + 1) * size].flatten(1).T
        for image in padded
        for i in range(rows)
        for j in range(columns)
    ]
    assert torch.equal(windows, torch.stack(expected))
    assert torch.equal(join_windows(windows, size, *grid), x)


def test_one_window_of_a_channels_last_map_is_no_copy():
    x = torch.randn(2, 4, 7, 7).to(memory_format=torch.channels_last)
    windows = cut_windows(x, 7)
    assert windows.data_ptr() == x.data_ptr() == join_windows(windows, 7, 7, 7).data_ptr()


def test_windows_do_not_see_each_other():
    stage = make(depths=(1, 1, 3, 3)).stages[2].eval().double()
    stage.downsample = torch.nn.Identity()
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 32, 6, 5, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 1, 4] += 1
    with torch.no_grad():
        differs = (stage(x) != stage(changed)).any(1)[0]
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[:3, 3:] = True
    assert torch.equal(differs, expected)


def test_first_half_scans_and_second_half_attends():
    kinds = [
        [isinstance(b.mixer, MambaVisionMixer) for b in make(depths=(1, 1, n, 4)).stages[2].blocks] for n in (1, 5)
    ]
    assert kinds == [[True], [True] * 3 + [False] * 2]


def mix_by_hand(mixer: MambaVisionMixer, x: torch.Tensor) -> torch.Tensor:
    """The mixer as the paper's equations have it, step by step."""
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    taps_x, taps_z = mixer.conv_weight.unsqueeze(1).chunk(2)
    x, z = (
        F.silu(F.conv1d(t.transpose(1, 2), w, padding="same", groups=t.shape[-1])).transpose(1, 2)
        for t, w in ((x, taps_x), (z, taps_z))
    )
    dt, B, C = mixer.x_proj(x).split(mixer.splits, dim=-1)
    step = F.softplus(mixer.dt_proj(dt) + mixer.dt_bias)
    A = -mixer.A_log.exp()
    state, ys = 0, []
    for t in range(x.shape[1]):
        state = torch.exp(step[:, t, :, None] * A) * state + (step[:, t] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(1)
        ys.append((state * C[:, t].unsqueeze(1)).sum(-1) + mixer.D * x[:, t])
    return mixer.out_proj(torch.cat([torch.stack(ys, 1), z], dim=-1))


@pytest.mark.parametrize("d_conv", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_mixer_equals_the_definition(d_conv, length):
    torch.manual_seed(0)
    mixer = MambaVisionMixer(8, d_state=3, d_conv=d_conv).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for run in (mixer, lambda x: mix_by_hand(mixer, x)):
        y = run(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


def test_local_windows_look_ahead():
    x = torch.randn(1, 12, 8)
    changed = x.clone()
    changed[:, 7] += 1
    for lb_window, first in ((1, 6), (4, 4)):  # the convolution reads one token ahead
        torch.manual_seed(0)
        mixer = MambaVisionMixer(8, lb_window=lb_window)
        differs = (mixer(x) - mixer(changed)).abs().amax((0, 2)) > 1e-8
        assert differs.nonzero().min() == first


def test_sixteen_bit_model():
    model = make(layer_scale=1.0).eval()
    images = torch.randn(2, 3, 64, 80)
    expected = model(images)
    logits = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    for given in (logits, mixed):
        torch.testing.assert_close(given.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64


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
        also_final, features = model.forward_intermediates(images, norm=True)
        plain = model.forward_intermediates(images, intermediates_only=True, output_fmt="NHWC")
    torch.testing.assert_close([also_final, features[3]], [final, final])
    torch.testing.assert_close(model.norm(plain[3].permute(0, 3, 1, 2)), final)
    torch.testing.assert_close(plain[2].permute(0, 3, 1, 2), features[2])
    assert (features[0].mean(1).abs() < 1e-5).all() and (features[1].mean(1).abs() > 1e-3).any()
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_pruned_model_gives_the_same_intermediates():
    model = make(feature_norms=(0, 1, 2, 3)).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(images, [1, 2], intermediates_only=True)
    early = model.forward_intermediates(images, [1, 2], intermediates_only=True, stop_early=True)
    assert model.prune_intermediate_layers([1, 2], prune_norm=True) == [1, 2]
    assert len(model.stages) == len(model.feature_info) == 3 and set(model.feature_norms) == {"1", "2"}
    features = model.forward_intermediates(images, [1, 2], intermediates_only=True)
    torch.testing.assert_close([early, features], [expected, expected])
    sum(f.square().sum() for f in features).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_features_only_through_timm():
    model = timm.create_model("mamba_vision_t", features_only=True, dim=8, stem_width=4)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [8, 16, 32, 64]
    features = model(torch.randn(1, 3, 160, 96))
    assert [f.shape[2:] for f in features] == [(40, 24), (20, 12), (10, 6), (5, 3)]


def test_nano_is_small_and_sees_small_images():
    model = timm.create_model("mamba_vision_nano").eval()
    assert sum(p.numel() for p in model.parameters()) <= 3e6
    final, features = model.forward_intermediates(torch.randn(1, 3, 32, 32))
    assert [f.shape[-1] for f in features] == [32, 16, 8, 4]
    assert model.forward_head(final).shape == (1, 10)


def test_classifier_can_be_replaced():
    model = make().to(torch.bfloat16).eval()
    model.reset_classifier(0)
    images = torch.randn(2, 3, 64, 64).bfloat16()
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert torch.equal(model(images), model.forward_features(images))
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7)
    assert model.get_classifier().weight.dtype == torch.bfloat16


@every_option
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = MambaVision(**{**TINY, **options})
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
            torch.testing.assert_close(*spreads, rtol=0.5, atol=1e-3, msg=name)


def test_initial_step_sizes():
    model = make()
    for mixer in (module for module in model.modules() if isinstance(module, MambaVisionMixer)):
        step = F.softplus(mixer.dt_bias)
        assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01
        assert mixer.dt_proj.weight.std() > 0.1


def test_weight_decay_and_layer_decay_groups():
    model = make(feature_norms=(3,), layer_scale=1e-5)
    exempt = model.no_weight_decay()
    assert exempt <= {name for name, _ in model.named_parameters()}
    assert {f"stages.2.blocks.1.mixer.{leaf}" for leaf in ("A_log", "D", "dt_bias")} <= exempt
    groups = param_groups_layer_decay(model, 0.1, exempt, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    ordered = (
        model.stem[0],
        model.stages[1].downsample,
        model.stages[1].blocks[0].conv1,
        model.stages[3].blocks[0].norm1,
    )
    scales = [scale[id(layer.weight)] for layer in ordered]
    assert scales == sorted(scales) and len(set(scales)) >= 3
    assert scale[id(model.head.weight)] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="token"), "global_pool='token'"),
        (dict(lb_window=3), "lb_window=3"),
        (dict(stem_stride=8), "stem_stride=8"),
        (dict(depths=(1, 2, 3)), r"depths=\(1, 2, 3\)"),
        (dict(window_size=(0, 7)), r"window_size=\(0, 7\)"),
        (dict(num_heads=(2, 4, 8, 16)), "num_heads=.*2 positive"),
        (dict(num_heads=(5, 4)), r"num_heads=\(5, 4\) do not divide"),
        (dict(feature_norms=(4,)), r"feature_norms=\(4,\)"),
        (dict(d_conv=5), "taps|W"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)(torch.randn(1, 3, 32, 32))


def upstream_names(model: MambaVision) -> dict[str, torch.Tensor]:
    """A model's weights under the authors' names, their step biases half of ours."""
    theirs = {}
    for name, tensor in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        stage, _, rest = parent.removeprefix("stages.").partition(".")
        if parent.startswith("stem."):
            theirs[f"patch_embed.conv_down.{parent.removeprefix('stem.')}.{leaf}"] = tensor
        elif rest == "downsample":
            theirs[f"levels.{int(stage) - 1}.downsample.reduction.0.{leaf}"] = tensor
        elif leaf == "conv_weight":
            for branch, half in zip("xz", tensor.unsqueeze(1).chunk(2), strict=True):
                theirs[f"levels.{stage}.{rest}.conv1d_{branch}.weight"] = half
        elif leaf == "dt_bias":
            theirs[f"levels.{stage}.{rest}.dt_proj.bias"] = tensor / 2
        elif leaf == "gamma":
            block, _, scale = rest.rpartition(".")
            theirs[f"levels.{stage}.{block}.{dict(ls='gamma', ls1='gamma_1', ls2='gamma_2')[scale]}"] = tensor
        else:
            theirs[name.replace("stages.", "levels.").replace("feature_norms.", "outnorm")] = tensor
    return theirs


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "encoder.", "module.encoder."])
@pytest.mark.parametrize("envelope", ["state_dict", "model", None])
def test_checkpoints_of_the_authors(prefix, envelope):
    source = make(layer_scale=0.1, layer_scale_conv=0.1, feature_norms=(0, 3))
    state_dict = {prefix + name: tensor for name, tensor in upstream_names(source).items()}
    model = make(layer_scale=0.2, layer_scale_conv=0.2, feature_norms=(0, 3))
    zoo.load_into(model, {envelope: state_dict} if envelope else state_dict)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in source.state_dict().items())
    assert checkpoint_filter_fn(ours, model).keys() == ours.keys()
    headless = make(num_classes=0, layer_scale=1.0, layer_scale_conv=1.0, feature_norms=(0, 3))
    zoo.load_into(headless, state_dict)


def test_weights_fit_every_window():
    source, other = make(), make(window_size=(8, 5))
    zoo.load_into(other, source.state_dict())


def test_upstream_arguments_are_checked():
    with pytest.raises(ValueError, match="new_trick"):
        args = dict(dim=8, in_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=[8] * 4, mlp_ratio=4)
        from_upstream("MambaVision", dict(args, new_trick=True))
    with pytest.raises(ValueError, match="qkv_bias must be True"):
        from_upstream("MambaVision", dict(qkv_bias=False))
    with pytest.raises(ValueError, match="OtherVision"):
        from_upstream("OtherVision", {})


def test_licence_of_released_weights_is_recorded():
    released = [name for name in zoo.list_pretrained("mamba_vision*") if "in1k" in name]
    assert len(released) == 11
    assert {timm.get_pretrained_cfg(name).license for name in released} == {"cc-by-nc-sa-4.0"}


def test_compiles_to_one_graph_and_exports():
    model = make(depths=(1, 1, 1, 2)).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
    auto = torch.export.Dim.AUTO
    images = torch.randn(2, 3, 150, 168)  # windows are cut off at both sides in both stages
    with torch.no_grad():
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
        for size in ((150, 168), (192, 192), (133, 200)):
            others = torch.randn(3, 3, *size)
            torch.testing.assert_close(exported(others), model(others))


def test_fx_feature_extraction():
    model = make().eval()
    images = torch.randn(2, 3, 64, 64)
    extracted = timm.models.create_feature_extractor(model, {"stages.2": "map", "head": "logits"})(images)
    torch.testing.assert_close(extracted["logits"], model(images))
    assert extracted["map"].shape == (2, 32, 4, 4)
