"""Talks with a vision-language model about images; the answer is written as it comes.

One question:      python -m zoo.tools.chat runs/my_vlm --image shelf.jpg "What is left of the bag?"
A conversation:    python -m zoo.tools.chat runs/my_vlm --image before.jpg --image after.jpg
A list of them:    python -m zoo.tools.chat runs/my_vlm --image shelf.jpg < questions.txt
Published models:  python -m zoo.tools.chat cobra_3b --checkpoint latest-checkpoint.pt --image shelf.jpg

Without a question it reads them from standard input, one a line, as one conversation. Lines with a slash in front are
commands: /image PATH... shows other images, /reset begins anew about the same ones, /quit ends. Control-C stops an
answer, control-D ends the conversation.
"""

import argparse
import contextlib
import logging
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import torch

from zoo.assistant import Assistant
from zoo.tools.arguments import positive

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMMANDS = ("/image", "/reset", "/quit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a run, .safetensors file of a run, or name of a published model")
    parser.add_argument("question", nargs="?", help="default: questions from standard input")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="image to look at; repeatable")
    parser.add_argument("--state", metavar="FILE", help="instead of images, what --save-state kept of them")
    parser.add_argument("--save-state", metavar="FILE", help="keep what was read of the images; .safetensors")
    parser.add_argument("--checkpoint", help="weights of a published model")
    parser.add_argument("--tokenizer", help="folder of a published model's tokenizer; default gets it from the hub")
    parser.add_argument("--max-tokens", type=positive, default=256, help="longest answer; default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the most likely token")
    parser.add_argument("--top-p", type=float, help="draw among the likeliest tokens of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; default %(default)s")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32", help="of weights; default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: GPU if any")
    options = parser.parse_intermixed_args(arguments)  # a question may follow options
    if options.state and options.image:
        parser.error("--state takes the place of --image; give one of them")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        dtype = DTYPES[options.precision]
        assistant = Assistant.load(options.model, options.checkpoint, options.tokenizer, options.device, dtype)
        if options.state:
            assistant.resume(options.state)
        else:
            assistant.look(options.image)
        if options.save_state:
            assistant.save(options.save_state)
        drawing: dict[str, Any] = {"max_new_tokens": options.max_tokens, "temperature": options.temperature}
        drawing |= {"top_p": options.top_p, "generator": torch.Generator(options.device).manual_seed(options.seed)}
        if options.question is None:
            return _converse(assistant, drawing)
        _write_answer(assistant, options.question, drawing)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _converse(assistant: Assistant, drawing: dict[str, Any]) -> int:
    """Answers lines of standard input; returns 1 if one of them was not understood."""
    at_terminal, status = sys.stdin.isatty(), 0
    if at_terminal:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (importing it is what gives input() its history)
        print(f"{assistant.images} images. Ask, or {', '.join(COMMANDS)}.", file=sys.stderr)
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
            if line == "/quit":
                return status
            _obey(assistant, line, drawing)
        except EOFError:
            return status
        except (OSError, ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 0 if at_terminal else 1
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()


def _obey(assistant: Assistant, line: str, drawing: dict[str, Any]) -> None:
    """Carries out a command or answers a question; an empty line is neither."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        if not rest.strip():
            raise ValueError("/image has to be followed by the path of an image, or several")
        assistant.look(shlex.split(rest))
    elif command == "/reset":
        assistant.reset()
    elif command.startswith("/"):
        raise ValueError(f"there is no command {command}; there are {', '.join(COMMANDS)}")
    elif line:
        _write_answer(assistant, line, drawing)


def _write_answer(assistant: Assistant, question: str, drawing: dict[str, Any]) -> None:
    for piece in assistant.ask(question, **drawing):
        print(piece, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
