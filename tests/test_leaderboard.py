"""The leaderboard: its recipe fits every small model, and its table says what the runs did."""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import zoo
from zoo.config import load_config
from zoo.engine import read_log
from zoo.kernels import selective_scan
from zoo.tools import leaderboard, train

# A2Mamba has released a model named nano, for 224 pixels; the one for small images is its pico.
NANO = [name for name in [*zoo.list_models("*_nano"), *zoo.list_models("*_pico")] if name != "a2mamba_nano"]
TINY = ["data.name=digits", "data.img_size=8", "data.train_samples=64", "data.val_samples=32", "data.batch_size=32"]
TINY += ["optim.epochs=2", "optim.warmup_epochs=1", "precision=fp32", "cpu=true"]
SMALL = ["model.kwargs.embed_dim=16", "model.kwargs.depth=2"]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of two models."""
    folder = tmp_path_factory.mktemp("leaderboard")
    for name in ("plain_mamba_nano", "local_vim_nano"):
        options = [f"model.name={name}", *SMALL, *TINY, f"output={folder / name}"]
        assert train.main([leaderboard.RECIPE, *options]) == 0
    return folder


def read_table(path):
    with path.open(newline="") as file:
        assert file.readline().startswith("# Trained on a test bench; vision-ssm-zoo ")
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NANO)
def test_recipe_fits_every_nano_model(name):
    config = load_config(leaderboard.RECIPE, [f"model.name={name}"])
    size = config.data.img_size
    with torch.device("meta"):
        model = zoo.create_model(name, num_classes=10, in_chans=1, drop_path_rate=config.model.drop_path)
        assert model(torch.empty(2, 1, size, size)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) <= 3e6


def test_table_of_two_runs(runs, tmp_path, capsys):
    folders = [str(runs / "plain_mamba_nano"), str(runs / "local_vim_nano")]
    path = tmp_path / "new" / "table.csv"
    assert leaderboard.main([*folders, "--output", str(path), "--device", "a test bench"]) == 0
    assert "2 runs in" in capsys.readouterr().out
    rows = read_table(path)
    assert {row["model"] for row in rows} == {"plain_mamba_nano", "local_vim_nano"}
    assert float(rows[0]["top1"]) >= float(rows[1]["top1"])
    for row in rows:
        log = read_log(runs / row["model"])
        assert float(row["top1"]) == log[-1]["top1"]
        assert float(row["train_samples_per_sec"]) == pytest.approx(log[1]["images_per_second"], abs=0.51)
        kwargs = dict(embed_dim=16, depth=2, num_classes=10, in_chans=1)
        model = zoo.create_model(row["model"], **kwargs)
        assert float(row["param_count"]) == round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
        assert float(row["gflops"]) == round(leaderboard.count_flops(model, (1, 1, 8, 8)) / 1e9, 4) > 0
        assert (int(row["img_size"]), int(row["epochs"])) == (8, 2)


def test_command_repeats_the_run(runs):
    rows = leaderboard.collect([runs / "plain_mamba_nano"])
    program, recipe, *settings = shlex.split(rows[0]["command"])[2:]
    assert (program, recipe) == ("zoo.tools.train", leaderboard.RECIPE)
    assert {"model.name=plain_mamba_nano", "optim.epochs=2", "model.kwargs.depth=2"} <= set(settings)
    again = load_config(recipe, [*settings, f"output={runs / 'plain_mamba_nano'}"])
    assert again == load_config(str(runs / "plain_mamba_nano" / "config.yaml"))


@pytest.mark.parametrize("changes", [[], ["optim.betas=[0.9,0.95]", "seed=3", "data.mean=[0.5]"], ["ema_decay=null"]])
def test_command_names_only_what_differs(changes):
    config = load_config(leaderboard.RECIPE, [*changes, "output=elsewhere", "data.workers=9"])
    command = leaderboard.training_command(leaderboard.asdict(config), leaderboard.RECIPE)
    settings = shlex.split(command)[4:]
    assert len(settings) == len(changes)
    assert load_config(leaderboard.RECIPE, [*settings, "output=elsewhere", "data.workers=9"]) == config


def test_flops_include_the_scan():
    """A model that is a scan and nothing else counts nine operations per step, channel and state."""

    class Scan(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = torch.nn.Parameter(-torch.ones(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).transpose(1, 2).contiguous()  # (B, L, 4)
            return selective_scan(tokens, tokens, self.A, tokens[..., :3], tokens[..., :3])

    assert leaderboard.count_flops(Scan(), (2, 4, 5, 7)) == 9 * 2 * 35 * 4 * 3


def test_unfinished_runs_are_left_out(runs, tmp_path, capsys, caplog):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for name in ("config.yaml", "log.csv"):
        text = (runs / "local_vim_nano" / name).read_text()
        (unfinished / name).write_text(text if name == "config.yaml" else "".join(text.splitlines(True)[:2]))
    table = ["--output", str(tmp_path / "table.csv"), "--device", "a test bench"]
    assert leaderboard.main([str(runs / "plain_mamba_nano"), str(unfinished), *table]) == 0
    assert f"{unfinished} is left out: 1 of 2 epochs" in caplog.text
    assert [row["model"] for row in read_table(tmp_path / "table.csv")] == ["plain_mamba_nano"]
    assert leaderboard.main([str(unfinished), *table]) == 1
    assert "none of the runs is finished" in capsys.readouterr().err


def test_mistakes_are_named(runs, tmp_path, capsys):
    table = ["--output", str(tmp_path / "table.csv")]
    assert leaderboard.main([str(tmp_path), *table]) == 1
    assert "no config.yaml" in capsys.readouterr().err
    assert leaderboard.main([str(runs / "plain_mamba_nano")] * 2 + table) == 1
    assert "several runs have the same settings: python -m zoo.tools.train" in capsys.readouterr().err
    assert not (tmp_path / "table.csv").exists()


def test_seeds_share_a_row(runs, tmp_path):
    """Two seeds of one model beside a single run of another: mean, deviation and which seeds they were."""
    options = ["model.name=plain_mamba_nano", *SMALL, *TINY, f"output={tmp_path / 'second'}", "seed=5"]
    assert train.main([leaderboard.RECIPE, *options]) == 0
    folders = [runs / "plain_mamba_nano", tmp_path / "second", runs / "local_vim_nano"]
    rows = {row["model"]: row for row in leaderboard.collect(folders)}
    scores = [read_log(folder)[-1]["top1"] for folder in folders]
    both, one = rows["plain_mamba_nano"], rows["local_vim_nano"]
    assert both["seeds"] == "0 5" and "seed=" not in both["command"]
    assert both["top1"] == pytest.approx(sum(scores[:2]) / 2, abs=1e-3)
    assert both["top1_std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5, abs=1e-3)
    assert (one["seeds"], one["top1"], one["top1_std"]) == ("0", scores[2], "")
    assert list(both) == list(one)


def test_rows_of_one_data_set_stay_together(runs, tmp_path):
    folders = [runs / "plain_mamba_nano", runs / "local_vim_nano"]
    assert not any("data" in row for row in leaderboard.collect(folders))
    for folder in folders[:]:
        folders.append(shutil.copytree(folder, tmp_path / folder.name))
        config = folders[-1] / "config.yaml"
        config.write_text(config.read_text().replace("name: digits", "name: fashion_mnist"))
    rows = leaderboard.collect(folders)
    assert [next(iter(row.items())) for row in rows] == [("data", "digits")] * 2 + [("data", "fashion_mnist")] * 2
    assert rows[0]["top1"] >= rows[1]["top1"]


def test_speeds_of_a_benchmark(runs, tmp_path):
    records = [dict(model="plain_mamba_nano.untrained", train_samples_per_sec=1234.5), dict(model="local_vim_nano")]
    (tmp_path / "speeds.json").write_text(json.dumps(dict(records=records)))
    folders = [str(runs / "plain_mamba_nano"), str(runs / "local_vim_nano")]
    table = tmp_path / "table.csv"
    options = ["--output", str(table), "--device", "a test bench", "--benchmark", str(tmp_path / "speeds.json")]
    assert leaderboard.main([*folders, *options]) == 0
    speeds = {row["model"]: row["train_samples_per_sec"] for row in read_table(table)}
    assert speeds == {"plain_mamba_nano": "1234", "local_vim_nano": ""}


def test_runs_of_other_tasks(tmp_path):
    """Scores are the task's; what is no score of the best weights is left out."""
    pytest.importorskip("albumentations")
    root, rng = tmp_path / "data", np.random.default_rng(0)
    for split in ("train", "val"):
        for place, high in (("images", 255), ("masks", 2)):
            (root / place / split).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, high, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(root / place / split / f"{number}.png")
    recipe, folder = "segmentation/nano_fashion_scenes", tmp_path / "run"
    options = ["data.name=folder", f"data.root={root}", "data.img_size=32", "data.batch_size=2", "data.workers=0"]
    options += [
        "model.name=vim_nano.untrained",
        "model.kwargs={embed_dim: 16, depth: 2}",
        "model.head_kwargs={channels: 16}",
        "cpu=true",
    ]
    options += ["data.train_samples=null", "data.val_samples=null", "data.val_batch_size=2", "optim.epochs=1"]
    options += ["optim.warmup_epochs=0", "optim.warmup_updates=null", "precision=fp32", f"output={folder}"]
    assert train.main([recipe, *options]) == 0
    (row,) = leaderboard.collect([folder], recipe)
    assert {"head", "miou", "macc", "aacc", "gflops"} <= set(row)
    assert row["miou"] == read_log(folder)[-1]["miou"]
    assert not {"val_loss", "lr", "seconds"} & set(row)
    assert "data.name=folder" in row["command"]
