"""Computing beforehand what depends on no input: tables of scan orders, resampled embeddings, decays, flipped taps."""

import hashlib
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

__all__ = ["fold_constants"]

# What is larger, in elements, and more times as large as what it is made from is left to be computed again and again,
# so that files stay small.
LARGEST = 1 << 16
GROWTH = 8


def fold_constants(program: ExportedProgram) -> None:
    """Replaces, in place, what a functional graph computes from parameters and constants alone by its value.

    The values are torch's own, so that folding is exact, and whoever translates the graph needs to know none of the
    operators that made them.

    Args:
        program: As from ``run_decompositions``, which leaves no operator that writes into its arguments.
    """
    graph = program.graph_module.graph
    values = _constants(program)
    given = set(values)
    for node in graph.nodes:
        if node not in given and _can_be_folded(node, values):
            value = _evaluate(node, values)
            if _is_worth_keeping(value, [values[each] for each in node.all_input_nodes]):
                values[node] = value
    known: dict[tuple, fx.Node] = {}
    for node in [each for each in values if each not in given]:
        if any(user not in values for user in node.users):
            key = _identity(values[node])
            if key not in known:
                known[key] = _add_constant(program, f"folded_{len(known)}", values[node], node.meta["val"])
            node.replace_all_uses_with(known[key], delete_user_cb=lambda user: user not in values)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _constants(program: ExportedProgram) -> dict[fx.Node, Any]:
    """Parameters, buffers and constants by their node."""
    signature = program.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.state_dict, **program.constants}
    placeholders = (node for node in program.graph_module.graph.nodes if node.op == "placeholder")
    return {node: tensors[targets[node.name]].detach() for node in placeholders if node.name in targets}


def _can_be_folded(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether all that an operator, or a choice among its results, needs is there."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return False
    is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not is_random and all(each in values for each in node.all_input_nodes)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: values[each])
    return node.target(*args, **kwargs)


def _is_worth_keeping(value: Any, inputs: list[Any]) -> bool:
    """Whether a result is small, or not much larger than what it was made from."""
    if not isinstance(value, Tensor):
        return True  # several results, of which one will be chosen
    sizes = [each.numel() for each in inputs if isinstance(each, Tensor)]
    return value.numel() <= max(LARGEST, GROWTH * max(sizes, default=0))


def _identity(value: Tensor) -> tuple:
    """Equal for equal tensors."""
    content = value.contiguous().reshape(-1).view(torch.uint8).numpy()
    return value.dtype, value.shape, hashlib.sha256(content).digest()


def _add_constant(program: ExportedProgram, name: str, value: Tensor, traced: Any) -> fx.Node:
    """Adds a constant to a program; constants come before the images among the inputs of its graph."""
    graph, specs = program.graph_module.graph, program.graph_signature.input_specs
    place = next(index for index, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT)
    before = [node for node in graph.nodes if node.op == "placeholder"][place]
    with graph.inserting_before(before):
        node = graph.placeholder(name)
    node.meta["val"] = traced
    specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name, None))
    program.constants[node.name] = value.contiguous()
    return node
