"""Chooses which implementation of an op runs, in one place, and can say why.

Three backends implement every op of this package:

* ``triton``    fused Triton kernels, on GPUs (or anywhere under ``TRITON_INTERPRET=1``, for tests);
* ``cpu``       the fast path on CPUs: vectorised torch code, which runs on any device torch knows, and where numba is
  installed compiled loops for the selective scan;
* ``reference`` the op's definition step by step in plain torch, slow and readable.

``ZOO_BACKEND=auto|triton|cpu|reference`` (default ``auto``) or :func:`use_backend` picks one. ``auto`` takes Triton
for CUDA/ROCm/XPU tensors and ``cpu`` otherwise. If a GPU tensor has to take the slow path, one warning per process
says why; with ``ZOO_BACKEND=triton`` it is an error instead.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["Backend", "backend", "use_backend", "why_no_compiled_loops"]

NAMES = ("triton", "cpu", "reference")
GPU_DEVICES = ("cuda", "xpu")


@dataclass(frozen=True)
class Backend:
    """The implementation that will run and the reason it was chosen."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def _requested_from_environment() -> str:
    requested = os.environ.get("ZOO_BACKEND", "auto").lower()
    if requested not in ("auto", *NAMES):
        raise ValueError(f"ZOO_BACKEND={requested!r} is not a backend; use one of auto, {', '.join(NAMES)}")
    return requested


_requested = _requested_from_environment()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the ops inside the ``with`` block on the named backend (``auto``, ``triton``, ``cpu``, ``reference``)."""
    global _requested
    if name not in ("auto", *NAMES):
        raise ValueError(f"unknown backend {name!r}; use one of auto, {', '.join(NAMES)}")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


@functools.lru_cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache
def why_no_compiled_loops() -> str | None:
    """Reason why the selective scan has no compiled loops on CPUs, or None if it has."""
    if importlib.util.find_spec("numba") is None:
        return "the selective scan is several times faster with numba, which is not installed (pip install numba)"
    try:
        importlib.import_module("zoo.kernels.selective_scan.cpu_numba")
    except Exception as error:  # whatever is wrong with that numba, torch code does the same
        return f"the selective scan is slower than with numba, which cannot be used: {type(error).__name__}: {error}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton(device_type: str) -> str | None:
    """Reason why Triton kernels cannot run on tensors of this device type, or None if they can."""
    if not _triton_installed():
        return "triton is not installed (pip install triton)"
    if _interpreting() or device_type in GPU_DEVICES:
        return None
    return f"Triton kernels need a GPU tensor, got a {device_type} tensor (TRITON_INTERPRET=1 interprets them anywhere)"


@functools.lru_cache
def _warn_slow_path(device_type: str, reason: str) -> None:
    warnings.warn(
        f"zoo.kernels runs {device_type} tensors through plain torch code, many times slower than Triton: {reason}. "
        "Set ZOO_BACKEND=triton to make this an error.",
        RuntimeWarning,
        stacklevel=3,
    )


def backend(device: torch.device | str | None = None) -> Backend:
    """Says which implementation runs for tensors on ``device`` and why.

    Args:
        device: Device of the tensors; default is the current CUDA device if there is one, else the CPU.

    Raises:
        RuntimeError: If Triton was requested and cannot run there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = torch.device(device).type
    obstacle = _why_no_triton(device_type)
    if _requested == "triton":
        if obstacle:
            raise RuntimeError(f"backend 'triton' was requested (ZOO_BACKEND) but cannot run: {obstacle}")
        return Backend("triton", "requested")
    if _requested != "auto":
        return Backend(_requested, "requested")
    if device_type == "cpu":
        loops = why_no_compiled_loops() or "the selective scan runs in loops compiled by numba"
        return Backend("cpu", f"vectorised torch code is the fast path for cpu tensors; {loops}")
    if device_type not in GPU_DEVICES:
        return Backend("cpu", f"vectorised torch code is the fast path for {device_type} tensors")
    if obstacle:
        _warn_slow_path(device_type, obstacle)
        return Backend("cpu", obstacle)
    return Backend("triton", f"fused kernels for {device_type} tensors")
