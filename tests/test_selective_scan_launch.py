"""How the selective scan's Triton kernels are launched, and where states are parked."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from zoo.kernels import selective_scan, use_backend
from zoo.kernels.selective_scan import triton_bwd
from zoo.kernels.selective_scan.triton_parking import shared_lot
from zoo.kernels.selective_scan.triton_regions import even_regions


@pytest.mark.parametrize(
    "items, places, steps, expected",
    [
        (1280, 1056, 2048, (4, 512)),  # a second round filled to a fifth
        (1536, 1056, 197, (1, 208)),  # to a half: not worth a first pass
        (1000, 1056, 2048, (1, 2048)),  # all in one round
        (1100, 1056, 50, (1, 64)),  # too short to cut
    ],
)
def test_regions_even_out_the_last_round(items, places, steps, expected):
    assert even_regions(items, places, steps) == expected


@pytest.mark.interpreted
def test_gradients_do_not_depend_on_the_backwards_regions(monkeypatch):
    """Five programs for the four places of the interpreter's one multiprocessor."""
    monkeypatch.setattr(triton_bwd, "RESIDENT_WARPS", 4)
    torch.manual_seed(0)
    batch, L, D, N = 5, 130, 4, 3
    assert even_regions(batch, 4, L) == (2, 80)
    inputs = dict(
        u=torch.randn(batch, L, D),
        delta=torch.randn(batch, L, D),
        A=-torch.rand(D, N),
        B=torch.randn(batch, L, N),
        C=torch.randn(batch, L, N),
        D=torch.randn(D),
        z=torch.randn(batch, L, D),
        delta_bias=torch.rand(D),
        initial_state=torch.randn(batch, D, N),
    )
    cotangent = torch.randn(batch, L, D)
    grads = {}
    for name in ("triton", "reference"):
        leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        with use_backend(name):
            out = selective_scan(**leaves, delta_softplus=True, reverse=True)
            grads[name] = torch.autograd.grad(out, list(leaves.values()), cotangent)
    for key, got, expected in zip(inputs, grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_states_are_parked_in_shared_memory_where_there_is_some(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA")
    gpu = torch.device("cuda")
    assert "parked[16384]" in shared_lot(gpu, torch.float32, 8 * 16 * 32)
    assert shared_lot(gpu, torch.float64, 8 * 16 * 32) is None
    assert shared_lot(gpu, torch.float32, 8 * 64 * 32) is None  # more than a program may reserve
    assert shared_lot(torch.device("cpu"), torch.float32, 8 * 16 * 32) is None
