"""Convolutions of maps: eager ones are torch's, compiled ones the same in one operation that compilers do not know."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from zoo.backbones.layers import convolution
from zoo.backbones.layers.convolution import convolve_map

CASES = {  # shape of x, of the weight, stride, padding, dilation
    "downsample": ((2, 7, 6, 8), (16, 8, 3, 3), (2, 2), (1, 1), (1, 1)),
    "patches": ((2, 9, 8, 3), (5, 3, 4, 4), (4, 4), (0, 0), (1, 1)),
    "uneven": ((1, 8, 9, 4), (2, 4, 3, 5), (1, 2), (0, 2), (2, 1)),
    "one_cell": ((2, 1, 1, 4), (8, 4, 1, 1), (1, 1), (0, 0), (1, 1)),
}


def inputs(name: str, device: torch.device, biased: bool = True) -> list[Tensor | None]:
    """Map, weight and bias."""
    torch.manual_seed(0)
    x, weight, *_ = CASES[name]
    bias = torch.randn(weight[0], device=device).requires_grad_() if biased else None
    return [*(torch.randn(shape, device=device).requires_grad_() for shape in (x, weight)), bias]


def gradients(out: Tensor, given: list[Tensor | None]) -> list[Tensor]:
    leaves = [x for x in given if x is not None and x.requires_grad]
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_op_is_torchs_convolution(name, biased, device):
    given, steps = inputs(name, device, biased), CASES[name][2:]
    out = convolution._convolve_map(*given, *(list(step) for step in steps))
    assert out.is_contiguous()
    expected = F.conv2d(given[0].permute(0, 3, 1, 2), *given[1:], *steps).permute(0, 2, 3, 1)
    torch.testing.assert_close(convolve_map(*given, *steps), expected)
    expected = gradients(expected, given)
    torch.testing.assert_close(gradients(out, given), expected, rtol=1e-4, atol=1e-4)
    images = given[0].detach()  # nobody asks for their gradient
    out = convolution._convolve_map(images, *given[1:], *(list(step) for step in steps))
    torch.testing.assert_close(gradients(out, given[1:]), [expected[0], *expected[2:]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, biased, device):
    given = inputs(name, device, biased), [list(step) for step in CASES[name][2:]]
    torch.library.opcheck(torch.ops.zoo.convolve_map.default, (*given[0], *given[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_for_gpus_it_is_one_operation(name):
    device, steps, targets = torch.device("cuda"), CASES[name][2:], []
    given = inputs(name, device)

    def note(graph, example):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(convolve_map, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    with torch.autocast("cuda", torch.bfloat16):
        out, expected = compiled(*given, *steps), convolve_map(*given, *steps)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), rtol=2e-2, atol=2e-2)
    assert "zoo.convolve_map.default" in targets and not any("aten.convolution" in target for target in targets)
