"""A vision-language model learns from the image: pictures belong to their questions and reach the answers."""

import numpy as np
import pytest
import torch

from zoo.config import load_config
from zoo.data.conversation_loader import ConversationLoader
from zoo.data.conversations import Conversation, Conversations, draw_conversations
from zoo.data.scenes import FashionScenes
from zoo.engine.vlm_build import build_vlm, encoder_of
from zoo.engine.vlm_evaluate import Answer, Questions, answer_questions, answer_scores, inputs_of, mean_color

pytest.importorskip("transformers", reason="needs transformers")

SIDE, LAYERS = 32, 2
LANGUAGE = (
    f"{{model_type: mamba2, hidden_size: 64, num_hidden_layers: {LAYERS}, num_heads: 4, head_dim: 32, state_size: 16, "
    "n_groups: 1, tie_word_embeddings: true}"
)


@pytest.fixture(scope="module")
def scenes():
    """Rings and bars instead of photos."""
    y, x = np.mgrid[:28, :28] - 13.5
    shapes = [np.where(np.hypot(x / (1 + k % 3), y / (1 + k // 3)) < 12 - k % 4, 150, 0) for k in range(10)]
    return FashionScenes("train", 200, SIDE, items=(np.array(shapes, np.uint8), np.arange(10)))


@pytest.fixture(scope="module")
def asked(scenes):
    """Sixteen questions, four of each text with four different answers: text alone gets four of them right at most."""
    chosen: dict[tuple[str, str], Conversation] = {}
    drawn = draw_conversations(scenes, "questions")
    for sample in drawn.samples:
        (turn,) = sample.turns
        of_text = [key for key in chosen if key[0] == turn[0]]
        if sample.kind == "corner" and turn not in chosen and len(of_text) < 4:
            chosen[turn] = sample
    assert len(chosen) == 16
    return Conversations(tuple(chosen.values()), drawn.images, drawn.place, drawn.words)


def small_model(data, connector="mamba2_scan_connector", *options):
    config = load_config(
        "vlm/nano_fashion_scenes",
        [
            *("model.name=vim_micro", "model.kwargs={patch_size: 8, embed_dim: 32, depth: 2, d_state: 4}"),
            *(f"model.connector={connector}", f"model.language_kwargs={LANGUAGE}", f"data.img_size={SIDE}"),
            *options,
        ],
    )
    torch.manual_seed(0)
    model, card = build_vlm(config, data)
    return model, encoder_of(model, card)


def learn(model, loader, epochs):
    """One batch an epoch; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameter_groups(5e-3, 0.0), betas=(0.9, 0.98))
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        (batch,) = loader
        loss = model.train()(**inputs_of(batch), labels=batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("in_text", ["true", "false"])
def test_what_is_learned_by_heart_needs_the_image(asked, in_text):
    """All answers are right with the images, and hardly any with a blank one or those of other questions."""
    connector = "model.connector_kwargs={depth: 1, d_state: 16, head_dim: 32}"
    model, encoder = small_model(asked, "mamba2_scan_connector", connector, f"model.images_in_text={in_text}")
    data, table = encoder.encode_all(asked)
    loss = learn(model, ConversationLoader(data, table, encoder, None, 16, training=True), epochs=40)
    assert loss < 0.1
    questions = Questions(data, encoder, 16)

    def scores(images):
        seen = Conversations(data.samples, images, data.place, data.words)
        loader = ConversationLoader(seen, questions.prompts, encoder, None, 7)
        answers = answer_questions(model, loader, questions, encoder, mean_color(data, None))
        return answer_scores(answers, questions.kinds, torch.device("cpu"))

    own = scores(data.images)
    assert own["accuracy"] == 100 and own["blank_accuracy"] <= 25 and own["margin"] >= 75
    of_others = data.images.clone()
    numbers = [sample.images[0] for sample in data.samples]
    of_others[numbers] = data.images[numbers[1:] + numbers[:1]]
    assert scores(of_others)["accuracy"] <= 25


def test_batches_hold_the_scenes_that_are_asked_about(scenes):
    """Images, questions and answers of a training batch are those of one and the same scene."""
    data = draw_conversations(scenes, turns=5)
    _, encoder = small_model(data)
    data, table = encoder.encode_all(data)
    for batch in ConversationLoader(data, table, encoder, None, 50, training=True):
        images = inputs_of(batch)["images"]
        for row, image, ids, labels in zip(batch["rows"], images, batch["input_ids"], batch["labels"], strict=True):
            scene = scenes[int(data.samples[row].name.rpartition("-")[2])]
            assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), scene.image)
            known = {question.text.lower(): question.answer for question in scene.questions}
            known["describe the image."] = scene.caption.lower()
            marks = encoder.tokenizer.marks
            said = "".join(
                f" {encoder.tokenizer.decode([token])}" if token not in marks.values() else "|"
                for token in ids.tolist()
            )
            texts = [text.strip().replace(" ,", ",").replace(" .", ".").replace(" ?", "?") for text in said.split("|")]
            texts = [text for text in texts if text]
            assert all(known[question] == answer for question, answer in zip(texts[::2], texts[1::2], strict=True))
            answered = encoder.tokenizer.decode(labels[labels >= 0].tolist())
            assert answered == texts[1]


def test_every_part_gets_gradients_and_the_decoder_runs_on_our_scan(asked):
    """Counted by torch's profiler: one forward and one backward of SSD for every layer of decoder and connector."""
    model, encoder = small_model(asked, "mlp_connector")
    data, table = encoder.encode_all(asked)
    (batch,) = ConversationLoader(data, table, encoder, None, 16, training=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.train()(**inputs_of(batch), labels=batch["labels"]).loss.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["zoo::ssd"] == calls["zoo::ssd_backward"] == LAYERS
    for name in ("vision", "connector", "language_model"):
        for parameter_name, parameter in getattr(model, name).named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, f"{name}.{parameter_name}"


def test_a_new_decoder_starts_with_the_steps_and_decays_of_mamba2(asked):
    """Steps from 0.001 to 0.1, decays of 1, 2, 3, ...: what is drawn from a normal distribution would forget."""
    model, _ = small_model(asked)
    for layer in model.language_model.backbone.layers:
        steps = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert steps.min() > 0.9e-3 and steps.max() < 0.11
        torch.testing.assert_close(layer.mixer.A_log.exp(), torch.arange(1.0, 5.0))
        assert bool((layer.mixer.D == 1).all())


def test_a_curriculum_begins_with_scenes_of_few_items(scenes):
    data = draw_conversations(scenes)
    _, encoder = small_model(data)
    data, table = encoder.encode_all(data)

    def items(epoch):
        loader = ConversationLoader(data, table, encoder, None, 4, training=True, curriculum=2)
        loader.set_epoch(epoch)
        return [[data.samples[row].difficulty for row in rows] for rows in loader.batches]

    assert all(sample.difficulty == len(scenes[sample.images[0]].labels) for sample in data.samples)
    means = [np.mean(items(epoch)[:50]) for epoch in range(3)]
    assert means[0] < 1.5 < means[1] < means[2] and max(map(max, items(2))) == 6
    first, last = (np.mean(part) for part in np.array_split(np.array(items(0)), 2))
    assert first < last
    assert items(1) == items(1) != items(0)


def test_scores_are_shares_of_right_answers():
    answers = [
        Answer("q", "Red", " red.", "blue", "color", 0),
        Answer("q", "two", "2", "two", "count", 1),
        Answer("q", "one", "one", "one", "count", 2),
        Answer("q", "yes", "no", "no", "", 3),
    ]
    scores = answer_scores(answers, ("color", "count"), torch.device("cpu"))
    expected = dict(accuracy=50, blank_accuracy=50, margin=0, color_accuracy=100, count_accuracy=50)
    assert scores == pytest.approx(expected)
