"""Language decoders: causal language models of transformers with their state-space mixers on this package's kernels.

Any class that ``AutoModelForCausalLM`` knows will do: Mamba, FalconMamba, Mamba-2, hybrids of them with attention
(Jamba, Bamba, FalconH1, NemotronH, GraniteMoeHybrid, Zamba2), or attention alone. Checkpoints of Mamba's authors
(``state-spaces/mamba-*``, ``mamba2-*``) have another configuration and one other name; both are translated here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.heads.vlm.mixers import use_zoo_kernels

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["convert_mamba_names", "create_decoder", "mamba_config", "position_limit"]

SSM_DEFAULTS = {"Mamba1": dict(d_state=16), "Mamba2": dict(d_state=128, headdim=64, ngroups=1)}
VOCABULARY_MULTIPLE = {"Mamba1": 8, "Mamba2": 16}  # rows that the authors pad the embedding to


def create_decoder(
    language: "PreTrainedModel | PretrainedConfig | str | Path",
    *,
    zoo_kernels: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """Creates a decoder, or takes one that is there.

    Args:
        language: A model; a configuration, from which a model is built with random weights; or the name of a repository
            on the Hugging Face hub or a folder, from which weights are read. A name may be of transformers' format or
            of Mamba's authors'.
        zoo_kernels: Whether its Mamba mixers run on our kernels; see :func:`~zoo.heads.vlm.mixers.use_zoo_kernels`.
        device: Where it is built; default the CPU. Ignored for a model.
        dtype: Dtype of its parameters; default float32. Ignored for a model.

    Raises:
        OSError: If there is no repository or folder of that name.
        ValueError: If the configuration is of no causal language model.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

    if isinstance(language, PreTrainedModel):
        model = language
    elif isinstance(language, PretrainedConfig):
        with torch.device(device or "cpu"):
            model = AutoModelForCausalLM.from_config(language, dtype=dtype or torch.float32)
    else:
        model = _from_files(str(language), dtype or torch.float32).to(device or "cpu")
    if zoo_kernels:
        use_zoo_kernels(model)
    return model


def mamba_config(original: Mapping[str, Any]) -> "PretrainedConfig":
    """transformers' configuration for one of Mamba's authors.

    Args:
        original: Fields of the authors' ``config.json``: ``d_model``, ``n_layer``, ``vocab_size``; optionally
            ``ssm_cfg`` (``layer``, ``d_state``, ``d_conv``, ``expand``, ``dt_rank``, ``headdim``, ``ngroups``),
            ``pad_vocab_size_multiple``, ``residual_in_fp32``, ``tie_embeddings`` and ``norm_epsilon``.

    Raises:
        ValueError: If the model has what transformers' classes have not: layer norms, attention or MLPs.
    """
    from transformers import Mamba2Config, MambaConfig

    missing = {"d_model", "n_layer", "vocab_size"} - set(original)
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(sorted(missing))}; it has {', '.join(original)}")
    ssm = dict(original.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer not in SSM_DEFAULTS:
        raise ValueError(f"ssm_cfg layer={layer!r} is not known; use one of {', '.join(SSM_DEFAULTS)}")
    if not original.get("rms_norm", True) or original.get("attn_layer_idx") or original.get("d_intermediate"):
        raise ValueError("only models of Mamba blocks and RMS norms are supported, without attention and MLPs")
    ssm = {"d_conv": 4, "expand": 2, **SSM_DEFAULTS[layer], **ssm}
    width = original["d_model"]
    multiple = original.get("pad_vocab_size_multiple", VOCABULARY_MULTIPLE[layer])
    common = dict(
        vocab_size=-(-original["vocab_size"] // multiple) * multiple,
        hidden_size=width,
        num_hidden_layers=original["n_layer"],
        state_size=ssm.pop("d_state"),
        conv_kernel=ssm.pop("d_conv"),
        expand=ssm["expand"],
        layer_norm_epsilon=original.get("norm_epsilon", 1e-5),
        residual_in_fp32=original.get("residual_in_fp32", True),
        tie_word_embeddings=original.get("tie_embeddings", True),
    )
    inner = ssm.pop("expand") * width
    if layer == "Mamba1":
        rank = ssm.pop("dt_rank", "auto")
        config = MambaConfig(**common, intermediate_size=inner, time_step_rank=rank)
    else:
        head_dim = ssm.pop("headdim")
        config = Mamba2Config(**common, head_dim=head_dim, num_heads=inner // head_dim, n_groups=ssm.pop("ngroups"))
    if ssm:
        raise ValueError(f"ssm_cfg has entries that are not known: {', '.join(ssm)}")
    return config


def convert_mamba_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Mamba's authors under transformers' names; an output layer that is left out is the embedding."""
    renamed = {name.replace("backbone.embedding.", "backbone.embeddings."): t for name, t in state_dict.items()}
    if "backbone.embeddings.weight" in renamed:
        renamed.setdefault("lm_head.weight", renamed["backbone.embeddings.weight"])
    return renamed


def position_limit(model: "PreTrainedModel") -> int | None:
    """Most tokens that a decoder can hold, None if nothing limits them, as in Mamba."""
    return getattr(model.config, "max_position_embeddings", None)


def _from_files(name: str, dtype: torch.dtype) -> "PreTrainedModel":
    """A pretrained model, in transformers' or in the authors' format."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import cached_file

    content = json.loads(Path(cached_file(name, "config.json")).read_text())
    if "model_type" in content or "d_model" not in content:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model = AutoModelForCausalLM.from_config(mamba_config(content), dtype=dtype)
    weights = torch.load(cached_file(name, "pytorch_model.bin"), map_location="cpu", weights_only=True)
    model.load_state_dict(convert_mamba_names(weights))
    return model
