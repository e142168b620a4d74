"""What can happen to a run, and what is left: kills, signals, full disks and memory, losses that are no numbers."""

import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchmetrics.classification  # noqa: F401 before matplotlib is hidden, which it looks at
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import zoo.engine.checkpoint
import zoo.engine.loop
from zoo.config import load_config
from zoo.engine import find_checkpoint, read_log, train
from zoo.engine.loop import find_batch_size
from zoo.engine.memory import advise_batch_size, is_out_of_memory, resized, same_update
from zoo.tools.train import main

processes = runpy.run_path(str(Path(__file__).with_name("training_processes.py")))
EVERYTHING = [
    *("ema_decay=0.9", "augment.mixup=0.2", "augment.erase=0.3", "augment.crop_padding=1", "model.drop_path=0.1"),
    *("checkpoint_every=1", "resume=auto"),
]


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        yield


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def small_config(folder, *options):
    return load_config("vim/micro_digits", [*processes["SMALL"], f"output={folder}", *options])


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else []


def assert_same_weights(first, second):
    for name in ("last", "best"):
        ours, theirs = (load_file(folder / "run" / f"{name}.safetensors") for folder in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def kill_and_continue(tmp_path, kills, epochs, world_size=1, strategy="ddp"):
    """Kills a run that saves its state after every update, at random moments after it has begun to, again and again."""
    options = [*EVERYTHING, f"optim.epochs={epochs}", f"data.batch_size={32 // world_size}", f"strategy={strategy}"]
    codes, output = processes["run"](tmp_path / "whole", options, world_size)
    assert codes == [0] * world_size, output
    moment, run = random.Random(0), tmp_path / "killed" / "run"
    for _ in range(kills):
        before = checkpoints(run)
        job = processes["start"](tmp_path / "killed", options, world_size)
        while checkpoints(run) == before and job.processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(moment.random() * 0.2)
        job.kill()
        if all(process.exitcode == 0 for process in job.processes):
            break  # it was faster
        assert find_checkpoint(run) or not before
    codes, output = processes["run"](tmp_path / "killed", options, world_size)
    assert codes == [0] * world_size, output
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_killed_twice_a_run_ends_with_the_same_weights(tmp_path):
    kill_and_continue(tmp_path, kills=2, epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, strategy, kills", [(1, "ddp", 10), (2, "ddp", 10), (2, "fsdp", 10), (4, "ddp", 3), (4, "fsdp", 3)]
)
def test_killed_many_times_a_run_ends_with_the_same_weights(tmp_path, world_size, strategy, kills):
    """The last bit of a sum of more than two depends on its order, which therefore may not change either."""
    kill_and_continue(tmp_path, kills, 5, world_size, strategy)


BRIEF = ["data.train_samples=64", "optim.epochs=3", "checkpoint_every=1"]


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """The folder of a run of six updates."""
    folder = tmp_path_factory.mktemp("brief")
    train(small_config(folder / "run", *BRIEF))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.mark.parametrize(
    "name, call", [("save_weights", 3), ("torch.save", 4), ("os.replace", 5), ("os.replace", 6), ("shutil.rmtree", 9)]
)
def test_killed_while_it_saves_a_run_continues(tmp_path, monkeypatch, brief, name, call):
    """At the third state or so, in each step of writing it."""
    owner, _, attribute = name.rpartition(".")
    module = getattr(zoo.engine.checkpoint, owner) if owner else zoo.engine.checkpoint
    real, calls = getattr(module, attribute), []

    def interrupted(*arguments, **options):
        paths = [str(argument) for argument in arguments if isinstance(argument, (str, Path))]
        calls.extend(path for path in paths[:1] if "checkpoints" in path)
        if len(calls) == call:
            raise KeyboardInterrupt  # unlike after an OSError, nobody tidies up
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, attribute, interrupted)
        train(small_config(tmp_path / "run", *BRIEF))
    assert len([name for name in checkpoints(tmp_path / "run") if name.startswith("epoch")]) >= 2
    assert find_checkpoint(tmp_path / "run").training["epoch"] < 3
    train(small_config(tmp_path / "run", *BRIEF, "resume=auto"))
    assert_same_weights(tmp_path, brief)
    assert checkpoints(tmp_path / "run") == checkpoints(brief / "run") == ["epoch-0002+00000001", "epoch-0003"]


