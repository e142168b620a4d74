"""The loops of :mod:`zoo.tools.exporting.decompositions` in ONNX, each a Scan over the leading dimension.

Names, shapes and results are those of the operators there. Bodies read what is the same in every round (A, q, k,
values) from outside.
"""

from onnxscript import FLOAT, INT64, graph, script
from onnxscript import opset18 as op

from zoo.tools.exporting import decompositions

__all__ = ["TRANSLATIONS"]


@script(default_opset=op)
def recurrence(
    steps: FLOAT[...], received: FLOAT[...], B: FLOAT[...], C: FLOAT[...], A: FLOAT[...], state: FLOAT[...]
) -> tuple[FLOAT[...], FLOAT[...]]:
    """One step after the other."""

    @graph()
    def advance(h, step, value, spread, read):
        new = op.Exp(step * A) * h + value * spread
        out = op.MatMul(read, new)
        return new, out

    last, outputs = op.Scan(state, steps, received, B, C, body=advance, num_scan_inputs=4)
    return outputs, last


@script(default_opset=op)
def lookahead(
    steps: FLOAT[...],
    received: FLOAT[...],
    B: FLOAT[...],
    C: FLOAT[...],
    keep: FLOAT[...],
    A: FLOAT[...],
    state: FLOAT[...],
) -> FLOAT[...]:
    """One step before the other."""

    @graph()
    def retreat(h, step, value, spread, read, kept):
        brought = op.Exp(step * A) * (h * kept)
        out = op.MatMul(read, brought)
        new = brought + value * spread
        return new, out

    _, outputs = op.Scan(
        state,
        steps,
        received,
        B,
        C,
        keep,
        body=retreat,
        num_scan_inputs=5,
        scan_input_directions=[1, 1, 1, 1, 1],
        scan_output_directions=[1],
    )
    return outputs


@script(default_opset=op)
def window_scores(q: FLOAT[...], k: FLOAT[...], cells: INT64[...]) -> FLOAT[...]:
    """One place in the windows after the other."""

    @graph()
    def compare(each):
        out = op.ReduceSum(q * op.Gather(k, each, axis=1), op.Constant(value_ints=[-1]), keepdims=0)
        return out

    outputs = op.Scan(cells, body=compare, num_scan_inputs=1)
    return outputs


@script(default_opset=op)
def window_sums(maps: FLOAT[...], values: FLOAT[...], cells: INT64[...]) -> FLOAT[...]:
    """One place in the windows after the other."""

    @graph()
    def add(total, weight, each):
        new = total + weight * op.Gather(values, each, axis=1)
        return new

    zeros = values - values
    total = op.Scan(zeros, maps, cells, body=add, num_scan_inputs=2)
    return total


TRANSLATIONS = {
    decompositions.RECURRENCE: recurrence,
    decompositions.LOOKAHEAD: lookahead,
    decompositions.WINDOW_SCORES: window_scores,
    decompositions.WINDOW_SUMS: window_sums,
}
