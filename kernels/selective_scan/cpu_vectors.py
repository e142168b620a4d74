"""Vectors of ``LANES`` float32 numbers for code compiled by numba, and the functions of them that a scan needs.

LLVM maps a vector to as many registers as the processor needs for it, so that loops over vectors are vectorised by
construction, whatever the processor. Addresses are integers, in bytes, and need no alignment.
"""

import operator
from collections.abc import Callable

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "BYTES",
    "LANES",
    "exp",
    "fma",
    "inlined",
    "load",
    "load_one",
    "read",
    "sigmoid",
    "softplus",
    "splat",
    "store",
    "store_one",
    "total",
    "write",
]

LANES = 32  # two registers of AVX-512, four of AVX2: enough independent work to hide what an instruction takes
BYTES = 4  # of a number
FLOAT, INT = ir.FloatType(), ir.IntType(32)
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
OPERATORS = {operator.add: "fadd", operator.sub: "fsub", operator.mul: "fmul", operator.truediv: "fdiv"}

inlined = numba.njit(forceinline=True, nogil=True, error_model="numpy")


class VectorType(types.Type):
    """What numba knows of a vector: its name. It is no array and is never seen by Python."""

    def __init__(self) -> None:
        super().__init__(name=f"vector{LANES}")


vector = VectorType()


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """LLVM's type of a vector."""

    def __init__(self, manager: object, kind: types.Type) -> None:
        super().__init__(manager, kind, FLOATS)


class VectorArithmetic(AbstractTemplate):
    """Two vectors give a vector."""

    def generic(self, args: tuple, kws: dict) -> object:
        return signature(vector, *args) if args == (vector, vector) else None


def _add_operator(python_operator: Callable, instruction: str) -> None:
    """Compiles an operator between two vectors to an instruction of LLVM."""
    infer_global(python_operator)(VectorArithmetic)

    @lower_builtin(python_operator, vector, vector)
    def build(context, builder, sig, args):
        return getattr(builder, instruction)(*args)


for _operator, _instruction in OPERATORS.items():
    _add_operator(_operator, _instruction)


def _filled(builder: ir.IRBuilder, number: ir.Value, kind: ir.VectorType) -> ir.Value:
    """A vector with one number in every lane."""
    undefined, lanes = ir.Constant(kind, ir.Undefined), ir.Constant(INTS, [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(undefined, number, INT(0)), undefined, lanes)


@intrinsic
def splat(typing_context, number):
    """A vector with a number in every lane."""

    def build(context, builder, sig, args):
        return _filled(builder, context.cast(builder, args[0], sig.args[0], types.float32), FLOATS)

    return vector(number), build


@intrinsic
def load(typing_context, address):
    """The vector at an address."""

    def build(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], FLOATS.as_pointer()), align=BYTES)

    return vector(types.intp), build


@intrinsic
def store(typing_context, address, x):
    """Writes a vector to an address."""

    def build(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], FLOATS.as_pointer()), align=BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, vector), build


@intrinsic
def load_one(typing_context, address):
    """The number at an address."""

    def build(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], FLOAT.as_pointer()), align=BYTES)

    return types.float32(types.intp), build


@intrinsic
def store_one(typing_context, address, number):
    """Writes a number to an address."""

    def build(context, builder, sig, args):
        builder.store(args[1], builder.inttoptr(args[0], FLOAT.as_pointer()), align=BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), build


@intrinsic
def lane(typing_context, x, number):
    """One lane of a vector."""

    def build(context, builder, sig, args):
        return builder.extract_element(*args)

    return types.float32(vector, types.intp), build


@intrinsic
def with_lane(typing_context, x, number, value):
    """A vector with one lane replaced."""

    def build(context, builder, sig, args):
        return builder.insert_element(args[0], args[2], args[1])

    return vector(vector, types.intp, types.float32), build


@intrinsic
def fma(typing_context, a, b, c):
    """a b + c, in one instruction where the processor has it."""

    def build(context, builder, sig, args):
        kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32"), args)

    return vector(vector, vector, vector), build


@intrinsic
def total(typing_context, x):
    """Sum over the lanes, in an order that is fixed for a processor."""

    def build(context, builder, sig, args):
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(add, [FLOAT(0.0), args[0]], fastmath=("reassoc", "nsz"))

    return types.float32(vector), build


@intrinsic
def where_less(typing_context, x, y, a, b):
    """a where x < y, b elsewhere, also where one of them is not a number."""

    def build(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return vector(vector, vector, vector, vector), build


@intrinsic
def times_power_of_two(typing_context, x, shifted):
    """x 2^k, where ``shifted`` is k + 1.5 * 2^23: its lowest bits are those of k."""

    def build(context, builder, sig, args):
        exponent = builder.shl(builder.bitcast(args[1], INTS), _filled(builder, INT(23), INTS))
        return builder.bitcast(builder.add(builder.bitcast(args[0], INTS), exponent), FLOATS)

    return vector(vector, vector), build


@inlined
def read(address, width):
    """The first ``width`` numbers at an address, zeros in the other lanes."""
    if width == LANES:
        return load(address)
    x = splat(0.0)
    for i in range(width):
        x = with_lane(x, i, load_one(address + i * BYTES))
    return x


@inlined
def write(address, x, width):
    """Writes the first ``width`` lanes to an address."""
    if width == LANES:
        store(address, x)
    else:
        for i in range(width):
            store_one(address + i * BYTES, lane(x, i))


@inlined
def exp(x):
    """e^x within 1.5 units in the last place; 0 below the smallest normal number, the largest number above itself.

    x = k log(2) + r with |r| <= log(2) / 2: a polynomial gives e^r, and k is added to its exponent.
    """
    x = where_less(splat(88.72283), x, splat(88.72283), x)
    shifted = fma(x, splat(1.4426950408889634), splat(12582912.0))  # so large that no bits are left behind the point
    k = shifted - splat(12582912.0)
    r = fma(k, splat(-0.693145751953125), x)  # log(2) in two parts; k times the first is exact
    r = fma(k, splat(-1.428606820309417e-06), r)
    p = fma(splat(0.008312477730214596), r, splat(0.041890550404787064))
    p = fma(fma(p, r, splat(0.16667115688323975)), r, splat(0.4999922811985016))
    p = fma(fma(p, r, splat(1.0)), r, splat(1.0))
    return where_less(x, splat(-87.33654), splat(0.0), times_power_of_two(p, shifted))


@inlined
def exp_of_minus_magnitude(x):
    return exp(where_less(x, splat(0.0), x, splat(0.0) - x))


@inlined
def sigmoid(x):
    """1 / (1 + e^-x) within 3 units in the last place."""
    e = exp_of_minus_magnitude(x)
    return where_less(x, splat(0.0), e, splat(1.0)) / (splat(1.0) + e)


@inlined
def softplus(x):
    """log(1 + e^x) within 3 units in the last place, however small it is.

    log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3, a polynomial in s^2.
    """
    e = exp_of_minus_magnitude(x)
    s = e / (splat(2.0) + e)
    y = s * s
    p = fma(splat(0.2801198959350586), y, splat(0.28001806139945984))
    p = fma(fma(p, y, splat(0.4002152681350708)), y, splat(0.666664183139801))
    return fma(s, fma(p, y, splat(2.0)), where_less(x, splat(0.0), splat(0.0), x))
