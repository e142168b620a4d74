"""The subject ``decoding``: time and memory per generated token after contexts of growing length.

Language decoders with random weights read random tokens in chunks until they have read a context, generate some tokens
greedily, in turns for several rounds, and read on to the next context. Mamba and Mamba-2 run on this package's kernels
and keep a state of constant size. Beside them is a transformer of transformers' Llama class with about as many
parameters: half as many layers of the same width, attention by torch's ``scaled_dot_product_attention``. Its keys and
values are written into memory that is set aside for the longest context, which is kinder to it than transformers' own
cache, which is copied whole with every token.

Weights and activations are of ``--dtype``. Steps are eager: on a GPU, small decoders wait for the host. Columns:

* ``step_ms``, ``step_p95_ms``: one token for every row of the batch, from scores to scores: choosing, embedding and
  reading it. Median and 95th percentile of ``steps``.
* ``state_mib``: what the decoder keeps of the context: states, or keys and values.
* ``prefill_tokens_per_sec``: reading, between the context before and this one; all rows together.
* ``step_peak_mib``, ``prefill_peak_mib``: on a GPU, most memory meanwhile, with weights (``weights_mib``) and state.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.heads.vlm import DecoderState, create_decoder, mamba_config, read, stream
from zoo.optional import require
from zoo.plots import BLUE, DPI, GREEN, ORANGE, new_figure
from zoo.tools.arguments import positive
from zoo.tools.benchmarks.measure import Machine, allocate_workspace, attempt, free_memory, peak_mib, seconds_per_call
from zoo.tools.tables import aligned

__all__ = ["HELP", "SIZES", "Decoder", "Plan", "Size", "add_arguments", "create", "measure_all", "run", "table"]

HELP = "language decoders: time and memory per token against the length of the context"
COLORS = {"mamba": BLUE, "mamba2": GREEN, "transformer": ORANGE}
HEAD = 64  # width of a head, of Mamba-2 and of attention
WARM_UP = 3  # steps at every context that are not counted
FEWEST_STEPS, MOST_STEPS = 16, 128
LONGEST_ANSWER = 1 + WARM_UP + MOST_STEPS  # tokens that are generated at a context

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Width, number of layers (of Mamba; the transformer has half) and vocabulary."""

    width: int
    layers: int
    vocabulary: int = 50277


# Mamba's published sizes, and one that a CPU can read long contexts with.
SIZES = {
    "tiny": Size(256, 8, 4096),
    "130m": Size(768, 24),
    "370m": Size(1024, 48),
    "790m": Size(1536, 48),
    "1.4b": Size(2048, 48),
    "2.8b": Size(2560, 64),
}


@dataclass(frozen=True)
class Plan:
    """How everything of one run is measured.

    Attributes:
        machine: Where; ``seconds`` is the work of one decoder's steps at one context, in all rounds together.
        batch_size: Rows that are read at once.
        chunk: Tokens of a row that are read at once.
        rounds: How often every decoder has its turn to generate at a context.
    """

    machine: Machine
    batch_size: int = 1
    chunk: int = 1024
    rounds: int = 4


