"""timm's contract on a small model of every family: what its tests ask of models they name, and what its tools use.

`tests/timm_contract.py` runs timm's test file itself on all models; what is here needs neither network nor minutes.
"""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import create_feature_extractor
from timm.models._features import FeatureGetterNet
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay

import zoo
from zoo.backbones import FAMILIES
from zoo.backbones.layers.columnar import ColumnarBackbone

COLUMN = dict(patch_size=8, embed_dim=32, depth=3)

WINDOWS = (("h", "w2_flip"), ("v_flip", "w3"))

# What makes a small model of every family smaller. A family that is not here is tested with its nano as it is.
SMALL = {
    "a2mamba": ("a2mamba_pico", dict(dims=(16, 32, 64), depths=(1,) * 3, num_heads=(2, 2, 4), projection_dim=48)),
    "adventurer": ("adventurer_nano", dict(COLUMN, d_state=8, head_dim=16, reversed_blocks=(1,))),
    "efficient_vmamba": ("efficient_vmamba_nano", dict(dims=16, depths=(1,) * 4)),
    "lbvim": ("lbvim_nano", dict(COLUMN, global_pool="attn", pool_heads=4)),
    "local_vim": ("local_vim_nano", dict(COLUMN, directions=WINDOWS)),
    "local_vmamba": ("local_vmamba_nano", dict(dims=16, depths=(1,) * 4, directions=WINDOWS)),
    "mamba_vision": ("mamba_vision_nano", dict(dim=16, stem_width=8, depths=(1, 1, 2, 2), num_heads=(2, 4))),
    # Of 16 channels oneDNN, on CPUs with AMX, convolves patches of 4 x 4 wrongly in bfloat16.
    "plain_mamba": ("plain_mamba_nano", dict(COLUMN, stem_width=8)),
    "shuffle_mamba": ("shuffle_mamba_nano", COLUMN),
    "vim": ("vim_micro", dict(COLUMN, class_token="middle", global_pool="token", rope=True)),
    "vmamba": ("vmamba_nano", dict(dims=16, depths=(1,) * 4)),
}
FIRST = dict(stem="patch", downsample="merge", gate="activated", d_state=4, pos_embed=True)
MORE = {  # models with parts that those above lack
    "local_vim_tokens": ("local_vim_nano", dict(SMALL["local_vim"][1], class_token=True, global_pool="token")),
    "shuffle_mamba_registers": ("shufflemamba_reg_small_patch16_224", dict(COLUMN, img_size=32, num_registers=4)),
    "vmamba_first": ("vmamba_nano", dict(SMALL["vmamba"][1], **FIRST)),
}
CASES = {family: (f"{family}_nano", {}) for family in FAMILIES} | SMALL | MORE


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def make(case: str, **options) -> torch.nn.Module:
    """A small model with five classes, the same at every call."""
    name, small = CASES[case]
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **small, **options})


def images_for(model: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    patch_embed = getattr(model, "patch_embed", None)
    size = model.pretrained_cfg["input_size"] if patch_embed is None else (model.in_chans, *patch_embed.img_size)
    return torch.randn(batch, *size)


def without_gradient(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.grad is None]


# What create_model, optimizers and checkpoints rely on.


def test_unknown_arguments_are_errors(case):
    with pytest.raises(TypeError, match="not_a_model_arg"):
        make(case, not_a_model_arg=1, device="meta")


def test_own_variants_are_small():
    """A model made for 32-pixel images is one to try things with: at most three million parameters."""
    names = [name for name in zoo.list_models() if timm.get_pretrained_cfg(name).input_size[-1] <= 32]
    assert len(names) >= len(FAMILIES)
    sizes = {name: sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) for name in names}
    assert {name: size for name, size in sizes.items() if size > 3e6} == {}


