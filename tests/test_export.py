"""Exported files: what they compute, what they say, and what is left behind when something goes wrong."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.backbones import FAMILIES
from zoo.backbones.layers.neighborhood import axis_windows, neighborhood_aggregate, neighborhood_maps
from zoo.data import Preprocessing
from zoo.engine import ModelCard, save_weights
from zoo.kernels import (
    add_layer_norm,
    add_rms_norm,
    causal_conv1d,
    depthwise_conv2d,
    selective_scan,
    ssd,
    use_backend,
)
from zoo.tools import export
from zoo.tools.exporting import onnx_file
from zoo.tools.exporting.decompositions import DECOMPOSITIONS, window_axis
from zoo.tools.exporting.folding import fold_constants
from zoo.tools.exporting.onnx_file import ANY_SIZE, convert, onnx_runner, write_onnx
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


# The operators, one by one.


def wave(x: Tensor, *shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, in the dtype of x."""
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=x.dtype).square()).view(shape)


@dataclass(frozen=True)
class Scan:
    """Sizes and options of one selective scan."""

    K: int = 1
    G: int = 1
    N: int = 4
    shared: bool = True
    table: tuple[tuple[int, ...], ...] | None = None
    reverse: tuple[bool, ...] = (False,)
    window: int = 1
    softplus: bool = True
    optional: bool = True
    complete: bool = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scans 9 tokens of 6 channels made from x (B, 9, 6); returns the output and the last states."""
        K, N = self.K, self.N
        scale = x.mean((1, 2)).view(-1, 1, 1, 1, 1)
        B, C = wave(x, 1, K, 9, self.G, N) + scale, wave(x, 1, K, 9, self.G, N) - scale
        return selective_scan(
            x if self.shared else x.unsqueeze(1) * wave(x, K, 1, 1),
            x.unsqueeze(1) * 0.5 + wave(x, K, 9, 6),
            -wave(x, K, 6, N).abs(),
            B,
            C,
            *((wave(x, K, 6), x * 0.7, wave(x, K, 6).cos()) if self.optional else ()),
            delta_softplus=self.softplus,
            paths=None if self.table is None else torch.tensor(self.table),
            reverse=list(self.reverse),
            window=self.window,
            complete=self.complete,
            initial_state=wave(x, K, 6, N) + scale.flatten(1, 2) if self.optional else None,
            return_last_state=True,
        )


SNAKE = (0, 1, 2, 5, 4, 3, 6, 7, 8)
SCANS = {
    "plain": Scan(),
    "bare": Scan(softplus=False, optional=False),
    "two_ends": Scan(K=2, reverse=(False, True), G=2),
    "own_inputs": Scan(K=2, reverse=(True, False), shared=False, N=1, G=3),
    "one_order_for_four_paths": Scan(K=4, table=(SNAKE,), reverse=(False, True) * 2, complete=True),
    "zero_tokens_and_fillers": Scan(
        K=2, table=((4, -1, 0, -1, 8), (7, 2, 5, -2, -2)), reverse=(False, True), shared=False
    ),
    "windows": Scan(K=2, reverse=(False, True), window=4),
    "windows_and_fillers": Scan(
        K=2, table=((3, -2, 0, -1, 8, 7, 1), (-2, 2, 5, -2, 1, 0, -1)), reverse=(False, True), window=2
    ),
}


def conv(x: Tensor) -> list[Tensor]:
    """Convolutions of tokens (B, 9, 6) along one and several paths."""
    weight, bias = torch.linspace(-1, 1, 48, dtype=x.dtype).view(2, 6, 4), torch.linspace(-1, 1, 12, dtype=x.dtype)
    return [
        causal_conv1d(x, weight[0], bias[:6]),
        causal_conv1d(x, weight, bias.view(2, 6), activation="silu", reverse=[False, True]),
        causal_conv1d(torch.stack([x, -x], 1), weight[:, :, :3], reverse=True),
    ]


def maps(x: Tensor) -> list[Tensor]:
    """Convolutions of maps (B, 3, 3, 6) made from x (B, 9, 6)."""
    weight, bias = torch.linspace(-1, 1, 54, dtype=x.dtype).view(6, 3, 3), torch.linspace(-1, 1, 6, dtype=x.dtype)
    grid = x.unflatten(1, (3, 3))
    kinds = [(bias, "silu"), (bias, "gelu"), (None, "relu"), (None, None)]
    return [depthwise_conv2d(grid, weight, shift, activation=activation) for shift, activation in kinds]


def heads(x: Tensor) -> list[Tensor]:
    """SSD over tokens (B, 9, 6) as 2 heads of 3 channels."""
    scale, values = x.mean((1, 2)).view(-1, 1, 1, 1), x.unflatten(2, (2, 3))
    dt, B, C = scale + wave(x, 2, 9, 2), (scale.unsqueeze(-1) + wave(x, 2, 9, 2, 5)), x.mean() - wave(x, 1, 2, 9, 2, 5)
    C = C.expand(len(x), -1, -1, -1, -1)
    A, D, bias, state = (
        -wave(x, 2, 2).abs(),
        wave(x, 2, 2),
        wave(x, 2, 2).cos(),
        scale.unsqueeze(-1) + wave(x, 2, 2, 3, 5),
    )
    table = torch.tensor([[4, -1, 0, -1, 8], [7, 2, 5, -2, -2]])
    return [
        *ssd(values, dt, A, B, C, D, bias, dt_softplus=True, reverse=[False, True], return_last_state=True),
        *ssd(values, dt, A, B, C, D, paths=table, reverse=[True, False], initial_state=state, return_last_state=True),
        ssd(values, -dt[:, 0].abs(), None, B[:, 0, :, 0], C[:, 0, :, 0]),
    ]


def norms(x: Tensor) -> list[Tensor]:
    """Norms of tokens (B, 9, 6), with and without an update, factors of it and a bias."""
    weight, bias = torch.linspace(0.5, 1.5, 6, dtype=x.dtype), torch.linspace(-1, 1, 6, dtype=x.dtype)
    return [
        add_rms_norm(None, x, weight)[0],
        *add_rms_norm(x.sin(), x, weight, 1e-3),
        *add_rms_norm(x.cos(), x, weight, scale=x.mean((1, 2))),
        add_layer_norm(None, x, weight)[0],
        *add_layer_norm(x.sin(), x, weight, bias, 1e-3),
        *add_layer_norm(x.cos(), x, weight, bias, scale=x.mean((1, 2))),
    ]


def attend(x: Tensor) -> list[Tensor]:
    """Neighbourhood attention on maps (B, 8, 9, 6) made from x (B, 9, 6), as 2 heads of 3 channels."""
    grid = torch.stack([x * (1 + 0.1 * row) for row in range(8)], 1).unflatten(3, (2, 3))
    bias = torch.linspace(-1, 1, 50, dtype=x.dtype).view(2, 5, 5)
    near = neighborhood_maps(grid, grid.cos(), 3, 1, bias)
    far = neighborhood_maps(grid, grid.sin(), 3, (2, 3))
    return [near, far, neighborhood_aggregate(near, grid, 3), neighborhood_aggregate(far, grid, 3, (2, 3))]


class Everything(nn.Module):
    """All operators with all of their options, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        scans = [out for scan in SCANS.values() for out in scan(x)]
        results = [*scans, *conv(x), *maps(x), *heads(x), *norms(x), *attend(x)]
        return torch.cat([result.flatten() for result in results])


