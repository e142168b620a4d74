"""The command-line tools, from training to pictures, on real images."""

import csv
import json

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from zoo.data import load_digits
from zoo.engine import read_log
from zoo.engine.figures import draw_confusion, draw_curves
from zoo.plots import plot_images
from zoo.tools import demo, predict, train, validate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of the packaged recipe: enough to be right most of the time."""
    folder = tmp_path_factory.mktemp("tools") / "run"
    options = ["optim.epochs=8", "optim.warmup_epochs=1", "model.kwargs.depth=1", f"output={folder}", "cpu=true"]
    assert train.main(["vim/micro_digits", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Thirty test digits as PNG files in folders named after their class, and a broken one."""
    folder = tmp_path_factory.mktemp("scans")
    digits = load_digits("test")
    for index in range(30):
        place = folder / str(int(digits.labels[index]))
        place.mkdir(exist_ok=True)
        Image.fromarray(digits.images[index, 0].numpy()).save(place / f"{index:02d}.png")
    (folder / "0" / "broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def is_picture(path):
    """Whether a PNG file shows something: many colours, not one."""
    with Image.open(path) as image:
        return min(image.size) > 200 and len(np.unique(np.asarray(image.convert("L")))) > 20


def test_train_reports_mistakes_without_a_traceback(capsys, tmp_path):
    assert train.main(["vim/micro_digits", "optim.lrr=1"]) == 1
    assert "did you mean 'optim.lr'" in capsys.readouterr().err
    assert train.main(["no_such_recipe"]) == 1
    assert "no packaged configuration" in capsys.readouterr().err
    assert train.main(["vim/micro_digits", "model.name=vim_nono", f"output={tmp_path}"]) == 1
    assert "vim_nano" in capsys.readouterr().err


def test_validate_agrees_with_the_log(run, tmp_path, capsys):
    assert (
        validate.main([str(run / "last.safetensors"), "--device", "cpu", "--results-file", str(tmp_path / "r.csv")])
        == 0
    )
    row = json.loads(capsys.readouterr().out)
    columns = "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation"
    assert (tmp_path / "r.csv").read_text().splitlines()[0] == columns
    assert ",".join(row) == columns
    assert row["top1"] == pytest.approx(read_log(run)[-1]["top1"], abs=1e-3)
    assert row["top1"] + row["top1_err"] == pytest.approx(100)
    assert row["img_size"] == 8


def test_validate_on_a_folder_matches_classes_by_name(run, scans, capsys):
    options = ["--data", "folder", "--root", str(scans), "--split", "", "--workers", "0", "--device", "cpu"]
    assert validate.main([str(run), *options]) == 1
    assert "broken.png" in capsys.readouterr().err
    assert validate.main([str(run), *options, "--bad-files", "skip"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] > 60


def test_predict_writes_a_table_and_a_sheet(run, scans, tmp_path, capsys, caplog):
    options = ["--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main([str(run), str(scans), *options]) == 0
    assert "1 of 31 files" in caplog.text
    assert "broken.png" in caplog.text
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert all(row["true"] in row["file"] and 0.1 <= float(row["probability"]) <= 1 for row in rows)
    right = sum(row["predicted"] == row["true"] for row in rows)
    assert right > 18
    assert f"{right} of the 30" in capsys.readouterr().out
    assert is_picture(tmp_path / "out" / "predictions.png")


def test_predict_takes_files_and_patterns(run, scans, tmp_path, capsys):
    options = ["--output", str(tmp_path), "--device", "cpu"]
    one = next((scans / "1").iterdir())
    assert predict.main([str(run), str(one), str(scans / "[23]" / "*.png"), *options]) == 0
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert {row["true"] for row in csv.DictReader(file)} == {"1", "2", "3"}
    assert predict.main([str(run), str(scans / "nothing*.png"), *options]) == 1
    assert "no image at" in capsys.readouterr().err


def test_demo_trains_once_and_then_only_draws(tmp_path, capsys):
    assert demo.main(["--short", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Test accuracy after" in printed
    short = tmp_path / "short"
    for name in ("curves.png", "confusion.png", "predictions.png", "mistakes.png"):
        assert str(short / name) in printed
        assert is_picture(short / name)
    weights = (short / "last.safetensors").stat().st_mtime_ns
    (short / "curves.png").unlink()
    assert demo.main(["--short", "--output", str(tmp_path)]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (short / "last.safetensors").stat().st_mtime_ns == weights
    assert is_picture(short / "curves.png")


def test_pictures_of_any_size(tmp_path):
    """One epoch, many classes, one image: the pictures are still drawn."""
    import torch

    row = {"epoch": 1, "lr": 1e-3, "train_loss": 2.0, "val_loss": 1.9, "top1": 40.0}
    draw_curves([row], tmp_path / "curves.png", "one epoch", {"loss": ("train_loss", "val_loss")}, "top1")
    draw_confusion(
        torch.eye(100, dtype=torch.long), [str(i) for i in range(100)], tmp_path / "confusion.png", "hundred"
    )
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    plot_images([picture], ["unknown"], [None], tmp_path / "images.png", "one")
    assert all(is_picture(tmp_path / f"{name}.png") for name in ("curves", "confusion", "images"))


def test_missing_run_is_said_to_be_missing(tmp_path, capsys):
    assert validate.main([str(tmp_path / "no_run")]) == 1
    assert "there is no run and no weight file at" in capsys.readouterr().err
    assert validate.main(["vim_mikro"]) == 1
    assert "vim_micro" in capsys.readouterr().err


@pytest.fixture(scope="module")
def segmentation_run(tmp_path_factory):
    """A segmentor that has seen six small images twice, and the folder of the images."""
    root = tmp_path_factory.mktemp("segmentation")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / "data" / kind / split).mkdir(parents=True)
        for index in range(6):
            mask = np.kron(rng.integers(0, 2, (4, 5)), np.ones((8, 8))).astype(np.uint8)
            image = (100 * mask[..., None] + rng.integers(0, 100, (*mask.shape, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / "data" / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "data" / "masks" / split / f"{index}.png")
    options = [
        *("data.name=folder", f"data.root={root / 'data'}", "data.img_size=32", "data.batch_size=3", "data.workers=0"),
        *("model.kwargs={dims: 8, depths: [1, 1]}", "model.head_kwargs={channels: 16, norm: group}"),
        *("optim.epochs=2", "optim.warmup_updates=1", "cpu=true", "precision=fp32", f"output={root / 'run'}"),
    ]
    assert train.main(["segmentation/nano_fashion_scenes", *options]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return root / "run", root / "data"


def test_validate_measures_segmentors(segmentation_run, tmp_path, capsys):
    run, _ = segmentation_run
    options = ["--device", "cpu", "--results-file", str(tmp_path / "r.csv")]
    assert validate.main([str(run / "last.safetensors"), *options]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["miou"] == pytest.approx(read_log(run)[-1]["miou"], abs=1e-3)
    assert (tmp_path / "r.csv").read_text().splitlines()[0] == ",".join(row)
    assert validate.main([str(run), "inference.mode=slide", "inference.crop_size=[16,16]", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["inference"] == "slide"
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((run / "best.safetensors").read_bytes())
    assert validate.main([str(moved)]) == 1
    assert "no config.yaml of its run beside it" in capsys.readouterr().err


def test_predict_segments_files(segmentation_run, tmp_path, capsys):
    run, data = segmentation_run
    options = ["--device", "cpu", "--output", str(tmp_path), "--set", "inference.flip=true"]
    assert predict.main([str(run), str(data / "images" / "val"), *options]) == 0
    assert "6 images segmented into 2 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "labels").iterdir())) == 6
    assert is_picture(tmp_path / "predictions.png")
    assert predict.main([str(run), str(data / "images" / "val"), *options, "--set", "inference.modus=slide"]) == 1
    assert "did you mean 'inference.mode'" in capsys.readouterr().err