def test_every_parameter_gets_a_gradient(case):
    model = make(case, drop_rate=0.1, drop_path_rate=0.1)
    logits = model(images_for(model, 4))
    assert logits.shape == (4, 5)
    logits.square().sum().backward()
    assert without_gradient(model) == []


def test_init_weights_after_to_empty(case):
    model = make(case, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    model.to_empty(device="cpu").eval()
    floating = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    for tensor in floating:
        torch.nn.init.constant_(tensor, float("nan"))
    model.init_weights()
    fresh = make(case, dtype=torch.float64).state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name
        if name in fresh and tensor.is_floating_point() and tensor.numel() >= 64:  # enough of a sample
            torch.testing.assert_close(tensor.std(), fresh[name].std(), rtol=0.5, atol=1e-3, msg=name)
    assert torch.isfinite(model(images_for(model).double())).all()


def test_headless_checkpoint_reload(case):
    """A checkpoint without classifier is ours too, whatever the order of its names."""
    model, reloaded = make(case, num_classes=0).eval(), make(case, num_classes=0).eval()
    for parameter in reloaded.parameters():
        torch.nn.init.zeros_(parameter)
    fit = sys.modules[type(model).__module__].checkpoint_filter_fn
    reloaded.load_state_dict(fit(dict(sorted(model.state_dict().items())), reloaded))
    images = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_pretrained_weights_fit_other_channels_and_classes(case, num_classes, tmp_path):
    source, path = make(case), tmp_path / "model.safetensors"
    save_file(source.state_dict(), path)
    options = dict(pretrained_cfg_overlay=dict(file=str(path), num_classes=5, source=None), pretrained=True)
    model = make(case, in_chans=1, num_classes=num_classes, **options)
    expected, head = source.state_dict(), source.pretrained_cfg["classifier"]
    changed = {f"{source.pretrained_cfg['first_conv']}.weight", f"{head}.weight", f"{head}.bias"}
    assert changed <= set(expected)
    for name, tensor in model.state_dict().items():
        assert name in changed or torch.equal(tensor, expected[name]), name
    assert model(images_for(model)[:, :1]).shape == (2, num_classes or model.head_hidden_size)


def test_parameter_groups(case):
    model = make(case)
    names, exempt = {name for name, _ in model.named_parameters()}, model.no_weight_decay()
    leaves = ("A_log", "D", "dt_bias", "pos_embed", "cls_token")
    assert {name for name in names if name.split(".")[-1] in leaves} <= exempt <= names
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(groups) == names and len(set(groups.values())) > 2
    decayed = param_groups_layer_decay(model, 0.1, exempt, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in decayed for p in group["params"]}
    ordered = [model, *(model.get_submodule(info["module"]) for info in model.feature_info), model.get_classifier()]
    scales = [scale[id(next(module.parameters()))] for module in ordered]
    assert scales == sorted(scales) and len(set(scales)) == len(scales) and scales[-1] == 1


# The classifier and the pooling.


def test_reset_classifier_keeps_pool(case):
    assert inspect.signature(make(case, device="meta").reset_classifier).parameters["global_pool"].default is None
    pools = set(make(case, device="meta").global_pools) - {"token"}
    for pool in sorted(pools - {"attn"}):
        model = make(case, global_pool=pool).eval()
        images = images_for(model)
        with torch.no_grad():
            expected = model.forward_head(model.forward_features(images), pre_logits=True)
            model.reset_classifier(7)
            torch.testing.assert_close(model.forward_head(model.forward_features(images), pre_logits=True), expected)
            assert 7 in model(images).shape
            for other in sorted(pools - {pool}):
                model.reset_classifier(7, other)
                changed = model.forward_head(model.forward_features(images), pre_logits=True)
                assert changed.shape != expected.shape or not torch.allclose(changed, expected)


def test_classifier_keeps_dtype_mode_and_frozen_parameters(case):
    model = make(case).to(torch.bfloat16).eval()
    model.requires_grad_(False)
    model.reset_classifier(0)
    images = images_for(model).bfloat16()
    assert model(images).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7) and model(images).dtype == torch.bfloat16
    assert not any(module.training for module in model.modules())


