"""Time and memory of single calls.

On a GPU a time is that of the device alone with a cold cache: the device is kept busy until the host has queued the
calls, each is timed by events, and the second-level cache is overwritten before it. What the host needs to issue a
call is measured by itself (:func:`host_milliseconds`). On a CPU a time is that of a warm call.
"""

import gc
import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

__all__ = [
    "Machine",
    "allocate_workspace",
    "attempt",
    "capture",
    "copy_bandwidth",
    "exponentials_ms",
    "free_memory",
    "host_milliseconds",
    "measure",
    "milliseconds",
    "peak_mib",
    "peer",
    "plan_calls",
    "seconds_per_call",
]

PAUSE_CYCLES = 150_000_000  # some 80 ms of a busy device, in which the host queues calls
QUEUE = 900  # launches; a host that is 1024 launches ahead has to wait for the device
LAUNCH_SECONDS = 3e-6  # no launch takes the host less, so that issuing a call bounds how many launches it has
FEWEST_CALLS, MOST_CALLS = 5, 20


@dataclass(frozen=True)
class Machine:
    """Where and how long is measured.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Dtype of the activations; parameters are float32.
        seconds: Work in one measurement, beyond warm-up.
    """

    device: str
    dtype: torch.dtype
    seconds: float


def measure(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    machine: Machine,
    backward_alone: bool,
) -> dict[str, float]:
    """Times and memory of a function of tensors.

    Args:
        function: Called with the inputs by name; returns a tensor or several.
        inputs: Its arguments; gradients are computed of all that are floating-point.
        machine: Where to measure.
        backward_alone: Whether ``backward_ms`` is the backward by itself or a forward and a backward.

    Returns:
        ``forward_ms`` (without gradients), ``backward_ms`` and, on a GPU, ``peak_mib``.
    """
    with torch.no_grad():
        forward = milliseconds(lambda: function(**inputs), machine)
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    targets = [x for x in leaves.values() if x.requires_grad]
    cotangents = [torch.randn_like(out) for out in _tensors(function(**leaves))]

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = _tensors(function(**leaves))
        return *outputs, *torch.autograd.grad(outputs, targets, cotangents)

    if backward_alone:
        backward = _backward_milliseconds(_tensors(function(**leaves)), targets, cotangents, machine)
    else:
        backward = milliseconds(forward_backward, machine)
    numbers = dict(forward_ms=forward, backward_ms=backward)
    if machine.device == "cuda":
        numbers["peak_mib"] = peak_mib(forward_backward)
    return numbers


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _backward_milliseconds(
    outputs: tuple[Tensor, ...], targets: list[Tensor], cotangents: list[Tensor], machine: Machine
) -> float:
    return milliseconds(lambda: torch.autograd.grad(outputs, targets, cotangents, retain_graph=True), machine)


def milliseconds(function: Callable[[], object], machine: Machine) -> float:
    """Median time of one call after a warm-up."""
    if machine.device == "cuda":
        return _device_milliseconds(function, machine.seconds)
    function()
    timer = Timer("function()", globals=dict(function=function), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=machine.seconds).median * 1e3


def _device_milliseconds(function: Callable[[], object], seconds: float) -> float:
    for _ in range(3):  # compiles, tunes, and fills the allocator's cache
        function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    issued = time.perf_counter()
    torch.cuda.synchronize()
    calls, at_once = plan_calls(time.perf_counter() - started, issued - started, seconds)

    overwrite = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    while len(times) < calls:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(at_once)]
        torch.cuda._sleep(PAUSE_CYCLES)
        for start, end in events:
            overwrite.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) for start, end in events]
    return statistics.median(times)


def plan_calls(call: float, issue: float, seconds: float) -> tuple[int, int]:
    """How many calls are measured, and how many of them are queued at once.

    Args:
        call: Seconds of one call from its issue to its end on the device.
        issue: Seconds of the host in it.
        seconds: Work to do in all.
    """
    calls = min(max(round(seconds / call), FEWEST_CALLS), MOST_CALLS)
    launches = issue / LAUNCH_SECONDS + 3  # and what overwrites the cache, and two events
    return calls, max(1, min(calls, int(QUEUE / launches)))


def host_milliseconds(function: Callable[[], object], machine: Machine) -> float:
    """Median wall-clock time in which the host issues a call; on a CPU that is the call itself."""
    times = []
    for _ in range(MOST_CALLS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
        if machine.device == "cuda":
            torch.cuda.synchronize()  # outside the time: no call finds a full queue
    return statistics.median(times) * 1e3


def seconds_per_call(function: Callable[[], object], calls: int, machine: Machine) -> float:
    """Mean wall-clock seconds of calls that are issued one after another; on a GPU until the last has ended there."""
    _synchronize(machine)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(machine)
    return (time.perf_counter() - started) / calls


def _synchronize(machine: Machine) -> None:
    if machine.device == "cuda":
        torch.cuda.synchronize()


def capture(function: Callable[[], Tensor], pool: tuple[int, int] | None = None) -> Callable[[], Tensor]:
    """Captures a function in a CUDA graph, after calls that warm it up on another stream.

    Args:
        function: Reads and writes the same memory in every call, never waits for the GPU, and leaves no gradients, as
            those it makes belong in the graph's own memory. Weights that autocast casts must not be cached.
        pool: Memory that graphs share, from ``torch.cuda.graph_pool_handle()``; the graphs may be replayed in any
            order if none reads what another replay left there. Default the graph's own.

    Returns:
        A function that replays the graph and returns the captured call's result, which the next replay overwrites.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what libraries set up in first calls on a stream must not be captured
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return partial(_replay, graph, result, function)


def _replay(graph: torch.cuda.CUDAGraph, result: Tensor, function: Callable[[], Tensor]) -> Tensor:
    """Replays a graph; the function is only held, as the graph reads and writes the tensors that it holds."""
    graph.replay()
    return result


def peak_mib(function: Callable[[], object]) -> float:
    """Most GPU memory allocated during a call beyond what was before, in MiB; what the call returns counts."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / 2**20


def allocate_workspace(machine: Machine) -> None:
    """Makes the GPU's matrix library take its workspace now, or it would count as memory of what is measured first."""
    x = torch.ones(16, 16, device=machine.device, dtype=machine.dtype)
    torch.nn.functional.linear(x, x, x[0])


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """What a function returns, and "" or why it failed."""
    try:
        return function(), ""
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:  # a model that is given a size it is not made for can raise nearly anything
        return None, f"{type(error).__name__}: {error}"


def free_memory() -> None:
    """Returns what nobody holds any longer to the device."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU


def copy_bandwidth(machine: Machine) -> float:
    """Bytes per second of a large copy, counting reads and writes."""
    source = torch.zeros(1 << (28 if machine.device == "cuda" else 25), device=machine.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), machine) * 1e-3)


def exponentials_ms(count: int) -> float:
    """Milliseconds of the GPU's special-function units for that many exponentials or logarithms: 16 a clock each."""
    properties = torch.cuda.get_device_properties(0)
    return count / (properties.multi_processor_count * 16 * properties.clock_rate)


def peer(module: str, name: str) -> Any | None:
    """A function of another package, or None if the package is not installed or does not load (with a warning)."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        warnings.warn(f"{package} is installed but has no working {module}.{name}: {error}", stacklevel=2)
        return None
