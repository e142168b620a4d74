"""What a run shows of itself: pictures, tables, waiting times, TensorBoard; and that training does not depend on it."""

import csv
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image

import zoo.engine.class_report as class_report
import zoo.engine.report as reporting
from zoo.config import load_config
from zoo.data import Normalize, TensorLoader, load_digits
from zoo.engine import load_trained, read_log, train
from zoo.engine.checkpoint import save_checkpoint
from zoo.engine.class_report import WORST, find_answers
from zoo.engine.figures import draw_confusion, draw_curves, shorten
from zoo.engine.report import RunReport, TensorBoardLog
from zoo.engine.run_folder import write_log
from zoo.engine.task import Place
from zoo.engine.tasks.classification import Classification
from zoo.files import replacing

SMALL = [
    "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, d_state: 4}",
    "data.train_samples=64",
    "data.val_samples=96",
    "data.batch_size=32",
    "optim.epochs=2",
    "optim.warmup_epochs=1",
    "cpu=true",
]
SHOWN = {"panels": Classification.panels, "goal": "top1"}
FILES = ("curves.png", "confusion.png", "worst.png", "confusion.csv", "classes.csv")
ROW = {"epoch": 1, "lr": 1e-3, "train_loss": 2.0, "train_top1": 30.0, "val_loss": 1.9, "top1": 40.0, "top5": 90.0}
ROW |= {"images_per_second": 100.0, "data_seconds": 1.0, "seconds": 10.0}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def small_config(output, *overrides):
    return load_config("vim/micro_digits", [*SMALL, f"output={output}", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("report") / "run"
    train(small_config(folder))
    return folder


def report_of(folder, *overrides):
    """The report of a finished run, its best model and its log."""
    model, _ = load_trained(folder)
    config = small_config(folder, *overrides)
    task = Classification(config, Place(torch.device("cpu")))
    return RunReport(config, task), model, read_log(folder)


def is_picture(path):
    """Whether a PNG file is whole and shows something: many colours, not one."""
    with Image.open(path) as image:
        return min(image.size) > 200 and len(np.unique(np.asarray(image.convert("L")))) > 20


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def times(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in FILES}


def test_run_leaves_pictures_and_tables(run):
    assert all(is_picture(run / name) for name in FILES if name.endswith(".png"))
    assert not list(run.glob(".*"))
    (row, last) = read_log(run)
    assert 0 <= row["data_seconds"] < row["seconds"]
    assert 0 <= row["train_top1"] <= 100

    header, *rows = read_table(run / "confusion.csv")
    assert header[1:] == [row[0] for row in rows] == list("0123456789")
    counts = np.array([row[1:] for row in rows], dtype=int)
    best = max(row["top1"], last["top1"])
    assert 100 * counts.trace() / counts.sum() == pytest.approx(best, abs=1e-3)
    header, *rows = read_table(run / "classes.csv")
    assert header == ["class", "images", "right", "accuracy", "most_often_taken_for", "times"]
    for index, (name, images, right, accuracy, other, count) in enumerate(rows):
        assert (name, int(images), int(right)) == (str(index), counts[index].sum(), counts[index, index])
        assert float(accuracy) == pytest.approx(100 * int(right) / int(images), abs=0.01)
        assert int(count) == np.delete(counts[index], index).max()
        assert not other or counts[index, int(other)] == int(count)


def test_report_draws_no_random_numbers(run):
    report, model, log = report_of(run)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    report.after_epoch(log)
    report.finish(model, log, trained=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_finished_run_gets_back_what_is_missing_and_nothing_else(run):
    before = times(run)
    assert train(small_config(run, "resume=auto")).trained == 0
    assert times(run) == before
    for name in FILES:
        (run / name).unlink()
    assert train(small_config(run, "resume=auto")).trained == 0
    assert all((run / name).exists() for name in FILES)


def test_continued_run_draws_its_whole_log(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reporting, "draw_curves", lambda log, *_: drawn.append([row["epoch"] for row in log]))
    monkeypatch.setattr(RunReport, "_report_weights", lambda *_: None)

    def killed(output, epoch, *arguments):
        if epoch == 2:
            raise KeyboardInterrupt
        return save_checkpoint(output, epoch, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("zoo.engine.loop.save_checkpoint", killed)
        train(small_config(tmp_path))
    train(small_config(tmp_path, "resume=auto"))
    assert drawn[0] == [1]
    assert drawn[-1] == [1, 2]


def test_picture_that_fails_leaves_the_old_one_and_is_reported_once(run, monkeypatch, caplog):
    from matplotlib.figure import Figure

    def full_disk(self, path, **_):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    report, model, log = report_of(run)
    before = {name: (run / name).read_bytes() for name in FILES}
    monkeypatch.setattr(Figure, "savefig", full_disk)
    report.finish(model, log, trained=1)
    for _ in range(2):
        report.next_drawing = 0
        report.after_epoch(log)
    assert before == {name: (run / name).read_bytes() for name in FILES}
    assert not list(run.glob(".*"))
    for name in ("curves.png", "confusion.png", "worst.png"):
        assert caplog.text.count(f"Not made: {name} ([Errno 28] No space left on device)") == 1


def test_files_are_replaced_in_one_step(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_training_says_once_what_is_missing(tmp_path, monkeypatch, caplog):
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib.figure"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert train(small_config(tmp_path)).trained == 2
    assert caplog.text.count("No pictures will be drawn") == 1
    assert "pip install 'vision-ssm-zoo[train]'" in caplog.text
    assert "Not made" not in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".png", ".csv")) == [
        "classes.csv",
        "confusion.csv",
        "log.csv",
    ]


def test_waiting_for_batches_is_measured(tmp_path, monkeypatch):
    iterate = TensorLoader.__iter__

    def slowly(self):
        for batch in iterate(self):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(TensorLoader, "__iter__", slowly)
    log = train(small_config(tmp_path, "optim.epochs=1", "optim.warmup_epochs=0")).log
    assert 2 * 0.05 <= log[0]["data_seconds"] < log[0]["seconds"]  # two batches; what the steps take is not counted


def test_waiting_too_long_is_reported_once(run, caplog):
    report, *_ = report_of(run, "data.workers=3")
    report.can_draw = False
    report.after_epoch([{**ROW, "data_seconds": 1.9}])
    assert not caplog.text
    for epoch in (2, 3):
        report.after_epoch([{**ROW, "epoch": epoch, "data_seconds": 2.1}])
    assert caplog.text.count("Epoch 2 waited for its data for 2.1 of its 10.0 s") == 1
    assert "Epoch 3" not in caplog.text
    assert "in memory, where data.workers (now 3;" in caplog.text
    report.config.data.name = "folder"
    report.said.clear()
    report.after_epoch([{**ROW, "data_seconds": 2.1}])
    assert "raise data.workers (now 3;" in caplog.text


def test_training_accuracy_counts_the_larger_share_of_mixed_images(tmp_path):
    task = Classification(small_config(tmp_path), Place(torch.device("cpu")))
    task._count(torch.eye(3), torch.tensor([0, 1, 1]))
    task._count(torch.eye(3), torch.tensor([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.1, 0.2, 0.7]]))
    assert task.train_scores() == {"train_top1": pytest.approx(100 * 4 / 6)}
    task.reset_train_scores(task.train_state())
    assert task.train_scores() == {"train_top1": pytest.approx(100 * 4 / 6)}


def test_worst_images_are_the_worst_of_all_batches(run):
    model, card = load_trained(run)
    data = load_digits("test")
    normalize = Normalize(card.preprocessing.mean, card.preprocessing.std)
    answers = find_answers(model, TensorLoader(data, 50), normalize, "fp32")
    with torch.no_grad():
        logits = model(normalize(data.images))
    worst = F.cross_entropy(logits, data.labels, reduction="none").argsort(descending=True)[:WORST]
    assert torch.equal(answers.labels, data.labels)
    assert torch.equal(answers.guesses, logits.argmax(-1))
    assert torch.equal(answers.worst_images, data.images[worst])
    assert torch.equal(answers.worst_labels, data.labels[worst])
    torch.testing.assert_close(answers.worst_probabilities, logits.softmax(-1).max(-1).values[worst])


def test_run_on_image_files(tmp_path):
    """Colour images, few of them, classes of all sizes and with strange names."""
    names = ("a class with quite a long name", "costs $5 or $6", "short")
    for split in ("train", "val"):
        for label, name in enumerate(names):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(1 + label if split == "val" else 12):
                color = np.random.default_rng(index).integers(0, 80, (9, 12, 3)) + 80 * np.eye(3, dtype=int)[label]
                Image.fromarray(color.astype(np.uint8)).save(folder / f"{index}.png")
    data = ["data.name=folder", f"data.root={tmp_path / 'data'}", "data.val_split=val", "data.workers=0"]
    train(small_config(tmp_path / "run", *data))
    assert all(is_picture(tmp_path / "run" / name) for name in FILES if name.endswith(".png"))
    rows = read_table(tmp_path / "run" / "classes.csv")[1:]
    assert [(row[0], row[1]) for row in rows] == [(name, str(1 + label)) for label, name in enumerate(names)]


@pytest.mark.parametrize("classes", [1, 10, 100, 600])
def test_confusion_matrix_of_any_size(tmp_path, classes):
    counts = 8 * torch.eye(classes, dtype=torch.long)
    counts[0] = 0  # a class without images
    counts[-1, 0] = 3
    draw_confusion(counts, [f"class {index} with a name" for index in range(classes)], tmp_path / "c.png", "title")
    assert is_picture(tmp_path / "c.png")


def test_classes_beyond_the_largest_matrix_are_left_out(run, monkeypatch, caplog):
    report, model, log = report_of(run)
    before = times(run)
    monkeypatch.setattr(class_report, "LARGEST_CONFUSION", 9)
    report.finish(model, log, trained=1)
    assert "No confusion matrix and no classes.csv for 10 classes" in caplog.text
    assert {name for name in FILES if times(run)[name] != before[name]} == {"worst.png"}


def test_curves_of_one_epoch_and_of_old_logs(tmp_path):
    old = {name: value for name, value in ROW.items() if name not in ("train_top1", "data_seconds")}
    draw_curves([old], tmp_path / "one.png", "one epoch of an older version", **SHOWN)
    draw_curves([{**old, "val_loss": float("inf")}, {**ROW, "epoch": 2}], tmp_path / "two.png", "mixed", **SHOWN)
    assert is_picture(tmp_path / "one.png") and is_picture(tmp_path / "two.png")
    write_log(tmp_path, [old, {**ROW, "epoch": 2}])
    log = read_log(tmp_path)
    assert np.isnan(log[0]["train_top1"]) and log[1]["train_top1"] == 30
    draw_curves(log, tmp_path / "two.png", "read back", **SHOWN)


def test_names_are_cut_and_not_read_as_formulas():
    assert shorten("short") == "short"
    assert shorten("a b c d e", 5) == "a b…"
    assert shorten("$x$") == r"\$x\$"


def test_tensorboard_is_told_the_whole_log_when_a_run_continues(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, tag, value, step, walltime):
            written.append((tag, value, step))

        def flush(self):
            pass

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    config = small_config(tmp_path)
    config.tensorboard = True
    log = train(config).log
    assert written[0] == (tmp_path / "tensorboard", 1)
    assert ("scores/top1", log[1]["top1"], 2) in written
    assert len(written) == 2 + 2 * (len(log[0]) - 1)  # opened and closed, and two epochs
    assert written[-1] == "closed"

    again = TensorBoardLog(tmp_path)
    written.clear()
    again.add(log)
    again.add([*log, {**ROW, "epoch": 3}])
    assert [entry[2] for entry in written if entry[0] == "loss/train_loss"] == [1, 2, 3]


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = [{**ROW, "epoch": epoch, "top1": 10.0 * epoch} for epoch in (1, 2, 3)]
    killed = TensorBoardLog(tmp_path)
    killed.add(log[:1])
    killed.add(log[:2])
    time.sleep(1.1)  # files are named after the second
    continued = TensorBoardLog(tmp_path)
    continued.add(log)
    continued.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("scores/top1")]
    assert values == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_tensorboard_that_is_not_installed_is_said_to_be_missing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = small_config(tmp_path, "optim.epochs=1", "optim.warmup_epochs=0")
    config.tensorboard = True
    assert train(config).trained == 1
    assert "tensorboard=true has no effect: this feature needs the package 'tensorboard'" in caplog.text
