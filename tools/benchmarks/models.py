"""The subject ``models``: throughput, memory and latency of whole models, ours and timm's, side by side.

All models of one image size and mode are warmed up first and then measured in rounds, one after another, so that a
clock that drifts is the same for all; a number is the median over the rounds. Images are random and already on the
device. Weights are random and float32 throughout: 16-bit runs are under autocast, as in mixed-precision training, and
nothing is cast beforehand, which costs inference the reading and casting of float32 weights in every call.

Modes, with timm's names where timm has them (one row for every model and image size):

* ``infer``: forward in evaluation and inference mode. ``infer_samples_per_sec``, ``infer_step_time`` (ms),
  ``infer_batch_size``, ``infer_img_size``, and on a GPU ``infer_peak_mib``.
* ``train``: forward, cross entropy, backward, AdamW; the same columns with ``train_``. No loss scaling in float16.
* ``latency``: forward of a single image, from the call to the end of its work: ``latency_p50_ms``, ``latency_p95_ms``.

``param_count`` is in millions. ``warmup_seconds`` is what the first steps took in all modes together, with compilation
and capture, and is in no other number. Peak memory is all that a model needs in a step: weights, optimizer, images,
activations; that of a captured step is taken before it is captured. ``infer_vs_baseline`` and ``train_vs_baseline`` are
throughputs divided by the baseline's. A mode that does not run has ``<mode>_failed`` instead of its numbers.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import zoo
from zoo.engine.build import recompute
from zoo.optional import require
from zoo.tools.arguments import positive
from zoo.tools.benchmarks.measure import (
    Machine,
    allocate_workspace,
    attempt,
    capture,
    free_memory,
    peak_mib,
    seconds_per_call,
)
from zoo.tools.tables import aligned

__all__ = ["HELP", "MODES", "Mode", "Plan", "add_arguments", "create_model", "inference_step", "run", "training_step"]

HELP = "whole models beside timm's: throughput, peak memory, latency"
WARM_UP = 3  # steps; the first compiles and tunes
FEWEST_LATENCIES = 20  # in all rounds together: fewer have no 95th percentile

Row = dict[str, Any]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Plan:
    """How everything of one run is measured.

    Attributes:
        machine: Where; ``seconds`` is the work of one model in one round.
        rounds: How often every model has its turn.
        compile: Whether models are compiled, without graph breaks.
        cuda_graph: Whether steps are captured and replayed.
        recompute: What of the models is computed again in the backward: ``block``, ``scan`` or None.
    """

    machine: Machine
    rounds: int
    compile: bool = False
    cuda_graph: bool = False
    recompute: str | None = None

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward.

        A graph casts weights itself: a cast that is kept from before its capture would never see their updates.
        """
        if self.machine.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.machine.device, self.machine.dtype, cache_enabled=not self.cuda_graph)


def inference_step(model: nn.Module, images: Tensor, plan: Plan) -> Step:
    """A function that returns the model's logits in evaluation mode."""
    model.eval()

    def step() -> Tensor:
        with torch.inference_mode(), plan.autocast():
            return model(images)

    return step


def training_step(model: nn.Module, images: Tensor, plan: Plan) -> Step:
    """A function that updates the model once, on random labels, leaves no gradients and returns the loss."""
    model.train()
    labels = torch.randint(model.num_classes, (len(images),), device=images.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, fused=plan.machine.device == "cuda", capturable=plan.cuda_graph
    )

    def step() -> Tensor:
        with plan.autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def throughput(seconds: Sequence[float], img_size: int, batch_size: int) -> Row:
    """Columns, without the mode's prefix, of the mean times of a step in every round."""
    step = statistics.median(seconds)
    return dict(samples_per_sec=batch_size / step, step_time=step * 1e3, batch_size=batch_size, img_size=img_size)


def latency(seconds: Sequence[float], img_size: int, batch_size: int) -> Row:
    """Columns, without the mode's prefix, of the times of all calls."""
    p50, p95 = torch.quantile(torch.tensor(seconds, dtype=torch.float64) * 1e3, torch.tensor([0.5, 0.95]).double())
    return dict(p50_ms=p50.item(), p95_ms=p95.item())


@dataclass(frozen=True)
class Mode:
    """What is measured of a model.

    Attributes:
        step: Makes the function that is timed, of a model, images and the plan.
        summarize: Makes columns of the seconds of all rounds.
        each_call: Whether every call is timed by itself, with one image and without a look at the memory, instead of
            all calls of a round at once.
    """

    step: Callable[[nn.Module, Tensor, Plan], Step]
    summarize: Callable[[Sequence[float], int, int], Row]
    each_call: bool = False


MODES = {
    "infer": Mode(inference_step, throughput),
    "train": Mode(training_step, throughput),
    "latency": Mode(inference_step, latency, each_call=True),
}


