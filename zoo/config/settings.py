"""Settings that training has whatever the task: the model, the optimiser, the run."""

from dataclasses import dataclass, field
from typing import Any

from zoo.config.checks import require_choice, require_range, require_that

__all__ = ["ModelConfig", "OptimConfig", "TrainConfig"]


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
        require_range("model.drop_path", self.drop_path, 0, 1)


@dataclass
class OptimConfig:
    """Optimiser and learning rate.

    Attributes:
        name: timm's optimiser name, for example ``adamw``, ``sgd``, ``lamb``.
        lr: Peak learning rate of an update, whatever its number of images, unless ``lr_batch_size`` is set.
        lr_batch_size: Images per update, over all processes and ``grad_accum``, for which ``lr``, ``warmup_lr`` and
            ``min_lr`` are meant: with another number they are scaled in proportion. Default no scaling.
        weight_decay: Weight decay; biases, norms and what the model's ``no_weight_decay()`` names are left out.
        betas: The two momenta of Adam-like optimisers; default the optimiser's own.
        layer_decay: Learning-rate factor from each layer to the one before it, for fine-tuning; default none.
        schedule: timm's schedule name, stepped per update: ``cosine``, ``poly``, ``multistep``, ...
        power: Exponent of ``poly``.
        milestones: Epochs after which ``multistep`` multiplies the learning rate by ``decay_rate``.
        decay_rate: Factor of ``multistep`` and ``step``.
        epochs: Passes over the training data, or stretches of ``epoch_updates``. After each the model is evaluated.
        epoch_updates: Updates per epoch, for recipes that count updates; default as many as one pass over the data has.
        warmup_epochs: Linear warm-up at the start, part of ``epochs``.
        warmup_updates: Length of the warm-up in updates; it wins over ``warmup_epochs``.
        warmup_lr: Learning rate that the warm-up starts from; default a hundredth of ``lr``.
        min_lr: Learning rate at the end.
        cooldown_epochs: Epochs with ``min_lr`` at the end, part of ``epochs``.
        clip_grad: Largest gradient norm; default no clipping.
        grad_accum: Batches per update.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_batch_size: int | None = None
    weight_decay: float = 0.05
    betas: list[float] | None = None
    layer_decay: float | None = None
    schedule: str = "cosine"
    power: float = 1.0
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    epochs: int = 100
    epoch_updates: int | None = None
    warmup_epochs: int = 5
    warmup_updates: int | None = None
    warmup_lr: float | None = None
    min_lr: float = 1e-6
    cooldown_epochs: int = 0
    clip_grad: float | None = 1.0
    grad_accum: int = 1

    def __post_init__(self) -> None:
        require_range("optim.lr", self.lr, 0)
        require_range("optim.lr_batch_size", 1 if self.lr_batch_size is None else self.lr_batch_size, 1)
        require_range("optim.warmup_lr", self.warmup_lr or 0, 0)
        require_range("optim.weight_decay", self.weight_decay, 0)
        require_range("optim.epochs", self.epochs, 1)
        require_range("optim.epoch_updates", 1 if self.epoch_updates is None else self.epoch_updates, 1)
        require_range("optim.warmup_epochs", self.warmup_epochs, 0, self.epochs)
        require_range("optim.warmup_updates", self.warmup_updates or 0, 0)
        require_that(
            self.schedule != "multistep" or bool(self.milestones),
            "optim.schedule=multistep needs optim.milestones, the epochs after which the learning rate drops",
        )
        require_range("optim.cooldown_epochs", self.cooldown_epochs, 0, self.epochs - max(self.warmup_epochs, 1))
        require_range("optim.grad_accum", self.grad_accum, 1)

    @property
    def part_lr(self) -> dict[str, float]:
        """Peak learning rates of the model's parts, by their names, if they have their own."""
        return {}


@dataclass
class TrainConfig:
    """What every run has, whatever its task; the tasks add their data and augmentation.

    Attributes:
        task: What the model learns: ``classification``, ...; decides which other settings there are.
        model: The model.
        optim: The optimiser.
        output: Folder of the run: config, log, checkpoints; default ``runs/<name of the YAML file>``.
        resume: ``auto`` continues the run in ``output`` if there is one; a path continues from that checkpoint; default
            starts anew and refuses a folder that already holds a run.
        checkpoint_every: Updates after which a state is saved within an epoch, for epochs of hours; default saves after
            every epoch only.
        strategy: What several processes share: ``ddp``, each holds the whole model; or ``fsdp``, weights, gradients and
            the optimizer's state are divided among them, for models that are too large for one device.
        seed: Seed of initial weights, order and augmentation.
        precision: ``fp32``, or ``bf16`` or ``fp16`` automatic mixed precision.
        compile: Run the model through ``torch.compile``.
        cuda_graph: Replay the model's forward and backward from CUDA graphs, several times as fast where kernels are
            short: small models, small images. For one GPU, without ``compile``. Of segmentors, detectors, CLIP and
            vision-language models it is the backbones or vision towers that are captured.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time. ``block`` for whole
            blocks; ``scan`` in Vim and its relatives for what lies between a mixer's projections; default none.
        ema_decay: Decay per update of a moving average of the weights, which is then what is evaluated and kept;
            default none.
        cpu: Train on the CPU even if there is a GPU.
        tensorboard: Write the log for TensorBoard too, into the run's folder ``tensorboard``.
    """

    task: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: str = "runs/train"
    resume: str | None = None
    checkpoint_every: int | None = None
    strategy: str = "ddp"
    seed: int = 0
    precision: str = "fp32"
    compile: bool = False
    cuda_graph: bool = False
    grad_checkpointing: str | None = None
    ema_decay: float | None = None
    cpu: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        require_choice("strategy", self.strategy, ("ddp", "fsdp"))
        require_choice("precision", self.precision, ("fp32", "bf16", "fp16"))
        require_choice("grad_checkpointing", self.grad_checkpointing, (None, "block", "scan"))
        require_range("checkpoint_every", 1 if self.checkpoint_every is None else self.checkpoint_every, 1)
        require_that(
            not (self.compile and self.cuda_graph), "compile and cuda_graph exclude each other; set one to false"
        )
