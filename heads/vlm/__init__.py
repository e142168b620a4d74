"""Generative vision-language models on state-space and hybrid language models.

Needs transformers (``pip install 'vision-ssm-zoo[vlm]'``), which is imported when a decoder is created.
``zoo.vlm.create_vlm`` puts models together by names.
"""

from zoo.heads.vlm import connectors
from zoo.heads.vlm.checkpoint import convert_connector, flatten_sections
from zoo.heads.vlm.decoder import convert_mamba_names, create_decoder, mamba_config, position_limit
from zoo.heads.vlm.generation import stream
from zoo.heads.vlm.mixers import use_zoo_kernels
from zoo.heads.vlm.model import VisionLanguageModel, VLMOutput
from zoo.heads.vlm.prompts import CHAT_FORMATS, ChatFormat, collate, encode_conversation, padding_token
from zoo.heads.vlm.state import DecoderState, read
from zoo.heads.vlm.vision import VisionEncoder

__all__ = [
    "CHAT_FORMATS",
    "ChatFormat",
    "DecoderState",
    "VLMOutput",
    "VisionEncoder",
    "VisionLanguageModel",
    "collate",
    "connectors",
    "convert_connector",
    "convert_mamba_names",
    "create_decoder",
    "encode_conversation",
    "flatten_sections",
    "mamba_config",
    "padding_token",
    "position_limit",
    "read",
    "stream",
    "use_zoo_kernels",
]
