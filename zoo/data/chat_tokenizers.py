"""Tokenizers of conversations: any of transformers, or whole words of a closed vocabulary, kept in a model's card.

Both kinds are used alike: ``tokenizer(text, add_special_tokens=False)["input_ids"]``, ``tokenizer.decode(tokens)``,
``len(tokenizer)``, ``eos_token``, ``eos_token_id`` and ``pad_token_id``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any

from zoo.data.captions import WordTokenizer, words_of
from zoo.heads.vlm.prompts import ChatFormat
from zoo.optional import require

__all__ = ["WordChatTokenizer", "open_tokenizer", "restore_tokenizer", "tokenizer_settings"]

MARK = re.compile(r"<\|\w+\|>")  # how chat formats write what is no text
END = "<|endoftext|>"
SHORT = 80  # characters of a text whose tokens are kept
NAMED_TOKENS = ("eos_token", "pad_token")  # that tokenizers of transformers keep beside their vocabulary


class WordChatTokenizer:
    """Words and punctuation marks of a closed vocabulary, without regard to case, and the marks of a chat format.

    Args:
        words: The vocabulary, as :func:`zoo.data.scenes.split_words` splits texts.
        marks: Further tokens, for example ``<|user|>``; ``<|endoftext|>`` is always one.

    Attributes:
        eos_token: The mark at the end of an answer.
        eos_token_id: Its token.
        pad_token_id: Token that fills rows up.

    Raises:
        ValueError: If there are no words, or one of them twice.
    """

    eos_token = END

    def __init__(self, words: Iterable[str], marks: Iterable[str] = ()) -> None:
        self.words = WordTokenizer(words)
        self.eos_token_id, self.pad_token_id = self.words.eot, self.words.pad
        others = [mark for mark in dict.fromkeys(marks) if mark != END]
        self.marks = {END: self.words.eot}
        self.marks |= {mark: number for number, mark in enumerate(others, self.words.vocab_size)}
        self._known: dict[str, list[int]] = {}  # questions and answers come again and again
        self.split = re.compile(f"({'|'.join(map(re.escape, self.marks))})").split

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON holds them."""
        return {"words": list(self.words.words), "marks": list(self.marks)}

    def __len__(self) -> int:
        return self.words.vocab_size + len(self.marks) - 1

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Tokens of a text, under ``input_ids``; there are none to add at its ends.

        Raises:
            ValueError: For a word that is not in the vocabulary; the message names the nearest.
        """
        tokens = self._known.get(text)
        if tokens is None:
            tokens = self._encode(text)
            if len(text) <= SHORT:
                self._known[text] = tokens
        return {"input_ids": list(tokens)}

    def _encode(self, text: str) -> list[int]:
        tokens = []
        for piece in self.split(text):
            tokens += [self.marks[piece]] if piece in self.marks else self.words.encode(piece)
        return tokens

    def decode(self, tokens: Iterable[int], **options: Any) -> str:
        """The text up to the first end, in lower case, without marks; options of transformers make no difference."""
        return self.words.decode(map(int, tokens))


def open_tokenizer(name: str, chat_format: ChatFormat, words: Iterable[str] | None = None) -> Any:
    """Opens a tokenizer.

    Args:
        name: Repository on the Hugging Face hub or folder of a tokenizer of transformers, or ``words``.
        chat_format: How conversations will be written, whose words and marks the vocabulary has to have too.
        words: The vocabulary, for ``words``.

    Raises:
        OSError: If there is no repository or folder of that name.
        ValueError: If the tokenizer has no end of text, or cannot be kept in a model's card.
    """
    if name == "words":
        texts = [text.replace("{text}", " ") for text in astuple(chat_format)]
        marks = [mark for text in texts for mark in MARK.findall(text)]
        return WordChatTokenizer(sorted({*(words or ()), *words_of(MARK.sub(" ", text) for text in texts)}), marks)
    tokenizer = require("transformers", "vlm").AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no end of text (eos_token), which answers have to end with")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"the tokenizer {name} is not of the tokenizers library; give one with a tokenizer.json")
    return tokenizer


def tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """All of a tokenizer as JSON holds it, for :func:`restore_tokenizer`."""
    if isinstance(tokenizer, WordChatTokenizer):
        return tokenizer.settings
    named = {name: getattr(tokenizer, name) for name in NAMED_TOKENS if getattr(tokenizer, name) is not None}
    return {"json": tokenizer.backend_tokenizer.to_str(), **named}


def restore_tokenizer(settings: Mapping[str, Any]) -> Any:
    """The tokenizer of :func:`tokenizer_settings`.

    Raises:
        ModuleNotFoundError: If it is one of transformers, which is not installed.
    """
    if "words" in settings:
        return WordChatTokenizer(**settings)
    transformers, tokenizers = require("transformers", "vlm"), require("tokenizers", "vlm")
    backend = tokenizers.Tokenizer.from_str(settings["json"])
    named = {name: value for name, value in settings.items() if name != "json"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
