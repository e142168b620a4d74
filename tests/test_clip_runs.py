"""Contrastive runs: pairs of images and captions, settings, training, several processes, the tool."""

import csv
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import zoo
from zoo.config import ClipConfig, ClipDataConfig, ZeroShotConfig, load_config
from zoo.data import Preprocessing
from zoo.data.captions import WordTokenizer, open_captions, read_pairs
from zoo.data.fashion_mnist import DEBIAN_FOLDER
from zoo.data.scenes import split_words, vocabulary
from zoo.engine import load_trained, read_log, train
from zoo.engine.task import Place, find_task
from zoo.tools.zero_shot import main
from zoo.weights import save_weights
from zoo.zero_shot import load_contrastive, open_classes

pytest.importorskip("open_clip")

TINIER_VISION = {"embed_dim": 32, "depth": 1, "patch_size": 16, "d_state": 4}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
PLACES = {"left": (0, 0, 12, 32), "right": (20, 0, 32, 32), "top": (0, 0, 32, 12)}

needs_photos = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# Data


def draw(colour, place, shade=0):
    image = Image.new("RGB", (32, 32), (90 + shade,) * 3)
    image.paste(tuple(max(0, level - shade) for level in COLOURS[colour]), PLACES[place])
    return image


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Coloured bars with captions, a CSV for training and a JSON file for validation; and bars in class folders."""
    root = tmp_path_factory.mktemp("pairs")
    for split, shades in (("train", range(0, 40, 10)), ("val", (5, 25))):
        rows = []
        for colour, place, shade in itertools.product(COLOURS, PLACES, shades):
            name = f"{split}_{colour}_{place}_{shade}.png"
            draw(colour, place, shade).save(root / name)
            rows.append({"image": name, "caption": f"A {colour} bar at the {place}."})
        if split == "val":
            (root / "val.json").write_text(json.dumps(rows))
            continue
        with (root / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    for colour, place in itertools.product(COLOURS, PLACES):
        folder = root / "classes" / "val" / colour
        folder.mkdir(parents=True, exist_ok=True)
        draw(colour, place, 15).save(folder / f"{place}.png")
    return root


def test_pairs_are_read_with_equal_captions_numbered_alike(pairs):
    data = open_captions(ClipDataConfig(name="pairs", root=str(pairs)), training=False)
    assert len(data) == 24 and len(data.caption_ids.unique()) == 12 and len(data.image_ids.unique()) == 24
    few = open_captions(ClipDataConfig(name="pairs", root=str(pairs), train_samples=5), training=True)
    assert len(few) == len(few.images) == 5


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_pairs_are_reported_and_left_out(tmp_path, caplog):
    draw("red", "left").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = ["image,caption", "good.png,A bar.", "gone.png,Two bars.", "broken.png,Three bars.", "good.png,   "]
    path = write_csv(tmp_path / "pairs.csv", *lines)
    with pytest.raises(ValueError, match=r"1 of 4 captions .*empty.*good\.png.*bad_files=skip"):
        read_pairs(path)
    files, captions = read_pairs(path, "skip")
    assert [file.name for file in files] == ["good.png"] and captions == ["A bar."]
    for words in ("1 of 4 captions", "2 of 3 files", "gone.png: there is no such file", "broken.png"):
        assert words in caplog.text
    with pytest.raises(ValueError, match=r"2 of 3 files.*(\n.*)*gone\.png"):
        read_pairs(write_csv(path, *lines[:-1]))
    with pytest.raises(ValueError, match="no pair"):
        read_pairs(write_csv(path, *lines[:1], *lines[2:4]), "skip")


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("x.csv", "file,caption\na.png,A bar.\n", "lacks the column image.*file, caption"),
        ("x.csv", "", "lacks the column image and caption.*nothing"),
        ("x.json", '{"image": "a.png"}', "list of objects"),
        ("x.json", '[{"image": "a.png", "caption": 3}]', "list of objects"),
        ("x.json", "[", "not valid JSON"),
        ("x.json", "[]", "no pair"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_pairs(tmp_path / name)


def test_missing_data_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.csv nor .*train\.json"):
        open_captions(ClipDataConfig(name="pairs", root=str(tmp_path)), training=True)
    with pytest.raises(ValueError, match=r"data\.root"):
        open_captions(ClipDataConfig(name="pairs"), training=True)


@pytest.mark.parametrize(
    "options, problem",
    [
        (["optim.layer_decay=0.9"], "layer_decay"),
        (["zero_shot.templates=['a photo']"], "templates"),
        (["zero_shot.fill=0"], "fill"),
        (["data.name=coco"], "fashion_scenes, pairs"),
        (["model.unlocked_groups=2"], "lock_vision"),
        (["data.val_samples=1"], "val_samples"),
        (["loss=triplet"], "clip, siglip"),
        (["model.tokenizer=letters"], "bpe, words"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        load_config("clip/vim_nano_fashion_scenes", options)


# Training


def pairs_config(pairs, output, *overrides, text_kwargs=("head_dim: 16", "d_state: 8")):
    return load_config(
        "clip/vim_nano_fashion_scenes",
        [
            "model.name=vim_micro",
            f"model.kwargs={json.dumps(TINIER_VISION)}",
            f"model.text_kwargs={{width: 32, layers: 1, {', '.join(text_kwargs)}}}",
            "model.embed_dim=32",
            "model.context_length=12",
            "data.name=pairs",
            f"data.root={pairs}",
            "data.val_split=val",
            "data.img_size=32",
            "data.train_samples=null",
            "data.batch_size=24",
            "data.workers=0",
            "augment.crop_padding=0",
            "augment.min_scale=1",
            "zero_shot.data=folder",
            f"zero_shot.root={pairs / 'classes'}",
            "zero_shot.split=val",
            "zero_shot.fill=1",
            "zero_shot.templates=['A {} bar at the left.', 'A {} bar at the top.']",
            "optim.lr=1e-2",
            "optim.epochs=2",
            "optim.warmup_epochs=0",
            "precision=fp32",
            "cpu=true",
            f"output={output}",
            *overrides,
        ],
    )


def test_a_run_learns_pairs_and_classes_and_is_loaded_again(pairs, tmp_path, capsys):
    result = train(pairs_config(pairs, tmp_path, "optim.epoch_updates=70"))
    first, last = result.log[0], result.log[-1]
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert result.best["recall1"] > 60 > 100 / 12  # of 12 captions one is right
    assert result.best["recall1"] == pytest.approx((result.best["i2t_recall1"] + result.best["t2i_recall1"]) / 2)
    assert result.best["zero_shot_top1"] > 60  # of 4 classes
    assert (tmp_path / "captions.png").stat().st_size > 10_000

    _, card = load_trained(tmp_path / "last.safetensors")
    assert (card.task, card.model, card.data) == ("clip", "vim_micro", "pairs")
    tower = load_contrastive(str(tmp_path / "last.safetensors"))
    assert tower.tokenizer.decode(tower.tokenizer("A red bar.")[0].tolist()) == "a red bar."
    assert main([str(tmp_path / "last.safetensors"), "--workers", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["top1"] == pytest.approx(last["zero_shot_top1"], abs=1e-3)
    where = ["--data", "pairs", "--root", str(pairs), "--workers", "0"]
    assert main([str(tmp_path / "last.safetensors"), *where]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["i2t_recall1"] == pytest.approx(last["i2t_recall1"], abs=1e-3)
    assert main([str(tmp_path), "--templates", "A photo of a {}.", "--workers", "0"]) == 1
    assert "no word 'photo'" in capsys.readouterr().err


def test_a_run_with_the_other_choices(pairs, tmp_path):
    """Sigmoid loss, open_clip's text tower and tokenizer, a locked image tower, recomputation, moving average."""
    options = ["loss=siglip", "model.text=transformer", "model.tokenizer=bpe", "model.lock_vision=true"]
    options += ["grad_checkpointing=block", "ema_decay=0.9", "zero_shot.data=null"]
    result = train(pairs_config(pairs, tmp_path, *options, text_kwargs=["heads: 2"]))
    assert result.log[-1]["val_loss"] < result.log[0]["val_loss"]
    assert "zero_shot_top1" not in result.log[0]
    model, card = load_trained(tmp_path)
    assert card.kwargs["tokenizer"] == {"context_length": 12, "words": None}
    assert model.vocab_size == 49408
    fresh = find_task("clip").create_model(card)
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_factor_of_similarities_is_kept_below_its_limit(pairs, tmp_path):
    task = find_task("clip")(pairs_config(pairs, tmp_path), Place(torch.device("cpu")))
    with torch.no_grad():
        task.model.logit_scale.fill_(7.0)
    task.train_loader.set_epoch(0)
    task.loss(task.model, next(iter(task.train_loader))).backward()
    assert task.model.logit_scale.exp().item() == pytest.approx(100)
    assert task.model.logit_scale.grad is not None
    assert "every module's output is finite" in task.explain_failure()


