"""Every packaged recipe: it loads, its model can be built, and its first lines and the guide say what it does."""

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import zoo
from zoo.backbones import FAMILIES
from zoo.config import find_config, list_configs, load_config
from zoo.data.loaders import IN_MEMORY

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "training.md"
RECIPES = list_configs()
CLASSIFICATION = [name for name in RECIPES if name.startswith("classification/")]
config_of = functools.cache(load_config)
OUTPUTS = {config_of(name).output: name for name in CLASSIFICATION}  # where each recipe's weights will be


def header(name: str) -> str:
    """The comment that a recipe begins with, as one line."""
    lines = find_config(name).read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


@functools.cache
def check_model(name: str, size: int | None, in_chans: int, kwargs: str) -> None:
    """Builds a model and runs it, without memory and without arithmetic."""
    with torch.device("meta"), torch.no_grad():
        model = zoo.create_model(name, num_classes=10, in_chans=in_chans, **json.loads(kwargs)).eval()
        size = size or model.pretrained_cfg["input_size"][-1]
        assert model(torch.empty(2, in_chans, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_recipe_loads_and_its_model_builds(name):
    config = config_of(name)
    assert 0 <= config.model.drop_path < 1
    kwargs = json.dumps({**config.model.kwargs, "drop_path_rate": 0.1})  # whatever the rate: fewer different models
    check_model(config.model.name, config.data.img_size, 1 if config.data.name in IN_MEMORY else 3, kwargs)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_warms_up_and_clips(name):
    """Scans diverge without: every recipe keeps clipping and a warm-up shorter than the run."""
    optim = config_of(name).optim
    assert optim.clip_grad
    assert 0 < optim.warmup_epochs < optim.epochs / 2


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_header_names_the_recipe_and_its_batch(name):
    """Its command is for this file; processes and batch are those that the learning rate is meant for."""
    config, text = config_of(name), header(name)
    commands = re.findall(r"-m zoo\.tools\.train (\S+)", text)
    assert name in {f"classification/{command.removeprefix('classification/')}" for command in commands} or (
        "python -m" not in text and "torchrun" not in text
    )
    batch = re.search(r"(\d+) GPUs x (\d+)", text)
    assert (batch is None) == (config.optim.lr_batch_size is None)
    if batch:
        gpus, images = map(int, batch.groups())
        assert (images, gpus * images) == (config.data.batch_size, config.optim.lr_batch_size)
        nodes = re.search(r"--nnodes=(\d+)", text)
        per_node = int(re.search(r"--nproc_per_node=(\d+)", text)[1])
        assert gpus == per_node * (int(nodes[1]) if nodes else 1)
    assert re.search(r"arXiv \d{4}\.\d{5}|Ours|leaderboard|comes with|digit scans|Fashion-MNIST", text)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_what_a_recipe_starts_from_exists(name):
    config = config_of(name)
    assert not (config.model.pretrained and config.model.checkpoint)
    if config.model.pretrained:
        assert zoo.list_pretrained(f"{config.model.name.split('.')[0]}*")
        assert timm.get_pretrained_cfg(config.model.name).has_weights
    if config.model.checkpoint:  # the weights of another recipe, of the same model or of its smaller patches' twin
        output, _, file = config.model.checkpoint.rpartition("/")
        assert file in ("best.safetensors", "last.safetensors")
        source = config_of(OUTPUTS[output]).model.name
        assert source == config.model.name.replace("_stride8", "")
    teacher = config.distill.teacher
    assert teacher in (None, "ema", "runs/teacher") or timm.get_pretrained_cfg(teacher).has_weights


def test_outputs_of_recipes_are_their_own():
    """Recipes whose file names are the same in several families would overwrite each other's runs."""
    assert len({config_of(name).output for name in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_published_and_a_fine_tuning_recipe(family):
    recipes = [name.split("/")[-1] for name in CLASSIFICATION if name.startswith(f"classification/{family}/")]
    assert any("_in1k" in name for name in recipes), recipes
    assert any(name.endswith("_imagefolder") for name in recipes), recipes
    models = {config_of(f"classification/{family}/{name}").model.name.split(".")[0] for name in recipes}
    assert models <= set(zoo.list_models(family=family))


def test_the_guide_lists_every_recipe_as_it_is():
    """Epochs, images per update and learning rate in the tables are those of the files; none is missing."""
    rows = re.findall(r"^\| `(\S+)` \| (\d+) \| (\d+) \| ([\d.e-]+) \|.*\| (.*) \|$", GUIDE.read_text(), re.M)
    listed = {f"classification/{name}": values for name, *values in rows}
    recipes = {name for name in list_configs() if name.startswith("classification/")}
    assert set(listed) == recipes
    for name, (epochs, batch, lr, last) in listed.items():
        config = config_of(name)
        assert (int(epochs), float(lr)) == (config.optim.epochs, config.optim.lr), name
        assert int(batch) == (config.optim.lr_batch_size or config.data.batch_size), name
        if re.fullmatch(r"\d+\.\d", last):  # the published accuracy, which the file's first lines name too
            assert f"{last} % top-1 published" in " ".join(find_config(name).read_text().split("\n# "))


def guide_commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("words", guide_commands(), ids=shlex.join)
def test_commands_of_the_guide_name_what_exists(words):
    assert words[0] in ("python", "torchrun", "accelerate")
    if words[1] == "train.py":  # timm's own
        assert words[2:4] == ["--device-modules", "zoo"] and words[5] in zoo.list_models()
        return
    module = words[words.index("-m") + 1]
    assert (ROOT / "tools" / f"{module.removeprefix('zoo.tools.')}.py").is_file()
    if module == "zoo.tools.train":
        recipe, *overrides = words[words.index("-m") + 2 :]
        assert not overrides or all("=" in override for override in overrides)
        load_config(recipe, overrides)


@pytest.mark.slow
def test_commands_of_the_guide_for_one_cpu_run(tmp_path):
    """Those on digits, in their order, in an empty folder; then the series of students is loaded as it says."""
    commands = [words for words in guide_commands() if words[0] == "python" and any("digits" in word for word in words)]
    (snippet,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert len(commands) == 7
    for words in [*commands, ["python", "-c", snippet]]:
        command = [sys.executable, *words[1:], *(["cpu=true"] if "zoo.tools.train" in words else [])]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
