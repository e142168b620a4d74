"""Shards of samples: the same as webdataset reads, each once an epoch, whatever the processes; damage is reported."""

import io
import json
import sys
import tarfile

import pytest
import timm
import torch
import torchmetrics.classification  # noqa: F401 before matplotlib is hidden, which it looks at
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from zoo.config import AugmentConfig, DataConfig, load_config
from zoo.data import load_digits, make_loader, open_split, resolve_preprocessing
from zoo.data.memory import epoch_order
from zoo.data.shards import find_shards, index_shard, open_shards
from zoo.engine import train
from zoo.engine.distributed import StopRequest

SAMPLES = 7  # per shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Digits in ten shards <tmp>/data/train-000003.tar, of which the label of a sample is its number in all of them."""
    folder = tmp_path / "data"
    folder.mkdir()
    digits = load_digits("train").images
    for shard in range(10):
        members = []
        for place in range(SAMPLES):
            number = shard * SAMPLES + place
            members.append((f"digits/{number:05d}.png", png(digits[number])))
            members.append((f"digits/{number:05d}.cls", str(number).encode()))
        write_shard(folder / f"train-{shard:06d}.tar", members)
    return folder


def loader_of(folder, training=True, bad_files="error", **options):
    config = DataConfig(
        name="shards",
        root=str(folder),
        img_size=8,
        in_chans=1,
        batch_size=options.pop("batch_size", 4),
        workers=options.pop("workers", 0),
        bad_files=bad_files,
    )
    dataset, names = open_split(config, "train", training=training)
    assert names is None
    preprocessing = resolve_preprocessing(config, dataset, timm.create_model("test_vit"))
    augment = AugmentConfig(min_scale=1.0) if training else None
    return make_loader(dataset, preprocessing, config, "cpu", augment, **options)


def labels_of(loader):
    return [int(label) for _, labels in loader for label in labels]


def test_samples_are_those_that_webdataset_reads(shards):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in find_shards(shards, "train-{000000..000009}.tar")]
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls")
    ours = open_shards(str(shards), "train")
    count = 0
    for (key, image, label), index in zip(theirs, range(len(ours)), strict=True):
        found, number = ours[index]
        assert ours.name(index).endswith(f".tar/{key}")
        assert (number, found.tobytes()) == (int(label), image.convert("L").tobytes())
        count += 1
    assert count == len(ours) == 70