def test_head_hidden_size(case):
    model = make(case, num_classes=0).eval()
    images = images_for(model)

    def check_width(num_classes: int) -> None:
        feature = model.forward_head(model.forward_features(images), pre_logits=True)
        assert feature.shape == (2, model.head_hidden_size)
        assert model(images).shape == (2, num_classes or model.head_hidden_size)

    with torch.no_grad():
        check_width(0)
        model.reset_classifier(7, "avg")
        check_width(7)
        index = len(model.feature_info) - 2
        width = model.feature_info[index]["num_chs"]
        model.prune_intermediate_layers([index], prune_norm=True)
        model.reset_classifier(7, "avg")
        check_width(7)
        assert model.head_hidden_size == model.num_features == width


# Features.


def test_intermediates_agree_with_forward(case):
    model = make(case).eval()
    images = images_for(model)
    with torch.no_grad():
        tokens = model.forward_features(images)
        final, maps = model.forward_intermediates(images)
        model.set_grad_checkpointing()
        recomputed, _ = model.forward_intermediates(images)
        normed = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(final, tokens)
    torch.testing.assert_close(recomputed, tokens)
    assert len(maps) == len(model.feature_info) >= 3
    for feature, info in zip(maps, model.feature_info, strict=True):
        sides = [-(-side // info["reduction"]) for side in images.shape[-2:]]
        assert feature.shape == (2, info["num_chs"], *sides)
    last = tokens
    if isinstance(model, ColumnarBackbone):
        last = model.split_tokens(tokens)[0].transpose(1, 2).view_as(normed)
    elif model.output_fmt == "NHWC":
        last = tokens.permute(0, 3, 1, 2)
    torch.testing.assert_close(normed, last)
    other_format = "NLC" if isinstance(model, ColumnarBackbone) else "NHWC"
    flat = model.forward_intermediates(images, intermediates_only=True, output_fmt=other_format)
    for feature, cells in zip(maps, flat, strict=True):
        torch.testing.assert_close(cells.reshape(2, -1, feature.shape[1]), feature.flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="'CHW'"):
        model.forward_intermediates(images, output_fmt="CHW")


def test_stopping_early_and_pruning_change_no_feature(case):
    model = make(case).eval()
    images, last = images_for(model), len(model.feature_info) - 1
    with torch.no_grad():
        taps = model.forward_intermediates(images, intermediates_only=True)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([last], prune_head=False)
        torch.testing.assert_close(whole(images), model(images))
        for index in range(last + 1):
            for norm in (False, True):
                _, early = model.forward_intermediates(images, [index], norm=norm, stop_early=True)
                expected = model.forward_intermediates(images, [index], norm=norm, intermediates_only=True)
                torch.testing.assert_close(early, expected)
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([index]) == [index]
            assert len(pruned.feature_info) == index + 1
            final, selected = pruned.forward_intermediates(images, [index])
            torch.testing.assert_close(selected[0], taps[index])
            torch.testing.assert_close(pruned.forward_features(images), final)


@pytest.mark.parametrize("taps", ["first", "last", "all"])
def test_prune_intermediate_layers_params_used(case, taps):
    """As in timm's feature extractors: no parameter is left over (DDP), and evaluation stays deterministic."""
    model = make(case, drop_rate=0.5)
    images, features = images_for(model), len(model.feature_info)
    indices, prune_norm = {"first": ([0], False), "last": ([features - 1], False), "all": (range(features), True)}[taps]
    pruned = copy.deepcopy(model)
    take = pruned.prune_intermediate_layers(list(indices), prune_norm=prune_norm)
    maps = pruned.forward_intermediates(images, take, norm=not prune_norm, intermediates_only=True)
    sum(feature.sum() for feature in maps).backward()
    assert without_gradient(pruned) == []
    pruned = model.eval()
    pruned.prune_intermediate_layers(list(indices), prune_norm=prune_norm)
    with torch.no_grad():
        assert torch.equal(pruned(images), pruned(images))


def test_norms_of_single_features(case):
    """Features of blocks or stages with a norm of their own are normed, and pruning keeps the norms in use only."""
    if "feature_norms" not in inspect.signature(type(make(case, device="meta"))).parameters:
        pytest.skip("the model has no norms of single features")
    model = make(case, feature_norms=(0, 1)).eval()
    images = images_for(model)
    with torch.no_grad():
        normed = model.forward_intermediates(images, [0, 1], intermediates_only=True)
        either_way = model.forward_intermediates(images, [0, 1], norm=True, intermediates_only=True)
        torch.testing.assert_close(either_way, normed)
        assert max(feature.mean(1).abs().max() for feature in normed) < 1e-5
    model.prune_intermediate_layers([1], prune_norm=True)
    assert list(model.feature_norms) == ["1"]
    selected = model.forward_intermediates(images, [1], intermediates_only=True)
    torch.testing.assert_close(selected[0], normed[1])
    selected[0].square().sum().backward()
    assert without_gradient(model) == []


def test_features_only_through_timm(case):
    model = make(case, features_only=True, out_indices=(0, 2), in_chans=3)
    assert isinstance(model, FeatureGetterNet)
    side = model.feature_info.reduction()[-1] * 3 - 1
    features = model(torch.randn(2, 3, side, side))
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    for feature, reduction in zip(features, model.feature_info.reduction(), strict=True):
        assert side // reduction <= feature.shape[2] <= -(-side // reduction)
    sum(feature.square().sum() for feature in features).backward()
    assert without_gradient(model) == []
    assert not [name for name, _ in model.named_parameters() if name.startswith(("model.head", "model.norm."))]


@pytest.mark.parametrize("features_only", [False, True])
def test_gradient_checkpointing_changes_nothing(case, features_only):
    grads = []
    for enable in (False, True):
        model = make(case, features_only=features_only).train()
        whole = model.model if features_only else model  # timm's wrapper has no such switch
        whole.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        outputs = model(images_for(whole))
        sum(output.square().mean() for output in (outputs if features_only else [outputs])).backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


# Inputs, dtypes, sizes.


def test_batch_consistency(case):
    model = make(case).eval()
    images = images_for(model, 3)
    with torch.no_grad():
        single = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), single, rtol=1e-4, atol=1e-5)


