"""The doctor: what it reports, and that it notices a wrong kernel."""

import sys

import pytest
import torch

from zoo.kernels import causal_conv1d, use_backend
from zoo.tools import doctor


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_reports_versions_backends_and_checks(monkeypatch, capsys):
    monkeypatch.setenv("ZOO_CACHE", "/some/where")
    assert doctor.main() == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["torch", doctor.installed_version("torch")] in lines
    assert ["ZOO_CACHE", "/some/where"] in lines
    assert "cpu              cpu (vectorised torch code is the fast path for cpu tensors" in out
    assert "FAIL" not in out
    for op in ("selective_scan", "ssd", "causal_conv1d", "depthwise_conv2d"):
        assert f"PASS {op} on cpu: largest error" in out


def test_extras_name_what_is_missing(monkeypatch):
    assert set(doctor.extras()) >= {"train", "dev"}
    assert doctor.extras()["train"] == []  # the tests need all of it
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: "not installed" if name == "rich" else real(name))
    assert doctor.extras()["train"] == ["rich"]


def test_fails_where_the_requested_backend_cannot_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this machine")
    with use_backend("triton"):
        assert doctor.main() == 1
    assert "SKIP cpu: none: backend 'triton' was requested" in capsys.readouterr().out


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
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert "PASS selective_scan on cpu" in out and "PASS ssd on cpu" in out
    assert "FAIL causal_conv1d on cpu" in out and detail in out
