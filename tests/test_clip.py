"""Two towers: open_clip's configurations, text tower, tokenizer, losses over processes, retrieval, runs, the tool."""

import csv
import itertools
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from torch import nn
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

import zoo
from zoo.config import ClipConfig, ClipDataConfig, ZeroShotConfig, load_config
from zoo.data import Normalize, Preprocessing, TensorData, TensorLoader
from zoo.data.captions import WordTokenizer, build_tokenizer, number_distinct, open_captions, read_pairs, words_of
from zoo.data.fashion_mnist import DEBIAN_FOLDER
from zoo.data.scenes import split_words, vocabulary
from zoo.engine import load_trained, read_log, train
from zoo.engine.task import Place, find_task
from zoo.heads.text_tower import Mamba2TextTower
from zoo.tools.zero_shot import main
from zoo.weights import save_weights
from zoo.zero_shot import embed_pairs, load_contrastive, open_classes, pair_recall, retrieval_recall

open_clip = pytest.importorskip("open_clip")
from zoo.heads import clip  # noqa: E402

CONFIGS = sorted(name for name in open_clip.list_models() if name.startswith("zoo-"))
TINY_VISION = {"embed_dim": 32, "depth": 2, "patch_size": 8, "d_state": 4}
TINIER_VISION = {"embed_dim": 32, "depth": 1, "patch_size": 16, "d_state": 4}
TINY_TEXT = {"width": 32, "layers": 2, "head_dim": 16, "d_state": 8, "context_length": 12, "vocab_size": 40}
TINY_TRANSFORMER = {"width": 32, "layers": 2, "heads": 2, "context_length": 12, "vocab_size": 40}
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}
PLACES = {"left": (0, 0, 12, 32), "right": (20, 0, 32, 32), "top": (0, 0, 32, 12)}

needs_photos = pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


def tiny_clip(text="mamba2", loss="clip", image_size=32, **options):
    options.setdefault("text_kwargs", TINY_TEXT if text == "mamba2" else TINY_TRANSFORMER)
    options.setdefault("vision_kwargs", TINY_VISION)
    return clip.create_clip("vim_micro", text, embed_dim=16, image_size=image_size, loss=loss, **options)


def tiny_texts(count=4):
    """Texts of different lengths that end with the largest token."""
    texts = torch.zeros(count, 12, dtype=torch.long)
    for row, text in enumerate(texts):
        length = 3 + 2 * row % 9
        text[:length] = torch.randint(1, 39, (length,))
        text[length - 1] = 39
    return texts


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# open_clip's configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_builds_and_encodes(name):
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
        shape = 2, open_clip.get_model_config(name)["embed_dim"]
        assert model.encode_image(torch.empty(2, 3, *model.visual.image_size)).shape == shape
        assert model.encode_text(torch.empty(2, model.context_length, dtype=torch.long)).shape == shape


def test_weights_of_create_clip_are_those_of_a_configuration():
    config = open_clip.get_model_config("zoo-vim_nano")
    with torch.device("meta"):
        theirs = open_clip.create_model("zoo-vim_nano", device="meta", force_image_size=64).state_dict()
        ours = clip.create_clip(
            config["vision_cfg"]["timm_model_name"],
            "transformer",
            embed_dim=config["embed_dim"],
            image_size=64,
            text_kwargs=config["text_cfg"],
        ).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


def test_registering_again_changes_nothing():
    clip.register_configs()
    assert sorted(name for name in open_clip.list_models() if name.startswith("zoo-")) == CONFIGS
    assert len(CONFIGS) == 5


