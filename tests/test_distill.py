"""Distillation: what a student learns from its teacher, from earlier students and from its own average."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchmetrics  # noqa: F401 before a test hides matplotlib, which it imports
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import zoo
from zoo.config import DistillConfig, load_config
from zoo.data import Normalize, Preprocessing, load_digits
from zoo.data.fashion_mnist import DEBIAN_FOLDER
from zoo.engine import find_checkpoint, load_trained, read_log, train, validate
from zoo.engine.checkpoint import ModelCard
from zoo.engine.distill import Distillation, FrozenModel, Series, load_frozen, load_series, teacher_loss
from zoo.engine.task import Place, find_task

SMALL = [
    "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 1, d_state: 4}",
    *("data.train_samples=128", "data.val_samples=64", "data.batch_size=32", "cpu=true"),
    *("optim.epochs=2", "optim.warmup_epochs=1", "ema_decay=null"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here chooses its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """A run without matplotlib draws nothing and takes half the time."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def config_of(output, *overrides):
    return load_config("vim/micro_digits", [*SMALL, f"output={output}", *overrides])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run that has learned something, with a normalisation of its own."""
    output = tmp_path_factory.mktemp("teacher") / "run"
    options = ["data.train_samples=null", "optim.epochs=3", "optim.lr=1e-2", "data.mean=[0.1]", "data.std=[0.9]"]
    result = train(config_of(output, *options))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert result.best["top1"] > 50
    return output


def card(mean=(0.5,), std=(0.5,), size=(8, 8), names=tuple("0123456789")) -> ModelCard:
    return ModelCard("vim_micro", {}, names, Preprocessing(size, len(mean), mean, std), data="digits")


def test_losses_are_those_of_the_papers():
    logits, target = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = (target / 3).softmax(-1), (logits / 3).softmax(-1)
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(teacher_loss(logits, target, "soft", temperature=3.0), 9 * divergence)
    hard = -logits.log_softmax(-1)[torch.arange(5), target.argmax(-1)].mean()
    torch.testing.assert_close(teacher_loss(logits, target, "hard"), hard)
    torch.testing.assert_close(teacher_loss(logits, target, "logits"), (logits - target).square().mean())
    assert teacher_loss(target, target).abs() < 1e-6

    soft = teacher_loss(logits, target)  # its gradient is that of MESA's cross-entropy with the average's probabilities
    cross_entropy = F.cross_entropy(logits, target.softmax(-1))
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (soft, cross_entropy)]
    torch.testing.assert_close(*gradients)


def test_teacher_sees_the_same_images_in_its_own_normalisation(teacher):
    images = load_digits("test").images[:16]
    frozen = load_frozen(teacher, card(mean=(0.3,), std=(0.4,)))
    model, own = load_trained(teacher)
    assert own.preprocessing.mean == (0.1,)
    with torch.no_grad():
        expected = model(Normalize(own.preprocessing.mean, own.preprocessing.std)(images))
    torch.testing.assert_close(frozen(Normalize((0.3,), (0.4,))(images)), expected, rtol=1e-4, atol=1e-4)


def test_grey_images_become_those_of_a_colour_teacher():
    model = zoo.create_model("vim_micro", in_chans=3, embed_dim=16, depth=1, img_size=8, patch_size=4).eval()
    own, given = Preprocessing((8, 8), 3, (0.4, 0.5, 0.6), (0.2,) * 3), Preprocessing((8, 8), 1, (0.1,), (0.9,))
    grey = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    frozen = FrozenModel(model, own, given)
    expected = model(Normalize(own.mean, own.std)(grey.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(frozen(Normalize(given.mean, given.std)(grey)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="grey images cannot see images of 3 channels"):
        FrozenModel(model, given, own)


def test_teachers_that_do_not_fit_are_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"knows other classes \(0, 1, 2, 3, 4, ...\) than the data \(a, b"):
        load_frozen(teacher, card(names=tuple("abcdefghij")))
    with pytest.raises(ValueError, match=r"vim_nano\.fashion_mnist has 10 classes and the data 3"):
        load_frozen("vim_nano.fashion_mnist", card(size=(28, 28), names=tuple("abc")))
    with pytest.raises(ValueError, match="there is no model 'vim_nanno'; did you mean"):
        load_frozen("vim_nanno", card())
    with pytest.raises(FileNotFoundError):
        load_frozen(tmp_path / "nowhere.safetensors", card())
    with pytest.raises(ValueError, match=r"distill\.teacher=ema knows nothing of the students"):
        config_of(tmp_path, "distill.teacher=ema", "ema_decay=0.9", "distill.previous=[a]")


def test_teacher_is_neither_trained_nor_saved(teacher, tmp_path):
    task = find_task("classification")(config_of(tmp_path / "x", f"distill.teacher={teacher}"), Place(CPU))
    task.begin(0, None)
    before = {name: tensor.clone() for name, tensor in task.distillation.teacher.state_dict().items()}
    task.distillation.teacher.train()
    assert not any(module.training for module in task.distillation.teacher.modules())
    batch = next(iter(task.train_loader))
    task.loss(task.model, batch).backward()
    assert all(parameter.grad is None for parameter in task.distillation.teacher.parameters())
    assert all(parameter.grad is not None for parameter in task.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in task.distillation.teacher.state_dict().items())

    train(config_of(tmp_path / "run", f"distill.teacher={teacher}"))
    names = set(dict(task.model.named_parameters()))
    state = find_checkpoint(tmp_path / "run")
    assert set(state.weights) == set(load_file(tmp_path / "run" / "last.safetensors")) == set(task.model.state_dict())
    assert len(state.training["optimizer"]["state"]) == len(names)


def test_weights_of_the_two_losses(teacher):
    logits, inputs, label_loss = torch.randn(4, 10), torch.randn(4, 1, 8, 8), torch.tensor(2.0)

    def loss(epoch=0, **settings):
        distillation = Distillation(DistillConfig(teacher=str(teacher), **settings), card(), CPU)
        distillation.begin(epoch, None)
        return distillation.loss(label_loss, logits, inputs)

    taught = loss(weight=1.0)
    torch.testing.assert_close(loss(weight=0.3), 0.7 * label_loss + 0.3 * taught)
    torch.testing.assert_close(loss(weight=2.0, label_weight=1.0), label_loss + 2 * taught)
    assert loss(weight=0.3, start_epoch=2, epoch=1) is label_loss
    torch.testing.assert_close(loss(weight=0.3, start_epoch=2, epoch=2), loss(weight=0.3))
    assert Distillation(DistillConfig(), card(), CPU).loss(label_loss, logits, inputs) is label_loss


def test_student_follows_its_teacher(teacher, tmp_path):
    """After the same updates, one that listens to the teacher alone agrees with it more than one that does not."""
    images = Normalize((0.1,), (0.9,))(load_digits("test").images)
    model, _ = load_trained(teacher)
    agreement = []
    for name in ("null", teacher):
        options = ["data.train_samples=null", "optim.lr=1e-2", "data.mean=[0.1]", "data.std=[0.9]", "seed=3"]
        output = tmp_path / str(len(agreement))
        train(config_of(output, *options, f"distill.teacher={name}", "distill.weight=1.0"))
        AcceleratorState._reset_state(reset_partial_state=True)
        student, _ = load_trained(output / "last.safetensors")
        with torch.no_grad():
            agreement.append(teacher_loss(student(images), model(images)).item())
    assert agreement[1] < 0.7 * agreement[0]


def test_distilled_run_continues_bit_for_bit(teacher, tmp_path, monkeypatch):
    """Killed in the second epoch and continued, with a teacher and an earlier student."""
    from zoo.data import BatchAugment

    options = [f"distill.teacher={teacher}", f"distill.previous=[{teacher}]", "augment.mixup=0.2"]
    train(config_of(tmp_path / "whole", *options))
    AcceleratorState._reset_state(reset_partial_state=True)
    forward, calls = BatchAugment.forward, []

    def stop(self, images):
        calls.append(None)
        if len(calls) > 6:  # four batches per epoch
            raise KeyboardInterrupt
        return forward(self, images)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BatchAugment, "forward", stop)
        train(config_of(tmp_path / "killed", *options))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(config_of(tmp_path / "killed", *options, "resume=auto")).trained == 1
    one, two = (load_file(tmp_path / run / "last.safetensors") for run in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_students_of_a_series_are_summed(teacher, tmp_path):
    """The second student learns what the first one leaves; the log scores both together, as load_series does."""
    first = [f"distill.teacher={teacher}", "data.train_samples=640", "optim.lr=1e-2"]
    train(config_of(tmp_path / "one", *first))
    AcceleratorState._reset_state(reset_partial_state=True)
    second = train(config_of(tmp_path / "two", *first, f"distill.previous=[{tmp_path / 'one'}]", "seed=1"))
    series, series_card = load_series([tmp_path / "one", tmp_path / "two" / "last.safetensors"])
    scores = validate(series, series_card, config_of(tmp_path).data)
    assert scores.top1 == pytest.approx(second.log[-1]["top1"], abs=1e-3)
    assert scores.loss == pytest.approx(second.log[-1]["val_loss"], rel=1e-4)
    alone = validate(*load_series([tmp_path / "one"]), config_of(tmp_path).data)
    assert scores.loss < alone.loss
    assert not any(parameter.requires_grad for parameter in series.parameters())
    with pytest.raises(ValueError, match="at least one run"):
        load_series([])

    images = torch.randn(3, 1, 8, 8)
    members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)) for _ in range(3)]
    torch.testing.assert_close(Series(members)(images), sum(member(images) for member in members))


def test_moving_average_teaches_from_its_epoch_on(tmp_path):
    """MESA: cross-entropy alone before, and then the divergence from the average too."""
    options = ["distill.teacher=ema", "distill.weight=1.5", "distill.label_weight=1.0", "distill.start_epoch=1"]
    task = find_task("classification")(config_of(tmp_path / "x", *options, "ema_decay=0.9"), Place(CPU))
    average = zoo.create_model("vim_micro", num_classes=10, in_chans=1, **task.config.model.kwargs).eval()
    task.model.eval()  # the same logits at every call
    batch = next(iter(task.train_loader))
    losses = []
    for epoch in (0, 1):
        task.place.generator.manual_seed(0)  # the same augmentation
        task.begin(epoch, average)
        losses.append(task.loss(task.model, batch))
    with torch.no_grad():
        taught = teacher_loss(task.model(task.inputs), average(task.inputs))
    torch.testing.assert_close(losses[1] - losses[0], 1.5 * taught)
    losses[1].backward()
    assert all(parameter.grad is None for parameter in average.parameters())

    train(config_of(tmp_path / "run", *options, "ema_decay=0.9"))
    log = read_log(tmp_path / "run")
    assert len(log) == 2 and all(row["train_loss"] > 0 for row in log)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_packaged_model_teaches(tmp_path):
    """The recipe on Fashion-MNIST, whose teacher comes with this package, for two updates of a smaller student."""
    options = ["model.kwargs={patch_size: 7, embed_dim: 16, depth: 1}", "data.train_samples=16", "data.val_samples=16"]
    options += ["data.batch_size=8", "optim.epochs=3", "optim.epoch_updates=1", "optim.warmup_epochs=1"]
    options += ["cpu=true", "precision=fp32", f"output={tmp_path}"]
    config = load_config("vim/micro_distil_fashion_mnist", options)
    task = find_task("classification")(config, Place(CPU))
    guesses = task.distillation.teacher(task.augment.normalize(task.val_data.images)).argmax(-1)
    assert (guesses == task.val_data.labels).float().mean() > 0.8
    assert len(train(config).log) == 3


@pytest.mark.slow
def test_two_processes_are_taught_alike(teacher, tmp_path):
    """A teacher, an earlier student and mixed labels under distributed data parallel."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    options = [f"distill.teacher={teacher}", f"distill.previous=[{teacher}]", "data.batch_size=16"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # Accelerate's barrier would look for a second GPU
    command = [*launch, "zoo.tools.train", "vim/micro_digits", *SMALL, *options, f"output={tmp_path / 'two'}"]
    subprocess.run(command, check=True, timeout=300, env=hidden)
    assert [row["epoch"] for row in read_log(tmp_path / "two")] == [1, 2]
    series, series_card = load_series([teacher, tmp_path / "two" / "last.safetensors"])
    scores = validate(series, series_card, config_of(tmp_path).data)
    assert scores.loss == pytest.approx(read_log(tmp_path / "two")[-1]["val_loss"], rel=1e-4)
