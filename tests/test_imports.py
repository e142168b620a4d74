"""Who imports whom: the layers of the code base, read from the syntax tree of every file."""

import ast
import json
import pkgutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm.models

ROOT = Path(__file__).parents[1]
FOLDERS = ("zoo", "backbones", "heads", "kernels", "configs", "tools")
OWN_TOP_LEVEL = {*FOLDERS, "tests"}
CORE = {"numpy", "torch", "torchvision", "timm"}
OPTIONAL = {
    *(
        "PIL",
        "accelerate",
        "albumentations",
        "faster_coco_eval",
        "matplotlib",
        "mmengine",
        "mmseg",
        "omegaconf",
        "onnx",
    ),
    *("onnxruntime", "onnxscript", "open_clip", "pycocotools", "rich", "safetensors", "sklearn", "torchmetrics"),
    *("elpv_dataset", "peft", "pytorch_grad_cam", "webdataset"),
    *("tensorboard", "tqdm", "transformers", "triton", "yaml", "huggingface_hub", "numba", "llvmlite"),
}
COMPILERS = {"triton", "numba", "llvmlite"}
COMPARED = {"causal_conv1d", "fla", "mamba_ssm", "mambapy"}  # what benchmarks measure us against


@dataclass(frozen=True)
class Layer:
    """What the files below a folder may import besides the standard library.

    Names are prefixes of dotted modules; the layer's own package is always allowed.
    """

    folder: str
    third_party: frozenset[str]
    own: tuple[str, ...]


LAYERS = (  # the most specific folder first
    Layer("kernels", frozenset({"torch", "numpy", *COMPILERS}), ()),
    Layer("backbones/scans", frozenset({"torch"}), ("zoo.kernels",)),
    Layer("backbones", frozenset({"torch", "timm"}), ("zoo.kernels", "zoo.registry")),
    Layer(
        "heads",
        frozenset(CORE | {"open_clip", "transformers", "peft", "mmseg", "mmengine"}),
        ("zoo.registry", "zoo.kernels", "zoo.backbones.layers", "zoo.backbones.scans"),
    ),
    Layer("configs", frozenset(), ()),
    Layer("zoo", frozenset(CORE | OPTIONAL - COMPILERS), ("zoo.backbones", "zoo.heads", "zoo.kernels", "zoo.configs")),
    Layer("tools", frozenset(CORE | OPTIONAL | COMPARED), ("zoo",)),
)
SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One imported name: ``from module import name``, or ``import module`` where name is empty."""

    line: int
    module: str
    name: str
    relative: bool


def imports_of(tree: ast.AST) -> list[Import]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, "", False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [Import(node.lineno, node.module or "", alias.name, node.level > 0) for alias in node.names]
    return found


def module_name(source: str) -> str:
    """Dotted import name of a file: ``backbones/vim.py`` is ``zoo.backbones.vim``."""
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.split(".")[0] == "zoo" else f"zoo.{name}"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def full_name(imported: Import) -> str:
    """The dotted module, counting ``from zoo import backbones`` as one of ``zoo.backbones``."""
    if imported.module == "zoo" and (ROOT / imported.name).is_dir():
        return f"zoo.{imported.name}"
    return imported.module


def layer_of(source: str) -> Layer:
    return next(layer for layer in LAYERS if source.startswith(layer.folder + "/"))


def violations(source: str, text: str) -> list[str]:
    """What in this file's imports breaks the layering."""
    layer, problems = layer_of(source), []
    own_package = module_name(f"{layer.folder}/__init__.py")
    for imported in imports_of(ast.parse(text)):
        module, top = full_name(imported), imported.module.split(".")[0]
        where = f"{source}:{imported.line}"
        if imported.relative:
            problems.append(f"{where}: relative import; write `from zoo...`")
        elif imported.name == "*":
            problems.append(f"{where}: star import of {module}")
        elif top in OWN_TOP_LEVEL - {"zoo"}:
            problems.append(f"{where}: bare `{top}`; write `zoo.{top}`")
        elif top == "zoo":
            own = own_package if layer.folder != "zoo" else "zoo"
            forbidden = layer.folder == "zoo" and within(module, "zoo.tools")
            forbidden |= layer.folder == "backbones" and module.startswith("zoo.kernels.")  # the public calls only
            if forbidden or not any(within(module, allowed) for allowed in (own, *layer.own)):
                problems.append(f"{where}: {layer.folder}/ must not import {module}")
        elif top not in sys.stdlib_module_names and top not in layer.third_party:
            problems.append(f"{where}: {layer.folder}/ must not import {top}")
        outside = not within(module, module_name(source).rpartition(".")[0])
        private = [part for part in (*module.split("."), imported.name) if part.startswith("_") and part[1:2] != "_"]
        if (
            top == "zoo"
            and private
            and outside
            and not (layer.folder == "kernels" and private[0] in ("_backend", "_triton"))
        ):
            problems.append(f"{where}: {private[0]} is private to {module}")
    return problems


