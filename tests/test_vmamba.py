"""VMamba: every option trains, any image size runs, the mixer computes its definition."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.backbones.layers.ss2d import FULL_SCANS, SS2D
from zoo.backbones.scans import scan_paths
from zoo.backbones.vmamba import VMamba, checkpoint_filter_fn, from_upstream
from zoo.kernels import selective_scan

TINY = dict(img_size=32, patch_size=2, depths=(1, 2, 1), dims=16, num_classes=5)
FIRST = dict(stem="patch", downsample="merge", gate="activated", d_state=4, ssm_ratio=2.0, conv_bias=True, mlp_ratio=0)

OPTIONS = {
    "second_generation": dict(),
    "first_generation": dict(**FIRST, global_pool=""),
    "seldom_used": dict(norm_layer="batchnorm", downsample="conv2x2", pos_embed=True, gated_mlp=True, d_conv=1),
    "windows": dict(lb_window=4, feature_norms=(0, 2), output_norm="layernorm_dwconv", activation="gelu"),
    "heads": dict(recurrence="ssd", d_state=8, dt_rank=2, scan="bidi", output_norm="dwconv", output_activation=True),
    "other_scan": dict(scan="atrous", gate="plain", output_norm="sigmoid"),
    "cascade": dict(scan="cascade", output_norm=None, dims=(16, 24, 32), dt_rank=3),
}
SIZES = [(97, 131), (40, 24), (11, 18)]


def make(**options) -> VMamba:
    torch.manual_seed(0)
    return VMamba(**{**TINY, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, drop_path_rate=0.2, drop_rate=0.1, proj_drop_rate=0.1)
    final, features = model.forward_intermediates(torch.randn(4, 3, 32, 32))
    logits = model.forward_head(final)
    assert logits.shape == ((4, 4, 4, 5) if options.get("global_pool") == "" else (4, 5))
    (logits.square().sum() + sum(f.square().sum() for f in features)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size(options, size):
    model = make(**options).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits, features = model(image), model.forward_intermediates(image, intermediates_only=True)
        for i, feature in enumerate(features):
            assert feature.shape[:2] == (1, model.dims[i])
            for pixels, cells in zip(size, feature.shape[2:], strict=True):
                assert pixels // 2 ** (i + 1) <= cells <= -(-pixels // 2 ** (i + 1))
        model.set_input_size(size)
        torch.testing.assert_close(model(image), logits)  # resampled once or at every call


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def make_mixer(**options) -> SS2D:
    """A mixer with parameters large enough for the scans to matter beside the skip connection."""
    torch.manual_seed(0)
    mixer = SS2D(8, **{"d_state": 3, "dt_rank": 2, "ssm_ratio": 1.5, **options}).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def walk_by_hand(mixer: SS2D, x: torch.Tensor) -> torch.Tensor:
    """The mixer with a reordered copy for every path, as the paper and the authors describe it."""
    batch, H, W, _ = x.shape
    x, z = mixer.in_proj(x).chunk(2, dim=-1)
    convolved = F.conv2d(x.permute(0, 3, 1, 2), *mixer.conv.parameters(), padding=1, groups=x.shape[3])
    u = F.silu(convolved.flatten(2).transpose(1, 2))
    if mixer.scan in FULL_SCANS:
        rows = torch.arange(H * W)
        second = rows.view(H, W).t().flatten() if mixer.scan == "cross" else rows
        paths = [rows, second, rows, second]
        paths = [path.flip(0) if backwards else path for path, backwards in zip(paths, mixer.reverse, strict=True)]
    else:
        paths = scan_paths(mixer.scan, H, W, **mixer.scan_options).long()
    padded, total = F.pad(u, (0, 0, 0, 1)), 0
    for k, path in enumerate(paths):
        walked, ssm = padded[:, path], mixer.ssm  # a padding cell reads the zero token that is the last
        dt, B, C = (walked @ ssm.x_proj_weight[k].t()).split(ssm.splits, dim=-1)
        delta, A = dt @ ssm.dt_proj_weight[k].t(), -ssm.A_log[k].exp()
        options = dict(delta_softplus=True, window=ssm.lb_window)
        y = selective_scan(walked, delta, A, B, C, ssm.D[k], None, ssm.dt_bias[k], **options)
        total = total + torch.zeros_like(padded).index_add(1, path % padded.shape[1], y)[:, :-1]
    return mixer.out_proj(mixer.out_norm(total.view(batch, H, W, -1)) * F.silu(z))


SCANS = {
    "cross": dict(scan="cross"),
    "cross_windows": dict(scan="cross", lb_window=4),
    "unidi": dict(scan="unidi"),
    "bidi": dict(scan="bidi"),
    "atrous": dict(scan="atrous"),
    "atrous_rate_3": dict(scan="atrous", scan_options=dict(rate=3)),
    "snake": dict(scan="snake", conv_bias=False),
}


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 6), (1, 1)])
@pytest.mark.parametrize("options", SCANS.values(), ids=SCANS)
def test_mixer_equals_the_definition(options, grid):
    mixer = make_mixer(**options)
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    results = []
    for run in (mixer, lambda x: walk_by_hand(mixer, x)):
        y = run(x)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("recurrence", ["selective_scan", "ssd"])
def test_transposed_map_with_transposed_parameters(recurrence):
    """The cross scan treats rows and columns alike: paths 0 and 1, 2 and 3 change places."""
    mixer, transposed = (make_mixer(recurrence=recurrence) for _ in range(2))
    state_dict = mixer.state_dict()
    state_dict["conv.weight"] = state_dict["conv.weight"].transpose(2, 3)
    for name, tensor in state_dict.items():
        if name.startswith("ssm."):
            state_dict[name] = tensor[[1, 0, 3, 2]]
    transposed.load_state_dict(state_dict)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(transposed(x.transpose(1, 2)).transpose(1, 2), mixer(x))


def test_hot_path_neither_permutes_nor_copies_activations():
    """Besides kernel and products there are views, and what norms, activations and A need."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    views = {"t", "view", "_unsafe_view", "transpose", "permute", "split", "split_with_sizes", "expand", "unflatten"}
    views |= {"slice", "unsqueeze", "detach", "promote_types", "alias"}
    mixer = SS2D(32, d_state=1, gate=None).eval()
    x = torch.randn(2, 3, 5, 32)
    mixer(x)  # makes the tables
    with torch.no_grad(), Recorder() as recorder:
        mixer(x)
    products = ["mm"] * 3 + ["bmm"]
    expected = [*products, "convolution", "exp", "neg", "selective_scan", "silu_", "native_layer_norm"]
    assert sorted(op for op in recorder.ops if op not in views) == sorted(expected)


