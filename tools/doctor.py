"""Says what is installed, which backend runs where and why, and checks the ops against their definition.

    python -m zoo.tools.doctor

Ends with exit status 1 if a check fails or none could run. Paste the output into a bug report.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from zoo import __version__, backend, use_backend
from zoo.kernels import causal_conv1d, depthwise_conv2d, selective_scan, ssd

DISTRIBUTION = "vision-ssm-zoo"
PACKAGES = ("torch", "torchvision", "timm", "triton", "numba")
TOLERANCE = 1e-4  # float32 against float64, relative to the largest entry
NOT_INSTALLED = "not installed"


def installed_version(package: str) -> str:
    """Version of an installed distribution, or a note that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def extras() -> dict[str, list[str]]:
    """Packages of every optional extra that are not installed, by the extra's name."""
    missing = defaultdict(list)
    for requirement in importlib.metadata.requires(DISTRIBUTION) or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if extra:
            package = re.match(r"[\w.-]+", requirement).group()
            missing[extra.group(1)] += [package] if installed_version(package) == NOT_INSTALLED else []
    return dict(missing)


def devices() -> list[torch.device]:
    """The CPU and every device of the accelerator torch sees."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return [torch.device("cpu")]
    numbers = range(torch.accelerator.device_count())
    return [torch.device("cpu"), *(torch.device(accelerator.type, number) for number in numbers)]


def device_name(device: torch.device) -> str:
    """What the device is, with its size."""
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"capability {properties.major}.{properties.minor}"
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
    return device.type


def chosen_backend(device: torch.device) -> tuple[bool, str]:
    """Whether the ops can run on a device at all, and the backend with the reason, or why there is none."""
    try:
        return True, str(backend(device))
    except RuntimeError as error:
        return False, f"none: {error}"


def scan_inputs() -> dict[str, Tensor]:
    """Two paths over 100 tokens: more than one chunk, and a channel count that fills no block."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return dict(
        u=normal(2, 100, 24),
        delta=normal(2, 2, 100, 24),
        A=-normal(2, 24, 8).abs(),
        B=normal(2, 2, 100, 8),
        C=normal(2, 2, 100, 8),
        D=normal(2, 24),
        z=normal(2, 100, 24),
        delta_bias=normal(2, 24),
    )


def run_scan(**inputs: Tensor) -> Tensor:
    return selective_scan(**inputs, delta_softplus=True, reverse=[False, True])


def ssd_inputs() -> dict[str, Tensor]:
    """Two paths over 100 tokens that read the same input: more than one chunk; heads and states that fill no block."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return dict(
        x=normal(2, 100, 4, 24),
        dt=normal(2, 2, 100, 4),
        A=-normal(2, 4).abs(),
        B=normal(2, 2, 100, 2, 20),
        C=normal(2, 2, 100, 2, 20),
        D=normal(2, 4),
        dt_bias=normal(2, 4),
        initial_state=normal(2, 2, 4, 24, 20),
    )


def run_ssd(**inputs: Tensor) -> Tensor:
    return ssd(**inputs, dt_softplus=True, reverse=[False, True])


def random_inputs(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def convolution_inputs() -> dict[str, Tensor]:
    """Two paths over 100 tokens that both read the same input."""
    return random_inputs(x=(2, 100, 24), weight=(2, 24, 4), bias=(2, 24))


def run_convolution(**inputs: Tensor) -> Tensor:
    return causal_conv1d(**inputs, activation="silu", reverse=[False, True])


def map_inputs() -> dict[str, Tensor]:
    """Two maps whose rows, columns and channels fill no block."""
    return random_inputs(x=(2, 13, 11, 40), weight=(40, 3, 3), bias=(40,))


def run_map_convolution(**inputs: Tensor) -> Tensor:
    return depthwise_conv2d(**inputs, activation="silu")


CHECKS = {
    "selective_scan": (run_scan, scan_inputs),
    "ssd": (run_ssd, ssd_inputs),
    "causal_conv1d": (run_convolution, convolution_inputs),
    "depthwise_conv2d": (run_map_convolution, map_inputs),
}


def outputs_and_gradients(op: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The op's output and, for a fixed gradient of it, the gradient of every input; on the CPU in float64."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = op(**leaves)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    results = {"output": out, **{f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}}
    return {name: x.detach().cpu().double() for name, x in results.items()}


def check(name: str, device: torch.device) -> tuple[bool, str]:
    """Runs one op in float32 on the device and compares it with its definition in float64 on the CPU.

    Returns:
        Whether all agree, and a line that says how well or what went wrong.
    """
    op, make_inputs = CHECKS[name]
    inputs = make_inputs()
    with use_backend("reference"):
        expected = outputs_and_gradients(op, inputs)
    start = time.perf_counter()
    try:
        got = outputs_and_gradients(op, {name: x.to(device, torch.float32) for name, x in inputs.items()})
    except Exception as error:  # whatever breaks on this machine is the finding
        return False, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    errors = {key: ((got[key] - exact).abs().max() / exact.abs().max()).item() for key, exact in expected.items()}
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return errors[worst] <= TOLERANCE, f"largest error {errors[worst]:.1e} ({worst}), {seconds:.2f} s"


def section(title: str, rows: dict[str, str]) -> None:
    print(title)
    for name, text in rows.items():
        print(f"  {name:<16} {text}")


def main() -> int:
    argparse.ArgumentParser(prog="python -m zoo.tools.doctor", description=__doc__.splitlines()[0]).parse_args()
    versions = {package: installed_version(package) for package in PACKAGES}
    section("Versions", {"zoo": __version__, "python": platform.python_version(), **versions})
    section(
        "Optional extras",
        {
            extra: f"missing {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]'" if missing else "complete"
            for extra, missing in extras().items()
        },
    )
    section("Devices", {str(device): device_name(device) for device in devices()})
    section("Backends", {str(device): chosen_backend(device)[1] for device in devices()})
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("ZOO_", "TRITON_"))}
    section("Environment", variables or {"ZOO_*": "none set"})

    print("Self-check: forward and gradients against the definition")
    verdicts = []
    for device in devices():
        runs, reason = chosen_backend(device)
        if not runs:
            print(f"  SKIP {device}: {reason}")
            continue
        for name in CHECKS:
            passed, detail = check(name, device)
            print(f"  {'PASS' if passed else 'FAIL'} {name} on {device}: {detail}")
            verdicts.append(passed)
    return 0 if verdicts and all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
