"""Asks a vision-language model the questions of a published benchmark, and scores its answers.

A run of ours:      python -m zoo.tools.vqa gqa --root /data/gqa --weights runs/my_vlm
Published models:   python -m zoo.tools.vqa textvqa --root /data/textvqa --ocr --weights cobra_3b --checkpoint FILE
The language prior: python -m zoo.tools.vqa pope --root /data/pope --weights runs/my_vlm --blank
Without any files:  python -m zoo.tools.vqa fashion_scenes --weights runs/my_vlm --limit 500

Answers are kept as they come: an interrupted call continues where it stopped, and one with a higher --limit asks the
rest. In the end the folder holds answers.jsonl (every question with its answer), the answers in the benchmark's own
form, and scores.json; a table of the scores is printed, and a row is added to a CSV file. Splits whose answers are not
published have no scores: what the model answers is for the benchmark's server.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.assistant import Assistant
from zoo.data.vqa import Benchmark, list_benchmarks, open_benchmark
from zoo.engine.vqa import add_result, ask, write_answers, write_scores
from zoo.engine.vqa_scores import Scores, score_answers
from zoo.tools.arguments import positive
from zoo.tools.tables import aligned

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed, 130 interrupted."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        benchmark = open_benchmark(options.benchmark, options.root, options.split, **_reading(options))
        folder = options.output or _folder(options, benchmark)
        dtype = PRECISIONS[options.precision]
        model = Assistant.load(options.weights, options.checkpoint, options.tokenizer, options.device, dtype)
        settings = _settings(options, benchmark)
        asked = dict(blank=options.blank, batch_size=options.batch_size, max_new_tokens=options.max_tokens)
        answers = ask(model, benchmark, folder, settings, **asked)
        for path in write_answers(benchmark, answers, folder):
            print(f"{len(answers)} answers: {path}")
        if not any(sample.answers and sample.counts for sample in benchmark.samples):
            print(f"no scores: the answers of {benchmark.name} {benchmark.split} are not published")
            return 0
        scores = score_answers(benchmark, answers)
        print(f"scores: {write_scores(scores, folder)}\n")
        print("\n".join(table(scores)))
        about = {name: settings[name] for name in ("benchmark", "split", "image")}
        row = {"model": options.weights, **about, **_rounded(scores.overall)}
        add_result(row, options.results_file or folder.parent / "results.csv")
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


def table(scores: Scores) -> list[str]:
    """Lines of a table: a row for all questions, then one for each part."""
    columns = list(scores.overall)
    lines = [["", *(name.replace("_", " ") for name in columns)], ["all", *_cells(scores.overall, columns)]]
    for kind, rows in scores.parts.items():
        lines += [[f"{kind}: {name}", *_cells(row, columns)] for name, row in rows.items()]
    return aligned(lines)


def _cells(row: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{row[name]:d}" if name == "questions" else f"{row[name]:.2f}" for name in columns]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.vqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=list_benchmarks(), help="what is asked")
    parser.add_argument("--root", metavar="DIR", help="folder of its published files; see zoo/data/vqa/")
    parser.add_argument(
        "--weights", required=True, help="folder or .safetensors file of a run, or name of a published model"
    )
    parser.add_argument("--checkpoint", help="weights of a published model")
    parser.add_argument("--tokenizer", help="folder of a published model's tokenizer; default gets it from the hub")
    parser.add_argument("--split", help="which part; default the one that is usually reported")
    parser.add_argument("--limit", type=positive, metavar="N", help="ask the first N questions only")
    parser.add_argument("--blank", action="store_true", help="show grey images instead: what language alone gives")
    parser.add_argument("--ocr", action="store_true", help="TextVQA: words that Rosetta read come before the question")
    parser.add_argument(
        "--instruction", action=argparse.BooleanOptionalAction, help="append that a short answer is wanted"
    )
    parser.add_argument("--img-size", type=positive, metavar="N", help="fashion scenes: side in pixels; default 64")
    parser.add_argument(
        "--bad-files", choices=("error", "skip"), default="error", help="for images that are missing or unreadable"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="questions at a time; default 8")
    parser.add_argument("--max-tokens", type=positive, default=32, metavar="N", help="longest answer; default 32")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="of the weights; default fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default runs/vqa/MODEL/BENCHMARK-SPLIT[-blank]")
    parser.add_argument("--results-file", type=Path, metavar="CSV", help="default results.csv beside the output")
    return parser


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    """Options of :func:`open_benchmark` that were given."""
    given = {name: getattr(options, name) for name in ("limit", "instruction", "img_size") if getattr(options, name)}
    if options.instruction is False:
        given["instruction"] = False
    return given | ({"ocr": True} if options.ocr else {}) | {"bad_files": options.bad_files}


def _folder(options: argparse.Namespace, benchmark: Benchmark) -> Path:
    path = Path(options.weights)
    name = path.stem if path.is_file() else path.name
    return Path("runs") / "vqa" / name / f"{benchmark.name}-{benchmark.split}{'-blank' if options.blank else ''}"


def _settings(options: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any]:
    """What the answers depend on: the folder of a run that was trained further holds those of other weights."""
    asked = {name: getattr(options, name) for name in ("ocr", "instruction", "img_size", "max_tokens", "precision")}
    return {
        "model": options.weights,
        "weights_written": _last_written(options.checkpoint or options.weights),
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "image": "blank" if options.blank else "real",
        **asked,
    }


def _last_written(weights: str) -> int | None:
    """When the newest weight file was written, in nanoseconds; None if there is none here."""
    path = Path(weights)
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    times = [file.stat().st_mtime_ns for file in files if file.suffix in WEIGHT_FILES]
    return max(times, default=None)


def _rounded(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else round(value, 4) for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
