"""Golden cases: reading them, running them through their family's file, comparing every tensor."""

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.weights import load_into

__all__ = ["Case", "Report", "check_case", "check_cases", "find_cases"]

SIXTEEN_BIT_TOLERANCE = 3e-2  # relative, and relative to the largest value: rounding of inputs and weights


@dataclass(frozen=True)
class Case:
    """One golden case, with its tensors as stored (on the CPU, mostly float32).

    Attributes:
        path: The JSON file.
        family: Name of the folder, which says who runs the case.
        spec: Content of the JSON file.
        tensors: Content of the safetensors file.
        device: Where to run it.
        dtype: Dtype of weights and inputs.
    """

    path: Path
    family: str
    spec: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype

    @property
    def class_name(self) -> str:
        """Class or function of the authors, without the file it is in."""
        return self.spec["class"].rsplit(":", 1)[-1].split()[0]

    @property
    def mode(self) -> str:
        """First word of the mode: ``eval``, ``train``, ``loader``..."""
        return self.spec.get("mode", "eval").split()[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of the authors' class or function."""
        return dict(self.spec["kwargs"])

    @property
    def expected(self) -> dict[str, Tensor]:
        """Outputs and gradients by name, ``output.*`` and ``grad.*``."""
        return {name: t for name, t in self.tensors.items() if name.startswith(("output.", "grad."))}

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start with ``prefix.``, without it."""
        return {n.removeprefix(f"{prefix}."): t for n, t in self.tensors.items() if n.startswith(f"{prefix}.")}

    def inputs(self) -> dict[str, Tensor]:
        """Inputs by name on the case's device; floating-point ones in its dtype and collecting gradients."""
        inputs = {name: t.to(self.device) for name, t in self.group("input").items()}
        return {n: t.to(self.dtype).requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}

    def load(self, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Loads ``state.*`` (or a part of it) strictly; returns the model on device, in dtype and mode."""
        load_into(model, self.group("state") if state_dict is None else state_dict)
        return model.to(self.device, self.dtype).train(self.mode == "train")


@dataclass(frozen=True)
class Report:
    """Outcome of one check.

    Attributes:
        name: ``family/case``.
        passed: Verdict.
        max_error: Largest absolute error over all tensors; None if nothing was compared.
        tolerance: What was allowed, in words.
        detail: The tensor that used most of the tolerance and how much of it, or why the check failed.
    """

    name: str
    passed: bool
    max_error: float | None
    tolerance: str
    detail: str

    def __str__(self) -> str:
        error = "-" if self.max_error is None else f"{self.max_error:.2e}"
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name:<48} max error {error:<9} {self.tolerance:<30} {verdict}  {self.detail}"


def find_cases(folder: str | Path, family: str | None = None) -> list[Path]:
    """JSON files of the cases below a folder of families, or in the folder of one family.

    Args:
        folder: ``goldens/`` or ``goldens/<family>/``.
        family: Only this family.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no cases.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    paths = sorted(path for pattern in ("*.json", "*/*.json") for path in folder.resolve().glob(pattern))
    paths = [path for path in paths if family in (None, path.parent.name)]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no cases" + (f" of family {family!r}" if family else ""))
    return paths


def check_cases(
    folder: str | Path, family: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[Report]:
    """Checks every case below a folder, one report each, as :func:`find_cases` and :func:`check_case`."""
    for path in find_cases(folder, family):
        yield check_case(path, device, dtype)


def check_case(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Report:
    """Runs one case and compares every output and gradient.

    Args:
        path: JSON file of the case.
        device: Where to run it.
        dtype: Dtype of weights and inputs; 16-bit dtypes are compared at 3e-2 instead of the case's tolerance.

    Returns:
        The report; errors while the case runs are failures, not exceptions.
    """
    path = Path(path)
    name = f"{path.parent.name}/{path.stem}"
    spec = json.loads(path.read_text())
    runner = _runner(path.parent.name)
    if runner is None:
        return Report(name, False, None, "-", "no builder")
    tensors = load_file(path.with_suffix(".safetensors"))
    case = Case(path, path.parent.name, spec, tensors, torch.device(device), dtype)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            actual = runner.run(case)
    except Exception as error:
        return Report(name, False, None, "-", f"{type(error).__name__}: {error}")
    return _compare(name, case, actual)


def _runner(family: str) -> ModuleType | None:
    """The family's file, or None if there is none."""
    module = f"zoo.parity.families.{family}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def _compare(name: str, case: Case, actual: Mapping[str, Tensor]) -> Report:
    """Compares all expected tensors with what the family's file returned."""
    rtol, atol = case.spec["tolerance"]["rtol"], case.spec["tolerance"]["atol"]
    of_scale = "relative to the tensor scale" in case.spec["tolerance"].get("note", "")
    tolerance = f"rtol {rtol:g} atol {atol:g}{'*max' if of_scale else ''}"
    if case.dtype.itemsize < 4:
        tolerance = f"rtol {SIXTEEN_BIT_TOLERANCE:g} atol {SIXTEEN_BIT_TOLERANCE:g}*max"
    missing = sorted(set(case.expected) - set(actual))
    if missing or not case.expected:
        return Report(name, False, None, tolerance, f"not computed: {', '.join(missing) or 'no outputs in the case'}")
    max_error, most_used, worst = 0.0, -1.0, ""
    for key, expected in case.expected.items():
        given = actual[key].detach().to("cpu", torch.float64)
        if given.shape != expected.shape:
            shapes = f"{tuple(given.shape)} for {tuple(expected.shape)}"
            return Report(name, False, None, tolerance, f"{key} has shape {shapes}")
        expected = expected.to(torch.float64)
        error = (given - expected).abs()
        used = (error / _allowed(key, expected, rtol, atol, of_scale, case.dtype)).max().nan_to_num(float("inf")).item()
        max_error = max(max_error, error.max().nan_to_num(float("inf")).item())
        if used > most_used:
            most_used, worst = used, key
    return Report(name, most_used <= 1, max_error, tolerance, f"{most_used:.1%} used by {worst}")


def _allowed(key: str, expected: Tensor, rtol: float, atol: float, of_scale: bool, dtype: torch.dtype) -> Tensor:
    """Error allowed at every element. Gradients are long sums, so theirs is relative to the largest one.

    With ``of_scale``, so is that of other tensors, if their largest entry is above 1.
    """
    largest = expected.abs().max()
    if dtype.itemsize < 4:
        rtol, atol = SIXTEEN_BIT_TOLERANCE, SIXTEEN_BIT_TOLERANCE * largest
    elif key.startswith("grad."):
        atol = rtol * largest
    elif of_scale:
        atol = atol * largest.clamp(min=1)
    return (rtol * expected.abs() + atol).clamp(min=1e-30)  # where everything is 0, so must the error be