def test_sixteen_bit_model():
    model = make(**FIRST).eval()
    images = torch.randn(2, 3, 32, 48)
    expected = model(images)
    tolerance = dict(rtol=0.05, atol=0.05 * expected.abs().max().item())
    for dtype in (torch.bfloat16, torch.float16):
        logits = copy.deepcopy(model).to(dtype)(images.to(dtype))
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, **tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, **tolerance)
    assert copy.deepcopy(model).double()(images.double()).dtype == torch.float64


def test_float16_sums_do_not_overflow():
    mixer = SS2D(8, gate=None).half()
    torch.nn.init.constant_(mixer.ssm.D, 3e4)
    mixer.out_norm.float()  # as autocast runs it
    with torch.no_grad():
        u = torch.rand(1, 4, 4, 16).half() + 1
        assert torch.isfinite(mixer._scan(u)).all()


def test_registered_models():
    for short, full in (("tiny", "tiny_s1l8"), ("small", "small_s1l20"), ("base", "base_s1l20")):
        models = [timm.create_model(f"vmamba_{name}", device="meta") for name in (short, full)]
        shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in models]
        assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in timm.create_model("vmamba_nano", device="meta").parameters()) <= 3e6
    for name in zoo.list_models("vmamba_vanilla*"):
        model = timm.create_model(name, device="meta")
        assert model.stages[0].blocks[0].mixer.ssm.A_log.shape[-1] == 16 and model.stages[0].blocks[0].mlp is None


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_meta_model_is_initialised_after_to_empty(options):
    with torch.device("meta"):
        model = VMamba(**{**TINY, **options})
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.constant_(tensor, float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    fresh = make(**options).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        if tensor.numel() >= 64:  # enough of a sample
            torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, msg=name)


def test_initialisation():
    model = make(d_state=4)
    ssm = model.stages[2].blocks[0].mixer.ssm
    step = F.softplus(ssm.dt_bias)
    assert step.min() >= 1e-3 * 0.99 and step.max() <= 0.1 * 1.01
    torch.testing.assert_close(ssm.A_log.exp(), torch.arange(1.0, 5).expand(4, 64, 4))
    assert 0.5 < ssm.x_proj_weight.std() * (3 * 64) ** 0.5 < 1.5  # not that of linear layers
    assert abs(model.stages[2].blocks[0].mixer.in_proj.weight.std() - 0.02) < 0.002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(global_pool="token"), "global_pool='token'"),
        (dict(stem="v2"), "stem='v2'"),
        (dict(patch_size=8), "patch_size=8"),
        (dict(downsample="v3"), "downsample='v3'"),
        (dict(norm_layer="bn"), "norm_layer='bn'"),
        (dict(dims=(8, 16)), r"dims=\(8, 16\)"),
        (dict(feature_norms=(3,)), r"feature_norms=\(3,\)"),
        (dict(pos_embed=True, stem="patch", img_size=1), "smaller than a cell"),
        (dict(scan="diagonals"), "no scan 'diagonals'"),
        (dict(recurrence="mamba2"), "recurrence='mamba2'"),
        (dict(recurrence="ssd", scan="atrous"), "recurrence='ssd' needs"),
        (dict(recurrence="ssd", dt_rank=3), "dt_rank=3 heads"),
        (dict(gate="z"), "gate='z'"),
        (dict(activation="relu"), "activation='relu'"),
        (dict(output_norm="none"), "output_norm='none'"),
        (dict(d_conv=4), "got 4"),
        (dict(lb_window=3), "lb_window=3"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def as_authors_store(model: VMamba) -> dict[str, torch.Tensor]:
    """A first-generation model's weights as the authors' code names and shapes them."""
    leaves = {"conv": "conv2d", "ssm.A_log": "A_logs", "ssm.D": "Ds", "ssm.dt_bias": "dt_projs_bias"}
    leaves |= {"ssm.x_proj_weight": "x_proj_weight", "ssm.dt_proj_weight": "dt_projs_weight"}
    state_dict = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("stem.conv1", "patch_embed.0").replace("stem.norm1", "patch_embed.2")
        name = name.replace("stages.", "layers.").replace(".mixer.", ".op.")
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest}"
        for ours, theirs in leaves.items():
            name = name.replace(f".op.{ours}", f".op.{theirs}")
        if name.startswith(("norm.", "head.")):
            name = f"classifier.{name}"
        state_dict[name] = tensor.flatten(0, 1) if name.endswith(("A_logs", "Ds")) else tensor
    return state_dict


