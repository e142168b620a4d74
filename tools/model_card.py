"""Writes model cards for the Hugging Face hub, and the table of all models.

    python -m zoo.tools.model_card vim_tiny_patch16_224
    python -m zoo.tools.model_card vim_tiny_patch16_224.in1k --output README.md
    python -m zoo.tools.model_card --all --output cards
    python -m zoo.tools.model_card --table docs/models.md

What a card says comes from the registry, from facts about the family, from counting on a model without values, and from
rows about the model in the .csv files of the results folder. Computation is that of one image: 2 floating-point
operations for a multiply-add, scans included, norms and activations not.
"""

import argparse
import csv
import difflib
import functools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import yaml
from timm.models import PretrainedCfg

import zoo
from zoo.optional import require
from zoo.tools.cards.families import FAMILIES, Family
from zoo.tools.leaderboard import RECIPE, count_flops
from zoo.tools.weights import published_accuracy
from zoo.weights import build_on_meta, licence_note

TAGS = ("image-classification", "timm", "vision-ssm-zoo")
COLUMNS = ("Model", "Family", "Paper", "Params (M)", "GMACs", "GFLOPs", "Input", "Weights", "Licence", "Top-1 (%)")
TABLE_NOTES = """\
# Models

Made by `python -m zoo.tools.model_card --table docs/models.md`.

Computation is that of one image of the model's own size: GFLOPs count 2 for a multiply-add, GMACs are half of that.
Scans are included, with the usual 9 operations per step, channel and state; norms and activations are not. Weights link
to where they come from and are under the licence beside them. Accuracies are those that the authors publish for
ImageNet-1k; they have not been measured again here."""
EXAMPLE = """\
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import zoo

model = zoo.create_model("{name}", pretrained={pretrained}).eval()
backbone = zoo.create_model("{name}", pretrained={pretrained}, features_only=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
image = transform(Image.open("image.png").convert("{mode}")).unsqueeze(0)  # {shape}
with torch.inference_mode():  # features have {channels} channels at strides {strides}
    print(model(image).softmax(-1).topk(5), [feature.shape for feature in backbone(image)])"""


@dataclass(frozen=True)
class TrainingData:
    """What a tag says about the images that weights were trained on.

    Args:
        name: Name in words.
        hub: Names of the data sets on the Hugging Face hub.
        validation: Options of ``zoo.tools.validate`` for its validation split.
    """

    name: str
    hub: tuple[str, ...]
    validation: str


IMAGENET = "--root IMAGENET_FOLDER --split val"
TRAINING_DATA = {
    "in1k": TrainingData("ImageNet-1k", ("imagenet-1k",), IMAGENET),
    "in21k_ft_in1k": TrainingData("ImageNet-21k, then ImageNet-1k", ("imagenet-1k", "imagenet-21k"), IMAGENET),
    "fashion_mnist": TrainingData("Fashion-MNIST", ("fashion_mnist",), "--data fashion_mnist --split test"),
}


