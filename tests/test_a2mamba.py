"""A2Mamba: neighbourhood attention is what it says, every option trains, any image size runs, timm's interface."""

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay

from zoo.backbones.a2mamba import A2Mamba, checkpoint_filter_fn, from_upstream
from zoo.backbones.layers.multi_scale import MultiScaleMixer
from zoo.backbones.layers.neighborhood import (
    axis_windows,
    neighborhood_aggregate,
    neighborhood_maps,
    neighborhood_scores,
)

TINY = dict(
    img_size=32,
    num_classes=5,
    dims=(16, 24, 32),
    depths=(1, 2, 1),
    num_heads=(2, 2, 4),
    mlp_ratios=(2, 2, 1.5),
    kernel_sizes=(5, 3, 3),
    projection_dim=20,
    stem_stride=2,
)
OPTIONS = {
    "plain": dict(),
    "layer_scale": dict(layer_scale=(1.0, None, 0.1), global_pool=""),
    "shortcut_scale": dict(shortcut_scale=(False, True, True), in_chans=1),
    "clamped": dict(clamp_windows=True, kernel_sizes=(7, 9, 5)),
    "coarse_stem": dict(
        stem_stride=4, dims=(16, 24), kernel_sizes=(5, 3), depths=(1, 1), num_heads=(2, 2), mlp_ratios=(2, 2)
    ),
}
SIZES = [(97, 131), (40, 24), (17, 35)]
GRIDS = [((7, 7), 7, (1, 1)), ((9, 13), 3, (1, 2)), ((14, 15), 5, (2, 3)), ((24, 6), 3, (3, 1)), ((4, 5), 1, (1, 1))]


def make(**options) -> A2Mamba:
    torch.manual_seed(0)
    return A2Mamba(**{**TINY, **options})


def make_lively(**options) -> A2Mamba:
    """A model in evaluation whose branches and position biases matter, unlike those of a model at its start."""
    model = make(**options).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "bias" in name else parameter[0].numel() ** -0.5)
    return model


def pixels(model: A2Mamba, *shape: int) -> torch.Tensor:
    return torch.randn(shape[0], model.in_chans, *shape[1:])


def attend_by_hand(q, k, v, bias, kernel_size, dilation):
    """Scores and sums from copies of every window."""
    H, W = q.shape[1:3]
    rows, columns = axis_windows(H, kernel_size, dilation[0]), axis_windows(W, kernel_size, dilation[1])
    row_steps = (rows - torch.arange(H).unsqueeze(1)) // dilation[0] + kernel_size - 1
    column_steps = (columns - torch.arange(W).unsqueeze(1)) // dilation[1] + kernel_size - 1
    rows, row_steps = (t[:, None, :, None] for t in (rows, row_steps))
    columns, column_steps = (t[None, :, None, :] for t in (columns, column_steps))
    keys, values = (x[:, rows, columns].flatten(3, 4) for x in (k, v))  # (B, H, W, K^2, n, c)
    scores = torch.einsum("bhwnc,bhwknc->bnhwk", q, keys) + bias[:, row_steps, column_steps].flatten(3)
    return scores, torch.einsum("bnhwk,bhwknc->bhwnc", scores.softmax(-1), values)


@pytest.mark.parametrize("length, kernel_size, dilation", list(itertools.product((15, 16, 19), (1, 3, 5), (1, 2, 3))))
def test_windows_are_the_definition(length, kernel_size, dilation):
    for cell, window in enumerate(axis_windows(length, kernel_size, dilation).tolist()):
        members = range(cell % dilation, length, dilation)
        nearest = sorted(members, key=lambda other: (abs(other - cell), other))[:kernel_size]
        assert window == sorted(nearest)


