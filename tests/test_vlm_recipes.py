"""Settings of vision-language models, and the packaged recipes: they load, and their models can be built."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import zoo.configs
from zoo.config import VlmConfig, list_configs, load_config
from zoo.data.conversations import Conversations
from zoo.data.scenes import vocabulary
from zoo.engine.build import build_optimizer
from zoo.engine.vlm_build import build_vlm, create_from_card, encoder_of

pytest.importorskip("transformers", reason="needs transformers")

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "vlm.md"
RECIPES = [name for name in list_configs() if name.startswith("vlm/")]
LIGHT = ("vlm/nano_fashion_scenes", "vlm/mlmamba_3b_stage1")


@pytest.mark.parametrize(
    "options, problem",
    [
        (["model.language_kwargs.model_type=null", "model.language=gpt2"], "either model.language"),
        (["model.language_kwargs={hidden_size: 8}"], None),  # merged with the file's
        (["model.freeze=[decoder]"], "vision, connector, language_model, got 'decoder'"),
        (["model.freeze=[vision,connector,language_model]"], "nothing to train"),
        (["model.lora.rank=4", "model.freeze=[language_model]"], "whose adapters model.lora trains"),
        (["model.lora.parts=[connector]"], "vision, language_model, got 'connector'"),
        (["model.lora.parts=[]"], "names no part"),
        (["optim.layer_decay=0.9"], "optim.vision_lr"),
        (["optim.lr=0", "optim.connector_lr=1e-3"], "in proportion to optim.lr, which is 0"),
        (["data.name=coco"], "fashion_scenes, llava"),
        (["data.val_split=null"], "cannot be null for fashion_scenes"),
        (["data.name=llava", "data.val_split=null", "data.val_samples=null"], "how many conversations are kept"),
        (["data.turns=0"], "data.turns must be at least 1"),
        (["data.crop_mode=stretch"], "squash, center, border"),
        (["evaluation.questions=-1"], "evaluation.questions"),
        (["model.connectr=mlp_connector"], "did you mean 'model.connector'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, problem):
    if problem is None:
        assert load_config("vlm/nano_fashion_scenes", options).model.language_kwargs["hidden_size"] == 8
        return
    with pytest.raises(ValueError, match=problem):
        load_config("vlm/nano_fashion_scenes", options)


NEW_LANGUAGE = {  # instead of a repository of the hub, which has this size
    "cobra": "{model_type: mamba, hidden_size: 2560, num_hidden_layers: 64, vocab_size: 50280}",
    "mlmamba": "{model_type: mamba2, hidden_size: 2560, num_hidden_layers: 64, num_heads: 80, head_dim: 64, "
    "n_groups: 1, vocab_size: 50288, tie_word_embeddings: true}",
}


@pytest.mark.parametrize(
    "name", [name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_recipe_loads_and_its_model_builds(name):
    options = ["model.pretrained=false", "model.weights=null", "model.tokenizer=words"]
    for family, language in NEW_LANGUAGE.items():
        if family in name:
            options += ["model.language=null", f"model.language_kwargs={language}"]
    config = load_config(name, options)
    assert isinstance(config, VlmConfig)
    with torch.device("meta"):
        model, card = build_vlm(config, Conversations((), (), "nowhere", vocabulary()))
        assert create_from_card(card).state_dict().keys() == model.state_dict().keys()
        tokens = encoder_of(model, card).image_tokens
    assert tokens == (256 if "nano" in name else 729)
    frozen = {part for part in ("vision", "connector", "language_model") if part in config.model.freeze}
    trained = {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"vision", "connector", "language_model"} - frozen
    build_optimizer(config, model, updates=100)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_warms_up_and_names_where_it_starts(name):
    config = load_config(name)
    assert config.optim.clip_grad and 0 < config.optim.warmup_epochs < config.optim.epochs / 2
    assert f"-m zoo.tools.train {name}" in " ".join(
        (Path(zoo.configs.__path__[0]) / f"{name}.yaml").read_text().split()
    )
    if config.model.weights:
        outputs = [load_config(other).output for other in RECIPES]
        assert config.model.weights.rpartition("/")[0] in outputs


@pytest.mark.parametrize(
    "override, connector",
    [
        ("model.connector=mlp_connector", "MLPConnector"),
        ("model.connector_kwargs.scans=[raster]", "Mamba2ScanConnector"),
        ("model.connector_kwargs.scans=[raster,columns]", "Mamba2ScanConnector"),
    ],
)
def test_small_recipe_takes_another_connector_by_one_setting(override, connector):
    config = load_config("vlm/nano_fashion_scenes", [override])
    with torch.device("meta"):
        model, _ = build_vlm(config, Conversations((), (), "nowhere", vocabulary()))
    assert type(model.connector).__name__ == connector
    assert getattr(model.connector, "scans", ()) == tuple(config.model.connector_kwargs.get("scans", ()))


def test_the_guide_lists_every_recipe_as_it_is():
    """Batch, rate and passes over the data of the table are those of the files."""
    rows = re.findall(r"^\| `(vlm/\S+)` \| (.*) \| (\d+) \| ([\d.e-]+) \| (\d+) \|", GUIDE.read_text(), re.M)
    assert {name for name, *_ in rows} == set(RECIPES)
    conversations = {"1231k": 1_231_000, "558k": 558_000, "665k": 665_000}
    for name, trained, batch, lr, passes in rows:
        config = load_config(name)
        parts = [part for part in ("vision", "connector", "language_model") if part not in config.model.freeze]
        assert trained == ("all" if len(parts) == 3 else ", ".join(parts).replace("_", " "))
        together = config.optim.lr_batch_size or config.data.batch_size
        assert (int(batch), float(lr)) == (together, config.optim.lr)
        if config.optim.epoch_updates is None:
            assert int(passes) == config.optim.epochs
            continue
        count = next(value for key, value in conversations.items() if key in config.data.train_split)
        seen = config.optim.epochs * config.optim.epoch_updates * together
        assert seen == pytest.approx(int(passes) * count, rel=0.01)
        assert config.optim.warmup_updates == pytest.approx(
            0.03 * config.optim.epochs * config.optim.epoch_updates, abs=1
        )


def test_commands_of_the_guide_name_what_exists():
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    modules = []
    for words in filter(None, lines):
        if words[0] == "pip":
            continue
        assert words[0] in ("python", "torchrun")
        module, *arguments = words[words.index("-m") + 1 :]
        modules.append(module)
        assert (ROOT / "tools" / f"{module.removeprefix('zoo.tools.')}.py").is_file()
        if module == "zoo.tools.train":
            load_config(arguments[0], arguments[1:])
    assert modules.count("zoo.tools.train") == 10
