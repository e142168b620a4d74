"""Published weights: from their authors' servers, checked and converted once, to a file that every later load reads."""

import contextlib
import difflib
import hashlib
import os
import re
import sys
import urllib.parse
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import timm
from timm.models import PretrainedCfg
from torch import Tensor

from zoo import backbones
from zoo.backbones.layers.backbone import checkpoint_filter
from zoo.version import __version__
from zoo.weights.cache import Record, cache_folder, file_hash, find, locked, read_record, writable_folder, write_record
from zoo.weights.checkpoint import load_checkpoint, save_weights
from zoo.weights.fit import build_on_meta, differences, misfit
from zoo.weights.transfer import DownloadError, download

__all__ = [
    "cached_weights",
    "convert_checkpoint",
    "fetch_pretrained",
    "licence_note",
    "pretrained_overlay",
    "verify_pretrained",
]

HUB = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "ZOO_OFFLINE")  # variables that forbid downloads

_announced: set[str] = set()  # models whose licence this process has printed


@dataclass(frozen=True)
class Source:
    """A place where a checkpoint can be had.

    Args:
        url: Address of the file.
        hub: Repository, file name and revision on the Hugging Face hub; None for other servers.
    """

    url: str
    hub: tuple[str, str, str | None] | None = None

    @property
    def suffix(self) -> str:
        return PurePosixPath(urllib.parse.urlsplit(self.url).path).suffix or ".pth"


