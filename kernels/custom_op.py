"""``custom_op``: what torch.library's decorator of that name does, with half the time around every call.

A model calls several ops a layer, and in an eager step a GPU waits for the host. torch's decorator compares the memory
of inputs and outputs in every call, looks up defaults that no op here has, and flattens lists of outputs; its
dispatcher turns all inputs into its own types and back. Where nothing but autograd has a say in a call, the op that
:func:`custom_op` makes goes without the dispatcher.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["CustomOp", "custom_op"]

LIBRARY = torch.library.Library("zoo", "FRAGMENT")

Outputs = Tensor | list[Tensor] | tuple[Tensor, ...]

PLAIN_TYPES = frozenset(
    (Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple, torch.dtype)
)  # of inputs; none that watches what is done to it, as proxies and fake tensors do


def _unwatched(inputs: tuple[Any, ...]) -> bool:
    """Whether nothing wants to see a call but autograd: no transform, mode, tracer, compiler or profiler."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not PLAIN_TYPES.issuperset(map(type, inputs))
        or inputs[0].is_meta
    )


class CustomOp:
    """An op ``torch.ops.zoo.<name>``, and the shortest way to call it; made by :func:`custom_op`.

    Args:
        name: Its name.
        function: What it does on every device. Its annotated types, without defaults, are the op's; the first input is
            a tensor. It changes no input, and returns none or a view of one.
    """

    def __init__(self, name: str, function: Callable[..., Outputs]) -> None:
        LIBRARY.define(
            name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        LIBRARY.impl(name, self._call, "Autograd", with_keyset=True)
        self.name = name
        self._function = function
        self._op = getattr(torch.ops.zoo, name).default
        self._returns_list = isinstance(self._op._schema.returns[0].type, torch.ListType)
        self.register_autograd(self._no_backward, setup_context=lambda ctx, inputs, output: None)

    def __call__(self, *inputs: Any) -> Outputs:
        """The op's outputs."""
        return self._call(None, *inputs) if _unwatched(inputs) else self._op(*inputs)

    def register_fake(self, function: Callable[..., Outputs]) -> Callable[..., Outputs]:
        """Decorates the function that makes the op's empty outputs: their shapes, dtypes and strides."""
        torch.library.register_fake(f"zoo::{self.name}", function, lib=LIBRARY)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Makes the op differentiable; arguments as of ``torch.library.register_autograd``."""
        run, in_list = self._run, self._returns_list  # of a list backwards get the gradients as one argument

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx, keys, *inputs):
                output = run(keys, *inputs)
                setup_context(ctx, inputs, output)
                return tuple(output) if in_list else output

            @staticmethod
            def backward(ctx, *grads):
                return None, *(backward(ctx, grads) if in_list else backward(ctx, *grads))

        self._node = Node

    def _call(self, keys: torch._C.DispatchKeySet | None, *inputs: Any) -> Outputs:
        if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)):
            return self._run(keys, *inputs)
        output = self._node.apply(keys, *inputs)
        return list(output) if self._returns_list else output

    def _run(self, keys: torch._C.DispatchKeySet | None, *inputs: Any) -> Outputs:
        """Goes on to what lies below autograd, as the same call to a profiler; without keys there is nothing else."""
        if keys is None:
            return self._function(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return self._op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def _no_backward(self, ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"zoo::{self.name} has no gradient")


def custom_op(name: str) -> Callable[[Callable[..., Outputs]], CustomOp]:
    """Decorates a function of tensors, which becomes the op ``torch.ops.zoo.<name>``."""
    return lambda function: CustomOp(name, function)
