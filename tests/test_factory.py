"""The public functions: names, creation, checkpoints."""

import argparse
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

import zoo
from zoo import registry
from zoo.weights import fitting_variants

SMALL = dict(embed_dim=32, depth=2)


def upstream_names(model):
    """A model's weights under the authors' names."""
    theirs = {
        "conv_weight": "conv1d{}.weight",
        "conv_bias": "conv1d{}.bias",
        "x_proj_weight": "x_proj{}.weight",
        "dt_proj_weight": "dt_proj{}.weight",
        "dt_bias": "dt_proj{}.bias",
        "A_log": "A{}_log",
        "D": "D{}",
    }
    state_dict = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.replace("blocks.", "layers.").rpartition(".")
        if path.endswith("mixer") and leaf in theirs:
            for k, suffix in enumerate(("", "_b")):
                value = tensor[k].unsqueeze(1) if leaf == "conv_weight" else tensor[k]
                state_dict[f"{path}.{theirs[leaf].format(suffix)}"] = value.clone()
        else:
            state_dict[name.replace("blocks.", "layers.").replace("norm.", "norm_f.", name.startswith("norm."))] = (
                tensor
            )
    return state_dict


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_is_light():
    heavy = ("matplotlib", "omegaconf", "accelerate", "sklearn", "torchmetrics", "zoo.parity", "zoo.engine", "zoo.data")
    code = f"import sys, zoo; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"
    ours = "import sys, zoo; print([m for m in sys.modules if m.startswith('zoo.') and 'triton' in m])"
    assert run_python(ours).stdout.strip() == "[]"


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, zoo
print(zoo.create_model("vim_micro", embed_dim=32, depth=1)(torch.randn(1, 3, 32, 32)).shape)
"""
    result = run_python(code)
    assert "torch.Size([1, 10])" in result.stdout, result.stderr


def test_timm_knows_the_models_after_import():
    code = "import timm, zoo; print(type(timm.create_model('vim_micro', embed_dim=16, depth=1)).__module__)"
    assert run_python(code).stdout.strip() == "zoo.backbones.vim"


def test_listing():
    names = zoo.list_models()
    assert {"vim_tiny_patch16_224", "vim_nano", "vim_micro"} <= set(names)
    assert not any(name.startswith(("vit_", "resnet", "efficientvim")) for name in names)
    assert zoo.list_models("vim_tiny*") == ["vim_tiny_patch16_224", "vim_tiny_patch16_stride8_224"]
    assert zoo.list_models("vim_tiny*", family="vim") == zoo.list_models("vim_tiny*")
    assert "vim_small_patch16_224.in1k" in zoo.list_pretrained()
    assert zoo.list_pretrained("vim_base*") == []
    with pytest.raises(ValueError, match="no family 'vit'"):
        zoo.list_models(family="vit")


def test_our_own_variants_are_small():
    for name, limit in (("vim_nano", 3e6), ("vim_micro", 1e6)):
        model = zoo.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) <= limit
        assert model.num_classes == 10
        assert zoo.create_model(name, num_classes=7, device="meta").num_classes == 7


def test_unknown_names_get_suggestions():
    with pytest.raises(ValueError, match="vim_tiny_patch16_224"):
        zoo.create_model("vim_tinny_patch16_224")
    with pytest.raises(ValueError, match="vim_"):
        zoo.create_model("vim")
    with pytest.raises(ValueError, match="resnet50"):
        zoo.create_model("resnet_50")
    with pytest.raises(RuntimeError, match="in22k"):
        zoo.create_model("vim_tiny_patch16_224.in22k")
    assert zoo.create_model("resnet18", device="meta").num_classes == 1000


def test_pretrained_configs_name_origin_and_licence():
    for name in zoo.list_pretrained():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.license
        assert (cfg.hf_hub_id and cfg.hf_hub_filename) or cfg.url or cfg.file
        assert cfg.origin_url or cfg.file
        assert cfg.first_conv and cfg.classifier


def test_packaged_weights_load_offline(tmp_path, monkeypatch):
    source = zoo.create_model("vim_nano", **SMALL)
    path = tmp_path / "vim_nano.fashion_mnist.safetensors"
    save_file(source.state_dict(), path)
    assert registry.packaged_weights("vim_nano.no_such_data") == {}
    monkeypatch.setattr(registry, "PRETRAINED_FOLDER", tmp_path)
    overlay = registry.packaged_weights("vim_nano.fashion_mnist")
    assert overlay == {"file": str(path)}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = zoo.create_model("vim_nano.fashion_mnist", True, pretrained_cfg_overlay=overlay, **SMALL)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    adapted = zoo.create_model(
        "vim_nano.fashion_mnist", True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1, **SMALL
    )
    assert torch.equal(adapted.blocks[0].mixer.A_log, source.blocks[0].mixer.A_log)
    assert adapted(torch.randn(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_our_checkpoint_round_trip(tmp_path, suffix):
    source = zoo.create_model("vim_micro", **SMALL)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    model = zoo.create_model("vim_micro", checkpoint_path=path, **SMALL)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), source(images))


def test_authors_training_checkpoint(tmp_path):
    """Names of the authors, under `model` beside an average that must not be taken, with a Namespace in the file."""
    options = dict(SMALL, class_token="middle", global_pool="token")
    source, average = (zoo.create_model("vim_micro", **options) for _ in range(2))
    path = tmp_path / "vim.pth"
    content = {
        "model": {f"module.{name}": t for name, t in upstream_names(source).items()},
        "model_ema": upstream_names(average),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 299,
        "args": argparse.Namespace(model="vim_tiny", lr=1e-3, betas=(0.9, 0.999), nested=argparse.Namespace(x=None)),
    }
    torch.save(content, path)
    model = zoo.create_model("vim_micro", checkpoint_path=path, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_checkpoint_for_features(tmp_path):
    source = zoo.create_model("vim_micro", **SMALL)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": source.state_dict()}, path)
    model = zoo.create_model("vim_micro", checkpoint_path=path, features_only=True, out_indices=(0,), **SMALL)
    images = torch.randn(1, 3, 32, 32)
    expected = source.forward_intermediates(images, [0], intermediates_only=True)
    torch.testing.assert_close(model(images), expected)


def test_checkpoint_for_another_resolution(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(zoo.create_model("vim_micro", **SMALL).state_dict(), path)
    model = zoo.create_model("vim_micro", checkpoint_path=path, img_size=(64, 48), **SMALL)
    assert model.pos_embed.shape[1] == model.patch_embed.grid_size[0] * model.patch_embed.grid_size[1]


def test_checkpoint_of_another_variant_is_named():
    small = zoo.create_model("vim_small_patch16_224", device="meta")
    tiny = zoo.create_model("vim_tiny_patch16_224", device="meta")
    with pytest.raises(ValueError, match=r"(?s)wrong shape cls_token \(1, 1, 384\).*fit.*vim_small_patch16_224"):
        zoo.load_into(tiny, upstream_names(small))
    small.reset_classifier(12)
    assert "vim_small_patch16_224 (num_classes=12)" in fitting_variants(small.state_dict())


def test_mismatches_are_listed():
    model = zoo.create_model("vim_micro", **SMALL)
    state_dict = model.state_dict()
    del state_dict["head.bias"]
    state_dict["surprise"] = torch.zeros(1)
    state_dict["norm.weight"] = torch.zeros(3)
    before = model.norm.weight.clone()
    with pytest.raises(ValueError) as error:
        zoo.load_into(model, state_dict)
    message = str(error.value)
    assert "missing head.bias" in message
    assert "unexpected surprise" in message
    assert "wrong shape norm.weight (3,) for (32,)" in message
    assert "fit no model" in message
    assert torch.equal(model.norm.weight, before)


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    whole = tmp_path / "whole.pth"
    torch.save(zoo.create_model("vim_micro", **SMALL).state_dict(), whole)
    for suffix in (".pth", ".safetensors"):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        text = tmp_path / f"text{suffix}"
        text.write_text("<html>not found</html>")
        empty = tmp_path / f"empty{suffix}"
        empty.touch()
        for path in (cut, text, empty):
            with pytest.raises(ValueError, match=str(path)):
                zoo.load_checkpoint(path)
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "hollow.pth")
    with pytest.raises(ValueError, match="no weights; its entries are epoch, args"):
        zoo.load_checkpoint(tmp_path / "hollow.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        zoo.load_checkpoint(tmp_path / "list.pth")
    torch.save({"model": {"w": torch.zeros(1)}, "extra": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match="harmful"):
        zoo.load_checkpoint(tmp_path / "harmful.pth")
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="absent"):
        zoo.load_checkpoint(tmp_path / "absent.pth")


def test_two_sources_of_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one"):
        zoo.create_model("vim_micro", True, checkpoint_path=tmp_path / "x.pth")


def test_local_directory_round_trip(tmp_path):
    model = zoo.create_model("vim_micro", **SMALL)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args=SMALL)
    restored = zoo.create_model(f"local-dir:{tmp_path}", pretrained=True)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(restored(images), model(images))


def test_packaged_weights_give_the_recorded_logits(monkeypatch):
    """Fashion-MNIST's Vim loads without a network and computes what it did when it was added."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = zoo.create_model("vim_nano.fashion_mnist", pretrained=True).eval()
    assert model.patch_embed.grid_size == (14, 14) and model.in_chans == 1
    image = torch.linspace(-0.8, 2.0, 28 * 28).view(1, 1, 28, 28)
    with torch.inference_mode():
        logits = model(image)
    torch.testing.assert_close(
        logits,
        torch.tensor([[-0.2076, -0.1650, -0.5552, -0.2159, -0.6290, -0.2432, -0.4596, -0.5211, 4.3859, -0.5345]]),
        rtol=1e-3,
        atol=1e-3,
    )
