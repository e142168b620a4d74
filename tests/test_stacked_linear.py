"""Stacked projections: the steps, B and C of a scan are the same however their weights are padded and shared."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.backbones.layers import stacked_linear
from zoo.backbones.layers.stacked_linear import project_steps


def written_down(u: Tensor, x_weight: Tensor, dt_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = torch.einsum("sble,sre->sblr", u.expand(len(x_weight), -1, -1, -1), x_weight)
    rank, states = dt_weight.shape[2], (x_weight.shape[1] - dt_weight.shape[2]) // 2
    dt, B, C = projected.split([rank, states, states], dim=-1)
    return torch.einsum("sblr,ser->sble", dt, dt_weight), B, C


def pad_to_8(x_weight: Tensor, dt_weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a GPU's products of 16-bit numbers want."""
    rank = dt_weight.shape[2]
    of_steps, of_states = x_weight.split([rank, x_weight.shape[1] - rank], dim=1)
    x_weight = torch.cat([F.pad(of_steps, (0, 0, 0, -rank % 8)), of_states], dim=1)
    return F.pad(x_weight, (0, 0, 0, -x_weight.shape[1] % 8)), F.pad(dt_weight, (0, -rank % 8))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sets, read", [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("rank, states", [(12, 16), (6, 1), (8, 4), (3, 5)])
def test_steps_are_those_of_the_definition(monkeypatch, rank, states, sets, read, training, padded):
    monkeypatch.setattr(stacked_linear, "pad_projections", pad_to_8 if padded else lambda *weights: weights[:2])
    torch.manual_seed(0)
    u = torch.randn(read, 2, 7, 24, dtype=torch.float64, requires_grad=True)
    x_weight = torch.randn(sets, rank + 2 * states, 24, dtype=torch.float64, requires_grad=True)
    dt_weight = torch.randn(sets, 24, rank, dtype=torch.float64, requires_grad=True)
    inputs = u, x_weight, dt_weight
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(project_steps(*inputs), written_down(*inputs))
        return
    got, expected = project_steps(*inputs), written_down(*inputs)
    torch.testing.assert_close(got, expected)
    cotangents = [torch.randn_like(x) for x in expected]
    gradients = (torch.autograd.grad(outputs, inputs, cotangents) for outputs in (got, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("rank, states", [(12, 16), (6, 1)])
def test_padded_products_of_16_bit_numbers(rank, states):
    torch.manual_seed(0)
    shapes = (2, 3, 50, 64), (2, rank + 2 * states, 64), (2, 64, rank)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    for got, expected in zip(project_steps(*inputs), written_down(*(x.double() for x in inputs)), strict=True):
        assert (got - expected).abs().max() <= 2e-2 * expected.abs().max()
