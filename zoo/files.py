"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the name under which to write a file that takes the place of ``path`` once it is whole."""
    temporary = path.with_name(f".writing.{path.name}")  # the ending stays: it tells the format of a picture
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