@pytest.mark.parametrize("grid, kernel_size, dilation", GRIDS)
def test_neighborhood_attention_equals_copied_windows(grid, kernel_size, dilation):
    torch.manual_seed(0)
    qkv = torch.randn(2, *grid, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(3)  # strided views
    scores, expected = attend_by_hand(q, k, v, bias, kernel_size, dilation)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), [qkv, bias])
    ours = neighborhood_scores(q, k, kernel_size, dilation, bias)
    torch.testing.assert_close(ours, scores)
    for maps in (ours.softmax(-1), neighborhood_maps(q, k, kernel_size, dilation, bias)):
        sums = neighborhood_aggregate(maps, v, kernel_size, dilation)
        torch.testing.assert_close(sums, expected)
        torch.testing.assert_close(torch.autograd.grad((sums * weight).sum(), [qkv, bias], retain_graph=True), grads)


def test_neighborhood_ops_are_proper_operators():
    q, k, v = (torch.randn(1, 7, 9, 2, 4, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 5, requires_grad=True)
    maps = neighborhood_maps(q, k, 3, (2, 3), bias).detach().requires_grad_()
    for bias_or_none, softmax in ((bias, True), (None, False)):
        torch.library.opcheck(torch.ops.zoo.neighborhood_maps.default, (q, k, bias_or_none, 3, [2, 3], softmax))
    torch.library.opcheck(torch.ops.zoo.neighborhood_aggregate.default, (maps, v, 3, [2, 3]))


def test_neighborhood_in_sixteen_bits():
    q, k, v = (torch.randn(2, 12, 11, 2, 8) for _ in range(3))
    bias = torch.randn(2, 9, 9)
    expected = neighborhood_aggregate(neighborhood_maps(q, k, 5, 2, bias), v, 5, 2)
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    maps = neighborhood_maps(q, k, 5, 2, bias)
    sums = neighborhood_aggregate(maps, v, 5, 2)
    sums.sum().backward()
    assert {x.dtype for x in (maps, sums, q.grad, k.grad, v.grad)} == {torch.bfloat16}
    torch.testing.assert_close(sums.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        wide = neighborhood_maps(q.float(), k.float(), 5, 2)
    assert wide.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("grid, kernel_size, dilation", [*GRIDS, ((56, 56), 11, (5, 5)), ((56, 56), 11, (1, 1))])
def test_neighborhood_attention_on_gpu(grid, kernel_size, dilation):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *grid, 2, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 2 * kernel_size - 1, 2 * kernel_size - 1, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in (q, k, v, bias)]
        maps = neighborhood_maps(inputs[0], inputs[1], kernel_size, dilation, inputs[3])
        sums = neighborhood_aggregate(maps, inputs[2], kernel_size, dilation)
        grads = torch.autograd.grad(sums.square().sum(), inputs)
        results.append([x.cpu() for x in (maps, sums, *grads)])
    torch.testing.assert_close(results[1], results[0])


def test_wrong_inputs_of_neighborhood_attention_are_named():
    q = torch.randn(1, 6, 9, 2, 4)
    for arguments, message in (
        ((q, q[:, 1:], 3), r"\(1, 6, 9, 2, 4\).*\(1, 5, 9, 2, 4\)"),
        ((q, q.double(), 3), "float64"),
        ((q, q, 4), "odd, got 4"),
        ((q, q, 3, (2, 4)), "6 x 9 is too small for windows of 3 x 3"),
        ((q, q, 3, 0), "at least 1"),
        ((q, q, 3, 1, torch.zeros(2, 3, 3)), r"\(2, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            neighborhood_maps(*arguments)
    with pytest.raises(ValueError, match=r"\(1, 2, 6, 9, 9\)"):
        neighborhood_aggregate(torch.zeros(1, 2, 6, 9, 25), q, 3)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1)
    final, features = model.forward_intermediates(pixels(model, 4, 56, 40))
    logits = model.forward_head(final)
    assert logits.shape[-1] == 5 and logits.dim() == (4 if options.get("global_pool") == "" else 2)
    (logits.square().sum() + sum(f.square().sum() for f in features)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(options, size):
    model = make_lively(**options)
    if min(size) < model.min_side:
        pytest.skip("too small for the windows")
    image = pixels(model, 1, *size)
    with torch.no_grad():
        logits, features = model(image), model.forward_intermediates(image, intermediates_only=True)
        for feature, dim, stride in zip(features, model.dims, model.strides, strict=True):
            assert feature.shape == (1, dim, -(-size[0] // stride), -(-size[1] // stride))
        model.set_input_size(size)
        torch.testing.assert_close(model(image), logits)  # resized once or at every call


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make_lively(**options)
    images = pixels(model, 3, 40, 56)
    with torch.no_grad():
        expected = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_too_small_images_are_refused_with_the_size_that_is_needed():
    model = make().eval()
    assert model.min_side == 17
    model(torch.randn(1, 3, 17, 17))
    for size in ((16, 40), (40, 16)):
        with pytest.raises(ValueError, match="at least 17 pixels"):
            model(torch.randn(1, 3, *size))
        with pytest.raises(ValueError, match="needs 17 pixels"):
            model.set_input_size(size)
    assert A2Mamba(depths=(1, 1, 1, 1), device="meta").min_side == 193
    assert make(clamp_windows=True).eval()(torch.randn(2, 3, 3, 9)).shape == (2, 5)


def test_clamping_changes_nothing_where_windows_fit():
    images = torch.randn(2, 3, 40, 32)
    with torch.no_grad():
        torch.testing.assert_close(make_lively(clamp_windows=True)(images), make_lively()(images))


def test_mixer_sees_the_whole_map_and_keeps_to_its_dilation_classes():
    """Without a scan and a convolution the second half of the heads reaches only cells of its own class."""
    torch.manual_seed(0)
    mixer = MultiScaleMixer(16, 2, 3).double()
    x = torch.randn(1, 9, 12, 16, dtype=torch.float64, requires_grad=True)
    q, k, v = mixer.project(x)
    values, maps = mixer.attend(q, k, v)
    assert maps.dilation == (3, 3)
    (grad,) = torch.autograd.grad(values[0, 4, 4, 1].square().sum(), x)
    reached = grad.abs().sum(-1)[0] > 0
    far = [(r, c) for r in (1, 4, 7) for c in (1, 4, 7)]
    window = {(r + i, c + j) for r, c in far for i in (-1, 0, 1) for j in (-1, 0, 1)}  # o1 of every far cell
    assert {tuple(cell) for cell in reached.nonzero().tolist()} == window


def test_sixteen_bit_model():
    model = make_lively()
    images = torch.randn(2, 3, 40, 48)
    expected = model(images)
    logits = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16())
    assert logits.dtype == torch.bfloat16
    limit = 0.05 * expected.abs().max().item()
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=limit)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=limit)
    mixed.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64


def test_evaluation_before_training():
    """Tables made in inference mode serve autograd too."""
    model = make()
    images = torch.randn(2, 3, 44, 36)
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()


def test_gradient_checkpointing_changes_nothing():
    model, images = make_lively(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_intermediates_agree_with_forward():
    model = make_lively()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        final, features = model.forward_intermediates(images, norm=True, output_fmt="NHWC")
        torch.testing.assert_close(final, model.forward_features(images))
        torch.testing.assert_close(features[-1], final)
        torch.testing.assert_close(model.forward_head(final), model(images))
    assert [f["reduction"] for f in model.feature_info] == [2, 4, 8]


def test_head_of_a_cut_model_goes_even_if_it_was_to_stay():
    model = make().eval()
    model.prune_intermediate_layers([0], prune_head=False)
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        feature = model.forward_intermediates(image, [0], intermediates_only=True)[0]  # (1, D, H, W)
        torch.testing.assert_close(model(image), feature.permute(0, 2, 3, 1))


def test_pruned_model_gives_the_same_intermediates():
    model = make().eval()
    images = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    early = model.forward_intermediates(images, [0, 1], intermediates_only=True, stop_early=True)
    torch.testing.assert_close(early, expected)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    features = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    torch.testing.assert_close(features, expected)
    assert model.num_features == model.head_hidden_size == 24
    sum(f.square().sum() for f in features).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_features_only_through_timm():
    model = timm.create_model("a2mamba_pico", features_only=True, dims=(16, 24, 32), num_heads=(2, 2, 4))
    assert [f.shape for f in model(torch.randn(1, 3, 34, 52))] == [(1, 16, 17, 26), (1, 24, 9, 13), (1, 32, 5, 7)]
    assert model.feature_info.reduction() == [2, 4, 8]
    model = timm.create_model("a2mamba_nano", features_only=True, device="meta")
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_pico_is_small_and_its_windows_fit():
    model = timm.create_model("a2mamba_pico")
    assert sum(p.numel() for p in model.parameters()) <= 3e6
    assert model.num_classes == 10 and model.min_side == model.pretrained_cfg["min_input_size"][1] <= 28
    assert model.eval().forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 4, 4, 192)


def test_shapes_are_known_without_data():
    with torch.device("meta"):
        model = timm.create_model("a2mamba_pico", in_chans=1, drop_path_rate=0.1)
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 10)


def test_classifier_can_be_replaced():
    model = make().to(torch.bfloat16).eval()
    images = torch.randn(2, 3, 32, 32).bfloat16()
    model.reset_classifier(0)
    assert model(images).shape == (2, model.head_hidden_size) == (2, 20)
    model.reset_classifier(7, "")
    assert model(images).shape == (2, 4, 4, 7)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.head.training


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = A2Mamba(**{**TINY, **options})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.isfinite(tensor).all(), name
            torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=0.02, equal_nan=True, msg=name)


