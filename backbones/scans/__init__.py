"""Scan strategies, one file each: in which order K paths walk over the cells of an H x W grid.

A strategy is pure data, an index table; ``zoo.kernels.selective_scan`` reads it, so any order costs the same as the
raster order and nothing is permuted in memory. Files in this folder are found and registered on import.
"""

import importlib
import pkgutil

from zoo.backbones.scans.registry import list_scans, register_scan, scan_paths

__all__ = ["list_scans", "register_scan", "scan_paths"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
