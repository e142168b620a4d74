"""Ops keep torch's rules for custom operators, and say so where they have no gradient."""

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import zoo.backbones.layers.neighborhood  # noqa: F401, which registers its ops
from zoo.kernels.add_norm.op import add_norm_op
from zoo.kernels.causal_conv1d.op import causal_conv1d_op


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def decays(*shape: int) -> Tensor:
    return randn(*shape).detach().abs().neg().requires_grad_()


INPUTS = {
    "add_norm": (randn(2, 5, 8), randn(2, 5, 8), randn(8), randn(8), randn(2), 1e-5, None, True),
    "bias_gelu": (randn(2, 5, 8), randn(8)),
    "causal_conv1d": (randn(2, 1, 9, 4), randn(2, 4, 3), randn(2, 4), True, [0, 1]),
    "depthwise_conv2d": (randn(2, 4, 5, 3), randn(3, 3, 3), randn(3), "silu"),
    "gated_norm": (randn(2, 5, 8), randn(2, 5, 8), randn(4), randn(4), 2, 1e-5, "silu", True, True),
    "selective_scan": (
        *(randn(2, 1, 20, 4), randn(2, 2, 20, 4), decays(2, 4, 3), randn(2, 2, 20, 1, 3), randn(2, 2, 20, 1, 3)),
        *(randn(2, 4), None, randn(2, 4), None, None, True, [0, 1], 1, False, False, True),
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


class TestShortestWay:
    """Ops called as they are made go without torch's dispatcher, unless something watches what is called."""

    inputs = (randn(2, 5, 8), randn(2, 5, 8), randn(8), randn(8), None, 1e-5, None, True)

    @pytest.fixture
    def straight(self, monkeypatch):
        """Of every call, whether it went without the dispatcher."""
        module = sys.modules["zoo.kernels.custom_op"]  # the package has a function of this name
        ways, unwatched = [], module._unwatched
        monkeypatch.setattr(module, "_unwatched", lambda inputs: ways.append(unwatched(inputs)) or ways[-1])
        return ways

    def gradients(self, call):
        normed, stream = call(*self.inputs)
        return normed, stream, *torch.autograd.grad(normed.square().sum() + stream.sin().sum(), self.inputs[:4])

    def test_it_gives_the_same(self, straight):
        results = self.gradients(add_norm_op)
        assert straight == [True, True]
        assert all(map(torch.equal, results, self.gradients(torch.ops.zoo.add_norm)))

    def test_without_gradients(self, straight):
        with torch.no_grad():
            results = add_norm_op(*self.inputs)
            assert straight == [True] and not results[0].requires_grad
            assert all(map(torch.equal, results, torch.ops.zoo.add_norm(*self.inputs)))

    def test_a_profiler_and_a_counter_see_both_ways(self, straight):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.gradients(add_norm_op)
        assert {"zoo::add_norm", "zoo::add_norm_backward"} <= {event.key for event in profile.key_averages()}
        x, weight = randn(1, 1, 6, 2), randn(1, 2, 3)
        with FlopCounterMode(display=False) as counter:
            causal_conv1d_op(x, weight, None, False, [0]).sum().backward()
        assert set(counter.get_flop_counts()["Global"]) >= {torch.ops.zoo.causal_conv1d}
        assert straight == [False] * 4

    def test_tracers_see_the_op(self):
        x, *others = (each.detach() if isinstance(each, Tensor) else each for each in self.inputs)

        def normed(x):
            return add_norm_op(x, *others)[0]

        graphs = [make_fx(normed)(x).graph]
        compiled = torch.compile(
            normed, fullgraph=True, backend=lambda module, _: graphs.append(module.graph) or module
        )
        assert torch.equal(compiled(x), normed(x)) and len(graphs) == 2
        for graph in graphs:
            assert torch.ops.zoo.add_norm.default in {node.target for node in graph.nodes}
        assert "zoo::add_norm" in str(torch.jit.trace(normed, x).graph)

    def test_tensors_without_numbers(self, straight):
        empty = [x.to("meta") if isinstance(x, Tensor) else x for x in self.inputs]
        assert [x.device.type for x in add_norm_op(*empty)] == ["meta", "meta"]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in self.inputs]
        assert isinstance(add_norm_op(*fake)[0], FakeTensor)
        assert straight == [False] * 2

    def test_what_torch_cannot_do_with_an_op_is_told(self):
        with pytest.raises(RuntimeError, match="Batching rule not implemented for zoo::add_norm"):
            torch.func.vmap(lambda x: add_norm_op(x, None, *self.inputs[2:])[0])(self.inputs[0])
