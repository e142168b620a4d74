"""Files of benchmarks: read with messages that name what is wrong, and images checked before they are asked about."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zoo.data.files import NAMES_SHOWN, report_bad_files, why_unreadable
from zoo.data.vqa.benchmark import Sample
from zoo.optional import require

__all__ = [
    "choose_split",
    "find",
    "needs_root",
    "read_json",
    "read_json_lines",
    "readable",
    "records_of",
    "refuse_repeated",
    "require_entries",
]

Record = dict[str, Any]


def needs_root(name: str, root: Path | None) -> Path:
    """The folder of a benchmark's files.

    Raises:
        ValueError: If none was given.
    """
    if root is None:
        raise ValueError(f"the benchmark {name} needs root, the folder of its files")
    return root


def choose_split(name: str, split: str | None, splits: Sequence[str]) -> str:
    """The split that was asked for, or the first.

    Raises:
        ValueError: If there is no such split.
    """
    if split is not None and split not in splits:
        raise ValueError(f"the benchmark {name} has the splits {', '.join(splits)}, got {split!r}")
    return split or splits[0]


def find(root: Path, *choices: str) -> Path:
    """The first of several places of a file or folder that exists.

    Raises:
        FileNotFoundError: If there is none; the message says where it was looked for and what is there.
    """
    for choice in choices:
        if (root / choice).exists():
            return root / choice
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; root has to be the folder of the benchmark's files")
    there = ", ".join(sorted(path.name for path in root.iterdir())[:NAMES_SHOWN]) or "nothing"
    raise FileNotFoundError(f"there is no {' and no '.join(choices)} in {root}; found there: {there}")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, is not JSON, or was cut off.
    """
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON, or was cut off: {error}") from error


def read_json_lines(path: Path) -> list[Record]:
    """The objects of a file with one on each line; empty lines are passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, or a line is no JSON object.
    """
    records = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON, or was cut off: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}: line {number} is not an object with named entries")
        records.append(record)
    return records


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError(f"{path} is empty; download it again")
    return text


def records_of(content: Any, part: str, entries: Sequence[str], path: Path) -> list[Record]:
    """The list of records that a file has under a name.

    Raises:
        ValueError: If there is no such list, it is empty, or a record lacks one of the entries.
    """
    records = content.get(part) if isinstance(content, dict) else None
    if not isinstance(records, list):
        raise ValueError(f"{path} has no list {part!r}, so it is not the published file")
    if not records:
        raise ValueError(f"{path}: the list {part!r} is empty")
    for number, record in enumerate(records):
        require_entries(record, entries, f"{path}: record {number} of {part!r}")
    return records


def require_entries(record: Any, entries: Sequence[str], where: str) -> None:
    """Raises ValueError if a record lacks one of the entries."""
    missing = [entry for entry in entries if entry not in record] if isinstance(record, Mapping) else list(entries)
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(map(repr, missing))}")


def refuse_repeated(samples: Sequence[Sample], path: Path) -> None:
    """Raises ValueError if two questions have the same id."""
    seen: set[str] = set()
    repeated = [sample.id for sample in samples if sample.id in seen or seen.add(sample.id)]
    if repeated:
        raise ValueError(f"{path} has the question {repeated[0]} more than once ({len(repeated)} such in all)")


def readable(samples: Sequence[Sample], place: Path, bad_files: str) -> list[Sample]:
    """Questions whose images can be read; each image is decoded once.

    Args:
        samples: Those that will be asked.
        place: Folder of the images, for messages.
        bad_files: ``error`` or ``skip``, as of :func:`zoo.data.report_bad_files`.

    Raises:
        ValueError: If images are bad under ``error``, or none is left under ``skip``.
    """
    if bad_files not in ("error", "skip"):
        raise ValueError(f"bad_files={bad_files!r} must be error or skip")
    files = list(dict.fromkeys(sample.image for sample in samples if sample.image is not None))
    with ThreadPoolExecutor() as pool:
        bar = require("tqdm").tqdm(
            pool.map(_why_bad, files), "checking images", len(files), unit="image", disable=None, leave=False
        )
        bad = {file: reason for file, reason in zip(files, bar, strict=True) if reason}
    report_bad_files({str(file): reason for file, reason in bad.items()}, len(files), place, bad_files)
    good = [sample for sample in samples if sample.image not in bad]
    if not good:
        raise ValueError(f"no question is left whose image in {place} can be read")
    return good


def _why_bad(file: Path) -> str | None:
    return why_unreadable(file) if file.is_file() else "there is no such file"
