"""Sections of a benchmark of ops: shapes, implementations to compare, floors, and the loop over them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.optional import require
from zoo.tools.benchmarks.measure import Machine, copy_bandwidth, measure
from zoo.tools.tables import aligned

__all__ = ["Implementation", "Section", "run_sections"]

Inputs = dict[str, Tensor]
Row = dict[str, Any]


def _as_they_are(inputs: Inputs) -> Inputs:
    return inputs


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        function: Called with what ``prepare`` returns, by name; returns a tensor or several.
        prepare: Brings a section's inputs into the layout in which this implementation is used. Not timed.
        peer: Whether it is of another package, whose failure is reported in its row and stops nothing.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    prepare: Callable[[Inputs], Inputs] = _as_they_are
    peer: bool = False


class Section(ABC):
    """What one op is measured on and beside. A shape is a dataclass with a ``name``."""

    name: ClassVar[str]
    cpu_shapes: Sequence[Any]
    gpu_shapes: Sequence[Any]

    def shapes(self, device: str) -> Sequence[Any]:
        """What is measured on a device, in the order of the tables."""
        return self.cpu_shapes if device == "cpu" else self.gpu_shapes

    @abstractmethod
    def implementations(self, device: str) -> dict[str, Implementation]:
        """By name, ours first; others as far as they are installed."""

    @abstractmethod
    def inputs(self, shape: Any, device: str, dtype: torch.dtype) -> Inputs:
        """Random arguments of realistic size."""

    @abstractmethod
    def floors(self, shape: Any, machine: Machine, bandwidth: float) -> dict[str, float]:
        """Milliseconds the device needs at least, as ``<limit>_forward`` and ``<limit>_backward``; ``dram`` is one."""

    def extras(
        self, shape: Any, implementations: dict[str, Implementation], inputs: Inputs, machine: Machine
    ) -> dict[str, dict[str, float]]:
        """Further numbers by name of the implementation, for those that ran. Default none."""
        return {}


def run_sections(sections: Sequence[Section], machine: Machine) -> dict[str, Any]:
    """Measures all sections under one progress bar and prints a table for every shape.

    Returns:
        ``bandwidth_gb_s`` of a large copy and ``records``, one for every shape and implementation.
    """
    total = sum(len(s.shapes(machine.device)) * len(s.implementations(machine.device)) for s in sections)
    bandwidth = copy_bandwidth(machine)
    records = []
    with require("tqdm").tqdm(total=total, unit="row", disable=None, dynamic_ncols=True) as bar:
        bar.write(f"bandwidth of a large copy: {bandwidth * 1e-9:.0f} GB/s")
        for section in sections:
            for shape in section.shapes(machine.device):
                rows = _measure_shape(section, shape, machine, bar)
                floors = section.floors(shape, machine, bandwidth)
                _add_ratios(rows, floors, _backward_alone(machine))
                bar.write(table(f"{section.name}, {describe(shape)}", rows, floors, machine))
                about = dict(section=section.name, shape=asdict(shape))
                records += [about | dict(implementation=name) | row | floors for name, row in rows.items()]
    return dict(bandwidth_gb_s=bandwidth * 1e-9, records=records)


def _backward_alone(machine: Machine) -> bool:
    """A GPU's backward is timed by itself; on a CPU it is timed with the forward."""
    return machine.device == "cuda"


def _measure_shape(section: Section, shape: Any, machine: Machine, bar: Any) -> dict[str, Row]:
    """Numbers of every implementation; of a peer that fails, its message."""
    inputs = section.inputs(shape, machine.device, machine.dtype)
    implementations = section.implementations(machine.device)
    rows: dict[str, Row] = {}
    for name, implementation in implementations.items():
        bar.set_description(f"{section.name}, {shape.name}: {name}")
        try:
            prepared = implementation.prepare(inputs)
            rows[name] = measure(implementation.function, prepared, machine, _backward_alone(machine))
        except Exception as error:
            if not implementation.peer:
                raise
            rows[name] = dict(failed=f"{type(error).__name__}: {error}")
        bar.update()
    working = {name: implementations[name] for name, row in rows.items() if "failed" not in row}
    for name, numbers in section.extras(shape, working, inputs, machine).items():
        rows[name] |= numbers
    return rows


def _add_ratios(rows: dict[str, Row], floors: Mapping[str, float], backward_alone: bool) -> None:
    """Adds to every row its times relative to our first row and to the floors: ``forward_vs_zoo``..."""
    ours = next(iter(rows.values())).copy()
    limits = dict(floors)
    if not backward_alone:
        for name in [name for name in floors if name.endswith("_backward")]:
            limits[name] += floors[name.removesuffix("backward") + "forward"]
    for row in rows.values():
        if "failed" in row:
            continue
        for direction in ("forward", "backward"):
            row[f"{direction}_vs_zoo"] = row[f"{direction}_ms"] / ours[f"{direction}_ms"]
        for name, floor in limits.items():
            limit, _, direction = name.rpartition("_")
            row[f"{direction}_vs_{limit}"] = row[f"{direction}_ms"] / floor


def describe(shape: Any) -> str:
    """Name and sizes of a shape."""
    sizes = asdict(shape)
    return f"{sizes.pop('name')}: " + " ".join(f"{name}={size}" for name, size in sizes.items())


COLUMNS = {  # key of a record: heading and format
    "forward_ms": ("forward", "{:.3f} ms"),
    "forward_vs_zoo": ("vs zoo", "{:.1f}x"),
    "forward_vs_dram": ("vs dram", "{:.1f}x"),
    "backward_ms": ("backward", "{:.3f} ms"),
    "backward_vs_zoo": ("vs zoo", "{:.1f}x"),
    "backward_vs_dram": ("vs dram", "{:.1f}x"),
    "peak_mib": ("peak memory", "{:.0f} MiB"),
    "host_ms": ("host", "{:.3f} ms"),
    "output_error": ("error", "{:.1e}"),
    "gradient_error": ("of gradients", "{:.1e}"),
    "float32_output_error": ("in float32", "{:.1e}"),
    "float32_gradient_error": ("of gradients", "{:.1e}"),
}


def table(title: str, rows: Mapping[str, Row], floors: Mapping[str, float], machine: Machine) -> str:
    """The numbers of one shape as text: a line for every implementation, and the floors."""
    columns = [key for key in COLUMNS if any(key in row for row in rows.values())]
    headings = dict(backward_ms="backward" if _backward_alone(machine) else "forward+backward")
    lines = [[""] + [headings.get(key, COLUMNS[key][0]) for key in columns]]
    for name, row in rows.items():
        lines.append([name] + [COLUMNS[key][1].format(row[key]) if key in row else "" for key in columns])
    text = [f"  {line}" for line in aligned(lines)]
    failures = [f"  {name} failed: {row['failed']}" for name, row in rows.items() if "failed" in row]
    limits = "  floors: " + ", ".join(f"{name.replace('_', ' ')} {ms:.3f} ms" for name, ms in floors.items())
    return "\n".join(["", title, *text, *failures, limits])