def test_initialisation_is_the_published_one():
    model = make(layer_scale=(1.0, 1.0, 1e-6))
    mixer = model.stages[0].blocks[0].mixer
    step = F.softplus(mixer.ssm.dt_bias)
    assert (step > 9e-4).all() and (step < 0.11).all()
    assert not mixer.ssm.A_log.any() and not mixer.bias_table.any() and (mixer.ssm.D == 1).all()
    assert model.stages[1].blocks[0].mlp.fc1.weight.std().sub(0.02).abs() < 3e-3
    assert model.stages[1].downsample[0].weight.std().sub(0.02).abs() < 3e-3
    last = model.stages[2].blocks[0]
    assert torch.allclose(last.scale1.weight, torch.tensor(1e-6)) and not last.scale1.bias.any()


def test_parameter_groups():
    model = make(shortcut_scale=True)
    exempt = model.no_weight_decay()
    assert "stages.0.blocks.0.mixer.ssm.A_log" in exempt and not any("bias_table" in name for name in exempt)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in groups})
    assert len(scales) > 5 and scales[-1] == 1.0
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def to_authors(model: A2Mamba) -> dict[str, torch.Tensor]:
    """A model's weights as its authors store them."""
    renamed = (
        ("stem.", "patch_embed."),
        ("projection.", "classifier."),
        ("head.", "classifier.4."),
        (".mixer.", ".token_mixer."),
        (".scale", ".layer_scale"),
        (".bias_table", ".rpb.0"),
        (".global_bias", ".rpb.2"),
        ("ssm.conv.", "ssm.conv2d."),
        ("x_proj.weight", "x_proj_weight"),
        ("dt_proj.weight", "dt_projs_weight"),
        ("dt_bias", "dt_projs_bias"),
        ("A_log", "A_logs"),
        ("ssm.D", "ssm.Ds"),
    )
    state_dict = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        if name.startswith("stages."):
            _, stage, *rest = name.split(".")
            inside = rest[1:] if rest[0] == "downsample" else rest
            name = ".".join(["layers", str(2 * int(stage) - (rest[0] == "downsample")), *inside])
        if ".layer_scale" in name and name.endswith("weight"):
            tensor = tensor.view(-1, 1, 1, 1)
        elif tensor.dim() == 2 and "ssm.x_proj" not in name and "ssm.dt_" not in name and "A_logs" not in name:
            tensor = tensor[:, :, None, None]
        state_dict[name] = tensor.clone()
        if name.endswith("rpb.0"):
            state_dict[f"{name[:-1]}1"] = tensor.clone()
    return {**state_dict, "layers.0.rope.angle": torch.ones(4), "layers.2.rope.angle": torch.ones(6)}


