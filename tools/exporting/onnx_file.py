"""ONNX files."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from zoo.optional import require
from zoo.tools.exporting.decompositions import DECOMPOSITIONS
from zoo.tools.exporting.folding import fold_constants
from zoo.tools.exporting.output import step
from zoo.tools.exporting.subject import Subject
from zoo.tools.exporting.tracing import Images, quiet, trace

__all__ = ["ANY_SIZE", "convert", "onnx_runner", "require_onnx", "write_onnx"]

OPSET = 18  # what torch translates to without converting between versions

# Families whose graphs hold at every image size. Others choose windows, or set up tables, in ways that a graph without
# checks would repeat at sizes for which they are wrong.
ANY_SIZE = ("adventurer", "mamba_vision", "shuffle_mamba", "vim", "vmamba")


def require_onnx() -> None:
    """Raises ModuleNotFoundError, with the command that installs it, if a package is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export")


def write_onnx(subject: Subject, images: Images, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a model as ONNX, logits from normalised images, and checks the file's structure.

    Weights of more than 2 GB go into a second file beside it, ``<name>.data``.

    Args:
        subject: Model.
        images: What images the file is for.
        path: File.

    Returns:
        A function that runs the file.

    Raises:
        ValueError: If the model does not take such images, or its graph would not hold at every size.
        RuntimeError: If the model cannot be translated.
    """
    family = type(subject.model).__module__.rpartition(".")[2]
    if images.any_size and family not in ANY_SIZE:
        known = ", ".join(ANY_SIZE)
        raise ValueError(
            f"a graph of {subject.name} is for one image size; leave out --dynamic-size and export every size that you "
            f"need (families with files for any size: {known})"
        )
    with step("tracing the model"):
        program = trace(subject, images)
    with step("translating it to ONNX (up to a minute)"):
        translated = convert(program, ["images"], ["logits"])
        _name_axes(translated.model, ("batch", "channels", "height", "width"))
        translated.model.metadata_props.update(subject.metadata())
    with step("writing and checking the file"):
        translated.save(path)
        require("onnx", "export").checker.check_model(str(path), full_check=True)
    return onnx_runner(path)


def convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str]) -> torch.onnx.ONNXProgram:
    """Translates a graph.

    Args:
        program: The graph, with this zoo's operators as nodes; not to be used any more.
        inputs: Names for its inputs.
        outputs: Names for its outputs.

    Raises:
        RuntimeError: If there is an operator that ONNX has no counterpart for; the message names it.
    """
    from zoo.tools.exporting.onnx_loops import TRANSLATIONS

    _decompose_ours_too(program)
    try:
        with quiet():
            translated = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                custom_translation_table=TRANSLATIONS,
                optimize=False,  # its time grows with the square of the graph, and runtimes optimise for themselves
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RuntimeError(f"a part of the model cannot be translated to ONNX: {cause}") from error
    _tidy(translated.model)
    return translated


def _decompose_ours_too(program: ExportedProgram) -> None:
    """Lets torch's exporter, which decomposes a program before it translates it, decompose our operators as well.

    It does so by ``run_decompositions``, which traces the graph anew and takes half of the time: once is enough. What
    is left is folded.
    """
    decompose = program.run_decompositions

    def run_decompositions(table: Mapping[Any, Callable]) -> ExportedProgram:
        decomposed = decompose({**table, **DECOMPOSITIONS})
        fold_constants(decomposed)
        return decomposed

    program.run_decompositions = run_decompositions


def _tidy(model: Any) -> None:
    """Removes what is in a graph twice or for nothing, and torch's notes about where nodes come from."""
    passes = require("onnxscript", "export").ir.passes
    common = passes.common
    passes.Sequential(
        common.InlinePass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)


def _name_axes(model: Any, names: Sequence[str]) -> None:
    """Gives the free axes of the first input names that tell what they are, instead of torch's symbols.

    Shapes of other tensors are formulas in these.
    """
    axes = {str(size): name for size, name in zip(model.graph.inputs[0].shape, names, strict=True)}
    symbols = {symbol: name for symbol, name in axes.items() if not symbol.isdigit()}
    results = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *results):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                value.shape[axis] = re.sub(r"\w+", lambda word: symbols.get(word[0], word[0]), str(size))


def onnx_runner(path: Path) -> Callable[..., Tensor]:
    """A function that runs a file on the CPU: tensors in order to its first output.

    Raises:
        RuntimeError: If ONNX Runtime does not take the file, or fails on it.
    """
    runtime = require("onnxruntime", "export")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the error
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise RuntimeError(f"ONNX Runtime cannot load the file: {error}") from error
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        try:
            return torch.from_numpy(session.run(None, feed)[0])
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime cannot run the file: {error}") from error

    return run
