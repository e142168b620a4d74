"""The benchmark of models, at sizes so small that only its own logic takes time."""

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from zoo.tools import benchmark
from zoo.tools.benchmarks import models
from zoo.tools.benchmarks.measure import Machine, capture, seconds_per_call
from zoo.tools.benchmarks.models import MODES, Plan, create_model, inference_step, training_step

OURS, PEER, ANY_SIZE = "vim_micro", "test_vit", "test_convnext"  # the last takes no img_size, and 16 px are too few
CPU = Machine("cpu", torch.float32, 0.001)
THROUGHPUT = {"samples_per_sec", "step_time", "batch_size", "img_size"}
ALL_COLUMNS = {
    *("model", "img_size", "param_count", "warmup_seconds", "infer_vs_baseline", "train_vs_baseline"),
    *(f"{mode}_{column}" for mode in ("infer", "train") for column in THROUGHPUT),
    *("latency_p50_ms", "latency_p95_ms"),
}


def run_tool(tmp_path, *options, names=(OURS, PEER), device="cpu"):
    """Exit status 0 is checked; returns the rows by size and model, and the whole file."""
    file = tmp_path / "results" / "models.json"
    common = ["models", "--device", device, "--seconds", "0.001", "--rounds", "2", "--json", str(file)]
    assert benchmark.main([*common, "--models", *names, *options]) == 0
    results = json.loads(file.read_text())
    return {(row["img_size"], row["model"]): row for row in results["records"]}, results


