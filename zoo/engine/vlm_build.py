"""From the configuration to a vision-language model, and from a card back to it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

import zoo
from zoo.config import LoraConfig, VlmConfig, VlmModelConfig
from zoo.data import Preprocessing
from zoo.data.chat_tokenizers import WordChatTokenizer, open_tokenizer, restore_tokenizer, tokenizer_settings
from zoo.data.conversation_loader import ChatEncoder
from zoo.data.conversations import Conversations
from zoo.engine.build import recompute
from zoo.engine.checkpoint import ModelCard
from zoo.engine.vlm_adapters import add_adapters
from zoo.heads.vlm import ChatFormat, VisionLanguageModel, position_limit
from zoo.heads.vlm.prompts import chat_format_ending_with
from zoo.optional import require
from zoo.vlm import create_vlm, load_vlm, load_vlm_checkpoint
from zoo.weights import load_features, load_into

__all__ = ["build_vlm", "create_from_card", "encoder_of"]

IMAGE_TOKEN = -200  # stands for an image among the tokens of a text; no tokenizer has it
TOWER_PREFIX = "visual.trunk."  # of the vision model in the weights of a CLIP run


def build_vlm(config: VlmConfig, data: Conversations) -> tuple[VisionLanguageModel, ModelCard]:
    """Creates the model, loads what it starts from, freezes what is not trained, and writes down how.

    Args:
        config: The complete configuration.
        data: Training data, for their vocabulary.

    Returns:
        The model on the CPU, and its card.

    Raises:
        OSError: If a repository or folder of the language model or the tokenizer is not there.
        ValueError: If parts, tokenizer or weights do not fit together.
    """
    wanted = config.model
    words = data.vocabulary() if wanted.tokenizer_name == "words" else None
    chat_format, tokenizer = _conversation(wanted, words)
    vision = _towers(wanted, config.data.image_size)
    model = create_vlm(
        vision=vision,
        vision_layer=wanted.vision_layer,
        connector=wanted.connector,
        connector_args=wanted.connector_kwargs,
        language=wanted.language or _language_config(wanted.language_kwargs, tokenizer),
        image_token_id=IMAGE_TOKEN if wanted.images_in_text else None,
        device=torch.get_default_device(),
    )
    _check_vocabulary(model, tokenizer)
    preprocessing = _preprocessing(config, vision[0])
    if wanted.weights:
        _start_from(model, wanted.weights)
    model.freeze(*wanted.freeze)
    lora = asdict(wanted.lora) if wanted.lora.rank else None
    if lora:
        add_adapters(model, wanted.lora)
    if config.grad_checkpointing:
        recompute(model, config.grad_checkpointing)
    kwargs = {
        "vision": [wanted.name, *wanted.more_vision],
        "vision_kwargs": {"drop_path_rate": wanted.drop_path, **wanted.kwargs},
        "vision_layer": wanted.vision_layer,
        "connector": wanted.connector,
        "connector_kwargs": dict(wanted.connector_kwargs),
        "language": model.language_model.config.to_dict(),
        "image_token_id": model.image_token_id,
        "tokenizer": tokenizer_settings(tokenizer),
        "chat_format": asdict(chat_format),
        "lora": lora,
    }
    language = model.language_model.config.model_type
    name = " + ".join([*kwargs["vision"], wanted.connector.removesuffix("_connector"), language])
    kwargs = json.loads(json.dumps(kwargs))  # as it will be read
    return model, ModelCard(name, kwargs, (), preprocessing, data=config.data.name, task="vlm")


def create_from_card(card: ModelCard) -> VisionLanguageModel:
    """The model that a card describes, with fresh weights, adapters included."""
    kwargs = card.kwargs
    names, (size, _) = kwargs["vision"], card.preprocessing.size
    further = [kwargs["vision_kwargs"], *[{} for _ in names[1:]]]
    model = create_vlm(
        vision=[_tower(name, size, more) for name, more in zip(names, further, strict=True)],
        vision_layer=kwargs["vision_layer"],
        connector=kwargs["connector"],
        connector_args=kwargs["connector_kwargs"],
        language=_config_of(kwargs["language"]),
        image_token_id=kwargs["image_token_id"],
        device=torch.get_default_device(),
    )
    if kwargs["lora"]:
        add_adapters(model, LoraConfig(**kwargs["lora"]))
    return model


def encoder_of(model: VisionLanguageModel, card: ModelCard, max_tokens: int | None = None) -> ChatEncoder:
    """How conversations become tokens for a model.

    Args:
        model: The model.
        card: Its tokenizer, chat format and size of images.
        max_tokens: Most tokens of a conversation, if it is to be less than what the decoder can hold.
    """
    limits = [limit for limit in (position_limit(model.language_model), max_tokens) if limit is not None]
    return ChatEncoder(
        tokenizer=restore_tokenizer(card.kwargs["tokenizer"]),
        chat_format=ChatFormat(**card.kwargs["chat_format"]),
        image_token_id=model.image_token_id,
        image_tokens=_count_image_tokens(model, card.preprocessing.size),
        limit=min(limits, default=None),
    )


@torch.no_grad()
def _count_image_tokens(model: VisionLanguageModel, size: tuple[int, int]) -> int:
    """Into how many tokens an image is made; one shows it."""
    parameter, training = next(model.parameters()), model.training
    blank = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
    count = model.eval().encode_images(blank).shape[1]  # batch norms are not to count it
    model.train(training)
    return count


def _conversation(config: VlmModelConfig, words: tuple[str, ...] | None) -> tuple[ChatFormat, Any]:
    """The chat format, ending with the tokenizer's end of text, and the tokenizer."""
    with_words = chat_format_ending_with(config.chat_format, WordChatTokenizer.eos_token)
    tokenizer = open_tokenizer(config.tokenizer_name, with_words, words)
    return chat_format_ending_with(config.chat_format, tokenizer.eos_token), tokenizer


