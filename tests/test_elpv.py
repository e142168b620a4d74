"""The solar cells of elpv: split, labels, sources, damaged data; scores that weigh classes alike."""

import hashlib
import importlib.util
import math
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from zoo.data.elpv import CLASS_NAMES, load_elpv
from zoo.engine.class_balance import ClassBalance

HAS_ELPV = importlib.util.find_spec("elpv_dataset") is not None
needs_elpv = pytest.mark.skipif(not HAS_ELPV, reason="the package elpv-dataset is not installed")
THIRDS = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")


@pytest.fixture(scope="module")
def published():
    """Training and test images of the package at their own size, for which nothing is resampled."""
    return load_elpv("train", img_size=300), load_elpv("test", img_size=300)


@pytest.fixture
def folder(tmp_path):
    """Forty cells in the layout of the authors' repository: 5 of each probability and type, brightness by number."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(40):
        name, kind = f"images/cell{number + 1:04d}.png", ("mono", "poly")[number // 4 % 2]
        Image.fromarray(np.full((30, 30), 5 * number, np.uint8)).save(tmp_path / name)
        lines.append(f"{name}  {THIRDS[number % 4]}  {kind}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def change_line(folder, number, line):
    path = folder / "labels.csv"
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines))


def numbers(data):
    """Which of the folder's cells these are, told by their brightness."""
    return (data.images[:, 0, 0, 0] // 5).tolist()


@needs_elpv
def test_published_images_are_split_as_the_authors_did(published):
    train, test = published
    assert train.images.shape == (1968, 1, 300, 300) and test.images.shape == (656, 1, 300, 300)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.class_names == CLASS_NAMES[4]
    counts = torch.stack([train.labels.bincount(), test.labels.bincount()])
    assert counts.sum(0).tolist() == [1508, 295, 106, 715]
    assert (counts[1] - counts.sum(0) / 4).abs().max() < 1


@needs_elpv
def test_published_split_is_the_same_everywhere_and_disjoint(published):
    digests = [[hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in data.images] for data in published]
    assert len({*digests[0], *digests[1]}) == 2624
    order = hashlib.sha256("".join([*digests[0], *digests[1]]).encode()).hexdigest()
    assert order == "5dcfde257775df14b2327547886997962c5952124c86daebd8325cbb07f3cf29"


@needs_elpv
def test_published_statistics_are_those_of_the_training_images(published):
    train, test = published
    assert (train.mean, train.std) == (test.mean, test.std)
    pixels = train.images[:, :, ::2, ::2].double() / 255
    assert pixels.mean().item() == pytest.approx(train.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(train.std[0], abs=1e-3)


@needs_elpv
def test_published_labels_agree_with_the_packages_own_reader(published, tmp_path):
    """Every tenth image as the package reads it, found among ours by its bytes."""
    import elpv_dataset
    from elpv_dataset.utils import load_dataset

    folder = Path(elpv_dataset.__file__).parent / "data"
    lines = (folder / "labels.csv").read_text().splitlines()[::10]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "images").symlink_to(folder / "images")
    images, probabilities, _ = load_dataset(str(tmp_path / "labels.csv"))
    ours = {
        image.numpy().tobytes(): int(label)
        for data in published
        for image, label in zip(data.images, data.labels, strict=True)
    }
    assert len(images) == 263
    assert [ours[image.tobytes()] for image in images] == [round(3 * probability) for probability in probabilities]


def test_folder_split_is_stratified_by_probability_and_type(folder):
    train, test = load_elpv("train", root=folder, img_size=30), load_elpv("test", root=folder, img_size=30)
    assert (len(train), len(test)) == (30, 10)
    assert sorted(numbers(train) + numbers(test)) == list(range(40))
    groups = (torch.tensor(numbers(test)) % 8).bincount(minlength=8)  # of 5 cells each: a quarter, rounded up or down
    assert sorted(groups.tolist()) == [1, 1, 1, 1, 1, 1, 2, 2]
    for data in (train, test):
        assert data.labels.tolist() == [number % 4 for number in numbers(data)]
    assert train.images.double().div(255).mean().item() == pytest.approx(train.mean[0], abs=1e-4)
    assert train.images.double().div(255).std(correction=0).item() == pytest.approx(train.std[0], abs=1e-4)


def test_order_of_the_labels_file_does_not_matter(folder):
    before = load_elpv("test", root=folder)
    path = folder / "labels.csv"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    after = load_elpv("val", root=folder)
    assert torch.equal(before.images, after.images) and torch.equal(before.labels, after.labels)


def test_two_classes_are_the_experts_verdict_on_the_same_cells(folder):
    four, two = load_elpv("train", 4, root=folder), load_elpv("train", 2, root=folder)
    assert torch.equal(four.images, two.images)
    assert two.labels.tolist() == [int(label >= 2) for label in four.labels.tolist()]
    assert two.class_names == ("functional", "defective")


def test_images_are_resized_with_antialiasing(folder):
    """Stripes finer than the result become grey instead of stripes of another width."""
    stripes = np.zeros((30, 30), np.uint8)
    stripes[:, ::2] = 255
    for file in (folder / "images").iterdir():
        Image.fromarray(stripes).save(file)
    data = load_elpv("train", root=folder, img_size=7)
    assert data.images.shape == (30, 1, 7, 7)
    assert (data.images.float() - 127.5).abs().max() < 30


@pytest.mark.parametrize(
    "line, problem",
    [
        ("images/cell0003.png 0.5 mono", r"labels\.csv, line 3: expected .* got 'images/cell0003.png 0.5 mono'"),
        ("images/cell0003.png nan mono", "line 3"),
        ("images/cell0003.png inf mono", "line 3"),
        ("images/cell0003.png 1.0 thin", "line 3"),
        ("images/cell0003.png 1.0", "line 3"),
        ("images/cell0002.png 1.0 mono", r"line 3: cell0002\.png is listed twice"),
    ],
)
def test_wrong_labels_are_refused(folder, line, problem):
    change_line(folder, 3, line)
    with pytest.raises(ValueError, match=problem):
        load_elpv("train", root=folder)


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    image = folder / "images" / "cell0007.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cell0007\.png cannot be read"):
        load_elpv("test", root=folder)
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"cell0007\.png is in labels\.csv but not on disk"):
        load_elpv("test", root=folder)
    with pytest.raises(FileNotFoundError, match=r"no labels\.csv in .*nowhere; .*pip install elpv-dataset"):
        load_elpv("test", root=tmp_path / "nowhere")


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="'dev'"):
        load_elpv("dev", root=folder)
    with pytest.raises(ValueError, match="classes=3"):
        load_elpv("train", classes=3, root=folder)
    with pytest.raises(ValueError, match="img_size=0"):
        load_elpv("train", img_size=0, root=folder)


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vision-ssm-zoo\[data\]'"):
        load_elpv("train")