def test_batches_of_one_pair_and_unknown_words_are_refused(pairs, tmp_path):
    find, place = find_task("clip"), Place(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"one pair.*data\.batch_size"):
        find(pairs_config(pairs, tmp_path, "data.batch_size=1"), place)
    with pytest.raises(ValueError, match="no word 'violet'"):
        find(pairs_config(pairs, tmp_path, "zero_shot.class_names=[red, violet, blue, white]"), place)
    with pytest.raises(ValueError, match="there are 2 class names for the 4 classes"):
        find(pairs_config(pairs, tmp_path, "zero_shot.class_names=[red, green]"), place)


def test_vision_tower_starts_from_a_classifier(pairs, tmp_path):
    classifier = zoo.create_model("vim_micro", num_classes=3, img_size=32, **TINIER_VISION)
    save_weights(classifier.state_dict(), tmp_path / "classifier.safetensors")
    options = [f"model.checkpoint={tmp_path / 'classifier.safetensors'}", "model.lock_vision=true"]
    task = find_task("clip")(pairs_config(pairs, tmp_path, *options), Place(torch.device("cpu")))
    for name, tensor in task.model.visual.trunk.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name


def test_images_with_classes_are_framed_in_black(pairs):
    wanted = Preprocessing((30, 40), 3, (0.5,) * 3, (0.25,) * 3)
    config = ZeroShotConfig(data="folder", root=str(pairs / "classes"), fill=0.5)
    loader, present, names = open_classes(config, wanted, batch_size=5, workers=0)
    assert names == tuple(sorted(COLOURS))
    images = present(next(iter(loader))[0])
    assert images.shape == (5, 3, 30, 40)
    assert (images[:, :, :7] == -2).all() and (images[..., :10] == -2).all()
    assert (images[:, :, 8:22, 10:30] > -2).any(dim=1).all()


