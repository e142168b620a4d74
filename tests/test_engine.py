"""The training loop on real digits: it learns, survives being killed, and says why it fails."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchmetrics.classification  # noqa: F401 before matplotlib is hidden, which it looks at
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import zoo
from zoo.config import load_config
from zoo.data import load_digits
from zoo.engine import evaluate, find_checkpoint, load_trained, read_log, save_weights, train, validate
from zoo.engine.evaluate import explain_nonfinite
from zoo.weights import load_features

SMALL = [
    "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, d_state: 4}",
    "data.train_samples=128",
    "data.val_samples=64",
    "data.batch_size=32",
    "optim.epochs=4",
    "optim.warmup_epochs=1",
    "cpu=true",
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


def small_config(output, *overrides):
    return load_config("vim/micro_digits", [*SMALL, f"output={output}", *overrides])


def weights(output, name="last"):
    return load_file(output / f"{name}.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_after(epoch, monkeypatch):
    """Kills the run, as Ctrl-C would, in the middle of the epoch after this one."""
    from zoo.data import BatchAugment

    augment, calls = BatchAugment.forward, []

    def forward(self, images):
        calls.append(None)
        if len(calls) > 4 * epoch + 2:  # four batches per epoch
            raise KeyboardInterrupt
        return augment(self, images)

    monkeypatch.setattr(BatchAugment, "forward", forward)


def test_run_leaves_a_log_and_weights_that_describe_themselves(tmp_path):
    result = train(small_config(tmp_path / "run"))
    log = read_log(tmp_path / "run")
    assert [row["epoch"] for row in log] == [1, 2, 3, 4]
    assert log[-1]["train_loss"] < log[0]["train_loss"]
    assert log[0]["lr"] > log[-1]["lr"] > 0
    assert result.trained == 4
    assert result.best["top1"] == max(row["top1"] for row in result.log)
    assert (tmp_path / "run" / "config.yaml").exists()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["epoch-0003", "epoch-0004"]

    model, card = load_trained(tmp_path / "run" / "last.safetensors")
    assert (card.model, card.epoch, card.data) == ("vim_micro", 4, "digits")
    assert card.class_names == tuple("0123456789")
    scores = validate(model, card, small_config(tmp_path / "run").data)
    assert scores.top1 == pytest.approx(log[-1]["top1"], abs=1e-3)
    assert scores.loss == pytest.approx(log[-1]["val_loss"], rel=1e-4)


PLAIN = ["ema_decay=null", "augment.erase=0"]
RECIPE = ["ema_decay=0.9", "augment.mixup=0.2", "augment.cutmix=1.0", "augment.erase=0.2", "model.drop_path=0.1"]


@pytest.mark.parametrize("options", [PLAIN, RECIPE], ids=["plain", "everything"])
def test_killed_run_continues_bit_for_bit(tmp_path, monkeypatch, options):
    train(small_config(tmp_path / "whole", *options))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        train(small_config(tmp_path / "killed", *options))
    assert [row["epoch"] for row in read_log(tmp_path / "killed")] == [1, 2]
    result = train(small_config(tmp_path / "killed", *options, "resume=auto"))
    assert result.trained == 2
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert_same(weights(tmp_path / "killed", "best"), weights(tmp_path / "whole", "best"))
    first, second = (find_checkpoint(tmp_path / name).training for name in ("killed", "whole"))
    for old, new in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    drop = ("seconds", "images_per_second", "data_seconds")
    logs = [[{**row, **dict.fromkeys(drop)} for row in read_log(tmp_path / name)] for name in ("killed", "whole")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("epoch_updates", ["null", "7"])
def test_run_continues_within_an_epoch(tmp_path, monkeypatch, epoch_updates):
    """Killed after ten updates, in the third epoch or the second; an epoch may be longer than a pass, too."""
    options = [*RECIPE, "checkpoint_every=2", "optim.epochs=3", f"optim.epoch_updates={epoch_updates}"]
    train(small_config(tmp_path / "whole", *options))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(2, patch)
        train(small_config(tmp_path / "killed", *options))
    state = find_checkpoint(tmp_path / "killed").training
    assert (state["epoch"], state["update"]) == ((2, 2) if epoch_updates == "null" else (1, 2))
    train(small_config(tmp_path / "killed", *options, "resume=auto"))
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    drop = ("seconds", "images_per_second", "data_seconds")
    logs = [[{**row, **dict.fromkeys(drop)} for row in read_log(tmp_path / name)] for name in ("killed", "whole")]
    assert logs[0] == logs[1]


def test_finished_run_is_not_trained_again(tmp_path):
    train(small_config(tmp_path, "optim.epochs=2"))
    before = (tmp_path / "last.safetensors").stat().st_mtime_ns
    assert train(small_config(tmp_path, "optim.epochs=2", "resume=auto")).trained == 0
    assert (tmp_path / "last.safetensors").stat().st_mtime_ns == before


def test_unreadable_checkpoint_is_reported_and_the_previous_one_used(tmp_path, caplog):
    whole = train(small_config(tmp_path, "optim.epochs=3"))
    expected = weights(tmp_path)
    newest = tmp_path / "checkpoints" / "epoch-0003" / "training.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    result = train(small_config(tmp_path, "optim.epochs=3", "resume=auto"))
    assert "epoch-0003 cannot be read" in caplog.text
    assert result.trained == 1
    assert_same(weights(tmp_path), expected)
    assert result.best["top1"] == pytest.approx(whole.best["top1"])

    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        train(small_config(tmp_path, "optim.epochs=3", "resume=auto"))


def test_a_run_is_never_overwritten_or_continued_with_other_settings(tmp_path):
    train(small_config(tmp_path, "optim.epochs=1", "optim.warmup_epochs=0"))
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(small_config(tmp_path))
    with pytest.raises(ValueError, match=r"other settings \(.*optim\.lr was 0\.003, is 0\.1"):
        train(small_config(tmp_path, "optim.lr=0.1", "resume=auto"))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        train(small_config(tmp_path / "other", f"resume={tmp_path / 'nowhere'}"))


def test_unwritable_output_fails_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    began = time.perf_counter()
    with pytest.raises(OSError, match="cannot write to the output folder"):
        train(small_config(tmp_path / "file" / "run"))
    assert time.perf_counter() - began < 5


def test_nonfinite_loss_stops_the_run_and_names_the_module(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    create = zoo.create_model

    def create_breaking(*arguments, **kwargs):
        """The real model, whose first mixer overflows from its ninth batch in training on."""
        model = create(*arguments, **kwargs)
        calls = []

        def overflow(module, inputs, output):
            calls.append(None)
            return output * float("inf") if module.training and len(calls) > 12 else output

        model.get_submodule("blocks.0.mixer.out_proj").register_forward_hook(overflow)
        return model

    monkeypatch.setattr(zoo, "create_model", create_breaking)
    with pytest.raises(FloatingPointError, match=r"'blocks\.0\.mixer\.out_proj' \(Linear\)") as caught:
        train(config)
    assert "epoch 3, update 1" in str(caught.value)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).training["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_nonfinite_parameter_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    assert "loss overflowed" in explain_nonfinite(model, torch.ones(2, 4))
    assert "input images" in explain_nonfinite(model, torch.full((2, 4), torch.nan))
    model[1].weight.data[0, 0] = torch.nan
    assert "'1.weight'" in explain_nonfinite(model, torch.ones(2, 4))


def test_gradient_accumulation_equals_the_larger_batch(tmp_path):
    """The same images per update in two portions; only the order of summation differs."""
    options = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.name=sgd", "augment.crop_padding=0", "augment.erase=0"]
    train(small_config(tmp_path / "one", *options))
    train(small_config(tmp_path / "two", *options, "data.batch_size=16", "optim.grad_accum=2"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_bfloat16_trains_close_to_float32(tmp_path):
    full = train(small_config(tmp_path / "fp32"))
    AcceleratorState._reset_state(reset_partial_state=True)
    half = train(small_config(tmp_path / "bf16", "precision=bf16"))
    assert half.log[-1]["train_loss"] == pytest.approx(full.log[-1]["train_loss"], rel=0.05)
    assert weights(tmp_path / "bf16")["head.weight"].dtype == torch.float32


def test_weight_decay_leaves_out_what_the_model_names(tmp_path):
    from zoo.engine.build import build_optimizer

    config = small_config(tmp_path)
    model = zoo.create_model("vim_micro", num_classes=10, in_chans=1, **config.model.kwargs)
    optimizer, _ = build_optimizer(config, model, updates=4)
    without = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in without}
    assert set(model.no_weight_decay()) & dict(model.named_parameters()).keys() <= names
    assert any(name.endswith("A_log") for name in names)
    assert "head.weight" not in names


def test_fine_tuning_starts_from_a_checkpoint_with_another_classifier(tmp_path):
    train(small_config(tmp_path / "first", "optim.epochs=1", "optim.warmup_epochs=0"))
    start = f"model.checkpoint={tmp_path / 'first' / 'last.safetensors'}"
    options = ["optim.epochs=1", "optim.warmup_epochs=0", "optim.lr=0", "optim.min_lr=0", "model.num_classes=12"]
    train(small_config(tmp_path / "second", start, *options))
    old, new = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert new["head.weight"].shape[0] == 12
    assert all(torch.equal(old[name], new[name]) for name in old if not name.startswith("head."))


def test_fine_tuning_in_colour_starts_from_a_checkpoint_for_grey_images(tmp_path):
    """Features and the classifier of the same shape stay; only the first convolution is spread over the channels."""
    grey = zoo.create_model("vim_micro", num_classes=10, in_chans=1, img_size=8).eval()
    colour = zoo.create_model("vim_micro", num_classes=10, img_size=8).eval()
    load_features(colour, grey.state_dict())
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(colour(images.expand(-1, 3, -1, -1)), grey(images))
    with pytest.raises(ValueError, match=r"missing head\.weight"):
        load_features(colour, {name: tensor for name, tensor in grey.state_dict().items() if "head" not in name})


def test_evaluation_counts_exactly(tmp_path):
    """The scores of a model that always gives the same answer are known."""
    from zoo.data import Normalize, TensorLoader

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.arange(10.0).flip(0))  # prefers 0, then 1, 2, ...

        def forward(self, images):
            return self.logits.expand(len(images), 10)

    digits = load_digits("test")
    scores = evaluate(Constant(), TensorLoader(digits, 100), Normalize((0.5,), (0.5,)), 10)
    shares = digits.labels.bincount() / len(digits)
    assert scores.top1 == pytest.approx(100 * shares[0].item(), abs=1e-4)
    assert scores.top5 == pytest.approx(100 * shares[:5].sum().item(), abs=1e-4)
    with pytest.raises(ValueError, match="label 9, but the model knows 5 classes"):
        model = Constant()
        model.forward = lambda images: model.logits[:5].expand(len(images), 5)
        evaluate(model, TensorLoader(digits, 100), Normalize((0.5,), (0.5,)), 5)


def test_weights_are_replaced_in_one_step(tmp_path, monkeypatch):
    train(small_config(tmp_path, "optim.epochs=1", "optim.warmup_epochs=0"))
    model, card = load_trained(tmp_path)
    before = (tmp_path / "best.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_weights(tmp_path / "best.safetensors", model.state_dict(), card)
    assert (tmp_path / "best.safetensors").read_bytes() == before


def test_weights_of_others_need_a_model_name(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="does not say which model"):
        load_trained(tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_trained(tmp_path / "cut.safetensors")


@pytest.mark.slow  # processes that load everything; test_robustness.py has the same in forked ones
@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name == "nt", reason="needs POSIX signals")
def test_sigterm_leaves_a_run_that_continues(tmp_path):
    command = [sys.executable, "-m", "zoo.tools.train", "vim/micro_digits", *SMALL, f"output={tmp_path}"]
    process = subprocess.Popen(
        [*command, "optim.epochs=2000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "epoch-0002").exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    state = find_checkpoint(tmp_path).training
    assert state["epoch"] >= 2


@pytest.mark.slow  # likewise, see test_distributed.py
def test_two_processes_train_one_model(tmp_path):
    """Two processes with half the batch each: same number of updates, one log, complete evaluation."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = [*SMALL, "data.batch_size=16", "optim.epochs=2", f"output={tmp_path}"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # Accelerate's barrier would look for a second GPU
    subprocess.run([*launch, "zoo.tools.train", "vim/micro_digits", *options], check=True, timeout=300, env=hidden)
    log = read_log(tmp_path)
    assert [row["epoch"] for row in log] == [1, 2]
    model, card = load_trained(tmp_path / "last.safetensors")
    scores = validate(model, card, small_config(tmp_path).data)
    assert scores.top1 == pytest.approx(log[-1]["top1"], abs=1e-3)
    assert scores.loss == pytest.approx(log[-1]["val_loss"], rel=1e-4)


@pytest.mark.gpu
def test_recipe_trains_on_the_gpu(tmp_path):
    result = train(load_config("vim/micro_digits", [f"output={tmp_path}", "precision=bf16", "compile=true"]))
    assert result.log[-1]["top1"] > 95


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_training_equals_eager_training(tmp_path, precision):
    losses = []
    for captured in ("false", "true"):
        options = [
            f"output={tmp_path / captured}",
            f"precision={precision}",
            f"cuda_graph={captured}",
            "optim.epochs=2",
        ]
        losses.append(train(load_config("vim/micro_digits", options)).log[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if precision == "fp32" else 2e-2)


def test_graphs_need_a_gpu_and_exclude_compilation(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph=true needs one GPU, not 1 processes on cpu"):
        train(small_config(tmp_path, "cuda_graph=true", "cpu=true"))
    with pytest.raises(ValueError, match="compile and cuda_graph exclude each other"):
        small_config(tmp_path, "cuda_graph=true", "compile=true")
