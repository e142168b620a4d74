"""Reading checkpoint files without running code from them, and writing weights so that no half file is ever seen."""

import argparse
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["load_checkpoint", "save_weights"]

# Keys under which training scripts keep the weights, best first: published accuracies are of `model`, not of its EMA.
ENVELOPES = ("model", "state_dict", "model_state_dict", "module", "model_ema", "state_dict_ema", "net", "weights")
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile


class _Settings:
    """Stands in for the dicts with attributes that training code keeps its settings in; becomes a plain dict."""

    def __new__(cls, *args: object) -> OrderedDict:
        return OrderedDict()


class _Ignored:
    """Stands in for values beside the weights, which nobody reads; takes anything and keeps nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What authors' files hold beside tensors. The names are read, the classes never imported: a stand-in is made instead.
STAND_INS = (
    (_Settings, "yacs.config.CfgNode"),
    (_Settings, "easydict.EasyDict"),
    (_Settings, "addict.addict.Dict"),
    (_Settings, "mmengine.config.config.ConfigDict"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.core.multiarray._reconstruct"),
    (_Ignored, "numpy._core.multiarray._reconstruct"),
    (_Ignored, "numpy.ndarray"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Ignored, "builtins.getattr"),
    (_Ignored, "pathlib.PosixPath"),
    (_Ignored, "pathlib.WindowsPath"),
)


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a checkpoint file without running code from it.

    Reads ``.safetensors`` and anything ``torch.save`` wrote; of a training checkpoint, the model's weights. Prefixes
    of wrappers are removed from the names.

    Args:
        path: File.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or holds objects other than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with _only_safe_globals(argparse.Namespace, *STAND_INS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is no checkpoint of tensors and plain values, or is damaged: {error}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read; it is damaged, incomplete or no checkpoint: {error}") from error
    return _unwrap(content, path)


@contextmanager
def _only_safe_globals(*allowed: object) -> Iterator[None]:
    """Lets `torch.load` make the allowed classes alone: other libraries allow some of the same names for good,
    and which of two classes of one name is taken would be chance."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(list(allowed)):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside a checkpoint."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in ENVELOPES if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights; its entries are {', '.join(map(str, content)) or 'none'}")
    for prefix in WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def save_weights(state_dict: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes weights as safetensors; the file appears whole or not at all.

    Args:
        state_dict: Tensors by name; ones that share memory are written apart.
        path: File; its folder has to exist.
        metadata: Written into the file's header as strings; None values are left out.

    Raises:
        OSError: If the file cannot be written; nothing is left behind.
    """
    path, tensors, seen = Path(path), {}, set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    header = {"format": "pt", **{key: str(value) for key, value in (metadata or {}).items() if value is not None}}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(f"{path} cannot be written: {error}; free some space or choose another folder") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
