"""Configuration files: YAML and ``key=value`` overrides to the typed settings of a task, and back."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import zoo.configs
from zoo.config.checks import require_choice, require_that
from zoo.config.classification import ClassificationConfig
from zoo.config.clip import ClipConfig
from zoo.config.detection import DetectionConfig
from zoo.config.segmentation import SegmentationConfig
from zoo.config.settings import TrainConfig
from zoo.config.vlm import VlmConfig
from zoo.optional import require

__all__ = ["SCHEMAS", "find_config", "list_configs", "load_config", "save_config"]

SCHEMAS: dict[str, type[TrainConfig]] = {
    "classification": ClassificationConfig,
    "clip": ClipConfig,
    "detection": DetectionConfig,
    "segmentation": SegmentationConfig,
    "vlm": VlmConfig,
}
FREE_FORM = "kwargs."  # within such a section: whatever a constructor takes


def list_configs() -> list[str]:
    """Lists the packaged configurations by path below the package's configs folder, without ``.yaml``."""
    folder = _packaged_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Finds a YAML file.

    Args:
        name: A path, or the end of the name of a packaged configuration: ``classification/vim/micro_digits``,
            ``vim/micro_digits.yaml`` and ``micro_digits`` are the same file. Of several, the one in the fewest folders.

    Raises:
        FileNotFoundError: If there is no such file, or the short name fits several; the message lists candidates.
    """
    if Path(name).is_file():
        return Path(name)
    wanted = name.removesuffix(".yaml")
    known = list_configs()
    fitting = [known_name for known_name in known if f"/{known_name}".endswith(f"/{wanted}")]
    depth = min((known_name.count("/") for known_name in fitting), default=0)
    fitting = [known_name for known_name in fitting if known_name.count("/") == depth]
    if len(fitting) == 1:
        return _packaged_folder() / f"{fitting[0]}.yaml"
    if fitting:
        raise FileNotFoundError(f"the name {name!r} fits several configurations, use one of: {', '.join(fitting)}")
    near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.3) or known
    raise FileNotFoundError(f"no file and no packaged configuration named {name!r}; nearest: {', '.join(near)}")


def load_config(name: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies ``key=value`` overrides.

    Args:
        name: A path or a packaged name, see :func:`find_config`.
        overrides: Settings that win over the file, for example ``["optim.lr=3e-4", "model.kwargs.depth=4"]``.

    Returns:
        The complete configuration, of the class that :data:`SCHEMAS` has for its task.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For an unknown key or a value that does not fit; the message names the key and the file.
    """
    omegaconf = require("omegaconf")
    path = find_config(name)
    for override in overrides:
        require_that("=" in override, f"the command line: {override!r} is not of the form key=value")
    try:
        from_file = omegaconf.OmegaConf.load(path)
    except require("yaml").YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    require_that(omegaconf.OmegaConf.is_dict(from_file), f"{path}: expected keys with values, as in 'seed: 0'")
    from_line = omegaconf.OmegaConf.from_dotlist(list(overrides))
    where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    schema = _schema(from_line.get("task") or from_file.get("task") or "classification", where)
    _check_keys(schema, _dotted(omegaconf.OmegaConf.to_container(from_file)), str(path))
    _check_keys(schema, _dotted(omegaconf.OmegaConf.to_container(from_line)), "the command line")

    default = {"output": f"runs/{path.stem}"}
    try:
        merged = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(schema), default, from_file, from_line)
        return omegaconf.OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: {getattr(error, 'full_key', None) or 'a setting'}: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def save_config(config: TrainConfig, path: str | Path) -> None:
    """Writes the complete configuration as YAML; :func:`load_config` reads it back unchanged."""
    omegaconf = require("omegaconf")
    omegaconf.OmegaConf.save(omegaconf.OmegaConf.create(asdict(config)), Path(path))


def _packaged_folder() -> Path:
    """The folder of the packaged YAML files: ``zoo.configs`` lies beside this package, wherever it was installed."""
    return Path(zoo.configs.__path__[0])


def _schema(task: str, where: str) -> type[TrainConfig]:
    require_choice(f"{where}: task", task, tuple(SCHEMAS))
    return SCHEMAS[task]


def _valid_keys(schema: type, prefix: str = "") -> list[str]:
    """Lists the dotted names of all settings of a dataclass of dataclasses, sections included."""
    keys = []
    for setting in fields(schema):
        keys.append(prefix + setting.name)
        if is_dataclass(setting.type):
            keys += _valid_keys(setting.type, f"{prefix}{setting.name}.")
    return keys


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """Yields the dotted names of everything in a nested dictionary, sections included."""
    for name, value in tree.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")


def _check_keys(schema: type[TrainConfig], keys: Iterable[str], where: str) -> None:
    """Raises ValueError for the first unknown key and names the nearest valid one."""
    valid = _valid_keys(schema)
    for key in keys:
        if key in valid or FREE_FORM in key:
            continue
        section = key.rpartition(".")[0]
        nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
        nearest = nearest or [name for name in valid if name.rpartition(".")[2] == key.rpartition(".")[2]]
        siblings = [name for name in valid if name.rpartition(".")[0] == section]
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are: {', '.join(siblings or valid)}"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")
