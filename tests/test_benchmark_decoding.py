"""The benchmark of language decoders, on small ones: what it counts, the transformer's cache, decoders that fail."""

import json
import math

import pytest
import torch

from zoo.heads.vlm import create_decoder, mamba_config, read
from zoo.tools import benchmark
from zoo.tools.benchmarks import decoding
from zoo.tools.benchmarks.decoding import SIZES, Plan, Size, create, measure_all
from zoo.tools.benchmarks.measure import Machine

pytest.importorskip("transformers", reason="needs transformers")

SMALL = Size(width=128, layers=2, vocabulary=53)
CPU = Machine("cpu", torch.float32, 0.001)
OPTIONS = ["decoding", "--device", "cpu", "--seconds", "0.001", "--size", "tiny", "--chunk", "32"]


class Bar:
    """Counts what is done, as a progress bar does."""

    def __init__(self) -> None:
        self.done = 0

    def set_description(self, text: str) -> None:
        self.text = text

    def update(self) -> None:
        self.done += 1


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", SMALL)


def test_every_row_has_its_numbers(tmp_path, capsys):
    path, picture = tmp_path / "results" / "decoding.json", tmp_path / "docs" / "decoding.png"
    contexts = ["--contexts", "180", "40"]
    assert benchmark.main([*OPTIONS, *contexts, "--json", str(path), "--plot", str(picture)]) == 0
    content = json.loads(path.read_text())
    assert content["size"] == "tiny" and content["environment"]["dtype"] == "float32"
    rows = content["records"]
    assert [(row["context"], row["decoder"]) for row in rows] == [
        (context, name) for context in (40, 180) for name in ("mamba", "mamba2", "transformer")
    ]
    for row in rows:
        numbers = [row[name] for name in ("step_ms", "step_p95_ms", "state_mib", "prefill_tokens_per_sec")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert row["step_ms"] <= row["step_p95_ms"]
        assert decoding.FEWEST_STEPS <= row["steps"] <= decoding.MOST_STEPS
    printed = capsys.readouterr().out
    assert "transformer, 180 tokens" in printed and f"drawn in {picture}" in printed
    assert picture.stat().st_size > 10_000


def test_states_are_what_the_decoders_keep():
    """Mamba: (taps + states) float32 per channel; the transformer: keys and values of every token."""
    decoders = [create(name, SMALL, 600, 2, CPU, None) for name in ("mamba", "mamba2", "transformer")]
    rows = {(row["decoder"], row["context"]): row for row in measure_all(decoders, (40, 180), Plan(CPU, 2, 32), Bar())}
    inner, batch = 2 * SMALL.width, 2
    mamba = SMALL.layers * batch * inner * (4 + 16) * 4 / 2**20
    mamba2 = SMALL.layers * batch * (inner * 128 + (inner + 2 * 128) * 4) * 4 / 2**20
    for context in (40, 180):
        assert rows["mamba", context]["state_mib"] == pytest.approx(mamba)
        assert rows["mamba2", context]["state_mib"] == pytest.approx(mamba2)
        attended = SMALL.layers // 2 * batch * 2 * SMALL.width * context * 4 / 2**20
        assert rows["transformer", context]["state_mib"] == pytest.approx(attended)


def test_grouped_keys_and_values_are_smaller_and_parameters_stay():
    whole, grouped = (create("transformer", SMALL, 300, 1, CPU, heads) for heads in (None, 1))
    counts = [sum(p.numel() for p in decoder.model.parameters()) for decoder in (whole, grouped)]
    assert counts[0] == pytest.approx(counts[1], rel=0.1)
    with torch.inference_mode():
        for decoder in (whole, grouped):
            decoder.read_to(100, Plan(CPU, 1, 64))
    assert whole.state_mib() == 2 * grouped.state_mib() > 0


def test_keys_and_values_with_room_change_no_result():
    decoder = create("transformer", SMALL, 200, 2, CPU, 1)
    tokens = torch.randint(SMALL.vocabulary, (2, 150))
    embeddings = decoder.model.get_input_embeddings()(tokens)
    expected = read(decoder.model, embeddings)
    for start, end in ((0, 64), (64, 128), (128, 149), (149, 150)):
        state = read(decoder.model, embeddings[:, start:end], state=decoder.state)
    torch.testing.assert_close(state.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert state.nbytes() == expected.nbytes()


@pytest.mark.parametrize("name", list(SIZES))
def test_decoders_of_a_size_have_about_as_many_parameters(name):
    size = Size(256, 8, 4096) if name == "tiny" else SIZES[name]
    ssm = [{"layer": "Mamba1"}, {"layer": "Mamba2", "headdim": 64}]
    common = dict(d_model=size.width, n_layer=size.layers, vocab_size=size.vocabulary)
    configs = [mamba_config({**common, "ssm_cfg": each}) for each in ssm]
    models = [create_decoder(config, device="meta") for config in configs]
    models.append(create("transformer", size, 16, 1, Machine("meta", torch.float32, 1.0), None).model)
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    assert max(counts) / min(counts) < (1.08 if name == "tiny" else 1.03)
    if name != "tiny":
        published = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert counts[0] == pytest.approx(published, rel=0.06)


def test_a_decoder_that_fails_is_out_and_the_others_go_on():
    too_short = 180  # for the second context
    decoders = [create(name, SMALL, too_short, 1, CPU, None) for name in ("transformer", "mamba")]
    bar = Bar()
    rows = measure_all(decoders, (40, 180, 320), Plan(CPU, 1, 32, rounds=2), bar)
    assert bar.done == 3 * 2 * (1 + 2)
    attended = [row for row in rows if row["decoder"] == "transformer"]
    assert "failed" not in attended[0]
    assert all("exceed the 180 of this LlamaForCausalLM" in row["failed"] for row in attended[1:])
    assert all(row["step_ms"] > 0 for row in rows if row["decoder"] == "mamba")
    printed = decoding.table(rows)
    assert "transformer, 180 tokens: ValueError: " in printed


@pytest.mark.parametrize(
    "options, problem",
    [
        (["--contexts", "100", "200"], "--contexts 100 and 200 are too near: 132 tokens are generated in between"),
        (["--kv-heads", "3"], "--kv-heads 3 does not divide the 2 heads of this size"),
        (["--plot", "decoding.pdf"], "--plot needs a .png file"),
    ],
)
def test_options_that_do_not_fit(options, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*OPTIONS, *options])
    assert ended.value.code == 2
    assert problem in capsys.readouterr().err


@pytest.mark.gpu
def test_rows_on_gpu_have_peaks():
    machine = Machine("cuda", torch.bfloat16, 0.01)
    decoders = [create(name, SMALL, 600, 2, machine, None) for name in ("mamba", "mamba2", "transformer")]
    rows = measure_all(decoders, (40, 180), Plan(machine, 2, 32), Bar())
    assert len(rows) == 6 and not any("failed" in row for row in rows)
    for row in rows:
        assert row["step_peak_mib"] >= row["weights_mib"] + row["state_mib"] > 0
        assert row["prefill_peak_mib"] > 0 and row["step_ms"] > 0