@dataclass(frozen=True)
class Subject:
    """A model that a card or a row is about.

    Args:
        name: Name with its tag, if it has one.
        cfg: Its pretrained config.
        family: Facts about its family.
    """

    name: str
    cfg: PretrainedCfg
    family: Family

    @property
    def architecture(self) -> str:
        """Name without tag."""
        return self.name.partition(".")[0]

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to load, in this package or at an address."""
        return bool(self.cfg.has_weights)

    @property
    def is_ours(self) -> bool:
        """Whether the variant is this zoo's own, not the authors'."""
        return self.cfg.origin_url is None

    @property
    def data(self) -> TrainingData | None:
        """What its weights were trained on, if it has weights and that is known."""
        return TRAINING_DATA.get(self.cfg.tag) if self.has_weights else None


@dataclass(frozen=True)
class Cost:
    """Parameters, and floating-point operations of one image of the model's own size."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class Measurement:
    """A row of a results file, and the comment above its table."""

    file: str
    note: str
    row: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status: 0 done, 1 failed; options that do not fit end it with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.tools.model_card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="name of a model, with or without tag")
    parser.add_argument("--all", action="store_true", help="cards of all models and their weights")
    parser.add_argument("--table", metavar="FILE", help="write the table of all models to this file")
    parser.add_argument("--output", help="file of the card, or folder with --all; default: the card is printed")
    parser.add_argument("--results", default="results", help="folder of results files; default %(default)s")
    options = parser.parse_args(arguments)
    if [bool(options.model), options.all, bool(options.table)].count(True) != 1:
        parser.error("give a model, --all or --table FILE, and only one of them")
    if options.all and not options.output:
        parser.error("--all needs --output FOLDER")
    if options.table and options.output:
        parser.error("--table names its file itself; leave out --output")
    try:
        if options.table:
            _write(options.table, model_table(_with_progress(zoo.list_models())))
            print(f"{len(zoo.list_models())} models in {options.table}")
        elif options.all:
            names = all_names()
            for name in _with_progress(names):
                _write(Path(options.output) / f"{name}.md", model_card(name, options.results))
            print(f"{len(names)} cards in {options.output}")
        elif options.output:
            _write(options.output, model_card(options.model, options.results))
            print(f"card of {options.model} in {options.output}")
        else:
            print(model_card(options.model, options.results), end="")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def model_card(name: str, results: str | Path = "results") -> str:
    """The card of a model as the Hugging Face hub shows it: Markdown below YAML.

    Args:
        name: Model, with or without tag; without, its first one.
        results: Folder whose .csv files hold measured results.

    Raises:
        ValueError: If there is no such model in this zoo.
    """
    subject = find(name)
    measured = read_results(results, subject)
    made_by = "\n".join(commands(subject, measured))
    sections = (
        front_matter(subject),
        f"# Model card for {subject.name}",
        f"{_variant(subject)} {subject.family.description}",
        _licence_warning(subject),
        facts(subject),
        results_section(measured),
        f"## Usage\n\n{_fenced(usage(subject), 'python')}",
        f"## Measuring it\n\n{_fenced(made_by, 'bash')}",
        f"## Citation\n\n{_fenced(citation(subject.family), 'bibtex')}",
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def model_table(names: Iterable[str]) -> str:
    """The table of these models and the papers of their families, as Markdown."""
    rows = [table_row(name) for name in names]
    papers = [
        f"- {family.name}: [{family.title}]({family.paper}); code: {_code(family)}"
        for family in sorted(FAMILIES.values(), key=lambda family: family.name)
    ]
    head = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    return "\n".join([TABLE_NOTES, "", *head, *rows, "", "## Papers", "", *papers]) + "\n"


def all_names() -> list[str]:
    """Every model: once for each of its released weights, or without tag if it has none."""
    released = zoo.list_pretrained()
    tagged = {model: [name for name in released if name.partition(".")[0] == model] for model in zoo.list_models()}
    return [name for model, names in tagged.items() for name in names or [model]]


def find(name: str) -> Subject:
    """Looks a model up.

    Raises:
        ValueError: If there is no such model in this zoo, it has no such tag, or nothing is known about its family.
    """
    architecture = name.partition(".")[0]
    if architecture not in zoo.list_models():
        nearest = difflib.get_close_matches(architecture, zoo.list_models(), n=5, cutoff=0.4)
        advice = f"did you mean {', '.join(nearest)}?" if nearest else "see zoo.list_models()"
        raise ValueError(f"there is no model {name!r} in this zoo; {advice}")
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        raise ValueError(f"{architecture} has no weights with the tag of {name!r}; see zoo.list_pretrained()") from None
    module = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    if module not in FAMILIES:
        raise ValueError(f"nothing is known about the family {module!r}; add it to tools/cards/families.py")
    return Subject(".".join(filter(None, (architecture, cfg.tag))), cfg, FAMILIES[module])


@functools.cache
def cost(name: str) -> Cost:
    """Counts a model on the meta device, where size is no matter."""
    model = build_on_meta(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Cost(parameters, count_flops(model, (1, *timm.get_pretrained_cfg(name).input_size)))


def front_matter(subject: Subject) -> str:
    """What the hub reads: tags, licence and data sets, as YAML."""
    entries = {
        "tags": list(TAGS),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": _licence(subject.cfg),
    }
    if subject.data:
        entries["datasets"] = list(subject.data.hub)
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---"


def facts(subject: Subject) -> str:
    """Origin, licences, size, preprocessing and published accuracy as a list."""
    family, cfg, size = subject.family, subject.cfg, cost(subject.name)
    paper = ", ".join(filter(None, (f"[{family.title}]({family.paper})", f"arXiv {family.year}", family.venue)))
    preprocessing = (
        f"{_pixels(cfg)}, {cfg.interpolation}, crop_pct {cfg.crop_pct}, crop_mode {cfg.crop_mode}, "
        f"mean {tuple(cfg.mean)}, std {tuple(cfg.std)}"
    )
    entries = {
        "Paper": paper,
        "Authors' code": _code(family),
        "This code": "vision-ssm-zoo, an implementation of its own, licence: Apache-2.0",
        "Weights": _weights(subject),
        "Parameters": f"{figure(size.parameters / 1e6)} M ({size.parameters:,})",
        "Computation": f"{figure(size.flops / 2e9)} GMACs, that is {figure(size.flops / 1e9)} GFLOPs, for one image "
        f"of {_pixels(cfg)}, scans included",
        "Preprocessing": preprocessing,
        "Accuracy": _published(subject),
    }
    return "## Facts\n\n" + "\n".join(f"- **{name}:** {text}" for name, text in entries.items() if text)


def usage(subject: Subject) -> str:
    """A program that classifies an image and extracts its features."""
    features = build_on_meta(subject.name, features_only=True).feature_info
    size = subject.cfg.input_size
    return EXAMPLE.format(
        name=subject.name,
        pretrained=subject.has_weights,
        mode="L" if size[0] == 1 else "RGB",
        shape=(1, *size),
        channels=", ".join(map(str, features.channels())),
        strides=", ".join(map(str, features.reduction())),
    )


def read_results(folder: str | Path, subject: Subject) -> list[Measurement]:
    """Rows about a model in the .csv files of a folder, by the names of the files.

    A row is about the model if its column ``model`` holds the name with this tag, or without any.
    """
    found = []
    for path in sorted(Path(folder).glob("*.csv")):
        lines = path.read_text(encoding="utf-8").splitlines()
        note = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            if row.get("model") in (subject.name, subject.architecture):
                found.append(Measurement(path.name, note, row))
    return found


def results_section(measured: Sequence[Measurement]) -> str:
    """The rows as tables, without the commands that made them; empty if there are no rows."""
    blocks = []
    for file in dict.fromkeys(measurement.file for measurement in measured):
        own = [measurement for measurement in measured if measurement.file == file]
        columns = [column for column in own[0].row if column and column != "command"]
        rows = [_row(measurement.row[column] or "" for column in columns) for measurement in own]
        title = f"From `results/{file}`. {own[0].note}".rstrip()
        blocks += [title, "\n".join([_row(columns), _row(["---"] * len(columns)), *rows])]
    return "\n\n".join(["## Results measured here", *blocks]) if blocks else ""


def commands(subject: Subject, measured: Sequence[Measurement]) -> list[str]:
    """Commands that repeat the rows, or that make the first one."""
    if subject.data:
        default = f"python -m zoo.tools.validate {subject.name} {subject.data.validation}"
    elif subject.is_ours:
        default = f"python -m zoo.tools.train {RECIPE} model.name={subject.name}"
    else:
        default = f"python -m zoo.tools.validate {subject.name} --checkpoint FILE {IMAGENET}"
    made_by = [measurement.row.get("command") or default for measurement in measured]
    return list(dict.fromkeys(made_by or [default]))


def citation(family: Family) -> str:
    """BibTeX of the paper, without what is not known."""
    fields = {
        "title": f"{{{family.title}}}",  # in braces of its own, so that capitals stay
        "author": family.authors,
        "year": family.year,
        "eprint": family.arxiv,
        "archivePrefix": "arXiv",
        "note": family.venue,
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    key = f"{family.name.lower()}{family.year}"
    return "\n".join([f"@misc{{{key},", *lines, "}"])


def table_row(name: str) -> str:
    """A model's line in the table."""
    subject = find(name)
    size = cost(subject.name)
    released = [find(full) for full in zoo.list_pretrained(f"{name}.*")]
    accuracy = published_accuracy(name)
    return _row(
        (
            f"`{name}`",
            subject.family.name,
            f"[{subject.family.arxiv}]({subject.family.paper})",
            figure(size.parameters / 1e6),
            figure(size.flops / 2e9),
            figure(size.flops / 1e9),
            _pixels(subject.cfg),
            ", ".join(_linked(weights.cfg.tag, _source(weights)) for weights in released),
            ", ".join(dict.fromkeys(_marked_licence(weights.cfg) for weights in released)),
            "" if accuracy is None else str(accuracy),
        )
    )


def figure(value: float) -> str:
    """A positive number with three digits, or with all those before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _variant(subject: Subject) -> str:
    """What the model's function says it is, without the numbers that the card counts itself."""
    text = (timm.model_entrypoint(subject.architecture).__doc__ or subject.architecture).partition(":")[0]
    return text.strip().replace("``", "`") + "."


def _code(family: Family) -> str:
    return f"<{family.repository}>, licence: {family.code_licence or 'none stated'}"


def _weights(subject: Subject) -> str:
    """Where weights come from, what they learned from and under which licence they are."""
    if not subject.has_weights:
        if subject.is_ours:
            return "none"
        return "none with a known address; a file of the authors' loads with `checkpoint_path=FILE`"
    origin = f"from <{_source(subject)}>" if _source(subject) else "part of this package"
    trained = f"trained on {subject.data.name}" if subject.data else ""
    return ", ".join(filter(None, (origin, trained, f"licence: {_marked_licence(subject.cfg)}")))


def _source(subject: Subject) -> str:
    """Address of weights; empty for those in this package."""
    cfg = subject.cfg
    if cfg.hf_hub_id:
        return f"https://huggingface.co/{cfg.hf_hub_id.partition('@')[0]}"
    return (cfg.url if isinstance(cfg.url, str) else cfg.url[0]) if cfg.url else ""


def _licence(cfg: PretrainedCfg) -> str:
    """The config's licence as the hub spells it."""
    return (cfg.license or "unknown").lower()


def _is_non_commercial(cfg: PretrainedCfg) -> bool:
    return "NOT FOR COMMERCIAL USE" in licence_note(cfg)


def _marked_licence(cfg: PretrainedCfg) -> str:
    """The licence in words, marked if it forbids commercial use."""
    text = "none stated" if _licence(cfg) in ("unknown", "other") else _licence(cfg)
    return f"{text} (**non-commercial**)" if _is_non_commercial(cfg) else text


def _licence_warning(subject: Subject) -> str:
    """A paragraph of its own for licences that keep one from using the weights freely."""
    if not subject.has_weights:
        return ""
    if _is_non_commercial(subject.cfg):
        return f"> **Not for commercial use:** these weights are licensed {_licence(subject.cfg)}."
    if _licence(subject.cfg) in ("unknown", "other"):
        return "> **No licence is stated** for these weights: ask the authors before you use or share them."
    return ""


def _published(subject: Subject) -> str:
    """The authors' accuracies, if they publish any."""
    top1, top5 = published_accuracy(subject.name), subject.family.top5.get(subject.architecture)
    if top1 is None:
        return ""
    return f"top-1 {top1} %{f', top-5 {top5} %' if top5 else ''} on ImageNet-1k, as published"


def _pixels(cfg: PretrainedCfg) -> str:
    return " x ".join(map(str, cfg.input_size))


def _linked(text: str, address: str) -> str:
    return f"[{text}]({address})" if address else f"{text} (in this package)"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def _with_progress(names: Sequence[str]) -> Iterable[str]:
    """The names with a bar, where there is a terminal to see it."""
    return require("tqdm").tqdm(names, unit="model", disable=None, dynamic_ncols=True)


def _write(path: str | Path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
