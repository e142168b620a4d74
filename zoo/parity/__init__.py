"""Checks models and ops against tensors that the authors' own code computed.

A golden case is a pair of files, ``<family>/<case>.json`` (what was built and called, and the tolerance) and
``<case>.safetensors`` (``state.*`` weights, ``input.*``, ``output.*`` and ``grad.*``). A family takes part by one file,
``zoo/parity/families/<family>.py``, with ``run(case) -> dict`` of every output and gradient by its name.
"""

from zoo.parity.case import Case, Report, check_case, check_cases, find_cases
from zoo.parity.keys import check_all_keys, check_keys

__all__ = ["Case", "Report", "check_all_keys", "check_case", "check_cases", "check_keys", "find_cases"]
