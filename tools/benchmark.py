"""Measures the library's speed beside its peers and the hardware's limits.

    python -m zoo.tools.benchmark ops                              # on the GPU if there is one
    python -m zoo.tools.benchmark ops --only cross_scan ssd
    python -m zoo.tools.benchmark ops --device cpu --json results/ops.json
    python -m zoo.tools.benchmark models --models vim_tiny_patch16_224 deit_tiny_patch16_224
    python -m zoo.tools.benchmark models --models vim_tiny_patch16_224 deit_tiny_patch16_224 --img-size 224 512 1248 \\
        --batch-size 256 64 8 --mode infer train latency --cuda-graph --json models.json --plot models.png
    python -m zoo.tools.benchmark loader --workers 0 4 --auto-augment rand-m9-mstd0.5-inc1
    python -m zoo.tools.benchmark decoding --contexts 1024 4096 16384 --json decoding.json --plot decoding.png

Every time is the median of several runs after a warm-up, and all rows of one table come from the same run. Peers of ops
are measured when they are installed: the step-by-step recurrence everybody writes first (always, on CPUs), mambapy's
parallel scan (``pip install mambapy``) and mamba_ssm's kernels. Peers of models are timm's.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

import zoo
from zoo.kernels import backend
from zoo.tools.benchmarks import decoding, loader, models, ops
from zoo.tools.benchmarks.measure import Machine

SUBJECTS = {"ops": ops, "models": models, "loader": loader, "decoding": decoding}


def environment(machine: Machine, arguments: Sequence[str]) -> dict[str, str]:
    """What the numbers were measured with."""
    on_gpu = machine.device == "cuda"
    return dict(
        command=" ".join(["python -m zoo.tools.benchmark", *arguments]),
        device=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        threads=str(torch.get_num_threads()),
        dtype=str(machine.dtype).removeprefix("torch."),
        backend=str(backend(machine.device)),
        zoo=zoo.__version__,
        commit=_commit(),
        torch=torch.__version__,
        timm=timm.__version__,
    )


def _commit() -> str:
    """The source tree's commit, "-dirty" if files were changed since; unknown in an installed package."""
    command = ["git", "-C", str(Path(zoo.__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, subject in SUBJECTS.items():
        options = subjects.add_parser(name, help=subject.HELP)
        options.add_argument(
            "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
        )
        options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on GPUs")
        options.add_argument("--seconds", type=float, help="work per measurement; default 0.3 on GPUs, 1 on CPUs")
        options.add_argument("--json", type=Path, help="also write the numbers to this file")
        subject.add_arguments(options)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed; options that do not fit end it with 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    machine = Machine(
        options.device,
        getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32")),
        options.seconds or (0.3 if on_gpu else 1.0),
    )
    about = environment(machine, arguments)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    try:
        results = SUBJECTS[options.subject].run(machine, options)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(dict(environment=about, **results), indent=1))
        print(f"\nwritten to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
