"""Every setting that a recipe names has its effect: optimizer, rates, averages, augmentation, losses, scores."""

import csv
import functools
import math
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchmetrics  # noqa: F401 before a test hides matplotlib, which it imports
import yaml
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from sklearn.metrics import balanced_accuracy_score

import zoo
from zoo.backbones import FAMILIES
from zoo.config import AugmentConfig, DataConfig, load_config
from zoo.data import Preprocessing, TensorLoader, image_transform, load_digits, make_loader, open_split
from zoo.data.memory import epoch_order
from zoo.engine import load_trained, read_log, train
from zoo.engine.build import build_loss, build_model, build_optimizer

ROOT = Path(__file__).parents[1]

COLUMN = "patch_size: 8, embed_dim: 32, depth: 2"
WINDOWS = "directions: [[h, w2_flip], [v_flip, w3]]"
STAGES = "dims: 16, depths: [1, 1, 1, 1]"
SMALL = {  # one recipe of every family, and what makes its model small
    "a2mamba": ("tiny_in1k", "a2mamba_pico", "dims: [16, 32, 64], depths: [1, 1, 1], num_heads: [2, 2, 4]"),
    "adventurer": ("base_in1k_stage1", "adventurer_nano", f"{COLUMN}, d_state: 8, head_dim: 16, reversed_blocks: [1]"),
    "efficient_vmamba": ("base_in1k", "efficient_vmamba_nano", STAGES),
    "lbvim": ("tiny_in1k", "lbvim_nano", COLUMN),
    "local_vim": ("tiny_in1k", "local_vim_nano", f"{COLUMN}, {WINDOWS}"),
    "local_vmamba": ("small_in1k", "local_vmamba_nano", f"{STAGES}, {WINDOWS}"),
    "mamba_vision": (
        *("base_in1k", "mamba_vision_nano"),
        "dim: 16, stem_width: 8, depths: [1, 1, 2, 2], num_heads: [2, 4]",
    ),
    "plain_mamba": ("l1_in1k", "plain_mamba_nano", f"{COLUMN}, stem_width: 16"),
    "shuffle_mamba": ("base_in1k", "shuffle_mamba_nano", COLUMN),
    "vim": ("tiny_in1k", "vim_micro", COLUMN),
    "vmamba": ("tiny_in1k", "vmamba_nano", STAGES),
}
DIGITS = [
    "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, d_state: 4}",
    *("data.train_samples=64", "data.val_samples=32", "data.batch_size=32", "cpu=true"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def no_pictures(monkeypatch):
    """A run without matplotlib draws nothing and takes half the time."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@functools.cache
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((80, 60))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of crops from two photographs: <folder>/<split>/<class>/<n>.png."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("china", "flower"):
            (folder / split / name).mkdir(parents=True)
            image = Image.fromarray(load_sample_image(f"{name}.jpg"))
            for number in range(count):
                left, top = random.integers(0, 500), random.integers(0, 300)
                image.crop((left, top, left + 64, top + 48)).save(folder / split / name / f"{number}.png")
    return folder


def digits(output: Path, *overrides: str):
    return load_config("vim/micro_digits", [*DIGITS, f"output={output}", *overrides])


# Whole recipes.


def test_all_families_are_here():
    assert set(SMALL) == set(FAMILIES)


@pytest.mark.parametrize("family", SMALL)
def test_published_recipe_trains_a_small_model(family, photos, tmp_path, no_pictures):
    """Two updates on photographs with all of a recipe's settings; the second one with its teacher, if it has one."""
    recipe, name, small = SMALL[family]
    options = [f"model.name={name}", f"model.kwargs={{{small}}}", "data.img_size=32", "data.batch_size=4"]
    options += [f"data.root={photos}", "data.workers=0", "cpu=true", f"output={tmp_path / 'run'}"]
    options += ["optim.epochs=2", "optim.epoch_updates=1", "optim.warmup_epochs=1", "optim.cooldown_epochs=0"]
    config = load_config(f"classification/{family}/{recipe}", [*options, "distill.start_epoch=1"])
    result = train(config)
    scale = 4 / config.optim.lr_batch_size
    warmup_lr = config.optim.lr / 100 if config.optim.warmup_lr is None else config.optim.warmup_lr
    assert result.log[0]["lr"] == pytest.approx(scale * warmup_lr, rel=1e-4)
    halfway = (config.optim.lr + config.optim.min_lr) / 2
    assert result.log[1]["lr"] == pytest.approx(scale * halfway, rel=1e-4)
    assert all(math.isfinite(value) for row in result.log for value in row.values())
    model, card = load_trained(tmp_path / "run" / "last.safetensors")
    assert card.class_names == ("china", "flower")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_stages_continue_at_a_larger_size(photos, tmp_path, no_pictures):
    """What a first stage learned at fewer pixels is where the second begins; its position embedding is resampled."""
    name, small = SMALL["adventurer"][1:]
    options = [f"model.name={name}", f"model.kwargs={{{small}}}", "data.batch_size=4", f"data.root={photos}"]
    options += ["data.workers=0", "cpu=true", "optim.epochs=2", "optim.epoch_updates=1", "optim.warmup_epochs=1"]
    first = load_config("adventurer/base_in1k_stage1", [*options, "data.img_size=16", f"output={tmp_path / 'one'}"])
    train(first)
    second = load_config(
        "adventurer/base_in1k_stage2",
        [
            *(*options, "data.img_size=32", f"output={tmp_path / 'two'}", "optim.lr=0", "optim.min_lr=0"),
            *("optim.warmup_lr=0", f"model.checkpoint={tmp_path / 'one' / 'last.safetensors'}"),
        ],
    )
    train(second)
    old, new = (load_file(tmp_path / run / "last.safetensors") for run in ("one", "two"))
    assert (old["pos_embed"].shape[1], new["pos_embed"].shape[1]) == (2 * 2 + 1, 4 * 4 + 1)
    assert all(torch.equal(old[key], new[key]) for key in old if key != "pos_embed")
    torch.testing.assert_close(new["pos_embed"].mean(1), old["pos_embed"].mean(1), rtol=0.5, atol=0.02)


def test_model_settings_reach_the_model():
    """Blocks are skipped, and tokens shuffled, in training alone."""

    def built(*overrides: str) -> torch.nn.Module:
        small = ["model.kwargs={embed_dim: 32, depth: 3, img_size: 8, patch_size: 2}", *overrides]
        return build_model(load_config("shuffle_mamba/base_in1k", small), digit_images, tuple("0123456789"))[0]

    digit_images, images = load_digits("train"), torch.randn(2, 1, 8, 8)
    drops = [module.drop_prob for module in built().modules() if type(module).__name__ == "DropPath"]
    assert 0.2 < max(drops) <= 0.5
    shuffled, plain = built("model.drop_path=0"), built("model.drop_path=0", "model.kwargs.layer_shuffle=0")
    for model, changes in ((shuffled, True), (plain, False)):
        assert (len({model(images).sum().item() for _ in range(8)}) > 1) == changes
        assert len({model.eval()(images).sum().item() for _ in range(8)}) == 1


# The optimizer.


def optimizer_for(model: torch.nn.Module, world_size: int = 1, updates: int = 4, **settings):
    config = load_config("vim/micro_digits", [f"optim.{key}={value}" for key, value in settings.items()])
    return build_optimizer(config, model, updates, world_size)


def test_optimizer_is_torchs_own_loop_on_the_cpu():
    assert not optimizer_for(torch.nn.Linear(3, 2))[0].defaults["fused"]


@pytest.mark.gpu
def test_one_kernel_steps_all_parameters_on_the_gpu():
    """Its steps are those of torch's loop, also from a state that was saved in between."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 7)).cuda()
    parameters, expected = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_for(model, lr=1e-2)[0]
    assert optimizer.defaults["fused"] and not optimizer_for(model, name="lamb")[0].defaults.get("fused")
    twin = dict(zip(parameters, expected, strict=True))
    groups = [{**group, "params": [twin[p] for p in group["params"]]} for group in optimizer.param_groups]
    peer = torch.optim.AdamW([{**group, "fused": False, "foreach": False} for group in groups])
    for step in range(6):
        for own, other in zip(parameters, expected, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        optimizer.step()
        peer.step()
        if step == 2:
            state = optimizer.state_dict()
            optimizer = optimizer_for(model, lr=1e-2)[0]
            optimizer.load_state_dict(state)
    torch.testing.assert_close([p.detach() for p in parameters], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay_lowers_the_rate_from_head_to_stem(family):
    """Each parameter is in one group; rates fall by the factor from one layer to the one before it."""
    name, small = SMALL[family][1:]
    with torch.device("meta"):
        model = zoo.create_model(name, num_classes=5, **yaml.safe_load(f"{{{small}}}"))
    optimizer, scheduler = optimizer_for(model, layer_decay=0.5, lr=1.0, epochs=16, warmup_epochs=2, min_lr=1.0)
    scheduler.step_update(8)  # the warm-up has ended
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters())
    assert len(rates) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    exponents = {round(math.log(rate, 0.5), 6) for rate in rates.values()}
    assert exponents == set(map(float, range(len(exponents)))) and len(exponents) >= 4
    classifier = model.pretrained_cfg["classifier"]
    assert rates[id(named[f"{classifier}.weight"])] == 1.0
    assert rates[id(named[f"{model.pretrained_cfg['first_conv']}.weight"])] == min(rates.values())


@pytest.mark.parametrize("layer_decay", ["null", "0.8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_never_decayed(family, layer_decay):
    with torch.device("meta"):
        model = zoo.create_model(SMALL[family][1], num_classes=5)
    optimizer, _ = optimizer_for(model, weight_decay=0.1, layer_decay=layer_decay)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    exempt = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0}
    assert set(decay.values()) == {0.0, 0.1}
    assert model.no_weight_decay() <= exempt
    assert all(name in exempt for name, parameter in model.named_parameters() if parameter.ndim <= 1)
    assert f"{model.pretrained_cfg['classifier']}.weight" not in exempt


def rates_of(updates: int = 4, world_size: int = 1, **settings) -> list[float]:
    """The learning rate of every update."""
    model = torch.nn.Linear(2, 2)
    optimizer, scheduler = optimizer_for(model, world_size, updates, **settings)
    rates = []
    for update in range(settings["epochs"] * updates):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
    return rates


def test_learning_rate_warms_up_falls_and_cools_down():
    rates = rates_of(lr=1.0, epochs=10, warmup_epochs=2, warmup_lr=0.2, min_lr=0.1, cooldown_epochs=3)
    warmup, fall, cooldown = rates[:8], rates[8:28], rates[28:]
    np.testing.assert_allclose(warmup, np.linspace(0.2, 1.0, 8, endpoint=False))
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * update / 28)) / 2 for update in range(8, 28)]
    np.testing.assert_allclose(fall, cosine)
    np.testing.assert_allclose(cooldown, [0.1] * 12)
    assert rates_of(lr=1.0, epochs=10, warmup_epochs=2)[0] == pytest.approx(0.01)


def test_learning_rates_follow_the_batch():
    """micro_digits has batches of 32: two processes that accumulate two make 128."""
    settings = dict(lr=1.0, epochs=4, warmup_epochs=1, warmup_lr=0.2, min_lr=0.1)
    plain = np.array(rates_of(**settings))
    np.testing.assert_allclose(rates_of(**settings, lr_batch_size=32), plain)
    np.testing.assert_allclose(rates_of(**settings, lr_batch_size=64), plain / 2)
    np.testing.assert_allclose(rates_of(**settings, lr_batch_size=64, grad_accum=2, world_size=2), 2 * plain)


def test_settings_that_cannot_be_meant_are_refused():
    for override, message in (
        ("optim.cooldown_epochs=16", "cooldown_epochs must be between 0 and 14"),
        ("augment.repeats=0", "repeats must be at least 1"),
        ("data.crop_pct=1.5", r"crop_pct must be in \(0, 1\]"),
        ("loss=hinge", "loss must be one of cross_entropy, bce"),
        ("scores=f1", "scores must be one of accuracy, balanced"),
        ("distill.weight=2", "set distill.label_weight too"),
        ("distill.temperature=0", "temperature must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("vim/micro_digits", [override])
    with pytest.raises(ValueError, match="set ema_decay"):
        load_config("vim/micro_digits", ["distill.teacher=ema", "ema_decay=null"])


def test_average_moves_as_its_decay_says(tmp_path, no_pictures):
    """Three updates of one epoch each: the average that was kept is the one computed from the weights."""
    config = digits(tmp_path, "ema_decay=0.6", "optim.epochs=3", "optim.epoch_updates=1", "optim.warmup_epochs=0")
    train(config)
    states = [tmp_path / "checkpoints" / f"epoch-000{epoch}" for epoch in (2, 3)]
    averages = [torch.load(state / "training.pt", weights_only=True)["ema"] for state in states]
    weights = load_file(states[1] / "model.safetensors")
    decay = min(0.6, 1 - 3 ** (-2 / 3))  # timm lets the decay rise to its value over the first updates
    for name, average in averages[1].items():
        expected = decay * averages[0][name] + (1 - decay) * weights[name]
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6)
    kept = load_file(tmp_path / "last.safetensors")
    assert all(torch.equal(kept[name], averages[1][name]) for name in kept)


# Augmentation.


def transformed(count: int, size: int = 32, **settings) -> list[np.ndarray]:
    preprocessing = Preprocessing((size, size), 3, (0.5,) * 3, (0.5,) * 3, "bicubic")
    transform = image_transform(preprocessing, AugmentConfig(**settings))
    return [transform(photo()).permute(1, 2, 0).numpy().astype(int) for _ in range(count)]


def test_three_augment_takes_one_of_three():
    """Grey, solarised or blurred, each as often: told apart by what each of them does to the same crop."""
    photo_crop = transformed(1, min_scale=1.0)[0]
    solarised = np.asarray(ImageOps.solarize(Image.fromarray(photo_crop.astype(np.uint8)), 128)).astype(int)
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    for image in transformed(300, min_scale=1.0, auto_augment="3a"):
        if (np.ptp(image, axis=-1) <= 2).all():
            counts["grey"] += 1
        elif np.abs(image - solarised).max() <= 1:
            counts["solarised"] += 1
        else:
            roughness = [np.abs(np.diff(each, axis=0)).mean() for each in (image, photo_crop)]
            assert roughness[0] <= roughness[1]
            counts["blurred"] += 1
    assert sum(counts.values()) == 300
    assert all(70 < count < 130 for count in counts.values()), counts


def test_jitter_works_beside_a_policy():
    plain = {image.tobytes() for image in transformed(60, min_scale=1.0, auto_augment="3a")}
    jittered = {image.tobytes() for image in transformed(60, min_scale=1.0, auto_augment="3a", color_jitter=0.3)}
    assert len(jittered) == 60  # no two alike, and grey and solarised ones alone are always the same
    assert len(plain) < 40
    brightness = [image.mean() for image in transformed(60, min_scale=1.0, color_jitter=0.3)]
    assert np.std(brightness) > 5 > np.std([image.mean() for image in transformed(60, min_scale=1.0)])


def test_random_augment_changes_images_more_with_its_magnitude():
    reference = transformed(1, min_scale=1.0)[0]

    def change(policy: str) -> float:
        images = transformed(80, min_scale=1.0, auto_augment=policy)
        return np.mean([np.abs(image - reference).mean() for image in images])

    assert 2 < change("rand-m2-inc1") < change("rand-m9-mstd0.5-inc1")


def test_simple_crop_cuts_the_resized_image():
    """Some square of the image, whose shorter side is the model's, with four reflected pixels around it."""
    resized = photo().resize((42, 32), Image.Resampling.BICUBIC)  # 80 x 60, shorter side 32
    padded = np.pad(np.asarray(resized).astype(int), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    places = set()
    for image in transformed(20, simple_crop=True):
        fits = [
            (top, left)
            for top in range(padded.shape[0] - 31)
            for left in range(padded.shape[1] - 31)
            if np.abs(padded[top : top + 32, left : left + 32] - image).max() <= 1
        ]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) > 10


def test_repeats_fill_an_epoch_of_the_same_length():
    plain = epoch_order(100, True, seed=0, epoch=3)
    order = epoch_order(100, True, seed=0, epoch=3, repeats=3)
    assert len(order) == 100
    images, copies = order % 100, order // 100
    assert images.tolist() == plain[:34].repeat_interleave(3)[:100].tolist()
    assert copies.tolist() == ([0, 1, 2] * 34)[:100]
    shares = [epoch_order(100, True, seed=0, epoch=3, rank=rank, world_size=3, repeats=3) for rank in range(3)]
    first = [set((share % 100).tolist()) for share in shares]
    assert len(first[0]) == 34 and first[0] >= first[1] == first[2]  # each process has one copy of an image
    assert torch.equal(epoch_order(10, False, 0, 0), torch.arange(10))


@pytest.mark.parametrize("world_size", [1, 2])
def test_copies_of_an_image_are_augmented_anew(photos, world_size):
    """They differ, they are the same in every pass of that epoch, and a pass may begin at any batch."""
    data = DataConfig(name="folder", root=str(photos), batch_size=4, workers=0)
    dataset, _ = open_split(data, "train")
    preprocessing = Preprocessing((32, 32), 3, (0.5,) * 3, (0.5,) * 3)
    seen = []
    for rank in range(world_size):
        augment = AugmentConfig(repeats=4, auto_augment="3a")
        loader = make_loader(dataset, preprocessing, data, "cpu", augment, rank=rank, world_size=world_size)
        loader.set_epoch(2)
        batches = list(loader)
        assert len(batches) == 4 // world_size
        loader.set_epoch(2, first_batch=1)
        torch.rand(3)  # what else was drawn does not matter
        assert all(torch.equal(a[0], b[0]) for a, b in zip(batches[1:], loader, strict=True))
        seen += batches
    images, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(labels) == 16
    assert len({image.numpy().tobytes() for image in images}) == 16


def test_repeats_of_data_in_memory():
    digit_images = load_digits("train").first(60)
    loader = TensorLoader(digit_images, 20, training=True, repeats=3)
    images = torch.cat([images for images, _ in loader])
    assert len(images) == 60
    assert len({image.numpy().tobytes() for image in images}) == 20


def test_evaluation_crop_is_that_of_the_configuration(photos):
    config = DataConfig(name="folder", root=str(photos), crop_pct=0.5, img_size=32)
    from zoo.data import resolve_preprocessing

    dataset, _ = open_split(config, "val")
    model = zoo.create_model("vim_micro", embed_dim=16, depth=1)
    assert resolve_preprocessing(config, dataset, model).crop_pct == 0.5
    assert resolve_preprocessing(DataConfig(name="folder"), dataset, model).crop_pct == 1.0


def test_augmentation_of_files_is_refused_for_data_in_memory():
    for settings in (dict(auto_augment="3a"), dict(color_jitter=0.3), dict(simple_crop=True)):
        with pytest.raises(ValueError, match="work on image files"):
            preprocessing = Preprocessing((8, 8), 1, (0.5,), (0.5,))
            make_loader(load_digits("train"), preprocessing, DataConfig(), "cpu", AugmentConfig(**settings))


# Losses and scores.


def test_binary_cross_entropy_of_hard_and_mixed_labels():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    config = load_config("vim/micro_digits", ["loss=bce", "augment.label_smoothing=0.1"])
    mixup, criterion = build_loss(config, 5)
    targets = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    assert mixup is None
    torch.testing.assert_close(criterion(logits, labels), expected)

    config = load_config("vim/micro_digits", ["loss=bce", "augment.mixup=0.8", "augment.label_smoothing=0.1"])
    mixup, criterion = build_loss(config, 5)
    _, mixed = mixup(torch.randn(6, 1, 4, 4), labels)
    torch.testing.assert_close(criterion(logits, mixed), F.binary_cross_entropy_with_logits(logits, mixed))
    assert mixed.sum(1).allclose(torch.ones(6))


@pytest.fixture
def cells(tmp_path) -> Path:
    """Forty-eight images in the layout of elpv: cells get darker with the probability of a defect."""
    (tmp_path / "images").mkdir()
    random, lines = np.random.default_rng(0), []
    for number in range(48):
        third = (0, 0, 0, 1, 2, 3)[number % 6]
        noise = random.normal(200 - 50 * third, 10, (30, 30)).clip(0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "images" / f"cell{number:04d}.png")
        lines.append(f"images/cell{number:04d}.png  {third / 3}  {('mono', 'poly')[number // 6 % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("recipe", ["vim/nano_elpv", "vim/nano_elpv_binary"])
def test_solar_cells_are_scored_class_by_class(cells, tmp_path, recipe, no_pictures):
    options = [f"data.root={cells}", f"output={tmp_path / 'run'}", "cpu=true", "precision=fp32", "data.img_size=16"]
    options += [
        "model.name=vim_micro",
        "model.kwargs={patch_size: 8, embed_dim: 16, depth: 1}",
        "optim.warmup_epochs=1",
    ]
    result = train(load_config(recipe, [*options, "data.batch_size=12", "optim.epochs=6", "optim.lr=1e-2"]))
    assert result.goal == "balanced_accuracy"
    assert result.best["balanced_accuracy"] == max(row["balanced_accuracy"] for row in result.log)
    model, card = load_trained(tmp_path / "run" / "last.safetensors")
    assert len(card.class_names) == (2 if recipe.endswith("binary") else 4)
    data, _ = open_split(DataConfig(name=card.data, root=str(cells), img_size=16), "test")
    with torch.no_grad():
        images = (data.images / 255 - card.preprocessing.mean[0]) / card.preprocessing.std[0]
        guesses = model(images).argmax(-1)
    row = read_log(tmp_path / "run")[-1]
    assert row["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(data.labels, guesses), abs=1e-3)
    assert 0 <= row["macro_f1"] <= 100 and 0 <= row["auroc"] <= 100


# timm's own script.


def timms_script() -> Path:
    """timm's train.py of the installed version: it is in the repository and in no package."""
    path = ROOT / ".pytest_cache" / "timm" / f"timm-{timm.__version__}" / "train.py"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = f"https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{timm.__version__}/train.py"
        try:
            urllib.request.urlretrieve(source, path)
        except urllib.error.URLError as error:
            pytest.skip(f"{source} cannot be fetched: {error}")
    return path


@pytest.mark.slow
@pytest.mark.network
def test_timms_own_script_trains_our_models(photos, tmp_path):
    """Unchanged, with layer decay, mixing and a moving average: ``--device-modules zoo`` is what registers us."""
    command = [sys.executable, str(timms_script()), "--device-modules", "zoo", "--device", "cpu"]
    command += ["--data-dir", str(photos), "--val-split", "val", "--model", "vim_micro"]
    command += ["--model-kwargs", "depth=2", "embed_dim=32", "--img-size", "32", "--num-classes", "2", "-b", "4"]
    command += ["--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--opt", "adamw", "--layer-decay", "0.8"]
    command += ["--mixup", "0.8", "--drop-path", "0.1", "--model-ema", "--output", str(tmp_path), "--experiment", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "x" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert math.isfinite(float(row["train_loss"])) and 0 <= float(row["eval_top1"]) <= 100
    checkpoint = tmp_path / "x" / "model_best.pth.tar"
    model = zoo.create_model("vim_micro", checkpoint_path=checkpoint, depth=2, embed_dim=32, img_size=32, num_classes=2)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
