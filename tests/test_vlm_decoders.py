"""Decoders of transformers on this package's kernels: equal logits, gradients, cached steps, padding; generation."""

import copy

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.heads.vlm import create_decoder, mixers, read, stream
from zoo.heads.vlm.mixers import recurrent_mixers
from zoo.vlm import load_state, save_state
from zoo.weights import save_weights

transformers = pytest.importorskip("transformers", reason="needs transformers")

VOCABULARY = 67
COMMON = dict(vocab_size=VOCABULARY, hidden_size=32)
MLP = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
SSD = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_chunk_size=16)
ZAMBA = dict(num_attention_heads=4, num_key_value_heads=4, intermediate_size=48)

# Class of the configuration, its arguments, and how many mixers run on our kernels.
DECODERS = {
    "mamba": ("MambaConfig", dict(num_hidden_layers=2, state_size=8, use_bias=True), 2),
    "mamba_gelu": ("MambaConfig", dict(num_hidden_layers=1, state_size=8, hidden_act="gelu"), 1),
    "falcon_mamba": ("FalconMambaConfig", dict(num_hidden_layers=2, state_size=8), 2),
    "mamba2": (
        "Mamba2Config",
        dict(num_hidden_layers=2, state_size=16, head_dim=8, num_heads=8, n_groups=1, chunk_size=16),
        2,
    ),
    "jamba": (
        "JambaConfig",
        dict(MLP, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8),
        1,
    ),
    "bamba": ("BambaConfig", dict(MLP, **SSD, num_hidden_layers=3, attn_layer_indices=[1]), 2),
    "falcon_h1": ("FalconH1Config", dict(MLP, **SSD, num_hidden_layers=2, head_dim=8, mamba_d_ssm=64), 2),
    "falcon_h1_norm": (
        "FalconH1Config",
        dict(MLP, **SSD, num_hidden_layers=1, head_dim=8, mamba_d_ssm=64, mamba_rms_norm=True, mamba_n_groups=2),
        1,
    ),
    "nemotron_h": (
        "NemotronHConfig",
        dict(
            MLP,
            layers_block_type=["mamba", "attention", "mlp"],
            head_dim=8,
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=16,
        ),
        1,
    ),
    "granite": (
        "GraniteMoeHybridConfig",
        dict(
            MLP,
            **SSD,
            num_hidden_layers=2,
            layer_types=["mamba", "attention"],
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=48,
            position_embedding_type="rope",
        ),
        1,
    ),
    "zamba2": (
        "Zamba2Config",
        dict(
            ZAMBA,
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            n_mamba_heads=8,
            mamba_headdim=8,
            mamba_d_state=16,
            mamba_ngroups=2,
            chunk_size=16,
            adapter_rank=4,
            num_mem_blocks=1,
        ),
        4,
    ),
    "zamba": (
        "ZambaConfig",
        dict(ZAMBA, num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2, n_mamba_heads=2, mamba_dt_rank=4),
        0,
    ),
    "lfm2": ("Lfm2Config", dict(MLP, num_hidden_layers=2, layer_types=["conv", "full_attention"]), 0),
    "phi": ("PhiConfig", dict(num_hidden_layers=2, intermediate_size=48, num_attention_heads=4), 0),
}
REPLACED = [name for name, (_, _, count) in DECODERS.items() if count]


def decoder(name: str, **options) -> "transformers.PreTrainedModel":
    """A decoder with random weights, biases and norms too, large enough that the state matters."""
    config_class, arguments, _ = DECODERS[name]
    torch.manual_seed(0)
    model = create_decoder(getattr(transformers, config_class)(**COMMON, **arguments), **options)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[2] not in ("A_log", "D"):
            parameter.data += torch.empty_like(parameter).normal_(0, 0.15, generator=generator)
    return model.eval()


def embed(model, ids):
    return model.get_input_embeddings()(ids)


def left_padded(rows):
    """Rows of ids as a batch padded on the left, and its mask."""
    length = max(map(len, rows))
    ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    return ids, torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])


