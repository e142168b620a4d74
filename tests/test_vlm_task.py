"""Training of vision-language models: settings, recipes, stages, adapters, runs that continue, weights in use."""

import csv
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import zoo
from zoo.config import load_config
from zoo.engine import find_checkpoint, load_trained, read_log, scores_row, settings_beside, train
from zoo.engine.build import build_optimizer
from zoo.engine.task import Place, find_task
from zoo.engine.vlm_evaluate import mean_color
from zoo.vlm import load_vlm
from zoo.weights import save_weights

pytest.importorskip("transformers", reason="needs transformers")

processes = runpy.run_path(str(Path(__file__).with_name("training_processes.py")))
CPU = Place(torch.device("cpu"))
COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
LANGUAGE = {
    "mamba2": "{model_type: mamba2, hidden_size: 32, num_hidden_layers: 1, num_heads: 4, head_dim: 16, "
    "state_size: 8, n_groups: 1, tie_word_embeddings: true}",
    "mamba": "{model_type: mamba, hidden_size: 32, num_hidden_layers: 1, state_size: 4}",
    "llama": "{model_type: llama, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 32, max_position_embeddings: 60}",
}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def said(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of one colour with questions about it, and text without images, in LLaVA's format."""
    root = tmp_path_factory.mktemp("llava")
    (root / "images").mkdir()
    for split, shades in (("train", range(0, 24, 4)), ("val", (2, 11))):
        rows = []
        for color, level in COLORS.items():
            for shade in shades:
                name = f"{split}_{color}_{shade}.png"
                Image.new("RGB", (20, 14), tuple(max(0, each - shade) for each in level)).save(root / "images" / name)
                turns = ["<image>\nWhat color is it?", color]
                if shade % 8 == 4:
                    turns += ["Is it white?", "yes" if color == "white" else "no"]
                rows.append({"id": name, "image": name, "conversations": said(*turns)})
        rows += [{"conversations": said("How many images are there?", "none")}] * (4 if split == "train" else 1)
        (root / f"{split}.json").write_text(json.dumps(rows))
    return root


def small_config(folder, output, *overrides, language="mamba2"):
    return load_config(
        "vlm/nano_fashion_scenes",
        [
            *("model.name=vim_micro", "model.kwargs={patch_size: 8, embed_dim: 16, depth: 2, d_state: 4}"),
            *("model.connector=mlp_connector", f"model.language_kwargs={LANGUAGE[language]}"),
            *("data.name=llava", f"data.root={folder}", "data.val_split=val", "data.img_size=16"),
            *("data.train_samples=null", "data.val_samples=null", "data.workers=0"),
            *("data.batch_size=7", "data.val_batch_size=5", "data.curriculum=0", "augment.crop_padding=1"),
            *("optim.lr=1e-2", "optim.epochs=2", "optim.warmup_epochs=0", "optim.warmup_updates=null"),
            *("precision=fp32", "cpu=true"),
            f"output={output}",
            *overrides,
        ],
    )


def run(*arguments, **options):
    result = train(small_config(*arguments, **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    return result


def weights(output, name="last"):
    return load_file(output / f"{name}.safetensors")


def changed(first, second):
    """First parts of the names of tensors that differ."""
    assert first.keys() == second.keys()
    return {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}


# Building


def test_parts_learn_at_their_own_rates(folder, tmp_path):
    rates = ["optim.lr=1e-3", "optim.connector_lr=4e-3", "optim.vision_lr=0", "optim.min_lr=0"]
    config = small_config(folder, tmp_path, *rates, "optim.warmup_updates=0")
    task = find_task("vlm")(config, CPU)
    optimizer, scheduler = build_optimizer(config, task.model, updates=4)
    part_of = {id(parameter): name.split(".")[0] for name, parameter in task.model.named_parameters()}
    for update, factor in ((0, 1.0), (4, 0.5), (8, 0.0)):  # halfway and at the end of a cosine
        scheduler.step_update(update)
        found = {part_of[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
        expected = {"vision": 0, "connector": 4e-3 * factor, "language_model": 1e-3 * factor}
        assert found == pytest.approx(expected)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(part_of)


def test_vision_model_starts_from_a_classifier_or_a_clip_run(folder, tmp_path):
    kwargs = small_config(folder, tmp_path).model.kwargs
    classifier = zoo.create_model("vim_micro", num_classes=3, img_size=32, **kwargs)  # another size of images
    files = [tmp_path / "classifier.safetensors", tmp_path / "clip.safetensors"]
    save_weights(classifier.state_dict(), files[0])
    trunk = {f"visual.trunk.{name}": tensor for name, tensor in classifier.state_dict().items() if "head" not in name}
    save_weights({**trunk, "logit_scale": torch.zeros(())}, files[1])
    for file in files:
        task = find_task("vlm")(small_config(folder, tmp_path, f"model.checkpoint={file}"), CPU)
        (tower,) = task.model.vision.towers
        assert tower.pos_embed.shape[1] == 4
        for name, tensor in tower.state_dict().items():
            assert name == "pos_embed" or torch.equal(tensor, classifier.state_dict()[name]), name
    with pytest.raises(ValueError, match="do not fit"):
        find_task("vlm")(small_config(folder, tmp_path, f"model.checkpoint={file}", "model.kwargs.embed_dim=32"), CPU)


def test_vision_model_starts_from_a_classifier_of_grey_images(folder, tmp_path):
    """Grey images in colour give what they gave."""
    kwargs = small_config(folder, tmp_path).model.kwargs
    classifier = zoo.create_model("vim_micro", num_classes=3, in_chans=1, img_size=8, **kwargs)
    save_weights(classifier.state_dict(), tmp_path / "grey.safetensors")
    task = find_task("vlm")(small_config(folder, tmp_path, f"model.checkpoint={tmp_path / 'grey.safetensors'}"), CPU)
    (tower,) = task.model.vision.towers
    grey = torch.randn(2, 1, 8, 8)
    (ours,), (theirs,) = (
        model.eval().forward_intermediates(images, indices=[0], intermediates_only=True, norm=False)
        for model, images in ((tower, grey.expand(-1, 3, -1, -1)), (classifier, grey))
    )
    torch.testing.assert_close(ours, theirs)


def test_a_pretrained_language_model_and_its_tokenizer(folder, tmp_path):
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    place = tmp_path / "language"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(place)
    config = transformers.MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1, state_size=4)
    language = transformers.MambaForCausalLM(config)
    language.save_pretrained(place)
    options = ["model.language_kwargs=null", f"model.language={place}", "model.images_in_text=true"]
    config = load_config(str(write_plain(folder, tmp_path, *options)))
    task = find_task("vlm")(config, CPU)
    ours, theirs = task.model.language_model.state_dict(), language.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert task.model.image_token_id == -200 and task.encoder.chat_format.answer == "{text}</s>"
    batch = next(iter(task.train_loader))
    task.loss(task.model, batch).backward()
    assert task.model.connector.layers[0].weight.grad.abs().sum() > 0
    assert task.encoder.tokenizer.decode(batch["labels"][batch["labels"] >= 0][:3]) in (
        "red",
        "gre",
        "blu",
        "whi",
        "non",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(9)])
    tokenizer.save_pretrained(place)
    with pytest.raises(ValueError, match="has 266 tokens, more than the 260 of the language model"):
        find_task("vlm")(config, CPU)


def write_plain(folder, tmp_path, *options):
    """The small settings in a file of their own, where a list of fields can be removed."""
    from zoo.config import save_config

    config = small_config(folder, tmp_path / "run")
    for option in options:
        name, _, value = option.removeprefix("model.").partition("=")
        setattr(config.model, name, {"null": {}, "true": True}.get(value, value))
    save_config(config, tmp_path / "plain.yaml")
    return tmp_path / "plain.yaml"


def test_conversations_beyond_what_the_decoder_holds(folder, tmp_path, caplog):
    """A decoder with attention has a limit: two turns about an image are too long here."""
    options = ["model.language_kwargs.max_position_embeddings=22"]
    with pytest.raises(ValueError, match=r"12 of 28 conversations in .*train\.json.*\n.*more than the 22"):
        find_task("vlm")(small_config(folder, tmp_path, *options, language="llama"), CPU)
    options += ["data.bad_files=skip"]
    task = find_task("vlm")(small_config(folder, tmp_path, *options, language="llama"), CPU)
    assert len(task.train_loader.samples) == 16 and "12 of 28" in caplog.text
    assert set(task.evaluate(task.model)) == set(task.columns)
    with pytest.raises(ValueError, match=r"more than the 12"):
        find_task("vlm")(small_config(folder, tmp_path, "data.max_tokens=12"), CPU)


# Runs


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run that has learned the colours."""
    output = tmp_path_factory.mktemp("run")
    return run(folder, output, "optim.epochs=3", "optim.epoch_updates=40", "checkpoint_every=25")


def test_a_run_learns_what_is_seen(finished):
    first, last = finished.log[0], finished.log[-1]
    assert last["train_loss"] < first["train_loss"] and last["val_loss"] < 0.5
    assert finished.best["accuracy"] > 85 and finished.goal == "accuracy"
    assert last["blank_accuracy"] < 60 and last["margin"] == pytest.approx(
        last["accuracy"] - last["blank_accuracy"], abs=1e-3
    )
    with (finished.output / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and {row["question"] for row in rows} >= {"What color is it?", "How many images are there?"}
    right = sum(row["truth"] == row["answer"] for row in rows)
    assert right == sum(int(row["right"]) for row in rows) and 100 * right / 9 == pytest.approx(
        finished.best["accuracy"], abs=0.01
    )
    with Image.open(finished.output / "answers.png") as sheet:
        assert min(sheet.size) > 300


def test_weights_of_a_run_answer_questions(finished, folder):
    trained = load_vlm(finished.output)
    assert not trained.model.training and trained.image_size == (16, 16) and trained.image_token_id is None
    assert trained.card.task == "vlm" and trained.card.model == "vim_micro + mlp + mamba2"
    ids = trained.tokenizer(trained.chat_format.question.replace("{text}", "What color is it?"))["input_ids"]
    image = torch.tensor(COLORS["blue"]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 255
    stop = [trained.tokenizer.eos_token_id]
    tokens = trained.model.generate(torch.tensor([ids]), images=image, max_new_tokens=5, stop_tokens=stop)
    assert trained.tokenizer.decode(tokens[0].tolist()) == "blue" and tokens.shape[1] == 2
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_vlm(folder / "nothing.safetensors")
    model, card = load_trained(finished.output / "last.safetensors")
    row = scores_row(model, card, settings_beside(str(finished.output)))
    logged = read_log(finished.output)[-1]
    for name in ("val_loss", "token_accuracy", "accuracy", "blank_accuracy"):
        assert row[name] == pytest.approx(logged[name], rel=1e-3, abs=1e-3)


def test_killed_run_continues_bit_for_bit_within_an_epoch(folder, tmp_path, monkeypatch):
    """Killed in the seventh of eight updates, and continued after the sixth."""
    options = ["ema_decay=0.9", "checkpoint_every=2", "model.lora.rank=2", "model.lora.dropout=0.1"]
    run(folder, tmp_path / "whole", *options)
    kind, calls = find_task("vlm"), []
    loss = kind.loss

    def killed(self, model, batch):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return loss(self, model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "loss", killed)
        run(folder, tmp_path / "killed", *options)
    state = find_checkpoint(tmp_path / "killed").training
    assert (state["epoch"], state["update"]) == (1, 2)
    AcceleratorState._reset_state(reset_partial_state=True)
    run(folder, tmp_path / "killed", *options, "resume=auto")
    for name in ("last", "best"):
        assert not changed(weights(tmp_path / "killed", name), weights(tmp_path / "whole", name))
    drop = dict.fromkeys(("seconds", "images_per_second", "data_seconds"))
    logs = [[{**row, **drop} for row in read_log(tmp_path / name)] for name in ("killed", "whole")]
    assert logs[0] == logs[1]


def test_two_stages(folder, tmp_path):
    """The connector alone; then connector and decoder from there, from the last weights of the first stage."""
    options = ["optim.epochs=1"]
    config = small_config(folder, tmp_path / "zero", "optim.epochs=1", "model.freeze=[vision,language_model]")
    torch.manual_seed(config.seed)
    start = find_task("vlm")(config, CPU).model.state_dict()  # the loop's seed
    run(folder, tmp_path / "one", *options, "model.freeze=[vision,language_model]")
    one = weights(tmp_path / "one")
    assert one.keys() == start.keys()
    file = tmp_path / "one" / "last.safetensors"
    begun = find_task("vlm")(small_config(folder, tmp_path / "two", f"model.weights={file}"), CPU).model
    assert not changed(begun.state_dict(), one)
    run(folder, tmp_path / "two", *options, "model.freeze=[vision]", f"model.weights={file}")
    assert changed(weights(tmp_path / "two"), one) == {"connector", "language_model"}
    again = find_task("vlm")(small_config(folder, tmp_path / "two", f"model.weights={tmp_path / 'two'}"), CPU).model
    assert not changed(again.state_dict(), weights(tmp_path / "two", "best"))
    with pytest.raises(ValueError, match="do not fit"):
        find_task("vlm")(
            small_config(folder, tmp_path, f"model.weights={file}", "model.connector=linear_connector"), CPU
        )


def test_a_frozen_decoder_recomputes_too(folder, tmp_path):
    options = ["model.freeze=[vision,language_model]", "augment.crop_padding=0"]
    gradients = []
    for scope in ("null", "block"):
        torch.manual_seed(0)
        task = find_task("vlm")(small_config(folder, tmp_path, *options, f"grad_checkpointing={scope}"), CPU)
        task.model.train()
        layer = task.model.language_model.backbone.layers[0]
        calls = []
        layer.mixer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        task.loss(task.model, next(iter(task.train_loader))).backward()
        assert len(calls) == (1 if scope == "null" else 2)
        assert not task.model.language_model.training
        gradients.append(task.model.connector.layers[0].weight.grad)
        task.model.eval()
        assert not layer.training
    torch.testing.assert_close(*gradients)


# Adapters


@pytest.mark.parametrize("language", ["mamba2", "mamba", "llama"])
def test_adapters_alone_are_trained_in_their_parts(folder, tmp_path, language):
    options = ["model.lora.rank=2", "model.lora.parts=[vision,language_model]", "optim.epochs=1"]
    config = small_config(folder, tmp_path, *options, language=language)
    task = find_task("vlm")(config, CPU)
    before = {name: parameter.clone() for name, parameter in task.model.named_parameters()}
    optimizer, _ = build_optimizer(config, task.model, updates=4)
    task.model.train()
    for batch in task.train_loader:
        task.loss(task.model, batch).backward()
        optimizer.step()
        without = [name for name, each in task.model.named_parameters() if each.requires_grad and each.grad is None]
        assert not without
        optimizer.zero_grad()
    moved = {name for name, parameter in task.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".lora_" in name or name.startswith("connector.")}
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in moved if ".lora_" in name}
    assert adapted >= {"mamba2": {"in_proj", "out_proj"}, "mamba": {"in_proj", "x_proj", "out_proj"}}.get(
        language, {"q_proj", "down_proj"}
    )
    assert not any("lm_head.lora" in name or "dt_proj.lora" in name for name in moved)


def test_weights_with_adapters_answer_as_merged_ones(folder, tmp_path):
    options = ["model.lora.rank=3", "model.lora.alpha=9", "optim.epochs=1", "optim.lr=3e-2"]
    run(folder, tmp_path / "lora", *options)
    adapted, card = load_trained(tmp_path / "lora")
    merged = load_vlm(tmp_path / "lora")
    assert card.kwargs["lora"]["rank"] == 3
    assert any(".lora_A." in name for name in adapted.state_dict())
    assert not any(".lora_" in name or ".base_layer" in name for name in merged.model.state_dict())
    states = adapted.state_dict()
    name = "language_model.backbone.layers.0.mixer.in_proj"
    added = states[f"{name}.lora_B.default.weight"] @ states[f"{name}.lora_A.default.weight"]
    assert added.abs().max() > 1e-3
    expected = states[f"{name}.base_layer.weight"] + 9 / 3 * added
    torch.testing.assert_close(merged.model.state_dict()[f"{name}.weight"], expected)
    images, ids = torch.rand(3, 3, 16, 16), torch.randint(1, len(merged.tokenizer), (3, 6))
    torch.testing.assert_close(merged.model(ids, images=images).logits, adapted(ids, images=images).logits)
    tokens = [model.generate(ids, images=images, max_new_tokens=8, stop_tokens=()) for model in (merged.model, adapted)]
    assert torch.equal(*tokens)
    task = find_task("vlm")(small_config(folder, tmp_path / "next", f"model.weights={tmp_path / 'lora'}"), CPU)
    assert not changed(task.model.state_dict(), merged.model.state_dict())


@pytest.mark.parametrize(
    "options, problem",
    [
        (["model.lora.layers=[q_proj]"], "the language_model has no q_proj; it has in_proj, out_proj"),
        (["model.lora.layers=[dt_proj]"], "dt_proj, where an adapter has no effect"),
    ],
)
def test_layers_that_cannot_have_adapters(folder, tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        find_task("vlm")(small_config(folder, tmp_path, "model.lora.rank=2", *options), CPU)


# Scores and failures


def test_blank_image_has_the_mean_colour(folder, tmp_path):
    task = find_task("vlm")(small_config(folder, tmp_path), CPU)
    levels = [[max(0, each - shade) / 255 for each in level] for level in COLORS.values() for shade in (2, 11)]
    torch.testing.assert_close(
        mean_color(task.validation.data, task.validation.transform), torch.tensor(levels).mean(0)
    )
    assert mean_color(task.validation.data.take([8]), task.validation.transform).shape == (3,)


def test_captions_are_scored_by_their_tokens_alone(folder, tmp_path):
    result = run(folder, tmp_path, "evaluation.questions=0", "optim.epochs=1")
    assert result.goal == "token_accuracy" and "accuracy" not in result.best
    assert not (tmp_path / "answers.csv").exists()


def test_batches_of_text_alone_reach_the_connector(folder, tmp_path):
    """So that every process has the same gradients to exchange."""
    task = find_task("vlm")(small_config(folder, tmp_path, "data.batch_size=4"), CPU)
    rows = torch.tensor([24, 25, 26, 27])
    batch = {**task.train_loader.table.batch(rows, 0), "images": torch.empty(4, 0, 3, 16, 16, dtype=torch.uint8)}
    loss = task.loss(task.model, {**batch, "image_counts": [0] * 4, "weight": 1.0})
    loss.backward()
    assert all(parameter.grad is not None for parameter in task.model.parameters())
    assert task.model.connector.layers[0].weight.grad.abs().sum() == 0


def test_failure_names_the_module(folder, tmp_path):
    task = find_task("vlm")(small_config(folder, tmp_path), CPU)
    task.model.connector.layers[2].bias.data.fill_(math.inf)
    task.model.train()
    assert not task.loss(task.model, next(iter(task.train_loader))).isfinite()
    assert "'model.connector.layers.2.bias' is not finite" in task.explain_failure()


def test_captured_towers_read_what_has_their_shape(folder, tmp_path, monkeypatch):
    """In training; of the capture itself there is a test for GPUs."""
    replayed = []

    def capture(reader, shape, precision):
        reader.register_forward_hook(lambda *_: replayed.append(reader.training))

    monkeypatch.setattr("zoo.engine.tasks.vlm.capture_training", capture)
    task = find_task("vlm")(small_config(folder, tmp_path), CPU)
    names = task.model.state_dict().keys()
    task.capture()
    assert task.model.state_dict().keys() == names
    vision, images = task.model.vision, torch.rand(7, 3, 16, 16)
    expected, _ = vision.eval()(images)
    assert not replayed
    features, _ = vision.train()(images)
    torch.testing.assert_close(features, expected)
    assert replayed == [True] and features.requires_grad
    vision(images[:3])
    assert len(replayed) == 1
    frozen = find_task("vlm")(small_config(folder, tmp_path, "model.freeze=[vision]"), CPU)
    with pytest.raises(ValueError, match="captures vision towers that are trained; these are frozen"):
        frozen.capture()


# Several processes


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(folder, tmp_path, strategy):
    """Rows of text alone are in some of the batches of one process and not of the other."""
    options = ["model.freeze=[vision]", "optim.name=sgd", "optim.epochs=1"]
    run(folder, tmp_path / "1" / "run", *options, "data.batch_size=6")
    (tmp_path / "recipe.yaml").write_text((tmp_path / "1" / "run" / "config.yaml").read_text())
    given = ["data.batch_size=3", f"strategy={strategy}"]
    job = processes["start"](tmp_path / "2", given, 2, config=str(tmp_path / "recipe.yaml"))
    assert job.wait() == [0, 0], job.output()
    (ours,), (theirs,) = (read_log(tmp_path / world_size / "run") for world_size in "21")
    for name in ("train_loss", "val_loss", "token_accuracy", "accuracy", "blank_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    ours, theirs = (weights(tmp_path / world_size / "run") for world_size in "21")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_run_in_bfloat16_with_average_and_recomputation(folder, tmp_path):
    options = ["precision=bf16", "ema_decay=0.9", "grad_checkpointing=block", "model.images_in_text=true"]
    result = run(folder, tmp_path, *options)
    assert math.isfinite(result.log[-1]["train_loss"])
    assert load_vlm(tmp_path).image_token_id == -200


@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize("connector", ["mlp_connector", "mamba2_scan_connector"])
def test_nothing_is_left_on_the_cpu(folder, tmp_path, train_elsewhere, connector, language):
    """Answers to questions included."""
    options = [f"model.connector={connector}", "evaluation.questions=8"]
    assert train_elsewhere(small_config(folder, tmp_path, *options, language=language))["val_loss"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("language", LANGUAGE)
@pytest.mark.parametrize(
    "connector",
    [
        ["model.connector=mlp_connector"],
        ["model.connector=mamba2_scan_connector"],
        ["model.connector=mamba2_scan_connector", "model.connector_kwargs={scans: [raster, columns]}"],
    ],
    ids=["mlp", "raster", "cross"],
)
def test_run_on_gpu(folder, tmp_path, connector, language):
    """Training, and answers to questions in evaluation and in the report."""
    options = [*connector, "cpu=false", "precision=bf16", "evaluation.questions=8", "optim.epochs=3"]
    result = run(folder, tmp_path, *options, language=language)
    assert result.log[-1]["train_loss"] < result.log[0]["train_loss"]
    assert (tmp_path / "answers.csv").is_file()


@pytest.mark.gpu
def test_captured_towers_train_as_eager_ones(folder, tmp_path):
    losses = []
    for captured in ("false", "true"):
        options = ["cpu=false", "precision=bf16", f"cuda_graph={captured}"]
        losses.append(run(folder, tmp_path / captured, *options).log[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
