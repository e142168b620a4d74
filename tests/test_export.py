"""Exported files: what they compute, what they say, and what is left behind when something goes wrong."""

import json
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch

import zoo
from zoo.backbones import FAMILIES
from zoo.data import Preprocessing
from zoo.engine import ModelCard, save_weights
from zoo.tools import export
from zoo.tools.exporting import onnx_file
from zoo.tools.exporting.onnx_file import ANY_SIZE, onnx_runner, write_onnx
from zoo.tools.exporting.output import staged
from zoo.tools.exporting.subject import Subject
from zoo.tools.exporting.tracing import Comparison, Images, compare

# What leaves of every family's nano model as few blocks as show all that its blocks can do.
WINDOWS = (("h", "v_flip", "w3_flip"),)
COLUMN = dict(patch_size=8, embed_dim=16)
FEW_BLOCKS = {
    "a2mamba": ("a2mamba_pico", dict(dims=(16, 32, 64), depths=(1, 0, 0), num_heads=(2, 2, 4), projection_dim=48)),
    "adventurer": ("adventurer_nano", dict(COLUMN, depth=2, d_state=8, head_dim=16, reversed_blocks=(1,))),
    "efficient_vmamba": ("efficient_vmamba_nano", dict(dims=16, depths=(1,) * 4)),
    "lbvim": ("lbvim_nano", dict(COLUMN, depth=2, global_pool="attn", pool_heads=4)),
    "local_vim": ("local_vim_nano", dict(COLUMN, depth=1, directions=WINDOWS, class_token=True, global_pool="token")),
    "local_vmamba": ("local_vmamba_nano", dict(dims=16, depths=(1, 0, 0, 0), directions=WINDOWS)),
    "mamba_vision": ("mamba_vision_nano", dict(dim=16, stem_width=8, depths=(1, 1, 2, 1), num_heads=(2, 4))),
    "plain_mamba": ("plain_mamba_nano", dict(COLUMN, depth=1, stem_width=16)),
    "shuffle_mamba": ("shuffle_mamba_nano", dict(COLUMN, depth=1)),
    "vim": ("vim_micro", dict(COLUMN, depth=1, class_token="middle", global_pool="token", rope=True)),
    "vmamba": ("vmamba_nano", dict(dims=16, depths=(1, 0, 0, 0))),
}
PUBLISHED = ("vim_tiny_patch16_224", "lbvim_tiny_patch16_224", "vmamba_tiny", "efficient_vmamba_tiny")
WHOLE = [
    *((name, None) for name in (*zoo.list_models("*nano*"), "a2mamba_pico")),
    *((name, size) for name in PUBLISHED for size in ((224, 224), (224, 192))),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def lively(model_name: str, size: tuple[int, int] | None = None, **options) -> Subject:
    """A model in which no parameter is at a value that hides mistakes, with logits of order one."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, **options).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    channels, *own_size = model.pretrained_cfg["input_size"]
    size = size or tuple(own_size)
    model.get_classifier().weight.div_(model(torch.randn(4, channels, *size)).std())
    preprocessing = Preprocessing(size, channels, (0.5,) * channels, (0.25,) * channels)
    return Subject(model_name, model, preprocessing, "random", "none")


def in_onnx(subject: Subject, path: Path, any_size: bool = False) -> Comparison:
    """Writes a model as ONNX and compares the file with it."""
    images = Images(subject.preprocessing.in_chans, subject.preprocessing.size, any_size=any_size)
    found = compare(subject, images, write_onnx(subject, images, path))
    print(f"{subject.name} {subject.preprocessing.size}: {found}, {path.stat().st_size / 1e6:.1f} MB")
    return found


# Models.


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_onnx(family, tmp_path):
    name, options = FEW_BLOCKS[family]
    found = in_onnx(lively(name, num_classes=5, **options), tmp_path / "model.onnx")
    assert found.difference <= 2e-5 and 0.1 < found.spread < 5


@pytest.mark.slow
@pytest.mark.parametrize("name, size", WHOLE)
def test_whole_models_in_onnx(name, size, tmp_path):
    subject = lively(name, size)
    found = in_onnx(subject, tmp_path / "model.onnx")
    assert found.difference <= 2e-5 and 0.1 < found.spread < 5
    weights = sum(parameter.nbytes for parameter in subject.model.parameters())
    assert (tmp_path / "model.onnx").stat().st_size < 1.05 * weights + 6e6


@pytest.mark.slow
@pytest.mark.parametrize("family", ANY_SIZE)
def test_families_in_onnx_at_any_size(family, tmp_path):
    name, options = FEW_BLOCKS[family]
    subject = lively(name, num_classes=5, **options)
    assert in_onnx(subject, tmp_path / "model.onnx", any_size=True).difference <= 2e-5
    run = onnx_runner(tmp_path / "model.onnx")
    for size in ((32, 32), (64, 32), (57, 121), (200, 104)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(run(images), subject.model(images), rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> Path:
    """A file written by the tool from a run."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    options = dict(num_classes=3, in_chans=1, **FEW_BLOCKS["vim"][1])
    model = timm.create_model("vim_micro", **options)
    preprocessing = Preprocessing((32, 40), 1, (0.3,), (0.2,), "bicubic", 0.9)
    card = ModelCard("vim_micro", options, ("cat", "dog", "owl"), preprocessing, "folder")
    save_weights(folder / "best.safetensors", model.state_dict(), card)
    assert export.main([str(folder), "--format", "onnx", "--output", str(folder / "out" / "model.onnx")]) == 0
    return folder / "out" / "model.onnx"


def test_file_says_what_it_is(small_file):
    session = onnxruntime.InferenceSession(small_file)
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 1, 32, 40])
    assert (logits.name, logits.shape) == ("logits", ["batch", 3])
    about = session.get_modelmeta().custom_metadata_map
    lists = {name: json.loads(about[name]) for name in ("input_size", "mean", "std", "class_names", "crop_pct")}
    assert lists == dict(input_size=[1, 32, 40], mean=[0.3], std=[0.2], class_names=["cat", "dog", "owl"], crop_pct=0.9)
    assert (about["model"], about["num_classes"], about["interpolation"]) == ("vim_micro", "3", "bicubic")
    assert about["license"] == "unknown" and about["weights"].startswith("run")
    assert [file.name for file in small_file.parent.iterdir()] == ["model.onnx"]


