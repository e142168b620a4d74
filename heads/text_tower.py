"""Text encoder of Mamba-2 blocks for contrastive training with images.

Mamba-2 is of arXiv 2405.21060, the task of arXiv 2103.00020. The interface is that of open_clip's text towers.
"""

from collections.abc import Sequence

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.backbones.layers.ssd import SSDMixer

__all__ = ["Mamba2TextTower"]

NO_WEIGHT_DECAY = ("A_log", "D", "dt_bias", "conv_bias")  # last parts of names


class Mamba2TextBlock(nn.Module):
    """Norm and mixer, added to the residual stream."""

    def __init__(self, norm: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to tokens (B, L, D)."""
        return x + self.mixer(self.norm(x))


class Mamba2TextTower(nn.Module):
    """Tokens to one feature per text: embedding, Mamba-2 blocks, pooling, projection.

    The end of a text is where its largest token is, as in CLIP. A causal tower pools there and never sees the padding
    behind, so that texts may be padded to any length. A bidirectional tower averages up to there; it reads the padding
    too, as SigLIP's does, and therefore needs texts of ``context_length`` tokens.

    Args:
        output_dim: Width of the features.
        context_length: Tokens of a text.
        vocab_size: Number of different tokens.
        width: Token width D.
        layers: Blocks.
        d_state: States of the mixers.
        head_dim: Width of their heads; divides ``expand * width``.
        expand: Their inner width as a multiple of ``width``.
        bidirectional: Whether they read texts backwards, too.

    Raises:
        ValueError: If the widths do not divide as needed.
    """

    def __init__(
        self,
        output_dim: int = 512,
        context_length: int = 77,
        vocab_size: int = 49408,
        width: int = 512,
        layers: int = 12,
        d_state: int = 64,
        head_dim: int = 64,
        expand: int = 2,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.context_length, self.vocab_size = context_length, vocab_size
        self.width, self.output_dim = width, output_dim
        self.bidirectional = bidirectional
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, width, **dd)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            mixer = SSDMixer(width, d_state, head_dim, expand, bidirectional=bidirectional, **dd)
            self.blocks.append(Mamba2TextBlock(nn.RMSNorm(width, eps=1e-5, **dd), mixer))
        self.norm = nn.RMSNorm(width, eps=1e-5, **dd)
        self.projection = nn.Linear(width, output_dim, bias=False, **dd)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=self.width**-0.5)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.out_proj.weight /= len(self.blocks) ** 0.5  # the stream does not grow with the depth

    def forward(self, text: Tensor) -> Tensor:
        """Tokens (B, L), integers, to features (B, output_dim).

        Raises:
            ValueError: If a bidirectional tower gets texts of another length than ``context_length``.
        """
        return self._head(self._advance(self._embed(text))[0], text)

    def _embed(self, text: Tensor) -> Tensor:
        if self.bidirectional and text.shape[1] != self.context_length:
            raise ValueError(
                f"texts have {text.shape[1]} tokens, but a bidirectional tower reads the padding too and needs "
                f"context_length={self.context_length}"
            )
        return self.token_embedding(text)

    def _advance(self, x: Tensor, blocks: int | None = None, taps: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Runs the first blocks, by default all; returns the stream behind them and behind those in ``taps``."""
        tapped = []
        for index, block in enumerate(self.blocks[:blocks]):
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x) if recompute else block(x)
            if index in taps:
                tapped.append(x)
        return x, tapped

    def _head(self, x: Tensor, text: Tensor) -> Tensor:
        end = text.argmax(dim=-1)  # (B,)
        if not self.bidirectional:
            last = x[torch.arange(len(x), device=x.device), end]
            return self.projection(self.norm(last))
        inside = torch.arange(text.shape[1], device=x.device) <= end[:, None]  # (B, L)
        shares = (inside / inside.sum(1, keepdim=True)).to(x.dtype)
        return self.projection(torch.einsum("bl,bld->bd", shares, self.norm(x)))

    def forward_intermediates(
        self,
        text: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NLC",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Streams behind some blocks and the feature, as open_clip's models ask for them.

        Args:
            text: Tokens (B, L).
            indices: Blocks; a number for that many last ones, None for all.
            stop_early: Whether to leave out the blocks behind the last one asked for, if there is no need of a feature.
            normalize_intermediates: Whether streams go through the final norm.
            intermediates_only: Whether to leave out the feature.
            output_fmt: ``"NLC"``; texts have no other.
            output_extra_tokens: There are none; changes nothing.

        Returns:
            ``text_intermediates``, a list of (B, L, D), and ``text_features`` (B, output_dim).

        Raises:
            ValueError: For another ``output_fmt``.
        """
        if output_fmt != "NLC":
            raise ValueError(f"output_fmt={output_fmt!r} is not known; features of texts are 'NLC'")
        taps, last = feature_take_indices(len(self.blocks), indices)
        blocks = last + 1 if stop_early and intermediates_only else None
        x, streams = self._advance(self._embed(text), blocks, taps)
        output = {"text_intermediates": [self.norm(each) for each in streams] if normalize_intermediates else streams}
        return output if intermediates_only else {**output, "text_features": self._head(x, text)}

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freezes the tower but for its last groups: embedding, blocks (the last with the final norm), projection.

        Args:
            unlocked_layers: Groups that stay trained.
            freeze_layer_norm: Norms are frozen with their blocks; other values are an error.

        Raises:
            ValueError: If norms shall not be frozen.
        """
        if not freeze_layer_norm:
            raise ValueError("freeze_layer_norm=False is not possible: norms are frozen with their blocks")
        groups = [[self.token_embedding], *([block] for block in self.blocks)]
        groups[-1].append(self.norm)
        groups.append([self.projection])
        for number, group in enumerate(groups):
            for module in group:
                module.requires_grad_(number >= len(groups) - unlocked_layers)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are recomputed in the backward instead of kept."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in NO_WEIGHT_DECAY}
