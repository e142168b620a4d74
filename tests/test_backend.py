"""Which implementation of the ops runs, and what is said about it."""

import os
import subprocess
import sys

import pytest

from zoo.kernels import backend, use_backend


def test_backend_says_what_runs_and_why():
    assert backend("cpu").name == "cpu" and "vectorised" in backend("cpu").reason
    with use_backend("reference"):
        assert backend("cpu").name == "reference"
        assert "requested" in str(backend("cpu"))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), use_backend("cuda"):
        pass


@pytest.mark.parametrize(
    "environment, code, message",
    [
        (dict(ZOO_BACKEND="fast"), "import zoo.kernels", "ZOO_BACKEND='fast' is not a backend"),
        (
            dict(ZOO_BACKEND="triton", TRITON_INTERPRET="0"),
            "from zoo.kernels import backend; backend('cpu')",
            "cannot run: Triton kernels need a GPU tensor, got a cpu tensor",
        ),
        (
            dict(),
            "import sys; sys.modules['triton'] = None; from zoo.kernels import _backend\n"
            "_backend._triton_installed = lambda: False\n"
            "print(_backend.backend('cuda')); _backend.backend('cuda')",
            "Set ZOO_BACKEND=triton to make this an error",
        ),
    ],
)
def test_backend_errors_and_warnings(environment, code, message):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.stderr.count(message) == 1, done.stderr
