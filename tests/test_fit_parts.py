"""Checkpoints of classifiers in models for dense features, and the other way round."""

import pytest
import torch
from safetensors.torch import save_file

import zoo


@pytest.mark.parametrize("name", ["vmamba_nano", "lbvim_nano", "local_vim_nano", "efficient_vmamba_nano"])
def test_norms_of_features_come_and_go(name, tmp_path):
    plain = zoo.create_model(name)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    dense = zoo.create_model(name, checkpoint_path=str(tmp_path / "plain.safetensors"), feature_norms=(1, 2))
    expected = plain.state_dict()
    for key, tensor in dense.state_dict().items():
        if not key.startswith("feature_norms."):
            assert torch.equal(tensor, expected[key]), key
    assert all(
        (norm.weight == 1).all() for norm in dense.feature_norms.modules() if isinstance(norm, torch.nn.LayerNorm)
    )

    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    again = zoo.create_model(name, checkpoint_path=str(tmp_path / "dense.safetensors"))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    with pytest.raises((RuntimeError, ValueError), match=r"feature_norms\.2"):
        zoo.create_model(name, checkpoint_path=str(tmp_path / "dense.safetensors"), feature_norms=(0, 1))
