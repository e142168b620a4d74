"""Trains a Vision Mamba on real images and draws what it learned.

    python -m zoo.tools.demo                                        1,797 scans of digits, about a minute on a CPU
    python -m zoo.tools.demo --data fashion_mnist                   70,000 photographs of clothing, better on a GPU
    python -m zoo.tools.demo --short                                a few epochs, to see that everything works

Run again, it finds the finished run and only draws; after an interruption it continues where it was.

With --serve it trains nothing, and shows models on a web page for this machine instead: classes and where the evidence
for them lies, segments and objects, answers to questions.

    python -m zoo.tools.demo --serve                                the packaged model, on http://127.0.0.1:7860
    python -m zoo.tools.demo --serve --segmenter runs/streets --detector runs/parts --vlm runs/my_vlm
"""

import argparse
import logging
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from zoo.config import ClassificationConfig, load_config
from zoo.data import Normalize, TensorData, open_split
from zoo.engine import TrainResult, load_trained, train
from zoo.engine.figures import draw_confusion
from zoo.optional import require
from zoo.plots import plot_images
from zoo.tools.arguments import positive

RECIPES = {"digits": "vim/micro_digits", "fashion_mnist": "vim/nano_fashion_mnist"}
SHORT = {
    "digits": ["optim.epochs=4", "optim.warmup_epochs=1"],
    "fashion_mnist": [
        "optim.epochs=2",
        "optim.warmup_epochs=1",
        "data.train_samples=512",
        "data.val_samples=256",
        "data.batch_size=32",
        "model.kwargs.patch_size=4",
        "model.kwargs.embed_dim=64",
        "model.kwargs.depth=2",
    ],
}
SHOWN = 40
PACKAGED = "vim_nano.fashion_mnist"
TASKS = {"classifier": "classification", "segmenter": "segmentation", "detector": "detection"}
HOST = "127.0.0.1"
FOR_TRAINING, FOR_SERVING = ("data", "output", "short"), ("classifier", "segmenter", "detector", "vlm")
FOR_SERVING += ("checkpoint", "tokenizer", "device", "host", "port")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=tuple(RECIPES), help="default digits")
    parser.add_argument("--output", help="folder for the run and the pictures; default runs/demo_<data>")
    parser.add_argument("--short", action="store_true", help="train a few epochs only, in the sub-folder short")
    page = parser.add_argument_group("web page", "runs are given by their folders or .safetensors files")
    page.add_argument("--serve", action="store_true", help="show models on a web page until Control-C")
    page.add_argument("--classifier", help=f"run or name of a model; default {PACKAGED}, which is part of the package")
    page.add_argument("--segmenter", help="run of a segmentor")
    page.add_argument("--detector", help="run of a detector")
    page.add_argument("--vlm", help="run or name of a vision-language model")
    page.add_argument("--checkpoint", help="weights of a published vision-language model")
    page.add_argument("--tokenizer", help="folder of its tokenizer; default gets it from the hub")
    page.add_argument("--device", help="default: GPU if any")
    page.add_argument("--host", help=f"address to listen on; default {HOST}, which other machines do not reach")
    page.add_argument("--port", type=positive, help="default the first free one from 7860 on")
    options = parser.parse_args(arguments)
    foreign = FOR_TRAINING if options.serve else FOR_SERVING
    given = [name for name in foreign if getattr(options, name)]
    if given:
        parser.error(f"--{given[0]} goes {'without' if options.serve else 'with'} --serve")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    return _serve(options) if options.serve else _train(options)


