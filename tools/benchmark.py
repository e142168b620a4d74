"""Measures the library's speed beside its peers and the hardware's limits.

    python -m zoo.tools.benchmark ops                    # the selective scan, on the GPU if there is one
    python -m zoo.tools.benchmark ops --device cpu --json results/ops.json

Every time is the median of many runs after a warm-up, and all rows of one table come from the same run. Peers are
measured when they are installed: the step-by-step recurrence everybody writes first (always), mambapy's parallel scan
(``pip install mambapy``) and mamba_ssm's CUDA kernel.

The floors are what the device needs at least: reading every input and writing every output once at the bandwidth of
a large copy measured in the same run, and N + 3 exponentials and logarithms per token and channel at 16 a clock and
multiprocessor (the special-function units of NVIDIA GPUs).
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import zoo
from zoo.kernels import backend, selective_scan, selective_scan_fn


@dataclass(frozen=True)
class Shape:
    """One call of the scan: batch, channels, tokens, states."""

    name: str
    batch: int
    D: int
    L: int
    N: int


CPU_SHAPES = (Shape("Vim-Ti 224", 8, 384, 197, 16), Shape("VMamba-T stage 1", 2, 192, 3136, 1))
GPU_SHAPES = (
    Shape("Vim-Ti 224", 128, 384, 197, 16),
    Shape("Vim-S 224", 128, 768, 197, 16),
    Shape("Vim-B 224", 128, 1536, 197, 16),
    Shape("Vim-Ti 1248", 4, 384, 6085, 16),
    Shape("LM 2.8B", 8, 5120, 2048, 16),
)


def scan_inputs(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs of realistic size in mamba_ssm's layout: (B, D, L), with gate, skip, bias and softplus."""
    torch.manual_seed(0)
    activation = dict(device=device, dtype=dtype)
    return dict(
        u=torch.randn(shape.batch, shape.D, shape.L, **activation),
        delta=torch.randn(shape.batch, shape.D, shape.L, **activation) * 0.5,
        A=-torch.arange(1.0, shape.N + 1, device=device).repeat(shape.D, 1),
        B=torch.randn(shape.batch, shape.N, shape.L, **activation),
        C=torch.randn(shape.batch, shape.N, shape.L, **activation),
        D=torch.ones(shape.D, device=device),
        z=torch.randn(shape.batch, shape.D, shape.L, **activation),
        delta_bias=torch.rand(shape.D, device=device) - 4.0,
    )