def test_file_does_not_grow_with_the_image(small_file, tmp_path):
    run, larger = str(small_file.parents[1]), tmp_path / "larger.onnx"
    assert export.main([run, "--format", "onnx", "--img-size", "64", "80", "--output", str(larger)]) == 0
    small, large = onnx.load(small_file), onnx.load(larger)
    assert len(small.graph.node) == len(large.graph.node) < 200
    assert larger.stat().st_size < small_file.stat().st_size + 40_000  # tables and the position embedding
    assert len([node for node in large.graph.node if node.op_type == "Scan"]) == 1


# Other formats.


def test_torch_export(small_file, tmp_path, capsys):
    options = ["--format", "torch_export", "--output", str(tmp_path / "model.pt2"), "--img-size", "16"]
    assert export.main([str(small_file.parents[1]), *options]) == 0
    assert "largest difference between logits 0.0e+00" in capsys.readouterr().out
    extra = {"metadata.json": ""}
    module = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert module(torch.randn(5, 1, 16, 16)).shape == (5, 3)
    assert json.loads(extra["metadata.json"])["input_size"] == "[1, 16, 16]"


@pytest.mark.parametrize("family", FAMILIES)
def test_hub_folder(family, tmp_path, monkeypatch, capsys):
    name, options = FEW_BLOCKS[family]
    subject = lively(name, num_classes=5, **options)
    monkeypatch.setattr(export, "load_subject", lambda *args: subject)
    assert export.main([name, "--format", "safetensors-hub", "--output", str(tmp_path / "hub")]) == 0
    assert {file.name for file in (tmp_path / "hub").iterdir()} == {"model.safetensors", "config.json"}
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architecture"] == name and config["pretrained_cfg"]["mean"] == [0.5] * 3
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(2, 3, *subject.preprocessing.size)
    assert torch.equal(loaded(images), subject.model(images))
    fresh = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=2)
    assert fresh(images).shape == (2, 2)


