"""Published weights: which there are, fetching them ahead of time, and checking and converting them.

    python -m zoo.tools.weights list 'vmamba*'
    python -m zoo.tools.weights fetch vim_tiny_patch16_224.in1k vmamba_tiny
    python -m zoo.tools.weights verify
    python -m zoo.tools.weights convert vim_t.pth vim_tiny_patch16_224 vim_t.safetensors

Weights are kept in the folder ZOO_CACHE, by default zoo in torch.hub's. ZOO_MIRROR, if set, is an address that replaces
scheme and host of every origin, the hub's included. HF_HUB_OFFLINE=1 or ZOO_OFFLINE=1 forbids downloads.
"""

import argparse
import re
import sys
from collections.abc import Sequence

import timm

import zoo
from zoo.weights import (
    build_on_meta,
    cache_folder,
    cached_weights,
    convert_checkpoint,
    fetch_pretrained,
    verify_pretrained,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="parameters, accuracy, licence and whether they are on this machine")
    command.add_argument("pattern", nargs="*", help="names with wildcards; default all")
    command = commands.add_parser("fetch", help="download and convert")
    command.add_argument("pattern", nargs="+", help="names with wildcards")
    command.add_argument("--force", action="store_true", help="download again what is on this machine")
    command = commands.add_parser("verify", help="read what is on this machine and compare it with its records")
    command.add_argument("pattern", nargs="*", help="names with wildcards; default all")
    command = commands.add_parser("convert", help="write a checkpoint file in this zoo's names, as safetensors")
    command.add_argument("checkpoint", help="file, the authors' or ours")
    command.add_argument("model", help="name of the model")
    command.add_argument("output", help="file to write, .safetensors")
    options = parser.parse_args(arguments)
    try:
        if options.command == "convert":
            count = convert_checkpoint(options.checkpoint, options.model, options.output)
            print(f"{count} tensors of {options.model} in {options.output}")
            return 0
        names = zoo.list_pretrained(options.pattern or "")
        if not names:
            raise ValueError(f"no weights have a name like {', '.join(options.pattern)}; see the command list")
        if options.command == "list":
            show(names)
            return 0
        return fetch(names, options.force) if options.command == "fetch" else verify(names)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def show(names: Sequence[str]) -> None:
    """Prints a table of weights."""
    width = max(map(len, names))
    print(f"{'model':<{width}}  {'param.':>8}  {'top-1':>5}  {'licence':<16}  {'here':<8}  origin")
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        here = "package" if cfg.file else "cached" if cached_weights(name) else ""
        count, top1 = parameter_count(name) / 1e6, published_accuracy(name) or ""
        licence = cfg.license or "unknown"
        print(f"{name:<{width}}  {count:>6.1f} M  {top1:>5}  {licence:<16}  {here:<8}  {cfg.origin_url or 'ours'}")
    print(f"{len(names)} in all; the cache is {cache_folder()}")


def fetch(names: Sequence[str], force: bool) -> int:
    """Downloads weights; what fails is reported, and the rest goes on."""
    failed = 0
    for name in names:
        try:
            path = fetch_pretrained(name, force=force)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
        else:
            print(f"{name}: {path}")
    return 1 if failed else 0


def verify(names: Sequence[str]) -> int:
    """Checks what is on this machine."""
    good = bad = 0
    for name in names:
        try:
            path = verify_pretrained(name)
        except ValueError as error:
            print(f"BAD  {name}: {error}")
            bad += 1
        else:
            good += path is not None
            print(f"good {name}: {path}" if path else f"     {name}: not on this machine")
    print(f"{good} good, {bad} bad")
    return 1 if bad else 0


def published_accuracy(model_name: str) -> float | None:
    """Top-1 accuracy in percent that the authors publish, or None if none is known.

    It stands in the config's notes (``top1=76.1``), or in the description of the model's function.
    """
    notes = timm.get_pretrained_cfg(model_name).notes or ()
    noted = [note.removeprefix("top1=") for note in notes if note.startswith("top1=")]
    stated = re.findall(r"([\d.]+) top-1", _description(model_name))
    return float((noted or stated)[0]) if noted or stated else None


def parameter_count(model_name: str) -> float:
    """Number of parameters, as the description of the model's function says, or counted if it does not."""
    stated = re.search(r"([\d.]+)\s?M parameters", _description(model_name))
    if stated:
        return float(stated.group(1)) * 1e6
    return sum(parameter.numel() for parameter in build_on_meta(model_name).parameters())


def _description(model_name: str) -> str:
    return timm.model_entrypoint(model_name.partition(".")[0]).__doc__ or ""


if __name__ == "__main__":
    sys.exit(main())