def guesses(classes, count):
    labels = torch.randint(classes, (count,))
    return torch.randn(count, classes) + 1.5 * torch.nn.functional.one_hot(labels, classes), labels


def scores_of_sklearn(logits, labels):
    probabilities = logits.double().softmax(-1).numpy()
    guessed, labels = probabilities.argmax(1), labels.numpy()
    two = probabilities.shape[1] == 2
    return {
        "balanced_accuracy": balanced_accuracy_score(labels, guessed),
        "macro_f1": f1_score(labels, guessed, average="macro"),
        "auroc": roc_auc_score(labels, probabilities[:, 1] if two else probabilities, multi_class="ovr"),
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_class_balance_agrees_with_sklearn(classes):
    logits, labels = guesses(classes, 200)
    balance = ClassBalance(classes)
    balance.update(*guesses(classes, 5))
    balance.reset()
    for batch in torch.arange(200).split(64):
        balance.update(logits[batch], labels[batch])
    assert balance.compute() == pytest.approx(scores_of_sklearn(logits, labels), abs=1e-6)


def test_class_balance_takes_logits_of_16_bits():
    logits, labels = guesses(4, 50)
    balance = ClassBalance(4)
    balance.update(logits.bfloat16(), labels)
    assert balance.compute() == pytest.approx(scores_of_sklearn(logits.bfloat16().float(), labels), abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_classes_without_samples_are_left_out():
    logits, labels = guesses(3, 60)
    logits = torch.cat([logits, torch.full((60, 1), -50.0)], dim=1)  # a fourth class: no sample, never guessed
    balance = ClassBalance(4)
    balance.update(logits, labels)
    assert balance.compute() == pytest.approx(scores_of_sklearn(logits[:, :3], labels), abs=1e-6)

    logits[0, 3] = 50.0  # guessed once: a wrong guess costs a recall, and its class has an F1 of 0
    balance.reset()
    balance.update(logits, labels)
    guessed = logits.argmax(1)
    recalls = [(guessed[labels == label] == label).double().mean().item() for label in range(3)]
    assert balance.compute()["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert balance.compute()["macro_f1"] == pytest.approx(f1_score(labels, guessed, average="macro"))


@pytest.mark.filterwarnings("error")
def test_a_single_class_has_no_curve_and_no_samples_no_score():
    balance = ClassBalance(2)
    with pytest.raises(ValueError, match="no samples"):
        balance.compute()
    balance.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    scores = balance.compute()
    assert scores["balanced_accuracy"] == 0.5 and math.isnan(scores["auroc"])
    with pytest.raises(ValueError, match="num_classes=1"):
        ClassBalance(1)


def score_share(rank, store, logits, labels, results):
    """One of three processes; the last gets no batch."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    balance = ClassBalance(4)
    for batch in torch.arange(len(labels))[rank::2].split(10) if rank < 2 else ():
        balance.update(logits[batch], labels[batch])
    results.put((rank, balance.compute()))
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs processes that are forked")
def test_class_balance_over_processes_is_that_of_all_samples(tmp_path):
    logits, labels = guesses(4, 61)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=score_share, args=(rank, tmp_path / "store", logits, labels, results), daemon=True)
        for rank in range(3)
    ]
    for worker in workers:
        worker.start()
    scores = dict(results.get(timeout=300) for _ in workers)
    for worker in workers:
        worker.join()
    for rank in range(3):
        assert scores[rank] == pytest.approx(scores_of_sklearn(logits, labels), abs=1e-6)
