"""Data for dense tasks: files of images and masks in every format, bad input, loaders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Cityscapes

from zoo.data.dense import (
    AugmentedData,
    make_dense_loader,
    open_segmentation,
    read_image,
    segmentation_augment,
)

ORIENTATION = 0x0112  # EXIF's tag


def save(path: Path, pixels: np.ndarray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    """A smooth image, so that JPEG hardly changes it."""
    start = np.random.default_rng(seed).integers(0, 60, 3)
    ramp = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    return (ramp + start).astype(np.uint8)


def labels(height: int = 20, width: int = 30, classes: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)


@pytest.fixture
def mask_folder(tmp_path):
    """Six images with masks of four classes, in three sizes, as a folder of masks."""
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ncar\ntree\n")
    for number in range(6):
        size = (20 + 4 * (number % 3), 30)
        save(tmp_path / f"images/train/{number}.jpg", picture(*size, number))
        save(tmp_path / f"masks/train/{number}.png", labels(*size, seed=number))
    return tmp_path


# Files of images


def test_every_kind_of_image_becomes_bytes(tmp_path):
    pixels, alpha = picture(), np.full((20, 30, 1), 9, np.uint8)
    grey = pixels[..., 0]
    wide = grey.astype(np.uint16) * 257 + np.arange(30, dtype=np.uint16)  # 16 bits whose upper half is grey
    files = {
        "rgb": save(tmp_path / "rgb.png", pixels),
        "rgba": save(tmp_path / "rgba.png", np.concatenate([pixels, alpha], 2)),
        "grey": save(tmp_path / "grey.png", grey),
        "grey_alpha": save(tmp_path / "la.png", np.stack([grey, alpha[..., 0]], 2)),
        "wide": save(tmp_path / "wide.png", wide),
        "wide_tiff": save(tmp_path / "wide.tif", wide),
        "wide_int": save(tmp_path / "int.tif", wide.astype(np.int32)),
        "cmyk": save(tmp_path / "cmyk.jpg", pixels, "CMYK", quality=98),
        "palette": save(tmp_path / "palette.png", pixels, "P"),
        "bits": save(tmp_path / "bits.png", grey > 100),
    }
    read = {name: read_image(path) for name, path in files.items()}
    assert all(image.shape == (20, 30, 3) and image.dtype == np.uint8 for image in read.values())
    for name in ("rgb", "rgba"):
        assert (read[name] == pixels).all()
    for name in ("grey", "grey_alpha", "wide", "wide_tiff", "wide_int"):
        assert (read[name] == grey[..., None]).all()
    assert np.abs(read["cmyk"].astype(int) - pixels).max() <= 6
    assert (read["palette"] == np.asarray(Image.open(files["palette"]).convert("RGB"))).all()
    assert (read["bits"] == np.where(grey > 100, 255, 0)[..., None]).all()
    assert read_image(files["wide"], channels=1).shape == (20, 30, 1)
    assert (read_image(files["wide"], channels=1)[..., 0] == grey).all()
    assert np.abs(read_image(files["rgba"], 1)[..., 0] - np.asarray(Image.open(files["rgb"]).convert("L"))).max() == 0


def test_images_that_cannot_be_read_are_named(tmp_path):
    floats = save(tmp_path / "floats.tif", np.random.rand(4, 4).astype(np.float32))
    with pytest.raises(ValueError, match=r"floats\.tif: it holds floating numbers"):
        read_image(floats)
    deep = save(tmp_path / "deep.tif", np.full((4, 4), 70000, np.int32))
    with pytest.raises(ValueError, match=r"deep\.tif: it holds values from 70000 to 70000"):
        read_image(deep)
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read the image .*text\.jpg"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match=r"nothing\.jpg"):
        read_image(tmp_path / "nothing.jpg")


def test_images_are_turned_only_if_their_annotations_are(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be shown a quarter turn clockwise
    pixels = picture(20, 30)
    path = save(tmp_path / "images/train/a.png", pixels, exif=exif)
    assert (read_image(path) == pixels).all()
    assert (read_image(path, size=(20, 30)) == pixels).all()
    assert (read_image(path, size=(30, 20)) == np.rot90(pixels, -1)).all()
    with pytest.raises(ValueError, match=r"20 x 30 pixels \(height x width\), but its annotations 31 x 20"):
        read_image(path, size=(31, 20))
    for size in ((20, 30), (30, 20)):
        save(tmp_path / "masks/train/a.png", labels(*size))
        data = open_segmentation("folder", tmp_path, "train")
        image, mask = data[0]
        assert image.shape[:2] == mask.shape == size == data.sizes[0]


# Semantic segmentation: the formats


def test_ade20k(tmp_path):
    stored = np.arange(600).reshape(20, 30) % 151
    stored[0, 0] = 255
    save(tmp_path / "images/training/ADE_train_1.jpg", picture())
    save(tmp_path / "annotations/training/ADE_train_1.png", stored.astype(np.uint8))
    data = open_segmentation("ade20k", tmp_path, "train")
    image, mask = data[0]
    assert image.shape == (20, 30, 3) and mask.dtype == np.uint8
    assert (mask == np.where((stored == 0) | (stored == 255), 255, stored - 1)).all()
    assert len(data) == 1 and len(data.class_names) == len(set(data.class_names)) == len(data.palette) == 150
    assert (data.class_names[0], data.class_names[149], data.palette[2]) == ("wall", "flag", (6, 230, 230))
    save(tmp_path / "annotations/training/ADE_train_1.png", np.full((20, 30), 151, np.uint8))
    with pytest.raises(
        ValueError, match=r"ADE_train_1\.png has the labels \[151\], .* 150 classes \(values 1 to 150\)"
    ):
        open_segmentation("ade20k", tmp_path, "training")


def test_ade20k_layout_with_other_classes(tmp_path):
    save(tmp_path / "images/validation/1.png", picture())
    save(tmp_path / "annotations/validation/1.png", labels(classes=3) + 1)
    data = open_segmentation("ade20k", tmp_path, "val", class_names=("background", "shirt", "shoe"))
    assert (data[0][1] == labels(classes=3)).all()
    assert data.class_names == ("background", "shirt", "shoe") and len(data.palette) == 3


def test_cityscapes(tmp_path):
    stored = np.arange(600).reshape(20, 30) % 34
    image = "leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png"
    ids, trained = (f"gtFine/val/ulm/ulm_000001_000019_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds"))
    save(tmp_path / image, picture())
    save(tmp_path / ids, stored.astype(np.uint8))
    for other in ("color", "instanceIds"):
        save(tmp_path / f"gtFine/val/ulm/ulm_000001_000019_gtFine_{other}.png", picture())
    data = open_segmentation("cityscapes", tmp_path, "val")
    official = {known.id: known.train_id for known in Cityscapes.classes}
    assert (data[0][1] == np.vectorize(official.get)(stored)).all()
    assert len(data) == 1 and len(data.class_names) == len(data.palette) == 19
    assert (data.class_names[0], data.class_names[18], data.palette[13]) == ("road", "bicycle", (0, 0, 142))

    converted = np.arange(600).reshape(20, 30) % 19
    converted[3:5] = 255
    save(tmp_path / trained, converted.astype(np.uint8))
    assert (open_segmentation("cityscapes", tmp_path, "val")[0][1] == converted).all()
    save(tmp_path / trained, np.full((20, 30), 20, np.uint8))
    with pytest.raises(ValueError, match=r"labels \[20\]"):
        open_segmentation("cityscapes", tmp_path, "val")
    with pytest.raises(ValueError, match="cityscapes has classes of its own"):
        open_segmentation("cityscapes", tmp_path, "val", class_names=("road",))


def test_voc(tmp_path):
    stored = np.arange(600).reshape(20, 30) % 21
    stored[5] = 255
    colored = Image.fromarray(stored.astype(np.uint8), "P")
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        save(tmp_path / f"JPEGImages/{name}.jpg", picture())
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        colored.putpalette([value % 256 for value in range(768)])
        colored.save(tmp_path / f"SegmentationClass/{name}.png")
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000032\n2007_000063\n")
    data = open_segmentation("voc", tmp_path, "val")
    assert [path.stem for path in data.images] == ["2007_000032", "2007_000063"]
    assert (data[1][1] == stored).all()
    assert len(data.class_names) == 21
    assert data.palette[:6] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128))
    assert data.palette[20] == (0, 64, 128)
    with pytest.raises(FileNotFoundError, match=r"no list of images .*train\.txt; found in .*: val\.txt"):
        open_segmentation("voc", tmp_path, "train")
    (lists / "val.txt").write_text("2007_000032\n2007_999999\n")
    with pytest.raises(ValueError, match=r"1 of 2 images .*\n.*2007_999999\.jpg: there is no file .*2007_999999"):
        open_segmentation("voc", tmp_path, "val")


def test_folder_of_masks(mask_folder):
    data = open_segmentation("folder", mask_folder, "train")
    assert data.class_names == ("sky", "road", "car", "tree")
    assert [path.stem for path in data.images] == [path.stem for path in data.masks] == list("012345")
    assert data.sizes == [(20, 30), (24, 30), (28, 30)] * 2
    for index, (image, mask) in enumerate(data[index] for index in range(6)):
        assert image.shape == (*data.sizes[index], 3)
        assert (mask == labels(*data.sizes[index], seed=index)).all()
    assert len(data.first(2)) == 2 and len(data.first(None)) == 6
    assert open_segmentation("folder", mask_folder, "train", in_chans=1)[0][0].shape == (20, 30, 1)
    save(mask_folder / "masks/train/0.png", labels(), "P")  # the numbers count, whatever the colours
    save(mask_folder / "masks/train/3.png", labels(seed=3).astype(np.uint16))
    again = open_segmentation("folder", mask_folder, "train")
    assert (again[3][1] == data[3][1]).all()
    (mask_folder / "classes.txt").unlink()
    assert open_segmentation("folder", mask_folder, "train").class_names == ("0", "1", "2", "3")
    assert open_segmentation("folder", mask_folder, "train", class_names="abcde").class_names == tuple("abcde")


def test_folders_within_folders(tmp_path):
    for place in ("a/1", "b/1", "b.c/1.5"):
        save(tmp_path / f"images/{place}.jpg", picture())
        save(tmp_path / f"masks/{place}.png", labels())
    data = open_segmentation("folder", tmp_path, "")
    assert len(data) == 3
    assert all(
        i.relative_to(tmp_path / "images").with_suffix("") == m.relative_to(tmp_path / "masks").with_suffix("")
        for i, m in zip(data.images, data.masks, strict=True)
    )


# Semantic segmentation: bad input


def test_labels_beyond_the_classes(mask_folder, caplog):
    bad = labels(24, 30)
    bad[0, :2] = 57, 60
    save(mask_folder / "masks/train/4.png", bad)
    message = r"1 of 6 images .*\n.*4\.jpg: the mask .*4\.png has the labels \[57, 60\], .*4 classes \(values 0 to 3\)"
    with pytest.raises(ValueError, match=message):
        open_segmentation("folder", mask_folder, "train")
    data = open_segmentation("folder", mask_folder, "train", bad_files="skip")
    assert [path.stem for path in data.images] == list("01235") and len(data.sizes) == 5
    assert "4.jpg" in caplog.text and "57, 60" in caplog.text
    save(mask_folder / "masks/train/0.png", bad[:20])  # after it was opened
    with pytest.raises(ValueError, match=r"0\.png has the labels \[57, 60\]"):
        data[0]


def test_masks_of_another_size(mask_folder):
    save(mask_folder / "masks/train/2.png", labels(20, 31))
    message = r"2\.jpg: the image has 28 x 30 pixels \(height x width\), but its annotations 20 x 31"
    with pytest.raises(ValueError, match=message):
        open_segmentation("folder", mask_folder, "train")
    assert len(open_segmentation("folder", mask_folder, "train", bad_files="skip")) == 5


def test_missing_and_damaged_files_are_listed(mask_folder, caplog):
    (mask_folder / "masks/train/0.png").unlink()
    (mask_folder / "images/train/1.jpg").unlink()
    cut = mask_folder / "images/train/2.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    (mask_folder / "masks/train/3.png").write_bytes(b"no picture")
    save(mask_folder / "masks/train/4.png", picture(24, 30))
    with pytest.raises(ValueError) as error:
        open_segmentation("folder", mask_folder, "train")
    text = str(error.value)
    assert text.startswith("5 of 6 images")
    for name, reason in {
        "images/train/0.jpg": "it has no mask",
        "masks/train/1.png": "it is the mask of no image",
        "images/train/2.jpg": "truncated",
        "images/train/3.jpg": "cannot read the mask",
        "images/train/4.jpg": "is a RGB image; masks hold one whole number per pixel",
    }.items():
        assert any(name in line and reason in line for line in text.splitlines()), (name, text)
    data = open_segmentation("folder", mask_folder, "train", bad_files="skip")
    assert [path.name for path in data.images] == ["5.jpg"]
    assert "5 of 6 images" in caplog.text
    (mask_folder / "masks/train/5.png").unlink()
    with pytest.raises(ValueError, match="no image with a mask in the split 'train'"):
        open_segmentation("folder", mask_folder, "train", bad_files="skip")


def test_masks_of_0_and_255_are_pointed_out(tmp_path, caplog):
    save(tmp_path / "images/a.png", picture())
    save(tmp_path / "masks/a.png", np.where(labels() > 1, 255, 0).astype(np.uint8))
    with pytest.raises(
        ValueError, match=r"no mask in .* has a label above 0.*; if 255 is meant to be a class, write it as 1"
    ):
        open_segmentation("folder", tmp_path, "")
    open_segmentation("folder", tmp_path, "", class_names=("no", "yes"))
    assert "write it as 1" in caplog.text


def test_segmentation_data_that_is_not_there(mask_folder):
    with pytest.raises(ValueError, match="unknown segmentation data 'ade'; use one of ade20k, cityscapes, voc, folder"):
        open_segmentation("ade", mask_folder, "train")
    with pytest.raises(FileNotFoundError, match=r"no folder .*val; found in .*images: train"):
        open_segmentation("folder", mask_folder, "val")
    with pytest.raises(FileNotFoundError, match=r"no folder .*training; nor is there .*nowhere"):
        open_segmentation("ade20k", mask_folder / "nowhere", "train")
    save(mask_folder / "images/train/0.png", picture())
    with pytest.raises(ValueError, match=r"0\.jpg and 0\.png have the same name but for the ending"):
        open_segmentation("folder", mask_folder, "train")
    (mask_folder / "images/train/0.png").unlink()
    with pytest.raises(ValueError, match="too many classes"):
        open_segmentation("folder", mask_folder, "train", class_names=[str(label) for label in range(256)])


# Loaders


def augmented(folder: Path, **options):
    data = open_segmentation("folder", folder, "train")
    return make_dense_loader(data, 2, True, segmentation_augment(16, distort=True), **options)


def test_batches_do_not_depend_on_workers(mask_folder):
    alone, helped = augmented(mask_folder, seed=3), augmented(mask_folder, seed=3, workers=2)
    assert len(alone) == len(helped) == 3
    passes = []
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        first, second = list(alone), list(helped)
        assert [images.shape for images, _ in first] == [(2, 3, 16, 16)] * 3
        assert first[0][0].dtype == torch.uint8 and first[0][1].dtype == torch.int64
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
        passes.append(torch.cat([images for images, _ in first]))
    assert not torch.equal(*passes)
    again = augmented(mask_folder, seed=3)
    torch.manual_seed(99)  # what others draw does not matter, and nothing is drawn from them
    before = torch.random.get_rng_state()
    assert torch.equal(torch.cat([images for images, _ in again]), passes[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(torch.cat([images for images, _ in augmented(mask_folder, seed=4)]), passes[0])
    again.set_epoch(1, first_batch=1)
    assert torch.equal(torch.cat([images for images, _ in again]), passes[1][2:])
    assert len(again) == 3


def test_samples_follow_from_seed_epoch_and_index(mask_folder):
    data = open_segmentation("folder", mask_folder, "train")
    samples = AugmentedData(data, segmentation_augment(16), seed=1)
    first = samples[3]
    samples[0], samples[5]
    assert torch.equal(samples[3][0], first[0])
    samples.set_epoch(1)
    assert not torch.equal(samples[3][0], first[0])


class Numbered(torch.utils.data.Dataset):
    """Images that show their index, of several sizes."""

    def __init__(self, count: int, boxes: bool = False) -> None:
        self.sizes = [(8 + index % 3, 9) for index in range(count)]
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int):
        image = np.full((*self.sizes[index], 3), index, np.uint8)
        if not self.boxes:
            return image, image[..., 0].copy()
        return image, {"boxes": np.zeros((index % 3, 4), np.float32), "image_id": np.array(index)}


def indices(loader) -> list[int]:
    return [int(image.flatten()[0]) for images, _ in loader for image in images]


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(boxes, world_size):
    data = Numbered(17, boxes)
    loaders = [make_dense_loader(data, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [indices(loader) for loader in loaders]
    assert sorted(index for share in shares for index in share) == list(range(17))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) and all(1 <= len(images) <= 4 for images, _ in batches)
        if not boxes:
            assert all(images.shape[-2:] == masks.shape[-2:] for images, masks in batches)
    if boxes:
        assert shares[0] == list(range(0, 17, world_size))


def test_processes_share_one_order():
    whole = make_dense_loader(Numbered(12, True), 4, True, seed=5)
    whole.set_epoch(2)
    order = indices(whole)
    assert sorted(order) == list(range(12)) != order
    shares = []
    for rank in range(2):
        loader = make_dense_loader(Numbered(12, True), 2, True, seed=5, rank=rank, world_size=2)
        loader.set_epoch(2)
        shares.append(indices(loader))
    assert [index for pair in zip(*shares, strict=True) for index in pair] == order
    assert len(make_dense_loader(Numbered(13, True), 2, True, world_size=2)) == 3  # full batches only


def test_loaders_say_what_does_not_fit():
    with pytest.raises(ValueError, match="5 training images do not fill one batch of 3 on each of 2 processes"):
        make_dense_loader(Numbered(5), 3, True, world_size=2)
    with pytest.raises(ValueError, match=r"differ in size: .*; crop and pad them, or batch_size=1"):
        list(make_dense_loader(Numbered(6), 3, True))
