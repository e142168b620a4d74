"""Model cards and the table of models: every model has one, and what they say is true."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image

import zoo
from zoo import backbones
from zoo.tools import leaderboard, model_card
from zoo.tools.cards.families import FAMILIES
from zoo.weights import licence_note

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "models.md"
KEYS = ROOT / "tests" / "keys"
COUNTED = ("GMACs", "GFLOPs")  # columns that take a pass through the model
SMALL = [*zoo.list_models("*_nano"), *zoo.list_models(["*_pico", "*_micro"])]


@pytest.fixture
def uncounted(monkeypatch):
    """Leaves out the slow part of cards, the count of operations."""
    model_card.cost.cache_clear()
    monkeypatch.setattr(model_card, "count_flops", lambda model, size: 2_000_000_000)
    yield
    model_card.cost.cache_clear()


def cells(line):
    """Cells of a table's line by their columns."""
    return dict(zip(model_card.COLUMNS, [cell.strip() for cell in line.strip("|\n").split("|")], strict=True))


def published_rows():
    """Lines of docs/models.md by model."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return {match[1]: line for line in lines if (match := re.match(r"\| `(\w+)` \|", line))}


def split_card(card):
    """The YAML of a card, read, and the Markdown below it."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def block(card, language):
    """Text of the card's block in a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", card, re.M | re.S)
    return text


def check_released(card, name, family, spec):
    """A card says what the list of the released checkpoint says."""
    assert family.repository == spec["upstream"]
    assert f"({spec['params']:,})" in card
    assert (f"top-1 {spec['top1']} %" in card) == (spec["top1"] is not None)
    assert family.top5.get(name) == spec.get("top5")
    assert f"crop_pct {spec['crop_pct']}, crop_mode {spec.get('crop_mode', 'center')}, " in card
    assert f"mean {tuple(spec['mean'])}, std {tuple(spec['std'])}" in card


# Every model.


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_model_has_a_card_and_a_row(name, uncounted):
    card = model_card.model_card(name, ROOT / "results")
    front, body = split_card(card)
    cfg = timm.get_pretrained_cfg(name)
    family = FAMILIES[timm.model_entrypoint(name).__module__.rpartition(".")[2]]
    assert front["license"] == (cfg.license or "unknown").lower()
    assert front["library_name"] == "timm" and set(front["tags"]) == set(model_card.TAGS)
    assert ("datasets" in front) == bool(cfg.has_weights)
    assert f"# Model card for {name}" in body and family.description in body
    assert ("**Not for commercial use" in body) == (bool(cfg.has_weights) and "NOT FOR" in licence_note(cfg))
    assert ("**No licence is stated" in body) == (bool(cfg.has_weights) and cfg.license in (None, "unknown"))
    compile(block(card, "python"), name, "exec")
    bibtex = block(card, "bibtex")
    assert bibtex.count("{") == bibtex.count("}") and family.arxiv in bibtex
    for private in (str(ROOT), str(Path(zoo.__file__).parent)):
        assert private not in card
    if (KEYS / f"{name}.json").is_file():
        check_released(card, name, family, json.loads((KEYS / f"{name}.json").read_text()))
    new, old = cells(model_card.table_row(name)), cells(published_rows()[name])
    assert {k: v for k, v in new.items() if k not in COUNTED} == {k: v for k, v in old.items() if k not in COUNTED}


def test_every_family_is_described():
    assert set(FAMILIES) == set(backbones.FAMILIES)
    for module, family in FAMILIES.items():
        cfgs = [timm.get_pretrained_cfg(name) for name in zoo.list_models(family=module)]
        assert {cfg.paper_ids for cfg in cfgs} == {f"arXiv:{family.arxiv}"}
        assert {cfg.paper_name for cfg in cfgs} == {family.title}
        assert {cfg.origin_url for cfg in cfgs} - {None} == {family.repository}
        assert set(family.top5) <= set(zoo.list_models(family=module))
        assert 2023 < family.year < 2100 and len(family.description) > 200


def test_released_checkpoints_are_of_models_with_cards():
    pytest.importorskip("transformers", reason="vision-language models need transformers")
    assert {path.stem for path in KEYS.glob("*.json")} - set(zoo.list_vlms()) <= set(zoo.list_models())


# Counting.


@pytest.mark.parametrize("name", SMALL)
def test_counts_of_small_models_are_current(name):
    assert model_card.table_row(name) == published_rows()[name]


@pytest.mark.slow
def test_table_is_current():
    assert model_card.model_table(zoo.list_models()) == TABLE.read_text(encoding="utf-8")


def test_table_without_its_rows_is_current():
    text = TABLE.read_text(encoding="utf-8")
    assert list(published_rows()) == zoo.list_models()
    for line in published_rows().values():
        text = text.replace(f"{line}\n", "", 1)
    assert text == model_card.model_table([])


@pytest.mark.parametrize("name", ["vmamba_nano", "adventurer_nano", "local_vim_nano"])
def test_counts_are_those_of_a_real_model(name):
    """These have no attention, whose operations torch does not count on CPUs."""
    model, counted = zoo.create_model(name), model_card.cost(name)
    size = (1, *model.pretrained_cfg["input_size"])
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counted.flops == leaderboard.count_flops(model, size)
    assert f"({counted.parameters:,})" in model_card.model_card(name)


def test_a_pool_whose_query_is_a_parameter_is_counted():
    """torch's counter asks for the gradient function of such a query, which it lacks."""
    assert model_card.cost("lbvim_528_patch16_224_atthead").flops > model_card.cost("lbvim_300_patch16_224").flops


