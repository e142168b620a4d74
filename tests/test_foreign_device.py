"""What is never left on the CPU: tables, constants and states of models, on a device that does not take it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.assistant import Assistant
from zoo.config import load_config

NANOS = sorted(name for name in zoo.list_models("*_nano") if "." not in name)
DIGITS = [
    "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, d_state: 4, drop_path_rate: 0.5}",
    *("data.train_samples=64", "data.val_samples=61", "data.batch_size=32", "cpu=true"),
]
AUGMENTED = {
    "plain": [],
    "mixed": ["augment.mixup=0.8", "augment.cutmix=1.0", "augment.erase=0.5"],
    "shuffled": ["model.kwargs.layer_shuffle=0.9"],
}


def test_a_process_on_the_foreign_device():
    """Runs the tests below, and those of all files that ask for the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    asking = re.compile(r"\b(foreign|train_elsewhere)\b")
    files = [str(path) for path in Path(__file__).parent.glob("test_*.py") if asking.search(path.read_text())]
    environment = {**os.environ, "ZOO_FOREIGN_DEVICE": "1"}
    done = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > len(NANOS) + len(AUGMENTED)


def test_a_tensor_that_was_left_on_the_cpu_is_an_error(foreign):
    x = torch.ones(3, device=foreign)
    assert x.device == foreign and (2 * x + torch.tensor(1.0)).sum().item() == 9
    assert torch.equal(x.cpu(), torch.ones(3)) and x[torch.tensor([0, 2])].device == foreign
    with pytest.raises(RuntimeError, match=r"same device: aten.add.Tensor has \[\(3,\)\] on cpu"):
        x + torch.ones(3)
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()


@pytest.mark.parametrize("name", NANOS)
def test_models(foreign, name):
    model = zoo.create_model(name, drop_path_rate=0.5).to(foreign).train()
    images = torch.randn(2, *model.default_cfg["input_size"]).to(foreign).requires_grad_()
    model(images).square().sum().backward()
    assert images.grad.device == foreign and all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        final, maps = model.eval().forward_intermediates(torch.cat([images, images], dim=3))
    assert {x.device for x in (final, *maps)} == {foreign}


@pytest.mark.parametrize("name", AUGMENTED)
def test_classification(tmp_path, train_elsewhere, name):
    config = load_config("vim/micro_digits", [*DIGITS, *AUGMENTED[name], f"output={tmp_path}"])
    assert 0 <= train_elsewhere(config)["top1"] <= 100


def test_conversations(foreign, tmp_path):
    small = runpy.run_path(str(Path(__file__).with_name("small_vlm.py")))
    assistant = Assistant.load(small["save_run"](tmp_path), device=foreign)
    for color in (small["DARK"], small["BRIGHT"]):
        assistant.look(small["picture"](color))
        for question, answer in small["KNOWN"][color]:
            assert "".join(assistant.ask(question)) == answer