@pytest.mark.parametrize("name", REPLACED)
def test_logits_and_gradients_are_those_of_transformers(name):
    ours, theirs = decoder(name), decoder(name, zoo_kernels=False)
    assert recurrent_mixers(ours) == DECODERS[name][2]
    assert recurrent_mixers(theirs) == 0
    ids = torch.randint(VOCABULARY, (2, 21))
    outputs = [model(input_ids=ids, labels=ids) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.loss.backward()
    for (key, given), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (given.grad is None) == (expected.grad is None), key
        if expected.grad is not None:
            scale = expected.grad.abs().max().item()
            torch.testing.assert_close(given.grad, expected.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=key)


@pytest.mark.parametrize("name", REPLACED)
def test_norms_on_gpus_are_those_of_transformers(name):
    """In one pass, and in autocast's dtype, as what reads them would make them."""
    norms = [module for module in decoder(name).modules() if type(module).__name__ in mixers.NORMS]
    assert len(norms) >= 2 and all("forward" in vars(norm) for norm in norms)
    for norm in norms:
        x = torch.randn(2, 5, norm.weight.numel(), requires_grad=True)
        grad = torch.randn_like(x)
        expected, ours = norm(x), mixers._rms_norm(x, norm.weight, norm.variance_epsilon)
        torch.testing.assert_close(ours, expected)
        wanted, found = (torch.autograd.grad(y, (x, norm.weight), grad) for y in (expected, ours))
        torch.testing.assert_close(found, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            narrow = mixers._rms_norm(x, norm.weight, norm.variance_epsilon)
        torch.testing.assert_close(narrow, expected.bfloat16())
        half = mixers._rms_norm(x.bfloat16(), norm.weight.bfloat16(), norm.variance_epsilon)
        assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", DECODERS)
def test_reading_on_is_reading_at_once(name):
    """Prompts of two lengths in one batch; single tokens, several, and padding after them; from a saved state too."""
    model = decoder(name)
    ids, lengths = torch.randint(VOCABULARY, (2, 30)), (11, 6)
    with torch.no_grad():
        whole = [model(input_ids=row[None]).logits[0] for row in ids]

    def check(state, reached):
        expected = torch.stack([logits[end - 1] for logits, end in zip(whole, reached, strict=True)])
        torch.testing.assert_close(state.logits, expected, rtol=1e-3, atol=1e-4)
        assert state.seen.tolist() == list(reached)

    prompts, mask = left_padded([row[:length] for row, length in zip(ids, lengths, strict=True)])
    state = read(model, embed(model, prompts), mask)
    check(state, lengths)
    for step in range(3):
        token = torch.stack([row[length + step] for row, length in zip(ids, lengths, strict=True)])
        state = read(model, embed(model, token[:, None]), state=state)
        check(state, [length + step + 1 for length in lengths])
    kept = state.copy()

    several = torch.stack([row[length + 3 : length + 7] for row, length in zip(ids, lengths, strict=True)])
    check(read(model, embed(model, several), state=state), [length + 7 for length in lengths])

    padded, mask = left_padded([ids[0, 14:15], ids[1, 9:14]])  # one token and five, after those that were read
    if name in ("zamba", "lfm2"):
        with pytest.raises(ValueError, match="rows of different lengths"):
            read(model, embed(model, padded), mask, kept)
        return
    state = read(model, embed(model, padded), mask, kept)
    check(state, (15, 14))
    token = torch.stack([ids[0, 15], ids[1, 14]])
    check(read(model, embed(model, token[:, None]), state=state), (16, 15))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "zamba2", "phi"])