@pytest.mark.parametrize("source", SOURCES)
def test_layering(source):
    assert violations(source, (ROOT / source).read_text()) == []


@pytest.mark.parametrize(
    "source, text, problem",
    [
        ("kernels/x.py", "import timm", "kernels/ must not import timm"),
        ("kernels/x.py", "from zoo.backbones import vim", "kernels/ must not import zoo.backbones"),
        ("kernels/x.py", "from zoo import heads", "kernels/ must not import zoo.heads"),
        ("backbones/scans/x.py", "from timm.layers import Mlp", "backbones/scans/ must not import timm"),
        ("backbones/x.py", "def f():\n    import zoo.factory", "backbones/ must not import zoo.factory"),
        ("backbones/x.py", "from zoo.kernels.selective_scan import op", "backbones/ must not import zoo.kernels.sel"),
        ("backbones/x.py", "import triton", "backbones/ must not import triton"),
        ("backbones/x.py", "import mamba_ssm", "backbones/ must not import mamba_ssm"),
        ("heads/x.py", "from zoo.backbones.vim import Vim", "heads/ must not import zoo.backbones.vim"),
        ("zoo/x.py", "from zoo.tools import train", "zoo/ must not import zoo.tools"),
        ("zoo/x.py", "from zoo.kernels import *", "star import"),
        ("tools/x.py", "from zoo.factory import _build", "_build is private"),
        ("tools/x.py", "from kernels import backend", "bare `kernels`"),
        ("heads/x.py", "from .fpn import FPN", "relative import"),
    ],
)
def test_violations_are_found(source, text, problem):
    assert any(problem in found for found in violations(source, text))


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("kernels/")])
def test_compilers_are_imported_in_their_own_files_only(source):
    used = {i.module.split(".")[0] for i in imports_of(ast.parse((ROOT / source).read_text()))} & COMPILERS
    assert used <= ({"triton"} if Path(source).name.startswith("triton") else COMPILERS - {"triton"})
    assert not used or Path(source).name.startswith(("triton", "cpu_"))


def test_no_tool_hides_another_module():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    assert tools.isdisjoint(sys.stdlib_module_names | CORE | OPTIONAL)


def test_no_backbone_file_has_the_name_of_a_timm_module():
    """timm's registry keeps only the last part of a module's name."""
    ours = {path.stem for path in (ROOT / "backbones").glob("*.py")} - {"__init__"}
    assert ours.isdisjoint(module.name for module in pkgutil.iter_modules(timm.models.__path__))


def test_import_is_light():
    """``import zoo`` loads no optional package beyond what timm loads anyway."""
    code = (
        "import json, sys, timm; before = set(sys.modules); import zoo; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "zoo" in loaded
    assert {name.split(".")[0] for name in loaded}.isdisjoint(OPTIONAL - {"safetensors", "PIL"})
    assert not [name for name in loaded if name.startswith(("zoo.tools", "zoo.engine")) or name.endswith(".triton")]