def step_recurrence(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """The scan as a loop over tokens with exponentials computed beforehand, (B, D, L): the peer in every table."""
    step = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(step[..., None] * A[:, None])  # (B, D, L, N)
    inputs = (step * u)[..., None] * B.transpose(1, 2)[:, None]  # (B, D, L, N)
    h, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[-1]):
        h = decay[:, :, t] * h + inputs[:, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * u) * F.silu(z)


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """The same through mambapy's parallel scan in plain torch."""
    from mambapy.pscan import pscan

    step = F.softplus(delta + delta_bias[:, None]).transpose(1, 2)  # (B, L, D)
    decay = torch.exp(step[..., None] * A)  # (B, L, D, N)
    h = pscan(decay, (step * u.transpose(1, 2))[..., None] * B.transpose(1, 2)[:, :, None])
    y = (h @ C.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    return (y + D[:, None] * u) * F.silu(z)


def scan_peers(device: str) -> dict[str, Callable[..., Tensor]]:
    """Other implementations that can run here, by name; all take ``scan_inputs``."""
    peers = {}
    if device == "cpu":
        peers["step recurrence"] = step_recurrence
        if importlib.util.find_spec("mambapy"):
            peers["mambapy"] = mambapy_scan
    elif importlib.util.find_spec("selective_scan_cuda"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn as mamba_ssm_scan

        peers["mamba_ssm"] = lambda **inputs: mamba_ssm_scan(**inputs, delta_softplus=True)
    return peers


def our_scan(**inputs: Tensor) -> Tensor:
    """Ours, channels-last; the inputs are views of channels-last memory, as in our models."""
    return selective_scan(
        *(inputs[name].transpose(1, 2) for name in ("u", "delta")),
        inputs["A"],
        *(inputs[name].transpose(1, 2) for name in ("B", "C")),
        inputs["D"],
        inputs["z"].transpose(1, 2),
        inputs["delta_bias"],
        delta_softplus=True,
    )


def device_milliseconds(function: Callable[[], object], calls: int = 12) -> float:
    """Median of several queued calls, each timed by events, with the cache overwritten before it."""
    overwrite = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    torch.cuda._sleep(150_000_000)  # clock cycles: some 80 ms, in which the host queues the calls
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        overwrite.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def milliseconds(function: Callable[[], object], device: str) -> float:
    """Median time of one call after a warm-up; on a GPU, of the device alone and with a cold cache.

    The device is kept busy until all calls are queued, so that it never waits for the host.
    """
    if device == "cuda":
        return device_milliseconds(function)
    function()
    timer = Timer("function()", globals=dict(function=function), num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1.0).median * 1e3


def measure_scan(scan: Callable[..., Tensor], inputs: dict[str, Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of a forward without gradients, and of the backward alone (GPU) or both together (CPU)."""
    with torch.no_grad():
        forward = milliseconds(lambda: scan(**inputs), device)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = scan(**leaves)
    cotangent = torch.randn_like(out)
    targets = list(leaves.values())
    if device == "cuda":
        return forward, milliseconds(lambda: torch.autograd.grad(out, targets, cotangent, retain_graph=True), device)
    return forward, milliseconds(lambda: torch.autograd.grad(scan(**leaves), targets, cotangent), device)


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, counting reads and writes."""
    source = torch.empty(1 << (28 if device == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (milliseconds(lambda: target.copy_(source), device) * 1e-3)


def scan_floors(shape: Shape, dtype: torch.dtype, bandwidth: float, device: str) -> dict[str, float]:
    """Milliseconds the device needs at least for forward and backward."""
    elements = shape.batch * shape.D * shape.L
    item = dtype.itemsize
    projections = 2 * shape.batch * shape.L * shape.N
    floors = dict(
        dram_forward=(4 * elements + projections) * item / bandwidth * 1e3,
        dram_backward=(7 * elements + 2 * projections) * item / bandwidth * 1e3,
    )
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        per_second = properties.multi_processor_count * 16 * properties.clock_rate * 1e3
        floors["exp_forward"] = (shape.N + 3) * elements / per_second * 1e3
    return floors


def benchmark_ops(device: str, dtype: torch.dtype) -> list[dict]:
    """One record per shape and implementation, ours first."""
    bandwidth = copy_bandwidth(device)
    records = []
    for shape in CPU_SHAPES if device == "cpu" else GPU_SHAPES:
        inputs = scan_inputs(shape, device, dtype)
        floors = scan_floors(shape, dtype, bandwidth, device)
        token_major = {
            name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 3 else x for name, x in inputs.items()
        }
        rows = {"zoo": measure_scan(our_scan, token_major, device)}
        for name, peer in scan_peers(device).items():
            rows[name] = measure_scan(peer, inputs, device)
        if device == "cuda":
            channel_major = measure_scan(lambda **x: selective_scan_fn(**x, delta_softplus=True), inputs, device)
            rows["zoo, (B, D, L) drop-in"] = channel_major
        for name, (forward, backward) in rows.items():
            records.append(
                dict(shape=asdict(shape), implementation=name, forward_ms=forward, backward_ms=backward, **floors)
            )
        print_shape(shape, rows, floors, device)
    return records


def print_shape(shape: Shape, rows: dict[str, tuple[float, float]], floors: dict[str, float], device: str) -> None:
    """Times of one shape, each with its ratio to ours."""
    second = "backward" if device == "cuda" else "forward+backward"
    print(f"\n{shape.name}: B={shape.batch} D={shape.D} L={shape.L} N={shape.N}")
    print(f"  {'':24}{'forward':>12}{'vs zoo':>9}{second:>19}{'vs zoo':>9}")
    for name, (forward, backward) in rows.items():
        ratios = forward / rows["zoo"][0], backward / rows["zoo"][1]
        print(f"  {name:24}{forward:9.3f} ms{ratios[0]:8.1f}x{backward:16.3f} ms{ratios[1]:8.1f}x")
    print("  floors: " + ", ".join(f"{name.replace('_', ' ')} {ms:.3f} ms" for name, ms in floors.items()))


def environment(device: str, dtype: torch.dtype) -> dict[str, str]:
    """What the numbers were measured with."""
    chip = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return dict(
        command=" ".join(["python -m zoo.tools.benchmark", *sys.argv[1:]]),
        device=chip,
        threads=str(torch.get_num_threads()),
        dtype=str(dtype).removeprefix("torch."),
        backend=str(backend(device)),
        zoo=zoo.__version__,
        commit=_commit(),
        torch=torch.__version__,
    )


def _commit() -> str:
    """The source tree's commit; unknown in an installed package."""
    command = ["git", "-C", str(Path(zoo.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo.tools.benchmark", description=__doc__.splitlines()[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    ops = subjects.add_parser("ops", help="the selective scan")
    ops.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    ops.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on GPUs")
    ops.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    about = environment(options.device, dtype)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    records = benchmark_ops(options.device, dtype)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(dict(environment=about, records=records), indent=1))
        print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