def test_states_are_copied_selected_and_saved(name, tmp_path):
    model = decoder(name)
    ids = torch.randint(VOCABULARY, (2, 9))
    state = read(model, embed(model, ids[:, :8]))
    save_state(state, tmp_path / "state.safetensors")
    token = embed(model, ids[:, 8:])
    expected = read(model, token, state=state.copy()).logits
    loaded = load_state(tmp_path / "state.safetensors", model.config)
    assert torch.equal(read(model, token, state=loaded).logits, expected)
    swapped = read(model, token.flip(0), state=state.select(torch.tensor([1, 0])))
    torch.testing.assert_close(swapped.logits, expected.flip(0))
    repeated = read(model, token.repeat_interleave(3, dim=0), state=state.repeat(3))
    torch.testing.assert_close(repeated.logits, expected.repeat_interleave(3, dim=0))
    assert torch.equal(read(model, token, state=state).logits, expected)  # none of these touched it


def test_a_state_of_another_decoder_is_refused(tmp_path):
    model = decoder("bamba")
    path = tmp_path / "state.safetensors"
    save_state(read(model, embed(model, torch.randint(VOCABULARY, (1, 4)))), path)
    with pytest.raises(ValueError, match=r"state of another decoder: a MambaConfig has no 1\.keys\.0"):
        load_state(path, decoder("mamba").config)
    save_weights({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"state\.safetensors: this is no decoder's state; its entries are weight"):
        load_state(path, model.config)
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "missing.safetensors", model.config)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_memory_of_a_mamba_state_does_not_grow(name):
    model = decoder(name)
    state = read(model, embed(model, torch.randint(VOCABULARY, (1, 5))))
    size = state.nbytes()
    read(model, embed(model, torch.randint(VOCABULARY, (1, 40))), state=state)
    assert state.nbytes() == size and state.mask is None


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_backends_agree(name, backend):
    model = decoder(name)
    ids = torch.randint(VOCABULARY, (1, 9))

    def logits():
        state = read(model, embed(model, ids[:, :4]))
        return read(model, embed(model, ids[:, 4:]), state=state).logits

    expected = logits()
    with zoo.use_backend(backend):
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1", "nemotron_h"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16(name, how):
    model = decoder(name)
    ids = torch.randint(VOCABULARY, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    if how == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        state = read(model, embed(model, ids[:, :-1]))
        state = read(model, embed(model, ids[:, -1:]), state=state)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    error = (state.logits - expected[:, -1]).norm() / expected[:, -1].norm()
    assert error < 0.1


def test_copies_run_on_our_kernels_and_do_not_share_weights():
    model = decoder("mamba")
    other = copy.deepcopy(model)
    assert recurrent_mixers(other) == 2
    other.backbone.layers[0].mixer.D.data.zero_()
    ids = torch.randint(VOCABULARY, (1, 5))
    assert not torch.allclose(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_wide_convolutions_keep_transformers_forward(caplog):
    config = transformers.MambaConfig(**COMMON, num_hidden_layers=1, conv_kernel=6)
    assert recurrent_mixers(create_decoder(config)) == 0
    assert "convolution of 6 taps" in caplog.text


def test_packed_rows_are_refused():
    model = decoder("bamba")
    ids = torch.randint(VOCABULARY, (1, 4))
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=ids, seq_idx=torch.zeros(1, 4, dtype=torch.int32))


def test_gradient_checkpointing():
    model = decoder("mamba").train()
    ids = torch.randint(VOCABULARY, (1, 7))
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.backbone.layers[0].mixer.A_log.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_adapters_train_and_generate():
    peft = pytest.importorskip("peft", reason="needs peft")
    model = decoder("bamba")
    ids = torch.randint(VOCABULARY, (2, 6))
    expected = list(stream(model, read(model, embed(model, ids)), 4, stop_tokens=()))
    config = peft.LoraConfig(target_modules=["in_proj", "out_proj", "q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora" in name for name in trained)
    given = list(stream(adapted, read(adapted, embed(adapted, ids)), 4, stop_tokens=()))
    assert torch.equal(torch.stack(given), torch.stack(expected))  # fresh adapters change nothing


def naive(model, row, count):
    """The most likely continuation, by reading everything again for every token."""
    for _ in range(count):
        with torch.no_grad():
            row = torch.cat([row, model(input_ids=row[None]).logits[0, -1:].argmax(dim=-1)])
    return row[-count:]


class TestGeneration:
    @pytest.mark.parametrize("name", DECODERS)
    def test_greedy_is_full_recomputation(self, name):
        model = decoder(name)
        rows = [torch.randint(VOCABULARY, (length,)) for length in (7, 4)]
        ids, mask = left_padded(rows)
        tokens = torch.stack(list(stream(model, read(model, embed(model, ids), mask), 6, stop_tokens=())), dim=1)
        assert torch.equal(tokens, torch.stack([naive(model, row, 6) for row in rows]))

    @pytest.mark.parametrize("name", ["mamba", "mamba2", "jamba"])
    def test_greedy_is_that_of_transformers(self, name):
        model = decoder(name)
        ids = torch.randint(1, VOCABULARY, (2, 5))
        expected = model.generate(
            inputs_embeds=embed(model, ids), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        tokens = torch.stack(list(stream(model, read(model, embed(model, ids)), 5, stop_tokens=())), dim=1)
        assert torch.equal(tokens, expected)

    @pytest.fixture
    def started(self):
        model = decoder("mamba")
        return model, read(model, embed(model, torch.randint(VOCABULARY, (2, 5))))

    def test_rows_stop_each_on_its_own(self, started):
        model, state = started
        free = torch.stack(list(stream(model, state.copy(), 8, stop_tokens=())), dim=1)
        stop = int(free[0, 2])
        tokens = torch.stack(list(stream(model, state.copy(), 8, stop_tokens=[stop], pad_token=-7)), dim=1)
        for row, whole in zip(tokens, free, strict=True):
            ends = (whole == stop).nonzero()
            end = int(ends[0]) + 1 if len(ends) else len(whole)
            assert torch.equal(row[:end], whole[:end]) and bool((row[end:] == -7).all())
        assert tokens.shape[1] == min(8, max(int((row != -7).sum()) for row in tokens))

    def test_the_state_has_read_what_was_yielded(self, started):
        model, state = started
        free = torch.stack(list(stream(model, state.copy(), 6, stop_tokens=())), dim=1)
        first = list(stream(model, state, 4, stop_tokens=()))
        rest = list(stream(model, state, 2, stop_tokens=()))
        assert torch.equal(torch.stack(first + rest, dim=1), free)

    def test_sampling_follows_the_distribution(self, started):
        model, state = started
        many = state.select(torch.zeros(4000, dtype=torch.int64))
        probabilities = (state.logits[0] / 0.7).softmax(dim=-1)
        drawn = next(stream(model, many, 1, temperature=0.7, generator=torch.Generator().manual_seed(0)))
        frequencies = drawn.bincount(minlength=VOCABULARY) / len(drawn)
        assert (frequencies - probabilities).abs().max() < 0.03
        drawn = next(stream(model, many, 1, temperature=0.7, top_k=3))
        assert set(drawn.tolist()) == set(probabilities.topk(3).indices.tolist())
        drawn = next(stream(model, many, 1, temperature=0.7, top_p=0.5))
        ordered, order = probabilities.sort(descending=True)
        kept = order[: int((ordered.cumsum(0) < 0.5).sum()) + 1]
        assert set(drawn.tolist()) == set(kept.tolist())

    def test_generators_make_it_repeatable(self, started):
        model, state = started

        def draw(seed):
            generator = torch.Generator().manual_seed(seed)
            options = dict(temperature=1.0, stop_tokens=(), generator=generator)
            return torch.stack(list(stream(model, state.copy(), 6, **options)))

        assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))

    def test_further_processors_see_the_tokens_so_far(self, started):
        from transformers.generation import LogitsProcessorList, NoRepeatNGramLogitsProcessor

        model, state = started
        processors = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
        tokens = torch.stack(list(stream(model, state, 10, stop_tokens=(), processors=processors)), dim=1)
        assert all(len(set(row.tolist())) == 10 for row in tokens)

    def test_training_mode_is_kept_and_dropout_is_off(self):
        model = decoder("jamba").train()
        model.config.attention_dropout = 0.5
        ids = torch.randint(VOCABULARY, (1, 5))
        results = [torch.stack(list(stream(model, read(model, embed(model, ids)), 4, stop_tokens=()))) for _ in "ab"]
        assert torch.equal(*results) and model.training

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
            (dict(temperature=-1.0), "temperature=-1.0"),
            (dict(top_k=5), "give a temperature above 0"),
            (dict(temperature=1.0, top_k=0), "top_k=0"),
            (dict(temperature=1.0, top_p=1.5), "top_p=1.5"),
        ],
    )
    def test_options_out_of_range(self, started, options, message):
        with pytest.raises(ValueError, match=message):
            stream(*started, **options)