@needs_photos
def test_scenes_and_grey_photos(tmp_path):
    config = ClipDataConfig(val_samples=6, val_split="test", workers=0)
    data = open_captions(config, training=False)
    assert data.images.images.shape == (6, 3, 64, 64) and data.words == vocabulary()
    assert all(set(split_words(caption)) <= set(data.words) for caption in data.captions)
    wanted = Preprocessing((64, 64), 3, (0.0,) * 3, (1.0,) * 3)
    zero_shot = ZeroShotConfig(data="fashion_mnist", split="test", samples=10, fill=0.45)
    loader, present, names = open_classes(zero_shot, wanted)
    images = present(next(iter(loader))[0])
    assert images.shape == (10, 3, 64, 64)
    assert len(names) == 10 and names[:2] == ("t-shirt", "pair of trousers")  # as captions have them
    assert torch.equal(images[:, 0], images[:, 2]) and images[:, :, :17].max() == 0 < images.max()


def test_models_without_weights_or_of_other_tasks_are_refused(tmp_path, capsys):
    assert main(["zoo-vim_nano", "--data", "fashion_mnist"]) == 1
    assert "needs weights" in capsys.readouterr().err
    assert main(["no_such_model", "--data", "fashion_mnist"]) == 1
    assert "no_such_model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_two_processes_train_as_one(pairs, tmp_path, loss):
    """The same pairs in every update, so the same weights after a few."""
    options = [f"loss={loss}", "optim.name=sgd", "optim.betas=null"]
    train(pairs_config(pairs, tmp_path / "one", *options))
    (tmp_path / "recipe.yaml").write_text((tmp_path / "one" / "config.yaml").read_text())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = ["zoo.tools.train", str(tmp_path / "recipe.yaml"), "data.batch_size=12", f"output={tmp_path / 'two'}"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, *command], check=True, timeout=300, env=hidden)
    models = [load_trained(tmp_path / name / "last.safetensors")[0].state_dict() for name in ("one", "two")]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    logs = [read_log(tmp_path / name)[-1] for name in ("one", "two")]
    assert logs[1]["val_loss"] == pytest.approx(logs[0]["val_loss"], rel=1e-4)


def test_nothing_is_left_on_the_cpu(pairs, tmp_path, train_elsewhere):
    assert train_elsewhere(pairs_config(pairs, tmp_path))["val_loss"] > 0


@pytest.mark.gpu
def test_captured_image_tower_trains_as_the_eager_one(pairs, tmp_path):
    losses = []
    for captured in ("false", "true"):
        options = ["cpu=false", "precision=bf16", f"cuda_graph={captured}"]
        losses.append(train(pairs_config(pairs, tmp_path / captured, *options)).log[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_packaged_recipe_is_for_scenes():
    config = load_config("clip/vim_nano_fashion_scenes")
    assert isinstance(config, ClipConfig) and config.data.image_size == 64
    assert config.augment.flip == 0  # captions tell left from right
    words = WordTokenizer(vocabulary(), config.model.context_length)
    words([template.format("pair of trousers") for template in config.zero_shot.templates])