@dataclass
class Decoder:
    """A decoder while it is measured.

    Attributes:
        name: ``mamba``, ``mamba2`` or ``transformer``.
        model: The model, in evaluation mode; None once it is out.
        state: What it has read.
        failure: Why it is out; empty while it is in.
        tokens: What it generates at the present context, of which it generates ``calls`` in a turn.
        seconds: What each took.
        peaks: Most memory in every turn, MiB; none on CPUs.
    """

    name: str
    model: Any
    state: DecoderState | None
    failure: str = ""
    tokens: Iterator[Tensor] | None = None
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def attempt(self, work: Callable[..., Row], *arguments: Any) -> Row:
        """Columns that some work makes; none, and the memory is free for the others, if it fails or did before."""
        if self.failure:
            return {}
        columns, self.failure = attempt(partial(work, *arguments))
        if self.failure:
            self.model = self.state = self.tokens = None
            free_memory()
        return columns or {}

    def warm_up(self, plan: Plan, longest: int) -> Row:
        """Reads two chunks and a token for nothing: what is compiled, tuned and set up at first use is no speed."""
        state = None
        for length in (min(plan.chunk, longest // 2),) * 2 + (1,):
            state = read(self.model, self._embedded(plan.batch_size, length), state=state)
        return {}

    def read_to(self, context: int, plan: Plan) -> Row:
        """Reads random tokens until each row has read so many."""
        length = context - self.seen()
        peak, seconds = self._run(partial(self._read, length, plan), plan.machine)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return dict(
            param_count=parameters / 1e6,
            weights_mib=self.weights_mib(),
            state_mib=self.state_mib(),
            prefill_tokens_per_sec=plan.batch_size * length / seconds[0],
            **({} if peak is None else dict(prefill_peak_mib=peak)),
        )

    def begin_steps(self, plan: Plan) -> Row:
        """Generates some tokens, to see how many a turn has time for."""
        self.tokens = stream(self.model, self.state, LONGEST_ANSWER, stop_tokens=[])
        next(self.tokens)  # only chooses a token: what is read in a step is the token before
        *_, last = self._steps(WARM_UP, plan.machine)
        fewest, most = -(-FEWEST_STEPS // plan.rounds), MOST_STEPS // plan.rounds
        self.calls = min(max(round(plan.machine.seconds / plan.rounds / last), fewest), most)
        self.seconds, self.peaks = [], []
        return {}

    def take_turn(self, plan: Plan) -> Row:
        """Generates tokens for one round; the columns are those of all rounds so far."""
        peak, seconds = self._run(partial(self._steps, self.calls, plan.machine), plan.machine)
        self.seconds += seconds
        self.peaks += [] if peak is None else [peak]
        times = torch.tensor(self.seconds, dtype=torch.float64)
        p50, p95 = (1e3 * torch.quantile(times, torch.tensor([0.5, 0.95]).double())).tolist()
        row = dict(step_ms=p50, step_p95_ms=p95, steps=len(times))
        return row | (dict(step_peak_mib=max(self.peaks)) if self.peaks else {})

    def seen(self) -> int:
        """Tokens that each row has read."""
        return 0 if self.state is None else int(self.state.seen[0])

    def weights_mib(self) -> float:
        """Memory of the parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters()) / 2**20

    def state_mib(self) -> float:
        """Memory of what was read."""
        return 0.0 if self.state is None else self.state.nbytes() / 2**20

    def _read(self, length: int, plan: Plan) -> list[float]:
        def chunks() -> None:
            for start in range(0, length, plan.chunk):
                embedded = self._embedded(plan.batch_size, min(plan.chunk, length - start))
                self.state = read(self.model, embedded, state=self.state)

        return [seconds_per_call(chunks, 1, plan.machine)]

    def _steps(self, count: int, machine: Machine) -> list[float]:
        return [seconds_per_call(partial(next, self.tokens), 1, machine) for _ in range(count)]

    def _embedded(self, rows: int, length: int) -> Tensor:
        """Random tokens as the decoder reads them, (B, L, D)."""
        embed = self.model.get_input_embeddings()
        return embed(torch.randint(embed.num_embeddings, (rows, length), device=embed.weight.device))

    def _run(self, work: Callable[[], list[float]], machine: Machine) -> tuple[float | None, list[float]]:
        """What some work returns, after the most memory that the decoder needed for it, which is known on GPUs."""
        if machine.device != "cuda":
            return None, work()
        seconds: list[float] = []
        own = self.weights_mib() + self.state_mib()
        return own + peak_mib(lambda: seconds.extend(work())), seconds


def create(name: str, size: Size, longest: int, batch_size: int, machine: Machine, kv_heads: int | None) -> Decoder:
    """A decoder with random weights.

    Args:
        name: ``mamba``, ``mamba2`` or ``transformer``.
        size: Of the model.
        longest: Most tokens that it will have to hold.
        batch_size: Rows that it will read.
        machine: Device and dtype.
        kv_heads: Of the transformer: heads that have keys and values of their own; default all.
    """
    torch.manual_seed(0)
    common = dict(device=machine.device, dtype=machine.dtype)
    if name == "transformer":
        model = create_decoder(_llama_config(size, longest, kv_heads), **common).eval()
        return Decoder(name, model, _state_with_room(model, longest, batch_size))
    layer = {"mamba": "Mamba1", "mamba2": "Mamba2"}[name]
    ssm = {"layer": layer, **({"headdim": HEAD} if name == "mamba2" else {})}
    config = mamba_config(dict(d_model=size.width, n_layer=size.layers, vocab_size=size.vocabulary, ssm_cfg=ssm))
    return Decoder(name, create_decoder(config, **common).eval(), None)


def _llama_config(size: Size, longest: int, kv_heads: int | None) -> Any:
    """Half as many layers as Mamba, each as large as two of Mamba's, of 6.25 width^2 + 111 width parameters."""
    heads = size.width // HEAD
    layer = 2 * (6.25 * size.width**2 + 111 * size.width)
    attention = (2 + 2 * (kv_heads or heads) / heads) * size.width**2
    return require("transformers", "vlm").LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers // 2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        intermediate_size=HEAD * round((layer - attention) / (3 * size.width) / HEAD),
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def _state_with_room(model: Any, longest: int, batch_size: int) -> DecoderState:
    """An empty state whose keys and values have their place already."""
    caches = require("transformers.cache_utils", "vlm")
    config = model.config
    shape = (2, batch_size, config.num_key_value_heads, longest, HEAD)

    class RoomyLayer(caches.DynamicLayer):
        """Keys and values (B, H, T, D) as the filled parts of larger tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.room = torch.empty(shape, dtype=model.dtype, device=model.device)
            self.keys, self.values = self.room[:, :, :, :0]
            self.is_initialized = True

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start = self.keys.shape[2]
            end = start + key_states.shape[2]
            self.room[0, :, :, start:end] = key_states
            self.room[1, :, :, start:end] = value_states
            self.keys, self.values = self.room[:, :, :, :end]
            return self.keys, self.values

    cache = caches.DynamicCache(config=config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    seen = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
    mask = torch.ones(batch_size, 0, dtype=torch.bool, device=model.device)
    return DecoderState(cache, torch.empty(batch_size, 0, device=model.device), seen, mask)


@torch.inference_mode()
def measure_all(decoders: Sequence[Decoder], contexts: Sequence[int], plan: Plan, bar: Any) -> list[Row]:
    """Rows of all contexts and decoders; a decoder that fails is out from then on.

    Args:
        decoders: Those that take part; afterwards they have read the longest context.
        contexts: In ascending order.
        plan: How they are measured.
        bar: Progress bar with a unit for every decoder at the beginning, and one more in each round, of each context.
    """
    rows = {(context, decoder.name): {} for context in contexts for decoder in decoders}
    for decoder in decoders:
        bar.set_description(f"warm-up: {decoder.name}")
        decoder.attempt(decoder.warm_up, plan, contexts[-1])
    for context in contexts:
        for decoder in decoders:
            bar.set_description(f"{context} tokens, reading: {decoder.name}")
            rows[context, decoder.name] |= decoder.attempt(decoder.read_to, context, plan)
            decoder.attempt(decoder.begin_steps, plan)
            bar.update()
        for turn, decoder in itertools.product(range(plan.rounds), decoders):
            bar.set_description(f"{context} tokens, round {turn + 1}: {decoder.name}")
            rows[context, decoder.name] |= decoder.attempt(decoder.take_turn, plan)
            bar.update()
        for decoder in decoders:
            rows[context, decoder.name] |= dict(failed=decoder.failure) if decoder.failure else {}
    return [dict(decoder=name, context=context) | row for (context, name), row in rows.items()]


COLUMNS = {  # key of a row: heading and format
    "param_count": ("parameters", "{:.1f} M"),
    "step_ms": ("step", "{:.2f} ms"),
    "step_p95_ms": ("p95", "{:.2f} ms"),
    "state_mib": ("state", "{:.2f} MiB"),
    "step_peak_mib": ("peak memory", "{:.0f} MiB"),
    "prefill_tokens_per_sec": ("reading", "{:.0f} tokens/s"),
    "prefill_peak_mib": ("peak memory", "{:.0f} MiB"),
}


def table(records: Sequence[Row]) -> str:
    """The numbers as text: a line for every decoder and context."""
    columns = [key for key in COLUMNS if any(key in row for row in records)]
    lines = [["", *(COLUMNS[key][0] for key in columns)]]
    for row in records:
        cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in columns]
        lines.append([f"{row['decoder']}, {row['context']} tokens", *cells])
    failures = [f"{row['decoder']}, {row['context']} tokens: {row['failed']}" for row in records if "failed" in row]
    return "\n".join([*aligned(lines), *failures])


PANELS = {
    "step_ms": "time per token (ms)",
    "state_mib": "kept of the context (MiB)",
    "prefill_tokens_per_sec": "reading (tokens per second)",
    "step_peak_mib": "peak memory (MiB)",
}


def plot(records: Sequence[Row], path: Path, title: str) -> None:
    """Draws the columns that there are against the context, all logarithmic; a line for every decoder.

    Args:
        records: Rows of all decoders and contexts.
        path: The PNG file; its folder is made.
        title: Line above the panels.
    """
    columns = [column for column in PANELS if any(column in row for row in records)]
    figure = new_figure(4.4 * max(len(columns), 1), 4)
    for axes, column in zip(figure.subplots(1, max(len(columns), 1), squeeze=False).flat, columns, strict=False):
        for name in dict.fromkeys(row["decoder"] for row in records):
            points = [(row["context"], row[column]) for row in records if row["decoder"] == name and column in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLORS[name], label=name)
        contexts = sorted({row["context"] for row in records})
        axes.set(xscale="log", yscale="log", xlabel="context (tokens)", title=PANELS[column])
        axes.set_xticks(contexts, [_thousands(context) for context in contexts])
        axes.set_xticks([], minor=True)
        ticker = require("matplotlib.ticker")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if columns:
        figure.axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _thousands(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), help="of the decoders; default tiny on CPUs, 1.4b on GPUs")
    parser.add_argument("--decoders", nargs="+", choices=tuple(COLORS), default=list(COLORS), help="default all")
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=positive,
        metavar="N",
        help="tokens; default 1024 to 16384 on CPUs, to 65536 on GPUs",
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="rows at once; default 1")
    parser.add_argument("--chunk", type=positive, default=1024, metavar="N", help="tokens read at once; default 1024")
    parser.add_argument("--rounds", type=positive, default=4, metavar="N", help="turns to generate; default 4")
    parser.add_argument("--kv-heads", type=positive, metavar="N", help="of the transformer; default all its heads")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the numbers, a .png file")


def run(machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Measures all decoders, prints a table, and draws the picture if asked.

    Returns:
        ``size``, its numbers, and ``records``, a row for every context and decoder.

    Raises:
        argparse.ArgumentError: If options do not fit each other; the message says which.
        ModuleNotFoundError: If transformers is not installed, or matplotlib for a picture.
    """
    on_gpu = machine.device == "cuda"
    name = options.size or ("1.4b" if on_gpu else "tiny")
    size = SIZES[name]
    contexts = sorted(set(options.contexts or [1024 * 2**k for k in range(7 if on_gpu else 5)]))
    check(size, contexts, options)
    if on_gpu:
        allocate_workspace(machine)
    longest = contexts[-1] + LONGEST_ANSWER
    decoders = [
        create(decoder, size, longest, options.batch_size, machine, options.kv_heads)
        for decoder in dict.fromkeys(options.decoders)
    ]
    plan = Plan(machine, options.batch_size, options.chunk, options.rounds)
    total = len(contexts) * len(decoders) * (1 + plan.rounds)
    with require("tqdm").tqdm(total=total, unit="turn", disable=None, dynamic_ncols=True) as bar:
        records = measure_all(decoders, contexts, plan, bar)
    print("\n" + table(records))
    if options.plot:
        plot(records, options.plot, _title(name, options.batch_size, machine))
        print(f"\ndrawn in {options.plot}")
    return dict(size=name, batch_size=options.batch_size, chunk=options.chunk, records=records)


def _title(size: str, batch_size: int, machine: Machine) -> str:
    dtype, threads = str(machine.dtype).removeprefix("torch."), torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    device = torch.cuda.get_device_name() if machine.device == "cuda" else cpu
    return f"decoders of size {size}, batch {batch_size}, {dtype}, {device}"


def check(size: Size, contexts: Sequence[int], options: argparse.Namespace) -> None:
    """Refuses options that do not fit each other, before anything is built."""
    require("transformers", "vlm")
    heads = size.width // HEAD
    if options.kv_heads and heads % options.kv_heads:
        raise argparse.ArgumentError(
            None, f"--kv-heads {options.kv_heads} does not divide the {heads} heads of this size"
        )
    near = [pair for pair in itertools.pairwise(contexts) if pair[1] - pair[0] < LONGEST_ANSWER]
    if near:
        raise argparse.ArgumentError(
            None,
            f"--contexts {near[0][0]} and {near[0][1]} are too near: {LONGEST_ANSWER} tokens are generated in between",
        )
    if options.plot:
        if options.plot.suffix != ".png":
            raise argparse.ArgumentError(None, "--plot needs a .png file")
        require("matplotlib.figure")