class TestLimits:
    def test_prompts_beyond_the_limit(self):
        model = decoder("phi")
        model.config.max_position_embeddings = 8
        with pytest.raises(
            ValueError, match=r"9 tokens exceed the 8 of this PhiForCausalLM \(max_position_embeddings\)"
        ):
            read(model, embed(model, torch.zeros(1, 9, dtype=torch.int64)))
        state = read(model, embed(model, torch.zeros(1, 6, dtype=torch.int64)))
        with pytest.raises(ValueError, match="6 tokens and max_new_tokens=3 exceed the 8"):
            stream(model, state, 3)
        assert len(list(stream(model, state, 2, stop_tokens=()))) == 2

    def test_mamba_has_none(self):
        model = decoder("mamba")
        assert read(model, embed(model, torch.zeros(1, 50, dtype=torch.int64))).seen.item() == 50

    @pytest.mark.parametrize("mask, message", [([[1, 1, 0]], "on the left"), ([[0, 0, 0]], "every row needs a token")])
    def test_padding_elsewhere(self, mask, message):
        model = decoder("mamba")
        with pytest.raises(ValueError, match=message):
            read(model, embed(model, torch.zeros(1, 3, dtype=torch.int64)), torch.tensor(mask))

    def test_decoders_that_hide_their_state(self):
        config = transformers.RecurrentGemmaConfig(
            **COMMON, **MLP, num_hidden_layers=3, head_dim=8, lru_width=32, attention_window_size=64
        )
        model = create_decoder(config)
        with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM returns no cache"):
            read(model, embed(model, torch.zeros(1, 3, dtype=torch.int64)))


