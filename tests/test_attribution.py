"""Attribution maps: of every family, against formulas, where they lie in trained models; the tool that draws them."""

import importlib.util
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import model_entrypoint
from torch import nn

import zoo
from zoo.backbones.mamba_vision import MambaVision
from zoo.backbones.vim import VisionMamba
from zoo.data import Normalize, load_fashion_mnist
from zoo.data.fashion_mnist import DEBIAN_FOLDER
from zoo.engine import attribution, load_any
from zoo.engine.attribution import attribute, overlay
from zoo.tools import attribute as tool

HAS_CAM = importlib.util.find_spec("pytorch_grad_cam") is not None
needs_cam = pytest.mark.skipif(not HAS_CAM, reason="the package grad-cam is not installed")

# One small model of every family, with class tokens in all places, and of timm; name, arguments.
MODELS = {
    "vim": ("vim_micro", {"depth": 2}),
    "vim middle": ("vim_micro", {"depth": 2, "class_token": "middle", "global_pool": "token"}),
    "vim both": ("vim_micro", {"depth": 2, "class_token": "both", "global_pool": "token"}),
    "vim pair": ("vim_micro", {"depth": 4, "class_token": "first", "global_pool": "token", "paired_blocks": True}),
    "vim max_logit": ("vim_micro", {"depth": 2, "global_pool": "max_logit"}),
    "vim rope": ("vim_micro", {"depth": 2, "rope": True, "class_token": "middle", "global_pool": "token"}),
    "lbvim": ("lbvim_nano", {"depth": 2, "embed_dim": 48}),
    "lbvim attn": ("lbvim_nano", {"depth": 2, "embed_dim": 48, "global_pool": "attn", "pool_heads": 4}),
    "shuffle_mamba": ("shuffle_mamba_nano", {"depth": 2, "embed_dim": 48}),
    "shuffle_mamba registers": ("shufflemamba_reg_small_patch16_224", {"depth": 2, "embed_dim": 48, "img_size": 64}),
    "local_vim": ("local_vim_nano", {"depth": 2, "embed_dim": 48}),
    "plain_mamba": ("plain_mamba_nano", {"depth": 2, "embed_dim": 48}),
    "adventurer": ("adventurer_nano", {"depth": 2, "embed_dim": 64}),
    "vmamba": ("vmamba_nano", {"depths": (1, 1, 1, 1)}),
    "local_vmamba": ("local_vmamba_nano", {"depths": (1, 1, 1, 1)}),
    "efficient_vmamba": ("efficient_vmamba_nano", {"depths": (1, 1, 1, 1)}),
    "mamba_vision": ("mamba_vision_nano", {"depths": (1, 1, 2, 2)}),
    "a2mamba": ("a2mamba_pico", {"depths": (1, 1, 1)}),
    "resnet": ("resnet18", {}),
    "deit": ("deit_tiny_patch16_224", {"img_size": (64, 96), "depth": 2}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 84), "patch_size": 14, "depth": 2}),
    "cait": ("cait_xxs24_224", {"img_size": 64, "depth": 2}),
}
SIZES = {
    "shuffle_mamba registers": (64, 96),
    "resnet": (64, 96),
    "deit": (64, 96),
    "dinov2": (56, 84),
    "cait": (64, 64),
}


def make_model(kind: str, **kwargs) -> nn.Module:
    name, arguments = MODELS[kind]
    return zoo.create_model(name, num_classes=5, **arguments, **kwargs).eval()


def make_images(kind: str, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SIZES.get(kind, (32, 48)))


def test_every_family_is_tested():
    families = {model_entrypoint(name).__module__ for name in zoo.list_models()}
    assert families <= {model_entrypoint(name).__module__ for name, _ in MODELS.values()}


