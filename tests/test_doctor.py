"""The doctor: what it reports, and that it notices a wrong kernel."""

import os
import subprocess
import sys

import pytest
import torch

from zoo.kernels import causal_conv1d
from zoo.tools import doctor


def run_doctor(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "zoo.tools.doctor"],
        env={**os.environ, "TRITON_INTERPRET": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_reports_versions_backends_and_checks():
    done = run_doctor(ZOO_CACHE="/some/where")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["torch", torch.__version__.split("+")[0]] in [[line[0], line[-1].split("+")[0]] for line in lines]
    assert ["ZOO_CACHE", "/some/where"] in lines
    assert "cpu              cpu (vectorised torch code is the fast path for cpu tensors)" in done.stdout
    assert "FAIL" not in done.stdout
    for op in ("selective_scan", "causal_conv1d"):
        assert f"PASS {op} on cpu: largest error" in done.stdout


def test_fails_where_the_requested_backend_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this machine")
    done = run_doctor(ZOO_BACKEND="triton")
    assert done.returncode == 1
    assert "SKIP cpu: none: backend 'triton' was requested" in done.stdout


@pytest.mark.parametrize("name", doctor.CHECKS)
def test_ops_agree_with_their_definition(name, device):
    passed, detail = doctor.check(name, device)
    assert passed, detail


def scaled_in_float32(**inputs: torch.Tensor) -> torch.Tensor:
    return causal_conv1d(**inputs) * (1.001 if inputs["x"].dtype == torch.float32 else 1)


def nan_in_float32(**inputs: torch.Tensor) -> torch.Tensor:
    return causal_conv1d(**inputs) * (float("nan") if inputs["x"].dtype == torch.float32 else 1)


def broken_in_float32(**inputs: torch.Tensor) -> torch.Tensor:
    if inputs["x"].dtype == torch.float32:
        raise OSError("out of resource")
    return causal_conv1d(**inputs)


@pytest.mark.parametrize(
    "op, detail", [(scaled_in_float32, "1.0e-03"), (nan_in_float32, "nan"), (broken_in_float32, "out of resource")]
)
def test_a_wrong_kernel_is_noticed(op, detail, monkeypatch, capsys):
    monkeypatch.setitem(doctor.CHECKS, "causal_conv1d", (op, doctor.convolution_inputs))
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "PASS selective_scan on cpu" in out
    assert "FAIL causal_conv1d on cpu" in out and detail in out
