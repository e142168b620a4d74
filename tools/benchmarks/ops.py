"""The subject ``ops``: kernels beside their peers and the hardware's limits.

Floors are what a device needs at least: ``dram`` moves every input and output once at the bandwidth of a large copy
measured in the same run; ``exp`` computes exponentials and logarithms on the special-function units of NVIDIA GPUs.
"""

import argparse
from typing import Any

from zoo.tools.benchmarks.add_norm import AddNorm
from zoo.tools.benchmarks.bias_gelu import BiasGelu
from zoo.tools.benchmarks.cross_scan import CrossScan
from zoo.tools.benchmarks.depthwise_conv2d import DepthwiseConv2d
from zoo.tools.benchmarks.gated_norm import GatedNorm
from zoo.tools.benchmarks.measure import Machine
from zoo.tools.benchmarks.projected_scan import ProjectedScan
from zoo.tools.benchmarks.section import run_sections
from zoo.tools.benchmarks.selective_scan import SelectiveScan
from zoo.tools.benchmarks.ssd import SSD

__all__ = ["HELP", "add_arguments", "run"]

HELP = "the kernels: selective scan, cross scan with and without projections, SSD, norms, convolution, GELU"
KINDS = (SelectiveScan, CrossScan, ProjectedScan, SSD, AddNorm, GatedNorm, DepthwiseConv2d, BiasGelu)
SECTIONS = {kind.name: kind() for kind in KINDS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=tuple(SECTIONS), help="sections to measure; default all")


def run(machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Measures the chosen sections, in their own order, and returns their records."""
    chosen = options.only or SECTIONS
    return run_sections([section for name, section in SECTIONS.items() if name in chosen], machine)
