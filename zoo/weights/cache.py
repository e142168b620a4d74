"""Where downloaded weights lie, what is known about each, and how processes share them."""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

__all__ = ["Record", "cache_folder", "file_hash", "find", "locked", "read_record", "writable_folder", "write_record"]

_logger = logging.getLogger(__name__)
_temporary: dict[Path, Path] = {}  # folders of this process that stand in for others that cannot be written


@dataclass(frozen=True)
class Record:
    """What is known about a downloaded file; kept beside it as ``<name>.json``.

    Args:
        source: Address it came from.
        sha256: Digest of the file as downloaded, in hexadecimal. Later downloads have to agree.
        size: Size of the file as downloaded, in bytes.
        file: Name of the file in the cache: converted weights, or the original where it could not be converted.
        converted: Whether ``file`` holds converted weights.
        file_sha256: Digest of ``file``.
        file_size: Size of ``file`` in bytes.
        file_mtime_ns: When ``file`` was written, in nanoseconds; if this changes, the digest is computed anew.
        version: Version of the package that converted it.
    """

    source: str
    sha256: str
    size: int
    file: str
    converted: bool
    file_sha256: str
    file_size: int
    file_mtime_ns: int
    version: str


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of downloaded weights: ``cache_dir``, else ``ZOO_CACHE``, else ``zoo`` in torch.hub's folder."""
    chosen = cache_dir or os.environ.get("ZOO_CACHE")
    return Path(chosen).expanduser() if chosen else Path(torch.hub.get_dir()) / "zoo"


def writable_folder(folder: Path) -> Path:
    """The folder itself, created if need be, or, with a warning, a temporary one that lasts as long as the process."""
    if folder in _temporary:
        return _temporary[folder]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        advice = f"cannot write to {folder} ({error.strerror}); set ZOO_CACHE to a folder that you can write"
    try:
        stand_in = Path(tempfile.mkdtemp(prefix="zoo-"))
    except OSError as error:
        raise OSError(error.errno, advice) from error
    _logger.warning("%s. Until this process ends, weights are kept in %s", advice, stand_in)
    atexit.register(shutil.rmtree, stand_in, ignore_errors=True)
    _temporary[folder] = stand_in
    return stand_in


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Keeps other processes, and threads, away from the files of ``name``; waits for whoever is at it.

    The system drops the lock of a process that dies.
    """
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(folder / f"{name}.lock"):
        yield


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_record(folder: Path, name: str) -> Record | None:
    """The record of ``name``, or None if there is none that can be read."""
    try:
        content = json.loads((folder / f"{name}.json").read_text())
        return Record(**{field.name: content[field.name] for field in fields(Record)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, name: str, record: Record) -> None:
    """Writes a record; it appears whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with open(handle, "w") as file:
            json.dump(asdict(record), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / f"{name}.json")
    finally:
        Path(temporary).unlink(missing_ok=True)


def find(folder: Path, name: str, *, verify: bool = False) -> tuple[Path, Record] | None:
    """The file of ``name`` and its record, if both are there and agree.

    Args:
        folder: Folder of the cache.
        name: Name without suffix.
        verify: Whether the digest is computed even if size and time of the file are as recorded.
    """
    record = read_record(folder, name)
    if record is None:
        return None
    path = folder / record.file
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_size != record.file_size:
        _logger.warning("%s has %d bytes instead of %d and is not used", path, status.st_size, record.file_size)
        return None
    if verify or status.st_mtime_ns != record.file_mtime_ns:
        if file_hash(path) != record.file_sha256:
            _logger.warning("%s has changed since it was written and is not used", path)
            return None
        if status.st_mtime_ns != record.file_mtime_ns:
            record = replace(record, file_mtime_ns=status.st_mtime_ns)
            with contextlib.suppress(OSError):  # the folder may be read-only
                write_record(folder, name, record)
    return path, record
