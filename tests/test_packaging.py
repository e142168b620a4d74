"""The wheel: what is in it, and that it works once installed, away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("zoo", "backbones", "heads", "kernels", "configs", "tools")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, without network, so that nothing is left behind in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").write_text("")
    subprocess.run(
        [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out, source], check=True
    )
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder the wheel is installed in, apart from this environment."""
    target = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    return target


def run_installed(installed: Path, folder: Path, *arguments: str) -> str:
    """Runs Python in another folder, with the installed wheel before anything else on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_is_pure_python_with_one_top_level_name(wheel):
    assert wheel.name.startswith("vision_ssm_zoo-") and wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"zoo"}
    assert not [name for name in names if "tests/" in name or name.endswith((".so", ".pyc"))]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_wheel_holds_every_module_and_every_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        (folder if folder == "zoo" else f"zoo/{folder}") + "/" + path.relative_to(ROOT / folder).as_posix()
        for folder in FOLDERS
        for pattern in ("*.py", "*.yaml", "*.json")
        for path in (ROOT / folder).rglob(pattern)
    }
    assert "zoo/backbones/vim.py" in expected
    assert any(name.startswith("zoo/configs/") and name.endswith(".yaml") for name in expected)
    assert expected - names == set()


def test_installed_wheel_works_from_another_folder(installed, tmp_path):
    code = (
        "import torch, zoo; from importlib.resources import files; from zoo.tools import doctor; "
        "print(zoo.__file__, zoo.kernels.__file__, doctor.__file__, files('zoo.configs')); "
        "print(tuple(zoo.create_model('vim_micro').eval()(torch.randn(2, 3, 32, 32)).shape)); "
        "print([doctor.check(name, torch.device('cpu'))[0] for name in doctor.CHECKS])"
    )
    paths, shape, checks = run_installed(installed, tmp_path, "-c", code).splitlines()
    assert all(path.startswith(str(installed)) for path in paths.split())
    assert shape == "(2, 10)"
    assert checks == "[True, True, True, True]"