@needs_cam
@pytest.mark.parametrize("kind", MODELS)
def test_maps_of_every_family(kind):
    model, images = make_model(kind), make_images(kind)
    for method in ("input_gradient", "grad_cam"):
        maps = attribute(model, images, [3, 1], method)
        assert maps.shape == (2, *images.shape[-2:]) and maps.dtype == torch.float32
        assert maps.amin((1, 2)).tolist() == [0, 0] and maps.amax((1, 2)).tolist() == [1, 1]
        alone, other = attribute(model, images[1:], 1, method), attribute(model, images[1:], 3, method)
        assert (alone[0] - maps[1]).abs().max() < 0.02  # each image for itself
        assert (other[0] - maps[1]).abs().mean() > 0.005  # each class for itself


@needs_cam
@pytest.mark.parametrize("kind", MODELS)
def test_watched_models_compute_what_the_models_do(kind):
    model, images = make_model(kind), make_images(kind, 1)
    with torch.no_grad():
        torch.testing.assert_close(attribution._Probed(model)(images), model(images), rtol=1e-4, atol=1e-5)


@needs_cam
@pytest.mark.parametrize("kind", ["lbvim", "plain_mamba", "vmamba", "mamba_vision"])
def test_activation_maps_of_pooled_features_are_those_of_the_classifiers_weights(kind):
    """After a mean, a cell's share of a logit is the product of its features and the class's weights (CAM)."""
    model, images = make_model(kind), make_images(kind)
    with torch.no_grad():
        features, (shape,) = model.forward_intermediates(images, indices=1)
        rows, columns = shape.shape[-2:]
        if kind == "mamba_vision":
            features = features.permute(0, 2, 3, 1)
        cells = F.relu(features.reshape(2, rows, columns, -1) @ model.head.weight[3])  # the class 3
    for method in ("grad_cam", "hires_cam"):
        maps = attribute(model, images, 3, method)
        for cell_map, found in zip(cells, maps, strict=True):
            expected = F.interpolate(cell_map[None, None], images.shape[-2:], mode="bilinear")[0, 0]
            expected = (expected - expected.min()) / (expected.max() - expected.min())
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_gradient_methods_agree_with_their_formulas(monkeypatch):
    model, images = make_model("vim"), make_images("vim").requires_grad_()
    (gradient,) = torch.autograd.grad(model(images)[:, 2].sum(), images)
    for method, expected in (
        ("input_gradient", (gradient * images.detach()).sum(1).abs()),
        ("smooth_grad", gradient.abs().sum(1)),
    ):
        monkeypatch.setattr(attribution, "SMOOTH_NOISE", 0.0)
        monkeypatch.setattr(attribution, "SMOOTH_SAMPLES", 2)
        expected = expected.minimum(torch.quantile(expected.flatten(1), 0.99, dim=1)[:, None, None])
        expected = expected - expected.amin((1, 2), keepdim=True)
        torch.testing.assert_close(
            attribute(model, images, 2, method), expected / expected.amax((1, 2), keepdim=True), rtol=1e-3, atol=1e-4
        )


def test_smooth_grad_is_reproducible_and_averages_over_noise(monkeypatch):
    monkeypatch.setattr(attribution, "SMOOTH_SAMPLES", 4)
    model, images = make_model("vim"), make_images("vim")
    torch.manual_seed(1)
    first = attribute(model, images, 0, "smooth_grad")
    torch.manual_seed(2)
    assert torch.equal(attribute(model, images, 0, "smooth_grad"), first)
    monkeypatch.setattr(attribution, "SMOOTH_NOISE", 0.0)
    assert not torch.allclose(attribute(model, images, 0, "smooth_grad"), first, atol=1e-3)


@needs_cam
def test_default_target_is_the_prediction():
    model, images = make_model("vim"), make_images("vim", 3)
    predicted = model(images).argmax(-1)
    for method in ("input_gradient", "grad_cam"):
        assert torch.equal(attribute(model, images, method=method), attribute(model, images, predicted, method))


