"""Data sets in memory and from files, with real images; augmentation; what happens with broken files."""

import gzip
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.config import AugmentConfig, DataConfig
from zoo.data import (
    BatchAugment,
    Normalize,
    TensorData,
    TensorLoader,
    image_transform,
    load_digits,
    load_fashion_mnist,
    make_loader,
    open_split,
    resolve_preprocessing,
)
from zoo.data.augment import random_black_point, random_erase, random_flip, random_shift
from zoo.data.fashion_mnist import CONTENTS, DEBIAN_FOLDER


@pytest.fixture
def digit_folder(tmp_path):
    """Twelve digit scans per split as PNG files in class folders: <tmp>/<split>/<class>/<n>.png."""
    for split in ("train", "val"):
        digits = load_digits("train" if split == "train" else "test")
        for label in range(3):
            folder = tmp_path / split / f"digit {label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(digits.images[digits.labels == label][:4]):
                Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return tmp_path


def file_loader(config: DataConfig, split: str = "train", augment: AugmentConfig | None = None):
    dataset, names = open_split(config, split)
    model = timm.create_model("test_vit")
    return make_loader(dataset, resolve_preprocessing(config, dataset, model), config, "cpu", augment), names


def test_digits_split_is_stratified_complete_and_disjoint():
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1442, 355)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.max() == 255
    shares = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert ((shares > 0.19) & (shares < 0.21)).all()
    seen = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in seen for image in test.images) <= 1  # scans, not copies
    with pytest.raises(ValueError, match="'dev'"):
        load_digits("dev")


def test_stated_statistics_are_those_of_the_images():
    train = load_digits("train")
    images = train.images.double() / 255
    assert images.mean().item() == pytest.approx(train.mean[0], abs=1e-3)
    assert images.std().item() == pytest.approx(train.std[0], abs=1e-3)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_debians_package(tmp_path):
    train, test = load_fashion_mnist("train"), load_fashion_mnist("test")
    assert train.images.shape == (60000, 1, 28, 28)
    assert test.images.shape == (10000, 1, 28, 28)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert (train.images.double() / 255).mean().item() == pytest.approx(train.mean[0], abs=1e-4)
    for name in CONTENTS:  # the same files unpacked
        (tmp_path / name).write_bytes(gzip.decompress((DEBIAN_FOLDER / f"{name}.gz").read_bytes()))
    assert torch.equal(load_fashion_mnist("test", tmp_path).images, test.images)


def test_damaged_fashion_mnist_is_refused(tmp_path):
    for name in CONTENTS:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(bytes(100)))
    with pytest.raises(ValueError, match=r"not the published Fashion-MNIST file: 100 bytes"):
        load_fashion_mnist("test", tmp_path)
    for name in CONTENTS:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
        load_fashion_mnist("test", tmp_path)


def test_missing_fashion_mnist_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist("train", tmp_path / "nowhere")


def test_tensor_loader_sees_every_image_once_over_all_processes():
    digits = load_digits("train")
    tagged = TensorData(digits.images, torch.arange(len(digits)), digits.class_names, digits.mean, digits.std)
    loaders = [TensorLoader(tagged, 32, rank=rank, world_size=3) for rank in range(3)]
    seen = torch.cat([labels for loader in loaders for _, labels in loader])
    assert sorted(seen.tolist()) == list(range(len(digits)))
    assert [len(loader) for loader in loaders] == [len(list(loader)) for loader in loaders]


def test_tensor_loader_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        loader = TensorLoader(load_digits("train"), 64, training=True, seed=seed)
        loader.set_epoch(epoch)
        torch.rand(epoch + 1)  # what else was drawn does not matter
        batches = list(loader)
        assert len(batches) == len(loader) == 22
        assert all(len(labels) == 64 for _, labels in batches)
        return torch.cat([labels for _, labels in batches]).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    with pytest.raises(ValueError, match=r"lower data\.batch_size"):
        TensorLoader(load_digits("train"), 2000, training=True)


def test_resized_keeps_the_picture():
    digits = load_digits("test")
    larger = digits.resized(16)
    assert larger.images.shape[-2:] == (16, 16)
    means = larger.images.double().mean(dim=(1, 2, 3)), digits.images.double().mean(dim=(1, 2, 3))
    assert torch.allclose(*means, atol=6)