def test_sigterm_stops_two_processes_that_continue_bit_for_bit(tmp_path):
    """One of them is told, at a moment of its own; both stop after the same update, and end well."""
    options = [*EVERYTHING, "data.batch_size=16", "optim.epochs=4"]
    job = processes["start"](tmp_path / "stopped", options, 2)
    while len(checkpoints(tmp_path / "stopped" / "run")) < 2:
        time.sleep(0.002)
    time.sleep(0.1)
    job.processes[1].terminate()  # which is SIGTERM
    assert job.wait() == [0, 0], job.output()
    state = find_checkpoint(tmp_path / "stopped" / "run").training
    assert state["epoch"] < 4
    assert "stopped as asked" in job.output()
    for folder in ("stopped", "whole"):
        codes, output = processes["run"](tmp_path / folder, options, 2)
        assert codes == [0, 0], output
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_stop_after_the_last_update_of_an_epoch_is_no_loss(tmp_path, monkeypatch, brief):
    """The epoch is evaluated when the run continues."""
    calls = []

    def at_the_fourth(self):
        calls.append(None)
        return len(calls) == 4

    with monkeypatch.context() as patch:
        patch.setattr(zoo.engine.loop.StopRequest, "requested", at_the_fourth)
        assert not train(small_config(tmp_path / "run", *BRIEF)).complete
    assert checkpoints(tmp_path / "run")[-1] == "epoch-0001+00000002"
    found = train(small_config(tmp_path / "run", *BRIEF, "resume=auto")).log
    assert_same_weights(tmp_path, brief)
    for ours, theirs in zip(found, read_log(brief / "run"), strict=True):
        assert all(ours[key] == pytest.approx(theirs[key], rel=1e-5) for key in ("lr", "train_loss", "train_top1"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_no_number_in_one_process_ends_all(tmp_path, strategy):
    codes, output = processes["run"](tmp_path, [f"strategy={strategy}"], 2, fault="nan_in_process_1", timeout=60)
    assert codes == [1, 1], output
    assert output.count("error: the loss is nan in process 1 in epoch 3, update 2: every module's output") == 1
    assert "error in process" not in output
    assert find_checkpoint(tmp_path / "run").training["epoch"] == 2


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_others(tmp_path, strategy):
    codes, output = processes["run"](tmp_path, [f"strategy={strategy}"], 2, fault="process_1_dies", timeout=60)
    assert codes == [1, 9], output
    assert "error: another process of this run has ended" in output
    assert "resume=auto" in output
    assert "Traceback" not in output


def test_a_full_disk_ends_all_processes_and_loses_nothing(tmp_path):
    codes, output = processes["run"](tmp_path, [], 2, fault="disk_is_full", timeout=60)
    assert codes == [1, 1], output
    assert "error: " in output
    assert "Traceback" not in output
    assert checkpoints(tmp_path / "run") == ["epoch-0001"]
    before = load_file(tmp_path / "run" / "last.safetensors")
    state = find_checkpoint(tmp_path / "run").training
    assert state["epoch"] == 1
    assert all(torch.equal(before[key], state["ema"][key]) for key in before)
    codes, output = processes["run"](tmp_path, ["resume=auto"], 2)
    assert codes == [0, 0], output


@pytest.mark.slow
def test_a_file_system_without_room_loses_nothing_and_the_run_continues(tmp_path, brief):
    """One in memory with room for two states beside the weights, but not for a third; then it grows."""
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system of one's own")
    disk, left = tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    words = ["vim/micro_digits", *processes["SMALL"], *BRIEF, "resume=auto", f"output={disk / 'run'}"]
    command = f"{sys.executable} -m zoo.tools.train {shlex.join(words)}"
    pages = sum(-(-file.stat().st_size // 4096) + 1 for file in (brief / "run").rglob("*") if file.is_file())
    script = f"""
        mount -t tmpfs -o size={4 * pages}k none {disk}
        {command} && exit 3
        cp -r {disk / "run"} {left}
        mount -o remount,size=60m {disk}
        {command} && cp -r {disk / "run"} {tmp_path}
    """
    done = subprocess.run([*mount, "sh", "-c", script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^error: .*(No space left|file write failed|unexpected pos)", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert find_checkpoint(left)
    assert all(file.stat().st_size for file in left.rglob("*") if file.is_file())
    assert_same_weights(tmp_path, brief)


def test_a_full_disk_leaves_earlier_states(tmp_path, monkeypatch):
    """A writer that fails in the middle of the third state."""
    save, calls = torch.save, []

    def full(state, path):
        calls.append(None)
        save(state, path)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:100])
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the earlier ones are whole"):
        patch.setattr(torch, "save", full)
        train(small_config(tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == ["epoch-0001", "epoch-0002"]
    assert train(small_config(tmp_path / "run", "resume=auto")).trained == 1


def test_a_state_within_an_epoch_is_not_continued_with_other_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.engine.loop.StopRequest, "requested", lambda self: True)
    train(small_config(tmp_path / "first"))
    monkeypatch.undo()
    state = find_checkpoint(tmp_path / "first").path
    with pytest.raises(ValueError, match="batches have 32 images over all processes, not 16"):
        train(small_config(tmp_path / "second", f"resume={state}", "data.batch_size=16"))


def test_processes_that_see_different_folders_do_not_begin(tmp_path, brief):
    shutil.copytree(brief / "run", tmp_path / "run")
    codes, output = processes["run"](tmp_path, [*BRIEF, "resume=auto"], 2, fault="process_1_sees_another_folder")
    assert codes == [1, 1], output
    assert "error: the processes do not see the same checkpoint" in output
    assert "Process 1 sees none" in output


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_shortage_of_memory_says_which_batch_size_makes_the_same_updates(tmp_path, monkeypatch, capsys):
    from zoo.engine.tasks.classification import Classification

    monkeypatch.setattr(Classification, "loss", out_of_memory)
    arguments = ["vim/micro_digits", *processes["SMALL"], f"output={tmp_path}", "optim.grad_accum=2"]
    assert main(arguments) == 1
    assert "data.batch_size=32 does not fit" in (message := capsys.readouterr().err)
    assert "set data.batch_size=16 optim.grad_accum=4, which makes the same updates" in message


@pytest.mark.parametrize(
    "update, largest, expected",
    [
        ((128, 1), 100, (64, 2)),
        ((96, 1), 50, (48, 2)),
        ((7, 3), 6, (3, 7)),
        ((10, 1), 3, (2, 5)),
        ((6, 2), 100, (6, 2)),
    ],
)
def test_an_update_is_split_into_batches_that_fit(update, largest, expected):
    assert same_update(*update, largest) == expected


def test_advice_without_a_measurement_goes_by_halves():
    device = torch.device("cpu")
    assert "data.batch_size=24 optim.grad_accum=2" in advise_batch_size(None, device, 48, 1)
    assert "neither does a smaller one" in advise_batch_size(None, device, 1, 1)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 1 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_batches_are_resized_whatever_they_hold():
    batch = (torch.arange(3), [{"boxes": 1}, {"boxes": 2}, {"boxes": 3}], {"mask": torch.eye(3)}, "as it is")
    larger = resized(batch, 5)
    assert larger[0].tolist() == [0, 1, 2, 0, 1]
    assert [target["boxes"] for target in larger[1]] == [1, 2, 3, 1, 2]
    assert larger[2]["mask"].shape == (5, 3)
    assert resized(larger, 2)[0].tolist() == [0, 1]
    assert larger[3] == "as it is"


def test_largest_batch_is_found(tmp_path, monkeypatch, capsys):
    from zoo.engine.tasks.classification import Classification

    loss = Classification.loss
    monkeypatch.setattr(
        Classification,
        "loss",
        lambda self, model, batch: (out_of_memory if len(batch[0]) > 20 else loss)(self, model, batch),
    )
    arguments = ["vim/micro_digits", *processes["SMALL"], f"output={tmp_path}"]
    assert main([*arguments, "--find-batch-size", "64"]) == 0
    output = capsys.readouterr().out
    assert "data.batch_size=16" in output
    assert re.search(r"^32 +does not fit$", output, re.MULTILINE)
    assert main([*arguments, "--find-batch-size", "8"]) == 0
    assert "data.batch_size=8" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert [trial.batch_size for trial in find_batch_size(small_config(tmp_path), 4)] == [2, 4]


@pytest.mark.gpu
def test_the_batch_size_that_is_advised_fits(tmp_path):
    """Some memory of the GPU is forbidden; the estimate is close to the largest batch that fits."""
    options = ["model.kwargs={img_size: 64, patch_size: 4, embed_dim: 192, depth: 8}", "data.img_size=64", "cpu=false"]
    options += ["data.train_samples=1442", "optim.epochs=1", "optim.warmup_epochs=0"]
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(MemoryError, match="about") as caught:
            train(small_config(tmp_path / "first", *options, "data.batch_size=1024"))
        words = str(caught.value).split()
        advice = [word.rstrip(",") for word in words if word.startswith(("data.batch_size", "optim.grad_accum"))][1:]
        assert train(small_config(tmp_path / "second", *options, *advice)).complete
        about = int(words[words.index("about") + 1])
        fitting = [trial.batch_size for trial in find_batch_size(small_config(tmp_path, *options), 2048) if trial.fits]
        assert fitting[-1] / 2 <= about < 2.5 * fitting[-1]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_signals_are_left_as_they_were(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(small_config(tmp_path, "optim.epochs=1", "optim.warmup_epochs=0"))
    assert signal.getsignal(signal.SIGTERM) is before