def create_model(name: str, img_size: int) -> nn.Module:
    """A model of this zoo or of timm with random weights, made for an image size where its constructor takes one.

    Our models, and timm's convolutional ones, take images of any size anyway. One that is made for the size has a
    position embedding of that size, instead of one that is resampled in every call.
    """
    torch.manual_seed(0)
    try:
        return zoo.create_model(name, img_size=img_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return zoo.create_model(name)


@dataclass(frozen=True)
class Runner:
    """A model that is ready to be measured: its step, and how often that is called in a round."""

    step: Step
    calls: int

    def time_round(self, mode: Mode, machine: Machine) -> list[float]:
        """Seconds of a step in this round, or of every call if the mode times each."""
        self.step()  # not timed: caches, and the allocator's blocks, are still those of the model before
        if mode.each_call:
            return [seconds_per_call(self.step, 1, machine) for _ in range(self.calls)]
        return [seconds_per_call(self.step, self.calls, machine)]


def prepare(
    name: str, img_size: int, batch_size: int, mode: Mode, plan: Plan, pool: tuple[int, int] | None
) -> tuple[Runner, Row]:
    """Creates a model and brings it to speed.

    Args:
        name: The model.
        img_size: Side of the images in pixels.
        batch_size: Images in a step.
        mode: What is measured.
        plan: How it is measured.
        pool: Memory that captured graphs share.

    Returns:
        What is timed, and ``param_count``, ``warmup_seconds`` and, on a GPU, ``peak_mib``.
    """
    machine = plan.machine
    on_gpu = machine.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = create_model(name, img_size).to(machine.device)
    channels = resolve_model_data_config(model)["input_size"][0]
    images = torch.randn(batch_size, channels, img_size, img_size, device=machine.device)
    if plan.compile:
        model.compile(fullgraph=True, dynamic=False)  # sizes of another model must not make this one's dynamic
    if plan.recompute:
        recompute(model, plan.recompute)
    step = mode.step(model, images, plan)
    row: Row = dict(param_count=sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    started = time.perf_counter()
    for _ in range(WARM_UP):
        step()
    if on_gpu and not mode.each_call:
        row["peak_mib"] = peak_mib(step) + (torch.cuda.memory_allocated() - before) / 2**20
    if plan.cuda_graph:
        step = capture(step, pool)
    seconds = seconds_per_call(step, 1, machine)
    row["warmup_seconds"] = time.perf_counter() - started
    fewest = math.ceil(FEWEST_LATENCIES / plan.rounds) if mode.each_call else 1
    return Runner(step, max(fewest, round(machine.seconds / seconds))), row


@dataclass
class Heat:
    """Models that are measured together at one image size in one mode; what :func:`prepare` takes, and further:

    Attributes:
        runners: Those that are still in it, by name.
        rows: Their columns, or why they are out.
        seconds: What their rounds took.
    """

    img_size: int
    batch_size: int
    mode: Mode
    plan: Plan
    pool: tuple[int, int] | None = None
    runners: dict[str, Runner] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def warm_up(self, name: str) -> None:
        """Lets a model in if it runs."""
        prepared, failure = attempt(
            partial(prepare, name, self.img_size, self.batch_size, self.mode, self.plan, self.pool)
        )
        if failure:
            self.drop(name, failure)
        else:
            self.runners[name], self.rows[name] = prepared
            self.seconds[name] = []

    def take_turn(self, name: str) -> None:
        """Measures a model for one round, if it is still in."""
        if name in self.runners:
            seconds, failure = attempt(partial(self.runners[name].time_round, self.mode, self.plan.machine))
            if failure:
                self.drop(name, failure)
            else:
                self.seconds[name] += seconds

    def drop(self, name: str, failure: str) -> None:
        """Notes why a model is out, and leaves its memory to the others."""
        self.runners.pop(name, None)
        self.rows[name] = dict(failed=failure)
        free_memory()

    def finish(self) -> dict[str, Row]:
        """Summarizes what was measured and frees all models."""
        for name in self.runners:
            self.rows[name] |= self.mode.summarize(self.seconds[name], self.img_size, self.batch_size)
        self.runners.clear()
        if self.plan.compile:
            torch.compiler.reset()  # forgets what was compiled for models that are gone
        free_memory()
        return self.rows


def measure_mode(
    names: Sequence[str], img_size: int, batch_size: int, mode_name: str, plan: Plan, bar: Any
) -> dict[str, Row]:
    """Columns of all models at one image size in one mode, by name: all are warmed up, then they take turns."""
    mode = MODES[mode_name]
    pool = torch.cuda.graph_pool_handle() if plan.cuda_graph else None
    heat = Heat(img_size, 1 if mode.each_call else batch_size, mode, plan, pool)
    for name in names:
        bar.set_description(f"{img_size} px, {mode_name}, warm-up: {name}")
        heat.warm_up(name)
        bar.update()
    for turn in range(plan.rounds):
        for name in names:
            bar.set_description(f"{img_size} px, {mode_name}, round {turn + 1}: {name}")
            heat.take_turn(name)
            bar.update()
    return {name: _prefixed(row, mode_name) for name, row in heat.finish().items()}


def _prefixed(row: Row, mode_name: str) -> Row:
    """Columns with the mode in front, but for those that are the same in, or added up over, all modes."""
    return {name if name in ("param_count", "warmup_seconds") else f"{mode_name}_{name}": row[name] for name in row}


def measure_size(
    names: Sequence[str], img_size: int, batch_size: int, mode_names: Sequence[str], plan: Plan, bar: Any
) -> dict[str, Row]:
    """Rows of all models at one image size, by name; the time to warm up is added up over the modes."""
    rows: dict[str, Row] = {name: dict(model=name, img_size=img_size) for name in names}
    for mode_name in mode_names:
        for name, columns in measure_mode(names, img_size, batch_size, mode_name, plan, bar).items():
            if "warmup_seconds" in columns:
                columns["warmup_seconds"] += rows[name].get("warmup_seconds", 0.0)
            rows[name] |= columns
    return rows


def add_ratios(rows: dict[str, Row], baseline: str) -> None:
    """Adds ``infer_vs_baseline`` and ``train_vs_baseline`` where both models ran."""
    for mode_name in ("infer", "train"):
        reference = rows[baseline].get(f"{mode_name}_samples_per_sec")
        for row in rows.values():
            if reference and f"{mode_name}_samples_per_sec" in row:
                row[f"{mode_name}_vs_baseline"] = row[f"{mode_name}_samples_per_sec"] / reference


COLUMNS = {  # key of a row: heading and format
    "param_count": ("parameters", "{:.2f} M"),
    "infer_samples_per_sec": ("inference", "{:.1f} img/s"),
    "infer_vs_baseline": ("ratio", "{:.2f}x"),
    "infer_peak_mib": ("peak memory", "{:.0f} MiB"),
    "train_samples_per_sec": ("training", "{:.1f} img/s"),
    "train_vs_baseline": ("ratio", "{:.2f}x"),
    "train_peak_mib": ("peak memory", "{:.0f} MiB"),
    "latency_p50_ms": ("latency p50", "{:.2f} ms"),
    "latency_p95_ms": ("p95", "{:.2f} ms"),
    "warmup_seconds": ("warm-up", "{:.1f} s"),
}


def table(title: str, rows: dict[str, Row]) -> str:
    """The numbers of one image size as text: a line for every model, then what did not run."""
    columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
    lines = [[""] + [COLUMNS[key][0] for key in columns]]
    for name, row in rows.items():
        lines.append([name] + [COLUMNS[key][1].format(row[key]) if key in row else "" for key in columns])
    text = [f"  {line}" for line in aligned(lines)]
    failures = [f"  {name}, {failure}" for name, row in rows.items() for failure in _failures(row)]
    return "\n".join(["", title, *text, *failures])


def _failures(row: Row) -> list[str]:
    """One line for every reason, with the modes that it stopped."""
    reasons = {mode_name: row[f"{mode_name}_failed"] for mode_name in MODES if f"{mode_name}_failed" in row}
    return [
        f"{' and '.join(mode_name for mode_name in reasons if reasons[mode_name] == reason)}: {reason.splitlines()[0]}"
        for reason in dict.fromkeys(reasons.values())
    ]


def plot(records: Sequence[Row], path: Path) -> None:
    """Draws throughput, and where it is known peak memory, against the image size; a line for every model.

    Args:
        records: Rows of all models and sizes.
        path: The PNG file; its folder is made.
    """
    wanted = [f"{mode}_{column}" for column in ("samples_per_sec", "peak_mib") for mode in ("infer", "train")]
    columns = [column for column in wanted if any(column in row for row in records)]
    side = 1 if len(columns) == 1 else 2
    down = max(1, math.ceil(len(columns) / side))  # nothing but failures is an empty picture
    figure = require("matplotlib.figure").Figure(figsize=(6.5 * side, 4 * down), layout="constrained", dpi=130)
    for axes, column in zip(figure.subplots(down, side, squeeze=False).flat, columns, strict=False):
        _draw_panel(axes, records, column)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


PANEL_TITLES = {
    "infer_samples_per_sec": "inference, images per second",
    "train_samples_per_sec": "training, images per second",
    "infer_peak_mib": "inference, peak memory (MiB)",
    "train_peak_mib": "training, peak memory (MiB)",
}


def _draw_panel(axes: Any, records: Sequence[Row], column: str) -> None:
    """One column against the image size, both logarithmic, with the models' names at their lines' ends."""
    colours = require("matplotlib").colormaps["tab10"].colors
    ends = []
    for index, name in enumerate(dict.fromkeys(row["model"] for row in records)):
        points = sorted((row["img_size"], row[column]) for row in records if row["model"] == name and column in row)
        if points:
            colour = colours[index % len(colours)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour)
            ends.append((*points[-1], name, colour))
    batch_size = f"{column.partition('_')[0]}_batch_size"
    batches = {row["img_size"]: row[batch_size] for row in records if batch_size in row}
    label = "image side (pixels), and images in a batch"
    axes.set(xscale="log", yscale="log", xlabel=label, title=PANEL_TITLES[column])
    axes.set_xticks(list(batches), [f"{size}\n{batch}" for size, batch in batches.items()])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Sequence[tuple[int, float, str, Any]]) -> None:
    """Writes names beside the panel at the heights of the ends (x, y, name, colour), apart where they would overlap."""
    bottom, top = map(math.log, axes.get_ylim())
    free = 0.0  # the lowest height, as a part of the axis, that is still free
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        height = max((math.log(y) - bottom) / (top - bottom), free)
        leader = dict(arrowstyle="-", color=colour, alpha=0.4, linewidth=0.7)
        place = dict(xytext=(1.02, height), textcoords="axes fraction", va="center")
        axes.annotate(name, (x, y), **place, fontsize=8, color=colour, arrowprops=leader)
        free = height + 0.055


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", required=True, type=_model_name, metavar="NAME", help="ours or timm's")
    parser.add_argument("--img-size", nargs="+", type=positive, default=[224], metavar="N", help="default 224")
    parser.add_argument(
        "--batch-size", nargs="+", type=positive, default=[64], metavar="N", help="one, or one a size; default 64"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["infer", "train"], help="default infer train")
    parser.add_argument("--compile", action="store_true", help="torch.compile, without graph breaks")
    parser.add_argument("--cuda-graph", action="store_true", help="capture steps once and replay them (GPUs only)")
    parser.add_argument("--recompute", choices=("block", "scan"), help="set_grad_checkpointing of this scope")
    parser.add_argument("--baseline", metavar="NAME", help="model that ratios refer to; default the first")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of every model; default 5")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the numbers against the size, a .png file")


