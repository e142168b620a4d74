"""Vision-language models: vision encoder, connector and language decoder in one module.

Cobra (arXiv 2403.14520), ML-Mamba (arXiv 2407.19832) and VL-Mamba (arXiv 2403.13600) are of this form, with images
before the text; with a placeholder token images stand anywhere in the text, as in LLaVA (arXiv 2304.08485).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.layers import summed_cross_entropy
from zoo.heads.vlm.checkpoint import checkpoint_filter_fn  # noqa: F401  (found here by zoo.load_into)
from zoo.heads.vlm.generation import stream
from zoo.heads.vlm.sequence import IGNORED, PADDING, PaddingSide, arrange
from zoo.heads.vlm.state import DecoderState, accepts, check_limit, read
from zoo.heads.vlm.vision import VisionEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PARTS", "VLMOutput", "VisionLanguageModel"]

PARTS = ("vision", "connector", "language_model")
NO_DECAY = ("A_log", "D", "dt_bias", "bias")  # last parts of names


@dataclass
class VLMOutput:
    """What a forward returns.

    Attributes:
        loss: Mean cross-entropy of the next token where there is an answer, None without labels.
        logits: Scores of the next token, (B, T, V) or at ``columns`` (B, T', V).
        labels: Labels of the joint sequences, (B, T), -100 where there is no answer; None without labels.
        columns: Positions of T that logits are of, (T',); None for all.
    """

    loss: Tensor | None
    logits: Tensor
    labels: Tensor | None
    columns: Tensor | None


class VisionLanguageModel(nn.Module):
    """Answers text about images: features of the images, brought to embeddings by a connector, are read with the text.

    A batch is given by the same arguments everywhere:

    ``input_ids`` (B, L) int64
        Text.
    ``attention_mask`` (B, L)
        0 at padding, on either side; default no padding.
    ``images`` (M, 3, H, W)
        All images of the batch in the order of the rows, with values from 0 to 1; towers normalise them.
    ``image_features`` (M, N, C)
        Instead of images, what the vision encoder makes of them; ``grid`` says how many rows and columns (H, W),
        default a square.
    ``image_counts``
        Images of each row; by default as many as it has placeholders, or one without them.

    Args:
        vision: Encoder of images; None if features are given always.
        connector: From features (M, N, C) and grid (H, W) to tokens (M, N', D); see :mod:`zoo.heads.vlm.connectors`.
        language_model: Causal language model of transformers, see :func:`zoo.heads.vlm.create_decoder`.
        image_token_id: Token of the text that images take the place of, one for each; it need not be in the
            vocabulary. Default: a row's images come before its text.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        connector: nn.Module,
        language_model: "PreTrainedModel",
        image_token_id: int | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.connector = connector
        self.language_model = language_model
        self.image_token_id = image_token_id
        self.frozen: frozenset[str] = frozenset()
        self.register_state_dict_post_hook(_leave_out_tied)
        self.register_load_state_dict_pre_hook(_add_tied)
        self.register_load_state_dict_post_hook(_tie)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        image_counts: Sequence[int] | None = None,
        all_logits: bool = False,
    ) -> VLMOutput:
        """Scores of next tokens and, with labels, the loss on answers.

        Args:
            input_ids: As in the class's description, like those not named here.
            labels: (B, L), equal to ``input_ids`` in answers and -100 elsewhere.
            all_logits: Whether to return all logits also with labels; by default those that no label in the batch
                asks for are not worked out, which spares much memory with many image tokens.

        Raises:
            ValueError: If images and placeholders do not match, or a sequence exceeds the decoder's limit.
        """
        embeddings, kept, labels = self.embed(
            input_ids, attention_mask, labels, images, image_features, grid, image_counts, padding_side="right"
        )
        check_limit(self.language_model, kept.sum(dim=1))
        columns = None
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "use_cache": False}
        if labels is not None and not all_logits and accepts(self.language_model, "logits_to_keep"):
            columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
            inputs["logits_to_keep"] = columns
        # Padding is on the right, where no token sees it.
        logits = self.language_model(**inputs).logits
        if labels is None:
            return VLMOutput(None, logits, None, None)
        targets = labels[:, 1:] if columns is None else labels[:, columns + 1]
        loss = answer_loss(logits[:, :-1] if columns is None else logits, targets)
        return VLMOutput(loss, logits, labels, columns)

    def encode_images(
        self,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | None:
        """Tokens (M, N', D) of images or of their features; None if there are none."""
        if images is not None and image_features is not None:
            raise ValueError("images and image_features are two sources of the same; give one")
        if images is not None and len(images):
            if self.vision is None:
                raise ValueError("this model has no vision encoder; give image_features instead of images")
            image_features, grid = self.vision(images)
        return None if image_features is None or not len(image_features) else self.connector(image_features, grid)

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        image_counts: Sequence[int] | None = None,
        padding_side: PaddingSide = "right",
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Joint sequences of text and images.

        Returns:
            Embeddings (B, T, D), 0 at padding; which positions are no padding, (B, T); labels (B, T) if there were.
        """
        visual = self.encode_images(images, image_features, grid)
        M, N = (0, 0) if visual is None else visual.shape[:2]
        table = arrange(input_ids, attention_mask, M, N, self.image_token_id, image_counts, padding_side)
        table = table.to(input_ids.device)
        words = input_ids if self.image_token_id is None else input_ids.masked_fill(input_ids == self.image_token_id, 0)
        sources = [self.language_model.get_input_embeddings()(words).flatten(0, 1)]  # (B * L, D)
        if visual is not None:
            sources.append(visual.flatten(0, 1).to(sources[0].dtype))
        sources.append(sources[0].new_zeros(1, sources[0].shape[1]))  # what padding (-1) reads
        rows = torch.where(table == PADDING, input_ids.numel() + M * N, table)
        if labels is not None:
            beyond = labels.new_full((M * N + 1,), IGNORED)
            labels = torch.cat([labels.flatten(), beyond])[rows]
        return F.embedding(rows, torch.cat(sources)), table != PADDING, labels

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        image_counts: Sequence[int] | None = None,
        state: DecoderState | None = None,
    ) -> DecoderState:
        """Reads a prompt, from the beginning or on from a state.

        A state's :meth:`~zoo.heads.vlm.DecoderState.copy` lets several prompts continue from one image.

        Args:
            input_ids: As in the class's description, like those not named here.
            state: What was read before; it is brought up to date in place.

        Returns:
            The state, from which :meth:`stream` and :meth:`generate` go on.

        Raises:
            ValueError: If images and placeholders do not match, or a prompt exceeds the decoder's limit.
        """
        with torch.no_grad():
            embeddings, kept, _ = self.embed(
                *(input_ids, attention_mask, None, images, image_features, grid, image_counts), padding_side="left"
            )
            return read(self.language_model, embeddings, kept, state)

    def stream(self, state: DecoderState, max_new_tokens: int = 256, **options: Any) -> Iterator[Tensor]:
        """Yields the next token of every row, (B,); options as of :func:`zoo.heads.vlm.stream`."""
        return stream(self.language_model, state, max_new_tokens, **options)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        image_features: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        image_counts: Sequence[int] | None = None,
        state: DecoderState | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Tensor:
        """Tokens (B, T) that continue prompts, T at most ``max_new_tokens``.

        Args:
            input_ids: Prompts, as in the class's description, like those not named here; None to go on from a state
                without reading more.
            state: What was read before; it is brought up to date in place. Default: the prompt is the beginning.
            max_new_tokens: Most tokens to generate.
            **options: As of :func:`zoo.heads.vlm.stream`: ``temperature``, ``top_k``, ``top_p``, ``stop_tokens``...

        Raises:
            ValueError: If there is neither prompt nor state, or as for :meth:`prefill` and :meth:`stream`.
        """
        if input_ids is not None:
            state = self.prefill(input_ids, attention_mask, images, image_features, grid, image_counts, state)
        elif state is None:
            raise ValueError("there is nothing to go on from; give input_ids or a state")
        return torch.stack(list(self.stream(state, max_new_tokens, **options)), dim=1)

    def freeze(self, *parts: str) -> None:
        """Freezes these parts, ``"vision"``, ``"connector"`` or ``"language_model"``, and thaws the others.

        Frozen parts stay in evaluation mode.

        Raises:
            ValueError: If there is no such part.
        """
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise ValueError(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
        self.frozen = frozenset(parts)
        for part in PARTS:
            module = getattr(self, part)
            if module is not None:
                module.requires_grad_(part not in self.frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Sets training mode, but for frozen parts."""
        super().train(mode)
        for part in self.frozen:
            module = getattr(self, part)
            if module is not None:
                module.eval()
        if "language_model" in self.frozen:  # whose layers look at this when they are to recompute
            for layer in self.language_model.modules():
                if getattr(layer, "gradient_checkpointing", False):
                    layer.training = mode
        return self

    def parameter_groups(self, lr: float | Mapping[str, float], weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Trainable parameters for an optimizer, each part with its learning rate, with and without weight decay.

        Args:
            lr: Learning rate, or one for each part that is not frozen.
            weight_decay: Of matrices; there is none for vectors, biases, and the decays and steps of recurrences.

        Raises:
            ValueError: If a part that is trained has no learning rate.
        """
        groups = []
        for part in PARTS:
            module = getattr(self, part)
            trained = [] if module is None else [(n, p) for n, p in module.named_parameters() if p.requires_grad]
            if trained and isinstance(lr, Mapping) and part not in lr:
                raise ValueError(f"lr has no entry for the part {part}, which is trained; it has {', '.join(lr)}")
            rate = lr.get(part) if isinstance(lr, Mapping) else lr
            for decayed in (True, False):
                chosen = [p for n, p in trained if _decays(n, p) == decayed]
                if chosen:
                    decay = weight_decay if decayed else 0.0
                    groups.append({"name": part, "params": chosen, "lr": rate, "weight_decay": decay})
        return groups

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves out."""
        return {name for name, parameter in self.named_parameters() if not _decays(name, parameter)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the layers of decoder and vision models in the backward instead of keeping their activations."""
        if enable:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.language_model.gradient_checkpointing_disable()
        for tower in [] if self.vision is None else self.vision.towers:
            tower.set_grad_checkpointing(enable)
        self.train(self.training)


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over targets (B, T) that are not -100, 0 if all are; logits (B, T, V)."""
    total = summed_cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), IGNORED)
    return total / (targets != IGNORED).sum().clamp(min=1)


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one, mostly the output layer's, and the names those have."""
    first, tied = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return tied


def _leave_out_tied(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A tensor is stored once."""
    for name in _tied_names(model):
        state_dict.pop(prefix + name, None)


def _add_tied(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, source in _tied_names(model).items():
        if prefix + source in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + source])


def _tie(model: nn.Module, incompatible_keys: Any) -> None:
    """Tensors that were assigned one by one are one again."""
    model.language_model.tie_weights()