def test_dtype_change_after_forward(case):
    model = make(case).eval()
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        tolerance = dict(rtol=0.05, atol=0.05 * expected.abs().max().item())
        half = copy.deepcopy(model).to(torch.bfloat16)
        logits, maps = half(images.bfloat16()), half.forward_intermediates(images.bfloat16(), intermediates_only=True)
        assert {logits.dtype, *(feature.dtype for feature in maps)} == {torch.bfloat16}
        torch.testing.assert_close(logits.float(), expected, **tolerance)
        torch.testing.assert_close(half.float()(images), expected, **tolerance)  # nothing of 16 bits stays behind
        final, maps = copy.deepcopy(model).double().forward_intermediates(images.double())
        assert {final.dtype, *(feature.dtype for feature in maps)} == {torch.float64}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    torch.testing.assert_close(mixed.float(), expected, **tolerance)
    mixed.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_evaluation_before_training(case):
    """Tables made in inference mode serve autograd too."""
    model = make(case)
    images = torch.randn(2, model.in_chans, 56, 88)  # a size that no other test has made tables for
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()


def test_set_input_size(case, tmp_path):
    """A resized model keeps what is frozen, and timm saves and rebuilds it at its new size."""
    model = make(case)
    if not hasattr(model, "set_input_size"):
        pytest.skip("no parameter depends on the image size")
    model.eval().requires_grad_(False)
    model.set_input_size(img_size=(48, 64))
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    image = torch.randn(1, model.in_chans, 48, 64)
    logits = model(image)
    assert logits.shape == (1, 5)
    model_args = {key: value for key, value in CASES[case][1].items() if key != "img_size"}
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=model_args)
    torch.testing.assert_close(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(image), logits)
    if "patch_size" in inspect.signature(model.set_input_size).parameters and isinstance(model, ColumnarBackbone):
        model.set_input_size(patch_size=4)
        assert model.patch_embed.grid_size == (12, 16) and model.feature_info[0]["reduction"] == 4
        assert not [name for name, p in model.named_parameters() if p.requires_grad]
        assert model(image).shape == (1, 5)