def test_images_and_their_training_shapes(shards):
    images, labels = next(iter(loader_of(shards, training=False)))
    assert torch.equal(images, load_digits("train").images[:4])
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 2), (3, 0)])
def test_an_epoch_has_every_sample_once_over_all_processes(shards, world_size, workers):
    """And in the same order: batches of all processes together do not depend on how many there are."""
    whole = loader_of(shards, batch_size=6)
    whole.set_epoch(3)
    expected = labels_of(whole)
    parts = [
        loader_of(shards, batch_size=6 // world_size, workers=workers, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for part in parts:
        part.set_epoch(3)
    labels = torch.tensor([labels_of(part) for part in parts])
    together = labels.T.flatten().tolist()
    assert together == expected
    assert len(set(together)) == len(together) == 66  # 70 but for an incomplete batch
    evaluated = [
        labels_of(loader_of(shards, training=False, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert sorted(label for labels in evaluated for label in labels) == list(range(70))


def test_a_pass_can_begin_at_any_batch(shards):
    whole, part = loader_of(shards), loader_of(shards, workers=2)
    whole.set_epoch(1)
    batches = list(whole)
    part.set_epoch(1, first_batch=5)
    for (images, labels), (expected, same) in zip(part, batches[5:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, same)


def test_shuffling_keeps_to_a_few_shards_at_a_time(shards):
    dataset = open_shards(str(shards), "train")

    def order(seed, epoch, **options):
        return epoch_order(len(dataset), True, seed, epoch, shuffled=dataset.shuffled, **options)

    first = order(0, 0)
    assert sorted(first.tolist()) == list(range(70))
    assert len({number // SAMPLES for number in first[: 8 * SAMPLES].tolist()}) == 8
    assert first[: 8 * SAMPLES].tolist() != sorted(first[: 8 * SAMPLES].tolist())
    assert torch.equal(order(0, 0), first)
    assert len({tuple(order(seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert torch.equal(order(0, 0, rank=1, world_size=3), first[1::3])


def test_names_of_splits(shards):
    def names(split):
        return [path.name for path in find_shards(shards, split)]

    assert len(find_shards(shards, "train")) == 10
    assert names("train-{000008..000009}.tar") == ["train-000008.tar", "train-000009.tar"]
    assert names("train-00000{1,7}.tar") == ["train-000001.tar", "train-000007.tar"]
    assert len(find_shards(shards.parent, "data")) == 10
    assert len(find_shards(shards, "train-000004.tar")) == 1
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards, the first is train-000010\.tar; found"):
        find_shards(shards, "train-{000008..000011}.tar")
    with pytest.raises(FileNotFoundError, match="does not have shards 'val'"):
        find_shards(shards, "val")
    with pytest.raises(ValueError, match=r"needs data\.root"):
        open_shards(None, "train")


def test_labels_in_json_and_text(tmp_path):
    image = png(load_digits("train").images[0])
    members = [
        ("a.png", image),
        ("a.json", json.dumps({"label": 4, "caption": "?"}).encode()),
        ("b.txt", b" 5\n"),
        ("b.png", image),
        ("c.PNG", image),
        ("c.seg.png", image),
        ("c.cls", b"6"),
        ("._c.cls", b"a system's own"),
    ]
    write_shard(tmp_path / "train-0.tar", members)
    assert index_shard(tmp_path / "train-0.tar").labels.tolist() == [4, 5, 6]
    write_shard(tmp_path / "val-0.tar", [("a.png", image), ("a.cls", b"cat"), ("b.cls", b"1"), ("c.png", image)])
    with pytest.raises(ValueError, match="3 of 3 files") as caught:
        open_shards(str(tmp_path), "val")
    assert "val-0.tar/a: the label in .cls is not a whole number: b'cat'" in str(caught.value)
    assert "val-0.tar/b: has no image among cls" in str(caught.value)
    assert "val-0.tar/c: has no label among png" in str(caught.value)


def test_index_is_kept_until_the_shard_changes(shards, cache, monkeypatch):
    path = shards / "train-000000.tar"
    first = index_shard(path)
    assert len(list(cache.iterdir())) == 1

    def walk(*_):
        raise AssertionError("walked again")

    with monkeypatch.context() as patch:
        patch.setattr("zoo.data.shards._walk", walk)
        assert index_shard(path).offsets.tolist() == first.offsets.tolist()
    write_shard(path, [("x.png", png(load_digits("train").images[0])), ("x.cls", b"8")])
    assert index_shard(path).labels.tolist() == [8]
    next(cache.iterdir()).write_bytes(b"PK but cut")
    assert index_shard(path).labels.tolist() == [8]


@pytest.mark.parametrize("cut", [0, 200, 512 + 100, 512 * 2 + 5, 512 * 4, 512 * 12, -512 * 2])
def test_a_shard_that_is_cut_off_is_reported_with_what_is_left(shards, caplog, cut):
    path = shards / "train-000002.tar"
    content = path.read_bytes()
    last = max(index for index in range(0, len(content), 512) if any(content[index : index + 512])) + 512  # real end
    path.write_bytes(content[: cut if cut >= 0 else last + cut])
    with pytest.raises(ValueError, match=r"train-000002\.tar: .*tar file.*; \d whole samples before"):
        open_shards(str(shards), "train")
    dataset = open_shards(str(shards), "train", bad_files="skip")
    assert "are left out" in caplog.text
    left = index_shard(path).labels.tolist()
    assert left == list(range(14, 14 + len(left)))
    assert len(left) < SAMPLES
    assert len(dataset) == 63 + len(left)
    for index in range(len(dataset)):
        assert dataset[index][0].size == (8, 8)


def test_a_compressed_or_empty_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match="without compression"):
        open_shards(str(tmp_path), "train")
    with pytest.raises(ValueError, match="have no whole sample"):
        open_shards(str(tmp_path), "train", bad_files="skip")


@pytest.fixture
def corrupt(shards):
    """Two images of one shard, one after the other, are noise."""
    path = shards / "train-000005.tar"
    found, content = index_shard(path), bytearray(path.read_bytes())
    for place in (2, 3):
        content[found.offsets[place] + 20 : found.offsets[place] + 60] = bytes(40)
    path.write_bytes(content)
    return shards


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_by_the_next_and_counted(corrupt, workers):
    loader = loader_of(corrupt, bad_files="skip", batch_size=7, workers=workers)
    for _ in range(2):
        labels = labels_of(loader)
        assert sorted(labels) == sorted([*range(37), 39, 39, *range(39, 70)])
        assert sorted(loader.unreadable()) == ["train-000005.tar/digits/00037", "train-000005.tar/digits/00038"]
        assert loader.unreadable() == []


def test_corrupt_images_are_an_error_if_asked_for(corrupt):
    with pytest.raises(ValueError, match=r"cannot be read: train-000005\.tar/digits/0003[78].*data\.bad_files=skip"):
        labels_of(loader_of(corrupt, workers=2))


def test_corrupt_images_are_no_part_of_an_evaluation(corrupt, caplog):
    with pytest.raises(ValueError, match="2 of 70 files"):
        loader_of(corrupt, training=False)
    assert sorted(labels_of(loader_of(corrupt, training=False, bad_files="skip"))) == [*range(37), *range(39, 70)]
    assert "train-000005.tar/digits/00037: " in caplog.text


def test_a_disk_that_cannot_be_read_is_no_run_of_corrupt_images(shards, monkeypatch):
    loader = loader_of(shards, bad_files="skip")
    monkeypatch.setattr("zoo.data.files.REPLACED_IN_A_ROW", 5)
    for path in shards.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="5 images in a row cannot be read"):
        next(iter(loader))


def test_more_shards_than_open_files(shards, monkeypatch):
    monkeypatch.setattr("zoo.data.shards.OPEN_FILES", 3)
    dataset = open_shards(str(shards), "train")
    assert [dataset[index][1] for index in range(0, 70, 3)] == list(range(0, 70, 3))
    assert len(dataset.files) == 3


def test_a_run_names_replaced_images_and_continues_within_an_epoch(corrupt, tmp_path, monkeypatch, caplog):
    """Stopped after every third update, and continued: with the weights of a run that was not."""
    (corrupt / "train-000009.tar").rename(corrupt / "val-000009.tar")
    model = "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, d_state: 4}"
    options = [model, "model.num_classes=70", "data.name=shards", f"data.root={corrupt}", "data.val_split=val"]
    options += ["data.bad_files=skip", "data.batch_size=16", "data.workers=2", "data.img_size=8", "data.in_chans=1"]
    options += ["optim.epochs=3", "optim.warmup_epochs=1", "cpu=true"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take longer than the training
    caplog.set_level("INFO")

    def run(folder, *more):
        result = train(load_config("vim/micro_digits", [*options, f"output={tmp_path / folder}", *more]))
        AcceleratorState._reset_state(reset_partial_state=True)
        return result

    whole = run("whole")
    assert (
        "Epoch 1: 2 images could not be read and were replaced by others: train-000005.tar/digits/0003" in caplog.text
    )
    assert [row["epoch"] for row in whole.log] == [1, 2, 3]  # 63 images, of which an update takes 16
    calls = []
    monkeypatch.setattr(StopRequest, "requested", lambda self: calls.append(None) or len(calls) % 3 == 2)
    while not run("stopped", "resume=auto").complete:
        pass
    assert len(calls) == 9
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
