"""Language models as Mamba's authors publish them: their configuration, their names, their folders."""

import json

import pytest
import torch

from zoo.heads.vlm import convert_mamba_names, create_decoder, mamba_config
from zoo.heads.vlm.mixers import recurrent_mixers

transformers = pytest.importorskip("transformers", reason="needs transformers")

ORIGINAL = {"d_model": 32, "n_layer": 1, "vocab_size": 50, "ssm_cfg": {"layer": "Mamba2", "headdim": 8}}


def test_configuration():
    config = mamba_config({"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}})
    assert (config.model_type, config.vocab_size, config.time_step_rank) == ("mamba", 50280, 160)
    assert config.state_size == 16 and config.intermediate_size == 5120 and config.tie_word_embeddings
    config = mamba_config({"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}})
    assert (config.model_type, config.vocab_size, config.num_heads) == ("mamba2", 50288, 80)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rms_norm": False}, "RMS norms"),
        ({"attn_layer_idx": [1]}, "without attention"),
        ({"ssm_cfg": {"layer": "Mamba9"}}, "layer='Mamba9' is not known; use one of Mamba1, Mamba2"),
        ({"ssm_cfg": {"surprise": 1}}, "not known: surprise"),
        ({"d_model": None}, "lacks d_model"),
    ],
)
def test_what_is_not_supported_is_said(change, message):
    original = {name: value for name, value in {**ORIGINAL, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        mamba_config(original)


def test_folder(tmp_path):
    """As the authors publish them: their configuration, their names, one tensor for embedding and output layer."""
    model = create_decoder(mamba_config(ORIGINAL))
    state = {n.replace("embeddings", "embedding"): t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    loaded = create_decoder(tmp_path)
    assert recurrent_mixers(loaded) == 1
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    ids = torch.randint(50, (1, 5))
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_folder_of_transformers(tmp_path):
    config = transformers.Mamba2Config(hidden_size=32, num_heads=8, head_dim=8, num_hidden_layers=1, vocab_size=50)
    model = create_decoder(config)
    model.save_pretrained(tmp_path)
    loaded = create_decoder(str(tmp_path))
    ids = torch.randint(50, (1, 5))
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_no_such_folder(tmp_path):
    with pytest.raises(OSError, match="nothing_here"):
        create_decoder(str(tmp_path / "nothing_here"))


def test_names():
    names = convert_mamba_names({"backbone.embedding.weight": torch.ones(1), "backbone.norm_f.weight": torch.ones(1)})
    assert sorted(names) == ["backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"]
