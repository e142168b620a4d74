"""Conversations with vision-language models: images are read once, answers come as a stream of text.

    assistant = Assistant.load("runs/my_vlm")
    assistant.look(["shelf.jpg"])
    for piece in assistant.ask("What is left of the bag?"):
        print(piece, end="", flush=True)

What a model has read is a state of fixed size, if its decoder is recurrent: it is copied for another conversation about
the same images, and can be kept in a file.
"""

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import Tensor

from zoo.data import Preprocessing, image_transform, why_unreadable
from zoo.heads.vlm import (
    CHAT_FORMATS,
    ChatFormat,
    DecoderState,
    VisionLanguageModel,
    collate,
    encode_conversation,
    padding_token,
)
from zoo.optional import require
from zoo.vlm import IMG_SIZE, create_vlm, list_vlms, load_state, load_vlm
from zoo.weights import save_weights

__all__ = ["PLACEHOLDER", "Assistant", "ImageSource", "open_image"]

ImageSource = str | Path | Image.Image

PLACEHOLDER = "<image>"  # in a question, for models that read images in their place in the text
PUBLISHED_TOKENIZER = "EleutherAI/gpt-neox-20b"  # of all published models
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what bytes are decoded to while others of their character are missing


@dataclass
class _Conversation:
    """What has been said.

    Attributes:
        state: What the decoder has read; None for nothing.
        turns: Questions asked.
        unread: Tokens that belong to the last answer and that the decoder has not read.
    """

    state: DecoderState | None = None
    turns: int = 0
    unread: list[int] = field(default_factory=list)