@needs_cam
@pytest.mark.parametrize("method", ["input_gradient", "grad_cam"])
@pytest.mark.parametrize("kind", ["vim middle", "mamba_vision"])
def test_models_are_left_as_they_were_found(kind, method):
    model, images = make_model(kind), make_images(kind)
    model.train()
    model.set_grad_checkpointing(True)
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    model(images).sum().backward()
    before = {name: (p.requires_grad, p.grad, p.detach().clone()) for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modules = [(module, dict(vars(module))) for module in model.modules()]
    grads = {name: None if grad is None else grad.clone() for name, (_, grad, _) in before.items()}
    with torch.inference_mode():
        attribute(model, images, 1, method)
    for name, parameter in model.named_parameters():
        requires_grad, grad, value = before[name]
        assert parameter.requires_grad == requires_grad and parameter.grad is grad
        assert grad is None or torch.equal(grad, grads[name])
        assert torch.equal(parameter, value)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    for module, attributes in modules:
        assert vars(module).keys() == attributes.keys()
        assert module.training == attributes["training"]
        assert getattr(module, "grad_checkpointing", None) == attributes.get("grad_checkpointing")
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    assert images.grad is None and not images.requires_grad


@needs_cam
def test_models_are_left_as_they_were_found_when_attribution_fails():
    model = make_model("vim").train()
    with pytest.raises(RuntimeError):
        attribute(model, torch.randn(1, 7, 32, 32))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@needs_cam
@pytest.mark.parametrize("method", ["input_gradient", "smooth_grad", "grad_cam"])
def test_bfloat16(method, device, monkeypatch):
    monkeypatch.setattr(attribution, "SMOOTH_SAMPLES", 3)
    model, images = make_model("vim middle").to(device), make_images("vim middle").to(device)
    exact = attribute(model, images, 1, method)
    with torch.autocast(device.type, torch.bfloat16):
        mixed = attribute(model, images, 1, method)
    narrow = attribute(model.bfloat16(), images.bfloat16(), 1, method)
    for maps in (mixed, narrow):
        assert maps.dtype == torch.float32
        assert torch.corrcoef(torch.stack([maps.flatten(), exact.flatten()]))[0, 1] > 0.9


@needs_cam
def test_wrong_arguments_are_refused():
    model, images = make_model("vim"), make_images("vim")
    for arguments, problem in (
        ({"method": "cam"}, r"method='cam' is not known; use one of input_gradient"),
        ({"target": 5}, "target=5 is not among the classes 0 to 4"),
        ({"target": [0, 1, 2]}, r"shape \(3,\).*one for each of 2"),
        ({"target": 0.5}, "target=0.5"),
    ):
        with pytest.raises(ValueError, match=problem):
            attribute(model, images, **arguments)
    with pytest.raises(ValueError, match=r"\(3, 32, 48\)"):
        attribute(model, images[0])
    model.reset_classifier(0)
    with pytest.raises(ValueError, match=r"found: shape \(2, 96\)\); attribution needs a model with a classifier"):
        attribute(model, images)
    with pytest.raises(ValueError, match="found: list"):
        attribute(timm.create_model("test_resnet", features_only=True), images)
    with pytest.raises(ValueError, match="a single cell; give larger images, or use method='input_gradient'"):
        attribute(make_model("resnet"), torch.randn(1, 3, 32, 32), method="grad_cam")
    with pytest.raises(ValueError, match="features are a list, not one map"):
        attribute(timm.create_model("efficientvim_m1"), torch.randn(1, 3, 128, 128), method="grad_cam")
    with pytest.raises(ValueError, match="does not give its features as timm's models do"):
        attribute(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5)), torch.randn(1, 3, 4, 4), method="grad_cam")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ModuleNotFoundError, match=r"vision-ssm-zoo\[explain\]"):
        attribute(make_model("vim"), make_images("vim"), method="grad_cam")