def test_shift_moves_each_image_as_a_whole():
    images = load_digits("test").images[:64]
    shifted = random_shift(images, 2)
    offsets = set()
    for image, moved in zip(images, shifted, strict=True):
        padded = torch.nn.functional.pad(image, [2] * 4)
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(padded[:, top : top + 8, left : left + 8], moved)
        ]
        assert fits
        offsets.add(fits[0])
    assert len(offsets) > 10


def test_flip_mirrors_the_given_share():
    images = load_digits("test").images[:300]
    flipped = random_flip(images, 0.5)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored | same).all()
    assert 100 < mirrored.sum() < 200
    assert torch.equal(random_flip(images, 1.0), images.flip(-1))


def test_black_point_stretches_each_image_by_its_own_amount():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, -1).expand(300, 3, 2, -1)
    stretched = random_black_point(ramp, 0.5)
    black = (stretched[:, 0, 0] == 0).sum(1) - 1  # the largest value that has become black
    assert black.min() < 10 and 115 < black.max() <= 127
    torch.testing.assert_close(stretched[..., -1], torch.full((300, 3, 2), 255.0))
    slope = stretched[..., 1:] - stretched[..., :-1]
    assert (slope >= 0).all()
    torch.testing.assert_close(slope[..., 128:].amax(-1), slope[..., 128:].amin(-1), atol=1e-3, rtol=0)


def test_erase_replaces_one_rectangle():
    images = torch.full((200, 3, 20, 30), 7.0)
    erased = random_erase(images, 0.5)
    changed = (erased != images).any(1)  # (B, H, W)
    touched = changed.flatten(1).any(1)
    assert 60 < touched.sum() < 140
    for mask in changed[touched]:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        assert rows.nonzero().flatten().diff().le(1).all()
        assert 0.01 < mask.float().mean() < 0.4


def test_augmentation_ends_with_normalised_images():
    images = load_digits("test").images
    mean, std = (0.3,), (0.4,)
    expected = (images.float() / 255 - 0.3) / 0.4
    assert torch.allclose(BatchAugment(mean, std)(images), expected)
    assert torch.allclose(Normalize(mean, std)(images), expected)


def test_folder_of_images(digit_folder):
    config = DataConfig(name="folder", root=str(digit_folder), batch_size=5, workers=2, in_chans=1, img_size=8)
    loader, names = file_loader(config)
    assert names == ("digit 0", "digit 1", "digit 2")
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    digits = load_digits("train")
    assert images.dtype == torch.uint8
    assert torch.equal(images[4:8], digits.images[digits.labels == 1][:4])


def test_training_images_of_a_folder_repeat_with_the_epoch(digit_folder):
    config = DataConfig(name="folder", root=str(digit_folder), batch_size=4, workers=2)
    loader, _ = file_loader(config, augment=AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4))

    def images(epoch):
        loader.set_epoch(epoch)
        return torch.cat([images for images, _ in loader])

    first = images(1)
    assert first.shape == (12, 3, 160, 160)
    assert torch.equal(images(1), first)
    assert not torch.equal(images(2), first)