def old_names(name: str) -> str:
    name = name.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
    name = name.replace(".op.", ".self_attention.").removeprefix("classifier.")
    return name.replace(".norm.", ".ln_1.") if ".blocks." in name else name


def single_file(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"x_proj_weight": "x_proj.weight", "dt_projs_weight": "dt_projs.weight"}
    names |= {"downsample.norm": "downsample.1", "downsample.reduction": "downsample.2"}
    converted = {}
    for name, tensor in state_dict.items():
        tensor = tensor.flatten(0, 1) if name.endswith(("x_proj_weight", "dt_projs_weight")) else tensor
        for theirs, single in names.items():
            name = name.replace(theirs, single)
        converted[name] = tensor
    return converted


@pytest.mark.parametrize("form", ["authors", "old_names", "single_file", "pointwise", "dense", "reversed", "ours"])
def test_checkpoints_of_all_forms_load(form):
    model = make(**FIRST, dims=(16, 24, 32))
    state_dict = as_authors_store(model)
    if form == "old_names":
        state_dict = {old_names(name): tensor for name, tensor in state_dict.items()}
    elif form == "single_file":
        state_dict = single_file(state_dict)
    elif form == "pointwise":
        state_dict = {n: t[..., None, None] if n.endswith("_proj.weight") else t for n, t in state_dict.items()}
    elif form == "dense":
        state_dict = {f"backbone.{name}": tensor for name, tensor in state_dict.items()}
        state_dict |= {"decode_head.conv_seg.weight": torch.zeros(2, 2, 1, 1)}
    elif form == "reversed":
        state_dict = dict(reversed(state_dict.items()))
    elif form == "ours":
        state_dict = model.state_dict()
    fresh = make(**FIRST, dims=(16, 24, 32))
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    zoo.load_into(fresh, {"model": state_dict} if form == "authors" else state_dict)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_dense_checkpoint_loads_without_head():
    model = make(feature_norms=(0, 1, 2))
    model.prune_intermediate_layers([0, 1, 2], prune_norm=True)
    source = make(feature_norms=(0, 1, 2)).state_dict()
    theirs = {name.replace("feature_norms.", "outnorm"): tensor for name, tensor in source.items()}
    zoo.load_into(model, theirs)
    assert torch.equal(model.feature_norms["2"].weight, source["feature_norms.2.weight"])


def test_position_embedding_of_another_size_fits():
    theirs = {"pos_embed": torch.randn(1, 16, 12, 20)}
    model = make(pos_embed=True, img_size=(24, 40))
    fitted = checkpoint_filter_fn(theirs, model)["pos_embed"]
    assert torch.equal(fitted, theirs["pos_embed"].flatten(2).transpose(1, 2))
    larger = make(pos_embed=True, img_size=(48, 64))
    expected = F.interpolate(theirs["pos_embed"], (24, 32), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(checkpoint_filter_fn(theirs, larger)["pos_embed"], expected)
    square = make(pos_embed=True).state_dict()
    larger.load_state_dict(checkpoint_filter_fn(square, larger))
    with pytest.raises(ValueError, match="15 rows"):
        checkpoint_filter_fn({"pos_embed": torch.zeros(1, 15, 16)}, model)


def test_upstream_arguments_are_checked():
    mixer = from_upstream("SS2D", dict(d_model=16, forward_type="v05_onnone_noz"))
    assert mixer.gate is None and isinstance(mixer.out_norm, torch.nn.Identity)
    with pytest.raises(ValueError, match="v05_noz_onnone"):
        from_upstream("SS2D", dict(d_model=16, forward_type="v05_noz_onnone"))
    with pytest.raises(ValueError, match="new_trick"):
        from_upstream("VSSM", dict(new_trick=True))
    with pytest.raises(ValueError, match="patchembed_version='v7'"):
        from_upstream("VSSM", dict(patchembed_version="v7"))
    with pytest.raises(ValueError, match="FancyVSSM"):
        from_upstream("FancyVSSM", {})