@pytest.mark.parametrize("text", ["mamba2", "transformer"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_towers_get_gradients_with_and_without_recomputation(text, loss):
    model = tiny_clip(text, loss)
    criterion = clip.create_loss(loss)
    images, texts = torch.randn(4, 3, 32, 40), tiny_texts()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(recompute)
        criterion(**model(images, texts)).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_similarities_start_as_published():
    assert tiny_clip().logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert tiny_clip().logit_bias is None
    model = tiny_clip(loss="siglip")
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == pytest.approx((10, -10))


def test_locked_tower_keeps_its_weights_but_for_the_last_groups():
    model = tiny_clip()
    model.lock_image_tower()
    assert not any(parameter.requires_grad for parameter in model.visual.trunk.parameters())
    assert model.visual.head.proj.weight.requires_grad
    model = tiny_clip()
    model.lock_image_tower(unlocked_groups=1)
    trained = {name for name, parameter in model.visual.trunk.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith(("blocks.1.", "norm.")) for name in trained)
    model.lock_text_tower(unlocked_layers=2)
    trained = {name for name, parameter in model.text.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"blocks", "norm", "projection"}
    assert not any(name.startswith("blocks.0.") for name in trained)
    with pytest.raises(ValueError, match="freeze_layer_norm"):
        model.lock_text_tower(1, freeze_layer_norm=False)


def test_weight_decay_leaves_out_what_both_towers_name():
    model = tiny_clip()
    names = model.no_weight_decay()
    assert names <= {name for name, _ in model.named_parameters()}
    for part in ("visual.trunk.blocks.0.mixer.A_log", "visual.trunk.pos_embed", "text.blocks.1.mixer.dt_bias"):
        assert part in names


def test_a_vision_model_of_timm():
    model = clip.create_clip("test_resnet", embed_dim=16, image_size=(40, 33), text_kwargs=TINY_TEXT)
    assert model(torch.randn(2, 3, 40, 33), tiny_texts(2))["image_features"].shape == (2, 16)
    assert not any(name.startswith("visual") for name in model.no_weight_decay())
    assert open_clip.get_model_preprocess_cfg(model)["size"] == (40, 33)


def test_intermediates_of_both_towers():
    model = tiny_clip().eval()
    images, texts = torch.randn(2, 3, 32, 32), tiny_texts(2)
    with torch.no_grad():
        found = model.forward_intermediates(images, texts, image_indices=1, text_indices=[0])
        plain = model(images, texts)
        early = model.forward_intermediates(text=texts, text_indices=[0], stop_early=True, intermediates_only=True)
    assert [tuple(each.shape) for each in found["image_intermediates"]] == [(2, 32, 4, 4)]
    assert [tuple(each.shape) for each in found["text_intermediates"]] == [(2, 12, 32)]
    for kind in ("image_features", "text_features"):
        torch.testing.assert_close(found[kind], plain[kind])
    assert early.keys() == {"text_intermediates"}
    torch.testing.assert_close(early["text_intermediates"][0], found["text_intermediates"][0])


def test_wrong_names_are_told():
    with pytest.raises(ValueError, match="vim_small"):
        clip.create_clip("vim_smal_patch16_224")
    with pytest.raises(ValueError, match="mamba2, transformer"):
        clip.create_clip("vim_micro", "lstm")
    with pytest.raises(ValueError, match="'transformer' takes no d_state"):
        clip.create_clip("vim_micro", "transformer", text_kwargs={"d_state": 8, "width": 32})
    with pytest.raises(ValueError, match="clip, siglip"):
        clip.create_loss("triplet")


# The text tower


def test_causal_tower_does_not_see_the_padding():
    tower, texts = Mamba2TextTower(16, **TINY_TEXT), tiny_texts()
    whole = tower(texts)
    torch.testing.assert_close(tower(F.pad(texts, (0, 5))), whole)
    changed = texts.clone()
    changed[texts == 0] = 7
    torch.testing.assert_close(tower(changed), whole)
    assert not torch.allclose(tower(texts.roll(1, dims=1)), whole)


def test_bidirectional_tower_reads_both_ways_and_whole_texts_only():
    tower = Mamba2TextTower(16, bidirectional=True, **TINY_TEXT)
    texts = tiny_texts()
    assert tower(texts).shape == (4, 16)
    streams = tower.forward_intermediates(texts, indices=[0])["text_intermediates"][0]
    changed = texts.clone()
    changed[:, 1] = 5 + texts[:, 1] % 5
    assert not torch.equal(tower.forward_intermediates(changed, [0])["text_intermediates"][0][:, 0], streams[:, 0])
    with pytest.raises(ValueError, match="context_length=12"):
        tower(texts[:, :11])
    with pytest.raises(ValueError, match="NCHW"):
        tower.forward_intermediates(texts, output_fmt="NCHW")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_tower_in_bfloat16(bidirectional):
    tower, texts = Mamba2TextTower(16, bidirectional=bidirectional, **TINY_TEXT), tiny_texts()
    expected = tower(texts)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tower(texts).float(), expected, atol=0.1, rtol=0.1)
    narrow = tower.to(torch.bfloat16)(texts)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, atol=0.1, rtol=0.1)


