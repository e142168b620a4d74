"""Several processes on one model: the same losses however many there are and however the model is divided."""

import csv
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

import zoo
from zoo.config import load_config
from zoo.data import BatchAugment, BatchShare
from zoo.engine import find_checkpoint, load_trained, validate
from zoo.engine.sharding import MovingAverage, fill_whole, find_units, scatter, shard, whole

processes = runpy.run_path(str(Path(__file__).with_name("training_processes.py")))
AUGMENTED = [
    *("augment.crop_padding=1", "augment.flip=0.5", "augment.erase=0.5", "augment.label_smoothing=0.1"),
    *("ema_decay=0.9", "optim.clip_grad=0.5", "optim.lr=1e-2"),
]


def losses(folder):
    with (folder / "run" / "log.csv").open(newline="") as file:
        return [[float(row[name]) for name in ("train_loss", "val_loss", "top1")] for row in csv.DictReader(file)]


def train(folder, world_size=1, strategy="ddp", options=()):
    """Trains with 32 images per batch over all processes."""
    arguments = [*AUGMENTED, f"data.batch_size={32 // world_size}", f"strategy={strategy}", *options]
    codes, output = processes["run"](folder, arguments, world_size)
    assert codes == [0] * world_size, output
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    return train(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """The same run of two processes that share the model."""
    return train(tmp_path_factory.mktemp("divided"), 2, "fsdp")


def test_two_processes_have_the_losses_of_one(tmp_path, alone):
    """61 images are evaluated, so this counts each of them once, too."""
    for ours, theirs in zip(losses(train(tmp_path, 2)), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_divided_model_has_the_losses_of_a_whole_one(alone, divided):
    for ours, theirs in zip(losses(divided), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_weights_and_states_of_a_divided_model_are_whole(alone, divided):
    for name in ("best", "last"):
        ours, theirs = (load_file(folder / "run" / f"{name}.safetensors") for folder in (divided, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
    assert load_trained(divided / "run")[1].model == "vim_micro"
    ours, theirs = (find_checkpoint(folder / "run").training for folder in (divided, alone))
    assert ours["optimizer"]["state"].keys() == theirs["optimizer"]["state"].keys()
    for mine, other in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert [value.shape for value in mine.values()] == [value.shape for value in other.values()]


@pytest.mark.slow
def test_a_run_continues_with_another_strategy_and_number_of_processes(tmp_path, alone):
    """Two processes divide the model in the first epoch, one has it in the second, four divide it in the third."""
    start = {"resume": "null"}
    for epoch, (world_size, strategy) in enumerate([(2, "fsdp"), (1, "ddp"), (4, "fsdp")], 1):
        folder = tmp_path / str(epoch)
        job = processes["start"](
            folder,
            [*AUGMENTED, f"data.batch_size={32 // world_size}", f"strategy={strategy}", f"resume={start['resume']}"],
            world_size,
            fault="stops_after_an_epoch",
        )
        assert job.wait() == [0] * world_size, job.output()
        start["resume"] = find_checkpoint(folder / "run").path
        assert find_checkpoint(folder / "run").training["epoch"] == epoch
    ours, theirs = (load_file(folder / "run" / "last.safetensors") for folder in (tmp_path / "3", alone))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_processes_have_the_losses_of_one(tmp_path, alone, strategy):
    for ours, theirs in zip(losses(train(tmp_path, 4, strategy)), losses(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["optim.grad_accum=2"], ["optim.name=lamb", "optim.layer_decay=0.7"]], ids=str)
def test_divided_models_accumulate_and_take_other_optimizers(tmp_path, options):
    whole_run = losses(train(tmp_path / "whole", options=options))
    for strategy in ("ddp", "fsdp"):
        for ours, theirs in zip(losses(train(tmp_path / strategy, 2, strategy, options)), whole_run, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_models_with_running_statistics_are_evaluated_alike_everywhere(tmp_path, strategy):
    """Each process has statistics of its own images; what is evaluated, and saved, is one model."""
    small, config = processes["SMALL"][1:], "classification/nano_fashion_mnist"  # another model than the small one
    options = ["model.name=efficient_vmamba_nano", "data.name=digits", "data.img_size=32", f"strategy={strategy}"]
    options += [*small, "optim.epochs=2", "data.batch_size=16", "data.train_samples=64", "data.val_split=test"]
    options += ["precision=fp32"]  # as validate computes
    job = processes["start"](tmp_path, options, 2, config=config)
    assert job.wait() == [0, 0], job.output()
    model, card = load_trained(tmp_path / "run" / "last.safetensors")
    data = load_config(config, options).data
    assert validate(model, card, data).loss == pytest.approx(losses(tmp_path)[-1][1], rel=1e-4)


def test_augmentation_does_not_depend_on_the_number_of_processes():
    images = torch.randint(0, 256, (12, 3, 9, 14), dtype=torch.uint8)

    def augmented(rank, world_size, seed=3):
        share = BatchShare(rank, world_size, torch.Generator().manual_seed(seed))
        torch.rand(rank + 1)  # what a process draws otherwise does not matter
        augment = BatchAugment((0.5,) * 3, (0.2,) * 3, crop_padding=2, flip=0.5, erase=0.5, share=share)
        return augment(images[rank::world_size])

    expected = augmented(0, 1)
    for world_size in (2, 3, 4):
        for rank in range(world_size):
            assert torch.equal(augmented(rank, world_size), expected[rank::world_size])
    assert not torch.equal(augmented(0, 1, seed=4), expected)
    assert len({image.numpy().tobytes() for image in expected}) == 12


def test_units_are_what_has_matrices_in_the_innermost_blocks():
    vim = zoo.create_model("vim_micro", num_classes=3, img_size=8, patch_size=2, embed_dim=16, depth=2, d_state=4)
    assert find_units(vim) == [block.mixer for block in vim.blocks]
    vmamba = zoo.create_model("vmamba_nano", num_classes=3)
    units = find_units(vmamba)
    blocks = [block for stage in vmamba.stages for block in stage.blocks]
    assert units == [part for block in blocks for part in (block.mixer, block.mlp)]
    assert find_units(nn.Linear(2, 2)) == []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.branches = nn.LayerNorm(4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    assert find_units(model) == list(model.layers[0].branches)


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, in which a model is divided by one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


SLOW_FAMILIES = [
    *(
        "vmamba_nano",
        "adventurer_nano",
        "efficient_vmamba_nano",
        "lbvim_nano",
        "local_vim_nano",
        "local_vmamba_nano",
        "a2mamba_nano",
    ),
    *("mamba_vision_nano", "plain_mamba_nano", "shuffle_mamba_nano", "test_vit", "test_convnext"),
]


@pytest.mark.parametrize("name", ["vim_micro", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FAMILIES)])
def test_divided_model_computes_what_it_did(process_group, name):
    """Loss, gradients, an optimizer's update, its moving average, and the way back to a whole model."""
    small = {"vim_micro": dict(embed_dim=16, depth=2, d_state=4), "a2mamba_nano": dict(clamp_windows=True)}
    size = 160 if name.startswith("test_") else 28 if name == "vim_micro" else 32
    make = dict(num_classes=3, in_chans=1 if name == "vim_micro" else 3, **small.get(name, {}))
    torch.manual_seed(1)
    model = zoo.create_model(name, **make).eval()  # neither dropout nor statistics of batches
    divided, kept = zoo.create_model(name, **make).eval(), zoo.create_model(name, **make).eval()
    divided.load_state_dict(model.state_dict())
    average, reference = MovingAverage(divided, decay=0.5), ModelEmaV3(model, decay=0.5)
    shard(divided, torch.device("cpu"))
    shard(average.module, torch.device("cpu"))
    images = torch.randn(2, make["in_chans"], size, size)
    optimizers = []
    for module, ema in ((divided, average), (model, reference)):
        optimizers.append(torch.optim.SGD(module.parameters(), lr=1e-1, momentum=0.9))
        for step in range(2):
            module(images).logsumexp(-1).sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizers[-1].step()
            optimizers[-1].zero_grad()
            ema.update(module, step=step)
    for ours, theirs in ((divided, model), (average.module, reference.module)):
        fill_whole(kept, ours)
        for (key, value), other in zip(kept.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.allclose(value, other, atol=1e-5), key
    state = whole(optimizers[0].state_dict())
    again = whole(scatter(state, optimizers[0]))
    for mine, other in zip(state["state"].values(), again["state"].values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert whole({"a": [torch.ones(1), 2]}, keep=False) == {"a": [None, 2]}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_torchrun_forwards_sigterm_and_the_run_continues_bit_for_bit(tmp_path, strategy):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = [*processes["SMALL"], *AUGMENTED, "data.batch_size=16", f"strategy={strategy}", "optim.epochs=40"]
    command = [*launch, "zoo.tools.train", "vim/micro_digits", *options, "resume=auto"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def finish(folder):
        subprocess.run([*command, f"output={folder}"], check=True, timeout=500, env=environment)
        return load_file(folder / "last.safetensors")

    expected = finish(tmp_path / "whole")
    job = subprocess.Popen([*command, f"output={tmp_path / 'stopped'}"], env=environment)
    deadline = time.monotonic() + 300
    while not (tmp_path / "stopped" / "checkpoints" / "epoch-0002").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.wait(60)
    state = find_checkpoint(tmp_path / "stopped").training
    assert 2 <= state["epoch"] < 40
    found = finish(tmp_path / "stopped")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_torchrun_ends_when_one_process_is_killed(tmp_path):
    """In bounded time, with a status that says so, and with a word of the process that is left."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = [*processes["SMALL"], "data.batch_size=16", "optim.epochs=2000", f"output={tmp_path / 'run'}"]
    job = subprocess.Popen(
        [*launch, "zoo.tools.train", "vim/micro_digits", *options],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "epoch-0002").exists():
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{pid}/environ").read_bytes().split(b"\0RANK=")[1][:1]: int(pid) for pid in workers}
    os.kill(ranks[b"1"], signal.SIGKILL)
    began = time.monotonic()
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert time.monotonic() - began < 60
    assert "error: another process of this run has ended" in errors
