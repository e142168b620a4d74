"""Vision state-space backbones, one family per file; importing this package registers them all with timm."""

import importlib
import pkgutil

FAMILIES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))

for _family in FAMILIES:
    importlib.import_module(f"{__name__}.{_family}")

__all__ = ["FAMILIES"]
