"""Conversations as tokens, and how text and images are arranged in one sequence."""

import pytest
import torch

from zoo.heads.vlm import collate, encode_conversation, padding_token
from zoo.heads.vlm.sequence import arrange

IMAGE = 66  # placeholder


class TestArrange:
    """Tables of positions; text position (b, l) is b * L + l, image positions follow after B * L."""

    def test_images_before_the_text(self):
        ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
        mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
        expected = [[6, 7, 0, 1, -1], [8, 9, 3, 4, 5]]
        assert arrange(ids, mask, 2, 2, None).tolist() == expected
        left = arrange(ids, mask, 2, 2, None, padding_side="left")
        assert left.tolist() == [[-1, 6, 7, 0, 1], [8, 9, 3, 4, 5]]

    def test_images_at_placeholders(self):
        ids = torch.tensor([[IMAGE, 5, IMAGE, 6], [7, IMAGE, 0, 0]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        table = arrange(ids, mask, 3, 2, IMAGE)
        assert table.tolist() == [[8, 9, 1, 10, 11, 3], [4, 12, 13, -1, -1, -1]]

    def test_padding_on_either_side_of_the_text(self):
        ids = torch.tensor([[0, 5, 6], [7, 8, 9]])
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        assert arrange(ids, mask, 0, 0, None).tolist() == [[1, 2, -1], [3, 4, 5]]

    def test_several_images_and_none(self):
        ids = torch.tensor([[5], [6], [7]])
        table = arrange(ids, None, 3, 1, None, image_counts=[2, 0, 1])
        assert table.tolist() == [[3, 4, 0], [1, -1, -1], [5, 2, -1]]

    @pytest.mark.parametrize(
        "ids, images, counts, token, message",
        [
            ([[1, 2]], 1, None, IMAGE, r"no image placeholder \(token 66\) for the 1 images"),
            ([[IMAGE, 2]], 2, None, IMAGE, "2 images do not match 1 image placeholders"),
            ([[IMAGE, 2]], 0, None, IMAGE, "0 images do not match 1 image placeholders"),
            ([[IMAGE, 2], [IMAGE, 3]], 2, [2, 0], IMAGE, r"rows have \[1, 1\] placeholders for \[2, 0\] images"),
            ([[1, 2], [3, 4]], 3, None, None, "3 images for 2 rows: say with image_counts"),
            ([[1, 2], [3, 4]], 2, [2], None, "one number for each of 2 rows and add up to 2"),
            ([[1, 2], [3, 4]], 2, [3, -1], None, "image_counts"),
        ],
    )
    def test_images_that_do_not_match(self, ids, images, counts, token, message):
        with pytest.raises(ValueError, match=message):
            arrange(torch.tensor(ids), None, images, 4, token, counts)

    def test_empty_rows(self):
        with pytest.raises(ValueError, match=r"rows \[1\] hold neither text nor images"):
            arrange(torch.tensor([[1], [2]]), torch.tensor([[1], [0]]), 0, 0, None)


class Tokenizer:
    """Characters as tokens."""

    pad_token_id: int | None = None
    eos_token_id: int | None = 127

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert text and not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


class TestPrompts:
    def test_labels_are_on_answers_only(self):
        example = encode_conversation(Tokenizer(), [("a?", "b"), ("c?", "d")])
        text = "".join(map(chr, example["input_ids"].tolist()))
        assert text == (
            "<|user|>\na?<|endoftext|>\n<|assistant|>\nb<|endoftext|>"
            "\n<|user|>\nc?<|endoftext|>\n<|assistant|>\nd<|endoftext|>"
        )
        labels = example["labels"]
        assert torch.equal(labels[labels != -100], example["input_ids"][labels != -100])
        assert "".join(map(chr, labels[labels != -100].tolist())) == "b<|endoftext|>d<|endoftext|>"

    def test_the_last_answer_may_be_open(self):
        example = encode_conversation(Tokenizer(), [("a?", None)], "plain")
        assert "".join(map(chr, example["input_ids"].tolist())) == "In: a?\nOut: "
        assert bool((example["labels"] == -100).all())
        with pytest.raises(ValueError, match="turn 0 of 2 has no answer"):
            encode_conversation(Tokenizer(), [("a?", None), ("b?", "c")])

    def test_placeholders(self):
        turns = [("<image><image>x{text}", "y")]
        example = encode_conversation(Tokenizer(), turns, "plain", "<image>", 1000)
        ids = example["input_ids"].tolist()
        assert ids[4:6] == [1000, 1000] and "".join(map(chr, ids[6:13])) == "x{text}"
        with pytest.raises(ValueError, match="give both or none"):
            encode_conversation(Tokenizer(), turns, "plain", "<image>")

    def test_unknown_format(self):
        with pytest.raises(ValueError, match="no chat format 'chatml'; there are zephyr, plain"):
            encode_conversation(Tokenizer(), [("a", "b")], "chatml")

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_collate(self, side):
        examples = [
            {
                "input_ids": torch.tensor([1, 2, 3]),
                "labels": torch.tensor([-100, 2, 3]),
                "images": torch.zeros(2, 3, 4, 4),
            },
            {"input_ids": torch.tensor([4]), "labels": torch.tensor([4]), "images": torch.zeros(0, 3, 4, 4)},
        ]
        batch = collate(examples, 9, side)
        rows = {"left": [9, 9, 4], "right": [4, 9, 9]}
        assert batch["input_ids"].tolist() == [[1, 2, 3], rows[side]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(token != 9) for token in rows[side]]]
        assert batch["labels"].tolist() == [[-100, 2, 3], [token if token != 9 else -100 for token in rows[side]]]
        assert batch["images"].shape == (2, 3, 4, 4) and batch["image_counts"].tolist() == [2, 0]

    def test_collate_refuses_unlike_examples(self):
        with pytest.raises(ValueError, match="no examples"):
            collate([], 0)
        with pytest.raises(ValueError, match="same entries"):
            collate([{"input_ids": torch.ones(1)}, {"input_ids": torch.ones(1), "labels": torch.ones(1)}], 0)

    def test_tokenizers_without_padding_token(self):
        tokenizer = Tokenizer()
        assert padding_token(tokenizer) == 127
        tokenizer.pad_token_id = 0
        assert padding_token(tokenizer) == 0
        tokenizer.pad_token_id = tokenizer.eos_token_id = None
        with pytest.raises(
            ValueError, match=r"neither a padding token nor an end-of-text token; set tokenizer\.pad_token"
        ):
            padding_token(tokenizer)