def _model_name(name: str) -> str:
    """A name that can be created; the error of one that cannot lists the nearest ones."""
    if not timm.is_model(name):
        try:
            zoo.create_model(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return name


def run(machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Measures all models at all sizes, printing a table for each size, and draws the picture if asked.

    Returns:
        ``records``, a row for every size and model.

    Raises:
        argparse.ArgumentError: If options do not fit each other; the message says which.
        ModuleNotFoundError: If a picture is wanted and matplotlib is not installed.
    """
    check(machine, options)
    names = list(dict.fromkeys(options.models))
    modes = [mode_name for mode_name in MODES if mode_name in options.mode]
    baseline = options.baseline or names[0]
    plan = Plan(machine, options.rounds, options.compile, options.cuda_graph, options.recompute)
    if machine.device == "cuda":
        torch.backends.cudnn.benchmark = True  # as timm's benchmark does
        allocate_workspace(machine)
    batch_sizes = options.batch_size * (len(options.img_size) if len(options.batch_size) == 1 else 1)
    records = []
    total = len(batch_sizes) * len(modes) * len(names) * (1 + plan.rounds)
    with require("tqdm").tqdm(total=total, unit="turn", disable=None, dynamic_ncols=True) as bar:
        for img_size, batch_size in zip(options.img_size, batch_sizes, strict=True):
            rows = measure_size(names, img_size, batch_size, modes, plan, bar)
            add_ratios(rows, baseline)
            bar.write(table(f"{img_size} px, batch size {batch_size}, ratios to {baseline}", rows))
            records += rows.values()
    if options.plot:
        plot(records, options.plot)
        print(f"\ndrawn in {options.plot}")
    return dict(records=records)


def check(machine: Machine, options: argparse.Namespace) -> None:
    """Refuses options that do not fit each other, before anything is measured."""
    sizes, batch_sizes = len(options.img_size), len(options.batch_size)
    if batch_sizes not in (1, sizes):
        raise argparse.ArgumentError(
            None, f"--batch-size has {batch_sizes} numbers for {sizes} of --img-size; give one, or one for each size"
        )
    if options.cuda_graph and machine.device != "cuda":
        raise argparse.ArgumentError(None, f"--cuda-graph needs a GPU, but --device is {machine.device}")
    if options.baseline and options.baseline not in options.models:
        raise argparse.ArgumentError(None, f"--baseline {options.baseline} is not one of --models")
    if options.plot:
        if options.plot.suffix != ".png" or set(options.mode) == {"latency"}:
            raise argparse.ArgumentError(None, "--plot needs a .png file, and mode infer or train")
        require("matplotlib.figure")
