"""Files that appear whole or not at all, and lines that say what takes so long."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["size_of", "staged", "step"]


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Lets a block write a file, or a folder, that is moved to its place only if the block succeeds.

    Args:
        output: The place. Folders above it are made; what is there already is replaced, file by file.

    Yields:
        Where to write instead. Files beside it, of weights for example, are moved along.

    Raises:
        OSError: If nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {output.parent}: {error.strerror}") from error
    with folder as name:
        place = Path(name) / output.name
        yield place
        for path in sorted(Path(name).iterdir(), key=lambda path: path == place):  # what it refers to goes first
            _move(path, output.with_name(path.name))


def _move(source: Path, target: Path) -> None:
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move(path, target / path.name)
    else:
        os.replace(source, target)


def size_of(path: Path) -> int:
    """Bytes of a file and of the weights beside it, if it has some there, or of a folder."""
    files = path.iterdir() if path.is_dir() else (path, path.with_name(f"{path.name}.data"))
    return sum(file.stat().st_size for file in files if file.is_file())


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Prints what is being done, and when it is done how long it took."""
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
