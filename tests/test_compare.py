"""Comparison of runs: its table is right, its labels keep apart, its errors say what is wrong."""

from itertools import pairwise

import pytest
from PIL import Image

from zoo.engine.figures import draw_runs, spread
from zoo.engine.run_folder import write_log
from zoo.tools import compare

COLUMNS = ("lr", "train_loss", "train_top1", "top5", "data_seconds")


def make_run(folder, top1, planned=4, speed=100.0, **columns):
    """Writes a run's folder with these accuracies; losses are what is missing to 100 %, divided by 100."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"optim:\n  epochs: {planned}\n")
    log = []
    for index, value in enumerate(top1):
        row = {"epoch": index + 1, "top1": value, "val_loss": 1 - value / 100} | dict.fromkeys(COLUMNS, 1.0)
        log.append(row | {"images_per_second": speed if index else 1.0, "seconds": 900.0} | columns)
    write_log(folder, log)
    return str(folder)


@pytest.fixture()
def runs(tmp_path):
    """A finished run and a better one that is not finished."""
    return [make_run(tmp_path / "first", [50, 70, 90, 80]), make_run(tmp_path / "second", [60, 95], speed=200.0)]


def rows_of(printed):
    header, *lines = printed.splitlines()[:-1]
    return header, [line.split() for line in lines]


def test_table_and_picture(runs, tmp_path, capsys):
    output = tmp_path / "new" / "compare.png"
    assert compare.main([*runs, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    header, rows = rows_of(printed)
    assert header.split("  ")[0] == "run" and "best top1 (epoch)" in header and "final val_loss" in header
    assert rows[0] == ["second", "2", "of", "4", "95.00", "(2)", "95.00", "0.05", "(2)", "0.05", "200", "0.50"]
    assert rows[1] == ["first", "4", "90.00", "(3)", "80.00", "0.1", "(3)", "0.2", "100", "1.00"]
    assert printed.splitlines()[-1] == f"2 runs in {output}"
    with Image.open(output) as image:
        assert image.size[0] > 1000 and image.size[1] > 800  # two metrics below each other


def test_low_losses_are_best(runs, tmp_path, capsys):
    assert compare.main([*runs, "--metric", "val_loss", "--output", str(tmp_path / "c.png")]) == 0
    _, rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["second", "first"]
    assert compare.main([*runs, "--metric", "images_per_second", "--output", str(tmp_path / "c.png")]) == 0
    _, rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["second", "first"]


def test_runs_of_the_same_name_are_told_apart_and_none_counts_twice(tmp_path, capsys):
    folders = [make_run(tmp_path / seed / "run", [50.0]) for seed in ("seed0", "seed1")]
    assert compare.main([*folders, folders[0] + "/", "--output", str(tmp_path / "c.png")]) == 0
    _, rows = rows_of(capsys.readouterr().out)
    assert sorted(row[0] for row in rows) == ["seed0/run", "seed1/run"]


def test_run_without_an_epoch_is_left_out(runs, tmp_path, capsys, caplog):
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "config.yaml").write_text("seed: 0\n")
    assert compare.main([*runs, str(tmp_path / "started"), "--output", str(tmp_path / "c.png")]) == 0
    assert f"{tmp_path / 'started'} is left out: no epoch is finished" in caplog.text
    assert "2 runs in" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "started"), "--output", str(tmp_path / "c.png")]) == 1
    assert "no epoch is finished in any of" in capsys.readouterr().err


def test_log_of_an_older_version(runs, tmp_path, capsys):
    old = tmp_path / "old"
    old.mkdir()
    header = "epoch,lr,train_loss,val_loss,top1,top5,images_per_second,seconds"
    (old / "log.csv").write_text(f"{header}\n1,1e-3,2,1.5,40,90,100,10\n")
    both = [*runs, str(old), "--output", str(tmp_path / "c.png"), "--metric", "train_top1"]
    assert compare.main(both) == 0
    _, rows = rows_of(capsys.readouterr().out)
    assert rows[-1] == ["old", "1", "-", "-", "100", "0.00"]
    assert compare.main([str(old), "--output", str(tmp_path / "c.png"), "--metric", "train_top1"]) == 1
    assert "no log has values of train_top1" in capsys.readouterr().err
    assert compare.main([str(old), "--output", str(tmp_path / "c.png")]) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds no run: there is neither config.yaml nor log.csv"),
        ("epoch,top1\n1,many\n", "is not the log of a run: could not convert"),
        ("step,loss\n1,2\n", "is not the log of a run: 'epoch'"),
        ("epoch,loss\n1,2\n", "is not the log of a run: no column images_per_second, seconds"),
        ("epoch,top1\n1\n", "is not the log of a run"),
    ],
)
def test_folders_that_are_no_runs(runs, tmp_path, capsys, text, message):
    folder = tmp_path / "other"
    folder.mkdir()
    if text:
        (folder / "log.csv").write_text(text)
    assert compare.main([*runs, str(folder), "--output", str(tmp_path / "c.png")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_other_mistakes_are_named(runs, tmp_path, capsys):
    assert compare.main([str(tmp_path / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert compare.main([*runs, "--metric", "top_1"]) == 1
    assert "no log has values of top_1; choose another --metric of top1, val_loss" in capsys.readouterr().err


@pytest.mark.parametrize("levels", [[0.5], [0.5] * 5, [0.0, 0.01, 0.99, 1.0], [1.0] * 20, [0.2, 0.22, 0.8, 0.3]])
def test_labels_keep_their_distance_and_order(levels):
    gap = 0.05
    places = spread(levels, gap)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    order = sorted(range(len(levels)), key=lambda index: levels[index])
    distances = [places[after] - places[before] for before, after in pairwise(order)]
    assert all(distance >= gap - 1e-9 for distance in distances)
    if min((abs(a - b) for i, a in enumerate(levels) for b in levels[:i]), default=1) >= gap:
        assert places == levels


def test_many_runs_of_one_epoch(tmp_path):
    logs = {f"_run_{index}_with_$_and_a_name_that_is_very_long": [{"epoch": 1, "top1": 50.0}] for index in range(25)}
    draw_runs(logs, ["top1"], tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as image:
        assert image.size[1] > 600
