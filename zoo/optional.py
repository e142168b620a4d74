"""Imports of packages that only some features need, with an error that says how to install them."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str = "train") -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: Import name, with dots for a submodule, for example ``"matplotlib.figure"``.
        extra: The extra of this package that installs it; default ``"train"``.

    Returns:
        The imported module.

    Raises:
        ModuleNotFoundError: If the package is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise  # the package is there, something that it needs is not: its own message says what
        raise ModuleNotFoundError(
            f"this feature needs the package {module.split('.')[0]!r}; install it with "
            f"pip install 'vision-ssm-zoo[{extra}]'",
            name=error.name,
        ) from None
