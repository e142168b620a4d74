"""Conversations as training data: LLaVA's format and its faults, scenes, tokenizers, labels on answers, batches."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.config import VlmDataConfig
from zoo.data import Preprocessing, image_transform
from zoo.data.chat_tokenizers import WordChatTokenizer, open_tokenizer, restore_tokenizer, tokenizer_settings
from zoo.data.conversation_loader import ChatEncoder, ConversationLoader, TokenTable
from zoo.data.conversations import Conversation, Conversations, draw_conversations, open_conversations, read_llava
from zoo.data.scenes import FashionScenes, vocabulary, write_llava
from zoo.data.scenes.language import DESCRIBE
from zoo.heads.vlm import CHAT_FORMATS, collate
from zoo.heads.vlm.prompts import chat_format_ending_with

SIZE = 16
TRANSFORM = image_transform(Preprocessing((SIZE, SIZE), 3, (0.0,) * 3, (1.0,) * 3, crop_mode="squash"))
ZEPHYR = CHAT_FORMATS["zephyr"]


def said(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


GOOD = [
    {"id": "one", "image": "a.png", "conversations": said("<image>\nWhat is it?", "a boot", "And the color?", "red")},
    {"id": "two", "image": ["a.png", "sub/b.png"], "conversations": said("<image><image>\nAlike?", "no")},
    {"id": "text", "conversations": said("Who are you?", "a model")},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good images, a damaged one, and a file of good conversations."""
    root = tmp_path_factory.mktemp("llava")
    (root / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (20, 10), "red").save(root / "images" / "a.png")
    Image.new("L", (10, 20), 100).save(root / "images" / "sub" / "b.png")
    (root / "images" / "broken.png").write_bytes(b"no image")
    (root / "train.json").write_text(json.dumps(GOOD))
    return root


def read(folder, rows, bad_files="error"):
    path = folder / "rows.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return read_llava(path, folder / "images", bad_files)


def test_conversations_of_one_image_of_two_and_of_none(folder):
    data = read_llava(folder / "train.json", folder / "images")
    assert [sample.images for sample in data.samples] == [(0,), (0, 1), ()]
    assert [path.name for path in data.images] == ["a.png", "b.png"]
    assert data.samples[0].turns == (("<image>\nWhat is it?", "a boot"), ("And the color?", "red"))
    assert {"boot", "red", "alike", "model", "?"} <= set(data.vocabulary()) and "<" not in data.vocabulary()


BAD = [
    ("text", "is no object"),
    ({"image": "a.png"}, "conversations is missing"),
    ({"conversations": []}, "no list of turns, or empty"),
    ({"conversations": [{"from": "human"}]}, "turn 0 has to have from and value"),
    ({"conversations": said("Hello", "hi")[::-1]}, "turn 0 is from 'gpt' and should be from 'human'"),
    ({"conversations": said("a", "b")[:1] * 2}, "turn 1 is from 'human' and should be from 'gpt'"),
    ({"conversations": said("a", "b", "c")}, "the last turn has no answer"),
    ({"conversations": said("a", " ")}, "the answer in turn 1 is empty"),
    ({"conversations": said(" ", "a")}, "the question in turn 0 is empty"),
    ({"image": "a.png", "conversations": said("a", "b")}, "0 placeholders <image> for 1 images"),
    ({"conversations": said("<image> a", "b")}, "1 placeholders <image> for 0 images"),
    ({"image": "a.png", "conversations": said("<image><image> a", "b")}, "2 placeholders <image> for 1 images"),
    ({"image": "a.png", "conversations": said("a", "<image>")}, "the answer in turn 1 has a placeholder"),
    ({"image": 3, "conversations": said("a", "b")}, "image has to be the name of a file or a list of names"),
    ({"image": "gone.png", "conversations": said("<image> a", "b")}, "gone.png: there is no such file"),
    ({"image": "broken.png", "conversations": said("<image> a", "b")}, "broken.png: cannot identify"),
]