def test_hub_folder_of_published_weights_has_a_card(tmp_path):
    output = tmp_path / "hub"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    options = ["--format", "safetensors-hub", "--output", str(output), "--pretrained"]
    assert export.main(["vim_nano", *options]) == 0
    names = {file.name for file in output.iterdir()}
    assert {"model.safetensors", "config.json", "notes.txt"} <= names
    assert ("README.md" in names) == ((Path(export.__file__).parent / "model_card.py").exists())
    config = json.loads((output / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "apache-2.0" and config["pretrained_cfg"]["tag"] == "fashion_mnist"


# Mistakes.


def failure(capsys, tmp_path: Path, *arguments: str) -> str:
    """The message of a call that has to fail and leave nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    assert export.main(list(arguments)) == 1
    assert sorted(tmp_path.rglob("*")) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_mistakes_are_named(capsys, tmp_path):
    output = str(tmp_path / "model.onnx")
    to_onnx = ("--format", "onnx", "--output", output)
    assert "did you mean vim_nano" in failure(capsys, tmp_path, "vim_nono", *to_onnx)
    assert "does not end in .onnx" in failure(capsys, tmp_path, "vim_nano", "--format", "onnx", "--output", "x.pt2")
    assert "got 3 numbers" in failure(capsys, tmp_path, "vim_nano", *to_onnx, "--img-size", "64", "99", "3")
    message = failure(capsys, tmp_path, "lbvim_nano", *to_onnx, "--dynamic-size")
    assert "leave out --dynamic-size" in message and "vim, vmamba" in message
    assert "too small for windows" in failure(capsys, tmp_path, "a2mamba_tiny", *to_onnx, "--img-size", "32")
    assert "no weights at" in failure(capsys, tmp_path, "runs/nothing.safetensors", *to_onnx)
    assert "there is no checkpoint" in failure(capsys, tmp_path, "vim_nano", *to_onnx, "--checkpoint", "none.pth")


def test_checkpoint_of_another_variant_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.weights.fit.fitting_variants", lambda state_dict: ["vim_micro"])  # it takes seconds
    checkpoint = tmp_path / "micro.pth"
    torch.save(timm.create_model("vim_micro").state_dict(), checkpoint)
    options = ["--format", "onnx", "--output", str(tmp_path / "model.onnx"), "--checkpoint", str(checkpoint)]
    assert "These weights fit vim_micro" in failure(capsys, tmp_path, "vim_nano", *options)


def test_places_that_cannot_be_written_are_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.onnx").mkdir()
    onnx_to = ("vim_nano", "--format", "onnx", "--output")
    assert "cannot write to" in failure(capsys, tmp_path, *onnx_to, str(tmp_path / "file" / "model.onnx"))
    assert "is a folder" in failure(capsys, tmp_path, *onnx_to, str(tmp_path / "folder.onnx"))
    message = failure(capsys, tmp_path, "vim_nano", "--format", "safetensors-hub", "--output", str(tmp_path / "file"))
    assert "is a file" in message


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named(package, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = failure(capsys, tmp_path, "vim_nano", "--format", "onnx", "--output", str(tmp_path / "model.onnx"))
    assert "pip install 'vision-ssm-zoo[export]'" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--format", "tensorrt"],
        ["--format", "onnx", "--img-size", "0"],
        ["--format", "onnx", "--pretrained", "--checkpoint", "file.pth"],
        ["--format", "safetensors-hub", "--batch", "4"],
        ["--format", "safetensors-hub", "--dynamic-size"],
    ],
)
def test_wrong_usage(arguments, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        export.main(["vim_nano", "--output", str(tmp_path / "model.onnx"), *arguments])
    assert stopped.value.code == 2


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_what_differs_is_removed(error, capsys, tmp_path, monkeypatch):
    def write(subject, images, path):
        path.write_bytes(b"wrong")
        path.with_name("model.onnx.data").write_bytes(b"wrong, too")
        return lambda x: subject.model(x) + error

    monkeypatch.setattr(export, "write_onnx", write)
    message = failure(capsys, tmp_path, "vim_micro", "--format", "onnx", "--output", str(tmp_path / "model.onnx"))
    assert "differs from vim_micro by more than 0.0001" in message


def test_interruption_leaves_nothing(capsys, tmp_path, monkeypatch):
    def write(subject, images, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_onnx", write)
    assert export.main(["vim_micro", "--format", "onnx", "--output", str(tmp_path / "model.onnx")]) == 130
    assert list(tmp_path.iterdir()) == [] and "nothing was written" in capsys.readouterr().err


def test_weights_beside_the_file_come_along(tmp_path, monkeypatch):
    """As they are written for models of more than 2 GB."""
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    monkeypatch.setattr(onnx_file, "fold_constants", lambda program: None)
    name, options = FEW_BLOCKS["shuffle_mamba"]
    subject = lively(name, **options)
    images = Images(3, (32, 32), batch=1)
    with staged(tmp_path / "out" / "model.onnx") as path:
        write_onnx(subject, images, path)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx", "model.onnx.data"}
    assert compare(subject, images, onnx_runner(tmp_path / "out" / "model.onnx")).difference < 2e-5
