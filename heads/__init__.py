"""Task heads by name. Each takes a list of feature maps and never names a backbone.

Every file in this folder is imported, which registers its heads, but for those that need packages of an extra.
"""

import importlib
import pkgutil

from zoo.heads.registry import create_head, list_heads, register_head

__all__ = ["create_head", "list_heads", "register_head"]

NEED_EXTRAS = {"mmseg", "clip", "vlm"}

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    if _module.name.rpartition(".")[2] not in NEED_EXTRAS:
        importlib.import_module(_module.name)
