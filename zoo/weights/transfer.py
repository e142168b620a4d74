"""Downloading one file over HTTP so that it arrives whole or not at all."""

import contextlib
import email.utils
import errno
import hashlib
import http.client
import json
import logging
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.version import __version__

__all__ = ["DownloadError", "download"]

ATTEMPTS = 4  # failures in a row; a connection that breaks after it brought something is none
RECONNECTIONS = 100  # in all
BACKOFF = 1.0  # seconds before the second attempt, doubled each time
LONGEST_WAIT = 60.0  # seconds; a server may ask for more
TIMEOUT = 30.0  # seconds without any data
MINIMUM_RATE = 1024  # bytes per second, over TIMEOUT
CHECKPOINT = 64 << 20  # bytes between two notes of how far the download has come
CHUNK = 1 << 20
WEB_PAGE = (b"<!doctype html", b"<html")

_logger = logging.getLogger(__name__)


class DownloadError(OSError):
    """A file could not be had; the message says from where and why."""


class _Interrupted(Exception):
    """An attempt failed in a way that another one may not."""

    def __init__(self, reason: str, wait: float = 0.0, progress: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.progress = progress


@dataclass
class _Part:
    """The beginning of a file, and which file it is the beginning of."""

    path: Path
    url: str = ""
    validator: str = ""  # ETag or date, by which the server knows whether the file is still the same
    size: int = 0  # bytes that have reached the disk

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @classmethod
    def read(cls, path: Path, url: str) -> "_Part":
        """What an earlier download of the same address left, or an empty part."""
        part = cls(path, url)
        try:
            noted = json.loads(part.note.read_text())
            if noted["url"] == url and path.stat().st_size >= noted["size"]:
                part.validator, part.size = str(noted["validator"]), int(noted["size"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return part

    def write(self) -> None:
        """Notes how much there is, so that not even a crash makes anyone trust more than that."""
        temporary = self.note.with_name(f"{self.note.name}.tmp")
        temporary.write_text(json.dumps({"url": self.url, "validator": self.validator, "size": self.size}))
        os.replace(temporary, self.note)

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.validator, self.size = "", 0


def download(
    url: str, path: str | Path, *, sha256: str | None = None, size: int | None = None, label: str | None = None
) -> tuple[str, int]:
    """Downloads a file, continuing where an earlier attempt broke off.

    The bytes go to ``<path>.part``; only a file that is complete, and has the digest and size if these are given,
    gets its name. One process at a time may download to a path.

    Args:
        url: Address, ``http`` or ``https``.
        path: File to write; its folder has to exist.
        sha256: Expected digest in hexadecimal, or the beginning of it. Default unknown.
        size: Expected size in bytes. Default unknown.
        label: What the progress bar says; default the file's name.

    Returns:
        SHA-256 in hexadecimal, and size in bytes.

    Raises:
        DownloadError: If the server does not give the file, or gives another one.
        OSError: If it cannot be written, for example because the disk is full.
    """
    path = Path(path)
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is no http or https address; give a file on disk as checkpoint_path")
    part = _Part.read(path.with_name(f"{path.name}.part"), url)
    failures = 0
    for _ in range(RECONNECTIONS):
        try:
            digest = _attempt(part, sha256, size, label or path.name)
        except _Interrupted as interruption:
            failures = 1 if interruption.progress else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(f"{url}: {interruption}, {failures} times in a row; try again later") from None
            wait = max(BACKOFF * 2 ** (failures - 1), min(interruption.wait, LONGEST_WAIT))
            _logger.info("%s: %s; trying again in %.0f s", url, interruption, wait)
            time.sleep(wait)
            continue
        os.replace(part.path, path)
        part.note.unlink(missing_ok=True)
        return digest, part.size
    raise DownloadError(f"{url}: the connection broke {RECONNECTIONS} times; try again later")


def _attempt(part: _Part, sha256: str | None, size: int | None, label: str) -> str:
    """Requests what is missing and returns the digest of the whole."""
    resumed = part.size > 0 and bool(part.validator or sha256)
    with _open(part, resumed) as response:
        total = _check_answer(part, response, resumed, size)
        resumed = resumed and response.status == 206
        part.size = part.size if resumed else 0
        part.validator = _validator(response.headers)
        digest = _receive(part, response, total, label)
    if total is not None and part.size < total:
        raise _Interrupted(f"the connection broke after {part.size} of {total} bytes", progress=True)
    wrong = ""
    if size is not None and part.size != size:
        wrong = f"has {part.size} bytes instead of {size}"
    elif sha256 and not digest.startswith(sha256.lower()):
        wrong = f"has the SHA-256 {digest} instead of {sha256}"
    if wrong:
        part.discard()
        if resumed:  # the two pieces may be of different files
            raise _Interrupted(f"what was put together {wrong}")
        raise DownloadError(f"{part.url} {wrong}: it is damaged or was replaced, and is not used")
    return digest


def _open(part: _Part, resumed: bool) -> Any:
    """Sends the request; answers that mean failure become errors."""
    headers = {"User-Agent": f"vision-ssm-zoo/{__version__}", "Accept-Encoding": "identity"}
    if resumed:
        headers["Range"] = f"bytes={part.size}-"
        if part.validator:
            headers["If-Range"] = part.validator
    try:
        return urllib.request.urlopen(urllib.request.Request(part.url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there is nothing after what we have: it is of another file
            part.discard()
            raise _Interrupted("the server's file is shorter than before") from None
        if error.code in (408, 425, 429) or error.code >= 500:
            raise _Interrupted(
                f"the server answered {error.code} {error.reason}", _retry_after(error.headers)
            ) from None
        raise DownloadError(
            f"{part.url}: the server answered {error.code} {error.reason}{_advice(error.code)}"
        ) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise DownloadError(f"{part.url}: the server's certificate is not trusted: {error.reason}") from None
        raise _Interrupted(f"no connection: {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"no connection: {error or type(error).__name__}") from None


def _advice(code: int) -> str:
    if code in (404, 410):
        return "; the file has moved or was taken away"
    return "; the file may ask for a login or for consent to its terms" if code in (401, 403) else ""


def _check_answer(part: _Part, response: Any, resumed: bool, size: int | None) -> int | None:
    """Whether the answer can be the file; returns the size of the whole, if the server says."""
    if part.url.startswith("https:") and not response.url.startswith("https:"):
        raise DownloadError(f"{part.url} leads to {response.url}, which is not encrypted")
    if response.headers.get_content_type() == "text/html":
        raise DownloadError(f"{part.url} gives a web page instead of a file; open it in a browser to see why")
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if resumed and response.status == 206:
        first, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if first.partition("-")[0] != str(part.size):
            part.discard()
            raise _Interrupted(f"the server sent bytes {first or 'of unknown place'} instead of the rest")
        total = int(whole) if whole.isdigit() else None if total is None else part.size + total
    if size is not None and total is not None and size != total:
        raise DownloadError(f"{part.url} has {total} bytes instead of {size}: it was replaced, and is not used")
    return total


def _receive(part: _Part, response: Any, total: int | None, label: str) -> str:
    """Appends the answer to the part and notes how long that is; returns the digest of all of it."""
    try:
        if total is not None and shutil.disk_usage(part.path.parent).free < total - part.size:
            raise OSError(errno.ENOSPC, "the disk is too full")
        with part.path.open("r+b" if part.size else "wb") as file, _progress_bar(part, total, label) as advance:
            digest, start = _digest_of(file, part.size), part.size
            file.truncate()
            try:
                noted = start
                for chunk in _chunks(response):
                    if part.size == 0 and chunk.lstrip()[:20].lower().startswith(WEB_PAGE):
                        raise DownloadError(f"{part.url} gives a web page instead of a file")
                    file.write(chunk)
                    digest.update(chunk)
                    part.size += len(chunk)
                    advance(len(chunk))
                    if part.size - noted >= CHECKPOINT:
                        _settle(part, file)
                        noted = part.size
            except _Interrupted as interruption:
                interruption.progress = interruption.progress and part.size > start
                raise
            finally:
                _settle(part, file)
    except DownloadError:
        part.discard()
        raise
    except OSError as error:  # of the disk: what the network does is an interruption
        part.discard()
        need = "" if total is None else f" of {total} bytes"
        advice = "free some space, or set ZOO_CACHE to a folder elsewhere"
        raise OSError(
            error.errno,
            f"{part.url}{need} cannot be written to {part.path.parent}: {error.strerror or error}; {advice}",
        ) from error
    return digest.hexdigest()


@contextlib.contextmanager
def _progress_bar(part: _Part, total: int | None, label: str) -> Iterator[Callable[[int], object]]:
    """A function that counts bytes, with a bar on terminals.

    Elsewhere there is no bar at all, not a disabled one: tqdm has a lock in common with forked processes, and one that
    is killed while it holds that would stop the others for good.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=part.size, desc=label, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


def _digest_of(file: Any, size: int) -> Any:
    """The digest of the first bytes of a file, which is left there."""
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest


def _chunks(response: Any) -> Iterator[bytes]:
    """The answer as it comes in; too slow is an interruption."""
    since, received = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except TimeoutError:
            raise _Interrupted(f"no data came for {TIMEOUT:.0f} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(f"the connection broke: {error!r}", progress=True) from None
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        seconds = time.monotonic() - since
        if seconds >= TIMEOUT:
            if received < seconds * MINIMUM_RATE:
                raise _Interrupted(f"only {received} bytes came in {seconds:.0f} s")
            since, received = time.monotonic(), 0


def _settle(part: _Part, file: Any) -> None:
    """Brings what was received to the disk and notes it."""
    file.flush()
    os.fsync(file.fileno())
    part.write()


def _validator(headers: Any) -> str:
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _retry_after(headers: Any) -> float:
    """Seconds that the server wants us to wait."""
    value = headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