def test_training_images_seed_no_gpu(digit_folder, monkeypatch):
    """Without one in use, that takes a stack trace an image."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    config = DataConfig(name="folder", root=str(digit_folder), batch_size=4, workers=0)
    loader, _ = file_loader(config, augment=AugmentConfig())
    assert len(list(loader)) == 3


def test_missing_split_lists_what_is_there(digit_folder):
    config = DataConfig(name="folder", root=str(digit_folder))
    with pytest.raises(FileNotFoundError, match="no split 'test'; found there: train, val"):
        open_split(config, "test")


def test_unknown_class_is_refused(digit_folder):
    (digit_folder / "val" / "digit 2").rename(digit_folder / "val" / "letter a")
    config = DataConfig(name="folder", root=str(digit_folder))
    _, names = open_split(config, "train")
    with pytest.raises(ValueError, match="classes that are not known: letter a"):
        open_split(config, "val", class_names=names)


@pytest.fixture
def damaged_folder(digit_folder):
    folder = digit_folder / "train" / "digit 1"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    (folder / "text.png").write_text("not a picture")
    (folder / "notes.txt").write_text("about these digits")
    return digit_folder


def test_bad_files_are_an_error_that_names_them(damaged_folder):
    config = DataConfig(name="folder", root=str(damaged_folder), bad_files="error")
    with pytest.raises(ValueError, match="3 of 15 files") as caught:
        open_split(config, "train")
    for name in ("cut.jpg", "text.png", "notes.txt"):
        assert name in str(caught.value)


def test_bad_files_are_skipped_with_a_report(damaged_folder, caplog):
    config = DataConfig(name="folder", root=str(damaged_folder), bad_files="skip", batch_size=3, workers=0)
    loader, names = file_loader(config)
    assert "3 of 15 files" in caplog.text
    assert "cut.jpg" in caplog.text
    assert len(names) == 3
    labels = torch.cat([labels for _, labels in loader])
    assert labels.bincount().tolist() == [4, 4, 4]


def test_tar_archive_is_the_folder(digit_folder):
    with tarfile.open(digit_folder / "packed.tar", "w") as archive:
        archive.add(digit_folder / "train", arcname="train")
        bad = tarfile.TarInfo("train/digit 0/bad.png")
        bad.size = 3
        archive.addfile(bad, io.BytesIO(b"???"))
    config = DataConfig(name="tar", root=str(digit_folder), bad_files="skip", batch_size=4, workers=2, in_chans=1)
    loader, names = file_loader(config, "packed")
    assert names == ("digit 0", "digit 1", "digit 2")
    folder = DataConfig(name="folder", root=str(digit_folder), batch_size=4, workers=0, in_chans=1)
    for (images, labels), (expected, same) in zip(loader, file_loader(folder)[0], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, same)


def test_webdataset_shards(tmp_path):
    pytest.importorskip("webdataset")
    digits = load_digits("test")
    with tarfile.open(tmp_path / "part-0000.tar", "w") as archive:
        for index in range(12):
            buffer = io.BytesIO()
            Image.fromarray(digits.images[index, 0].numpy()).save(buffer, "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("cls", str(int(digits.labels[index])).encode())):
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    config = DataConfig(
        name="wds/digits", root=str(tmp_path), val_samples=12, batch_size=4, workers=1, in_chans=1, img_size=8
    )
    loader, names = file_loader(config, "part-0000.tar")
    assert names is None
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(labels, digits.labels[:12])
    assert torch.equal(images, digits.images[:12])


def test_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'cifar'; use digits, fashion_mnist, folder"):
        open_split(DataConfig(name="cifar"), "train")


def test_file_augmentation_is_refused_for_data_in_memory():
    dataset, _ = open_split(DataConfig(), "train")
    preprocessing = resolve_preprocessing(DataConfig(), dataset, torch.nn.Identity())
    with pytest.raises(ValueError, match=r"augment\.auto_augment"):
        make_loader(dataset, preprocessing, DataConfig(), "cpu", AugmentConfig(auto_augment="rand-m9"))


def test_split_may_be_a_tar_file_itself(digit_folder):
    with tarfile.open(digit_folder / "val.tar", "w") as archive:
        archive.add(digit_folder / "val", arcname="")
    shutil.rmtree(digit_folder / "val")
    dataset, names = open_split(DataConfig(name="tar", root=str(digit_folder)), "val")
    assert len(dataset) == 12
    assert len(names) == 3
    assert Path(dataset.reader.root).name == "val.tar"


def test_preprocessing_follows_the_models_crop_mode():
    model = zoo.create_model("mamba_vision_nano", pretrained_cfg_overlay={"crop_mode": "squash", "crop_pct": 1.0})
    preprocessing = resolve_preprocessing(DataConfig(img_size=32), None, model)
    assert preprocessing.crop_mode == "squash"
    stripes = Image.fromarray(np.repeat(np.linspace(0, 255, 96, dtype=np.uint8)[None], 32, 0)).convert("RGB")
    image = image_transform(preprocessing)(stripes)  # 32 x 96 pixels
    assert image.shape == (3, 32, 32) and image[0, 0, 0] < 10 and image[0, 0, -1] > 245  # nothing is cut off