@pytest.mark.parametrize("row, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_conversation_is_named_with_its_reason(folder, row, reason):
    row = {"id": "x", **row} if isinstance(row, dict) else row
    with pytest.raises(ValueError) as caught:
        read(folder, [*GOOD, row])
    assert "1 of 4 conversations in" in str(caught.value) and "data.bad_files=skip" in str(caught.value)
    assert f"row 3{' (id x)' if isinstance(row, dict) else ''}: " in str(caught.value) and reason in str(caught.value)


def test_bad_conversations_are_counted_and_left_out(folder, caplog):
    data = read(folder, [*[row for row, _ in BAD], *GOOD], "skip")
    assert [sample.name.split("id ")[1] for sample in data.samples] == ["one)", "two)", "text)"]
    assert f"{len(BAD)} of {len(BAD) + 3} conversations in" in caplog.text and "are left out" in caplog.text
    with pytest.raises(ValueError, match="no conversation that can be used"):
        read(folder, [BAD[0][0]], "skip")


@pytest.mark.parametrize("text, problem", [("[", "not valid JSON"), ('{"a": 1}', "a list of conversations, not dict")])
def test_files_of_another_form_are_refused(folder, text, problem):
    with pytest.raises(ValueError, match=problem):
        read(folder, text)


def test_splits_and_what_is_kept_apart(folder):
    many = [{"id": f"r{number}", "conversations": said(f"question {number}", "yes")} for number in range(10)]
    (folder / "many.json").write_text(json.dumps(many))
    config = VlmDataConfig(name="llava", root=str(folder), train_split="many", val_split=None, val_samples=3)
    train, val = open_conversations(config)
    assert [sample.turns[0][0] for sample in val.samples] == ["question 0", "question 3", "question 6"]
    assert len(train) == 7 and not {sample.name for sample in train.samples} & {sample.name for sample in val.samples}
    config = VlmDataConfig(name="llava", root=str(folder), train_split="many", val_split="train", train_samples=4)
    assert [len(data) for data in open_conversations(config)] == [4, 3]
    config.val_split = "gone"
    with pytest.raises(FileNotFoundError, match=r"no .*gone\.json, but many\.json, .*train\.json"):
        open_conversations(config)
    config.root = None
    with pytest.raises(ValueError, match=r"needs data\.root"):
        open_conversations(config)
    with pytest.raises(ValueError, match=r"val_samples=10 of the 10 .* leave none to train"):
        open_conversations(
            VlmDataConfig(name="llava", root=str(folder), train_split="many", val_split=None, val_samples=10)
        )


@pytest.fixture(scope="module")
def scenes():
    """Rings and bars instead of photos."""
    y, x = np.mgrid[:28, :28] - 13.5
    shapes = [np.where(np.hypot(x / (1 + k % 3), y / (1 + k // 3)) < 12 - k % 4, 150, 0) for k in range(10)]
    return [
        FashionScenes(split, 6, 32, items=(np.array(shapes, np.uint8), np.arange(10))) for split in ("train", "val")
    ]


def test_scenes_are_the_conversations_that_are_exported(scenes, tmp_path):
    folder = write_llava(tmp_path / "llava", *scenes)
    files, drawn = read_llava(folder / "train.json", folder / "images"), draw_conversations(scenes[0])
    assert [sample.turns for sample in files.samples] == [sample.turns for sample in drawn.samples]
    assert [sample.images for sample in files.samples] == [sample.images for sample in drawn.samples]
    kinds = [sample.name.rpartition("-")[2].rstrip(")") for sample in files.samples]
    assert kinds == [sample.kind for sample in drawn.samples]
    for number, path in enumerate(files.images):
        assert np.array_equal(drawn.images[number].permute(1, 2, 0), np.array(Image.open(path)))


def test_questions_of_a_scene_can_share_a_conversation(scenes):
    alone, grouped = (draw_conversations(scenes[0], turns=turns) for turns in (1, 3))
    together = draw_conversations(scenes[0], turns=9)
    for number in range(6):
        *questions, last = (
            turn for sample in together.samples if sample.images == (number,) for turn in stripped(sample)
        )
        count = len(scenes[0][number].questions)
        if questions[0][0] == DESCRIBE:
            questions, last = [*questions[1:], last], questions[0]
        assert last[0] == DESCRIBE and len(questions) == count
        beginnings = [text.split()[0] for text, _ in questions[1:]]
        assert beginnings == sorted(beginnings, key=["Is", "How", "Which", "What"].index)
    assert max(len(sample.turns) for sample in grouped.samples) == 3
    for number in range(6):
        texts = [
            sorted(
                turn for sample in data.samples if sample.images == (number,) for turn in stripped(sample) if turn[1]
            )
            for data in (alone, grouped)
        ]
        assert texts[0] == texts[1]
    assert all(sample.turns[0][0].startswith("<image>\n") for sample in grouped.samples)
    assert not any("<image>" in question for sample in grouped.samples for question, _ in sample.turns[1:])
    captions = draw_conversations(scenes[0], "captions")
    assert len(captions) == 6 and all(stripped(sample)[0][0] == DESCRIBE for sample in captions.samples)
    questions = draw_conversations(scenes[0], "questions")
    assert len(questions) + 6 == len(alone) and set(questions.vocabulary()) == set(vocabulary())


def test_a_conversation_begins_with_a_question_of_any_kind(scenes):
    """Validation asks each alone. After a caption nothing is asked, as it tells all."""
    firsts = Counter()
    for seed in range(40):
        data = draw_conversations(scenes[0], turns=30, all_questions=True, seed=seed)
        firsts.update(stripped(sample)[0][0].split()[0] for sample in data.samples)
        assert all(DESCRIBE not in question for sample in data.samples for question, _ in sample.turns[:-1])
    assert min(firsts[beginning] for beginning in ("Is", "How", "Which", "What", "Describe")) > 8


def test_all_that_is_known_of_a_scene_can_be_asked(scenes):
    data = draw_conversations(scenes[0], "questions", turns=30, all_questions=True)
    for number, sample in enumerate(data.samples):
        scene = scenes[0][number]
        known = {(question.text, question.answer) for question in (*scene.questions, *scene.further)}
        assert len(sample.turns) == len(known) > 1 and set(stripped(sample)) == known


def stripped(sample):
    return [(question.removeprefix("<image>\n"), answer) for question, answer in sample.turns]


# Tokens


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folder of a tokenizer of transformers: bytes, an end of text of its own name, no padding."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return folder


def encoder_for(tokenizer, chat_format=ZEPHYR, image_token_id=None, limit=None):
    return ChatEncoder(tokenizer, chat_format, image_token_id, image_tokens=4, limit=limit)


def words(folder):
    return WordChatTokenizer(
        read_llava(folder / "train.json", folder / "images").vocabulary(), ["<|user|>", "<|assistant|>"]
    )


def test_words_and_marks_come_back_as_they_went():
    tokenizer = open_tokenizer("words", ZEPHYR, vocabulary())
    text = "<|user|>\nIs there a t-shirt?<|endoftext|>\n<|assistant|>\nyes<|endoftext|>"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) == 10 and max(tokens) < len(tokenizer) and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[1:6]) == "is there a t-shirt?"
    assert tokenizer.decode([0, *tokens[8:], *tokens[:4]]) == "yes"  # up to the end
    again = restore_tokenizer(json.loads(json.dumps(tokenizer_settings(tokenizer))))
    assert again(text) == tokenizer(text) and len(again) == len(tokenizer)
    with pytest.raises(ValueError, match=r"no word 'shirtt'.*nearest are .*shirt"):
        tokenizer("a shirtt")
    plain = open_tokenizer("words", CHAT_FORMATS["plain"], ["a"])
    assert plain.decode(plain("In: a\nOut: a<|endoftext|>")["input_ids"]) == "in: a out: a"


def test_tokenizer_of_transformers_is_kept_whole(pretrained):
    tokenizer = open_tokenizer(str(pretrained), ZEPHYR)
    chat_format = chat_format_ending_with("zephyr", tokenizer.eos_token)
    assert (chat_format.answer, chat_format.between) == ("{text}</s>", "\n")
    encoder = encoder_for(tokenizer, chat_format)
    assert encoder.pad_token == tokenizer.eos_token_id  # it has no other
    again = restore_tokenizer(json.loads(json.dumps(tokenizer_settings(tokenizer))))
    example = encoder.encode(Conversation("x", (("Größe?", "três"),)))
    assert torch.equal(
        encoder_for(again, chat_format).encode(Conversation("x", (("Größe?", "três"),)))["labels"], example["labels"]
    )
    assert again.decode(example["labels"][example["labels"] != -100], skip_special_tokens=True) == "três"
    assert (example["labels"] == tokenizer.eos_token_id).sum() == 1


def test_tokenizers_that_cannot_be_used(tmp_path, pretrained):
    with pytest.raises(OSError, match="nowhere"):
        open_tokenizer(str(tmp_path / "nowhere"), ZEPHYR)
    settings = json.loads((pretrained / "tokenizer_config.json").read_text())
    for file in pretrained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    with pytest.raises(ValueError, match="has no end of text"):
        open_tokenizer(str(tmp_path), ZEPHYR)


def test_only_answers_are_learned(folder):
    data = read_llava(folder / "train.json", folder / "images")
    tokenizer = words(folder)
    for token, images in ((None, 0), (-200, 1)):
        example = encoder_for(tokenizer, image_token_id=token).encode(data.samples[0])
        ids, labels = example["input_ids"], example["labels"]
        assert (ids == -200).sum() == images
        learned = labels[labels != -100].tolist()
        end = tokenizer.eos_token_id
        assert learned == [*tokenizer("a boot")["input_ids"], end, *tokenizer("red")["input_ids"], end]
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        prompt = encoder_for(tokenizer, image_token_id=token).encode(data.samples[0], answered=False)
        assert torch.equal(prompt["input_ids"], ids[:-2])


def test_conversations_beyond_the_limit_and_unknown_words(folder, caplog):
    data, tokenizer = read_llava(folder / "train.json", folder / "images"), words(folder)
    sizes = [len(encoder_for(tokenizer).encode(sample)["input_ids"]) for sample in data.samples]
    longest = sizes[0] + 4
    assert longest > max(sizes[1] + 8, sizes[2])
    encoder_for(tokenizer, limit=longest).encode_all(data)
    spliced = encoder_for(tokenizer, image_token_id=-200, limit=longest)
    spliced.encode_all(data)  # a placeholder is replaced by the image: no longer
    with pytest.raises(
        ValueError, match=rf"1 of 3 .*\n.*id one.*{longest} tokens with its images, more than the {longest - 1}"
    ):
        encoder_for(tokenizer, limit=longest - 1).encode_all(data)
    kept, table = encoder_for(tokenizer, limit=longest - 1).encode_all(data, "skip")
    assert len(kept) == len(table.lengths) == 2 and "are left out" in caplog.text
    strange = Conversations((Conversation("row 0", (("zebra?", "a boot"),)), *data.samples), data.images, "here")
    with pytest.raises(ValueError, match=r"1 of 4 conversations in here.*\n.*row 0: .*no word 'zebra'"):
        encoder_for(tokenizer).encode_all(strange)


def test_rows_of_the_table_are_those_of_collate(folder):
    data, encoder = read_llava(folder / "train.json", folder / "images"), encoder_for(words(folder))
    _, table = encoder.encode_all(data)
    examples = [encoder.encode(sample) for sample in data.samples]
    expected = collate([examples[number] for number in (2, 0)], encoder.pad_token)
    batch = table.batch(torch.tensor([2, 0]), encoder.pad_token)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert table.answer_counts().tolist() == [int((each["labels"] != -100).sum()) for each in examples]


# Batches


def many(count=60):
    """Conversations of different lengths, each about an image of its own brightness; every seventh about none."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    samples = [
        Conversation(
            f"row {number}", (("a " * length, "b" if number % 3 else "b b b"),), (number,) if number % 7 else ()
        )
        for number, length in enumerate(lengths)
    ]
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    return Conversations(tuple(samples), images, "memory")


def loader_of(data, batch_size, **options):
    encoder = encoder_for(WordChatTokenizer(["a", "b"], ["<|user|>", "<|assistant|>"]))
    data, table = encoder.encode_all(data)
    return ConversationLoader(data, table, encoder, TRANSFORM, batch_size, **options)


def rows_of(loader, epoch=0, first=0):
    loader.set_epoch(epoch, first)
    return [batch["rows"] for batch in loader]


def test_batches_have_similar_lengths_in_random_order():
    loader = loader_of(many(400), 8, training=True)
    batches = rows_of(loader)
    assert len(batches) == len(loader) == 50 and sorted(itertools.chain(*batches)) == list(range(400))
    lengths = loader.batches.lengths
    waste = sum(8 * int(lengths[rows].max()) - int(lengths[rows].sum()) for rows in batches)
    at_random = sum(8 * int(lengths[rows].max()) - int(lengths[rows].sum()) for rows in torch.arange(400).split(8))
    assert waste < 0.1 * at_random
    longest = [int(lengths[rows].max()) for rows in batches]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_order_is_that_of_seed_and_epoch_and_continues_anywhere():
    loader = loader_of(many(), 4, training=True, seed=3)
    whole = rows_of(loader, epoch=2)
    assert rows_of(loader, epoch=2, first=5) == whole[5:] and rows_of(loader, epoch=1) != whole
    assert rows_of(loader_of(many(), 4, training=True, seed=3), epoch=2) == whole
    assert rows_of(loader_of(many(), 4, training=True, seed=4), epoch=2) != whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_same_batches_and_weigh_all_tokens_alike(world_size):
    data = many()
    alone = loader_of(data, 6, training=True)
    shares = [
        loader_of(data, 6 // world_size, training=True, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(alone)}
    for one, *parts in zip(alone, *shares, strict=True):
        assert one["weight"] == 1
        assert sorted(one["rows"]) == sorted(row for part in parts for row in part["rows"])
        loss = torch.rand(60)  # of a token, by row
        means = [
            part["weight"] * (counts := (part["labels"] != -100).sum(1)).mul(loss[part["rows"]]).sum() / counts.sum()
            for part in parts
        ]
        counts = (one["labels"] != -100).sum(1)
        torch.testing.assert_close(sum(means) / world_size, (counts * loss[one["rows"]]).sum() / counts.sum())


def test_evaluation_has_every_row_once():
    found = [rows_of(loader_of(many(61), 8, rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(row for batches in found for rows in batches for row in rows) == list(range(61))


def test_images_come_with_their_rows(folder):
    for batch in loader_of(many(), 5, training=True):
        assert batch["images"].shape == (5, 1, 3, SIZE, SIZE)
        for row, image, count in zip(batch["rows"], batch["images"][:, 0], batch["image_counts"], strict=True):
            assert count == (row % 7 > 0) and (not count or bool((image == row).all()))
    data = read_llava(folder / "train.json", folder / "images")
    encoder = encoder_for(words(folder))
    for workers in (0, 1):
        _, table = encoder.encode_all(data)
        (batch,) = ConversationLoader(data, table, encoder, TRANSFORM, 3, workers)
        assert batch["images"].shape == (3, 2, 3, SIZE, SIZE)
        assert dict(zip(batch["rows"], batch["image_counts"], strict=True)) == {0: 1, 1: 2, 2: 0}
        of_two = batch["images"][batch["rows"].index(1)]
        assert of_two[0].float().mean((1, 2)).tolist() == [255, 0, 0] and bool((of_two[1] == 100).all())
    text = data.take([2])
    _, table = encoder.encode_all(text)
    (batch,) = ConversationLoader(text, table, encoder, TRANSFORM, 3)
    assert batch["images"].shape[:2] == (1, 0)


def test_too_few_conversations_for_a_batch():
    with pytest.raises(ValueError, match=r"10 training conversations do not fill one batch of 6 on each of 2"):
        loader_of(many(10), 6, training=True, world_size=2)


def test_empty_tables_of_answers():
    table = TokenTable.of([{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, -100])}])
    assert table.answer_counts().tolist() == [0]
