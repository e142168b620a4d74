"""Adventurer and its Mamba-2 mixer: every option trains, any image size runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from zoo.backbones.adventurer import Adventurer, AdventurerBlock, checkpoint_filter_fn, from_upstream
from zoo.backbones.layers.ssd import SSDMixer, stack_ssd_parameters

TINY = dict(
    img_size=32, patch_size=8, embed_dim=32, depth=2, d_state=8, head_dim=16, reversed_blocks=(1,), num_classes=5
)

OPTIONS = {
    "released": dict(),
    "average": dict(global_pool="avg"),
    "no_reversed_block": dict(reversed_blocks=()),
    "sizes": dict(d_conv=3, expand=1, mlp_ratio=1.5),
}

MIXERS = {
    "mamba2": dict(),
    "groups": dict(groups=2, norm_groups=2, learned_state=True),
    "connector": dict(bidirectional=True, groups=2, norm_groups=2),
    "matvlm": dict(expand=1, groups=4, kv_heads=2, norm_groups=4),
    "matvlm_repeated_first": dict(expand=1, groups=4, kv_heads=2, norm_groups=4, repeat_before_conv=True),
    "mmmamba": dict(expand=1, groups=4, kv_heads=2, d_conv=2, skip=False, norm="head_first", qk_norm=True),
    "phi_mamba": dict(expand=1, groups=4, conv_activation=None, decay="token", norm=None),
    "unit_decay": dict(decay="unit", dt_limit=(0.01, 0.5), d_conv=1, bias=True),
    "reversed": dict(reverse=True),
}


def make(**options) -> Adventurer:
    torch.manual_seed(0)
    return Adventurer(**{**TINY, **options})


def make_mixer(name: str) -> SSDMixer:
    torch.manual_seed(0)
    return SSDMixer(32, **{**dict(d_state=8, head_dim=8), **MIXERS[name]})


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("length", [1, 2, 17, 70])
def test_every_parameter_of_a_mixer_gets_a_gradient(name, length):
    mixer = make_mixer(name)
    out = mixer(torch.randn(2, length, 32))
    assert out.shape == (2, length, 32)
    out.square().sum().backward()
    if length > 1:
        assert [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", [name for name in MIXERS if name not in ("connector", "reversed")])
@pytest.mark.parametrize("cuts", [(3, 17), (1, 2, 3, 69)])
def test_a_sequence_in_pieces_is_the_sequence(name, cuts):
    """Prefilling, then decoding one or several tokens at a time."""
    mixer, tokens = make_mixer(name), torch.randn(2, 70, 32)
    state, pieces = None, []
    with torch.no_grad():
        whole = mixer(tokens)
        for start, stop in zip((0, *cuts), (*cuts, 70), strict=True):
            piece, state = mixer(tokens[:, start:stop], state=state, return_state=True)
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["connector", "reversed"])
def test_mixers_that_read_backwards_have_no_state(name):
    with pytest.raises(ValueError, match="reads the sequence from its end"):
        make_mixer(name)(torch.randn(1, 3, 32), return_state=True)


def test_reading_backwards_is_flipping_around_the_mixer():
    forwards, backwards = make_mixer("mamba2"), make_mixer("reversed")
    tokens = torch.randn(2, 70, 32)
    torch.testing.assert_close(backwards(tokens), forwards(tokens.flip(1)).flip(1), rtol=1e-4, atol=1e-5)


def test_two_directions_with_the_same_parameters_see_a_palindrome_alike():
    mixer = make_mixer("connector")
    for parameter in (mixer.conv_weight, mixer.conv_bias, mixer.dt_bias, mixer.A_log, mixer.D):
        parameter.data[1] = parameter.data[0]
    half = torch.randn(1, 9, 32)
    out = mixer(torch.cat([half, half.flip(1)], dim=1))
    torch.testing.assert_close(out, out.flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=24), "head_dim=24"),
        (dict(groups=3), "groups=3"),
        (dict(norm_groups=5), "norm_groups=5"),
        (dict(kv_heads=2), "needs groups=8"),
        (dict(decay="none"), "decay='none'"),
        (dict(norm="layer"), "norm='layer'"),
    ],
)
def test_bad_mixer_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SSDMixer(32, **{**dict(d_state=8, head_dim=8), **options})


def test_directions_of_a_checkpoint_are_stacked():
    theirs = {f"a.mixer.{name}": torch.full((8,), i) for i, name in enumerate(("D", "D_b", "dt_bias", "norm.weight"))}
    theirs["a.mixer.conv1d.weight"] = torch.zeros(6, 1, 4)
    theirs["a.norm.weight"] = torch.ones(3)
    ours = stack_ssd_parameters(theirs)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    assert shapes == {
        "a.mixer.D": (2, 8),
        "a.mixer.dt_bias": (1, 8),
        "a.mixer.norm_weight": (8,),
        "a.mixer.conv_weight": (1, 6, 4),
        "a.norm.weight": (3,),
    }
    assert ours["a.mixer.D"][:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_gets_a_gradient(options):
    model = make(**options, depth=3, drop_path_rate=0.2, drop_rate=0.1, pos_drop_rate=0.1)
    logits = model(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("size", [(97, 131), (40, 24), (5, 17)])
def test_any_image_size(options, size):
    model = make(**options).eval()
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        logits = model(image)
        features = model.forward_intermediates(image, intermediates_only=True)
        assert features[-1].shape == (1, 32, -(-max(size[0], 8) // 8), -(-max(size[1], 8) // 8))
        model.set_input_size(img_size=size)
        torch.testing.assert_close(model(image), logits)  # resampled once or at every call


def test_fixed_size_is_enforced():
    model = make(dynamic_img_size=False)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(AssertionError, match="set_input_size"):
        model(torch.randn(1, 3, 40, 32))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_of_a_batch_do_not_mix(options):
    model = make(**options).eval()
    images = torch.randn(3, 3, 32, 40)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_reversed_block_is_flipping_the_patches_around_it():
    mixers = [SSDMixer(32, d_state=8, head_dim=8, reverse=reverse) for reverse in (False, True)]
    mixers[1].load_state_dict(mixers[0].state_dict())
    plain, reversed_ = AdventurerBlock(32, mixers[0]), AdventurerBlock(32, mixers[1], reverse=True)
    reversed_.load_state_dict(plain.state_dict())
    tokens = torch.randn(2, 17, 32)
    flipped = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    expected = plain(flipped)
    expected = torch.cat([expected[:, :-1].flip(1), expected[:, -1:]], dim=1)
    torch.testing.assert_close(reversed_(tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_class_token_sees_every_patch_and_patches_see_the_mean():
    model = make(depth=1, reversed_blocks=()).eval()
    tokens, _ = model.embed(torch.randn(1, 3, 32, 32))
    tokens = tokens.detach().requires_grad_()
    out = model.blocks[0](tokens)
    grad = torch.autograd.grad(out[0, -1].square().sum(), tokens, retain_graph=True)[0]
    assert (grad[0].abs().amax(-1) > 0).all()
    grad = torch.autograd.grad(out[0, 0].square().sum(), tokens)[0]
    assert (grad[0].abs().amax(-1) > 0).all()


def test_released_models_reverse_blocks_two_and_three():
    model = zoo.create_model("adventurer_tiny_patch16_224", device="meta")
    assert [index for index, block in enumerate(model.blocks) if block.reverse] == [2, 3]
    assert all(block.mixer.reverse == (block.reverse,) for block in model.blocks)


def test_drop_path_rates_are_shifted_by_one():
    model = make(depth=4, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2])


def test_pooling_choices():
    images = torch.randn(2, 3, 32, 32)
    model = make(global_pool="")
    tokens = model.forward_features(images)
    assert model(images).shape == (2, 17, 5)
    for pool, feature in {"token": tokens[:, -1], "avg": tokens[:, :-1].mean(1)}.items():
        model.reset_classifier(5, pool)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), feature)
        torch.testing.assert_close(model(images), model.head(feature))
    with pytest.raises(ValueError, match="'last'"):
        model.reset_classifier(5, "last")


def test_weights_can_be_remade():
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu").init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    A = model.blocks[0].mixer.A_log.exp()
    assert (A >= 1).all() and (A <= 16).all()
    steps = torch.nn.functional.softplus(model.blocks[0].mixer.dt_bias)
    assert (steps > 9e-4).all() and (steps < 0.11).all()
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_hot_path_neither_flips_nor_copies():
    """Between its projections the mixer runs its kernels and elementwise work, whichever way it reads."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for name in ("mamba2", "reversed", "connector"):
        mixer = make_mixer(name)
        with torch.no_grad(), Recorder() as recorder:
            mixer(torch.randn(2, 17, 32))
        assert recorder.ops.count("causal_conv1d") == 1
        assert recorder.ops.count("ssd") == len(mixer.reverse)
        assert not {"flip", "cat", "clone", "copy_", "_to_copy", "index", "gather", "roll"} & set(recorder.ops)


def test_checkpoints_fit_other_sizes():
    """The class row of the position embedding is last, and kept; patches are resampled."""
    state_dict = make().state_dict()
    state_dict["pos_embed"] = torch.arange(17.0).view(1, 17, 1).expand(1, 17, 32).clone()
    larger = make(img_size=48, patch_size=4, num_classes=0)
    fitted = checkpoint_filter_fn({"model": state_dict}, larger)
    assert fitted["pos_embed"].shape == larger.pos_embed.shape
    assert (fitted["pos_embed"][:, -1] == 16).all()
    larger.load_state_dict(fitted)
    with pytest.raises(ValueError, match="15 patch rows"):
        checkpoint_filter_fn({"pos_embed": torch.zeros(1, 16, 32)}, larger)


def test_upstream_arguments_are_checked():
    with pytest.raises(ValueError, match="if_new_trick"):
        from_upstream(dict(if_new_trick=True))
    with pytest.raises(ValueError, match="conv_layers"):
        from_upstream(dict(depth=1, ssm_cfg=dict(conv_layers=2)))
    with pytest.raises(ValueError, match="rms_norm"):
        from_upstream(dict(rms_norm=False))