class Decomposed(TorchDispatchMode):
    """Runs the decompositions in place of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.met = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.met.add(func)
        return DECOMPOSITIONS.get(func, func)(*args, **(kwargs or {}))


def test_decompositions_equal_the_operators():
    """In float64, so that nothing but a mistake makes a difference."""
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    with use_backend("reference"):
        expected = Everything()(x)
    with Decomposed() as mode:
        torch.testing.assert_close(Everything()(x), expected, rtol=1e-10, atol=1e-10)
    assert mode.met >= set(DECOMPOSITIONS)


def test_operators_in_onnx(tmp_path):
    program = torch.export.export(Everything(), (torch.randn(2, 9, 6),))
    translated = convert(program, ["x"], ["y"])
    translated.save(tmp_path / "everything.onnx")
    onnx.checker.check_model(str(tmp_path / "everything.onnx"), full_check=True)
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(onnx_runner(tmp_path / "everything.onnx")(x), Everything()(x), rtol=1e-4, atol=1e-5)


@torch.library.custom_op("zoo_test::unheard_of", mutates_args=())
def unheard_of(x: Tensor) -> Tensor:
    return x.clone()


@unheard_of.register_fake
def _(x):
    return torch.empty_like(x)


def test_operators_without_translation_are_named():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.zoo_test.unheard_of(x)

    with pytest.raises(RuntimeError, match=r"cannot be translated to ONNX: .*zoo_test.unheard_of"):
        convert(torch.export.export(Odd(), (torch.randn(3),)), ["x"], ["y"])


@pytest.mark.parametrize("length, kernel_size, dilation", [(7, 3, 1), (9, 3, 3), (16, 5, 3), (14, 7, 2), (5, 1, 4)])
def test_windows_of_neighbourhood_attention(length, kernel_size, dilation):
    cells, bias_rows = window_axis(length, kernel_size, dilation)
    assert torch.equal(cells, axis_windows(length, kernel_size, dilation))
    assert torch.equal(bias_rows * dilation, cells - torch.arange(length).unsqueeze(1) + (kernel_size - 1) * dilation)


class Tables(nn.Module):
    """Adds much that depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(300)
        order[::3] = order[::3].flip(0)
        values, places = torch.sort(self.weight.exp()[order])
        large = self.weight.unsqueeze(1) * self.weight
        return x + values + places + self.weight.exp()[order].sort().values + large.sum(0) + torch.rand(300) * 0


def test_folding_leaves_what_depends_on_the_input_and_what_grows():
    module, x = Tables(), torch.randn(4, 300)
    program = torch.export.export(module, (x,)).run_decompositions({})
    fold_constants(program)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if any(op in target for op in ("sort", "index", "arange", "exp"))]
    assert len([target for target in targets if "aten.add" in target]) == 5
    assert [target for target in targets if "mul" in target] and [target for target in targets if "rand" in target]
    folded = [name for name in program.constants if name.startswith("folded")]
    assert len(folded) == 3  # values, which are used twice, places, and the column of the large product
    torch.testing.assert_close(program.module()(x), module(x))


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