def striped(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """24 x 24 of noise with a striped square of 8 x 8, upright for class 0, lying for class 1; labels; and where."""
    labels = torch.randint(2, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, 24, 24, generator=generator)
    places = torch.zeros(count, 24, 24)
    stripes = 1.5 * torch.tensor([1.0, 1, -1, -1, 1, 1, -1, -1]).expand(8, 8)
    for image, label, place in zip(images, labels, places, strict=True):
        row, column = torch.randint(17, (2,), generator=generator).tolist()
        image[0, row : row + 8, column : column + 8] += stripes.T if label else stripes
        place[row : row + 8, column : column + 8] = 1
    return images, labels, places


@pytest.fixture(scope="module", params=["column", "stages"])
def trained(request):
    """A model that tells the stripes apart; images that it has not seen, with their labels and places."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    if request.param == "column":  # its class token stands in the middle
        model = VisionMamba(24, 4, in_chans=1, num_classes=2, embed_dim=32, depth=2)
    else:
        model = MambaVision(1, 2, stem_stride=1, dim=16, depths=(1, 1, 1, 1), num_heads=(2, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    while len(losses) < 30 or sum(losses[-5:]) / 5 > 0.03:
        assert len(losses) < 300, f"training does not succeed: the last losses are {losses[-5:]}"
        images, labels, _ = striped(32, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), *striped(64, generator)


@needs_cam
@pytest.mark.parametrize("method", ["input_gradient", "grad_cam"])
def test_maps_lie_where_the_evidence_is(trained, method):
    model, images, labels, places = trained

    def certainty(heat: torch.Tensor) -> float:
        """Mean probability of the right class once a fifth of the pixels, the hottest, are blank."""
        hottest = heat.flatten(1).topk(115).indices
        blanked = images.flatten(1).scatter(1, hottest, 0.0).view_as(images)
        with torch.no_grad():
            return model(blanked).softmax(-1).gather(1, labels[:, None]).mean().item()

    maps = attribute(model, images, labels, method)
    mass = (maps * places).sum((1, 2)) / maps.sum((1, 2))
    assert mass.mean() > 1.75 * places.mean()  # a uniform map would have just that share
    moved = maps.roll((12, 12), (1, 2))  # as many pixels in as many clumps, elsewhere
    assert certainty(maps) < min(certainty(moved), certainty(torch.rand(maps.shape))) - 0.1


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_gradients_of_the_packaged_model_lie_on_the_clothes():
    model, card = load_any("vim_nano.fashion_mnist")
    data = load_fashion_mnist("test").first(32)
    images = Normalize(card.preprocessing.mean, card.preprocessing.std)(data.images)
    clothes = (data.images[:, 0] > 0).float()
    maps = attribute(model, images)
    mass = (maps * clothes).sum((1, 2)) / maps.sum((1, 2))
    assert (mass > clothes.mean((1, 2))).float().mean() > 0.75
    assert (mass / clothes.mean((1, 2))).mean() > 1.25


def test_overlay_keeps_the_image_where_the_map_is_zero():
    image, heat = torch.full((1, 4, 6), 200, dtype=torch.uint8), torch.zeros(4, 6)
    heat[1, 2] = 1
    picture = overlay(image, heat)
    assert picture.shape == (4, 6, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == 100).all()
    assert picture[1, 2, 0] > 200 and picture[1, 2, 2] < picture[1, 2, 0]
    assert overlay(image.expand(3, -1, -1), heat).tolist() == picture.tolist()


@pytest.fixture
def photographs(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def test_tool_draws_a_sheet(photographs, capsys):
    options = ["vim_nano.fashion_mnist", str(photographs), "--output", str(photographs / "out"), "--device", "cpu"]
    assert tool.main([*options, "--shown", "2", "--batch-size", "1"]) == 0
    assert "2 images, input_gradient" in capsys.readouterr().out
    with Image.open(photographs / "out" / "attributions.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 150
    assert (np.ptp(pixels, axis=2) > 60).sum() > 100  # colour, which the grey images have none of


def test_tool_reports_mistakes_without_a_traceback(photographs, capsys):
    options = [str(photographs), "--output", str(photographs / "out"), "--device", "cpu"]
    assert tool.main(["vim_nano.fashion_mnist", *options, "--target", "Boot"]) == 1
    assert "has no class 'Boot'; its classes are" in capsys.readouterr().err
    assert tool.main(["runs/nowhere", *options]) == 1
    assert "runs/nowhere" in capsys.readouterr().err


def test_a_single_pixel_of_evidence_is_not_capped_away():
    class OnePixel(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 2, 3:5] * 2

    maps = attribute(OnePixel(), torch.ones(1, 1, 20, 20), 1)
    assert maps[0, 2, 4] == 1 and maps.sum() == 1