@pytest.mark.parametrize("value, text", [(0.0364, "0.0364"), (7.148, "7.15"), (97.598, "97.6"), (1023.1, "1023")])
def test_figures_have_three_digits(value, text):
    assert model_card.figure(value) == text


# Usage, results, commands.


def test_usage_runs(uncounted, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    program = block(model_card.model_card("vim_nano"), "python")
    assert 'create_model("vim_nano.fashion_mnist", pretrained=True)' in program
    assert len([line for line in program.splitlines() if line]) == 10
    (tmp_path / "program.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py")
    printed = capsys.readouterr().out
    assert "indices" in printed and "torch.Size([1, 192, 14, 14])" in printed


def test_weights_tell_their_origin_and_data(uncounted):
    card = model_card.model_card("mamba_vision_b_21k")
    front, body = split_card(card)
    assert front["license"] == "cc-by-nc-sa-4.0" and front["datasets"] == ["imagenet-1k", "imagenet-21k"]
    assert "from <https://huggingface.co/nvidia/MambaVision-B-21K>, trained on ImageNet-21k" in body
    assert "cc-by-nc-sa-4.0 (**non-commercial**)" in body and "research and evaluation only" in body
    assert "licence: apache-2.0" in model_card.model_card("vim_nano.fashion_mnist")
    assert "**Weights:** none\n" in model_card.model_card("vim_nano.untrained")


def test_measured_rows_and_their_commands(tmp_path):
    head = ["model", "top1", "command"]
    rows = [["vim_nano", "93.1", "train it"], ["lbvim_nano", "93.0", "train that"], ["vim_nano.untrained", "9.9", ""]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        file.write("# Trained on a test bench\n")
        csv.writer(file).writerows([head, *rows])
    (tmp_path / "b.csv").write_text("model,img_size,top1\nvim_nano.fashion_mnist,28,94.4\n")
    (tmp_path / "c.csv").write_text("epoch,loss\n1,2\n")
    subject = model_card.find("vim_nano")
    measured = model_card.read_results(tmp_path, subject)
    section = model_card.results_section(measured)
    assert (
        "From `results/a.csv`. Trained on a test bench\n\n| model | top1 |\n| --- | --- |\n| vim_nano | 93.1 |\n"
        in section
    )
    assert section.endswith(
        "From `results/b.csv`.\n\n| model | img_size | top1 |\n| --- | --- | --- |\n"
        "| vim_nano.fashion_mnist | 28 | 94.4 |"
    )
    validate = "python -m zoo.tools.validate vim_nano.fashion_mnist --data fashion_mnist --split test"
    assert model_card.commands(subject, measured) == ["train it", validate]
    assert model_card.results_section([]) == "" and model_card.read_results(tmp_path / "none", subject) == []


@pytest.mark.parametrize(
    "name, command",
    [
        ("vim_tiny_patch16_224", "validate vim_tiny_patch16_224.in1k --root IMAGENET_FOLDER --split val"),
        ("vim_base_patch16_224", "validate vim_base_patch16_224 --checkpoint FILE --root IMAGENET_FOLDER --split val"),
        ("plain_mamba_nano", f"train {leaderboard.RECIPE} model.name=plain_mamba_nano"),
    ],
)
def test_commands_without_rows(name, command):
    assert model_card.commands(model_card.find(name), []) == [f"python -m zoo.tools.{command}"]


# The command line.


def test_tool_writes_and_prints(uncounted, tmp_path, capsys, monkeypatch):
    assert model_card.main(["vmamba_nano"]) == 0
    card = model_card.model_card("vmamba_nano")
    assert capsys.readouterr().out == card
    assert model_card.main(["vmamba_nano", "--output", str(tmp_path / "new" / "card.md")]) == 0
    assert (tmp_path / "new" / "card.md").read_text() == card
    monkeypatch.setattr(model_card, "all_names", lambda: ["vmamba_nano", "vim_nano.fashion_mnist"])
    assert model_card.main(["--all", "--output", str(tmp_path / "cards")]) == 0
    assert {path.name for path in (tmp_path / "cards").iterdir()} == {"vmamba_nano.md", "vim_nano.fashion_mnist.md"}
    assert f"2 cards in {tmp_path / 'cards'}" in capsys.readouterr().out
    monkeypatch.setattr(zoo, "list_models", lambda *args: ["vmamba_nano"])
    assert model_card.main(["--table", str(tmp_path / "table.md")]) == 0
    assert model_card.table_row("vmamba_nano") in (tmp_path / "table.md").read_text()


def test_names_of_all_cards():
    names = model_card.all_names()
    assert len(names) == len(set(names))
    assert set(zoo.list_pretrained()) <= set(names)
    assert {name.partition(".")[0] for name in names} == set(zoo.list_models())


@pytest.mark.parametrize(
    "name, message",
    [
        ("vim_nono", "did you mean vim_nano"),
        ("resnet18", "no model 'resnet18' in this zoo"),
        ("vim_nano.in1k", "no weights with the tag of 'vim_nano.in1k'"),
    ],
)
def test_mistakes_are_named(name, message, capsys):
    assert model_card.main([name]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["vim_nano", "--all"], ["--all"], ["--table", "a", "--output", "b"]])
def test_options_that_do_not_fit_end_with_2(options, capsys):
    with pytest.raises(SystemExit) as ended:
        model_card.main(options)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_family_without_facts_is_named(monkeypatch):
    monkeypatch.delitem(FAMILIES, "vim")
    with pytest.raises(ValueError, match=r"family 'vim'; add it to tools/cards/families\.py"):
        model_card.find("vim_nano")
