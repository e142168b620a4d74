"""Vision-language models by name, or put together from any vision model, connector and language model.

    model = create_vlm("cobra_3b", checkpoint_path="latest-checkpoint.pt")
    model = create_vlm(vision="vim_tiny_patch16_224", connector="mlp_connector", language=MambaConfig(...))
    trained = load_vlm("runs/vlm_nano_fashion_scenes")

Named models are as published: Cobra (arXiv 2403.14520), ML-Mamba (arXiv 2407.19832) and VL-Mamba (arXiv 2403.13600,
whose connector is known from the paper alone).
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.factory import create_model
from zoo.heads.registry import create_head, list_heads
from zoo.heads.vlm import (
    ChatFormat,
    DecoderState,
    VisionEncoder,
    VisionLanguageModel,
    create_decoder,
    flatten_sections,
    mamba_config,
)
from zoo.optional import require
from zoo.weights import load_checkpoint, load_into, save_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from zoo.engine.checkpoint import ModelCard

__all__ = ["TrainedVLM", "create_vlm", "list_vlms", "load_state", "load_vlm", "load_vlm_checkpoint", "save_state"]

DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384.webli"
IMG_SIZE = 384  # pixels, in all published models
CHANNELS = {DINO: 1024, SIGLIP: 1152}
MAMBA_2_8B = dict(d_model=2560, n_layer=64, vocab_size=50277)
MAMBA2_2_7B = dict(MAMBA_2_8B, ssm_cfg={"layer": "Mamba2"})


@dataclass(frozen=True)
class _Published:
    """What a published model consists of; ``language`` is a configuration of Mamba's authors."""

    vision: tuple[str, ...]
    connector: str
    language: Mapping[str, Any]


PUBLISHED = {
    "cobra_3b": _Published((DINO, SIGLIP), "fused_mlp_connector", MAMBA_2_8B),
    "cobra_ldpnet_3b": _Published((DINO, SIGLIP), "ldp_connector", MAMBA_2_8B),
    "cobra_siglip_3b": _Published((SIGLIP,), "mlp_connector", MAMBA_2_8B),
    "mlmamba_3b": _Published((DINO, SIGLIP), "mamba2_scan_connector", MAMBA2_2_7B),
    "vl_mamba_3b": _Published((SIGLIP,), "mmc_connector", MAMBA_2_8B),
}


def list_vlms() -> list[str]:
    """Names of published vision-language models."""
    return sorted(PUBLISHED)


def create_vlm(
    name: str | None = None,
    *,
    vision: str | nn.Module | Sequence[str | nn.Module] | None = None,
    connector: str | nn.Module | None = None,
    language: "PreTrainedModel | PretrainedConfig | str | Path | None" = None,
    image_token_id: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    vision_layer: int = -2,
    vision_channels: int | None = None,
    pretrained_vision: bool = False,
    connector_args: Mapping[str, Any] | None = None,
    zoo_kernels: bool = True,
    checkpoint_path: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VisionLanguageModel:
    """Creates a vision-language model.

    Args:
        name: One of :func:`list_vlms`; other arguments replace its parts. Without it ``vision``, ``connector`` and
            ``language`` are needed.
        vision: Name of a model of this zoo or of timm, or such a model, or several whose features are concatenated by
            channel. An empty sequence leaves the encoder out: the model then takes features.
        connector: One of ``list_heads("connector")``, or a module that is called with features and their grid.
        language: Causal language model of transformers, its configuration, or a repository or folder; see
            :func:`zoo.heads.vlm.create_decoder`.
        image_token_id: Token that images take the place of. Default: images come before the text.
        img_size: Side (or height and width) of images, for vision models that have to know it.
        vision_layer: Block (or stage) of the vision models whose features are taken; default the second-to-last.
        vision_channels: Channels of the features, for models without encoder.
        pretrained_vision: Whether named vision models load their pretrained weights.
        connector_args: Further arguments of a named connector.
        zoo_kernels: Whether the decoder's Mamba mixers run on this package's kernels.
        checkpoint_path: Weights to load, as of :func:`load_vlm_checkpoint`.
        device: Where the model is built; default the CPU.
        dtype: Dtype of its parameters; default float32.

    Raises:
        ModuleNotFoundError: If transformers is not installed; the message says how to install it.
        ValueError: If there is no such model or connector, or a part is missing.
    """
    require("transformers", "vlm")
    args = dict(connector_args or {})
    if name is not None:
        published = _published(name)
        if connector is None:
            connector = published.connector
        if not isinstance(vision, nn.Module) and vision is not None and not len(vision):
            vision_channels = vision_channels or sum(CHANNELS[tower] for tower in published.vision)
        if vision is None:
            vision, img_size = published.vision, img_size or IMG_SIZE
        language = mamba_config(published.language) if language is None else language
    missing = [
        part for part, given in (("vision", vision), ("connector", connector), ("language", language)) if given is None
    ]
    if missing:
        raise ValueError(f"without the name of a published model, give {', '.join(missing)} too")

    encoder = _vision_encoder(vision, vision_layer, img_size, pretrained_vision, device, dtype)
    decoder = create_decoder(language, zoo_kernels=zoo_kernels, device=device, dtype=dtype)
    channels = vision_channels if encoder is None else encoder.num_features
    if isinstance(connector, str):
        if channels is None:
            raise ValueError("without a vision encoder, vision_channels has to say how many channels features have")
        if connector not in list_heads("connector"):
            raise ValueError(f"there is no connector {connector!r}; there are {', '.join(list_heads('connector'))}")
        connector = create_head(
            connector, channels, decoder.get_input_embeddings().embedding_dim, **args, device=device, dtype=dtype
        )
    elif args:
        raise ValueError("connector_args are for connectors given by name; this one is there already")
    model = VisionLanguageModel(encoder, connector, decoder, image_token_id)
    if checkpoint_path is not None:
        load_into(model, load_vlm_checkpoint(checkpoint_path))
    return model


def load_vlm_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights of a vision-language model, ours or a released file with sections, without running code.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors" or not path.is_file():
        return load_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        Exception
    ):  # other formats than zip files of plain values: the other reader takes them, or says what is wrong
        return load_checkpoint(path)
    content = content.get("model", content) if isinstance(content, Mapping) else {}
    tensors = flatten_sections(content)
    if not tensors:
        raise ValueError(f"{path} holds no weights")
    return tensors