class Assistant:
    """Answers questions about images.

    Args:
        model: The model, with a vision encoder.
        tokenizer: Its tokenizer, of transformers.
        chat_format: How conversations are written for it, or a name of ``zoo.heads.vlm.CHAT_FORMATS``.
        preprocessing: How images become those that the model sees, of values from 0 to 1; or the side of squares that
            they are stretched to, as for the published models.

    Raises:
        ValueError: If the model takes features instead of images, there is no such chat format, or the tokenizer has no
            token of its own for the end of an answer.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Any,
        chat_format: ChatFormat | str = "zephyr",
        preprocessing: Preprocessing | int = IMG_SIZE,
    ) -> None:
        if model.vision is None:
            raise ValueError("this model has no vision encoder, so it cannot look at images; build it with one")
        if isinstance(chat_format, str) and chat_format not in CHAT_FORMATS:
            raise ValueError(f"there is no chat format {chat_format!r}; there are {', '.join(CHAT_FORMATS)}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat_format = CHAT_FORMATS[chat_format] if isinstance(chat_format, str) else chat_format
        self.device = next(model.parameters()).device
        self.transform = image_transform(_squashing(preprocessing) if isinstance(preprocessing, int) else preprocessing)
        # Cleaning up spaces would change text that has been written.
        cleans = hasattr(tokenizer, "clean_up_tokenization_spaces")
        self.decoding = {"clean_up_tokenization_spaces": False} if cleans else {}
        self.ending, self.stop_tokens = self._find_ending()
        self.look([])

    @classmethod
    def load(
        cls,
        name: str | Path,
        checkpoint: str | Path | None = None,
        tokenizer: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Assistant":
        """Loads a model that this package trained, or a published one.

        Args:
            name: A run's folder or a ``.safetensors`` file of a run, or one of ``zoo.list_vlms()``.
            checkpoint: Weight file of a published model.
            tokenizer: Folder of a published model's tokenizer; default gets it from the Hugging Face hub.
            device: Where the model goes; default the CPU.
            dtype: Dtype of its parameters; default float32.

        Raises:
            FileNotFoundError: If a path leads nowhere.
            ValueError: If there is no such model, or its weights are missing or do not fit.
            OSError: If a tokenizer cannot be had.
        """
        if Path(name).exists():
            trained = load_vlm(name, device)
            model = trained.model.to(dtype=dtype)
            return cls(model, trained.tokenizer, trained.chat_format, trained.card.preprocessing)
        if Path(name).suffix == ".safetensors" or "/" in str(name):  # names of models have no slash
            raise FileNotFoundError(f"there is no run and no weight file at {name}")
        if name not in list_vlms():
            nearest = ", ".join(difflib.get_close_matches(str(name), list_vlms(), cutoff=0.4) or list_vlms())
            raise ValueError(f"there is no run and no vision-language model {name!r}; did you mean {nearest}?")
        if checkpoint is None:
            raise ValueError(f"{name} has to be given its weights: name the file as checkpoint (--checkpoint FILE)")
        if not Path(checkpoint).is_file():  # found out before a large model is built, as is a missing tokenizer
            raise FileNotFoundError(f"there are no weights at {checkpoint}")
        words = require("transformers", "vlm").AutoTokenizer.from_pretrained(str(tokenizer or PUBLISHED_TOKENIZER))
        return cls(create_vlm(str(name), checkpoint_path=checkpoint, device=device, dtype=dtype), words)

    def look(self, images: ImageSource | Sequence[ImageSource]) -> None:
        """Reads images, and begins a conversation about them; those before are forgotten.

        Args:
            images: Files or PIL images, in the order in which the text is to speak of them; none for text alone.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a file is no image that can be read, or the images exceed what the model can hold.
        """
        pixels = self._pixels(_listed(images))
        state, opening = None, torch.empty(0, dtype=torch.int64)
        if pixels is not None:
            opening = self._opening(len(pixels))
            state = self.model.prefill(opening[None].to(self.device), images=pixels, image_counts=[len(pixels)])
        self._begin(0 if pixels is None else len(pixels), pixels, opening, state)

    def ask(self, question: str, max_new_tokens: int = 256, **options: Any) -> Iterator[str]:
        """Asks a question about the images and goes on with the conversation.

        An answer that is left before its end is part of the conversation as far as it was taken.

        Args:
            question: The text. The images come before the first one, unless it has a placeholder ``<image>`` for each.
            max_new_tokens: Longest answer.
            **options: ``temperature``, ``top_k``, ``top_p``, ``generator``, as of :func:`zoo.heads.vlm.stream`; by
                default the most likely token is taken.

        Returns:
            The answer, piece by piece; pieces hold whole characters.

        Raises:
            ValueError: If placeholders and images do not match, the conversation exceeds what the model can hold, or an
                option is out of range. The conversation then is as before.
        """
        before = self._conversation
        first = before.turns == 0
        ids, images, state = self._turn(question, self.images if first else 0, first), None, before.state
        if first and self.images:
            if torch.equal(ids[: len(self._read)], self._read):
                ids = ids[len(self._read) :]
            elif self._kept is None:
                raise ValueError(f"of the images only the state is here: {PLACEHOLDER} has to be before the question")
            else:  # the question has them in other places
                images, state = self._kept, None
        ids = torch.cat([torch.tensor(before.unread, dtype=torch.int64), ids])[None].to(self.device)
        state = self.model.prefill(ids, images=images, state=None if state is None else state.copy())
        tokens = self.model.stream(state, max_new_tokens, stop_tokens=self.stop_tokens, **options)
        self._conversation = _Conversation(state, before.turns + 1, self.ending)
        return self._pieces(self._conversation, tokens)

    def answer(
        self,
        images: Sequence[ImageSource | Sequence[ImageSource]],
        questions: Sequence[str],
        batch_size: int = 8,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> list[str]:
        """Answers many questions, each on its own, in batches, with a progress bar; the conversation stays as it is.

        Args:
            images: For every question an image or several, as for :meth:`look`. Within a batch the same one is encoded
                once, so keep questions about an image together.
            questions: The texts, as for :meth:`ask`.
            batch_size: Questions at a time.
            max_new_tokens: Longest answer.
            **options: As of :meth:`ask`.

        Returns:
            The answers, without white space at their ends.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If there are not as many images as questions, or as of :meth:`look` and :meth:`ask`.
        """
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images for {len(questions)} questions: give as many of both")
        rows = [(_listed(shown), question) for shown, question in zip(images, questions, strict=True)]
        answers: list[str] = []
        hidden = True if len(rows) <= batch_size else None  # None: where there is no terminal
        with require("tqdm").tqdm(rows, "answers", disable=hidden, leave=False, dynamic_ncols=True) as bar:
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                answers += self._answer(batch, max_new_tokens=max_new_tokens, **options)
                bar.update(len(batch))
        return answers

    def reset(self) -> None:
        """Begins another conversation about the same images, which are not read again."""
        self._conversation = _Conversation(self._seen)

    def another(self) -> "Assistant":
        """An assistant of the same model, with images and a conversation of its own, none at first."""
        other = copy.copy(self)
        other.look([])
        return other

    def save(self, path: str | Path) -> None:
        """Writes what was read of the images, not of the conversation, as safetensors.

        Raises:
            ValueError: If there are no images.
            OSError: If the file cannot be written.
        """
        if self._seen is None:
            raise ValueError("there are no images whose state could be kept; look at some first")
        save_weights(self._seen.tensors(), path, {"images": self.images})

    def resume(self, path: str | Path) -> None:
        """Begins a conversation about the images whose state :meth:`save` wrote, with the same weights.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or not of such a model.
        """
        language = self.model.language_model
        state = load_state(path, language.config, self.device)
        with safe_open(path, framework="pt") as opened:
            count = (opened.metadata() or {}).get("images", "")
        width = language.get_output_embeddings().out_features
        if not count.isdecimal() or state.logits.shape != (1, width):
            raise ValueError(
                f"{path} is not what this model has read of images (images: {count or 'unknown'}, scores of "
                f"{state.logits.shape[-1]} tokens instead of {width}); keep it with Assistant.save (--save-state)"
            )
        self._begin(int(count), None, self._opening(int(count)), state)

    def _begin(self, images: int, pixels: Tensor | None, opening: Tensor, state: DecoderState | None) -> None:
        """Begins a conversation about so many images, whose state has read the opening tokens."""
        self.images, self._kept, self._read, self._seen = images, pixels, opening, state
        self.reset()

    def _find_ending(self) -> tuple[list[int], list[int]]:
        """Tokens that end an answer in a conversation, and tokens at which generation stops."""
        text = self.chat_format.answer.rpartition("{text}")[2]
        ending = self._encode(text, replace(self.chat_format, question="{text}")).tolist()
        if len(ending) > 1:
            raise ValueError(
                f"an answer ends with {text!r}, which this {type(self.tokenizer).__name__} takes for {len(ending)} "
                "tokens; add it as a special token, or choose another chat format"
            )
        own = getattr(self.tokenizer, "eos_token_id", None)
        return ending, sorted({*ending, *([] if own is None else [own])})

    def _encode(self, question: str, chat_format: ChatFormat) -> Tensor:
        """Tokens (L,) of a question up to where its answer begins."""
        token = self.model.image_token_id
        placeholder = None if token is None else PLACEHOLDER
        return encode_conversation(self.tokenizer, [(question, None)], chat_format, placeholder, token)["input_ids"]

    def _turn(self, question: str, images: int, first: bool) -> Tensor:
        """Tokens (L,) of a turn with so many images that have not been shown before."""
        text, found = question, question.count(PLACEHOLDER)
        if self.model.image_token_id is None:
            if found:
                raise ValueError(f"this model reads images before the text; leave {PLACEHOLDER} out of {question!r}")
        elif found not in (0, images):
            hint = f"give one for each, or none to have the images before the question: {question!r}"
            raise ValueError(f"the text has {found} placeholders {PLACEHOLDER} for {images} images to be shown; {hint}")
        elif not found:
            text = f"{PLACEHOLDER}\n" * images + question
        form = self.chat_format
        return self._encode(text, form if first else replace(form, question=form.between + form.question))

    def _opening(self, images: int) -> Tensor:
        """Tokens (L,) of a conversation up to the last image that comes before the first question."""
        if self.model.image_token_id is None:
            return torch.empty(0, dtype=torch.int64)
        ids = self._turn("", images, first=True)
        return ids[: int((ids == self.model.image_token_id).nonzero().max()) + 1]

    def _pixels(self, images: Sequence[ImageSource]) -> Tensor | None:
        """Images as the model takes them, (n, 3, H, W) from 0 to 1; None for none."""
        if not images:
            return None
        pixels = torch.stack([self.transform(open_image(image)) for image in images])
        return pixels.to(self.device).float() / 255

    def _pieces(self, conversation: _Conversation, tokens: Iterator[Tensor]) -> Iterator[str]:
        """Text of an answer as it becomes certain; keeps account of what the decoder has not read."""
        answer: list[int] = []
        written, stopped = "", False
        for token in map(int, tokens):
            stopped = token in self.stop_tokens
            conversation.unread = [token, *([] if stopped else self.ending)]  # read when the next one is asked for
            if stopped:
                continue
            answer.append(token)
            text = self._decode(answer)
            if text != written and not text.endswith(INCOMPLETE):
                yield text[len(written) :]
                written = text
        conversation.unread = [] if stopped else self.ending
        rest = self._decode(answer)[len(written) :]
        if rest:
            yield rest

    @torch.no_grad()
    def _answer(self, rows: Sequence[tuple[Sequence[ImageSource], str]], **options: Any) -> list[str]:
        """Answers of one batch, whose images are encoded once each."""
        places: dict[Any, int] = {}
        different, chosen = [], []
        for image in (image for images, _ in rows for image in images):
            key = id(image) if isinstance(image, Image.Image) else str(image)
            if key not in places:
                places[key] = len(different)
                different.append(image)
            chosen.append(places[key])
        features, grid = (None, None) if not different else self.model.vision(self._pixels(different))
        examples = [{"input_ids": self._turn(question, len(images), first=True)} for images, question in rows]
        tokens = self.model.generate(
            **{name: t.to(self.device) for name, t in collate(examples, padding_token(self.tokenizer), "left").items()},
            image_features=None if features is None else features[chosen],
            grid=grid,
            image_counts=[len(images) for images, _ in rows],
            stop_tokens=self.stop_tokens,
            **options,
        )
        return [self._decode(self._until_stop(row)).strip() for row in tokens.tolist()]

    def _until_stop(self, tokens: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(tokens) if token in self.stop_tokens), len(tokens))
        return tokens[:end]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, **self.decoding)


def _squashing(side: int) -> Preprocessing:
    """Stretches whole images; mean 0 and deviation 1, as the model's towers normalise images themselves."""
    return Preprocessing((side, side), 3, (0.0,) * 3, (1.0,) * 3, "bicubic", crop_mode="squash")


def _listed(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    return [images] if isinstance(images, (str, Path, Image.Image)) else list(images)


def open_image(image: ImageSource) -> Image.Image:
    """An image, turned as its camera says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image that can be read.
    """
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)
    if not Path(image).is_file():
        raise FileNotFoundError(f"there is no image file at {image}")
    reason = why_unreadable(Path(image))
    if reason:
        raise ValueError(f"{image} is not a readable image: {reason}")
    with Image.open(image) as opened:
        return ImageOps.exif_transpose(opened)