def pretrained_overlay(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What to add to a pretrained config so that timm's loader reads weights from this machine.

    Args:
        cfg: Config whose weights are wanted; they are downloaded if they are not in the cache.
        cache_dir: Folder of the cache; default as :func:`zoo.weights.cache_folder` says.

    Returns:
        ``{"file": path}`` of converted weights; ``{"state_dict": weights}`` of a checkpoint that does not fit the
        registered variant, and so can be meant for a model with other arguments only; empty if the config has
        weights at hand, names none, or is of ``hf-hub:`` or ``local-dir:``, which timm reads itself.

    Raises:
        OSError: If the weights cannot be downloaded or written.
        ValueError: If what came is no checkpoint.
    """
    if cfg.source or cfg.state_dict or cfg.file or not (cfg.hf_hub_id or cfg.url):
        return {}
    path, record = _fetch(cfg, cache_dir)
    return {"file": str(path)} if record.converted else {"state_dict": load_checkpoint(path)}


def fetch_pretrained(model_name: str, *, force: bool = False, cache_dir: str | Path | None = None) -> Path:
    """Downloads and converts the weights of a model, unless that was done before.

    Args:
        model_name: ``name.tag``, or a name for its first tag.
        force: Whether to download again; the file has to be the same as the first time.
        cache_dir: Folder of the cache; default as :func:`zoo.weights.cache_folder` says.

    Returns:
        Converted weights, a ``.safetensors`` file.

    Raises:
        OSError: If the weights cannot be downloaded or written.
        ValueError: If there is no such model, no weights of it are published, or what came does not fit it.
    """
    cfg = _config(model_name)
    if cfg.file:
        return Path(cfg.file)
    if not (cfg.hf_hub_id or cfg.url):
        advice = f"; look at {cfg.origin_url} and give a copy as checkpoint_path" if cfg.origin_url else ""
        raise ValueError(f"no weights of {model_name} are published{advice}")
    path, record = _fetch(cfg, cache_dir, force)
    if not record.converted:
        _converted(load_checkpoint(path), cfg, strict=True)
    return path


def cached_weights(model_name: str, cache_dir: str | Path | None = None) -> Path | None:
    """The converted weights of a model if they are on this machine, in the cache or in the package, else None."""
    cfg = _config(model_name)
    if cfg.file:
        return Path(cfg.file)
    found = find(cache_folder(cache_dir), _stem(cfg))
    return found[0] if found else None


def verify_pretrained(model_name: str, cache_dir: str | Path | None = None) -> Path | None:
    """Reads the cached weights of a model whole: digest, structure, names and shapes.

    Returns:
        The file, or None if the weights are not cached.

    Raises:
        ValueError: If the file is damaged or does not fit; the message says how to replace it.
    """
    cfg = _config(model_name)
    folder = cache_folder(cache_dir)
    record = read_record(folder, _stem(cfg))
    path = Path(cfg.file) if cfg.file else folder / record.file if record else None
    if path is None or not path.exists():
        return None
    again = f"fetch it again: python -m zoo.tools.weights fetch --force {model_name}"
    if record is not None and find(folder, _stem(cfg), verify=True) is None:
        raise ValueError(f"{path} is not what was downloaded; {again}")
    try:
        _converted(load_checkpoint(path), cfg, strict=True)
    except ValueError as error:
        raise ValueError(f"{error} {'' if cfg.file else again}".rstrip()) from None
    return path


def convert_checkpoint(path: str | Path, model_name: str, output: str | Path) -> int:
    """Converts a checkpoint file to the names and shapes of a model, as safetensors.

    Args:
        path: Checkpoint, the authors' or ours; see :func:`zoo.weights.load_checkpoint`.
        model_name: Model, with or without tag.
        output: File to write, ``.safetensors``.

    Returns:
        Number of tensors.

    Raises:
        ValueError: If the checkpoint is damaged or does not fit; the message names the models that it fits. If the
            output's name does not end in ``.safetensors``.
    """
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"{output} does not end in .safetensors, which is what is written")
    cfg = _config(model_name)
    weights = _converted(load_checkpoint(path), cfg, strict=True)
    save_weights(weights, output, {"model": model_name, "source": Path(path).name, "license": cfg.license})
    return len(weights)


def licence_note(cfg: PretrainedCfg) -> str:
    """Where weights come from and what their licence is, in a line."""
    licence = (cfg.license or "unknown").lower()
    if licence in ("unknown", "other"):
        terms = "no licence stated: ask the authors before you use or share them"
    elif re.search(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research", licence):
        terms = f"license {cfg.license}: NOT FOR COMMERCIAL USE"
    else:
        terms = f"license {cfg.license}"
    return f"weights of {cfg.origin_url or cfg.hf_hub_id or cfg.url}; {terms}"


def _config(model_name: str) -> PretrainedCfg:
    try:
        return timm.get_pretrained_cfg(model_name, allow_unregistered=False)
    except RuntimeError:
        known = difflib.get_close_matches(model_name, timm.list_models(module=backbones.FAMILIES, pretrained=True))
        advice = f"did you mean {', '.join(known)}" if known else "see zoo.list_models() and zoo.list_pretrained()"
        raise ValueError(f"there is no model {model_name!r}; {advice}") from None


def _name(cfg: PretrainedCfg) -> str:
    return ".".join(filter(None, (cfg.architecture, cfg.tag)))


def _stem(cfg: PretrainedCfg) -> str:
    """Name of a config's files in the cache: the model's, and a digest of what else decides what is in them."""
    if not (cfg.hf_hub_id or cfg.url):
        return _name(cfg)
    decisive = f"{_sources(cfg)[0].url} {tuple(cfg.input_size)} {cfg.fixed_input_size} {cfg.num_classes}"
    return f"{_name(cfg)}-{hashlib.sha256(decisive.encode()).hexdigest()[:8]}"


def _sources(cfg: PretrainedCfg) -> list[Source]:
    """Where to look, in order: the hub, then the origin."""
    sources = []
    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        for name in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin"):
            url = f"{HUB}/{repository}/resolve/{revision or 'main'}/{name}"
            sources.append(Source(url, (repository, name, revision or None)))
    if cfg.url:
        sources.append(Source(cfg.url if isinstance(cfg.url, str) else cfg.url[0]))
    return sources


def _expected(cfg: PretrainedCfg, source: Source) -> tuple[str | None, int | None]:
    """SHA-256 and size that the config states: ``sha256=`` and ``size=`` in its notes, or a digest in the file name."""
    notes = dict(note.split("=", 1) for note in cfg.notes or () if "=" in note)
    in_name = re.search(r"-([0-9a-f]{8,64})\.", source.url.rpartition("/")[2])
    return notes.get("sha256") or (in_name and in_name.group(1)), int(notes["size"]) if "size" in notes else None


def _fetch(cfg: PretrainedCfg, cache_dir: str | Path | None, force: bool = False) -> tuple[Path, Record]:
    """The file of a config's weights in the cache and its record, downloaded if need be."""
    stem, folder = _stem(cfg), cache_folder(cache_dir)
    _announce(cfg)
    found = None if force else find(folder, stem)
    if found and _is_current(cfg, found[0], found[1]):
        return found
    folder = writable_folder(folder)
    with locked(folder, stem):
        found = None if force else find(folder, stem)  # somebody else may have been faster
        if found and _is_current(cfg, found[0], found[1]):
            return found
        return _download_and_convert(cfg, folder, stem, cache_dir)


def _is_current(cfg: PretrainedCfg, path: Path, record: Record) -> bool:
    """Whether weights converted by another version of this package still have the names that this one uses."""
    if not record.converted or record.version == __version__:
        return True
    try:
        _converted(load_checkpoint(path), cfg, strict=True)
    except ValueError:
        return False
    with contextlib.suppress(OSError):  # the folder may be read-only
        write_record(path.parent, _stem(cfg), replace(record, version=__version__))
    return True


def _announce(cfg: PretrainedCfg) -> None:
    """Prints origin and licence, once per model and process."""
    name = _name(cfg)
    if name not in _announced:
        _announced.add(name)
        sys.stderr.write(f"{name}: {licence_note(cfg)}\n")


def _download_and_convert(
    cfg: PretrainedCfg, folder: Path, stem: str, cache_dir: str | Path | None
) -> tuple[Path, Record]:
    """Tries one source after the other; the caller holds the lock."""
    known = read_record(folder, stem)
    problems = []
    for source in _sources(cfg):
        original = folder / f"{stem}.original{source.suffix}"
        try:
            path, digest = _get(source, original, cfg, cache_dir)
            if known is not None and known.source == source.url and known.sha256 != digest:
                raise DownloadError(
                    f"{source.url} is not the file of the first time (SHA-256 {digest}, then {known.sha256}); if the "
                    f"authors replaced it, delete {folder / stem}.json to accept the new one"
                )
            state_dict = load_checkpoint(path)
        except DownloadError as error:
            original.unlink(missing_ok=True)
            problems.append(str(error).rstrip("."))
            continue
        except ValueError as error:
            original.unlink(missing_ok=True)
            problems.append(f"{source.url} gave a file that is not used: {error}")
            continue
        return _keep(state_dict, path, original, digest, source, cfg, stem)
    raise DownloadError(
        f"the weights of {_name(cfg)} could not be had: {'; '.join(problems)}. A copy from elsewhere can be given as "
        f"checkpoint_path, or set ZOO_MIRROR to a server that has a copy. Origin: {cfg.origin_url or cfg.url}"
    )


def _get(source: Source, original: Path, cfg: PretrainedCfg, cache_dir: str | Path | None) -> tuple[Path, str]:
    """Brings the file of a source to this machine; returns where it is and its SHA-256."""
    sha256, size = _expected(cfg, source)
    mirror = os.environ.get("ZOO_MIRROR", "").rstrip("/")
    forbidding = next((v for v in OFFLINE if os.environ.get(v, "").lower() in ("1", "on", "true", "yes")), None)
    if source.hub and not mirror:
        path = _from_hub(source, forbidding, cache_dir)
        digest = file_hash(path)
        if (sha256 and not digest.startswith(sha256.lower())) or (size and path.stat().st_size != size):
            raise DownloadError(f"{path} has the SHA-256 {digest} instead of {sha256}; delete it")
    elif forbidding:
        raise DownloadError(f"{source.url} is not in the cache, and {forbidding} forbids downloads; unset it")
    else:
        url = re.sub(r"^https?://[^/]+", lambda _: mirror, source.url) if mirror else source.url
        path, (digest, _) = original, download(url, original, sha256=sha256, size=size, label=source.url.split("/")[-1])
    if sha256 is None:
        _check_archive(path)
    return path, digest


def _from_hub(source: Source, forbidding: str | None, cache_dir: str | Path | None) -> Path:
    """A file of the Hugging Face hub, through its own library and cache."""
    from huggingface_hub import hf_hub_download

    repository, name, revision = source.hub
    try:
        return Path(
            hf_hub_download(
                repository, name, revision=revision, cache_dir=cache_dir, local_files_only=forbidding is not None
            )
        )
    except Exception as error:  # the library lets through what its HTTP client raises, and that differs by version
        if forbidding:
            raise DownloadError(f"{source.url} is not in the cache, and {forbidding} forbids downloads") from error
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DownloadError(f"{source.url}: {type(error).__name__}: {reason}") from error


def _check_archive(path: Path) -> None:
    """Compares the checksums inside a file of ``torch.save`` with its contents, which ``torch.load`` does not."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            damaged = error
        if damaged:
            raise ValueError(f"{path} is damaged at {damaged}")


def _keep(
    state_dict: Mapping[str, Tensor],
    path: Path,
    original: Path,
    digest: str,
    source: Source,
    cfg: PretrainedCfg,
    stem: str,
) -> tuple[Path, Record]:
    """Writes converted weights and their record, and removes the original."""
    size = path.stat().st_size
    weights = _converted(state_dict, cfg, strict=False)
    kept = original if weights is None else original.with_name(f"{stem}.safetensors")
    if weights is not None:
        header = {"model": _name(cfg), "source": source.url, "license": cfg.license}
        save_weights(weights, kept, {**header, "origin": cfg.origin_url})
    elif path != original:  # in the hub's cache, which may be emptied
        kept = original.with_name(f"{stem}.original.safetensors")
        save_weights(state_dict, kept)
    status = kept.stat()
    record = Record(
        source=source.url,
        sha256=digest,
        size=size,
        file=kept.name,
        converted=weights is not None,
        file_sha256=file_hash(kept),
        file_size=status.st_size,
        file_mtime_ns=status.st_mtime_ns,
        version=__version__,
    )
    write_record(original.parent, stem, record)
    if kept != original:
        original.unlink(missing_ok=True)
    return kept, record


def _converted(state_dict: Mapping[str, Tensor], cfg: PretrainedCfg, strict: bool) -> dict[str, Tensor] | None:
    """Weights in the names and shapes of the registered variant; if they do not fit, None or an error."""
    model = build_on_meta(cfg.architecture, pretrained_cfg=cfg)
    try:
        converted = checkpoint_filter(model)(state_dict, model)
        problems = differences(converted, model.state_dict())
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        converted, problems = {}, [f"the names are of another family ({error})"]
    if not problems:
        return converted
    if strict:
        raise misfit(cfg.architecture, problems, state_dict)
    return None
