"""Ops keep torch's rules for custom operators, and say so where they have no gradient."""

import pytest
import torch
from torch import Tensor

import zoo.backbones.layers.neighborhood  # noqa: F401, which registers its ops


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def decays(*shape: int) -> Tensor:
    return randn(*shape).detach().abs().neg().requires_grad_()


INPUTS = {
    "add_norm": (randn(2, 5, 8), randn(2, 5, 8), randn(8), randn(8), randn(2), 1e-5, None, True),
    "causal_conv1d": (randn(2, 1, 9, 4), randn(2, 4, 3), randn(2, 4), True, [0, 1]),
    "depthwise_conv2d": (randn(2, 4, 5, 3), randn(3, 3, 3), randn(3), "silu"),
    "selective_scan": (
        *(randn(2, 1, 20, 4), randn(2, 2, 20, 4), decays(2, 4, 3), randn(2, 2, 20, 1, 3), randn(2, 2, 20, 1, 3)),
        *(randn(2, 4), None, randn(2, 4), None, None, True, [0, 1], 1, False, True),
    ),
    "ssd": (
        *(randn(1, 1, 12, 2, 4), randn(1, 1, 12, 2), None, randn(1, 1, 12, 1, 3), randn(1, 1, 12, 1, 3)),
        *(randn(1, 2), None, None, None, False, [0]),
    ),
    "neighborhood_maps": (randn(1, 6, 7, 2, 4), randn(1, 6, 7, 2, 4), None, 3, [1, 1], True),
    "neighborhood_aggregate": (randn(1, 2, 6, 7, 9), randn(1, 6, 7, 2, 4), 3, [1, 1]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_torch_accepts_the_registration(name):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(getattr(torch.ops.zoo, name).default, INPUTS[name], test_utils=checks)


def test_a_gradient_of_a_gradient_names_the_op():
    x, weight = randn(1, 1, 6, 2), randn(1, 2, 3)
    y = torch.ops.zoo.causal_conv1d(x, weight, None, False, [0])
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="zoo::causal_conv1d_backward has no gradient"):
        gradient.sum().backward()