@dataclass(frozen=True)
class TrainedVLM:
    """A vision-language model that this package trained, and what is needed to talk to it.

    Attributes:
        model: The model, in evaluation mode; adapters are merged into its weights.
        tokenizer: See :mod:`zoo.data.chat_tokenizers`; an answer ends with its ``eos_token_id``.
        chat_format: How conversations are written.
        image_size: Height and width of images in pixels.
        image_token_id: Token where images stand in the text; None: they come before the text.
        card: All that is known of the model; its ``preprocessing`` says how images are resized.
    """

    model: VisionLanguageModel
    tokenizer: Any
    chat_format: ChatFormat
    image_size: tuple[int, int]
    image_token_id: int | None
    card: "ModelCard"


def load_vlm(path: str | Path, device: torch.device | str | None = None) -> TrainedVLM:
    """Loads a vision-language model that this package trained.

    Args:
        path: A run's folder, for its best weights, or a ``.safetensors`` file.
        device: Where the model goes; default the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or of something else.
        ModuleNotFoundError: If transformers is not installed, or peft for a model with adapters.
    """
    from zoo.data.chat_tokenizers import restore_tokenizer
    from zoo.engine.checkpoint import load_trained, read_card
    from zoo.engine.vlm_adapters import merge_adapters

    file = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    card = read_card(file)
    if card.task != "vlm":
        raise ValueError(f"{file} was trained for {card.task}; it is no vision-language model")
    model = merge_adapters(load_trained(file, device or "cpu")[0])
    tokenizer = restore_tokenizer(card.kwargs["tokenizer"])
    chat_format = ChatFormat(**card.kwargs["chat_format"])
    return TrainedVLM(model, tokenizer, chat_format, tuple(card.preprocessing.size), model.image_token_id, card)


def save_state(state: DecoderState, path: str | Path) -> None:
    """Writes what a decoder has read, an image for example, as safetensors; the file appears whole or not at all.

    Raises:
        OSError: If the file cannot be written.
    """
    save_weights(state.tensors(), path)


def load_state(path: str | Path, config: "PretrainedConfig", device: torch.device | str | None = None) -> DecoderState:
    """Reads what :func:`save_state` wrote.

    Args:
        path: The file.
        config: Configuration of the decoder, ``model.language_model.config``.
        device: Where the state goes; default the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or no state of a decoder of this configuration.
    """
    tensors = {name: tensor.to(device or "cpu") for name, tensor in load_checkpoint(path).items()}
    try:
        return DecoderState.from_tensors(tensors, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _published(name: str) -> _Published:
    if name not in PUBLISHED:
        nearest = difflib.get_close_matches(name, PUBLISHED, n=3, cutoff=0.4) or list_vlms()
        raise ValueError(f"there is no vision-language model {name!r}; did you mean {', '.join(nearest)}?")
    return PUBLISHED[name]


def _vision_encoder(
    vision: str | nn.Module | Sequence[str | nn.Module],
    layer: int,
    img_size: int | tuple[int, int] | None,
    pretrained: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> VisionEncoder | None:
    """The encoder of models and names of models; None for none of them."""
    towers = [vision] if isinstance(vision, (str, nn.Module)) else list(vision)
    if not towers:
        return None
    sizes = {} if img_size is None else {"img_size": img_size}
    with torch.device(device or "cpu"):
        built = [create_model(each, pretrained, **sizes) if isinstance(each, str) else each for each in towers]
        return VisionEncoder(built, layer).to(dtype=dtype)
