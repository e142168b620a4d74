"""Conversations about images: streamed text, images read once, states that are kept, batches, and what is refused."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.assistant import Assistant, open_image
from zoo.heads.vlm import CHAT_FORMATS, ChatFormat, encode_conversation
from zoo.vlm import create_vlm, save_state

pytest.importorskip("transformers", reason="needs transformers")

small = runpy.run_path(str(Path(__file__).with_name("small_vlm.py")))
DARK, BRIGHT, KNOWN, picture = (small[name] for name in ("DARK", "BRIGHT", "KNOWN", "picture"))
TOKENIZER = small["byte_tokenizer"]()
(FIRST, FIRST_ANSWER), (SECOND, SECOND_ANSWER) = KNOWN[DARK]


@pytest.fixture(scope="module", params=[False, True], ids=["before the text", "in the text"])
def run(request, tmp_path_factory):
    """Weights of a model that has learned its answers, with images before the text or in it."""
    return small["save_run"](tmp_path_factory.mktemp("vlm"), images_in_text=request.param)


@pytest.fixture
def assistant(run):
    return Assistant.load(run)


@pytest.fixture(scope="module")
def reads():
    """A function that counts how often images were encoded since it was last asked."""

    def watch(assistant):
        counts = []
        assistant.model.vision.register_forward_hook(lambda *_: counts.append(1))

        def count():
            seen = len(counts)
            counts.clear()
            return seen

        return count

    return watch


def said(pieces):
    return "".join(pieces)


def expected(assistant, turns, *images, limit=256):
    """What the model generates for a conversation that is read at once."""
    token = assistant.model.image_token_id
    marks = {} if token is None else {"image_placeholder": "<image>", "image_token_id": token}
    if token is not None and not any("<image>" in question for question, _ in turns):
        turns = [("<image>\n" * len(images) + turns[0][0], turns[0][1]), *turns[1:]]
    ids = encode_conversation(TOKENIZER, turns, assistant.chat_format, **marks)["input_ids"]
    pixels = torch.stack([assistant.transform(image) for image in images]) / 255 if images else None
    counts = [len(images)]
    tokens = assistant.model.generate(ids[None], images=pixels, image_counts=counts, max_new_tokens=limit)
    return TOKENIZER.decode(tokens[0], skip_special_tokens=True)


class TestAnswers:
    def test_stream_batch_and_generate_agree(self, assistant):
        rows = [(picture(color), *turn) for color, turns in KNOWN.items() for turn in turns]
        streamed = []
        for image, question, answer in rows:
            assistant.look(image)
            streamed.append(said(assistant.ask(question)))
            assert streamed[-1] == expected(assistant, [(question, None)], image) == answer
        images, questions, _ = zip(*rows, strict=True)
        for batch_size in (1, 3, 8):
            assert assistant.answer(images, questions, batch_size) == streamed

    def test_pieces_are_whole_characters(self, assistant):
        """Each of these characters is of one to four tokens."""
        assistant.look(picture(DARK))
        assert list(assistant.ask(FIRST)) == list(FIRST_ANSWER)

    def test_a_character_that_is_cut_off(self, assistant):
        assistant.look(picture(DARK))
        pieces = list(assistant.ask(FIRST, max_new_tokens=3))  # G, r, the first of two bytes of ö
        assert pieces == ["G", "r", "\N{REPLACEMENT CHARACTER}"]
        assert assistant.answer([picture(DARK)], [FIRST], max_new_tokens=3) == [said(pieces)]

    def test_drawing(self, assistant):
        drawn = []
        for _ in range(2):
            assistant.look(picture(BRIGHT))
            generator = torch.Generator().manual_seed(3)
            drawn.append(said(assistant.ask("?", 12, temperature=2.0, top_p=0.95, generator=generator)))
        other = torch.Generator().manual_seed(4)
        assert drawn[0] == drawn[1]
        assistant.reset()
        assert said(assistant.ask("?", 12, temperature=2.0, top_p=0.95, generator=other)) != drawn[0]

    def test_several_images_and_none(self, assistant):
        images = [picture(DARK), picture(BRIGHT, (9, 31))]
        assistant.look(images)
        answer = said(assistant.ask(FIRST, 20))
        assert answer == expected(assistant, [(FIRST, None)], *images, limit=20)
        assistant.look([])
        alone = said(assistant.ask(FIRST, 20))
        assert alone == expected(assistant, [(FIRST, None)], limit=20)
        rows = [images, [], [images[1]]]
        answers = assistant.answer(rows, [FIRST] * 3, max_new_tokens=20)
        assert answers[:2] == [answer.strip(), alone.strip()] and answers[2] == KNOWN[BRIGHT][0][1]

    def test_files_and_the_cameras_orientation(self, assistant, tmp_path):
        rng = np.random.default_rng(0)
        upright = Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its left side
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        assert np.array_equal(open_image(tmp_path / "turned.png"), upright)
        assistant.look(tmp_path / "turned.png")
        state = assistant._seen.logits
        assistant.look([upright])
        torch.testing.assert_close(assistant._seen.logits, state)

    def test_attention_and_its_limit(self, tmp_path):
        model, card = small["build"](tmp_path, "llama")
        assistant = Assistant(model, TOKENIZER, ChatFormat(**card.kwargs["chat_format"]), card.preprocessing)
        assistant.look(picture(DARK))
        first = said(assistant.ask("a", 10))
        assert first == expected(assistant, [("a", None)], picture(DARK), limit=10)
        for question, tokens in (("b" * 200, 10), ("b", 130)):
            with pytest.raises(ValueError, match=r"exceed the 150 of this LlamaForCausalLM"):
                assistant.ask(question, tokens)
        second = said(assistant.ask("b", 10))
        assert second == expected(assistant, [("a", first), ("b", None)], picture(DARK), limit=10)
        short, long = "a", "a longer question"
        answers = assistant.answer([picture(DARK)] * 2, [short, long], max_new_tokens=10)
        for question, answer in zip((short, long), answers, strict=True):
            assert answer == expected(assistant, [(question, None)], picture(DARK), limit=10).strip()


class TestConversation:
    def test_it_goes_on_from_the_state(self, assistant, reads):
        count = reads(assistant)
        assistant.look(picture(DARK))
        assert said(assistant.ask(FIRST)) == FIRST_ANSWER
        assert said(assistant.ask(SECOND)) == SECOND_ANSWER
        assert count() == 1
        turns = [(FIRST, FIRST_ANSWER), (SECOND, SECOND_ANSWER), ("And?", None)]
        third = said(assistant.ask("And?", 30))
        assert count() == 0
        assert third == expected(assistant, turns, picture(DARK), limit=30)

    @pytest.mark.parametrize("cut", ["by its length", "by the listener", "unheard"])
    def test_after_an_answer_that_was_cut(self, assistant, cut):
        """What was taken of it is part of the conversation, and ends as answers do."""
        assistant.look(picture(DARK))
        if cut == "by its length":
            taken = said(assistant.ask(FIRST, max_new_tokens=2))
            assert taken == FIRST_ANSWER[:2]
        elif cut == "by the listener":
            pieces = assistant.ask(FIRST)
            taken = next(pieces) + next(pieces)
        else:
            assistant.ask(FIRST)
            taken = ""
        second = said(assistant.ask("x", 30))
        assert second == expected(assistant, [(FIRST, taken), ("x", None)], picture(DARK), limit=30)

    def test_questions_that_share_an_image(self, assistant, reads):
        count = reads(assistant)
        assistant.look(picture(BRIGHT))
        for question, answer in [*KNOWN[BRIGHT], *KNOWN[BRIGHT][::-1]]:
            assistant.reset()
            assert said(assistant.ask(question)) == answer
        assert count() == 1
        images = [picture(DARK)] * 2 + [picture(BRIGHT)] * 2  # two objects
        assistant.model.vision.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
        sizes = []
        assistant.answer(images, [FIRST, SECOND] * 2, batch_size=4, max_new_tokens=1)
        assert sizes == [2]

    def test_conversations_are_apart(self, assistant):
        assistant.look(picture(DARK))
        other = assistant.another()
        other.look(picture(BRIGHT))
        pieces, others = assistant.ask(FIRST), other.ask(KNOWN[BRIGHT][0][0])
        both = [(piece, another) for piece, another in zip(pieces, others, strict=False)]
        assert said(another for _, another in both) == KNOWN[BRIGHT][0][1]
        assert FIRST_ANSWER.startswith(said(piece for piece, _ in both))
        assert other.model is assistant.model

    def test_a_question_that_fails_changes_nothing(self, assistant):
        assistant.look(picture(DARK))
        assert said(assistant.ask(FIRST)) == FIRST_ANSWER
        with pytest.raises(ValueError, match="temperature=-1"):
            assistant.ask(SECOND, temperature=-1)
        with pytest.raises(FileNotFoundError, match=r"no image file at nowhere\.png"):
            assistant.look("nowhere.png")
        assert said(assistant.ask(SECOND)) == SECOND_ANSWER


class TestStates:
    def test_what_was_seen_is_kept(self, assistant, run, tmp_path, reads):
        assistant.look(picture(DARK))
        said(assistant.ask(SECOND))
        assistant.save(tmp_path / "dark.safetensors")
        later = Assistant.load(run)
        count = reads(later)
        later.resume(tmp_path / "dark.safetensors")
        assert later.images == 1
        assert said(later.ask(FIRST)) == FIRST_ANSWER
        assert said(later.ask(SECOND)) == SECOND_ANSWER
        assert count() == 0

    def test_files_that_hold_no_such_state(self, assistant, tmp_path):
        assistant.look([])
        with pytest.raises(ValueError, match="no images whose state could be kept"):
            assistant.save(tmp_path / "none.safetensors")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            assistant.resume(tmp_path / "nowhere.safetensors")
        assistant.look(picture(DARK))
        assistant.save(tmp_path / "whole.safetensors")
        content = (tmp_path / "whole.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(content[:-100])
        save_state(assistant._seen, tmp_path / "unknown.safetensors")
        for name, problem in (("cut", "cut.safetensors"), ("unknown", "images: unknown")):
            with pytest.raises(ValueError, match=problem):
                assistant.resume(tmp_path / f"{name}.safetensors")
        assert said(assistant.ask(FIRST)) == FIRST_ANSWER

    def test_the_state_of_another_model(self, assistant, tmp_path):
        assistant.look(picture(DARK))
        assistant.save(tmp_path / "state.safetensors")
        model, _ = small["build"](tmp_path, "llama")
        other = Assistant(model, TOKENIZER, "zephyr", small["SIDE"])
        with pytest.raises(ValueError, match="state of another decoder"):
            other.resume(tmp_path / "state.safetensors")


class TestPlaceholders:
    def test_images_in_the_text(self, run):
        assistant = Assistant.load(run)
        images = [picture(DARK), picture(BRIGHT)]
        assistant.look(images)
        if assistant.model.image_token_id is None:
            with pytest.raises(ValueError, match="reads images before the text; leave <image> out"):
                assistant.ask("<image>\nWas?")
            return
        text = "a <image> b <image> c"
        answer = said(assistant.ask(text, 20))
        assert answer == expected(assistant, [(text, None)], *images, limit=20)
        assert assistant.answer([images], [text], max_new_tokens=20) == [answer.strip()]
        with pytest.raises(ValueError, match="1 placeholders <image> for 0 images"):
            assistant.ask("<image> again")
        for question in ("<image> Was?", "<image><image><image>"):
            assistant.reset()
            with pytest.raises(ValueError, match=r"has [13] placeholders <image> for 2 images"):
                assistant.ask(question)
            with pytest.raises(ValueError, match=r"has [13] placeholders <image> for 2 images"):
                assistant.answer([images], [question])

    def test_images_of_which_only_the_state_is_there(self, run, tmp_path):
        assistant = Assistant.load(run)
        if assistant.model.image_token_id is None:
            pytest.skip("images come before the text")
        assistant.look(picture(DARK))
        assistant.save(tmp_path / "state.safetensors")
        assistant.resume(tmp_path / "state.safetensors")
        with pytest.raises(ValueError, match="has to be before the question"):
            assistant.ask("Was <image>?")
        assert said(assistant.ask("<image>\nWas?")) == FIRST_ANSWER


class TestRefusals:
    def test_files(self, assistant, tmp_path):
        picture(DARK).save(tmp_path / "good.png")
        picture(DARK, (300, 300)).save(tmp_path / "cut.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
        (tmp_path / "text.png").write_text("no image")
        assistant.look(tmp_path / "good.png")
        with pytest.raises(FileNotFoundError, match=r"no image file at .*absent\.png"):
            assistant.look([tmp_path / "good.png", tmp_path / "absent.png"])
        for name in ("cut.png", "text.png"):
            with pytest.raises(ValueError, match=rf"{name} is not a readable image"):
                assistant.look(tmp_path / name)
            with pytest.raises(ValueError, match=rf"{name} is not a readable image"):
                assistant.answer([tmp_path / name], [FIRST])
        assert said(assistant.ask(FIRST)) == FIRST_ANSWER

    def test_images_and_questions_of_different_number(self, assistant):
        with pytest.raises(ValueError, match="1 images for 2 questions"):
            assistant.answer([picture(DARK)], [FIRST, SECOND])

    def test_parts_that_do_not_fit(self, assistant):
        model = assistant.model
        blind = create_vlm(vision=(), vision_channels=16, connector=model.connector, language=model.language_model)
        with pytest.raises(ValueError, match="no vision encoder"):
            Assistant(blind, TOKENIZER)
        with pytest.raises(ValueError, match="no chat format 'chatml'; there are zephyr, plain"):
            Assistant(model, TOKENIZER, "chatml")
        with pytest.raises(ValueError, match=r"'</answer>', which this .* takes for 9 tokens"):
            Assistant(model, TOKENIZER, ChatFormat("{text}", "{text}</answer>"))
        assert Assistant(model, TOKENIZER, ChatFormat("{text}", "{text}")).stop_tokens == [TOKENIZER.eos_token_id]
        assert Assistant(model, TOKENIZER, "plain").chat_format == CHAT_FORMATS["plain"]

    @pytest.mark.parametrize(
        "name, options, error, message",
        [
            ("runs/nowhere", {}, FileNotFoundError, "no run and no weight file at runs/nowhere"),
            ("nowhere.safetensors", {}, FileNotFoundError, "no weight file at nowhere"),
            ("cobra_4b", {}, ValueError, "'cobra_4b'; did you mean cobra_3b"),
            ("cobra_3b", {}, ValueError, "has to be given its weights"),
            ("cobra_3b", {"checkpoint": "nowhere.pt"}, FileNotFoundError, "nowhere.pt"),
        ],
    )
    def test_models_that_are_not_there(self, name, options, error, message):
        with pytest.raises(error, match=message):
            Assistant.load(name, **options)
