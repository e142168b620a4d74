"""Gradient checkpointing by scope: the same gradients, fewer saved tensors."""

import pytest
import torch

import zoo


def saved_bytes(loss_of, model) -> int:
    """Bytes of what autograd saves for the backward of a loss, parameters apart, each memory once."""
    kept = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model)
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("name", ["vim_nano.untrained", "lbvim_nano", "shuffle_mamba_nano"])
@pytest.mark.parametrize("scope", ["scan", "block"])
def test_scope_changes_memory_but_no_gradient(name, scope):
    images = torch.randn(4, zoo.create_model(name).in_chans, 32, 32)

    def loss_of(model):
        torch.manual_seed(1)
        return model(images).square().mean()

    grads, memory = [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = zoo.create_model(name).train()
        model.set_grad_checkpointing(enable, scope=scope)
        memory.append(saved_bytes(loss_of, model))
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])
    assert memory[1] < 0.6 * memory[0]


def test_scope_can_be_changed_and_unknown_ones_are_named():
    model = zoo.create_model("vim_nano.untrained")
    model.set_grad_checkpointing(scope="scan")
    model.set_grad_checkpointing()
    assert model.grad_checkpointing and not any(block.mixer.grad_checkpointing for block in model.blocks)
    with pytest.raises(ValueError, match="scope='layer' is not known to VisionMamba; use 'block' or 'scan'"):
        model.set_grad_checkpointing(scope="layer")
    with pytest.raises(ValueError, match="scope='scan' is not known to Adventurer; use 'block'"):
        zoo.create_model("adventurer_nano").set_grad_checkpointing(scope="scan")