def test_authors_checkpoint_converts():
    source = make(layer_scale=(1.0, None, 0.1))
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    theirs = to_authors(source)
    assert theirs["layers.3.0.weight"].shape == (32, 24, 3, 3)
    assert theirs["layers.4.blocks.0.token_mixer.rpb.2"].shape == (1, 4, 16, 16)
    target = make(layer_scale=(1.0, None, 0.1))
    target.load_state_dict(checkpoint_filter_fn({"state_dict": theirs, "epoch": 3}, target))
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    features = make(layer_scale=(1.0, None, 0.1), num_classes=0)
    features.load_state_dict(checkpoint_filter_fn(theirs, features))
    theirs["layers.0.blocks.0.token_mixer.rpb.1"][0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.token_mixer\.rpb\.1"):
        checkpoint_filter_fn(theirs, target)


def test_checkpoint_of_another_size_fits():
    source, larger = make_lively(), make(img_size=(48, 72)).eval()
    bias = source.stages[2].blocks[0].mixer.global_bias
    larger.load_state_dict(checkpoint_filter_fn(source.state_dict(), larger))
    resized = F.interpolate(bias, (54, 54), mode="bicubic")
    torch.testing.assert_close(larger.stages[2].blocks[0].mixer.global_bias, resized)
    image = torch.randn(1, 3, 48, 72)
    with torch.no_grad():
        torch.testing.assert_close(larger(image), source(image))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="token"), "global_pool='token'"),
        (dict(num_heads=(2, 3, 4)), "num_heads=3"),
        (dict(num_heads=(2, 2, 16)), "num_heads=16.*dim=32"),
        (dict(kernel_sizes=(5, 4, 3)), "kernel_size=4 must be odd"),
        (dict(kernel_sizes=(5, 3)), r"kernel_sizes=\(5, 3\) must have 3 values"),
        (dict(layer_scale=(1.0,)), r"layer_scale=\(1.0,\) must have 3 values"),
        (dict(layer_scale=(1.0, 1.0, 1.0), shortcut_scale=True), "not both"),
        (dict(stem_stride=8), "stem_stride=8"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_upstream_arguments_are_checked():
    known = dict(embed_dims=[16], depths=[1], num_heads=[2], mlp_ratios=[1], window_size=[3], use_rpb=True)
    with pytest.raises(ValueError, match="new_trick"):
        from_upstream("A2Mamba", dict(known, layerscales=[False], layer_init_values=[1], new_trick=True))
    with pytest.raises(ValueError, match="window_dilation"):
        from_upstream("A2Mamba", dict(known, window_dilation=[2]))
    with pytest.raises(ValueError, match="use_rpb"):
        from_upstream("A2Mamba", dict(known, use_rpb=False))
    with pytest.raises(ValueError, match="B2Mamba"):
        from_upstream("B2Mamba", {})


def test_compiles_to_one_graph_and_exports():
    model = make_lively(**{**OPTIONS["coarse_stem"], "stem_stride": 2})
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():  # for training the scan saves states, whose number a graph fixes to one or to several
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    torch.testing.assert_close(exported(images), expected)
    others = torch.randn(3, 3, 50, 67)
    torch.testing.assert_close(exported(others), model(others))


def test_fx_feature_extraction():
    model = make_lively()
    images = torch.randn(2, 3, 32, 40)
    extractor = timm.models.create_feature_extractor(model, {"stages.1": "map", "head": "logits"})
    extracted = extractor(images)
    torch.testing.assert_close(extracted["logits"], model(images))
    assert extracted["map"].shape == (2, 8, 10, 24)
