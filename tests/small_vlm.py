"""A small vision-language model that has learned a few answers by heart, for tests; they load this file with ``runpy``.

It reads bytes, so that most characters of its answers are of several tokens.
"""

from pathlib import Path

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zoo.config import load_config
from zoo.data.conversations import Conversations
from zoo.engine import ModelCard, save_weights
from zoo.engine.vlm_build import build_vlm
from zoo.heads.vlm import ChatFormat, VisionLanguageModel, collate, encode_conversation

SIDE = 16
LANGUAGES = {
    "mamba": "{model_type: mamba, hidden_size: 48, num_hidden_layers: 2, state_size: 8}",
    "llama": "{model_type: llama, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "intermediate_size: 64, max_position_embeddings: 150}",
}
# What is asked and answered about a dark and about a bright image.
DARK, BRIGHT = (30, 20, 40), (240, 230, 220)
KNOWN = {
    DARK: [("Was?", "Größe 3 m², 猫🐈"), ("And?", "naïve")],
    BRIGHT: [("Was?", "été ½"), ("And?", "два")],
}


def picture(color: tuple[int, int, int], size: tuple[int, int] = (20, 14)) -> Image.Image:
    return Image.new("RGB", size, color)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte is a token, and so is the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def build(folder: Path, language: str = "mamba", images_in_text: bool = False) -> tuple[VisionLanguageModel, ModelCard]:
    """A model with random weights, large enough that images make a difference, and its card."""
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    config = load_config(
        "vlm/nano_fashion_scenes",
        [
            *("model.name=vim_micro", "model.kwargs={patch_size: 8, embed_dim: 16, depth: 2, d_state: 4}"),
            *("model.connector=mlp_connector", f"model.language_kwargs={LANGUAGES[language]}"),
            *(f"model.tokenizer={folder / 'tokenizer'}", f"model.images_in_text={str(images_in_text).lower()}"),
            *("data.name=llava", f"data.img_size={SIDE}"),
        ],
    )
    torch.manual_seed(0)
    return build_vlm(config, Conversations((), (), "nowhere", ()))


def learn(model: VisionLanguageModel, card: ModelCard, steps: int = 80) -> None:
    """Learns the known answers, to questions one by one and in a row."""
    tokenizer, form, token = byte_tokenizer(), ChatFormat(**card.kwargs["chat_format"]), model.image_token_id
    place = "" if token is None else "<image>\n"
    marks = {} if token is None else {"image_placeholder": "<image>", "image_token_id": token}
    examples = []
    for color, turns in KNOWN.items():
        image = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, SIDE, SIDE) / 255
        for said in (turns, turns[:1], turns[1:]):
            placed = [(place + said[0][0], said[0][1]), *said[1:]]
            examples.append({**encode_conversation(tokenizer, placed, form, **marks), "images": image})
    batch = collate(examples, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def save_run(folder: Path, images_in_text: bool = False) -> Path:
    """Weights of a model that has learned, as a run leaves them."""
    model, card = build(folder, images_in_text=images_in_text)
    learn(model, card)
    save_weights(folder / "best.safetensors", model.state_dict(), card)
    return folder