# The tokenizer


def test_words_come_back_as_they_went():
    tokenizer = WordTokenizer(vocabulary(), 20)
    texts = ["A white dress, three t-shirts and a pair of red trousers.", "Is there an orange coat?", ""]
    tokens = tokenizer(texts)
    assert tokens.shape == (3, 20) and tokens.dtype == torch.long
    assert [tokenizer.decode(row.tolist()) for row in tokens] == [text.lower() for text in texts]
    assert (tokens[:, 0] == tokenizer.sot).all() and (tokens.max(dim=1).values == tokenizer.eot).all()
    assert tokenizer.vocab_size == len(vocabulary()) + 3 == int(tokens.max()) + 1
    assert torch.equal(tokenizer(texts[0]), tokens[:1])
    assert tokenizer.encode(tokenizer.decode(tokens[0].tolist())) == tokenizer.encode(texts[0])
    again = build_tokenizer(**json.loads(json.dumps(tokenizer.settings)))
    assert torch.equal(again(texts), tokens)


def test_tokenizer_refuses_what_it_does_not_know():
    tokenizer = WordTokenizer(words_of(["a red coat.", "a blue boot."]), 6)
    assert tokenizer.words == (".", "a", "blue", "boot", "coat", "red")
    with pytest.raises(ValueError, match=r"no word 'boat'.*boot"):
        tokenizer("a red boat.")
    with pytest.raises(ValueError, match=r"7 tokens.*context_length=6"):
        tokenizer("a red blue coat.")
    assert tokenizer("a red blue coat.", context_length=8).shape == (1, 8)
    for words in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="vocabulary"):
            WordTokenizer(words)


# Retrieval


def brute_force(similarity, right, rank):
    hits = 0
    for query, row in enumerate(similarity.tolist()):
        order = sorted(range(len(row)), key=lambda item: -row[item])
        hits += any(right[query][item] for item in order[:rank])
    return hits / len(similarity)


@pytest.mark.parametrize("queries, gallery", [(5, 5), (7, 23), (40, 9)])
def test_recall_is_that_of_brute_force_and_of_torchmetrics(queries, gallery, monkeypatch):
    monkeypatch.setattr("zoo.zero_shot.CHUNK", 6)
    a, b = F.normalize(torch.randn(queries, 8), dim=1), F.normalize(torch.randn(gallery, 8), dim=1)
    right = torch.rand(queries, gallery) < 0.15
    right[torch.arange(queries), torch.arange(queries) % gallery] = True
    found = retrieval_recall(a, b, right.nonzero(), (1, 3, 5))
    single = torch.zeros_like(right)
    single[torch.arange(queries), torch.arange(queries) % gallery] = True
    found_single = retrieval_recall(a, b, single.nonzero(), (1, 3, 5))
    rows = torch.arange(queries)[:, None].expand(-1, gallery).flatten()
    for rank in (1, 3, 5):
        assert found[rank] == pytest.approx(brute_force(a @ b.T, right, rank))
        scores = (a @ b.T).flatten() + 2  # torchmetrics wants positive ones
        assert found[rank] == pytest.approx(RetrievalHitRate(top_k=rank)(scores, right.flatten(), indexes=rows).item())
        expected = RetrievalRecall(top_k=rank)(scores, single.flatten(), indexes=rows)
        assert found_single[rank] == pytest.approx(expected.item())