def failing_at(monkeypatch, when, error):
    """Makes the peer fail in forwards for which ``when(model, calls so far)`` holds; returns references to its models.

    Wrapped is what the tool creates, so that the failure comes where real ones do.
    """
    create, created = zoo.create_model, []

    class Failing(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.pretrained_cfg, self.num_classes = model, model.pretrained_cfg, model.num_classes
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if when(self, self.calls):
                raise error
            return self.model(x)

    def create_failing(name, **kwargs):
        model = create(name, **kwargs)
        if name != PEER:
            return model
        failing = Failing(model)
        created.append(weakref.ref(failing))
        return failing

    monkeypatch.setattr(zoo, "create_model", create_failing)
    return created


def test_rows_have_all_columns(tmp_path, capsys):
    rows, results = run_tool(tmp_path, "--img-size", "32", "--batch-size", "2", "--mode", "latency", "train", "infer")
    assert set(rows) == {(32, OURS), (32, PEER)}
    for row in rows.values():
        assert set(row) == ALL_COLUMNS
        assert all(math.isfinite(value) and value > 0 for value in row.values() if not isinstance(value, str))
        assert row["train_batch_size"] == row["infer_batch_size"] == 2
        assert row["infer_samples_per_sec"] == pytest.approx(2e3 / row["infer_step_time"])
        assert row["latency_p50_ms"] <= row["latency_p95_ms"]
    assert rows[32, OURS]["param_count"] == pytest.approx(0.7, abs=0.05)
    assert results["environment"]["command"].startswith("python -m zoo.tools.benchmark models --device cpu")
    assert {"timm", "torch", "dtype", "commit"} <= set(results["environment"])
    printed = capsys.readouterr().out
    assert f"32 px, batch size 2, ratios to {OURS}" in printed
    for heading in ("parameters", "inference", "training", "ratio", "latency p50", "p95", "warm-up"):
        assert heading in printed


def test_ratios_refer_to_the_baseline(tmp_path, capsys):
    rows, _ = run_tool(tmp_path, "--img-size", "32", "--batch-size", "1", "--mode", "infer", "--baseline", PEER)
    assert rows[32, PEER]["infer_vs_baseline"] == 1
    quotient = rows[32, OURS]["infer_samples_per_sec"] / rows[32, PEER]["infer_samples_per_sec"]
    assert rows[32, OURS]["infer_vs_baseline"] == quotient
    assert "train_vs_baseline" not in rows[32, OURS]
    assert f"ratios to {PEER}" in capsys.readouterr().out


def test_every_size_has_its_batch_size_and_one_that_cannot_run_is_a_row(tmp_path, capsys):
    picture = tmp_path / "pictures" / "models.png"
    sizes = ["--img-size", "16", "32", "--batch-size", "3", "2", "--mode", "infer", "--plot", str(picture)]
    rows, _ = run_tool(tmp_path, *sizes, names=(ANY_SIZE, OURS))
    assert [rows[size, OURS]["infer_batch_size"] for size in (16, 32)] == [3, 2]
    assert [rows[size, OURS]["infer_img_size"] for size in (16, 32)] == [16, 32]
    assert "Kernel size can't be greater" in rows[16, ANY_SIZE]["infer_failed"]
    assert set(rows[16, ANY_SIZE]) == {"model", "img_size", "infer_failed"}
    assert rows[32, ANY_SIZE]["infer_samples_per_sec"] > 0
    assert "infer_vs_baseline" not in rows[16, OURS]  # the baseline did not run
    assert rows[32, OURS]["infer_vs_baseline"] > 0
    assert f"{ANY_SIZE}, infer: RuntimeError: Calculated padded input" in capsys.readouterr().out
    with Image.open(picture) as image:
        assert min(image.size) > 300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_one_batch_size_serves_all_sizes(tmp_path):
    rows, _ = run_tool(tmp_path, "--img-size", "8", "16", "--batch-size", "2", "--mode", "infer", names=(OURS,))
    assert [row["infer_batch_size"] for row in rows.values()] == [2, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--img-size", "16", "32", "64", "--batch-size", "2", "2"], "--batch-size has 2 numbers for 3 of --img-size"),
        (["--img-size", "16", "--batch-size", "0"], "'0' is not a positive whole number"),
        (["--cuda-graph"], "--cuda-graph needs a GPU, but --device is cpu"),
        (["--baseline", "deit_tiny_patch16_224"], "--baseline deit_tiny_patch16_224 is not one of --models"),
        (["--models", "vim_mikro"], "there is no model 'vim_mikro'; did you mean vim_micro"),
        (["--mode", "latency", "--plot", "a.png"], "--plot needs a .png file, and mode infer or train"),
        (["--plot", "a.jpg"], "--plot needs a .png file"),
    ],
)
def test_options_that_do_not_fit(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["models", "--device", "cpu", "--models", OURS, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_picture_has_a_line_for_every_model_and_one_of_nothing_is_drawn_too(tmp_path):
    records = [
        dict(model=name, img_size=size, infer_batch_size=8, infer_samples_per_sec=factor / size, infer_peak_mib=size)
        for name, factor in (("a", 1e5), ("b", 1.01e5), ("c", 1e6))
        for size in (224, 512, 1248)
    ]
    models.plot([*records, dict(model="d", img_size=224, infer_failed="out of memory")], tmp_path / "all.png")
    models.plot([dict(model="d", img_size=224, infer_failed="out of memory")], tmp_path / "none.png")
    with Image.open(tmp_path / "all.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # the first three of matplotlib's ten
    assert (214, 39, 40) not in colours
    assert (tmp_path / "none.png").is_file()


def test_plot_without_matplotlib_is_refused_before_measuring(monkeypatch, capsys):
    def missing(module):
        raise ModuleNotFoundError(f"this feature needs {module}")

    monkeypatch.setattr(models, "require", missing)
    assert benchmark.main(["models", "--device", "cpu", "--models", OURS, "--plot", "a.png"]) == 1
    assert "error: this feature needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("calls_before", [0, 6])  # in the warm-up; in the first round
def test_model_out_of_memory_is_freed_and_others_go_on(tmp_path, monkeypatch, capsys, calls_before):
    error = torch.OutOfMemoryError("no room")
    created = failing_at(monkeypatch, lambda model, calls: model.training and calls > calls_before, error)
    rows, _ = run_tool(tmp_path, "--img-size", "16", "--batch-size", "2", names=(PEER, OURS))
    assert rows[16, PEER]["train_failed"] == "out of memory"
    assert "train_samples_per_sec" not in rows[16, PEER]
    assert rows[16, PEER]["infer_samples_per_sec"] > 0
    assert rows[16, OURS]["train_samples_per_sec"] > 0
    assert f"{PEER}, train: out of memory" in capsys.readouterr().out
    error.__traceback__ = None  # this test's own reference to the frames
    gc.collect()
    assert len(created) == 2
    assert not any(model() for model in created)


def test_models_take_turns(monkeypatch):
    order = []

    def step_of(name):
        return lambda: order.append(name)

    heat = models.Heat(8, 1, MODES["infer"], Plan(CPU, rounds=2))
    for name in "ab":
        heat.runners[name], heat.rows[name], heat.seconds[name] = models.Runner(step_of(name), 2), {}, []
    for _ in range(2):
        for name in "ab":
            heat.take_turn(name)
    assert "".join(order) == "aaabbb" * 2  # one call that is not timed, then two
    assert [len(seconds) for seconds in heat.seconds.values()] == [2, 2]
    assert heat.finish()["a"]["batch_size"] == 1


def test_summaries_by_hand():
    assert models.throughput([0.5, 9.0, 0.25], 32, 4) == dict(
        samples_per_sec=8, step_time=500, batch_size=4, img_size=32
    )
    summary = models.latency([second / 1e3 for second in range(101)], 32, 1)
    assert summary == pytest.approx(dict(p50_ms=50, p95_ms=95))


def test_created_for_the_size_where_that_is_an_argument():
    assert create_model(OURS, 24).patch_embed.img_size == (24, 24)
    assert create_model(PEER, 64).patch_embed.img_size == (64, 64)
    assert create_model(ANY_SIZE, 64).num_classes == 1000
    weight, again = (create_model(OURS, 8).head.weight for _ in range(2))
    assert torch.equal(weight, again)


def test_training_step_updates_float32_weights_under_autocast(device):
    machine = Machine(device.type, torch.bfloat16, 0.001)
    model = create_model(PEER, 32).to(device)
    step = training_step(model, torch.randn(2, 3, 32, 32, device=device), Plan(machine, 1))
    losses = [step().item() for _ in range(10)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    step = inference_step(model, torch.randn(2, 3, 32, 32, device=device), Plan(machine, 1))
    assert step().dtype == torch.bfloat16
    assert step().is_inference()


def test_seconds_are_a_mean():
    assert seconds_per_call(lambda: torch.ones(2).sum(), 3, CPU) > 0


@pytest.mark.slow
def test_compiled(tmp_path):
    rows, _ = run_tool(tmp_path, "--img-size", "16", "--batch-size", "2", "--compile")
    assert all({"infer_samples_per_sec", "train_samples_per_sec"} <= set(row) for row in rows.values())


def gpu_plans(dtype):
    machine = Machine("cuda", dtype, 0.001)
    return Plan(machine, 1), Plan(machine, 1, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["vim_nano", PEER])
def test_captured_training_is_the_same(name, dtype, rtol):
    losses = []
    for plan in gpu_plans(dtype):
        model = create_model(name, 32).cuda()
        channels = model.pretrained_cfg["input_size"][0]
        step = training_step(model, torch.randn(8, channels, 32, 32, device="cuda"), plan)
        if plan.cuda_graph:
            step = capture(step)  # its warm-up trains three steps
        else:
            for _ in range(3):
                step()
        losses.append(torch.stack([step().clone() for _ in range(20)]))
    torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=rtol)
    assert losses[1][-1] < losses[1][0] - 2 * rtol


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_inference_reads_its_images_in_every_replay(dtype):
    eager, captured = gpu_plans(dtype)
    pool = torch.cuda.graph_pool_handle()
    for name in ("vim_nano", PEER):  # two graphs in the same memory
        model = create_model(name, 32).cuda()
        images = torch.randn(4, model.pretrained_cfg["input_size"][0], 32, 32, device="cuda")
        replay = capture(inference_step(model, images, captured), pool)
        for _ in range(2):
            images.normal_()
            expected = inference_step(model, images, eager)()
            torch.testing.assert_close(replay(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--cuda-graph"], ["--cuda-graph", "--compile"]])
def test_on_gpu(tmp_path, options):
    sizes = ["--img-size", "32", "--batch-size", "8", "--mode", "infer", "train", "latency"]
    rows, _ = run_tool(tmp_path, *sizes, *options, names=(OURS, PEER, ANY_SIZE), device="cuda")
    for row in rows.values():
        assert set(row) == ALL_COLUMNS | {"infer_peak_mib", "train_peak_mib"}
        weights = row["param_count"] * 4e6 / 2**20
        assert weights < row["infer_peak_mib"] < row["train_peak_mib"]
        assert row["train_peak_mib"] > 3 * weights  # and both moments


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--cuda-graph"]])
def test_what_does_not_fit_leaves_the_next_size_its_memory(tmp_path, options):
    batch_sizes = ["--batch-size", str(10**8), "4"]  # of 1.2 MiB
    rows, _ = run_tool(tmp_path, "--img-size", "320", "32", *batch_sizes, *options, names=(PEER,), device="cuda")
    assert rows[320, PEER]["infer_failed"] == rows[320, PEER]["train_failed"] == "out of memory"
    assert rows[32, PEER]["train_samples_per_sec"] > 0
