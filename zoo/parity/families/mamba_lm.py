"""Mamba-1 and Mamba-2 language models, against the package of Mamba's authors: transformers' classes on our kernels."""

import torch
from torch import Tensor

from zoo.heads.vlm import convert_mamba_names, create_decoder, mamba_config, read
from zoo.parity.case import Case

__all__ = ["run"]

SAME_RESULT = ("fused_add_norm", "padded_vocab")


def run(case: Case) -> dict[str, Tensor]:
    """Logits of whole sequences, and of their last tokens read one by one after the rest."""
    if case.class_name != "MambaLMHeadModel":
        raise ValueError(f"no builder for {case.class_name!r}")
    kwargs = {**case.kwargs, "vocab_size": case.kwargs["padded_vocab"], "pad_vocab_size_multiple": 1}
    config = mamba_config({name: value for name, value in kwargs.items() if name not in SAME_RESULT})
    model = case.load(create_decoder(config), convert_mamba_names(case.group("state")))
    ids = case.inputs()["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    prompt = ids.shape[1] - case.spec["switches"]["T_step"]
    state, steps = read(model, embeddings[:, :prompt]), []
    for position in range(prompt, ids.shape[1]):
        state = read(model, embeddings[:, position : position + 1], state=state)
        steps.append(state.logits)
    return {"output.logits": model(input_ids=ids).logits, "output.step_logits": torch.stack(steps, dim=1)}