# Experts are counted by histograms of integers on every device but CPUs, which have none.
@pytest.mark.parametrize("name", sorted(set(REPLACED) - {"jamba"}))
def test_nothing_is_left_on_the_cpu(name, foreign):
    model = decoder(name).to(foreign)
    ids = torch.randint(VOCABULARY, (2, 9)).to(foreign)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    with torch.no_grad():
        state = read(model, embed(model, ids[:, :-1]), mask[:, :-1])
        state = read(model, embed(model, ids[:, -1:]), state=state)
        assert state.logits.device == foreign
        assert len(list(stream(model, state, 3, temperature=1.0, top_k=5, top_p=0.9))) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", REPLACED)
def test_on_gpu(name):
    model = decoder(name)
    ids = torch.randint(VOCABULARY, (2, 70))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.cuda()
    ids = ids.cuda()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    state = read(model, embed(model, ids[:, :-1]))
    state = read(model, embed(model, ids[:, -1:]), state=state)
    torch.testing.assert_close(state.logits.cpu(), expected[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_training_on_cpu_is_fast():
    """A step of 512 tokens, at least ten times as fast as through transformers' loop."""
    import statistics
    import time

    config = transformers.MambaConfig(vocab_size=1000, hidden_size=128, num_hidden_layers=2)
    torch.manual_seed(0)
    models = {kernels: create_decoder(config, zoo_kernels=kernels).train() for kernels in (True, False)}
    ids = torch.randint(1000, (1, 512))
    times = {True: [], False: []}
    for round_ in range(4):
        for kernels, model in models.items():
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            if round_:
                times[kernels].append(time.perf_counter() - start)
    assert statistics.median(times[False]) > 10 * statistics.median(times[True])
