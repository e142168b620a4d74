"""Training configuration: typed dataclasses filled from a YAML file and ``key=value`` overrides.

The dataclasses below are the complete list of settings, their units and their defaults. A YAML file under ``configs/``
holds only what differs. An unknown key is an error that names the nearest valid one.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import zoo.configs
from zoo.optional import require

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "find_config",
    "list_configs",
    "load_config",
    "save_config",
]

FREE_FORM = "model.kwargs."  # whatever the model's constructor takes


@dataclass
class ModelConfig:
    """Which model is trained.

    Attributes:
        name: A name that ``zoo.create_model`` knows, ours or timm's; default ``vim_micro``.
        pretrained: Start from the published weights of that name.
        checkpoint: Start from these weights instead (a file; not a run to resume, see ``TrainConfig.resume``).
        num_classes: Size of the classifier; default the number of classes in the data.
        drop_path: Stochastic depth rate of the last block, 0 to 1.
        kwargs: Further constructor arguments, for example ``{patch_size: 2}``.
    """

    name: str = "vim_micro"
    pretrained: bool = False
    checkpoint: str | None = None
    num_classes: int | None = None
    drop_path: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_range("model.drop_path", self.drop_path, 0, 1)


@dataclass
class DataConfig:
    """Which images are used and how they are read.

    Attributes:
        name: ``digits`` (inside scikit-learn), ``fashion_mnist``, ``folder`` (``root/<split>/<class>/<image>``),
            ``tar`` (``root/<split>.tar`` or ``root/<split>/*.tar`` holding such class folders), or any name with a
            prefix that timm reads: ``wds/...``, ``hfds/...``, ``hfids/...``, ``tfds/...``, ``torch/...``.
        root: Folder of the data.
        train_split: Name of the training split (a sub-folder for ``folder``).
        val_split: Name of the split that is evaluated after every epoch.
        train_samples: Use this many training images of ``digits`` and ``fashion_mnist``, default all; or how many a
            stream has (``wds/``) that cannot tell.
        val_samples: Number of validation images, likewise.
        download: Fetch data sets that can be fetched if they are not on this machine.
        bad_files: What to do with truncated and non-image files in a folder: ``error``, or ``skip`` with a report.
        img_size: Side of the square images that the model sees, in pixels; default the data's own size for ``digits``
            and ``fashion_mnist``, the model's for files.
        in_chans: Image channels, 1 or 3; default 1 for ``digits`` and ``fashion_mnist``, 3 for files.
        mean: Per-channel mean that is subtracted (images in 0..1); default the data's or the model's.
        std: Per-channel standard deviation that is divided by, likewise.
        batch_size: Images per step and process.
        workers: Processes that decode files; unused for data held in memory.
    """

    name: str = "digits"
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    train_samples: int | None = None
    val_samples: int | None = None
    download: bool = True
    bad_files: str = "error"
    img_size: int | None = None
    in_chans: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    batch_size: int = 128
    workers: int = 4

    def __post_init__(self) -> None:
        _require_choice("data.bad_files", self.bad_files, ("error", "skip"))
        _require_range("data.batch_size", self.batch_size, 1)
        _require_range("data.workers", self.workers, 0)
        if self.in_chans is not None:
            _require_choice("data.in_chans", self.in_chans, (1, 3))


@dataclass
class AugmentConfig:
    """What is done to training images. Evaluation images are only resized, cropped at the centre and normalised.

    Attributes:
        min_scale: Random resized crop keeps at least this share of the area (files only); 1 keeps everything.
        color_jitter: Strength of brightness, contrast and saturation jitter (files only).
        auto_augment: timm's augmentation policy, for example ``rand-m9-mstd0.5-inc1`` for RandAugment (files only).
        crop_padding: Shift by up to this many pixels in each direction, filled with zeros.
        flip: Probability of a horizontal flip.
        erase: Probability that a random rectangle is replaced by noise.
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off.
        mix_prob: Probability that a batch is mixed when mixup or cutmix is on.
        label_smoothing: Share of the target spread evenly over all classes, 0 to 1.
    """

    min_scale: float = 0.08
    color_jitter: float = 0.0
    auto_augment: str | None = None
    crop_padding: int = 0
    flip: float = 0.5
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_scale", "flip", "erase", "mix_prob", "label_smoothing"):
            _require_range(f"augment.{name}", getattr(self, name), 0, 1)
        for name in ("color_jitter", "crop_padding", "mixup", "cutmix"):
            _require_range(f"augment.{name}", getattr(self, name), 0)


@dataclass
class OptimConfig:
    """Optimiser and learning rate.

    Attributes:
        name: timm's optimiser name, for example ``adamw``, ``sgd``, ``lamb``.
        lr: Peak learning rate, used as given (not scaled with the batch size).
        weight_decay: Weight decay; biases, norms and what the model's ``no_weight_decay()`` names are left out.
        betas: The two momenta of Adam-like optimisers; default the optimiser's own.
        layer_decay: Learning-rate factor from each layer to the one before it, for fine-tuning; default none.
        schedule: timm's schedule name, stepped per update.
        epochs: Passes over the training data.
        warmup_epochs: Linear warm-up at the start, part of ``epochs``.
        min_lr: Learning rate at the end.
        clip_grad: Largest gradient norm; default no clipping.
        grad_accum: Batches per update.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: list[float] | None = None
    layer_decay: float | None = None
    schedule: str = "cosine"
    epochs: int = 100
    warmup_epochs: int = 5
    min_lr: float = 1e-6
    clip_grad: float | None = 1.0
    grad_accum: int = 1

    def __post_init__(self) -> None:
        _require_range("optim.lr", self.lr, 0)
        _require_range("optim.weight_decay", self.weight_decay, 0)
        _require_range("optim.epochs", self.epochs, 1)
        _require_range("optim.warmup_epochs", self.warmup_epochs, 0, self.epochs)
        _require_range("optim.grad_accum", self.grad_accum, 1)


@dataclass
class TrainConfig:
    """Everything that ``zoo.engine.train`` needs.

    Attributes:
        model: The model.
        data: The images.
        augment: The augmentation.
        optim: The optimiser.
        output: Folder of the run: config, log, checkpoints; default ``runs/<name of the YAML file>``.
        resume: ``auto`` continues the run in ``output`` if there is one; a path continues from that checkpoint; default
            starts anew and refuses a folder that already holds a run.
        seed: Seed of initial weights, order and augmentation.
        precision: ``fp32``, or ``bf16`` or ``fp16`` automatic mixed precision.
        compile: Run the model through ``torch.compile``.
        cuda_graph: Replay the model's forward and backward from CUDA graphs, several times as fast where kernels are
            short: small models, small images. For one GPU, without ``compile``.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time. ``block`` for whole
            blocks; ``scan`` in Vim and its relatives for what lies between a mixer's projections; default none.
        ema_decay: Decay per update of a moving average of the weights, which is then what is evaluated and kept;
            default none.
        cpu: Train on the CPU even if there is a GPU.
        tensorboard: Write the log for TensorBoard too, into the run's folder ``tensorboard``.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: str = "runs/train"
    resume: str | None = None
    seed: int = 0
    precision: str = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    grad_checkpointing: str | None = None
    ema_decay: float | None = None
    cpu: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _require_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        _require_choice("grad_checkpointing", self.grad_checkpointing, (None, "block", "scan"))
        _require(not (self.compile and self.cuda_graph), "compile and cuda_graph exclude each other; set one to false")
        mixing = self.augment.mixup > 0 or self.augment.cutmix > 0
        _require(
            not mixing or self.data.batch_size % 2 == 0,
            f"mixup and cutmix pair the images of a batch: data.batch_size must be even, got {self.data.batch_size}",
        )


def list_configs() -> list[str]:
    """Lists the packaged configurations by path below the package's configs folder, without ``.yaml``."""
    folder = _packaged_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Finds a YAML file.

    Args:
        name: A path, or the end of the name of a packaged configuration: ``classification/vim/micro_digits``,
            ``vim/micro_digits.yaml`` and ``micro_digits`` are the same file.

    Raises:
        FileNotFoundError: If there is no such file, or the short name fits several; the message lists candidates.
    """
    if Path(name).is_file():
        return Path(name)
    wanted = name.removesuffix(".yaml")
    known = list_configs()
    fitting = [known_name for known_name in known if f"/{known_name}".endswith(f"/{wanted}")]
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
        The complete configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For an unknown key or a value that does not fit; the message names the key and the file.
    """
    omegaconf = require("omegaconf")
    path = find_config(name)
    for override in overrides:
        _require("=" in override, f"the command line: {override!r} is not of the form key=value")
    try:
        from_file = omegaconf.OmegaConf.load(path)
    except require("yaml").YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    _require(omegaconf.OmegaConf.is_dict(from_file), f"{path}: expected keys with values, as in 'seed: 0'")
    from_line = omegaconf.OmegaConf.from_dotlist(list(overrides))
    _check_keys(_dotted(omegaconf.OmegaConf.to_container(from_file)), str(path))
    _check_keys(_dotted(omegaconf.OmegaConf.to_container(from_line)), "the command line")

    where = f"{path} with {' '.join(overrides)}" if overrides else str(path)
    default = {"output": f"runs/{path.stem}"}
    try:
        merged = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.structured(TrainConfig), default, from_file, from_line)
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


def _check_keys(keys: Iterable[str], where: str) -> None:
    """Raises ValueError for the first unknown key and names the nearest valid one."""
    valid = _valid_keys(TrainConfig)
    for key in keys:
        if key in valid or key.startswith(FREE_FORM):
            continue
        section = key.rpartition(".")[0]
        nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
        nearest = nearest or [name for name in valid if name.rpartition(".")[2] == key.rpartition(".")[2]]
        siblings = [name for name in valid if name.rpartition(".")[0] == section]
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys are: {', '.join(siblings or valid)}"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_range(key: str, value: float, low: float, high: float = math.inf) -> None:
    limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
    _require(low <= value <= high, f"{key} must be {limits}, got {value}")


def _require_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    _require(value in choices, f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")
