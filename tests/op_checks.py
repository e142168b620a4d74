"""What tests of several ops share; they load this file with ``runpy``."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

BACKENDS = [  # and devices
    ("cpu", "cpu"),
    ("reference", "cpu"),
    pytest.param("triton", "cpu", marks=pytest.mark.interpreted),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]


def subjects(cases: Iterable[str], gpu_cases: Iterable[str]) -> list[Any]:
    """Backend, device and case of a test that runs all cases, the larger ones on GPUs alone."""
    return [
        *[(backend, "cpu", name) for backend in ("cpu", "reference") for name in cases],
        *[pytest.param("triton", "cpu", name, marks=pytest.mark.interpreted) for name in cases],
        *[
            pytest.param(backend, "cuda", name, marks=pytest.mark.gpu)
            for backend in ("triton", "cpu")
            for name in (*cases, *gpu_cases)
        ],
    ]


def with_gradients(out: Tensor, inputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The output, and for a fixed gradient of it those of x, weight and, if it was given, bias."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.device)
    names = [name for name, t in zip(("x", "weight", "bias"), inputs, strict=True) if t is not None]
    grads = torch.autograd.grad((out.double() * cotangent).sum(), [t for t in inputs if t is not None])
    return dict(out=out, **dict(zip(names, grads, strict=True)))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor has the expected shape and is within ``tolerance`` of it, relative to its largest entry."""
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        assert got[name].shape == exact.shape, name
        error = (got[name].double() - exact).abs().max()
        assert error <= tolerance * exact.abs().max(), f"{name}: error {error:.2e} of {exact.abs().max():.2e}"