def _language_config(fields: Mapping[str, Any], tokenizer: Any) -> Any:
    """transformers' configuration of a new language model for a tokenizer."""
    given = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    return _config_of({**given, **fields})


def _config_of(fields: Mapping[str, Any]) -> Any:
    further = dict(fields)
    kind = further.pop("model_type")
    auto = require("transformers", "vlm").AutoConfig
    try:
        return auto.for_model(kind, **further)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.language_kwargs, a configuration of {kind}: {error}") from error


def _check_vocabulary(model: VisionLanguageModel, tokenizer: Any) -> None:
    rows = model.language_model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the {rows} of the language model; choose the "
            "tokenizer that it was trained with (model.tokenizer)"
        )


def _towers(config: VlmModelConfig, size: int | None) -> list[nn.Module]:
    """The vision models with their weights; the further ones see images of the first one's size."""
    further = {"drop_path_rate": config.drop_path, **config.kwargs}
    first = _tower(config.name, size, further, config.pretrained)
    if config.checkpoint:
        _load_tower(first, config.checkpoint)
    size = size or first.pretrained_cfg["input_size"][-1]
    return [first, *[_tower(name, size, {}, config.pretrained) for name in config.more_vision]]


def _tower(name: str, size: int | None, further: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    sizes = {} if size is None else {"img_size": size}  # timm passes it on to models that ask for it
    return zoo.create_model(name, pretrained, **{"num_classes": 0, **sizes, **further})


def _load_tower(tower: nn.Module, path: str) -> None:
    """Loads the weights of a classifier of the same name, or those of the vision model of a CLIP run."""
    weights = zoo.load_checkpoint(path)
    inner = {name.removeprefix(TOWER_PREFIX): weights[name] for name in weights if name.startswith(TOWER_PREFIX)}
    load_features(tower, inner or weights)


def _preprocessing(config: VlmConfig, tower: nn.Module) -> Preprocessing:
    """Images are only resized: towers normalise them themselves."""
    of_model = resolve_model_data_config(tower)
    size = config.data.image_size or of_model["input_size"][-1]
    return Preprocessing(
        size=(size, size),
        in_chans=3,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        interpolation=of_model["interpolation"],
        crop_mode=config.data.crop_mode,
    )


def _start_from(model: VisionLanguageModel, path: str) -> None:
    """Loads the weights of a whole model: of a run, whose adapters are merged, or of a released file."""
    file = Path(path) / "best.safetensors" if Path(path).is_dir() else Path(path)
    weights = load_vlm_checkpoint(file)
    if any(".lora_A." in name for name in weights):
        weights = load_vlm(file).model.state_dict()
    load_into(model, weights)
