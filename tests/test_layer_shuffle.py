"""Layer-wise shuffle: the published draws, reproducible, none in evaluation; and a gradient that only gathers."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.backbones.layers.layer_shuffle import LayerShuffle, TokenOrder, restore_tokens, shuffle_paths, shuffle_tokens
from zoo.backbones.lbvim import LBVim
from zoo.backbones.shuffle_mamba import ShuffleMamba, ShuffleMambaReg
from zoo.backbones.vim import VisionMamba
from zoo.kernels import selective_scan

TINY = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_classes=5, d_state=4)
MODELS = {
    "vim": (VisionMamba, {}),
    "vim_pairs": (VisionMamba, dict(directions="forward", paired_blocks=True, depth=4)),
    "lbvim": (LBVim, {}),
    "shuffle_mamba": (ShuffleMamba, {}),
    "shuffle_mamba_reg": (ShuffleMambaReg, dict(num_registers=4, register_reduce=2)),
}


def make(name, **options):
    model_class, own = MODELS[name]
    torch.manual_seed(0)
    return model_class(**{**TINY, **own, **options})


def random_order(length, batch=None):
    """One order (L,), or one per sample (B, L)."""
    order = torch.rand(length if batch is None else (batch, length)).argsort(-1)
    return TokenOrder(order, order.argsort(-1))


class GivenOrders(torch.nn.Module):
    def __init__(self, orders):
        super().__init__()
        self.orders = orders

    def forward(self, x):
        return self.orders


@pytest.mark.parametrize("per_sample", [False, True])
def test_orders_are_permutations_with_their_inverses(device, per_sample):
    tokens = torch.zeros(5, 11, 3, device=device)
    orders = LayerShuffle(1.0, 4, per_sample)(tokens)
    assert len(orders) == 4 and orders[0] is None
    for order, inverse in orders[1:]:
        assert order.device == tokens.device
        assert order.shape == inverse.shape == ((5, 11) if per_sample else (11,))
        in_place = torch.arange(11, device=device).expand_as(order)
        assert torch.equal(order.sort(-1).values, in_place)
        assert torch.equal(order.gather(-1, inverse), in_place)
    if per_sample:
        assert len({tuple(row.tolist()) for row in orders[3].order}) == 5


@pytest.mark.parametrize("per_sample", [False, True])
def test_probability_grows_from_layer_to_layer(per_sample):
    shuffle = LayerShuffle(0.9, 4, per_sample)
    tokens = torch.zeros(10, 30, 1)
    in_place = torch.arange(30)
    fired = torch.zeros(3)
    for _ in range(200):
        for i, order in enumerate(shuffle(tokens)[1:]):
            fired[i] += (order.order != in_place).any(-1).float().mean()
    torch.testing.assert_close(fired / 200, torch.tensor([0.3, 0.6, 0.9]), rtol=0, atol=0.08)


def test_evaluation_and_rate_zero_shuffle_nothing():
    tokens = torch.zeros(2, 5, 1)
    assert LayerShuffle(1.0, 3).eval()(tokens) == LayerShuffle(0.0, 3)(tokens) == [None] * 3
    assert LayerShuffle(1.0, 1)(tokens) == [None]
    assert shuffle_tokens(tokens, None) is restore_tokens(tokens, None) is tokens


@pytest.mark.parametrize("rate", [-0.1, 1.1])
def test_rate_must_be_a_probability(rate):
    with pytest.raises(ValueError, match=f"got {rate}"):
        LayerShuffle(rate, 3)


def test_generator_makes_draws_reproducible(device):
    tokens = torch.zeros(2, 9, 1, device=device)

    def draws(shuffle):
        return [order.order.tolist() for _ in range(3) for order in shuffle(tokens)[1:]]

    shuffle = LayerShuffle(1.0, 3, generator=torch.Generator(device).manual_seed(7))
    copied = copy.deepcopy(shuffle)
    before = torch.get_rng_state()
    first = draws(shuffle)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert draws(shuffle) != first == draws(copied)
    shuffle.generator.manual_seed(7)
    assert draws(shuffle) == first
    shuffle.generator = None
    torch.manual_seed(3)
    globally = draws(shuffle)
    torch.manual_seed(3)
    assert draws(shuffle) == globally != first


@pytest.mark.parametrize("batch", [None, 3], ids=["per_batch", "per_sample"])
def test_shuffle_gathers_and_restore_undoes_it(device, batch):
    order = TokenOrder(*(each.to(device) for each in random_order(7, batch)))
    x = torch.randn(7, 3, 2, device=device).transpose(0, 1)  # not contiguous
    shuffled = shuffle_tokens(x, order)
    for b in range(3):
        assert torch.equal(shuffled[b], x[b, order.order if batch is None else order.order[b]])
    assert torch.equal(restore_tokens(shuffled, order), x)


@pytest.mark.parametrize("batch", [None, 2], ids=["per_batch", "per_sample"])
def test_gradients(batch):
    order = random_order(5, batch)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for function in (shuffle_tokens, restore_tokens):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, order).sin(), x)
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, order).sin(), x)


@pytest.mark.parametrize("batch", [None, 2], ids=["per_batch", "per_sample"])
def test_backward_scatters_nothing(batch):
    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    loss = shuffle_tokens(torch.randn(2, 5, 3, requires_grad=True), random_order(5, batch)).sum()
    with Recorder() as recorder:
        loss.backward()
    assert "index_select" in recorder.ops
    assert not [op for op in recorder.ops if "scatter" in op or "index_add" in op or "index_put" in op]


@pytest.mark.parametrize("window", [1, 4])
def test_scan_follows_a_shuffled_table_in_place(window):
    B, L, D, N = 2, 11, 4, 3
    u, delta, A = torch.randn(B, L, D), torch.rand(B, 2, L, D), -torch.rand(2, D, N)
    b, c = torch.randn(B, 2, L, N), torch.randn(B, 2, L, N)
    paths = torch.stack([torch.randperm(L), torch.tensor([3, -1, 0, 8, -1, 10, 5, -2, -2, -2, -2])]).int()
    order = random_order(L)
    options = dict(reverse=[False, True], window=window)
    table = shuffle_paths(paths, order)
    assert table.dtype == paths.dtype
    in_place = selective_scan(u, delta, A, b, c, paths=table, **options)
    moved = [shuffle_tokens(u, order), *(x[:, :, order.order] for x in (delta, b, c))]
    gathered = selective_scan(moved[0], moved[1], A, moved[2], moved[3], paths=paths, **options)
    torch.testing.assert_close(in_place, restore_tokens(gathered, order))
    assert shuffle_paths(paths, None) is paths
    with pytest.raises(ValueError, match="per sample"):
        shuffle_paths(paths, random_order(L, 2))


@pytest.mark.parametrize("name", MODELS)
def test_models_shuffle_in_training_only(name):
    plain, shuffled = make(name, layer_shuffle=0.0), make(name, layer_shuffle=1.0)
    assert shuffled.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    expected = plain(images)
    torch.testing.assert_close(shuffled.eval()(images), expected)
    first, second = shuffled.train()(images), shuffled(images)
    assert (first - expected).abs().max() > 1e-5
    assert (first - second).abs().max() > 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_model_is_reproducible_with_and_without_checkpointing(name, per_sample):
    model = make(name, layer_shuffle=1.0, shuffle_per_sample=per_sample)
    model.layer_shuffle.generator = torch.Generator()
    images = torch.randn(2, 3, 32, 40)
    results = []
    for checkpointing in (False, False, True):
        model.layer_shuffle.generator.manual_seed(5)
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("name", MODELS)
def test_orders_per_sample_are_those_of_samples_alone(name):
    model = make(name)
    images = torch.randn(3, 3, 32, 32)
    length = model.eval().forward_features(images).shape[1]
    orders = [random_order(length, 3) for _ in range(model.depth)]
    model.layer_shuffle = GivenOrders(orders)
    together = model(images)
    alone = []
    for b in range(3):
        model.layer_shuffle = GivenOrders([TokenOrder(o.order[b], o.inverse[b]) for o in orders])
        alone.append(model(images[b : b + 1]))
    torch.testing.assert_close(together, torch.cat(alone))


def test_block_reads_the_stream_in_its_order():
    """As published: tokens of the stream go in shuffled, the block's output comes back in place."""
    model = make("vim", layer_shuffle=1.0)
    stream, order = torch.randn(2, 17, 16), random_order(17)
    block = model.blocks[1]
    expected = block(stream[:, order.order])[:, order.inverse]
    torch.testing.assert_close(block(stream, order), expected)
    assert (block(stream) - expected).abs().max() > 1e-5


def test_training_step_compiles_to_one_graph():
    torch.compiler.reset()  # families share a forward, and recompilations of one are limited
    model = make("shuffle_mamba", layer_shuffle=1.0, shuffle_per_sample=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 32, 32)
    first, second = compiled(images), compiled(images)
    assert (first - second).abs().max() > 1e-6  # drawn anew, not baked into the graph
    first.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
