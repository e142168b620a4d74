"""Checks of settings, whose errors name the key and the value."""

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["require_choice", "require_range", "require_that"]


def require_that(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_range(key: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ValueError unless ``low <= value <= high``."""
    limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
    require_that(low <= value <= high, f"{key} must be {limits}, got {value}")


def require_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    require_that(value in choices, f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")