def test_equal_captions_and_equal_images_are_right_answers():
    captions = ["a coat", "a boot", "a coat", "a bag", "a bag of mine"]
    images = ["1.png", "2.png", "3.png", "4.png", "4.png"]  # the last has two captions
    texts = torch.eye(5)[[0, 1, 0, 2, 3]]
    swapped = torch.eye(5)[[0, 1, 0, 2, 2]]  # both coats look the same; image 4 is nearest to its first caption
    ids = number_distinct(images), number_distinct(captions)
    assert ids[0].tolist() == [0, 1, 2, 3, 3] and ids[1].tolist() == [0, 1, 0, 2, 3]
    scores = pair_recall(swapped, texts, *ids, ranks=(1, 2))
    assert scores["i2t_recall1"] == 100
    assert scores["t2i_recall1"] == pytest.approx(75)  # the fourth caption is like no image
    # Were only the own pair right, the second coat would be found by chance alone.
    assert len(set(ids[1].tolist())) == 4


def test_a_model_that_tells_nothing_apart_finds_nothing():
    same, ids = torch.ones(6, 4), torch.arange(6)
    for features in (same, torch.full((6, 4), torch.nan)):
        assert set(pair_recall(features, same, ids, ids, ranks=(1, 5)).values()) == {0.0}


# Losses over processes


class MeanOfWords(nn.Module):
    """The least text tower."""

    def __init__(self):
        super().__init__()
        self.context_length, self.vocab_size = 6, 20
        self.embedding = nn.Embedding(20, 8)

    def forward(self, text):
        return self.embedding(text).mean(1)


def linear_clip(loss):
    visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    return clip.ContrastiveModel(visual, MeanOfWords(), *clip.FIRST_SCALE_AND_BIAS[loss])


def contrastive_gradients(loss, state, images, texts, rank=0, world_size=1):
    model = linear_clip(loss)
    model.load_state_dict(state)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    value = clip.create_loss(loss, rank, world_size)(**wrapped(images, texts))
    value.backward()
    return value.detach(), [parameter.grad for parameter in model.parameters()]


def embed_share(state, data, tokens, rank=0, world_size=1):
    model = linear_clip("clip")
    model.load_state_dict(state)
    loader = TensorLoader(data, 2, rank=rank, world_size=world_size)
    return embed_pairs(model, loader, tokens, Normalize((0.5,) * 3, (0.5,) * 3))


