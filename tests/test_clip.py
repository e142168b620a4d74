"""Two towers: open_clip's configurations, text tower, tokenizer, losses over processes, retrieval."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

from zoo.data import Normalize, TensorData, TensorLoader
from zoo.data.captions import WordTokenizer, build_tokenizer, number_distinct, words_of
from zoo.data.scenes import vocabulary
from zoo.heads.text_tower import Mamba2TextTower
from zoo.zero_shot import embed_pairs, pair_recall, retrieval_recall

open_clip = pytest.importorskip("open_clip")
from zoo.heads import clip  # noqa: E402

CONFIGS = sorted(name for name in open_clip.list_models() if name.startswith("zoo-"))
TINY_VISION = {"embed_dim": 32, "depth": 2, "patch_size": 8, "d_state": 4}
TINY_TEXT = {"width": 32, "layers": 2, "head_dim": 16, "d_state": 8, "context_length": 12, "vocab_size": 40}
TINY_TRANSFORMER = {"width": 32, "layers": 2, "heads": 2, "context_length": 12, "vocab_size": 40}


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


def work(rank, store):
    """One of two processes: its share of the pairs."""
    inputs = torch.load(f"{store}.inputs")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for loss, state in inputs["states"].items():
        own = inputs["images"][rank::2], inputs["texts"][rank::2]
        found[loss] = contrastive_gradients(loss, state, *own, rank, 2)
    found["features"] = embed_share(inputs["states"]["clip"], in_memory(inputs["bytes"]), inputs["tokens"], rank, 2)
    torch.save(found, f"{store}.{rank}")
    dist.destroy_process_group()


def in_memory(images):
    return TensorData(images, torch.arange(len(images)), (), (), ())


def test_two_processes_have_the_gradient_and_the_features_of_one(tmp_path):
    inputs = {
        "images": torch.randn(6, 3, 2, 2),
        "texts": torch.randint(0, 20, (6, 6)),
        "states": {loss: linear_clip(loss).state_dict() for loss in ("clip", "siglip")},
        "bytes": torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8),
        "tokens": torch.randint(0, 20, (7, 6)),
    }
    store = tmp_path / "store"
    torch.save(inputs, f"{store}.inputs")
    # New interpreters: autograd refuses to run in copies of a process in which it has threads.
    program = "import runpy, sys; runpy.run_path(sys.argv[1])['work'](int(sys.argv[2]), sys.argv[3])"
    command = [sys.executable, "-c", program, __file__]
    workers = [subprocess.Popen([*command, str(rank), str(store)]) for rank in range(2)]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    found = [torch.load(f"{store}.{rank}") for rank in range(2)]
    for loss, state in inputs["states"].items():
        value, gradients = contrastive_gradients(loss, state, inputs["images"], inputs["texts"])
        torch.testing.assert_close((found[0][loss][0] + found[1][loss][0]) / 2, value)
        for each in found:
            torch.testing.assert_close(each[loss][1], gradients)
    expected = embed_share(inputs["states"]["clip"], in_memory(inputs["bytes"]), inputs["tokens"])
    for each in found:
        torch.testing.assert_close(each["features"], expected)