def _train(options: argparse.Namespace) -> int:
    """Trains the demo's model, or finds it trained, and draws."""
    data = options.data or "digits"
    output = Path(options.output or f"runs/demo_{data}")
    output = output / "short" if options.short else output
    if data == "digits":
        torch.set_num_threads(1)  # batches so small gain nothing from more threads, and lose a lot on a busy machine
    try:
        overrides = [f"output={output}", "resume=auto", *(SHORT[data] if options.short else [])]
        if not torch.cuda.is_available():
            overrides.append("precision=fp32")
        config = load_config(RECIPES[data], overrides)
        print(f"Training {config.model.name} on {data} for {config.optim.epochs} epochs; files go to {output}")
        result = train(config)
        if not result.trained:
            print("This run was finished before: nothing to train, drawing only. (Remove the folder to train again.)")
        accuracy, count = draw(config, result)
    except (OSError, ValueError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    seconds = sum(row["seconds"] for row in result.log)
    print(f"\nTest accuracy after {len(result.log)} epochs: {accuracy:.2f} % of {count} images")
    print(f"Training took {seconds:.0f} s in all")
    for name in ("curves.png", "confusion.png", "predictions.png", "mistakes.png", "log.csv", "last.safetensors"):
        if (output / name).exists():
            print(f"  {output / name}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    """Shows models on a web page until it is interrupted."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: getattr(options, name) for name in TASKS}
    models["classifier"] = models["classifier"] or PACKAGED
    try:
        from zoo.assistant import Assistant  # heads are slow to import
        from zoo.web import create_page, draw_clothes, load_for, serve

        loaded = {name: load_for(TASKS[name], model, device) for name, model in models.items() if model}
        if options.vlm:
            loaded["assistant"] = Assistant.load(options.vlm, options.checkpoint, options.tokenizer, device)
        with tempfile.TemporaryDirectory() as folder:
            examples = draw_clothes(Path(folder)) if models["classifier"] == PACKAGED else []
            page = create_page(**loaded, examples=examples)
            print(f"Open {serve(page, options.host or HOST, options.port)} in a browser; Control-C ends this")
            try:
                threading.Event().wait()
            finally:
                page.close(verbose=False)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def draw(config: ClassificationConfig, result: TrainResult) -> tuple[float, int]:
    """Draws the pictures of a finished run from its last weights, but for the curves, which the run has drawn.

    The last weights rather than the best ones: choosing by the test images would flatter the result.

    Args:
        config: The run's configuration.
        result: What training returned.

    Returns:
        Test accuracy in percent, and the number of test images.
    """
    model, card = load_trained(result.output / "last.safetensors", "cuda" if torch.cuda.is_available() else "cpu")
    data, _ = open_split(config.data, config.data.val_split)
    probabilities = _probabilities(model, data, Normalize(card.preprocessing.mean, card.preprocessing.std))
    confidence, guesses = probabilities.max(-1)
    accuracy = 100 * (guesses == data.labels).double().mean().item()
    count_confusions = require("torchmetrics.functional.classification").multiclass_confusion_matrix

    title = f"{card.model} on {config.data.name}"
    heading = f"{title}: {accuracy:.2f} % of {len(data)} test images"
    confusions = count_confusions(guesses, data.labels, num_classes=len(data.class_names))
    draw_confusion(confusions, data.class_names, result.output / "confusion.png", heading)
    _draw_images(data, confidence, guesses, torch.arange(len(data))[:SHOWN], result.output / "predictions.png", heading)
    wrong = (guesses != data.labels).nonzero().flatten()
    if len(wrong):
        order = wrong[confidence[wrong].argsort(descending=True)][:SHOWN]
        shown = f"{title}: the most confident of {len(wrong)} mistakes"
        _draw_images(data, confidence, guesses, order, result.output / "mistakes.png", shown)
    return accuracy, len(data)


@torch.no_grad()
def _probabilities(model: torch.nn.Module, data: TensorData, normalize: Normalize) -> torch.Tensor:
    """Class probabilities (N, classes) on the CPU."""
    device = next(model.parameters()).device
    normalize.to(device)
    batches = data.images.split(256)
    return torch.cat([model(normalize(images.to(device))).float().softmax(-1).cpu() for images in batches])


def _draw_images(
    data: TensorData, confidence: torch.Tensor, guesses: torch.Tensor, chosen: torch.Tensor, path: Path, title: str
) -> None:
    """Draws the chosen test images with the guess and its probability, and the truth where the guess is wrong."""
    captions = []
    for index in chosen.tolist():
        guess, truth = data.class_names[guesses[index]], data.class_names[data.labels[index]]
        caption = f"{guess} ({confidence[index]:.0%})"
        captions.append(caption if guess == truth else f"{caption}\ntrue: {truth}")
    plot_images(
        list(data.images[chosen].squeeze(1).numpy()),
        captions,
        (guesses[chosen] == data.labels[chosen]).tolist(),
        path,
        title,
    )


if __name__ == "__main__":
    sys.exit(main())