# Graphs.


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_fx_trace(case, train):
    """Traced once, a model gives its logits and a feature for any batch, and trains."""
    model = make(case).train(train)
    images, node = images_for(model, 3), model.feature_info[1]["module"]
    traced = create_feature_extractor(model, {node: "feature", "head": "logits"}).train(train)
    torch.manual_seed(1)
    outputs = traced(images)
    torch.manual_seed(1)
    torch.testing.assert_close(outputs["logits"], model(images))
    assert len(outputs["feature"]) == 3
    outputs["logits"].square().sum().backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_compiles_to_one_graph(case, train):
    torch.compiler.reset()  # families share a forward, and recompilations of one are limited
    model = make(case).train(train)
    images, results = images_for(model), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        with torch.set_grad_enabled(train):
            logits = run(images)
        results.append([logits, *(torch.autograd.grad(logits.square().sum(), [*model.parameters()]) if train else ())])
    torch.testing.assert_close(results[1], results[0])


def export(model: torch.nn.Module, images: torch.Tensor, dynamic: dict) -> torch.nn.Module:
    with torch.no_grad():  # for training the scan saves states, whose number a graph fixes to one or to several
        return torch.export.export(model, (images,), dynamic_shapes=(dynamic,)).module()


@pytest.mark.parametrize("case", FAMILIES)
def test_export_with_any_batch(case):
    model = make(case).eval()
    exported = export(model, images_for(model), {0: torch.export.Dim("batch", max=64)})
    for batch in (1, 5):
        images = images_for(model, batch)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_with_any_size(case):
    torch.compiler.reset()
    model = make(case).eval()
    auto = torch.export.Dim.AUTO
    exported = export(model, torch.randn(2, model.in_chans, 128, 96), {0: auto, 2: auto, 3: auto})
    for size in ((128, 96), (80, 104)):  # one cell or window along a side would be fixed to one
        images = torch.randn(3, model.in_chans, *size)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
def test_torchscript_by_tracing(case, tmp_path):
    """For one image size and any batch; saved and read back, where Python's code is not called any more."""
    model = make(case).eval()
    with torch.no_grad():
        model(images_for(model))  # what is made at first use stays out of the trace
        torch.jit.save(torch.jit.trace(model, images_for(model)), tmp_path / "model.pt")
        images = images_for(model, 3)
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.xfail(
    strict=True,
    reason="torch.jit.script knows neither callable arguments, abstract sequences nor blocks chosen by number; torch "
    "deprecates it for torch.export",
)
@pytest.mark.parametrize("case", ["vim", "vmamba"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torchscript_by_scripting(case):
    torch.jit.script(make(case).eval())


def test_timms_own_tests():
    """The file that `make test-contract` fetches, on one model; only if it was fetched."""
    script = Path(__file__).with_name("timm_contract.py")
    if not (script.parents[1] / ".pytest_cache" / "timm" / f"timm-{timm.__version__}").is_dir():
        pytest.skip("timm's tests are not here; `make test-contract` fetches them")
    command = [sys.executable, str(script), "-k", "vim_micro"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 8, result.stdout