def work(rank, store, inputs, results):
    """One of two processes: its share of the pairs."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for loss, state in inputs["states"].items():
        own = inputs["images"][rank::2], inputs["texts"][rank::2]
        found[loss] = contrastive_gradients(loss, state, *own, rank, 2)
    found["features"] = embed_share(inputs["states"]["clip"], inputs["data"], inputs["tokens"], rank, 2)
    torch.save(found, f"{store}.{rank}")
    results.put(rank)
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs processes that are forked")
def test_two_processes_have_the_gradient_and_the_features_of_one(tmp_path):
    bytes_ = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)
    inputs = {
        "images": torch.randn(6, 3, 2, 2),
        "texts": torch.randint(0, 20, (6, 6)),
        "states": {loss: linear_clip(loss).state_dict() for loss in ("clip", "siglip")},
        "data": TensorData(bytes_, torch.arange(7), (), (), ()),
        "tokens": torch.randint(0, 20, (7, 6)),
    }
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(rank, tmp_path / "store", inputs, results) for rank in range(2)]
    workers = [context.Process(target=work, args=each, daemon=True) for each in arguments]
    for worker in workers:
        worker.start()
    assert {results.get(timeout=60) for _ in workers} == {0, 1}
    for worker in workers:
        worker.join()
    found = [torch.load(tmp_path / f"store.{rank}") for rank in range(2)]
    for loss, state in inputs["states"].items():
        value, gradients = contrastive_gradients(loss, state, inputs["images"], inputs["texts"])
        torch.testing.assert_close((found[0][loss][0] + found[1][loss][0]) / 2, value)
        for each in found:
            torch.testing.assert_close(each[loss][1], gradients)
    expected = embed_share(inputs["states"]["clip"], inputs["data"], inputs["tokens"])
    for each in found:
        torch.testing.assert_close(each["features"], expected)


# Data


def draw(colour, place, shade=0):
    image = Image.new("RGB", (32, 32), (90 + shade,) * 3)
    image.paste(tuple(max(0, level - shade) for level in COLOURS[colour]), PLACES[place])
    return image


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Coloured bars with captions, a CSV for training and a JSON file for validation; and bars in class folders."""
    root = tmp_path_factory.mktemp("pairs")
    for split, shades in (("train", range(0, 40, 10)), ("val", (5, 25))):
        rows = []
        for colour, place, shade in itertools.product(COLOURS, PLACES, shades):
            name = f"{split}_{colour}_{place}_{shade}.png"
            draw(colour, place, shade).save(root / name)
            rows.append({"image": name, "caption": f"A {colour} bar at the {place}."})
        if split == "val":
            (root / "val.json").write_text(json.dumps(rows))
            continue
        with (root / "train.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    for colour, place in itertools.product(COLOURS, PLACES):
        folder = root / "classes" / "val" / colour
        folder.mkdir(parents=True, exist_ok=True)
        draw(colour, place, 15).save(folder / f"{place}.png")
    return root


def test_pairs_are_read_with_equal_captions_numbered_alike(pairs):
    data = open_captions(ClipDataConfig(name="pairs", root=str(pairs)), training=False)
    assert len(data) == 24 and len(data.caption_ids.unique()) == 12 and len(data.image_ids.unique()) == 24
    few = open_captions(ClipDataConfig(name="pairs", root=str(pairs), train_samples=5), training=True)
    assert len(few) == len(few.images) == 5


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_bad_pairs_are_reported_and_left_out(tmp_path, caplog):
    draw("red", "left").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = ["image,caption", "good.png,A bar.", "gone.png,Two bars.", "broken.png,Three bars.", "good.png,   "]
    path = write_csv(tmp_path / "pairs.csv", *lines)
    with pytest.raises(ValueError, match=r"1 of 4 captions .*empty.*good\.png.*bad_files=skip"):
        read_pairs(path)
    files, captions = read_pairs(path, "skip")
    assert [file.name for file in files] == ["good.png"] and captions == ["A bar."]
    for words in ("1 of 4 captions", "2 of 3 files", "gone.png: there is no such file", "broken.png"):
        assert words in caplog.text
    with pytest.raises(ValueError, match=r"2 of 3 files.*(\n.*)*gone\.png"):
        read_pairs(write_csv(path, *lines[:-1]))
    with pytest.raises(ValueError, match="no pair"):
        read_pairs(write_csv(path, *lines[:1], *lines[2:4]), "skip")


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("x.csv", "file,caption\na.png,A bar.\n", "lacks the column image.*file, caption"),
        ("x.csv", "", "lacks the column image and caption.*nothing"),
        ("x.json", '{"image": "a.png"}', "list of objects"),
        ("x.json", '[{"image": "a.png", "caption": 3}]', "list of objects"),
        ("x.json", "[", "not valid JSON"),
        ("x.json", "[]", "no pair"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_pairs(tmp_path / name)


def test_missing_data_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.csv nor .*train\.json"):
        open_captions(ClipDataConfig(name="pairs", root=str(tmp_path)), training=True)
    with pytest.raises(ValueError, match=r"data\.root"):
        open_captions(ClipDataConfig(name="pairs"), training=True)


@pytest.mark.parametrize(
    "options, problem",
    [
        (["optim.layer_decay=0.9"], "layer_decay"),
        (["zero_shot.templates=['a photo']"], "templates"),
        (["zero_shot.fill=0"], "fill"),
        (["data.name=coco"], "fashion_scenes, pairs"),
        (["model.unlocked_groups=2"], "lock_vision"),
        (["data.val_samples=1"], "val_samples"),
        (["loss=triplet"], "clip, siglip"),
        (["model.tokenizer=letters"], "bpe, words"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        load_config("clip/vim_nano_fashion_scenes", options)


# Training


def pairs_config(pairs, output, *overrides, text_kwargs=("head_dim: 16", "d_state: 8")):
    return load_config(
        "clip/vim_nano_fashion_scenes",
        [
            "model.name=vim_micro",
            f"model.kwargs={json.dumps(TINIER_VISION)}",
            f"model.text_kwargs={{width: 32, layers: 1, {', '.join(text_kwargs)}}}",
            "model.embed_dim=32",
            "model.context_length=12",
            "data.name=pairs",
            f"data.root={pairs}",
            "data.val_split=val",
            "data.img_size=32",
            "data.train_samples=null",
            "data.batch_size=24",
            "data.workers=0",
            "augment.crop_padding=0",
            "augment.min_scale=1",
            "zero_shot.data=folder",
            f"zero_shot.root={pairs / 'classes'}",
            "zero_shot.split=val",
            "zero_shot.fill=1",
            "zero_shot.templates=['A {} bar at the left.', 'A {} bar at the top.']",
            "optim.lr=1e-2",
            "optim.epochs=2",
            "optim.warmup_epochs=0",
            "precision=fp32",
            "cpu=true",
            f"output={output}",
            *overrides,
        ],
    )


def test_a_run_learns_pairs_and_classes_and_is_loaded_again(pairs, tmp_path, capsys):
    result = train(pairs_config(pairs, tmp_path, "optim.epoch_updates=50"))
    first, last = result.log[0], result.log[-1]
    assert last["train_loss"] < 0.7 * first["train_loss"]
    assert result.best["recall1"] > 60 > 100 / 12  # of 12 captions one is right
    assert result.best["recall1"] == pytest.approx((result.best["i2t_recall1"] + result.best["t2i_recall1"]) / 2)
    assert result.best["zero_shot_top1"] > 60  # of 4 classes
    assert (tmp_path / "captions.png").stat().st_size > 10_000

    _, card = load_trained(tmp_path / "last.safetensors")
    assert (card.task, card.model, card.data) == ("clip", "vim_micro", "pairs")
    tower = load_contrastive(str(tmp_path / "last.safetensors"))
    assert tower.tokenizer.decode(tower.tokenizer("A red bar.")[0].tolist()) == "a red bar."
    assert main([str(tmp_path / "last.safetensors"), "--workers", "0"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["top1"] == pytest.approx(last["zero_shot_top1"], abs=1e-3)
    where = ["--data", "pairs", "--root", str(pairs), "--workers", "0"]
    assert main([str(tmp_path / "last.safetensors"), *where]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["i2t_recall1"] == pytest.approx(last["i2t_recall1"], abs=1e-3)
    assert main([str(tmp_path), "--templates", "A photo of a {}.", "--workers", "0"]) == 1
    assert "no word 'photo'" in capsys.readouterr().err


def test_a_run_with_the_other_choices(pairs, tmp_path):
    """Sigmoid loss, open_clip's text tower and tokenizer, a locked image tower, recomputation, moving average."""
    options = ["loss=siglip", "model.text=transformer", "model.tokenizer=bpe", "model.lock_vision=true"]
    options += ["grad_checkpointing=block", "ema_decay=0.9", "zero_shot.data=null"]
    result = train(pairs_config(pairs, tmp_path, *options, text_kwargs=["heads: 2"]))
    assert result.log[-1]["val_loss"] < result.log[0]["val_loss"]
    assert "zero_shot_top1" not in result.log[0]
    model, card = load_trained(tmp_path)
    assert card.kwargs["tokenizer"] == {"context_length": 12, "words": None}
    assert model.vocab_size == 49408
    fresh = find_task("clip").create_model(card)
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_factor_of_similarities_is_kept_below_its_limit(pairs, tmp_path):
    task = find_task("clip")(pairs_config(pairs, tmp_path), Place(torch.device("cpu")))
    with torch.no_grad():
        task.model.logit_scale.fill_(7.0)
    task.train_loader.set_epoch(0)
    task.loss(task.model, next(iter(task.train_loader))).backward()
    assert task.model.logit_scale.exp().item() == pytest.approx(100)
    assert task.model.logit_scale.grad is not None
    assert "every module's output is finite" in task.explain_failure()


def test_batches_of_one_pair_and_unknown_words_are_refused(pairs, tmp_path):
    find, place = find_task("clip"), Place(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"one pair.*data\.batch_size"):
        find(pairs_config(pairs, tmp_path, "data.batch_size=1"), place)
    with pytest.raises(ValueError, match="no word 'violet'"):
        find(pairs_config(pairs, tmp_path, "zero_shot.class_names=[red, violet, blue, white]"), place)
    with pytest.raises(ValueError, match="there are 2 class names for the 4 classes"):
        find(pairs_config(pairs, tmp_path, "zero_shot.class_names=[red, green]"), place)


def test_vision_tower_starts_from_a_classifier(pairs, tmp_path):
    classifier = zoo.create_model("vim_micro", num_classes=3, img_size=32, **TINIER_VISION)
    save_weights(classifier.state_dict(), tmp_path / "classifier.safetensors")
    options = [f"model.checkpoint={tmp_path / 'classifier.safetensors'}", "model.lock_vision=true"]
    task = find_task("clip")(pairs_config(pairs, tmp_path, *options), Place(torch.device("cpu")))
    for name, tensor in task.model.visual.trunk.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name


def test_images_with_classes_are_framed_in_black(pairs):
    wanted = Preprocessing((30, 40), 3, (0.5,) * 3, (0.25,) * 3)
    config = ZeroShotConfig(data="folder", root=str(pairs / "classes"), fill=0.5)
    loader, present, names = open_classes(config, wanted, batch_size=5, workers=0)
    assert names == tuple(sorted(COLOURS))
    images = present(next(iter(loader))[0])
    assert images.shape == (5, 3, 30, 40)
    assert (images[:, :, :7] == -2).all() and (images[..., :10] == -2).all()
    assert (images[:, :, 8:22, 10:30] > -2).any(dim=1).all()


@needs_photos
def test_scenes_and_grey_photos(tmp_path):
    config = ClipDataConfig(val_samples=6, val_split="test", workers=0)
    data = open_captions(config, training=False)
    assert data.images.images.shape == (6, 3, 64, 64) and data.words == vocabulary()
    assert all(set(split_words(caption)) <= set(data.words) for caption in data.captions)
    wanted = Preprocessing((64, 64), 3, (0.0,) * 3, (1.0,) * 3)
    zero_shot = ZeroShotConfig(data="fashion_mnist", split="test", samples=10, fill=0.45)
    loader, present, names = open_classes(zero_shot, wanted)
    images = present(next(iter(loader))[0])
    assert images.shape == (10, 3, 64, 64) and len(names) == 10
    assert torch.equal(images[:, 0], images[:, 2]) and images[:, :, :17].max() == 0 < images.max()


def test_models_without_weights_or_of_other_tasks_are_refused(tmp_path, capsys):
    assert main(["zoo-vim_nano", "--data", "fashion_mnist"]) == 1
    assert "needs weights" in capsys.readouterr().err
    assert main(["no_such_model", "--data", "fashion_mnist"]) == 1
    assert "no_such_model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_two_processes_train_as_one(pairs, tmp_path, loss):
    """The same pairs in every update, so the same weights after a few."""
    options = [f"loss={loss}", "optim.name=sgd", "optim.betas=null"]
    train(pairs_config(pairs, tmp_path / "one", *options))
    (tmp_path / "recipe.yaml").write_text((tmp_path / "one" / "config.yaml").read_text())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = ["zoo.tools.train", str(tmp_path / "recipe.yaml"), "data.batch_size=12", f"output={tmp_path / 'two'}"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launch, *command], check=True, timeout=300, env=hidden)
    models = [load_trained(tmp_path / name / "last.safetensors")[0].state_dict() for name in ("one", "two")]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    logs = [read_log(tmp_path / name)[-1] for name in ("one", "two")]
    assert logs[1]["val_loss"] == pytest.approx(logs[0]["val_loss"], rel=1e-4)


@pytest.mark.gpu
def test_captured_image_tower_trains_as_the_eager_one(pairs, tmp_path):
    losses = []
    for captured in ("false", "true"):
        options = ["cpu=false", "precision=bf16", f"cuda_graph={captured}"]
        losses.append(train(pairs_config(pairs, tmp_path / captured, *options)).log[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_packaged_recipe_is_for_scenes():
    config = load_config("clip/vim_nano_fashion_scenes")
    assert isinstance(config, ClipConfig) and config.data.image_size == 64
    assert config.augment.flip == 0  # captions tell left from right
    words = WordTokenizer(vocabulary(), config.model.context_length)
    words([template.format("trousers") for template in config.zero_shot.templates])
